"""Hugging Face tokenizers (tokenizer.json) through the `tokenizers` library: those of pretrained models.

Its text is stored in a data set's meta.json and in checkpoints, so that a fine-tuned model needs no other file:

    {'tokenizer': 'hub', 'vocab_size': 49152, 'json': '{"version": "1.0", ...}', 'source': 'where it came from'}

Imports no torch, and `tokenizers` at first use only.
"""
import functools
import json
from pathlib import Path

from variants import UserError

MOST_BYTES = 1 << 26
INSTALL = 'install it: pip install tokenizers'
BETWEEN_TEXTS = ('<|endoftext|>', '<|begin_of_text|>', '<s>', '</s>')       # the first that a tokenizer has
ANCHOR = 'a'                            # a text put before the text to decode


class HubTokenizer:
    """The tokenizer of a tokenizer.json: byte-pair encoding with any pre-tokenizer, and what else the library has."""
    name = 'hub'

    def __init__(self, meta):
        self.json, self.source = meta.get('json'), str(meta.get('source', 'tokenizer.json'))[:200]
        self.vocab_size = count_tokens(self.json, self.source)

    @property
    def library(self):
        """The library's tokenizer, and the tokens of ANCHOR: built at first use, since a trainer never needs it."""
        return built(self.json, self.source)

    @property
    def end_of_text(self):
        """The token that begins every document of a data set; raises UserError where the tokenizer has none."""
        found = between_texts(self.json)
        if found is None:
            raise UserError(f'the tokenizer of {self.source} has none of {", ".join(BETWEEN_TEXTS)} to put between texts')
        return found[1]

    def encode(self, text):
        """text -> [token] as transformers does: special tokens are recognised, and prepended where it does so."""
        library = self.library[0]
        library.encode_special_tokens = False
        return library.encode(text).ids

    def encode_marked(self, text):
        """text -> [token] with special tokens recognised and none prepended, for the text of a chat template."""
        library = self.library[0]
        library.encode_special_tokens = False
        return library.encode(text, add_special_tokens=False).ids

    def encode_ordinary(self, text):
        """text -> [token] without special tokens: for data sets, whose text may contain anything."""
        library = self.library[0]
        library.encode_special_tokens = True
        return library.encode(text, add_special_tokens=False).ids

    def decode(self, tokens):
        """[token] -> text as a continuation of other text; bytes that are not UTF-8 read as U+FFFD.

        (At the start of a text some decoders drop a space. Unknown tokens read as nothing.)
        """
        library, anchor = self.library
        whole = library.decode([*anchor, *tokens], skip_special_tokens=False)
        return whole[len(library.decode(anchor, skip_special_tokens=False)):]


@functools.lru_cache(maxsize=4)
def built(text, source):
    """(tokenizers.Tokenizer of a tokenizer.json's text, the tokens of ANCHOR); raises UserError in one line."""
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise UserError(f'the tokenizer of {source} needs the package tokenizers; {INSTALL}') from None
    try:
        library = Tokenizer.from_str(plain(text))
        return library, library.encode(ANCHOR, add_special_tokens=False).ids
    except Exception as error:                          # the library raises plain Exceptions
        raise UserError(f'{source}: the tokenizers library cannot read it: {str(error)[:120]}') from None


def plain(text):
    """A tokenizer.json's text with truncation, padding and dropout switched off: nobody asks for them here."""
    found, on = json.loads(text), False
    for owner, name in ((found, 'truncation'), (found, 'padding'), (found['model'], 'dropout')):
        on |= owner.get(name) is not None
        owner[name] = None
    return json.dumps(found, ensure_ascii=False) if on else text


@functools.lru_cache(maxsize=4)
def count_tokens(text, source):
    """One more than the largest token of a tokenizer.json's text; raises UserError where it is not valid."""
    try:
        if not isinstance(text, str) or len(text) > MOST_BYTES:
            raise ValueError(f'a text of at most {MOST_BYTES:,} characters is wanted')
        found = json.loads(text)
        vocabulary = found['model']['vocab']
        numbers = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
        return 1 + max([*numbers, *(token['id'] for token in found.get('added_tokens') or ())])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f'{source}: no tokenizer.json with a vocabulary ({type(error).__name__}: '
                        f'{str(error)[:80]})') from None


@functools.lru_cache(maxsize=4)
def between_texts(text):
    """(word, token) between texts, by a tokenizer.json's text: the first of BETWEEN_TEXTS there; or None."""
    known = {token['content']: token['id'] for token in json.loads(text).get('added_tokens') or ()}
    return next(((word, known[word]) for word in BETWEEN_TEXTS if word in known), None)


def describe(text, source):
    """The meta of a tokenizer.json's text. source: for messages."""
    size = count_tokens(text, source)
    return {'tokenizer': HubTokenizer.name, 'vocab_size': size, 'json': plain(text), 'source': source}


def is_gguf(path):
    """Whether a file is a GGUF, by its first bytes."""
    try:
        with open(path, 'rb') as file:
            return file.read(4) == b'GGUF'
    except OSError:
        return False


def read(place):
    """The meta of the tokenizer of a tokenizer.json, of a folder with one, of a .gguf, or of OWNER/NAME on the Hugging Face
    hub; raises UserError."""
    path = Path(place).expanduser()
    if '/' in str(place):
        from checkpoints import hub
        if hub.is_name(str(place)):
            return {**read(hub.fetch(str(place), tokens_only=True)), 'source': str(place)}
    if is_gguf(path):
        from checkpoints import gguf_file
        reader = gguf_file.open_file(path)
        found = gguf_file.tokenizer(reader, path)
        if found is None:
            word = gguf_file.value(reader, 'tokenizer.ggml.model')
            word = 'SentencePiece' if word == 'llama' else repr(word)[:40]
            raise UserError(f'{path}: its tokenizer is {word}, which is not read from a GGUF; pass the tokenizer.json of '
                            'the model that it was made of')
        return describe(found, path.name)
    path = path / 'tokenizer.json' if path.is_dir() else path
    try:
        if path.stat().st_size > MOST_BYTES:
            raise UserError(f'{path}: at most {MOST_BYTES:,} bytes are read')
        return describe(path.read_text(encoding='utf-8'), f'{path.resolve().parent.name}/{path.name}')
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f'{path}: not readable as a tokenizer.json: {getattr(error, "strerror", None) or error}') from None
