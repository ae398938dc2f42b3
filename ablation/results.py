"""The finished runs in a grid's folder, as rows: losses over seeds, parameters, training FLOPs, wall-clock time."""
import os
import statistics

import configurator
from ablation import axes, cost
from ablation.effects import effects, pareto
from ablation.grid import SEEDS, Grid, Run, by_variant, check, first_runs, placeholders, run_at
from ablation.runner import evaluations, outcome, state_of
from reporting import records
from reporting.written import read_settings
from variants import UserError


def read_grid(folder, part=''):
    """The grid of a folder; part: only that one of its `grids` and the controls."""
    grid = read_settings(os.path.join(folder, 'grid.json'), Grid, 'name the out_dir of a grid')
    try:
        check(grid)
    except UserError as error:
        raise UserError(f'{folder}/grid.json: {error}') from None
    grid.out_dir = folder
    if part:
        whole, grid.part = set(axes.switches(grid)), part
        axes.check(grid)
        kept = axes.switches(grid)
        grid.variants = {n: s for n, s in grid.variants.items() if n in kept or n not in whole or n == axes.DENSE}
    return grid


def drawn_runs(grid, task, variant):
    """The runs of a rank search, from the names of their folders."""
    folder = os.path.join(grid.out_dir, task, variant)
    names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    runs = [run_at(task, variant, name, grid) for name in names]
    return [run for run in runs if run and run.seed == SEEDS[0]]


def all_firsts(grid):
    """Every possible run of the grid on the first seed, drawn ones included."""
    drawn = [run for task in grid.tasks for variant, settings in grid.variants.items()
             if placeholders(settings, grid.ranks) for run in drawn_runs(grid, task, variant)]
    return first_runs(grid) + drawn


def find_runs(grid):
    """{(task, variant): {searched: [run of records.read_run, by seed]}} of all finished runs, however many seeds."""
    found = {}
    for (task, variant), group in by_variant(all_firsts(grid)).items():
        for first in group:
            folders = [Run(task, variant, first.searched, seed).folder(grid) for seed in SEEDS]
            done = [records.read_run(folder) for folder in folders if state_of(folder)[0] == 'done']
            if done:
                found.setdefault((task, variant), {})[first.searched] = done
    return found


def unfinished(grid, state):
    """[(run, words, loss)] of the runs whose outcome is 'failed' or 'pruned'."""
    found = []
    for first in all_firsts(grid):
        for seed in SEEDS:
            run = Run(first.task, first.variant, first.searched, seed)
            said = outcome(run.folder(grid))
            if said.get('state') == state and state_of(run.folder(grid))[0] != 'done':
                lines = evaluations(run.folder(grid))
                found.append((run, said['words'], lines[-1]['val_loss'] if lines else None))
    return found


def last_losses(runs):
    return [run['evals'][-1]['val_loss'] for run in runs]


def by_seed(runs):
    return {run['config']['seed']: run['evals'][-1]['val_loss'] for run in runs}


def best_of(searched):
    """(values, runs) of the searched values with the lowest mean loss, among those that ran with the most seeds."""
    most = max(len(runs) for runs in searched.values())
    several = {values: runs for values, runs in searched.items() if len(runs) == most}
    return min(several.items(), key=lambda item: statistics.fmean(last_losses(item[1])))


def config_of(run):
    """The Config that a run was trained with."""
    known = configurator.settings(configurator.Config)
    return configurator.Config(**{name: configurator.coerce(known[name], value) for name, value in run['config'].items()
                                  if name in known})


def wall(run):
    """Seconds of the process, imports and validation included; of its steps alone where the process was not timed."""
    timed = outcome(run['folder']).get('seconds')
    return timed or statistics.fmean(line['ms'] for line in run['steps']) * run['config']['max_iters'] / 1e3


def row_of(task, variant, values, runs, on):
    """One row: cost and loss of a variant with its best searched values."""
    losses, spent = by_seed(runs), cost.training_cost(config_of(runs[0]), runs[0]['evals'])
    return {'task': task, 'variant': variant, 'searched': dict(values), 'losses': losses, 'on': on,
            'loss': statistics.fmean(losses.values()), 'runs': runs, **spent,
            'seconds': statistics.fmean(map(wall, runs))}


def rows_of(grid, found, task):
    """The rows of a task, with the difference to the baseline and to the narrow model of the same size, seed by seed."""
    flags = axes.switches(grid) if grid.axes else {}
    rows = [row_of(task, variant, *best_of(searched), flags.get(variant)) for (t, variant), searched in found.items()
            if t == task]
    baseline = grid.baseline or (axes.DENSE if axes.DENSE in grid.variants else next(iter(grid.variants)))
    reference = next((row for row in rows if row['variant'] == baseline), None)
    narrow = sorted((row for row in rows if row['variant'].startswith('narrow ')), key=lambda row: row['parameters'])
    for row in rows:
        row['beside'] = differences(row, reference)
        twin = next((n for n in narrow if n['parameters'] >= row['trained']), None)
        apart = row['variant'] != baseline and row not in narrow
        row['beside_narrow'], row['narrow'] = (differences(row, twin), twin['variant']) if twin and apart else ([], '')
    for cost_name in ('parameters', 'flops'):
        front = pareto([(row[cost_name], row['loss']) for row in rows])
        for index, row in enumerate(rows):
            row[f'front_{cost_name}'] = index in front
    return rows


def differences(row, other):
    """Losses of a row minus another's, on the seeds that both have."""
    if other is None:
        return []
    return [row['losses'][seed] - other['losses'][seed] for seed in row['losses'] if seed in other['losses']]


def effects_of(grid, rows):
    """(main effects, interactions) of a grid with axes; ([], []) of others."""
    losses = {frozenset(axis for axis, value in row['on'].items() if value): row['losses'] for row in rows if row['on']}
    return effects(losses, list(grid.axes)) if grid.axes else ([], [])


