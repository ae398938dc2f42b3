"""The context that one call of GPT.forward gives every layer, and blocks whose activations are recomputed in backward."""
from dataclasses import dataclass, field, replace

import torch
from torch.utils.checkpoint import checkpoint

from attention.heads import rotate, rotation
from layers.losses import Losses


@dataclass
class Context:
    """The context of one call of GPT.forward, shared by all layers; nothing else survives a call."""
    tokens: torch.Tensor                                # (B, T) of this call
    positions: torch.Tensor                             # (T,) theirs
    config: object                                      # GPTConfig
    cache: dict | None = None                           # this layer's own, initially {}; None while training
    first_value: torch.Tensor | None = None             # block 0's values, for the value residual
    first_latent: tuple | None = None                   # block 0, its latents, its W_UV: the same in mla's decoding
    losses: Losses = field(default_factory=lambda: Losses())  # of mixtures, for training; torch.compile wants the lambda
    measures: dict = field(default_factory=dict)        # (kind, module) -> tensor without graph, kept as GPT.measures
    shared: dict = field(default_factory=dict)          # what several layers need, see share
    seen: torch.Tensor | None = None                    # in a static step, see decoding.py: (1, block_size), True so far

    @property
    def block_size(self):
        return self.config.block_size

    def share(self, key, make):
        """The result of make(), called for the first layer that asks for key in this call; a key contains no tensor."""
        if key not in self.shared:
            self.shared[key] = make()
        return self.shared[key]

    def rotate(self, x, positions=None, stretch=()):
        """RoPE of x (..., T, size) at this call's positions, or at others; x itself without rope."""
        if not self.config.rope:
            return x
        return self.turn(x, positions, stretch)

    def turn(self, x, positions=None, stretch=()):
        """RoPE whether or not config.rope is set, for classes that need it (MLA)."""
        size, base, half, kind = x.size(-1), self.config.rope_base, self.config.rope_half, x.dtype
        if positions is not None:
            return rotate(x, rotation(positions, size, base, kind, stretch, half))
        key = ('rope', size, kind, *stretch)
        return rotate(x, self.share(key, lambda: rotation(self.positions, size, base, kind, stretch, half)))


def again(block, x, ctx):
    """block(x, ctx), its activations recomputed in the backward pass; what it writes into ctx is returned as results.

    A compiled checkpoint must not write into existing objects, so the block gets a separate Context.
    """
    def run(x, first_value):
        own = replace(ctx, first_value=first_value, losses=Losses(), measures={}, shared=dict(ctx.shared))
        return block(x, own), own.first_value, tuple(own.losses), own.measures
    x, ctx.first_value, losses, measures = checkpoint(run, x, ctx.first_value, use_reentrant=False)
    for loss in losses:
        ctx.losses.append(loss)
    ctx.measures.update(measures)
    return x
