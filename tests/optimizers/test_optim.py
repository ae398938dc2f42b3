"""Groups by tag, AdamW against torch's own, the schedule, and optimizer state by name."""
import math
from types import SimpleNamespace

import pytest
import torch

from model import GPT, GPTConfig
from optimizers import optim, schedules
from variants import UserError

SMALL = dict(block_size=16, vocab_size=65, n_layer=2, n_head=4, n_embd=64, bias=True)


def small(seed=0, **settings):
    torch.manual_seed(seed)
    return GPT(GPTConfig(**{**SMALL, **settings}))


def steps(model, optimizer, count, seed=0):
    rng = torch.Generator().manual_seed(seed)
    for _ in range(count):
        x = torch.randint(65, (4, 17), generator=rng)
        optimizer.zero_grad(set_to_none=True)
        model(x[:, :-1], x[:, 1:])[1].backward()
        optimizer.step()


def test_every_parameter_stands_in_exactly_one_group():
    model = small(linear={'*.c_fc': 'kron(16, 8, scale=True)', '*.c_v': 'lowrank(4)'})
    decayed, rest = optim.groups(model, 0.1)
    ids = [id(p) for p in decayed['params'] + rest['params']]
    assert len(ids) == len(set(ids)) == len(list(model.parameters()))
    names = {id(p): name for name, p in model.named_parameters()}
    plain = {names[id(p)].split('.')[-1] for p in rest['params']}
    assert plain <= {'bias', 'scale', 'weight'} and (decayed['weight_decay'], rest['weight_decay']) == (0.1, 0.0)
    assert all('ln_' in names[id(p)] for p in rest['params'] if names[id(p)].endswith('weight'))
    assert any(names[id(p)].endswith('c_fc.A') for p in decayed['params'])     # 3-D, and 1-row factors too


def test_frozen_parameters_stand_in_no_group():
    model = small()
    model.transformer.h[0].requires_grad_(False)
    before = {n: p.clone() for n, p in model.transformer.h[0].named_parameters()}
    grouped = {id(p) for group in optim.groups(model, 0.1) for p in group['params']}
    assert not grouped & {id(p) for p in model.transformer.h[0].parameters()}
    steps(model, optim.adamw(model, 0.1, 1e-2, (0.9, 0.95), 'cpu'), 3)
    for name, p in model.transformer.h[0].named_parameters():
        assert torch.equal(p, before[name]), name


def test_adamw_is_the_published_update():
    """One parameter of each kind against the formula of Loshchilov & Hutter in float64."""
    model = small().double()
    optimizer = optim.adamw(model, 0.1, 1e-2, (0.9, 0.95), 'cpu')
    watched = {'transformer.h.0.mlp.c_fc.weight': 0.1, 'transformer.h.0.mlp.c_fc.bias': 0.0}
    params = dict(model.named_parameters())
    w = {n: params[n].detach().clone() for n in watched}
    m, v = dict.fromkeys(watched, 0.0), dict.fromkeys(watched, 0.0)
    rng = torch.Generator().manual_seed(0)
    for t in range(1, 4):
        x = torch.randint(65, (4, 17), generator=rng)
        optimizer.zero_grad()
        model(x[:, :-1], x[:, 1:])[1].backward()
        for n, decay in watched.items():
            g = params[n].grad
            m[n], v[n] = 0.9 * m[n] + 0.1 * g, 0.95 * v[n] + 0.05 * g * g
            w[n] = w[n] * (1 - 1e-2 * decay) - 1e-2 * (m[n] / (1 - 0.9 ** t)) / ((v[n] / (1 - 0.95 ** t)).sqrt() + 1e-8)
        optimizer.step()
    for n in watched:
        assert (params[n] - w[n]).abs().max() < 1e-10


def test_learning_rate():
    c = SimpleNamespace(decay_lr=True, warmup_iters=10, lr_decay_iters=110, learning_rate=1.0, min_lr=0.1,
                        lr_schedule='cosine', cooldown=0.25)
    rate = lambda step: schedules.learning_rate(step, c)                                    # noqa: E731
    assert rate(0) == pytest.approx(1 / 11) and rate(9) == pytest.approx(10 / 11) and rate(10) == 1.0
    assert rate(60) == pytest.approx(0.55) and rate(35) == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi / 4)))
    assert rate(110) == rate(10 ** 6) == 0.1
    c.lr_schedule = 'wsd'                                                   # the last quarter of 110 steps
    assert rate(9) == pytest.approx(10 / 11) and rate(10) == rate(82) == 1.0 and rate(110) == 0.1
    assert rate(96) == pytest.approx(0.1 + 0.9 * 14 / 27.5)
    c.decay_lr = False
    assert rate(0) == rate(500) == 1.0
    c.decay_lr, c.warmup_iters, c.lr_decay_iters = True, 10, 10             # no division by zero
    assert rate(10) == 0.1


def test_state_goes_by_name_and_not_by_position():
    """Two same-shaped parameters whose order differs: a positional load swaps their moments, ours does not."""
    model = small()
    optimizer = optim.adamw(model, 0.1, 1e-3, (0.9, 0.95), 'cpu')
    steps(model, optimizer, 3)
    saved = {n: {k: t.clone() for k, t in e.items()} for n, e in optim.state_by_name(optimizer, model).items()}
    other = small()
    other.load_state_dict(model.state_dict())
    again = optim.adamw(other, 0.1, 1e-3, (0.9, 0.95), 'cpu')
    again.param_groups[0]['params'].reverse()
    optim.load_state_by_name(again, other, saved)
    steps(model, optimizer, 2, seed=1)
    steps(other, again, 2, seed=1)
    for (name, p), q in zip(model.named_parameters(), other.parameters()):
        assert torch.equal(p, q), name
    positional = optim.adamw(small(), 0.1, 1e-3, (0.9, 0.95), 'cpu')            # negative control
    positional.param_groups[0]['params'].reverse()
    positional.load_state_dict(optimizer.state_dict())
    assert any(entries['exp_avg'].shape != p.shape for p, entries in positional.state.items())


def test_unknown_names_are_refused_and_missing_ones_start_afresh():
    model = small()
    optimizer = optim.adamw(model, 0.1, 1e-3, (0.9, 0.95), 'cpu')
    with pytest.raises(UserError, match='nowhere.weight'):
        optim.load_state_by_name(optimizer, model, {'nowhere.weight': {}})
    optim.load_state_by_name(optimizer, model, {})
    steps(model, optimizer, 1)


# ---- OrthoGrad ----

def handed(gradient, weight):
    """What the optimizer sees of a gradient under OrthoGrad."""
    model = torch.nn.Module()
    model.weight, model.tags = torch.nn.Parameter(weight), {'weight': 'matrix'}
    model.weight.grad = gradient.clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    optim.add_orthograd(optimizer, model)
    optimizer.step()
    return model.weight.grad


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16])
def test_orthograd_hands_on_an_orthogonal_gradient_of_the_same_norm(dtype):
    torch.manual_seed(0)
    w, g = torch.randn(32, 48).to(dtype), torch.randn(48, 32).to(dtype).t()     # not contiguous
    got, exact = handed(g, w).double(), 1e-2 if dtype == torch.bfloat16 else 1e-6
    cosine = (got * w.double()).sum() / got.norm() / w.double().norm()
    assert cosine.abs() < exact and got.norm() / g.double().norm() == pytest.approx(1, abs=max(1e-5, exact))


def test_orthograd_of_zero_weights_and_of_parallel_gradients():
    g = torch.randn(4, 4)
    assert torch.allclose(handed(g, torch.zeros(4, 4)), g)
    assert handed(3 * g, g.clone()).abs().max() == 0                            # and not noise at full size
    assert handed(torch.zeros(4, 4), g).abs().max() == 0


def test_orthograd_leaves_state_groups_and_vectors_to_the_optimizer():
    model, other = small(), small()
    runs = []
    for m in (model, other):
        o = optim.adamw(m, 0.1, 1e-3, (0.9, 0.95), 'cpu')
        optim.add_orthograd(o, m)
        runs.append(o)
    steps(model, runs[0], 3)
    other.load_state_dict(model.state_dict())
    saved = {n: {k: t.clone() for k, t in e.items()} for n, e in optim.state_by_name(runs[0], model).items()}
    optim.load_state_by_name(runs[1], other, saved)
    for o in runs:
        optim.set_learning_rate(o, 1e-2)                    # a schedule reaches the optimizer after a load
    steps(model, runs[0], 2, seed=1)
    steps(other, runs[1], 2, seed=1)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters()))
    plain = small()
    steps(plain, optim.adamw(plain, 0.1, 1e-3, (0.9, 0.95), 'cpu'), 3)
    assert not torch.equal(plain.transformer.h[0].attn.c_q.weight, model.transformer.h[0].attn.c_q.weight)
    model.zero_grad()
    model(torch.arange(8)[None], torch.arange(8)[None])[1].backward()
    bias = model.transformer.h[0].mlp.c_fc.bias
    before = bias.grad.clone()
    runs[0].step()
    assert torch.equal(bias.grad, before)


# ---------------------------------------------------------------------------------------------------
# factors

FACTORS = {'*.c_fc': 'kron(16, 8, terms=2)', '*.c_v': 'lowrank(4)', '*.c_k': 'lowrank(4, weight_norm=True) + kron(8, 8)',
           '*.c_q': 'abba(2, 3)'}


def by_name(model, groups):
    names = {id(p): n.removeprefix('transformer.h.0.') for n, p in model.named_parameters()}
    return {names[id(p)]: (g.get('lr_scale', 1.0), g['weight_decay']) for g in groups for p in g['params']}


def test_factors_learn_by_their_fan_in():
    """in_features / fan-in / factors; c_fc (64 -> 256), A (16, 8), B (16, 8), two terms: B first takes fewer FLOPs."""
    model = small(linear=FACTORS)
    found = by_name(model, optim.groups(model, 0.1, factor_lr='fan_in'))
    assert len(found) == len(list(model.named_parameters()))
    assert found['attn.c_v.U'] == (64 / 4 / 2, 0.1) and found['attn.c_v.V'] == (0.5, 0.1)
    module = model.transformer.h[0].mlp.c_fc
    assert module.fans() == {'A': 8 * 2, 'B': 8} or module.fans() == {'A': 8, 'B': 8 * 2}
    assert found['mlp.c_fc.A'][0] == 64 / module.fans()['A'] / 2 and found['mlp.c_fc.B'][0] == 64 / module.fans()['B'] / 2
    assert found['attn.c_k.parts.0.U'][0] == 8 and found['attn.c_k.parts.1.A'][0] == 64 / 8 / 2
    assert found['attn.c_q.A1'] == (1.0, 0.1) and found['attn.c_proj.weight'] == (1.0, 0.1)
    assert found['attn.c_proj.bias'] == (1.0, 0.0)


def test_krony_pts_multipliers():
    """The figures of the sheet for (256, 1024) (x) (3, 3), one term: 1.5 and 128."""
    from kron.linear import KroneckerLinear
    with torch.device('meta'):
        module = KroneckerLinear(768, 3072, False, 1024, 256)
    assert {n: 768 / fan / 2 for n, fan in module.fans().items()} == {'A': 1.5, 'B': 128}


@pytest.mark.parametrize('factor_lr', ['none', 'fan_in'])
def test_decay_of_the_product_is_decay_of_the_weight(factor_lr):
    """Without gradients a step multiplies W by 1 - lr weight_decay, to first order, as it does a dense one."""
    model = small(linear=FACTORS).double()
    before = {site: module.dense_weight().detach().clone() for site, module in model.sites().items()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    for kind, expected in (('product', 1.0), ('tensors', None)):
        other = small(linear=FACTORS).double()
        other.load_state_dict(model.state_dict())
        for p in other.parameters():
            p.grad = torch.zeros_like(p)
        optimizer = optim.adamw(other, 0.1, 1e-3, (0.9, 0.95), 'cpu', factor_lr=factor_lr, factor_decay=kind)
        optim.set_learning_rate(optimizer, 1e-3)
        optimizer.step()
        shares = {s: 1 - (m.dense_weight() * before[s]).sum().item() / before[s].square().sum().item()
                  for s, m in other.sites().items()}
        if expected:
            assert all(share == pytest.approx(1e-4, rel=2e-3) for share in shares.values())
        elif factor_lr == 'none':                       # negative control: two factors decay W twice, four four times
            assert shares['h.0.mlp.c_fc'] == pytest.approx(2e-4, rel=1e-3)
            assert shares['h.0.attn.c_q'] == pytest.approx(4e-4, rel=1e-3)
            assert shares['h.0.attn.c_proj'] == pytest.approx(1e-4, rel=1e-3)


def test_the_schedule_keeps_the_multipliers():
    model = small(linear=FACTORS)
    optimizer = optim.adamw(model, 0.1, 1e-3, (0.9, 0.95), 'cpu', factor_lr='fan_in')
    optim.set_learning_rate(optimizer, 0.5)
    assert {g['lr'] / 0.5 for g in optimizer.param_groups} == {g['lr_scale'] for g in optimizer.param_groups}
    assert len({g['lr_scale'] for g in optimizer.param_groups}) > 2
