"""What a contraction plan costs on a CPU, by arithmetic: the rule's choice there. It reads no clock.

    seconds = CALL calls + FLOP FLOPs + MOVED elements of products + COPIED elements of copies + STRIDED elements

A plan is a list of steps, products and copies as products.py makes them; each says how often a training step takes it.
The five constants are fitted by `python bench.py rule --fit=True` to recorded timings of every plan
(records/2026-11-22_plans and records/2026-11-29_plans: one thread, float32); no shape is named. On a GPU and under
torch.compile costs are others, and FLOPs decide (plan.rule). Sizes as in products.py: A (r, m, n), B (r, p, q), T tokens.
"""
import functools
from typing import NamedTuple

from kron.lean import THIN, together
from kron.plan import by_rule, considered, kronecker, rule, sizes_of, taken

# seconds: per kernel call; per FLOP; per element that a product reads or writes, weights too; per element of a copy, and
# of a product with a factor of at most THIN rows and columns; per weight of a product with one row or a few that reads
# its input in strides, or of dot products
CONSTANTS = CALL, FLOP, MOVED, COPIED, STRIDED = 1.11e-5, 3.63e-12, 5.15e-10, 8.85e-10, 2.65e-9
TOKENS = tuple(2 ** k for k in range(14))       # for which costs are taken; a number between two takes the larger one's


class Step(NamedTuple):
    """What the constants count, and how many times a training step takes the step, forward and backward."""
    calls: float = 1
    flops: float = 0
    moved: float = 0
    copied: float = 0
    strided: float = 0
    training: int = 2


def product(rows, inner, columns, strided=False, again=0):
    """(rows, inner) @ (inner, columns) and its two gradients; again: times that backward repeats it."""
    thin, elements, weights = max(inner, columns) <= THIN, rows * (inner + columns), inner * columns
    return Step(1, 2 * elements * weights / (inner + columns), elements * (not thin) + weights * (not strided),
                elements * thin, weights * strided, 3 + again)


def copy(elements, needed=True, calls=1, again=0):
    """[the copy], or [] where it is a view."""
    return [Step(calls, copied=elements, training=2 + again)] if needed else []


def narrow(rows, inner, columns, g, again=0):
    """lean.narrow: g rows at once, by I_g ⊗ factor."""
    return [*copy(g * g * inner * columns, g > 1, calls=4), product(rows // g, inner * g, columns * g, again=again)]


# ---------------------------------------------------------------------------------------------------
# the steps of products.py's plans; a single token's rows are views where those of many are copies

def a_first(shape, T, layout):
    """A's product, then B's."""
    m, n, p, q, r = shape
    first = [*copy(T * n * q, T > 1 and q > 1), product(T * q, n, r * m, strided=T == 1 and q > 1)]
    between, size = T * m * q * r, (T * m, q * r, p)
    if layout == 'planes':
        return [*first, *copy(between, T > 1 and r > 1), product(*size), *copy(T * m * p, p > 1, calls=p)]
    if layout == 'blocks':
        return [*copy(r * m * n, r > 1), *first, *copy(between, q > 1 and max(T, r) > 1),
                *narrow(*size, together(m, q * r, p))]
    return [*first, *copy(between, T > 1 and q * r > 1), product(*size)]


def b_first(shape, T, layout):
    """B's product, which backward repeats, then A's; one call more, of a Function (lean.BFirst)."""
    m, n, p, q, r = shape
    g = together(n, q, p * r) if layout == 'blocks' else 1
    first, between = [Step(1), *narrow(T * n, q, p * r, g, again=1)], T * n * p * r
    if layout == 'planes':
        return [*first, *copy(between, T > 1 and r > 1, again=1), *copy(r * m * n, r > 1), product(T * p, r * n, m),
                *copy(T * m * p, p > 1, calls=p)]
    return [*first, *copy(between, p > 1 and max(T, r) > 1, again=1), *copy(r * m * n, r > 1),
            product(T * p, n * r, m, strided=T == 1 and p > 1), *copy(T * m * p, p > 1)]


def one_term(shape, T, order, dot):
    """A B of one column or row, with hardly any calls: A's product and a broadcast, five of them in training, or a sum."""
    m, n, p, q, _ = shape
    large = product(T, n, m, strided=dot)
    return [large, Step(1, copied=T * m * p, training=5)] if order == 'a' else [Step(1, moved=T * n * q), large]


def whole(shape, T, kept):
    """W's product, and W itself, formed twice in training and its gradient passed on, unless it is kept."""
    m, n, p, q, _ = shape
    return [*copy(m * p * n * q, not kept, again=1), product(T, n * q, m * p)]


def steps(name, shape, tokens, kept=False):
    """The steps of a plan; kept: W is there already."""
    order, _, layout = name.partition('_')
    if name == 'materialise':
        return whole(shape, tokens, kept)
    if layout in ('dot', 'outer', 'inner'):
        return one_term(shape, tokens, order, layout == 'dot')
    return (a_first if order == 'a' else b_first)(shape, tokens, layout)


# ---------------------------------------------------------------------------------------------------
# the choice

def counts(name, shape, tokens, training=False, kept=False):
    """What CONSTANTS multiply, summed over a plan's steps: five numbers."""
    found = steps(name, shape, tokens, kept and not training)
    times = [step.training if training else 1 for step in found]
    return [sum(t * step[i] for t, step in zip(times, found)) for i in range(len(CONSTANTS))]


def seconds(name, shape, tokens, training=False, kept=False):
    """What the rule believes a plan takes, on the machines of the record."""
    return sum(constant * count for constant, count in zip(CONSTANTS, counts(name, shape, tokens, training, kept)))


def cheapest(shape, tokens, training=False, kept=False):
    """The plan that costs least for that many tokens."""
    return min(considered(shape, tokens, 'cpu'), key=lambda name: seconds(name, shape, tokens, training, kept))


@functools.lru_cache(maxsize=1024)
def choices(shape, training, kept):
    """(tokens, plan) pairs in rising order, for plan.taken: the cheapest plan up to that many tokens.

    kept: without gradients, a plan that forms W does so once (KroneckerLinear.merge). Cost: a millisecond per shape.
    """
    found = [(tokens, cheapest(shape, tokens, training, kept)) for tokens in TOKENS]
    following = [name for _, name in found[1:]] + [None]
    return tuple(pair for pair, name in zip(found, following) if pair[1] != name)


def ruled(shape, tokens, device, training=False, kept=False, compiled=False):
    """The rule's plan for that many tokens: by cost on a CPU, by FLOPs elsewhere and where torch.compile runs it."""
    if device.type != 'cpu' or compiled:
        return by_rule(rule(*sizes_of(shape)), tokens)
    return taken(choices(shape, training, kept and not training), tokens)


def keep_formed(model):
    """For generation on a CPU: sums whose W is best for a single token keep it (KroneckerLinear.merge), others do not."""
    for module in kronecker(model):
        on_cpu = module.B.device.type == 'cpu'
        module.merge = on_cpu and taken(choices(module.kron_shape(), False, True), 1) == 'materialise'
