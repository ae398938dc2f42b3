"""Muon against torch.optim.Muon and formulas, the singular values it promises, resuming, and 1 process against several."""
import copy
import math
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

import configurator
from layers.basic import tags_of
from model import GPT, GPTConfig
from optimizers import muon, optim
from optimizers.muon import POLAR_EXPRESS, QUINTIC, Muon, newton_schulz


def parameters(*shapes, seed=0, dtype=torch.float32):
    rng = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(*shape, generator=rng).to(dtype)) for shape in shapes]


def with_gradients(params, seed):
    rng = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=rng).to(p.dtype)


def steps(optimizer, params, count, seed=0):
    for i in range(count):
        with_gradients(params, 1000 * seed + i + 1)
        optimizer.step()


def copies(params):
    return [torch.nn.Parameter(p.detach().clone(), requires_grad=p.requires_grad) for p in params]


def matrix(singular_values, rows, cols, seed=0):
    """U S V^T with given singular values and random U and V, in float64."""
    torch.manual_seed(seed)
    n = len(singular_values)
    U, V = (torch.linalg.qr(torch.randn(size, n, dtype=torch.float64))[0] for size in (rows, cols))
    return U * torch.as_tensor(singular_values, dtype=torch.float64) @ V.T, U @ V.T


# ---- the iteration ----

def spectrum(lowest, n):
    """n singular values, log-spaced, the least of which is `lowest` of the Frobenius norm."""
    s = torch.logspace(-3, 0, n, dtype=torch.float64)
    for _ in range(50):                                 # raise the small ones until the least is where it should be
        s = s.clamp_min(lowest * s.norm() * (1 + 1e-12))
    return s


SHAPES = [(64, 64), (64, 256), (256, 64), (128, 96), (48, 48)]


@pytest.mark.parametrize('coefficients, dtype, low, high', [
    (QUINTIC, torch.float32, 0.68, 1.21), (QUINTIC, torch.bfloat16, 0.66, 1.22),
    (POLAR_EXPRESS, torch.float32, 0.87, 1.13), (POLAR_EXPRESS, torch.bfloat16, 0.85, 1.15)])
@pytest.mark.parametrize('shape', SHAPES)
def test_singular_values(shape, coefficients, dtype, low, high):
    s = spectrum(0.003, min(shape))
    assert s.min() / s.norm() == pytest.approx(0.003, rel=1e-6)
    G, polar = matrix(s, *shape)
    out = newton_schulz(G.to(dtype), coefficients)
    assert out.shape == G.shape and out.dtype == dtype
    values = torch.linalg.svdvals(out.double())
    assert low <= values.min() and values.max() <= high
    assert (out.double() - polar).norm() / math.sqrt(min(shape)) < 0.35         # singular vectors are kept


def test_the_property_is_not_true_without_its_condition():
    """Negative control: a singular value of 0.0003 of the norm stays small; and one step is not five."""
    s = torch.ones(32, dtype=torch.float64)
    s[-1] = 0.0003 * s.norm()
    G, _ = matrix(s, 32, 48)
    assert torch.linalg.svdvals(newton_schulz(G.float()))[-1] < 0.3
    G, _ = matrix(spectrum(0.003, 32), 32, 48)
    assert torch.linalg.svdvals(newton_schulz(G.float(), QUINTIC[:1])).min() < 0.1


def polynomials(coefficients, x):
    for a, b, c in coefficients:
        x = a * x + b * x ** 3 + c * x ** 5
    return x


def test_scalar_maps():
    """What the five steps do to a singular value: the ranges that the documents state, and the slope at 0."""
    x = torch.linspace(0.003, 1, 200_001, dtype=torch.float64)
    for coefficients, low, high, slope in ((QUINTIC, 0.6818, 1.2024, 485), (POLAR_EXPRESS, 0.8702, 1.1236, 977)):
        y = polynomials(coefficients, x)
        assert y.min() == pytest.approx(low, abs=1e-3) and y.max() == pytest.approx(high, abs=1e-3)
        assert math.prod(a for a, _, _ in coefficients) == pytest.approx(slope, rel=0.01)


def test_polar_express_is_optimal_step_by_step():
    """Each polynomial of the table sends what is left of [0.001, 1] to an interval around 1: as far below as above."""
    x, widths = torch.linspace(0.001, 1, 400_001, dtype=torch.float64), []
    for triple in muon._TABLE:
        x = polynomials([triple], x)
        widths.append((x.max() - x.min()).item())
    assert x.max() + x.min() == pytest.approx(2, abs=1e-6)
    assert widths == sorted(widths, reverse=True) and widths[-1] < 0.25
    assert widths[-1] < 0.5 * (1.2024 - 0.6818)         # half the quintic's
    assert not polynomials(muon._TABLE, torch.tensor(1.01)).abs() < 1e3         # past the interval it bursts: hence
    assert 0.87 < polynomials(POLAR_EXPRESS, torch.tensor(1.01)) < 1.13         # the margin


@pytest.mark.parametrize('dtype, exact, lowest', [
    (torch.float64, 1e-10, 0.003), (torch.float32, 1e-4, 0.003), (torch.bfloat16, 0.03, 0.1)])
def test_zero_scale_and_transpose(dtype, exact, lowest):
    for shape in ((24, 40), (24, 24)):                  # a square one is not transposed inside
        G = matrix(spectrum(lowest, 24), *shape)[0].to(dtype)
        out = newton_schulz(G)
        for c in (1e-3, 7.0, 1e4):
            assert (newton_schulz((c * G.double()).to(dtype)) - out).abs().max() <= exact
        for c in (2.0 ** -10, 8.0, 2.0 ** 13):          # no rounding: the same bits
            assert torch.equal(newton_schulz(c * G), out)
        assert torch.equal(newton_schulz(-G), -out)
        assert (newton_schulz(G.T) - out.T).abs().max() <= exact
    assert newton_schulz(torch.zeros(3, 5, dtype=dtype)).abs().max() == 0
    assert newton_schulz(torch.zeros(2, 5, 3, dtype=dtype)).abs().max() == 0
    assert (newton_schulz(1e-20 * G) - out).abs().max() > 0.1       # control: below 1e-7 the scale is not removed


def test_by_svd_in_float64():
    """NS(U S V^T) = U f(S / ||S||) V^T with the scalar polynomials, an independent formula."""
    s = torch.rand(20, dtype=torch.float64) + 0.01
    U = torch.linalg.qr(torch.randn(20, 20, dtype=torch.float64))[0]
    V = torch.linalg.qr(torch.randn(30, 20, dtype=torch.float64))[0]
    for coefficients in (QUINTIC, POLAR_EXPRESS, [(1.5, -0.5, 0.0)] * 3):
        expected = U * polynomials(coefficients, s / s.norm()) @ V.T
        assert (newton_schulz(U * s @ V.T, coefficients) - expected).abs().max() < 1e-10


@pytest.mark.parametrize('dtype, exact', [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 0)])
@pytest.mark.parametrize('shape', [(6, 8, 8), (5, 16, 48), (5, 48, 16), (4, 1, 24), (3, 100, 37)])
def test_a_stack_is_a_loop_over_its_slices(shape, dtype, exact):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    out = newton_schulz(x)
    assert max((out[i] - newton_schulz(x[i])).abs().max() for i in range(len(x))) <= exact
    assert (newton_schulz(x.flatten(0, 1)).view_as(x) - out).abs().max() > 0.01         # control: not the flat matrix


def test_one_row_is_a_vector_of_fixed_length():
    out = newton_schulz(torch.randn(1, 64))
    assert out.norm() == pytest.approx(polynomials(QUINTIC, torch.tensor(1.0)).item(), abs=1e-5)
    assert out.norm() == pytest.approx(0.70, abs=0.03)


# ---- against torch.optim.Muon ----

ORACLE = [(32, 32), (96, 32), (32, 96), (64, 64), (32, 32), (17, 50), (1, 40), (40, 1), (96, 32)]


@pytest.mark.parametrize('adjust, theirs', [('original', 'original'), ('match_rms', 'match_rms_adamw')])
@pytest.mark.parametrize('nesterov', [True, False])
def test_equal_to_torch_muon_bit_by_bit(adjust, theirs, nesterov):
    """All matrices in batches by shape, tall ones with wide ones, bf16 inside: the same bits on a CPU."""
    ours = parameters(*ORACLE)
    reference = copies(ours)
    a = Muon(ours, lr=0.02, momentum_warmup=0, adjust_lr=adjust, nesterov=nesterov, ns_dtype=torch.bfloat16)
    b = torch.optim.Muon(reference, lr=0.02, weight_decay=0.0, momentum=0.95, adjust_lr_fn=theirs, nesterov=nesterov)
    for i in range(6):
        for params, optimizer in ((ours, a), (reference, b)):
            with_gradients(params, i)
            optimizer.step()
        for p, q in zip(ours, reference):
            assert torch.equal(p, q), (i, p.shape)
    assert len(a.buckets(a.param_groups[0])) == 5
    with_gradients(ours, 7)
    with_gradients(reference, 8)                        # negative control
    a.step()
    b.step()
    assert not torch.equal(ours[0], reference[0])


def test_equal_to_torch_muon_with_weight_decay_and_fp32_is_near_it():
    ours, near = parameters(*ORACLE), parameters(*ORACLE)
    reference = copies(ours)
    a = Muon(ours, lr=0.02, weight_decay=0.1, momentum_warmup=0, ns_dtype=torch.bfloat16)
    c = Muon(near, lr=0.02, weight_decay=0.1, momentum_warmup=0)
    b = torch.optim.Muon(reference, lr=0.02, weight_decay=0.1)
    for params, optimizer in ((ours, a), (reference, b), (near, c)):
        steps(optimizer, params, 4)
    assert all(torch.equal(p, q) for p, q in zip(ours, reference))
    start = parameters(*ORACLE)
    for p, q, s in zip(near, reference, start):
        assert 0 < (p - q).norm() < 0.02 * (q - s).norm(), p.shape          # 2%: bf16 against fp32


def test_batches_equal_a_loop_over_matrices():
    shapes = [(24, 24)] * 3 + [(24, 40), (40, 24), (40, 24), (5, 8, 8), (3, 8, 8), (2, 4, 8), (8, 4)]
    batched, single = parameters(*shapes), parameters(*shapes)
    steps(Muon(batched), batched, 4)
    separate = [Muon([p], chunk=1) for p in single]
    for i in range(4):
        with_gradients(single, i + 1)
        for optimizer in separate:
            optimizer.step()
    assert max((p - q).abs().max() for p, q in zip(batched, single)) < 1e-6


def test_a_chunk_limits_the_stack(monkeypatch):
    seen = []
    plain = muon.newton_schulz

    def counted(x, coefficients):
        seen.append(tuple(x.shape))
        return plain(x, coefficients)
    monkeypatch.setattr(muon, 'newton_schulz', counted)
    params = parameters((9, 8, 16), (16, 8), (8, 16), (8, 16))
    whole = copies(params)
    steps(Muon(params, chunk=4 * 128 + 5), params, 2)
    assert seen[:3] == [(4, 8, 16), (4, 8, 16), (4, 8, 16)] and len(seen) == 6
    seen.clear()
    steps(Muon(whole), whole, 2)
    assert seen == [(12, 8, 16)] * 2
    assert max((p - q).abs().max() for p, q in zip(params, whole)) < 1e-6


# ---- momentum, rates, decay ----

def formula(weights, gradients, lr=0.02, decay=0.0, cautious=False, momenta=None, factor=1.0):
    """W after gradients, in float64, by the textbook: m = mu m + (1 - mu) g, u = UV^T-like of (1 - mu) g + mu m."""
    W, M = weights.double().clone(), torch.zeros_like(weights, dtype=torch.float64)
    for t, g in enumerate(gradients):
        mu = momenta(t) if momenta else 0.95
        M = mu * M + (1 - mu) * g.double()
        u = (1 - mu) * g.double() + mu * M
        U, s, V = torch.linalg.svd(u, full_matrices=False)
        u = U * polynomials(QUINTIC, s / s.norm()) @ V
        mask = (u * W >= 0).double() if cautious else 1.0
        W = W - lr * decay * mask * W - lr * factor * u
    return W


@pytest.mark.parametrize('settings, expected', [
    (dict(momentum_warmup=0), {}),
    (dict(), {'momenta': lambda t: 0.85 + 0.1 * t / 300}),
    (dict(momentum_warmup=2), {'momenta': lambda t: (0.85, 0.90, 0.95, 0.95, 0.95)[t]}),
    (dict(momentum_warmup=0, weight_decay=0.5), {'decay': 0.5}),
    (dict(momentum_warmup=0, weight_decay=0.5, cautious=True), {'decay': 0.5, 'cautious': True}),
    (dict(momentum_warmup=0, adjust_lr='match_rms'), {'factor': 0.2 * math.sqrt(30)}),
])
@pytest.mark.parametrize('shape', [(20, 30), (30, 20)])
def test_update_by_an_independent_formula(settings, expected, shape):
    p, = parameters(shape, dtype=torch.float64)
    start = p.detach().clone()
    expected = {'factor': math.sqrt(max(1, shape[0] / shape[1])), **expected}
    rng, gradients = torch.Generator().manual_seed(3), []
    optimizer = Muon([p], lr=0.02, **settings)
    for _ in range(5):
        gradients.append(torch.randn(shape, generator=rng, dtype=torch.float64))
        p.grad = gradients[-1]
        optimizer.step()
    assert (p - formula(start, gradients, **expected)).abs().max() < 1e-10
    if settings.get('cautious'):
        assert (p - formula(start, gradients, **{**expected, 'cautious': False})).abs().max() > 1e-3      # control


def test_the_two_forms_of_momentum_give_the_same_update():
    """m = mu m + g and m = mu m + (1 - mu) g differ by a scale, which the normalisation removes."""
    gradients, mu = [torch.randn(12, 20, dtype=torch.float64) for _ in range(6)], 0.95
    total, mean = 0, 0
    for g in gradients:
        total, mean = mu * total + g, mu * mean + (1 - mu) * g
    a, b = newton_schulz(g + mu * total), newton_schulz((1 - mu) * g + mu * mean)
    assert (a - b).abs().max() < 1e-10


def test_momentum_schedule():
    at = [muon.momentum_at(step, 0.85, 0.95, 300) for step in (0, 150, 299, 300, 10 ** 6)]
    assert at == pytest.approx([0.85, 0.90, 0.85 + 0.1 * 299 / 300, 0.95, 0.95])
    assert muon.momentum_at(0, 0.85, 0.95, 0) == 0.95


def test_update_sizes():
    """original: spectral norm about lr sqrt(max(1, out/in)); match_rms: root mean square about 0.2 lr, as AdamW's."""
    for adjust in ('original', 'match_rms'):
        for shape in ((64, 64), (256, 64), (64, 256)):
            p, = parameters(shape)
            start = p.detach().clone()
            steps(Muon([p], lr=0.1, adjust_lr=adjust), [p], 1)
            moved = p.detach() - start
            if adjust == 'original':
                size = torch.linalg.matrix_norm(moved, 2) / math.sqrt(max(1, shape[0] / shape[1]))
                assert 0.05 < size < 0.122
            else:
                assert moved.square().mean().sqrt() == pytest.approx(0.02, rel=0.2)


def test_a_cautious_decay_acts_only_where_the_update_shrinks_the_weight():
    p, = parameters((16, 16))
    start = p.detach().clone()
    plain, = copies([p])
    for q, decay in ((p, 0.5), (plain, 0.0)):
        steps(Muon([q], lr=0.1, weight_decay=decay, cautious=True), [q], 1)
    update = (start - plain.detach()) / 0.1
    same = (update * start) > 0
    assert torch.equal(p[~same], plain[~same]) and 0.3 < same.double().mean() < 0.7
    assert torch.allclose((plain - p)[same], 0.05 * start[same], atol=1e-6)
    zero, = parameters((4, 4))
    before = zero.detach().clone()
    zero.grad = torch.zeros(4, 4)
    Muon([zero], lr=0.1, weight_decay=0.5, cautious=True).step()
    assert torch.allclose(zero, 0.95 * before)                                  # no update: decays as without caution


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_low_precision_weights_take_an_fp32_update(dtype):
    """One rounding a step, of the fp32 result; the momentum stays fp32."""
    low = parameters((16, 24), (24, 16), (3, 8, 8), dtype=dtype)
    high = [torch.nn.Parameter(p.detach().float()) for p in low]
    a, b = (Muon(params, lr=0.02, weight_decay=0.1) for params in (low, high))
    for i in range(3):
        for p, q in zip(low, high):
            q.data.copy_(p)
        with_gradients(low, i)
        for p, q in zip(low, high):
            q.grad = p.grad.float()
        a.step()
        b.step()
        for p, q in zip(low, high):
            assert torch.equal(p, q.to(dtype)) and a.state[p]['momentum'].dtype == torch.float32


# ---- which parameters ----

def test_none_gradients_are_skipped_and_frozen_parameters_start_afresh():
    params = parameters((8, 8), (8, 8), (8, 8))
    optimizer = Muon(params, lr=0.1, weight_decay=0.5)
    steps(optimizer, params, 2)
    before = [p.detach().clone() for p in params]
    stale = optimizer.state[params[0]]['momentum'].clone()
    with_gradients(params, 9)
    params[0].grad = None
    params[1].requires_grad_(False)                     # frozen, though a gradient is left
    optimizer.step()
    assert torch.equal(params[0], before[0]) and torch.equal(params[1], before[1])
    assert not torch.equal(params[2], before[2])
    assert torch.equal(optimizer.state[params[0]]['momentum'], stale) and optimizer.state[params[0]]['step'] == 2
    assert params[1] not in optimizer.state
    params[1].requires_grad_(True)
    fresh, = copies([params[1]])
    steps(optimizer, params, 1, seed=5)
    fresh.grad = params[1].grad.clone()
    Muon([fresh], lr=0.1, weight_decay=0.5).step()
    assert (fresh - params[1]).abs().max() < 1e-6       # no momentum from before it was frozen


def test_the_momentum_schedule_counts_a_parameters_own_steps():
    """Two matrices of one shape, one of which joins late: each as if it were alone."""
    together = parameters((8, 12), (12, 8))
    alone = copies(together)
    a, separate = Muon(together, momentum_warmup=6), [Muon([p], momentum_warmup=6) for p in alone]
    for step in range(5):
        for params in (together, alone):
            with_gradients(params, step)
            if step < 3:
                params[1].grad = None
        for optimizer in (a, *separate):
            optimizer.step()
    assert max((p - q).abs().max() for p, q in zip(together, alone)) < 1e-6
    assert [a.state[p]['step'].item() for p in together] == [5, 2]


def test_mistakes_are_said():
    with pytest.raises(ValueError, match=r'matrices and stacks of them.*\(7,\)'):
        Muon(parameters((7,)))
    with pytest.raises(ValueError, match="'rms'; take one of original, match_rms"):
        Muon(parameters((7, 7)), adjust_lr='rms')


def test_closures_groups_and_odd_strides():
    p, q = parameters((12, 20), (4, 6, 6))
    reference = copies([p, q])
    with_gradients([p, q], 0)
    for mine, theirs in zip(reference, (p, q)):
        mine.grad = theirs.grad.clone()
        theirs.grad = theirs.grad.mT.contiguous().mT
    a = Muon([{'params': [p]}, {'params': [q], 'lr': 0.5}], lr=0.1)
    assert a.step(lambda: torch.tensor(3.0)) == 3.0
    Muon(reference[:1], lr=0.1).step()
    Muon(reference[1:], lr=0.5).step()
    assert torch.equal(p, reference[0]) and torch.equal(q, reference[1])


@pytest.mark.slow
def test_compiled_is_near():
    """2% an entry is what the sheet allows; needs a C++ compiler."""
    plain, fast = parameters((64, 96), (96, 64), (64, 96)), parameters((64, 96), (96, 64), (64, 96))
    steps(Muon(plain), plain, 2)
    steps(Muon(fast, compile=True), fast, 2)
    assert all((p - q).abs().max() < 0.02 * 0.04 for p, q in zip(plain, fast))


# ---- a model, by tags; resuming ----

MIXED = dict(block_size=16, vocab_size=65, n_layer=2, n_head=4, n_embd=32, bias=True,
             linear={'*.c_fc': 'kron(4, 8, terms=3, scale=True)', '*.c_v': 'lowrank(4)'})


def both(model, **settings):
    """Muon for what is tagged matrix or factor, AdamW for the rest."""
    tags = tags_of(model)
    chosen = [p for name, p in model.named_parameters() if tags[name] in ('matrix', 'factor')]
    rest = [p for name, p in model.named_parameters() if tags[name] not in ('matrix', 'factor')]
    return Muon(chosen, **settings), torch.optim.AdamW(rest, lr=1e-2)


def train(model, optimizers, first, last):
    losses = []
    for step in range(first, last):
        x = torch.randint(65, (4, 17), generator=torch.Generator().manual_seed(step % 4))
        loss = model(x[:, :-1], x[:, 1:])[1]
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_it_trains_a_model_of_mixed_linears():
    torch.manual_seed(0)
    model = GPT(GPTConfig(**MIXED))
    losses = train(model, both(model, lr=0.02), 0, 30)
    assert losses[-1] < losses[0] - 1.0 and all(map(math.isfinite, losses))
    factors = [n for n, p in model.named_parameters() if p.ndim == 3]
    assert factors and not any(n.endswith('scale') for n in factors)


def test_resuming_by_name_is_exact(tmp_path):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**MIXED))
    start = copy.deepcopy(model)
    whole = both(model, momentum_warmup=8, weight_decay=0.1)
    train(model, whole, 0, 10)
    first = both(start, momentum_warmup=8, weight_decay=0.1)
    train(start, first, 0, 5)
    torch.save({'model': start.state_dict(), 'optimizer': [optim.state_by_name(o, start) for o in first]}, tmp_path / 'x')
    saved = torch.load(tmp_path / 'x', weights_only=True)
    entries = saved['optimizer'][0]['transformer.h.0.mlp.c_fc.A']
    assert set(entries) == {'step', 'momentum'} and entries['step'] == 5 and entries['momentum'].shape == (3, 4, 8)

    def resumed(change=lambda state: None):
        other = GPT(GPTConfig(**MIXED))
        other.load_state_dict(saved['model'])
        optimizers, states = both(other, momentum_warmup=8, weight_decay=0.1), copy.deepcopy(saved['optimizer'])
        optimizers[0].param_groups[0]['params'].reverse()       # positions do not matter
        for optimizer, state in zip(optimizers, states):
            change(state)
            optim.load_state_by_name(optimizer, other, state)
        train(other, optimizers, 5, 10)
        return all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters()))
    assert resumed()
    assert not resumed(lambda state: [e.update(step=e['step'] * 0) for e in state.values()])            # controls
    assert not resumed(lambda state: [e['momentum'].zero_() for e in state.values() if 'momentum' in e])


def test_resuming_by_torchs_own_state_dict():
    params = parameters((8, 12), (3, 4, 4))
    other, a = copies(params), Muon(params)
    steps(a, params, 3)
    b = Muon(other)
    b.load_state_dict(copy.deepcopy(a.state_dict()))
    for p, q in zip(other, params):
        p.data.copy_(q)
    steps(a, params, 2, seed=1)
    steps(b, other, 2, seed=1)
    assert all(torch.equal(p, q) for p, q in zip(params, other))


# ---- many processes ----

# odd counts of a shape, odd rows, one row, one term, fewer rows than ranks; 'a' and 'b' share a shape, transposed
BAG = {'a': (12, 20), 'b': (20, 12), 'c': (12, 20), 'd': (7, 20), 'row': (1, 9), 'square': (10, 10), 'stack': (3, 6, 8),
       'term': (1, 6, 8), 'many': (5, 8, 6), 'thin': (9, 2), 'unused': (4, 4)}


class Bag(torch.nn.Module):
    """Parameters whose gradient depends on themselves and on the step; `unused` gets none."""

    def __init__(self):
        super().__init__()
        for name, p in zip(BAG, parameters(*BAG.values())):
            self.register_parameter(name, p)

    def forward(self, step):
        rng = torch.Generator().manual_seed(step)
        return sum(((p - torch.randn(BAG[name], generator=rng)) ** 2).sum() + (p ** 3).sum() / 9
                   for name, p in self.named_parameters() if name != 'unused')


SETTINGS = dict(lr=0.05, weight_decay=0.1, cautious=True, momentum_warmup=3)


def train_bag(net, optimizer, first=0, last=5):
    for step in range(first, last):
        net(step).backward()
        optimizer.step()
        optimizer.zero_grad()


def ddp_run(group):
    from torch.nn.parallel import DistributedDataParallel
    bag = Bag()
    net = DistributedDataParallel(bag, find_unused_parameters=True)
    train_bag(net, Muon(bag.parameters(), process_group=group, chunk=600, **SETTINGS))
    return {name: p.detach() for name, p in bag.named_parameters()}


def fsdp_run(group, shape=None, resume=False):
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
    from torch.distributed.fsdp import fully_shard
    names = ('replicate', 'shard') if shape else ('shard',)
    mesh = torch.distributed.init_device_mesh('cpu', shape or (dist.get_world_size(),), mesh_dim_names=names)
    bag = fully_shard(Bag(), mesh=mesh)
    optimizer = Muon(bag.parameters(), process_group=group, chunk=600, **SETTINGS)
    train_bag(bag, optimizer, 0, 3 if resume else 5)
    if resume:
        saved = get_optimizer_state_dict(bag, optimizer)
        optimizer = Muon(bag.parameters(), process_group=group, chunk=600, **SETTINGS)
        set_optimizer_state_dict(bag, optimizer, saved, options=StateDictOptions(strict=False))     # unused has none
        train_bag(bag, optimizer, 3, 5)
    for p in bag.parameters():
        if p in optimizer.state:
            momentum = optimizer.state[p]['momentum']
            assert momentum.placements == p.placements and momentum.to_local().shape == p.to_local().shape
    return {name: p.full_tensor().detach() for name, p in bag.named_parameters()}


def worker(rank, world, folder):
    """Every way to run, in one process group; results and counts of matrices are left as files."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/meet', rank=rank, world_size=world)
    seen, plain = [], muon.newton_schulz

    def counted(x, coefficients):
        seen.append(len(x))
        return plain(x, coefficients)
    muon.newton_schulz = counted
    group, result = dist.group.WORLD, {}
    result['ddp'] = ddp_run(group)
    result['ddp matrices'] = sum(seen)
    seen.clear()
    result['fsdp'] = fsdp_run(group)
    result['fsdp matrices'] = sum(seen)
    result['fsdp resumed'] = fsdp_run(group, resume=True)
    if world == 4:
        result['hsdp'] = fsdp_run(group, (2, 2))
    torch.save(result, f'{folder}/{rank}.pt')
    dist.barrier()                                      # a rank that leaves early can bring the other down at its end
    dist.destroy_process_group()


@pytest.mark.parametrize('world', [2, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_share_the_work_and_get_the_weights_of_one_process(tmp_path, world):
    alone = Bag()
    untouched = alone.unused.detach().clone()
    train_bag(alone, Muon(alone.parameters(), **SETTINGS))
    torch.multiprocessing.spawn(worker, (world, str(tmp_path)), nprocs=world)
    results = [torch.load(tmp_path / f'{rank}.pt', weights_only=True) for rank in range(world)]
    for kind in ('ddp', 'fsdp', 'fsdp resumed') + (('hsdp',) if world == 4 else ()):
        for name, p in alone.named_parameters():
            got = [r[kind][name] for r in results]
            assert all(torch.equal(got[0], other) for other in got[1:]), (kind, name)
            assert (got[0] - p).abs().max() < 1e-6, (kind, name)
        assert torch.equal(results[0][kind]['unused'], untouched)
    matrices = 5 * sum(math.prod(shape[:-2]) for name, shape in BAG.items() if name != 'unused')
    for kind in ('ddp matrices', 'fsdp matrices'):
        total = sum(r[kind] for r in results)
        assert matrices <= total < matrices * world, (kind, total, matrices)        # less than all by everyone
    assert max((r['ddp'][n] - p).abs().max() for r in results for n, p in Bag().named_parameters()) > 0.01


def test_other_shardings_are_refused():
    class Placement:
        def __init__(self, dim):
            self.is_replicate, self.is_shard = (lambda: dim is None), (lambda wanted: dim == wanted)
    for dims in ([1], [None], [0, 0]):
        p, = parameters((4, 4))
        p.placements, p.device_mesh = [Placement(dim) for dim in dims], None
        with pytest.raises(ValueError, match='sharded on dim 0'):
            Muon([p])


def test_four_steps_of_polar_express_land_where_the_documentation_says():
    y = polynomials(POLAR_EXPRESS[:4], torch.linspace(0.003, 1, 400_001, dtype=torch.float64))
    assert y.min() == pytest.approx(0.44, abs=0.005) and y.max() == pytest.approx(1.56, abs=0.005)


def test_the_number_of_steps_is_a_setting():
    config = configurator.load(['--optimizer=muon', '--muon_steps=4', '--muon_coefficients=polar_express'])
    made = optim.muon(GPT(GPTConfig(block_size=8, vocab_size=11, n_layer=1, n_head=1, n_embd=8)), config)
    assert made.param_groups[0]['coefficients'] == POLAR_EXPRESS[:4]
