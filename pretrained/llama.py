"""Llama's names and settings <-> ours, for Hugging Face's files and for GGUF: RMSNorm, RoPE, SwiGLU, grouped queries.

Mistral without a window and Qwen2 (biases on queries, keys, values) are Llamas with other settings.

    ours                      Hugging Face                                      GGUF
    h.3.attn.c_q (c_k, c_v)   model.layers.3.self_attn.q_proj (k_proj, v_proj)  blk.3.attn_q (attn_k, attn_v)
    h.3.mlp.c_gate, c_fc      model.layers.3.mlp.gate_proj, up_proj             blk.3.ffn_gate, ffn_up

RoPE rotates pairs of rows of a head. Hugging Face pairs row j with row j + D/2 (D the head size), as GGUF does for qwen2;
GGUF's llama and we pair 2j with 2j + 1: `pairs` reorders the rows of queries and keys, bit by bit, and `halves` reverses it.
"""
import re

import torch

import configurator
from configurator import GPTConfig
from pretrained.gpt2 import NEUTRAL, odd_block
from variants import Spec, UserError

SIZES = {'vocab_size': 'vocab_size', 'n_layer': 'num_hidden_layers', 'n_head': 'num_attention_heads',
         'n_embd': 'hidden_size'}
# Hugging Face's defaults, for keys that old files leave out
DEFAULTS = {'block_size': ('max_position_embeddings', 2048), 'norm_eps': ('rms_norm_eps', 1e-6),
            'tie_weights': ('tie_word_embeddings', False), 'bias': ('attention_bias', False)}
# what changes the function, and all that our block computes
AS_PUBLISHED = {'hidden_act': 'silu', 'quantization_config': None, 'rope_scaling': None, 'partial_rotary_factor': 1.0}
# what a config.json means where it leaves a key out, when that is not Llama's default
UNSAID = {'llama': {}, 'mistral': {'num_key_value_heads': 8, 'max_position_embeddings': 131072, 'sliding_window': 4096},
          'qwen2': {'num_key_value_heads': 32, 'max_position_embeddings': 32768, 'sliding_window': 4096,
                    'use_sliding_window': False}}
STRETCH = ('factor', 'low_freq_factor', 'high_freq_factor', 'original_max_position_embeddings')     # of rope_type llama3
PARTS = {'ln_1': ('input_layernorm', 'attn_norm'), 'ln_2': ('post_attention_layernorm', 'ffn_norm'),
         'attn.c_q': ('self_attn.q_proj', 'attn_q'), 'attn.c_k': ('self_attn.k_proj', 'attn_k'),
         'attn.c_v': ('self_attn.v_proj', 'attn_v'), 'attn.c_proj': ('self_attn.o_proj', 'attn_output'),
         'mlp.c_gate': ('mlp.gate_proj', 'ffn_gate'), 'mlp.c_fc': ('mlp.up_proj', 'ffn_up'),
         'mlp.c_proj': ('mlp.down_proj', 'ffn_down')}
ENDS = {'transformer.wte': ('model.embed_tokens', 'token_embd'), 'transformer.ln_f': ('model.norm', 'output_norm'),
        'lm_head': ('lm_head', 'output')}
HUB, GGUF = 0, 1                                        # columns of PARTS and ENDS
BLOCKS = (re.compile(r'model\.layers\.(\d+)\.(.+)'), re.compile(r'blk\.(\d+)\.(.+)'))
FREE = (*SIZES, *DEFAULTS, *NEUTRAL, 'n_kv_head', 'rope_base', 'linear', 'attention', 'mlp', 'norm', 'rope')


def settings(raw, where):
    """GPTConfig's fields as a dict, not yet checked, from Hugging Face's config.json.

    Raises UserError for what our Llama block would not compute exactly.
    """
    lacking = [name for name in (*SIZES.values(), 'intermediate_size') if name not in raw]
    if lacking:
        raise UserError(f'{where}: config.json lacks {lacking[0]}', 'init_from')
    kind = raw.get('model_type', 'llama')
    raw = {**UNSAID.get(kind, {}), **raw}
    rope, stretch = rope_settings(raw, where)
    check_window(raw, where)
    for name, only in AS_PUBLISHED.items():
        if name != 'rope_scaling' and raw.get(name, only) != only:
            raise UserError(f'{where}: {name} is {repr(raw[name])[:60]}, and only {only!r} is read', 'init_from')
    heads, width, size = raw['num_attention_heads'], raw['hidden_size'], raw.get('head_dim')
    if size is not None and not (type(heads) is type(size) is int and size * heads == width):
        raise UserError(f'{where}: head_dim is {size!r}, and only hidden_size / num_attention_heads is read', 'init_from')
    if raw.get('attention_bias', False) != raw.get('mlp_bias', False):
        raise UserError(f'{where}: attention_bias is {raw.get("attention_bias", False)} and mlp_bias '
                        f'{raw.get("mlp_bias", False)}; here a model has biases in all its linears or in none', 'init_from')
    kv_heads = raw.get('num_key_value_heads')
    return {**{ours: raw[theirs] for ours, theirs in SIZES.items()},
            **{ours: raw.get(*pair) for ours, pair in DEFAULTS.items()},
            'n_kv_head': None if kv_heads == heads else kv_heads, 'norm': 'rmsnorm', 'rope': True, 'rope_base': rope,
            'mlp': f'swiglu({raw["intermediate_size"]!r})', 'attention': attention(kind == 'qwen2', stretch)}


def attention(qkv_bias, stretch):
    """The attention's spec: causal, with biases on queries, keys and values, with stretched rotary positions."""
    return str(Spec('causal', (), {**({'qkv_bias': True} if qkv_bias else {}),
                                   **({'rope_llama3': stretch} if stretch else {})}))


def check_window(raw, where):
    """Refuse attention to a window of tokens that is shorter than the context."""
    window, length = raw.get('sliding_window'), raw.get('max_position_embeddings', DEFAULTS['block_size'][1])
    kinds = set(raw.get('layer_types') or ['sliding_attention' if window else 'full_attention'])
    used = raw.get('use_sliding_window', True) and window is not None and 'sliding_attention' in kinds
    if kinds - {'sliding_attention', 'full_attention'}:
        raise UserError(f'{where}: layer_types is {str(raw["layer_types"])[:60]}, and only full_attention is read',
                        'init_from')
    if used and not (type(window) is type(length) is int and window >= length):
        raise UserError(f'{where}: sliding_window is {window!r}, and only attention to all tokens is read; shorten '
                        f'max_position_embeddings in config.json to {window!r}, where both are the same', 'init_from')


def rope_settings(raw, where):
    """(RoPE's base, llama3's four numbers or ()) of old files and new; raises UserError for what is scaled otherwise."""
    rope = raw.get('rope_parameters') or {'rope_theta': raw.get('rope_theta', 10000.0), **(raw.get('rope_scaling') or {})}
    if not isinstance(rope, dict):
        raise UserError(f'{where}: rope_parameters is {str(rope)[:40]!r}, and an object is wanted', 'init_from')
    kind = rope.get('rope_type', rope.get('type', 'default'))
    if kind not in ('default', 'llama3') or rope.get('partial_rotary_factor', 1.0) != 1.0:
        raise UserError(f"{where}: its rotary positions are scaled or partial ({kind!r}), and only plain ones and Llama 3's "
                        'are read', 'init_from')
    stretch = tuple(rope.get(name) for name in STRETCH) if kind == 'llama3' else ()
    if not all(type(number) in (int, float) for number in stretch):
        raise UserError(f'{where}: rope_type llama3 takes the numbers {", ".join(STRETCH)}', 'init_from')
    return rope.get('rope_theta', raw.get('rope_theta', 10000.0)), stretch


# ----------------------------------------------------------------------------------------------------
# theirs -> ours

def from_hub(tensors, config, where):
    """A state dict in our names of Hugging Face's tensors, which are removed from `tensors`; only q and k are copied."""
    return renamed(((name, tensors.pop(name)) for name in list(tensors) if not name.endswith('rotary_emb.inv_freq')),
                   config, HUB, True)


def from_gguf(pairs, config, kind):
    """A state dict in our names of (name, array) pairs, one array at a time. kind: 'llama' or 'qwen2'."""
    return renamed(((name, torch.from_numpy(array)) for name, array in pairs), config, GGUF, kind == 'qwen2')


def renamed(pairs, config, column, halves):
    """{our name: tensor}; halves: rows of q and k lie as Hugging Face's. An unknown name is kept: check_state refuses it."""
    ours = {}
    for name, tensor in pairs:
        owner, _, kind = name.rpartition('.')
        known = our_name(owner, column)
        if halves and known and known.endswith(('.c_q', '.c_k')):
            tensor = pairs_of(tensor, config.n_head if known.endswith('q') else config.n_kv_head or config.n_head)
        ours[f'{known}.{kind}' if known else name] = tensor
    return ours


def our_name(owner, column):
    """transformer.h.3.attn.c_q for model.layers.3.self_attn.q_proj; None for a module that a Llama does not have."""
    block = BLOCKS[column].fullmatch(owner)
    table, name = (PARTS, block[2]) if block else (ENDS, owner)
    found = next((ours for ours, theirs in table.items() if theirs[column] == name), None)
    return f'transformer.h.{block[1]}.{found}' if block and found else found


def pairs_of(tensor, heads):
    """Rows (H D, ...) reordered in each head: j and j + D/2 become 2j and 2j + 1. Shapes that do not fit are left."""
    if tensor.dim() == 0 or tensor.shape[0] % (2 * heads):
        return tensor
    return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def halves_of(tensor, heads):
    """The inverse of pairs_of."""
    return tensor.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


# ----------------------------------------------------------------------------------------------------
# ours -> theirs

def difference(model):
    """Why the model is not a Llama, in a few words, or None. Structured linears do not count: they have a W."""
    config, wanted = model.config, {'norm': 'rmsnorm', 'rope': True}
    for name in configurator.settings(GPTConfig):
        if name in wanted and getattr(config, name) != wanted[name]:
            return f'{name}={getattr(config, name)!r}'
        if name not in FREE and getattr(config, name) != getattr(GPTConfig(), name):
            return f'{name}={getattr(config, name)!r}'
    odd, blocks = odd_block(config, 'swiglu', ('qkv_bias', 'rope_llama3')), model.transformer.h
    if odd is None and len({(block.attn.stretch, block.attn.c_q.bias is None) for block in blocks}) > 1:
        odd = 'attention'
    if odd is None and any(block.mlp.c_fc.out_features != blocks[0].mlp.c_fc.out_features for block in blocks):
        odd = 'mlp'
    return odd and f'{odd}={getattr(config, odd)!r}'


@torch.no_grad()
def from_ours(model, vocab_size=None):
    """(config.json, state dict) of Hugging Face's LlamaForCausalLM or Qwen2ForCausalLM with the same function.

    vocab_size: rows of the vocabulary to keep, without padding; None keeps all. Structured linears become their
    dense_weight(). Raises ValueError for a model with a `difference`.
    """
    if difference(model):
        raise ValueError(f'{difference(model)} is not Llama')
    config, rows, state = model.config, vocab_size or model.config.vocab_size, {}
    state['model.embed_tokens.weight'] = model.transformer.wte.weight[:rows]
    state['model.norm.weight'] = model.transformer.ln_f.weight
    if not config.tie_weights:
        state['lm_head.weight'] = model.lm_head.weight[:rows]
    for i, block in enumerate(model.transformer.h):
        for ours, (theirs, _) in PARTS.items():
            module, name = block.get_submodule(ours), f'model.layers.{i}.{theirs}'
            found = {'weight': module.dense_weight() if hasattr(module, 'dense_weight') else module.weight}
            if getattr(module, 'bias', None) is not None:
                found['bias'] = module.bias
            for kind, tensor in found.items():
                heads = {'attn.c_q': config.n_head, 'attn.c_k': config.n_kv_head or config.n_head}.get(ours)
                state[f'{name}.{kind}'] = halves_of(tensor, heads) if heads else tensor
    return config_json(model, rows), {name: t.detach().contiguous().cpu() for name, t in state.items()}


def config_json(model, vocab_size):
    """Hugging Face's config.json of a model of ours that is a Llama; the caller sets its eos by the tokenizer."""
    config, attn = model.config, model.transformer.h[0].attn
    qwen2 = attn.c_q.bias is not None and not config.bias           # biases on queries, keys and values only
    stretch = {'rope_type': 'llama3', **dict(zip(STRETCH, attn.stretch))} if attn.stretch else None
    return {
        'architectures': [f'{"Qwen2" if qwen2 else "Llama"}ForCausalLM'], 'model_type': 'qwen2' if qwen2 else 'llama',
        **{theirs: getattr(config, ours) for ours, theirs in SIZES.items()}, 'vocab_size': vocab_size,
        **{theirs: getattr(config, ours) for ours, (theirs, _) in DEFAULTS.items()}, 'mlp_bias': config.bias,
        **({'use_sliding_window': False} if qwen2 else {}),
        'num_key_value_heads': config.n_kv_head or config.n_head, 'head_dim': config.n_embd // config.n_head,
        'intermediate_size': model.transformer.h[0].mlp.c_fc.out_features, 'hidden_act': 'silu',
        'rope_theta': config.rope_base, **({'rope_scaling': stretch} if stretch else {}),          # of transformers 4 and 5
        'rope_parameters': {**(stretch or {'rope_type': 'default'}), 'rope_theta': config.rope_base},
        'attention_dropout': config.dropout, 'initializer_range': 0.02, 'bos_token_id': None, 'eos_token_id': None,
        'dtype': str(next(model.parameters()).dtype).removeprefix('torch.'),
    }
