"""Sliding-window attention: token t sees exactly the tokens t - W + 1 .. t, with W fixed or on a schedule.

On a CUDA GPU FlexAttention computes it, with W as a tensor that the kernel reads, so that one graph serves all windows;
elsewhere SDPA under a mask gives the same results. Layers with the same arguments share one mask per call.
"""
import functools
import math

import torch
import torch.nn as nn
from torch.nn import functional as F

import variants
from attention.heads import QueryKeyNorm, ValueMix, keep, merge_heads, padded, split_heads, write
from layers.base import BaseAttention

try:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
except ImportError:                                     # a build of torch without it: use the mask
    flex_attention = None

STEP = 128                                              # windows on a schedule are multiples of this

# share of the largest window at x = step / max_iters; cubic: fast, flat, fast (modded-nanogpt, 2025-04-22)
SCHEDULES = {'linear': lambda x: x, 'cubic': lambda x: ((4 * x - 6) * x + 3) * x}


def scheduled(size, schedule, fraction):
    """The window at `fraction` of the run, tokens: size times the schedule's share, up to a multiple of STEP."""
    share = SCHEDULES[schedule](min(max(fraction, 0.0), 1.0))
    return STEP * max(1, math.ceil(size * share / STEP - 1e-9))         # 128.00000000000001 is 128


def visible(window, queries, keys, query_documents=None, key_documents=None):
    """Mask (T, S), or (B, 1, T, S) with documents (B, T), (B, S): key not later, within the window, same document."""
    distance = queries[:, None] - keys
    mask = (distance >= 0) & (distance < window)
    if query_documents is None:
        return mask
    return mask & (query_documents[:, None, :, None] == key_documents[:, None, None, :])


def block_mask(window, positions, documents=None):
    """FlexAttention's form of visible() for positions (T,) and documents (B, T) or None; window a 0-d tensor.

    Keeps 4 lists of (B or 1, 1, T/128, T/128) blocks. They are counted from B T^2 booleans, which are never in memory when
    this is compiled.
    """
    def mask(b, h, i, j):
        distance = positions[i] - positions[j]
        near = (distance >= 0) & (distance < window)
        return near if documents is None else near & (documents[b, i] == documents[b, j])

    B, T = None if documents is None else documents.size(0), positions.size(0)
    return create_block_mask(mask, B, None, T, T, device=positions.device)


def flex(q, k, v, blocks, scale):
    """softmax(scale q k^T + mask of visible()) v by FlexAttention, blocks of block_mask(). No float64 once compiled.

    q (B, H, T, D), k and v (B, H_kv, T, D) -> (B, H, T, D).
    """
    return flex_attention(q, k, v, block_mask=blocks, scale=scale, enable_gqa=q.size(1) != k.size(1))


@functools.cache
def compiled(function):
    """FlexAttention and its masks are kernels only when compiled; here for models that are not compiled as a whole."""
    return torch.compile(function)


def kernel(function):
    """The function as part of what is being compiled, else compiled separately."""
    return function if torch.compiler.is_compiling() else compiled(function)


def extend_ring(cache, size, **new):
    """Put tensors (B, H, T, ...) into ring buffers of `size` entries -> (what this call's tokens may attend to, in order).

    One token sees the ring after its own entry; several see the previous entries and themselves.
    """
    start = cache.setdefault('length', 0)               # tokens seen, however many are kept
    T = next(iter(new.values())).size(2)
    end = cache['length'] = start + T
    found = []
    for name, value in new.items():
        if name not in cache:
            cache[name] = value.new_empty(*value.shape[:2], size, *value.shape[3:])
        ring, kept = cache[name], value[:, :, -size:]
        if T > 1:                                       # before older entries are overwritten
            found.append(torch.cat((ring[:, :, :min(start, size)], value), 2))
        ring[:, :, torch.arange(end - kept.size(2), end, device=ring.device) % size] = kept
        if T == 1:
            found.append(ring[:, :, :min(end, size)])
    return found


class WindowAttention(BaseAttention):
    """softmax(q k^T / sqrt(D) + mask) v, the mask open for the last `size` tokens, the current one included.

    size: tokens, any from 1; with a schedule the largest window, reached at the end of the run and rounded up to a
    multiple of 128. schedule: None, 'linear' or 'cubic' in step / max_iters. long: indices of the blocks that have this
    window, the others half of it (with a schedule at least 128); None = all. documents: the token that begins a
    document (GPT-2's 50256), so that tokens see only their own document; None = one document.
    The current window is a buffer, so that checkpoints include it.
    Parameters as causal attention; scores 4 min(size, T) C FLOPs per token; cache 2 H_kv D min(size, block_size) elements.
    Raises ValueError for arguments that do not fit. Source: modded-nanogpt, token-exact here.
    """

    def __init__(self, config, site, size, schedule=None, long=None, documents=None):
        super().__init__()
        check(config, size, schedule, long, documents)
        width, self.n_head, self.n_kv_head = config.n_embd, config.n_head, config.n_kv_head or config.n_head
        self.head_dim = width // self.n_head
        self.c_q = variants.linear(config, f'{site}.c_q', width, width)
        self.c_k = variants.linear(config, f'{site}.c_k', width, self.n_kv_head * self.head_dim)
        self.c_v = variants.linear(config, f'{site}.c_v', width, self.n_kv_head * self.head_dim)
        self.c_proj = variants.linear(config, f'{site}.c_proj', width, width)
        self.norm_qk, self.mix_v = QueryKeyNorm(config, self.n_head, self.head_dim), ValueMix(config, site)
        self.size, self.schedule, self.eot = size, schedule, documents
        self.short = long is not None and int(site.split('.')[1]) not in long
        self.dropout, self.resid_dropout = config.dropout, nn.Dropout(config.dropout)
        self.register_buffer('window', torch.tensor(self.window_at(1.0)))

    def window_at(self, fraction):
        """This block's window, tokens, at `fraction` of the run."""
        window = scheduled(self.size, self.schedule, fraction) if self.schedule else self.size
        return max(STEP if self.schedule else 1, window // 2) if self.short else window

    def set_progress(self, fraction):
        """Set the window to the schedule's value at `fraction` = step / max_iters."""
        self.window.fill_(self.window_at(fraction))

    def forward(self, x, ctx):
        q, k = split_heads(self.c_q(x), self.n_head), split_heads(self.c_k(x), self.n_kv_head)    # (B, H, T, D)
        v = split_heads(self.mix_v(self.c_v(x), ctx), self.n_kv_head)
        q, k = self.norm_qk(q, k)
        y = self.attend(ctx.rotate(q), ctx.rotate(k), v, ctx)
        return self.resid_dropout(self.c_proj(merge_heads(y)))

    def prepare(self, ctx):
        """Make what layers with these arguments share in one call; GPT.forward calls this before the first block runs."""
        if ctx.cache is None:
            self.mask(ctx)

    def mask(self, ctx):
        """The mask among this call's tokens: block_mask() for FlexAttention, else visible(); once per call.

        The key identifies the window without reading it: equal arguments, equal windows at any progress.
        """
        by_flex, positions, documents = self.flex_fits(ctx), ctx.positions, self.number_documents(ctx)

        def make():
            if by_flex:
                return kernel(block_mask)(self.window, positions, documents)
            return visible(self.window, positions, positions, documents, documents)
        return ctx.share((type(self), self.size, self.schedule, self.short, self.eot, by_flex), make)

    def attend(self, q, k, v, ctx):
        """(B, H, T, D) of q, k, v at this call's positions, and of the cache."""
        scale = self.norm_qk.scale
        if ctx.cache is None:
            mask = self.mask(ctx)
            if self.flex_fits(ctx):
                return kernel(flex)(q, k, v, mask, scale)
        else:
            documents = self.number_documents(ctx)
            k, v, places, texts = self.remember(ctx, k, v, documents)
            # one query sees the whole ring, except what a static step has not filled yet
            mask = None if ctx.seen is None and q.size(2) == 1 and texts is None else visible(
                self.window, ctx.positions, places, documents, texts)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=self.dropout if self.training else 0.0,
                                              scale=scale, enable_gqa=self.n_head != self.n_kv_head)

    def flex_fits(self, ctx):
        """Whether FlexAttention has a kernel for the call: on a CUDA GPU, no dropout, not float64, heads of 16 or more."""
        return (flex_attention is not None and ctx.positions.is_cuda and not (self.training and self.dropout)
                and self.head_dim >= 16 and next(self.parameters()).dtype != torch.float64)

    def remember(self, ctx, k, v, documents):
        """k, v, positions (S,) and documents (B, S) or None: the ring's and this call's. The ring holds k rotated."""
        if ctx.seen is None and 'size' not in ctx.cache:        # reading the window waits for a GPU, so once per text
            ctx.cache['size'] = min(int(self.window), ctx.block_size)
        new = {'k': k, 'v': v, 'position': ctx.positions[None, None]}
        if documents is not None:
            new['document'] = documents[:, None]
        if ctx.seen is None:
            k, v, places, *texts = extend_ring(ctx.cache, ctx.cache['size'], **new)
        else:
            slot = ctx.positions % ctx.cache['k'].size(2)
            k, v, places, *texts = (write(ctx.cache[name], slot, value) for name, value in new.items())
        return k, v, places[0, 0], texts[0][:, 0] if texts else None

    def number_documents(self, ctx):
        """(B, T) the index of each token's document; an end-of-text token belongs to the next document."""
        if self.eot is None:
            return None
        found = ctx.share(('documents', self.eot), lambda: (ctx.tokens == self.eot).cumsum(1))
        if ctx.cache is not None:
            found = found + ctx.cache.get('documents', 0)
            keep(ctx, documents=found[:, -1:])
        return found

    def static_cache(self, cache, size):
        """The rings; unused entries get a position that no query sees, `size`."""
        entries, filled = cache['size'], min(cache['length'], cache['size'])
        return {**padded(cache, entries, ('k', 'v', 'document'), filled=filled),
                **padded(cache, entries, ('position',), value=size, filled=filled),
                **{name: cache[name] for name in ('documents',) if name in cache}}

    def flops(self, context):
        """Forward FLOPs per token of q k^T and of the weighted sum: the keys of the final window, at most `context`."""
        return 4 * min(self.window_at(1.0), context) * self.n_head * self.head_dim


def check(config, size, schedule, long, documents):
    """Refuse arguments that do not fit; each ValueError says what would work."""
    if type(size) is not int or size < 1:
        raise ValueError(f'size is the window in tokens, a whole number of at least 1, got {size!r}')
    if schedule not in (None, *SCHEDULES):
        raise ValueError(f'schedule is None, {" or ".join(map(repr, SCHEDULES))}, got {schedule!r}')
    if schedule and size < STEP:
        raise ValueError(f'a schedule moves in steps of {STEP} tokens, so size must be at least {STEP}, got {size}; '
                         'enlarge it or drop schedule')
    if long is not None and (not isinstance(long, (tuple, list)) or
                             any(type(i) is not int or not 0 <= i < config.n_layer for i in long)):
        raise ValueError(f'long lists blocks from 0 to {config.n_layer - 1}, such as (0,), got {long!r}')
    if documents is not None and (type(documents) is not int or not 0 <= documents < config.vocab_size):
        raise ValueError(f'documents is the token that begins one, below vocab_size ({config.vocab_size}), such as '
                         f"GPT-2's 50256, got {documents!r}")
