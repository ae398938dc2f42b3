"""Foreign models: GPT-2 and Llama from the hub, a folder or a GGUF, nanoGPT's ckpt.pt, our checkpoints and exports.

A *source* is (GPTConfig, state dict in our names, info). No model is imported here: decomposition/initialise.py checks
names and shapes against it and builds it. No code in a file is run: safetensors, JSON, and torch.save's format as
checkpoints/torchfile.py reads it.
"""
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

import configurator
from checkpoints import gguf_file, hub, torchfile
from configurator import GPTConfig
from data import hub_tokenizer, identity, tokenizer_json
from pretrained import files, gpt2, llama, said
from variants import UserError, did_you_mean

to_hf_gpt2 = gpt2.from_ours
AGAIN = ("; where you trust it, write it anew with what is needed alone: torch.save({'model': c['model'], 'model_args': "
         "c['model_args'], 'iter_num': int(c['iter_num'])}, 'NEW/ckpt.pt') of c = torch.load('ckpt.pt', weights_only=False)")
# Hugging Face's model_type -> settings, from_hub, difference, from_ours
LAYOUTS = {'gpt2': gpt2, 'llama': llama, 'mistral': llama, 'qwen2': llama}


def find(init_from):
    """The folder or .gguf of that name; a name on the Hugging Face hub is downloaded. Raises UserError in one line."""
    place = os.path.expanduser(init_from)
    if os.path.exists(place):
        return place
    if not hub.is_name(init_from):
        raise UserError(f'there is no folder {init_from!r}; pass a local folder, a .gguf file, or OWNER/NAME of the hub',
                        'init_from')
    return hub.fetch(init_from)


def read(folder, which='last'):
    """Our checkpoints, nanoGPT's ckpt.pt, Hugging Face's GPT-2 or Llama, a .gguf or our export -> (GPTConfig, state, info).

    which: 'last' or 'best' of our checkpoints. info: kind ('nanokron', 'nanogpt', 'gguf' or a name in LAYOUTS), step,
    data (the tokenizer's meta) or None, and source, what is said besides (said.py). The state dict is dense unless it is
    ours. Raises UserError in one line for a folder with none of these, for settings that ours cannot compute exactly, and as
    check_ends does.
    """
    folder = os.path.expanduser(folder)
    if os.path.isfile(folder):
        config, state, info = read_file(folder)
        check_ends(config, state, folder)
        return config, state, info
    if not os.path.isdir(folder):
        raise UserError(f'there is no folder {folder!r}', 'init_from')
    names = os.listdir(folder)
    if any(name.startswith('ckpt_') for name in names):
        config, state, info = read_ours(folder, which)
    elif 'ckpt.pt' in names:
        config, state, info = read_nanogpt(os.path.join(folder, 'ckpt.pt'))
    elif 'config.json' in names and any(name.startswith('model.safetensors') for name in names):
        config, state, info = read_safetensors(folder, names)
    elif 'pytorch_model.bin' in names:
        raise UserError(f'{folder} holds a pickle only (pytorch_model.bin), which could run code; convert it by '
                        "transformers' GPT2LMHeadModel.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)",
                        'init_from')
    else:
        raise UserError(f"{folder} holds no checkpoint: neither our ckpt_*.pt, nor nanoGPT's ckpt.pt, nor config.json "
                        'with model.safetensors (a GGUF is named as a file, FOLDER/NAME.gguf)', 'init_from')
    check_ends(config, state, folder)
    return config, state, info


def read_file(path):
    """A .gguf, nanoGPT's ckpt.pt or a .safetensors beside its config.json, by what is in it."""
    kind, (folder, name) = files.kind(path), os.path.split(os.path.abspath(path))
    names = os.listdir(folder)
    if kind == 'gguf':
        return read_gguf(path)
    if kind == 'legacy':
        files.refuse_legacy(path)
    if kind == 'torch' and not name.startswith('ckpt_'):
        return read_nanogpt(path)
    if kind == 'safetensors' and 'config.json' in names:
        return read_safetensors(folder, names, [name])
    if kind in ('torch', 'safetensors'):
        lacking = ' beside a config.json' if kind == 'safetensors' else ''
        raise UserError(f'{path} is one file of a model; pass its folder{lacking}', 'init_from')
    raise UserError(f"{path} is no model: neither GGUF nor safetensors nor torch.save's", 'init_from')


def read_ours(folder, which):
    from checkpoints import checkpoint
    saved = checkpoint.load(folder, which)
    settings, state = parts(saved, 'config', folder)
    built = {} if saved.get('built') is None else saved['built']                     # an older checkpoint's
    stage = built.get('model', {}) if isinstance(built, dict) else built
    if not isinstance(stage, dict):
        raise UserError(f'{folder}: its stage of growth is a {type(stage).__name__}, which no run writes', 'init_from')
    settings = {**settings, **stage}
    config = checked_config(configurator.as_dict(configurator.model_config(settings)), folder)
    if not isinstance(saved.get('average'), (dict, type(None))) or saved.get('average'):      # the averaged weights
        state.update(parts({**saved, 'model': saved['average']}, 'config', folder)[1])
        if config.tie_weights:
            state['lm_head.weight'] = state['transformer.wte.weight']
    run = saved['config'] if saved.get('data_digest') else None         # of train.py: its settings
    return config, state, {'kind': 'nanokron', **facts(saved, ('step', 'tokens', 'flops'), folder),
                           'source': said.sound(saved.get('source')), 'run': run}


def facts(saved, names, where):
    """{'data': the tokenizer's meta or None, and the numbers of those names or None}; raises UserError for others."""
    for name in names:
        if type(saved.get(name)) not in (int, float, type(None)):
            raise UserError(f'{where}: {name} is a {type(saved[name]).__name__}, and a number is due', 'init_from')
    identity.refuse_odd(saved.get('data'), where)
    return {name: saved.get(name) for name in (*names, 'data')}


def read_nanogpt(path):
    """nanoGPT's ckpt.pt: exact GELU; tied unless the two tensors differ."""
    if files.kind(path) == 'legacy':
        files.refuse_legacy(path)
    try:
        saved = torchfile.load(path)
    except (torchfile.Refused, OSError) as error:
        remedy = AGAIN if 'plain values are taken' in str(error) else ''
        raise UserError(f'{path} {error}{remedy}', 'init_from') from None
    settings, tensors = parts(saved, 'model_args', path)
    state = gpt2.to_ours(files.plain_names(tensors, path), False, path)
    wte, head = state.get('transformer.wte.weight'), state.get('lm_head.weight')
    tied = wte is None or head is None or torch.equal(wte, head)
    config = checked_config({'bias': True, **settings, 'tie_weights': tied}, path)
    step = saved.get('iter_num')
    return config, state, {'kind': 'nanogpt', 'step': step if type(step) is int else None, 'data': None, 'source': {}}


def parts(saved, key, where):
    """(settings, tensors) of a checkpoint: the dicts under `key` and 'model'."""
    settings, tensors = saved.get(key), saved.get('model')
    if not isinstance(settings, dict) or not isinstance(tensors, dict):
        raise UserError(f'{where} is no checkpoint of a model: it lacks {key} or model', 'init_from')
    if not all(isinstance(name, str) and torch.is_tensor(tensor) for name, tensor in tensors.items()):
        raise UserError(f'{where}: model holds something other than named tensors', 'init_from')
    return settings, dict(tensors)


def read_safetensors(folder, names, only=None):
    """config.json and safetensors: Hugging Face's layouts, or our own as export.py writes it; only: these files."""
    raw = files.read_json(os.path.join(folder, 'config.json'))
    kind = str(raw.get('model_type', 'gpt2'))
    if kind == 'nanokron':
        if not isinstance(raw.get('config'), dict):
            raise UserError(f"{folder}: config.json lacks the model's config", 'init_from')
        info = {'kind': kind, **facts(raw, ('step',), folder), 'source': said.of_folder(folder, raw, kind)}
        info['data'] = info['data'] or tokens_of(folder, names, kind)
        return checked_config(raw['config'], folder), read_tensors(folder, names, only), info
    if kind not in LAYOUTS:
        raise UserError(f'{folder}: model_type is {kind[:60]!r}, and only {", ".join(LAYOUTS)} are read', 'init_from')
    config = checked_config(LAYOUTS[kind].settings(raw, folder), folder)
    data = tokens_of(folder, names, kind)
    state = LAYOUTS[kind].from_hub(files.plain_names(read_tensors(folder, names, only), folder), config, folder)
    return config, state, {'kind': kind, 'step': None, 'data': data, 'source': said.of_folder(folder, raw, kind)}


def tokens_of(folder, names, kind):
    """What a folder's tokenizer.json says of its tokens, or a GPT-2's vocab.json and merges.txt; None without them."""
    if 'tokenizer.json' in names:
        return identity.known(hub_tokenizer.read(folder))
    if kind != 'gpt2' or not {'vocab.json', 'merges.txt'} <= set(names):
        return None
    try:
        text = tokenizer_json.of_gpt2_files(Path(folder))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f'{folder}: vocab.json and merges.txt are no tokenizer: {str(error)[:80]}', 'init_from') from None
    return identity.known(hub_tokenizer.describe(text, f'{os.path.basename(os.path.abspath(folder))}/vocab.json'))


def read_gguf(path):
    """A GGUF file of the architecture llama or qwen2, in float32, with its tokenizer where that is byte pairs."""
    reader = gguf_file.open_file(path)
    raw = gguf_file.settings(reader, path)
    config = checked_config(llama.settings(raw, path), path)
    text = gguf_file.tokenizer(reader, path)
    data = text and hub_tokenizer.describe(text, os.path.basename(path))
    state = llama.from_gguf(gguf_file.tensors(reader, path), config, raw['model_type'])
    source = said.of_gguf(lambda name, default=None: gguf_file.value(reader, name, default), path)
    return config, state, {'kind': 'gguf', 'step': None, 'data': data, 'source': source}


def read_tensors(folder, names, only=None):
    """The tensors of `only`, of model.safetensors, or of all the files that model.safetensors.index.json lists."""
    wanted = only or ['model.safetensors']
    if wanted[0] not in names or wanted[0] != 'model.safetensors' and 'model.safetensors.index.json' in names:
        index = files.read_json(os.path.join(folder, 'model.safetensors.index.json')).get('weight_map')
        wanted = sorted({str(name) for name in index.values()}) if isinstance(index, dict) else wanted
    tensors = {}
    for name in wanted:
        if name not in names:                           # a path that leads out of the folder is none of its names
            raise UserError(f'{folder} lacks {name!r}, which its index lists', 'init_from')
        try:
            tensors.update(load_file(os.path.join(folder, name)))
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(f'{os.path.join(folder, name)} is damaged: {error}', 'init_from') from None
    return tensors


def checked_config(values, where):
    """GPTConfig(**values) with the checks of the command line; raises UserError that names `where`."""
    known = configurator.settings(GPTConfig)
    try:
        for name in values:
            if name not in known:
                raise UserError(f'there is no setting {name!r}{did_you_mean(name, known)}')
        config = GPTConfig(**{name: configurator.coerce(known[name], value) for name, value in values.items()})
        for _, sentence in configurator.check(config):
            raise UserError(sentence)
    except UserError as error:
        raise UserError(f'{where}: {error}') from None
    return config


def check_ends(config, state, where):
    """Add a tied head that the file omits; refuse a wrong number of blocks, and missing or misshapen embeddings."""
    blocks = {name.split('.')[2] for name in state if name.startswith('transformer.h.')}
    if len(blocks) != config.n_layer:                   # before that many blocks are built
        raise UserError(f'{where}: n_layer is {config.n_layer}, and the file holds {len(blocks)} blocks', 'init_from')
    for name, rows in (('wte', config.vocab_size), *([] if config.rope else [('wpe', config.block_size)])):
        found = state.get(f'transformer.{name}.weight')
        if found is None or found.shape != (rows, config.n_embd):
            raise UserError(f'{where}: {name}.weight is {"missing" if found is None else tuple(found.shape)}, and its '
                            f'config says {(rows, config.n_embd)}', 'init_from')
    if config.tie_weights:
        state.setdefault('lm_head.weight', state['transformer.wte.weight'])
