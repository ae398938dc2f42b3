"""Run a grid of variants and compare them: `python ablate.py config/ablation/X.py [--jobs=N] [--seeds=N] [--key=value]`.

A grid file names a base config, variants (changes to it), data sets, and settings to search. Every variant first runs
with every searched value on one seed; the best value then runs with the other seeds. Runs that are done are skipped, so
that the same command goes on after a kill; a variant that fails is named and the others go on. Keys of train.py on
the command line hold for every run. `python ablate.py report DIR` prints the table of what has finished so far;
--record=NAME keeps it, with all logs, in records/<date>_NAME/. `--dry_run=True` lists the runs.
"""
import concurrent.futures
import datetime
import functools
import itertools
import json
import os
import subprocess
import sys
import threading
from dataclasses import dataclass

import compare
import configurator
from configurator import key
from runlog import read_log, write_json
from variants import UserError, did_you_mean

ROOT = os.path.dirname(os.path.abspath(__file__))
SEEDS = (1337, 1, 2, 3, 4, 5, 6, 7, 8, 9)
PRINTING = threading.Lock()


@dataclass
class Grid:
    """Settings of ablate.py."""
    base: str = key('', 'config file that every run starts from')
    out_dir: str = key('', 'folder of all runs; default out/<name of the grid file>')
    variants: dict = key({}, '{name: {setting: value}}: what differs from the base')
    tasks: dict = key({'': {}}, '{name: {setting: value}}: every variant runs on every task, a data set as a rule')
    only: dict = key({}, '{variant: [tasks]} for variants that do not run on all')
    search: dict = key({}, '{setting: [values]}: tried on the first seed, the best value kept, for each variant and task')
    seeds: int = key(3, 'seeds a variant, with its best setting', low=1)
    jobs: int = key(1, 'runs at a time', low=1)
    threads: int = key(1, 'CPU threads a run', low=1)
    baseline: str = key('', 'the variant that others are compared with; default the first')
    dry_run: bool = key(False, 'list the runs and stop')
    record: str = key('', 'name of a record to write to records/<date>_NAME')
    title: str = key('', 'title of the record')
    note: str = key('', 'a paragraph for the record: what a reader must know')


@dataclass(frozen=True)
class Run:
    """One training run of the grid; `searched` holds its values of Grid.search."""
    task: str
    variant: str
    searched: tuple
    seed: int

    def folder(self, grid):
        values = ''.join(f'{name}={value}_' for name, value in self.searched)
        return os.path.join(grid.out_dir, self.task, self.variant, f'{values}seed={self.seed}')

    def __str__(self):
        words = (self.task, self.variant, *(f'{name}={value}' for name, value in self.searched), f'seed={self.seed}')
        return ' '.join(filter(None, words))


# ----------------------------------------------------------------------------------------------------
# the grid

def read(arguments):
    """(grid, settings for every run) of a command line; raises UserError."""
    fields = configurator.settings(Grid)
    passed = [a for a in arguments if a.startswith('--') and a[2:].partition('=')[0] not in fields]
    grid = configurator.load([a for a in arguments if a not in passed], Grid)
    files = [a for a in arguments if not a.startswith('-')]
    if not grid.base or not grid.variants:
        raise UserError(f'{files[0] if files else "ablate.py"}: a grid needs `base` and `variants`; name a file of '
                        'config/ablation/')
    grid.out_dir = grid.out_dir or os.path.join('out', os.path.splitext(os.path.basename(files[0]))[0])
    if grid.seeds > len(SEEDS):
        raise UserError(f'seeds must be at most {len(SEEDS)}, got {grid.seeds}')
    check(grid, passed)
    return grid, passed


def check(grid, passed):
    """Every variant on every task must be a configuration that train.py takes."""
    for name in ('variants', 'tasks', 'only', 'search'):
        inner = list if name in ('only', 'search') else dict
        for label, value in getattr(grid, name).items():
            if not isinstance(value, inner) or inner is list and not value:
                raise UserError(f'{name}: {label!r} needs a {inner.__name__}, got {value!r}', name)
    for label in (*grid.only, *([grid.baseline] if grid.baseline else [])):
        if label not in grid.variants:
            raise UserError(f'there is no variant {label!r}{did_you_mean(label, grid.variants)}', 'only')
    for run in first_runs(grid):
        configurator.load([grid.base, *settings_of(run, grid), *passed])


def first_runs(grid):
    """The runs of the search: every variant and task with every value, on the first seed."""
    values = [[(name, value) for value in choices] for name, choices in grid.search.items()]
    return [Run(task, variant, searched, SEEDS[0])
            for task in grid.tasks for searched in itertools.product(*values) for variant in grid.variants
            if task in grid.only.get(variant, [task])]


def later_runs(grid, runs):
    """The best of each variant's searched values on the other seeds; nothing where all its runs failed."""
    later = []
    for group in by_variant(runs).values():
        losses = {run: loss_of(run, grid) for run in group}
        finished = [run for run in group if losses[run] is not None]
        if finished:
            best = min(finished, key=losses.get)
            later += [Run(best.task, best.variant, best.searched, seed) for seed in SEEDS[1:grid.seeds]]
    return sorted(later, key=lambda run: run.seed)


def by_variant(runs):
    groups = {}
    for run in runs:
        groups.setdefault((run.task, run.variant), []).append(run)
    return groups


def argument(name, value):
    """--name=value as train.py reads it; rules become 'pattern=spec; pattern=spec'."""
    if isinstance(value, dict):
        value = '; '.join(f'{pattern}={spec}' for pattern, spec in value.items())
    return f'--{name}={value}'


def settings_of(run, grid):
    changes = {**grid.tasks[run.task], **grid.variants[run.variant], **dict(run.searched), 'seed': run.seed}
    return [argument(name, value) for name, value in changes.items()]


# ----------------------------------------------------------------------------------------------------
# running

def state_of(folder):
    """('done', its last validation loss), ('started', None) or ('new', None)."""
    try:
        with open(os.path.join(folder, 'config.json'), encoding='utf-8') as file:
            steps = json.load(file)['max_iters']
    except (OSError, ValueError, KeyError):
        return 'new', None
    evaluations = [line for line in read_log(os.path.join(folder, 'log.jsonl')) if 'val_loss' in line]
    if evaluations and evaluations[-1]['step'] >= steps:
        return 'done', evaluations[-1]['val_loss']
    saved = any(name.startswith('ckpt_') and name.endswith('.json') for name in os.listdir(folder))
    return ('started' if saved else 'new'), None


def loss_of(run, grid):
    return state_of(run.folder(grid))[1]


def carry_out(run, grid, passed):
    """Run train.py for one run, unless it is done; returns a sentence when it failed, else None."""
    folder = run.folder(grid)
    state, loss = state_of(folder)
    if state == 'done':
        return say(f'{run}: {loss:.4f} (done before)')
    command = [sys.executable, os.path.join(ROOT, 'train.py'), grid.base, *settings_of(run, grid), *passed,
               f'--out_dir={folder}']
    if state == 'started':
        command.append('--init_from=resume')
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, 'train.log'), 'w+', encoding='utf-8', errors='replace') as log:
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT,
                              env={**os.environ, 'OMP_NUM_THREADS': str(grid.threads)}).returncode
        log.seek(0)
        last = (log.read().strip().splitlines() or ['no output'])[-1]
    state, loss = state_of(folder)
    if code == 0 and state == 'done':
        return say(f'{run}: {loss:.4f}')
    say(f'{run}: failed with exit code {code}: {last[:200]}')
    return f'{run}: {last[:200]}'


def say(text):
    with PRINTING:
        print(text, flush=True)


def carry_out_all(grid, passed):
    """The search, then the other seeds; returns the sentences of those that failed."""
    failures = []
    with concurrent.futures.ThreadPoolExecutor(grid.jobs) as pool:
        first = first_runs(grid)
        failures += pool.map(lambda run: carry_out(run, grid, passed), first)
        failures += pool.map(lambda run: carry_out(run, grid, passed), later_runs(grid, first))
    return [failure for failure in failures if failure]


# ----------------------------------------------------------------------------------------------------
# the report

def find_runs(folder):
    """{(task, variant): {searched: [run of compare.read_run, by seed]}} of all finished runs below a grid's folder."""
    with open(os.path.join(folder, 'grid.json'), encoding='utf-8') as file:
        grid = Grid(**json.load(file))
    grid.out_dir, found = folder, {}
    for (task, variant), group in by_variant(first_runs(grid)).items():
        for first in group:
            runs = [Run(task, variant, first.searched, seed) for seed in SEEDS[:grid.seeds]]
            done = [compare.read_run(run.folder(grid)) for run in runs if state_of(run.folder(grid))[0] == 'done']
            if done:
                found.setdefault((task, variant), {})[first.searched] = done
    return grid, found


def shown(value):
    return f'{value:g}' if isinstance(value, float) else str(value)


def last_losses(runs):
    return [run['evals'][-1]['val_loss'] for run in runs]


def best_of(searched):
    """(values, runs) of the searched values that did best on the first seed."""
    return min(searched.items(), key=lambda item: last_losses(item[1])[0])


def speed(runs):
    """Tokens a second of processor time, the median step of the fastest run: fair on a machine with other work."""
    best = 0.0
    for run in runs:
        steps = sorted(line['cpu_ms'] / (line['ms'] * line['tokens_per_s']) for line in run['steps'][1:] if 'cpu_ms' in line)
        best = max(best, 1 / steps[len(steps) // 2]) if steps else best
    return best


@functools.cache
def cache_bytes(settings):
    """Bytes of generation cache a token, all layers, at full context, or None; settings: a run's, as JSON."""
    import torch

    from model import GPT
    model = GPT(configurator.model_config(json.loads(settings))).eval()
    length, caches = model.config.block_size, [{} for _ in model.transformer.h]
    try:
        with torch.no_grad():
            model(torch.zeros(1, length, dtype=torch.long), caches=caches)
    except UserError:
        return None
    return sum(t.nbytes for cache in caches for t in cache.values() if isinstance(t, torch.Tensor)) / length


def table(grid, found, task):
    """The Markdown table of one task: a row a variant, the difference to the baseline seed by seed."""
    searched = list(grid.search)
    head = ['variant', 'parameters', 'FLOPs a token', 'cache, bytes a token', *searched, 'validation loss',
            'beside the baseline', 'tokens/s of one core']
    lines = [f'| {" | ".join(head)} |', '|---' * len(head) + '|']
    baseline = grid.baseline or next(iter(grid.variants))
    reference = {}
    if (task, baseline) in found:
        reference = {r['config']['seed']: r['evals'][-1]['val_loss'] for r in best_of(found[task, baseline])[1]}
    for (_, variant), choices in ((k, v) for k, v in found.items() if k[0] == task):
        values, runs = best_of(choices)
        differences = [r['evals'][-1]['val_loss'] - reference[r['config']['seed']] for r in runs
                       if r['config']['seed'] in reference]
        env, size = runs[0]['env'], cache_bytes(json.dumps(runs[0]['config']))
        row = [variant, f'{env["parameters"]:,}', f'{env["flops_per_token"]:,}', f'{size:,.0f}' if size else 'none',
               *(shown(value) for _, value in values), compare.spread(last_losses(runs), 4),
               compare.spread(differences, 4) if differences else '', f'{speed(runs):,.0f}']
        lines.append(f'| {" | ".join(row)} |')
    return '\n'.join(lines)


def searched_table(grid, found, task):
    """Every searched value's loss on the first seed, so that a value at the edge of its range shows."""
    choices = list(dict.fromkeys(values for searched in found.values() for values in searched))
    head = ['variant', *(', '.join(f'{name} {shown(value)}' for name, value in values) for values in choices)]
    lines = [f'| {" | ".join(head)} |', '|---' * len(head) + '|']
    for (_, variant), searched in ((k, v) for k, v in found.items() if k[0] == task):
        cells = [f'{last_losses(searched[values])[0]:.4f}' if values in searched else 'failed' for values in choices]
        lines.append(f'| {" | ".join((variant, *cells))} |')
    return '\n'.join(lines)


def report(folder):
    """(grid, found, text of the tables) of what has finished in a grid's folder."""
    try:
        grid, found = find_runs(folder)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f'{folder}: {error}; name the out_dir of a grid') from None
    if not found:
        raise UserError(f'{folder}: no run has finished yet')
    parts = []
    for task in grid.tasks:
        if any(name == task for name, _ in found):
            parts.append((f'## {task}\n\n' if task else '') + table(grid, found, task))
            if grid.search:
                parts.append('The search, on one seed:\n\n' + searched_table(grid, found, task))
    return grid, found, '\n\n'.join(parts)


def write_record(grid, found, text, options):
    """records/<date>_NAME with the tables, the grid, and configuration, machine and log of every run."""
    folder = os.path.join(ROOT, 'records', f'{datetime.date.today()}_{options.record}')
    runs = [run for searched in found.values() for group in searched.values() for run in group]
    compare.write_record(folder, options.title or options.record.replace('_', ' '), options.note, runs, text,
                         [f'    python ablate.py config/ablation/{os.path.basename(os.path.normpath(grid.out_dir))}.py'])
    write_json(os.path.join(folder, 'grid.json'), configurator.as_dict(grid))
    print(f'written to {os.path.relpath(folder)}')


def main_report(arguments):
    """`ablate.py report DIR [--record=NAME --title= --note=]`."""
    if not arguments:
        raise UserError('name the folder of a grid: python ablate.py report DIR')
    options = configurator.load(arguments[1:], Grid)
    grid, found, text = report(arguments[0])
    print(text)
    if options.record:
        write_record(grid, found, text, options)


def main_run(arguments):
    """`ablate.py config/ablation/X.py [--key=value]`; exit code 1 when a run failed."""
    grid, passed = read(arguments)
    runs = first_runs(grid)
    print(f'{len(grid.variants)} variants, {len(runs)} runs to search, then {grid.seeds - 1} more seeds each', flush=True)
    if grid.dry_run:
        print('\n'.join(map(str, runs)))
        return
    os.makedirs(grid.out_dir, exist_ok=True)
    write_json(os.path.join(grid.out_dir, 'grid.json'), configurator.as_dict(grid))
    failures = carry_out_all(grid, passed)
    print(report(grid.out_dir)[2] if find_runs(grid.out_dir)[1] else 'nothing finished')
    if failures:
        print('\n'.join(('failed:', *failures)), file=sys.stderr)
        raise SystemExit(1)


def main():
    reporting = sys.argv[1:2] == ['report']
    try:
        main_report(sys.argv[2:]) if reporting else main_run(sys.argv[1:])
    except UserError as error:
        configurator.say_mistake('ablate.py', error)


if __name__ == '__main__':
    main()
