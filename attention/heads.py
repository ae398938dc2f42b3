"""Shared by all attention classes: norms of queries and keys, value residual, RoPE, the cache, SDPA.

Shapes: B batch, T tokens of this call, S tokens so far, C = n_embd, H heads, D head size.
"""
import math

import torch
import torch.nn as nn
from torch.nn import functional as F

from layers.basic import Learned, rms, unit

ROOM = 1024                             # positions of a cache that are allocated at once


def split_heads(x, heads):
    """(B, T, H D) -> (B, H, T, D)"""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x):
    """(B, H, T, D) -> (B, T, H D)"""
    return x.transpose(1, 2).flatten(2)


class QueryKeyNorm(nn.Module):
    """Norms and scales q and k before RoPE; `scale` multiplies q . k.

    qk_norm='standard' or 'split': RMS norm over the head size D, no gain, scale 1/sqrt(D) (so |logit| <= sqrt(D)), or
    config.attention_scale.
    ngpt='full': L2 norm, a learned s_qk (H, D) shared by q and k, scale sqrt(D); 'simple': no norm, one s_qk per head,
    scale C/sqrt(D), so that logits start with std 1 (C = n_embd). Source: Loshchilov et al. 2024 (nGPT).
    """

    def __init__(self, config, heads, head_dim):
        super().__init__()
        self.kind = config.ngpt if config.ngpt != 'none' else config.qk_norm
        self.scale, width = config.attention_scale or head_dim ** -0.5, config.n_embd
        if config.ngpt != 'none':
            shape = (heads, 1, head_dim) if config.ngpt == 'full' else (heads, 1, 1)
            self.s_qk = Learned(shape, 1.0, width ** -0.5)
            self.scale = head_dim ** 0.5 if config.ngpt == 'full' else width * head_dim ** -0.5

    def forward(self, q, k):
        """q (B, H, T, D), k (B, H_kv, T, D) -> the same shapes."""
        if self.kind in ('standard', 'split'):
            return rms(q), rms(k)
        if self.kind == 'full':
            q, k = unit(q), unit(k)
        if self.kind in ('full', 'simple'):
            s = self.s_qk().to(q.dtype)
            q, k = q * s, k * s
        return q, k


class ValueMix(nn.Module):
    """Value residual: v <- (1 - lam) v + lam v_0 with block 0's raw values, one learned lam per block, initially 0.5.

    Block 0 keeps its v in ctx.first_value and has no lam. Source: Zhou et al. 2024, arXiv 2410.17897.
    """
    tags = {'lam': 'vector'}

    def __init__(self, config, site):
        super().__init__()
        self.used, self.first = config.value_residual, site.startswith('h.0.')
        if self.used and not self.first:
            self.lam = nn.Parameter(torch.full((1,), 0.5))           # FSDP2 shards no scalars

    def forward(self, v, ctx):
        """v (B, T, features of all value heads) of the tokens of this call."""
        if not self.used:
            return v
        if self.first:
            ctx.first_value = v
            return v
        return torch.lerp(v, ctx.first_value.to(v.dtype), self.lam.to(v.dtype))


def rotation(positions, size, base, dtype, stretch=(), half=False):
    """cos, sin (T, size/2) of the angles position * base^(-2i/size), in fp32 at least; stretch: as in stretched.

    half: only the first half of the pairs, n of them (the larger one), turn, with base^(-i/(n-1)); the others stand still,
    so that a head can match content at any distance. Source: modded-nanogpt's half-truncated RoPE, base 1024.
    """
    dtype = torch.promote_types(dtype, torch.float32)
    frequencies = base ** (-torch.arange(0, size, 2, device=positions.device, dtype=dtype) / size)
    if half:
        turning = (len(frequencies) + 1) // 2
        spread = torch.arange(turning, device=positions.device, dtype=dtype) / max(1, turning - 1)
        frequencies = torch.cat((base ** -spread, torch.zeros_like(frequencies[turning:])))
    frequencies = stretched(frequencies, *stretch) if stretch else frequencies
    angles = positions.to(dtype)[:, None] * frequencies
    return angles.cos(), angles.sin()


def stretched(frequencies, factor, low, high, context):
    """Llama 3.1's frequencies: f / factor where a wave has fewer than `low` turns in `context` tokens, f above `high`.

    f (s + (1 - s) / factor) with s = (turns - low) / (high - low) within 0 and 1, turns = context f / 2 pi. Source:
    Grattafiori et al. 2024 (Llama 3), and Hugging Face's rope_type llama3.
    """
    share = ((context * frequencies / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
    return frequencies * (share + (1 - share) / factor)


def stretch_of(numbers):
    """(factor, low, high, context) or () as a tuple; raises ValueError for what is neither."""
    sound = isinstance(numbers, (tuple, list)) and all(type(number) in (int, float) for number in numbers)
    if not sound or len(numbers) not in (0, 4) or numbers and not (
            1 <= numbers[0] < 1e9 and 0 < numbers[1] < numbers[2] < 1e9 and 1 <= numbers[3] < 1e15):
        raise ValueError(f'rope_llama3 is (factor, low, high, context) with factor >= 1 and 0 < low < high, got {numbers!r}')
    return tuple(numbers)


def rotate(x, table):
    """RoPE (Su et al. 2021): rotate each adjacent pair (2i, 2i+1) of the last axis by its angle. x (..., T, size)."""
    cos, sin = table
    even, odd = x.unflatten(-1, (-1, 2)).to(cos.dtype).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).to(x.dtype)


def sizes(config, head_dim, kv_heads=None, v_head_dim=None):
    """(query heads, key-value heads, size of a value head) of a block that keeps `kv_heads` groups."""
    groups = config.n_kv_head or config.n_head
    for name, value, most in (('kv_heads', kv_heads, groups), ('v_head_dim', v_head_dim, head_dim)):
        if value is not None and (type(value) is not int or not 1 <= value <= most):
            raise ValueError(f'{name} must be a whole number from 1 to {most}, got {value!r}')
    kept, size = kv_heads or groups, v_head_dim or head_dim
    if (kept, size) != (groups, head_dim) and (config.value_residual or config.ngpt != 'none'):
        raise ValueError("kv_heads and v_head_dim need value_residual=False and ngpt='none', whose tables are of all heads")
    return config.n_head // groups * kept, kept, size


def extend_cache(ctx, **new):
    """Append tensors (B, H, T, ...) to this layer's cache, if there is one; return all so far, in the order given.

    Buffers have block_size positions, beyond ROOM at first twice those filled, so that a token costs no copy of the past.
    In a static step (see decoding.py) the whole buffers are returned; ctx.seen says which positions are filled.
    """
    if ctx.cache is None:
        return tuple(new.values())
    if ctx.seen is not None:
        return tuple(write(ctx.cache[name], ctx.positions, value) for name, value in new.items())
    start = ctx.cache.setdefault('length', 0)
    end = ctx.cache['length'] = start + next(iter(new.values())).size(2)
    for name, value in new.items():
        if name not in ctx.cache or ctx.cache[name].size(2) < end:
            room = value.new_empty(*value.shape[:2], min(ctx.block_size, max(ROOM, 2 * end)), *value.shape[3:])
            if start:
                room[:, :, :start] = ctx.cache[name][:, :, :start]
            ctx.cache[name] = room
        ctx.cache[name][:, :, start:end] = value
    return tuple(ctx.cache[name][:, :, :end] for name in new)


def write(buffer, places, value, dim=2):
    """Write value into the buffer at these places (n,) of an axis, in the buffer's type; returns the buffer."""
    return buffer.index_copy_(dim, places, value.to(buffer.dtype))


def keep(ctx, **new):
    """Put tensors that do not grow into this layer's cache, replacing those of the last call; in place in a static step."""
    for name, value in new.items():
        if ctx.seen is None:
            ctx.cache[name] = value
        else:
            ctx.cache[name].copy_(value)


def padded(cache, size, names, dim=2, value=0, filled=None):
    """{name: tensor} of the `names` in a cache, with `size` entries along an axis, the first `filled` of them kept.

    Entries that were never written become `value`: a buffer may contain NaN there, which no mask removes.
    """
    found = {}
    for name in names:
        if name in cache:
            t = cache[name].narrow(dim, 0, cache[name].size(dim) if filled is None else filled)
            found[name] = F.pad(t, (*(0, 0) * (t.ndim - 1 - dim), 0, size - t.size(dim)), value=value)
    return found


def mask_of(ctx, queries, keys):
    """causal_mask of this call's positions, or (1, block_size) in a static step."""
    return causal_mask(queries, keys, ctx.positions.device) if ctx.seen is None else ctx.seen


def causal_mask(queries, keys, device):
    """(queries, keys), True where a query, one of the last `queries` of `keys` positions, may attend."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def attend_openly(q, k, v, scale):
    """The same with explicit scores (B H, T, T), for training in bf16 on a CPU, where SDPA's backward pass is slow.

    Forward and backward at (B, H, T, D) = (6, 2, 128, 64), one thread: 1.7 ms, SDPA 6.5; (4, 6, 256, 64): 9.6 and 24 ms.
    """
    batch, heads = q.shape[:2]
    k, v = (t.repeat_interleave(heads // t.size(1), 1).flatten(0, 1) for t in (k, v))
    mask = q.new_zeros(()).masked_fill(~causal_mask(q.size(2), k.size(1), q.device), -torch.inf)       # (T, T)
    scores = torch.baddbmm(mask, q.flatten(0, 1), k.mT, alpha=scale)                                    # (B H, T, T)
    return torch.bmm(scores.softmax(-1).to(v.dtype), v).unflatten(0, (batch, heads))


def attend(q, k, v, scale, dropout=0.0, softcap=0.0, seen=None):
    """Causal softmax(scale q k^T) v of the last T positions of S, by SDPA; of one position with a mask `seen` (1, S).

    q (B, H, T, D), k (B, H_kv, S, D), v (B, H_kv, S, D_v) -> (B, H, T, D_v). softcap > 0 bounds the scores by
    softcap tanh(score / softcap), with explicit scores. SDPA's own is_causal aligns at the wrong corner for S > T.
    """
    queries, keys = q.size(2), k.size(2)
    if softcap:
        k, v = (t.repeat_interleave(q.size(1) // t.size(1), 1) for t in (k, v))
        scores = softcap * torch.tanh(scale * (q @ k.mT) / softcap)
        mask = causal_mask(queries, keys, q.device) if seen is None else seen
        scores = scores.masked_fill(~mask, -torch.inf)
        return F.dropout(scores.softmax(-1), dropout) @ v
    if q.dtype == torch.bfloat16 and q.device.type == 'cpu' and q.requires_grad and not dropout and queries == keys:
        return attend_openly(q, k, v, scale)
    mask = {'attn_mask': seen} if seen is not None else {'is_causal': True} if queries == keys else {} if queries == 1 else {
        'attn_mask': causal_mask(queries, keys, q.device)}
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scale, enable_gqa=q.size(1) != k.size(1),
                                          **mask)
