"""What a terminal shows: one bar, printed lines above it, and no control character where there is no terminal."""
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
import warnings

import pytest
from tqdm import tqdm

import configurator
import train
from reporting import live, outlets
from tests.screen import Screen
from tests.tiny import ROOT, arguments, make_data

BAR = (r' *\d+%\|.*\| \d+/12(?:, evaluates|, saves|, loss \d\.\d{4}(?:, val loss \d\.\d{4})?, [\d,]+ tokens/s'
       r'(?:, \d\d:\d\d left)?)?')
HISTORY = [r'[\d,]+ parameters \(.*', r'step \d+: train loss \d\.\d{4}, val loss \d\.\d{4}', r'loss curves: .*loss\.png']


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp('data'))


def terminal(monkeypatch):
    """The Screen of a terminal of 80 columns that is stdout and stderr from now on.

    No fixture: behind one pytest's own come back. A pseudo terminal tells bars its size.
    """
    screen, (master, slave) = Screen(80), os.openpty()
    set_size(master, 80)
    monkeypatch.setattr(screen, 'fileno', lambda: slave)
    screen.open = os.fdopen(master), os.fdopen(slave)   # closed with the screen
    monkeypatch.setenv('COLUMNS', '80')
    train.STOP.update(signal=None, time=0.0)
    for name in ('stdout', 'stderr'):
        monkeypatch.setattr(sys, name, screen)
    outlets.lasting_streams()
    return screen


def run(data, out, *more):
    train.main(configurator.load(arguments(data, out, *more)))


def strange(screen, *patterns):
    """The lines of any moment that are none of these patterns."""
    whole = [re.compile(pattern) for pattern in patterns]
    return {line for lines in screen.seen for line in lines if not any(p.fullmatch(line) for p in whole)}


def test_a_model_that_is_only_made_has_no_curves(data, tmp_path, monkeypatch):
    screen = terminal(monkeypatch)
    run(data, tmp_path, '--max_iters=0', '--eval_first=False')
    assert [*tmp_path.glob('ckpt_*.pt')] and not (tmp_path / 'loss.png').exists()
    assert len(screen.lines()) == 1                     # the model's, and no bar is left


def test_every_line_of_the_screen_is_one_thing_and_the_history_stays(data, tmp_path, monkeypatch):
    screen = terminal(monkeypatch)
    monkeypatch.setattr(live, 'EVERY', 0.0)             # every step is drawn
    run(data, tmp_path)
    assert not strange(screen, BAR, *HISTORY)
    kinds = [next(i for i, pattern in enumerate(HISTORY) if re.fullmatch(pattern, line)) for line in screen.lines()]
    assert kinds == [0, 1, 1, 1, 2]                     # and no bar is left
    assert screen.lines()[-1] == f'loss curves: {tmp_path}/loss.png' and (tmp_path / 'loss.png').is_file()
    bars = [line for lines in screen.seen for line in lines if '%|' in line]
    assert any(re.search(r' 9/12, loss \d.\d+, val loss \d.\d+, [\d,]+ tokens/s, 00:00 left', line) for line in bars)
    assert {line.split()[-1] for line in bars} >= {'evaluates', 'saves'} and max(map(len, bars)) <= 80
    assert all(sum('%|' in line for line in lines) <= 1 for lines in screen.seen) and not tqdm._instances


def test_what_others_say_meanwhile_stands_above_the_bar(data, tmp_path, monkeypatch):
    """A warning of Python's and a checkpoint that cannot be written, on stderr."""
    screen = terminal(monkeypatch)
    real = train.train_step

    def warns(run, batches, step):
        if step == 3:
            warnings.warn('beware', stacklevel=1)
        return real(run, batches, step)

    def full(*_, **__):
        raise OSError('the disk is full')
    monkeypatch.setattr(live, 'EVERY', 0.0)
    monkeypatch.setattr(train, 'train_step', warns)
    monkeypatch.setattr(train.checkpoint, 'save', full)
    with warnings.catch_warnings(), pytest.raises(SystemExit):
        warnings.simplefilter('always', UserWarning)
        warnings.showwarning = lambda message, *_: sys.stderr.write(f'UserWarning: {message}\n')
        run(data, tmp_path)
    said = [r'train\.py: step \d+ was not saved: the disk is full', 'UserWarning: beware']
    assert not strange(screen, BAR, *HISTORY, *said)
    assert {'UserWarning: beware', 'train.py: step 6 was not saved: the disk is full'} <= {*screen.lines()}


def test_a_resumed_run_goes_on_with_its_bar_at_the_right_step(data, tmp_path, monkeypatch):
    screen = terminal(monkeypatch)
    monkeypatch.setattr(live, 'EVERY', 0.0)
    run(data, tmp_path, '--max_iters=6')
    del screen.seen[:]
    run(data, tmp_path, '--init_from=resume', '--max_iters=12')
    steps = [int(re.search(r'(\d+)/12', line)[1]) for lines in screen.seen for line in lines if '%|' in line]
    assert min(steps) == 6 and max(steps) == 12 and steps == sorted(steps)


@pytest.mark.parametrize('order', [(1, 0), (0, 1)])
def test_lines_go_above_several_bars_and_half_lines_wait(order, monkeypatch):
    screen = terminal(monkeypatch)
    first, second = live.bar(3, 'a', file=sys.stdout), live.bar(3, 'b', file=sys.stdout)
    sys.stdout.write('one ')
    assert all('one' not in line for line in screen.lines())
    print('thing')
    print('another', file=sys.stderr)
    first.update(1)
    assert [line.split()[0] for line in screen.lines()] == ['one', 'another', 'a', 'b']
    for index in order:
        (first, second)[index].close()
    print('a question: ', end='', flush=True)
    assert screen.lines() == ['one thing', 'another', 'a question:']


def test_a_bar_where_there_is_no_terminal_is_silent(capsys):
    with live.bar(3) as bar:
        bar.update(1)
    assert capsys.readouterr() == ('', '')


def line(step, loss=2.0):
    return json.dumps({'step': step, 'loss': loss}) + '\n'


def test_the_bar_of_another_process_is_read_from_its_log(tmp_path, monkeypatch):
    """Lines that a resumed run had written before are not its own; half a line and evaluations are none."""
    screen = terminal(monkeypatch)
    log = tmp_path / 'log.jsonl'
    log.write_text(line(3))
    followed = live.Followed('a long name ' * 9 + 'seed=1', tmp_path)

    def look():
        followed.then = 0.0
        followed.look()
        return screen.lines()[0]
    assert re.fullmatch(r'a long name.*\.\.\..*seed=1: starts', look())
    (tmp_path / 'config.json').write_text('{"max_iters": 20}')
    log.write_text(line(3) + line(4) + '{"step": 5, "val_loss": 3.0}\n' + '{"step": 5, "lo')
    assert re.search(r'seed=1  25%\|.*\| 5/20, loss 2.0000, \? left$', look())
    log.write_text(line(3) + line(9, 1.5))
    assert re.search(r'seed=1  50%\|.*\| 10/20, loss 1.5000, \d\d:\d\d left$', look()) and followed.share == 0.5
    followed.close()
    assert not screen.lines()


@pytest.mark.parametrize('text', [None, b'', b'[]\n', b'{"step": "x", "loss": 1}\n', b'\xff\n', b'{"step": 1, "loss": 1}'])
def test_a_log_without_a_whole_line_has_no_last_line(tmp_path, text):
    if text is not None:
        (tmp_path / 'log.jsonl').write_bytes(text)
    assert live.last_line(tmp_path / 'log.jsonl') == {}


# ---- whole processes ----

def under_a_terminal(command, columns=80, after=None):
    """(Screen, exit code) of a command under a pseudo terminal; after: (text, signal) to send once the text was seen."""
    pid, master = pty.fork()
    if pid == 0:
        os.environ.update(OMP_NUM_THREADS='1')
        os.execv(command[0], command)
    set_size(master, columns)
    screen, text = Screen(columns), b''
    while True:
        try:
            found = os.read(master, 65536)
        except OSError:                                 # Linux: the other side is closed
            found = b''
        if not found:
            break
        text += found
        if after and after[0] in text:
            time.sleep(0.3)
            os.kill(pid, after[1])
            after = None
    screen.write(text.decode().replace('\r\n', '\n'))
    return screen, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def set_size(terminal, columns):
    import fcntl
    import struct
    import termios
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack('HHHH', 30, columns, 0, 0))


@pytest.mark.slow
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_a_clean_screen(data, tmp_path, number):
    command = [sys.executable, str(ROOT / 'train.py'),
               *arguments(data, tmp_path, '--max_iters=100000', '--eval_interval=50')]
    screen, code = under_a_terminal(command, after=(b'step 50:', number))
    lines = [line for line in screen.lines() if not re.fullmatch(HISTORY[1], line)]
    assert code == 0 and re.fullmatch(HISTORY[0], lines[0]) and re.fullmatch(HISTORY[2], lines[1])
    assert re.fullmatch(rf'stopped by {number.name} at step \d+', lines[2]) and len(lines) == 3


@pytest.mark.slow
def test_without_a_terminal_there_are_plain_lines(data, tmp_path):
    done = subprocess.run([sys.executable, ROOT / 'train.py', *arguments(data, tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr and all(c == '\n' or c.isprintable() for c in done.stdout)
    assert len(re.findall(r'^iter \d+: loss ', done.stdout, re.MULTILINE)) == 12
    assert done.stdout.splitlines()[-1] == f'loss curves: {tmp_path}/loss.png'
