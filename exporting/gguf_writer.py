"""A plain Llama as a GGUF file (llama.cpp) through the `gguf` library, with its tokenizer where llama.cpp has a name for it.

Rows of queries and keys are in adjacent pairs there, as ours are (pretrained/llama.py); norms are float32 in any case.
"""
import json
import os
from types import SimpleNamespace

import torch

from checkpoints.gguf_file import BYTES, CUTS
from data import identity
from pretrained import llama
from variants import UserError

TYPES = {'float32': ('F32', 'ALL_F32'), 'float16': ('F16', 'MOSTLY_F16'), 'bfloat16': ('BF16', 'MOSTLY_BF16')}
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5      # types of tokens
INSTALL = 'a GGUF file is written by the package gguf; install it: pip install gguf'
SPECIAL = {'eos_token_id': 'eos', 'bos_token_id': 'bos', 'pad_token_id': 'pad'}


def write(path, found, info, text):
    """Write found (layouts.Export of a Llama) to a file; returns a line about its tokenizer.

    text: of its tokenizer.json, or None. Raises UserError for what is no plain Llama, and OSError.
    """
    gguf, raw, kind = library(), found.raw, found.raw['dtype']
    check(found)
    aside = f'{path}.part'
    writer = gguf.GGUFWriter(aside, 'llama')
    settings(writer, gguf, raw, info, kind)
    tokens = tokenizer(writer, raw, info, text)
    for name, tensor in named(found.tensors, raw):
        flat = tensor.dim() == 1
        array = tensor.float().numpy() if flat else packed(tensor, gguf, kind)
        writer.add_tensor(name, array, raw_dtype=gguf.GGMLQuantizationType[TYPES['float32' if flat else kind][0]])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(aside, path)
    return tokens


def library():
    try:
        import gguf
    except ImportError:
        raise UserError(INSTALL, 'to') from None
    return gguf


def check(found):
    """Refuse what a GGUF of the architecture llama does not compute."""
    raw = found.raw
    if raw['model_type'] != 'llama':
        odd = f'this is {raw["model_type"]!r}' if found.dense else found.line.partition(':')[0]
        raise UserError(f'a .gguf is written of plain Llamas alone, and {odd}; pass --dense=True where matrices are '
                        'structured, or a folder as --to', 'to')
    rope = raw.get('rope_parameters') or raw.get('rope_scaling') or {}
    if rope.get('rope_type', 'default') != 'default' or raw.get('attention_bias') != raw.get('mlp_bias'):
        raise UserError('a .gguf is written of Llamas with plain rotary positions, and biases in all linears or in none; '
                        'pass a folder as --to', 'to')


def settings(writer, gguf, raw, info, kind):
    """The metadata that pretrained/llama.py's settings are read from, and the licence."""
    source = info['source']
    writer.add_name(source.get('name') or 'nanokron')
    if source.get('licence'):
        writer.add_license(source['licence'])
    writer.add_context_length(raw['max_position_embeddings'])
    writer.add_embedding_length(raw['hidden_size'])
    writer.add_block_count(raw['num_hidden_layers'])
    writer.add_feed_forward_length(raw['intermediate_size'])
    writer.add_head_count(raw['num_attention_heads'])
    writer.add_head_count_kv(raw['num_key_value_heads'])
    writer.add_layer_norm_rms_eps(raw['rms_norm_eps'])
    writer.add_rope_freq_base(raw['rope_parameters']['rope_theta'])
    writer.add_rope_dimension_count(raw['head_dim'])
    writer.add_vocab_size(raw['vocab_size'])
    writer.add_file_type(gguf.LlamaFileType[TYPES[kind][1]])


def packed(tensor, gguf, kind):
    """A matrix as the array of bytes of its type."""
    if kind == 'bfloat16':
        return gguf.quants.quantize(tensor.float().numpy(), gguf.GGMLQuantizationType.BF16)
    return tensor.to(getattr(torch, kind)).numpy()


def named(tensors, raw):
    """(name in a GGUF, tensor) of Hugging Face's tensors."""
    heads = SimpleNamespace(n_head=raw['num_attention_heads'], n_kv_head=raw['num_key_value_heads'])
    for name, tensor in llama.renamed(iter(tensors.items()), heads, llama.HUB, True).items():
        owner, _, kind = name.rpartition('.')
        yield f'{their_name(owner)}.{kind}', tensor.contiguous()


def their_name(owner):
    """blk.3.attn_q for transformer.h.3.attn.c_q."""
    if owner in llama.ENDS:
        return llama.ENDS[owner][llama.GGUF]
    _, _, block, part = owner.split('.', 3)
    return f'blk.{block}.{llama.PARTS[part][llama.GGUF]}'


# ----------------------------------------------------------------------------------------------------
# the tokenizer

def tokenizer(writer, raw, info, text):
    """Add the tokens of a tokenizer.json's text; returns what to say about them."""
    pre = text and cut_of(text)
    if not pre:
        return 'no tokenizer, as llama.cpp has no name here for what it cuts text by' if text else 'no tokenizer'
    whole = json.loads(text)
    words, kinds = vocabulary(whole, raw['vocab_size'])
    merges = [pair if isinstance(pair, str) else ' '.join(pair) for pair in whole['model']['merges']]
    writer.add_tokenizer_model('gpt2')
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(words)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    for name, short in SPECIAL.items():
        number = raw.get(name)
        if number is not None:
            getattr(writer, f'add_{short}_token_id')(number[0] if isinstance(number, list) else number)
    files = info['source'].get('files', {})
    settings = json.loads(files.get('tokenizer_config.json', '{}'))
    if settings.get('unk_token') in words:
        writer.add_unk_token_id(words.index(settings['unk_token']))
    first = ((whole.get('post_processor') or {}).get('single') or [{}])[0]
    writer.add_add_bos_token('SpecialToken' in first)
    template = files.get('chat_template.jinja') or settings.get('chat_template')
    if isinstance(template, str):
        writer.add_chat_template(template)
    return f'with its tokenizer ({pre})'


def cut_of(text):
    """llama.cpp's name of a tokenizer's pre-tokenizer, among those that we read again; None for another kind."""
    whole = json.loads(text)
    model, cut = whole['model'], identity.cuts(whole.get('pre_tokenizer'))
    if model.get('type') != 'BPE' or not model.get('merges') or whole.get('normalizer') or model.get('byte_fallback'):
        return None
    return next((name for name, known in CUTS.items() if full(identity.cuts(known)) == full(cut)), None)


def full(cut):
    """A pre_tokenizer with what ByteLevel means unsaid."""
    if isinstance(cut, dict):
        own = {'use_regex': BYTES['use_regex']} if cut.get('type') == 'ByteLevel' else {}
        return own | {name: full(part) for name, part in cut.items()}
    return [full(part) for part in cut] if isinstance(cut, list) else cut


def vocabulary(whole, rows):
    """(words, their types) for all rows of the vocabulary; rows without a token are unused."""
    words, kinds = [f'[PAD{number}]' for number in range(rows)], [UNUSED] * rows
    for word, number in whole['model']['vocab'].items():
        words[number], kinds[number] = word, NORMAL
    for token in whole.get('added_tokens') or ():
        words[token['id']], kinds[token['id']] = token['content'], CONTROL if token.get('special') else USER_DEFINED
    return words, kinds
