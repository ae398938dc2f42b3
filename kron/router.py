"""Token-choice routing: scores, gates, two losses, and the order in which tokens go to experts and come back.

Sizes: T tokens, E experts, k experts a token, G groups of R rows.
"""
import torch
import torch.nn as nn
from torch.nn import functional as F


class Router(nn.Module):
    """Scores x W^T, (T, C) -> (T, E), in fp32 at least, without bias; to AdamW, without decay, as all gates.

    width C, experts E. Parameters E C, FLOPs twice that a token.
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
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(dtype), self.weight.to(dtype))

    def flops(self, tokens):
        return 2 * tokens * self.in_features * self.experts


def route(logits, top_k):
    """(gates, chosen), both (T, k), from scores (T, E): the k largest, and a softmax over them.

    A stable sort and not topk, so that ties go to the lower expert on every device.
    """
    scores, order = logits.sort(dim=-1, descending=True, stable=True)
    return scores[:, :top_k].softmax(-1), order[:, :top_k]


def balance_loss(logits, load):
    """E sum_e f_e P_e: f the share of assignments (load (E,), counts), P the mean probability; 1 when both are even.

    Source: Fedus et al. 2021, Switch Transformers, arXiv 2101.03961.
    """
    share = load.to(logits.dtype) / load.sum()
    return logits.shape[1] * (share * logits.softmax(-1).mean(0)).sum()


def z_loss(logits):
    """Mean of logsumexp(scores)^2, which keeps scores small. Source: Zoph et al. 2022, ST-MoE, arXiv 2202.08906."""
    return logits.logsumexp(-1).square().mean()


def most(load):
    """The largest load as a number; the one place that waits for a GPU and breaks a compiled graph."""
    return int(load.max())


class Slots:
    """Where every (token, choice) stands among G groups of R rows; nothing is dropped.

    chosen (T, k) -> groups = experts, each with as many rows as the busiest has tokens; the rest of the rows holds token 0
    and is never read. A few tokens (T k <= E) make a group each instead, with a copy of their experts' factors, so that
    decoding reads only what it uses. load (E,): assignments of every expert.
    """

    def __init__(self, chosen, experts):
        (T, k), flat = chosen.shape, chosen.flatten()
        one_hot = F.one_hot(flat, experts)                                              # (T k, E)
        self.load, count = one_hot.sum(0), torch.arange(T * k, device=chosen.device)
        self.few = T * k <= experts
        if self.few:
            self.groups, self.expert, self.source, self.slot = T * k, flat, count // k, count
        else:
            rank = (one_hot.cumsum(0) - 1).gather(1, flat[:, None])[:, 0]               # among its expert's
            rows = most(self.load)
            self.groups, self.slot = experts, flat * rows + rank
            self.source = flat.new_zeros(experts * rows)
            self.source[self.slot] = count // k
        self.slot = self.slot.view(T, k)

    def pick(self, factor):
        """The factors of the groups, (G or 1, ., .), of a stack of E or of one that all share."""
        return factor[self.expert] if self.few and factor.shape[0] > 1 else factor

    def scatter(self, x):
        """Tokens x (T, ...) to groups (G, R, ...)."""
        return x.index_select(0, self.source).unflatten(0, (self.groups, -1))

    def gather(self, y, gates):
        """Groups y (G, R, ...) back to tokens, each the sum of its k rows times its gates (T, k)."""
        rows = y.flatten(0, 1)[self.slot]                                               # (T, k, ...)
        return (rows * gates.to(y.dtype).view(*gates.shape, *(1,) * (rows.ndim - 2))).sum(1)
