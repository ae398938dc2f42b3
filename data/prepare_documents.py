"""Shared by the prepare.py of wikitext, fineweb and openwebtext: documents -> GPT-2 tokens -> shards. Imports no torch.

<|endoftext|> stands before each document. A shard is full at --shard_tokens; a document may continue in the next one.
Shards are written to the hidden folder .parts, with a record of progress; when all are complete, meta.json is written and
they are moved into place. An interrupted run resumes after its last full shard, and ends with the same bytes.
"""
import argparse
import json
from dataclasses import dataclass
from pathlib import Path

from data import prepare_joined, tokenizer, workers
from data.dataset import FORMAT, check_meta, read_meta
from data.documents import Documents, in_files, on_hub
from data.shard_writer import ShardWriter
from data.shards import MOST_TOKENS, check_space, refuse, write_atomic
from variants import UserError

UNITS = {'K': 10**3, 'M': 10**6, 'B': 10**9}
BYTES_PER_TOKEN, TOKENS_PER_BYTE = 2, 0.7           # of a shard; of a compressed file, at most


@dataclass
class Recipe:
    """A data set of documents: where it is on the hub, and how it is split."""
    folder: Path                            # the script's
    load: object                            # datasets.load_dataset
    path: str                               # on the hub
    names: tuple                            # configurations there, the default first; () for none
    size: float                             # total tokens, approximately, to check the disk space
    splits: dict | None = None              # our name -> the published one; None: the beginning is for validation,
    val_documents: int = 0                  # ... this many documents, or 0: one shard
    begins: object = None                   # as in documents.Documents
    joined: str = ''                        # the name whose lines --tokenizer joins; '': it takes no --tokenizer


@dataclass
class Phase:
    """One split."""
    split: str
    sources: list
    most_tokens: int | None = None
    most_documents: int | None = None
    goes_on: bool = False                   # the next phase continues in the same sources


def phases_of(recipe, args):
    """[Phase] in the order in which they are made; raises UserError when local files are missing."""
    local = in_files(args.input, recipe.splits is not None) if args.input else None
    if recipe.splits is None:
        sources = local or [on_hub(recipe.path, args.name, 'train')]
        tokens, documents = (None, args.val_documents) if recipe.val_documents else (args.shard_tokens, None)
        return [Phase('val', sources, tokens, documents, goes_on=True), Phase('train', sources, args.tokens)]
    if local:
        found = {split: [s for s in local if published[:5] in Path(s.name).name.lower()]
                 for split, published in recipe.splits.items()}
        missing = [split for split in ('train', 'val') if not found[split]]
        others = [Path(s.name).name for s in local if not any(s in chosen for chosen in found.values())]
        if others:
            print(f'not read, for their names hold none of train, valid and test: {", ".join(others)[:200]}', flush=True)
        if missing:
            refuse(args.input, 'files whose names hold train and valid (and test)', f'none for {" and ".join(missing)}')
    else:
        found = {split: [on_hub(recipe.path, args.name, published)] for split, published in recipe.splits.items()}
    return [Phase(split, sources, args.tokens if split == 'train' else None) for split, sources in found.items() if sources]


def main(recipe, argv=None):
    """The whole of a prepare.py: a user error is reported in one line and ends the program with exit code 2."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description=f'Make shards of tokens of {recipe.path}.')
    say, name = parser.add_argument, recipe.names[0] if recipe.names else None
    say('--tokenizer', metavar='PLACE', help="a model's tokens, with --out=DIR: a tokenizer.json, a folder with one, or a "
        f'.gguf; each split is one text of joined lines then, and --name is {recipe.joined}'
        if recipe.joined else argparse.SUPPRESS)
    say('--input', metavar='FILE_OR_FOLDER', help='local files of the same form: parquet, json, jsonl, arrow, txt, '
        'packed or not (default: streamed from the hub)')
    say('--name', choices=recipe.names or None, help=f'which one (default: {name})')
    say('--tokens', metavar='N', help='most training tokens, such as 1B (default: all)')
    say('--shard_tokens', metavar='N', default='100M', help='tokens per shard (default: 100M)')
    say('--val_documents', metavar='N', default=str(recipe.val_documents), help='first documents, held out for validation'
        if recipe.val_documents else argparse.SUPPRESS)
    say('--column', default='text', metavar='NAME', help='column of the text (default: text)')
    say('--vocab_size', type=int, default=tokenizer.MOST_GPT2, metavar='N', help='the first N - 1 tokens of GPT-2 and '
        f'<|endoftext|> (default: {tokenizer.MOST_GPT2})')
    say('--out', metavar='DIR', default=recipe.folder, help='where to write (default: beside the script)')
    say('--processes', type=int, default=workers.cores(), metavar='N', help='default: all cores')
    args = parser.parse_args(argv)
    args.name = args.name or (recipe.joined if args.tokenizer else name)
    workers.run_prepare(prepare, recipe, args)


def number(text, option, low=1, most=10**15):
    """'100M' -> 100000000; raises UserError unless it is a whole number from `low` to `most`."""
    digits, unit = (text[:-1], UNITS[text[-1].upper()]) if text[-1:].upper() in UNITS else (text, 1)
    try:
        value = round(float(digits) * unit)
    except (ValueError, OverflowError):
        value = low - 1
    if not low <= value <= most:
        raise UserError(f'--{option}={text}: expected a number from {low} to {most:,} such as 1000, 100M or 1B')
    return value


def prepare(recipe, args):
    """Run the phases, from where an earlier run stopped, and finish the folder."""
    args.shard_tokens = number(args.shard_tokens, 'shard_tokens', most=MOST_TOKENS)
    args.tokens = None if args.tokens is None else number(args.tokens, 'tokens')
    args.val_documents = number(args.val_documents, 'val_documents', low=min(1, recipe.val_documents))
    if args.tokenizer:
        prepare_joined.prepare(recipe, checked(recipe, args), phases_of(recipe, args))
        return
    described = {'tokenizer': 'gpt2', 'vocab_size': args.vocab_size, 'source': f'{recipe.path} {args.name or ""}'.strip()}
    tokenizer.load(described)
    phases = phases_of(recipe, args)
    bytes_depend_on = what_matters(phases, args, described['source'])
    out = Path(args.out)
    if is_done(out, bytes_depend_on):
        print(f'{out} is prepared already')
        return
    ask_for_room(out, recipe, phases, args)
    print(f'reading {", ".join(dict.fromkeys(s.name for phase in phases for s in phase.sources))[:200]}', flush=True)
    writer = ShardWriter(out / '.parts', recipe.folder.name, bytes_depend_on)
    for phase in phases[writer.state['phase']:]:
        documents = Documents(phase.sources, recipe.load, args.column, recipe.begins, writer.state['at']['position'])
        writer.fill(phase, documents, args.processes)
    finish(out, writer, described)


def checked(recipe, args):
    """The options where the lines of a split are joined; raises UserError for one that has no meaning then."""
    if not recipe.joined:
        raise UserError(f'--tokenizer is for lines that are joined, and {recipe.path} has documents; leave it out')
    for name, usual in (('shard_tokens', number('100M', 'shard_tokens')), ('vocab_size', tokenizer.MOST_GPT2)):
        if getattr(args, name) != usual:
            raise UserError(f'--{name} does not go with --tokenizer; leave it out')
    return args


def what_matters(phases, args, source):
    """What the bytes of the shards depend on, as JSON keeps it."""
    files = [[phase.split, Path(s.name).name, s.size] for phase in phases for s in phase.sources]
    return {'version': 1, 'source': source, 'files': files, 'column': args.column, 'vocab_size': args.vocab_size,
            'shard_tokens': args.shard_tokens, 'tokens': args.tokens, 'val_documents': args.val_documents}


def ask_for_room(out, recipe, phases, args):
    """Raise UserError unless the disk has room for the shards."""
    local = {s.name: s.size for phase in phases for s in phase.sources}
    tokens = sum(local.values()) * TOKENS_PER_BYTE or recipe.size
    if args.tokens:
        tokens = min(tokens, args.tokens + args.shard_tokens)
    there = sum(path.stat().st_size for path in (out / '.parts').glob('*.bin'))
    check_space(out, tokens * BYTES_PER_TOKEN - there)


def is_done(out, bytes_depend_on):
    """Whether the folder already has the result, by names and sizes."""
    try:
        meta = read_meta(out) or {}
    except UserError:
        return False
    entries = [entry for content in meta.get('splits', {}).values() for entry in content['files']]
    return meta.get('made_from') == bytes_depend_on and all(
        (out / e['name']).is_file() and (out / e['name']).stat().st_size == e['size'] for e in entries)


def finish(out, writer, described):
    """Move the shards into place, write meta.json, and delete the parts and the shards of earlier settings."""
    state = writer.state
    splits = {split: {'tokens': writer.tokens(split), 'files': state['files'][split]}
              for split in ('train', 'val', 'test') if split in state['files']}
    for split in ('train', 'val'):
        if split not in splits:
            writer.remove()
            refuse(out, f'documents for {split}', 'none', 'give more of them, or a smaller --shard_tokens (fineweb) or '
                   '--val_documents (openwebtext)')
    meta = {'format': FORMAT, **described, 'documents': state['documents'], 'empty_documents': state['empty'],
            'made_from': state['recipe'], 'splits': splits}
    check_meta(meta)
    names = {entry['name'] for content in splits.values() for entry in content['files']}
    write_atomic(out / 'meta.json', json.dumps(meta, ensure_ascii=False, indent=1).encode('utf-8'))
    for name in sorted(names):
        if (writer.folder / name).exists():                         # else a run that was killed here moved it
            (writer.folder / name).replace(out / name)
    for old in out.glob(f'{writer.name}_*_??????.bin'):
        if old.name not in names:
            old.unlink()
    writer.remove()
    for split, content in splits.items():
        print(f'{split} has {content["tokens"]:,} tokens of {state["documents"][split]:,} documents in '
              f'{len(content["files"])} files')
    print(f'{state["empty"]:,} empty documents were left out')
