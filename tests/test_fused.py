"""The Triton plans are the materialised product, forward and backward; interpreted on a CPU, for real on a GPU."""
import os
import subprocess
import sys

import pytest
import torch

from kron import fused
from kron.plan import PLANS, Shape
from tests.test_plan import SHAPES, all_of, error, kron_sum, tensors
from tests.tiny import ROOT

pytest.importorskip('triton', reason='Triton is not installed; it comes with the CUDA wheels of torch')
INTERPRETED = os.environ.get('TRITON_INTERPRET') == '1'
interpreted = pytest.mark.skipif(not INTERPRETED, reason='runs in a process of its own with TRITON_INTERPRET=1')
FUSED = ['a_fused', 'b_fused']
THIN = [shape for shape in SHAPES if fused.suits(Shape(*shape))]


@pytest.mark.skipif(INTERPRETED, reason='is that process')
@pytest.mark.slow
def test_in_the_interpreter():
    """Everything below that a CPU can run; Triton reads the variable when it is imported."""
    done = subprocess.run([sys.executable, '-m', 'pytest', '-q', '-m', 'not gpu', __file__], cwd=ROOT, text=True,
                          capture_output=True, env={**os.environ, 'TRITON_INTERPRET': '1', 'CUDA_VISIBLE_DEVICES': ''})
    assert done.returncode == 0 and ' passed' in done.stdout, done.stdout[-3000:]


def dense(x, A, B):
    return x @ kron_sum(A, B).t()


@interpreted
@pytest.mark.parametrize('name', FUSED)
@pytest.mark.parametrize('shape', THIN, ids=str)
@pytest.mark.parametrize('tokens', [1, 9])
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
    check_autocast(name, shape, 'cpu')


def check_autocast(name, shape, device, tokens=64):
    given = [t.detach().to(device).requires_grad_() for t in tensors(shape, tokens, torch.float32)]
    x, A, B, g = given
    with torch.autocast(device, torch.bfloat16):
        y = PLANS[name].apply(x, A, B)
    assert y.dtype == torch.bfloat16
    found = [y, *torch.autograd.grad(y, (x, A, B), g.bfloat16())]
    assert error([t.cpu() for t in found], all_of(dense, *tensors(shape, tokens, torch.float64))) < 0.05


@interpreted
def test_blocks_that_are_not_full(monkeypatch):
    monkeypatch.setattr(fused, 'BLOCK', 16)
    for tokens in (0, 1, 3, 5):
        for name in FUSED:
            expected = all_of(dense, *tensors((7, 5, 2, 3, 2), tokens, torch.float64))
            found = all_of(PLANS[name].apply, *tensors((7, 5, 2, 3, 2), tokens, torch.float32))
            for mine, right in zip(found, expected):
                torch.testing.assert_close(mine.double(), right, rtol=1e-4, atol=1e-4)


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
