"""A linear with many matrices: a sum of Kronecker products with a gate per term and token, y = sum_e g_e (A_e ⊗ B_e) x.

A factor may be shared by all experts: then it costs one product per token, before the others or after their sum.
Sizes in this file: E experts, k = top_k, T tokens, A (E or 1, m, n), B (E or 1, p, q), out = m p, in = n q; G groups
of R rows as in kron/router.py.
"""
import math

import torch
import torch.nn as nn

from kron.linear import CALIBRATED, METHODS, KroneckerLinear
from kron.van_loan import nearest_kronecker_sum
from layers.basic import Linear
from layers.structured import no_autocast


def left(X, A):
    """A_g X for every row: X (G, R, n, q), A (G, m, n) -> (G, R, m, q), as one product per group."""
    G, R, n, q = X.shape
    Y = X.transpose(2, 3).reshape(G, R * q, n) @ A.mT                                   # (G, R q, m)
    return Y.view(G, R, q, -1).transpose(2, 3)


def right(X, B):
    """X B_g^T for every row: X (G, R, n, q), B (G, p, q) -> (G, R, n, p), as one product per group."""
    G, R, n, q = X.shape
    return (X.reshape(G, R * n, q) @ B.mT).view(G, R, n, -1)


class ExpertLinear(nn.Module):
    """y = sum over the chosen experts of g_e (A_e ⊗ B_e) x, plus one bias, for gates g that sum to 1.

    in_features, out_features: sizes; bias: bool; experts E, m x n: size of the left factors; top_k: experts per token;
    share: 'A' or 'B', the factor that all experts have in common, or None. m = out and n = in leave a 1 x 1 right factor,
    which is left out: dense experts, weight (E, out, in). Parameters E m n + E p q + out, a shared factor once. FLOPs per
    token: k times those of an A_e ⊗ B_e in the cheaper order, a shared factor's product once. Otherwise no
    (out, in) matrix is formed, forward or backward. Raises ValueError, one sentence, for sizes that do not divide.
    """
    tags = {'A': 'factor', 'B': 'factor', 'weight': 'factor', 'bias': 'vector'}
    methods, calibrated, products = METHODS, CALIBRATED, (('A', 'B'),)

    def __init__(self, in_features, out_features, bias, experts, m, n, top_k=2, share='B'):
        super().__init__()
        KroneckerLinear.weight_numel(in_features, out_features, m, n)           # refuses bad sizes
        self.in_features, self.out_features = in_features, out_features
        self.experts, self.top_k, self.m, self.n, self.share = experts, top_k, m, n, share
        self.A = self.B = self.weight = None
        if (m, n) == (out_features, in_features):
            self.weight, self.share = nn.Parameter(torch.empty(experts, m, n)), None
        else:
            self.A = nn.Parameter(torch.empty(1 if share == 'A' else experts, m, n))
            self.B = nn.Parameter(torch.empty(1 if share == 'B' else experts, out_features // m, in_features // n))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        self.reset_parameters()

    @property
    def factors(self):
        """A and B, or the dense weight alone."""
        return (self.A, self.B) if self.weight is None else (self.weight,)

    @property
    def zero_factor(self):
        """The name of a factor whose zeros make every expert zero."""
        return 'B' if self.weight is None else 'weight'

    @property
    def spec(self):
        """Its name in the site table."""
        what = f'kron({self.m}, {self.n})' if self.weight is None else 'dense'
        return f'{self.top_k} of {self.experts} {what}' + (f', one {self.share}' if self.share else '')

    def arguments(self):
        """The arguments that build another one of the same structure, besides sizes and bias."""
        return {'experts': self.experts, 'm': self.m, 'n': self.n, 'top_k': self.top_k, 'share': self.share}

    @torch.no_grad()
    def reset_parameters(self, std=0.02):
        """Gaussian factors with ||A_e||_F = ||B_e||_F, and entries of the gated sum of that std at equal gates; b = 0.

        The sum of k independent experts at gates 1/k has 1/sqrt(k) of an expert's std, so an expert has std sqrt(k).
        """
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        norm = std * math.sqrt(self.top_k * self.out_features * self.in_features)       # of each expert's matrix
        for factor in self.factors:
            nn.init.normal_(factor)
            factor.mul_(norm ** (1 / len(self.factors)) / factor.norm(dim=(1, 2), keepdim=True))

    def forward(self, x, slots, gates):
        """x (T, in), Slots and gates (T, k) of the router -> (T, out)."""
        y = self.product(x, slots, gates) if self.weight is None else slots.gather(
            slots.scatter(x) @ slots.pick(self.weight).mT, gates)
        return y if self.bias is None else y + self.bias.to(y.dtype)    # autocast leaves the bias in fp32

    def product(self, x, slots, gates):
        """The gated sum of (A_e ⊗ B_e) x, in the order of fewer FLOPs."""
        A, B = self.factors
        steps = [(left, A), (right, B)] if self.a_first() else [(right, B), (left, A)]
        x = x.view(len(x), A.shape[2], B.shape[2])                                      # (T, n, q)
        x = self.apply_shared(x, *steps.pop(0)) if self.shared(steps[0]) else x
        X = slots.scatter(x)                                                            # (G, R, ., .)
        last = steps.pop() if len(steps) > 1 and self.shared(steps[-1]) else None
        for function, factor in steps:
            X = function(X, slots.pick(factor))
        y = slots.gather(X, gates)                                                      # (T, ., .)
        return (y if last is None else self.apply_shared(y, *last)).reshape(len(y), self.out_features)

    def shared(self, step):
        return self.share is not None and step[1] is getattr(self, self.share)

    @staticmethod
    def apply_shared(x, function, factor):
        """A factor that all experts share, once per token: x (T, ., .)."""
        return function(x[None], factor)[0]

    def order_flops(self):
        """Forward FLOPs per token of (A-first, B-first), a shared factor counted once."""
        (_, m, n), (_, p, q) = self.A.shape, self.B.shape
        a, b = (1 if self.share == factor else self.top_k for factor in 'AB')
        return 2 * (a * m * n * q + b * m * q * p), 2 * (b * n * q * p + a * n * m * p)

    def a_first(self):
        """Whether A-first costs fewer FLOPs; a tie goes to B-first."""
        first, second = self.order_flops()
        return first < second

    def flops(self, tokens):
        """Forward FLOPs for that many tokens, a multiply-add counted as 2; padding adds at most a quarter."""
        if self.weight is not None:
            return 2 * tokens * self.top_k * self.in_features * self.out_features
        return tokens * min(self.order_flops())

    def active(self):
        """Parameters used per token."""
        each = [f.numel() if f.shape[0] < self.experts else self.top_k * f[0].numel() for f in self.factors]
        return sum(each) + (0 if self.bias is None else self.bias.numel())

    def dense_weight(self):
        """The matrices of all experts, (E, out, in), multiplied in fp32 at least and cast back."""
        if self.weight is not None:
            return self.weight
        dtype = torch.promote_types(self.A.dtype, torch.float32)
        A, B = (f.to(dtype).expand(self.experts, -1, -1) for f in (self.A, self.B))
        with no_autocast(A):
            W = torch.einsum('eab,ecd->eacbd', A, B)
        return W.reshape(self.experts, self.out_features, self.in_features).to(self.A.dtype)

    @torch.no_grad()
    def realise(self):
        """Replace every expert's factors by the dense matrix, in place: the same function."""
        if self.weight is None:
            self.weight = nn.Parameter(self.dense_weight(), requires_grad=self.A.requires_grad)
            self.A = self.B = self.share = None
            self.m, self.n = self.out_features, self.in_features

    @classmethod
    def from_dense(cls, weight, bias, *, method='van_loan', stats=None, experts, m, n, top_k=2, share='B'):
        """The experts that stand for a dense matrix while the router's weight is 0; see at_start.

        With share=None the first top_k experts are the terms of `method`'s Kronecker sum of top_k terms, times top_k because
        gates are 1 / top_k, and the others the terms of the nearest sum to the remainder. With a shared factor, or
        dense experts, every expert is the one-term sum (the matrix itself). Arguments and errors otherwise as in
        KroneckerLinear.from_dense.
        """
        module = cls(weight.shape[1], weight.shape[0], bias is not None, experts, m, n, top_k, share).to(weight)
        factors = (weight.detach(),)
        if module.weight is None:
            made = KroneckerLinear.from_dense(weight, bias, method=method, stats=stats, m=m, n=n,
                                              terms=1 if share else top_k)
            factors, bias = (made.A.detach(), made.B.detach()), made.bias
            if not share:
                left_over = nearest_kronecker_sum(weight - made.dense_weight(), m, n, experts - top_k)
                factors = [torch.cat(pair) * top_k ** 0.5 for pair in zip(factors, left_over)]
        with torch.no_grad():
            for parameter, value in zip(module.factors, factors):
                parameter.copy_(value)                  # one term is copied to every expert
            if bias is not None:
                module.bias.copy_(bias)
        return module

    def at_start(self):
        """The dense linear that it equals while the router's weight is 0: ties go to the first top_k experts."""
        return Linear.from_dense(self.dense_weight()[:self.top_k].mean(0), self.bias)
