"""The figure of README.md: validation loss against parameters, drawn from records/ as SVG by hand.

By hand, so that its bytes depend on nothing but the records: no fonts, no date, no version of a plotting library. Two files,
for light and for dark pages.
"""
import math

from reporting.tables import Record

FOLDER = 'docs'
WIDTH, HEIGHT = 640, 370
LEFT, RIGHT, TOP, BOTTOM = 62, 80, 40, 60                  # margins around the axes
APART, NEAR = 21, 150                                       # of labels whose lines end within NEAR pixels in x
SIZES, LOSS = (2.4e5, 8.9e5), (1.64, 1.78)                  # what the axes span
RECORD = '2026-11-29_scratch'

# label: (colour on light pages, on dark ones, the rows of the record by size)
LINES = {
    'dense': ('#57606a', '#9198a1', ('narrow both', 'narrow hidden', 'dense')),
    'Kronecker MLPs': ('#cf222e', '#ff7b72', ('kron, narrow', 'kron, spectron')),
    'low-rank MLPs': ('#8250df', '#bc8cff', ('low rank',)),
}
THEMES = {'light': ('#1f2328', '#d1d9e0', 0), 'dark': ('#e6edf3', '#3d444d', 1)}        # text, grid, which colour of LINES


def x_of(size):
    return LEFT + (math.log(size) - math.log(SIZES[0])) / math.log(SIZES[1] / SIZES[0]) * (WIDTH - LEFT - RIGHT)


def y_of(loss):
    return TOP + (LOSS[1] - loss) / (LOSS[1] - LOSS[0]) * (HEIGHT - TOP - BOTTOM)


def points(root):
    """{label: [(parameters, loss, standard deviation)]} of LINES, from the record."""
    record = Record(root, RECORD)
    return {label: [(record.number(row, 'parameters')[0], *record.number(row, 'validation loss')[:2]) for row in rows]
            for label, (_, _, rows) in LINES.items()}


def words(x, y, text, colour, size=17, anchor='start', more=''):
    return (f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}" font-size="{size}" text-anchor="{anchor}"{more}>'
            f'{text}</text>')


def line(x1, y1, x2, y2, colour, width=1.0):
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" stroke-width="{width:g}"/>'


def axes(text, grid):
    """Grid, ticks and titles."""
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = []
    for loss in (1.66, 1.7, 1.74, 1.78):
        y = y_of(loss)
        parts += [line(LEFT, y, right, y, grid), words(LEFT - 10, y + 6, f'{loss:.2f}', text, anchor='end')]
    for size in (0.3, 0.4, 0.6, 0.8):
        x = x_of(size * 1e6)
        parts += [line(x, bottom, x, bottom + 6, text), words(x, bottom + 24, f'{size}M', text, anchor='middle')]
    middle = (LEFT + right) / 2
    return [*parts, line(LEFT, bottom, right, bottom, text),
            words(middle, HEIGHT - 12, 'parameters (log scale)', text, anchor='middle'),
            words(10, 24, 'validation loss, nats per character', text)]


def heights(found):
    """{label: y} of the labels at the right ends of the lines, apart where they would touch."""
    placed = {}
    for y, x, label in sorted((y_of(values[-1][1]), x_of(values[-1][0]), label) for label, values in found.items()):
        placed[label] = max([y, *(other + APART for other, at in placed.values() if abs(at - x) < NEAR)]), x
    return {label: y for label, (y, _) in placed.items()}


def mark(label, values, colour, height):
    """One line of the figure: points with their spread over seeds, joined, and its label at the right end."""
    places = [(x_of(size), y_of(loss), y_of(loss - half) - y_of(loss)) for size, loss, half in values]
    parts = [line(x1, y1, x2, y2, colour, 2) for (x1, y1, _), (x2, y2, _) in zip(places, places[1:])]
    for x, y, half in places:
        parts += [line(x, y - half, x, y + half, colour, 2), f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{colour}"/>']
    return [*parts, words(places[-1][0] + 12, height + 6, label, colour)]


def svg(root, theme):
    """The figure for pages of one theme."""
    text, grid, which = THEMES[theme]
    found = points(root)
    title = 'Validation loss against parameters of small GPTs on Shakespeare at equal training FLOPs, five seeds each'
    parts, told, high = axes(text, grid), [], heights(found)
    for label, values in found.items():
        parts += mark(label, values, LINES[label][which], high[label])
        told.append(f'{label}: {", ".join(f"{loss:.3f} with {size:,.0f} parameters" for size, loss, _ in values)}')
    told = '; '.join(told)
    return '\n'.join([f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
                      f'height="{HEIGHT}" font-family="system-ui, sans-serif" role="img">', f'<title>{title}</title>',
                      f'<desc>{told}</desc>', *parts, '</svg>', ''])


def drawn(root):
    """{path: SVG} of all figures."""
    return {f'{FOLDER}/losses-{theme}.svg': svg(root, theme) for theme in THEMES}
