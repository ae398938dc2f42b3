"""Multi-head latent attention (MLA; DeepSeek-V2, arXiv 2405.04434): keys and values of all heads from one small latent.

Training expands the latents to keys and values ("naive"). Decoding moves the products to the query and to the output
instead ("absorbed"), so that the cache has one latent and one small rotated key per token, for all heads together.
"""
import torch
import torch.nn as nn
from torch.nn import functional as F

import variants
from attention.heads import ValueMix, attend, extend_cache, mask_of, merge_heads, padded, split_heads
from layers.base import BaseAttention
from layers.basic import Learned, RMSNorm, UnitNorm, unit


def latent_norm(config, features):
    return RMSNorm(features, config.norm_eps) if config.ngpt == 'none' else UnitNorm()


class LatentScale(nn.Module):
    """What multiplies q . k: 1/sqrt(d) of d = d_n + d_r features, and nGPT's norms and learned scales.

    nGPT 'full': q and each head's [k_n, k_r] get unit length, then s_qk, (H, d_n) and, as heads share one k_r, (d_r);
    scale sqrt(d). 'simple': no norm, one s_qk per head, and the scale with which logits of unit latents start at std 1.
    The key's share of s_qk is applied to the query too, and its norm is returned separately, (B, H, T), so that the key
    stays linear in the latent: score = (q_n . k_n + q_r . k_r) inverse.
    """

    def __init__(self, config, heads, nope, rope, rank, query_rank):
        super().__init__()
        self.kind, self.nope, self.scale = config.ngpt, nope, config.attention_scale or (nope + rope) ** -0.5
        width = config.n_embd
        if self.kind == 'simple':
            self.s_qk = Learned((heads, 1, 1), 1.0, width ** -0.5)
            self.scale = (nope / (query_rank * rank) + rope / (query_rank * width)) ** -0.5
        if self.kind == 'full':
            self.s_qk = Learned((heads, 1, nope), 1.0, width ** -0.5)
            self.s_rope = Learned((rope,), 1.0, width ** -0.5) if rope else None
            self.scale = (nope + rope) ** 0.5

    def query(self, q):
        """q (..., H, T, d_n + d_r) before RoPE -> q_n, q_r."""
        if self.kind == 'full':
            q = unit(q)
        if self.kind == 'simple':
            q = q * self.s_qk().square().to(q.dtype)
        q_n, q_r = q[..., :self.nope], q[..., self.nope:]
        if self.kind == 'full':
            q_n = q_n * self.s_qk().square().to(q.dtype)
        return q_n, self.shared(q_r)

    def shared(self, x):
        """The rope part of a query or of the key times its s_qk."""
        return x * self.s_rope().to(x.dtype) if self.kind == 'full' and x.size(-1) else x

    def inverse(self, k_n, k_r):
        """1 / ||[k_n, k_r]|| (..., H, T) of k_n (..., H, T, d_n), k_r (..., T, d_r), in fp32 at least."""
        wide = torch.promote_types(k_n.dtype, torch.float32)
        squares = k_n.to(wide).square().sum(-1) + k_r.to(wide).square().sum(-1).unsqueeze(-2)
        return squares.clamp_min(1e-24).rsqrt()


class LatentAttention(BaseAttention):
    """c = norm(W_DKV x); [k_n, v] = W_UKV c per head; scores (q_n . k_n + q_r . k_r) / sqrt(d_n + d_r), k_r shared.

    kv_lora_rank: d_c, features of the latent; q_lora_rank: the same for queries, None = W_Q without a latent;
    qk_nope_head_dim d_n and v_head_dim d_v: None = n_embd // n_head; qk_rope_head_dim d_r: even, 0 = none. Queries and
    keys have RoPE on their last d_r features whatever `rope` says; with rope=False a position table is added.
    Parameters C H (d_n + d_r) + C (d_c + d_r) + d_c H (d_n + d_v) + H d_v C + d_c, besides q_lora_rank.
    FLOPs per token 2 T H (d_n + d_r + d_v) naive, 2 T H (2 d_c + d_r) absorbed; cache d_c + d_r elements per token, and H
    more under ngpt='full'. The absorbed path forms W_UKV of a structured linear once per call.
    Raises ValueError for arguments and settings that do not fit.
    Subclasses may have several maps per head, each with its own queries and keys: an axis after B.
    """
    maps = 1                                            # a head

    def __init__(self, config, site, kv_lora_rank, q_lora_rank=None, qk_nope_head_dim=None, qk_rope_head_dim=32,
                 v_head_dim=None):
        super().__init__()
        width, self.n_head, self.rank = config.n_embd, config.n_head // self.maps, kv_lora_rank
        self.nope = width // config.n_head if qk_nope_head_dim is None else qk_nope_head_dim
        self.value = width // self.n_head if v_head_dim is None else v_head_dim
        self.rope = qk_rope_head_dim
        check_sizes(kv_lora_rank, q_lora_rank, self.nope, self.rope, self.value)
        check_settings(config, site, self.rope, self.value, self.n_head)
        query = self.n_head * self.maps * (self.nope + self.rope)
        self.c_q_a = self.norm_q = None
        if q_lora_rank is None:
            self.c_q = variants.linear(config, f'{site}.c_q', width, query)
        else:
            self.c_q_a = variants.linear(config, f'{site}.c_q_a', width, q_lora_rank)
            self.norm_q = latent_norm(config, q_lora_rank)
            self.c_q_b = variants.linear(config, f'{site}.c_q_b', q_lora_rank, query)
        self.c_kv_a = variants.linear(config, f'{site}.c_kv_a', width, self.rank + self.maps * self.rope)
        self.norm_kv = latent_norm(config, self.rank)
        self.halves = self.maps * self.nope, self.value                 # a head's rows of W_UKV: keys, value
        self.c_kv_b = variants.linear(config, f'{site}.c_kv_b', self.rank, self.n_head * sum(self.halves))
        self.c_proj = variants.linear(config, f'{site}.c_proj', self.n_head * self.value, width)
        self.scale = LatentScale(config, self.n_head, self.nope, self.rope, self.rank, q_lora_rank or width)
        self.mix_v = ValueMix(config, site)
        self.dropout, self.resid_dropout = config.dropout, nn.Dropout(config.dropout)

    def forward(self, x, ctx):
        q_n, q_r = self.queries(x, ctx)
        c, k_r = self.latents(x)                                        # (B, T, d_c), (B, T, d_r)
        decoding, k_n, inverse = bool(ctx.cache), None, None
        if not decoding or self.scale.kind == 'full' or self.mix_v.used and self.mix_v.first:
            k_n, v = self.multiply_out(c, ctx)                          # of this call's tokens only
        if self.scale.kind == 'full':
            inverse = self.scale.inverse(k_n, k_r)
        k_r = self.turn(self.scale.shared(k_r), ctx)
        latent, past_inverse = self.remember(ctx, c, k_r, inverse)
        if decoding:
            y = self.absorbed(q_n, q_r, latent, past_inverse, ctx)
        else:
            k = torch.cat((k_n, k_r.unsqueeze(-3).expand(*k_n.shape[:-1], -1)), -1)
            k = k if inverse is None else k * inverse[..., None].to(k.dtype)
            y = self.outputs(torch.cat((q_n, q_r), -1), k, v, self.scale.scale)
        y = self.combine(y, latent.size(1) - x.size(1), ctx)
        return self.resid_dropout(self.c_proj(merge_heads(y)))

    def by_map(self, x):
        """(B, H, T, maps * size) -> (B, H, T, size), or with an axis for maps."""
        return x

    def outputs(self, q, k, v, scale):
        """The heads' outputs, (B, H, T, d_v), or one such tensor per map."""
        return attend(q, k, v, scale, self.dropout if self.training else 0.0)

    def combine(self, y, start, ctx):
        """(B, H, T, d_v) of the maps' outputs; start: tokens before this call."""
        return y

    def turn(self, x, ctx):
        return ctx.turn(x) if self.rope else x

    def queries(self, x, ctx):
        """(B, H, T, d_n) and, rotated, (B, H, T, d_r)."""
        q = self.c_q(x) if self.c_q_a is None else self.c_q_b(self.norm_q(self.c_q_a(x)))
        q_n, q_r = self.scale.query(self.by_map(split_heads(q, self.n_head)))
        return q_n, self.turn(q_r, ctx)

    def latents(self, x):
        """The normalised latent (B, T, d_c) and the shared key before RoPE (B, T, d_r)."""
        c, k_r = self.c_kv_a(x).split((self.rank, self.maps * self.rope), -1)
        return self.norm_kv(c).to(k_r.dtype), self.by_map(k_r[:, None]).squeeze(-3)

    def multiply_out(self, c, ctx):
        """k_n (B, H, T, d_n) and v (B, H, T, d_v), mixed with block 0's, of latents (B, T, d_c)."""
        k_n, v = split_heads(self.c_kv_b(c), self.n_head).split(self.halves, -1)
        return self.by_map(k_n), split_heads(self.mix_v(merge_heads(v), ctx), self.n_head)

    def remember(self, ctx, c, k_r, inverse):
        """All latents with rotated keys so far, (B, S, d_c + maps d_r), and norms, (B, H, S), or None."""
        keys = k_r if self.maps == 1 else merge_heads(k_r)
        new = {'latent': torch.cat((c, keys), -1)[:, None]}
        if inverse is not None:
            new['inverse'] = inverse.flatten(1, -2)
        latent, *norms = extend_cache(ctx, **new)
        return latent[:, 0], norms[0].unflatten(1, inverse.shape[1:-1]) if norms else None

    def static_cache(self, cache, size):
        return padded(cache, size, ('latent', 'inverse'), filled=cache['length'])

    def up(self):
        """W_UKV as (H, d_n, d_c) for keys, or with the axis for maps before H, and (H, d_v, d_c) for values."""
        keys, values = self.c_kv_b.dense_weight().unflatten(0, (self.n_head, -1)).split(self.halves, 1)
        return self.by_map(keys.mT[None])[0].mT, values

    def absorbed(self, q_n, q_r, latent, inverse, ctx):
        """The same as outputs() of the expanded keys and values, for the last T of the S tokens of latent.

        score = (W_UK^T q_n) . c + q_r . k_r; y = W_UV (sum_j a_j c_j). The key's bias adds the same to every score of a
        query, so it is left out. (B, H, T, d_n), (B, H, T, d_r), (B, S, d_c + maps d_r) -> (B, H, T, d_v).
        """
        up_k, up_v = self.up()
        q = torch.cat((q_n @ up_k, self.place(q_r)), -1)                # (B, H, T, d_c + maps d_r)
        scores = self.scale.scale * (q.flatten(1, -2) @ latent.mT).unflatten(1, q.shape[1:-1])
        wide = torch.promote_types(scores.dtype, torch.float32)
        scores = scores.to(wide) if inverse is None else scores.to(wide) * inverse.unsqueeze(-2)
        mask = mask_of(ctx, q.size(-2), latent.size(1))
        weights = scores.masked_fill(~mask, -torch.inf).softmax(-1).to(latent.dtype)
        weights = F.dropout(weights, self.dropout, self.training)
        latents = latent[..., :self.rank]
        y = self.read(weights, latents, up_v)
        if self.mix_v.used and self.mix_v.first:
            ctx.first_latent = self, latents, up_v
        elif self.mix_v.used:                                           # block 0's values, through its own W_UV
            first, *theirs = ctx.first_latent
            y = torch.lerp(y, first.read(weights, *theirs), self.mix_v.lam.to(y.dtype))
        return y

    def place(self, q_r):
        """q_r as a vector over the rotated keys of all maps: zero except for its own map's."""
        if self.maps == 1:
            return q_r
        own = torch.eye(self.maps, dtype=q_r.dtype, device=q_r.device)[:, None, None, :, None]
        return (q_r.unsqueeze(-2) * own).flatten(-2)

    def read(self, weights, latents, up_v):
        """sum_j a_j v_j = W_UV (sum_j a_j c_j) + b_v, as the weights (B, H, T, S) of a query sum to 1.

        The weights may be another block's, with other heads: these then divide the features of v differently.
        """
        heads = weights.size(-3), -1
        mean = (weights.flatten(1, -2) @ latents).unflatten(1, weights.shape[1:-1])
        y = mean @ up_v.flatten(0, 1).unflatten(0, heads).mT
        if self.c_kv_b.bias is None:
            return y
        bias = self.c_kv_b.bias.to(y.dtype).unflatten(0, (self.n_head, -1))[:, self.halves[0]:]
        return y + bias.flatten().unflatten(0, heads)[:, None]

    def flops(self, context):
        """Forward FLOPs per token of scores and weighted sums over `context` keys, expanded as in training."""
        return 2 * context * self.n_head * self.maps * (self.nope + self.rope + self.value)


def check_sizes(kv_lora_rank, q_lora_rank, nope, rope, value):
    """Refuse invalid sizes; each ValueError says what would work."""
    sizes = {'kv_lora_rank': kv_lora_rank, 'qk_nope_head_dim': nope, 'v_head_dim': value}
    if q_lora_rank is not None:
        sizes['q_lora_rank'] = q_lora_rank
    for name, size in sizes.items():
        if type(size) is not int or size < 1:
            raise ValueError(f'{name} must be a whole number of at least 1, got {size!r}')
    if type(rope) is not int or rope < 0 or rope % 2:
        raise ValueError(f'qk_rope_head_dim must be an even whole number, 0 for none, got {rope!r}')


def check_settings(config, site, rope, value, heads):
    """Refuse settings that do not work with latents; each ValueError says what would work."""
    if config.n_kv_head not in (None, config.n_head):
        raise ValueError('mla has one latent for all heads, so there are no groups of heads; set n_kv_head=None')
    if config.qk_norm != 'none':
        raise ValueError("mla norms its latents instead of queries and keys; set qk_norm='none'")
    if config.rope and not rope:
        raise ValueError('rope=True and qk_rope_head_dim=0 leave mla without positions; take an even number such as 32')
    if not config.value_residual:
        return
    if value * heads != config.n_embd:
        raise ValueError(f'value_residual mixes values of n_embd features; set v_head_dim={config.n_embd // heads}')
    first = variants.parse_spec(variants.match(config.attention, 'h.0', 'causal')[1])
    if not site.startswith('h.0.') and not issubclass(variants.ATTENTIONS[first.name], LatentAttention):
        raise ValueError(f"value_residual reads block 0's latents while decoding, and block 0 is {first.name}; "
                         'give it mla too')
