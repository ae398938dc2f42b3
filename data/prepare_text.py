"""Shared by the prepare.py of text data sets: choosing the text, splitting it, writing the folder. Imports no torch."""
import argparse
import hashlib
import json
import sys
from pathlib import Path

import numpy as np

from data import hub_tokenizer, tokenizer
from data.dataset import FORMAT, check_meta, tokens_of_folder
from data.shards import reason, write_atomic, write_shard
from variants import UserError

SHAKESPEARE = Path(__file__).resolve().parent / 'shakespeare_char' / 'shakespeare.xz'
SHAKESPEARE_SHA256 = 'dc7b6ce5128267758d47bf05d5d44fa8185030f3493c95fd05ae959c6400f64c'
CANONICAL_SHA256 = '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'


def main(folder, kind, argv=None):
    """Make train.bin, val.bin and meta.json; the whole of a prepare.py. folder: the script's; kind: 'char' or 'gpt2'.

    A user error is reported in one line and ends the program with exit code 2.
    """
    folder = Path(folder).resolve()
    parser = argparse.ArgumentParser(allow_abbrev=False, description=f'Make train.bin, val.bin and meta.json of a text '
                                                                     f'(tokenizer: {kind}).')
    parser.add_argument('--input', metavar='FILE', help='any text in UTF-8 (default: Shakespeare, which is built in)')
    parser.add_argument('--out', metavar='DIR', default=folder, help='where to write (default: beside the script)')
    parser.add_argument('--tokenizer', metavar='PLACE', help='that of a model or of other data instead: a tokenizer.json, '
                        'a folder with one or with a meta.json, or a .gguf')
    args = parser.parse_args(argv)
    try:
        described = named_tokenizer(args.tokenizer) if args.tokenizer else {'tokenizer': kind}
        text, source = choose_text(folder, args.input)
        prepare(text, source, described, args.out)
    except UserError as error:
        sys.exit(complain(error))
    except OSError as error:
        sys.exit(complain(f'{error.filename or args.out}: {reason(error)}'))


def complain(message):
    """Print a user error in one line; returns the exit code 2."""
    print(f'prepare.py: {message}', file=sys.stderr)
    return 2


def named_tokenizer(place):
    """The meta of the tokenizer of a data set's folder, or of what hub_tokenizer.read takes; raises UserError."""
    place = Path(place).expanduser()
    is_data = any((place / name).exists() for name in ('meta.json', 'meta.pkl'))
    return tokens_of_folder(place) if is_data else hub_tokenizer.read(place)


def choose_text(folder, chosen=None):
    """(text, where it comes from): the file `chosen`, else a canonical input.txt in the folder, else the nine plays."""
    if chosen:
        return read_text(chosen), Path(chosen).name
    found = folder / 'input.txt'
    if not found.exists():
        return shakespeare(), 'nine plays of Shakespeare (the text that ships with this repository)'
    sha256 = hashlib.sha256(found.read_bytes()).hexdigest()
    if sha256 != CANONICAL_SHA256:
        raise UserError(f'{found}: expected the canonical tiny shakespeare (SHA-256 {CANONICAL_SHA256[:16]}...), found '
                        f'{sha256[:16]}...; pass --input={found} to use this text')
    print(f'using {found}, the canonical tiny shakespeare')
    return read_text(found), 'tiny shakespeare (the canonical input.txt)'


def read_text(path):
    """A file as text, line ends as they are; raises UserError when it is empty or is not UTF-8."""
    try:
        text = Path(path).expanduser().read_bytes().decode('utf-8')
    except OSError as error:
        raise UserError(f'{path}: expected a text file, found {reason(error)}') from None
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise UserError(f'{path}: expected UTF-8, found byte {byte:#04x} at {error.start:,}') from None
    if len(text) < 2:
        raise UserError(f'{path}: expected two characters or more, found {len(text)}')
    return text


def shakespeare():
    """The built-in text: nine plays in the shape of tiny shakespeare."""
    return tokenizer.unpack(SHAKESPEARE, SHAKESPEARE_SHA256).decode('ascii')


def prepare(text, source, described, out):
    """Split the text 90 : 10 by characters as nanoGPT does, encode the parts, write the folder and print a summary.

    described: the name of a tokenizer, or its meta.
    """
    cut = int(len(text) * 0.9)
    described = {**({'tokenizer': described} if isinstance(described, str) else described), 'source': source}
    kind = described['tokenizer']
    if kind == 'char' and 'chars' not in described:
        described['chars'] = sorted(set(text))
    encoder = tokenizer.load(described)
    described['vocab_size'] = encoder.vocab_size
    print(f'{len(text):,} characters of {source}; vocabulary: {encoder.vocab_size:,} ({kind})')
    meta = write_dataset(out, described, {'train': encoder.encode_ordinary(text[:cut]),
                                          'val': encoder.encode_ordinary(text[cut:])})
    for split, content in meta['splits'].items():
        print(f'{split} has {content["tokens"]:,} tokens')


def write_dataset(out, described, splits):
    """Write one <split>.bin per split and then meta.json into the folder `out`; returns the meta.

    described: what data.tokenizer.load reads, with vocab_size; splits: name -> tokens. Each file is replaced whole,
    meta.json last: a run that dies in between leaves files that open_dataset refuses and another run replaces.
    """
    out = Path(out).expanduser()
    out.mkdir(parents=True, exist_ok=True)
    meta = {'format': FORMAT, **described, 'splits': {}}
    for split, tokens in splits.items():
        entry = write_shard(out / f'{split}.bin', np.asarray(tokens), described['vocab_size'])
        meta['splits'][split] = {'tokens': entry['tokens'], 'files': [entry]}
    check_meta(meta)
    write_atomic(out / 'meta.json', json.dumps(meta, ensure_ascii=False, indent=1).encode('utf-8'))
    return meta
