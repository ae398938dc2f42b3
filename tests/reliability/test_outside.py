"""What a run survives of the outside world, or says in one line: disks, folders, trackers, streams; and how it goes on."""
import errno
import io
import json
import os
import signal
import subprocess
import sys
import types

import pytest
import torch

import configurator
import train
from checkpoints import checkpoint
from reporting import hardware, outlets, records, runlog
from tests.tiny import ROOT, arguments, make_data
from training import outdir, restart, startup
from variants import UserError


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp('data'))


@pytest.fixture(autouse=True)
def no_signal():
    train.STOP.update(signal=None, time=0.0)


def run(data, out, *more):
    train.main(configurator.load(arguments(data, out, '--max_iters=2', '--eval_interval=2', '--eval_iters=1', *more)))
    return checkpoint.load(out)


def go_on(out, *more):
    train.main(configurator.load([f'--out_dir={out}', '--init_from=resume', *more]))
    return checkpoint.load(out)


def refused(capsys, action, *arguments):
    """The one line with which a program leaves with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as leave:
        action(*arguments)
    err = capsys.readouterr().err
    assert leave.value.code == 2 and err.count('\n') == 1 and len(err) < 400, err
    return err


def full(*arguments, **keywords):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# ----------------------------------------------------------------------------------------------------
# folders that no run can use

def make_file(path):
    path.write_text('mine')


def make_loop(path):
    path.symlink_to(path)


def make_dangling(path):
    path.symlink_to(path.parent / 'gone')


def make_lock_folder(path):
    (path / '.lock').mkdir(parents=True)


def make_foreign(name, text='x'):
    def make(path):
        path.mkdir()
        (path / name).write_text(text)
    return make


BAD = {'a file': ('out', make_file, 'no folder'), 'in a file': ('out/run', lambda p: make_file(p.parent), 'not a directory'),
       'a long name': ('n' * 300, None, 'too long'), 'a loop': ('out', make_loop, 'leads nowhere'),
       'in a loop': ('out/run', lambda p: make_loop(p.parent), 'symbolic links'),
       'a dangling link': ('out', make_dangling, 'leads nowhere'), 'a lock folder': ('out', make_lock_folder, '.lock'),
       'safetensors': ('out', make_foreign('model.safetensors'), "another program's model.safetensors"),
       'nanoGPT': ('out', make_foreign('ckpt.pt'), "another program's ckpt.pt"),
       'a config': ('out', make_foreign('config.json', '{"model_type": "llama"}'), "another program's config.json")}


def listing(folder):
    return {str(path.relative_to(folder)): path.is_file() and path.read_bytes() for path in folder.rglob('*')}


@pytest.mark.parametrize('case', BAD)
def test_an_out_dir_that_cannot_be_used_is_one_line_before_the_data(case, tmp_path, capsys):
    name, make, words = BAD[case]
    if make:
        make(tmp_path / name)
    before = listing(tmp_path)
    config = configurator.load([f'--out_dir={tmp_path / name}', '--data_dir=/nowhere', '--device=cpu'])
    said = refused(capsys, train.main, config)
    assert 'out_dir' in said and words in said and 'nowhere/' not in said
    assert listing(tmp_path) == before


def test_a_folder_that_is_read_only(tmp_path, monkeypatch):
    monkeypatch.setattr(outdir.os, 'access', lambda path, mode: False)
    with pytest.raises(UserError, match='cannot be written to'):
        outdir.check(tmp_path / 'new')


def test_folders_that_can_be_used(tmp_path):
    outdir.check(tmp_path)
    outdir.check(tmp_path / 'a' / 'b' / 'c')
    make_foreign('config.json', '{"out_dir": "x", "n_layer": 2}')(tmp_path / 'ours')
    outdir.check(tmp_path / 'ours')
    (tmp_path / 'ours' / 'log.jsonl').write_text('')
    (tmp_path / 'ours' / 'model.safetensors').write_text('an export beside a run')
    outdir.check(tmp_path / 'ours')


def test_a_lock_that_cannot_be_taken_is_one_line(tmp_path):
    (tmp_path / '.lock').mkdir()
    with pytest.raises(UserError, match='cannot be used'):
        checkpoint.Lock(tmp_path)
    os.mkfifo(tmp_path / 'pipe')
    (tmp_path / 'run').mkdir()
    os.mkfifo(tmp_path / 'run' / '.lock')
    with pytest.raises(UserError, match='a pipe'):
        checkpoint.Lock(tmp_path / 'run')


def test_the_first_line_of_a_fresh_run_says_what_is_set_aside(data, tmp_path, capsys):
    first = run(data, tmp_path)
    capsys.readouterr()
    for number, place in enumerate(('previous', 'previous.1')):
        train.main(configurator.load(arguments(data, tmp_path, '--max_iters=1', '--eval_interval=9')))
        line = capsys.readouterr().out.splitlines()[0]
        assert f'up to step {2 - number}: it is set aside in {tmp_path / place}; ' in line
        assert line.endswith(f'--init_from=resume --out_dir={tmp_path / place}')
    kept = checkpoint.load(tmp_path / 'previous')
    assert kept['step'] == 2 and all(torch.equal(t, first['model'][n]) for n, t in kept['model'].items())
    assert go_on(tmp_path / 'previous', '--max_iters=3')['step'] == 3


def test_a_folder_that_cannot_be_set_aside_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(restart.checkpoint, 'set_aside', full)
    with pytest.raises(UserError, match='could not be set aside: No space'):
        restart.set_aside(configurator.load([f'--out_dir={tmp_path}']))


# ----------------------------------------------------------------------------------------------------
# logs, pictures and trackers end no run

def test_a_full_disk_for_logs_and_a_picture_that_fails_warn_once_each(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(runlog, 'write_json', full)
    monkeypatch.setattr(runlog, 'rewind', full)
    monkeypatch.setattr(runlog.losses, 'draw', full)
    monkeypatch.setattr(outlets.Lines, 'write', full)
    assert run(data, tmp_path, '--max_iters=4', '--target_val_loss=99', '--eval_first=False')['step'] == 2
    err = capsys.readouterr().err
    for name in ('config.json', 'env.json', 'log.jsonl', 'loss.png', 'target.json'):
        assert err.count(f'{name}: [Errno 28] No space left on device; the run goes on without it\n') == 1, err
    assert err.count('\n') == 5


class Filling(io.RawIOBase):
    """A file on a disk with so many bytes of room."""

    def __init__(self, room):
        self.room, self.data = room, b''

    def write(self, data):
        if not self.room:
            full()
        taken = data[:self.room]
        self.room -= len(taken)
        self.data += taken
        return len(taken)


@pytest.mark.parametrize('room', range(0, 45, 4))
def test_lines_are_whole_when_there_is_space_again(room, tmp_path):
    lines, failed = outlets.Lines(str(tmp_path / 'log.jsonl')), 0
    lines.file = Filling(room)
    for step in range(6):
        if step == 4:
            lines.file.room = 1000
        try:
            lines.write({'step': step})
        except OSError:
            failed += 1
    assert failed == max(0, 4 - room // 12)
    assert [json.loads(text)['step'] for text in lines.file.data.splitlines()] == list(range(6))


def test_a_log_that_is_no_file_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / 'log.jsonl')
    with pytest.raises(OSError, match='no regular file'):
        outlets.Lines(str(tmp_path / 'log.jsonl')).write({})
    assert runlog.read_log(tmp_path / 'log.jsonl') == []


def test_damaged_lines_of_a_log_are_set_aside(tmp_path, capsys):
    path, good = tmp_path / 'log.jsonl', [{'step': 0, 'loss': 2.0}, {'step': 1, 'loss': 1.5}]
    bad = [b'\xff\xfe', b'[]', b'5', b'{}', b'null', b'[' * 100000, b'{"step": "x"}']
    first, second = (json.dumps(line).encode() for line in good)
    path.write_bytes(b'\n'.join([first, *bad, second, b'{"step": 2, "lo']))
    runlog.rewind(path, 5, None)
    assert runlog.read_log(path) == good
    assert capsys.readouterr().err == f'{path}: 7 damaged lines are set aside in {path}.damaged\n'
    assert sorted((tmp_path / 'log.jsonl.damaged').read_bytes().splitlines()) == sorted(bad)
    runlog.rewind(path, 5, None)
    assert capsys.readouterr().err == ''


def wandb(init, log=None):
    return types.SimpleNamespace(init=init, log=log, finish=lambda: None)


def test_wandb_without_a_login_is_one_line_before_anything_moves(data, tmp_path, capsys, monkeypatch):
    seen = []

    def init(**keywords):
        seen.append(os.path.exists(tmp_path / 'previous'))
        raise RuntimeError('api_key not configured (no-tty)\nand more')
    run(data, tmp_path)
    monkeypatch.setitem(sys.modules, 'wandb', wandb(init))
    assert run(data, tmp_path, '--wandb_log=True')['step'] == 2 and seen == [False]
    assert capsys.readouterr().err == 'wandb_log: api_key not configured (no-tty); the run goes on without it\n'


def test_wandb_that_fails_later_gets_no_more(data, tmp_path, capsys, monkeypatch):
    calls = []
    monkeypatch.setitem(sys.modules, 'wandb', wandb(lambda **_: wandb(None, lambda *_, **__: calls.append(1) or full())))
    run(data, tmp_path, '--wandb_log=True')
    assert len(calls) == 1 and capsys.readouterr().err.count('wandb_log: ') == 1


def test_a_resumed_run_goes_on_as_the_same_run_of_wandb(data, tmp_path, monkeypatch, capsys):
    """Also after a resume without it and one on which it failed; a fresh run in the folder is another one."""
    asked, lines, names = [], [], iter('abc')

    def init(**keywords):
        asked.append(keywords)
        module = wandb(None, lambda line, step: lines.append((module.id, step)))
        module.id = keywords['id'] or next(names)
        return module
    monkeypatch.setitem(sys.modules, 'wandb', wandb(init))
    run(data, tmp_path, '--wandb_log=True', '--wandb_project=p', '--wandb_run_name=n')
    go_on(tmp_path, '--max_iters=3', '--wandb_log=False')
    monkeypatch.setitem(sys.modules, 'wandb', wandb(full))
    go_on(tmp_path, '--max_iters=4', '--wandb_log=True')
    monkeypatch.setitem(sys.modules, 'wandb', wandb(init))
    go_on(tmp_path, '--max_iters=5')
    run(data, tmp_path, '--wandb_log=True')
    assert [(k['id'], k['resume']) for k in asked] == [(None, 'allow'), ('a', 'allow'), (None, 'allow')]
    assert [(k['project'], k['name']) for k in asked] == [('p', 'n'), ('p', 'n'), ('nanokron', tmp_path.name)]
    assert {step for name, step in lines if name == 'a'} == {0, 1, 2, 4, 5} and lines[-1][0] == 'b'
    assert json.loads((tmp_path / 'previous' / 'env.json').read_text())['wandb'] == 'a'
    (tmp_path / 'env.json').write_text('[' * 99999)
    go_on(tmp_path, '--max_iters=3')                    # nothing says which: a new one
    assert asked[-1]['id'] is None


# ----------------------------------------------------------------------------------------------------
# streams that go away

class Gone(io.StringIO):
    """A stream whose reader has left; its descriptor is a file of the test."""

    def __init__(self, error, number):
        super().__init__()
        self.error, self.number = error, number

    def fail(self, *arguments):
        raise self.error

    write = flush = fail

    def fileno(self):
        return self.number


@pytest.mark.parametrize('error', [BrokenPipeError(), OSError(errno.ENOSPC, 'full'), ValueError('closed')])
def test_a_stream_that_fails_is_silent_from_then_on(error, tmp_path):
    with open(tmp_path / 'x', 'wb', buffering=0) as file:
        print('words', file=outlets.Stream(Gone(error, file.fileno())), flush=True)
        file.write(b'more')
    assert (tmp_path / 'x').read_bytes() == b''          # the descriptor leads nowhere now


@pytest.mark.slow
@pytest.mark.parametrize('command, env', [('{} | head -1', {}), ('{} > /dev/full', {}), ('{} > /dev/full 2>&1', {}),
                                          ('{} >&-', {}), ('{} > /dev/null', {'PYTHONIOENCODING': 'ascii'})])
def test_a_run_without_its_stdout_trains_and_saves(command, env, data, tmp_path):
    out = tmp_path / 'grüße'
    words = ' '.join(f"'{word}'" for word in (sys.executable, 'train.py', *arguments(data, out)))
    line = f'set -o pipefail; {command.format(words)}'
    done = subprocess.run(['bash', '-c', line], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, 'OMP_NUM_THREADS': '1', **env}, timeout=120)
    assert done.returncode == 0 and done.stderr == '', done.stderr
    assert checkpoint.load(out)['step'] == 12


# ----------------------------------------------------------------------------------------------------
# signals

def test_listening_leaves_a_hangup_that_nohup_switched_off(monkeypatch):
    for before, after in ((signal.SIG_IGN, None), (signal.SIG_DFL, train.on_signal)):
        put = {}
        monkeypatch.setattr(train.signal, 'getsignal', lambda number, before=before: before)
        monkeypatch.setattr(train.signal, 'signal', put.__setitem__)
        train.listen(train.on_signal)
        assert put.pop(signal.SIGHUP, None) == after
        assert put == dict.fromkeys((signal.SIGTERM, signal.SIGINT, signal.SIGUSR1), train.on_signal)


# ----------------------------------------------------------------------------------------------------
# what a resumed run's settings are checked against

@pytest.fixture(scope='module')
def half(data, tmp_path_factory):
    """A run of 4 steps in bfloat16, with a warm-up and a min_lr far from the defaults."""
    out = tmp_path_factory.mktemp('half')
    train.STOP.update(signal=None, time=0.0)
    run(data, out, '--dtype=bfloat16', '--max_iters=4', '--lr_decay_iters=4', '--min_lr=1e-6')
    return out


@pytest.fixture
def copy(half, tmp_path):
    subprocess.run(['cp', '-r', half, tmp_path / 'run'], check=True)
    return tmp_path / 'run'


def test_resume_checks_what_is_given_against_the_checkpoint(copy):
    state = go_on(copy, '--learning_rate=5e-5', '--lr_decay_iters=6', '--max_iters=6')     # min_lr 6e-5, warm-up 2000
    assert state['step'] == 6 and state['config']['min_lr'] == 1e-6 and state['config']['warmup_iters'] == 2


@pytest.mark.parametrize('given, words', [('--warmup_iters=500', 'warmup_iters must not exceed lr_decay_iters (4)'),
                                          ('--min_lr=0.5', 'min_lr must not exceed learning_rate (0.01)'),
                                          ('--finish_dense_at=1.5', 'must be below 1'),
                                          ('--optimizer=muon', "optimizer is 'adamw' in the checkpoint")])
def test_resume_refuses_what_a_fresh_start_refuses(copy, capsys, given, words):
    before = checkpoint.load(copy)['step']
    said = refused(capsys, go_on, copy, given, '--max_iters=9')
    assert words in said and given in said and checkpoint.load(copy)['step'] == before


def test_resume_goes_on_in_the_type_of_the_checkpoint(data, copy, tmp_path, monkeypatch):
    """The same bits as a run that was not interrupted: the job is made of the checkpoint's settings."""
    jobs, start = [], train.parallel.start
    monkeypatch.setattr(train.parallel, 'start', lambda config: jobs.append(start(config)) or jobs[-1])
    state = go_on(copy, '--max_iters=8', '--lr_decay_iters=4')
    assert jobs[0].dtype == torch.bfloat16 and jobs[0].device.type == 'cpu'
    whole = run(data, tmp_path / 'whole', '--dtype=bfloat16', '--max_iters=8', '--lr_decay_iters=4', '--min_lr=1e-6')
    assert all(torch.equal(tensor, whole['model'][name]) for name, tensor in state['model'].items())


def test_resume_says_that_a_run_is_finished_or_stays_at_min_lr(copy, capsys):
    go_on(copy)
    assert 'is finished: it is at step 4, and max_iters is 4' in capsys.readouterr().out
    go_on(copy, '--max_iters=5')
    out = capsys.readouterr().out
    assert 'lr_decay_iters is 4' in out and 'pass --lr_decay_iters=5 too' in out and 'finished' not in out
    go_on(copy, '--max_iters=6', '--lr_decay_iters=6')
    out = capsys.readouterr().out
    assert 'min_lr' not in out and 'finished' not in out


def test_a_block_size_above_the_source_is_refused(tmp_path):
    source = configurator.load(['--block_size=64']).__class__(block_size=64)
    with pytest.raises(UserError, match='block_size is 64 in X, got 256; lower it'):
        startup.adopt(configurator.load(['--init_from=X', '--block_size=256']), source)
    for given, wanted in (('--block_size=32', 32), ('--max_iters=1', 64)):                  # cropped; the default follows
        config = configurator.load(['--init_from=X', given])
        startup.adopt(config, source)
        assert config.block_size == wanted


# ----------------------------------------------------------------------------------------------------
# checkpoints whose manifest fits and whose contents do not, and what lies in the place of their files

def first(state):
    """(name, entries) of the first parameter's optimizer state."""
    return next(iter(state['optimizer'].items()))


ODD = {'n_layer': lambda s: s['config'].update(n_layer=10 ** 12), 'n_embd': lambda s: s['config'].update(n_embd=10 ** 12),
       'a text': lambda s: s['config'].update(n_head='two'), 'a list': lambda s: s['config'].update(linear=[1]),
       'vocab_size': lambda s: s['config'].update(vocab_size=5), 'no config': lambda s: s.pop('config'),
       'config': lambda s: s.update(config=[]), 'no model': lambda s: s.pop('model'), 'empty': lambda s: s.update(model={}),
       'numbers': lambda s: s['model'].update(x=3),
       'another shape': lambda s: s['model'].update({'lm_head.weight': torch.ones(3)}),
       'one missing': lambda s: s['model'].popitem(), 'optimizer': lambda s: s.update(optimizer=5),
       'its entries': lambda s: s['optimizer'].update({next(iter(s['optimizer'])): 7}),
       'another shape of them': lambda s: first(s)[1].update(exp_avg=torch.zeros(2, 2)),
       'one of them missing': lambda s: first(s)[1].pop('exp_avg_sq'),
       'a text among them': lambda s: first(s)[1].update(exp_avg='x'),
       'another average': lambda s: s.update(average={name: torch.ones(1) for name in s['model']}),
       'scaler': lambda s: s.update(scaler=None),
       'tokens': lambda s: s.update(tokens='many'), 'built': lambda s: s.update(built={'layers': 2}),
       'drop': lambda s: s['built'].pop('model'),
       'best': lambda s: s.update(best_val_loss=True), 'outliers': lambda s: s.update(outliers=[]),
       'digest': lambda s: s.update(data_digest=5)}


@pytest.mark.parametrize('case', ODD)
def test_odd_contents_are_one_line(case, copy, capsys):
    state = checkpoint.load(copy)
    ODD[case](state)
    subprocess.run(f'rm {copy}/ckpt_*', shell=True, check=True)
    checkpoint.save(copy, state)
    said = refused(capsys, go_on, copy, '--max_iters=6', '--ema_decay=0.5')
    assert str(copy) in said, said


def test_no_manifest_is_read_from_a_pipe_and_missing_data_is_told(tmp_path, capsys):
    for step in (1, 2, 3, 4, 5, 6, 7):
        checkpoint.save(tmp_path, {'step': step, 'model': {}}, keep=9)
    data = {step: tmp_path / f'ckpt_{step:08d}.pt' for step in range(1, 8)}
    for step in range(2, 7):
        data[step].unlink()
    data[3].mkdir()
    data[4].symlink_to(tmp_path / 'gone')
    data[5].symlink_to(data[5])
    os.mkfifo(data[6])
    data[7].with_suffix('.json').unlink()
    os.mkfifo(data[7].with_suffix('.json'))
    assert checkpoint.load(tmp_path)['step'] == 1
    err = capsys.readouterr().err
    assert err.count('taking the next older checkpoint') == 6 and all(f'ckpt_{step:08d}' in err for step in range(2, 8))


# ----------------------------------------------------------------------------------------------------
# a best.json that cannot be written, another machine, a source

def test_a_best_that_cannot_be_named_is_no_failed_save(data, tmp_path, monkeypatch, capsys):
    """And a checkpoint that cannot be written still leaves with 4."""
    monkeypatch.setattr(checkpoint, 'set_best', full)
    assert run(data, tmp_path / 'a')['step'] == 2
    err = capsys.readouterr().err
    assert 'best.json: ' in err and 'was not saved' not in err
    monkeypatch.setattr(checkpoint, 'save', full)
    with pytest.raises(SystemExit) as leave:
        run(data, tmp_path / 'b')
    assert leave.value.code == 4 and 'step 2 was not saved' in capsys.readouterr().err


def elsewhere(out, **changes):
    """The checkpoint of `out` as a run with other settings would have left it."""
    state = checkpoint.load(out)
    state['config'].update(changes)
    checkpoint.save(out, {**state, 'step': state['step'] + 1})


def test_a_checkpoint_of_a_device_that_is_not_here_goes_on_with_ours(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(hardware, 'sees_cuda', lambda: False)
    run(data, tmp_path)
    elsewhere(tmp_path, device='cuda', compile=True, prefetch=2, dtype='float32')
    assert "device 'cuda' of the checkpoint must" not in refused(capsys, go_on, tmp_path, '--device=cuda')    # given now
    config = go_on(tmp_path, '--max_iters=4', '--prefetch=1')['config']
    assert (config['device'], config['compile'], config['prefetch'], config['dtype']) == ('auto', None, 1, 'float32')
    assert "the device 'cuda' of the checkpoint is not on this machine: device='auto'" in capsys.readouterr().out


def test_a_device_that_is_here_stays_the_checkpoints(data, tmp_path, monkeypatch):
    """A run with --device=cpu stays on the CPU of a machine with a GPU, and compile=True stays."""
    run(data, tmp_path)
    monkeypatch.setattr(hardware, 'sees_cuda', lambda: True)
    state = checkpoint.load(tmp_path)
    state['config'].update(compile=True, prefetch=2)
    config = startup.resumed(configurator.load([f'--out_dir={tmp_path}', '--init_from=resume']), state)
    assert (config.device, config.compile, config.prefetch) == ('cpu', True, 2) and not [*startup.remarks(config, {
        **state, 'step': 0})]


def test_a_run_from_a_trained_twin_says_what_the_twin_had(data, tmp_path):
    """In env.json, also after a resume, and below the table; a run from scratch says nothing."""
    twin, out = tmp_path / 'twin', tmp_path / 'out'
    had = run(data, twin)
    run(data, out, f'--init_from={twin}')
    assert 'from' not in json.loads((twin / 'env.json').read_text())
    said = json.loads((out / 'env.json').read_text())['from']
    assert said == {'init_from': str(twin), 'kind': 'nanokron', 'step': 2, 'tokens': had['tokens'], 'flops': had['flops']}
    assert had['tokens'] == 2 * 128 and had['flops'] > 0
    go_on(out, '--max_iters=4', '--lr_decay_iters=4')
    assert json.loads((out / 'env.json').read_text())['from'] == said
    table = records.table([records.read_run(str(twin)), records.read_run(str(out))])
    assert table.count('began from') == 1 and f'out began from {twin}, trained with 256 tokens and ' in table
