"""The report of a grid as Markdown."""
import functools
import json

import configurator
from ablation import results
from reporting import records
from reporting.claims import probability
from reporting.significance import paired
from variants import UserError

FORMULA = (
    'The effect of an axis is the mean of loss(on) - loss(off) over all pairs of variants that differ in that axis alone '
    'and are both valid, seed by seed; below 0 it helps. An interaction is the mean of loss(both) - loss(first only) - '
    'loss(second only) + loss(neither) over all fours that differ in those two axes alone: above 0 the two together are '
    'worse than the sum of their effects. Intervals are mean ± t(n - 1; 97.5 %) s / √n. "Over pairs": n pairs (or '
    'fours), each averaged over its seeds; it says how much the effect depends on the other axes. "Over seeds": n seeds, '
    'each averaged over the pairs that have them all. An interval that contains 0 shows nothing; no correction is made for '
    'their number.')


def shown(value):
    return f'{value:g}' if isinstance(value, float) else str(value)


def markdown(head, lines):
    """A Markdown table of a head and rows of texts."""
    return '\n'.join([f'| {" | ".join(head)} |', '|---' * len(head) + '|', *(f'| {" | ".join(row)} |' for row in lines)])


def speed(runs):
    """Tokens per second of CPU time, the median step of the fastest run: fair on a machine with other work."""
    best = 0.0
    for run in runs:
        steps = sorted(line['cpu_ms'] / (line['ms'] * line['tokens_per_s']) for line in run['steps'][1:] if 'cpu_ms' in line)
        best = max(best, 1 / steps[len(steps) // 2]) if steps else best
    return best


@functools.cache
def cache_bytes(settings):
    """Bytes of generation cache per token, all layers, at full context, or None; settings: a run's, as JSON."""
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


def spread(values, digits=4):
    return records.spread(values, digits) if values else ''


def columns(grid, rows):
    """[(head, row -> text, row -> number to sort by)] of the table of one task."""
    axes, searched = list(grid.axes), [*grid.ranks, *grid.search]
    found = [('variant', lambda r: r['variant'], lambda r: r['variant'])]
    found += [(axis, lambda r, a=axis: '' if not r['on'] else 'Y' if r['on'][a] else 'N',
               lambda r, a=axis: -1 if not r['on'] else int(r['on'][a])) for axis in axes]
    found += [(name, lambda r, n=name: shown(r['searched'].get(n, '')), lambda r, n=name: r['searched'].get(n, -1))
              for name in searched]
    found += [('validation loss', lambda r: spread(list(r['losses'].values())), lambda r: r['loss']),
              ('n', lambda r: str(len(r['losses'])), lambda r: len(r['losses'])),
              ('beside the baseline', lambda r: spread(r['beside']), lambda r: mean(r['beside'])),
              ('95 % interval', reach, lambda r: (paired(r['beside'])[1] or '') if any(r['beside']) else ''),
              ('p, paired', lambda r: probability(chance(r)), lambda r: '' if chance(r) is None else chance(r))]
    if any(row['narrow'] for row in rows):
        found += [('beside a narrow dense model', lambda r: f'{spread(r["beside_narrow"])} ({r["narrow"]})' if r['narrow']
                   else '', lambda r: mean(r['beside_narrow']))]
    if any(row['trained'] != row['parameters'] for row in rows):
        found += [('parameters before the finish', lambda r: f'{r["trained"]:,}', lambda r: r['trained'])]
    found += [('parameters', lambda r: f'{r["parameters"]:,}' + ' *' * r['front_parameters'], lambda r: r['parameters']),
              ('training FLOPs', lambda r: f'{r["flops"]:.3e}' + ' *' * r['front_flops'], lambda r: r['flops']),
              ('wall time, s', lambda r: f'{r["seconds"]:.0f}', lambda r: r['seconds'])]
    if not axes and not grid.ranks:
        found += [('FLOPs per token', lambda r: f'{r["runs"][0]["env"]["flops_per_token"]:,}',
                   lambda r: r['runs'][0]['env']['flops_per_token']),
                  ('cache, bytes per token', lambda r: f'{cache_of(r):,.0f}' if cache_of(r) else 'none', cache_of)]
    return [*found, ('tokens/s of one core', lambda r: f'{speed(r["runs"]):,.0f}', lambda r: speed(r['runs']))]


def chance(row):
    """The one-sided p of the paired t test that a row's loss is below the baseline's; None of the baseline itself."""
    return paired(row['beside'])[2] if any(row['beside']) else None


def reach(row):
    """The 95 % interval of the mean difference to the baseline, seed by seed, as text."""
    middle, half, _ = paired(row['beside']) if any(row['beside']) else (0, None, None)
    return '' if half is None else f'{middle - half:+.4f} to {middle + half:+.4f}'


def cache_of(row):
    return cache_bytes(json.dumps(row['runs'][0]['config'])) or 0


def mean(values):
    """The mean to sort by; empty for no values, which sort last."""
    return sum(values) / len(values) if values else ''


def table(grid, rows):
    """The Markdown table of one task: a row per variant; * marks the Pareto front of loss against that column."""
    shape = columns(grid, rows)
    return markdown([head for head, _, _ in shape], [[text(row) for _, text, _ in shape] for row in rows])


def search_heading(grid):
    return f'The search, {"every" if grid.every_seed else "one"} seed'


def searched_table(grid, found, task):
    """Every searched value's loss, on the first seed or on all, so that a value at the edge of its range shows."""
    def cell(losses):
        return spread(losses) if grid.every_seed else f'{losses[0]:.4f}'

    mine = {variant: searched for (t, variant), searched in found.items()
            if t == task and not any(name in dict(values) for values in searched for name in grid.ranks)}
    choices = list(dict.fromkeys(values for searched in mine.values() for values in searched))
    head = ['variant', *(', '.join(f'{name} {shown(value)}' for name, value in values) for values in choices)]
    return markdown(head, [[variant, *(cell(results.last_losses(searched[values])) if values in searched else '-'
                                       for values in choices)] for variant, searched in mine.items()])


def trials_table(grid, found, pruned, task):
    """The trials of a rank search on the first seed, best first; pruned ones with their last loss."""
    trials = [(results.last_losses(runs)[0], variant, values, '') for (t, variant), searched in found.items() if t == task
              for values, runs in searched.items() if any(name in grid.ranks for name, _ in values)]
    trials += [(loss, run.variant, run.searched, 'pruned') for run, _, loss in pruned if run.task == task]
    names = [*grid.ranks, *grid.search]
    return markdown(['variant', *names, 'loss', ''],
                    [[variant, *(shown(dict(values).get(n, '')) for n in names), f'{loss:.4f}', words]
                     for loss, variant, values, words in sorted(trials, key=lambda trial: (trial[3], trial[0]))])


def half(value):
    return '' if value is None else f'± {value:.4f}'


def effect_rows(found):
    return [[' × '.join(e['axes']), f'{e["mean"]:+.4f}', half(e['over_pairs']), str(e['pairs']), half(e['over_seeds']),
             str(e['seeds'])] for e in found]


EFFECT_HEAD = ['axis', 'effect on the loss', '95 % over pairs', 'pairs', '95 % over seeds', 'seeds']


def task_text(grid, found, rows, task, pruned):
    """All tables of one task."""
    parts = [(f'## {task}\n\n' if task else '') + table(grid, rows),
             '\\* on the Pareto front: no row has both a lower loss and less of that column. p: one-sided, of the paired '
             't test that the loss is below the baseline\'s on the same seeds; near 1 it is above; not corrected.']
    mains, pairs = results.effects_of(grid, rows)
    if mains:
        parts += ['### Main effects', markdown(EFFECT_HEAD, effect_rows(mains))]
    if pairs:
        parts += ['### Interactions', markdown(EFFECT_HEAD, effect_rows(pairs))]
    if mains:
        parts.append(FORMULA)
    if grid.ranks:
        parts += ['### Trials of the rank search, one seed', trials_table(grid, found, pruned, task)]
    if grid.search:
        parts += [f'### {search_heading(grid)}', searched_table(grid, found, task)]
    return '\n\n'.join(parts)


def failed_text(failed):
    """The runs that failed, each with the last line it printed."""
    return '\n'.join(['### Failed', '', *(f'- {run}: {words}' for run, words, _ in failed)]) if failed else ''
