"""How pictures look: colours, line styles and markers by index, and the files that a picture becomes.

The colours are Okabe and Ito's (Color Universal Design, 2008), which the colour blind tell apart, without their yellow,
which white paper swallows. Neighbours in the order differ in lightness, the first three by far, so that a grey print keeps
them apart; beyond that the markers and the line styles do.
"""
import os

COLOURS = '#0072b2', '#e69f00', '#000000', '#009e73', '#56b4e9', '#d55e00', '#cc79a7'
NAMES = 'blue', 'orange', 'black', 'green', 'sky', 'vermilion', 'purple'
BLUE, ORANGE, BLACK, GREEN, SKY, VERMILION, PURPLE = COLOURS
GREY, PALE = '#595959', '#b8b8b8'
MARKERS = 'o', 's', '^', 'D', 'v', 'P', 'X'
LINES = '-', '--', '-.', ':', (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (1, 3))
KINDS = 'png', 'png,pdf', 'png,svg', 'png,pdf,svg'      # what a setting `figures` may be
HELP = "formats of pictures; 'png,pdf' and 'png,svg' are for papers"


def style(index, line=None):
    """{'color', 'marker', 'linestyle'} of the index-th thing of a picture; line: the index of its line style, if another."""
    return {'color': COLOURS[index % len(COLOURS)], 'marker': MARKERS[index % len(MARKERS)],
            'linestyle': LINES[(index if line is None else line) % len(LINES)]}


def lightness(colour):
    """CIE L* of '#rrggbb', 0 to 100: what a grey print shows."""
    parts = [int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    y = sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear))
    return 116 * y ** (1 / 3) - 16 if y > 0.008856 else 903.3 * y


def figure(width, height):
    """A matplotlib Figure of so many inches, without pyplot, which is slow to import and keeps every figure."""
    from matplotlib.figure import Figure
    return Figure(figsize=(width, height), layout='constrained')


def save(picture, path, figures='png', dpi=110):
    """Write the picture to `path` (*.png) and beside it in the other formats of `figures`; returns the png's file name."""
    import matplotlib
    stem = os.path.splitext(path)[0]
    with matplotlib.rc_context({'pdf.fonttype': 42, 'svg.fonttype': 'none'}):       # text stays text, for editing and search
        for kind in figures.split(','):
            picture.savefig(f'{stem}.{kind}', dpi=dpi)
    return os.path.basename(f'{stem}.png')
