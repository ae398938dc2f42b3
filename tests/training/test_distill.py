"""Runs that refine the compressed model first, learn from a teacher, or train a part: settings, logs, resuming, refusals."""
import json
import math
import os

import pytest
import torch

import train
from checkpoints import checkpoint
from decomposition import initialise
from tests.reliability.ranks import trained
from tests.tiny import arguments, make_data
from tests.training.test_train import log, no_signal, run, same  # noqa: F401 - the fixture is used by every test
from variants import UserError

KRON = '--linear=h.*.mlp.*=kron(8, 8, terms=2)'
PLAIN = ['--dropout=0', '--linear={}']


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp('data'))


@pytest.fixture(scope='module')
def dense(data, tmp_path_factory):
    """A dense run's folder."""
    folder = tmp_path_factory.mktemp('dense') / 'run'
    run(data, folder, *PLAIN, '--max_iters=30', '--lr_decay_iters=30')
    return folder


def from_dense(dense, *more):
    return [f'--init_from={dense}', '--dropout=0', *more]


def text(capsys):
    found = capsys.readouterr()
    return found.out + found.err


# ----------------------------------------------------------------------------------------------------
# distillation

def test_the_log_has_the_labels_loss_and_the_divergence(data, dense, tmp_path):
    """A student that is its teacher: no divergence, no gradient, the labels' loss as without a teacher."""
    alike = run(data, tmp_path / 'a', *from_dense(dense, '--linear={}', '--distill=init_from', '--weight_decay=0'))
    run(data, tmp_path / 'b', *from_dense(dense, '--linear={}'))
    assert [kl for _, kl in log(tmp_path / 'a', 'kl')] == [0.0] * 12
    assert log(tmp_path / 'a')[0] == pytest.approx(log(tmp_path / 'b')[0], rel=1e-6)
    _, weights, _ = initialise.read_source(str(dense))
    assert all(torch.equal(t, weights[name]) for name, t in alike['model'].items())
    assert max(norm for _, norm in log(tmp_path / 'a', 'grad_norm')) == 0.0 and not log(tmp_path / 'b', 'kl')


@pytest.mark.parametrize('more', [[], ['--distill_top_k=3', '--distill_weight=0.5', '--distill_temperature=2']], ids=str)
def test_a_compressed_model_approaches_its_teacher(data, dense, tmp_path, more):
    state = run(data, tmp_path, *from_dense(dense, KRON, '--distill=init_from', '--max_iters=40', '--lr_decay_iters=40',
                                            '--loss_chunk=10', *more))
    kls = [kl for _, kl in log(tmp_path, 'kl')]
    assert sum(kls[-5:]) < 0.8 * sum(kls[:5]) and len(log(tmp_path, 'val_loss')) == 8
    assert state['config']['distill'] == str(dense) and len(state['teacher']) == 64
    assert json.load(open(tmp_path / 'config.json'))['distill'] == str(dense)


def test_micro_steps_and_chunks_do_not_change_the_loss(data, dense, tmp_path):
    for name, more in (('a', []), ('b', ['--gradient_accumulation_steps=1', '--batch_size=8', '--loss_chunk=7'])):
        run(data, tmp_path / name, *from_dense(dense, KRON, '--distill=init_from', '--max_iters=3', *more))
    for key in ('loss', 'kl', 'grad_norm'):
        assert [v for _, v in log(tmp_path / 'a', key)] == pytest.approx([v for _, v in log(tmp_path / 'b', key)], rel=1e-4)


@pytest.mark.parametrize('more', [['--distill_top_k=3'], ['--trainable=h.*.mlp.*, ln_f.*'], ['--dtype=bfloat16']], ids=str)
def test_resume_is_bit_exact(data, dense, tmp_path, monkeypatch, more):
    given = [f'--init_from={dense}', KRON, '--distill=init_from', '--dropout=0.1', *more]
    whole = run(data, tmp_path / 'whole', *given)
    step, own = [0], train.train_step

    def until_seven(*arguments):
        step[0] += 1
        train.STOP['signal'] = 15 if step[0] == 7 else None
        return own(*arguments)
    with monkeypatch.context() as patch:
        patch.setattr(train, 'train_step', until_seven)
        assert run(data, tmp_path / 'parts', *given)['step'] < 12
    train.STOP['signal'] = None
    assert same(run(data, tmp_path / 'parts', '--init_from=resume', KRON), whole)
    assert log(tmp_path / 'parts', 'kl') == log(tmp_path / 'whole', 'kl')
    other = run(data, tmp_path / 'other', *given, '--distill_weight=0.5')               # the control
    assert not same(other, whole)


def test_a_changed_teacher_is_refused_and_a_moved_one_is_not(data, dense, tmp_path, capsys):
    folder = tmp_path / 'run'
    run(data, folder, *from_dense(dense, KRON, '--distill=init_from'))
    again = ['--init_from=resume', '--dropout=0', KRON, '--max_iters=14']
    run(data, tmp_path / 'other', *PLAIN, '--max_iters=2', '--seed=1')
    run(data, folder, *again, f'--distill={tmp_path / "other"}', code=2)
    said = text(capsys)
    assert 'is not the model that' in said and 'Traceback' not in said
    os.symlink(dense, tmp_path / 'moved')
    assert run(data, folder, *again, f'--distill={tmp_path / "moved"}')['step'] == 14
    assert run(data, folder, *again, '--max_iters=16', '--distill=')['step'] == 16       # without one
    assert len(log(folder, 'kl')) == 14


@pytest.mark.parametrize('more, words', [
    (['--distill=init_from'], "init_from='scratch' is no model to learn from"),
    (['--distill=nowhere'], "'nowhere' is no folder here"),
    (['--init_from=DENSE', '--distill=init_from', '--loss=stablemax'], "distill is for loss='cross_entropy'"),
    (['--init_from=DENSE', '--distill=init_from', '--distill_weight=0'], 'distill_weight must be above 0 and at most 1'),
    (['--distill=DENSE', '--block_size=32'], 'has a block_size of 16, less than 32'),
    (['--trainable=h.*.mpl.*'], "trainable: 'h.*.mpl.*' matches no parameter"),
    (['--refine=5'], "refine meets the blocks of a dense model, and init_from='scratch' has none"),
    (['--init_from=DENSE', '--refine=5', '--calibration_tokens=0'], 'refine learns on the calibration text'),
    (['--init_from=DENSE', '--refine=5', '--calibration_tokens=16'], 'and got 1 of them; raise calibration_tokens'),
    (['--init_from=DENSE', '--refine=5', '--self_guided=0.5'], 'refine does not go with self_guided'),
])
def test_mistakes_are_one_line(data, dense, tmp_path, capsys, more, words):
    more = [argument.replace('DENSE', str(dense)) for argument in more]
    try:
        run(data, tmp_path / 'run', '--linear={}', '--dropout=0', *more, code=2)
        said = text(capsys).strip().splitlines()[-1]
    except UserError as error:                          # found before torch
        said = str(error)
    assert words in said and '\n' not in said and not checkpoint.steps(tmp_path / 'run')


def test_a_teacher_of_other_tokens_is_refused(dense, tmp_path, capsys):
    other = tmp_path / 'data'
    make_data(other)
    meta = json.load(open(other / 'tiny' / 'meta.json'))
    swap = {'a': 'b', 'b': 'a'}
    chars = [swap.get(c, c) for c in meta['chars']] if 'chars' in meta else None
    assert chars
    meta['chars'] = chars
    json.dump(meta, open(other / 'tiny' / 'meta.json', 'w'))
    run(other, tmp_path / 'run', *PLAIN, f'--distill={dense}', code=2)
    assert 'mean other things than those of' in text(capsys)


@pytest.mark.parametrize('more', [[], ['--distill_top_k=3'], ['--parallel=fsdp'], ['--weights=bfloat16']], ids=str)
@pytest.mark.slow
def test_two_ranks_learn_as_one_does(data, dense, tmp_path, more):
    given = arguments(data, tmp_path / 'two', *from_dense(dense, KRON, '--refine=10', '--calibration_tokens=2048',
                                                          '--distill=init_from', '--backend=gloo', *more))
    trained(2, tmp_path / 'two', *given)
    one = run(data, tmp_path / 'one', *from_dense(dense, KRON, '--refine=10', '--calibration_tokens=2048',
                                                  '--distill=init_from', *[a for a in more if 'parallel' not in a]))
    two, near = checkpoint.load(tmp_path / 'two'), 1e-2 if 'bfloat16' in str(more) else 1e-5
    assert max((t.double() - two['model'][n].double()).abs().max().item() for n, t in one['model'].items()) < near
    for key in ('kl', 'loss'):
        losses = [[v for _, v in log(tmp_path / name, key)] for name in ('one', 'two')]
        assert losses[0] == pytest.approx(losses[1], abs=near)


@pytest.mark.parametrize('more', [[], ['--distill_top_k=3', '--loss_chunk=16']], ids=str)
@pytest.mark.slow
def test_a_compiled_run_learns_alike(data, dense, tmp_path, more):
    given = from_dense(dense, KRON, '--distill=init_from', '--max_iters=4', *more)
    run(data, tmp_path / 'a', *given)
    run(data, tmp_path / 'b', *given, '--compile=True')
    for key in ('kl', 'loss', 'grad_norm'):
        assert [v for _, v in log(tmp_path / 'b', key)] == pytest.approx([v for _, v in log(tmp_path / 'a', key)], rel=1e-3)


# ----------------------------------------------------------------------------------------------------
# a part that trains

@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_only_what_is_named_trains(data, tmp_path, optimizer):
    first = run(data, tmp_path / 'a', '--max_iters=0', '--warmup_iters=0', f'--optimizer={optimizer}')['model']
    more = ['--trainable=h.*.mlp.*,ln_f.weight', f'--optimizer={optimizer}']
    state = run(data, tmp_path / 'b', *more)
    moved = {name for name, t in state['model'].items() if not torch.equal(t, first[name])}
    assert moved == {name for name in first if '.mlp.' in name or name == 'transformer.ln_f.weight'}
    assert set(state['optimizer']) == moved
    flops = [checkpoint.load(tmp_path / name)['flops'] for name in 'ab']
    assert flops[0] == 0 < flops[1] < run(data, tmp_path / 'c', f'--optimizer={optimizer}')['flops']


def test_what_is_dropped_in_later_trains_only_where_it_is_named(data, tmp_path):
    more = ['--drop_in=sequential', '--drop_in_from=2', '--drop_in_every=2', '--linear=h.*.mlp.*=kron(8, 8, terms=2)',
            '--trainable=h.0.mlp.*', '--calibration_tokens=512']
    state = run(data, tmp_path, *more)
    assert state['built']['drop']['done'] == 4 and state['optimizer']
    assert all(name.startswith('transformer.h.0.mlp.') for name in state['optimizer'])


# ----------------------------------------------------------------------------------------------------
# refinement

def test_refining_lowers_the_loss_and_is_said(data, dense, tmp_path, capsys):
    given = from_dense(dense, '--linear=h.*.mlp.*=lowrank(1)', '--decompose=svd', '--max_iters=0', '--warmup_iters=0',
                       '--calibration_tokens=4096')
    run(data, tmp_path / 'a', *given)
    run(data, tmp_path / 'b', *given, '--refine=60')
    losses = [log(tmp_path / name, 'val_loss')[0][1] for name in 'ab']
    assert losses[1] < losses[0] - 0.01 and math.isfinite(losses[1])
    assert 'h.1: held-out error' in text(capsys)
    assert {'h.0.safetensors', 'h.1.safetensors'} <= set(os.listdir(tmp_path / 'b' / 'refine'))


def test_a_killed_refinement_goes_on_with_equal_bits(data, dense, tmp_path, monkeypatch):
    from decomposition import refine
    given = from_dense(dense, KRON, '--refine=10', '--refine_parameters=block', '--calibration_tokens=2048')
    whole, own = run(data, tmp_path / 'a', *given), refine.fit

    def killed(block, *rest):
        if block.streams.index == 1:
            raise KeyboardInterrupt
        return own(block, *rest)
    with monkeypatch.context() as patch:
        patch.setattr(refine, 'fit', killed)
        with pytest.raises(KeyboardInterrupt):
            run(data, tmp_path / 'b', *given)
    first = (tmp_path / 'b/refine/h.0.safetensors').stat().st_mtime_ns
    assert same(run(data, tmp_path / 'b', *given), whole)
    assert (tmp_path / 'b/refine/h.0.safetensors').stat().st_mtime_ns == first
    assert not same(run(data, tmp_path / 'c', *given, '--refine=9'), whole)
