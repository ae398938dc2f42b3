"""Widths that fill a budget: of MLPs and heads, alone, alike, and with structures on what stays."""
import dataclasses

import pytest
import torch

from compression import sizes, study
from decomposition import calibrate, narrow, widths
from decomposition.initialise import initialise
from decomposition.sites import Decomposition
from model import GPT, GPTConfig
from specs import UserError

CONFIG = GPTConfig(n_layer=3, n_head=4, n_embd=16, block_size=16, vocab_size=31, bias=False, n_kv_head=2, rope=True,
                   norm='rmsnorm', mlp={'h.1': 'swiglu(48)', 'h.*': 'gelu(hidden=64, approximate=\'tanh\')'})
MLP, ALL = 'h.*.mlp.*', 'h.*'


def text(count=8, seed=1):
    g = torch.Generator().manual_seed(seed)
    x = [torch.randint(31, (4, 16), generator=g) for _ in range(count)]
    return [(a, a.roll(-1, 1)) for a in x]


@pytest.fixture(scope='module')
def model():
    torch.manual_seed(0)
    made = GPT(CONFIG).double().eval()
    with torch.no_grad():
        for p in made.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
    return made


def forms(model, share, pattern=MLP, known=None, **settings):
    given = {'narrow': 'mlp', 'decompose': 'neurons,svd_whitened_hessian', 'sizes': 'curvature'}
    variant, data = study.Variant(**{**given, **settings}), text()
    return widths.forms(model.config, model, variant, share, sizes.counted(model, pattern),
                        lambda sites, gradients: calibrate.passes(model, sites, data, gradients),
                        {} if known is None else known)


def share_of(model, rules, pattern):
    used, _, _ = sizes.cost(dataclasses.replace(model.config, **rules), pattern)
    return used / sum(m.in_features * m.out_features for m in sizes.counted(model, pattern).values())


@pytest.mark.parametrize('share', [0.3, 0.5, 0.75])
@pytest.mark.parametrize('settings', [
    {}, {'sizes': 'uniform'}, {'linear': {MLP: 'pivot'}}, {'linear': {MLP: 'lowrank'}, 'split': 1.2},
    {'linear': {'h.*.mlp.c_fc': 'kron(4, 4)', 'h.0.*': 'dense', MLP: 'lowrank'}}])
def test_a_budget_is_filled_and_never_exceeded(model, share, settings):
    rules = forms(model, share, **settings)
    found = share_of(model, rules, MLP)
    step = 8 * 3 * 16 * 3 / 7000                        # three blocks, each less than a step of 8 neurons below
    assert share - step <= found <= share
    GPT(dataclasses.replace(model.config, **rules))     # no idle rule, no structure that saves nothing


def test_heads_and_neurons_share_one_budget(model):
    rules = forms(model, 0.6, ALL, narrow='mlp, heads')
    assert 0.5 < share_of(model, rules, ALL) <= 0.6
    assert 'swiglu(' in str(rules['mlp']) and "approximate='tanh'" in str(rules['mlp'])
    alone = forms(model, 0.9, ALL, narrow='heads')
    assert alone['mlp'] == model.config.mlp and share_of(model, alone, ALL) <= 0.9
    assert 'kv_heads=1' in str(alone['attention'])


@pytest.mark.parametrize('settings', [
    {'narrow': 'values'}, {'narrow': 'heads, values, mlp'}, {'narrow': 'mlp', 'linear': {ALL: 'lowrank'}},
    {'narrow': 'values', 'linear': {'h.*.c_q': 'dense', ALL: 'lowrank'}}])
def test_values_and_structures_elsewhere_pay_too(model, settings):
    """The rest of the model is part of the budget, and a matrix outside the narrow parts takes a size of its own."""
    share = 0.93 if settings == {'narrow': 'values'} else 0.7
    rules = forms(model, share, ALL, **settings)
    assert share - 0.08 < share_of(model, rules, ALL) <= share
    if 'linear' in settings:
        assert any('attn' in site and spec.startswith('lowrank') for site, spec in rules['linear'].items())
    elif share > 0.9:
        assert 'v_head_dim=' in str(rules['attention'])


def test_predicted_nats_of_smaller_values_are_those_of_the_least_squares_fit(model):
    name, data = 'h.0.attn.c_proj', text()
    stats = next(calibrate.passes(model, [name], data, True))[name]
    part = widths.parts_of(model, 'values')[0]
    order, nats = narrow.order_of(part, stats, 'neurons')
    found = narrow.value_nats(part, stats, order, [(2, 1), (2, 2), (2, 3), (2, 4)])
    assert list(found) == [(2, 1), (2, 2), (2, 3)]
    losses = [*found.values(), nats[2].item()]
    assert losses == sorted(losses, reverse=True) and losses[-1] < 1e-9 < losses[-2]


def test_equal_blocks_get_one_rule(model):
    like = GPT(dataclasses.replace(CONFIG, mlp='swiglu(64)')).double().eval()
    assert forms(like, 0.5, sizes='uniform')['mlp'] == 'swiglu(32)'
    assert forms(like, 0.5, sizes='uniform', linear={})['linear'] == {}


def test_more_goes_to_the_layer_whose_neurons_matter(model):
    with torch.no_grad():
        weak = GPT(dataclasses.replace(CONFIG, mlp='gelu(64)')).double().eval()
        weak.load_state_dict(weak.state_dict())
        for p in weak.transformer.h[1].mlp.parameters():
            p.mul_(0.05)
    chosen = forms(weak, 0.5)['mlp']
    kept = {block: int(spec.split('(')[1].rstrip(')')) for block, spec in chosen.items() if block != '*'}
    assert kept['h.1'] == min(kept.values()) < kept['h.0']


def test_the_known_orders_serve_the_decomposition(model):
    """What forms() found is what initialise() keeps: the same weights with and without the orders."""
    known = {}
    config = dataclasses.replace(model.config, **forms(model, 0.5, known=known))
    made = []
    for orders in ({}, {key: found[0] for key, found in known.items() if key[1] == 'neurons'}):
        made.append(GPT(config).double())
        initialise(made[-1], model.config, model.state_dict(), how=Decomposition('neurons', text(), orders=orders))
    assert len(known) == 3
    assert all(torch.equal(a, b) for a, b in zip(*(m.state_dict().values() for m in made)))


def test_the_split_is_the_better_of_those_tried(model):
    """One budget for both predicts no more nats than any fixed split does."""
    known, rules = {}, {MLP: 'pivot'}
    free = forms(model, 0.4, linear=rules, known=known)
    for split in (1.0, 1.35):
        forms(model, 0.4, linear=rules, split=split, known=known)
    assert free['linear'] and free['mlp'] != model.config.mlp


@pytest.mark.parametrize('settings, pattern, words', [
    ({'narrow': 'neurons'}, MLP, 'narrow takes mlp, heads, values'),
    ({'narrow': 'heads'}, MLP, 'widen it'),
    ({'decompose': 'neurons_best'}, MLP, "no method 'neurons_best'"),
])
def test_mistakes_are_one_line(model, settings, pattern, words):
    with pytest.raises(UserError, match=words):
        forms(model, 0.5, pattern, **settings)
    with pytest.raises(UserError, match='cannot be met'):
        forms(model, 0.01)


def test_other_attention_has_no_units():
    latent = GPT(dataclasses.replace(CONFIG, attention='mla(kv_lora_rank=4, qk_rope_head_dim=2)', n_kv_head=None))
    with pytest.raises(UserError, match='has no units'):
        widths.parts_of(latent, 'heads')
