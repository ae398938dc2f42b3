"""SIGKILLs over structures, growth, drop-in, dense finish, under AdamW and Muon (R1), of ranks (R14); what is left (R18)."""
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch

import configurator
import export
import sample
import train
from checkpoints import checkpoint
from decomposition import initialise
from tests.reliability.disks import in_child
from tests.reliability.test_processes import catch_a_save, fingerprint, finish, start, wait_for
from tests.reliability.test_sharded import torchrun
from tests.test_export import assert_close, load_in_transformers
from tests.tiny import arguments, make_data

STEPS, KILLS, SEED = 60, 25, 20
SIZES = ['--n_embd=64', '--block_size=32', f'--max_iters={STEPS}', f'--lr_decay_iters={STEPS}', '--eval_interval=10',
         '--save_interval=1']
WAYS = {
    'kron': [],
    'growth': ['--grow_from=1', '--grow_every=25', '--grow_rewarm=3', '--grow_freeze=True', '--ema_decay=0.9'],
    'drop-in': ['--drop_in=sensitivity', '--drop_in_every=9', '--drop_in_freeze=3', '--drop_in_report=2',
                '--decompose=als,svd_whitened', '--calibration_tokens=512'],
    'dense finish': ['--finish_dense_at=0.5', '--grow_rewarm=3', '--finish_dense_state=estimate'],
}
PAIRS = [(way, optimizer) for way in WAYS for optimizer in ('adamw', 'muon')]
MOMENTS = [moment for moment in ('import', 'first step', 'step', 'eval', 'save') for _ in range(KILLS // 5)]
random.Random(SEED).shuffle(MOMENTS)


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp('data'))


@pytest.fixture(scope='module')
def dense(data, tmp_path_factory):
    """The dense model into which structures are dropped."""
    out = tmp_path_factory.mktemp('dense')
    train.STOP.update(signal=None, time=0.0)
    train.main(configurator.load([*arguments(data, out, *SIZES), '--linear=dense', '--max_iters=20', '--save_interval=0']))
    return out


def settings(way, optimizer, dense):
    return [*SIZES, *WAYS[way], f'--optimizer={optimizer}', *([f'--init_from={dense}'] if way == 'drop-in' else [])]


def opened(out):
    """What changes when a run has been set up: its config.json is another file."""
    path = os.path.join(out, 'config.json')
    return os.path.exists(path) and os.stat(path).st_ino


def wait_until_set_up(out, before, process, seconds=60):
    until = time.monotonic() + seconds
    while opened(out) in (False, before):
        assert process.poll() is None and time.monotonic() < until, process.args
        time.sleep(0.002)


def kill_at(moment, process, out, before, draw):
    """SIGKILL around the moment; steps are counted from the checkpoint that the process has begun with."""
    begin = max(checkpoint.steps(out), default=0)
    if moment == 'import':
        time.sleep(2 * draw.random())
    else:
        wait_until_set_up(out, before, process)
    step = min(begin + draw.randrange(2, 12), STEPS - 8)
    if moment == 'eval':
        step = min(-(-(begin + 2) // 10) * 10, STEPS - 10) - 1
    if moment in ('step', 'eval', 'save') and step > begin:
        wait_for(os.path.join(out, 'log.jsonl'), f'"step": {step}, "loss"', process)
    if moment == 'save':
        catch_a_save(out)
    elif moment != 'import':
        time.sleep(0.03 * draw.random())
    process.kill()
    finish(process)
    assert process.returncode == -signal.SIGKILL, f'it had ended before the kill at {moment}'


@pytest.mark.slow
@pytest.mark.parametrize('way, optimizer', PAIRS)
def test_r1_twenty_five_sigkills_over_structures_and_optimizers(data, dense, tmp_path, count, way, optimizer):
    """SHA-256 of weights and optimizer and every logged loss are those of the run that nobody killed. One thread each."""
    more, at = settings(way, optimizer, dense), PAIRS.index((way, optimizer))
    moments, draw, out = MOMENTS[at::len(PAIRS)], random.Random(f'{SEED} {way} {optimizer}'), tmp_path / 'killed'
    assert finish(start(data, tmp_path / 'whole', *more)).returncode == 0
    with count(len(moments)):
        for moment in [*moments, None]:
            saved, before = checkpoint.steps(out), opened(out)
            process = start(data, out, *more, *(['--init_from=resume'] if saved else []))
            if moment:
                kill_at(moment, process, out, before, draw)
        done = finish(process)
        assert done.returncode == 0, done.stderr
        assert fingerprint(out) == fingerprint(tmp_path / 'whole')
        assert not [name for name in os.listdir(out) if '.tmp' in name]


def test_r1_every_pair_is_killed_and_every_moment_five_times():
    assert sum(len(MOMENTS[at::len(PAIRS)]) for at in range(len(PAIRS))) == KILLS and len(PAIRS) == 8
    assert all(MOMENTS.count(moment) == 5 for moment in MOMENTS)


# ----------------------------------------------------------------------------------------------------
# R14: ranks under torchrun

def kill_rank(process, rank):
    workers = subprocess.run(['pgrep', '-P', str(process.pid)], capture_output=True, text=True).stdout.split()
    ranks = {open(f'/proc/{pid}/environ').read().split('\0RANK=')[1][0]: int(pid) for pid in workers}
    os.kill(ranks[str(rank)], signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize('rank, step, more', [
    (0, 0, []), (1, 17, ['--optimizer=muon']), (0, 11, ['--grow_from=1', '--grow_every=10']), (0, 'save', [])],
    ids=['first step', 'mid-run', 'growth', 'save'])
def test_r14_either_rank_is_killed_and_the_job_ends_in_the_same_bits(data, tmp_path, rank, step, more):
    """torchrun starts both again, from the last checkpoint if there is one."""
    whole = finish(torchrun(data, tmp_path / 'whole', *more))
    assert whole.returncode == 0, whole.stderr[-2000:]
    process = torchrun(data, tmp_path / 'killed', *more)
    log = tmp_path / 'killed' / 'log.jsonl'
    wait_for(log, f'"step": {6 if step == "save" else step}, "loss"', process, 120)
    if step == 'save':
        catch_a_save(tmp_path / 'killed', 60)
    kill_rank(process, rank)
    done = finish(process)
    assert done.returncode == 0, done.stderr[-2000:]
    assert fingerprint(tmp_path / 'killed') == fingerprint(tmp_path / 'whole')


# ----------------------------------------------------------------------------------------------------
# R18: what a killed and resumed run is good for

def killed_training(words, step):
    """Train, and die by SIGKILL when the checkpoint of that step has been written."""
    save = checkpoint.save

    def last(folder, state, **more):
        save(folder, state, **more)
        if state['step'] == step:
            os.kill(os.getpid(), signal.SIGKILL)
    checkpoint.save = last
    train.main(configurator.load(words))


def said(program, monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, 'argv', ['x.py', *map(str, words)])
    program.main()
    return capsys.readouterr().out


@pytest.mark.parametrize('more', [[], ['--optimizer=muon', '--finish_dense_at=0.5']], ids=['kron', 'dense finish'])
def test_r18_sample_and_export_of_a_killed_run_are_those_of_the_whole_one(data, tmp_path, monkeypatch, capsys, count, more):
    train.STOP.update(signal=None, time=0.0)
    train.main(configurator.load(arguments(data, tmp_path / 'whole', *more)))
    words = arguments(data, tmp_path / 'killed', *more, '--save_interval=1')
    assert in_child(killed_training, words, 7) == signal.SIGKILL and max(checkpoint.steps(tmp_path / 'killed')) == 7
    train.main(configurator.load([*words, '--init_from=resume']))
    capsys.readouterr()
    with count():
        texts = [said(sample, monkeypatch, capsys, f'--out_dir={tmp_path / name}', '--num_samples=2', '--device=cpu',
                      '--max_new_tokens=60', '--start=the ').replace(name, '') for name in ('whole', 'killed')]
        assert texts[0] == texts[1] and len(texts[0]) > 100
    with count():
        for name in ('whole', 'killed'):
            said(export, monkeypatch, capsys, f'--out_dir={tmp_path / name}', f'--to={tmp_path / name / "hf"}',
                 '--dense=True')
        both = [(tmp_path / name / 'hf' / 'model.safetensors').read_bytes() for name in ('whole', 'killed')]
        assert both[0] == both[1]
    with count():                                       # the dense weights of the export against the factors
        config, state, _ = initialise.read_folder(str(tmp_path / 'killed'))
        idx = torch.randint(20, (3, 16), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            theirs = load_in_transformers(tmp_path / 'killed' / 'hf')(idx).logits
            ours = initialise.build(config, config, state).eval()(idx, targets=idx)[0][..., :theirs.shape[-1]]
        assert_close(theirs, ours)
