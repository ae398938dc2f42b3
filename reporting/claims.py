"""What a record may claim: rows of runs that are enough, alike and reproducible, or one line that says what is missing.

A row is a list of runs of records.read_run that differ in their seed alone. claim: 'loss', a comparison of last validation
losses; 'speed', of tokens per second; 'none', runs kept as they are, which the record says.
"""
import fnmatch
import os
import re
import statistics

from reporting.hardware import DIFF
from reporting.significance import paired, welch
from variants import UserError

SEEDS = 3                               # per row of a claim, at least
HARDWARE = 'device', 'gpu', 'cpu', 'cpus', 'threads', 'world_size', 'platform'
REMEDY = 'or record the runs without a claim: --claim=none'
HEAD = 'beside the baseline', '95 % interval', 'p, Welch', 'p, paired'
SAID = ('Beside the baseline: {}. Differences are taken seed by seed where both rows have the same seeds (± their standard '
        'deviation, interval mean ± t(n - 1; 97.5 %) s / √n), else of the means (Welch\'s interval). p is one-sided: the '
        'probability of a difference at least so far on the better side if there were none; near 1 the row is worse. No '
        'correction is made for the number of rows.')


def name_of(row):
    """A row's name: its first folder's, without the seed where the row has several runs."""
    first = row[0]
    name = os.path.basename(os.path.normpath(first['folder']))
    seed = first['config'].get('seed')
    return name if len(row) == 1 else re.sub(rf'[\W_]*(seed\W?)?{re.escape(str(seed))}$', '', name) or name


def by_seed(row, value):
    """{seed: value(run)} of a row."""
    return {run['config'].get('seed'): value(run) for run in row}


def last_loss(run):
    return run['evals'][-1]['val_loss']


def speed(run):
    """Median tokens per second of a run's logged steps; 0 where it logged none."""
    return statistics.median([line['tokens_per_s'] for line in run['steps']]) if run['steps'] else 0.0


MEASURES = {'loss': (last_loss, 1, 4), 'none': (last_loss, 1, 4), 'speed': (speed, -1, 0)}  # value, better side, digits


# ----------------------------------------------------------------------------------------------------
# what is missing

def check(rows, claim):
    """Raise UserError, in one line, for rows that cannot back the claim; 'none' asks nothing."""
    if claim == 'none':
        return
    for row in rows:
        check_seeds(row)
        for run in row:
            check_end(run)
            check_code(run)
    check_alike(rows, evaluation, 'their losses do not compare')
    if claim == 'speed':
        check_alike(rows, hardware, 'their speeds do not compare')


def check_seeds(row):
    seeds = [run['config'].get('seed') for run in row]
    twice = next((seed for seed in seeds if seeds.count(seed) > 1), None)
    if twice is not None:
        folders = [run['folder'] for run in row if run['config'].get('seed') == twice]
        raise UserError(f'{name_of(row)}: seed {twice} twice ({folders[0]}, {folders[1]}), which is one draw; leave one '
                        f'out, {REMEDY}', 'claim')
    if len(seeds) < SEEDS:
        raise UserError(f'{name_of(row)}: {len(seeds)} seed{"s" * (len(seeds) > 1)} ({", ".join(map(str, seeds))}); a claim '
                        f'needs {SEEDS} in every row: train more with --seed=N, {REMEDY}', 'claim')


def check_end(run):
    """A run that stopped early has not the loss that its settings give."""
    config, step = run['config'], run['evals'][-1]['step']
    if step < config.get('max_iters', 0) and not last_loss(run) <= config.get('target_val_loss', 0.0):
        raise UserError(f'{run["folder"]}: ended at step {step} of {config["max_iters"]}; resume it, leave it out, {REMEDY}',
                        'claim')


def check_code(run):
    """The commit, and the whole of what differed from it, must be known."""
    env, where = run['env'], run['folder']
    if not env.get('commit'):
        raise UserError(f'{where}: env.json names no commit, so its code is unknown; train in a git clone, '
                        + REMEDY, 'claim')
    diff = env.get('diff')
    if not isinstance(diff, str) or env.get('dirty') and not diff:
        raise UserError(f'{where}: the working tree had uncommitted changes and env.json does not hold them; commit and '
                        f'train again, {REMEDY}', 'claim')
    if len(diff) >= DIFF:
        raise UserError(f'{where}: its uncommitted changes are longer than the {DIFF:,} characters that env.json keeps; '
                        f'commit and train again, {REMEDY}', 'claim')


def evaluation(run):
    """{what a loss is measured on: value}."""
    config = run['config']
    windows = config.get('eval_iters', 0) and config.get('eval_iters', 0) * config.get('batch_size', 0)
    return {'dataset': config.get('dataset'), 'data': run['env'].get('data'), 'block_size': config.get('block_size'),
            'evaluation windows': windows or 'the whole split'}


def hardware(run):
    return {name: run['env'].get(name) for name in HARDWARE}


def check_alike(rows, facts, why):
    """The same facts of all runs; what older runs did not note is not compared."""
    runs = [run for row in rows for run in row]
    for name, wanted in facts(runs[0]).items():
        odd = next((run for run in runs if facts(run)[name] != wanted and None not in (wanted, facts(run)[name])), None)
        if name == 'gpu':                               # None is a CPU
            odd = next((run for run in runs if facts(run)[name] != wanted), None)
        if odd is not None:
            raise UserError(f'{runs[0]["folder"]} has {name} {wanted}, {odd["folder"]} {facts(odd)[name]}: {why}; leave one '
                            f'out, {REMEDY}', 'claim')


# ----------------------------------------------------------------------------------------------------
# the comparison

def matches(row, pattern):
    """How well a row fits a name or pattern: 2 by its name, a folder's or its path's parts; 1 by the name's beginning."""
    names = {name_of(row)}
    for run in row:
        folder = os.path.normpath(run['folder'])
        names |= {folder, *folder.split(os.sep)}
    if any(fnmatch.fnmatchcase(name, pattern) for name in names):
        return 2
    return int(any(name.startswith(pattern) for name in names))


def baseline_of(rows, pattern):
    """The one row that --baseline names; raises UserError for none and for several."""
    fits = [matches(row, pattern) for row in rows]
    found = [row for row, fit in zip(rows, fits) if fit and fit == max(fits)]
    if len(found) != 1:
        names, how = ', '.join(map(name_of, found or rows)), 'several rows' if found else 'none of the rows'
        raise UserError(f'--baseline={pattern} matches {how}: {names}', 'baseline')
    return found[0]


def probability(p):
    return '' if p is None else f'{p:.3f}' if p >= 0.001 else f'{p:.1g}'


def beside(row, other, claim):
    """(cells of HEAD, {seed: difference}) of a row beside another; no differences where the seeds are not the same."""
    measure, side, digits = MEASURES[claim]
    mine, theirs = by_seed(row, measure), by_seed(other, measure)
    mean, half, p = welch([side * v for v in mine.values()], [side * v for v in theirs.values()])
    differences, q, shown = {}, None, f'{side * mean:+,.{digits}f}'
    if mine.keys() == theirs.keys() and len(mine) == len(row) and len(theirs) == len(other):
        differences = {seed: mine[seed] - theirs[seed] for seed in mine}
        mean, half, q = paired([side * d for d in differences.values()])
        if half is not None:
            shown += f' ± {statistics.stdev(differences.values()):,.{digits}f} (n={len(differences)})'
    reach = '' if half is None else ' to '.join(f'{side * mean + sign * half:+,.{digits}f}' for sign in (-1, 1))
    return [shown, reach, probability(p), probability(q)], differences


def comparison(rows, pattern, claim):
    """({id of a row's first run: cells of HEAD}, text below the table) of all rows beside the baseline."""
    base, cells, listed = baseline_of(rows, pattern), {}, []
    digits = MEASURES[claim][2]
    for row in rows:
        found, differences = beside(row, base, claim) if row is not base else (['baseline', '', '', ''], {})
        cells[id(row[0])] = found
        if differences:
            each = ', '.join(f'{value:+,.{digits}f} ({seed})' for seed, value in differences.items())
            listed.append(f'{name_of(row)} minus {name_of(base)} by seed: {each}.')
    name = f'{name_of(base)}, {"tokens per second" if claim == "speed" else "last validation loss"}, n = {len(base)}'
    return cells, '\n\n'.join([SAID.format(name), *listed])


def words(rows, claim):
    """What the record says about itself."""
    least = min(map(len, rows))
    if claim != 'none':
        return f'A claim on {claim}: n = {least} or more in every row, the same data and evaluation' + (
            ', the same hardware.' if claim == 'speed' else '.')
    return f'No claim: n = {least}' + ('.' if least == max(map(len, rows)) else f' to {max(map(len, rows))}.')
