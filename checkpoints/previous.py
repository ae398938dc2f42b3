"""Former runs of a folder: a fresh run moves them to previous, previous.1, previous.2, ...; only the user removes them."""
import os
import re
from pathlib import Path

from checkpoints.durable import DISK
from checkpoints.manifest import in_order

RUN_FILES = ('best.json', 'config.json', 'env.json', 'loss.png', 'log.jsonl')          # a run's, besides checkpoints
PLACE = re.compile(r'previous(?:\.(\d+))?')


def files_of_run(folder):
    """The paths of a run's files in the order in which they can be moved: the oldest checkpoint first, the log last."""
    files = sorted(filter(in_order, folder.glob('ckpt_*')), key=in_order)
    return files + [folder / name for name in RUN_FILES if os.path.lexists(folder / name)]


def next_place(folder):
    """<folder>/previous, or previous.N after the highest number that is there: names never change, later is higher."""
    taken = [int(found[1] or 0) for found in map(PLACE.fullmatch, os.listdir(folder)) if found]
    return Path(folder) / (f'previous.{max(taken) + 1}' if taken else 'previous')


def to_set_aside(folder):
    """Whether set_aside would move something."""
    folder = Path(folder)
    return folder.is_dir() and bool(files_of_run(folder) or (folder / 'previous.new').exists())


def set_aside(folder, ops=DISK):
    """Move a former run's files into next_place(folder), replacing nothing; returns it, or None when there are none.

    Stopped anywhere it loses nothing: the rest follows at the next call. The oldest checkpoint goes first and the log
    last, so that a run caught half-way can still be resumed.
    """
    folder = Path(folder)
    if not to_set_aside(folder):
        return None
    incoming, files = folder / 'previous.new', files_of_run(folder)
    if any(os.path.lexists(incoming / path.name) for path in files):        # of another run: it gets a place of its own
        ops.replace(incoming, next_place(folder))
    incoming.mkdir(exist_ok=True)
    for path in files:
        ops.replace(path, incoming / path.name)
    ops.fsync_dir(incoming)
    ops.fsync_dir(folder)
    place = next_place(folder)
    ops.replace(incoming, place)
    ops.fsync_dir(folder)
    return place
