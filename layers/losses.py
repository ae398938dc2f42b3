"""Loss functions, and auxiliary losses of layers."""
import torch
from torch.nn import functional as F


class Losses:
    """Auxiliary losses of one call. No list: FSDP2 gives a block a copy of every list of tensors with gradients."""

    def __init__(self):
        self.found = []

    def append(self, loss):
        self.found.append(loss)

    def __iter__(self):
        return iter(self.found)

    def __len__(self):
        return len(self.found)


def cross_entropy(logits, targets, reduction='mean'):
    """Mean (or sum) of -log softmax(logits)[target] in fp32 at least; logits (N, V), targets (N,), -1 ignored."""
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, ignore_index=-1,
                           reduction=reduction)


def stablemax(logits, targets, reduction='mean'):
    """Mean (or sum) of -log(s_target / sum s), s = x + 1 for x >= 0 and 1 / (1 - x) below, in float64; -1 ignored.

    For small vocabularies only: p grows with the logit and not its exponential, so that with 50,304 tokens a
    probability of 0.9 needs a logit near 450,000. Source: Prieto et al. 2025, arXiv 2501.04697.
    """
    x = logits.double()
    s = torch.where(x >= 0, x + 1, 1 / (1 - x.clamp(max=0)))            # clamped: the unused branch has a pole at 1
    log_p = s.log() - s.sum(-1, keepdim=True).log()
    return F.nll_loss(log_p, targets, ignore_index=-1, reduction=reduction).to(logits.dtype)


class ChunkedCrossEntropy(torch.autograd.Function):
    """cross_entropy(cap(x W^T), targets), `chunk` rows of logits at a time, cap(z) = softcap tanh(z / softcap).

    x (N, C), weight (V, C), targets (N,). The forward pass computes both gradients, so that nothing is computed twice and
    at most chunk x V logits exist; memory chunk V + V C elements. Plain tensor code, so that torch.compile accepts it.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, softcap, chunk):
        wide = torch.promote_types(x.dtype, torch.float32)
        wanted = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        count = (targets != -1).sum().clamp(min=1).to(wide)
        loss = torch.zeros((), dtype=wide, device=x.device)
        dx, dw = (torch.zeros_like(t, dtype=wide) if wanted else None for t in (x, weight))
        classes = torch.arange(weight.size(0), device=x.device)
        for start in range(0, x.size(0), chunk):
            piece, target = x[start:start + chunk], targets[start:start + chunk]
            logits = (piece @ weight.T).to(wide)
            slope = None
            if softcap:
                slope = torch.tanh(logits / softcap)
                logits, slope = softcap * slope, 1 - slope.square()
            loss = loss + cross_entropy(logits, target, 'sum')
            if not wanted:
                continue
            d = logits.softmax(-1) - (classes == target[:, None]).to(wide)     # one_hot takes 8 bytes per logit
            d = d * ((target != -1) / count)[:, None]
            d = (d if slope is None else d * slope).to(piece.dtype)
            dx[start:start + chunk] = d @ weight.to(d.dtype)
            dw += d.T @ piece
        if wanted:
            ctx.save_for_backward(dx.to(x.dtype), dw.to(weight.dtype))
        return loss / count

    @staticmethod
    def backward(ctx, gradient):
        dx, dw = ctx.saved_tensors
        return dx * gradient, dw * gradient, None, None, None


def likeliest(x, targets, head, loss, chunk):
    """(likeliest tokens (B, T), mean loss) of x (B, T, C), for evaluation: `chunk` tokens' logits at a time, 0 = all.

    head: (n, C) -> logits (n, V); loss: one of LOSSES; targets (B, T), -1 ignored. Memory chunk x V without gradients.
    """
    rows, wanted = x.flatten(0, 1), targets.flatten()
    if not 0 < chunk < len(rows):
        logits = head(rows)
        return logits.argmax(-1).view_as(targets), loss(logits, wanted)
    guesses, total = [], 0.0
    for piece, target in zip(rows.split(chunk), wanted.split(chunk)):
        logits = head(piece)
        guesses.append(logits.argmax(-1))
        total = total + loss(logits, target, 'sum')
    return torch.cat(guesses).view_as(targets), total / (wanted != -1).sum()


LOSSES = {'cross_entropy': cross_entropy, 'stablemax': stablemax}
