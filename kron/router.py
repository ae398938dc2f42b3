"""Token-choice routing: scores, gates, two losses, and the order in which tokens go to experts and come back.

Sizes: T tokens, E experts, k experts per token, G groups of R rows.
"""
import torch
import torch.nn as nn
from torch.nn import functional as F

from layers.structured import no_autocast


class Router(nn.Module):
    """Scores x W^T, (T, C) -> (T, E), in fp32 at least, without bias; trained by AdamW without weight decay, as all gates.

    width C, experts E. Parameters E C, FLOPs per token twice that.
    """
    tags = {'weight': 'vector'}
    spec = 'router'

    def __init__(self, width, experts):
        super().__init__()
        self.in_features, self.out_features, self.experts = width, experts, experts
        self.weight = nn.Parameter(torch.empty(experts, width))
        self.reset_parameters()

    def reset_parameters(self, std=0.02):
        nn.init.normal_(self.weight, mean=0.0, std=std)

    def forward(self, x):
        dtype = torch.promote_types(x.dtype, torch.float32)
        with no_autocast(x):
            return F.linear(x.to(dtype), self.weight.to(dtype))

    def flops(self, tokens):
        return 2 * tokens * self.in_features * self.experts


def route(logits, top_k):
    """(gates, chosen), both (T, k), from scores (T, E): the k largest, and a softmax over them.

    A stable sort and not topk, so that ties go to the lower expert on every device. Two operations for a compiler: fused
    with what follows, inductor (torch 2.11 and 2.13 on a CPU) gives the scores wrong gradients.
    """
    return route_op(logits, top_k)


@torch.library.custom_op('nanokron::route', mutates_args=())
def route_op(logits: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    scores, order = logits.sort(dim=-1, descending=True, stable=True)
    return scores[:, :top_k].softmax(-1), order[:, :top_k].contiguous()


@torch.library.custom_op('nanokron::unroute', mutates_args=())
def unroute_op(gradient: torch.Tensor, gates: torch.Tensor, chosen: torch.Tensor, experts: int) -> torch.Tensor:
    """Gradient of the scores (T, E) from that of the gates (T, k): softmax's, at the chosen experts."""
    inner = gates * (gradient - (gradient * gates).sum(-1, keepdim=True))
    return gates.new_zeros(len(gates), experts).scatter(1, chosen, inner)


@route_op.register_fake
def _(logits, top_k):
    return logits.new_empty(len(logits), top_k), logits.new_empty(len(logits), top_k, dtype=torch.long)


@unroute_op.register_fake
def _(gradient, gates, chosen, experts):
    return gates.new_empty(len(gates), experts)


def keep_route(ctx, inputs, output):
    ctx.save_for_backward(*output)
    ctx.experts = inputs[0].shape[1]


def route_backward(ctx, gradient, _):
    return unroute_op(gradient, *ctx.saved_tensors, ctx.experts), None


route_op.register_autograd(route_backward, setup_context=keep_route)


def balance_loss(logits, load):
    """E sum_e f_e P_e: f the share of assignments (load (E,), counts), P the mean probability; 1 when both are even.

    Source: Fedus et al. 2021, Switch Transformers, arXiv 2101.03961.
    """
    share = load.to(logits.dtype) / load.sum()
    return logits.shape[1] * (share * logits.softmax(-1).mean(0)).sum()


def z_loss(logits):
    """Mean of logsumexp(scores)^2, which keeps scores small. Source: Zoph et al. 2022, ST-MoE, arXiv 2202.08906."""
    return logits.logsumexp(-1).square().mean()


SPARE = 4           # groups per mean load of an expert: more of them pad less and copy factors more often


class Slots:
    """The place of every (token, choice) among G groups of R rows, each group of one expert; nothing is dropped.

    chosen (T, k), experts E. An expert takes ceil(load / R) groups; unused rows contain token 0 and are never read.
    Whatever the loads, their sum is at most (T k + E (R - 1)) // R = G, so that no size depends on a value: no GPU
    synchronisation, and one graph under torch.compile. R is 1 / SPARE of the mean load, so padding adds at most that share
    of rows. With a few tokens R = 1, each token with a copy of its experts' factors, so that decoding reads only what it
    uses. load (E,): assignments of every expert.
    """

    def __init__(self, chosen, experts):
        (T, k), flat = chosen.shape, chosen.flatten()
        rows = max(1, T * k // (SPARE * experts))
        self.groups = (T * k + experts * (rows - 1)) // rows
        count = torch.arange(T * k, device=chosen.device)
        one_hot = (flat[:, None] == torch.arange(experts, device=chosen.device)).long()     # (T k, E); F.one_hot waits
        rank = (one_hot.cumsum(0) - 1).gather(1, flat[:, None])[:, 0]                   # among its expert's
        self.load = one_hot.sum(0)
        taken = (self.load + rows - 1) // rows                                          # groups of every expert
        ends = taken.cumsum(0)
        slot = (ends - taken)[flat] * rows + rank
        self.expert = torch.searchsorted(ends, count[:self.groups], right=True).clamp(max=experts - 1)
        self.source = flat.new_zeros(self.groups * rows).index_copy(0, slot, count // k)
        self.slot = slot.view(T, k)

    def pick(self, factor):
        """The factors of the groups, (G or 1, ., .), of a stack of E or of one that all share."""
        return factor.index_select(0, self.expert) if factor.shape[0] > 1 else factor

    def scatter(self, x):
        """Tokens x (T, ...) to groups (G, R, ...)."""
        return x.index_select(0, self.source).unflatten(0, (self.groups, -1))

    def gather(self, y, gates):
        """Groups y (G, R, ...) back to tokens, each the sum of its k rows times its gates (T, k)."""
        rows = y.flatten(0, 1).index_select(0, self.slot.flatten()).unflatten(0, self.slot.shape)   # (T, k, ...)
        return (rows * gates.to(y.dtype).view(*gates.shape, *(1,) * (rows.ndim - 2))).sum(1)
