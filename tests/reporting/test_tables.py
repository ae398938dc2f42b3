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


@pytest.mark.parametrize('row', published.TABLES['answers'].rows.values())
def test_what_readme_shows_is_what_the_logs_say(row):
    """Loss, spread, seeds, parameters and interval, from log.jsonl and env.json, which the tables do not read."""
    record = published.TABLES['answers'].record
    folder, found, losses, sizes = ROOT / 'records' / record, Record(ROOT, record), {}, set()
    envs = json.loads((folder / 'env.json').read_text())
    best = {name: f'/{name}/muon_lr={found.cell(name, "muon_lr")}_seed=' for name in (row, 'dense')}
    with open(folder / 'log.jsonl', encoding='utf-8') as file:
        for line in map(json.loads, file):
            for name, run in best.items():
                if run in line['run'] and 'val_loss' in line:
                    losses.setdefault(name, {})[line['run'].split('=')[-1]] = line['val_loss']
                    sizes |= {envs[line['run']]['parameters']} if name == row else set()
    mean, deviation, seeds = found.number(row, 'validation loss')
    assert seeds == len(losses[row]) == len(losses['dense']) == 5 and sizes == {found.number(row, 'parameters')[0]}
    assert mean == pytest.approx(statistics.mean(losses[row].values()), abs=6e-5)
    assert deviation == pytest.approx(statistics.stdev(losses[row].values()), abs=6e-5)
    if row != 'dense':
        apart = [losses[row][seed] - losses['dense'][seed] for seed in losses[row]]
        middle, half = statistics.mean(apart), 2.7764451 * statistics.stdev(apart) / 5 ** 0.5
        assert found.cell(row, '95 % interval') == f'{middle - half:+.4f} to {middle + half:+.4f}'


def test_losses_after_equal_text_in_readme_are_what_the_logs_say():
    """The columns that the first table takes from another record, by their logs."""
    table, seen = published.TABLES['answers'], {}
    of_rows, of_text = table.records(ROOT)
    with open(ROOT / 'records' / of_text.name / 'log.jsonl', encoding='utf-8') as file:
        for line in map(json.loads, file):
            run, _, seed = line['run'].rpartition('_seed=')
            if 'val_loss' in line:
                seen.setdefault(run, {})[seed] = line['val_loss']
    count = 0
    for (_, label), (_, cells) in zip(table.rows.items(), table.cells(of_rows, of_text), strict=True):
        for column, cell in zip(table.columns.values(), cells, strict=True):
            if isinstance(column, published.At) and cell:
                variant = 'low rank, plain steps' if label == 'low rank' else label
                rate = of_text.cell(variant, 'muon_lr', column.part)
                losses = [*seen[f'out/budgets/{column.part}/{variant}/muon_lr={rate}'].values()]
                assert cell == f'{statistics.mean(losses):.4f} ± {statistics.stdev(losses):.4f} (n=3)', (label, column.part)
                count += 1
    assert count == 14
    first, last = (of_text.number('kron, spectron', 'beside the baseline', f'tokens x{times}')[0] for times in (1, 10))
    low, high = map(float, of_text.cell('kron, spectron', '95 % interval', 'tokens x10').split(' to '))
    said = re.sub(r'\s+', ' ', (ROOT / 'README.md').read_text(encoding='utf-8'))
    assert f'gap to it narrows from {first:.3f} to {last:.3f} (95% interval {low:.3f} to {high:+.3f})' in said


def test_perplexities_in_readme_are_those_of_the_record():
    """Every number with one decimal of the paragraph on SmolLM2 is in its table, or the dense model's."""
    text = (ROOT / 'README.md').read_text(encoding='utf-8')
    said = re.findall(r'(?<![\d.])\d+\.\d(?!\d)', text[text.index('Fewer hidden neurons are'):text.index('## Compare')])
    record = Record(ROOT, published.TABLES['smollm2'].record)
    dense = re.search(r'perplexity ([\d.]+) on test', record.text)[1]
    found = {f'{float(value):.1f}' for _, cells in published.TABLES['smollm2'].cells(record) for cell in cells
             for value in re.findall(r'[\d.]+(?:e\+\d+)?', cell)}
    assert len(said) > 5 and set(said) <= found | {f'{float(dense):.1f}'}


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
    path = copied / 'records' / '2026-11-29_scratch' / 'README.md'
    path.write_text(path.read_text().replace('1.7292 ± 0.0055', '1.7294 ± 0.0055'))
    with pytest.raises(SystemExit) as left:
        compare.publish([], compare.TablesConfig(check=True))
    assert left.value.code == 1
    said = capsys.readouterr().out.split('\n')
    assert [line.split(' ')[0] for line in said if line] == ['README.md', 'docs/results.md', 'docs/losses-light.svg',
                                                             'docs/losses-dark.svg']
    assert '1.7294' not in (copied / 'README.md').read_text()
    compare.publish([], compare.TablesConfig())
    assert '1.7294' in (copied / 'README.md').read_text() and pages.stale(copied) == []


def test_words_around_the_tables_stay(copied):
    page = copied / 'README.md'
    page.write_text('Before.\n' + page.read_text().replace('| 1.7292', '| 9.7292') + '\nAfter.\n')
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
    assert figure.LOSS[1] - (lowest[1] - figure.TOP) * scale == pytest.approx(1.6535, abs=2e-4)     # narrow both
    width = figure.WIDTH - figure.LEFT - figure.RIGHT
    span = (figure.SIZES[1] / figure.SIZES[0])
    assert figure.SIZES[0] * span ** ((lowest[0] - figure.LEFT) / width) == pytest.approx(273835, rel=1e-3)
    assert len(circles) == 6 and all(figure.LEFT < x < figure.WIDTH - figure.RIGHT for x, _ in circles)
    assert all(figure.TOP < y < figure.HEIGHT - figure.BOTTOM for _, y in circles)


def test_labels_of_the_figure_do_not_touch():
    high = figure.heights({'a': [(4.1e5, 1.7, 0)], 'b': [(4.2e5, 1.699, 0)], 'c': [(8e5, 1.7, 0)]})
    assert high['a'] == high['c'] == figure.y_of(1.7) and high['b'] == high['a'] + figure.APART
