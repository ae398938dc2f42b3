"""A linear map whose matrix has a low rank, W = U V, applied as two thin products."""
import math

import torch
import torch.nn as nn

from layers import few_rows
from layers.base import whole
from layers.structured import Structured, loudest, no_autocast, options_numel, silenced
from lowrank.svd import moved, seen, truncated_svd, two_sided_svd, whitened_svd


def svd(weight, stats, rank):
    """The nearest product in Frobenius norm -> U, V and no mean: the bias is unchanged."""
    return *truncated_svd(weight, rank), None


def svd_whitened(weight, stats, rank):
    """The product with the nearest outputs, min E ||W x - U V x||^2 over the calibration inputs -> U, V, no mean."""
    count, moment = (seen(stats, name, weight, 'svd_whitened') for name in ('count', 'moment'))
    return *whitened_svd(weight, rank, moment, count), None


def svd_whitened_bias(weight, stats, rank):
    """The same where the bias absorbs what the mean input m loses, so that U V need only fit x - m -> U, V, m."""
    count, mean, covariance = (seen(stats, name, weight, 'svd_whitened_bias') for name in ('count', 'mean', 'covariance'))
    return *whitened_svd(weight, rank, covariance, count), mean


def svd_whitened_hessian(weight, stats, rank):
    """The product with the smallest loss increase, to second order: errors weighted by the gradients' covariance."""
    count, moment, gradient = (seen(stats, name, weight, 'svd_whitened_hessian') for name in ('count', 'moment', 'gradient'))
    return *two_sided_svd(weight, rank, moment, gradient, count), None


def svd_whitened_sequential(weight, stats, rank):
    """The product with the nearest outputs to the dense model's, on the inputs from the compressed earlier layers.

    For a site without a bias, for which from_dense has the best one: svd_whitened of svd.moved's target.
    """
    T, _, stats = moved(weight, None, stats)
    return *(factor.to(weight.dtype) for factor in svd_whitened(T, stats, rank)[:2]), None


# method of from_dense -> function (weight (out, in) detached, stats, rank) -> U, V, the mean input or None
METHODS = {
    'van_loan': svd,        # the name that every structure has: its nearest member in Frobenius norm
    'svd': svd,
    'svd_whitened': svd_whitened,
    'svd_whitened_bias': svd_whitened_bias,
    'svd_whitened_sequential': svd_whitened_sequential,
    'svd_whitened_hessian': svd_whitened_hessian,
}
CALIBRATED = frozenset(name for name in METHODS if 'whitened' in name)      # the methods that need stats


class LowRankLinear(Structured):
    """y = U (V x) + b with U (out, rank) and V (rank, in).

    in_features, out_features: sizes; bias: bool; rank >= 1. Parameters rank (out + in) (+ out), FLOPs per token twice
    that. A rank beyond min(out, in) is allowed and adds nothing. No (out, in) matrix is formed, forward or backward.
    exact_columns, weight_norm, guide: see structured.Structured.
    Raises ValueError for sizes that are not positive.
    """
    tags = {'U': 'factor', 'V': 'factor', 'bias': 'vector'}
    methods, calibrated = METHODS, CALIBRATED
    size_argument, zero_factor, products = 'rank', 'U', (('U', 'V'),)

    def __init__(self, in_features, out_features, bias, rank, *, exact_columns=0, weight_norm=False, guide=False):
        super().__init__()
        self.weight_numel(in_features, out_features, rank, exact_columns, weight_norm, guide)       # refuses bad sizes
        self.rank = rank
        self.U = nn.Parameter(torch.empty(out_features, rank))
        self.V = nn.Parameter(torch.empty(rank, in_features))
        self.add_options(in_features, out_features, bias, exact_columns, weight_norm, guide)
        self.reset_parameters()

    @classmethod
    def weight_numel(cls, in_features, out_features, rank, exact_columns=0, weight_norm=False, guide=False):
        """Parameters without the bias: rank (out + in) and the options'. Raises ValueError, one sentence, for bad sizes."""
        options = options_numel(in_features, out_features, exact_columns, weight_norm, guide)
        whole(rank=rank)
        return rank * (out_features + in_features) + options

    def reset_factors(self, std):
        """U V = the part of `rank` largest singular values of a Gaussian matrix, rescaled to entries of std.

        "Spectral" initialisation: U^T U = V V^T = diag(S), so that both factors get gradients of equal size.
        Truncation reduces the norm (to about rank/in of it when rank << in <= out), so U V is rescaled to
        ||U V||_F = std sqrt(out in) exactly. The SVD of the Gaussian G comes from an eigh of its smaller Gram matrix,
        G^T G = Q L Q^T, hence U = G Q L^-1/4 and V = L^1/4 Q^T: exact, as U V = G Q Q^T whatever L's rounding, at a
        third of the cost of an SVD (0.1 s for 3072 x 768). Ranks beyond min(out, in) start as zeros in U and
        Gaussian in V. Source of the initialisation: Wei et al., NeurIPS 2024 (structured FFNs).
        """
        if self.U.is_meta:
            return
        out, dtype = self.out_features, torch.promote_types(self.U.dtype, torch.float32)
        tall, short = max(out, self.in_features), min(out, self.in_features)
        G = torch.randn(tall, short, dtype=dtype, device=self.U.device)
        L, Q = torch.linalg.eigh(G.t() @ G)                                     # L (short,) rises
        k = min(self.rank, short)
        L, Q = L[-k:].flip(0), Q[:, -k:].flip(1)                                # the k largest, Q (short, k)
        L = L.clamp(min=torch.finfo(dtype).eps * tall)                          # rounding makes small ones negative
        gain = (std * math.sqrt(tall * short) / L.sum().sqrt()).sqrt()
        left, right = gain * (G @ (Q * L ** -0.25)), gain * (Q * L ** 0.25)     # left right^T = gain^2 G Q Q^T
        if out < self.in_features:
            left, right = right, left
        nn.init.zeros_(self.U)
        nn.init.normal_(self.V, std=math.sqrt(std))
        self.U[:, :k].copy_(left)
        self.V[:k].copy_(right.t())

    def product(self, x, bias=None):
        """U (V x) + bias for x (..., in); never forms W."""
        return few_rows.linear(few_rows.linear(x, self.V), self.U, bias)

    def product_weight(self):
        """U V (out, in) in fp32 at least."""
        dtype = torch.promote_types(self.U.dtype, torch.float32)
        with no_autocast(self.U):
            return self.U.to(dtype) @ self.V.to(dtype)

    def row_norms(self):
        """||U_i V||, (out,), in fp32 at least and without W: rank^2 (out + in) multiply-adds."""
        dtype = torch.promote_types(self.U.dtype, torch.float32)
        U, V = self.U.to(dtype), self.V.to(dtype)
        return ((U @ (V @ V.t())) * U).sum(1).clamp(min=1e-24).sqrt()

    def fans(self):
        """{factor: inputs that each of its outputs sums}."""
        return {'V': self.in_features, 'U': self.rank}

    def norm_flops(self):
        """FLOPs of row_norms."""
        return 2 * self.rank ** 2 * (self.in_features + self.out_features)

    def normalise_(self, dim):
        """Every row (dim=1) or column (dim=0) of W to unit length, in place and without forming W.

        Row i of W has the squared norm U_i (V V^T) U_i^T, column j V_j^T (U^T U) V_j.
        """
        if self.refuse_to_normalise(dim):
            self.magnitude.fill_(1)
        elif dim == 1:
            self.U.div_(self.row_norms()[:, None])
        else:
            norms = torch.einsum('rj,rs,sj->j', self.V, self.U.t() @ self.U, self.V).clamp(min=1e-24).sqrt()
            self.V.div_(norms)

    def flops(self, tokens):
        """Forward FLOPs for that many tokens, a multiply-add counted as 2."""
        return 2 * tokens * self.rank * (self.in_features + self.out_features) + self.option_flops(tokens)

    @classmethod
    def from_dense(cls, weight, bias, *, method='van_loan', stats=None, rank, exact_columns=0, index=None, **options):
        """The structure that replaces a dense matrix, with its dtype and device.

        weight (out, in), bias (out,) or None; method: 'van_loan' or 'svd', both the nearest matrix of that rank in
        Frobenius norm; 'svd_whitened', the one with the nearest outputs on the inputs of stats (count, mean and
        covariance, see seen); 'svd_whitened_bias', which also adds (W - U V) mean to the bias;
        'svd_whitened_sequential', the dense model's outputs under other inputs (cross, source_mean), bias included;
        'svd_whitened_hessian', errors weighted by the gradients' covariance too (gradient). Others keep the bias.
        Cost: truncated_svd, whitened_svd. Raises ValueError for an unknown method, stats or a bias that are missing,
        or sizes below 1. exact_columns are the inputs of largest E[x^2], without stats the largest columns of W;
        or those of `index`.
        """
        if method not in METHODS:
            raise ValueError(f'method={method!r} is unknown; lowrank knows {", ".join(METHODS)}')
        if bias is None and method == 'svd_whitened_bias':
            raise ValueError("method='svd_whitened_bias' needs a bias to correct; take 'svd_whitened' or bias=True")
        weight = target = weight.detach()
        if method == 'svd_whitened_sequential' and (bias is not None or exact_columns):
            target, bias, stats = moved(weight, bias, stats)
            method = 'svd_whitened' if bias is None else 'svd_whitened_bias'
        index, whole = loudest(target, stats, exact_columns) if index is None else index, target.to(weight.dtype)
        if index is not None:                       # the factors are 0 in these columns, which is the best choice
            target, stats = target.index_fill(1, index, 0), silenced(stats, index)
        U, V, mean = METHODS[method](target, stats, rank)
        if mean is not None:
            bias = bias + (target.double() - U.double() @ V.double()) @ mean
        return cls.settled(whole, bias, cls.gauged(U, V), index, rank=rank, exact_columns=exact_columns, **options)

    @staticmethod
    def gauged(U, V):
        """The factors of the product U V, by name."""
        return {'U': U, 'V': V}

    def extra_repr(self):
        return (f'in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, '
                f'bias={self.bias is not None}')
