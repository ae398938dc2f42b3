"""Several ranks, by DDP and FSDP2, on one machine and on two torchrun agents: the optimisation is that of one rank."""
import os
import socket
import subprocess
import sys

import pytest
import torch

from checkpoints import checkpoint
from tests.reliability.test_processes import fingerprint, finish, start
from tests.tiny import ROOT, arguments, make_data

SAME = ['--max_iters=20', '--lr_decay_iters=20', '--dropout=0.1', '--eval_interval=20']
WAYS = {'ddp': [], 'ddp muon': ['--optimizer=muon'],
        'ddp grows': ['--grow_from=1', '--grow_every=7', '--linear=h.0.*=dense', '--orthograd=True'],
        'ddp guides': ['--self_guided=0.5', '--skip_zscore=4'], 'fsdp': ['--parallel=fsdp'],
        'fsdp muon': ['--parallel=fsdp', '--optimizer=muon'],
        'fsdp average': ['--parallel=fsdp', '--ema_decay=0.9', '--value_residual=True', '--recompute=True',
                         '--loss_chunk=16']}


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp('data'))


def run(data, out, *more, ranks=None):
    done = finish(start(data, out, *SAME, *more, ranks=ranks))
    assert done.returncode == 0, done.stderr[-3000:]
    return checkpoint.load(out)


def distance(a, b, part='model'):
    return max((t - b[part][name]).abs().max().item() for name, t in a[part].items() if t.is_floating_point())


@pytest.mark.parametrize('way', WAYS)
def test_two_ranks_equal_accumulation_on_one(data, tmp_path, way):
    one = run(data, tmp_path / 'one', *[a for a in WAYS[way] if 'parallel' not in a])
    two = run(data, tmp_path / 'two', *WAYS[way], ranks=2)
    assert distance(one, two) < 1e-6 and one['tokens'] == two['tokens']
    if one['average']:
        assert distance(one, two, 'average') < 1e-6
    assert one['optimizer'].keys() == two['optimizer'].keys()


@pytest.mark.parametrize('more', [['--weights=bfloat16'], ['--weights=float16', '--master_weights=False'],
                                  ['--dtype=float16', '--ema_decay=0.9']], ids=str)
def test_two_ranks_train_in_half_precision_as_one_does(data, tmp_path, more):
    """Sums over two ranks are rounded otherwise. Where gradients are not averaged the losses are 2e-2 apart."""
    more = [*more, '--learning_rate=1e-3']
    one, two = run(data, tmp_path / 'one', *more), run(data, tmp_path / 'two', *more, ranks=2)
    assert abs(one['best_val_loss'] - two['best_val_loss']) < 5e-3 and one['scaler'] == two['scaler']
    assert {n: t.dtype for n, t in one['model'].items()} == {n: t.dtype for n, t in two['model'].items()}


def test_shards_gathered_in_bfloat16_train_as_copies_do(data, tmp_path):
    """Under autocast products read bf16 anyway; norms are rounded to it on the way. Masters and checkpoints stay fp32."""
    more = ['--dtype=bfloat16', '--learning_rate=1e-3', '--bias=True', '--softcap=15.0', '--qk_norm=standard']
    copies = run(data, tmp_path / 'ddp', *more, ranks=2)
    shards = run(data, tmp_path / 'fsdp', *more, '--parallel=fsdp', ranks=2)
    assert abs(copies['best_val_loss'] - shards['best_val_loss']) < 5e-3
    assert 0 < distance(copies, shards) < 2 * 20 * 1e-3 + 1e-6            # AdamW moves a weight by lr per step at most
    assert all(t.dtype == torch.float32 for t in shards['model'].values() if t.is_floating_point())
    narrow = run(data, tmp_path / 'narrow', *more, '--parallel=fsdp', '--residual=bfloat16', '--recompute=True', ranks=2)
    assert abs(copies['best_val_loss'] - narrow['best_val_loss']) < 1e-2


def test_another_seed_is_far_away(data, tmp_path):
    """What the distance is worth: a run that differs is 1e-2 off and not 1e-6."""
    assert distance(run(data, tmp_path / 'a'), run(data, tmp_path / 'b', '--seed=2')) > 1e-2


def test_accumulation_8_equals_2_by_4(data, tmp_path):
    more = ['--gradient_accumulation_steps=8', '--log_interval=1']
    one, two = run(data, tmp_path / 'one', *more), run(data, tmp_path / 'two', *more, ranks=2)
    assert distance(one, two) < 1e-4
    losses = [dict(fingerprint(tmp_path / name)[1]) for name in ('one', 'two')]
    assert all(abs(float(loss) - float(losses[1][step])) < 1e-5 for step, loss in losses[0].items())


@pytest.mark.parametrize('way', ['fsdp', 'fsdp muon'])
def test_sharded_runs_resume_on_any_number_of_ranks(data, tmp_path, way):
    whole = run(data, tmp_path / 'a', *WAYS[way], ranks=2)
    run(data, tmp_path / 'b', *WAYS[way], '--max_iters=9', ranks=2)
    again = run(data, tmp_path / 'b', '--init_from=resume', ranks=2)
    assert distance(whole, again) == 0
    run(data, tmp_path / 'c', *WAYS[way], '--max_iters=9', ranks=2)
    assert distance(whole, run(data, tmp_path / 'c', '--init_from=resume')) < 1e-6


def test_ranks_with_unequal_shares_of_the_validation_split_do_not_wait_for_one_another(data, tmp_path):
    """37 whole windows and a rest, dealt to two ranks, each forward pass of which gathers shards."""
    more = ['--eval_iters=0', '--block_size=16', '--batch_size=3']
    one, two = run(data, tmp_path / 'one', *more), run(data, tmp_path / 'two', *more, '--parallel=fsdp', ranks=2)
    assert abs(one['best_val_loss'] - two['best_val_loss']) < 1e-6


def test_half_precision_weights_are_refused_with_shards(data, tmp_path):
    done = finish(start(data, tmp_path, *SAME, '--parallel=fsdp', '--weights=bfloat16', ranks=2))
    assert "does not go with parallel='fsdp'" in done.stderr


def test_two_agents_stand_for_two_nodes(data, tmp_path):
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    words = [sys.executable, '-m', 'torch.distributed.run', '--nnodes=2', '--nproc_per_node=1', '--rdzv_backend=c10d',
             f'--rdzv_endpoint=127.0.0.1:{port}', '--rdzv_id=test', 'train.py', *arguments(data, tmp_path / 'two', *SAME)]
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''}
    agents = [subprocess.Popen(words, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
              for _ in range(2)]
    for agent in agents:
        out, err = agent.communicate(timeout=180)
        assert agent.returncode == 0, err[-3000:]
    assert distance(run(data, tmp_path / 'one'), checkpoint.load(tmp_path / 'two')) < 1e-6
