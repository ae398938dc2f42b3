"""Effects of axes: differences of matched pairs, their interactions, t intervals, and the Pareto front. Imports no torch.

The effect of an axis is the mean of loss(on) - loss(off) over the pairs of variants that differ in that axis alone. The
interaction of two axes is the mean of (on, on) - (off, on) - (on, off) + (off, off) over the groups of four that differ
in those two alone. The grid is not a full factorial, as some axes need others, so no model is fitted. Where a design is
full, both are the coefficients of least squares with switches coded -1/2 and +1/2.
"""
import itertools
import math
import statistics


def t_probability(t, degrees):
    """P(|T| <= t) of Student's t, by its closed form for whole degrees of freedom (Abramowitz & Stegun 26.7.3, 26.7.4)."""
    angle = math.atan2(t, math.sqrt(degrees))
    square, odd = math.cos(angle) ** 2, degrees % 2
    term = total = math.cos(angle) if odd else 1.0
    for k in range(2 + odd, degrees, 2):
        term *= square * (k - 1) / k
        total += term
    if not odd:
        return math.sin(angle) * total
    return 2 / math.pi * (angle + (math.sin(angle) * total if degrees > 1 else 0.0))


def t_quantile(degrees, level=0.95):
    """t with P(|T| <= t) = level, by bisection."""
    low, high = 0.0, 1e5
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if t_probability(middle, degrees) < level else (low, middle)
    return (low + high) / 2


def interval(values, level=0.95):
    """(mean, half width): mean +- t(n - 1) s / sqrt(n), s the standard deviation; (mean, None) of one value."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, None
    return mean, t_quantile(len(values) - 1, level) * statistics.stdev(values) / math.sqrt(len(values))


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
