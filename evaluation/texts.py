"""What is evaluated, as tokens: a file of text, a split of a data set, a published test text. Imports no torch."""
import dataclasses
import os
import re
from dataclasses import dataclass
from pathlib import Path

from sampling.words import Numbers, load_tokenizer
from variants import UserError

# name -> its data set on the Hugging Face hub and the configuration there; the test split is taken
BENCHMARKS = {'wikitext2': ('Salesforce/wikitext', 'wikitext-2-raw-v1'),
              'wikitext103': ('Salesforce/wikitext', 'wikitext-103-raw-v1'),
              'lambada': ('EleutherAI/lambada_openai', 'default')}


@dataclass
class Source:
    """What is evaluated: `count` tokens, read(start, stop) -> int64 array, and what is known about them."""
    name: str
    read: object
    count: int
    tokenizer: object
    bytes: int | None                                   # of the whole text in UTF-8; None where tokens are not text
    train: object = None                                # the training split's data.shards.Tokens, for the unigram
    words: int | None = None                            # of the whole text, between white space


def open_source(config, data, vocab_size, note):
    """The Source of --text, --dataset or --benchmark for a model with these rows; data: the meta of its tokenizer or None.

    note: called with one line where something is assumed. Raises UserError in one line.
    """
    dataset = open_data(config, data, vocab_size, note) if config.dataset else None
    if config.text or config.benchmark:
        return open_text(config, data, vocab_size, dataset, note)
    if config.split not in dataset.splits:
        raise UserError(f'{dataset.folder} has no split {config.split!r}; it has {", ".join(dataset.splits)}', 'split')
    from data import tokenizer
    tokens, kind = dataset.splits[config.split], tokenizer.load(dataset.tokenizer)
    text = None if hasattr(kind, 'centres') else kind.decode(tokens.read(0, len(tokens)).tolist())
    return Source(f'{dataset.folder}, split {config.split}', tokens.read, len(tokens), kind, *sizes(text)[:1],
                  dataset.splits['train'], *sizes(text)[1:])


def sizes(text):
    """(bytes in UTF-8, words between white space) of a text; (None, None) of None."""
    return (None, None) if text is None else (len(text.encode()), len(text.split()))


def open_data(config, data, vocab_size, note):
    """The data set, checked whole, when its tokens are those of the model."""
    from data import identity
    from data.dataset import open_dataset
    dataset = open_dataset(os.path.join(config.data_dir, config.dataset), note)
    identity.check(data, vocab_size, dataset.tokenizer, dataset.folder, config.out_dir, note)
    return dataset


def tokenizer_of(config, data, vocab_size, note):
    """The tokenizer of the model or of --dataset; raises UserError where none is known."""
    kind = load_tokenizer(config, data, vocab_size, note)
    if isinstance(kind, Numbers):
        raise UserError(f'nothing says what the {vocab_size} tokens of {config.out_dir} mean; pass --dataset=NAME, whose '
                        'tokenizer it has (prepare.py --tokenizer=tokenizer.json makes one)', 'dataset')
    return kind


def open_text(config, data, vocab_size, dataset, note):
    """The Source of a text; dataset: whose training split is the unigram's, or None."""
    import numpy as np

    from data import tokenizer
    from data.prepare_joined import joined
    from data.prepare_text import read_text
    kind = tokenizer.load(dataset.tokenizer) if dataset else tokenizer_of(config, data, vocab_size, note)
    if config.benchmark:                                # with the tokens in front that the tokenizer itself puts there
        text = joined(rows_of(config.benchmark, config.text))
        tokens = np.asarray(kind.encode(text), np.int64)
    else:
        text = read_text(config.text)
        tokens = np.asarray(kind.encode_ordinary(text), np.int64)
    size, words = sizes(None if hasattr(kind, 'centres') else text)
    name = ', '.join(filter(None, (config.benchmark, config.text)))
    return Source(name, lambda start, stop: tokens[start:stop], len(tokens), kind, size,
                  dataset.splits['train'] if dataset else None, words)


def rows_of(name, place=''):
    """The rows of a published test text: its lines (wikitext), its passages (lambada).

    place: a file or folder with them (of a folder the files whose names hold `test`, where there are some); '': the hub.
    Needs the package datasets. Raises UserError where neither can be read.
    """
    from datasets import load_dataset

    from data import documents
    if place:
        found = documents.in_files(place, lines=True, notice=lambda line: None)
        sources = [source for source in found if re.search('test', Path(source.name).name.lower())] or found
    else:
        remedy = 'it needs the network; without one, pass its files by --text=FILE_OR_FOLDER'
        sources = [dataclasses.replace(documents.on_hub(*BENCHMARKS[name], 'test'), remedy=remedy)]
    return list(documents.Documents(sources, load_dataset))


def prefixed(source, token):
    """The Source with one token in front, so that all of its own can be scored."""
    import numpy as np

    def read(start, stop):
        rest = source.read(max(start - 1, 0), max(stop - 1, 0))
        return np.concatenate(([token], rest)).astype(np.int64) if start == 0 else rest
    return dataclasses.replace(source, read=read, count=source.count + 1)

