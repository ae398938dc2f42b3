"""Our own tokenizers as a tokenizer.json, which transformers reads too: characters, bytes, GPT-2's byte pairs.

transformers leaves out characters that the table lacks, where data/tokenizer.py refuses them. No torch here.
"""
import functools
import json

from data import tokenizer

BYTES = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True, 'use_regex': True}


def text_of(described):
    """The text of a tokenizer.json with the tokens of a description; None for a kind that has no such form (prices)."""
    maker = MAKERS.get(described['tokenizer'])
    return maker and maker(described)


def of_chars(described):
    return whole({char: number for number, char in enumerate(described['chars'])}, decoder={'type': 'Fuse'})


def of_bytes(described):
    letters = {letter: byte for byte, letter in tokenizer.gpt2_bytes()}
    return whole(letters, cuts={**BYTES, 'use_regex': False}, decoder=BYTES)


def of_gpt2_files(folder):
    """The text for the two older files of a GPT-2's tokenizer, vocab.json and merges.txt; raises OSError and ValueError."""
    vocabulary = json.loads((folder / 'vocab.json').read_text(encoding='utf-8'))
    lines = (folder / 'merges.txt').read_text(encoding='utf-8').splitlines()
    if not isinstance(vocabulary, dict) or not all(type(number) is int for number in vocabulary.values()):
        raise ValueError('vocab.json is no dict of tokens')
    merges = [line.split(' ') for line in lines if line and not line.startswith('#version')]
    if not all(len(pair) == 2 and {*pair, ''.join(pair)} <= vocabulary.keys() for pair in merges):
        raise ValueError('merges.txt names tokens that vocab.json lacks')
    end = vocabulary.get(tokenizer.END_OF_TEXT)
    return whole(vocabulary, merges, [] if end is None else [special(tokenizer.END_OF_TEXT, end)], BYTES, BYTES)


def special(word, number):
    return {'id': number, 'content': word, 'single_word': False, 'lstrip': False, 'rstrip': False, 'normalized': False,
            'special': True}


def of_gpt2(described):
    return gpt2_text(described['vocab_size'])


@functools.lru_cache(maxsize=2)
def gpt2_text(size):
    """GPT-2's first size - 1 tokens and <|endoftext|>."""
    merges = [line.split(' ') for line in tokenizer.gpt2_merges().splitlines()[1:] if line]
    merges = merges[:size - tokenizer.FEWEST_GPT2]
    names = [letter for _, letter in tokenizer.gpt2_bytes()] + [''.join(pair) for pair in merges] + [tokenizer.END_OF_TEXT]
    end = special(tokenizer.END_OF_TEXT, size - 1)
    return whole({name: number for number, name in enumerate(names)}, merges, [end], BYTES, BYTES)


def whole(vocabulary, merges=(), added=(), cuts=None, decoder=None):
    model = {'type': 'BPE', 'dropout': None, 'unk_token': None, 'continuing_subword_prefix': None,
             'end_of_word_suffix': None, 'fuse_unk': False, 'byte_fallback': False, 'ignore_merges': False,
             'vocab': vocabulary, 'merges': list(merges)}
    return json.dumps({'version': '1.0', 'truncation': None, 'padding': None, 'added_tokens': list(added),
                       'normalizer': None, 'pre_tokenizer': cuts, 'post_processor': None, 'decoder': decoder,
                       'model': model}, ensure_ascii=False)


MAKERS = {'char': of_chars, 'bytes': of_bytes, 'gpt2': of_gpt2}
