"""Calibration, layer-by-layer fitting, pruning and reports: numpy, autograd and whole models are the oracles."""
import dataclasses
import sys

import numpy as np
import pytest
import torch

from configurator import GPTConfig
from data.dataset import open_dataset
from decomposition import calibrate, sequential, sites
from decomposition.calibrate import Moments, Stats
from decomposition.initialise import initialise
from decomposition.sites import Decomposition, prune, runnable
from model import GPT, CausalSelfAttention
from tests.screen import Screen
from tests.tiny import make_data
from variants import UserError

CONFIG = GPTConfig(block_size=16, vocab_size=23, n_layer=2, n_head=4, n_embd=16, bias=True, dropout=0.1)
RULES = {'h.*.mlp.c_fc': 'kron(8, 4, terms=3)', 'h.*.mlp.c_proj': 'kron(4, 8, terms=3)', 'h.1.attn.c_v': 'lowrank(4)'}


def random_model(seed=0, dtype=torch.float64, **changes):
    torch.manual_seed(seed)
    model = GPT(dataclasses.replace(CONFIG, **changes)).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def text(batches=3, rows=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [tuple(torch.randint(23, (rows, 16), generator=generator) for _ in range(2)) for _ in range(batches)]


def gathered(model, sites, batches, **keywords):
    return {site: s for found in calibrate.passes(model, sites, batches, **keywords) for site, s in found.items()}


def recorded(model, site, batches):
    """The site's inputs, (tokens, in), by a plain hook of our own."""
    rows = []
    handle = model.sites()[site].register_forward_pre_hook(lambda _, args: rows.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        for x, _ in batches:
            model.eval()(x)
    handle.remove()
    return torch.cat(rows)


def same(found, expected, tolerance=1e-10):
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


# ---------------------------------------------------------------------------------------------------
# one model

@pytest.mark.parametrize('dtype', [torch.float64, torch.float32], ids=str)
def test_stats_are_numpys(dtype):
    model, batches = random_model(dtype=dtype), text()
    for site, stats in gathered(model, list(model.sites()), batches).items():
        x = recorded(model, site, batches).double().numpy()
        assert stats.count == len(x) == 192 and stats.covariance.dtype == torch.float64
        same(stats.mean, x.mean(0))
        same(stats.covariance, np.cov(x, rowvar=False, bias=True))


def test_pieces_are_the_whole():
    x = 1000 + torch.randn(100, 7, dtype=torch.float64)
    whole, pieces = Moments(), Moments()
    whole.add(x)
    for piece in x.split([1, 2, 50, 47]):
        pieces.add(piece.view(1, -1, 7))
    same(pieces.covariance, whole.covariance)
    same(whole.covariance, np.cov(x.numpy(), rowvar=False, bias=True), 1e-12)       # a large mean costs no digits
    model, batches = random_model(), text(1, 12)
    rows = [tuple(t[i:i + 3] for t in batches[0]) for i in range(0, 12, 3)]
    one, many = (gathered(model, ['h.1.mlp.c_proj'], b, gradients=True)['h.1.mlp.c_proj'] for b in (batches, rows))
    same(one.covariance, many.covariance)
    same(one.gradient, many.gradient)


def test_sites_of_one_input_share_one_covariance():
    model = random_model(mlp='swiglu(32)')
    found = calibrate.groups(model, text()[0][0])
    assert found[:4] == [['h.0.attn.c_q', 'h.0.attn.c_k', 'h.0.attn.c_v'], ['h.0.attn.c_proj'],
                         ['h.0.mlp.c_gate', 'h.0.mlp.c_fc'], ['h.0.mlp.c_proj']]
    stats = gathered(model, list(model.sites()), text())
    assert stats['h.0.attn.c_q'].covariance is stats['h.0.attn.c_v'].covariance
    assert stats['h.0.attn.c_q'].covariance is not stats['h.1.attn.c_q'].covariance


@pytest.mark.parametrize('gradients', [False, True])
def test_little_memory_takes_more_passes_and_gives_the_same(gradients):
    model, batches, sites = random_model(), text(), ['h.0.attn.c_v', 'h.0.mlp.c_proj', 'h.1.mlp.c_fc']
    assert len(list(calibrate.passes(model, sites, batches, gradients))) == 1
    chunks = list(calibrate.passes(model, sites, batches, gradients, memory=8 * 64 ** 2 + 8 * 16 ** 2 * gradients))
    assert [list(chunk) for chunk in chunks] == [[site] for site in sites]
    whole = gathered(model, sites, batches, gradients=gradients)
    for chunk in chunks:
        for site, stats in chunk.items():
            assert torch.equal(stats.covariance, whole[site].covariance)
            assert not gradients or torch.equal(stats.gradient, whole[site].gradient)


@pytest.mark.parametrize('recompute', [False, True])
def test_gradients_are_autograds(recompute):
    model, batches, site = random_model(recompute=recompute), text(2), 'h.0.mlp.c_fc'
    stats = gathered(model, [site], batches, gradients=True)[site]
    plain, rows = random_model().eval(), []
    for x, y in batches:
        kept = []
        handle = plain.sites()[site].register_forward_hook(lambda _, args, out, kept=kept: kept.append(out))
        loss = plain(x, y)[1] * y.numel()
        rows.append(torch.autograd.grad(loss, kept[0])[0].flatten(0, 1))
        handle.remove()
    g = torch.cat(rows).numpy()
    same(stats.gradient, g.T @ g / len(g))
    assert stats.count == len(g)                            # not twice where the block is computed again


def test_the_model_is_left_as_it_was():
    model = random_model().train()
    model.lm_head.weight.requires_grad_(False)
    before, state = {n: (p.clone(), p.requires_grad) for n, p in model.named_parameters()}, torch.get_rng_state()
    first = gathered(model, list(model.sites()), text(), gradients=True)
    again = gathered(model, list(model.sites()), text(), gradients=True)
    assert all(torch.equal(first[s].covariance, again[s].covariance) for s in first)        # nothing is carried over
    assert all(torch.equal(p, before[n][0]) and p.requires_grad == before[n][1] and p.grad is None
               for n, p in model.named_parameters())
    assert model.training and torch.equal(torch.get_rng_state(), state)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


# ---------------------------------------------------------------------------------------------------
# the text

@pytest.fixture(scope='module')
def dataset(tmp_path_factory):
    return open_dataset(str(make_data(tmp_path_factory.mktemp('data')) / 'tiny'), lambda *words: None)


def test_the_text_is_what_was_asked_for_and_no_window_comes_twice(dataset):
    found = calibrate.batches(dataset, 1000, 16)
    x = torch.cat([x for x, _ in found])
    assert x.shape == (63, 16) and all(torch.equal(a[:, 1:], b[:, :-1]) for a, b in found)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(found, calibrate.batches(dataset, 1000, 16)))
    assert not torch.equal(x, torch.cat([x for x, _ in calibrate.batches(dataset, 1000, 16, seed=1)]))
    starts = {tuple(row.tolist()) for row in x}
    assert len(starts) == 63


def test_too_little_text_is_refused(dataset):
    with pytest.raises(UserError, match=r"calibration_tokens can be at most [\d,]+, .*split 'train' .* got 100,000"):
        calibrate.batches(dataset, 100_000, 16)
    with pytest.raises(UserError, match='calibration_tokens must be at least 64, the inputs of h.0.mlp.c_proj.*got 48'):
        gathered(random_model(), ['h.0.mlp.c_fc', 'h.0.mlp.c_proj'], text(1, 3))


# ---------------------------------------------------------------------------------------------------
# layer by layer

def filled(method, seed=1, source=None, batches=None, rules=RULES, **keywords):
    """(model, report) decomposed from the source."""
    source = source or random_model()
    model = random_model(seed, linear=rules)
    how = Decomposition(method, batches if batches is not None else text(), **keywords)
    return model, {row['site']: row for row in initialise(model, source.config, source.state_dict(), how=how)}


def test_sequential_stats_are_those_of_the_finished_models(monkeypatch):
    """What a site was fitted to is what the finished compressed model feeds it, and the cross moment is both models'."""
    seen, walk = {}, sequential.walk

    def watched(*arguments):
        for site, stats in walk(*arguments):
            seen[site] = dataclasses.replace(stats)
            yield site, stats
    monkeypatch.setattr(sequential, 'walk', watched)
    source, batches = random_model(), text()
    model, _ = filled('als_sequential_hessian,svd_sequential', source=source, batches=batches)
    assert list(seen) == ['h.0.mlp.c_fc', 'h.0.mlp.c_proj', 'h.1.attn.c_v', 'h.1.mlp.c_fc', 'h.1.mlp.c_proj']
    gradients = gathered(source, list(seen), batches, gradients=True)
    for site, stats in seen.items():
        x, y = (recorded(m, site, batches).numpy() for m in (model, source))
        same(stats.mean, x.mean(0))
        same(stats.source_mean, y.mean(0))
        same(stats.covariance, np.cov(x, rowvar=False, bias=True))
        same(stats.source_covariance, np.cov(y, rowvar=False, bias=True))
        same(stats.cross, (y - y.mean(0)).T @ (x - x.mean(0)) / len(x))
        same(stats.gradient, gradients[site].gradient)
    assert not torch.allclose(seen['h.1.mlp.c_proj'].cross, seen['h.1.mlp.c_proj'].covariance)


@pytest.mark.parametrize('method, models', [('als_sequential', 2), ('als_streamed', 1)])
def test_a_block_attends_once_for_all_of_its_mlp(monkeypatch, method, models):
    calls, forward = [], CausalSelfAttention.forward
    monkeypatch.setattr(CausalSelfAttention, 'forward', lambda self, *given: calls.append(self) or forward(self, *given))
    batches = text()
    filled(method, batches=batches, rules={'h.*.mlp.*': 'kron(8, 4)'})
    blocks = 2
    assert len(calls) == blocks + models * blocks * len(batches)   # to see the order of the sites; each model


def test_fitting_layer_by_layer_follows_the_dense_model_better():
    source, batches = random_model(), text(6, 8)
    loss = {}
    for method in ('van_loan,svd', 'als,svd', 'als_sequential,svd_sequential'):
        model, _ = filled(method, source=source, batches=batches)
        with torch.no_grad():
            loss[method] = sum((model.eval()(x, y)[0] - source.eval()(x, y)[0]).square().mean() for x, y in batches)
    assert loss['als_sequential,svd_sequential'] < loss['als,svd'] < loss['van_loan,svd']


def test_a_plain_method_becomes_sequential_by_its_target():
    """svd_sequential: the SVD of the regression of the dense outputs on what the compressed model feeds."""
    source, batches = random_model(), text(6, 8)
    rules = {'h.0.mlp.c_fc': 'kron(8, 4)', 'h.1.attn.c_v': 'lowrank(4)'}
    model, _ = filled('van_loan_sequential,svd_sequential', source=source, batches=batches, rules=rules)
    site = 'h.1.attn.c_v'
    x, y = (recorded(m, site, batches) for m in (model, source))
    W, b = source.sites()[site].weight.detach(), source.sites()[site].bias.detach()
    xc, yc = x - x.mean(0), y - y.mean(0)
    ridge = 0.01 * min(xc.var(0, correction=0).mean(), 3 * xc.var(0, correction=0).median()) * torch.eye(16)
    T = W @ (yc.t() @ xc / len(x) + ridge) @ torch.linalg.inv(xc.t() @ xc / len(x) + ridge)
    U, S, V = torch.linalg.svd(T)
    same(model.sites()[site].dense_weight().detach(), U[:, :4] @ S[:4].diag() @ V[:4], 1e-7)
    same(model.sites()[site].bias.detach(), b + W @ y.mean(0) - T @ x.mean(0), 1e-7)


@pytest.mark.parametrize('method', ['als_sequential_streamed', 'svd_streamed_sequential', 'svd_sequential_whitened'])
def test_a_form_that_is_none_is_refused(method):
    with pytest.raises(UserError, match='is unknown'):
        filled(method, batches=text(), rules={'h.0.mlp.c_fc': 'kron(8, 4)' if 'als' in method else 'lowrank(4)'})


@pytest.mark.parametrize('beside', ['svd_whitened_streamed', 'svd_whitened_sequential'])
def test_a_streamed_method_is_the_plain_one_on_what_the_compressed_model_feeds(beside):
    """With the dense model alone in front, and with it beside for another site."""
    source, batches = random_model(), text(6, 8)
    rules = {'h.0.mlp.c_fc': 'lowrank(4)', 'h.1.attn.c_v': 'kron(4, 4)', 'h.1.mlp.c_fc': 'lowrank(3)'}
    model, report = filled(f'{beside},als_hessian_streamed', source=source, batches=batches, rules=rules)
    gradients = gathered(source, ['h.1.attn.c_v'], batches, gradients=True)['h.1.attn.c_v'].gradient
    for site, method in (('h.1.attn.c_v', 'als_hessian'), ('h.1.mlp.c_fc', 'svd_whitened')):
        x, dense, made = recorded(model, site, batches), source.sites()[site], model.sites()[site]
        stats = Stats(len(x), x.mean(0), torch.from_numpy(np.cov(x.numpy(), rowvar=False, bias=True)), gradients)
        again = type(made).from_dense(dense.weight.detach(), dense.bias.detach(), method=method, stats=stats,
                                      **sites.structure(made)[1])
        matches = torch.allclose(made.dense_weight(), again.dense_weight(), rtol=1e-6, atol=1e-8)
        assert matches == (method == 'als_hessian' or beside.endswith('streamed'))
        if matches:
            with torch.no_grad():
                error = ((dense(x) - made(x)).square().sum() / (x @ dense.weight.t()).square().sum()).sqrt()
            assert report[site]['output_error'] == pytest.approx(error.item(), rel=1e-7)


# ---------------------------------------------------------------------------------------------------
# the report

def test_the_report_is_what_the_model_does():
    source, batches = random_model(), text()
    _, plain = filled('van_loan,svd', source=source, prune_before='wanda', prune_fraction=0.01)
    model, fitted = filled('als,svd', source=source, validation=text(2, seed=5))
    for site in ('h.0.mlp.c_fc', 'h.1.mlp.c_proj'):
        x, dense, made = recorded(source, site, batches), source.sites()[site], model.sites()[site]
        with torch.no_grad():
            error = (dense(x) - made(x)).square().sum() / (x @ dense.weight.t()).square().sum()
        assert fitted[site]['output_error'] == pytest.approx(error.sqrt().item(), rel=1e-9)
        assert fitted[site]['output_error'] < plain[site]['output_error']
        assert fitted[site]['error'] > plain[site]['error']
        alone = runnable(source.config, source.state_dict(), None)
        alone.transformer.set_submodule(site, made)
        with torch.no_grad():
            assert fitted[site]['loss'] == pytest.approx(sites.mean_loss(alone, text(2, seed=5)), rel=1e-12)
            assert fitted[site]['dense_loss'] == pytest.approx(sites.mean_loss(source.eval(), text(2, seed=5)))
    assert fitted['h.0.attn.c_q'].keys() == {'site', 'spec', 'error', 'norm', 'parameters'}         # copied


def test_the_source_and_other_sites_stay_as_they_were():
    source = random_model()
    before = {name: t.clone() for name, t in source.state_dict().items()}
    for method in ('als,svd', 'als_sequential,svd'):
        first, again = (filled(method, source=source)[0].state_dict() for _ in range(2))
        assert all(torch.equal(t, again[name]) for name, t in first.items())
        assert all(torch.equal(t, before[name]) for name, t in source.state_dict().items())
        assert torch.equal(first['transformer.h.0.attn.c_q.weight'], before['transformer.h.0.attn.c_q.weight'])


@pytest.mark.parametrize('changes', [
    {'rope': True, 'value_residual': True, 'n_kv_head': 2, 'tie_weights': False},
    {'norm': 'rmsnorm', 'bias': False, 'mlp': 'swiglu(32)', 'attention': 'mla(8)'}], ids=str)
def test_models_of_every_kind_are_calibrated(changes):
    source = random_model(**changes)
    model = random_model(1, **changes, linear={'h.*.mlp.c_fc': 'kron(8, 4)', 'h.*.attn.c_proj': 'lowrank(4)'})
    how = Decomposition('als_sequential_hessian,svd_sequential', text())
    rows = initialise(model, source.config, source.state_dict(), how=how)
    assert sum('output_error' in row for row in rows) == 4


def test_mistakes_are_one_sentence():
    for method, keywords, words in [
            ('als,svd', {'batches': []}, 'decompose=als,svd needs text to calibrate on; set calibration_tokens'),
            ('als_hesian,svd', {}, "h.0.mlp.c_fc: method='als_hesian,svd' is unknown; kron knows .*mean 'als_hessian'"),
            ('als', {}, "h.1.attn.c_v: method='als' is unknown; lowrank knows"),
            ('van_loan', {'prune_before': 'wanda'}, 'prune_fraction must be above 0'),
            ('van_loan', {'prune_before': 'wnada', 'prune_fraction': 0.5}, "did you mean 'wanda'"),
            ('van_loan', {'prune_before': 'wanda', 'prune_fraction': 0.5, 'batches': []}, 'prune_before=wanda needs text')]:
        with pytest.raises(UserError, match=words) as caught:
            filled(method, **keywords)
        assert '\n' not in str(caught.value)


# ---------------------------------------------------------------------------------------------------
# pruning

def test_pruning_drops_the_least():
    W = torch.tensor([[1.0, -5.0, 0.1, 2.0], [-0.2, 3.0, 4.0, 0.3]], dtype=torch.float64)
    assert prune(W, 0.5, 'magnitude').tolist() == [[0, -5, 0, 2], [0, 3, 4, 0]]
    stats = Stats(9, torch.tensor([3.0, 0, 0, 0]).double(), torch.diag(torch.tensor([1.0, 0.01, 100, 1])).double())
    assert prune(W, 0.5, 'wanda', stats).tolist() == [[1, 0, 0, 2], [-0.2, 0, 4, 0]]      # by row, and E x^2 holds the mean
    assert prune(W, 0.0, 'magnitude') is W and prune(W, 0.9, 'none') is W
    ties = prune(torch.ones(10, 10), 0.37, 'magnitude')
    assert (ties == 0).sum() == 37


def test_pruning_comes_before_the_method():
    source = random_model()
    model, _ = filled('van_loan,svd', source=source, prune_before='magnitude', prune_fraction=0.3)
    site = 'h.0.mlp.c_fc'
    pruned = prune(source.sites()[site].weight.detach(), 0.3, 'magnitude')
    expected = type(model.sites()[site]).from_dense(pruned, None, m=8, n=4, terms=3).dense_weight()
    assert torch.equal(model.sites()[site].dense_weight(), expected)


NARROW = {'mlp': {'h.*': 'gelu(32)'}}


@pytest.mark.parametrize('changes, method, bars', [
    ({}, 'van_loan', []), ({'linear': RULES}, 'van_loan', ['decompose']),
    ({'linear': RULES}, 'svd_whitened,als', ['calibration', 'decompose']),
    (NARROW, 'neurons', ['calibration with gradients', 'narrow'])])
def test_on_a_terminal_a_bar_appears_only_for_what_there_is_to_do(monkeypatch, changes, method, bars):
    """Not '0site [00:00, ?site/s]' before a sample; and no minutes without a word."""
    source, model = random_model(), GPT(dataclasses.replace(CONFIG, **changes)).double()
    screen = Screen(120)
    monkeypatch.setattr(sys, 'stderr', screen)
    initialise(model, source.config, source.state_dict(), how=Decomposition(method, text(8)))
    seen = {line.partition(':')[0] for lines in screen.seen for line in lines}
    assert seen == set(bars) and not screen.lines()
