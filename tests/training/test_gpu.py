"""What a GPU must show: compiled gradients are the eager ones, bits come back, float16 and its scaler, DDP, kernels.

Every body takes its device and its sizes from the machine: on a GPU these are the tests of `-m gpu`; without one the same
bodies run in the long tier, tiny and by aot_eager, to be sure that they run at all.
"""
import itertools
import math

import pytest
import torch

import configurator
import train
import variants
from attention import window
from bench import cases, check, compiled, modules
from checkpoints import checkpoint
from kron.plan import PLANS, Shape
from kron.timing import candidates
from optimizers import optim
from tests.tiny import arguments, make_data

CUDA = torch.cuda.is_available()
DEVICE = torch.device('cuda', 0) if CUDA else torch.device('cpu')
BACKEND = 'inductor' if CUDA else 'aot_eager'
pytestmark = pytest.mark.gpu if CUDA else pytest.mark.slow
gpu_only = pytest.mark.skipif(not CUDA, reason='no CUDA GPU')
RUN = [f'--device={DEVICE.type}', '--dtype=bfloat16', f'--compile={CUDA}', '--max_iters=30', '--lr_decay_iters=30']
SIZES = dict(backend=BACKEND) | ({} if CUDA else dict(n_embd=128, block_size=32, batch_size=2, vocab_size=64))
SETTINGS = check.Settings(**SIZES)


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp('data'))


def run(data, out, *more):
    train.STOP.update(signal=None, time=0.0)
    train.main(configurator.load([*arguments(data, out), *RUN, *more]))
    return checkpoint.load(out)


# ----------------------------------------------------------------------------------------------------
# compiled models

@pytest.mark.parametrize('name', cases.cases(SETTINGS))
def test_compiled_gradients_are_the_eager_ones(name):
    row = compiled.compare(name, cases.cases(SETTINGS)[name], SETTINGS, DEVICE)
    assert row['passed'], row
    assert row['recompiled'] == 0, row


def entries():
    """{words: settings of GPTConfig}: one a name of the three tables."""
    shape = modules.Settings(n_embd=SETTINGS.n_embd, n_head=2, block_size=SETTINGS.block_size)
    found = {}
    for part in modules.TABLES:
        for _, spec in modules.specs(part, shape):
            found[f'{part} {spec}'] = {'linear': {'h.*.mlp.c_fc': spec}} if part == 'linear' else {part: spec}
    return found


@pytest.mark.slow
@pytest.mark.parametrize('words', entries())
def test_compiled_gradients_of_every_entry_of_the_tables(words):
    row = compiled.compare(words, ('bfloat16', dict(rope=True, **entries()[words])), SETTINGS, DEVICE)
    assert row['passed'], row


@pytest.mark.parametrize('name', cases.RANKED)
def test_ddp_of_one_rank_trains_as_without(name):
    row = compiled.one_rank(name, SETTINGS, DEVICE)
    assert row['passed'], row


# ----------------------------------------------------------------------------------------------------
# training

def test_bf16_and_compile_train_and_resume_to_the_same_bits(data, tmp_path):
    whole = run(data, tmp_path / 'a', '--deterministic=True')
    assert whole['best_val_loss'] < 2.7
    run(data, tmp_path / 'b', '--deterministic=True', '--max_iters=17')
    again = run(data, tmp_path / 'b', '--deterministic=True', '--init_from=resume')
    assert all(torch.equal(t, again['model'][name]) for name, t in whole['model'].items())


def test_float16_with_its_scaler(data, tmp_path):
    state = run(data, tmp_path, '--dtype=float16')
    assert state['scaler']['scale'] >= 1 and state['best_val_loss'] < 2.7


def test_float16_passes_over_outliers_and_losses_that_are_not_finite(data, tmp_path, monkeypatch):
    """Both leave gradients that the scaler has divided already; the steps after them train."""
    seen, calls, real = itertools.count(), itertools.count(), train.assemble

    def assemble(*given):
        built = real(*given)
        net = built.net

        def spoiled(x, y):
            return None, net(x, y)[1] * (math.inf if next(calls) == 11 else 1.0)         # in step 5 of two micro-steps
        built.net = spoiled
        return built
    monkeypatch.setattr(train, 'assemble', assemble)
    monkeypatch.setattr(optim.Outliers, 'check', lambda self, **values: next(seen) in (3, 8))
    state = run(data, tmp_path, '--dtype=float16', '--nonfinite=skip')
    assert state['step'] == 30 and next(seen) > 20 and next(calls) == 60
    assert state['best_val_loss'] < 2.7 and all(t.isfinite().all() for t in state['model'].values())


@gpu_only
def test_a_model_larger_than_memory_is_said_in_one_line(data, tmp_path, capsys):
    with pytest.raises(SystemExit) as leave:
        run(data, tmp_path, '--batch_size=1000000', '--block_size=16', '--n_embd=4096', '--n_head=2', '--compile=False')
    assert leave.value.code == 4 and 'lower batch_size' in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------
# kernels

@gpu_only
def test_windows_by_flex_attention_are_those_of_the_mask_in_bf16(monkeypatch):
    """Gradients, with windows that move: no further from the mask's than twice its rounding."""
    name, changes = 'windows', cases.cases(SETTINGS)['windows'][1]
    model, x, y = compiled.make(SETTINGS, DEVICE, **changes)
    net = torch.compile(model, backend=BACKEND)
    for size in (SETTINGS.block_size // 3, 7, SETTINGS.block_size):
        for block in model.transformer.h:
            block.attn.window.fill_(size)
        found = compiled.gradients(model, net, x, y, torch.bfloat16)[1]
        with monkeypatch.context() as patch:
            patch.setattr(window.WindowAttention, 'flex_fits', lambda self, q: False)
            masked = compiled.gradients(model, model, x, y, torch.bfloat16)[1]
            exact = compiled.gradients(model, model, x, y, torch.float32)[1]
        judged = compiled.verdict(compiled.distances(found, masked), compiled.distances(masked, exact), 0.05)
        assert judged['wrong'] == 0, (name, size, judged)


FACTORS = [(768, 768, 4, 1, 1), (768, 768, 1, 4, 1), (1024, 256, 3, 3, 2)] if CUDA else [(12, 12, 4, 1, 1), (8, 4, 3, 3, 2)]


@pytest.mark.parametrize('m, n, p, q, terms', FACTORS)
@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 3e-3), (torch.bfloat16, 3e-2)])
def test_every_plan_of_this_device_agrees_with_float64(m, n, p, q, terms, dtype, tolerance):
    """y and the gradients of x, A and B, fused kernels among them."""
    tokens = 2048 if CUDA else 9
    torch.manual_seed(0)
    given = [torch.randn(*size, device=DEVICE) for size in ((tokens, n * q), (terms, m, n), (terms, p, q))]
    gradient = torch.randn(tokens, m * p, device=DEVICE)

    def all_of(function, inputs):
        inputs = [t.detach().requires_grad_() for t in inputs]
        y = function(*inputs)
        return [y, *torch.autograd.grad(y, inputs, gradient.to(y.dtype))]

    def formed(x, A, B):
        return x @ sum(torch.kron(a.contiguous(), b.contiguous()) for a, b in zip(A, B)).t()
    expected = all_of(formed, [t.double() for t in given])
    names = candidates(Shape(m, n, p, q, terms), tokens, DEVICE)
    assert names
    for name in names:
        with torch.autocast(DEVICE.type, dtype=dtype, enabled=dtype != torch.float32):
            found = all_of(PLANS[name].apply, given)
        for mine, right in zip(found, expected):
            assert ((mine.double() - right).norm() / right.norm()).item() < tolerance, name


@pytest.mark.parametrize('name, spec', [('kron', dict(m=768, n=768)), ('kron', dict(m=1024, n=256, terms=2)),
                                        ('lowrank', dict(rank=153)), ('dense', {})])
@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 1e-3), (torch.bfloat16, 2e-2)])
def test_linears_agree_with_float64(name, spec, dtype, tolerance):
    torch.manual_seed(0)
    module = variants.LINEARS[name](768, 3072, False, **spec).to(DEVICE)
    x = torch.randn(512 if CUDA else 8, 768, device=DEVICE)
    expected = x.double() @ module.dense_weight().double().t()
    with torch.autocast(DEVICE.type, dtype=dtype, enabled=dtype != torch.float32):
        y = module(x)
    assert ((y.double() - expected).norm() / expected.norm()).item() < tolerance
