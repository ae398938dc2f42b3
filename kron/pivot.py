"""A sum of Kronecker products whose left factors are partly a unit matrix: the same sums, terms^2 fewer parameters."""
import torch
import torch.nn as nn

from kron.linear import KroneckerLinear
from kron.plan import rule
from layers.structured import pivoted, with_others


class KroneckerPivot(KroneckerLinear):
    """y = (sum_i A_i ⊗ B_i) x + b, where row i of [vec A_1, vec A_2, ...]^T is [e_i, R_i] in some order of the entries.

    Any invertible mix of the A_i, undone in the B_i, is the same matrix, as in lowrank.pivot: here every A_i has a 1 at a
    pivot entry where the others have 0, and B_i is that block of W. in_features, out_features: sizes; bias: bool; m must
    divide out_features and n in_features; 1 <= terms <= m n. R (terms, m n - terms), B (terms, out/m, in/n) and the
    buffer `order` of the entries, pivots first, which checkpoints include. Parameters
    terms (m n + out in / (m n) - terms); FLOPs and plans are kron's, for the A that is formed from R at each call.
    exact_columns, weight_norm, guide: see structured.Structured. Raises ValueError for sizes that do not fit.
    """
    tags = {'R': 'factor', 'B': 'factor', 'bias': 'vector'}
    scale, products = None, ()                          # R's matrix has the left factors as rows

    def __init__(self, in_features, out_features, bias, m, n, terms=1, *, exact_columns=0, weight_norm=False, guide=False):
        nn.Module.__init__(self)                        # not kron's, which would create an A
        self.weight_numel(in_features, out_features, m, n, terms, exact_columns, weight_norm, guide)    # refuses bad sizes
        self.m, self.n = m, n
        self.R = nn.Parameter(torch.empty(terms, m * n - terms))
        self.B = nn.Parameter(torch.empty(terms, out_features // m, in_features // n))
        self.register_buffer('order', torch.arange(m * n))
        self.plans, self.rule, self.merge, self.merged = ((), ()), rule((terms, m, n), self.B.shape), False, None
        self.add_options(in_features, out_features, bias, exact_columns, weight_norm, guide)
        self.reset_parameters()

    @property
    def A(self):
        """(terms, m, n), formed from R; differentiable."""
        terms = len(self.R)
        both = torch.cat((torch.eye(terms, dtype=self.R.dtype, device=self.R.device), self.R), 1)
        return torch.zeros_like(both).index_copy(1, self.order, both).view(terms, self.m, self.n)

    @classmethod
    def weight_numel(cls, in_features, out_features, m, n, terms=1, exact_columns=0, weight_norm=False, guide=False):
        """Parameters without the bias: terms (m n + out in / (m n) - terms) and the options'; ValueError as kron's."""
        whole = super().weight_numel(in_features, out_features, m, n, terms, False, exact_columns, weight_norm, guide)
        if terms > m * n:
            raise ValueError(f'terms={terms} must be at most the {m * n} entries of a factor of {m} x {n}')
        return whole - terms ** 2

    def reset_factors(self, std):
        """R Gaussian of std 1/sqrt(terms), B Gaussian, rescaled so that W's entries have that std; unit entries spread."""
        if self.B.is_meta:
            return
        terms, size = len(self.R), self.m * self.n
        nn.init.normal_(self.B)
        if self.R.numel():
            nn.init.normal_(self.R, std=terms ** -0.5)
        self.order.copy_(with_others(torch.arange(terms) * size // terms, size))
        A, B = (factor.flatten(1).to(torch.promote_types(factor.dtype, torch.float32)) for factor in (self.A, self.B))
        square = ((A @ A.t()) * (B @ B.t())).sum()              # ||W||_F^2
        self.B.mul_(std * (self.out_features * self.in_features / square).sqrt())

    def sources(self):
        """The parameters of W."""
        return self.R, self.B

    def fans(self):
        """{factor: inputs that each of its outputs sums}, as kron's."""
        fans = super().fans()
        return {'R': fans['A'], 'B': fans['B']}

    def normalise_(self, dim):
        """Rows by the magnitudes of weight_norm; ValueError for anything else, which would break the unit entries."""
        if not self.refuse_to_normalise(dim):
            raise ValueError('kron_pivot cannot be normalised by its factors; take kron with terms=1, or weight_norm=True '
                             'where rows are normalised')
        self.magnitude.fill_(1)

    @staticmethod
    def gauged(A, B):
        """The sum as {'R', 'B', 'order'}, exactly: unit entries where `pivoted` chooses. O(terms^2 (m n + p q)), float64."""
        flat, terms = A.double().flatten(1), len(A)
        order = with_others(pivoted(flat), flat.shape[1])
        first, others = flat[:, order].tensor_split((terms,), 1)
        return {'R': torch.linalg.pinv(first) @ others, 'order': order,
                'B': (first.t() @ B.double().flatten(1)).view_as(B)}
