"""The page of runs: what it holds, that texts of runs stay texts, and what it does in a browser."""
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest

import compare
from reporting import comparison, curves, drawing, records, webpage
from tests.reporting.browser import needs_chromium, visit
from variants import UserError

NASTY = '</script><script>window.hacked = 1</script><img src=x onerror="window.hacked = 2">'


def write_run(folder, seed=1, steps=100, every=20, level=2.0, **config):
    """A run's folder without training; the loss falls to `level`."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    (folder / 'config.json').write_text(json.dumps({'seed': seed, 'n_layer': 2, 'linear': {}, **config}))
    (folder / 'env.json').write_text(json.dumps({
        'parameters': 1000 * len(str(config)), 'flops_per_token': 100, 'commit': 'a' * 40, 'torch': '2.13.0', 'cpus': 2,
        'command': ['python', 'train.py', 'config/x.py', f'--seed={seed}']}))
    lines = []
    for step in range(steps + 1):
        loss = level + 2 * np.exp(-step / steps * 8)
        if step % every == 0:
            lines.append({'step': step, 'tokens': 64 * step, 'flops': 300 * 64 * step, 'train_loss': loss,
                          'val_loss': loss + 0.1})
        if step < steps:
            lines.append({'step': step, 'loss': loss + rng.normal(0, 0.02), 'tokens': 64 * (step + 1), 'ms': 10.0,
                          'tokens_per_s': 6400.0})
    (folder / 'log.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    return folder


@pytest.fixture
def folders(tmp_path):
    """Four runs: two seeds of one setting, another structure, and one whose name and settings are HTML."""
    out = tmp_path / 'out'
    return [write_run(out / 'dense-1'), write_run(out / 'dense-2', seed=2), write_run(
        out / 'kron', level=1.8, linear={'h.*.mlp.*': 'kron(8, 8)'}), write_run(out / '<script>x', level=1.9, title=NASTY)]


def runs_of(folders):
    return [records.read_run(str(folder)) for folder in folders]


def page_of(tmp_path, folders, **options):
    path = tmp_path / 'page.html'
    comparison.write(runs_of(folders), str(path), command='python compare.py out/*', **options)
    return path


# ----------------------------------------------------------------------------------------------------
# numbers

@pytest.mark.parametrize('count', [0, 1, 5, 99, 100, 101, 1000, 54321])
def test_a_long_curve_is_cut_into_few_parts_and_keeps_its_beginning(count):
    cuts = curves.edges(count, 100)
    assert cuts[0] == 0 and cuts[-1] == count and (np.diff(cuts) > 0).all() and len(cuts) <= 101
    if count <= 100:
        assert len(cuts) == count + 1
    else:
        assert np.diff(cuts).max() <= -(-2 * count // 100) and (np.diff(cuts)[:3] == 1).all()


def test_thinning_keeps_means_and_picks_true_evaluations():
    xs, ys = {'steps': np.arange(1000.0)}, {0: np.random.default_rng(0).normal(size=1000)}
    few, means = curves.thin(xs, ys, 50)
    sizes = np.diff(curves.edges(1000, 50))
    assert len(sizes) <= 50 and np.isclose((means[0] * sizes).sum(), ys[0].sum())
    assert np.isclose((few['steps'] * sizes).sum(), xs['steps'].sum())
    losses = {1: ys[0], 2: ys[0] + 1}
    at, picked = curves.pick(xs, losses, 50)
    assert len(at['steps']) <= 50 and at['steps'][-1] == 999 and picked[2].min() == losses[2].min()
    assert all(picked[2][i] == losses[2][int(step)] for i, step in enumerate(at['steps']))


def test_numbers_that_json_has_not_are_gaps():
    assert curves.plain(np.array([1.0, np.nan, np.inf, 2.34567891, 1.5e15])) == [1, None, None, 2.34568, 1500000000000000]
    with pytest.raises(ValueError):
        webpage.embedded({'x': np.nan})


def test_axes_of_a_run_that_is_logged_every_tenth_step():
    steps = [{'step': s, 'loss': 1.0, 'ms': 100.0, 'tokens': 64 * (s + 1), 'tokens_per_s': 1.0} for s in range(0, 100, 10)]
    evals = [{'step': 50, 'tokens': 3200, 'flops': 1e6, 'val_loss': 1.0}, {'step': 100, 'tokens': 6400, 'flops': 3e6,
                                                                         'val_loss': 1.0}]
    run = {'env': {'flops_per_token': 7}, 'steps': steps, 'evals': evals}
    xs = curves.xs_of(run, evals)
    assert xs['time'][0] == pytest.approx(5.0, abs=0.2) and list(xs['flops']) == [1e6, 3e6]
    assert curves.flops_at(run, np.array([1600, 4800, 6500])).tolist() == [5e5, 2e6, 3e6 + 2100]
    run['evals'] = [{'step': 50, 'val_loss': 1.0}]      # of an older log: tokens from the steps, FLOPs from the model
    xs = curves.xs_of(run, run['evals'])
    assert xs['tokens'] == pytest.approx(64 * 50, rel=0.01) and xs['flops'] == pytest.approx(21 * 64 * 50, rel=0.01)


def test_runs_that_differ_in_their_seed_alone_look_alike(folders):
    runs = runs_of(folders)
    assert curves.looks_of(runs) == [0, 0, 1, 2] and curves.looks_of(runs[:2]) == [0, 1]
    assert curves.names_of(runs) == ['dense-1', 'dense-2', 'kron', '<script>x'] and curves.names_of(runs[:1]) == ['dense-1']
    assert drawing.labels_of(['dense-1', 'dense-2', 'kron'], [0, 0, 1]) == ['dense (2 seeds)', '', 'kron']


# ----------------------------------------------------------------------------------------------------
# the page

def test_the_page_says_where_it_is_from_and_marks_what_differs(tmp_path, folders):
    text = page_of(tmp_path, folders[:3]).read_text()
    for words in ('python compare.py out/*', 'config/x.py --seed=2', 'commit aaaaaaaaaaaa', 'torch 2.13.0', 'page made 20'):
        assert words in text
    assert re.findall(r'class="words other">([^<]*)<', text) == ['h.*.mlp.*=kron(8,\xa08)']
    assert 'n_layer = 2' in text and 'data-reload="0"' in text


def test_nothing_is_loaded_and_no_other_script_may_run(tmp_path, folders):
    text = page_of(tmp_path, folders).read_text()
    assert re.findall(r'https?://[\w.]+', text) == ['http://www.w3.org'] * 2           # names of SVG and HTML
    assert "default-src 'none'" in text and "script-src 'sha256-" in text and "'unsafe-eval'" not in text
    assert not re.search(r'<link|@import|\ssrc="(?!data:)', text)


def test_texts_of_runs_stay_texts(tmp_path, folders):
    text = page_of(tmp_path, folders).read_text()
    assert NASTY not in text and '<script>x' not in text and '&lt;script&gt;x' in text
    assert re.findall('<script[^>]*>', text) == ['<script type="application/json">', '<script>']
    assert text.count('</script>') == 2 and '<img' not in text


def test_fifty_long_runs_fit_into_five_megabytes(tmp_path, monkeypatch):
    write_run(tmp_path / 'run', steps=4000, every=4)
    run = records.read_run(str(tmp_path / 'run'))
    runs = [{**run, 'folder': f'out/run{i}', 'config': {**run['config'], 'seed': i}} for i in range(50)]
    path = tmp_path / 'page.html'
    comparison.write(runs, str(path), command='python compare.py')
    print(comparison.size(str(path)))
    assert 1e6 < path.stat().st_size < 5e6 and 'at most 500 points' in path.read_text()


def test_markdown_of_our_reports_becomes_tables():
    text = webpage.markdown('### A <b>\n\nwords `x`\n\n| name | loss |\n|---|---|\n| a | 1,234.5 ± 0.1 (n=2) |\n'
                            '| **b** | 2e-3 |', {'a': 3})
    assert '<h3>A &lt;b&gt;</h3>' in text and '<code>x</code>' in text
    assert 'data-row="a" data-look="3"' in text and 'data-value="1234.5"' in text and 'data-value="0.002"' in text
    assert '**' not in text and webpage.leading('-0.5 (x)') == -0.5 and webpage.leading('n/a') == 'n/a'


# ----------------------------------------------------------------------------------------------------
# compare.py

def test_a_half_written_line_is_waited_for(tmp_path, folders):
    whole = page_of(tmp_path, folders).read_text()
    with open(folders[0] / 'log.jsonl', 'a') as file:
        file.write('{"step": 101, "val_lo')
    charts = [re.search('<figure.*</figure>', text)[0] for text in (whole, page_of(tmp_path, folders).read_text())]
    assert charts[0] == charts[1]


def test_watch_goes_on_while_runs_do_and_ends_with_a_quiet_page(tmp_path, folders, monkeypatch, capsys):
    path, late, seen = tmp_path / 'page.html', tmp_path / 'out' / 'late', []

    def sleep(seconds):
        seen.append(path.read_text())
        if len(seen) == 1:
            write_run(late)
            (late / 'log.jsonl').write_text('{"step": 0, "loss": 4.0, "tokens": 64, "tokens_per_s": 9.0, "ms": 1.0}\n{"st')
        else:
            raise KeyboardInterrupt

    monkeypatch.setattr(compare, 'time', SimpleNamespace(sleep=sleep))      # not time.sleep, which subprocess calls too
    compare.watch([str(folders[0]), str(late)], compare.CompareConfig(html=str(path), every=5.0))
    assert all('data-reload="5"' in text for text in seen) and 'data-reload="0"' in path.read_text()
    assert 'late' not in re.search('<tbody>.*?</tbody>', seen[0], re.DOTALL)[0] and 'not there yet' in seen[0]
    assert 'late' in re.search('<tbody>.*?</tbody>', seen[1], re.DOTALL)[0] and 'not there yet' not in seen[1]
    out = capsys.readouterr().out
    assert out.count('| dense-1 |') == 2 and f'written: {path}' in out


def test_pictures_for_a_paper(tmp_path, folders):
    for x, log, smooth in (('steps', '', 0.0), ('time', 'x', 0.1), ('flops', 'xy', 0.0)):
        drawing.draw(runs_of(folders), str(tmp_path / f'{x}.png'), x, log, smooth)
    drawing.draw(runs_of(folders[:1]), str(tmp_path / 'a.pdf'))
    assert (tmp_path / 'a.pdf').read_bytes().startswith(b'%PDF') and (tmp_path / 'time.png').stat().st_size > 5000


@pytest.mark.parametrize('settings, words', [({'png': 'x.jpg'}, '.png'), ({'html': 'page'}, '.html')])
def test_a_file_of_another_kind_is_refused(folders, settings, words):
    with pytest.raises(UserError, match=words):
        compare.compare([str(folders[0])], compare.CompareConfig(**settings))


# ----------------------------------------------------------------------------------------------------
# in a browser

@needs_chromium
def test_switching_sorting_filtering_in_chromium(tmp_path, folders):
    found = visit(page_of(tmp_path, folders), '''
      const svg = document.querySelector("figure svg"), body = document.querySelector("tbody");
      const names = () => [...body.rows].filter(row => !row.hidden).map(row => row.cells[0].textContent);
      const lines = () => svg.querySelectorAll("g > path[stroke-dasharray]").length;
      const title = () => [...svg.querySelectorAll("text:not(.tick)")].map(text => text.textContent);
      const set = (name, value) => {
        const input = document.querySelector(`[name=${name}]`);
        if (input.type === "checkbox") input.checked = value; else input.value = value;
        input.dispatchEvent(new Event("input", { bubbles: true }));
      };
      const out = { first: names(), lines: lines(), title: title(), hacked: window.hacked ?? null };
      const path = () => svg.querySelector("g > path[stroke-dasharray]").getAttribute("d");
      const before = path();
      set("x0", "flops"); out.flops = [title(), path() !== before, location.hash];
      set("logx0", true); set("logy0", true); out.logs = lines();
      set("smooth0", "0.1"); out.smooth = lines(); set("smooth0", "0");
      set("kind1_0", true); out.third = lines(); set("kind1_0", false);
      const head = [...document.querySelectorAll("th button")][1];
      head.click(); out.up = names(); head.click(); out.down = names();
      body.rows[0].querySelector("input").click(); out.without = lines(); body.rows[0].querySelector("input").click();
      set("theme", "dark"); out.dark = getComputedStyle(document.body).backgroundColor;
      set("theme", "light"); out.light = getComputedStyle(document.body).backgroundColor;
      set("kind0_0", false);
      const box = svg.getBoundingClientRect();
      svg.dispatchEvent(new PointerEvent("pointermove", { clientX: box.left + box.width - 20, clientY: box.top + 300 }));
      const tip = document.querySelector(".tip"), place = tip.getBoundingClientRect(), area = svg.getBoundingClientRect();
      out.tip = tip.textContent;
      out.inside = place.top >= area.top - 1 && place.bottom <= area.bottom + 60 && place.right <= innerWidth;
      return out;''')
    assert found['first'] == ['dense-1', 'dense-2', 'kron', '<script>x'] and found['hacked'] is None
    assert found['lines'] == 8 and found['title'] == ['steps', 'loss, nats per token']
    assert found['flops'][0][0] == 'training FLOPs' and found['flops'][2] == '#x0=flops' and found['logs'] == 8
    assert found['smooth'] == 12 and found['third'] == 12 and found['without'] == 6
    assert found['up'][:2] == ['kron', '<script>x'] and found['down'][2:] == ['<script>x', 'kron']
    assert found['dark'] != found['light'] == 'rgb(255, 255, 255)'
    assert 'val loss' in found['tip'] and 'training time, s' in found['tip'] and 'beside it' in found['tip']
    assert found['inside']


@needs_chromium
def test_arrow_keys_read_the_values_that_a_pointer_finds(tmp_path, folders):
    found = visit(page_of(tmp_path, folders), '''
      const svg = document.querySelector("figure svg"), tip = document.querySelector(".tip");
      const press = key => svg.dispatchEvent(new KeyboardEvent("keydown", { key, cancelable: true }));
      const step = () => /steps([0-9]+)/.exec(tip.textContent)?.[1], name = () => tip.querySelector("b")?.textContent;
      document.querySelector("[name=kind0_0]").click();
      svg.focus();
      const out = { focus: document.activeElement === svg, role: tip.getAttribute("role"), before: tip.hidden };
      press("ArrowRight"); out.first = [step(), name()];
      press("ArrowRight"); out.second = [step(), name()];
      out.kept = press("a"); out.taken = press("ArrowLeft"); out.back = [step(), name()];
      out.beside = tip.textContent.includes("beside it");
      const value = () => +/val loss([0-9.]+)/.exec(tip.textContent)[1];
      for (let i = 0; i < 5; i++) press("ArrowUp");
      out.column = [];
      for (let i = 0; i < 5; i++) { out.column.push([name(), value(), step()]); press("ArrowDown"); }
      press("Escape"); out.after = tip.hidden;
      press("ArrowLeft"); out.last = step();
      svg.blur(); out.left = tip.hidden;
      return out;''')
    assert found['focus'] and found['role'] == 'status' and found['before'] and found['after'] and found['left']
    assert found['back'] == found['first'] != found['second'] and found['second'][1] == found['first'][1]
    assert int(found['second'][0]) > int(found['first'][0]) and int(found['last']) >= int(found['second'][0])
    assert found['kept'] and not found['taken'], 'an arrow key moves the page, or another key does not'
    names, values, steps = zip(*found['column'])
    assert found['beside'] and len(set(names)) > 1 and list(values) == sorted(values, reverse=True)
    assert set(steps) == {found['first'][0]}


@needs_chromium
def test_the_address_keeps_the_switches_and_a_phone_is_wide_enough(tmp_path, folders):
    more = [write_run(tmp_path / 'out' / f'more-{i}', seed=i, n_layer=3) for i in (7, 8)]
    found = visit(page_of(tmp_path, folders + more, start={'x': 'time', 'log': 'y', 'smooth': 0.1}), '''
      const rows = [...document.querySelectorAll("tbody tr")];
      return { x: document.querySelector("[name=x0]").value, logy: document.querySelector("[name=logy0]").checked,
               smooth: document.querySelector("[name=smooth0]").value,
               wide: [document.documentElement.scrollWidth, innerWidth],
               rows: rows.filter(row => !row.hidden).map(row => row.cells[0].textContent),
               lines: document.querySelectorAll("figure svg g > path[stroke-dasharray]").length,
               mine: smoothed([0, 1, 2, 5, 9], [3, 1, 2, 8, 1], 2) };''',
                  width=500, where='x0=tokens&filter0=DENSE&sort0=0-&off0=r1')
    assert found['x'] == 'tokens' and found['logy'] and found['smooth'] == '0.1' and found['rows'] == ['dense-2', 'dense-1']
    assert found['lines'] == 3 and found['wide'][0] <= found['wide'][1]
    assert found['mine'] == pytest.approx(drawing.smoothed(np.array([0.0, 1, 2, 5, 9]), np.array([3.0, 1, 2, 8, 1]), 2))


def test_lines_break_in_names_and_not_in_numbers():
    assert webpage.broken('lr=0.1_seed') == 'lr=0.1_<wbr>seed' and webpage.broken('rank + kron') == 'rank +<wbr> kron'
    assert webpage.broken('2.045e+12 *') == '2.045e+12 *' and webpage.broken('grow+v') == 'grow+<wbr>v'
