"""An MLP whose input and output pass through one small latent: "MLA's idea in the feed-forward layer"."""
import torch.nn as nn
from torch.nn import functional as F

import variants
from layers.base import BaseMLP
from layers.basic import RMSNorm, UnitNorm, hidden_scale


class LatentMLP(BaseMLP):
    """c = c_a x; y = c_proj c_b (silu(c_gate c) * c_fc c): SwiGLU between two latents of `rank` features.

    rank r: features of both latents; hidden F: width of the activation, None = 8/3 C, up to a multiple of 64; norm: RMS
    norm with gain on c (nGPT: c is a unit vector in any case). Parameters r (2 C + 3 F), FLOPs per token twice that; dense
    SwiGLU has 3 C F, so that r = C/4 keeps 31 % at F = 8/3 C. At the start the products c_fc c_a, c_gate c_a and
    c_proj c_b have the standard deviations of the dense matrices. Raises ValueError for arguments that are not sizes.
    """

    def __init__(self, config, site, rank, hidden=None, norm=False):
        super().__init__()
        width, hidden = config.n_embd, default_hidden(config, hidden)
        check(rank, hidden, norm)
        self.rank = rank
        self.c_a = variants.linear(config, f'{site}.c_a', width, rank)
        self.c_fc = variants.linear(config, f'{site}.c_fc', rank, hidden)
        self.c_gate = variants.linear(config, f'{site}.c_gate', rank, hidden)
        self.c_b = variants.linear(config, f'{site}.c_b', hidden, rank)
        self.c_proj = variants.linear(config, f'{site}.c_proj', rank, width)
        # a sum of r products of entries: std(B A) = std(B) std(A) sqrt(r)
        self.c_a.std, self.c_b.std = width ** -0.5, hidden ** -0.5
        self.c_fc.std = self.c_gate.std = 0.02 * (width / rank) ** 0.5
        self.c_proj.std = 0.02 * (hidden / rank) ** 0.5                 # and GPT divides by sqrt(2 n_layer)
        self.norm = UnitNorm() if config.ngpt != 'none' else RMSNorm(rank, config.norm_eps) if norm else nn.Identity()
        self.dropout, self.s_u = nn.Dropout(config.dropout), hidden_scale(config, hidden, rank)

    def forward(self, x, ctx):
        c = self.norm(self.c_a(x))                                      # (B, T, r)
        gate = self.c_gate(c) if self.s_u is None else self.c_gate(c) * self.s_u()
        return self.dropout(self.c_proj(self.c_b(F.silu(gate) * self.c_fc(c))))

    @staticmethod
    def refuse_waste(config, rank, hidden=None, norm=False):
        """Raises ValueError when a dense SwiGLU of the same hidden size has no more parameters."""
        hidden = default_hidden(config, hidden)
        check(rank, hidden, norm)
        dense, each = 3 * config.n_embd * hidden, 2 * config.n_embd + 3 * hidden
        if rank * each >= dense:
            raise ValueError(f'saves nothing: {rank * each:,} parameters where swiglu({hidden}) has {dense:,}; '
                             f'rank={(dense - 1) // each} is the largest that saves some')


def default_hidden(config, hidden):
    return -(-8 * config.n_embd // 3 // 64) * 64 if hidden is None else hidden


def check(rank, hidden, norm):
    for name, value in (('rank', rank), ('hidden', hidden)):
        if type(value) is not int or value < 1:
            raise ValueError(f'{name} must be a whole number of at least 1, got {value!r}')
    if type(norm) is not bool:
        raise ValueError(f'norm is True or False, got {norm!r}')
