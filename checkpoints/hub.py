"""Models of the Hugging Face hub by their names: what a model needs is downloaded once, and read from the cache afterwards.

Weights as safetensors, settings, tokenizer and model card; never pickles or code. Where files go and whether the network is
used is up to the library's own settings: HF_HOME, HF_HUB_OFFLINE, HF_ENDPOINT, HF_TOKEN. Imports no torch.
"""
import json
import os
import re
import sys
from pathlib import Path

from variants import UserError

NAME = re.compile(r'[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?')
TOKENS = ('tokenizer.json', 'tokenizer_config.json', 'special_tokens_map.json', 'chat_template.jinja')
OLD_TOKENS = ('vocab.json', 'merges.txt')               # of a GPT-2 without tokenizer.json
SETTINGS = ('config.json', 'generation_config.json', 'README.md')
WHOLE, INDEX = 'model.safetensors', 'model.safetensors.index.json'
SHARD = re.compile(r'model-\d+-of-\d+\.safetensors')
TIMEOUT = 20                                            # seconds until the hub answers


def is_name(place):
    """Whether a place can be a model's name on the hub, NAME or OWNER/NAME: nothing of that name, and no folder OWNER, is
    here."""
    owner, slash, _ = place.partition('/')
    return bool(NAME.fullmatch(place)) and not os.path.exists(place) and not (slash and os.path.isdir(owner))


def needed(names, tokens_only=False):
    """The files of a repository that are needed, of their names."""
    tokens = [*TOKENS, *(OLD_TOKENS if 'tokenizer.json' not in names else ())]
    if tokens_only:
        return [name for name in tokens if name in names]
    weights = [WHOLE] if WHOLE in names else [INDEX, *sorted(name for name in names if SHARD.fullmatch(name))]
    return [name for name in (*SETTINGS, *tokens, *weights) if name in names]


def fetch(name, tokens_only=False):
    """The folder of a model's files: from the hub where it can be reached, with a bar on a terminal, else from the cache.

    Says on stderr what is downloaded, its size and where it is. tokens_only: the tokenizer's files. Raises UserError in one
    line with the remedy.
    """
    import huggingface_hub
    from huggingface_hub import errors
    try:
        info = huggingface_hub.HfApi().model_info(name, files_metadata=True, timeout=TIMEOUT)
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise UserError(refusal(name, error), 'init_from') from None
    except Exception as error:                          # offline, the hub's own errors, or those of its HTTP library
        return cached(name, tokens_only) or refuse(name, error)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    files = needed(sizes, tokens_only)
    check(name, sizes, files, tokens_only)
    new = [file for file in files
           if not isinstance(huggingface_hub.try_to_load_from_cache(name, file, revision=info.sha), str)]
    if new:
        size = megabytes(sum(sizes[file] for file in new))
        say(f'{name}: downloading {len(new)} files, {size}, to {huggingface_hub.constants.HF_HUB_CACHE}')
    try:
        places = [huggingface_hub.hf_hub_download(name, file) for file in files]
    except Exception as error:                          # as above, and a full disk
        refuse(name, error)
    folder = os.path.dirname(places[0])
    if new:
        say(f'{name}: {len(files)} files, {megabytes(sum(sizes[file] for file in files))}, in {folder}')
    return folder


def check(name, names, files, tokens_only):
    """Raise UserError for a repository without the files that a model needs."""
    if tokens_only:
        if 'tokenizer.json' not in names:
            raise UserError(f'{name} has no tokenizer.json on the hub; pass a folder or a .gguf that has the tokenizer')
    elif 'config.json' not in names or not {WHOLE, INDEX} & set(files):
        others = ''.join(f', but {what}' for ending, what in (
            ('.gguf', 'GGUF files: download one and pass it as --init_from=FILE.gguf'),
            ('.bin', 'a pickle, which could run code: ask its owner for safetensors')) if any(
                other.endswith(ending) for other in names))
        raise UserError(f'{name} has no config.json with model.safetensors on the hub{others}', 'init_from')


def cached(name, tokens_only=False):
    """The folder of a model in the cache, where it is whole; else None."""
    import huggingface_hub
    found = huggingface_hub.try_to_load_from_cache(name, 'tokenizer.json' if tokens_only else 'config.json')
    if not isinstance(found, str):
        return None
    folder = Path(found).parent
    if tokens_only or (folder / WHOLE).exists():
        return str(folder)
    try:
        shards = set(json.loads((folder / INDEX).read_text(encoding='utf-8'))['weight_map'].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return str(folder) if all((folder / str(shard)).exists() for shard in shards) else None


def refuse(name, error):
    raise UserError(refusal(name, error), 'init_from') from None


def refusal(name, error):
    """What is wrong, and the remedy, in one line."""
    from huggingface_hub import constants, errors
    if isinstance(error, errors.GatedRepoError):
        return (f'{name} is gated: accept its terms at {constants.ENDPOINT}/{name}, then log in by `hf auth login` or set '
                'HF_TOKEN')
    if isinstance(error, (errors.RepositoryNotFoundError, errors.HFValidationError)):
        return (f'{name!r} is neither a folder here nor a model on the hub, or it is private: check the name, which is '
                'OWNER/NAME, log in by `hf auth login`, or pass a local folder')
    reason = ' '.join(str(error).split())[:100]
    if constants.HF_HUB_OFFLINE:
        reason = 'HF_HUB_OFFLINE is set'
    elif isinstance(error, OSError) and error.errno is not None and error.filename:
        return f'{name}: {error.filename}: {error.strerror}; free some space, or set HF_HOME to another disk'
    return (f'{name!r} is no folder here and not whole in the cache ({constants.HF_HUB_CACHE}), and it cannot be downloaded '
            f'({type(error).__name__}: {reason}); run it once with the network, or pass a local folder')


def megabytes(size):
    return f'{size / 1e9:.2f} GB' if size >= 1e9 else f'{size / 1e6:.1f} MB'


def say(line):
    """One line on stderr, of the first rank alone."""
    if os.environ.get('RANK', '0') == '0':
        print(line, file=sys.stderr, flush=True)
