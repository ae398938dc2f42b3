"""Manifests: a small JSON file per checkpoint that identifies what was written, so that nothing else is taken for it.

    {sha256, size, step, schema}: of a file its SHA-256 and bytes; of a folder the SHA-256 of its listing (a line
    `sha256 size name` for each file, by name) and the bytes of all files together
"""
import errno
import hashlib
import json
import os
import re
import stat
from pathlib import Path

from variants import UserError

SCHEMA = 1                          # increases when an older reader would misread a newer file
MAX_JSON = 4096                     # bytes of a manifest or best.json that are read
NAME = re.compile(r'ckpt_(\d{8,})(?:\.pt|\.json|\.old)?')


class Damaged(ValueError):
    """One line: which file is not what was saved, and the evidence."""


def data_path(folder, step, suffix='.pt'):
    return Path(folder) / f'ckpt_{step:08d}{suffix}'


def data_paths(folder, step):
    """Where a step's data may be: a file, a folder, or a folder that was about to be replaced."""
    paths = [data_path(folder, step, suffix) for suffix in ('.pt', '', '.old')]
    return [path for path in paths if (path.is_file() if path.suffix == '.pt' else path.is_dir())]


def in_order(path):
    """(step, is data, name) of a checkpoint's path: a manifest sorts before its data; None for other files."""
    name = NAME.fullmatch(path.name)
    return name and (int(name[1]), path.suffix != '.json', path.name)


def open_regular(path):
    """A file opened to be read; raises OSError for all that is none, such as a pipe, whose reader waits for ever."""
    file = open(os.open(path, os.O_RDONLY | getattr(os, 'O_NONBLOCK', 0) | getattr(os, 'O_BINARY', 0)), 'rb')
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, 'it is no regular file', str(path))
    return file


def read_json(path, **kinds):
    """The small JSON object at path that has these keys with exactly these types; raises Damaged."""
    with open_regular(path) as file:
        text = file.read(MAX_JSON)
    try:
        value = json.loads(text)
        if all(type(value[key]) is kind for key, kind in kinds.items()):
            return value
    except (ValueError, TypeError, KeyError, RecursionError):
        pass
    raise Damaged(f'{path.name} is damaged')


def digest(path):
    """(SHA-256, bytes) of a file."""
    hashed = hashlib.sha256()
    with open_regular(path) as file:
        while piece := file.read(1 << 20):
            hashed.update(piece)
        return hashed.hexdigest(), file.tell()


def folder_digest(entries):
    """(SHA-256 of the listing, bytes) of a folder's [(name, sha256, size)]."""
    listing = ''.join(f'{sha256} {size} {name}\n' for name, sha256, size in sorted(entries))
    return hashlib.sha256(listing.encode()).hexdigest(), sum(size for _, _, size in entries)


def measure(path):
    """(SHA-256, bytes) of a file, or of a folder of files."""
    if not path.is_dir():
        return digest(path)
    return folder_digest([(file.name, *digest(file)) for file in path.iterdir()])


def verify(path):
    """SHA-256 of a file or folder that matches its manifest; raises Damaged, and UserError for a newer schema."""
    try:
        noted = read_json(path.with_suffix('.json'), sha256=str, size=int, step=int, schema=int)
        name = NAME.fullmatch(path.name)
        if noted['schema'] > SCHEMA:
            raise newer(path, noted['schema'])
        if name and int(name[1]) != noted['step']:
            raise Damaged(f'{path.name} has the manifest of step {noted["step"]}')
        files = list(path.iterdir()) if path.is_dir() else [path]
        size = sum(file.stat().st_size for file in files)
        if size != noted['size'] and 'before' not in noted:
            raise Damaged(f'{path.name} is damaged: {size:,} bytes where {noted["size"]:,} were written')
        sha256, _ = measure(path)
    except OSError as error:
        raise Damaged(f'{str(error.filename or path).split("/")[-1]} cannot be read: {error.strerror}') from error
    if sha256 not in (noted['sha256'], noted.get('before')):
        raise Damaged(f'{path.name} is damaged: its SHA-256 is not the one of its manifest')
    return sha256


def newer(path, schema):
    return UserError(f'{path} has checkpoint schema {schema}, this version reads up to {SCHEMA}; update nanokron')
