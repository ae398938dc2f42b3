"""Where a run's words go besides its checkpoints. None of it ends a training run: one warning each, and it goes on."""
import contextlib
import json
import os
import sys

import configurator


class Outlets:
    """wandb and tensorboard where asked for, and attempt() for all that a run writes beside its checkpoints.

    again: the run in out_dir goes on, and so does its run of wandb, whose id is in env.json.
    """

    def __init__(self, config, main, again=False):
        self.warned, self.wandb, self.board = set(), None, None
        self.wandb_id = noted(os.path.join(config.out_dir, 'env.json'), 'wandb') if again else None
        if main and not config.eval_only:
            self.wandb = config.wandb_log and self.attempt('wandb_log', open_wandb, config, self.wandb_id)
            self.wandb_id = getattr(self.wandb, 'id', self.wandb_id)
            self.board = config.tensorboard_log and self.attempt('tensorboard_log', open_board, config)

    def attempt(self, what, action, *arguments):
        """action(*arguments), or None and one line on stderr, the first time that `what` fails."""
        try:
            return action(*arguments)
        except Exception as error:                      # a full disk, a lost network, and whatever trackers raise
            if what not in self.warned:
                said = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
                print(f'{what}: {said}; the run goes on without it', file=sys.stderr, flush=True)
            self.warned.add(what)
            return None

    def track(self, line):
        """A line of the log to the trackers; one that fails gets no more."""
        if self.wandb:
            self.attempt('wandb_log', lambda: self.wandb.log(line, step=line['step']))
        if self.board:
            self.attempt('tensorboard_log', self.scalars, line)
        self.wandb = self.wandb if 'wandb_log' not in self.warned else None
        self.board = self.board if 'tensorboard_log' not in self.warned else None

    def scalars(self, line):
        for name, value in line.items():
            if isinstance(value, (int, float)):
                self.board.add_scalar(name, value, line['step'])

    def close(self):
        if self.wandb:
            self.attempt('wandb_log', self.wandb.finish)
        if self.board:
            self.attempt('tensorboard_log', self.board.close)
        self.wandb = self.board = None


def noted(path, name):
    """What an env.json says of the run under a name; None where it says nothing."""
    try:
        with open(path, encoding='utf-8') as file:
            return json.load(file).get(name)
    except (OSError, ValueError, AttributeError, RecursionError):
        return None


def open_wandb(config, run_id):
    """run_id: of the run to go on with; None begins a new one.

    The run of a grid has the grid as its group and its own name in the environment, as wandb reads it (ablation/runner.py).
    """
    try:
        import wandb
    except ImportError:
        raise RuntimeError('wandb is not installed (pip install wandb)') from None
    name = config.wandb_run_name or os.environ.get('WANDB_NAME') or os.path.basename(os.path.abspath(config.out_dir))
    return wandb.init(project=config.wandb_project, name=name, config=configurator.as_dict(config),
                      id=run_id, resume='allow')


def open_board(config):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise RuntimeError('tensorboard is not installed (pip install tensorboard)') from None
    return SummaryWriter(os.path.join(config.out_dir, 'tensorboard'))


class Lines:
    """A file that gets a JSON line at a time, whole ones only: what a full disk does not take waits for the next."""

    def __init__(self, path):
        self.path, self.file, self.pending = path, None, b''

    def write(self, line):
        """Raises OSError; the line is then written with a later one, when there is space again."""
        self.pending += json.dumps(line).encode() + b'\n'
        if self.file is None:
            if os.path.lexists(self.path) and not os.path.isfile(self.path):
                raise OSError(f'{self.path} is no regular file')        # a FIFO would wait for a reader
            self.file = open(self.path, 'ab', buffering=0)
        while self.pending:
            self.pending = self.pending[self.file.write(self.pending):]

    def close(self):
        if self.file:
            with contextlib.suppress(OSError):
                self.file.close()


class Stream:
    """stdout or stderr that may go away (`| head -2`, a full log file): from then on it is silent, and nothing fails.

    On a terminal the lines that a program prints go above its progress bars.
    """

    def __init__(self, file):
        self.file, self.part = file, ''                 # part: a line whose end is not written yet

    def __getattr__(self, name):
        return getattr(self.file, name)

    def bars(self):
        """tqdm's class while a bar of it is on the screen."""
        module = sys.modules.get('tqdm.std')            # not imported: no bars
        return module.tqdm if module and getattr(module.tqdm, '_instances', None) and self.file.isatty() else None

    def write(self, text):
        """What bars write themselves moves the cursor, and passes; other text waits for the end of its line."""
        bars = self.bars()
        if not bars or '\r' in text or '\x1b' in text or not self.part and not text.strip('\n'):
            self.put(text)
            return len(text)
        whole, end, self.part = (self.part + text).rpartition('\n')
        if end:
            with bars.external_write_mode(file=self):
                self.put(whole + end)
        return len(text)

    def put(self, text):
        try:
            self.file.write(text)
        except (OSError, ValueError):
            self.silence()

    def flush(self):
        if self.part and not self.bars():
            self.part, text = '', self.part
            self.put(text)
        try:
            self.file.flush()
        except (OSError, ValueError):
            self.silence()

    def silence(self):
        with contextlib.suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.file.fileno())           # also takes what is still in the stream's buffer
            os.close(null)


def lasting_streams():
    """sys.stdout and sys.stderr that no reader, disk or letter can make fail; where one is closed it goes nowhere."""
    for name in ('stdout', 'stderr'):
        file = getattr(sys, name) or open(os.devnull, 'w', encoding='utf-8')
        file.reconfigure(errors='backslashreplace')     # an ascii terminal and an umlaut
        setattr(sys, name, Stream(file))
