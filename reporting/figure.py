"""The figure of README.md: validation loss against training FLOPs, drawn from records/ as SVG by hand.

By hand, so that its bytes depend on nothing but the records: no fonts, no date, no version of a plotting library. Two files,
for light and for dark pages.
"""
import math

from reporting.tables import Record

FOLDER = 'docs'
WIDTH, HEIGHT = 640, 370
LEFT, RIGHT, TOP, BOTTOM = 62, 236, 40, 60                  # margins around the axes
FLOPS, LOSS = (1.15e12, 4.2e12), (1.77, 2.21)                  # what the axes span
STEPS, EQUAL = '2026-11-22_where_the_money_is', '2026-11-21_scratch'

# label: (colour on light pages, on dark ones, the row with 600 steps each, the row with equal training FLOPs)
LINES = {
    'low rank MLPs': ('#8250df', '#bc8cff', '', 'low rank'),
    'dense': ('#57606a', '#9198a1', 'dense', 'dense'),
    'low rank + Kronecker': ('#0969da', '#58a6ff', '', 'low rank + kron'),
    'Kronecker MLPs': ('#cf222e', '#ff7b72', 'mlp 50%', 'kron'),
    'narrow dense': ('#1a7f37', '#3fb950', 'narrow 50%', 'narrow'),
}
THEMES = {'light': ('#1f2328', '#d1d9e0', 0), 'dark': ('#e6edf3', '#3d444d', 1)}        # text, grid, which colour of LINES


def x_of(flops):
    return LEFT + (math.log(flops) - math.log(FLOPS[0])) / math.log(FLOPS[1] / FLOPS[0]) * (WIDTH - LEFT - RIGHT)


def y_of(loss):
    return TOP + (LOSS[1] - loss) / (LOSS[1] - LOSS[0]) * (HEIGHT - TOP - BOTTOM)


def points(root):
    """{label: (parameters, [(training FLOPs, loss, standard deviation)])} of LINES, from the records."""
    records, found = {STEPS: Record(root, STEPS), EQUAL: Record(root, EQUAL)}, {}
    for label, (_, _, *rows) in LINES.items():
        places = [(records[name], row) for name, row in zip((STEPS, EQUAL), rows) if row]
        values = [(record.number(row, 'training FLOPs')[0], *record.number(row, 'validation loss')[:2])
                  for record, row in places]
        found[label] = places[-1][0].number(places[-1][1], 'parameters')[0], values
    return found


def words(x, y, text, colour, size=17, anchor='start', more=''):
    return (f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}" font-size="{size}" text-anchor="{anchor}"{more}>'
            f'{text}</text>')


def line(x1, y1, x2, y2, colour, width=1.0):
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" stroke-width="{width:g}"/>'


def axes(text, grid):
    """Grid, ticks and titles."""
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = []
    for loss in (1.8, 1.9, 2.0, 2.1, 2.2):
        y = y_of(loss)
        parts += [line(LEFT, y, right, y, grid), words(LEFT - 10, y + 6, loss, text, anchor='end')]
    for flops in (1.5, 2, 3, 4):
        x = x_of(flops * 1e12)
        parts += [line(x, bottom, x, bottom + 6, text), words(x, bottom + 24, flops, text, anchor='middle')]
    middle = (LEFT + right) / 2
    return [*parts, line(LEFT, bottom, right, bottom, text),
            words(middle, HEIGHT - 12, 'training FLOPs, 10¹² (log scale)', text, anchor='middle'),
            words(10, 24, 'validation loss, nats per character', text),
            words(x_of(3.963e12) + 12, 24, 'parameters', text)]


def mark(label, parameters, values, colour):
    """One line of the figure: points with their spread over seeds, joined, and its label at the right end."""
    places = [(x_of(flops), y_of(loss), y_of(loss - half) - y_of(loss)) for flops, loss, half in values]
    parts = [line(x1, y1, x2, y2, colour, 2) for (x1, y1, _), (x2, y2, _) in zip(places, places[1:])]
    for x, y, half in places:
        parts += [line(x, y - half, x, y + half, colour, 2), f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{colour}"/>']
    x, y, _ = places[-1]
    return [*parts, words(x + 12, y + 6, f'{parameters / 1e3:.0f}k {label}', colour)]


def svg(root, theme):
    """The figure for pages of one theme."""
    text, grid, which = THEMES[theme]
    found = points(root)
    title = 'Validation loss against training FLOPs of small GPTs on Shakespeare, three seeds each'
    parts, told = axes(text, grid), []
    for label, (size, values) in found.items():
        parts += mark(label, size, values, LINES[label][which])
        reached = ', '.join(f'{loss:.3f} at {flops:.3g} FLOPs' for flops, loss, _ in values)
        told.append(f'{label}, {size:,.0f} parameters: {reached}')
    told = '; '.join(told)
    return '\n'.join([f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
                      f'height="{HEIGHT}" font-family="system-ui, sans-serif" role="img">', f'<title>{title}</title>',
                      f'<desc>{told}</desc>', *parts, '</svg>', ''])


def drawn(root):
    """{path: SVG} of all figures."""
    return {f'{FOLDER}/losses-{theme}.svg': svg(root, theme) for theme in THEMES}
