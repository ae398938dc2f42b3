"""Real processes: kills, signals, two ranks, two trainers. Final bits must equal an uninterrupted run's."""
import hashlib
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from checkpoints import checkpoint
from tests.tiny import ROOT, arguments, make_data

STEPS = 150
EVERY = ['--save_interval=1', f'--max_iters={STEPS}', f'--lr_decay_iters={STEPS}', '--eval_interval=50']


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp('data'))


@pytest.fixture(scope='module')
def whole(data, tmp_path_factory):
    """The uninterrupted run: hash of its weights and optimizer, and its logged losses."""
    out = tmp_path_factory.mktemp('whole')
    done = finish(start(data, out, *EVERY))
    assert done.returncode == 0, done.stderr
    return fingerprint(out)


def command(data, out, *more):
    return [sys.executable, 'train.py', *arguments(data, out, *more)]


def start(data, out, *more, ranks=None):
    words = command(data, out, *more)
    if ranks:
        words = [sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={ranks}', *words[1:]]
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''}
    return subprocess.Popen(words, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))


def finish(process, timeout=180):
    out, err = process.communicate(timeout=timeout)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def fingerprint(out):
    """(SHA-256 of the newest checkpoint's tensors, {step: repr of the loss})."""
    import json
    state, digest = checkpoint.load(out), hashlib.sha256()
    for name, tensor in sorted(state['model'].items()):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    for name, entries in sorted(state['optimizer'].items()):
        for key, tensor in sorted(entries.items()):
            digest.update(f'{name} {key}'.encode() + tensor.contiguous().numpy().tobytes())
    lines = [json.loads(line) for line in open(os.path.join(out, 'log.jsonl'))]
    return digest.hexdigest(), [(line['step'], repr(line['loss'])) for line in lines if 'loss' in line]


def wait_for(path, text, process, seconds=60):
    """Wait until a file holds a text: a ready signal, not a sleep."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if os.path.exists(path) and text in open(path).read():
            return
        if process.poll() is not None:
            raise AssertionError(process.communicate())
        time.sleep(0.01)
    raise AssertionError(f'{text!r} did not come')


def kill_and_resume(data, out, kills, seed):
    """Run to the end under SIGKILLs at times drawn from the seed; returns how many fell into a save."""
    rng, in_save, more = random.Random(seed), 0, []
    print(f'seed {seed}')
    for launch in range(kills + 1):
        process = start(data, out, *EVERY, *more)
        if launch < kills:
            if launch == 0 or rng.random() < 0.8:
                step = rng.randrange(launch * STEPS // kills, (launch + 1) * STEPS // kills - 5)
                wait_for(os.path.join(out, 'log.jsonl'), f'"step": {step}, "loss"', process)
                if launch == kills - 1:                     # one for certain while a checkpoint is being written
                    catch_a_save(out)
                else:
                    time.sleep(rng.random() * 0.03)
            else:
                time.sleep(rng.random() * 3)                # during the import, too
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            in_save += any(name.endswith('.tmp') for name in os.listdir(out)) if os.path.isdir(out) else 0
            more = ['--init_from=resume'] if checkpoint.steps(out) else []
        done = finish(process)
        assert launch < kills or done.returncode == 0, done.stderr
    return in_save


def catch_a_save(out, seconds=20):
    """Return while a .tmp file is there."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if any(name.endswith('.tmp') for name in os.listdir(out)):
            return
    raise AssertionError('no save was seen')


def test_r1_five_sigkills_and_the_same_bits(data, whole, tmp_path, count):
    in_save = 0
    for attempt in range(4):                                # a kill lands in a save within a few tries at the most
        out = tmp_path / str(attempt)
        with count(5):
            in_save += kill_and_resume(data, out, 5, seed=2026 + attempt)
            assert fingerprint(out) == whole
        assert not [name for name in os.listdir(out) if name.endswith('.tmp')]
        if in_save:
            break
    assert in_save >= 1


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_r11_a_signal_saves_leaves_0_and_resumes_bit_for_bit(data, whole, tmp_path, number):
    more = [a for a in EVERY if 'save_interval' not in a]
    process = start(data, tmp_path, *more)
    wait_for(tmp_path / 'log.jsonl', '"step": 20, "loss"', process)
    begin = time.monotonic()
    os.killpg(process.pid, number)
    done = finish(process, 20)
    assert done.returncode == 0 and time.monotonic() - begin < 20, done.stderr
    assert f'stopped by {number.name} at step' in done.stdout
    done = finish(start(data, tmp_path, *more, '--init_from=resume'))
    assert done.returncode == 0 and fingerprint(tmp_path) == whole


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_r11_a_signal_before_the_loop_leaves_at_once(data, tmp_path, monkeypatch, number):
    """While torch is imported, and where no handler of Python would run: in the opening of a pipe that no one reads."""
    os.mkfifo(tmp_path / 'first_node')
    monkeypatch.setenv('NANOKRON_FIRST_NODE', str(tmp_path / 'first_node'))
    process = start(data, tmp_path / 'out')
    wait_for(f'/proc/{process.pid}/maps', 'libtorch', process)
    os.kill(process.pid, number)
    done = finish(process, 10)
    assert done.returncode == -number and done.stderr == '' and not (tmp_path / 'out').exists()


def test_r11_the_second_signal_leaves_at_once(data, tmp_path):
    process = start(data, tmp_path, '--gradient_accumulation_steps=2', '--batch_size=4000', '--max_iters=1000')
    wait_for(tmp_path / 'log.jsonl', 'val_loss', process)
    os.kill(process.pid, signal.SIGSTOP)                    # so that both arrive while a step is under way
    os.kill(process.pid, signal.SIGTERM)
    os.kill(process.pid, signal.SIGCONT)
    time.sleep(0.7)
    if process.poll() is None:
        os.kill(process.pid, signal.SIGTERM)
    begin = time.monotonic()
    done = finish(process, 20)
    assert done.returncode in (0, 128 + signal.SIGTERM) and time.monotonic() - begin < 5


def test_r19_a_second_trainer_on_the_same_folder_is_refused(data, tmp_path):
    first = start(data, tmp_path, '--max_iters=100000')
    wait_for(tmp_path / 'log.jsonl', '"loss"', first)
    second = finish(start(data, tmp_path))
    os.kill(first.pid, signal.SIGTERM)
    assert second.returncode == 2 and str(first.pid) in second.stderr and second.stderr.count('\n') == 1
    assert finish(first).returncode == 0


def test_accumulation_on_one_rank_equals_two_ranks(data, tmp_path):
    """Accumulation 2 on one rank = two ranks, 20 steps, fp32, one thread: the same bits. Dropout is on."""
    more = ['--max_iters=20', '--lr_decay_iters=20', '--eval_interval=10']
    assert finish(start(data, tmp_path / 'one', *more)).returncode == 0
    done = finish(start(data, tmp_path / 'two', *more, ranks=2))
    assert done.returncode == 0, done.stderr
    one, two = checkpoint.load(tmp_path / 'one'), checkpoint.load(tmp_path / 'two')
    worst = max((one['model'][n] - t).abs().max().item() for n, t in two['model'].items())
    assert worst <= 1e-6
    assert fingerprint(tmp_path / 'one')[0] == fingerprint(tmp_path / 'two')[0]


def test_r14_a_killed_rank_restarts_both_and_ends_in_the_same_bits(data, tmp_path):
    more = ['--max_iters=30', '--lr_decay_iters=30', '--eval_interval=10', '--save_interval=5']
    assert finish(start(data, tmp_path / 'one', *more)).returncode == 0
    process = start(data, tmp_path / 'two', *more, ranks=2)
    wait_for(tmp_path / 'two' / 'log.jsonl', '"step": 12, "loss"', process)
    workers = subprocess.run(['pgrep', '-P', str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    finish(process)
    done = finish(start(data, tmp_path / 'two', *more, '--init_from=resume', ranks=2))
    assert done.returncode == 0, done.stderr
    assert fingerprint(tmp_path / 'one') == fingerprint(tmp_path / 'two')


@pytest.mark.slow
def test_r15_a_stopped_rank_ends_the_job_with_its_number(data, tmp_path):
    process = start(data, tmp_path, '--max_iters=100000', '--dist_timeout=5', ranks=2)
    wait_for(tmp_path / 'log.jsonl', '"step": 5, "loss"', process)
    workers = subprocess.run(['pgrep', '-P', str(process.pid)], capture_output=True, text=True).stdout.split()
    ranks = {open(f'/proc/{pid}/environ').read().split('\0RANK=')[1][0]: int(pid) for pid in workers}
    os.kill(ranks['1'], signal.SIGSTOP)
    try:
        done = finish(process, 90)
    finally:
        os.kill(ranks['1'], signal.SIGKILL) if os.path.exists(f'/proc/{ranks["1"]}') else None
    assert done.returncode != 0 and 'train.py: rank 1 does not answer for 5 s (dist_timeout)' in done.stderr
    assert 'train.py", line' not in done.stderr          # no traceback of ours


def test_sigterm_to_torchrun_saves_on_two_ranks(data, tmp_path):
    process = start(data, tmp_path, '--max_iters=100000', ranks=2)
    wait_for(tmp_path / 'log.jsonl', '"step": 5, "loss"', process)
    os.kill(process.pid, signal.SIGTERM)
    done = finish(process, 40)
    assert 'stopped by SIGTERM at step' in done.stdout and checkpoint.steps(tmp_path)
