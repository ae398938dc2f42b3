"""The loss against a teacher: a float64 reference by autograd, limits, and models as students of themselves."""
import math

import pytest
import torch
from torch.nn import functional as F

from configurator import GPTConfig
from layers.distillation import Distilled, Soft, likeliest
from model import GPT

N, C, V = 13, 6, 17


def case(seed=0, teacher_tokens=V, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    x, W, rows, head = (torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype) for shape in (
        (N, C), (V, C), (N, C), (teacher_tokens, C)))
    y = torch.randint(V, (N,), generator=g)
    y[3] = -1
    return x.requires_grad_(), W.requires_grad_(), rows, head, y


def bounded(z, cap):
    return cap * torch.tanh(z / cap) if cap else z


def reference(x, W, rows, head, y, share, T, caps, k):
    """The definition on whole logits, its gradients by autograd."""
    z, t = bounded(x @ W.T, caps[0]), bounded(rows @ head.T, caps[1])[:, :V]
    q, p = F.softmax(z / T, -1), F.pad(F.softmax(t / T, -1), (0, max(0, V - t.shape[1])))
    if k:
        top = p.topk(k).indices
        p, q = (torch.cat((a.gather(1, top), 1 - a.gather(1, top).sum(1, keepdim=True)), 1) for a in (p, q))
    kl = (torch.xlogy(p, p) - torch.xlogy(p, q)).sum(-1)[y != -1].mean()
    label = F.cross_entropy(z, y, ignore_index=-1)
    return share * T * T * kl + (1 - share) * label, label, kl


def ours(x, W, rows, head, y, share, T, caps, k, chunk):
    if k:
        values, ids = likeliest(rows, head, caps[1], k, T, chunk)
        return Distilled.apply(x, W, y, values, ids, None, (caps[0], 0.0, share, T, chunk))
    return Distilled.apply(x, W, y, rows, None, head, (caps[0], caps[1], share, T, chunk))


@pytest.mark.parametrize('k, share, T, caps, chunk', [
    (0, 1.0, 1.0, (0.0, 0.0), 13), (0, 0.3, 2.0, (0.0, 1.5), 4), (0, 1.0, 0.5, (2.0, 0.0), 5), (3, 1.0, 1.0, (0.0, 0.0), 4),
    (3, 0.6, 2.0, (2.0, 3.0), 13), (1, 1.0, 1.0, (0.0, 0.0), 1), (16, 1.0, 1.0, (0.0, 0.0), 7)])
def test_it_is_the_definition_and_its_gradient(k, share, T, caps, chunk):
    x, W, *rest = case()
    expected = reference(x, W, *rest, share, T, caps, k)
    found = ours(x, W, *rest, share, T, caps, k, chunk)
    torch.testing.assert_close(found.detach(), torch.stack(expected).detach(), rtol=1e-10, atol=1e-12)
    for a, b in zip(torch.autograd.grad(3 * found[0], (x, W)), torch.autograd.grad(3 * expected[0], (x, W))):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize('tokens', [V - 4, V + 4])
def test_a_teacher_may_have_other_padding(tokens):
    x, W, *rest = case(teacher_tokens=tokens)
    expected, found = reference(x, W, *rest, 1.0, 1.0, (0, 0), 0), ours(x, W, *rest, 1.0, 1.0, (0, 0), 0, 4)
    torch.testing.assert_close(found.detach(), torch.stack(expected).detach())
    for a, b in zip(torch.autograd.grad(found[0], (x, W)), torch.autograd.grad(expected[0], (x, W))):
        torch.testing.assert_close(a, b)


def test_all_but_one_token_is_all():
    """One token as the rest is itself."""
    x, W, *rest = case()
    torch.testing.assert_close(ours(x, W, *rest, 1.0, 1.0, (0, 0), V - 1, 4), ours(x, W, *rest, 1.0, 1.0, (0, 0), 0, 4))


def test_fewer_tokens_say_less():
    """Merging tokens can only lower a divergence."""
    x, W, *rest = case()
    kls = [ours(x, W, *rest, 1.0, 1.0, (0, 0), k, 4)[2].item() for k in (1, 3, 8, 0)]
    assert kls == sorted(kls) and kls[0] < kls[-1]


@pytest.mark.parametrize('k', [0, 3])
def test_a_student_that_is_its_teacher_has_no_loss_and_no_gradient(k):
    x, W, _, _, y = case(dtype=torch.float32)
    loss = ours(x, W, x.detach(), W.detach(), y, 1.0, 1.0, (0, 0), k, 4)
    gradients = torch.autograd.grad(loss[0], (x, W))
    most = 1e-6 if k else 0.0
    assert abs(loss[2].item()) <= most and all(g.abs().max() <= most for g in gradients)
    assert loss[1] > 0.1
    off = ours(x, W, x.detach() + 0.1, W.detach(), y, 1.0, 1.0, (0, 0), k, 4)           # the control
    assert off[2] > 1e-4


# ---------------------------------------------------------------------------------------------------
# models

def models(**changes):
    config = GPTConfig(**{**dict(block_size=8, vocab_size=V, n_layer=2, n_head=2, n_embd=8), **changes})
    torch.manual_seed(1)
    student, teacher = GPT(config).double(), GPT(config).double().eval()
    with torch.no_grad():
        for p in (*student.parameters(), *teacher.parameters()):
            p.add_(0.3 * torch.randn_like(p))
    return student, teacher


@pytest.mark.parametrize('changes', [{}, {'softcap': 3.0, 'tie_weights': False}, {'ngpt': 'full'}, {'loss_chunk': 3}],
                         ids=str)
def test_a_models_loss_is_that_of_its_logits(changes):
    student, teacher = models(**changes)
    idx, y = torch.randint(V, (2, 8)), torch.randint(V, (2, 8))
    with torch.no_grad():
        rows = teacher.trunk(idx)[0].flatten(0, 1)
        t = teacher(idx, y)[0].log_softmax(-1)
    soft = Soft(rows, None, teacher.head_weight().detach(), teacher.config.softcap, 0.7)
    logits, loss = student(idx, y, soft=soft)
    assert logits is None
    z = student.eval()(idx, y)[0]
    kl = (t.exp() * (t - z.log_softmax(-1))).sum(-1).mean()
    label = F.cross_entropy(z.flatten(0, 1), y.flatten())
    torch.testing.assert_close(loss, 0.7 * kl + 0.3 * label)
    student.train()(idx, y, soft=soft)
    assert student.measures['kl', ''].item() == pytest.approx(kl.item()) and math.isclose(
        student.measures['label', ''].item(), label.item())
    first = torch.autograd.grad(loss, student.lm_head.weight)[0]
    second = torch.autograd.grad(0.7 * kl + 0.3 * label, student.lm_head.weight)[0]
    torch.testing.assert_close(first, second)


def test_the_losses_of_mixtures_are_added():
    student, teacher = models(mlp='kron_moe(experts=2, top_k=1)')
    idx, y = torch.randint(V, (2, 8)), torch.randint(V, (2, 8))
    soft = Soft(teacher.trunk(idx)[0].flatten(0, 1).detach(), None, teacher.head_weight().detach())
    loss = student(idx, y, soft=soft)[1]
    extra = sum(value for (kind, _), value in student.measures.items() if kind.endswith('_loss'))
    assert extra > 0 and loss.item() == pytest.approx((student.measures['kl', ''] + extra).item())
