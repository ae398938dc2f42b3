"""What a model's place says besides weights: its tokenizer's files, tokens, context, number type and licence.

Plain values, kept by checkpoints under `source`, so that export.py can write them out again:

    {'name': 'SmolLM2', 'kind': 'llama', 'parameters': 134515008, 'dtype': 'bfloat16', 'max_positions': 8192,
     'licence': 'apache-2.0', 'tokens': {'eos_token_id': 2}, 'files': {'generation_config.json': '{}'}, 'history': []}

Nothing of it is run, and what is too large or of another kind is left out. Imports no torch.
"""
import json
import os
import re

FILES = ('tokenizer_config.json', 'special_tokens_map.json', 'generation_config.json', 'chat_template.jinja')
TOKENS = ('eos_token_id', 'bos_token_id', 'pad_token_id')
DTYPES = ('float32', 'float16', 'bfloat16')
MOST_FILE = 1 << 20                     # characters of a file
MOST_LINE = 1000                        # of a text besides
MOST_HISTORY = 20
CODE = ('auto_map', 'custom_generate')  # what a tokenizer_config.json or generation_config.json could name code by
KINDS = {'name': str, 'kind': str, 'parameters': int, 'dtype': str, 'max_positions': int, 'licence': str, 'tokens': dict,
         'files': dict, 'history': list}
FILE_TYPES = {0: 'float32', 1: 'float16', 32: 'bfloat16'}       # general.file_type of a GGUF; others are quantised
SPECIAL = {'bos_token': 'bos_token_id', 'eos_token': 'eos_token_id', 'pad_token': 'padding_token_id',
           'unk_token': 'unknown_token_id'}


def sound(value):
    """The parts of a dict of that form that are sound; {} for anything else."""
    if not isinstance(value, dict):
        return {}
    found = {name: value[name] for name, kind in KINDS.items() if type(value.get(name)) is kind}
    if found.get('dtype') not in DTYPES:
        found.pop('dtype', None)
    for name in ('parameters', 'max_positions'):
        if not 0 < found.get(name, 1) < 1 << 53:
            del found[name]
    for name in ('name', 'kind', 'licence'):
        if name in found:
            found[name] = ' '.join(found[name].split())[:MOST_LINE]
    tokens, files = found.get('tokens', {}), found.get('files', {})
    found['tokens'] = {name: number for name, number in tokens.items() if name in TOKENS and is_token(number)}
    found['files'] = {name: text for name, text in files.items() if name in FILES and is_file(name, text)}
    found['history'] = [line[:MOST_LINE] for line in found.get('history', ()) if isinstance(line, str)][-MOST_HISTORY:]
    return found


def is_token(value):
    """Whether a value is a token, or some."""
    some = value if isinstance(value, list) else [value]
    return 0 < len(some) <= 64 and all(type(number) is int and 0 <= number < 1 << 31 for number in some)


def is_file(name, text):
    """Whether a text can be a file of that name: not too large, a JSON object where it is JSON."""
    if not isinstance(text, str) or len(text) > MOST_FILE or '\0' in text:
        return False
    try:
        return not name.endswith('.json') or isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def of_folder(folder, raw, kind):
    """The same of a folder with a config.json, whose content is `raw`."""
    files = {name: read_text(os.path.join(folder, name)) for name in FILES}
    own = raw.get('source') if isinstance(raw.get('source'), dict) else {}          # of an export of ours
    tokens = {name: raw.get(name) for name in TOKENS}
    return sound({'name': os.path.basename(os.path.abspath(folder)), 'licence': licence_of(folder), **own, 'kind': kind,
                  'dtype': raw.get('dtype', raw.get('torch_dtype')), 'tokens': tokens, 'files': files,
                  'max_positions': raw.get('max_position_embeddings', raw.get('n_positions'))})


def read_text(path, most=MOST_FILE):
    """The text of a file; None where it is missing, too large or none."""
    try:
        if os.path.getsize(path) > 4 * most:
            return None
        with open(path, encoding='utf-8', newline='') as file:
            return file.read()
    except (OSError, ValueError):
        return None


def licence_of(folder):
    """The line `license:` at the top of a folder's README.md, as model cards have it; None without."""
    head = re.match(r'---\n(.*?)\n---\n', read_text(os.path.join(folder, 'README.md')) or '', re.S)
    found = head and re.search(r'^license:\s*(\S.*)$', head[1], re.M)
    return found and found[1].strip('\'" ')


def of_gguf(value, path):
    """The same of a GGUF; value(name, default) reads its metadata. A quantised one counts as float16, as its scales are."""
    words = value('tokenizer.ggml.tokens', [])
    ids = {word: value(f'tokenizer.ggml.{name}') for word, name in SPECIAL.items()}
    ids = {word: number for word, number in ids.items() if type(number) is int and 0 <= number < len(words)}
    settings = {'tokenizer_class': 'PreTrainedTokenizerFast', 'clean_up_tokenization_spaces': False,
                **{word: words[number] for word, number in ids.items()}}
    if isinstance(value('tokenizer.chat_template'), str):
        settings['chat_template'] = value('tokenizer.chat_template')
    tokens = {f'{word}_id': number for word, number in ids.items() if f'{word}_id' in TOKENS}
    return sound({'name': value('general.name', os.path.basename(path)), 'kind': 'gguf', 'licence': value('general.license'),
                  'dtype': FILE_TYPES.get(value('general.file_type', 0), 'float16'), 'tokens': tokens,
                  'max_positions': value('llama.context_length'),
                  'files': {'tokenizer_config.json': dumped(settings), 'generation_config.json': dumped(tokens)}})


def dumped(value):
    """A dict as the text of a file."""
    return json.dumps(value, indent=2, ensure_ascii=False) + '\n'


def without_code(name, text):
    """A file's text without the entries that name code to run."""
    if not name.endswith('.json') or not any(word in text for word in CODE):
        return text
    return dumped({key: value for key, value in json.loads(text).items() if key not in CODE})


def begun(info, place, config, state):
    """What a run keeps of a source that it begins from: what was said, with a name, its parameters and its past."""
    source, tied = info['source'], {'lm_head.weight'} if config.tie_weights else set()
    numbers = sum(tensor.numel() for name, tensor in state.items() if name not in tied)
    past = list(source.get('history', ()))
    past += [told(info['run'], info['step'], source)] if info.get('run') else []
    return sound({'name': os.path.basename(os.path.normpath(place)), 'kind': info['kind'], 'parameters': numbers, **source,
                  'history': past})


def told(run, step, source):
    """One line about a run of train.py, from its settings; source: what it began from, {} for one from scratch."""
    name = source.get('name', '')
    how = ', '.join(f'{key}={run[key]!r}' for key in ('linear', 'narrow') if run.get(key))
    made = (f' with {how} by decompose={run.get("decompose")} on {run.get("calibration_tokens", 0):,} calibration tokens'
            if name and how and not source.get('history') else '')          # else it was made before
    return f'train.py{f" from {name}" if name else ""}{made}: {step:,} steps on {run.get("dataset")}'
