"""Whether the tokens of a data set are those of a model: compared wherever both are there, and never guessed by size.

Two descriptions mean the same when their tokens, merges and cuts do; how a file was formatted, where it came from and what
it puts round a text do not count. No torch here.
"""
import functools
import hashlib
import json

from data import tokenizer
from variants import UserError

GPT2 = {'tokenizer': 'gpt2', 'vocab_size': tokenizer.MOST_GPT2}
PADDED_GPT2 = 50304                         # rows of a GPT-2 that nanoGPT pads
BYTES = {'type': 'ByteLevel', 'add_prefix_space': False, 'use_regex': True}
MODEL = {'type': 'BPE', 'byte_fallback': False, 'ignore_merges': False}         # parts that count, and what they are unsaid


def meaning(described):
    """A description without its label, to be compared; a tokenizer.json by its essence, and GPT-2's own is 'gpt2'."""
    if described['tokenizer'] != 'hub':
        return {name: value for name, value in described.items() if name != 'source'}
    found = essence(described['json'])
    return GPT2 if found == gpt2_essence() else {'tokenizer': 'hub', 'essence': found}


@functools.lru_cache(maxsize=8)
def essence(text):
    """SHA-256 of what a tokenizer.json's text makes of a text: tokens, merges, normalizer, cuts."""
    whole = json.loads(text)
    model = whole['model']
    words = model['vocab'] if isinstance(model['vocab'], dict) else dict(enumerate(map(str, model['vocab'])))
    added = {token['content']: token['id'] for token in whole.get('added_tokens') or ()}
    merges = [pair.split(' ') if isinstance(pair, str) else list(pair) for pair in model.get('merges') or ()]
    return hashed({'tokens': {**words, **added}, 'merges': merges, 'normalizer': whole.get('normalizer'),
                   'cuts': cuts(whole.get('pre_tokenizer')), **{k: model.get(k) or v for k, v in MODEL.items()}})


@functools.lru_cache(maxsize=1)
def gpt2_essence():
    """The essence of GPT-2's own tokenizer, from the merges that ship with the repository."""
    merges = [line.split(' ') for line in tokenizer.gpt2_merges().splitlines()[1:] if line]
    names = [letter for _, letter in tokenizer.gpt2_bytes()] + [''.join(pair) for pair in merges] + [tokenizer.END_OF_TEXT]
    return hashed({'tokens': {name: number for number, name in enumerate(names)}, 'merges': merges, 'normalizer': None,
                   'cuts': BYTES, **MODEL})


def hashed(value):
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def cuts(value):
    """A pre_tokenizer without what moves offsets only."""
    if isinstance(value, dict):
        return {name: cuts(part) for name, part in value.items() if name != 'trim_offsets'}
    return [cuts(part) for part in value] if isinstance(value, list) else value


def is_gpt2_size(rows):
    """Whether an embedding has GPT-2's rows, plain or as nanoGPT pads them."""
    return tokenizer.MOST_GPT2 <= rows <= PADDED_GPT2


def check(data, rows, described, folder, where, notice=None):
    """Raise UserError unless a data set's tokens are those of a model.

    data: the model's description or None; rows: of its embedding; described: the data set's, of `folder`; where: the
    model's place. A model that says nothing is GPT-2's by the size of GPT-2, and else has the data set's size, padded or
    not: notice is then called with a line that says what is assumed.
    """
    size = described['vocab_size']
    if data is None and not is_gpt2_size(rows):
        if rows not in (size, -(-size // 64) * 64):
            raise UserError(f'{where} has {rows} tokens and does not say what they mean, and {folder} has {size}; take the '
                            "data that it was trained on (nanoGPT's folder, with its meta.pkl)", 'dataset')
        if notice:
            notice(f'nothing says what the tokens of {where} mean; they are taken as those of {folder}')
        return
    if meaning(tokenizer.describe(data or GPT2)) != meaning(described):
        known = '' if data else ", which are GPT-2's by their number"
        raise UserError(f'the tokens of {folder} mean other things than those of {where}{known}; take its '
                        'own data set, or prepare the text with its tokens: data/shakespeare/prepare.py '
                        f'--input=TEXT --out=FOLDER{tokens_of(data, where)}', 'dataset')
    if size > rows:
        raise UserError(f'{folder} has {size} tokens, the model {rows}', 'dataset')


def tokens_of(data, where):
    """The option of prepare.py that takes a model's tokens, with a blank before it; '' for GPT-2's."""
    if (data or GPT2)['tokenizer'] == 'gpt2':
        return ''
    return f' --tokenizer={where if data["tokenizer"] == "hub" else "THE_FOLDER_OF_ITS_DATA"}'
