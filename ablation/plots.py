"""The plots of a report, as PNG: Pareto fronts, losses over seeds, effects with intervals, trials of a rank search."""
import os
import statistics

import matplotlib

matplotlib.use('Agg')
from matplotlib import pyplot as plt

from ablation import results
from ablation.effects import pareto

BLUE, RED, GREY, ORANGE = '#1f6fb4', '#c0392b', '#8a8a8a', '#d98324'
COSTS = {'parameters': 'parameters of the final model', 'flops': 'training FLOPs'}


def save(figure, folder, name):
    """Write folder/name and return it; closes the figure, which matplotlib would keep."""
    figure.savefig(os.path.join(folder, name), dpi=110)
    plt.close(figure)
    return name


def is_control(row):
    return row['variant'] == 'dense' or row['variant'].startswith('narrow ')


def front(rows, cost, title, folder, name):
    """Loss against a cost: every row a dot with its range over seeds, the front as steps, its rows by name."""
    figure, axes = plt.subplots(figsize=(11, 5.5), layout='constrained')
    for control, colour, words in ((False, BLUE, 'variants'), (True, RED, 'controls: dense, narrow')):
        chosen = [row for row in rows if is_control(row) == control]
        if chosen:
            errors = [[row['loss'] - min(row['losses'].values()) for row in chosen],
                      [max(row['losses'].values()) - row['loss'] for row in chosen]]
            axes.errorbar([r[cost] for r in chosen], [r['loss'] for r in chosen], yerr=errors, fmt='o', ms=5, lw=0.8,
                          color=colour, alpha=0.75, label=words)
    best = [rows[i] for i in pareto([(row[cost], row['loss']) for row in rows])]
    axes.step([r[cost] for r in best], [r['loss'] for r in best], where='post', color='black', lw=1, label='Pareto front')
    for i, row in enumerate(best, 1):                   # by number: names next to the dots would overlap
        axes.annotate(str(i), (row[cost], row['loss']), xytext=(-9, -11), textcoords='offset points', fontsize=9)
        axes.plot([], [], ' ', label=f'{i}  {row["variant"]}')
    axes.set(xlabel=COSTS[cost], ylabel='validation loss, nats per token', title=title)
    axes.grid(alpha=0.25)
    figure.legend(fontsize=8, loc='outside right upper')
    return save(figure, folder, name)


def losses(rows, title, folder, name):
    """All rows by loss: a tick per seed, a dot for the mean."""
    ordered = sorted(rows, key=lambda row: -row['loss'])
    figure, axes = plt.subplots(figsize=(8, 1.2 + 0.19 * len(ordered)), layout='constrained')
    for place, row in enumerate(ordered):
        colour = RED if is_control(row) else BLUE
        axes.plot(list(row['losses'].values()), [place] * len(row['losses']), '|', color=colour, ms=7)
        axes.plot(row['loss'], place, 'o', color=colour, ms=4)
    axes.set_yticks(range(len(ordered)), [row['variant'] for row in ordered], fontsize=7)
    axes.set_ylim(-0.8, len(ordered) - 0.2)
    axes.set(xlabel='validation loss, nats per token (dot: mean, tick: one seed; red: controls)', title=title)
    axes.grid(axis='x', alpha=0.25)
    return save(figure, folder, name)


def effect_plot(found, title, folder, name):
    """Effects with both intervals; black over pairs, orange over seeds."""
    ordered = list(reversed(found))
    figure, axes = plt.subplots(figsize=(8, 1.3 + 0.3 * len(ordered)), layout='constrained')
    for key, colour, width, shift, words in (('over_pairs', BLUE, 2.2, 0.12, '95 % over pairs'),
                                             ('over_seeds', ORANGE, 1.4, -0.12, '95 % over seeds')):
        known = [(e, place) for place, e in enumerate(ordered) if e[key] is not None]
        if known:
            axes.errorbar([e['mean'] for e, _ in known], [place + shift for _, place in known],
                          xerr=[e[key] for e, _ in known], fmt='none', color=colour, lw=width, capsize=2, label=words)
    axes.plot([e['mean'] for e in ordered], range(len(ordered)), 'ko', ms=4)
    axes.axvline(0, color='black', lw=0.8)
    axes.set_yticks(range(len(ordered)), [' × '.join(e['axes']) for e in ordered], fontsize=8)
    axes.set_ylim(-0.7, len(ordered) - 0.3)
    reach = max(abs(e['mean']) for e in ordered)        # an interval over two seeds may be 13 deviations wide
    wide = max([abs(e['mean']) + (e['over_pairs'] or 0) for e in ordered] + [1.3 * reach, 1e-4])
    axes.set_xlim(-1.08 * wide, 1.08 * wide)
    axes.set(xlabel='effect on the validation loss, nats per token (left of 0: it helps)', title=title)
    axes.grid(axis='x', alpha=0.25)
    if any(e['over_pairs'] is not None or e['over_seeds'] is not None for e in found):
        axes.legend(fontsize=8)
    return save(figure, folder, name)


def trial_plot(grid, found, pruned, task, folder, name):
    """A rank search: loss against each rank, pruned trials hollow, one colour per variant."""
    count = len(grid.ranks)
    figure, panels = plt.subplots(1, count, figsize=(4.2 * count, 3.8), squeeze=False, layout='constrained')
    done = [(variant, dict(values), results.last_losses(runs)[0]) for (t, variant), searched in found.items() if t == task
            for values, runs in searched.items()]
    cut = [(run.variant, dict(run.searched), loss) for run, _, loss in pruned if run.task == task and loss is not None]
    colours = {variant: f'C{i}' for i, variant in enumerate(dict.fromkeys(v for v, _, _ in done + cut))}
    for axes, rank in zip(panels[0], grid.ranks):
        for variant in (v for v in colours if any(v == other and rank in values for other, values, _ in done + cut)):
            for group, style in ((done, {}), (cut, {'mfc': 'none'})):
                mine = [(values[rank], loss) for v, values, loss in group if v == variant and rank in values]
                axes.plot([x for x, _ in mine], [y for _, y in mine], 'o', ms=5, color=colours[variant],
                          label=variant + ' (pruned)' * bool(style) if mine else None, **style)
        axes.set_xscale('log', base=2)
        axes.xaxis.set_major_formatter('{x:g}')                 # 16, not 2 to the 4th
        axes.set(xlabel=f'{rank}', ylabel='validation loss')
        axes.grid(alpha=0.25)
        if axes.lines:
            axes.legend(fontsize=7)
    return save(figure, folder, name)


def search_plot(found, setting, task, folder, name):
    """Loss against a searched setting: a line per variant through the means over seeds, with their range.

    The colour is the variant's name but for its last word, the line's style that word.
    """
    figure, axes = plt.subplots(figsize=(9, 5), layout='constrained')
    names = [variant for t, variant in found if t == task]
    parts = {name: (name.rpartition(' ')[0] or name, name.rpartition(' ')[2]) for name in names}
    colours, styles = ({part: i for i, part in enumerate(dict.fromkeys(parts[n][k] for n in names))} for k in (0, 1))
    for variant in names:
        by_value = {}
        for values, runs in found[task, variant].items():
            by_value.setdefault(dict(values)[setting], []).extend(results.last_losses(runs))
        xs = sorted(by_value)
        means = [statistics.fmean(by_value[x]) for x in xs]
        spread = [[m - min(by_value[x]) for x, m in zip(xs, means)], [max(by_value[x]) - m for x, m in zip(xs, means)]]
        colour, style = colours[parts[variant][0]], styles[parts[variant][1]]
        axes.errorbar(xs, means, yerr=spread, color=f'C{colour % 10}', ls=('-', '--', ':', '-.')[style % 4], marker='o',
                      ms=4, lw=1.2, capsize=2, label=variant)
    axes.set_xscale('log', base=2)
    axes.xaxis.set_major_formatter('{x:g}')
    axes.set(xlabel=setting, ylabel='validation loss, nats per token (mean and range of the seeds)')
    axes.grid(alpha=0.25)
    figure.legend(fontsize=8, loc='outside right upper')
    return save(figure, folder, name)


def draw(grid, found, rows, task, pruned, folder):
    """All plots of a task: [(file name, title)]."""
    prefix, words = (f'{task}_', f'{task}: ') if len(grid.tasks) > 1 else ('', '')
    made = [(front(rows, cost, f'{words}loss against {label}', folder, f'{prefix}pareto_{cost}.png'),
             f'{words}loss against {label}') for cost, label in COSTS.items()]
    made.append((losses(rows, f'{words}all variants', folder, f'{prefix}losses.png'), f'{words}losses, over seeds'))
    for effects, name, title in zip(results.effects_of(grid, rows), ('effects', 'interactions'),
                                    ('main effects', 'two-way interactions')):
        if effects:
            made.append((effect_plot(effects, words + title, folder, f'{prefix}{name}.png'), words + title))
    for setting in (s for s, values in grid.search.items() if len(values) > 2 and {*map(type, values)} <= {int, float}):
        name = search_plot(found, setting, task, folder, f'{prefix}losses_{setting}.png')
        made.append((name, f'{words}losses over {setting}'))
    if grid.ranks:
        name = trial_plot(grid, found, pruned, task, folder, f'{prefix}ranks.png')
        made.append((name, f'{words}trials of the rank search'))
    return made


