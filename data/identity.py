"""Whether the tokens of a data set are those of a model: compared wherever both are there, and never guessed by size.

Two descriptions mean the same when their tokens, merges and cuts do; how a file was formatted, where it came from and what
it puts round a text do not count. No torch here.
"""
import functools
import hashlib
import json
import re
import shlex
from pathlib import Path

from data import tokenizer, tokenizer_json
from variants import UserError

ROOT = Path(__file__).resolve().parents[1]
GPT2 = {'tokenizer': 'gpt2', 'vocab_size': tokenizer.MOST_GPT2}
PADDED_GPT2 = 50304                         # rows of a GPT-2 that nanoGPT pads
MODEL = {'type': 'BPE', 'byte_fallback': False, 'ignore_merges': False}         # parts that count, and what they are unsaid


def known(described):
    """A description of a tokenizer.json by its shorter name where it is characters, bytes or GPT-2's; else itself."""
    if described['tokenizer'] != 'hub':
        return described
    text, size = described['json'], described['vocab_size']
    for other in candidates(json.loads(text), size):
        if essence(tokenizer_json.text_of(other)) == essence(text):
            return {**other, 'source': described.get('source', '')}
    return described


def candidates(whole, size):
    """The descriptions of our own kinds that a tokenizer.json could be, by its numbers alone."""
    words = whole['model']['vocab']
    if tokenizer.FEWEST_GPT2 <= size <= tokenizer.MOST_GPT2 and whole['model'].get('merges'):
        yield {'tokenizer': 'gpt2', 'vocab_size': size}
    if isinstance(words, dict) and not whole['model'].get('merges') and sorted(words.values()) == list(range(size)):
        yield {'tokenizer': 'bytes', 'vocab_size': 256}
        if all(len(word) == 1 for word in words):
            yield {'tokenizer': 'char', 'vocab_size': size, 'chars': sorted(words, key=words.get)}


def meaning(described):
    """A description without its label, to be compared; a tokenizer.json by its essence."""
    described = known(described)
    if described['tokenizer'] == 'hub':
        return {'tokenizer': 'hub', 'essence': essence(described['json'])}
    return {name: value for name, value in described.items() if name != 'source'}


@functools.lru_cache(maxsize=8)
def essence(text):
    """SHA-256 of what a tokenizer.json's text makes of a text: tokens, merges, normalizer, cuts."""
    whole = json.loads(text)
    model = whole['model']
    words = model['vocab'] if isinstance(model['vocab'], dict) else dict(enumerate(map(str, model['vocab'])))
    added = {token['content']: token['id'] for token in whole.get('added_tokens') or ()}
    merges = [pair.split(' ') if isinstance(pair, str) else list(pair) for pair in model.get('merges') or ()]
    kept = json.dumps({'tokens': {**words, **added}, 'merges': merges, 'normalizer': whole.get('normalizer'),
                       'cuts': cuts(whole.get('pre_tokenizer')), **{k: model.get(k) or v for k, v in MODEL.items()}},
                      sort_keys=True)
    return hashlib.sha256(kept.encode()).hexdigest()


def refuse_odd(described, where):
    """Raise UserError for a description, of a checkpoint, that describes no tokens; None is none."""
    if described is None:
        return
    try:
        tokenizer.load(described)
        if described['tokenizer'] == 'hub':
            essence(described['json'])
    except UserError as error:
        raise UserError(f'{where}: {error}', 'init_from') from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f'{where}: its tokenizer.json is none ({type(error).__name__}: {str(error)[:80]})',
                        'init_from') from None


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
        raise UserError(f'the tokens of {folder} mean other things than those of {where}{known}; take its own data set, or '
                        f'prepare the text with its tokens: {remedy(data, where, folder)}', 'dataset')
    if size > rows:
        raise UserError(f'{folder} has {size} tokens, the model {rows}', 'dataset')


# data sets whose prepare.py takes --tokenizer, and the one that takes GPT-2's tokens without it
PREPARED = {'shakespeare': 'shakespeare', 'shakespeare_char': 'shakespeare', 'wikitext': 'wikitext',
            'enwik8_prose': 'enwik8_prose', 'enwik8_prose_4096': 'enwik8_prose'}


def remedy(data, where, folder):
    """The command that makes a data set's text into a model's tokens, and the setting that takes the result.

    TEXT stands for the file of a text that is not this repository's.
    """
    folder = Path(folder)
    script = PREPARED.get(folder.name)
    ours = script and (ROOT / 'data' / folder.name).resolve() == folder.resolve()
    out = folder.with_name(f'{folder.name}_{label(data, where)}')
    text = '' if ours else ' --input=TEXT'
    return (f'python data/{script if ours else "shakespeare"}/prepare.py{text}{tokens_of(data, where)} '
            f'--out={shlex.quote(str(out))}, then --dataset={shlex.quote(out.name)}')


def label(data, where):
    """A short name of a model's tokens, for a folder."""
    if (data or GPT2)['tokenizer'] != 'hub':
        return (data or GPT2)['tokenizer']
    return re.sub(r'[^\w.-]', '_', Path(str(where)).name.removesuffix('.gguf')) or 'model'


def tokens_of(data, where):
    """The option of prepare.py that takes a model's tokens, with a blank before it; '' for all of GPT-2's."""
    if data is None or (data['tokenizer'], data.get('vocab_size', tokenizer.MOST_GPT2)) == ('gpt2', tokenizer.MOST_GPT2):
        return ''
    return f' --tokenizer={shlex.quote(str(where)) if data["tokenizer"] == "hub" else "THE_FOLDER_OF_ITS_DATA"}'
