"""The contraction plan of a sum of Kronecker products: by the rule, or as measured by timing.py and stored.

The rule is arithmetic: on a CPU the least cost (cost.py), elsewhere and compiled the fewest FLOPs (`rule`).

A choice is one entry of a dict of strings that is stored in checkpoints and config.json:

    '3072x768 by 768x768x1 train 4096 float32 cpu': 'a_blocks'

out x in by m x n x terms; 'train' with gradients, else 'eval'; tokens per call; type of the computation; device.
`assign` gives every module the entries of its shape; without entries the rule applies.
"""
import math
from typing import NamedTuple

import torch

from kron import fused, products
from kron.lean import THIN

NEAR = 1.6              # an order of contraction with that many times the FLOPs of the other is not considered


class Shape(NamedTuple):
    """A (terms, m, n), B (terms, p, q)."""
    m: int
    n: int
    p: int
    q: int
    terms: int

    @property
    def words(self):
        return f'{self.m * self.p}x{self.n * self.q} by {self.m}x{self.n}x{self.terms}'


class Plan(NamedTuple):
    """apply: (x (T, in), A, B) -> (T, out), right for every shape; order: 'A', 'B' or 'W' first; suits: shapes it is for.

    most: tokens per call above which another plan takes over; runs: whether it runs on a device.
    """
    apply: object
    order: str
    suits: object = lambda shape: True
    most: float = math.inf
    runs: object = lambda device: True


def thin(shape):
    return max(shape.p, shape.q) <= THIN


def column(shape):
    """Whether B is one column."""
    return shape.q * shape.terms == 1


def row(shape):
    """Whether B is one row."""
    return shape.p * shape.terms == 1


# name -> plan; without gradients a module may keep the W of materialise, see KroneckerLinear.merge
PLANS = {
    'a_rows': Plan(products.a_rows, 'A'),
    'b_rows': Plan(products.b_rows, 'B'),
    'a_planes': Plan(products.a_planes, 'A', thin),
    'b_planes': Plan(products.b_planes, 'B', thin),
    'a_blocks': Plan(products.a_blocks, 'A', thin),
    'b_blocks': Plan(products.b_blocks, 'B', thin),
    'a_outer': Plan(products.a_outer, 'A', column),
    'b_inner': Plan(products.b_inner, 'B', row),
    'a_dot': Plan(products.a_dot, 'A', column, 1),
    'b_dot': Plan(products.b_dot, 'B', row, 1),
    'a_fused': Plan(fused.a_fused, 'A', fused.suits, runs=fused.available),
    'b_fused': Plan(fused.b_fused, 'B', fused.suits, runs=fused.available),
    'materialise': Plan(products.materialise, 'W'),
}


def shape_of(A, B):
    return Shape(*A.shape[1:], *B.shape[1:], A.shape[0])


def sizes_of(shape):
    """Shapes of A and B."""
    return (shape.terms, shape.m, shape.n), (shape.terms, shape.p, shape.q)


# ---------------------------------------------------------------------------------------------------
# by FLOPs

def order_flops(A_shape, B_shape):
    """Forward FLOPs per token of (A-first, B-first), a multiply-add counted as 2."""
    (r, m, n), (_, p, q) = A_shape, B_shape
    return 2 * r * m * q * (n + p), 2 * r * n * p * (q + m)


def cheaper_is_a_first(A_shape, B_shape):
    """Whether A-first costs fewer FLOPs; a tie goes to B-first."""
    a_first_flops, b_first_flops = order_flops(A_shape, B_shape)
    return a_first_flops < b_first_flops


def rule(A_shape, B_shape):
    """(plan of the order with fewer forward FLOPs, tokens from which forming W costs fewer, or None); no clock, no state.

    A B of at most THIN rows and columns is contracted by planes. Where both orders cost more than the dense matrix, W is
    formed from a number of tokens on: 2 out in (tokens + terms) FLOPs.
    """
    (r, m, n), (_, p, q) = A_shape, B_shape
    least, dense = min(order_flops(A_shape, B_shape)), 2 * m * p * n * q
    order = f'{"a" if cheaper_is_a_first(A_shape, B_shape) else "b"}_{"planes" if max(p, q) <= THIN else "rows"}'
    return order, dense * r // (least - dense) + 1 if least > dense else None


def considered(shape, tokens, device):
    """Names of the plans that may be the fastest: those for its shape, device and tokens, of a cheap order."""
    flops = dict(zip('AB', order_flops(*sizes_of(shape))))
    least = min(flops.values())
    return [name for name, plan in PLANS.items() if plan.suits(shape) and tokens <= plan.most and plan.runs(device)
            and flops.get(plan.order, least) <= NEAR * least]


def rule_flops(A_shape, B_shape, tokens):
    """Forward FLOPs of the rule's plan for that many tokens."""
    (r, m, n), (_, p, q), many = A_shape, B_shape, rule(A_shape, B_shape)[1]
    formed = many is not None and tokens >= many
    return 2 * m * p * n * q * (tokens + r) if formed else tokens * min(order_flops(A_shape, B_shape))


def by_rule(rule, tokens):
    """The plan of a rule for that many tokens."""
    order, many = rule
    return order if many is None or tokens < many else 'materialise'


# ---------------------------------------------------------------------------------------------------
# a model's plans

def entry(shape, training, tokens, dtype, device):
    """The key of one choice; see the top of this file."""
    kind = str(dtype).removeprefix('torch.')
    return f'{shape.words} {"train" if training else "eval"} {tokens} {kind} {torch.device(device).type}'


def kronecker(model):
    """The modules of a model that take plans."""
    return [module for module in model.modules() if hasattr(module, 'plans')]


def check(plans):
    """ValueError, in one sentence, for an invalid entry or an unknown plan."""
    for key, name in plans.items():
        if len(str(key).split()) != 7 or str(name) not in PLANS:
            raise ValueError(f'{key!r}: {name!r} is no plan; an entry is written '
                             f"'3072x768 by 768x768x1 train 4096 float32 cpu': one of {', '.join(PLANS)}")


def assign(model, plans, dtype, device):
    """Every module takes its entries of {entry: plan}; those of other shapes, types and devices are ignored."""
    check(plans)
    for module in kronecker(model):
        shape = shape_of(module.A, module.B)
        module.plans = tuple(tuple(sorted(limits(plans, shape, training, dtype, device))) for training in (False, True))


def limits(plans, shape, training, dtype, device):
    """(tokens, plan) of the entries for a shape."""
    for key, name in plans.items():
        tokens = key.split()[4]
        if key == entry(shape, training, tokens, dtype, device):
            yield int(tokens), name


def taken(plans, tokens):
    """The plan of (tokens, plan) pairs, in rising order, for that many tokens: the next larger one's, else the last."""
    for limit, name in plans:
        if tokens <= limit:
            return name
    return plans[-1][1]
