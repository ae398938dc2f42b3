"""layers/few_rows.py: the same products as F.linear's, taken apart only where a CPU's threads would idle."""
import pytest
import torch
from torch.nn import functional as F

from kron import products
from layers import few_rows
from layers.basic import Linear
from lowrank.linear import LowRankLinear
from model import GPT, GPTConfig


@pytest.fixture(autouse=True)
def two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.fixture
def taken(monkeypatch):
    """Shapes of the products that were taken in blocks."""
    found, real = [], few_rows.blocks
    monkeypatch.setattr(few_rows, 'blocks', lambda rows, weight: found.append(tuple(weight.shape)) or real(rows, weight))
    return found


@pytest.mark.parametrize('out', [1024, 1031, 4111])
@pytest.mark.parametrize('shape', [(1,), (4,), (1, 1), (2, 2), (1, 4)])
@pytest.mark.parametrize('bias', [False, True])
def test_products_are_those_of_float64(out, shape, bias, taken):
    torch.manual_seed(0)
    x, W, b = torch.randn(*shape, 256), torch.randn(out, 256), torch.randn(out) if bias else None
    with torch.no_grad():
        y = few_rows.linear(x, W, b)
    exact = F.linear(x.double(), W.double(), b if b is None else b.double())
    assert y.shape == exact.shape and taken == [(out, 256)]
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=2e-4)


def cases():
    x, W = torch.randn(1, 512), torch.randn(512, 512)
    yield 'five rows', torch.randn(5, 512), W
    yield 'bfloat16', x.bfloat16(), W.bfloat16()
    yield 'float64', x.double(), W.double()
    yield 'small', torch.randn(1, 64), torch.randn(64, 64)


@pytest.mark.parametrize('case', list(cases()), ids=lambda case: case[0])
def test_all_others_are_left_to_torch(case, taken):
    _, x, W = case
    with torch.no_grad():
        assert torch.equal(few_rows.linear(x, W), F.linear(x, W))
    assert taken == []


def test_training_autocast_and_a_single_thread_are_left_to_torch(taken):
    x, W = torch.randn(1, 512), torch.randn(512, 512, requires_grad=True)
    few_rows.linear(x, W).sum().backward()
    with torch.no_grad(), torch.autocast('cpu', dtype=torch.bfloat16):
        assert few_rows.linear(x, W).dtype == torch.bfloat16
    torch.set_num_threads(1)
    with torch.no_grad():
        few_rows.linear(x, W)
    assert W.grad is not None and taken == []


def test_layers_of_every_kind_use_it(taken):
    x = torch.randn(1, 512)
    with torch.no_grad():
        Linear(512, 512, False)(x)
        LowRankLinear(512, 512, False, rank=300)(x)
        for plan in (products.a_dot, products.a_outer):
            plan(x, torch.randn(1, 512, 512), torch.randn(1, 4, 1))
        for plan in (products.b_dot, products.b_inner):
            plan(torch.randn(1, 2048), torch.randn(1, 512, 512), torch.randn(1, 1, 4))
    assert taken == [(512, 512), (300, 512), (512, 300), *[(512, 512)] * 4]


def test_a_model_generates_the_same_tokens_with_either_number_of_threads(taken):
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=2, n_head=4, n_embd=256, block_size=32, vocab_size=1031)).eval()
    with torch.no_grad():
        both = model.generate(torch.zeros(1, 1, dtype=torch.long), 16, top_k=1)
        assert (1031, 256) in taken
        torch.set_num_threads(1)
        assert torch.equal(both, model.generate(torch.zeros(1, 1, dtype=torch.long), 16, top_k=1))
