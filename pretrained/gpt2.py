"""GPT-2's names and settings <-> ours, for Hugging Face's files and nanoGPT's.

    ours            transformer.h.3.attn.c_q.weight (C, C), c_k, c_v
    nanoGPT         transformer.h.3.attn.c_attn.weight (3 C, C); `_orig_mod.` in front after torch.compile
    Hugging Face    h.3.attn.c_attn.weight (C, 3 C), as c_fc and c_proj are (in, out); `transformer.` in front or not
"""
import torch

import configurator
from configurator import GPTConfig
from variants import Spec, UserError, match, parse_spec

TANH = "gelu(approximate='tanh')"
ACTIVATIONS = {'gelu_new': TANH, 'gelu_pytorch_tanh': TANH, 'gelu': 'gelu'}
SIZES = {'block_size': 'n_positions', 'vocab_size': 'vocab_size', 'n_layer': 'n_layer', 'n_head': 'n_head',
         'n_embd': 'n_embd'}
# (n_layer, n_head, n_embd) of the models on the hub, so that their sizes are known before a download
PUBLISHED = {'gpt2': (12, 12, 768), 'gpt2-medium': (24, 16, 1024), 'gpt2-large': (36, 20, 1280),
             'gpt2-xl': (48, 25, 1600)}
# settings that change the function: Hugging Face's defaults, the only values that our GPT-2 computes
AS_PUBLISHED = {'model_type': 'gpt2', 'layer_norm_epsilon': 1e-5, 'scale_attn_weights': True,
                'add_cross_attention': False, 'scale_attn_by_inverse_layer_idx': False,
                'reorder_and_upcast_attn': False}
TRANSPOSED = ('attn.c_attn.weight', 'attn.c_proj.weight', 'mlp.c_fc.weight', 'mlp.c_proj.weight')
NEUTRAL = ('dropout', 'zero_init', 'loss_chunk', 'recompute', 'residual', 'embed_std', 'head_std',
           'hidden_gain')                               # settings that change no logits of given weights
VOCABULARY = 50257                                      # of GPT-2's tokenizer; the last one is <|endoftext|>


def published(name):
    """The GPTConfig of gpt2, gpt2-medium, gpt2-large or gpt2-xl."""
    n_layer, n_head, n_embd = PUBLISHED[name]
    return GPTConfig(1024, VOCABULARY, n_layer, n_head, n_embd, bias=True, mlp=TANH)


def settings(raw, where):
    """GPTConfig's fields as a dict, not yet checked, from Hugging Face's config.json.

    Raises UserError for what our GPT-2 would not compute exactly.
    """
    for name, value in AS_PUBLISHED.items():
        if raw.get(name, value) != value:
            raise UserError(f"{where}: {name} is {raw[name]!r}, and only GPT-2's {value!r} is read", 'init_from')
    lacking = [name for name in SIZES.values() if name not in raw]
    if lacking:
        raise UserError(f'{where}: config.json lacks {lacking[0]}', 'init_from')
    activation, inner, width = raw.get('activation_function', 'gelu_new'), raw.get('n_inner'), raw['n_embd']
    if str(activation) not in ACTIVATIONS:
        raise UserError(f'{where}: activation_function is {activation!r}, and only {", ".join(ACTIVATIONS)} are read',
                        'init_from')
    if inner is not None and not (type(inner) is int and inner >= 1):
        raise UserError(f'{where}: n_inner is {inner!r}, and a whole number of at least 1 is wanted', 'init_from')
    spec = parse_spec(ACTIVATIONS[activation])
    if inner is not None and inner != 4 * width:
        spec = Spec('gelu', (), {'hidden': inner, **spec.kwargs})
    return {**{ours: raw[theirs] for ours, theirs in SIZES.items()}, 'bias': True, 'mlp': str(spec),
            'tie_weights': raw.get('tie_word_embeddings', True)}


def from_hub(tensors, config, where):
    """to_ours of Hugging Face's tensors; config: our GPTConfig, which is not needed."""
    return to_ours(tensors, True, where)


def to_ours(tensors, transposed, where):
    """A state dict in our names, of views: prefixes and old mask buffers dropped, c_attn split in three.

    transposed: the linears are (in, out), Hugging Face's way. Raises UserError for a c_attn that is not three matrices.
    """
    ours = {}
    for name, tensor in tensors.items():
        name = name.removeprefix('_orig_mod.').removeprefix('transformer.')
        if name.endswith(('.attn.bias', '.attn.masked_bias')):
            continue
        if transposed and name.endswith(TRANSPOSED) and tensor.dim() == 2:
            tensor = tensor.t()
        if '.c_attn.' not in name:
            ours[name if name.startswith('lm_head.') else f'transformer.{name}'] = tensor
            continue
        if tensor.dim() == 0 or tensor.shape[0] % 3:
            raise UserError(f'{where}: {name} of shape {tuple(tensor.shape)} is not q, k and v in one', 'init_from')
        for letter, third in zip('qkv', tensor.chunk(3)):
            ours[f'transformer.{name.replace("c_attn", f"c_{letter}")}'] = third
    return ours


def difference(model):
    """Why the model is not a GPT-2, in a few words, or None. Structured linears do not count: they have a W."""
    config, defaults = model.config, GPTConfig()
    for name in configurator.settings(GPTConfig):
        if name not in (*SIZES, *NEUTRAL, 'bias', 'tie_weights', 'linear', 'attention', 'mlp'):
            if getattr(config, name) != getattr(defaults, name):
                return f'{name}={getattr(config, name)!r}'
    odd = odd_block(config, 'gelu')
    kinds = {(block.mlp.approximate, block.mlp.c_fc.out_features) for block in model.transformer.h} if odd is None else ()
    odd = 'mlp' if len(kinds) > 1 else odd              # narrowed blocks of one width are a GPT-2 with n_inner
    return odd and f'{odd}={getattr(config, odd)!r}'


def odd_block(config, mlp, free=()):
    """'attention' where a block's spec is more than plain causal attention, 'mlp' where it names another mlp, or None.

    free: names of arguments of causal that may have any value.
    """
    for site in (f'h.{i}' for i in range(config.n_layer)):
        spec = parse_spec(match(config.attention, site, 'causal')[1])
        bound = [value for name, value in spec.kwargs.items() if name not in free]
        if spec.name != 'causal' or any((*spec.args, *bound)):              # a gate, a soft cap
            return 'attention'
        if parse_spec(match(config.mlp, site, 'gelu')[1]).name != mlp:
            return 'mlp'
    return None


@torch.no_grad()
def from_ours(model, vocab_size=None):
    """(config.json, state dict) of Hugging Face's GPT2LMHeadModel with the same function.

    vocab_size: rows of the vocabulary to keep, without padding; None keeps all. Structured linears become their
    dense_weight(), missing biases zeros. Raises ValueError for a model with a `difference`.
    """
    if difference(model):
        raise ValueError(f'{difference(model)} is not GPT-2')
    part, state, rows = model.transformer, {}, vocab_size or model.config.vocab_size
    state['transformer.wte.weight'], state['transformer.wpe.weight'] = part.wte.weight[:rows], part.wpe.weight
    if not model.config.tie_weights:
        state['lm_head.weight'] = model.lm_head.weight[:rows]
    norms = {'ln_f': part.ln_f}
    for i, block in enumerate(part.h):
        norms.update({f'h.{i}.ln_1': block.ln_1, f'h.{i}.ln_2': block.ln_2})
        fused = {'attn.c_attn': (block.attn.c_q, block.attn.c_k, block.attn.c_v), 'attn.c_proj': (block.attn.c_proj,),
                 'mlp.c_fc': (block.mlp.c_fc,), 'mlp.c_proj': (block.mlp.c_proj,)}
        for name, linears in fused.items():
            weight = torch.cat([linear.dense_weight() for linear in linears])           # (out, in)
            state[f'transformer.h.{i}.{name}.weight'] = weight.t()
            state[f'transformer.h.{i}.{name}.bias'] = torch.cat([bias_of(linear, linear.out_features)
                                                                 for linear in linears])
    for name, norm in norms.items():
        state[f'transformer.{name}.weight'] = norm.weight
        state[f'transformer.{name}.bias'] = bias_of(norm, norm.weight.numel())
    return config_json(model, rows), {name: t.detach().contiguous().cpu() for name, t in state.items()}


def bias_of(module, features):
    return next(module.parameters()).new_zeros(features) if module.bias is None else module.bias


def config_json(model, vocab_size):
    """Hugging Face's config.json of a model of ours that is a GPT-2."""
    config, mlp = model.config, model.transformer.h[0].mlp
    inner = mlp.c_fc.out_features
    end = VOCABULARY - 1 if vocab_size >= VOCABULARY else None
    return {
        'architectures': ['GPT2LMHeadModel'], 'model_type': 'gpt2', **AS_PUBLISHED, **{
            theirs: getattr(config, ours) for ours, theirs in SIZES.items()}, 'vocab_size': vocab_size,
        'n_inner': None if inner == 4 * config.n_embd else inner, 'tie_word_embeddings': config.tie_weights,
        'activation_function': 'gelu_new' if mlp.approximate == 'tanh' else 'gelu',
        'resid_pdrop': config.dropout, 'embd_pdrop': config.dropout, 'attn_pdrop': config.dropout,
        'initializer_range': 0.02, 'bos_token_id': end, 'eos_token_id': end,
        'dtype': str(next(model.parameters()).dtype).removeprefix('torch.'),
    }
