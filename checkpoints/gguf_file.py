"""GGUF files (llama.cpp) through the `gguf` library: settings in Hugging Face's terms, tensors, tokenizer. No torch.

A GGUF has metadata, such as `llama.block_count`, and tensors in one of many quantisations, which become float32.
For the architecture `llama` the rows of queries and keys are already in adjacent pairs, as ours are.
"""
import json
from pathlib import Path

import numpy as np

from variants import UserError

INSTALL = 'a GGUF file is read by the package gguf; install it: pip install gguf tokenizers'
ARCHITECTURE = 'llama'
SIZES = {'hidden_size': 'embedding_length', 'intermediate_size': 'feed_forward_length',
         'num_hidden_layers': 'block_count', 'num_attention_heads': 'attention.head_count',
         'max_position_embeddings': 'context_length', 'rms_norm_eps': 'attention.layer_norm_rms_epsilon'}
# optional ones: where they are missing Hugging Face's default applies too
OPTIONAL = {'num_key_value_heads': 'attention.head_count_kv', 'rope_theta': 'rope.freq_base', 'vocab_size': 'vocab_size',
            'head_dim': 'attention.key_length'}
# allowed with these values only: anything else, and any other name, would change the function
ONLY = {'rope.scaling.type': 'none', 'rope.scale_linear': 1.0, 'attention.sliding_window': 0, 'attention.causal': True,
        'expert_count': 0, 'expert_used_count': 0}
EQUAL = ('rope.dimension_count', 'attention.value_length', 'attention.key_length')      # all of them the head size
SILENT = ('tensor_data_layout',)
# pre-tokenizers before byte-pair encoding, by llama.cpp's names
BYTES = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True, 'use_regex': True}
CUTS = {'gpt-2': BYTES, 'smollm': {'type': 'Sequence', 'pretokenizers': [{'type': 'Digits', 'individual_digits': True},
                                                                       BYTES]}}
CONTROL, USER_DEFINED = 3, 4                            # types of tokens


def open_file(path):
    """The library's reader of a file, memory-mapped; raises UserError in one line."""
    try:
        import gguf
    except ImportError:
        raise UserError(f'{path}: {INSTALL}', 'init_from') from None
    try:
        return gguf.GGUFReader(path)
    except (OSError, ValueError, KeyError, IndexError, TypeError, OverflowError, MemoryError) as error:
        reason = getattr(error, 'strerror', None) or str(error) or type(error).__name__
        raise UserError(f'{path}: damaged, or no GGUF file: {reason[:120]}', 'init_from') from None


def value(reader, name, default=None):
    """One value of the metadata as a Python object; arrays too."""
    field = reader.fields.get(name)
    return default if field is None else field.contents()


def settings(reader, path):
    """The settings in the names of Hugging Face's config.json; raises UserError for anything but a plain Llama."""
    found = value(reader, 'general.architecture')
    if found != ARCHITECTURE:
        raise UserError(f"{path}: the architecture is {found!r}, and only {ARCHITECTURE!r} is read", 'init_from')
    if value(reader, 'split.count', 1) != 1:
        raise UserError(f'{path}: one of {value(reader, "split.count")} files; merge them by gguf-split', 'init_from')
    own = {name.removeprefix(f'{ARCHITECTURE}.'): value(reader, name) for name in reader.fields
           if name.startswith(f'{ARCHITECTURE}.')}
    shapes = {tensor.name: tensor.shape for tensor in reader.tensors}
    lacking = [f'{ARCHITECTURE}.{name}' for name in SIZES.values() if name not in own]
    lacking += [] if 'token_embd.weight' in shapes else ['token_embd.weight']
    if lacking:
        raise UserError(f'{path} lacks {lacking[0]}', 'init_from')
    raw = {theirs: own[name] for theirs, name in {**SIZES, **OPTIONAL}.items() if name in own}
    check_others(own, raw, path)
    raw.setdefault('vocab_size', int(shapes['token_embd.weight'][-1]))
    raw['rms_norm_eps'] = short(raw['rms_norm_eps'])
    raw['tie_word_embeddings'] = 'output.weight' not in shapes
    raw['attention_bias'] = raw['mlp_bias'] = any(name.endswith('.bias') for name in shapes)
    return {'model_type': 'llama', 'hidden_act': 'silu', **raw}


def check_others(own, raw, path):
    """Refuse metadata of another model, and unknown names."""
    for name, found in own.items():
        if name in ONLY and found != ONLY[name]:
            raise UserError(f'{path}: {ARCHITECTURE}.{name} is {found!r}, and only {ONLY[name]!r} is read', 'init_from')
        if name in EQUAL and found * raw['num_attention_heads'] != raw['hidden_size']:
            raise UserError(f'{path}: {ARCHITECTURE}.{name} is {found!r}, and only embedding_length / head_count is read',
                            'init_from')
        if name not in {*SIZES.values(), *OPTIONAL.values(), *ONLY, *EQUAL, *SILENT}:
            raise UserError(f'{path}: {ARCHITECTURE}.{name} is {str(found)[:40]}, which is not read', 'init_from')


def short(number):
    """A float32 of the file as the shortest decimal number: 1e-05 and not 9.999999747378752e-06."""
    return float(str(np.float32(number)))


def tensors(reader, path):
    """Yield (name, float32 array) one at a time; raises UserError for a quantisation that the library cannot dequantise."""
    from gguf.quants import dequantize
    for tensor in reader.tensors:
        try:
            yield tensor.name, np.require(dequantize(tensor.data, tensor.tensor_type), np.float32, 'CW')
        except (NotImplementedError, ValueError) as error:
            raise UserError(f'{path}: {tensor.name} is {tensor.tensor_type.name}, which the gguf library cannot turn into '
                            f'numbers ({str(error)[:80]}); take a file of another quantisation', 'init_from') from None


def tokenizer(reader, path):
    """The text of a tokenizer.json with the tokens of the file; None for a kind of tokenizer that is not supported.

    Supported: byte-pair encoding (`tokenizer.ggml.model` gpt2) with the pre-tokenizers of CUTS. Raises UserError for
    inconsistent lists.
    """
    cut = CUTS.get(value(reader, 'tokenizer.ggml.pre', 'gpt-2'))
    if value(reader, 'tokenizer.ggml.model') != 'gpt2' or cut is None:
        return None
    tokens, merges, kinds = (value(reader, f'tokenizer.ggml.{name}', []) for name in ('tokens', 'merges', 'token_type'))
    vocabulary = {token: number for number, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens) or len(kinds) not in (0, len(tokens)):
        raise UserError(f'{Path(path).name}: its tokens and their types contradict each other', 'init_from')
    added = [{'id': number, 'content': tokens[number], 'single_word': False, 'lstrip': False, 'rstrip': False,
              'normalized': False, 'special': kind == CONTROL}
             for number, kind in enumerate(kinds) if kind in (CONTROL, USER_DEFINED)]
    model = {'type': 'BPE', 'dropout': None, 'unk_token': None, 'continuing_subword_prefix': None,
             'end_of_word_suffix': None, 'fuse_unk': False, 'byte_fallback': False, 'vocab': vocabulary, 'merges': merges}
    return json.dumps({'version': '1.0', 'truncation': None, 'padding': None, 'added_tokens': added, 'normalizer': None,
                       'pre_tokenizer': cut, 'post_processor': begin(reader, tokens), 'decoder': BYTES, 'model': model},
                      ensure_ascii=False)


def begin(reader, tokens):
    """The part of a tokenizer.json that prepends the first token to a text, or None."""
    first = value(reader, 'tokenizer.ggml.bos_token_id')
    if not value(reader, 'tokenizer.ggml.add_bos_token', False) or first is None or not 0 <= first < len(tokens):
        return None
    word, text = {'SpecialToken': {'id': tokens[first], 'type_id': 0}}, {'Sequence': {'id': 'A', 'type_id': 0}}
    both = [word, text, {'Sequence': {'id': 'B', 'type_id': 1}}]
    return {'type': 'TemplateProcessing', 'single': [word, text], 'pair': both,
            'special_tokens': {tokens[first]: {'id': tokens[first], 'ids': [first], 'tokens': [tokens[first]]}}}
