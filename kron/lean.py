"""Products whose backward pass is written out, so that it keeps the factors and x alone: B-first, and W itself.

Sizes as in products.py. What autograd would keep besides, T r n p numbers or W, costs less to make again.
"""
import functools
import itertools

import torch

THIN = 8        # a B of at most this many rows and columns may be contracted by planes or in blocks
WIDE = 16       # numbers of a row that a block of a thin product has on its longer side


def computed_in(x):
    """The type that a product with x has here: autocast's, else x's own."""
    kind = x.device.type
    if kind != 'meta' and x.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype


def broadcasts(x):
    """Whether a factor of one column or row is broadcast: on a GPU, and where torch.compile fuses that with its neighbours.

    A product with an inner size of 1 wastes a GPU's tiles; on a CPU BLAS is faster than an elementwise product.
    """
    return x.is_cuda or torch.compiler.is_compiling()


class Nothing:
    """The context of a forward pass that no backward pass follows."""

    def save_for_backward(self, *tensors):
        pass


def explicit(function, x, *rest):
    """function.apply(x, *rest) without autocast: what has a written backward pass is given the types it computes in."""
    call = function.apply if torch.is_grad_enabled() else functools.partial(function.forward, Nothing())
    kind = x.device.type
    if kind == 'meta' or not torch.is_autocast_enabled(kind):
        return call(x, *rest)
    with torch.autocast(kind, enabled=False):
        return call(x, *rest)


def narrow(rows, factor, g):
    """rows (N, k) @ factor (k, l) as (N/g, g k) @ (I_g ⊗ factor): g rows at once fill a vector; FLOPs g times."""
    if g == 1:
        return rows @ factor
    k, l = factor.shape
    eye = torch.eye(g, dtype=factor.dtype, device=factor.device)
    wide = (eye[:, None, :, None] * factor[None, :, None, :]).reshape(g * k, g * l)
    return (rows.reshape(len(rows) // g, g * k) @ wide).view(len(rows), l)


def correlate(rows, others):
    """rows^T others, (k, l), of (N, k) and (N, l): g rows of each at once, as in narrow, then the sum of g blocks."""
    (N, k), l = rows.shape, others.shape[1]
    g = together(N, k, l)
    wide = rows.reshape(N // g, g * k).t() @ others.reshape(N // g, g * l)                  # (g k, g l)
    return wide.view(g, k, g, l).diagonal(dim1=0, dim2=2).sum(-1)


def together(size, k, l):
    """How many rows `narrow` takes at once: the largest divisor of size up to WIDE / max(k, l)."""
    return max(g for g in range(1, max(1, WIDE // max(k, l)) + 1) if size % g == 0)


# ---------------------------------------------------------------------------------------------------
# B first

def first_b(x, A, B, g):
    """sum_i (X B_i^T) A_i^T of every row x, as BFirst lays it out, in the type that products with x have here."""
    kind = computed_in(x)
    return explicit(BFirst, x.to(kind), A.to(kind), B.to(kind), g)


class BFirst(torch.autograd.Function):
    """z = X [B_1 .. B_r]^T, laid out so that y = z A' is one product; x, A and B are kept, and z is made again.

    g = 0: planes, z (p T, r n) -> y (p T, m). g > 0: rows, z (T p, n r) -> y (T p, m), with g rows at once in B's product.
    With p = r = 1 both are z (T, n) -> y (T, m), and B may be broadcast.
    """

    @staticmethod
    def forward(ctx, x, A, B, g):
        ctx.save_for_backward(x, A, B)
        ctx.g = g
        return laid_out(x, A, B, g) @ second(A, g)

    @staticmethod
    def backward(ctx, gradient):
        x, A, B = ctx.saved_tensors
        (r, m, n), (_, p, q), T, g = A.shape, B.shape, x.shape[0], ctx.g
        dx = dA = dB = None
        if ctx.needs_input_grad[1]:
            dA = laid_out(x, A, B, g).t() @ gradient                                        # (r n or n r, m)
            dA = dA.view(r, n, m).transpose(1, 2) if g == 0 else dA.view(n, r, m).permute(1, 2, 0)
        dz, rows = gradient @ second(A, g).t(), x.reshape(T * n, q)
        if p * r == 1 and broadcasts(x):
            dz = dz.reshape(T * n, 1)
            dx = (dz * B.view(q)).view(T, n * q) if ctx.needs_input_grad[0] else None
            dB = (dz * rows).sum(0).view(1, 1, q)
        elif g == 0:
            dz, thin = dz.view(p, T, r, n).transpose(1, 2).reshape(p * r, T * n), B.transpose(0, 1).reshape(p * r, q)
            dx = (dz.t() @ thin).view(T, n * q) if ctx.needs_input_grad[0] else None
            dB = (dz @ rows).view(p, r, q).transpose(0, 1)
        else:
            dz, thin = dz.view(T, p, n, r).transpose(1, 2).reshape(T * n, p * r), B.permute(1, 0, 2).reshape(p * r, q)
            dx = narrow(dz, thin, g).view(T, n * q) if ctx.needs_input_grad[0] else None
            dB = correlate(rows, dz).view(q, p, r).permute(2, 1, 0)
        return dx, dA, dB, None


def laid_out(x, A, B, g):
    """z of BFirst."""
    (r, _, n), (_, p, q), T = A.shape, B.shape, x.shape[0]
    rows = x.reshape(T * n, q)
    if p * r == 1 and broadcasts(x):
        return (rows * B.view(q)).sum(-1).view(T, n)
    if g == 0:
        z = B.transpose(0, 1).reshape(p * r, q) @ rows.t()                                  # (p r, T n)
        return z.view(p, r, T, n).transpose(1, 2).reshape(p * T, r * n)
    z = narrow(rows, B.permute(2, 1, 0).reshape(q, p * r), g)                               # (T n, p r)
    return z.view(T, n, p, r).transpose(1, 2).reshape(T * p, n * r)


def second(A, g):
    """A' of BFirst, (r n or n r, m)."""
    r, m, n = A.shape
    return A.transpose(0, 1).reshape(m, r * n).t() if g == 0 else A.permute(2, 0, 1).reshape(n * r, m)


# ---------------------------------------------------------------------------------------------------
# W itself

def form(A, B):
    """W = sum_i A_i ⊗ B_i, (out, in), in fp32 at least. FLOPs 2 r out in."""
    (r, m, n), (_, p, q), dtype = A.shape, B.shape, torch.promote_types(A.dtype, torch.float32)
    A, B = A.to(dtype), B.to(dtype)
    if r == 1 or max(p, q) > THIN:
        return torch.einsum('imn,ipq->mpnq', A, B).reshape(m * p, n * q)
    planes = (B.reshape(r, p * q).t() @ A.reshape(r, m * n)).view(p, q, m, n)
    W = A.new_empty(m, p, n, q)
    for c, d in itertools.product(range(p), range(q)):                                      # strided writes, as Interleave's
        W[:, c, :, d] = planes[c, d]
    return W.view(m * p, n * q)


def unform(dW, A, B):
    """(dA, dB) of form: dA_i = sum_cd dW[., c, ., d] B_i[c, d] and dB_i = sum_ab dW[a, ., b, .] A_i[a, b]."""
    (r, m, n), (_, p, q), dW = A.shape, B.shape, dW.to(torch.promote_types(A.dtype, torch.float32))
    a, b, dW = A.to(dW.dtype).reshape(r, m * n), B.to(dW.dtype).reshape(r, p * q), dW.view(m, p, n, q)
    if max(p, q) > THIN:
        dW = dW.transpose(1, 2).reshape(m * n, p * q)
        dA, dB = (dW @ b.t()).t(), a @ dW
    else:                                                                                   # long runs: a third of the time
        dW = dW.permute(1, 3, 0, 2).reshape(p * q, m * n)
        dA, dB = b @ dW, (dW @ a.t()).t()
    return dA.reshape(r, m, n).to(A.dtype), dB.reshape(r, p, q).to(B.dtype)


class Materialised(torch.autograd.Function):
    """y = x W^T; W is formed for it, and formed again for backward, which keeps x, A and B alone."""

    @staticmethod
    def forward(ctx, x, A, B):
        ctx.save_for_backward(x, A, B)
        return x @ form(A, B).to(x.dtype).t()

    @staticmethod
    def backward(ctx, gradient):
        """dx = g W, and dW = g^T x handed on to the factors."""
        x, A, B = ctx.saved_tensors
        dx = gradient @ form(A, B).to(gradient.dtype) if ctx.needs_input_grad[0] else None
        factors = unform(gradient.t() @ x, A, B) if any(ctx.needs_input_grad[1:]) else (None, None)
        return dx, *factors
