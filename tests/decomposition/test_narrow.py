"""Models that become narrower: neurons of every MLP, groups of heads, value features, and structures on what stays."""
import dataclasses

import pytest
import torch

from decomposition import narrow
from decomposition.initialise import initialise
from decomposition.sites import Decomposition, runnable
from model import GPT, GPTConfig
from specs import UserError

BASE = GPTConfig(n_layer=2, n_head=4, n_embd=16, block_size=16, vocab_size=31, bias=True)
LLAMA = dataclasses.replace(BASE, bias=False, rope=True, norm='rmsnorm', n_kv_head=2, mlp='swiglu(24)')
KINDS = {
    'gelu': (BASE, {'mlp': 'gelu(40)'}),
    'relu2': (dataclasses.replace(BASE, mlp='relu2', bias=False), {'mlp': {'h.0': 'relu2(24)', 'h.1': 'relu2(64)'}}),
    'swiglu': (LLAMA, {'mlp': 'swiglu(16)'}),
    'swiglu with biases': (dataclasses.replace(LLAMA, bias=True), {'mlp': 'swiglu(16)'}),
    'kron_moe': (dataclasses.replace(BASE, mlp='kron_moe(3, 64, 16, share=None)'),
                 {'mlp': 'kron_moe(3, 40, 16, share=None, hidden=40)'}),
    'heads': (BASE, {'attention': 'causal(kv_heads=3)'}),
    'groups': (LLAMA, {'attention': 'causal(kv_heads=1)'}),
    'a gate': (dataclasses.replace(BASE, attention='causal(gate=True)'), {'attention': 'causal(gate=True, kv_heads=2)'}),
    'values': (BASE, {'attention': 'causal(v_head_dim=3)'}),
    'values of groups': (LLAMA, {'attention': 'causal(v_head_dim=3, kv_heads=1)'}),
    'all': (LLAMA, {'attention': {'h.1': 'causal(v_head_dim=2, kv_heads=1)', 'h.0': 'causal'}, 'mlp': 'swiglu(8)'}),
}
METHODS = ('neurons', 'neurons_leverage', 'neurons_norm', 'neurons_taylor', 'neurons_streamed', 'neurons_sequential')
each_kind = pytest.mark.parametrize('kind', KINDS)


def text(count=8, seed=1):
    g = torch.Generator().manual_seed(seed)
    x = [torch.randint(31, (4, 16), generator=g) for _ in range(count)]
    return [(a, a.roll(-1, 1)) for a in x]


def random_model(config, seed=0):
    torch.manual_seed(seed)
    model = GPT(config).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
    return model


def filled(source, changes, method='neurons', **how):
    model = GPT(dataclasses.replace(source.config, **changes)).double().eval()
    rows = initialise(model, source.config, source.state_dict(), how=Decomposition(method, text(), **how))
    return model, {row['site']: row for row in rows}


def loss(model, data):
    return sum(model(x, y)[1].item() for x, y in data) / len(data)


@each_kind
def test_a_model_whose_other_units_are_silent_loses_nothing(kind):
    """The columns of c_proj of all but the units that the target has room for are zero: all the others go."""
    config, changes = KINDS[kind]
    source = random_model(config)
    target = GPT(dataclasses.replace(config, **changes)).double()
    with torch.no_grad():
        for part in narrow.parts(target, source):
            for unit in range(part.target.n_units, part.source.n_units):
                part.source.c_proj.weight[..., unit * part.size:(unit + 1) * part.size] = 0
            if getattr(part.target, 'v_head_dim', None) != getattr(part.source, 'v_head_dim', None):
                size, rank = part.source.v_head_dim, part.target.v_head_dim
                for head in range(part.source.n_head):
                    part.source.c_proj.weight[:, head * size + rank:(head + 1) * size] = 0
    model, _ = filled(source, changes, 'neurons_norm')                  # by it the silent ones are last
    x, y = text(1, seed=5)[0]
    assert model.num_params() < source.num_params()
    torch.testing.assert_close(model(x, y)[0], source(x, y)[0], rtol=1e-6, atol=1e-6)


@each_kind
@pytest.mark.parametrize('method', METHODS)
def test_every_method_runs_for_every_kind_and_beats_no_refit(kind, method):
    config, changes = KINDS[kind]
    source = random_model(config)
    model, rows = filled(source, changes, method)
    target = GPT(dataclasses.replace(config, **changes))
    for part in narrow.parts(target, source):
        row = rows[part.site]
        assert row['units'] == f'{part.target.n_units} of {part.source.n_units}'
        assert 0 < row['output_error'] < 1
    assert all(p.isfinite().all() for p in model.parameters())


def test_c_proj_is_the_least_squares_fit_to_the_outputs():
    """On the rows themselves, with a bias: the best affine map of the neurons that stay."""
    source = random_model(BASE)
    kept = []
    hook = source.transformer.h[0].mlp.c_proj.register_forward_hook(lambda m, i, o: kept.append((i[0], o)))
    with torch.no_grad():
        for x, _ in text():
            source(x)
    hook.remove()
    h, y = (torch.cat([pair[i].flatten(0, 1) for pair in kept]) for i in (0, 1))
    model, rows = filled(source, {'mlp': {'h.0': 'gelu(30)', 'h.1': 'gelu'}})
    ours, theirs = model.transformer.h[0].mlp, source.transformer.h[0].mlp
    places = torch.cdist(ours.c_fc.weight, theirs.c_fc.weight).argmin(1)
    assert places.tolist() == sorted(set(places.tolist()))
    torch.testing.assert_close(ours.c_fc.weight, theirs.c_fc.weight[places])
    inputs = torch.cat((h[:, places], torch.ones(len(h), 1, dtype=h.dtype)), 1)
    best = (inputs @ torch.linalg.lstsq(inputs, y).solution - y).square().sum()
    found = (h[:, places] @ ours.c_proj.weight.t() + ours.c_proj.bias - y).square().sum()
    assert best <= found <= 1.02 * best                                 # the ridge
    power = (y - theirs.c_proj.bias).square().sum()
    assert rows['h.0.mlp.c_proj']['output_error'] == pytest.approx((found / power).sqrt().item(), rel=1e-6)
    plain = (h[:, places] @ theirs.c_proj.weight[:, places].t() + theirs.c_proj.bias - y).square().sum()
    assert found < 0.8 * plain


def test_the_curvature_order_loses_less_than_norms():
    """Of the loss itself, by a model that is trained a little, so that its gradients are those of a minimum."""
    source = random_model(dataclasses.replace(BASE, n_layer=1))
    data = text(8)
    optimizer = torch.optim.Adam(source.parameters(), 1e-2)
    for _ in range(60):
        for x, y in data:
            optimizer.zero_grad()
            source(x, y)[1].backward()
            optimizer.step()
    found = {method: loss(filled(source, {'mlp': 'gelu(20)'}, method)[0], data) for method in ('neurons', 'neurons_norm')}
    assert loss(source, data) < found['neurons'] < found['neurons_norm']


def test_structures_are_fitted_to_what_stays():
    """With the statistics of the source cut to it: the same as measured on the narrow model, where inputs are the same."""
    source = random_model(LLAMA)
    changes = {'mlp': {'h.0': 'swiglu', 'h.1': 'swiglu(16)'} | {'h.0': 'swiglu(24)'}, 'linear': {'h.1.mlp.*': 'lowrank(6)'}}
    model, rows = filled(source, changes, 'neurons,svd_whitened_hessian')
    slim, _ = filled(source, {'mlp': changes['mlp']})
    again = GPT(model.config).double().eval()
    initialise(again, slim.config, slim.state_dict(), how=Decomposition('svd_whitened', text()))
    plain, _ = filled(source, changes, 'neurons,svd_whitened')
    for site in ('c_fc', 'c_gate', 'c_proj'):
        a, b = (m.sites()[f'h.1.mlp.{site}'].dense_weight() for m in (plain, again))
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    assert 'units' in rows['h.1.mlp.c_proj'] and rows['h.1.mlp.c_proj']['output_error'] > 0


def test_streamed_statistics_are_those_of_the_narrow_model():
    """The last block's c_proj is fitted to inputs that the narrow first block gives."""
    source = random_model(BASE)
    one, two = (filled(source, {'mlp': 'gelu(20)'}, method)[0] for method in ('neurons', 'neurons_streamed'))
    first, last = ([m.transformer.h[i].mlp.c_proj.weight for m in (one, two)] for i in (0, 1))
    assert torch.equal(*first) and not torch.allclose(*last)


@pytest.mark.parametrize('config, changes, words', [
    (BASE, {'mlp': 'gelu(80)'}, 'can be removed, not added'),
    (dataclasses.replace(BASE, linear={'h.1.mlp.c_fc': 'lowrank(4)'}), {'mlp': 'gelu(20)'}, 'removed from dense matrices'),
    (dataclasses.replace(BASE, bias=False, ngpt='full'), {'mlp': 'gelu(20)'}, 'unit length'),
])
def test_what_cannot_be_is_said_in_one_line(config, changes, words):
    source = random_model(config)
    with pytest.raises(UserError, match=words):
        filled(source, changes)


def test_it_needs_text():
    source = random_model(BASE)
    model = GPT(dataclasses.replace(BASE, mlp='gelu(20)'))
    with pytest.raises(UserError, match='calibration_tokens above 0'):
        initialise(model, BASE, source.state_dict())
    with pytest.raises(UserError, match="no method 'neurons_lever'"):
        filled(source, {'mlp': 'gelu(20)'}, 'neurons_lever')


def test_an_unchanged_model_is_the_same_bit_by_bit():
    source = random_model(BASE)
    config, state, _, rows = narrow.narrowed(GPT(BASE), BASE, source.state_dict(), Decomposition(), runnable)
    assert config is BASE and rows == {} and torch.equal(state['lm_head.weight'], source.lm_head.weight)
