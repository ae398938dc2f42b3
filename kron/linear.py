"""A linear map whose matrix is a sum of Kronecker products, W = sum_i s_i A_i ⊗ B_i, applied by one of several plans.

products.py has the plans: a term costs two small products, in either order, and the orders differ in FLOPs by up to m or
n, so that an expanding and a contracting linear need opposite ones. plan.py chooses. Sizes in this file: A (terms, m, n),
B (terms, p, q), out = m p, in = n q.
"""
import math

import torch
import torch.nn as nn

from kron import cost
from kron.lean import computed_in
from kron.methods import CALIBRATED, METHODS, bias_shift, centred, fit_beside, moved
from kron.plan import PLANS, Shape, by_rule, cheaper_is_a_first, rule, rule_flops, taken
from layers.base import whole
from layers.structured import Structured, loudest, no_autocast, options_numel
from variants import did_you_mean


class KroneckerLinear(Structured):
    """y = (sum_i s_i A_i ⊗ B_i) x + b with A_i (m, n) and B_i (out/m, in/n).

    in_features, out_features: sizes; bias: bool; m must divide out_features and n in_features; terms >= 1;
    scale: one learnable s_i per term, initially 1, else s_i = 1. Factors A (terms, m, n), B (terms, out/m, in/n).
    More terms than min(m n, p q) are allowed and add nothing. exact_columns, weight_norm, guide: see structured.Structured.

    plans: two tuples of (tokens, plan), without and with gradients, as plan.assign sets them; where they are empty the plan
    is the rule's: the least cost on a CPU, the fewest FLOPs elsewhere. No (out, in) matrix is formed, forward or backward,
    unless the plan says so.
    merge: without gradients, a plan that forms W keeps it until the factors change or `train()`; initially off. A change
    through `.data` is not detected, so only programs that never train turn it on. A compiled call uses the W that the last
    eager call kept (attention/decoding.py makes one first), and forms W each time where there is none.
    Raises ValueError for sizes that do not divide or are not positive.
    Source: Krony-PT (arXiv 2412.12351) for the model; it forms W, which this class does not.
    """
    tags = {'A': 'factor', 'B': 'factor', 'scale': 'vector', 'bias': 'vector'}
    methods, calibrated = METHODS, CALIBRATED
    size_argument, zero_factor, products = 'terms', 'B', (('A', 'B'),)

    def __init__(self, in_features, out_features, bias, m, n, terms=1, scale=False, *, exact_columns=0, weight_norm=False,
                 guide=False):
        super().__init__()
        self.weight_numel(in_features, out_features, m, n, terms, scale, exact_columns, weight_norm, guide)     # refuses
        self.A = nn.Parameter(torch.empty(terms, m, n))
        self.B = nn.Parameter(torch.empty(terms, out_features // m, in_features // n))
        self.scale = nn.Parameter(torch.ones(terms)) if scale else None
        self.plans, self.rule, self.merge, self.merged = ((), ()), rule(self.A.shape, self.B.shape), False, None
        self.add_options(in_features, out_features, bias, exact_columns, weight_norm, guide)
        self.reset_parameters()

    @classmethod
    def weight_numel(cls, in_features, out_features, m, n, terms=1, scale=False, exact_columns=0, weight_norm=False,
                     guide=False):
        """Parameters without the bias: terms (m n + out in / (m n)), one per term with scale, and the options'.

        Raises ValueError, in one sentence that says what would work, for sizes that do not divide or are not positive.
        """
        options = options_numel(in_features, out_features, exact_columns, weight_norm, guide)
        whole(m=m, n=n, terms=terms)
        if not isinstance(scale, bool):
            raise ValueError(f'scale={scale!r} is neither True nor False; True learns one scale per term')
        if out_features % m or in_features % n:
            raise ValueError(f'factors of {m} x {n} do not divide a matrix of {out_features} x {in_features}; '
                             f'the nearest that do are {nearest_divisor(out_features, m)} x '
                             f'{nearest_divisor(in_features, n)}')
        return terms * (m * n + (out_features // m) * (in_features // n) + scale) + options

    def reset_factors(self, std):
        """A_i, B_i Gaussian, then rescaled to ||A_i||_F = ||B_i||_F = (std^2 out in / terms)^(1/4); s = 1.

        So every term has the norm std sqrt(out in / terms), and entries of W have that std: exactly with one term, on
        average with more; N(0, 0.02) for both factors would give 4e-4. Equal norms are also what van_loan gives and what
        gradient flow preserves. Equal rms was the alternative: AdamW moves every entry by about lr per step, so W then
        moves equally fast, relative to its size, through A as through B, but at lr / sqrt(std), where a dense W moves at
        lr / std. With equal norms the entries of the larger factor are nearly as small as a dense W's, and it learns as
        fast; the few entries of the other factor are near 1 and move little.
        Validation loss of a small character model (4 layers, n_embd 128, 1000 steps of AdamW, mean of 2 seeds) with
        equal norms, equal rms, N(0, 0.02): at lr 1e-3 2.07, 2.11, 2.27 with kron(256, 64) and 2.14, 2.23, 2.28 with
        kron(64, 16, terms=4), dense 2.10; at lr 3e-3 1.93, 2.17, 2.27 with kron(256, 64), dense 1.94 (one seed).
        """
        if self.scale is not None:
            nn.init.ones_(self.scale)
        norm = std * math.sqrt(self.out_features * self.in_features / self.A.shape[0])      # of each A_i ⊗ B_i
        for factor in (self.A, self.B):
            nn.init.normal_(factor)
            factor.mul_(math.sqrt(norm) / factor.norm(dim=(1, 2), keepdim=True))

    def product(self, x, bias=None):
        """x (..., in) -> (..., out), by the plan for that many rows."""
        rows = x if x.ndim == 2 else x.reshape(-1, self.in_features)
        name = self.plan(rows.shape[0], x.device.type)
        if name == 'materialise' and self.keeps():
            y = rows @ self.merged_weight(computed_in(x)).t()
        else:
            y = PLANS[name].apply(rows, self.A if self.scale is None else self.A * self.scale[:, None, None], self.B)
        if bias is not None:
            y = y + bias.to(y.dtype)                # autocast leaves the bias in fp32 and would widen y
        return y if x.ndim == 2 else y.view(*x.shape[:-1], self.out_features)

    def plan(self, tokens, kind='cpu'):
        """The plan's name for that many rows on that kind of device, here and now."""
        evaluation, training = self.plans
        plans = training if torch.is_grad_enabled() else evaluation     # torch 2.11 cannot compile a bool index
        if plans:
            return taken(plans, tokens)
        if kind != 'cpu' or torch.compiler.is_compiling():
            return by_rule(self.rule, tokens)
        return taken(cost.choices(self.kron_shape(), torch.is_grad_enabled(), self.merge), tokens)

    def kron_shape(self):
        """kron.plan.Shape of the sum, without A, which kron_pivot would form."""
        terms, p, q = self.B.shape
        return Shape(self.out_features // p, self.in_features // q, p, q, terms)

    def keeps(self):
        """Whether a W that is formed in this call is kept for the next one."""
        return self.merge and not torch.is_grad_enabled() and (self.merged is not None
                                                               or not torch.compiler.is_compiling())

    @torch.no_grad()
    def merged_weight(self, dtype):
        """W in that type, formed once per version of the factors, which are kept alive so that no address is reused."""
        if torch.compiler.is_compiling():           # which cannot ask for addresses
            return self.merged[1].to(dtype)
        parameters = [p for p in self.sources() if p is not None]
        version = [dtype, *((p.data_ptr(), p._version) for p in parameters)]
        if self.merged is None or self.merged[0] != version:
            self.merged = None                      # before the new one takes as much memory
            self.merged = version, self.product_weight().to(dtype), [p.detach() for p in parameters]
        return self.merged[1]

    def sources(self):
        """The parameters of W; None for one that is off."""
        return self.A, self.B, self.scale

    def train(self, mode=True):
        """nn.Module's train; drops the kept W when training begins."""
        self.merged = None if mode else self.merged
        return super().train(mode)

    def factors(self):
        """A with the scales in it, and B, in fp32 at least."""
        dtype = torch.promote_types(self.A.dtype, torch.float32)
        A = self.A.to(dtype)
        return A if self.scale is None else A * self.scale.to(dtype)[:, None, None], self.B.to(dtype)

    def product_weight(self):
        """sum_i s_i A_i ⊗ B_i, (out, in), in fp32 at least."""
        with no_autocast(self.A):
            return torch.einsum('imn,ipq->mpnq', *self.factors()).reshape(self.out_features, self.in_features)

    def row_norms(self):
        """Norms of the rows, (out,), without W: row (a, c) has sum_ij (A_i A_j^T)[a, a] (B_i B_j^T)[c, c] for a square."""
        A, B = self.factors()
        squares = torch.einsum('ijm,ijp->mp', torch.einsum('imn,jmn->ijm', A, A), torch.einsum('ipq,jpq->ijp', B, B))
        return squares.reshape(-1).clamp(min=1e-24).sqrt()

    def fans(self):
        """{factor: inputs that each of its outputs sums}: the second one of the order sums over the terms too."""
        (r, _, n), q = self.A.shape, self.B.shape[2]
        return {'A': n, 'B': q * r} if cheaper_is_a_first(self.A.shape, self.B.shape) else {'A': n * r, 'B': q}

    def norm_flops(self):
        """FLOPs of row_norms."""
        (r, m, n), (_, p, q) = self.A.shape, self.B.shape
        return 2 * r * r * (m * n + p * q + m * p)

    def normalise_(self, dim):
        """Every row (dim=1) or column (dim=0) of W to unit length, in place: those of A ⊗ B are products of A's and B's.

        Raises ValueError for a sum of terms, whose rows no scaling of the factors makes unit.
        """
        if self.refuse_to_normalise(dim):
            self.magnitude.fill_(1)
            return
        if self.A.shape[0] > 1 or self.scale is not None:
            raise ValueError('a sum of Kronecker products cannot be normalised by its factors; take terms=1, '
                             'scale=False, or weight_norm=True where rows are normalised')
        for factor in (self.A, self.B):
            factor.copy_(nn.functional.normalize(factor, dim=dim + 1, eps=1e-12))

    def flops(self, tokens):
        """Forward FLOPs of the plan with the fewest for that many tokens, a multiply-add as 2, whatever plan is taken."""
        return rule_flops(self.A.shape, self.B.shape, tokens) + self.option_flops(tokens)

    @classmethod
    def from_dense(cls, weight, bias, *, method='van_loan', stats=None, correct_bias=True, m, n, terms=1, scale=False,
                   exact_columns=0, index=None, **options):
        """The structure that replaces a dense matrix, with its dtype and device.

        weight (out, in), bias (out,) or None; method: a name in METHODS; stats: statistics of a calibration pass, an object
        with mean (in,), covariance (in, in) about the mean, and gradient, cross and source_mean where the method needs
        them (calibrate.Stats): needed by CALIBRATED methods, unused by the others. With correct_bias a calibrated
        method fits about the means and W E[x] - Ŵ E[x'] is added to the bias, which is the optimal bias; a site
        without a bias is fitted to the second moments. With scale, a method's scale goes there, else into B.
        Cost: nearest_kronecker_sum, and kron.als.fit. Raises ValueError for an unknown method, stats that are missing,
        or sizes that do not divide.
        """
        if method not in METHODS:
            raise ValueError(f'method={method!r} is unknown; kron knows {", ".join(METHODS)}'
                             f'{did_you_mean(method, METHODS)}')
        if method in CALIBRATED and stats is None:
            raise ValueError(f'method={method!r} needs what a calibration pass saw; give it text, or take van_loan')
        if exact_columns and 'sequential' in method:        # what remains besides exact columns is not W on other inputs
            weight, taken, stats = moved(weight, bias if correct_bias else None, stats)
            bias, method = taken if correct_bias else bias, method.replace('_sequential', '')
        shift = correct_bias and bias is not None and method in CALIBRATED
        index = loudest(weight, stats, exact_columns) if index is None else index
        seen = None if method not in CALIBRATED else centred(stats) if shift else stats
        A, B, s = fit_beside(METHODS[method], weight.detach(), seen, index, m, n, terms)
        factors = {'A': A, 'B': B, 'scale': torch.tensor(s, dtype=torch.float64)} if scale else cls.gauged(A, B * s)
        sizes = {'m': m, 'n': n, 'terms': terms, 'exact_columns': exact_columns} | ({'scale': True} if scale else {})
        module = cls.settled(weight.detach(), bias, factors, index, **sizes, **options)
        if shift:
            with torch.no_grad():
                module.bias.copy_(bias + bias_shift(weight, module.dense_weight(), stats))
        return module

    @staticmethod
    def gauged(A, B):
        """The factors of the sum, by name."""
        return {'A': A, 'B': B}

    def extra_repr(self):
        return (f'in_features={self.in_features}, out_features={self.out_features}, A={tuple(self.A.shape)}, '
                f'B={tuple(self.B.shape)}, scale={self.scale is not None}, bias={self.bias is not None}')


def nearest_divisor(size, wanted):
    """The divisor of size closest to wanted."""
    return min((k for k in range(1, size + 1) if size % k == 0), key=lambda k: abs(k - wanted))
