"""One budget for all kinds of saving: what is the cheapest next parameter to remove, a neuron, a rank, a term, a head?

A `Part` of a model (the MLP or the attention of a block) may be narrowed to some numbers of units, and each of its matrices
may then be given a structure. Both cost predicted nats (units.losses, and half of the squared singular values that a
structure drops). At a price per parameter every part has one cheapest form; the budget is met by the price.
"""
import dataclasses

import torch

HALVINGS = 60           # bisections of the price
MULTIPLE = 8            # widths of MLPs: what matrix products like


@dataclasses.dataclass
class Menu:
    """The sizes of one matrix: parameters and nats of each, in rising order of parameters; the last may be dense."""
    site: str
    sizes: list                                         # size of the structure; None = dense
    costs: torch.Tensor                                 # (sizes,) parameters
    nats: torch.Tensor                                  # (sizes,)

    def at(self, price):
        """Place of the cheapest size."""
        return int((self.nats + price * self.costs).argmin())


@dataclasses.dataclass
class Width:
    """A part at one number of units: the nats that it costs, and the menus of its matrices."""
    units: int
    nats: float
    menus: list

    def at(self, price):
        """(nats + price x parameters, [place in each menu])."""
        places = [menu.at(price) for menu in self.menus]
        return self.nats + sum(float(m.nats[i] + price * m.costs[i]) for m, i in zip(self.menus, places)), places


@dataclasses.dataclass
class Choice:
    """What a part becomes."""
    part: str
    width: Width
    places: list

    @property
    def cost(self):
        return sum(int(menu.costs[i]) for menu, i in zip(self.width.menus, self.places))

    @property
    def nats(self):
        return self.width.nats + sum(float(menu.nats[i]) for menu, i in zip(self.width.menus, self.places))

    @property
    def sizes(self):
        """{site: size}, None = dense."""
        return {menu.site: menu.sizes[i] for menu, i in zip(self.width.menus, self.places)}


def cheapest(parts, price):
    """[Choice] of {part: [Width]} at a price per parameter."""
    found = []
    for name, widths in parts.items():
        _, places, best = min(((*width.at(price), k) for k, width in enumerate(widths)), key=lambda x: x[0])
        found.append(Choice(name, widths[best], places))
    return found


def choose(parts, budget):
    """[Choice] of least nats within the budget, or nearly: exact at the price that meets it, the rest spent on sizes.

    parts: {name: [Width]}. Cost: HALVINGS x widths x sizes. Raises ValueError when the smallest forms do not fit.
    """
    low, high = 0.0, 1.0
    while sum(c.cost for c in cheapest(parts, high)) > budget:
        high *= 16
        if high > 1e30:
            raise ValueError(f'the smallest forms take more than the {budget:,} parameters of the budget')
    for _ in range(HALVINGS):
        price = (low + high) / 2
        low, high = (price, high) if sum(c.cost for c in cheapest(parts, price)) > budget else (low, price)
    return spend(parts, cheapest(parts, high), budget)


def spend(parts, choices, budget):
    """What is left of the budget, on the steps of most nats per parameter: a larger size, or a greater width."""
    left = budget - sum(choice.cost for choice in choices)
    while True:
        steps = [(step, i) for i, choice in enumerate(choices) for step in larger(parts[choice.part], choice, left)]
        if not steps:
            return choices
        best, i = max(steps, key=lambda s: (choices[s[1]].nats - s[0].nats) / (s[0].cost - choices[s[1]].cost))
        left -= best.cost - choices[i].cost
        choices = [*choices[:i], best, *choices[i + 1:]]


def larger(widths, choice, left):
    """The forms of a part that cost at most `left` more and lower its nats: one menu or the width a step up."""
    found = []
    for m, place in enumerate(choice.places):
        if place + 1 < len(choice.width.menus[m].sizes):
            found.append(Choice(choice.part, choice.width, [*choice.places[:m], place + 1, *choice.places[m + 1:]]))
    here = widths.index(choice.width)
    if here + 1 < len(widths) and all(len(menu.sizes) == 1 for menu in widths[here + 1].menus):
        found.append(Choice(choice.part, widths[here + 1], choice.places))
    return [c for c in found if 0 < c.cost - choice.cost <= left and c.nats < choice.nats]
