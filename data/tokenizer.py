"""Text <-> tokens: characters, GPT-2's byte pairs, bytes, a tokenizer.json; each rebuilt from a dict. Imports no torch.

The dict is stored in a data set's meta.json and in every checkpoint, so that sampling needs no data folder:

    {'tokenizer': 'char', 'vocab_size': 3, 'chars': ['a', 'b', 'c'], 'source': 'where the text came from'}
    {'tokenizer': 'gpt2', 'vocab_size': 50257}          {'tokenizer': 'bytes', 'vocab_size': 256}

'gpt2' takes any vocab_size from 257 to 50257: the first merges of GPT-2, and <|endoftext|> as the last token.
"""
import functools
import hashlib
import lzma
from pathlib import Path

from data.hub_tokenizer import HubTokenizer
from data.prices.returns import PriceTokenizer
from variants import UserError, did_you_mean

GPT2_MERGES = Path(__file__).resolve().parent / 'gpt2_vocab' / 'vocab.bpe.xz'
GPT2_MERGES_SHA256 = '1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5'
END_OF_TEXT = '<|endoftext|>'
FEWEST_GPT2, MOST_GPT2 = 257, 50257         # 256 bytes and <|endoftext|>; and all 50,000 merges besides
MOST_CHARACTERS = 0x110000                  # all of Unicode
UNKNOWN = '\ufffd'                          # text of a token outside the vocabulary (in padded models)


class CharTokenizer:
    """One token per character, numbered as in the table. meta: 'chars', and 'source' for messages."""
    name = 'char'

    def __init__(self, meta):
        self.chars = check_chars(meta)
        self.source = str(meta.get('source', 'the training text'))[:200]
        self.vocab_size = len(self.chars)
        self.numbers = {char: number for number, char in enumerate(self.chars)}

    def encode(self, text):
        """text -> [token]; raises UserError naming the first character that the table lacks."""
        try:
            return [self.numbers[char] for char in text]
        except KeyError as error:
            raise UserError(f'the character {error.args[0]!r} is not among the {self.vocab_size} of the vocabulary, '
                            f'which comes from {self.source}; leave it out') from None

    encode_ordinary = encode

    def decode(self, tokens):
        """[token] -> text."""
        return ''.join(self.chars[t] if 0 <= t < self.vocab_size else UNKNOWN for t in tokens)


class ByteTokenizer:
    """One token per byte of UTF-8."""
    name = 'bytes'
    vocab_size = 256

    def __init__(self, meta):
        pass

    def encode(self, text):
        """text -> [token]."""
        return list(text.encode('utf-8', errors='surrogatepass'))

    encode_ordinary = encode

    def decode(self, tokens):
        """[token] -> text; bytes that are not UTF-8 read as U+FFFD."""
        return bytes(t if 0 <= t < 256 else 0xff for t in tokens).decode('utf-8', errors='replace')


class GPT2Tokenizer:
    """GPT-2's byte-pair encoding through tiktoken, from the merges in gpt2_vocab/; needs no network.

    vocab_size N < 50257: the first N - 1 ranks, which are a byte-pair encoding by themselves, since a merge comes after
    the two tokens that it joins; for small models. The last token, N - 1, is always <|endoftext|>.
    """
    name = 'gpt2'

    def __init__(self, meta):
        self.vocab_size = meta.get('vocab_size', MOST_GPT2)
        if type(self.vocab_size) is not int or not FEWEST_GPT2 <= self.vocab_size <= MOST_GPT2:
            raise UserError(f"'vocab_size' is {short(self.vocab_size)}, but a gpt2 tokenizer has from {FEWEST_GPT2} to "
                            f'{MOST_GPT2} tokens')

    @property
    def encoding(self):
        return gpt2_encoding(self.vocab_size)       # built at first use: a trainer never needs it

    @property
    def end_of_text(self):
        """The token of <|endoftext|>, which begins every document of a data set."""
        return self.vocab_size - 1

    def encode(self, text):
        """text -> [token]; `<|endoftext|>` is the one special token, as in nanoGPT's sample.py."""
        return self.encoding.encode(text, allowed_special={END_OF_TEXT}, disallowed_special=())

    def encode_ordinary(self, text):
        """text -> [token] without special tokens: for data sets, whose text may contain anything."""
        return self.encoding.encode_ordinary(text)

    def decode(self, tokens):
        """[token] -> text; bytes that are not UTF-8 read as U+FFFD."""
        known = [t if 0 <= t < self.vocab_size else None for t in tokens]
        return b''.join(UNKNOWN.encode() if t is None else self.encoding.decode_single_token_bytes(t)
                        for t in known).decode('utf-8', errors='replace')


TOKENIZERS = {kind.name: kind for kind in (CharTokenizer, GPT2Tokenizer, ByteTokenizer, PriceTokenizer, HubTokenizer)}


def load(meta):
    """The tokenizer that a dict (of meta.json or of a checkpoint) describes: .name .vocab_size .encode .decode.

    Raises UserError in one line for an invalid dict; unknown keys are ignored.
    """
    if not isinstance(meta, dict):
        raise UserError(f'the description of a tokenizer is a dict, not {type(meta).__name__}')
    name = meta.get('tokenizer')
    if not isinstance(name, str) or name not in TOKENIZERS:
        raise UserError(f"'tokenizer' is {short(name)}, not one of {', '.join(TOKENIZERS)}"
                        f'{did_you_mean(name[:40], TOKENIZERS) if isinstance(name, str) else ""}')
    tokenizer = TOKENIZERS[name](meta)
    size = meta.get('vocab_size', tokenizer.vocab_size)
    if type(size) is not int or size != tokenizer.vocab_size:
        raise UserError(f"'vocab_size' is {short(size)}, but this {name} tokenizer has {tokenizer.vocab_size} tokens")
    return tokenizer


def describe(meta):
    """The part of a meta that defines its tokens: what load() reads, and nothing else."""
    return {key: meta[key] for key in ('tokenizer', 'vocab_size', 'chars', 'returns', 'json', 'source') if key in meta}


def short(value):
    """A value of unknown size and type, for a message of one line."""
    text = repr(value) if isinstance(value, str | int | float | bool | None) else f'a {type(value).__name__}'
    return text if len(text) <= 60 else f'{text[:57]}...'


def check_chars(meta):
    """meta['chars'] when it is a list of different single characters; raises UserError."""
    chars = meta.get('chars')
    if not isinstance(chars, list) or not 1 <= len(chars) <= MOST_CHARACTERS:
        size = f'{len(chars):,} items' if isinstance(chars, list) else short(chars)
        raise UserError(f"'chars' is {size}, not a list of 1 to {MOST_CHARACTERS:,} characters")
    seen = set()
    for char in chars:
        if not isinstance(char, str) or len(char) != 1 or '\ud800' <= char <= '\udfff':
            raise UserError(f"'chars' holds {short(char)}, which is not one character")
        if char in seen:
            raise UserError(f"'chars' holds {char!r} twice")
        seen.add(char)
    return chars


def gpt2_pattern():
    """GPT-2's splitting of text into pieces (tiktoken's regular expressions): merges never cross their borders."""
    return '|'.join((
        r"'(?:[sdmt]|ll|ve|re)",            # English contractions
        r' ?\p{L}+',                        # a word with the space before it
        r' ?\p{N}+',                        # a number
        r' ?[^\s\p{L}\p{N}]+',              # punctuation
        r'\s+(?!\S)',                       # white space, but for the last one before a word
        r'\s+',
    ))


def gpt2_bytes():
    """[(byte, its letter in vocab.bpe)] in the order of the first 256 tokens.

    Bytes that print in Latin-1 stand for themselves and come first; the others are written as U+0100 and on.
    """
    printing = [*range(0x21, 0x7f), *range(0xa1, 0xad), *range(0xae, 0x100)]
    others = [byte for byte in range(256) if byte not in printing]
    return [(byte, chr(byte)) for byte in printing] + [(byte, chr(256 + k)) for k, byte in enumerate(others)]


@functools.lru_cache(maxsize=4)
def gpt2_encoding(vocab_size=MOST_GPT2):
    """tiktoken's Encoding of GPT-2 from the vendored merges: 256 bytes, 50,000 merges, <|endoftext|>; about 0.2 s.

    vocab_size: tokens; the last merges are left out where it is smaller, and <|endoftext|> is token vocab_size - 1.

    Raises UserError when the file is missing or is not the published one.
    """
    import tiktoken
    letters = gpt2_bytes()
    ranks = {bytes([byte]): rank for rank, (byte, _) in enumerate(letters)}
    byte_of = {letter: byte for byte, letter in letters}
    merges = gpt2_merges().splitlines()[1:]                         # the first line is a version
    for line in merges[:vocab_size - FEWEST_GPT2]:
        ranks[bytes(byte_of[letter] for letter in line.replace(' ', ''))] = len(ranks)
    return tiktoken.Encoding('gpt2', pat_str=gpt2_pattern(), mergeable_ranks=ranks, explicit_n_vocab=vocab_size,
                             special_tokens={END_OF_TEXT: vocab_size - 1})


def gpt2_merges():
    """The text of vocab.bpe, its SHA-256 checked."""
    return unpack(GPT2_MERGES, GPT2_MERGES_SHA256).decode('utf-8')


def unpack(path, sha256):
    """The bytes of an .xz file in the repository; raises UserError unless they have this SHA-256."""
    try:
        data = lzma.decompress(Path(path).read_bytes())
    except (OSError, lzma.LZMAError) as error:
        raise UserError(f'{path}: cannot be read ({error}); restore it from the repository') from None
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise UserError(f'{path}: expected SHA-256 {sha256[:16]}..., found {found[:16]}...; restore it from the '
                        'repository')
    return data
