"""The loss against a teacher's predictions, a chunk of logits at a time."""
from typing import NamedTuple

import torch

from layers.losses import cross_entropy


class Soft(NamedTuple):
    """A teacher's predictions of N tokens. With k > 0 all but its k likeliest tokens count as one.

    values: (N, C), its last hidden states, for all logits; else (N, k + 1), log-probabilities of ids (N, k) and, last, of
    all other tokens together. head: (V, C), with softcap, for all logits. share: of the divergence in the loss, the rest
    is the labels'. temperature: divides both models' logits.
    """
    values: torch.Tensor
    ids: torch.Tensor | None = None
    head: torch.Tensor | None = None
    softcap: float = 0.0
    share: float = 1.0
    temperature: float = 1.0


def capped(logits, softcap):
    """(logits in fp32 at least, bounded by softcap, the slope of the bound or None)."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if not softcap:
        return logits, None
    bound = torch.tanh(logits / softcap)
    return softcap * bound, 1 - bound.square()


def likeliest(rows, head, softcap, k, temperature, chunk):
    """(values (N, k + 1), ids (N, k)) of Soft from hidden states (N, C); memory chunk x V."""
    values, ids = [], []
    for piece in rows.split(chunk):
        log_p = (capped(piece @ head.T, softcap)[0] / temperature).log_softmax(-1)
        top, where = log_p.topk(k)
        rest = log_p.scatter(1, where, -torch.inf).logsumexp(-1, keepdim=True)
        values.append(torch.cat((top, rest), 1))
        ids.append(where)
    return torch.cat(values), torch.cat(ids)


def against_all(log_q, log_p):
    """(KL(p || q) (n,), its gradient by q's logits (n, V)); p may have fewer tokens than q, of more the first count."""
    count = log_p.size(1)
    p, d = log_p.exp(), log_q.exp()
    kl = (p * (log_p - log_q[:, :count])).sum(-1)
    if count == d.size(1):
        return kl, d - p
    return kl, torch.cat((d[:, :count] - p, d[:, count:]), 1)


def against_top(log_q, values, ids):
    """The same for p known at ids, (n, k), and on all other tokens together; q's share of a token there is its own."""
    log_p, rest_p = values[:, :-1], values[:, -1:]
    at, others = log_q.gather(1, ids), log_q.scatter(1, ids, -torch.inf)
    rest_q = others.logsumexp(-1, keepdim=True)
    kl = (log_p.exp() * (log_p - at)).sum(-1, keepdim=True) + rest_p.exp() * (rest_p - rest_q)
    aim = (others - rest_q + rest_p).exp().scatter(1, ids, log_p.exp())
    return kl[:, 0], log_q.exp() - aim


class Distilled(torch.autograd.Function):
    """(share T^2 KL + (1 - share) CE, CE, KL), means over the labelled tokens, of which the first has gradients.

    KL = sum_v p_v (log p_v - log q_v), p = softmax(teacher / T), q = softmax(cap(x W^T) / T); CE: cross entropy of the
    labels at T = 1. x (N, C), weight (V, C), targets (N,), -1 ignored; values, ids, head: of Soft; numbers: (softcap, the
    teacher's, share, T, chunk). T^2 keeps the gradient's size (Hinton et al. 2015, arXiv 1503.02531). Both gradients come
    from the forward pass: memory some chunk x V and V C elements; cost of a head, and of the teacher's for all logits.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, values, ids, head, numbers):
        softcap, theirs, share, T, chunk = numbers
        wide = torch.promote_types(x.dtype, torch.float32)
        kept, sums = (targets != -1).to(wide), torch.zeros(2, dtype=wide, device=x.device)
        count = kept.sum().clamp(min=1)
        wanted = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        dx, dw = (torch.zeros_like(t, dtype=wide) if wanted else None for t in (x, weight))
        classes = torch.arange(weight.size(0), device=x.device)
        for start in range(0, x.size(0), chunk):
            part = slice(start, start + chunk)
            piece, target, mask = x[part], targets[part], kept[part]
            logits, slope = capped(piece @ weight.T, softcap)
            log_q = (logits / T).log_softmax(-1)
            if ids is None:
                teacher = capped(values[part] @ head.T, theirs)[0][:, :logits.size(1)]
                kl, d = against_all(log_q, (teacher / T).log_softmax(-1))
            else:
                kl, d = against_top(log_q, values[part], ids[part])
            sums = sums + torch.stack((cross_entropy(logits, target, 'sum'), (kl * mask).sum()))
            if not wanted:
                continue
            d = share * T * d
            if share < 1:
                d = d + (1 - share) * (logits.softmax(-1) - (classes == target[:, None]).to(wide))
            d = d * (mask / count)[:, None]
            d = (d if slope is None else d * slope).to(piece.dtype)
            dx[part] = d @ weight.to(d.dtype)
            dw += d.T @ piece
        if wanted:
            ctx.save_for_backward(dx.to(x.dtype), dw.to(weight.dtype))
        labels, kl = (sums / count).unbind()
        return torch.stack((share * T ** 2 * kl + (1 - share) * labels, labels, kl))

    @staticmethod
    def backward(ctx, gradient):
        dx, dw = ctx.saved_tensors
        return dx * gradient[0], dw * gradient[0], None, None, None, None, None


def distilled(x, weight, targets, soft, config, measures):
    """The loss of x (B, T, C) against a teacher, loss_chunk tokens at a time.

    weight: of the head, (V, C); config: of the student; measures get 'label' and 'kl', the labels' loss and the divergence.
    """
    x, targets = x.flatten(0, 1), targets.flatten()
    numbers = config.softcap, soft.softcap, soft.share, soft.temperature, config.loss_chunk or len(x)
    loss, label, kl = Distilled.apply(x, weight, targets, soft.values, soft.ids, soft.head, numbers).unbind()
    measures.update({('label', ''): label.detach(), ('kl', ''): kl.detach()})
    return loss
