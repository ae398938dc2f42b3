"""Names beside the points of a plot, where there is room for them: no name covers a point, another name or the frame."""
import itertools
import math

from reporting.palette import BLACK, GREY

NEAR, FAR = (7, 12), (7, 13, 20, 28, 38, 50, 66, 84, 104, 128)     # distances from the point, in points of 1/72 inch
TURNS = [math.radians(angle) for angle in (0, 45, 135, 180, 315, 225, 90, 270, 20, 160, 200, 340)]


def overlap(a, b):
    """Whether two boxes (x0, y0, x1, y1) have a common area."""
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def around(x, y, size, distance, turn):
    """The box of a text of `size` (width, height) at a distance from a point in the direction `turn`."""
    dx, dy = distance * math.cos(turn), distance * math.sin(turn)
    left = x + dx - size[0] * (0.5 - 0.5 * math.cos(turn) if abs(math.cos(turn)) > 0.3 else 0.5)
    low = y + dy - size[1] * (0.5 - 0.5 * math.sin(turn))
    return left, low, left + size[0], low + size[1]


def inside(box, frame):
    return box[0] >= frame[0] and box[1] >= frame[1] and box[2] <= frame[2] and box[3] <= frame[3]


def gap(box, place):
    """The distance from a box to a point."""
    return math.hypot(*(max(low - at, 0, at - high) for low, at, high in zip(box[:2], place, box[2:])))


def free_box(place, size, distances, taken, frame, unit, others=()):
    """The nearest box for a text beside a point that is inside the frame and touches nothing of `taken`; or None.

    others: points that must not be nearer to the box than its own, or it would be read as theirs.
    """
    for distance, turn in itertools.product(distances, TURNS):
        box = around(*place, size, distance * unit, turn)
        if inside(box, frame) and not any(overlap(box, other) for other in taken):
            if all(gap(box, place) <= gap(box, other) for other in others):
                return box
    return None


def name_points(picture, axes, points, names, wanted, sticks=(), fontsize=8):
    """Write names beside points (x, y): those in `wanted` everywhere they fit, on a line where that is far, the others only
    where they fit at once, uncrowded. sticks: ends of upright and level lines, [((x, y), (x, y))], that names avoid if
    they can. Returns the names written.

    Axes and legends must be complete, as places are measured on the drawn figure. Cost: names x places x boxes.
    """
    import numpy as np
    from matplotlib.patheffects import withStroke
    picture.draw_without_rendering()
    unit, to_display = picture.dpi / 72, axes.transData.transform
    places = [tuple(to_display(point)) for point in points]
    dots = [(x - 4 * unit, y - 4 * unit, x + 4 * unit, y + 4 * unit) for x, y in places]
    ends = [(to_display(one), to_display(two)) for one, two in sticks]
    sticks = [(*(np.minimum(one, two) - unit), *(np.maximum(one, two) + unit)) for one, two in ends]
    frame, written, boxes = axes.get_window_extent().extents, [], []
    for i in sorted(range(len(points)), key=lambda i: (names[i] not in wanted, -places[i][1])):
        text = axes.annotate(names[i], points[i], fontsize=fontsize, color=BLACK, in_layout=False)
        extent, far = text.get_window_extent(), names[i] in wanted
        size = extent.width + 2 * unit, extent.height + 2 * unit
        text.remove()
        ways = [(dots + boxes + sticks, places), (dots + boxes, places), (dots + boxes, ())][:3 if far else 1]
        found = (free_box(places[i], size, FAR if far else NEAR, taken, frame, unit, others) for taken, others in ways)
        box = next(filter(None, found), None)
        if box is None:
            continue
        boxes.append(box)
        written.append(names[i])
        middle = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
        offset = [(m - p) / unit for m, p in zip(middle, places[i])]
        line = {'arrowstyle': '-', 'lw': 0.6, 'color': GREY, 'shrinkA': 0, 'shrinkB': 3}
        axes.annotate(names[i], points[i], xytext=offset, textcoords='offset points', ha='center', va='center',
                      fontsize=fontsize, color=BLACK, in_layout=False,
                      path_effects=[withStroke(linewidth=2, foreground='w')],
                      arrowprops=line if gap(box, places[i]) > 16 * unit or any(
                          gap(box, other) < gap(box, places[i]) for other in places) else None)
    return written
