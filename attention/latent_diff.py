"""Differential (DIFF) and differential integral (DINT) attention on latents: MLA with two attention maps per head.

Each map of a head has its own queries, its own keys from the latent and its own shared rotated key; both maps weight the
same values. Training expands the latents, decoding absorbs the products, each map separately, as in attention/mla.py.
Sources: Ye et al. 2024, arXiv 2410.05258; Cang et al. 2025, arXiv 2501.17486; DeepSeek-V2, arXiv 2405.04434.
"""
import torch

from attention.diff import TwoMaps, by_map, widen
from attention.dint import integrate
from attention.mla import LatentAttention


class LatentDifferentialAttention(TwoMaps, LatentAttention):
    """(A1 - lam A2) v for P = n_head / 2 heads, A_m = softmax((q_n . k_n + q_r . k_r) / sqrt(d_n + d_r)) of map m.

    Arguments as mla, with d_n and d_r of one map; v_head_dim d_v: None = 2 n_embd // n_head (2 d_n, unless that is set).
    k_n of each map and v come from the latent c; each map has one rotated key k_r for all heads. lam, the RMS norm per head
    and the factor 1 - lambda_init as diff(version=1), lam's vectors of size d_n + d_r.
    Parameters C 2P (d_n + d_r) + C (d_c + 2 d_r) + d_c P (2 d_n + d_v) + P d_v C + d_c + 4 (d_n + d_r) + d_v, besides
    q_lora_rank. FLOPs per token 4 T P (d_n + d_r + d_v) naive, 4 T P (2 d_c + 2 d_r) absorbed; cache d_c + 2 d_r elements
    per token, and 2 P more under ngpt='full'.
    ngpt: unit latents; 'full' gives each map's q and its [k_n, k_r] unit length; both maps share s_qk; the norm per head
    is L2, times sqrt(d_v). Not normalised: v, lam's vectors. Raises ValueError as mla does, and for an odd n_head.
    """
    maps = 2

    def __init__(self, config, site, kv_lora_rank, q_lora_rank=None, qk_nope_head_dim=None, qk_rope_head_dim=32,
                 v_head_dim=None):
        if config.n_head % 2:
            raise ValueError(f'a head is a pair of maps, so that n_head must be even, got {config.n_head}')
        super().__init__(config, site, kv_lora_rank, q_lora_rank, qk_nope_head_dim, qk_rope_head_dim, v_head_dim)
        self.make_lambda(config, site, self.nope + self.rope, self.value)

    def by_map(self, x):
        return by_map(x, 2)

    def combine(self, y, start, ctx):
        first, second = y.unbind(1) if torch.is_tensor(y) else y            # decoding, training
        return self.finish(self.mix(widen(first), widen(second), start, ctx)).to(first.dtype)

    def mix(self, first, second, start, ctx):
        """The heads before their norm, (B, P, T, d_v), of the maps' outputs, in fp32 at least."""
        return first - self.lam(None) * second


class LatentDINTAttention(LatentDifferentialAttention):
    """(A1 - lam A2 + lam M) v, M v the running mean of A1 v: dint(version=1) on the maps of mla_diff.

    Rows sum to 1, hence no factor 1 - lambda_init. Parameters of mla_diff; P d_v more FLOPs per token; cache of mla_diff
    and one mean, P d_v elements per layer. (The mean is kept after W_UV: it is usually shorter there, d_v < d_c, and the
    naive first call has it at hand.)
    """

    def __init__(self, config, site, kv_lora_rank, q_lora_rank=None, qk_nope_head_dim=None, qk_rope_head_dim=32,
                 v_head_dim=None):
        super().__init__(config, site, kv_lora_rank, q_lora_rank, qk_nope_head_dim, qk_rope_head_dim, v_head_dim)
        self.head_scale = 1.0

    def mix(self, first, second, start, ctx):
        return integrate(first, second, self.lam(None), start, ctx)

    def static_cache(self, cache, size):
        return {**super().static_cache(cache, size), 'mean': cache['mean']}

    def flops(self, context):
        return super().flops(context) + self.n_head * self.value
