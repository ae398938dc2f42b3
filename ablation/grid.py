"""A grid: its settings, its runs, and each run's arguments for train.py. Imports no torch."""
import fnmatch
import itertools
import math
import os
import re
from dataclasses import dataclass

import configurator
from commandline import bounds
from configurator import key
from reporting import palette
from variants import UserError, did_you_mean

SEEDS = (1337, 1, 2, 3, 4, 5, 6, 7, 8, 9)
RUNS = 1024                             # of the search, the other seeds not counted


@dataclass
class Grid:
    """Settings of ablate.py."""
    base: str = key('', 'config file that every run starts from')
    out_dir: str = key('', 'folder of all runs; default out/<name of the grid file>')
    variants: dict = key({}, '{name: {setting: value}}: what differs from the base')
    axes: dict = key({}, '{axis: {setting: value}}: every combination is a variant, in place of `variants`')
    needs: dict = key({}, '{axis: [axes]}: on only where one of these is')
    exchange: dict = key({}, '{axis: {spec: spec}}: an axis that puts other specs into `linear`')
    grids: dict = key({}, '{name: {axis: [True or False]}}: parts of the grid, chosen by --axes=NAME')
    part: str = key('', "name of one of `grids`; --axes=NAME says the same; default ''all combinations")
    controls: bool = key(True, 'with axes or ranks: also train the dense base and narrower dense models of equal size')
    equal: str = key('tokens', 'budget of every variant: the same tokens, or the training FLOPs of the dense base',
                     choices=('tokens', 'flops'))
    tasks: dict = key({'': {}}, '{name: {setting: value}}: every variant runs on every task, usually a data set')
    only: dict = key({}, '{variant: [tasks]} for variants that do not run on all')
    pick: str = key('', "names of variants by commas, * for any part (and for a comma): only these run; default '' all")
    search: dict = key({}, '{setting: [values]}: tried on the first seed, the best value kept, for each variant and task')
    every_seed: bool = key(False, 'every value of `search` runs with all seeds, for the plot of losses over the values')
    ranks: dict = key({}, '{name: [lowest, highest]}: searched by optuna; variants hold {name} in their specs')
    budget: float = key(0.0, "ranks: share of the dense base's parameters or FLOPs that a trial may take", low=0)
    budget_of: str = key('parameters', 'what the budget counts', choices=('parameters', 'flops'))
    trials: int = key(20, 'ranks: trials per variant and task', low=1)
    confirm: int = key(3, 'ranks: best trials that run with the other seeds', low=1)
    seeds: int = key(3, 'seeds per variant, with its best setting', low=1)
    jobs: int = key(1, 'runs at a time', low=1)
    threads: int = key(1, 'CPU threads per run', low=1)
    gpus: int = key(0, 'GPUs: every run gets one, by CUDA_VISIBLE_DEVICES; 0 = what train.py chooses', low=0)
    baseline: str = key('', 'the variant that others are compared with; default dense, or the first')
    dry_run: bool = key(False, 'list the runs and stop')
    figures: str = key('png', palette.HELP, choices=palette.KINDS)
    record: str = key('', 'name of a record to write to records/<date>_NAME')
    claim: str = key('loss', "what a record claims; 'none' records runs as they are, fewer than three seeds for example",
                     choices=('loss', 'speed', 'none'))
    title: str = key('', 'title of the record')
    note: str = key('', 'a paragraph for the record: what a reader needs to know')


@dataclass(frozen=True)
class Run:
    """One training run of the grid; `searched` holds its values of Grid.search and Grid.ranks."""
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


def placeholders(settings, ranks):
    """Names of `ranks` that occur as {name} in a variant's specs, in the order of `ranks`."""
    text = ' '.join(str(part) for value in settings.values() for part in
                    (value.values() if isinstance(value, dict) else [value]))
    return [name for name in ranks if '{' + name + '}' in text]


def runs_on(grid, variant, task):
    """Whether a variant runs on a task, by `only` and `pick`."""
    names = [name.strip() for name in grid.pick.split(',') if name.strip()]
    return task in grid.only.get(variant, [task]) and (
        not names or any(fnmatch.fnmatchcase(variant, name) for name in names))


def first_runs(grid):
    """The runs of the search: every variant and task with every value, on the first seed; without optuna's trials."""
    values = [[(name, value) for value in choices] for name, choices in grid.search.items()]
    return [Run(task, variant, searched, SEEDS[0])
            for task in grid.tasks for searched in itertools.product(*values) for variant in grid.variants
            if runs_on(grid, variant, task) and not placeholders(grid.variants[variant], grid.ranks)]


def by_variant(runs):
    groups = {}
    for run in runs:
        groups.setdefault((run.task, run.variant), []).append(run)
    return groups


def with_seeds(run, grid):
    """The same run with the other seeds."""
    return [Run(run.task, run.variant, run.searched, seed) for seed in SEEDS[1:grid.seeds]]


def later_runs(grid, runs, loss_of):
    """The best of each variant's searched values on the other seeds, where all of its runs have ended; or all values.

    loss_of: run -> loss, inf for a run that failed, None for one that has not ended. Nothing where all failed.
    """
    later = []
    for group in by_variant(runs).values():
        losses = {run: loss_of(run) for run in group}
        if grid.every_seed:
            later += [other for run in group for other in with_seeds(run, grid)]
        elif None not in losses.values() and min(losses.values()) < float('inf'):
            later += with_seeds(min(group, key=losses.get), grid)
    return sorted(later, key=lambda run: run.seed)


def argument(name, value):
    """--name=value as train.py reads it; rules become 'pattern=spec; pattern=spec'."""
    if isinstance(value, dict):
        value = '; '.join(f'{pattern}={spec}' for pattern, spec in value.items())
    return f'--{name}={value}'


def filled(value, ranks):
    """A setting with {name} replaced by the values of ranks, in rules too."""
    if isinstance(value, dict):
        return {pattern: filled(spec, ranks) for pattern, spec in value.items()}
    if isinstance(value, str):
        return re.sub(r'\{(\w+)\}', lambda found: str(ranks.get(found[1], found[0])), value)
    return value


def settings_of(run, grid, passed=()):
    """The arguments of train.py that a run adds to the base.

    passed: of the command line. They override the base's and the task's, and are overridden by those of a variant.
    """
    searched = dict(run.searched)
    ranks = {name: searched.pop(name) for name in list(searched) if name in grid.ranks}
    variant = {name: filled(value, ranks) for name, value in grid.variants[run.variant].items()}
    own = {**variant, **searched, 'seed': run.seed}
    return [*(argument(name, value) for name, value in grid.tasks[run.task].items()), *passed,
            *(argument(name, value) for name, value in own.items())]


def run_at(task, variant, name, grid):
    """The run whose folder has this name, or None: 'v=8_learning_rate=0.003_seed=1'."""
    known = [*(n for n in grid.ranks if n in placeholders(grid.variants[variant], grid.ranks)), *grid.search, 'seed']
    found = re.fullmatch('_'.join(f'{re.escape(n)}=(?P<v{i}>.+)' for i, n in enumerate(known)), name)
    if not found:
        return None
    values = {n: found[f'v{i}'] for i, n in enumerate(known)}
    seed = values.pop('seed')
    searched = []
    for n, text in values.items():
        choices = {str(c): c for c in grid.search.get(n, ())}
        if n not in grid.ranks and text not in choices or n in grid.ranks and not text.isdigit():
            return None
        searched.append((n, choices.get(text) if n in grid.search else int(text)))
    return Run(task, variant, tuple(searched), int(seed)) if seed.isdigit() else None


def check(grid):
    """Refuse dicts with invalid values, unknown settings, and names that cannot be folders."""
    inner = {'variants': dict, 'axes': dict, 'tasks': dict, 'exchange': dict, 'grids': dict, 'needs': list, 'only': list,
             'search': list, 'ranks': list}
    for name, kind in inner.items():
        for label, value in getattr(grid, name).items():
            if not isinstance(value, kind) or kind is list and not value:
                raise UserError(f'{name}: {bounds.shown(label)} needs a {kind.__name__}, got {bounds.shown(value)}', name)
            check_name(name, label)
            if name in ('variants', 'axes', 'tasks'):
                check_settings(f'{name}: {label!r}', value, grid.ranks, name)
    if not grid.tasks:
        raise UserError("tasks is empty, so nothing would run; drop it, or name data sets, {'name': {'dataset': 'name'}}",
                        'tasks')
    check_parts(grid)
    if grid.seeds > len(SEEDS):
        raise UserError(f'seeds must be at most {len(SEEDS)}, got {grid.seeds}')
    check_size(grid, len(grid.variants))


def check_name(key, label, what='name'):
    """Refuse a name that becomes a folder and is none; the only task may be ''."""
    fault = '' if label == '' and key in ('tasks', 'only') else bounds.name_fault(label)
    if fault:
        raise UserError(f'{key}: the {what} {bounds.shown(label)} is {fault}; it becomes the name of a folder', key)


def check_settings(where, values, ranks, key):
    """Refuse {setting: value} with a setting or a value that train.py has not; {rank} in a text is filled later."""
    known = configurator.settings(configurator.Config)
    for setting, value in values.items():
        if setting not in known:
            raise UserError(f'{where}: there is no setting {bounds.shown(setting)}{did_you_mean(setting, known)}', key)
        if not any('{' + name + '}' in str(value) for name in ranks):
            try:
                configurator.coerce(known[setting], value)
            except UserError as error:
                raise UserError(f'{where}: {error}', key) from None
        if isinstance(value, dict) and not all(isinstance(word, (str, int,
                                                                 float)) for pair in value.items() for word in pair):
            raise UserError(f'{where}: {setting} takes a text or a number for each pattern, got {bounds.shown(value)}', key)


def check_parts(grid):
    """Refuse lists and dicts within the dicts of a grid that hold other things than names and plain values."""
    for name in ('needs', 'only'):
        for label, names in getattr(grid, name).items():
            if not all(isinstance(other, str) for other in names):
                raise UserError(f'{name}: {label!r} takes a list of names, got {bounds.shown(names)}', name)
    for label, pairs in grid.exchange.items():
        if not all(isinstance(spec, str) for pair in pairs.items() for spec in pair):
            raise UserError(f'exchange: {label!r} takes {{spec: spec}}, got {bounds.shown(pairs)}', 'exchange')
    for label, values in grid.search.items():
        for value in values:
            if not isinstance(value, (str, int, float, type(None))):
                raise UserError(f'search: {label!r} takes plain values, got {bounds.shown(value)}', 'search')
            check_name('search', f'{label}={value}', 'value')
            check_settings(f'search: {label!r}', {label: value}, (), 'search')


def check_size(grid, variants):
    """Refuse more runs than anybody reads, by arithmetic: before any of them is listed."""
    runs = math.prod(map(len, grid.search.values())) * len(grid.tasks) * variants
    if runs > RUNS:
        raise UserError(f'{variants} variants on {len(grid.tasks)} tasks with the values of `search` are {runs} runs; a '
                        f'grid has at most {RUNS}', 'search' if grid.search else 'variants')
