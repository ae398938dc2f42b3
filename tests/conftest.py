"""What all tests share: the root on sys.path, one torch thread, no network, and programs run as a user runs them."""
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# tests run side by side and must not reach for a hub; programs that they start inherit both
os.environ['OMP_NUM_THREADS'] = '1'
os.environ.setdefault('HF_HUB_OFFLINE', '1')
signal.signal(signal.SIGHUP, signal.SIG_DFL)        # nohup's "ignored", which train.py respects, would be inherited

try:
    import torch
    torch.set_num_threads(1)
except ModuleNotFoundError:             # the set-up tests run without it
    torch = None


def pytest_collection_modifyitems(items):
    if torch is not None and torch.cuda.is_available():
        return
    for item in items:
        if 'gpu' in item.keywords:
            item.add_marker(pytest.mark.skip(reason='no CUDA GPU'))


def command(program, arguments):
    """The command line of a program of ours: a .py file under this Python, a .sh file under bash."""
    path = Path(program) if Path(program).is_absolute() else ROOT / program
    return [shutil.which('bash') if path.suffix == '.sh' else sys.executable, str(path), *map(str, arguments)]


def environment(changes, hide_gpu):
    """This environment with changes: {name: text, or None to drop it}."""
    values = {**os.environ, **({'CUDA_VISIBLE_DEVICES': ''} if hide_gpu else {}), **(changes or {})}
    return {name: str(value) for name, value in values.items() if value is not None}


def heed_interrupts():
    """Tests that run in the background of a shell ignore SIGINT, and would hand that on to what they start."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture
def count(request):
    """`with count():` around each case of a test that has many; see tests/reliability/counters.py."""
    from tests.reliability.counters import Cases
    cases = Cases()
    request.node.user_properties.append(('cases', cases.numbers))
    return cases


@pytest.fixture
def run_program():
    """run_program('train.py', 'config/x.py', '--max_iters=5') -> CompletedProcess with stdout and stderr as text.

    Keywords: cwd (default: the root), timeout (120 s), env (changes), hide_gpu (False), and code, the exit
    code that the program must end with (0; None takes any). A relative program is one of the root's.
    """
    def run(program, *arguments, cwd=ROOT, timeout=120, env=None, hide_gpu=False, code=0):
        done = subprocess.run(command(program, arguments), cwd=cwd, env=environment(env, hide_gpu), timeout=timeout,
                              stdin=subprocess.DEVNULL, capture_output=True, text=True)
        assert code is None or done.returncode == code, (
            f'{program} left with {done.returncode}, not {code}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}')
        return done
    return run


@pytest.fixture
def start_program():
    """Like run_program, but returns the running Popen; killed when the test ends.

    stdout and stderr are one text pipe. The program leads a process group of its own, so that
    os.killpg(process.pid, signal.SIGINT) is what a terminal does at Ctrl-C.
    """
    started = []

    def start(program, *arguments, cwd=ROOT, env=None, hide_gpu=False):
        process = subprocess.Popen(command(program, arguments), cwd=cwd, env=environment(env, hide_gpu), text=True,
                                   stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                   start_new_session=True, preexec_fn=heed_interrupts)
        started.append(process)
        return process
    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()
