"""Causal Linformer: each past chunk as a few mixed keys and values, the current chunk token by token.

Wang et al. 2020 mix all T tokens into every slot, which shows the future and fixes T. Here each complete chunk of c
tokens is mixed alone, and only later chunks see its r slots, as in Long-Short Transformer's autoregressive attention
(Zhu et al. 2021).
"""
import torch
import torch.nn as nn
from torch.nn import functional as F

import variants
from attention.heads import QueryKeyNorm, ValueMix, merge_heads, padded, split_heads, write
from layers.base import BaseAttention
from layers.basic import RMSNorm


def block_average(slots, chunk):
    """(slots, chunk): slot i is the mean of the i-th of `slots` runs of adjacent tokens, of nearly equal length."""
    run = torch.arange(chunk) * slots // chunk
    member = (run == torch.arange(slots)[:, None]).float()
    return member / member.sum(1, keepdim=True)


class LinformerAttention(BaseAttention):
    """One softmax over r slots of every past chunk and over the keys of the current chunk up to t.

    Chunk n, once complete, has slot keys E K_n and slot values F V_n. E, F (r, c) are learned and shared over
    chunks and heads; they start as block averages with N(0, 0.02) added. Keys are mixed before RoPE and before their
    norm; a slot is then normalised like a key and rotated to the position of its chunk's last token.
    slots: r, at most chunk; 0 = attention within chunks. chunk: c, tokens. per_head: E, F for every key head.
    dynamic: weights softmax over the chunk of x W_p instead of E and F, for keys and values alike, W_p (C -> H_kv r).
    slot_norm: RMS norm with a gain on slot keys, whose norm averaging reduces.
    Parameters 2 C^2 (1 + H_kv/H) + 2 r c; scores 4 C (c + r T/c) FLOPs per token; cache 2 H_kv D (c + r T/c) elements
    (dynamic: r H_kv more per token of the open chunk). Raises ValueError for arguments that do not fit.
    """
    tags = {'E': 'vector', 'F': 'vector', 'W_p': 'vector'}      # mixing weights: no weight decay, no Muon

    def __init__(self, config, site, slots, chunk=64, per_head=False, dynamic=False, slot_norm=False):
        super().__init__()
        self.norm_qk = QueryKeyNorm(config, config.n_head, config.n_embd // config.n_head)
        check(config, slots, chunk, per_head, dynamic, slot_norm, self.norm_qk.kind)
        width, self.n_head, self.n_kv_head = config.n_embd, config.n_head, config.n_kv_head or config.n_head
        self.head_dim, self.slots, self.chunk, self.dynamic = width // self.n_head, slots, chunk, dynamic
        self.c_q = variants.linear(config, f'{site}.c_q', width, width)
        self.c_k = variants.linear(config, f'{site}.c_k', width, self.n_kv_head * self.head_dim)
        self.c_v = variants.linear(config, f'{site}.c_v', width, self.n_kv_head * self.head_dim)
        self.c_proj = variants.linear(config, f'{site}.c_proj', width, width)
        self.mix_v = ValueMix(config, site)
        if dynamic:
            self.W_p = nn.Parameter(0.02 * torch.randn(self.n_kv_head * slots, width))
        elif slots:
            for name in ('E', 'F'):
                mean = block_average(slots, chunk).expand(self.n_kv_head if per_head else 1, slots, chunk)
                self.register_parameter(name, nn.Parameter(mean + 0.02 * torch.randn(mean.shape)))
        self.slot_norm = RMSNorm(self.head_dim) if slot_norm else None
        self.dropout, self.resid_dropout = config.dropout, nn.Dropout(config.dropout)

    def forward(self, x, ctx):
        q = split_heads(self.c_q(x), self.n_head)                       # (B, H, T, D)
        raw = {'k': split_heads(self.c_k(x), self.n_kv_head),
               'v': split_heads(self.mix_v(self.c_v(x), ctx), self.n_kv_head)}
        if self.dynamic:
            raw['p'] = split_heads(F.linear(x, self.W_p), self.n_kv_head)       # (B, H, T, r)
        if ctx.seen is not None:
            return self.resid_dropout(self.c_proj(merge_heads(self.static_step(q, raw, ctx))))
        raw = self.reopen(ctx, raw)                                     # (B, H, L, .), L >= T, from a chunk's border on
        L = raw['k'].size(2)
        places = None if L == q.size(2) else ctx.positions[-1] - L + 1 + torch.arange(L, device=x.device)
        before, slot_k, slot_v = self.all_slots(ctx, raw, ctx.positions if places is None else places)
        q, k = self.norm_qk(q, raw['k'])
        q, k = ctx.rotate(q), ctx.rotate(k, places)
        v, groups = raw['v'], self.n_head // self.n_kv_head
        if groups > 1:
            k, v, slot_k, slot_v = (t.repeat_interleave(groups, 1) for t in (k, v, slot_k, slot_v))
        if q.size(2) == 1:                                              # sees all slots except its own chunk's
            k, v = torch.cat((slot_k[:, :, :before], k), 2), torch.cat((slot_v[:, :, :before], v), 2)
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.drop, scale=self.norm_qk.scale)
        else:
            y = self.attend(q, k, v, slot_k, slot_v, before)
        return self.resid_dropout(self.c_proj(merge_heads(y)))

    def static_step(self, q, raw, ctx):
        """The outputs (B, H, 1, D) of one token: buffers hold a whole chunk and the slots of all chunks of block_size.

        The open chunk is mixed at every token, into slots that no query sees before the chunk is complete.
        """
        c, r, groups = self.chunk, self.slots, self.n_head // self.n_kv_head
        number, place = ctx.positions // c, ctx.positions % c           # (1,) of the chunk, and in it
        chunk, slot = torch.arange(c, device=q.device), torch.arange(ctx.cache['slot_k'].size(2), device=q.device)
        opened = {name: write(ctx.cache[name], place, value) for name, value in raw.items()}        # (B, H, c, .)
        new = self.compress(opened, number * c + chunk, ctx)
        slot_k, slot_v = (write(ctx.cache[name], number * r + slot[:r], value)
                          for name, value in zip(('slot_k', 'slot_v'), new))
        q, k = self.norm_qk(q, opened['k'])
        k, v = torch.cat((slot_k, ctx.rotate(k, number * c + chunk)), 2), torch.cat((slot_v, opened['v']), 2)
        seen = torch.cat((slot < number * r, chunk <= place))[None]
        return F.scaled_dot_product_attention(ctx.rotate(q), k, v, attn_mask=seen, dropout_p=self.drop,
                                              scale=self.norm_qk.scale, enable_gqa=groups > 1)

    def static_cache(self, cache, size):
        slots = -(-size // self.chunk) * self.slots
        return {**padded(cache, self.chunk, ('k', 'v', 'p')), **padded(cache, slots, ('slot_k', 'slot_v'))}

    @property
    def drop(self):
        return self.dropout if self.training else 0.0

    def reopen(self, ctx, raw):
        """The open chunk's raw tensors followed by this call's; what is open afterwards stays in the cache."""
        if not ctx.cache:
            opened = raw
        else:
            opened = {name: torch.cat((ctx.cache[name], value), 2) for name, value in raw.items()}
        if ctx.cache is not None:
            done = opened['k'].size(2) // self.chunk * self.chunk
            ctx.cache.update({name: value[:, :, done:].clone() for name, value in opened.items()})
        return opened

    def all_slots(self, ctx, raw, places):
        """(slots of the chunks before the first token of raw, slot keys, slot values of all complete chunks)."""
        slot_k, slot_v = self.compress(raw, places, ctx)                # (B, H, N r, D)
        if ctx.cache is None:
            return 0, slot_k, slot_v
        before = ctx.cache['slot_k'].size(2) if 'slot_k' in ctx.cache else 0
        if before:
            slot_k, slot_v = (torch.cat((ctx.cache[name], new), 2) if new.size(2) else ctx.cache[name]
                              for name, new in (('slot_k', slot_k), ('slot_v', slot_v)))
        ctx.cache.update(slot_k=slot_k, slot_v=slot_v)
        return before, slot_k, slot_v

    def compress(self, raw, places, ctx):
        """Slot keys and values (B, H, N r, D) of the N complete chunks of raw (B, H, L, D); places (L,) positions."""
        r, c = self.slots, self.chunk
        count = raw['k'].size(2) // c
        chunks = {name: value[:, :, :count * c].unflatten(2, (count, c)) for name, value in raw.items()}
        if not r:
            return raw['k'][:, :, :0], raw['v'][:, :, :0]
        if self.dynamic:
            wide = torch.promote_types(chunks['p'].dtype, torch.float32)
            weights = chunks['p'].to(wide).softmax(3).to(chunks['k'].dtype)     # (B, H, N, c, r)
            k, v = (torch.einsum('bhncr,bhncd->bhnrd', weights, chunks[name]) for name in ('k', 'v'))
        else:
            k, v = (torch.einsum('hrc,bhncd->bhnrd', weights.expand(self.n_kv_head, r, c), chunks[name])
                    for name, weights in (('k', self.E), ('v', self.F)))
        k, v = k.flatten(2, 3), v.flatten(2, 3)
        if self.slot_norm is not None:
            k = self.slot_norm(k).to(v.dtype)
        k = self.norm_qk(k, k)[1]
        return ctx.rotate(k, places[:count * c].view(count, c)[:, -1].repeat_interleave(r)), v

    def attend(self, q, k, v, slot_k, slot_v, before):
        """One softmax over slots and current chunk. q (B, H, T, D): the last T of the L tokens of k and v (B, H, L, D).

        The first `before` slots belong to chunks before k; slot_k, slot_v (B, H, before + N r, D).
        """
        c, T, L, far = self.chunk, q.size(2), k.size(2), slot_k.size(2)
        M = -(-L // c)                                                  # chunks, the last perhaps partial
        q = F.pad(q, (0, 0, L - T, M * c - L)).unflatten(2, (M, c))     # (B, H, M, c, D)
        k, v = (F.pad(t, (0, 0, 0, M * c - L)).unflatten(2, (M, c)) for t in (k, v))
        seen = before + self.slots * torch.arange(M, device=q.device)   # slots that chunk m may attend to
        hidden = torch.arange(far, device=q.device) >= seen[:, None, None]
        past = (q.flatten(2, 3) @ slot_k.mT).unflatten(2, (M, c)).masked_fill(hidden, -torch.inf)
        later = torch.ones(c, c, dtype=torch.bool, device=q.device).triu(1)
        own = (q @ k.mT).masked_fill(later, -torch.inf)                 # (B, H, M, c, c)
        weights = (self.norm_qk.scale * torch.cat((past, own), -1)).softmax(-1).to(v.dtype)
        past, own = F.dropout(weights, self.drop).split((far, c), -1)
        y = (past.flatten(2, 3) @ slot_v).unflatten(2, (M, c)) + own @ v
        return y.flatten(2, 3)[:, :, L - T:L]

    def flops(self, context):
        """Forward FLOPs per token: scores and sums over the current chunk and all slots, and the mixing of slots."""
        r, c, width, keys = self.slots, self.chunk, self.n_head * self.head_dim, self.n_kv_head * self.head_dim
        scores = 4 * width * (min(c, context) + r * (context // c))
        return scores + 4 * r * keys + (2 * self.W_p.numel() if self.dynamic else 0)


def check(config, slots, chunk, per_head, dynamic, slot_norm, kind):
    """Refuse arguments that do not fit; each ValueError says what would work. kind: the norm of queries and keys."""
    if type(slots) is not int or type(chunk) is not int or slots < 0 or chunk < 1:
        raise ValueError(f'slots is a whole number from 0 and chunk one from 1, got {slots!r} and {chunk!r}')
    if any(not isinstance(flag, bool) for flag in (per_head, dynamic, slot_norm)):
        raise ValueError(f'per_head, dynamic and slot_norm are True or False, got {per_head!r}, {dynamic!r} and '
                         f'{slot_norm!r}')
    if slots > chunk:
        raise ValueError(f'slots ({slots}) must not exceed chunk ({chunk}), which they stand for; lower slots')
    if slots and chunk >= config.block_size:
        raise ValueError(f'no token would ever see a slot: chunk ({chunk}) must be below block_size '
                         f'({config.block_size}); lower chunk, or take causal attention')
    if not slots and (per_head or dynamic or slot_norm):
        raise ValueError('slots=0 has nothing to mix; drop per_head, dynamic and slot_norm')
    if dynamic and per_head:
        raise ValueError('dynamic weights are those of each head already; drop per_head')
    if slot_norm and kind != 'none':
        raise ValueError("slot_norm goes with qk_norm='none' and ngpt='none' only, as those norm slots too; drop it")
