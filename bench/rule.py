"""Part rule: the plans that the rule takes beside the best of those that `bench.py plans` timed and recorded; no clock.

    python bench.py rule --lists=records/2026-11-22_plans/plans_1.json,records/2026-11-22_plans/plans_2.json
    python bench.py rule --lists=... --by=flops           # the rule of fewest FLOPs, as on a GPU
    python bench.py rule --lists=... --fit=True           # constants for kron/cost.py, and each machine's by the others'

Ratios are times: chosen over best, 1 at best. Lists of one processor are averaged first (geometric mean of each plan), as
two lists of one machine differ by up to a fifth. Without gradients W is kept (KroneckerLinear.merge), as bench.py plans
times it.
"""
import json
import math
import statistics
from dataclasses import dataclass

from bench import Output, tables
from bench.plans import token_counts
from configurator import key
from variants import UserError

WITHIN = 1.10                           # chosen over best that counts as right
ROUNDS = 6000                           # random changes of the constants that a fit tries
MARGIN = 1.07                           # ratios up to this one cost the fit nothing


@dataclass
class Settings(Output):
    """Which timings, and which rule."""
    lists: str = key('', 'files of bench.py plans, by commas')
    tokens: str = key('1,16,512', 'numbers of tokens')
    by: str = key('cost', "'cost' = the rule on a CPU (kron/cost.py), 'flops' = the rule elsewhere",
                  choices=('cost', 'flops'))
    fit: bool = key(False, 'fit the constants of kron/cost.py, and judge each processor by constants of the others')
    worst: int = key(8, 'cells that are printed, the worst first; -1 = all', low=-1)
    seed: int = key(0, 'of the random changes of a fit', low=0)


def check(settings, part):
    """Refuse bad settings before torch is imported; raises UserError."""
    if not settings.lists:
        raise UserError('name files of bench.py plans: --lists=plans.json,...', 'lists')
    token_counts(settings)
    for path in settings.lists.split(','):
        read(path)


def read(path):
    """(machine's words, cells) of a file of bench.py plans."""
    try:
        with open(path, encoding='utf-8') as file:
            found = json.load(file)
        return found.get('processor', 'Intel Xeon'), [c for c in found['cells'] if c['matrix'] and c['ms'] and c['tokens']]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f'{path!r} is no file of python bench.py plans --json=FILE', 'lists') from None


def averaged(paths, tokens):
    """{processor: cells} of all files: the geometric mean of a plan's times over the files of one processor."""
    found = {}
    for path in paths:
        processor, cells = read(path)
        for cell in cells:
            if cell['tokens'] in tokens:
                where = (cell['matrix'], cell['phase'], cell['tokens'])
                found.setdefault(processor, {}).setdefault(where, []).append(cell['ms'])
    return {processor: [{'matrix': where[0], 'phase': where[1], 'tokens': where[2], 'ms': mean(lists)}
                        for where, lists in cells.items()] for processor, cells in found.items()}


def mean(lists):
    """The geometric mean of each plan that all lists have."""
    names = [name for name in lists[0] if name != 'dense' and all(name in ms for ms in lists)]
    return {name: math.exp(statistics.mean(math.log(ms[name]) for ms in lists)) for name in names}


def shape_of(matrix):
    """kron.plan.Shape of '3072x768 by 64x32x1'."""
    from kron.plan import Shape
    (out, inputs), (m, n, terms) = (map(int, half.split('x')) for half in matrix.split(' by '))
    return Shape(m, n, out // m, inputs // n, terms)


def chosen(cell, by):
    """The rule's plan for a cell."""
    import torch

    from kron.cost import ruled
    device, training = torch.device('cpu' if by == 'cost' else 'cuda'), cell['phase'] == 'training'
    return ruled(shape_of(cell['matrix']), cell['tokens'], device, training, not training)


def judged(cell, name):
    """The cell with the chosen plan, the best, and the ratio of their times."""
    ms = cell['ms']
    best = min(ms, key=ms.get)
    return {key: cell[key] for key in ('matrix', 'phase', 'tokens')} | {
        'chosen': name, 'best': best, 'ratio': ms.get(name, math.inf) / ms[best]}


def summary(rows):
    """Per phase and number of tokens: cells, worst and mean ratio, and how many are beyond WITHIN."""
    found = {}
    for row in rows:
        found.setdefault((row['phase'], row['tokens']), []).append(row['ratio'])
    return [{'phase': phase, 'tokens': tokens, 'cells': len(ratios), 'worst': max(ratios), 'mean': statistics.mean(ratios),
             'beyond': sum(ratio > WITHIN for ratio in ratios)} for (phase, tokens), ratios in sorted(found.items())]


# ---------------------------------------------------------------------------------------------------
# the constants

def packed(cells):
    """(counts (cells, plans, constants), ratios (cells, plans)) as tensors; missing plans cost and take infinitely much."""
    import torch

    from kron import cost
    width = max(len(cell['ms']) for cell in cells)
    counts = torch.full((len(cells), width, len(cost.CONSTANTS)), 1e15, dtype=torch.float64)
    ratios = torch.full((len(cells), width), math.inf, dtype=torch.float64)
    for i, cell in enumerate(cells):
        training, shape = cell['phase'] == 'training', shape_of(cell['matrix'])
        for j, (name, ms) in enumerate(cell['ms'].items()):
            counts[i, j] = torch.tensor(cost.counts(name, shape, cell['tokens'], training, not training))
            ratios[i, j] = ms / min(cell['ms'].values())
    return counts, ratios


def loss(constants, counts, ratios):
    """Ratios beyond MARGIN, summed, of the cheapest plan and of the worst of those within 3% of it, and the mean ratio."""
    costs = counts @ constants
    least = costs.min(1, keepdim=True)
    taken = ratios.gather(1, least.indices).flatten()
    near = ratios.masked_fill((costs > 1.03 * least.values) | ratios.isinf(), 0).max(1).values.clamp(max=3)
    return (3 * (taken - MARGIN).clamp(min=0).sum() + (near - MARGIN).clamp(min=0).sum() + 2 * taken.mean()).item()


def fitted(cells, seed):
    """Constants with a low loss: a random walk in their logarithms from those of kron/cost.py; only their ratios count."""
    import torch

    from kron import cost
    (counts, ratios), generator = packed(cells), torch.Generator().manual_seed(seed)
    best = torch.tensor(cost.CONSTANTS, dtype=torch.float64)
    least = loss(best, counts, ratios)
    for i in range(ROUNDS):
        step = torch.randn(len(best), generator=generator, dtype=torch.float64) * (0.3 if i < ROUNDS // 2 else 0.1)
        found = best * (step * (torch.rand(len(best), generator=generator) < 0.5)).exp()
        value = loss(found, counts, ratios)
        if value < least:
            best, least = found, value
    return scaled(best, cells).tolist()


def scaled(constants, cells):
    """The constants times the median of measured seconds over costs."""
    counts, ratios = packed(cells)
    least = counts.new_tensor([min(cell['ms'].values()) * 1e-3 for cell in cells])
    measured = (least[:, None] * ratios / (counts @ constants))[ratios.isfinite()]
    return constants * measured.median()


def crossed(processors, seed):
    """Each processor's cells by constants that were fitted to the others' cells alone."""
    import torch
    found = {}
    for held in processors if len(processors) > 1 else ():
        constants = fitted([cell for name, cells in processors.items() if name != held for cell in cells], seed)
        counts, _ = packed(processors[held])
        picks = (counts @ torch.tensor(constants, dtype=torch.float64)).argmin(1)
        rows = [judged(cell, list(cell['ms'])[i]) for cell, i in zip(processors[held], picks.tolist())]
        found[held] = {'constants': constants, 'summary': summary(rows)}
    return found


def run(settings, part):
    """Judge, and fit where that is wanted."""
    processors = averaged(settings.lists.split(','), token_counts(settings))
    result = {'part': 'rule', 'by': settings.by, 'worst': settings.worst, 'processors': {}}
    for processor, cells in processors.items():
        rows = [judged(cell, chosen(cell, settings.by)) for cell in cells]
        result['processors'][processor] = {'summary': summary(rows), 'cells': rows}
    if settings.fit:
        result['constants'] = fitted([cell for cells in processors.values() for cell in cells], settings.seed)
        result['crossed'] = crossed(processors, settings.seed)
    return result


def text(result):
    """A table per processor, the worst cells, and the constants."""
    parts = []
    for processor, found in result['processors'].items():
        worst = sorted(found['cells'], key=lambda row: -row['ratio'])[:None if result['worst'] < 0 else result['worst']]
        parts += [f'{processor}, the rule by {result["by"]}: time of the chosen plan over the best', table(found['summary'])]
        names = ['matrix', 'phase', 'tokens', 'chosen', 'best']
        parts.append(tables.aligned([[*names, 'ratio']] + [
            [*(str(row[name]) for name in names), f'{row["ratio"]:.2f}'] for row in worst]))
    if 'constants' in result:
        parts.append('fitted CALL, FLOP, MOVED, COPIED, STRIDED: ' + ', '.join(f'{c:.2e}' for c in result['constants']))
    for processor, found in result.get('crossed', {}).items():
        parts += [f'{processor}, by constants of the others', table(found['summary'])]
    return '\n\n'.join(parts)


def table(rows):
    return tables.aligned([['phase', 'tokens', 'cells', 'worst', 'mean', f'beyond {WITHIN:.2f}']] + [
        [*(str(row[k]) for k in ('phase', 'tokens', 'cells')), f'{row["worst"]:.2f}', f'{row["mean"]:.3f}',
         str(row['beyond'])] for row in rows])
