"""Tables and figures of README.md and docs/: equal to records/, and records/ equal to the logs that they hold."""
import json
import re
import shutil
import statistics
import xml.etree.ElementTree as ET

import pytest

import compare
from reporting import figure, pages, published, tables
from reporting.tables import Record
from tests.test_setup import ROOT
from variants import UserError


def test_pages_and_figures_are_what_records_give():
    """Else: python compare.py tables."""
    assert pages.stale(ROOT) == []


def test_every_table_is_shown_once_at_least():
    shown = {name for page in pages.pages(ROOT) for name in pages.BLOCK.findall((ROOT / page).read_text(encoding='utf-8'))}
    assert shown == set(published.TABLES)


@pytest.mark.parametrize('record, row, run', [
    ('2026-11-22_where_the_money_is', 'mlp 50%', 'mlp 50%/learning_rate=0.008'),
    ('2026-11-22_where_the_money_is', 'dense', '/dense/learning_rate=0.004'),
    ('2026-11-22_where_the_money_is', 'narrow 50%', 'narrow 50%/learning_rate=0.008'),
    ('2026-11-21_scratch', 'kron', '/kron/learning_rate=0.004'),
    ('2026-11-21_scratch', 'dense', '/dense/learning_rate=0.004'),
    ('2026-11-21_scratch', 'narrow', '/narrow/learning_rate=0.008'),
    ('2026-11-21_scratch', 'low rank', '/low rank/learning_rate=0.004'),
    ('2026-11-21_scratch', 'low rank + kron', '/low rank + kron/learning_rate=0.004'),
    ('2026-11-21_attention', 'linformer', 'shakespeare_char/linformer/learning_rate=0.003'),
    ('2026-11-21_attention', 'llama', 'shakespeare_char/llama/learning_rate=0.001'),
    ('2026-11-21_growth', 'from 1 copy', '/from 1 copy/learning_rate=0.005'),
    ('2026-11-21_growth', 'dense', '/dense/learning_rate=0.005'),
    ('2026-11-21_kron_mlp', 'dense_mlp_1337', 'out/dense_mlp_'),
    ('2026-11-21_kron_mlp', 'kron_mlp_from_dense_1337', 'out/kron_mlp_from_dense_'),
])
def test_what_readme_shows_is_what_the_logs_say(record, row, run):
    """Loss, spread, seeds and parameters, from log.jsonl and env.json, which the tables do not read."""
    column = 'last val loss' if record.endswith('kron_mlp') else 'validation loss'
    folder, last = ROOT / 'records' / record, {}
    with open(folder / 'log.jsonl', encoding='utf-8') as file:
        for line in map(json.loads, file):
            if run in line['run'] and 'val_loss' in line:
                last[line['run']] = line['val_loss']
    losses = list(last.values())
    mean, deviation, seeds = Record(ROOT, record).number(row, column)
    assert seeds == len(losses) == 3
    assert mean == pytest.approx(statistics.mean(losses), abs=6e-5)
    assert deviation == pytest.approx(statistics.stdev(losses), abs=6e-5)
    sizes = {env['parameters'] for name, env in json.loads((folder / 'env.json').read_text()).items() if name in last}
    assert sizes == {Record(ROOT, record).number(row, 'parameters')[0]}


def test_smollm2_in_readme_is_what_its_log_says():
    lines = [json.loads(line) for line in open(ROOT / 'records' / published.Answers.smollm2 / 'log.jsonl',
                                                 encoding='utf-8')]
    healed = [line['healed']['test']['perplexity'] for line in lines if line['kind'] == 'healed' and line['budget'] == '50%'
              and line['variant'] == 'neurons refined']
    dense = next(line for line in lines if line['variant'] == 'dense')
    row = published.Answers().compressed(ROOT)
    assert row[3].split() == ['perplexity', f'{healed[-1]:.1f}'] and row[4] == f'{dense["test"]["perplexity"]:.1f}'


def test_no_page_gives_half_ranges():
    paths = [ROOT / 'README.md', *(ROOT / 'docs').glob('*.md'), *(ROOT / 'records').glob('*/README.md')]
    assert not [str(path) for path in paths if re.search('half (of )?the range', path.read_text(encoding='utf-8'))]


@pytest.fixture
def copied(tmp_path):
    """README.md, docs/ and the READMEs of records/ somewhere else, to be changed."""
    shutil.copy(ROOT / 'README.md', tmp_path)
    shutil.copytree(ROOT / 'docs', tmp_path / 'docs')
    for path in (ROOT / 'records').glob('*/README.md'):
        (tmp_path / 'records' / path.parent.name).mkdir(parents=True)
        shutil.copy(path, tmp_path / 'records' / path.parent.name)
    return tmp_path


def test_a_changed_record_changes_pages_and_figures_and_back(copied, monkeypatch, capsys):
    monkeypatch.setattr(compare, 'ROOT', copied)
    path = copied / 'records' / '2026-11-21_scratch' / 'README.md'
    path.write_text(path.read_text().replace('1.8567 ± 0.0116', '1.7567 ± 0.0116'))
    with pytest.raises(SystemExit) as left:
        compare.publish([], compare.TablesConfig(check=True))
    assert left.value.code == 1
    said = capsys.readouterr().out.split('\n')
    assert [line.split(' ')[0] for line in said if line] == ['README.md', 'docs/results.md', 'docs/losses-light.svg',
                                                             'docs/losses-dark.svg']
    assert '1.757' not in (copied / 'README.md').read_text()
    compare.publish([], compare.TablesConfig())
    assert '1.757' in (copied / 'README.md').read_text() and pages.stale(copied) == []


def test_words_around_the_tables_stay(copied):
    page = copied / 'README.md'
    page.write_text('Before.\n' + page.read_text().replace('| 2.051', '| 9.051') + '\nAfter.\n')
    assert [str(path) for path in pages.write(copied)] == ['README.md']
    assert page.read_text() == 'Before.\n' + (ROOT / 'README.md').read_text() + '\nAfter.\n'


@pytest.mark.parametrize('ask, said', [
    (lambda: pages.block('anwsers', 'README.md', ROOT), "no table 'anwsers'; did you mean 'answers'"),
    (lambda: Record(ROOT, '2026-11-21_scratch').cell('krom', 'parameters'), "no 'krom'; did you mean 'kron'"),
    (lambda: Record(ROOT, '2026-11-21_scratch').cell('kron', 'parameter'), "no 'parameter'; did you mean 'parameters'"),
    (lambda: Record(ROOT, '2026-11-21_scratch').table('elsewhere'), "no table below 'elsewhere'"),
    (lambda: Record(ROOT, 'none'), 'No such file'),
    (lambda: compare.publish(['out'], compare.TablesConfig()), 'takes no folders'),
])
def test_mistakes_are_told_in_one_line(ask, said):
    with pytest.raises(UserError) as error:
        ask()
    assert said in str(error.value).replace(' - ', '; ') or said.split(';')[0] in str(error.value)


def test_cells_are_read():
    found = tables.read_tables('## a\n\n| v | FLOPs a token |\n|---|---|\n| x | 1,5 * |\n\n# b\n\n| w |\n|:-:|\n| y |\n')
    assert found == [('a', {'x': {'v': 'x', 'FLOPs per token': '1,5'}}), ('b', {'y': {'w': 'y'}})]


def test_the_figure_draws_the_records():
    """Positions of the circles, by the inverse of the axes; text that stays inside; the same shapes in both themes."""
    light, dark = (figure.svg(ROOT, theme) for theme in figure.THEMES)
    assert light != dark and re.sub('#[0-9a-f]{6}', '', light) == re.sub('#[0-9a-f]{6}', '', dark)
    assert light == figure.svg(ROOT, 'light')
    circles = [(float(c.get('cx')), float(c.get('cy'))) for c in ET.fromstring(light).iter() if c.tag.endswith('circle')]
    lowest = max(circles, key=lambda place: place[1])
    scale = (figure.LOSS[1] - figure.LOSS[0]) / (figure.HEIGHT - figure.TOP - figure.BOTTOM)
    assert figure.LOSS[1] - (lowest[1] - figure.TOP) * scale == pytest.approx(1.8138, abs=2e-4)     # narrow, equal FLOPs
    width = figure.WIDTH - figure.LEFT - figure.RIGHT
    span = (figure.FLOPS[1] / figure.FLOPS[0])
    assert figure.FLOPS[0] * span ** ((lowest[0] - figure.LEFT) / width) == pytest.approx(3.964e12, rel=1e-3)
    assert len(circles) == 8 and all(figure.LEFT < x < figure.WIDTH - figure.RIGHT for x, _ in circles)
    assert all(figure.TOP < y < figure.HEIGHT - figure.BOTTOM for _, y in circles)
