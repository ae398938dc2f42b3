"""The report of a grid as one self-contained HTML page: curves, tables that sort and filter, plots."""
import os

from ablation import results, tables
from reporting import curves, webpage
from reporting.records import SPREAD
from reporting.webpage import Cell, Row

COSTS = {'parameters': 'parameters of the final model', 'flops': 'training FLOPs', 'seconds': 'wall time, s'}
STAR = f'* on the Pareto front: no row has both a lower loss and less of that column. {SPREAD}. Italics: controls.'


def key_of(row):
    """What links a row of the table with its curves."""
    return f'{row["task"]}/{row["variant"]}'


def is_control(grid, row):
    return not row['on'] if grid.axes else row['variant'] == 'dense' or row['variant'].startswith('narrow ')


def main_table(grid, rows):
    shape = tables.columns(grid, rows)
    return webpage.table([name for name, _, _ in shape], [
        Row([Cell(text(row), value(row)) for _, text, value in shape], key_of(row), look, is_control(grid, row))
        for look, row in enumerate(rows)])


def loss_chart(rows):
    """The curves of every run of every row, each with its best searched values."""
    runs = [(run, row, look) for look, row in enumerate(rows) for run in row['runs']]
    names = [f'{row["variant"]} seed={run["config"]["seed"]}' for run, row, _ in runs]
    found = [run for run, _, _ in runs]
    chart = webpage.chart(**curves.series(found, names, [look for _, _, look in runs], [key_of(row) for _, row, _ in runs]))
    note = curves.thinned(found)
    return chart + f'<p class="note">{webpage.text(note)}</p>' * bool(note)


def pareto_chart(grid, rows):
    """Loss against cost: a point per row, with the range over its seeds."""
    points = [{'name': row['variant'], 'look': look, 'row': key_of(row), 'control': is_control(grid, row), 'parts': [{
        'x': {cost: [row[cost]] for cost in COSTS}, 'y': {'0': [row['loss']]},
        'low': [min(row['losses'].values())], 'high': [max(row['losses'].values())],
        'names': [f'{row["variant"]}: {tables.spread(list(row["losses"].values()))}']}]} for look, row in enumerate(rows)]
    return webpage.chart(xs=COSTS, y='validation loss, nats per token', kinds=[{'label': 'mean over seeds', 'dots': True}],
                         series=points, front=True)


def effect_table(found):
    values = [[' × '.join(e['axes']), e['mean'], e['over_pairs'], e['pairs'], e['over_seeds'], e['seeds']] for e in found]
    lines = [[Cell(words, '' if value is None else value) for words, value in zip(*pair)]
             for pair in zip(tables.effect_rows(found), values)]
    return webpage.table(tables.EFFECT_HEAD, list(map(Row, lines)))


def section(grid, found, rows, task, pruned, folder, pictures):
    """Everything of one task."""
    mains, pairs = results.effects_of(grid, rows)
    parts = [f'<h2>{webpage.text(task)}</h2>' if task else '', loss_chart(rows), main_table(grid, rows),
             f'<p class="note">{STAR}</p>',
             '<h3>Loss against cost, with the Pareto front</h3>', pareto_chart(grid, rows)]
    if mains:
        parts += ['<h3>Main effects</h3>', effect_table(mains)]
    if pairs:
        parts += ['<h3>Interactions</h3>', effect_table(pairs)]
    if mains:
        parts.append(f'<p>{webpage.text(tables.FORMULA)}</p>')
    parts += [webpage.picture(os.path.join(folder, name), title) for name, title in pictures]
    if grid.ranks:
        parts += ['<h3>Trials of the rank search, one seed</h3>',
                  webpage.markdown(tables.trials_table(grid, found, pruned, task))]
    if grid.search:
        parts += [f'<h3>{tables.search_heading(grid)}</h3>', webpage.markdown(tables.searched_table(grid, found, task))]
    return '\n'.join(parts)


def page(title, sections, failed, words, runs, commands):
    """The whole page as text; failed: [(run, words, loss)]; runs: all that are reported; commands: that made them."""
    envs = [run['env'] for run in runs]
    intro = f'{webpage.now()} · commit {webpage.unlike(map(webpage.commit, envs))} · {words}'
    return webpage.page(title, intro, [webpage.failures(f'{run}: {said}' for run, said, _ in failed), *sections,
                                       webpage.origin(envs, commands)])
