"""Differential integral attention (DINT): DIFF plus the mean of the first map over the queries so far.

Shapes as in attention/diff.py.
"""
import torch
from torch.nn import functional as F

import variants
from attention.diff import DifferentialAttention, widen
from attention.heads import keep, mask_of, padded, write

VERSIONS, LEAKING = (1, 2), ('published', 'visible')


class DINTAttention(DifferentialAttention):
    """(A1 - lam A2 + lam A3) v, by heads of two maps as in diff(version=1); Cang et al. 2025, arXiv 2501.17486.

    A1, A2: the two causal softmax maps; A3[t, j] says how much the queries look at key j, by version:
    1: the running mean (1 / (t+1)) sum over i <= t of A1[i, j]. A3 v is the running mean of A1 v, so that no map is
       formed: FLOPs of diff + C per token; cache of diff and one mean, C elements.
    2: the mean over the queries that see j, (1 / (t-j+1)) sum over i <= t of A1[i, j]; the row is then divided by its
       sum. It needs the maps: 2 P T S elements in memory, FLOPs 4 S C per token; cache of diff and P S column sums.
    'published' (mean over all T queries) and 'visible' (over those that see j, then masked) see the future and are
    negative controls: `leaks` is True, train.py refuses them without allow_leak=True, and they cannot use a cache.
    Rows of versions 1 and 2 sum to 1, hence no factor 1 - lambda_init, which head_scale=True restores.
    documents: the token that begins a document; tokens then see only their own document, and the mean is over it.
    """

    def __init__(self, config, site, version=1, head_scale=False, documents=None):
        if type(version) not in (int, str) or version not in VERSIONS + LEAKING:
            raise ValueError(f"version is 1 or 2 (or, to show their leaks, 'published' or 'visible'), got {version!r}")
        if type(head_scale) is not bool:
            raise ValueError(f'head_scale is True or False, got {head_scale!r}')
        if documents is not None and (type(documents) is not int or not 0 <= documents < config.vocab_size):
            raise ValueError(f'documents is None or a token below vocab_size ({config.vocab_size}), got {documents!r}')
        if documents is not None and version in LEAKING:
            raise ValueError(f'documents needs version 1 or 2, got {version!r}')
        super().__init__(config, site)
        self.form, self.eot, self.leaks = version, documents, version in LEAKING
        if not head_scale:
            self.head_scale = 1.0

    def mix(self, q, k, v, lam, ctx):
        if self.leaks and ctx.cache is not None:
            raise variants.UserError(f'dint(version={self.form!r}) sees the future, which a cache cannot hold; '
                                     'generate with use_cache=False')
        T, S = q.size(-2), k.size(-2)
        mask = None
        if self.form != 1 or self.eot is not None:
            mask = mask_of(ctx, T, S) & (True if self.eot is None else self.same_document(ctx))
        if self.form != 1:
            return self.mix_by_maps(q, k, v, lam, mask, ctx)
        first, second = (self.outputs(q, k, v, self.norm_qk.scale, ctx.seen) if mask is None else
                         self.masked(q, k, v, mask))
        return integrate(first, second, lam, S - T, ctx, mask)

    def same_document(self, ctx):
        """(B, 1, T, S), True where a key's document is the query's; a document begins with its end-of-text token."""
        document = (ctx.tokens == self.eot).cumsum(1)                             # (B, T)
        if ctx.seen is not None:
            past = ctx.cache['document']                # (B, block_size)
            document = past.index_select(1, ctx.positions - 1) + document
            return (document[:, :, None] == write(past, ctx.positions, document, 1)[:, None]).unsqueeze(1)
        if ctx.cache is not None:
            if 'document' in ctx.cache:
                past = ctx.cache['document']
                document = torch.cat((past, past[:, -1:] + document), 1)
            ctx.cache['document'] = document            # (B, S)
        return (document[:, -ctx.tokens.size(1):, None] == document[:, None]).unsqueeze(1)

    def masked(self, q, k, v, mask):
        """As outputs, under a mask (B, 1, T, S)."""
        settings = dict(attn_mask=mask, dropout_p=self.dropout if self.training else 0.0, scale=self.norm_qk.scale,
                        enable_gqa=self.pairs != self.groups)
        return (F.scaled_dot_product_attention(q[:, i], k[:, i], v, **settings) for i in (0, 1))

    def mix_by_maps(self, q, k, v, lam, mask, ctx):
        """The formula, computed with maps; mask (T, S) or (B, 1, T, S)."""
        k, v = k.repeat_interleave(self.pairs // self.groups, 2), v.repeat_interleave(self.pairs // self.groups, 1)
        scores = widen(self.norm_qk.scale * (q @ k.mT)).unbind(1)                       # two of (B, P, T, S)
        first, second = (s.masked_fill(~mask, -torch.inf).softmax(-1) for s in scores)
        whole = first + lam * (self.integral(first, mask, ctx) - second)
        return widen(F.dropout(whole, self.dropout, self.training).to(v.dtype) @ v)

    def integral(self, first, mask, ctx):
        """A3 (B, P, T, S) of A1, for every form except 1."""
        T, S = first.shape[-2:]
        keys = torch.arange(S, device=first.device)
        if self.form == 'published':
            return first.mean(-2, keepdim=True).expand_as(first)
        if self.form == 'visible':
            return first.sum(-2, keepdim=True) / (T - keys) * mask
        columns = first.cumsum(-2)                      # over the queries so far
        if ctx.cache is not None:
            if 'columns' in ctx.cache:
                columns = columns + F.pad(ctx.cache['columns'], (0, T if ctx.seen is None else 0)).unsqueeze(-2)
            keep(ctx, columns=columns[..., -1, :])      # (B, P, S)
        means = columns / (ctx.positions[:, None] - keys + 1).clamp(min=1) * mask
        return means / means.sum(-1, keepdim=True)

    def static_cache(self, cache, size):
        grow = {**padded(cache, size, ('document',), dim=1), **padded(cache, size, ('columns',))}
        return {**super().static_cache(cache, size), **grow, **{n: cache[n] for n in ('mean',) if n in cache}}

    def flops(self, context):
        """As diff, and the mean; with maps, one weighted sum for both."""
        width = self.pairs * self.value_dim
        if self.form != 1:
            return 4 * context * width
        return super().flops(context) + (width if self.eot is None else 2 * context * width)


def integrate(first, second, lam, start, ctx, mask=None):
    """O1 - lam O2 + lam M of two maps' outputs (B, P, T, D_v), M the mean of O1 so far; its last row is cached.

    start: tokens before this call; mask: of documents, or None. In fp32 at least.
    """
    first, second = widen(first), widen(second)
    past = None if ctx.cache is None else ctx.cache.get('mean')
    if ctx.seen is not None:
        count = ctx.positions + 1 if mask is None else mask.sum(-1, keepdim=True)
        mean = (first + past * (count - 1)) / count
    else:
        mean = running_mean(first, start, past) if mask is None else document_mean(first, mask, past)
    if ctx.cache is not None:
        keep(ctx, mean=mean[:, :, -1:])
    return first + lam * (mean - second)


def running_mean(y, start, past=None):
    """Running mean over the rows of y (B, P, T, D_v), after `start` earlier rows with mean past (B, P, 1, D_v)."""
    sums = y.cumsum(2) if past is None else y.cumsum(2) + past * start
    return sums / torch.arange(start + 1, start + y.size(2) + 1, device=y.device)[:, None]


def document_mean(y, mask, past=None):
    """running_mean within a row's document: mask (B, 1, T, S) says which of all S positions belong to it.

    past: the mean of the document that the last call ended with. A product with the mask, not a difference of sums,
    which would lose precision.
    """
    T, weights = y.size(2), mask.to(y.dtype) / mask.sum(-1, keepdim=True)
    mean = weights[..., -T:] @ y
    return mean if past is None else mean + past * weights[..., :-T].sum(-1, keepdim=True)
