"""Ways to apply W = sum_i A_i ⊗ B_i to rows x, each a function (x (T, in), A, B) -> (T, out): orders, layouts, W itself.

With x as a matrix X (n, q), row-major, (A ⊗ B) x is the matrix A X B^T (m, p), row-major. So a term costs two small
products, in either order, with the sum over terms inside the second one. Plans differ in memory layout: the aim is long
rows in both products and few copies around them. Sizes: A (terms, m, n), B (terms, p, q), out = m p,
in = n q, r = terms, T tokens. FLOPs per token: A-first 2 r m q (n + p), B-first 2 r n p (q + m).
"""
import torch

from kron.lean import Materialised, broadcasts, computed_in, explicit, first_b, narrow, together
from layers import few_rows

# ---------------------------------------------------------------------------------------------------
# rows: tokens and the other factor's axis outermost, the axis that is multiplied innermost

def a_rows(x, A, B):
    """Y = sum_i (A_i X) B_i^T; largest intermediate T r m q."""
    (r, m, n), (_, p, q), T = A.shape, B.shape, x.shape[0]
    if q * r == 1 and broadcasts(x):
        return outer(x, A, B)
    v = x.view(T, n, q).transpose(1, 2).reshape(T * q, n) @ A.reshape(r * m, n).t()         # (T q, r m)
    v = v.view(T, q, r, m).permute(0, 3, 1, 2).reshape(T * m, q * r)
    return (v @ B.permute(2, 0, 1).reshape(q * r, p)).view(T, m * p)


def b_rows(x, A, B):
    """Y = sum_i A_i (X B_i^T); largest intermediate T r n p, not kept for backward: see lean.BFirst."""
    return by_b_first(x, A, B, 1)


def by_b_first(x, A, B, g):
    """b_rows with B's product taken for g rows at once."""
    (_, m, _), (_, p, _), T = A.shape, B.shape, x.shape[0]
    return first_b(x, A, B, g).view(T, p, m).transpose(1, 2).reshape(T, m * p)


# ---------------------------------------------------------------------------------------------------
# planes: the axes of a thin B outermost, so that both products have long rows and copies move long runs

def a_planes(x, A, B):
    """a_rows with a plane of (T, m) for every column of B; y comes from its planes by one strided copy each."""
    (r, m, n), (_, p, q), T = A.shape, B.shape, x.shape[0]
    if q * r == 1 and broadcasts(x):
        return outer(x, A, B)
    v = x.view(T, n, q).permute(2, 0, 1).reshape(q * T, n) @ A.reshape(r * m, n).t()        # (q T, r m)
    v = v.view(q, T, r, m).transpose(1, 2).reshape(q * r, T * m)
    y = B.permute(1, 2, 0).reshape(p, q * r) @ v                                            # (p, T m)
    return interleaved(y).view(T, m * p)


def b_planes(x, A, B):
    """b_rows with a plane of (T, n) for every row of B."""
    (r, m, _), (_, p, _), T = A.shape, B.shape, x.shape[0]
    if p * r == 1 and broadcasts(x):
        return first_b(x, A, B, 0)
    return interleaved(first_b(x, A, B, 0).view(p, T * m)).view(T, m * p)


def interleaved(planes):
    """Planes (p, N) -> (N, p); a single plane needs no copy."""
    return planes.t() if len(planes) == 1 else explicit(Interleave, planes)


class Interleave(torch.autograd.Function):
    """Planes (p, N) -> (N, p): p strided writes, a third of the time of one permuted copy on a CPU.

    Always a copy: compiled by torch 2.11, a Function that returns a view of its input loses the gradient.
    """

    @staticmethod
    def forward(ctx, planes):
        y = planes.new_empty(planes.shape[::-1])
        for c, plane in enumerate(planes.unbind(0)):
            y[:, c] = plane
        return y

    @staticmethod
    def backward(ctx, gradient):
        return gradient.t().clone(memory_format=torch.contiguous_format)


# ---------------------------------------------------------------------------------------------------
# blocks: rows, and the thin product taken for several of its rows at once

def a_blocks(x, A, B):
    """a_rows; the terms innermost too, so that with q = 1 no activation is copied; B's product in blocks."""
    (r, m, n), (_, p, q), T = A.shape, B.shape, x.shape[0]
    v = x.view(T, n, q).transpose(1, 2).reshape(T * q, n) @ A.transpose(0, 1).reshape(m * r, n).t()         # (T q, m r)
    v = v.view(T, q, m, r).transpose(1, 2).reshape(T * m, q * r)
    return narrow(v, B.permute(2, 0, 1).reshape(q * r, p), together(m, q * r, p)).view(T, m * p)


def b_blocks(x, A, B):
    """b_rows; B's product in blocks. With p = 1 no activation is copied."""
    (r, _, n), (_, p, q) = A.shape, B.shape
    return by_b_first(x, A, B, together(n, q, p * r))


# ---------------------------------------------------------------------------------------------------
# one term whose B is a single column or row: hardly any calls, which matters with few tokens; where lean.broadcasts
# says so, rows and planes use these too

def outer(x, A, B):
    """y = (A x) b^T for B = b (p, 1): a product and a broadcast."""
    v = few_rows.linear(x, A[0])                                                            # (T, m)
    return (v.unsqueeze(-1) * B.to(v.dtype).view(-1)).view(len(v), v.shape[1] * B.shape[1])


def a_outer(x, A, B):
    """outer; a_blocks for every other B."""
    return a_blocks(x, A, B) if B.shape[0] > 1 or B.shape[2] > 1 else outer(x, A, B)


def b_inner(x, A, B):
    """y = A (X b) for B = b^T (1, q); b_blocks for every other B."""
    if B.shape[0] > 1 or B.shape[1] > 1:
        return b_blocks(x, A, B)
    if torch.is_grad_enabled() or broadcasts(x):
        return b_rows(x, A, B)                          # keeps less for backward
    return few_rows.linear(x.view(len(x), A.shape[2], B.shape[2]) @ B.view(-1), A[0])       # (T, n) by (m, n)


def times_vector(A, v):
    """A v for one row v (1, n), (1, m), as m dot products: faster than a product where A comes from memory."""
    if few_rows.in_blocks(v, A):
        return few_rows.linear(v, A)
    return torch.linalg.vecdot(A, v).to(computed_in(v)).unsqueeze(0)


def a_dot(x, A, B):
    """a_outer of a single row by dot products."""
    if len(x) != 1 or B.shape[0] > 1 or B.shape[2] > 1:
        return a_outer(x, A, B)
    v = times_vector(A[0], x)
    return (v.unsqueeze(-1) * B.to(v.dtype).view(-1)).view(1, v.shape[1] * B.shape[1])


def b_dot(x, A, B):
    """b_inner of a single row by dot products."""
    if len(x) != 1 or B.shape[0] > 1 or B.shape[1] > 1:
        return b_inner(x, A, B)
    return times_vector(A[0], x.view(1, A.shape[2], B.shape[2]) @ B.view(-1))


# ---------------------------------------------------------------------------------------------------
# W itself

def materialise(x, A, B):
    """y = x W^T with W formed in fp32 at least, so that the product of factors is rounded once. FLOPs 2 out in (T + r)."""
    return explicit(Materialised, x.to(computed_in(x)), A, B)
