"""A mixture of Kronecker experts: an MLP with two gated sums of Kronecker products, one gate per term and token.

c_fc x = sum_e g_e(x) (A_e ⊗ B_e) x + b over the top_k experts that a router chooses for the token, and c_proj the
same with other factors and the same gates. With equal gates it is a static sum; a mixture adds the gates.
"""
import math

import torch.nn as nn
from torch.nn import functional as F

from kron.experts import ExpertLinear
from kron.router import Router, Slots, balance_loss, route, z_loss
from layers.base import BaseMLP, whole


class KronMoE(BaseMLP):
    """c_proj(gelu(c_fc x)) of size `hidden` (None: 4 C), both gated sums over top_k of `experts` Kronecker experts.

    experts E; m x n: size of c_fc's left factors, c_proj's are n x m; None: such that right factors are b x b, b the
    largest divisor of C up to 8. top_k: experts per token, gates a softmax over their k router scores; share: 'A' or 'B',
    the factor that experts have in common, or None. balance, z: weights of the load-balance loss and of the router
    z-loss, which join the training loss only. approximate: of GELU, 'tanh' is GPT-2's.
    Token choice, dropless: causal, and a token's output does not depend on the batch. Parameters 2 E (m n + p q) + E C
    (a shared factor once) and biases; ExpertLinear.flops, and 2 E C per token for the router.
    Raises ValueError, one sentence, for arguments that do not fit and under ngpt.
    """
    units = ('c_fc',)

    def __init__(self, config, site, experts, m=None, n=None, top_k=2, share='B', balance=0.01, z=0.001,
                 approximate='none', hidden=None):
        super().__init__()
        width, bias, side = config.n_embd, config.bias, small_side(config.n_embd)
        hidden = 4 * width if hidden is None else hidden
        whole(hidden=hidden)
        check(config, experts, top_k, share, balance, z, approximate)
        m, n = hidden // side if m is None else m, width // side if n is None else n
        self.site, self.top_k, self.balance, self.z = site, top_k, balance, z
        self.router = Router(width, experts)
        self.c_fc = ExpertLinear(width, hidden, bias, experts, m, n, top_k, share)
        self.c_proj = ExpertLinear(hidden, width, bias, experts, n, m, top_k, share)
        self.approximate, self.dropout = approximate, nn.Dropout(config.dropout)

    def forward(self, x, ctx):
        """x (B, T, C) -> (B, T, C); writes auxiliary losses and loads to ctx."""
        rows = x.flatten(0, -2)                         # (T, C), all sequences
        logits = self.router(rows)
        gates, chosen = route(logits, self.top_k)
        slots = Slots(chosen, logits.shape[1])
        self.note(logits, slots.load, ctx)
        u = F.gelu(self.c_fc(rows, slots, gates), approximate=self.approximate)
        return self.dropout(self.c_proj(u, slots, gates).view_as(x))

    def note(self, logits, load, ctx):
        """The load of every expert, and while training the two losses, to ctx."""
        if ctx is None:
            return
        ctx.measures['load', self.site] = load
        if self.training:
            for name, loss in (('balance_loss', self.balance * balance_loss(logits, load)),
                               ('z_loss', self.z * z_loss(logits))):
                ctx.losses.append(loss)
                ctx.measures[name, self.site] = loss.detach()

    def realise(self):
        """Make every expert dense, in place: the same function."""
        self.c_fc.realise()
        self.c_proj.realise()

    @staticmethod
    def realised(arguments, width):
        """The arguments of the spec after realise()."""
        return {**arguments, 'm': arguments['hidden'] or 4 * width, 'n': width, 'share': None}


def small_side(width):
    """The default side of the right factors."""
    return max(b for b in range(1, 9) if width % b == 0)


def check(config, experts, top_k, share, balance, z, approximate):
    """Refuse arguments that do not fit, in one sentence each."""
    for name, value in (('experts', experts), ('top_k', top_k)):
        if type(value) is not int or value < 1:
            raise ValueError(f'{name} must be a whole number of at least 1, got {value!r}')
    if top_k > experts:
        raise ValueError(f'top_k can be at most experts ({experts}), got {top_k}')
    if share not in ('A', 'B', None):
        raise ValueError(f"share is 'A', 'B' or None, got {share!r}")
    for name, value in (('balance', balance), ('z', z)):
        if type(value) not in (int, float) or not 0 <= value < math.inf:
            raise ValueError(f'{name} is the weight of a loss, a number from 0, got {value!r}')
    if approximate not in ('none', 'tanh'):
        raise ValueError(f"approximate is 'none' or 'tanh', got {approximate!r}")
    if config.ngpt != 'none':
        raise ValueError("gated sums cannot be normalised as ngpt asks; set ngpt='none' or take another mlp")
