"""Differential attention (DIFF): two attention maps per head, the second subtracted from the first.

Shapes: B batch, T tokens of this call, S tokens so far, C = n_embd, H = n_head, D = C / H, P pairs of query maps,
G groups of keys and values, D_v size of a value (2 D in version 1, D in version 2).
"""
import math

import torch
import torch.nn as nn
from torch.nn import functional as F

import variants
from attention.heads import QueryKeyNorm, ValueMix, attend, extend_cache, merge_heads, padded, split_heads
from layers.base import BaseAttention
from layers.basic import RMSNorm, unit

PAD_FROM = 256                                          # queries; measured on a CPU


class TwoMaps:
    """Mixin for heads of two maps: version 1's lam, norm and factor, and the two outputs."""
    tags = {'lambdas': 'vector'}

    def make_lambda(self, config, site, map_dim, value_dim):
        """The four vectors of lam, of a query's size; the norm per head, and the factor 1 - lambda_init."""
        self.lambdas = nn.Parameter(0.1 * torch.randn(4, map_dim))
        self.lambda_init = 0.8 - 0.6 * math.exp(-0.3 * int(site.split('.')[1]))         # the first layer is 0
        self.norm_head = RMSNorm(value_dim, eps=1e-5) if config.ngpt == 'none' else None
        self.head_scale = 1 - self.lambda_init

    def lam(self, x):
        """lam of the layer, (), in fp32 at least."""
        q1, k1, q2, k2 = widen(self.lambdas)
        return (q1 * k1).sum().exp() - (q2 * k2).sum().exp() + self.lambda_init

    def outputs(self, q, k, v, scale, seen=None):
        """The maps' outputs, (B, P, T, D_v) each, by SDPA: q (B, 2, P, T, D), k (B, 2 or 1, G, S, D), v (B, G, S, D_v).

        Kernels that form no T x S map need one size for q, k and v: long calls are padded with zeros for them. Short
        calls are faster without. flops does not count the zeros.
        """
        if q.size(-2) >= PAD_FROM and v.size(-1) > q.size(-1):
            q, k = (F.pad(t, (0, v.size(-1) - t.size(-1))) for t in (q, k))
        dropout = self.dropout if self.training else 0.0
        return tuple(attend(q[:, i], k[:, i % k.size(1)], v, scale, dropout, seen=seen) for i in (0, 1))

    def finish(self, y):
        """The norm and factor per head."""
        y = unit(y) * y.size(-1) ** 0.5 if self.norm_head is None else self.norm_head(y)
        return y * self.head_scale


class DifferentialAttention(TwoMaps, BaseAttention):
    """(softmax(q1 k1) - lam softmax(q2 k2)) v, by heads.

    Version 1 (Ye et al. 2024, arXiv 2410.05258): P = H / 2 heads with two keys each and values of size 2 D; lam =
    exp(l1 . l2) - exp(l3 . l4) + lambda_init, one per layer, lambda_init = 0.8 - 0.6 exp(-0.3 layer); then an RMS norm per
    head and the factor 1 - lambda_init. n_kv_head counts maps, so that grouped queries share pairs of keys.
    Parameters of a full layer 4 C^2 + 6 D, FLOPs 6 S C per token, cache 2 n_kv_head D elements per token.
    Version 2 (microsoft/diff-attn-v2): P = H heads, both maps of a head with the same key and value, of size D; lam =
    sigmoid(w . x), one per token and head; no norm. Parameters 5 C^2 + H C, FLOPs 8 S C + 2 H C, cache as version 1.

    qk_norm='standard' normalises the two queries of a head as one vector, and its two keys; 'split' each map separately.
    ngpt: each map's q and k are unit vectors, both maps share s_qk; the norm per head is L2, times sqrt(2 D), without
    gain (the branch's own norm hides 1 - lambda_init); w is used as a unit vector, times sqrt(C).
    Raises ValueError for another version, and in version 1 for an odd n_head or n_kv_head.
    """
    tags = {**TwoMaps.tags, 'w_lambda': 'vector'}

    def __init__(self, config, site, version=1):
        super().__init__()
        if type(version) is not int or version not in (1, 2):
            raise ValueError(f'version is 1 or 2, got {version!r}')
        width, keys = config.n_embd, config.n_kv_head or config.n_head
        if version == 1 and (config.n_head % 2 or keys % 2):
            raise ValueError('a head is a pair of maps, so that n_head and n_kv_head must be even, got '
                             f'{config.n_head} and {keys}')
        self.version, self.head_dim, self.ngpt = version, width // config.n_head, config.ngpt != 'none'
        self.key_maps = 2 if version == 1 else 1
        self.pairs, self.groups = config.n_head // self.key_maps, keys // self.key_maps
        self.value_dim = self.key_maps * self.head_dim
        self.c_q = variants.linear(config, f'{site}.c_q', width, 2 * self.pairs * self.head_dim)
        self.c_k = variants.linear(config, f'{site}.c_k', width, keys * self.head_dim)
        self.c_v = variants.linear(config, f'{site}.c_v', width, keys * self.head_dim)
        self.c_proj = variants.linear(config, f'{site}.c_proj', width, width)
        self.joint_norm = config.qk_norm == 'standard' and not self.ngpt
        self.norm_qk, self.mix_v = QueryKeyNorm(config, self.pairs, self.head_dim), ValueMix(config, site)
        self.dropout, self.resid_dropout = config.dropout, nn.Dropout(config.dropout)
        if version == 2:
            self.w_lambda = nn.Parameter(0.02 * torch.randn(self.pairs, width))
        else:
            self.make_lambda(config, site, self.head_dim, self.value_dim)

    def forward(self, x, ctx):
        q, k, v = self.project(x, ctx)
        y = self.finish(self.mix(q, k, v, self.lam(x), ctx)).to(v.dtype)
        return self.resid_dropout(self.c_proj(merge_heads(y)))

    def project(self, x, ctx):
        """x (B, T, C) -> q (B, 2, P, T, D); k (B, 2 or 1, G, S, D) and v (B, G, S, D_v) of all tokens so far."""
        q, k = split_heads(self.c_q(x), self.pairs), split_heads(self.c_k(x), self.groups)
        v = split_heads(self.mix_v(self.c_v(x), ctx), self.groups)
        if self.joint_norm:
            q, k = self.norm_qk(q, k)
        q, k = by_map(q, 2), by_map(k, self.key_maps)
        if not self.joint_norm:
            q, k = self.norm_qk(q, k)
        k, v = extend_cache(ctx, k=ctx.rotate(k).flatten(1, 2), v=v)
        return ctx.rotate(q), k.unflatten(1, (self.key_maps, self.groups)), v

    def static_cache(self, cache, size):
        return padded(cache, size, ('k', 'v'), filled=cache['length'])

    def lam(self, x):
        """lam in fp32 at least: of the layer, (), or in version 2 of each token and head, (B, P, T, 1)."""
        if self.version == 1:
            return super().lam(x)
        w = unit(self.w_lambda) * x.size(-1) ** 0.5 if self.ngpt else self.w_lambda
        return torch.sigmoid(widen(F.linear(x, w))).mT.unsqueeze(-1)

    def mix(self, q, k, v, lam, ctx):
        """The heads' outputs before their norm, (B, P, T, D_v), in fp32 at least."""
        first, second = self.outputs(q, k, v, self.norm_qk.scale, ctx.seen)
        return widen(first) - lam * widen(second)

    def finish(self, y):
        """Version 1's norm and factor per head."""
        return y if self.version == 2 else super().finish(y)

    def flops(self, context):
        """Forward FLOPs per token of two maps' scores and weighted sums, with `context` keys, and of version 2's lam."""
        lam = 2 * self.w_lambda.numel() if self.version == 2 else 0
        return 4 * context * self.pairs * (self.head_dim + self.value_dim) + lam


def by_map(x, maps):
    """(B, heads, T, maps D) -> (B, maps, heads, T, D)"""
    return x.unflatten(-1, (maps, -1)).movedim(-2, 1)


def widen(x):
    """x in fp32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
