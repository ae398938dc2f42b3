"""Variants from axes: every valid combination of switches that are on or off. Imports no torch."""
import itertools
import math

from commandline import bounds
from variants import UserError, as_rules, did_you_mean

COMBINATIONS = 4096                     # of axes, invalid ones counted
DENSE = 'dense'                         # the variant with every axis off


def check(grid):
    """Refuse axes that do not exist, in needs, exchange, grids and --axes."""
    for name, pairs in (('needs', grid.needs), ('exchange', grid.exchange),
                        *((f'grids: {part!r}', choices) for part, choices in grid.grids.items())):
        listed = [*pairs, *(axis for axes in pairs.values() for axis in axes)] if name == 'needs' else pairs
        for axis in listed:
            if axis not in grid.axes:
                raise UserError(f'{name}: there is no axis {axis!r}{did_you_mean(axis, grid.axes)}; the axes are '
                                f'{", ".join(grid.axes) or "none"}', 'axes')
    for part, choices in grid.grids.items():
        for axis, allowed in choices.items():
            if not isinstance(allowed, list) or not allowed or not all(isinstance(v, bool) for v in allowed):
                raise UserError(f'grids: {part!r}: {axis!r} takes a list of True and False, got {allowed!r}', 'grids')
    if grid.part and grid.part not in grid.grids:
        raise UserError(f'--axes={grid.part}: there is no such part of the grid{did_you_mean(grid.part, grid.grids)}; '
                        f'there are {", ".join(grid.grids) or "none"}', 'part')


def valid(on, grid):
    """Whether a combination {axis: bool} makes sense: every axis that is on has one of those it needs."""
    allowed = grid.grids.get(grid.part, {})
    return (all(value in allowed.get(axis, (False, True)) for axis, value in on.items()) and
            all(any(on[other] for other in grid.needs[axis]) for axis, value in on.items() if value and axis in grid.needs))


def combinations(grid):
    """The valid combinations {axis: bool}; the first axes change last."""
    allowed = grid.grids.get(grid.part, {})
    choices = [[value for value in (False, True) if value in allowed.get(axis, (False, True))] for axis in grid.axes]
    if math.prod(map(len, choices)) > COMBINATIONS:
        raise UserError(f'{len(grid.axes)} axes have {bounds.shown(math.prod(map(len, choices)))} combinations; at most '
                        f'{COMBINATIONS} are looked at: fix some axes in a part of `grids` and take --axes=NAME', 'axes')
    found = [dict(zip(grid.axes, values)) for values in itertools.product(*choices)]
    return [on for on in found if valid(on, grid)]


def name_of(on):
    return '+'.join(axis for axis, value in on.items() if value) or DENSE


def switches(grid):
    """{variant: {axis: bool}} of the grid's variants; controls are not among them, unless all-off is valid."""
    return {name_of(on): on for on in combinations(grid)}


def settings_for(on, grid):
    """The settings of a combination: those of its axes, rules merged, then specs exchanged."""
    settings = {}
    for axis in (axis for axis, value in on.items() if value):
        for name, value in grid.axes[axis].items():
            merged = isinstance(value, dict) and name in settings
            settings[name] = {**as_rules(settings[name]), **value} if merged else value
    for axis in (axis for axis, value in on.items() if value and axis in grid.exchange):
        rules = as_rules(settings.get('linear', {}))
        settings['linear'] = {pattern: grid.exchange[axis].get(spec, spec) for pattern, spec in rules.items()}
    return settings


def spread(grid):
    """Fill grid.variants from its axes. Raises UserError when no combination is valid."""
    check(grid)
    if not grid.axes:
        return
    found = switches(grid)
    if not found:
        raise UserError(f'no combination of the axes is valid{f" in --axes={grid.part}" if grid.part else ""}: `needs` '
                        'rules out what `grids` asks for', 'axes')
    grid.variants = {name: settings_for(on, grid) for name, on in found.items()}
