"""What a terminal shows while something goes on: tqdm's bars, and those of runs in other processes.

Bars are drawn on a terminal only. Text that a program prints meanwhile goes above them: outlets.Stream sees to it.
"""
import json
import os
import shutil
import sys
import time

from tqdm import tqdm

EVERY = 0.25                            # s between two drawings of a bar: each costs some 0.2 ms
FORMAT = '{desc}{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}'
TIMED = FORMAT + ', {remaining} left'
TAIL = 4096                             # bytes of a log that hold its last line


class Bar(tqdm):
    """tqdm's, after whose end text begins where a line begins: below the first bar tqdm leaves the cursor behind blanks."""

    def close(self):
        drawn = not self.disable
        super().close()
        if drawn:
            self.fp.write('\r')


def bar(total, what='', file=None, form=TIMED, **more):
    """A tqdm bar that leaves no trace when it is closed; a silent one where file (None = stderr) is no terminal."""
    file = file or sys.stderr
    return Bar(total=total, desc=what + ' ' * bool(what), file=file, disable=not file.isatty(), leave=False,
                dynamic_ncols=True, mininterval=EVERY, miniters=1, bar_format=form, **more)


def describe(shown, words):
    """Other words before a bar, at once."""
    shown.set_description_str(words + ' ' * bool(words))


def clock(seconds):
    """1:35 as bars write it, 01:35 or 1:02:03."""
    return tqdm.format_interval(seconds)


def last_line(path):
    """The last whole line of a training step in a log.jsonl, {} without one. Reads the end of the file alone."""
    try:
        with open(path, 'rb') as file:
            file.seek(max(0, os.path.getsize(path) - TAIL))
            texts = file.read().split(b'\n')[:-1]
    except OSError:
        return {}
    for text in reversed(texts):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict) and all(type(line.get(name)) in (int, float) for name in ('step', 'loss')):
            return line
    return {}


class Followed:
    """The bar of a train.py in another process, read from its log.jsonl: name, step of all, loss, time left.

    share: of the run that is done, 0 to 1. look() as often as one likes, then close().
    """

    def __init__(self, name, folder, position=None):
        self.name, self.folder, self.share, self.then = name, folder, 0.0, 0.0
        self.before = last_line(os.path.join(folder, 'log.jsonl'))         # what a run that goes on had written
        self.bar = bar(1, f'{shortened(name)}: starts', form='{desc}', position=position)

    def look(self):
        now = time.monotonic()
        if self.bar.disable or now - self.then < 2 * EVERY:
            return
        line, self.then = last_line(os.path.join(self.folder, 'log.jsonl')), now
        if line and line != self.before:
            self.before = self.before and {}
            self.move(line)

    def move(self, line):
        """The bar at this line of the log; the first one begins its clock."""
        shown, done = self.bar, line['step'] + 1
        if shown.bar_format != TIMED:
            shown.bar_format = TIMED
            describe(shown, shortened(self.name))
            shown.reset(max_iters(self.folder))
            shown.initial = shown.n = done
        shown.set_postfix_str(f'loss {line["loss"]:.4f}', refresh=False)
        shown.n, self.share = done, done / max(done, shown.total or 0)
        shown.refresh()

    def close(self):
        self.bar.close()


def max_iters(folder):
    """Steps of the whole run in a folder; None where its config.json does not say."""
    try:
        with open(os.path.join(folder, 'config.json'), encoding='utf-8') as file:
            steps = json.load(file).get('max_iters')
    except (OSError, ValueError, AttributeError, RecursionError):
        return None
    return steps if type(steps) is int else None


def shortened(name):
    """A name that leaves half of the terminal's line, its middle left out: its end tells seeds apart."""
    room = max(20, shutil.get_terminal_size().columns // 2 - 8)
    return name if len(name) <= room else f'{name[:room // 2 - 1]}...{name[len(name) - (room - room // 2 - 2):]}'
