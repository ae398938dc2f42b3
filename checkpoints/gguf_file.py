"""GGUF files (llama.cpp) through the `gguf` library: settings in Hugging Face's terms, tensors, tokenizer. No torch.

A GGUF has metadata, such as `llama.block_count`, and tensors in one of many quantisations, which become float32.
For the architecture `llama` the rows of queries and keys are already in adjacent pairs, as ours are; for `qwen2` they are
in halves, as Hugging Face's are.
"""
import json
from pathlib import Path

import numpy as np

from variants import UserError

INSTALL = 'a GGUF file is read by the package gguf; install it: pip install gguf tokenizers'
ARCHITECTURES = 'llama', 'qwen2'
SIZES = {'hidden_size': 'embedding_length', 'intermediate_size': 'feed_forward_length',
         'num_hidden_layers': 'block_count', 'num_attention_heads': 'attention.head_count',
         'max_position_embeddings': 'context_length', 'rms_norm_eps': 'attention.layer_norm_rms_epsilon'}
# optional ones
OPTIONAL = {'num_key_value_heads': 'attention.head_count_kv', 'rope_theta': 'rope.freq_base', 'vocab_size': 'vocab_size',
            'head_dim': 'attention.key_length'}
# allowed with these values only: anything else, and any other name, would change the function
ONLY = {'rope.scaling.type': 'none', 'rope.scale_linear': 1.0, 'attention.sliding_window': 0, 'attention.causal': True,
        'expert_count': 0, 'expert_used_count': 0}
EQUAL = ('rope.dimension_count', 'attention.value_length', 'attention.key_length')      # all of them the head size
SILENT = ('tensor_data_layout',)
ROPE = 'rope_freqs.weight'                              # D/2 numbers by which Llama 3.1's frequencies are divided
CONTEXTS = [2 ** k for k in range(13, 24)] + [2 ** k for k in range(13)]                # 8192 first, that of Llama 3.1

# pre-tokenizers before byte-pair encoding, by llama.cpp's names
BYTES = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True, 'use_regex': True}


def words_of(digits):
    """Llama 3's cut of a text, with so many digits to a token at most."""
    number = r'\p{N}' + (f'{{1,{digits}}}' if digits > 1 else '')
    words = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)", r'[^\r\n\p{L}\p{N}]?\p{L}+', number, r' ?[^\s\p{L}\p{N}]+[\r\n]*',
             r'\s*[\r\n]+', r'\s+(?!\S)', r'\s+')
    split = {'type': 'Split', 'pattern': {'Regex': '|'.join(words)}, 'behavior': 'Isolated', 'invert': False}
    return {'type': 'Sequence', 'pretokenizers': [split, {**BYTES, 'use_regex': False}]}


CUTS = {'gpt-2': BYTES, 'smollm': {'type': 'Sequence', 'pretokenizers': [{'type': 'Digits', 'individual_digits': True},
                                                                       BYTES]},
        'llama-bpe': words_of(3), 'qwen2': words_of(1)}
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
    """The settings in the names of Hugging Face's config.json; raises UserError for anything but a plain Llama or Qwen2."""
    kind = value(reader, 'general.architecture')
    if kind not in ARCHITECTURES:
        known = ' and '.join(ARCHITECTURES)
        raise UserError(f'{path}: the architecture is {str(kind)[:40]!r}, and only {known} are read', 'init_from')
    if value(reader, 'split.count', 1) != 1:
        raise UserError(f'{path}: one of {value(reader, "split.count")} files; merge them by gguf-split', 'init_from')
    own = {name.removeprefix(f'{kind}.'): value(reader, name) for name in reader.fields if name.startswith(f'{kind}.')}
    shapes = {tensor.name: tensor.shape for tensor in reader.tensors}
    lacking = [f'{kind}.{name}' for name in SIZES.values() if name not in own]
    lacking += [] if 'token_embd.weight' in shapes else ['token_embd.weight']
    if lacking:
        raise UserError(f'{path} lacks {lacking[0]}', 'init_from')
    raw = {theirs: own[name] for theirs, name in {**SIZES, **OPTIONAL}.items() if name in own}
    check_others(own, raw, f'{path}: {kind}')
    raw = {'num_key_value_heads': raw['num_attention_heads'], 'vocab_size': int(shapes['token_embd.weight'][-1]), **raw}
    raw['rms_norm_eps'] = short(raw['rms_norm_eps'])
    raw['tie_word_embeddings'] = 'output.weight' not in shapes
    raw['attention_bias'] = raw['mlp_bias'] = kind == 'llama' and any(name.endswith('.bias') for name in shapes)
    stretch = rope_scaling(reader, raw, path)
    return {'model_type': kind, 'hidden_act': 'silu', **raw, **({'rope_scaling': stretch} if stretch else {})}


def check_others(own, raw, where):
    """Refuse metadata of another model, and unknown names."""
    for name, found in own.items():
        if name in ONLY and found != ONLY[name]:
            raise UserError(f'{where}.{name} is {found!r}, and only {ONLY[name]!r} is read', 'init_from')
        if name in EQUAL and not is_head_size(found, raw):
            raise UserError(f'{where}.{name} is {found!r}, and only embedding_length / head_count is read', 'init_from')
        if name not in {*SIZES.values(), *OPTIONAL.values(), *ONLY, *EQUAL, *SILENT}:
            raise UserError(f'{where}.{name} is {str(found)[:40]}, which is not read', 'init_from')


def is_head_size(found, raw):
    heads, width = raw['num_attention_heads'], raw['hidden_size']
    return type(found) is type(heads) is type(width) is int and found * heads == width


def rope_scaling(reader, raw, path):
    """Llama 3.1's numbers, of Hugging Face's rope_scaling, that give the file's rope_freqs; None for plain positions.

    The file holds divisors of the frequencies and not those numbers: of the published models, low 1 and high 4, and a
    context that is a power of 2, the one is taken that gives the same divisors. Raises UserError when there is none.
    """
    found = next((tensor.data for tensor in reader.tensors if tensor.name == ROPE), None)
    if found is None or np.all(np.asarray(found) == 1):
        return None
    found, base = np.asarray(found, np.float64), raw.get('rope_theta', 10000.0)
    sound = is_head_size(2 * found.size, raw) and type(base) in (int, float) and base > 0 and np.all(found >= 1)
    frequencies = base ** (-np.arange(found.size) / found.size) if sound else found
    for context in CONTEXTS if sound else ():
        share = np.clip((context * frequencies / (2 * np.pi) - 1) / 3, 0, 1)
        if np.allclose(found, 1 / (share + (1 - share) / found.max()), rtol=1e-5):
            return {'rope_type': 'llama3', 'factor': short(found.max()), 'low_freq_factor': 1.0, 'high_freq_factor': 4.0,
                    'original_max_position_embeddings': context}
    raise UserError(f"{path}: {ROPE} are not Llama 3.1's rotary positions, and only these are read; take the model's "
                    'safetensors', 'init_from')


def short(number):
    """A float32 of the file as the shortest decimal number: 1e-05 and not 9.999999747378752e-06; what is none as it is."""
    return float(str(np.float32(number))) if isinstance(number, float) else number


def tensors(reader, path):
    """Yield (name, float32 array) one at a time; raises UserError for a quantisation that the library cannot dequantise."""
    from gguf.quants import dequantize
    for tensor in reader.tensors:
        if tensor.name == ROPE:                         # in the settings
            continue
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
    pre = value(reader, 'tokenizer.ggml.pre', 'gpt-2')
    cut = CUTS.get(pre)
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
             'end_of_word_suffix': None, 'fuse_unk': False, 'byte_fallback': False, 'vocab': vocabulary, 'merges': merges,
             **({'ignore_merges': True} if pre == 'llama-bpe' else {})}                 # a known word is its own token
    return json.dumps({'version': '1.0', 'truncation': None, 'padding': None, 'added_tokens': added,
                       'normalizer': {'type': 'NFC'} if pre == 'qwen2' else None,
                       'pre_tokenizer': cut, 'post_processor': begin(reader, tokens), 'decoder': BYTES, 'model': model},
                      ensure_ascii=False)


def begin(reader, tokens):
    """The part of a tokenizer.json that prepends the first token to a text, or None."""
    first = value(reader, 'tokenizer.ggml.bos_token_id')
    wanted = value(reader, 'tokenizer.ggml.add_bos_token', value(reader, 'tokenizer.ggml.pre') == 'llama-bpe')
    if not wanted or first is None or not 0 <= first < len(tokens):
        return None
    word, text = {'SpecialToken': {'id': tokens[first], 'type_id': 0}}, {'Sequence': {'id': 'A', 'type_id': 0}}
    both = [word, text, {'Sequence': {'id': 'B', 'type_id': 1}}]
    return {'type': 'TemplateProcessing', 'single': [word, text], 'pair': both,
            'special_tokens': {tokens[first]: {'id': tokens[first], 'ids': [first], 'tokens': [tokens[first]]}}}
