"""Half-precision models that compute in float32 by blocks: logits, statistics and fits of the float32 model, and memory."""
import dataclasses
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from configurator import GPTConfig
from decomposition import calibrate, wide
from decomposition.initialise import empty, initialise
from decomposition.sites import Decomposition, runnable
from model import GPT

SIZES = {'block_size': 16, 'vocab_size': 43, 'n_layer': 3, 'n_head': 4, 'n_embd': 32}
LLAMA = GPTConfig(**SIZES, n_kv_head=2, norm='rmsnorm', rope=True, mlp='swiglu(56)', bias=False, tie_weights=False)
CONFIGS = {'llama': LLAMA, 'gpt2': GPTConfig(**SIZES), 'mixed values': dataclasses.replace(LLAMA, value_residual=True),
           'qwen2': dataclasses.replace(LLAMA, attention='causal(qkv_bias=True)', tie_weights=True)}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def state_of(config, dtype=torch.bfloat16):
    torch.manual_seed(0)
    model = GPT(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return {name: t.to(dtype) for name, t in model.state_dict().items()}


def text(rows=3, batches=3, config=LLAMA):
    generator = torch.Generator().manual_seed(1)
    shape = (rows, config.block_size)
    return [tuple(torch.randint(config.vocab_size, shape, generator=generator) for _ in range(2)) for _ in range(batches)]


def near(a, b, share=1e-6):
    return (a - b).abs().max() <= share * b.abs().max()


@pytest.mark.parametrize('dtype', wide.HALF, ids=str)
@pytest.mark.parametrize('name', CONFIGS)
def test_logits_and_loss_are_those_of_the_float_model(name, dtype, monkeypatch):
    monkeypatch.setattr(wide, 'ROWS', 10)
    state = state_of(CONFIGS[name], dtype)
    small, full = (runnable(CONFIGS[name], state, 'cpu', half) for half in (True, False))
    assert wide.is_wide(small) and not wide.is_wide(full) and {p.dtype for p in small.parameters()} == {dtype}
    x, y = text()[0]
    with torch.no_grad():
        for ours, theirs in zip(small(x, y), full(x, y)):
            assert ours.dtype == torch.float32 and near(ours, theirs)
        guesses, loss = small(x, y, guess=True)
        assert torch.equal(guesses, full(x, y)[0].argmax(-1)) and near(loss, full(x, y)[1])


@pytest.mark.parametrize('memory', [1, 1 << 30])
@pytest.mark.parametrize('name', CONFIGS)
def test_statistics_are_those_of_the_float_model(name, memory):
    state, found = state_of(CONFIGS[name]), []
    for half in (True, False):
        model = runnable(CONFIGS[name], state, 'cpu', half)
        before = {p: p.requires_grad for p in model.parameters()}
        measured = calibrate.passes(model, list(model.sites()), text(), True, memory if half else 1 << 30)
        found.append({site: s for part in measured for site, s in part.items()})
        assert {p: p.requires_grad for p in model.parameters()} == before and not wide.Again.now
    assert found[0].keys() == found[1].keys()
    for site, ours in found[0].items():
        theirs = found[1][site]
        assert ours.count == theirs.count == 144         # the second forward pass of a block is not counted
        for part in ('mean', 'covariance', 'gradient'):
            assert near(getattr(ours, part), getattr(theirs, part)), (site, part)


@pytest.mark.parametrize('method', ['svd', 'svd_whitened', 'svd_whitened_hessian', 'svd_whitened_sequential',
                                    'svd_whitened_streamed', 'neurons', 'neurons_streamed'])
def test_fits_are_those_of_the_float_model(method):
    narrow = method.startswith('neurons')
    config = dataclasses.replace(LLAMA, **({'mlp': 'swiglu(40)', 'attention': 'causal(kv_heads=1)'} if narrow else
                                           {'linear': {'h.*': 'lowrank(6)'}}))
    made, state = [], state_of(LLAMA)
    for dtype in (torch.bfloat16, torch.float32):
        half, source = dtype == torch.bfloat16, state
        model = empty(config, dtype)
        shared = runnable(LLAMA, state, 'cpu', half)
        initialise(model, LLAMA, shared.state_dict(), how=Decomposition(method, text(), dense=shared, wide=half))
        assert {p.dtype for p in model.parameters()} == {dtype}
        made.append(wide.widened(model) if half else model)
        assert all(torch.equal(t, shared.state_dict()[name].to(t.dtype)) for name, t in source.items())
    with torch.no_grad():
        x, y = text(4, 1)[0]
        ours, theirs = (model.eval()(x, y)[0] for model in made)
    assert 0 < (ours - theirs).norm() / theirs.norm() < 0.02            # factors rounded to 8 bits


class Live(TorchDispatchMode):
    """Bytes of float32 storages that operations made and that are alive; `peak`: the most at once."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        found = function(*arguments, **(options or {}))
        for t in tree_leaves(found):
            if torch.is_tensor(t) and t.dtype == torch.float32:
                self.add(t.untyped_storage())
        return found

    def add(self, storage):
        if storage not in self.known:
            self.known.add(storage)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.drop, storage.nbytes())

    def drop(self, size):
        self.now -= size


@pytest.mark.parametrize('gradients', [False, True])
def test_one_block_is_in_float32_at_a_time(gradients, monkeypatch):
    config = dataclasses.replace(LLAMA, n_layer=8, n_embd=64, mlp='swiglu(160)', block_size=4, vocab_size=8)
    model = runnable(config, state_of(config), 'cpu', True)
    block, tokens = 4 * sum(p.numel() for p in model.transformer.h[0].parameters()), text(1, 2, config)
    monkeypatch.setattr(calibrate, 'check_enough', lambda *_: None)

    def peak():
        with Live() as live:
            for _ in calibrate.passes(model, list(model.sites()), tokens, gradients):
                pass
        return live.peak / block
    assert 1 <= peak() < 2
    if gradients:                                       # what the second forward pass saves
        monkeypatch.setattr(wide.WideBlock, 'forward', wide.WideBlock.in_float)
        assert peak() > 6


def test_models_of_one_source_share_its_tensors():
    state = state_of(CONFIGS['qwen2'])
    first = runnable(CONFIGS['qwen2'], state, 'cpu', True)
    again = runnable(CONFIGS['qwen2'], first.state_dict(), 'cpu', True)
    places = [{t.data_ptr() for t in model.state_dict().values()} for model in (first, again)]
    assert places[0] == places[1] == {t.data_ptr() for name, t in state.items() if name != 'lm_head.weight'}
    assert first.lm_head.weight is first.transformer.wte.weight


def test_a_pass_goes_no_further_than_its_blocks():
    """The sums of the first blocks need no later block, and gradients of the last ones no earlier block."""
    model, calls = runnable(LLAMA, state_of(LLAMA, torch.float32), 'cpu'), []
    for i, block in enumerate(model.transformer.h):
        block.register_forward_hook(lambda *_, i=i: calls.append(i))
        block.mlp.register_full_backward_hook(lambda *_, i=i: calls.append(-i))
    list(calibrate.passes(model, ['h.0.mlp.c_fc'], text(batches=1)))
    assert calls == [0, 1, 2, 0]                        # all of them once, to see which sites share an input
    calls.clear()
    list(calibrate.passes(model, ['h.2.mlp.c_fc', 'h.1.mlp.c_fc'], text(batches=1), True))
    assert calls == [0, 1, 2, 0, 1, 2, -2, -1]
