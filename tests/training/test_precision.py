"""training/precision.py: weights in half precision, fp32 masters, loss scaling."""
import pytest
import torch

import configurator
import train
from checkpoints import checkpoint
from model import GPT, GPTConfig
from optimizers import optim
from tests.tiny import arguments, make_data
from training import precision


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp('data'))


def run(data, out, *more):
    train.STOP.update(signal=None, time=0.0)
    train.main(configurator.load([*arguments(data, out), *more]))
    return checkpoint.load(out)


def half_and_full(dtype, seed=0):
    """A parameter in half precision with its AdamW, and its fp32 twin."""
    torch.manual_seed(seed)
    narrow = torch.nn.Parameter(torch.randn(7, 5).to(dtype))
    wide = torch.nn.Parameter(narrow.detach().float())
    return narrow, torch.optim.AdamW([narrow], lr=1e-3), wide, torch.optim.AdamW([wide], lr=1e-3)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_with_masters_the_weights_are_those_of_fp32_rounded(dtype):
    narrow, optimizer, wide, oracle = half_and_full(dtype)
    for _ in range(20):
        narrow.grad = torch.randn(7, 5).to(dtype)
        wide.grad = narrow.grad.float()
        with precision.widened(optimizer, True, True):
            assert narrow.dtype == narrow.grad.dtype == torch.float32
            optimizer.step()
        oracle.step()
        assert narrow.dtype == dtype and torch.equal(narrow, wide.to(dtype))
    assert torch.equal(optimizer.state[narrow]['master'], wide)
    assert optimizer.state[narrow]['exp_avg'].dtype == torch.float32


def test_small_steps_are_lost_without_masters_only():
    """5e-6 a step beside a weight of 1, whose neighbours in float16 are 5e-4 away."""
    moved = {}
    for masters in (True, False):
        p = torch.nn.Parameter(torch.ones(4, dtype=torch.float16))
        optimizer = torch.optim.SGD([p], lr=1.0, momentum=0.0)
        optimizer.state[p]['any'] = torch.zeros(1)
        for _ in range(1000):
            p.grad = torch.full((4,), 5e-6, dtype=torch.float16)
            with precision.widened(optimizer, True, masters):
                optimizer.step()
        moved[masters] = (1 - p.float()).max().item()
    assert moved[True] == pytest.approx(5e-3, rel=0.1) and moved[False] == 0


def test_a_step_that_overflowed_leaves_the_weights_as_they_are():
    narrow, optimizer, _, _ = half_and_full(torch.float16)
    scaler, before = torch.amp.GradScaler('cpu', init_scale=4.0), narrow.detach().clone()
    scaler.scale(torch.ones(()))                            # the scaler wants to have been used
    for gradient in (float('inf'), 1.0):
        narrow.grad = torch.full((7, 5), gradient, dtype=torch.float16)
        with precision.widened(optimizer, True, True):
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        assert torch.equal(narrow, before) == (gradient == float('inf'))


def test_parameters_without_gradient_and_tied_ones_stay_one_tensor():
    p, idle = (torch.nn.Parameter(torch.ones(3, dtype=torch.float16)) for _ in range(2))
    optimizer = torch.optim.AdamW([p, idle], lr=0.1)
    p.grad, place = torch.ones(3, dtype=torch.float16), p.data_ptr()
    with precision.widened(optimizer, True, True):
        optimizer.step()
    assert p.data_ptr() == place and torch.equal(idle, torch.ones(3, dtype=torch.float16)) and (p < 1).all()


def test_fp32_is_left_alone():
    p = torch.nn.Parameter(torch.ones(3))
    p.grad, optimizer = torch.ones(3), torch.optim.AdamW([p])
    place = p.data_ptr()
    with precision.widened(optimizer, False, True):
        assert p.data_ptr() == place
    assert p.data_ptr() == place and p.grad is not None


@pytest.mark.parametrize('more', [['--weights=float16'], ['--weights=float16', '--master_weights=False'],
                                  ['--weights=bfloat16'], ['--weights=float16', '--ngpt=simple', '--rope=True',
                                                           '--tie_weights=False', '--linear=h.*.mlp.*=kron(8,8)']], ids=str)
def test_half_weights_train_and_resume_to_the_same_bits(data, tmp_path, more):
    whole = run(data, tmp_path / 'a', *more)
    kind = torch.bfloat16 if 'bfloat16' in more[0] else torch.float16
    assert all(t.dtype == kind for name, t in whole['model'].items() if t.is_floating_point() and 'weight' in name)
    assert all(('master' in entries) == ('--master_weights=False' not in more) for entries in whole['optimizer'].values())
    assert (whole['scaler'] != {}) == (kind == torch.float16)
    run(data, tmp_path / 'b', *more, '--max_iters=7')
    again = run(data, tmp_path / 'b', *more, '--init_from=resume')
    assert all(torch.equal(t, again['model'][name]) for name, t in whole['model'].items())
    for name, entries in whole['optimizer'].items():
        assert all(torch.equal(value, again['optimizer'][name][key]) for key, value in entries.items())


def test_ngpt_masters_stay_on_the_sphere(data, tmp_path):
    state = run(data, tmp_path, '--weights=float16', '--ngpt=full', '--rope=True', '--tie_weights=False',
                '--linear=h.*=dense')
    master = state['optimizer']['transformer.h.0.attn.c_q.weight']['master']
    assert (master.norm(dim=1) - 1).abs().max() < 1e-6


LONG = ['--linear=h.*=dense', '--n_layer=2', '--n_embd=64', '--block_size=64', '--batch_size=16',
        '--dropout=0', '--gradient_accumulation_steps=1', '--max_iters=400', '--lr_decay_iters=400',
        '--warmup_iters=20', '--eval_interval=400', '--eval_iters=0', '--learning_rate=3e-3', '--min_lr=3e-4']


@pytest.mark.slow
def test_pure_float16_ends_where_fp32_ends(data, tmp_path):
    """Minutes: half precision is slow on a CPU."""
    losses = {}
    for name, more in {'fp32': [], 'masters': ['--weights=float16'],
                       'pure': ['--weights=float16', '--master_weights=False']}.items():
        losses[name] = run(data, tmp_path / name, *LONG, *more)['best_val_loss']
    assert abs(losses['masters'] - losses['fp32']) < 0.02 and abs(losses['pure'] - losses['fp32']) < 0.02, losses


def micro_steps(scaling, accumulation=2048, steps=150):
    """Loss after `steps` steps that each see one micro-step of `accumulation`, whose loss counts 1 / accumulation."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=32, vocab_size=17))
    precision.halve(model, torch.float16)
    optimizer = optim.adamw(model, 0.1, 1e-2, (0.9, 0.99), 'cpu')
    scaler = torch.amp.GradScaler('cpu', enabled=scaling)
    for _ in range(steps):
        x = torch.randint(17, (16, 33))
        loss = model(x[:, 1:], x[:, :-1])[1]                    # the token before: only attention can tell it
        scaler.scale(loss / accumulation).backward()
        with precision.widened(optimizer, True, True):
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad()
    return loss.item()


@pytest.mark.slow
def test_large_batches_fail_in_float16_without_the_scaler():
    """2^20 tokens per step, in micro-steps of 512: most gradients of activations lie below 6e-8 and are 0."""
    scaled, unscaled = micro_steps(True), micro_steps(False)
    assert scaled < 0.5 and unscaled > scaled + 1, (scaled, unscaled)
