"""torch.save files with tensors and plain values only: written so, and read without trusting them.

torch.load(weights_only=True) runs no code, but a file controls how much memory it allocates: 300 bytes can make it
allocate 4 GB, by a bytearray, an unfilled tensor or a compressed member, or return a tensor of 7 GB over one element.
So a file is checked before it is loaded, and data is checked the same way before it is written: load accepts all that
dumps writes.
"""
import io
import pickletools
import re
import zipfile

import torch

from checkpoints.manifest import open_regular

MEMBER = re.compile(r'data\.pkl|data/\d+|byteorder|version|\.\w+(/\w+)?')          # what torch.save puts into its zip
BUILDERS = {'collections OrderedDict', 'torch._utils _rebuild_tensor_v2', 'torch._utils _rebuild_parameter',
            *(f'torch {kind}Storage' for kind in ('Double', 'Float', 'Half', 'BFloat16', 'Long', 'Int', 'Short', 'Char',
                                                  'Byte', 'Bool'))}
MAX_INDEX = 4 << 20         # bytes of the zip's directory, and of the stream that locates each tensor
MAX_CODES = 250_000         # instructions in that stream, besides a hundred for each member; a tensor takes about 45
MAX_DEPTH = 32              # dicts, lists and tuples inside one another


class Refused(ValueError):
    """One line: how a file differs from what torch.save writes for tensors and plain values."""


def dumps(state):
    """The bytes of torch.save(state), as a memoryview; raises Refused for anything that load would not accept.

    In memory and not to a file, because torch.save reports a full disk without its errno.
    """
    buffer = io.BytesIO()
    try:
        torch.save(state, buffer)
    except MemoryError:
        raise
    except Exception as error:          # whatever an object's own reduction raises
        raise Refused(f'cannot be written: {one_line(error)}') from error
    data = buffer.getbuffer()
    _examine_container(buffer, len(data))
    _examine_values(state, len(data))
    return data


def load(path):
    """The state in the file at path, its tensors on the CPU; raises Refused, and OSError if it cannot be read.

    Nothing in the file can run code, open a path, or make this allocate more than a few times the file's length.
    """
    with open_regular(path) as file:
        size = file.seek(0, io.SEEK_END)
        try:
            _examine_container(file, size)
            file.seek(0)
            state = torch.load(file, map_location='cpu', weights_only=True)
        except (MemoryError, OSError, Refused):
            raise
        except Exception as error:      # zipfile and torch raise some ten kinds of exceptions for invalid files
            raise Refused(f'cannot be read: {one_line(error)}') from error
    _examine_values(state, size)
    return state


def one_line(error):
    """The first line of an exception's text, at most 200 characters."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


class _Capped:
    """A file for zipfile, which would read a directory of any length at once."""

    def __init__(self, file):
        self.seek, self.tell, self.seekable, self._read = file.seek, file.tell, file.seekable, file.read

    def read(self, size=-1):
        if size > MAX_INDEX:
            raise Refused(f'has a directory or an index of {size:,} bytes, more than {MAX_INDEX:,}')
        return self._read(MAX_INDEX if size < 0 else size)


def _examine_container(file, size):
    """A zip of stored members under one name, no larger together than the file, and an index of known builders."""
    with zipfile.ZipFile(_Capped(file)) as archive:
        members = archive.infolist()
        names = [member.filename for member in members]
        root = names[0].partition('/')[0] if names else ''
        if root in ('.', '..') or len(set(names)) < len(names) or not all(
                name.startswith(f'{root}/') and MEMBER.fullmatch(name[len(root) + 1:]) for name in names):
            raise Refused('has other members than torch.save writes')
        if any(m.compress_type != zipfile.ZIP_STORED or m.compress_size != m.file_size for m in members):
            raise Refused('has compressed members, which torch.save never writes')
        # overlapping members add up to more; with bytes before the zip, torch and zipfile would read different ones
        if sum(m.file_size for m in members) > size or min((m.header_offset for m in members), default=1) != 0:
            raise Refused('has members that overlap or do not lie where they should')
        index = archive.read(f'{root}/data.pkl')
    for count, (code, value, _) in enumerate(pickletools.genops(index)):       # reads the stream, builds nothing
        if count > MAX_CODES + 100 * len(members):
            raise Refused(f'has an index of more than {count:,} instructions')
        if code.proto > 2 or (code.name == 'PROTO' and value != 2):
            raise Refused('has an index of another protocol than torch.save writes')
        if code.name == 'GLOBAL' and value not in BUILDERS:
            raise Refused(f'holds {value.replace(" ", ".")[:100]!r}; only tensors and plain values are taken')


def _examine_values(state, size):
    """A dict, not nested too deeply, in which no tensor claims more bytes than the file has (a stride may be 0)."""
    if not isinstance(state, dict):
        raise Refused(f'holds a {type(state).__name__} where a dict is due')
    level, seen = {id(state): state}, set()
    for _ in range(MAX_DEPTH):
        for value in level.values():
            if torch.is_tensor(value) and value.numel() * value.element_size() > size:
                raise Refused(f'declares a tensor of {tuple(value.shape)}, larger than the file')
        seen.update(level)
        level = {id(child): child for value in level.values() for child in _children(value) if id(child) not in seen}
    if level:
        raise Refused(f'is nested more than {MAX_DEPTH} levels deep')


def _children(value):
    if isinstance(value, dict):
        return [*value, *value.values()]
    return value if isinstance(value, (list, tuple)) else ()
