"""Sizes for many sites under one budget: the same share for each, or by gain. Sites as in allocate.py."""
import bisect
import heapq
import itertools

import torch

WINDOW = 6              # steps around the greedy choice that are tried in each class of equal costs
HALVINGS = 100          # bisections of the range of prices


def uniform(sites, budget):
    """{site: size}: the same fraction of its dense parameters for each, at least size 1, as large as the budget allows."""
    costs = {s.name: [s.numel(k) for k in range(1, s.most + 1)] for s in sites}

    def at(fraction):
        return {s.name: max(1, bisect.bisect_right(costs[s.name], fraction * s.dense)) for s in sites}
    fractions = sorted({s.numel(k) / s.dense * (1 + 1e-12) for s in sites for k in range(1, s.most + 1)})
    low, high = 0, len(fractions)                       # the largest fraction that fits, by bisection
    while low < high:
        middle = (low + high) // 2
        fits = sum(s.numel(at(fractions[middle])[s.name]) for s in sites) <= budget
        low, high = (middle + 1, high) if fits else (low, middle)
    return at(fractions[max(low - 1, 0)])


def spectrum(sites, budget, gains):
    """{site: size} with the largest sum of gains within the budget.

    gains: {site: those of size 1, 2, ..., falling}. Steps are taken by gain per parameter, the best for the budget that
    they use (a Lagrangian); the rest of the budget is spent by trying all numbers of steps near those, per class of
    sites with equal cost per step, which is exact where the optimum is within WINDOW of them. Where the steps of a site
    differ in cost: by_price.
    """
    if any(s.bend for s in sites):
        return by_price(sites, budget, gains)
    classes = {}
    for s in sites:
        classes.setdefault(s.step, []).append(s)
    steps = {cost: sorted(((gains[s.name][k - 1], s.name) for s in members for k in range(2, s.most + 1)), reverse=True)
             for cost, members in classes.items()}
    left = budget - sum(s.first for s in sites)
    counts = best_counts({cost: [gain for gain, _ in found] for cost, found in steps.items()}, left)
    taken = {s.name: 1 for s in sites}
    for cost, found in steps.items():
        for _, name in found[:counts[cost]]:
            taken[name] += 1
    return taken


def best_counts(gains, budget):
    """{cost: how many steps of that cost}: the largest sum of gains, {cost: falling list}, within the budget."""
    counts, left = dict.fromkeys(gains, 0), budget
    heap = [(-found[0] / cost, cost) for cost, found in gains.items() if found]
    heapq.heapify(heap)
    while heap:
        _, cost = heapq.heappop(heap)
        if cost > left:
            continue                                    # a cheaper step may still fit
        counts[cost], left = counts[cost] + 1, left - cost
        if counts[cost] < len(gains[cost]):
            heapq.heappush(heap, (-gains[cost][counts[cost]] / cost, cost))
    totals = {cost: [0, *itertools.accumulate(found)] for cost, found in gains.items()}
    *free, last = sorted(gains, reverse=True)           # the cheapest class takes the rest
    near = [range(max(0, counts[c] - WINDOW), min(len(gains[c]), counts[c] + WINDOW) + 1) for c in free]
    best, value = counts, sum(totals[c][counts[c]] for c in gains)
    for tried in itertools.product(*near):
        rest = budget - sum(c * n for c, n in zip(free, tried))
        if rest < 0:
            continue
        n = min(rest // last, len(gains[last]))
        now = totals[last][n] + sum(totals[c][k] for c, k in zip(free, tried))
        if now > value:
            best, value = {last: n, **dict(zip(free, tried))}, now
    return best


def by_price(sites, budget, gains):
    """spectrum for any costs: the sizes of largest gain - price x parameters at the lowest price that fits, then steps.

    Those are the best for the parameters that they take; the rest is spent on single steps, by gain per parameter.
    """
    total = {s.name: torch.tensor(gains[s.name][:s.most], dtype=torch.float64).cumsum(0) for s in sites}
    costs = {s.name: torch.tensor([s.numel(k) for k in range(1, s.most + 1)], dtype=torch.float64) for s in sites}

    def at(price):
        return {name: int((total[name] - price * costs[name]).argmax()) + 1 for name in costs}

    def used(sizes):
        return sum(s.numel(sizes[s.name]) for s in sites)
    low, high = 0.0, max(float(gain[-1]) for gain in total.values()) + 1.0      # at which every size is 1
    for _ in range(HALVINGS):
        price = (low + high) / 2
        low, high = (low, price) if used(at(price)) <= budget else (price, high)
    sizes = at(high)
    while True:
        left, steps = budget - used(sizes), []
        for s in sites:
            size = sizes[s.name]
            cost = s.numel(size + 1) - s.numel(size)
            if size < s.most and cost <= left:
                steps.append((gains[s.name][size] / cost, s.name))
        if not steps:
            return sizes
        sizes[max(steps)[1]] += 1
