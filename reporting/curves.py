"""Loss curves of runs: losses against steps, tokens, training FLOPs and time, thinned for a page, or drawn for a paper."""
import math
import os

import numpy as np

from reporting import records

AXES = {'steps': 'steps', 'tokens': 'training tokens', 'flops': 'training FLOPs', 'time': 'training time, s'}
KINDS = [{'label': 'training step', 'width': 1, 'opacity': 0.5, 'smooth': True},
         {'label': 'train loss', 'width': 1.4, 'opacity': 0.8, 'dots': True, 'hollow': True, 'on': False},
         {'label': 'val loss', 'width': 2, 'dots': True}]
POINTS, MOST = 25_000, 1000             # points of all curves of a chart, and of one: 50 runs stay below 3 MB


def column(lines, name):
    return np.array([line.get(name, math.nan) for line in lines], float)


def clock(steps):
    """(steps done, seconds of training until then) from the lines of a log's steps.

    The time of a logged step stands for the steps since the line before it. Evaluation and saving are not counted.
    """
    if not steps:
        return np.zeros(1), np.zeros(1)
    at, ms = column(steps, 'step'), column(steps, 'ms')
    gaps = np.diff(at, prepend=at[0] - 1)
    return np.append(at[0], at + 1), np.append(0.0, np.cumsum(np.nan_to_num(np.maximum(gaps, 0) * ms / 1e3)))


def flops_at(run, tokens):
    """Training FLOPs after so many tokens: in proportion between evaluations, which say it; else 3 x forward x tokens."""
    said = {(line['tokens'], line['flops']) for line in run['evals'] if 'flops' in line and 'tokens' in line}
    at, flops = np.array(sorted({(0, 0), *said}), float).T
    rate = 3 * run['env'].get('flops_per_token', 0)
    return np.interp(tokens, at, flops) + rate * np.maximum(tokens - at[-1], 0)


def xs_of(run, lines):
    """{axis of AXES: its value at each line}."""
    steps, tokens = column(lines, 'step'), column(lines, 'tokens')
    with np.errstate(all='ignore'):                     # of logs with infinite numbers
        if run['steps']:                                # evaluations of older logs do not say their tokens
            before = np.interp(steps, column(run['steps'], 'step') + 1, column(run['steps'], 'tokens'), left=0)
            tokens = np.where(np.isnan(tokens), before, tokens)
        return {'steps': steps, 'tokens': tokens, 'flops': flops_at(run, tokens),
                'time': np.interp(steps, *clock(run['steps']))}


def curves_of(run):
    """The curves of a run, not thinned: [(x values by axis, {index in KINDS: losses})]."""
    steps, evals = run['steps'], run['evals']
    return [(xs_of(run, steps), {0: column(steps, 'loss')}),
            (xs_of(run, evals), {1: column(evals, 'train_loss'), 2: column(evals, 'val_loss')})]


# ----------------------------------------------------------------------------------------------------
# thinning

def edges(count, most):
    """Where to cut a row of `count` values into at most `most` parts: half of the cuts evenly, half by logarithm.

    So that the first steps stay visible on a logarithmic axis, and no part is longer than 2 / most of the whole.
    """
    if count <= most:
        return np.arange(count + 1)
    cuts = np.concatenate([[0], np.linspace(0, count, most // 2 + 1), np.geomspace(1, count, most // 2)])
    return np.unique(np.rint(cuts).astype(int))


def thin(xs, ys, most):
    """(xs, ys) of at most `most` points, each the mean of neighbours."""
    cuts = edges(len(next(iter(xs.values()))), most)

    def means(columns):
        return {name: np.add.reduceat(values, cuts[:-1]) / np.diff(cuts) for name, values in columns.items()}
    return means(xs), means(ys)


def pick(xs, ys, most):
    """(xs, ys) of at most `most` points, which are evaluations as they were: the last of neighbours, and the best of all."""
    count = len(next(iter(xs.values())))
    kept = set(edges(count, most - 1)[1:] - 1)
    if count and not np.isnan(ys[2]).all():
        kept.add(int(np.nanargmin(ys[2])))
    kept = sorted(kept)
    return {name: values[kept] for name, values in xs.items()}, {name: values[kept] for name, values in ys.items()}


def plain(values):
    """Numbers for JSON, with six digits; null for what is no number."""
    short = (float(f'{value:.6g}') if math.isfinite(value) else None for value in map(float, values))
    return [int(value) if value is not None and value == int(value) and abs(value) < 2 ** 53 else value for value in short]


def parts_of(run, most):
    """The curves of a run as the parts of a chart's series."""
    made = [way(*pair, most) for way, pair in zip((thin, pick), curves_of(run)) if len(pair[0]['steps'])]
    return [{'x': {name: plain(values) for name, values in xs.items()},
             'y': {str(kind): plain(values) for kind, values in ys.items()}} for xs, ys in made]


def share(count):
    """Points of one curve where a chart has the curves of `count` runs."""
    return max(20, min(MOST, POINTS // max(count, 1)))


def thinned(runs):
    """A sentence on the thinning of these runs, or ''."""
    most = share(len(runs))
    if max((max(len(run['steps']), len(run['evals'])) for run in runs), default=0) <= most:
        return ''
    return (f'Curves have at most {most} points: of training steps means of neighbours, more of them early in the run; of '
            'evaluations every n-th, with the best and the last.')


def series(runs, names, looks, keys):
    """The series of a chart of runs, and the chart's other settings."""
    made = [{'name': name, 'look': look, 'row': key, 'parts': parts_of(run, share(len(runs)))}
            for run, name, look, key in zip(runs, names, looks, keys)]
    return {'xs': AXES, 'y': 'loss, nats per token', 'kinds': KINDS, 'series': made}


# ----------------------------------------------------------------------------------------------------
# names, groups

def names_of(runs):
    """The folders of the runs without what is common to them all."""
    folders = [os.path.normpath(run['folder']) for run in runs]
    common = os.path.dirname(folders[0]) if len(folders) == 1 else os.path.commonpath(map(os.path.abspath, folders))
    return [os.path.relpath(os.path.abspath(folder), os.path.abspath(common)) for folder in folders]


def looks_of(runs):
    """The look of each run: runs that differ in their seed alone share one, unless all do."""
    groups = records.grouped(runs)
    if len(groups) == 1:
        return list(range(len(runs)))
    return [next(i for i, group in enumerate(groups) if any(run is one for one in group)) for run in runs]
