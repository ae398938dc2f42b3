"""Effects of axes: differences of matched pairs, their interactions, t intervals, and the Pareto front. Imports no torch.

The effect of an axis is the mean of loss(on) - loss(off) over the pairs of variants that differ in that axis alone. The
interaction of two axes is the mean of (on, on) - (off, on) - (on, off) + (off, off) over the groups of four that differ
in those two alone. The grid is not a full factorial, as some axes need others, so no model is fitted. Where a design is
full, both are the coefficients of least squares with switches coded -1/2 and +1/2.
"""
import itertools
import math
import statistics

from reporting.significance import interval


def contrasts(losses, flips):
    """{(the other switches): {seed: contrast}} over all variants that differ only in the axes `flips`.

    losses: {frozenset of the axes that are on: {seed: loss}}. One axis: on - off; two: the difference of differences.
    A contrast uses the seeds that all of its variants have.
    """
    found = {}
    for on in losses:
        rest = on - set(flips)
        corners = [(rest | set(part), (-1) ** (len(flips) - len(part)))
                   for size in range(len(flips) + 1) for part in itertools.combinations(flips, size)]
        if rest in found or not all(corner in losses for corner, _ in corners):
            continue
        seeds = set.intersection(*(set(losses[corner]) for corner, _ in corners))
        if seeds:
            found[rest] = {seed: sum(sign * losses[corner][seed] for corner, sign in corners) for seed in sorted(seeds)}
    return found


def effect(losses, flips):
    """{'axes', 'mean', 'pairs', 'over_pairs', 'seeds', 'over_seeds'}, None where no contrast exists.

    over_pairs: half width of the 95 % t interval over the contrasts, each first averaged over its seeds: how far the mean
    would move with other settings of the other axes. over_seeds: the same over seeds, each first averaged over the
    contrasts that have all seeds: how far it would move with other seeds. None with a single pair or seed.
    """
    found = contrasts(losses, flips)
    if not found:
        return None
    mean, over_pairs = interval([statistics.fmean(by_seed.values()) for by_seed in found.values()])
    most = max(len(by_seed) for by_seed in found.values())
    full = [by_seed for by_seed in found.values() if len(by_seed) == most]
    seeds = sorted(set.intersection(*map(set, full)))
    over_seeds = interval([statistics.fmean(by_seed[seed] for by_seed in full) for seed in seeds])[1] if seeds else None
    return {'axes': tuple(flips), 'mean': mean, 'pairs': len(found), 'over_pairs': over_pairs, 'seeds': len(seeds),
            'over_seeds': over_seeds}


def effects(losses, names):
    """(main effects, two-way interactions) of the axes `names`, those that have a contrast."""
    mains = [effect(losses, (axis,)) for axis in names]
    pairs = [effect(losses, pair) for pair in itertools.combinations(names, 2)]
    return [e for e in mains if e], [e for e in pairs if e]


def pareto(points):
    """Indices of the (cost, loss) points that no other point beats in both, by cost."""
    front, best = [], math.inf
    for index in sorted(range(len(points)), key=lambda i: points[i]):
        if points[index][1] < best:
            front.append(index)
            best = points[index][1]
    return front
