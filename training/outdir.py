"""A run's folder: whether it can be written to, whether it is another program's, and what becomes of a run that is there."""
import fnmatch
import json
import os
import shlex
from pathlib import Path

from checkpoints import checkpoint, previous
from variants import UserError

OTHERS = ('ckpt.pt', '*.safetensors', '*.safetensors.index.json', '*.gguf', 'pytorch_model*.bin', 'tokenizer*.json',
          'params.json')                                # what models of other programs consist of
MAX_CONFIG = 1 << 20                                    # bytes of a config.json that are read


def check(folder):
    """Raises UserError where a run could not be written, or must not be. Nothing is touched."""
    path = Path(folder)
    try:
        wrong = trouble(path)
    except OSError as error:                            # a name too long, a loop of links, a part that is a file
        wrong = (error.strerror or str(error)).lower()
    if wrong:
        raise UserError(f'out_dir {shown(folder)} cannot be used: {wrong}; take another --out_dir', 'out_dir')


def trouble(path):
    """What is wrong with a folder to write to, in words; '' for nothing. Raises OSError."""
    there = path
    while True:
        try:
            os.lstat(there)
            break
        except FileNotFoundError:                       # mkdir makes it, in the nearest folder that is there
            if there == there.parent:
                raise
            there = there.parent
    if not there.exists():
        return f'{shown(there)} is a link that leads nowhere'
    if not there.is_dir():
        return f'{shown(there)} is no folder'
    if not os.access(there, os.W_OK | os.X_OK):
        return f'{shown(there)} cannot be written to'
    if there != path:
        return ''
    if (path / '.lock').is_dir():
        return 'its .lock is a folder'
    name = foreign(path)
    return name and f"it holds another program's {name}, and such a folder is never written to"


def foreign(path):
    """The file by which a folder is another program's model and no run of ours; '' for none."""
    if checkpoint.steps(path) or (path / 'log.jsonl').exists():
        return ''
    names = sorted(os.listdir(path))
    found = next((name for name in names if any(fnmatch.fnmatch(name, other) for other in OTHERS)), '')
    if found or not (path / 'config.json').is_file():
        return found
    with open(path / 'config.json', 'rb') as file:
        try:
            settings = json.loads(file.read(MAX_CONFIG))
        except (ValueError, RecursionError):
            return ''
    return 'config.json' if isinstance(settings, dict) and 'out_dir' not in settings else ''


def shown(path):
    """A path for a message: its ends, where it is long."""
    text = str(path)
    return repr(text if len(text) <= 120 else f'{text[:60]}...{text[-50:]}')


def announce(folder, say):
    """Say what a fresh run in a used folder sets aside, where, and how to go on with that instead."""
    if previous.to_set_aside(folder):
        place, steps = previous.next_place(folder), checkpoint.steps(folder)
        how = f'; to go on with it: --init_from=resume --out_dir={shlex.quote(str(place))}' if steps else ''
        what = f'an earlier run, up to step {steps[-1]}' if steps else 'an earlier run without a checkpoint'
        say(f'{folder} holds {what}: it is set aside in {place}{how}')
