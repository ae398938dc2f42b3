"""Shared by the prepare.py of enwik8, enwik8_prose and enwik8_prose_4096. Imports no torch.

bytes: one token per byte, the published split 90M / 5M / 5M. prose: markup stripped (wiki_markup.py), GPT-2's byte pairs
or a pretrained model's tokens, each article after <|endoftext|>; of 20 articles in order the 19th is for validation and
the 20th for the test.
"""
import argparse
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data import enwik8_source, hub_tokenizer, tokenizer, wiki_markup, workers
from data.prepare_text import write_dataset
from data.shards import check_space
from variants import UserError

DATA = Path(__file__).resolve().parent
CUTS = {'train': (0, 90_000_000), 'val': (90_000_000, 95_000_000), 'test': (95_000_000, 100_000_000)}
EVERY, HELD_OUT = 20, {18: 'val', 19: 'test'}       # article number modulo EVERY -> split
PAGES_AT_ONCE = 64


def main(form, vocab_size=tokenizer.MOST_GPT2, argv=None):
    """The whole of a prepare.py. form: 'bytes' or 'prose'; vocab_size: tokens of the prose's tokenizer."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description='Make train.bin, val.bin, test.bin and meta.json '
                                     'of enwik8.')
    parser.add_argument('--form', choices=('bytes', 'prose'), default=form, help='bytes, or prose without the markup '
                        f'in byte pairs (default: {form})')
    parser.add_argument('--input', metavar='FILE', help='enwik8, enwik8.zip or enwik8.gz (default: one in data/enwik8, '
                        'else a download)')
    parser.add_argument('--vocab_size', type=int, default=vocab_size, metavar='N', help='tokens of the prose: the first '
                        f'N - 1 of GPT-2 and <|endoftext|> (default: {vocab_size})')
    parser.add_argument('--tokenizer', metavar='PLACE', help="a pretrained model's for the prose, with --out=DIR: a "
                        'tokenizer.json, a folder with one, or a .gguf')
    parser.add_argument('--out', metavar='DIR', help='where to write (default: data/enwik8, data/enwik8_prose or '
                        'data/enwik8_prose_N)')
    parser.add_argument('--processes', type=int, default=workers.cores(), metavar='N', help='default: all cores')
    workers.run_prepare(prepare, parser.parse_args(argv))


def prepare(args):
    """Find enwik8, make the tokens of each split, write the folder and print a summary."""
    if args.tokenizer and (args.form != 'prose' or not args.out):
        raise UserError('--tokenizer is for --form=prose and needs --out=DIR')
    out = Path(args.out) if args.out else DATA / folder_name(args.form, args.vocab_size)
    described = hub_tokenizer.read(args.tokenizer) if args.tokenizer else gpt2(args.vocab_size)
    if args.form == 'prose':
        tokenizer.load(described)                                   # user errors are reported before the download
    check_space(out, 400e6)
    text = enwik8_source.find(DATA / 'enwik8', args.input)
    if args.form == 'bytes':
        described, splits = make_bytes(text)
    else:
        described, splits = make_prose(text.decode('utf-8'), described, args.processes)
    meta = write_dataset(out, described, splits)
    for split, content in meta['splits'].items():
        articles = f' in {described["articles"][split]:,} articles' if 'articles' in described else ''
        print(f'{split} has {content["tokens"]:,} tokens{articles}')


def folder_name(form, vocab_size):
    """The folder below data/ where train.py looks for it."""
    if form == 'bytes':
        return 'enwik8'
    return 'enwik8_prose' if vocab_size == tokenizer.MOST_GPT2 else f'enwik8_prose_{vocab_size}'


def make_bytes(text):
    """(description, split -> tokens) of the published byte-level task."""
    numbers = np.frombuffer(text, np.uint8)
    described = {'tokenizer': 'bytes', 'vocab_size': 256, 'source': 'enwik8, bytes'}
    return described, {split: numbers[start:stop] for split, (start, stop) in CUTS.items()}


def gpt2(vocab_size):
    """The meta of GPT-2's tokenizer with so many tokens."""
    return {'tokenizer': 'gpt2', 'vocab_size': vocab_size}


def make_prose(xml, meta, processes):
    """(description, split -> tokens) of the articles without markup. About 15 s on 2 cores.

    meta: of a tokenizer, or the vocab_size of GPT-2's.
    """
    meta, found = gpt2(meta) if isinstance(meta, int) else meta, list(wiki_markup.pages(xml))
    jobs = [(found[k:k + PAGES_AT_ONCE], meta) for k in range(0, len(found), PAGES_AT_ONCE)]
    results = tqdm(workers.in_order(encode_pages, jobs, processes), 'enwik8 prose', len(jobs), False, disable=None)
    articles = [article for chunk in results for article in chunk]
    described = {**meta, 'source': 'enwik8, articles without markup'}
    dealt = {'train': [], 'val': [], 'test': []}
    for number, (tokens, _) in enumerate(articles):
        dealt[HELD_OUT.get(number % EVERY, 'train')].append(tokens)
    described['articles'] = {split: len(content) for split, content in dealt.items()}
    print(f'{len(articles):,} articles, {sum(size for _, size in articles):,} bytes of prose, '
          f'{sum(len(tokens) for tokens, _ in articles):,} tokens of {meta["vocab_size"]:,}')
    return described, {split: np.concatenate(content) for split, content in dealt.items() if content}


def encode_pages(job):
    """[(tokens of an article after <|endoftext|>, its bytes)] of the pages that are long enough."""
    pages, meta = job
    encoder = tokenizer.load(meta)
    found = []
    for text in (wiki_markup.article(*page) for page in pages):
        if text:
            tokens = [encoder.end_of_text, *encoder.encode_ordinary(text)]
            found.append((np.array(tokens, np.uint32), len(text.encode('utf-8'))))
    return found
