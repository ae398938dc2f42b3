"""Token files: one file of tokens, written with llm.c's header and read with or without it. Imports no torch.

    bytes 0..1023   256 little-endian int32: magic 20240520, version 1, number of tokens, and, since
                    llm.c leaves the rest at zero, bytes per token (0 means 2) and size of the vocabulary (0: unsaid)
    bytes 1024...   the tokens: uint16, or uint32 where the vocabulary has more than 65,536

nanoGPT's own .bin is the second part alone, always uint16. llm.c's Llama 3 has magic 20240801 and uint32.
(github.com/karpathy/llm.c, KellerJordan/modded-nanogpt.)
"""
import hashlib
import mmap
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from variants import UserError

MAGIC, VERSION = 20240520, 1
WIDTHS = {MAGIC: 2, 20240801: 4}            # magic -> bytes per token where the header does not say; llm.c's Llama 3
HEADER_BYTES = 1024
MOST_TOKENS = 2**31 - 1                     # largest count in the header's int32
CHUNK_BYTES = 1 << 23
AROUND, MOST_VISITED = 1 << 16, 4 << 20     # bytes that the kernel maps around a read; bytes that one map may visit


@dataclass(frozen=True)
class Shard:
    """One token file whose header and size agree. `vocab_size` is 0 where no header says it."""
    path: Path
    size: int                               # bytes, header included
    offset: int                             # bytes before the first token
    dtype: np.dtype
    tokens: int
    vocab_size: int = 0


def refuse(path, expected, found, remedy=''):
    """Raise UserError in one line: the path, what was expected, what was found, and the remedy."""
    raise UserError(f'{path}: expected {expected}, found {found}' + (f'; {remedy}' if remedy else ''))


def reason(error):
    """An OSError in a few words."""
    return (error.strerror or str(error)).lower()


def check_space(folder, needed):
    """Raise UserError unless the disk of `folder` (which need not exist yet) has `needed` bytes free."""
    place = Path(folder).absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        refuse(folder, f'{needed / 1e9:,.1f} GB of free disk', f'{free / 1e9:,.1f} GB', 'make room, or write elsewhere '
               'with --out=DIR')


def write_atomic(path, *parts):
    """Write the parts (bytes-like) one after the other to a temporary file, and rename: `path` is replaced atomically."""
    path = Path(path)
    aside = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    try:
        with open(aside, 'wb') as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def write_shard(path, tokens, vocab_size):
    """Write tokens (1-D, integers in [0, vocab_size)) with the header; returns the file's entry for meta.json.

    The entry is {'name', 'tokens', 'sha256', 'size'}. Raises UserError when a token is outside the vocabulary.
    """
    tokens = np.asarray(tokens)
    if not tokens.size:
        refuse(path, 'at least one token to write', 'none')
    if tokens.ndim != 1 or tokens.dtype.kind not in 'iu' or tokens.size > MOST_TOKENS:
        refuse(path, f'a list of at most {MOST_TOKENS:,} integers', f'{tokens.dtype} of shape {tokens.shape}')
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocab_size:
        refuse(path, f'tokens from 0 to {vocab_size - 1}', low if low < 0 else high)
    dtype = np.dtype('<u2' if vocab_size <= 65536 else '<u4')
    header = np.zeros(256, '<i4')
    header[:5] = MAGIC, VERSION, tokens.size, dtype.itemsize, vocab_size
    parts = header.tobytes(), np.ascontiguousarray(tokens, dtype).data.cast('B')
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    write_atomic(path, *parts)
    return {'name': Path(path).name, 'tokens': tokens.size, 'sha256': digest.hexdigest(), 'size': sum(map(len, parts))}


def open_shard(path, expected_size=None):
    """Check the header and the size, and return the Shard.

    expected_size: bytes, as meta.json has them. Raises UserError naming path, what was expected and what was found.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with open(path, 'rb') as file:
            head = file.read(1 << 16)
    except OSError as error:
        refuse(path, 'a token file', reason(error), 'run the prepare.py of this data set')
    if size == 0:
        refuse(path, 'tokens', 'an empty file', 'run the prepare.py of this data set')
    if expected_size not in (None, size):
        refuse(path, f'{expected_size:,} bytes as meta.json says', f'{size:,}', 'copy it or prepare it again')
    words = np.frombuffer(head[:min(size, HEADER_BYTES) // 4 * 4], '<i4')
    if words.size and int(words[0]) in WIDTHS:
        return with_header(path, size, words)
    return without_header(path, size, words, head)


def with_header(path, size, words):
    """The Shard that a header describes, if it describes this file."""
    if words.size < 256:
        refuse(path, f'a header of {HEADER_BYTES:,} bytes', f'{size:,} bytes in all')
    magic, version, tokens, width, vocab_size = map(int, words[:5])
    if version != VERSION:
        refuse(path, f'version {VERSION} in the header', version)
    if width not in (0, 2, 4):
        refuse(path, '2 or 4 bytes per token in the header', width)
    width = width or WIDTHS[magic]
    if tokens < 1 or vocab_size < 0:
        refuse(path, 'a positive number of tokens in the header', f'{tokens} (vocabulary {vocab_size})')
    if size != HEADER_BYTES + tokens * width:
        refuse(path, f'{HEADER_BYTES + tokens * width:,} bytes for the {tokens:,} tokens in its header', f'{size:,}')
    return Shard(path, size, HEADER_BYTES, np.dtype(f'<u{width}'), tokens, vocab_size)


def without_header(path, size, words, head):
    """The Shard of a raw file of uint16, unless it looks like something else."""
    if words.size == 256 and not words[8:].any():
        refuse(path, f'the magic number {MAGIC} at the head (or raw uint16 tokens)', int(words[0]))
    if head.startswith(b'\x93NUMPY'):
        refuse(path, 'uint16 tokens', 'a file of numpy.save', 'write them with tofile() as uint16')
    if looks_like_text(head):
        refuse(path, 'uint16 tokens', f'text ({head[:16]!r}...)', 'make tokens of it by prepare.py --input=FILE')
    if size % 2:
        refuse(path, 'uint16 tokens, an even number of bytes', f'{size:,} bytes')
    values = np.frombuffer(head[:size // 4 * 4], '<u2')
    if values.size >= 64 and not values[1::2].any() and values.any():
        refuse(path, 'uint16 tokens', 'wider integers, every second uint16 is 0', 'write them as uint16')
    return Shard(path, size, 0, np.dtype('<u2'), size // 2)


def looks_like_text(head):
    """True when 64 bytes or more are UTF-8 without control characters, which a token file never is for long."""
    if len(head) < 64:
        return False
    for cut in range(4):                    # the end may split a character
        try:
            text = head[:len(head) - cut].decode('utf-8')
        except UnicodeDecodeError:
            continue
        return all(c >= ' ' or c in '\t\n\r\f' for c in text)
    return False


def scan(shard):
    """(SHA-256 of the whole file, largest token), in one pass of 8 MiB pieces."""
    digest, largest = hashlib.sha256(), 0
    with open(shard.path, 'rb') as file:
        digest.update(file.read(shard.offset))
        while piece := file.read(CHUNK_BYTES):
            digest.update(piece)
            whole = len(piece) // shard.dtype.itemsize
            largest = max(largest, int(np.frombuffer(piece, shard.dtype, whole).max(initial=0)))
    return digest.hexdigest(), largest


class Tokens:
    """Several shards seen as one stream of tokens."""

    def __init__(self, shards):
        self.shards = list(shards)
        self.starts = np.cumsum([0] + [shard.tokens for shard in self.shards])          # (shards + 1,)
        self.maps = {}                      # index of a shard -> Mapped

    def __len__(self):
        return int(self.starts[-1])

    @property
    def path(self):
        """The first file of the stream, for messages."""
        return self.shards[0].path

    def read(self, start, stop):
        """Tokens [start, stop) of the stream as an int64 array, across the ends of shards. About 8 microseconds."""
        parts, k = [], int(np.searchsorted(self.starts, start, 'right')) - 1
        while start < stop:
            end = min(stop, int(self.starts[k + 1]))
            mapped = self.maps.get(k) or self.maps.setdefault(k, Mapped(self.shards[k]))
            parts.append(mapped.read(start - int(self.starts[k]), end - start))
            start, k = end, k + 1
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


class Mapped:
    """One memory-mapped token file.

    Visited pages count as this process's memory for as long as the map exists (nanoGPT issue 287 took that for a leak),
    so it is remapped now and then. A file that shrinks would end the process by a signal: its size is checked first.
    """

    def __init__(self, shard):
        self.shard, self.map, self.visited = shard, None, MOST_VISITED

    def read(self, first, count):
        """`count` tokens from the one numbered `first`, as int64; raises UserError when the file has changed."""
        shard = self.shard
        try:
            size = os.stat(shard.path).st_size
            if size == shard.size and self.visited >= MOST_VISITED:
                with open(shard.path, 'rb') as file:
                    self.map, self.visited = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), 0
        except OSError as error:
            refuse(shard.path, 'the file that was there at the start', reason(error))
        if size != shard.size:
            tokens = max(0, size - shard.offset) // shard.dtype.itemsize
            refuse(shard.path, f'{shard.tokens:,} tokens', f'{tokens:,}', 'it was changed during the run')
        self.visited += count * shard.dtype.itemsize + AROUND
        if size != shard.size:
            refuse(shard.path, f'{shard.size:,} bytes', f'{size:,}', 'it was changed during the run')
        start = shard.offset + first * shard.dtype.itemsize
        return np.frombuffer(self.map, shard.dtype, count, start).astype(np.int64)
