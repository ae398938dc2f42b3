"""Sums of structures: the site language, the fit of one part to what the others leave, and models that hold them."""
import copy
import itertools
from types import SimpleNamespace

import pytest
import torch

import variants
from configurator import GPTConfig
from decomposition.initialise import initialise
from decomposition.sites import Decomposition
from growth import changes
from kron.linear import KroneckerLinear
from layers.basic import tags_of
from layers.sums import SumLinear, alternate
from lowrank.linear import LowRankLinear
from model import GPT
from tests.kron.test_als import covariance, inputs, randn, stats_of
from variants import Spec, UserError, parse_spec

SUM = 'lowrank(4) + kron(8, 8, terms=2)'
CONFIG = dict(block_size=16, vocab_size=23, n_layer=2, n_head=4, n_embd=32, bias=True)


def model(seed=0, dtype=torch.float64, **changes):
    torch.manual_seed(seed)
    made = GPT(GPTConfig(**{**CONFIG, **changes})).to(dtype)
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return made


# ---------------------------------------------------------------------------------------------------
# the language

def test_a_sum_is_one_spec():
    spec = parse_spec(' lowrank(64)+kron(8,8, terms=2) ', variants.LINEARS)
    assert spec == Spec('sum', (('lowrank(64)', 'kron(8, 8, terms=2)'),))
    assert str(spec) == 'lowrank(64) + kron(8, 8, terms=2)' and parse_spec(str(spec)) == spec
    assert parse_spec('a + (b(1) + c)') == Spec('sum', (('a', 'b(1)', 'c'),))
    assert str(parse_spec("sum(('lowrank(2)', 'kron(4, 4)'), guide=True)")).startswith('sum(')
    assert variants.parse_rules('h.*.mlp.*=lowrank(4)+kron(8,8,terms=2); *=dense') == {
        'h.*.mlp.*': 'lowrank(4)+kron(8,8,terms=2)', '*': 'dense'}
    assert variants.parse_rules('lowrank(4) + kron(8, 8, terms=2)') == {'*': SUM}


@pytest.mark.parametrize('text, words', [
    ('lowrank(4) + 3', 'not a spec'), ('lowrank(4) - kron(8, 8)', 'not a spec'), ('lowrank(4) + ', 'not a spec'),
    ('lowrank(4) + krom(8, 8)', "'krom' is not one of"), ('lowrank(4) * 2', 'not a spec'), ('+lowrank(4)', 'not a spec'),
], ids=str)
def test_what_is_no_sum_is_refused(text, words):
    with pytest.raises(UserError, match=words):
        parse_spec(text, variants.LINEARS)


@pytest.mark.parametrize('spec, words', [
    ('lowrank(20) + kron(8, 8, terms=15)', 'saves nothing: 5,'),
    ('lowrank(20) + kron(8, 8, terms=15)', 'in lowrank(20), rank=13 is the largest that saves some'),
    ('lowrank(4) + kron(7, 8)', '128 x 32'), ('lowrank(4) + kron(8)', 'kron(8): missing'),
    ('lowrank(4) + kron(8, 8, term=2)', "'term'"), ('lowrank(0) + kron(8, 8)', 'rank=0'),
    ('dense + kron(8, 8)', 'saves nothing'),
    ("sum(('lowrank(4)',))", 'two or more'), ("lowrank(2) + sum(('lowrank(4)', 'kron(8, 8)'))", 'write its parts'),
], ids=str)
def test_a_sum_that_does_not_fit_is_refused_in_one_sentence(spec, words):
    with pytest.raises(UserError) as caught:
        model(linear={'*.c_fc': spec})
    assert words in str(caught.value) and '\n' not in str(caught.value) and 'h.0.mlp.c_fc' in str(caught.value)


def test_the_remedy_saves_and_one_more_does_not():
    parts = ('lowrank(13)', 'kron(8, 8, terms=15)')
    assert SumLinear.weight_numel(32, 128, parts) < 32 * 128 <= SumLinear.weight_numel(32, 128, ('lowrank(14)', parts[1]))


# ---------------------------------------------------------------------------------------------------
# in a model

def test_the_model_counts_tags_and_realises_it():
    made = model(linear={'*.c_fc': SUM})
    module = made.sites()['h.1.mlp.c_fc']
    assert made.sites().keys() == model().sites().keys()                # the parts are no sites of their own
    row = next(row for row in made.site_table() if row['site'] == 'h.1.mlp.c_fc')
    assert (row['spec'], row['shape']) == (SUM, (128, 32))
    assert row['parameters'] == 4 * 160 + 2 * (64 + 64) + 128
    assert row['flops'] == sum(part.flops(16) for part in module.parts) // 16
    assert tags_of(module) == {'parts.0.U': 'factor', 'parts.0.V': 'factor', 'parts.1.A': 'factor', 'parts.1.B': 'factor',
                               'bias': 'vector'}
    x = torch.randint(23, (2, 16), generator=torch.Generator().manual_seed(0))
    before = made(x, x)[0]
    made.realise()
    torch.testing.assert_close(made(x, x)[0], before, rtol=1e-10, atol=1e-10)
    assert made.sites()['h.1.mlp.c_fc'].spec == 'dense'


@pytest.mark.parametrize('spec', [SUM, 'lowrank(4, exact_columns=2) + kron(8, 8, weight_norm=True)',
                                  'kron(8, 8, weight_norm=True)'])
def test_zero_init_makes_it_zero_and_it_trains(spec):
    torch.manual_seed(0)
    made = GPT(GPTConfig(**CONFIG, zero_init=True, linear={'*.c_proj': spec.replace('8, 8', '4, 4')}))
    module = made.sites()['h.0.mlp.c_proj']
    assert not module.dense_weight().any()
    made(torch.zeros(1, 4, dtype=torch.long), torch.ones(1, 4, dtype=torch.long))[1].backward()
    assert all(module.get_parameter(name).grad.abs().sum() > 0 for name in module.zero_factor.split())


def test_ngpt_refuses_a_sum_in_one_sentence():
    with pytest.raises(UserError, match='ngpt'):
        GPT(GPTConfig(**{**CONFIG, 'bias': False}, ngpt='full', linear={'*.c_fc': SUM}))


def test_the_dense_estimate_weighs_each_part():
    """For gradients that come from one dense G the estimate is J J^T-weighted per part; a dense-only site is its own."""
    made = model(linear={'h.0.mlp.c_fc': SUM})
    site = made.sites()['h.0.mlp.c_fc']
    state = {f'transformer.h.0.mlp.c_fc.{n}': {'step': torch.tensor(3.0), 'exp_avg': torch.randn_like(p),
                                               'exp_avg_sq': torch.rand_like(p)} for n, p in site.named_parameters()}
    found = changes.estimates(made, state)['transformer.h.0.mlp.c_fc.weight']
    U, V = site.parts[0].U.detach(), site.parts[0].V.detach()
    (A, B), total = (f.detach() for f in (site.parts[1].A, site.parts[1].B)), 0

    def kron(A, B):
        return sum(torch.kron(a, b) for a, b in zip(A, B))
    m = {n.rpartition('.')[2]: state[f'transformer.h.0.mlp.c_fc.{n}']['exp_avg'] for n, _ in site.named_parameters()}
    for factor, image, P in ((U, m['U'] @ V, U @ V), (V, U @ m['V'], U @ V), (A, kron(m['A'], B), kron(A, B)),
                             (B, kron(A, m['B']), kron(A, B))):
        total = total + image * factor.square().sum() / P.square().sum() / 4
    torch.testing.assert_close(found['exp_avg'], total, rtol=1e-9, atol=1e-9)


# ---------------------------------------------------------------------------------------------------
# from a dense matrix

def error(W, module, C=None):
    D = W - module.dense_weight()
    return (D * (D if C is None else D @ C)).sum().item()


def test_the_first_part_is_fitted_to_w_and_the_next_to_the_rest(monkeypatch):
    monkeypatch.setattr('layers.sums.ROUNDS', 0)
    W, parts = randn(96, 48), ('lowrank(5)', 'kron(8, 6, terms=3)')
    module = SumLinear.from_dense(W, None, parts=parts)
    first = LowRankLinear.from_dense(W, None, rank=5)
    second = KroneckerLinear.from_dense(W - first.dense_weight(), None, m=8, n=6, terms=3)
    torch.testing.assert_close(module.dense_weight(), first.dense_weight() + second.dense_weight(), rtol=1e-10, atol=1e-10)


def test_rounds_lower_the_error_and_never_raise_it(monkeypatch):
    errors = []
    W = randn(96, 48)
    for rounds in (0, 1, 3, 30):
        monkeypatch.setattr('layers.sums.ROUNDS', rounds)
        errors.append(error(W, SumLinear.from_dense(W, None, parts=('lowrank(5)', 'kron(8, 6, terms=3)'))))
    assert all(b <= a for a, b in itertools.pairwise(errors)) and errors[2] < errors[0]
    assert errors[0] < error(W, LowRankLinear.from_dense(W, None, rank=5))


def test_a_sum_that_is_there_is_found_better_than_by_either_part_alone():
    low, kron = randn(96, 4) @ randn(4, 48, seed=1), torch.kron(randn(8, 6, seed=2), randn(12, 8, seed=3))
    W = low + kron
    module = SumLinear.from_dense(W, None, parts=('lowrank(4)', 'kron(8, 6)'))
    equal = LowRankLinear.from_dense(W, None, rank=5)                   # 720 parameters, the sum has 720
    assert sum(p.numel() for p in module.parameters()) == sum(p.numel() for p in equal.parameters())
    assert error(W, module) < 0.1 * error(W, equal)


@pytest.mark.parametrize('bias', [True, False])
def test_calibrated_methods_lower_the_error_of_the_outputs(bias):
    W, x, parts = randn(96, 48), inputs(2000, 48), ('lowrank(5)', 'kron(8, 6, terms=3)')
    stats, b = stats_of(x), randn(96, seed=5) if bias else None
    plain = SumLinear.from_dense(W, b, parts=parts)
    fitted = SumLinear.from_dense(W, b, method='svd_whitened,als', stats=stats, parts=parts)

    def outputs(module):
        y = module(x) - (0 if b is None else b)
        return (y - x @ W.t()).square().mean().item()
    assert outputs(fitted) < 0.6 * outputs(plain)
    for half in (('lowrank(5)', 'lowrank(1)'), ('kron(8, 6, terms=3)', 'kron(8, 6)')):
        assert outputs(fitted) < outputs(SumLinear.from_dense(W, b, method='svd_whitened,als', stats=stats, parts=half))
    if bias:
        torch.testing.assert_close(fitted(x).mean(0), x.mean(0) @ W.t() + b, rtol=1e-9, atol=1e-9)


def test_calibrated_rounds_are_never_worse_than_their_start(monkeypatch):
    W, stats, errors = randn(48, 24), stats_of(inputs(500, 24)), []
    C = stats.covariance + torch.outer(stats.mean, stats.mean)
    d = C.diagonal()
    C = C + 0.01 * min(d.mean(), 3 * d.median()) * torch.eye(24)
    for rounds in (0, 1, 3):
        monkeypatch.setattr('layers.sums.ROUNDS', rounds)
        errors.append(error(W, SumLinear.from_dense(W, None, method='als,svd_whitened', stats=stats,
                                                    parts=('kron(8, 6)', 'lowrank(3)')), C))
    assert errors[2] <= errors[1] <= errors[0]


def test_a_hessian_weighs_the_outputs():
    W, x = randn(48, 24), inputs(500, 24)
    stats = stats_of(x, gradient=covariance(48))
    parts = ('kron(8, 6)', 'kron(2, 4, terms=2)')
    D = [W - SumLinear.from_dense(W, None, method=method, stats=stats, parts=parts).dense_weight()
         for method in ('als', 'als_hessian')]
    weighed = [(stats.gradient @ d @ x.t() * (d @ x.t())).sum() for d in D]
    assert weighed[1] < weighed[0]


def test_mistakes_of_methods_are_one_sentence():
    W, parts = randn(48, 24), ('lowrank(2)', 'kron(8, 6)')
    with pytest.raises(ValueError, match='lowrank knows van_loan'):
        SumLinear.from_dense(W, None, method='als', parts=parts)
    with pytest.raises(ValueError, match='calibration pass'):
        SumLinear.from_dense(W, None, method='als,svd', parts=parts)


def test_models_are_decomposed_into_sums():
    source = model(linear={})
    generator = torch.Generator().manual_seed(0)
    text = [tuple(torch.randint(23, (16, 16), generator=generator) for _ in range(2)) for _ in range(3)]
    loss = {}
    for method in ('van_loan', 'svd_whitened,als', 'svd_whitened_sequential,als_sequential'):
        made = model(seed=1, linear={'*.c_fc': SUM, '*.c_proj': 'kron(4, 4, terms=4)'})
        rows = initialise(made, source.config, source.state_dict(), how=Decomposition(method, text))
        assert {row['spec'] for row in rows} == {'dense', SUM, 'kron(4, 4, terms=4)'}
        with torch.no_grad():
            loss[method] = sum((made(x, y)[0] - source(x, y)[0]).square().mean().item() for x, y in text)
    assert loss['svd_whitened_sequential,als_sequential'] < loss['svd_whitened,als'] < loss['van_loan']
    again = model(seed=2, linear={'*.c_fc': SUM, '*.c_proj': 'kron(4, 4, terms=4)'})
    initialise(again, made.config, made.state_dict())                   # the same structure is copied bit by bit
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), made.state_dict().values()))
    dense = model(seed=3)
    initialise(dense, made.config, copy.deepcopy(made.state_dict()))    # and realised where the new model is dense
    torch.testing.assert_close(dense(text[0][0], text[0][1])[0], made(text[0][0], text[0][1])[0], rtol=1e-8, atol=1e-8)


def test_stats_may_be_plain_objects():
    stats = stats_of(inputs(300, 24))
    assert isinstance(stats, SimpleNamespace)
    before = copy.deepcopy(stats)
    SumLinear.from_dense(randn(48, 24), randn(48), method='svd_whitened,als', stats=stats,
                         parts=('lowrank(2, exact_columns=2)', 'kron(8, 6)'))
    assert torch.equal(stats.covariance, before.covariance) and torch.equal(stats.mean, before.mean)


def test_a_refit_that_is_worse_is_not_taken():
    """Of a method that draws ever worse matrices for its part, the first stays."""
    W, calls = randn(8, 6), []

    def worse(rest):
        calls.append(0)
        return LowRankLinear.from_dense(rest * 0.5 ** len(calls), None, rank=6)
    made = alternate(W, [worse, worse], lambda D: D.square().sum().item())
    torch.testing.assert_close(sum(m.dense_weight() for m in made), 0.5 * W + 0.125 * W, rtol=1e-10, atol=1e-10)
    assert len(calls) == 4
