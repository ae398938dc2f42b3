"""A data set folder, checked before the first step: meta.json, train.bin, val.bin, or several shards per split.

    meta.json  {"format": 1, "tokenizer": "gpt2", "vocab_size": 50257, "source": "...",
                "splits": {"train": {"tokens": N, "files": [{"name", "tokens", "sha256", "size"}]}, "val": ...}}

Without meta.json a folder is taken as nanoGPT or llm.c leave it: the characters of its meta.pkl, which is read and never
run, the tokens of its tokenizer.json, or GPT-2's. No torch here.
"""
import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path

from data import hub_tokenizer, meta_pickle, tokenizer
from data.shards import MOST_TOKENS, Tokens, open_shard, reason, refuse, scan, write_atomic
from variants import UserError

FORMAT = 1
SPLITS = ('train', 'val', 'test')           # the last one may be missing
MOST_META_BYTES = 1 << 24
MOST_BYTES = 1 << 62
FRESH_NS = 2_000_000_000                    # a file younger than this could change again without a new time stamp
GPT2_META = {'tokenizer': 'gpt2', 'vocab_size': 50257, 'source': 'a folder without meta.json'}


@dataclass(frozen=True)
class Dataset:
    """A data set that open_dataset verified. `digest` identifies the data (and the tokenizer) in checkpoints."""
    folder: str
    meta: dict                              # meta.json, or its substitute
    vocab_size: int
    tokenizer: dict                         # the part of meta that data.tokenizer.load reads
    digest: str                             # 16 hexadecimal digits
    splits: dict                            # name -> shards.Tokens


def open_dataset(folder, notice=print):
    """Read and check the data set in `folder`; returns a Dataset, or raises UserError with path, expected and found.

    Checked: meta.json; each file's size against its header and meta.json; its SHA-256 against meta.json; every token
    against the vocabulary. The last two read whole files, once: `.verified.json` beside them records the result by name,
    size and modification time. notice: called with one line where something is assumed.
    """
    folder = Path(folder)
    meta = read_meta(folder)
    files = from_meta(meta) if meta else from_names(folder)
    meta = meta or guessed_meta(folder, notice)
    shards = {split: [open_shard(folder / e['name'], e.get('size')) for e in files[split]] for split in files}
    memory, hashes = Memory(folder), {}
    for split in files:
        hashes[split] = [check_shard(*pair, meta, memory) for pair in zip(shards[split], files[split])]
    memory.save()
    described = tokenizer.describe(meta)
    return Dataset(str(folder), meta, meta['vocab_size'], described, digest(hashes, described),
                   {split: Tokens(shards[split]) for split in shards})


def digest(hashes, described):
    """16 hexadecimal digits that change with any file and with the meaning of the tokens, but not with a label."""
    meaning = {key: value for key, value in described.items() if key != 'source'}
    return hashlib.sha256(json.dumps([hashes, meaning], sort_keys=True).encode()).hexdigest()[:16]


def check_shard(shard, entry, meta, memory):
    """The SHA-256 of a file whose tokens are all in the vocabulary and which is the one that meta.json means."""
    vocab_size, guessed = meta['vocab_size'], meta.get('source') == GPT2_META['source']
    remedy = 'without meta.json it is read as GPT-2 BPE: prepare it again' if guessed else 'prepare it again'
    if guessed and shard.dtype.itemsize > 2 and not shard.vocab_size:
        refuse(shard.path, "GPT-2's tokens of 2 bytes", "tokens of 4 bytes (llm.c's Llama 3)",
               'put the tokenizer.json of its model beside it')
    if shard.vocab_size not in (0, vocab_size):
        refuse(shard.path, f'a vocabulary of {vocab_size}', f'{shard.vocab_size} in its header', remedy)
    if entry.get('tokens') not in (None, shard.tokens):
        refuse(shard.path, f'{entry["tokens"]:,} tokens as meta.json says', f'{shard.tokens:,}', remedy)
    sha256, largest = memory.recall(shard.path) or memory.keep(shard.path, *scan(shard))
    if entry.get('sha256') not in (None, sha256):
        refuse(shard.path, f'SHA-256 {entry["sha256"][:16]}... as meta.json says', f'{sha256[:16]}...',
               'the file changed: copy it or prepare it again')
    if largest >= vocab_size:
        refuse(shard.path, f'tokens below {vocab_size}', largest, remedy)
    return sha256


# ---- which files, and what they should be ----

def read_meta(folder):
    """meta.json of the folder when it is valid, None when it is missing; raises UserError."""
    path = folder / 'meta.json'
    try:
        size = path.stat().st_size
        if size > MOST_META_BYTES:
            refuse(path, f'at most {MOST_META_BYTES:,} bytes', f'{size:,}')
        meta = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        refuse(path, 'a file', reason(error))
    except (ValueError, RecursionError, MemoryError) as error:
        refuse(path, 'JSON', str(error)[:80] or type(error).__name__, 'prepare the data again')
    try:
        check_meta(meta)
    except UserError as error:
        raise UserError(f'{path}: {error}; prepare the data again') from None
    return meta


def check_meta(meta):
    """Raise UserError unless meta has the format, a tokenizer and a list of files for train and val."""
    if not isinstance(meta, dict):
        raise UserError(f'expected an object, found {tokenizer.short(meta)}')
    if type(meta.get('format')) is not int or meta['format'] != FORMAT:
        raise UserError(f"expected 'format' {FORMAT}, found {tokenizer.short(meta.get('format'))}")
    meta.setdefault('vocab_size', None)                             # required in a data set
    if not isinstance(meta.get('source', ''), str):
        raise UserError(f"expected a string in 'source', found {tokenizer.short(meta['source'])}")
    tokenizer.load(meta)
    splits = meta.get('splits')
    if not isinstance(splits, dict) or not {'train', 'val'} <= set(splits) <= set(SPLITS):
        names = [tokenizer.short(name) for name in list(splits)[:5]] if isinstance(splits, dict) else []
        raise UserError(f"expected 'splits' with train and val, found {', '.join(names) or tokenizer.short(splits)}")
    for split, content in splits.items():
        check_split(split, content)
    names = [entry['name'] for content in splits.values() for entry in content['files']]
    if len(set(names)) != len(names):
        raise UserError("expected different files in 'splits', found one of them twice")


def check_split(split, content):
    """Raise UserError unless content is {'tokens': sum, 'files': [entry, ...]}."""
    files = content.get('files') if isinstance(content, dict) else None
    if not isinstance(files, list) or not files:
        raise UserError(f"expected a list of files for {split!r}, found {tokenizer.short(files)}")
    for entry in files:
        check_entry(split, entry)
    total = sum(entry['tokens'] for entry in files)
    if type(content.get('tokens')) is not int or content['tokens'] != total:
        raise UserError(f"expected {total:,} 'tokens' in {split!r} as its files say, "
                        f"found {tokenizer.short(content.get('tokens'))}")


def check_entry(split, entry):
    """Raise UserError unless entry is {'name': a file of the folder, 'tokens', 'sha256', 'size'}."""
    if not isinstance(entry, dict):
        raise UserError(f'expected an object for each file of {split!r}, found {tokenizer.short(entry)}')
    name, sha256 = entry.get('name'), entry.get('sha256')
    plain = isinstance(name, str) and 0 < len(name) < 256 and name not in ('.', '..')
    if not plain or not name.isprintable() or set(name) & set('/\\:'):
        raise UserError(f'expected the plain name of a file of {split!r}, found {tokenizer.short(name)}')
    if not isinstance(sha256, str) or len(sha256) != 64 or set(sha256) - set('0123456789abcdef'):
        raise UserError(f'expected 64 hexadecimal digits as sha256 of {name}, found {tokenizer.short(sha256)}')
    for key, most in (('tokens', MOST_TOKENS), ('size', MOST_BYTES)):
        if type(entry.get(key)) is not int or not 0 < entry[key] <= most:
            raise UserError(f'expected a whole number from 1 to {most:,} as {key} of {name}, '
                            f'found {tokenizer.short(entry.get(key))}')


def from_meta(meta):
    """split -> entries of its files, as meta.json lists them."""
    return {split: meta['splits'][split]['files'] for split in SPLITS if split in meta['splits']}


def tokens_of_folder(folder, notice=print):
    """What the tokens of a data set's folder mean, as data.tokenizer.describe says it; its token files are not read."""
    folder = Path(folder)
    if not folder.is_dir():
        refuse(folder, 'the folder of a data set', 'none', 'prepare it first')
    return tokenizer.describe(read_meta(folder) or guessed_meta(folder, notice))


def guessed_meta(folder, notice):
    """What the tokens of a folder without meta.json mean: its meta.pkl's characters, else GPT-2's tokens."""
    found = meta_pickle.read(folder / 'meta.pkl')
    if found:
        tokenizer.load(found)
        notice(f'{folder} has no meta.json: its tokens are the {found["vocab_size"]} characters of its meta.pkl')
        return found
    if (folder / 'tokenizer.json').exists():
        notice(f'{folder} has no meta.json: its tokens are those of its tokenizer.json')
        return hub_tokenizer.read(folder)
    notice(f'{folder} has no meta.json: its tokens are taken as GPT-2 BPE, a vocabulary of 50257')
    return dict(GPT2_META)


def from_names(folder):
    """split -> entries of its files, by name: train.bin, else the sorted *train*.bin (llm.c, modded-nanogpt)."""
    files = {}
    for split in SPLITS:
        exact = folder / f'{split}.bin'
        paths = [exact] if exact.exists() else sorted(folder.glob(f'*{split}*.bin'))
        if paths or split != 'test':
            files[split] = [{'name': path.name} for path in paths]
    if not files['train'] or not files['val']:
        missing = [f'{split}.bin' for split in ('train', 'val') if not files[split]]
        script = folder / 'prepare.py'
        refuse(folder, 'train.bin and val.bin (or *train*.bin and *val*.bin)', f'no {" and no ".join(missing)}',
               f'run python {script}' if script.exists() else '')
    names = [entry['name'] for split in files for entry in files[split]]
    if len(set(names)) != len(names):
        refuse(folder, 'each .bin to belong to one split', 'a name that fits two of them', 'rename it')
    return files


# ---- what was found before ----

class Memory:
    """`.verified.json`: name -> [size, modification time in ns, SHA-256, largest token] of files that were read whole."""

    def __init__(self, folder):
        self.path, self.new = folder / '.verified.json', {}
        try:
            self.known = json.loads(self.path.read_bytes())
        except (OSError, ValueError, RecursionError):
            self.known = {}
        if not isinstance(self.known, dict):
            self.known = {}

    def recall(self, path):
        """(SHA-256, largest token) of a file that has not changed since it was read, else None."""
        known, now = self.known.get(path.name), path.stat()
        if not isinstance(known, list) or [type(v) for v in known] != [int, int, str, int]:
            return None
        return (known[2], known[3]) if known[:2] == [now.st_size, now.st_mtime_ns] else None

    def keep(self, path, sha256, largest):
        """Record a scan's result, unless the file is so new that a change might not alter its modification time."""
        now = path.stat()
        if time.time_ns() - now.st_mtime_ns > FRESH_NS:
            self.new[path.name] = [now.st_size, now.st_mtime_ns, sha256, largest]
        return sha256, largest

    def save(self):
        """Write new results. A folder that cannot be written is read completely again next time."""
        if not self.new:
            return
        try:
            write_atomic(self.path, json.dumps({**self.known, **self.new}).encode())
        except OSError:
            pass
