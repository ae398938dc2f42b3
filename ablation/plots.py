"""The plots of a report: Pareto fronts, losses over seeds, effects with intervals, trials of a rank search."""
import os
import statistics

import numpy as np

from ablation import results
from ablation.effects import pareto
from reporting import labels, palette
from reporting.palette import BLACK, BLUE, ORANGE

COSTS = {'parameters': 'parameters of the final model', 'flops': 'training FLOPs'}
KINDS = ((False, BLUE, 'o', 'variants'), (True, ORANGE, 's', 'controls: dense, narrow'))     # is a control, colour, marker


def is_control(row):
    return row['variant'].split(' ')[0] in ('dense', 'narrow')


def front(rows, cost, title):
    """Loss against a cost: every row a point with its range over seeds, the front as steps; controls and the front by name,
    others where they are not crowded."""
    figure = palette.figure(11, 6)
    axes = figure.subplots()
    bars = [(row[cost], min(row['losses'].values()), max(row['losses'].values())) for row in rows]
    for control, colour, marker, words in KINDS:
        chosen = [(row['loss'], *bar) for row, bar in zip(rows, bars) if is_control(row) == control]
        if chosen:
            means, xs, low, high = map(np.array, zip(*chosen))
            axes.errorbar(xs, means, yerr=[means - low, high - means], fmt=marker, ms=6, lw=0.8, color=colour, mec=BLACK,
                          mew=0.6 if control else 0, label=f'{words} (bar: range of the seeds)')
    best = [rows[i] for i in pareto([(row[cost], row['loss']) for row in rows])]
    axes.step([r[cost] for r in best], [r['loss'] for r in best], where='post', color=BLACK, lw=1, label='Pareto front')
    axes.set(xlabel=COSTS[cost], ylabel='validation loss, nats per token', title=title)
    axes.xaxis.set_major_formatter('{x:,.0f}' if cost == 'parameters' else '{x:.3g}')
    axes.margins(x=0.12, y=0.08)
    axes.grid(alpha=0.25)
    figure.legend(fontsize=9, loc='outside lower center', ncols=3)
    wanted = {row['variant'] for row in rows if is_control(row)} | {row['variant'] for row in best}
    sticks = [((x, low), (x, high)) for x, low, high in bars]
    for one, two in zip(best, best[1:]):                # the steps of the front
        corner = two[cost], one['loss']
        sticks += [((one[cost], one['loss']), corner), (corner, (two[cost], two['loss']))]
    labels.name_points(figure, axes, [(row[cost], row['loss']) for row in rows], [row['variant'] for row in rows], wanted,
                       sticks)
    return figure


def losses(rows, title):
    """All rows by loss: a tick per seed, a point for the mean."""
    ordered = sorted(rows, key=lambda row: -row['loss'])
    figure = palette.figure(8, 1.2 + 0.19 * len(ordered))
    axes = figure.subplots()
    for control, colour, marker, _ in KINDS:
        for place, row in enumerate(ordered):
            if is_control(row) == control:
                axes.plot(list(row['losses'].values()), [place] * len(row['losses']), '|', color=colour, ms=7)
                axes.plot(row['loss'], place, marker, color=colour, ms=5, mec=BLACK, mew=0.6 if control else 0)
    axes.set_yticks(range(len(ordered)), [row['variant'] for row in ordered], fontsize=7)
    axes.set_ylim(-0.8, len(ordered) - 0.2)
    axes.set(xlabel='validation loss, nats per token (point: mean, tick: one seed; squares: controls)', title=title)
    axes.grid(axis='x', alpha=0.25)
    return figure


def cut_marks(axes, ends, limit, colour):
    """A triangle on the frame where an interval (low, high, place) goes on beyond -limit or limit; returns how many."""
    both = [(side, end, place) for low, high, place in ends for side, end in ((-1, low), (1, high))]
    cut = [(side * limit, place, '<>'[side > 0], end) for side, end, place in both if side * end > limit]
    for x, place, marker, end in cut:
        axes.plot(x, place, marker, color=colour, ms=7, clip_on=False, zorder=5)
        axes.annotate(f'to {end:+.2g}', (x, place), xytext=(-9 if x > 0 else 9, -3), textcoords='offset points', fontsize=7,
                      ha='right' if x > 0 else 'left', va='top')
    return len(cut)


def effect_plot(found, title):
    """Effects with both intervals, over pairs and over seeds; a triangle on the frame where an interval is cut."""
    ordered = list(reversed(found))
    figure = palette.figure(8, 1.6 + 0.3 * len(ordered))
    axes = figure.subplots()
    reach = max(abs(e['mean']) for e in ordered)        # an interval over two seeds may be 13 deviations wide
    limit = 1.08 * max([abs(e['mean']) + (e['over_pairs'] or 0) for e in ordered] + [1.3 * reach, 1e-4])
    axes.set_xlim(-limit, limit)
    cut = 0
    for key, colour, width, shift, style in (('over_pairs', BLUE, 2.6, 0.14, '-'), ('over_seeds', ORANGE, 1.6, -0.14, '--')):
        known = [(e['mean'], e[key], place + shift) for place, e in enumerate(ordered) if e[key] is not None]
        ends = [(mean - half, mean + half, place) for mean, half, place in known]
        for low, high, place in ends:
            axes.plot([low, high], [place, place], style, color=colour, lw=width, marker='|', ms=7,
                      label=f'95 % {key.replace("_", " ")}' if (low, high, place) == ends[0] else None)
        cut += cut_marks(axes, ends, limit, colour)
    axes.plot([e['mean'] for e in ordered], range(len(ordered)), 'o', color=BLACK, ms=4, label='effect')
    if cut:
        axes.plot([], [], '>', color=palette.GREY, ms=7, label='the interval goes on')
    axes.axvline(0, color=BLACK, lw=0.8)
    axes.set_yticks(range(len(ordered)), [' × '.join(e['axes']) for e in ordered], fontsize=8)
    axes.set_ylim(-0.7, len(ordered) - 0.3)
    axes.set(xlabel='effect on the validation loss, nats per token (left of 0: it helps)', title=title)
    axes.grid(axis='x', alpha=0.25)
    figure.legend(fontsize=8, loc='outside lower center', ncols=4)
    return figure


def trial_plot(grid, found, pruned, task):
    """A rank search: loss against each rank, pruned trials hollow, a colour and marker per variant; the legend below."""
    columns = min(3, len(grid.ranks))
    lines = -(-len(grid.ranks) // columns)
    figure = palette.figure(max(6, 4.2 * columns), 0.6 + 3.8 * lines)
    panels = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes in panels[len(grid.ranks):]:
        axes.set_axis_off()
    done = [(variant, dict(values), results.last_losses(runs)[0]) for (t, variant), searched in found.items() if t == task
            for values, runs in searched.items()]
    cut = [(run.variant, dict(run.searched), loss) for run, _, loss in pruned if run.task == task and loss is not None]
    styles = {v: {**palette.style(i), 'linestyle': ''} for i, v in enumerate(
        dict.fromkeys(v for v, values, _ in done + cut if values.keys() & {*grid.ranks}))}
    for axes, rank in zip(panels, grid.ranks):
        for variant, style in styles.items():
            for group, more in ((done, {}), (cut, {'mfc': 'none'})):
                mine = [(values[rank], loss) for v, values, loss in group if v == variant and rank in values]
                if mine:
                    axes.plot(*zip(*mine), ms=6, **style, **more, label=variant + ' (pruned)' * bool(more))
        axes.set_xscale('log', base=2)
        axes.xaxis.set_major_formatter('{x:g}')                 # 16, not 2 to the 4th
        axes.set(xlabel=f'{rank}', ylabel='validation loss')
        axes.grid(alpha=0.25)
    handles = {label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels())}
    if handles:
        figure.legend(handles.values(), handles.keys(), fontsize=8, loc='outside lower center', ncols=3)
    return figure


def looks(names):
    """{name: (index of its colour and marker, index of its line)}: the colour is the name but for its last word, the line
    that word; where names share no last word, lines change when the colours begin again."""
    first = {name: name.rpartition(' ')[0] or name for name in names}
    last = {name: name.rpartition(' ')[2] for name in names}
    colours, lines = ([*dict.fromkeys(words.values())] for words in (first, last))
    if len(lines) == len(names):
        return {name: (i, i // len(palette.COLOURS)) for i, name in enumerate(names)}
    return {name: (colours.index(first[name]), lines.index(last[name])) for name in names}


def search_plot(found, setting, task):
    """Loss against a searched setting: a line per variant through the means over seeds, with their range."""
    names = [variant for t, variant in found if t == task]
    figure = palette.figure(9, max(5, 0.6 + 0.19 * len(names)))
    axes, ticks = figure.subplots(), set()
    for variant, look in looks(names).items():
        by_value = {}
        for values, runs in found[task, variant].items():
            by_value.setdefault(dict(values)[setting], []).extend(results.last_losses(runs))
        xs = sorted(by_value)
        ticks |= {*xs}
        means = [statistics.fmean(by_value[x]) for x in xs]
        spread = [[m - min(by_value[x]) for x, m in zip(xs, means)], [max(by_value[x]) - m for x, m in zip(xs, means)]]
        axes.errorbar(xs, means, yerr=spread, **palette.style(*look), ms=5, lw=1.2, capsize=2, label=variant)
    axes.set_xscale('log', base=2)
    axes.set_xticks(sorted(ticks), [f'{x:g}' for x in sorted(ticks)])
    axes.set_xticks([], minor=True)
    axes.set(xlabel=setting, ylabel='validation loss, nats per token (mean and range of the seeds)')
    axes.grid(alpha=0.25)
    figure.legend(fontsize=8, loc='outside right upper')
    return figure


def draw(grid, found, rows, task, pruned, folder):
    """All plots of a task, in the formats of grid.figures: [(file name of the png, title)]."""
    several = len(grid.tasks) > 1
    prefix = f'{task}_'.replace(' ', '_') if several else ''            # a Markdown link ends at a blank
    words = f'{task}: ' if several else ''
    made = [(f'pareto_{cost}', f'loss against {label}', front(rows, cost, f'{words}loss against {label}'))
            for cost, label in COSTS.items()]
    made.append(('losses', 'losses, over seeds', losses(rows, f'{words}all variants')))
    for effects, name, title in zip(results.effects_of(grid, rows), ('effects', 'interactions'),
                                    ('main effects', 'two-way interactions')):
        if effects:
            made.append((name, title, effect_plot(effects, words + title)))
    for setting in (s for s, values in grid.search.items() if len(values) > 2 and {*map(type, values)} <= {int, float}):
        made.append((f'losses_{setting}', f'losses over {setting}', search_plot(found, setting, task)))
    if grid.ranks:
        made.append(('ranks', 'trials of the rank search', trial_plot(grid, found, pruned, task)))
    return [(palette.save(figure, os.path.join(folder, f'{prefix}{name}.png'), grid.figures), words + title)
            for name, title, figure in made]
