"""How programs end early: a mistake, a package that is missing, a reader who has closed the pipe."""
import atexit
import os
import select
import sys
from pathlib import Path

from commandline import bounds, cores

ROOT = Path(__file__).resolve().parents[1]
CLOSED = 141                            # 128 + SIGPIPE, as a shell counts it
# package -> the extra of pyproject.toml that brings it
EXTRAS = {'datasets': 'data', 'wandb': 'log', 'tensorboard': 'log', 'optuna': 'sweep', 'gguf': 'pretrained',
          'tokenizers': 'pretrained', 'lm_eval': 'evaluate', 'transformers': 'dev'}


def say_mistake(program, error):
    """Print one line for a user's mistake, on rank 0 alone, and leave with exit code 2."""
    if os.environ.get('RANK', '0') == '0':
        print(bounds.one_line(f'{program}: {error}'), file=sys.stderr, flush=True)
    raise SystemExit(2)


def remedy(error):
    """What to do about a package of others that is not installed; '' for any other error."""
    name = (error.name or '').partition('.')[0] if isinstance(error, ModuleNotFoundError) else ''
    if not name or name in sys.stdlib_module_names or (ROOT / name).is_dir() or (ROOT / f'{name}.py').is_file():
        return ''
    if name in EXTRAS:
        return f'{name} is not installed in this Python; pip install {name} (the extra `{EXTRAS[name]}` of pyproject.toml)'
    if Path(sys.prefix) == ROOT / '.venv':
        return f'{name} is not installed in .venv; pip install {name}, or remove .venv and let bash run.sh CONFIG make it'
    return (f'{name} is not installed in this Python; activate .venv first (source .venv/bin/activate; bash run.sh CONFIG '
            'makes it)')


def reader_has_left(file):
    """Whether nobody reads the pipe that a file writes to; a failed write does not always leave something to flush."""
    if not hasattr(select, 'poll'):
        return False
    poll = select.poll()
    poll.register(file.fileno(), 0)
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))


def stdout_is_closed():
    """Whether the reader of stdout has left, as `| head` does; what would be written from now on goes nowhere."""
    if sys.stdout is None:              # the program was started without one
        return False
    try:
        sys.stdout.flush()
        left = reader_has_left(sys.stdout)
    except BrokenPipeError:
        left = True
    except (OSError, ValueError):       # no file of the system, or one that was closed
        left = False
    if left:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return left


def show(text):
    """Print a text and leave with 0, also where the reader wanted only a part of it."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        stdout_is_closed()
    raise SystemExit(0)


def watch(program):
    """From now on a missing package is one line and exit code 2, and a closed pipe nothing and exit code 141.

    For the program that is run, before it imports packages of others: those at the top of train.py are in no function.
    """
    usual = sys.excepthook
    cores.let_threads_sleep()

    def hook(kind, error, trace):
        if isinstance(error, BrokenPipeError) and stdout_is_closed():
            raise SystemExit(CLOSED)
        if remedy(error) and '--debug=True' not in sys.argv:
            say_mistake(program, remedy(error))
        usual(kind, error, trace)

    sys.excepthook = hook
    atexit.register(stdout_is_closed)   # before Python writes what is left, and complains
