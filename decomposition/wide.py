"""Models in half precision that compute in float32, one block at a time: what a model of 7B needs to fit into 24 GB.

Weights stay in bfloat16 or float16. A block runs on float32 copies of its parameters, which go when it is done; with
gradients it runs once more in the backward pass, so that neither copies nor activations of other blocks are kept. Embeddings
and the residual stream are float32. So every result is that of the float32 model with the same (rounded) weights.
"""
import contextlib

import torch
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from layers.basic import Head
from model import Block

HALF = (torch.float16, torch.bfloat16)
ROWS = 8192                             # of the head, in float32 at once


class Again:
    """Context of a block's second forward pass; `now`: whether one is under way, in which hooks must stay silent."""
    now = False

    def __enter__(self):
        Again.now = True

    def __exit__(self, *failure):
        Again.now = False


class Body(nn.Module):
    """A block's own forward pass, for functional_call."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x, ctx):
        return Block.forward(self.block, x, ctx)


class WideBlock(Block):
    """A block whose parameters are in half precision and that computes in float32. Memory: 4 bytes per parameter for now."""

    def forward(self, x, ctx):
        if torch.is_grad_enabled() and x.requires_grad:
            return checkpoint(self.in_float, x, ctx, use_reentrant=False, preserve_rng_state=False,
                              context_fn=lambda: (contextlib.nullcontext(), Again()))
        return self.in_float(x, ctx)

    def in_float(self, x, ctx):
        """forward on float32 copies."""
        copies = {f'block.{name}': p.float() for name, p in self.named_parameters() if p.dtype in HALF}
        return functional_call(Body(self), copies, (x, ctx))


class WideEmbedding(nn.Embedding):
    """An embedding in half precision with float32 outputs."""

    def forward(self, idx):
        return super().forward(idx).float()


class Product(torch.autograd.Function):
    """x W^T in float32 for W (rows, C) in half precision, ROWS rows at a time in both directions; no gradient for W."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(weight)
        found = x.new_empty(*x.shape[:-1], len(weight))
        for place, piece in zip(found.split(ROWS, -1), weight.split(ROWS)):
            place.copy_(x @ piece.float().t())
        return found

    @staticmethod
    def backward(ctx, gradient):
        weight, = ctx.saved_tensors
        return sum(g @ piece.float() for g, piece in zip(gradient.split(ROWS, -1), weight.split(ROWS))), None


class WideHead(Head):
    """A head in half precision with float32 logits; no gradient for its weight."""

    def forward(self, x):
        return Product.apply(x, self.weight)


KINDS = {Block: WideBlock, nn.Embedding: WideEmbedding, Head: WideHead}


def widened(model):
    """The GPT itself, whose blocks, embeddings and head compute in float32 from now on; for inference and calibration."""
    ends = (model.transformer[name] for name in ('wte', 'wpe') if name in model.transformer)
    for module in (*model.transformer.h, *ends, model.lm_head):
        module.__class__ = KINDS.get(type(module), type(module))
    return model


def is_wide(model):
    """Whether a GPT is widened."""
    return isinstance(model.lm_head, WideHead)


@torch.no_grad()
def halve(model, dtype):
    """The GPT itself with parameters of that type, in place; buffers stay."""
    for p in model.parameters():
        p.data = p.data.to(dtype)
    return model
