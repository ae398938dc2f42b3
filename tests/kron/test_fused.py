"""The Triton plans are the materialised product, forward and backward; interpreted on a CPU, for real on a GPU.

Wherever Triton is installed the kernels are compiled for GPUs that need not be there, and their code is read.
"""
import os
import re
import subprocess
import sys

import pytest
import torch

from kron import fused
from kron.plan import PLANS, Shape
from tests.kron.test_plan import SHAPES, all_of, error, kron_sum, tensors
from tests.tiny import ROOT

triton = pytest.importorskip('triton', reason='Triton is not installed; it comes with the CUDA wheels of torch')
INTERPRETED = os.environ.get('TRITON_INTERPRET') == '1'
interpreted = pytest.mark.skipif(not INTERPRETED, reason='runs in a process of its own with TRITON_INTERPRET=1')
compiled = pytest.mark.skipif(INTERPRETED, reason='an interpreted kernel has no code')
FUSED = ['a_fused', 'b_fused']
THIN = [shape for shape in SHAPES if fused.suits(Shape(*shape))]


@pytest.mark.skipif(INTERPRETED, reason='is that process')
@pytest.mark.slow
def test_in_the_interpreter():
    """Everything below that a CPU can run; Triton reads the variable when it is imported."""
    done = subprocess.run([sys.executable, '-m', 'pytest', '-q', '-m', 'not gpu', __file__], cwd=ROOT, text=True,
                          capture_output=True, env={**os.environ, 'TRITON_INTERPRET': '1', 'CUDA_VISIBLE_DEVICES': ''})
    assert done.returncode == 0 and ' passed' in done.stdout, done.stdout[-3000:]


# ---------------------------------------------------------------------------------------------------
# code for GPUs, compiled without one

BYTES = {'bf16': 2, 'fp16': 2, 'fp32': 4}
KERNELS = ['mix', 'unmix', 'moment']
# K, C, N: B of gpt2_kron_mlp, the most that `suits` lets through, one column, an odd one, a single position, few positions
CASES = [(1, 4, 768), (32, 8, 768), (32, 1, 768), (3, 3, 100), (4, 4, 1), (2, 2, 48)]
each_case = pytest.mark.parametrize('K, C, N', [CASES[0], CASES[1], *(pytest.param(*case, marks=pytest.mark.slow)
                                                                      for case in CASES[2:])])


@pytest.fixture(autouse=True)
def no_cache(tmp_path, monkeypatch):
    monkeypatch.setenv('TRITON_CACHE_DIR', str(tmp_path))


def code(name, dtype, K, C, N, capability):
    """The stages of a kernel's code, for aligned tensors, as a call of it is compiled: 16 divides a number, or it is 1."""
    from triton.backends.compiler import GPUTarget
    kernel = getattr(fused, f'{name}_kernel')
    sizes = fused.moment_tile(N, K, C, BYTES[dtype]) if name == 'moment' else fused.tile(N, C, BYTES[dtype])
    options, numbers = {'num_warps': sizes.pop('num_warps')}, {'N': N, 'tiles': 65536, 'programs': fused.PROGRAMS}
    known = {**sizes, 'K': K, 'C': C, **({'N': 1} if N == 1 else {})}
    types = {'v': f'*{dtype}', 'y': f'*{dtype}', 'M': '*fp32', 'sums': '*fp32'}
    signature = {word: 'constexpr' if word in known else types.get(word, 'i32') for word in kernel.arg_names}
    where = {word: (place,) for place, word in enumerate(kernel.arg_names)}
    attributes = {where[word]: [['tt.divisibility', 16]] for word, kind in signature.items()
                  if kind != 'constexpr' and numbers.get(word, 0) % 16 == 0}
    source = triton.compiler.ASTSource(kernel, signature, {where[word]: known[word] for word in known}, attributes)
    return triton.compile(source, target=GPUTarget('cuda', capability, 32), options=options).asm


def instructions(ptx):
    return re.findall(r'^\s+(?:@!?%p\d+\s+)?([a-z][\w.:]*)', ptx, re.MULTILINE)


@compiled
@pytest.mark.parametrize('capability', [80, 90, 100])
@pytest.mark.parametrize('dtype', ['bf16', *(pytest.param(kind, marks=pytest.mark.slow) for kind in ('fp16', 'fp32'))])
@each_case
@pytest.mark.parametrize('name', KERNELS)
def test_code_for_a_gpu(name, dtype, K, C, N, capability):
    """ptxas takes it; it is short whatever K is; no atomics; offsets of tokens in 64 bits."""
    stages = code(name, dtype, K, C, N, capability)
    words = instructions(stages['ptx'])
    assert len(stages['cubin']) > 1000 and f'.target sm_{capability}' in stages['ptx']
    assert 20 < len(words) < 1300                       # unrolled over K and C: 4400 to 10500 for (32, 8)
    assert not [word for word in words if word.startswith(('atom.', 'red.'))]
    assert re.search(r'muli .* : i64', stages['ttir'])
    if N % 16 == 0 and C & (C - 1) == 0:
        assert wide(words, N)


def wide(words, N):
    """Nothing is read or written in pieces of 2 bytes; of 16 bytes where a thread has them."""
    touched = [word for word in words if re.match(r'(ld|st)\.global', word)]
    assert touched
    return not [word for word in touched if re.search(r'\.[bsu](8|16)$', word) and '.v' not in word] and (
        N < 256 or any('.v4.b32' in word for word in touched))


# ---------------------------------------------------------------------------------------------------
# interpreted: kernels

def reference(name, *given):
    formula = {'mix': 'tka,kc->tac', 'unmix': 'tac,kc->tka', 'moment': 'tka,tac->kc'}[name]
    return torch.einsum(formula, *(t.double() for t in given))


def operands(name, T, K, N, C, dtype):
    rng = torch.Generator().manual_seed(0)
    v, y, M = (torch.randn(size, generator=rng).to(dtype) for size in ((T, K, N), (T, N, C), (K, C)))
    return {'mix': (v, M.float()), 'unmix': (y, M.float()), 'moment': (v, y)}[name]


# T, K, N, C: nothing, one of everything, a part of a block, more than one, sums on tensor cores and not, the most terms
SIZES = [(0, 2, 3, 2), (1, 1, 1, 1), (3, 2, 5, 3), (2, 3, 33, 4), (2, 12, 20, 10), (2, 32, 40, 8), (5, 8, 17, 8),
         (2, 17, 16, 1)]


@interpreted
@pytest.mark.parametrize('dtype, most', [(torch.float32, 2e-6), (torch.bfloat16, 8e-3), (torch.float16, 6e-4)], ids=str)
@pytest.mark.parametrize('sizes', SIZES, ids=str)
@pytest.mark.parametrize('name', KERNELS)
def test_kernels(name, sizes, dtype, most, monkeypatch):
    """In blocks of at most 16 positions, two programs for the sums; rounded once, which to bf16 is cutting off here."""
    monkeypatch.setattr(fused, 'BLOCK', 16)
    monkeypatch.setattr(fused, 'PROGRAMS', 2)
    given = operands(name, *sizes, dtype)
    found, expected = getattr(fused, f'{name}_op')(*given), reference(name, *given)
    assert found.shape == expected.shape and found.dtype == (torch.float32 if name == 'moment' else dtype)
    if found.numel():
        limit = 2e-6 if name == 'moment' else most
        assert (found.double() - expected).abs().max() <= limit * max(1, expected.abs().max())


@interpreted
@pytest.mark.parametrize('name', KERNELS)
@pytest.mark.parametrize('sizes', [(1, 1, 1, 1), (2, 3, 5, 2), (1, 1, 4, 1)], ids=str)
def test_operators_are_as_declared(name, sizes):
    """Shapes and types of tensors without values; no result shares storage with what was given."""
    given = operands(name, *sizes, torch.float32)
    torch.library.opcheck(getattr(fused, f'{name}_op'), given, test_utils=('test_schema', 'test_faketensor'))


@interpreted
@pytest.mark.parametrize('function', [fused.Mix, fused.Unmix])
@pytest.mark.parametrize('sizes', [(1, 1, 1, 1), (1, 1, 4, 1), (3, 1, 1, 1), (2, 3, 5, 2)], ids=str)
def test_functions_return_storage_of_their_own(function, sizes):
    given = [t.requires_grad_() for t in operands(function.__name__.lower(), *sizes, torch.float32)]
    y = function.apply(*given)
    g = torch.ones_like(y)
    every = [*given, y, g, *torch.autograd.grad(y, given, g)]
    assert len({t.untyped_storage().data_ptr() for t in every}) == len(every)


# ---------------------------------------------------------------------------------------------------
# interpreted: plans

def dense(x, A, B):
    return x @ kron_sum(A, B).t()


@interpreted
@pytest.mark.parametrize('name', FUSED)
@pytest.mark.parametrize('shape', THIN, ids=str)
@pytest.mark.parametrize('tokens', [1, 3])
def test_forward_and_all_gradients_in_fp32(name, shape, tokens):
    expected = all_of(dense, *tensors(shape, tokens, torch.float64))
    assert error(all_of(PLANS[name].apply, *tensors(shape, tokens, torch.float32)), expected) < 1e-5


@interpreted
@pytest.mark.parametrize('name', FUSED)
def test_other_factors_give_another_result(name):
    """Negative control of the test above."""
    expected = all_of(dense, *tensors(THIN[0], 9, torch.float64, seed=1))
    assert error(all_of(PLANS[name].apply, *tensors(THIN[0], 9, torch.float32)), expected) > 1e-2


@interpreted
@pytest.mark.parametrize('name', FUSED)
@pytest.mark.parametrize('shape', THIN, ids=str)
def test_under_autocast(name, shape):
    check_autocast(name, shape, 'cpu', tokens=4)


def check_autocast(name, shape, device, tokens):
    given = [t.detach().to(device).requires_grad_() for t in tensors(shape, tokens, torch.float32)]
    x, A, B, g = given
    with torch.autocast(device, torch.bfloat16):
        y = PLANS[name].apply(x, A, B)
    assert y.dtype == torch.bfloat16
    found = [y, *torch.autograd.grad(y, (x, A, B), g.bfloat16())]
    assert error([t.cpu() for t in found], all_of(dense, *tensors(shape, tokens, torch.float64))) < 0.05


@interpreted
@pytest.mark.parametrize('name', FUSED)
@pytest.mark.parametrize('shape', [(8, 4, 3, 3, 2), (12, 12, 4, 1, 1), (12, 12, 1, 4, 1)], ids=str)
def test_one_graph(name, shape):
    """Under torch.compile no graph break, and the same numbers."""
    torch._dynamo.reset()
    whole = torch.compile(PLANS[name].apply, fullgraph=True, backend='aot_eager')
    found, expected = (all_of(function, *tensors(shape, 3, torch.float32)) for function in (whole, PLANS[name].apply))
    assert error(found, expected) < 1e-6


@interpreted
def test_blocks_that_are_not_full(monkeypatch):
    monkeypatch.setattr(fused, 'BLOCK', 16)
    for tokens in (0, 1, 3, 5):
        for name in FUSED:
            expected = all_of(dense, *tensors((7, 5, 2, 3, 2), tokens, torch.float64))
            found = all_of(PLANS[name].apply, *tensors((7, 5, 2, 3, 2), tokens, torch.float32))
            for mine, right in zip(found, expected):
                torch.testing.assert_close(mine.double(), right, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------------------------
# on a GPU

@pytest.mark.gpu
@pytest.mark.parametrize('name', FUSED)
@pytest.mark.parametrize('shape', [*THIN, (768, 768, 4, 1, 1), (768, 768, 1, 4, 1), (1024, 256, 3, 3, 4)], ids=str)
def test_on_a_gpu(name, shape):
    check_autocast(name, shape, 'cuda', tokens=1000)
    x, A, B, g = (t.detach().cuda().requires_grad_() for t in tensors(shape, 1000, torch.float32))
    expected = all_of(dense, *tensors(shape, 1000, torch.float64))
    assert error([t.cpu() for t in all_of(PLANS[name].apply, x, A, B, g)], expected) < 2e-3         # tf32 may be on


@pytest.mark.gpu
@pytest.mark.parametrize('name', FUSED)
def test_compiled_on_a_gpu(name):
    torch._dynamo.reset()
    x, A, B, g = (t.detach().cuda().requires_grad_() for t in tensors((8, 4, 3, 3, 2), 9, torch.float32))
    compiled = torch.compile(PLANS[name].apply, fullgraph=True)
    assert error(all_of(compiled, x, A, B, g), all_of(PLANS[name].apply, x, A, B, g)) < 1e-4
