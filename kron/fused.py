"""Plans for CUDA: products with a thin B in one Triton kernel, all terms at once, around one large product with A.

    mix(v, M):    y[t, a, c] = sum_k v[t, k, a] M[k, c]      planes to rows: (T, K, N), (K, C) -> (T, N, C)
    unmix(y, M):  v[t, k, a] = sum_c y[t, a, c] M[k, c]      rows to planes, the adjoint

With these A-first is unmix (a transposition), x A^T, mix by B, and B-first unmix by B, z A^T, mix (a transposition); of
one column or row the transposition is none. Each kernel reads and writes every number once, sums in fp32, and rounds once.
Their backward passes are each other and a sum over (t, a) for M, which one more kernel takes block by block.
Triton is a part of torch's CUDA wheels and may be missing elsewhere; TRITON_INTERPRET=1 runs the kernels on a CPU.
"""
import os

import torch

from kron.lean import THIN, computed_in, explicit

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

BLOCK = 512         # (t, a) pairs of one program


def available(device):
    """Whether the kernels run on tensors of this device."""
    return triton is not None and (torch.device(device).type == 'cuda' or os.environ.get('TRITON_INTERPRET') == '1')


if triton is not None:
    @triton.jit
    def mix_kernel(v, M, y, rows, N, K: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr):
        """y[t, a, c] = sum_k v[t, k, a] M[k, c] for BLOCK pairs (t, a); rows = T N."""
        row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside, t, a = row < rows, row // N, row % N
        for c in tl.static_range(C):
            total = tl.zeros((BLOCK,), tl.float32)
            for k in tl.static_range(K):
                total += tl.load(v + (t * K + k) * N + a, mask=inside, other=0.0).to(tl.float32) * tl.load(M + k * C + c)
            tl.store(y + row * C + c, total.to(y.dtype.element_ty), mask=inside)

    @triton.jit
    def unmix_kernel(y, M, v, rows, N, K: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr):
        """v[t, k, a] = sum_c y[t, a, c] M[k, c] for BLOCK pairs (t, a)."""
        row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside, t, a = row < rows, row // N, row % N
        for k in tl.static_range(K):
            total = tl.zeros((BLOCK,), tl.float32)
            for c in tl.static_range(C):
                total += tl.load(y + row * C + c, mask=inside, other=0.0).to(tl.float32) * tl.load(M + k * C + c)
            tl.store(v + (t * K + k) * N + a, total.to(v.dtype.element_ty), mask=inside)

    @triton.jit
    def moment_kernel(v, y, sums, rows, N, K: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr):
        """sums[program, k, c] = sum over its pairs of v[t, k, a] y[t, a, c]."""
        program = tl.program_id(0).to(tl.int64)
        row = program * BLOCK + tl.arange(0, BLOCK)
        inside, t, a = row < rows, row // N, row % N
        for k in tl.static_range(K):
            left = tl.load(v + (t * K + k) * N + a, mask=inside, other=0.0).to(tl.float32)
            for c in tl.static_range(C):
                right = tl.load(y + row * C + c, mask=inside, other=0.0).to(tl.float32)
                tl.store(sums + (program * K + k) * C + c, tl.sum(left * right, axis=0))


# ---------------------------------------------------------------------------------------------------
# calls of the kernels; as custom operators torch.compile takes them as they are

def programs(rows):
    return -(-rows // BLOCK)


@torch.library.custom_op('nanokron::mix', mutates_args=())
def mix_op(v: torch.Tensor, M: torch.Tensor) -> torch.Tensor:
    (T, K, N), C = v.shape, M.shape[1]
    y = v.new_empty(T, N, C)
    if y.numel():
        mix_kernel[(programs(T * N),)](v.contiguous(), M.float().contiguous(), y, T * N, N, K, C, BLOCK)
    return y


@torch.library.custom_op('nanokron::unmix', mutates_args=())
def unmix_op(y: torch.Tensor, M: torch.Tensor) -> torch.Tensor:
    (T, N, C), K = y.shape, M.shape[0]
    v = y.new_empty(T, K, N)
    if v.numel():
        unmix_kernel[(programs(T * N),)](y.contiguous(), M.float().contiguous(), v, T * N, N, K, C, BLOCK)
    return v


@torch.library.custom_op('nanokron::moment', mutates_args=())
def moment_op(v: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """sum_{t, a} v[t, k, a] y[t, a, c], (K, C) in fp32."""
    (T, K, N), C = v.shape, y.shape[2]
    sums = torch.zeros(programs(T * N), K, C, device=v.device, dtype=torch.float32)
    if v.numel():
        moment_kernel[(programs(T * N),)](v.contiguous(), y.contiguous(), sums, T * N, N, K, C, BLOCK)
    return sums.sum(0)


mix_op.register_fake(lambda v, M: v.new_empty(v.shape[0], v.shape[2], M.shape[1]))
unmix_op.register_fake(lambda y, M: y.new_empty(y.shape[0], M.shape[0], y.shape[1]))
moment_op.register_fake(lambda v, y: v.new_empty(v.shape[1], y.shape[2], dtype=torch.float32))


class Mix(torch.autograd.Function):
    """mix_op with its gradients."""

    @staticmethod
    def forward(ctx, v, M):
        ctx.save_for_backward(v, M)
        return mix_op(v, M)

    @staticmethod
    def backward(ctx, gradient):
        v, M = ctx.saved_tensors
        dM = moment_op(v, gradient).to(M.dtype) if ctx.needs_input_grad[1] else None
        return Unmix.apply(gradient, M) if ctx.needs_input_grad[0] else None, dM


class Unmix(torch.autograd.Function):
    """unmix_op with its gradients."""

    @staticmethod
    def forward(ctx, y, M):
        ctx.save_for_backward(y, M)
        return unmix_op(y, M)

    @staticmethod
    def backward(ctx, gradient):
        y, M = ctx.saved_tensors
        dM = moment_op(gradient, y).to(M.dtype) if ctx.needs_input_grad[1] else None
        return Mix.apply(gradient, M) if ctx.needs_input_grad[0] else None, dM


# ---------------------------------------------------------------------------------------------------
# plans

def a_fused(x, A, B):
    """A-first: x A^T, and B's product, the sum over terms and the layout of y in one kernel."""
    (r, m, n), (_, p, q), T, kind = A.shape, B.shape, x.shape[0], computed_in(x)
    X = x.to(kind).reshape(T, n, q)
    planes = X.view(T, 1, n) if q == 1 else explicit(Unmix, X, torch.eye(q, device=x.device))       # (T, q, n)
    v = planes.reshape(T * q, n) @ A.to(kind).reshape(r * m, n).t()                                 # (T q, r m)
    return explicit(Mix, v.view(T, q * r, m), B.permute(2, 0, 1).reshape(q * r, p)).view(T, m * p)


def b_fused(x, A, B):
    """B-first: B's product with the layout that A's wants in one kernel, then z A^T."""
    (r, m, n), (_, p, q), T, kind = A.shape, B.shape, x.shape[0], computed_in(x)
    z = explicit(Unmix, x.to(kind).reshape(T, n, q), B.transpose(0, 1).reshape(p * r, q))           # (T, p r, n)
    y = z.view(T * p, r * n) @ A.to(kind).transpose(0, 1).reshape(m, r * n).t()                     # (T p, m)
    if p == 1:
        return y
    return explicit(Mix, y.view(T, p, m), torch.eye(p, device=x.device)).view(T, m * p)


def suits(shape):
    """Thin factors, and few enough terms for one kernel."""
    return max(shape.p, shape.q) <= THIN and shape.terms * max(shape.p, shape.q) <= 4 * THIN
