"""EMA-Nesterov against a float64 reference; runs that skip, resume and shard; NorMuon's rows; AdamW's rates by tag."""
import math
from types import SimpleNamespace

import pytest
import torch

import configurator
from layers.basic import tags_of
from model import GPT, GPTConfig
from optimizers import optim
from optimizers.lookahead import LookAhead
from optimizers.muon import ADJUST_LR, CONVERGENT, QUINTIC, Muon, newton_schulz
from tests.optimizers.test_muon import formula, matrix, parameters, spectrum
from variants import UserError


def settings(**changes):
    values = dict(look_ahead=0.6, look_ahead_decay=0.9, look_ahead_from=2, look_ahead_until=6)
    return SimpleNamespace(**{**values, **changes})


class Bowl(torch.nn.Module):
    """A quartic whose gradient depends on where it is taken."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.linspace(-1, 2, 7, dtype=torch.float64))

    def forward(self):
        return (self.w ** 4 / 4 + self.w * torch.arange(7, dtype=torch.float64) / 7).sum()


def walk(config, rate, count=9):
    """Weights after every step of plain gradient descent with a look ahead."""
    model, found = Bowl(), []
    ahead = LookAhead(model, config)
    for step in range(count):
        ahead.move(step, rate(step))
        model.w.grad = None
        model().backward()
        with torch.no_grad():
            model.w -= 0.02 * rate(step) * model.w.grad
        ahead.settle(True)
        found.append(model.w.detach().clone())
    return found, ahead


@pytest.mark.parametrize('changes', [{}, {'look_ahead_until': 0}, {'look_ahead_from': 0, 'look_ahead': 1.5},
                                     {'look_ahead': 0.0}])
def test_the_published_recursion(changes):
    """w' = w + b (lr / peak) d, w_new = w' - lr g(w'), d <- g d + (1 - g) (w_new - w)."""
    config, rate = settings(**changes), lambda step: 1.0 if step < 4 else 0.5
    w, d = torch.linspace(-1, 2, 7, dtype=torch.float64), torch.zeros(7, dtype=torch.float64)
    found, ahead = walk(config, rate)
    for step, got in enumerate(found):
        on = step >= config.look_ahead_from and (not config.look_ahead_until or step < config.look_ahead_until)
        ahead_of = w + on * config.look_ahead * rate(step) * d
        new = ahead_of - 0.02 * rate(step) * (ahead_of ** 3 + torch.arange(7).double() / 7)
        d, w = 0.9 * d + 0.1 * (new - w), new
        assert (got - w).abs().max() < 1e-14, step
    if config.look_ahead:
        assert (ahead.state['w'] - d).abs().max() < 1e-14
        assert (found[-1] - walk(settings(look_ahead=0.0), rate)[0][-1]).abs().max() > 1e-4         # control
    else:
        assert not ahead.state and not ahead.parameters


def test_a_step_that_is_not_applied_leaves_weights_and_average():
    _, ahead = walk(settings(), lambda step: 1.0, 4)
    w, before, d = ahead.parameters['w'], ahead.parameters['w'].detach().clone(), ahead.state['w'].clone()
    ahead.move(4, 1.0)
    assert not torch.equal(w, before)
    ahead.settle(False)
    assert torch.equal(w, before) and torch.equal(ahead.state['w'], d) and not ahead.kept


def test_a_state_of_another_shape_starts_afresh():
    model = Bowl()
    kept = LookAhead(model, settings(), {'w': torch.ones(7, dtype=torch.float64)}).state['w']
    assert kept.eq(1).all() and LookAhead(model, settings(), {'w': torch.ones(3)}).state['w'].eq(0).all()
    assert LookAhead(model, settings(), {}).state['w'].eq(0).all()


@pytest.mark.parametrize('argument, words', [
    ('--weights=bfloat16', "weights='float32'"), ('--ngpt=full', "ngpt='none'"), ('--look_ahead_decay=1', 'below 1')])
def test_what_a_look_ahead_does_not_go_with(argument, words):
    with pytest.raises(UserError, match=words):
        configurator.load(['--look_ahead=0.6', argument])


# ---- NorMuon ----

def neuron(weights, gradients, beta, lr=0.02):
    """Li et al.'s update in float64, one row after the other, with the norm of the orthogonal update in place of their
    0.2 sqrt(rows cols), which is 0.2 sqrt(max) times it for an update whose singular values are 1."""
    W, v, M = weights.double().clone(), [0.0] * len(weights), torch.zeros_like(weights, dtype=torch.float64)
    for g in gradients:
        M = 0.95 * M + 0.05 * g.double()
        O = newton_schulz(0.05 * g.double() + 0.95 * M, QUINTIC)
        rows = []
        for i, row in enumerate(O):
            v[i] = beta * v[i] + (1 - beta) * sum(x * x for x in row.tolist()) / len(row)
            rows.append(row / math.sqrt(v[i]))
        even = torch.stack(rows)
        W = W - lr * math.sqrt(max(1, W.shape[0] / W.shape[1])) * even * O.norm() / even.norm()
    return W


@pytest.mark.parametrize('shape', [(12, 20), (20, 12)])
def test_rows_are_divided_by_their_average(shape):
    p, = parameters(shape, dtype=torch.float64)
    start, plain = p.detach().clone(), p.detach().clone()
    rng, gradients = torch.Generator().manual_seed(3), []
    optimizer = Muon([p], lr=0.02, momentum_warmup=0, row_beta=0.9)
    for _ in range(4):
        gradients.append(torch.randn(shape, generator=rng, dtype=torch.float64) * torch.logspace(0, 1, shape[0])[:, None])
        p.grad = gradients[-1]
        optimizer.step()
    assert (p - neuron(start, gradients, 0.9)).abs().max() < 1e-7               # 1e-10 is added to the roots
    assert optimizer.state[p]['rows'].shape == (shape[0], 1)
    assert (p - formula(plain, gradients, factor=ADJUST_LR['original'](*shape))).abs().max() > 1e-4         # control


def test_stacks_transposes_and_zero_rows():
    """Each slice of a stack by itself, tall and wide ones in one batch, and rows without gradient stay."""
    shapes = [(3, 8, 14), (14, 8), (8, 14)]
    together, alone = parameters(*shapes), parameters(*shapes)
    for p, q in zip(together, alone):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
        p.grad[..., 0, :] = 0
        q.grad = p.grad.clone()
    slices = [*alone[0].detach().unbind(), *alone[1:]]
    slices = [torch.nn.Parameter(s.detach().clone()) for s in slices]
    for s, g in zip(slices, [*alone[0].grad.unbind(), alone[1].grad, alone[2].grad]):
        s.grad = g.clone()
    before = together[1].detach().clone()
    Muon(together, row_beta=0.95).step()
    for s in slices:
        Muon([s], row_beta=0.95).step()
    got = [*together[0].detach().unbind(), *together[1:]]
    assert max((p - s).abs().max() for p, s in zip(got, slices)) < 1e-6
    assert torch.equal(together[1][0], before[0]) and together[1].isfinite().all()


def test_convergent_steps_are_orthogonal():
    G = matrix(spectrum(0.003, 20), 20, 30)[0]
    values = torch.linalg.svdvals(newton_schulz(G, CONVERGENT))
    assert 0.999 < values.min() and values.max() < 1.001
    assert torch.linalg.svdvals(newton_schulz(G, CONVERGENT[:5])).min() < 0.9   # control: it needs its steps


# ---- AdamW by tag ----

TINY = dict(block_size=16, vocab_size=65, n_layer=2, n_head=4, n_embd=32, tie_weights=False, embed_norm=True)


def test_rates_and_eps_by_tag_are_the_published_update():
    """Embedding, head and vectors: w <- w (1 - lr wd) - lr m / (sqrt(v) + eps), each with its rate, and the schedule."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**TINY)).double()
    config = configurator.load(['--optimizer=muon', '--learning_rate=0.02', '--embedding_lr=0.7', '--head_lr=0.004',
                                '--vector_lr=0.015', '--adam_eps=1e-10', '--beta1=0.8', '--beta2=0.95',
                                '--weight_decay=0.001', '--tie_weights=False'])
    optimizer, rates = optim.build(model, config, 'cpu'), {'embedding': 0.7, 'head': 0.004, 'vector': 0.015}
    tags, params = tags_of(model), dict(model.named_parameters())
    watched = {n: rates[tags[n]] for n in params if tags[n] in rates}
    assert {tags[n] for n in watched} == set(rates)
    w = {n: params[n].detach().clone() for n in watched}
    m, v = dict.fromkeys(watched, 0.0), dict.fromkeys(watched, 0.0)
    for t, schedule in ((1, 1.0), (2, 1.0), (3, 0.25)):
        optim.set_learning_rate(optimizer, 0.02 * schedule)
        x = torch.randint(65, (4, 17), generator=torch.Generator().manual_seed(t))
        optimizer.zero_grad()
        model(x[:, :-1], x[:, 1:])[1].backward()
        for n, rate in watched.items():
            g, lr = params[n].grad, rate * schedule
            m[n], v[n] = 0.8 * m[n] + 0.2 * g, 0.95 * v[n] + 0.05 * g * g
            decay = 0.0 if tags[n] == 'vector' else 0.001
            w[n] = w[n] * (1 - lr * decay) - lr * (m[n] / (1 - 0.8 ** t)) / ((v[n] / (1 - 0.95 ** t)).sqrt() + 1e-10)
        optimizer.step()
    assert all((params[n] - w[n]).abs().max() < 1e-10 for n in watched)
    counted = [id(p) for group in optimizer.param_groups for p in group['params']]
    assert len(counted) == len(set(counted)) == len(params)


def test_without_own_rates_the_groups_are_the_two_of_before():
    model = GPT(GPTConfig(**TINY))
    made = optim.build(model, configurator.load(['--optimizer=muon']), 'cpu')
    assert [('lr_scale' in group, group.get('eps')) for group in made.param_groups] == [(False, 1e-8)] * 2 + [(True, None)]


@pytest.mark.parametrize('arguments, words', [
    (['--head_lr=0.01'], 'tie_weights=False'),
    (['--vector_lr=0.01', '--learning_rate=0', '--min_lr=0'], 'vector_lr follows'),
    (['--muon_steps=6'], "at most 5 with muon_coefficients='quintic'"), (['--muon_row_beta=1'], 'below 1')])
def test_mistakes_are_said(arguments, words):
    with pytest.raises(UserError, match=words):
        configurator.load(arguments)
