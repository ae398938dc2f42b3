"""Losses and gradients that are not finite on either rank (R10), a disk that fills up (R12), memory that runs out (R13)."""
import functools
import os
import resource
import subprocess

import pytest
import torch

import configurator
import train
from checkpoints import checkpoint
from optimizers import optim
from tests.reliability.disks import in_child
from tests.reliability.ranks import together
from tests.reliability.test_checkpoint_files import GIB, memory
from tests.reliability.test_processes import fingerprint
from tests.tiny import arguments, make_data


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp('data'))


@pytest.fixture(autouse=True)
def no_signal():
    train.STOP.update(signal=None, time=0.0)


# ----------------------------------------------------------------------------------------------------
# R10

FAULTS = {'nan loss': lambda model: model.transformer.ln_f.register_forward_hook(lambda module, x, y: y * torch.nan),
          'inf gradient': lambda model: next(model.parameters()).register_hook(lambda g: g * torch.inf),
          'spike': lambda model: next(model.parameters()).register_hook(lambda g: g * 1e4)}
AT = 7                                                  # the step that goes wrong


def poisoned(fault, where, words):
    """Train; on one rank a step has the fault. Both ranks print whether that step was applied and what they end with."""
    real, rank = train.train_step, int(os.environ['RANK'])
    train.optim.Outliers = functools.partial(optim.Outliers, window=5)

    def step(run, batches, number):
        hook = FAULTS[fault](run.model) if number == AT and rank == where else None
        before = [p.detach().clone() for p in run.model.parameters()]
        result = real(run, batches, number)
        if hook:
            hook.remove()
        if number == AT:
            moved = any(not torch.equal(a, b) for a, b in zip(before, run.model.parameters()))
            print('poisoned:', 'applied' if moved or result['applied'] else 'passed over', flush=True)
        if number == 11:
            print('ends:', sum(p.detach().double().sum().item() for p in run.model.parameters()), flush=True)
        return result
    train.train_step = step
    train.main(configurator.load(words))


CASES = [(fault, rank, policy) for fault in FAULTS for rank in (0, 1) for policy in ('stop', 'skip', 'float16')
         if not (fault == 'spike' and policy != 'skip')]


@pytest.mark.parametrize('fault, rank, policy', [
    pytest.param(*case, marks=[] if case in (('nan loss', 1, 'stop'), ('spike', 0, 'skip')) else pytest.mark.slow)
    for case in CASES])
def test_r10_a_fault_on_one_rank_is_applied_on_none(data, tmp_path, fault, rank, policy):
    more = {'stop': [], 'skip': ['--nonfinite=skip', '--skip_zscore=4'], 'float16': ['--dtype=float16', '--nonfinite=skip']}
    words = arguments(data, tmp_path / 'out', '--save_interval=2', '--keep_checkpoints=9', '--max_iters=12', *more[policy])
    ends = together(2, tmp_path / 'said', poisoned, fault, rank, words)
    stopped = policy == 'stop'
    assert [code for code, _ in ends] == [3 if stopped else 0] * 2, ends
    said = [[line for line in text.splitlines() if line.startswith(('poisoned', 'ends'))] for _, text in ends]
    assert said[0] == said[1] and said[0][0] == 'poisoned: passed over' and len(said[0]) == 2 - stopped
    newest = checkpoint.load(tmp_path / 'out')
    assert newest['step'] == (AT - 1 if stopped else 12)
    assert all(tensor.isfinite().all() for tensor in newest['model'].values() if tensor.is_floating_point())


# ----------------------------------------------------------------------------------------------------
# R12: a real disk, of 2 MiB

@pytest.fixture
def small_disk(tmp_path):
    """small_disk(size) -> a file system of that size, or the same with another size."""
    place = tmp_path / 'disk'
    place.mkdir()

    def mount(size):
        way = ['-o', f'{"remount," if os.path.ismount(place) else ""}size={size}']
        done = subprocess.run(['mount', '-t', 'tmpfs', *way, 'none', place], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f'no file system can be mounted here: {done.stderr.strip()}')
        return place
    if os.getuid():
        pytest.skip('only root mounts file systems')
    yield mount
    if os.path.ismount(place):
        subprocess.run(['umount', '--lazy', place], check=True)      # a log may be open still


def test_r12_a_run_on_a_disk_that_fills_up_trains_on_and_is_resumed_when_there_is_space(data, tmp_path, small_disk, capsys):
    disk, more = small_disk('2m'), ['--save_interval=1', '--keep_checkpoints=9', '--n_embd=64']
    with pytest.raises(SystemExit) as leave:
        train.main(configurator.load(arguments(data, disk / 'out', *more)))
    lines = capsys.readouterr().err.splitlines()
    failed = [line for line in lines if 'was not saved' in line]
    assert leave.value.code == 4 and len(failed) >= 3 and not [line for line in lines if 'Traceback' in line]
    assert all('No space left on device' in line and 'MiB; the checkpoints before it are intact' in line for line in failed)
    kept = checkpoint.steps(disk / 'out')
    assert len(kept) >= 2 and checkpoint.load(disk / 'out')['step'] == max(kept) < 12
    assert not [name for name in os.listdir(disk / 'out') if '.tmp' in name]
    small_disk('32m')
    train.main(configurator.load([f'--out_dir={disk / "out"}', '--init_from=resume']))
    train.main(configurator.load(arguments(data, tmp_path / 'whole', *more)))
    assert fingerprint(disk / 'out')[0] == fingerprint(tmp_path / 'whole')[0]


# ----------------------------------------------------------------------------------------------------
# R13

def starved(data, out):
    """A run that the system gives half a GiB more and no more."""
    resource.setrlimit(resource.RLIMIT_AS, (memory('VmSize') + GIB // 2,) * 2)
    try:
        train.main(configurator.load([f'--out_dir={out}', '--init_from=resume', '--max_iters=14', '--batch_size=60000']))
    except SystemExit as leave:
        assert leave.code == 4, leave.code
        return
    raise AssertionError('it fitted')


def test_r13_a_real_limit_of_memory_is_one_line_and_leaves_the_checkpoints(data, tmp_path, capfd):
    train.main(configurator.load(arguments(data, tmp_path / 'out')))
    before = fingerprint(tmp_path / 'out')
    capfd.readouterr()
    assert in_child(starved, data, tmp_path / 'out') == 0
    err = capfd.readouterr().err
    assert 'out of memory; lower batch_size (60000) or block_size (16)' in err and err.count('\n') == 1
    assert fingerprint(tmp_path / 'out') == before
