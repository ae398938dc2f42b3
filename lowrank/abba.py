"""A linear map whose matrix is a Hadamard product of two low-rank products, W = s (B1 A1) o (B2 A2).

Its rank reaches rank1 rank2 for the parameters of rank rank1 + rank2. By the Khatri-Rao identity it is W = s B* A*
with B*[i, (a, b)] = B1[i, a] B2[i, b] and A*[(a, b), j] = A1[a, j] A2[b, j], so W x needs no W.
"""
import math

import torch
import torch.nn as nn
from torch.nn import functional as F

from layers.base import whole
from layers.structured import Structured, no_autocast, options_numel
from lowrank.hadamard import nearest_hadamard
from lowrank.svd import seen

ROWS = 256          # rows of W in memory while its norms are computed


def nearest(weight, stats, rank1, rank2):
    """nearest_hadamard: a small Frobenius error -> B1, A1, B2, A2."""
    return nearest_hadamard(weight, rank1, rank2)


def als(weight, stats, rank1, rank2):
    """The same with the squared error of column j weighted by E[x_j^2] -> B1, A1, B2, A2.

    Only the diagonal of the second moment: the full matrix would couple the columns of A.
    """
    return nearest_hadamard(weight, rank1, rank2, seen(stats, 'moment', weight, 'als').diagonal())


# method of from_dense -> function (weight (out, in) detached, stats, rank1, rank2) -> B1, A1, B2, A2
METHODS = {
    'van_loan': nearest,    # the name that every structure has: its nearest member in Frobenius norm
    'als': als,
}
CALIBRATED = frozenset({'als'})             # the methods that need stats


class ABBALinear(Structured):
    """y = s ((B1 A1) o (B2 A2)) x + b with B1 (out, rank1), A1 (rank1, in), B2 (out, rank2), A2 (rank2, in).

    in_features, out_features: sizes; bias: bool; rank1, rank2 >= 1; scale: s is one learnable scalar, initially 1, else
    s = 1. Parameters (rank1 + rank2) (out + in), and the rank of W up to rank1 rank2: most where the ranks are equal.
    The factors are applied one after the other, or W is formed once per call, as `materialises` says: a rule by FLOPs.
    guide: see structured.Structured. Raises ValueError for sizes that are not positive.
    Source: ABBA-Adapters (arXiv 2505.14238) for the product and the identity; FedPara (arXiv 2108.06098) trained such
    products as weights, from scratch.
    """
    tags = {'B1': 'factor', 'A1': 'factor', 'B2': 'factor', 'A2': 'factor', 'scale': 'vector', 'bias': 'vector'}
    methods, calibrated = METHODS, CALIBRATED
    size_argument, zero_factor = 'rank1', 'B1'         # and no `products`: |X o Y|_2 is far below |X|_2 |Y|_2

    def __init__(self, in_features, out_features, bias, rank1, rank2, scale=False, *, guide=False):
        super().__init__()
        self.weight_numel(in_features, out_features, rank1, rank2, scale, guide)        # refuses bad sizes
        self.rank1, self.rank2 = rank1, rank2
        self.B1 = nn.Parameter(torch.empty(out_features, rank1))
        self.A1 = nn.Parameter(torch.empty(rank1, in_features))
        self.B2 = nn.Parameter(torch.empty(out_features, rank2))
        self.A2 = nn.Parameter(torch.empty(rank2, in_features))
        self.scale = nn.Parameter(torch.ones(1)) if scale else None
        self.add_options(in_features, out_features, bias, guide=guide)
        self.reset_parameters()

    @classmethod
    def weight_numel(cls, in_features, out_features, rank1, rank2, scale=False, guide=False):
        """Parameters without the bias, (rank1 + rank2) (out + in) and one with scale.

        Raises ValueError, in one sentence, for sizes below 1 or a scale that is no bool.
        """
        options_numel(in_features, out_features, guide=guide)
        whole(rank1=rank1, rank2=rank2)
        if not isinstance(scale, bool):
            raise ValueError(f'scale={scale!r} is neither True nor False; True learns one scale')
        return (rank1 + rank2) * (out_features + in_features) + scale

    def reset_factors(self, std):
        """Factors N(0, sigma^2), sigma = (std^2 / (rank1 rank2))^(1/8), so that entries of W have std; s = 1.

        Each is rescaled to a mean square of exactly sigma^2, which removes half of the randomness of the norm of W.
        An entry of B1 A1 is a sum of rank1 products of independent entries, variance rank1 sigma^4; that of B2 A2
        rank2 sigma^4; and the variance of a product of independent centred variables is the product of theirs,
        rank1 rank2 sigma^8 = std^2. Entries are not Gaussian: their kurtosis is (3 + 6 / rank1) (3 + 6 / rank2), 14 at
        ranks of 8, so a few are large. Zeros in B2, as adapters start, would give a zero weight here.
        """
        sigma = (std ** 2 / (self.rank1 * self.rank2)) ** 0.125
        for factor in (self.B1, self.A1, self.B2, self.A2):
            nn.init.normal_(factor)
            factor.mul_(sigma * factor.numel() ** 0.5 / factor.norm())
        if self.scale is not None:
            nn.init.ones_(self.scale)

    # ------------------------------------------------------------------------------------------------
    # the map

    def materialises(self, tokens):
        """Whether a call on that many tokens forms W: where that takes fewer FLOPs, or the factors would need W's memory.

        Applying the factors takes 2 tokens rank1 rank2 (out + in), forming W and applying it
        2 out in (rank1 + rank2 + tokens). Backward takes twice as many either way, so the rule is right for training
        too. The largest tensor of the first way that does not grow with the tokens has min(tokens, rank2) rank1
        max(out, in) elements, which must be fewer than W has.
        """
        r1, r2, out, cols = self.rank1, self.rank2, self.out_features, self.in_features
        applied, formed = tokens * r1 * r2 * (out + cols), out * cols * (r1 + r2 + tokens)
        return formed < applied or min(tokens, r2) * r1 * max(out, cols) >= out * cols

    def flops(self, tokens):
        """Forward FLOPs for that many tokens, a multiply-add counted as 2; not proportional to them where W is formed.

        Those of matrix products; the entrywise products, at most out in, are not counted.
        """
        r1, r2, out, cols = self.rank1, self.rank2, self.out_features, self.in_features
        if self.materialises(tokens):
            return 2 * out * cols * (r1 + r2 + tokens) + self.option_flops(tokens)
        return 2 * tokens * r1 * r2 * (out + cols) + self.option_flops(tokens)

    def product(self, x, bias=None):
        """x (..., in) -> (..., out); forms W only where materialises(tokens)."""
        if x.shape[-1] != self.in_features:
            raise RuntimeError(f'x has {x.shape[-1]} features and not {self.in_features}')
        tokens = math.prod(x.shape[:-1])
        B1 = self.B1 if self.scale is None else self.B1 * self.scale
        if self.materialises(tokens):
            return F.linear(x, self.weight(B1, self.A1, self.B2, self.A2).to(self.B1.dtype), bias)
        if tokens < self.rank2:
            return self.few_tokens(x, B1, bias)
        B = (B1[:, :, None] * self.B2[:, None]).flatten(1)                      # B* (out, r1 r2)
        A = (self.A1[:, None] * self.A2).flatten(0, 1)                          # A* (r1 r2, in)
        return F.linear(F.linear(x, A), B, bias)

    def few_tokens(self, x, B1, bias):
        """The same sums token by token, without B* and A*, which cost more than a few tokens save."""
        z = F.linear(x[..., None, :] * self.A1, self.A2)                        # (..., r1, r2)
        z = F.linear(z, self.B2)                                                # (..., r1, out)
        y = (z * B1.t()).sum(-2)
        return (y if bias is None else y + bias).to(z.dtype)          # autocast's sum is in fp32

    @staticmethod
    def weight(B1, A1, B2, A2):
        """(B1 A1) o (B2 A2) multiplied in fp32 at least."""
        dtype = torch.promote_types(B1.dtype, torch.float32)
        with no_autocast(B1):
            return (B1.to(dtype) @ A1.to(dtype)) * (B2.to(dtype) @ A2.to(dtype))

    def product_weight(self):
        """s (B1 A1) o (B2 A2), (out, in), in fp32 at least."""
        dtype = torch.promote_types(self.B1.dtype, torch.float32)
        B1 = self.B1 if self.scale is None else self.B1.to(dtype) * self.scale.to(dtype)
        return self.weight(B1, self.A1, self.B2, self.A2)

    def normalise_(self, dim):
        """Every row (dim=1) or column (dim=0) of W to unit length, in place, by rows of B1 or columns of A1.

        The norms are exact, from ROWS rows of W at a time: (rank1 + rank2) out in multiply-adds. The form without
        W, ||W_i||^2 = B*_i (A* A*^T) B*_i^T, takes (rank1 rank2)^2 (out + in), more from ranks of 12 or so.
        """
        self.refuse_to_normalise(dim)
        dtype = torch.promote_types(self.B1.dtype, torch.float32)
        s = 1 if self.scale is None else self.scale.abs()
        rows, squares = [], torch.zeros(self.in_features, dtype=dtype, device=self.B1.device)
        for B1, B2 in zip(self.B1.split(ROWS), self.B2.split(ROWS)):
            W = self.weight(B1 * s, self.A1, B2, self.A2)
            rows.append(W.norm(dim=1))
            squares += W.square().sum(0)
        if dim == 1:
            self.B1.div_(torch.cat(rows)[:, None].clamp(min=1e-12))
        else:
            self.A1.div_(squares.sqrt().clamp(min=1e-12))

    @classmethod
    def from_dense(cls, weight, bias, *, method='van_loan', stats=None, rank1, rank2, scale=False, guide=False):
        """The structure that replaces a dense matrix, with its dtype and device; s = 1.

        weight (out, in), bias (out,) or None (kept as it is); method: 'van_loan', a small Frobenius error, or 'als',
        errors weighted by the second moment of each input; stats: statistics of a calibration pass (see svd.seen).
        Never a larger (weighted) error than the truncated SVD of rank max(rank1, rank2). Cost: nearest_hadamard.
        Raises ValueError for an unknown method, stats that are missing or sizes below 1.
        """
        if method not in METHODS:
            raise ValueError(f'method={method!r} is unknown; abba knows {", ".join(METHODS)}')
        fitted = METHODS[method](weight.detach(), stats, rank1, rank2)
        factors = dict(zip(('B1', 'A1', 'B2', 'A2'), fitted)) | ({'scale': torch.ones(1)} if scale else {})
        return cls.settled(weight.detach(), bias, factors, rank1=rank1, rank2=rank2, scale=scale, guide=guide)

    def extra_repr(self):
        return (f'in_features={self.in_features}, out_features={self.out_features}, rank1={self.rank1}, '
                f'rank2={self.rank2}, scale={self.scale is not None}, bias={self.bias is not None}')
