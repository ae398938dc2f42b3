"""The curves of several runs as one picture for a paper, PNG or PDF, by matplotlib."""
import os

import numpy as np

from reporting import curves, palette

# seven colours and five dashes, as in web/page.js: 35 lines differ, in grey and for the colour-blind too
DASHES = 'solid', (0, (7, 3)), (0, (2, 2.5)), (0, (9, 3, 2, 3)), (0, (4, 2, 1, 2, 1, 2))
MARKERS = palette.MARKERS[:5]
CUT, MOST = 0.05, 0.98                  # the y axis spans what lies behind this share of a run, without spikes
LOOK = {'pdf.fonttype': 42, 'font.size': 9, 'lines.scale_dashes': False}        # text in PDF stays text


def smoothed(xs, ys, width):
    """The exponential mean of ys over xs, each value weighted by its share of xs; width: in units of xs."""
    out, total, weight = [], 0.0, 0.0
    for gap, y in zip(np.diff(xs, prepend=2 * xs[0] - xs[1]), ys):
        keep = np.exp(-gap / width)
        total, weight = total * keep + y * (1 - keep), weight * keep + 1 - keep
        out.append(total / weight if weight else y)
    return np.array(out)


def style(look):
    return {'color': palette.COLOURS[look % len(palette.COLOURS)], 'linestyle': DASHES[look % len(DASHES)]}


def curve(axes, run, look, label, x, smooth):
    """One run: training steps thin and pale, evaluations thick with markers. Returns [(xs, ys)] of each kind."""
    (steps, train), (evals, losses) = curves.curves_of(run)
    val, noisy, exact = losses[2], [], []
    if len(train[0]):
        ys, at = train[0], steps['steps']
        if smooth and len(ys) > 2:
            ys = smoothed(at, ys, smooth * (at[-1] - at[0] or 1))
        axes.plot(steps[x], ys, lw=0.7, alpha=0.45, **style(look))
        noisy.append((steps[x], ys))
    if len(val):
        few = MARKERS[look % len(MARKERS)] if len(val) <= 60 else ''
        axes.plot(evals[x], val, lw=1.6, marker=few, ms=3.5, label=label, **style(look))
        exact.append((evals[x], val))
    return noisy, exact


def limits(axes, noisy, exact):
    """The y axis without the first steps and without spikes; noisy, exact: [(xs, ys)] of single steps and of evaluations."""
    far, ends = max(np.nanmax(xs) for xs, _ in noisy + exact), []
    for pairs, share in ((noisy, MOST), (exact, 1)):
        inside = np.sort(np.concatenate([[], *(ys[(xs >= CUT * far) & np.isfinite(ys)] for xs, ys in pairs)]))
        ends += list(inside[[0, int(share * (len(inside) - 1))]]) if len(inside) else []
    if ends and min(ends) < max(ends):
        low, high = min(ends), max(ends)
        ratio, edge = (high / low) ** 0.05, 0.05 * (high - low)
        log = axes.get_yscale() == 'log'
        axes.set_ylim(low / ratio if log else low - edge, high * ratio if log else high + edge)


def labels_of(names, looks):
    """The label of each run in the legend: of runs with one look the first's, what their names have in common."""
    labels = []
    for i, look in enumerate(looks):
        group = [name for name, other in zip(names, looks) if other == look]
        common = os.path.commonprefix(group).rstrip('-_ ./=') or group[0]
        labels.append((f'{common} ({len(group)} seeds)' if len(group) > 1 else names[i]) * (looks.index(look) == i))
    return labels


def draw(runs, path, x='steps', log='', smooth=0.0):
    """Write the picture to path, whose ending says the format. x: of curves.AXES; log: the axes that are logarithmic."""
    import matplotlib
    names, looks = curves.names_of(runs), curves.looks_of(runs)
    with matplotlib.rc_context(LOOK):
        figure = palette.figure(6.4, 4)
        axes = figure.subplots()
        axes.set(xscale='log' if 'x' in log else 'linear', yscale='log' if 'y' in log else 'linear',
                 xlabel=curves.AXES[x], ylabel='loss, nats per token')
        drawn = [curve(axes, run, look, label, x, smooth) for run, look, label in zip(runs, looks, labels_of(names, looks))]
        noisy, exact = (sum((pair[kind] for pair in drawn), []) for kind in (0, 1))
        if noisy or exact:
            limits(axes, noisy, exact)
        axes.grid(alpha=0.25)
        axes.plot([], [], lw=0.7, color='0.5', label='thin: training step')
        figure.legend(fontsize=7.5, loc='outside lower center', ncols=3)
        figure.savefig(path, dpi=200)
