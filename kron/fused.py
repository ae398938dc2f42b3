"""Plans for CUDA: products with a thin B in one Triton kernel, all terms at once, around one large product with A.

    mix(v, M):    y[t, a, c] = sum_k v[t, k, a] M[k, c]      planes to rows: (T, K, N), (K, C) -> (T, N, C)
    unmix(y, M):  v[t, k, a] = sum_c y[t, a, c] M[k, c]      rows to planes, the adjoint

With these A-first is unmix (a transposition), x A^T, mix by B, and B-first unmix by B, z A^T, mix (a transposition); of
one column or row the transposition is none. Each kernel reads and writes every element once, sums in fp32, and rounds once.
Each is the other's backward pass, plus a sum over (t, a) for M, which one more kernel takes in a fixed order.
Triton is a part of torch's CUDA wheels and may be missing elsewhere; TRITON_INTERPRET=1 runs the kernels on a CPU.

A program of mix or unmix has BLOCK neighbours a of one t: a thread has as many of them as 16 bytes hold, all C columns of
y, and one plane k after the other, so that planes are read and written 16 bytes at a time.
"""
import os

import torch

from kron.lean import THIN, computed_in, explicit

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

BLOCK = 512             # positions a of one program, at most
DOT = 64                # elements of M beyond which their sums are a product on tensor cores
PROGRAMS = 2048         # programs of the sum for M, at most: over ten for each multiprocessor


def available(device):
    """Whether the kernels run on tensors of this device."""
    return triton is not None and (torch.device(device).type == 'cuda' or os.environ.get('TRITON_INTERPRET') == '1')


if triton is not None:
    @triton.jit
    def place(i, N, BLOCK: tl.constexpr):
        """(t, positions a (BLOCK,)) of tile i; t in 64 bits, since T K N may not fit in 32."""
        tiles = tl.cdiv(N, BLOCK)
        return (i // tiles).to(tl.int64), i % tiles * BLOCK + tl.arange(0, BLOCK)

    @triton.jit
    def mix_kernel(v, M, y, N, K: tl.constexpr, C: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
        """y[t, a, c] = sum_k v[t, k, a] M[k, c] of one tile; WIDTH is C or the next power of 2."""
        t, a = place(tl.program_id(0), N, BLOCK)
        a, c = a[:, None], tl.arange(0, WIDTH)
        total = tl.zeros((BLOCK, WIDTH), tl.float32)
        for k in tl.range(0, K, loop_unroll_factor=4):
            plane = tl.load(v + t * K * N + (k * N + a), mask=a < N, other=0.0).to(tl.float32)
            total += plane * tl.load(M + k * C + c, mask=c < C, other=0.0)[None, :]
        c = c[None, :]
        tl.store(y + t * N * C + (a * C + c), total.to(y.dtype.element_ty), mask=(a < N) & (c < C))

    @triton.jit
    def unmix_kernel(y, M, v, N, K: tl.constexpr, C: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
        """v[t, k, a] = sum_c y[t, a, c] M[k, c] of one tile."""
        t, a = place(tl.program_id(0), N, BLOCK)
        a, c = a[:, None], tl.arange(0, WIDTH)
        rows = tl.load(y + t * N * C + (a * C + c[None, :]), mask=(a < N) & (c < C)[None, :], other=0.0).to(tl.float32)
        for k in tl.range(0, K, loop_unroll_factor=4):
            factors = tl.load(M + k * C + c, mask=c < C, other=0.0)[None, :]
            plane = tl.sum(rows * factors, axis=1, keep_dims=True)
            tl.store(v + t * K * N + (k * N + a), plane.to(v.dtype.element_ty), mask=a < N)

    @triton.jit
    def moment_kernel(v, y, sums, tiles, programs, N, K: tl.constexpr, C: tl.constexpr, PLANES: tl.constexpr,
                      WIDTH: tl.constexpr, BLOCK: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr):
        """sums[program, k, c] = sum of v[t, k, a] y[t, a, c] over the program's tiles: every programs-th one."""
        k, c = tl.arange(0, PLANES)[:, None], tl.arange(0, WIDTH)[None, :]
        if DOT:
            total = tl.zeros((PLANES, WIDTH), tl.float32)
        else:
            total = tl.zeros((PLANES, BLOCK, WIDTH), tl.float32)
        i = tl.program_id(0)
        while i < tiles:                                # Triton 3.6 interprets no range of a number known at run time
            t, a = place(i, N, BLOCK)
            b, a = a[:, None], a[None, :]
            left = tl.load(v + t * K * N + (k * N + a), mask=(k < K) & (a < N), other=0.0).to(tl.float32)
            right = tl.load(y + t * N * C + (b * C + c), mask=(b < N) & (c < C), other=0.0).to(tl.float32)
            if DOT:
                total = tl.dot(left, right, total, input_precision=PRECISION)
            else:
                total += left[:, :, None] * right[None, :, :]
            i += programs
        if not DOT:
            total = tl.sum(total, axis=1)
        tl.store(sums + tl.program_id(0) * K * C + k * C + c, total, mask=(k < K) & (c < C))


# ---------------------------------------------------------------------------------------------------
# sizes of programs

def power(n):
    """The least power of 2 that is not under n."""
    return 1 << (n - 1).bit_length()


def tile(N, C, size):
    """Compile-time sizes of mix_kernel and unmix_kernel besides K and C, for elements of size bytes: 16 bytes per thread."""
    block = min(BLOCK, power(N))
    return dict(WIDTH=power(C), BLOCK=block, num_warps=max(1, block * size // 16 // 32))


def moment_tile(N, K, C, size):
    """The same for moment_kernel: one (PLANES, WIDTH) sum by tensor cores, or up to DOT elements one for every position.

    Elements of 2 bytes are exact in tf32; one of 4 bytes is taken as a sum of tf32 values.
    """
    planes, width = power(K), power(C)
    dot = planes * width > DOT
    if not dot:
        block, warps = max(1, min(BLOCK, power(N), 4096 // (planes * width))), max(2, size)
    else:
        planes, width = max(16, planes), max(16, width)
        block, warps = max(16, min(BLOCK, power(N), 256 // size)), planes // 8
    return dict(PLANES=planes, WIDTH=width, BLOCK=block, DOT=dot, PRECISION='tf32' if size == 2 else 'tf32x3',
                num_warps=warps)


def tiles(T, N, sizes):
    return T * -(-N // sizes['BLOCK'])


# ---------------------------------------------------------------------------------------------------
# calls of the kernels; as custom operators torch.compile takes them as they are

@torch.library.custom_op('nanokron::mix', mutates_args=())
def mix_op(v: torch.Tensor, M: torch.Tensor) -> torch.Tensor:
    (T, K, N), C = v.shape, M.shape[1]
    y = v.new_empty(T, N, C)
    if y.numel():
        sizes = tile(N, C, v.itemsize)
        mix_kernel[(tiles(T, N, sizes),)](v.contiguous(), M.float().contiguous(), y, N, K, C, **sizes)
    return y


@torch.library.custom_op('nanokron::unmix', mutates_args=())
def unmix_op(y: torch.Tensor, M: torch.Tensor) -> torch.Tensor:
    (T, N, C), K = y.shape, M.shape[0]
    v = y.new_empty(T, K, N)
    if v.numel():
        sizes = tile(N, C, y.itemsize)
        unmix_kernel[(tiles(T, N, sizes),)](y.contiguous(), M.float().contiguous(), v, N, K, C, **sizes)
    return v


@torch.library.custom_op('nanokron::moment', mutates_args=())
def moment_op(v: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """sum_{t, a} v[t, k, a] y[t, a, c], (K, C) in fp32."""
    (T, K, N), C = v.shape, y.shape[2]
    if not v.numel():
        return torch.zeros(K, C, device=v.device, dtype=torch.float32)
    sizes = moment_tile(N, K, C, v.itemsize)
    count = tiles(T, N, sizes)
    sums = torch.empty(min(count, PROGRAMS), K, C, device=v.device, dtype=torch.float32)
    moment_kernel[(len(sums),)](v.contiguous(), y.contiguous(), sums, count, len(sums), N, K, C, **sizes)
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
