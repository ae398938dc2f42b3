"""Token files, data set folders, batches, tokenizers and the prepare scripts."""
import hashlib
import io
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data import prepare_text, tokenizer
from data.dataset import check_meta, open_dataset
from data.loader import Loader
from data.shards import HEADER_BYTES, MAGIC, Tokens, open_shard, write_shard
from variants import UserError

ROOT = Path(__file__).resolve().parents[2]
CHARS = [chr(97 + k) for k in range(26)]
DESCRIBED = {'tokenizer': 'char', 'vocab_size': 26, 'chars': CHARS, 'source': 'a test'}
FIRST_STARTS, FIXED_STARTS = [29, 19, 99, 319, 409, 919], [218, 758, 228]
quick = settings(max_examples=40, deadline=None)


def quiet(line):
    pass


def make(folder, train, val=range(20), described=DESCRIBED):
    """A data set folder of ours with these tokens."""
    prepare_text.write_dataset(folder, described, {'train': np.asarray(train), 'val': np.asarray(val)})
    return folder


def letters(count, seed=0):
    return np.random.default_rng(seed).integers(0, 26, count)


def raw(path, tokens, dtype='<u2'):
    Path(path).parent.mkdir(exist_ok=True)
    np.asarray(tokens).astype(dtype).tofile(path)


class Plain:
    """Stands for a data set whose token k is the number k, so that a batch shows where it was read."""

    def __init__(self, length):
        self.folder, self.splits = 'plain', {'train': self}
        self.length, self.path = length, 'plain/train.bin'

    def __len__(self):
        return self.length

    def read(self, start, stop):
        assert 0 <= start < stop <= self.length
        return np.arange(start, stop)


def run_starts(loader, steps, world_size=1):
    """First token of each row, in the global order."""
    return [int(row[0]) for step in range(steps) for micro in range(loader.accumulation // world_size)
            for rank in range(world_size) for row in loader.batch(step, micro, rank)[0]]


def refused(folder, *words):
    """open_dataset and Loader refuse the folder in one line that holds path, expected and found."""
    with pytest.raises(UserError) as caught:
        dataset = open_dataset(folder, quiet)
        for split in ('train', 'val'):
            Loader(dataset, split, 8, 2)
    line = str(caught.value)
    assert '\n' not in line and str(folder) in line, line
    for word in ('expected', 'found', *words):
        assert word in line, line
    return line


# ---- order ----

@quick
@given(length=st.integers(2, 400), block=st.integers(1, 50), batch=st.integers(1, 9), step=st.integers(0, 10**6),
       seed=st.integers(-5, 2**70))
def test_batch_is_a_pure_function(length, block, batch, step, seed):
    block = min(block, length - 1)
    one, other = (Loader(Plain(length), 'train', block, batch, accumulation=2, seed=seed) for _ in range(2))
    x, y = one.batch(step, 1)
    one.batch(0, 0)
    other.batch(step + 7, 0)
    assert torch.equal(x, one.batch(step, 1)[0]) and torch.equal(x, other.batch(step, 1)[0])
    assert x.shape == y.shape == (batch, block) and x.dtype == y.dtype == torch.int64
    assert torch.equal(y, x + 1) and x.is_contiguous() and y.is_contiguous()


@quick
@given(length=st.integers(2, 600), block=st.integers(1, 40), seed=st.integers(0, 99))
def test_an_epoch_takes_every_window_once(length, block, seed):
    block = min(block, length - 1)
    loader = Loader(Plain(length), 'train', block, 1, seed=seed)
    for epoch in range(3):
        starts = sorted(loader.start(epoch * loader.windows + k) for k in range(loader.windows))
        phase = starts[0]
        assert starts == [phase + k * block for k in range(loader.windows)]             # side by side, none twice
        assert phase < block and starts[-1] + block + 1 <= length
        assert loader.windows * block > length - 2 * block - 1                          # and nearly all of the stream


def test_epochs_differ_in_order_and_phase():
    loader = Loader(Plain(10_000), 'train', 64, 1)
    epochs = [[loader.start(epoch * loader.windows + k) for k in range(loader.windows)] for epoch in range(8)]
    assert len({min(starts) for starts in epochs}) > 4
    assert len({tuple(np.argsort(starts)) for starts in epochs}) == 8
    assert epochs[0] != sorted(epochs[0])
    other = Loader(Plain(10_000), 'train', 64, 1, seed=1338)
    assert [other.start(k) for k in range(loader.windows)] != epochs[0]


def test_the_order_is_the_same_on_every_machine():
    """The first starts of seed 1337, written down: a resumed run may meet another numpy."""
    loader = Loader(Plain(1000), 'train', 10, 6)
    assert run_starts(loader, 1) == FIRST_STARTS
    assert [int(x[0, 0]) for x, _ in loader.fixed(3, 'val')] == FIXED_STARTS


@pytest.mark.parametrize('world_size', [2, 4])
def test_the_order_does_not_depend_on_the_number_of_ranks(world_size):
    one = Loader(Plain(997), 'train', 16, 3, accumulation=4)
    many = Loader(Plain(997), 'train', 16, 3, accumulation=4, world_size=world_size)
    assert run_starts(one, 12) == run_starts(many, 12, world_size)
    assert len(run_starts(one, 12)) > 2 * one.windows                                   # over several epochs


def test_a_batch_that_straddles_epochs_is_right():
    one, big = Loader(Plain(200), 'train', 16, 1), Loader(Plain(200), 'train', 16, 7)
    assert big.windows % 7 and big.windows < 7 * 4
    wanted = [one.start(g) for g in range(70)]
    assert run_starts(big, 10) == wanted
    assert [int(big.batch(step)[0][k, 0]) for step in reversed(range(10)) for k in range(7)] == \
        [wanted[step * 7 + k] for step in reversed(range(10)) for k in range(7)]


def test_a_split_of_one_window():
    loader = Loader(Plain(9), 'train', 8, 5)
    assert loader.windows == 1
    assert torch.equal(loader.batch(3)[0], torch.arange(8).expand(5, 8))


def test_batches_that_do_not_exist_are_refused():
    loader = Loader(Plain(99), 'train', 8, 5, accumulation=4, world_size=2)
    for wrong in ((-1, 0, 0), (0, 2, 0), (0, 0, 2), (0, -1, 0)):
        with pytest.raises(ValueError):
            loader.batch(*wrong)
    with pytest.raises(UserError, match='divide by the 3 ranks'):
        Loader(Plain(99), 'train', 8, 5, accumulation=4, world_size=3)
    with pytest.raises(UserError, match='test'):
        Loader(Plain(99), 'test', 8, 5)


# ---- evaluation ----

@quick
@given(length=st.integers(2, 300), block=st.integers(1, 40), batch=st.integers(1, 6), world=st.integers(1, 4))
def test_sequential_predicts_every_token_once(length, block, batch, world):
    block = min(block, length - 1)
    loader = Loader(Plain(length), 'train', block, batch)
    targets = []
    for rank in range(world):
        for x, y in loader.sequential(rank=rank, world_size=world):
            assert torch.equal(y, x + 1) and 1 <= len(x) <= batch and 1 <= x.shape[1] <= block
            targets += y.flatten().tolist()
    assert sorted(targets) == list(range(1, length))
    in_order = [t for _, y in loader.sequential(batch_size=2) for t in y.flatten().tolist()]
    assert in_order == list(range(1, length))


def test_fixed_batches_are_always_the_same():
    loader = Loader(Plain(5000), 'train', 16, 4, seed=1)
    first = [x.tolist() for x, _ in loader.fixed(6, 'val')]
    loader.batch(3)
    assert [x.tolist() for x, _ in loader.fixed(6, 'val')] == first
    assert [x.tolist() for x, _ in Loader(Plain(5000), 'train', 16, 4, seed=2).fixed(6, 'val')] == first
    assert [x.tolist() for x, _ in loader.fixed(6, 'train')] != first
    assert len({str(x) for x in first}) == 6
    shared = [[x.tolist() for x, _ in loader.fixed(6, 'val', rank, 4)] for rank in range(4)]
    assert shared == [first[rank::4] for rank in range(4)]
    last = Loader(Plain(17), 'train', 16, 4)                                            # one place to start
    assert all(torch.equal(x, torch.arange(16).expand(4, 16)) for x, _ in last.fixed(2, 'val'))
    assert all(torch.equal(y, x + 1) for x, y in loader.fixed(6, 'val'))


def test_nothing_touches_the_global_generators(tmp_path):
    dataset = open_dataset(make(tmp_path, letters(500)), quiet)
    loader = Loader(dataset, 'train', 8, 4)
    state = torch.get_rng_state(), str(np.random.get_state()), random.getstate()
    loader.batch(5)
    list(loader.sequential())
    list(loader.fixed(3, 'val'))
    assert torch.equal(state[0], torch.get_rng_state())
    assert state[1:] == (str(np.random.get_state()), random.getstate())


# ---- files ----

@pytest.mark.parametrize('vocab_size, width', [(26, 2), (65536, 2), (65537, 4)])
def test_a_shard_comes_back(tmp_path, vocab_size, width):
    tokens = np.array([0, 5, vocab_size - 1, 7])
    entry = write_shard(tmp_path / 'x.bin', tokens, vocab_size)
    data = (tmp_path / 'x.bin').read_bytes()
    assert np.frombuffer(data, '<i4', 6).tolist() == [MAGIC, 1, 4, width, vocab_size, 0]
    assert len(data) == HEADER_BYTES + 4 * width == entry['size'] and entry['tokens'] == 4
    assert entry['sha256'] == hashlib.sha256(data).hexdigest()
    shard = open_shard(tmp_path / 'x.bin')
    stream = Tokens([shard, shard])
    assert all(stream.read(a, 8).tolist() == [*tokens, *tokens][a:] for a in range(8))
    assert shard.vocab_size == vocab_size
    assert os.listdir(tmp_path) == ['x.bin']


@pytest.mark.parametrize('tokens', [[], [-1, 2], [26], [1.5], [[1, 2]]])
def test_wrong_tokens_are_not_written(tmp_path, tokens):
    with pytest.raises(UserError, match='expected .* found'):
        write_shard(tmp_path / 'x.bin', tokens, 26)
    assert not os.listdir(tmp_path)


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    write_shard(tmp_path / 'x.bin', [1, 2, 3], 26)
    with open(tmp_path / 'x.bin', 'rb') as reader:
        old = (tmp_path / 'x.bin').read_bytes()
        write_shard(tmp_path / 'x.bin', [1, 2, 3], 27)
        assert reader.read() == old != (tmp_path / 'x.bin').read_bytes()                # replaced, not written over
    monkeypatch.setattr(os, 'fsync', lambda fd: (_ for _ in ()).throw(OSError(28, 'No space left on device')))
    with pytest.raises(OSError):
        write_shard(tmp_path / 'x.bin', [4, 5, 6], 26)
    assert Tokens([open_shard(tmp_path / 'x.bin')]).read(0, 3).tolist() == [1, 2, 3]
    assert os.listdir(tmp_path) == ['x.bin']


@quick
@given(data=st.data(), tokens=st.lists(st.integers(0, 255), min_size=2, max_size=60))
def test_shards_read_as_one_file(tmp_path_factory, data, tokens):
    folder = tmp_path_factory.mktemp('shards')
    cuts = sorted(data.draw(st.lists(st.integers(1, len(tokens) - 1), unique=True, max_size=5)))
    pieces = np.split(np.array(tokens), cuts)
    for k, piece in enumerate(pieces):
        write_shard(folder / f'{k}.bin', piece, 256)
    stream = Tokens([open_shard(folder / f'{k}.bin') for k in range(len(pieces))])
    start = data.draw(st.integers(0, len(tokens) - 1))
    stop = data.draw(st.integers(start + 1, len(tokens)))
    assert len(stream) == len(tokens) and stream.read(start, stop).tolist() == tokens[start:stop]
    raw(folder / 'raw.bin', tokens)
    assert Tokens([open_shard(folder / 'raw.bin')]).read(start, stop).tolist() == tokens[start:stop]


def test_headers_raw_files_and_shards_give_the_same_batches(tmp_path):
    train, val = np.random.default_rng(0).integers(0, 50257, (2, 700))
    make(tmp_path / 'ours', train, val, {'tokenizer': 'gpt2', 'vocab_size': 50257})
    raw(tmp_path / 'nanogpt' / 'train.bin', train)
    raw(tmp_path / 'nanogpt' / 'val.bin', val)
    (tmp_path / 'llmc').mkdir()
    for split, tokens in (('train', train), ('val', val)):
        for k, piece in enumerate(np.split(tokens, [90, 91, 400])):
            header = np.zeros(256, '<i4')
            header[:3] = 20240520, 1, len(piece)
            (tmp_path / 'llmc' / f'fineweb_{split}_{k:06}.bin').write_bytes(
                header.tobytes() + piece.astype('<u2').tobytes())
    rows = {}
    for name in ('ours', 'nanogpt', 'llmc'):
        dataset = open_dataset(tmp_path / name, quiet)
        loader = Loader(dataset, 'train', 32, 8)
        assert dataset.vocab_size == 50257 and dataset.tokenizer['tokenizer'] == 'gpt2'
        assert [x.tolist() for x, _ in loader.sequential()][0][0] == train[:32].tolist()
        rows[name] = [loader.batch(step)[1].tolist() for step in range(9)]
        assert len(dataset.splits['val']) == 700
    assert rows['ours'] == rows['nanogpt'] == rows['llmc']


def test_resident_size_does_not_grow(tmp_path):
    """nanoGPT issue 287: a memory map that lives keeps every page that was visited."""
    if not os.path.exists('/proc/self/statm'):
        pytest.skip('needs /proc')
    for split in ('train', 'val'):
        raw(tmp_path / f'{split}.bin', np.arange(12_000_000) % 50_000)
    loader = Loader(open_dataset(tmp_path, quiet), 'train', 12_000, 10)

    def resident():
        return int(Path('/proc/self/statm').read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE')
    loader.batch(0)
    before = resident()
    for step in range(1, 100):
        loader.batch(step)
    assert resident() - before < 8e6


# ---- refusing bad data (R9) ----

def header_of(path, **words):
    data = bytearray(path.read_bytes())
    for index, value in words.items():
        k = int(index[1:])
        data[4 * k:4 * k + 4] = np.int32(value).tobytes()
    path.write_bytes(data)


def spoil_header(**words):
    return lambda path: header_of(path, **words)


def without_meta(spoil):
    def both(path):
        (path.parent / 'meta.json').unlink()
        spoil(path)
    return both


def swap(path):
    other = path.with_name('val.bin')
    path.rename(path.with_name('x'))
    other.rename(path)
    path.with_name('x').rename(other)


def cut(share):
    return lambda path: path.write_bytes(path.read_bytes()[:int(path.stat().st_size * share)])


def put(data):
    return lambda path: path.write_bytes(data)


TEXT = b'First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, speak.\n' * 9
BAD = {
    'missing': (Path.unlink, 'no such file'),
    'empty': (put(b''), 'an empty file'),
    'a folder': (lambda path: (path.unlink(), path.mkdir()), 'is a directory'),
    'half': (cut(0.5), 'meta.json says'),
    'a byte more': (lambda path: path.write_bytes(path.read_bytes() + b'\0'), 'meta.json says'),
    'text': (put(TEXT), 'meta.json says'),
    'magic': (spoil_header(_0=20240802), 'magic number 20240520', '20240802'),
    'version': (spoil_header(_1=2), 'version 1', 'found 2'),
    'count': (spoil_header(_2=799), '2,622 bytes for the 799 tokens', '2,624'),
    'count below 0': (spoil_header(_2=-800), 'positive'),
    'width': (spoil_header(_3=8), '2 or 4 bytes per token', 'found 8'),
    'vocabulary': (spoil_header(_4=27), 'a vocabulary of 26', 'found 27'),
    'unused word of the header': (spoil_header(_77=1), 'SHA-256'),
    'a token': (lambda path: path.write_bytes(path.read_bytes()[:-2] + b'\3\0'), 'SHA-256'),
    'swapped splits': (swap, 'meta.json says'),
    'raw: missing': (without_meta(Path.unlink), 'no train.bin'),
    'raw: empty': (without_meta(put(b'')), 'an empty file'),
    'raw: odd': (without_meta(put(b'\1\2\0')), 'even number of bytes'),
    'raw: short': (without_meta(put(b'\1\0' * 8)), 'block_size + 1 = 9', 'found 8'),
    'raw: token outside GPT-2': (without_meta(put(b'\1\0' * 40 + b'\x51\xc4')), 'below 50257', 'found 50257'),
    'raw: text': (without_meta(put(TEXT)), 'uint16 tokens', 'text'),
    'raw: text of odd length': (without_meta(put(TEXT[1:] + b'\xc3')), 'text'),
    'raw: int64': (without_meta(put(np.arange(90).tobytes())), 'wider integers'),
    'raw: int32': (without_meta(put(np.arange(90, dtype='<i4').tobytes())), 'wider integers'),
    'raw: zeroed': (without_meta(put(bytes(4000))), 'magic number', 'found 0'),
    'raw: magic': (without_meta(spoil_header(_0=20240802)), 'magic number', '20240802'),
    'raw: other byte order': (without_meta(put(np.array([MAGIC, 1, 9] + [0] * 253, '>i4').tobytes() + b'\1\0' * 9)),
                              'magic number'),
    'raw: header cut': (without_meta(cut(0.3)), 'a header of 1,024 bytes', 'found 787'),
    'raw: half': (without_meta(cut(0.5)), '2,624 bytes', 'found 1,312'),
    'raw: vocabulary': (without_meta(Path.exists), 'vocabulary of 50257', 'found 26', 'without meta.json'),
    'raw: npy': (without_meta(lambda path: path.write_bytes(npy(letters(800)))), 'numpy.save'),
}


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@pytest.mark.parametrize('case', BAD)
def test_bad_shards_are_refused_in_one_line(tmp_path, case):
    folder = make(tmp_path, letters(800), letters(30))
    spoil, *words = BAD[case]
    if case.startswith('raw') and 'vocabulary' not in case and case != 'raw: missing':
        raw(folder / 'val.bin', range(30))
    spoil(folder / 'train.bin')
    line = refused(folder, *words)
    assert 'train.bin' in line or 'val.bin' in line


def test_good_folders_are_not_refused(tmp_path):
    """The negative control of the test above."""
    Loader(open_dataset(make(tmp_path, letters(800)), quiet), 'train', 8, 2)


def test_short_validation_split_and_missing_folder(tmp_path):
    refused(make(tmp_path / 'a', letters(800), range(8)), 'val.bin', 'at least block_size + 1 = 9 tokens', 'found 8')
    refused(tmp_path / 'nowhere', 'train.bin and val.bin')
    (tmp_path / 'b').mkdir()
    (tmp_path / 'b' / 'prepare.py').touch()
    refused(tmp_path / 'b', f'run python {tmp_path}/b/prepare.py')
    for name in ('a_train_val_0', 'b_val', 'c_train'):
        raw(tmp_path / 'b' / f'{name}.bin', range(40))
    refused(tmp_path / 'b', 'belong to one split')


@pytest.mark.parametrize('seed', [1])
def test_every_flip_and_truncation_is_found(tmp_path, count, seed):
    folder, chance = make(tmp_path, letters(800), letters(300)), random.Random(seed)
    for k in range(200):
        path = folder / chance.choice(['train.bin', 'val.bin'])
        good = path.read_bytes()
        if k % 2:
            bad = bytearray(good)
            bad[chance.randrange(len(good))] ^= 1 << chance.randrange(8)
        else:
            bad = good[:chance.randrange(len(good))]
        path.write_bytes(bad)
        with count():
            refused(folder, path.name)
        path.write_bytes(good)
    open_dataset(folder, quiet)


def test_files_are_read_whole_once(tmp_path, monkeypatch):
    folder = make(tmp_path, letters(800))
    count = []
    import data.dataset
    scan = data.dataset.scan
    monkeypatch.setattr(data.dataset, 'scan', lambda shard: count.append(shard.path.name) or scan(shard))
    fresh = open_dataset(folder, quiet)
    assert count == ['train.bin', 'val.bin'] and not (folder / '.verified.json').exists()   # written a moment ago
    for name in ('train.bin', 'val.bin'):
        os.utime(folder / name, (1e9, 1e9))
    assert open_dataset(folder, quiet).digest == fresh.digest and len(count) == 4
    assert open_dataset(folder, quiet).digest == fresh.digest and len(count) == 4           # remembered
    data = bytearray((folder / 'val.bin').read_bytes())
    data[-1] ^= 1
    (folder / 'val.bin').write_bytes(data)
    refused(folder, 'SHA-256')
    assert count[4:] == ['val.bin']


@pytest.mark.parametrize('memory', ['', '[1]', '{"train.bin": 5, "val.bin": [1, 2]}', '[' * 99999,
                                    '{"train.bin": [2624, 1, "x", {}]}', 'null', '\x00'])
def test_a_spoiled_memory_is_no_trouble(tmp_path, memory):
    folder = make(tmp_path, letters(800))
    (folder / '.verified.json').write_text(memory)
    os.utime(folder / 'train.bin', (1e9, 1e9))
    open_dataset(folder, quiet)
    open_dataset(folder, quiet)


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    folder = make(tmp_path, letters(800))
    os.utime(folder / 'train.bin', (1e9, 1e9))
    import data.dataset

    def refuse(path, *parts):
        raise OSError(30, 'Read-only file system')
    monkeypatch.setattr(data.dataset, 'write_atomic', refuse)
    open_dataset(folder, quiet)
    assert not (folder / '.verified.json').exists()


def test_data_that_change_during_a_run(tmp_path):
    loader = Loader(open_dataset(make(tmp_path, letters(800)), quiet), 'train', 8, 4)
    (tmp_path / 'train.bin').write_bytes(b'')
    with pytest.raises(UserError, match='train.bin: expected .* found 0'):
        loader.batch(0)
    (tmp_path / 'train.bin').unlink()
    with pytest.raises(UserError, match='train.bin: expected .* found no such file'):
        loader.batch(0)


def test_the_digest_names_data_and_tokenizer(tmp_path):
    digests = {open_dataset(folder, quiet).digest for folder in (
        make(tmp_path / 'a', letters(800)), make(tmp_path / 'b', letters(800), range(21)),
        make(tmp_path / 'c', letters(800), described={**DESCRIBED, 'chars': CHARS[::-1]}))}
    assert len(digests) == 3
    again = open_dataset(make(tmp_path / 'd', letters(800), described={**DESCRIBED, 'source': 'elsewhere'}), quiet)
    assert again.digest in digests and len(again.digest) == 16


def test_nanogpt_folders_are_announced_and_no_pickle_is_run(tmp_path):
    canary, lines = tmp_path / 'canary', []
    for split in ('train', 'val'):
        raw(tmp_path / f'{split}.bin', range(40))
    assert open_dataset(tmp_path, lines.append).tokenizer['tokenizer'] == 'gpt2'
    assert len(lines) == 1 and 'GPT-2' in lines[0] and '\n' not in lines[0]
    (tmp_path / 'meta.pkl').write_bytes(b"cos\nsystem\n(S'touch %s'\ntR." % str(canary).encode())
    refused(tmp_path, 'meta.pkl', 'GLOBAL', 'not run', 'prepare.py --input=TEXT')
    assert not canary.exists()


# ---- meta.json ----

def edit(**changes):
    def change(meta):
        for path, value in changes.items():
            *keys, last = path.split('__')
            inner = meta
            for key in keys:
                inner = inner[int(key) if key.isdigit() else key]
            if value is None:
                del inner[last]
            else:
                inner[last] = value
    return change


FILE = 'splits__train__files__0__'
HOSTILE = {
    'format': edit(format=2), 'no format': edit(format=None), 'format is a bool': edit(format=True),
    'tokenizer': edit(tokenizer='gpt3'), 'tokenizer is a list': edit(tokenizer=['char']),
    'no tokenizer': edit(tokenizer=None), 'vocab_size': edit(vocab_size=27),
    'vocab_size is a bool': edit(vocab_size=True),
    'vocab_size is huge': edit(vocab_size=10**30), 'vocab_size is a float': edit(vocab_size=26.0),
    'no vocab_size': edit(vocab_size=None), 'gpt2 of another size': edit(tokenizer='gpt2'),
    'no chars': edit(chars=None), 'chars is a string': edit(chars='abc'), 'chars is empty': edit(chars=[]),
    'a char twice': edit(chars=['a'] * 26), 'a long char': edit(chars=[*CHARS[:25], 'zz' * 99]),
    'a char is a number': edit(chars=[*CHARS[:25], 7]), 'a surrogate': edit(chars=[*CHARS[:25], '\ud800']),
    'too many chars': edit(chars=['a'] * 1_200_000), 'source': edit(source=['x']),
    'no splits': edit(splits=None), 'splits is a list': edit(splits=[]), 'no val': edit(splits__val=None),
    'another split': edit(splits__evil={}), 'no files': edit(splits__train__files=[]),
    'files': edit(splits__train__files={}),
    'split is a number': edit(splits__train=5), 'sum': edit(splits__train__tokens=801),
    'file is a string': edit(splits__train__files=['train.bin']), 'name twice': edit(**{FILE + 'name': 'val.bin'}),
    'name outside': edit(**{FILE + 'name': '../train.bin'}), 'absolute name': edit(**{FILE + 'name': '/etc/passwd'}),
    'name of the folder': edit(**{FILE + 'name': '..'}), 'name of two lines': edit(**{FILE + 'name': 'a\nb'}),
    'no name': edit(**{FILE + 'name': None}), 'name is long': edit(**{FILE + 'name': 'x' * 999}),
    'sha256': edit(**{FILE + 'sha256': 'x' * 64}), 'sha256 is short': edit(**{FILE + 'sha256': 'ab'}),
    'no sha256': edit(**{FILE + 'sha256': None}), 'tokens': edit(**{FILE + 'tokens': -1}),
    'huge tokens': edit(**{FILE + 'tokens': 10**25}), 'size': edit(**{FILE + 'size': 'big'}),
    'size is a bool': edit(**{FILE + 'size': True}), 'huge size': edit(**{FILE + 'size': 10**25}),
}


@pytest.mark.parametrize('case', HOSTILE)
def test_hostile_meta_is_refused_in_one_line(tmp_path, case):
    folder = make(tmp_path, letters(800))
    meta = json.loads((folder / 'meta.json').read_text())
    HOSTILE[case](meta)
    (folder / 'meta.json').write_text(json.dumps(meta))
    with pytest.raises(UserError) as caught:
        open_dataset(folder, quiet)
    line = str(caught.value)
    assert line.startswith(str(folder / 'meta.json')) and '\n' not in line and len(line) < len(str(folder)) + 300, line


@pytest.mark.parametrize('text', ['', '{', 'null', '[]', '5', '"x"', '[' * 200_000, '{"a":' * 100_000, '\xff\x00',
                                  '1' * 10_000, ' ' * (1 << 24) + '{}', '{"format": NaN}'])
def test_what_is_no_meta_is_refused_in_one_line(tmp_path, text):
    folder = make(tmp_path, letters(800))
    (folder / 'meta.json').write_text(text, encoding='latin-1')
    with pytest.raises(UserError) as caught:
        open_dataset(folder, quiet)
    assert str(caught.value).startswith(str(folder / 'meta.json')) and '\n' not in str(caught.value)


def test_mutated_meta_never_ends_in_a_traceback(tmp_path, count):
    folder, chance = make(tmp_path, letters(800)), random.Random(3)
    good, refusals = (folder / 'meta.json').read_bytes(), 0
    for _ in range(300):
        bad = bytearray(good)
        for _ in range(chance.randrange(1, 4)):
            bad[chance.randrange(len(bad))] = chance.choice(b'0123456789"[]{}:,-.eEnt \\u\n')
        (folder / 'meta.json').write_bytes(bad)
        with count():
            try:
                open_dataset(folder, quiet)
            except UserError as error:
                refusals += '\n' not in str(error)
    assert refusals > 200                       # the others changed the source or white space


def test_good_meta_is_taken(tmp_path):
    meta = json.loads((make(tmp_path, letters(800)) / 'meta.json').read_text())
    check_meta(meta)
    check_meta({**meta, 'a key of a later version': 1})
    assert open_dataset(tmp_path, quiet).tokenizer == DESCRIBED


# ---- tokenizers ----

@quick
@given(text=st.text(alphabet=st.characters(exclude_categories=['Cs']), max_size=50))
def test_tokenizers_round_trip(text):
    chars = {'tokenizer': 'char', 'chars': sorted(set(text) | {'a'})}
    for meta in (chars, {'tokenizer': 'bytes', 'vocab_size': 256}, {'tokenizer': 'gpt2', 'vocab_size': 50257}):
        kind = tokenizer.load(meta)
        tokens = kind.encode(text)
        assert kind.decode(tokens) == text and kind.decode(kind.encode_ordinary(text)) == text
        assert all(type(t) is int and 0 <= t < kind.vocab_size for t in tokens) and kind.name == meta['tokenizer']


def test_characters_that_the_vocabulary_lacks():
    kind = tokenizer.load(DESCRIBED)
    with pytest.raises(UserError, match="'É' is not among the 26 .* comes from a test") as caught:
        kind.encode('abcÉ')
    assert '\n' not in str(caught.value)
    assert kind.vocab_size == 26 and kind.encode('cab') == [2, 0, 1]


def test_bytes_that_are_no_text():
    kind = tokenizer.load({'tokenizer': 'bytes'})
    assert kind.encode('é') == [0xc3, 0xa9]
    assert kind.decode([0xc3]) == '\ufffd' and kind.decode([0x61, 300]) == 'a\ufffd'
    assert kind.encode('\ud800')                # what a terminal may hand over


def test_gpt2_tokens():
    kind = tokenizer.load({'tokenizer': 'gpt2'})
    assert kind.vocab_size == 50257 and kind.encode('Hello world') == [15496, 995]
    assert kind.encode('<|endoftext|>') == [50256] and kind.decode([50256]) == '<|endoftext|>'
    assert len(kind.encode_ordinary('<|endoftext|>')) > 1
    assert kind.decode([15496, 50300]) == 'Hello\ufffd'
    assert kind.encode("I'll say  it's 42!\n\n  é\u3042") == [40, 1183, 910, 220, 340, 338, 5433, 0, 628, 220, 38251,
                                                              40948]


def test_gpt2_is_tiktokens_own():
    """Same ranks as tiktoken builds from the published files: hash of the sorted table, and the same pattern."""
    from tiktoken_ext import openai_public
    encoding = tokenizer.gpt2_encoding()
    assert encoding.n_vocab == 50257 and encoding.max_token_value == 50256
    ours = encoding._mergeable_ranks
    assert len(ours) == 50256 and sorted(ours.values()) == list(range(50256))
    assert ours[b'!'] == 0 and ours[b'\x00'] == 188 and ours[b' t'] == 256 and ours[b' gazed'] == 50255
    theirs = getattr(openai_public, 'r50k_pat_str', None)
    if theirs is None:
        pytest.skip('this tiktoken does not name the pattern')
    import tiktoken
    other = tiktoken.Encoding('other', pat_str=theirs, mergeable_ranks=ours, special_tokens={})
    chance = random.Random(0)
    for _ in range(300):
        text = ''.join(chance.choice(" \n\t'stdmrevlLé1२!—\u3000a") for _ in range(40))
        assert encoding.encode_ordinary(text) == other.encode_ordinary(text)


def test_a_damaged_vocabulary_is_refused(tmp_path, monkeypatch):
    for data in (b'', b'x' * 99, tokenizer.GPT2_MERGES.read_bytes()[:-50], prepare_text.SHAKESPEARE.read_bytes()):
        (tmp_path / 'v.xz').write_bytes(data)
        monkeypatch.setattr(tokenizer, 'GPT2_MERGES', tmp_path / 'v.xz')
        with pytest.raises(UserError, match='restore it from the repository'):
            tokenizer.gpt2_merges()


@pytest.mark.parametrize('meta', [None, [], 5, {}, {'tokenizer': None}, {'tokenizer': 'chr'}, {'tokenizer': 'char'},
                                  {'tokenizer': 'bytes', 'vocab_size': 255}, {'tokenizer': 'gpt2', 'vocab_size': '5'}])
def test_a_tokenizer_that_nobody_knows(meta):
    with pytest.raises(UserError) as caught:
        tokenizer.load(meta)
    assert '\n' not in str(caught.value)


# ---- prepare scripts ----

def prepare(script, *arguments, cwd=None, code=0):
    done = subprocess.run([sys.executable, str(script), *map(str, arguments)], cwd=cwd, capture_output=True, text=True,
                          timeout=60)
    assert done.returncode == code, done.stdout + done.stderr
    assert 'Traceback' not in done.stderr
    return done.stdout if code == 0 else done.stderr


@pytest.fixture
def copy(tmp_path):
    """The repository's data folder elsewhere, without what was prepared here, and what it imports."""
    leave = shutil.ignore_patterns('*.bin', 'meta.json', '.verified.json', 'input.txt', '__pycache__')
    shutil.copytree(ROOT / 'data', tmp_path / 'repo' / 'data', ignore=leave)
    shutil.copytree(ROOT / 'commandline', tmp_path / 'repo' / 'commandline', ignore=leave)
    for name in ('variants.py', 'specs.py'):
        shutil.copy(ROOT / name, tmp_path / 'repo')
    return tmp_path / 'repo' / 'data'


@pytest.mark.parametrize('name, train, val, vocab_size', [('shakespeare_char', 1_006_261, 111_807, 64),
                                                          ('shakespeare', 302_546, 36_159, 50257)])
def test_prepare_from_anywhere_and_twice(copy, tmp_path, name, train, val, vocab_size):
    out = prepare(copy / name / 'prepare.py', cwd=tmp_path)
    assert '1,118,068 characters' in out and f'train has {train:,}' in out and f'val has {val:,}' in out
    dataset = open_dataset(copy / name, quiet)
    assert [len(dataset.splits[s]) for s in ('train', 'val')] == [train, val] and dataset.vocab_size == vocab_size
    kind = tokenizer.load(dataset.tokenizer)
    assert kind.decode(dataset.splits['train'].read(0, 100).tolist()).startswith('First Citizen:\nBefore we proceed')
    before = {path.name: path.read_bytes() for path in (copy / name).iterdir() if path.is_file()}
    prepare(copy / name / 'prepare.py', cwd=tmp_path)
    assert before == {path.name: path.read_bytes() for path in (copy / name).iterdir() if path.is_file()}


def test_the_text_that_ships():
    text = prepare_text.shakespeare()
    assert len(text) == 1_118_068 and len(set(text)) == 64
    assert text.startswith('First Citizen:\n') and text.endswith('Whiles thou art waking.\n')
    assert '[' not in text and '_' not in text and '\n\n\n' not in text and not any(
        line != line.rstrip() for line in text.split('\n'))


def test_prepare_of_any_text(tmp_path):
    text = 'ab\u00e9\n' * 25 + 'zz'
    (tmp_path / 'my.txt').write_text(text, encoding='utf-8')
    prepare(ROOT / 'data/shakespeare_char/prepare.py', '--input=my.txt', '--out=made/deep', cwd=tmp_path)
    dataset = open_dataset(tmp_path / 'made' / 'deep', quiet)
    assert dataset.tokenizer['chars'] == ['\n', 'a', 'b', 'z', '\u00e9'] and dataset.tokenizer['source'] == 'my.txt'
    decode = tokenizer.load(dataset.tokenizer).decode
    parts = [decode(dataset.splits[split].read(0, len(dataset.splits[split])).tolist()) for split in ('train', 'val')]
    assert parts == [text[:91], text[91:]]                      # int(102 * 0.9) characters for training


def test_line_ends_are_kept(tmp_path):
    (tmp_path / 'dos.txt').write_bytes(b'a\r\nb\r\n' * 9)
    assert '\r' in prepare_text.read_text(tmp_path / 'dos.txt')


def test_another_input_is_refused_and_the_canonical_one_used(copy, tmp_path, monkeypatch):
    (copy / 'shakespeare' / 'input.txt').write_text('not Shakespeare')
    line = prepare(copy / 'shakespeare' / 'prepare.py', code=2)
    assert line.count('\n') == 1 and 'canonical' in line and f'--input={copy}/shakespeare/input.txt' in line
    assert not list(copy.glob('shakespeare/*.bin'))
    monkeypatch.setattr(prepare_text, 'CANONICAL_SHA256', hashlib.sha256(b'not Shakespeare').hexdigest())
    text, source = prepare_text.choose_text(copy / 'shakespeare')
    assert text == 'not Shakespeare' and 'canonical' in source


@pytest.mark.parametrize('data, word', [(None, 'no such file'), (b'', 'two characters'), (b'abc\xff', '0xff at 3')])
def test_texts_that_are_none(tmp_path, data, word):
    if data is not None:
        (tmp_path / 'x.txt').write_bytes(data)
    line = prepare(ROOT / 'data/shakespeare_char/prepare.py', f'--input={tmp_path}/x.txt', f'--out={tmp_path}/o',
                   code=2)
    assert line.count('\n') == 1 and word in line and 'x.txt' in line and not (tmp_path / 'o').exists()


def test_an_option_that_nobody_knows(tmp_path):
    assert '--inputs' in prepare(ROOT / 'data/shakespeare_char/prepare.py', '--inputs=x', f'--out={tmp_path}', code=2)
    (tmp_path / 'file').touch()
    assert 'file' in prepare(ROOT / 'data/shakespeare_char/prepare.py', f'--out={tmp_path}/file/x', code=2)


def test_only_the_loader_imports_torch():
    check = 'import sys, data.prepare_text, data.dataset, data.tokenizer; sys.exit("torch" in sys.modules)'
    assert subprocess.run([sys.executable, '-c', check], cwd=ROOT).returncode == 0


def test_canonical_tiny_shakespeare(tmp_path):
    """nanoGPT's own counts, when the text is at hand."""
    places = [os.environ.get('NANOKRON_TINYSHAKESPEARE', ''), ROOT / 'data/shakespeare_char/input.txt']
    found = next((Path(p) for p in places if p and Path(p).is_file()), None)
    if found is None:
        pytest.skip('set NANOKRON_TINYSHAKESPEARE=FILE to the canonical input.txt')
    shutil.copy(found, tmp_path / 'input.txt')
    for kind, counts in (('char', [1_003_854, 111_540]), ('gpt2', [301_966, 36_059])):
        text, source = prepare_text.choose_text(tmp_path)
        prepare_text.prepare(text, source, kind, tmp_path / kind)
        dataset = open_dataset(tmp_path / kind, quiet)
        assert [len(dataset.splits[split]) for split in ('train', 'val')] == counts
        assert dataset.vocab_size == (65 if kind == 'char' else 50257) and 'tiny shakespeare' in source
