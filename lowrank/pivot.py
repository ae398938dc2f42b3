"""A low-rank map with one factor partly an identity, W = U [I R] P: the same matrices, rank^2 fewer parameters."""
import torch
import torch.nn as nn

from layers import few_rows
from layers.structured import no_autocast, pivoted, with_others
from lowrank.linear import LowRankLinear


class PivotLinear(LowRankLinear):
    """y = U (x_S + R x_rest) + b: S are `rank` inputs, U (out, rank) the columns of W there, R (rank, in - rank).

    Every matrix of that rank is of this form: U V = (U V_S) [I, V_S^-1 V_rest]. in_features, out_features: sizes; bias:
    bool; 1 <= rank <= in_features. The indices of S, then of the other inputs, are the buffer `order`, which checkpoints
    include. Parameters rank (out + in - rank) (+ out), FLOPs per token twice that: fewer than the dense matrix's at every
    rank below min(out, in); lowrank's are fewer only below rank out in / (out + in).
    exact_columns, weight_norm, guide: see structured.Structured.
    Raises ValueError for sizes that are not positive, or a rank above in_features.
    Source of the idea: pivoting factorization, Zhao et al. 2025, arXiv 2501.19090.
    """
    tags = {'U': 'factor', 'R': 'factor', 'bias': 'vector'}
    products = (('U', 'R'),)

    def __init__(self, in_features, out_features, bias, rank, *, exact_columns=0, weight_norm=False, guide=False):
        nn.Module.__init__(self)                        # not lowrank's, which would create a V
        self.weight_numel(in_features, out_features, rank, exact_columns, weight_norm, guide)       # refuses bad sizes
        self.rank = rank
        self.U = nn.Parameter(torch.empty(out_features, rank))
        self.R = nn.Parameter(torch.empty(rank, in_features - rank))
        self.register_buffer('order', torch.arange(in_features))
        self.add_options(in_features, out_features, bias, exact_columns, weight_norm, guide)
        self.reset_parameters()

    @classmethod
    def weight_numel(cls, in_features, out_features, rank, exact_columns=0, weight_norm=False, guide=False):
        """Parameters without the bias: rank (out + in - rank) and the options'. ValueError, one sentence, for bad sizes."""
        whole = super().weight_numel(in_features, out_features, rank, exact_columns, weight_norm, guide)
        if rank > in_features:
            raise ValueError(f'rank={rank} must be at most the {in_features} inputs')
        return whole - rank ** 2

    def reset_factors(self, std):
        """Entries of U N(0, std), of R N(0, 1/sqrt(rank)), so that all of W have that std; S spread over the inputs."""
        if self.U.is_meta:
            return
        nn.init.normal_(self.U, std=std)
        if self.R.numel():
            nn.init.normal_(self.R, std=self.rank ** -0.5)
        spread = torch.arange(self.rank) * self.in_features // self.rank
        self.order.copy_(with_others(spread, self.in_features))

    def product(self, x, bias=None):
        """U (x_S + R x_rest) + bias for x (..., in); never forms W."""
        if x.shape[-1] != self.in_features:
            raise RuntimeError(f'x has {x.shape[-1]} features and not {self.in_features}')
        first, others = Reordered.apply(x, self.order).split((self.rank, self.in_features - self.rank), -1)
        return few_rows.linear(first + few_rows.linear(others, self.R), self.U, bias)

    def product_weight(self):
        """[U, U R] with its columns permuted back, (out, in), in fp32 at least."""
        dtype = torch.promote_types(self.U.dtype, torch.float32)
        with no_autocast(self.U):
            U = self.U.to(dtype)
            W = torch.cat((U, U @ self.R.to(dtype)), 1)
        return torch.zeros_like(W).index_copy(1, self.order, W)

    def row_norms(self):
        """||U_i [I R]||, (out,), in fp32 at least and without W: rank^2 (out + in) multiply-adds."""
        dtype = torch.promote_types(self.U.dtype, torch.float32)
        U, R = self.U.to(dtype), self.R.to(dtype)
        return (U.square() + (U @ (R @ R.t())) * U).sum(1).clamp(min=1e-24).sqrt()

    def fans(self):
        """{factor: inputs that each of its outputs sums}."""
        return {'R': max(1, self.in_features - self.rank), 'U': self.rank}

    def norm_flops(self):
        """FLOPs of row_norms."""
        return 2 * self.rank ** 2 * (self.in_features - self.rank + self.out_features)

    def normalise_(self, dim):
        """Every row (dim=1) or column (dim=0) of W to unit length, in place and without forming W.

        Dividing a column of U by its length multiplies that row of R, so that U R is unchanged; then R's columns follow.
        """
        if dim == 1:
            super().normalise_(dim)
            return
        self.refuse_to_normalise(dim)
        lengths = self.U.norm(dim=0).clamp(min=1e-12)
        self.U.div_(lengths)
        self.R.mul_(lengths[:, None])
        self.R.div_(torch.einsum('rj,rs,sj->j', self.R, self.U.t() @ self.U, self.R).clamp(min=1e-24).sqrt())

    def flops(self, tokens):
        """Forward FLOPs for that many tokens, a multiply-add counted as 2."""
        return 2 * tokens * self.rank * (self.in_features + self.out_features - self.rank) + self.option_flops(tokens)

    @staticmethod
    def gauged(U, V):
        """The product U V as {'U', 'R', 'order'}, exactly, with the inputs of `pivoted` in front, in float64.

        Cost O(rank^2 (out + in)).
        """
        rank, size = V.shape
        order = with_others(pivoted(V), size)
        first, others = V.double()[:, order].tensor_split((rank,), 1)
        return {'U': U.double() @ first, 'R': torch.linalg.pinv(first) @ others, 'order': order}


class Reordered(torch.autograd.Function):
    """x[..., order], x (..., in) and a permutation order (in,); keeps only the permutation for backward.

    The gradient is permuted back by the inverse; the backward of indexing would add it up element by element on one core.
    """

    @staticmethod
    def forward(ctx, x, order):
        ctx.save_for_backward(order)
        return x[..., order]

    @staticmethod
    def backward(ctx, gradient):
        order, = ctx.saved_tensors
        return Reordered.apply(gradient, order.argsort()), None
