"""The options that all structures share: exact columns and learned row norms; the guide is in test_guided.py."""
import copy

import pytest
import torch

from configurator import GPTConfig
from decomposition.initialise import initialise
from decomposition.sites import Decomposition
from kron.linear import KroneckerLinear
from layers.structured import loudest, silenced
from layers.sums import SumLinear
from lowrank.linear import LowRankLinear
from model import GPT
from tests.kron.test_als import inputs, randn, stats_of

CASES = {
    'lowrank': (LowRankLinear, {'rank': 4}, 'svd_whitened'),
    'kron': (KroneckerLinear, {'m': 8, 'n': 6, 'terms': 2}, 'als'),
    'sum': (SumLinear, {'parts': ('lowrank(3, exact_columns=3)', 'kron(8, 6)')}, 'svd_whitened,als'),
}
each = pytest.mark.parametrize('name', CASES)


def loud(columns=(3, 17, 20), size=24):
    """Inputs of which some are 30 times the others."""
    x = inputs(800, size)
    x[:, list(columns)] = 30 * randn(800, len(columns), seed=7)         # and they have nothing to do with one another
    return x


def built(name, columns=3):
    cls, arguments, method = CASES[name]
    return cls, arguments if name == 'sum' else {**arguments, 'exact_columns': columns}, method


def index_of(module):
    return getattr(module, 'parts', [module])[0].index


@each
@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('calibrated', [True, False])
def test_the_loudest_inputs_are_kept_exactly(name, bias, calibrated):
    cls, arguments, method = built(name)
    W, b, x = randn(48, 24), randn(48, seed=9) if bias else None, loud()
    W[:, [5, 6, 9]] *= 10                                       # the largest columns, for the one without stats
    stats = stats_of(x) if calibrated else None
    module = cls.from_dense(W, b, method=method if calibrated else 'van_loan', stats=stats, **arguments)
    kept = [3, 17, 20] if calibrated else [5, 6, 9]
    assert index_of(module).tolist() == kept
    torch.testing.assert_close(module.dense_weight()[:, kept], W[:, kept], rtol=1e-12, atol=1e-12)
    others = [j for j in range(24) if j not in kept]
    assert (module.dense_weight()[:, others] - W[:, others]).norm() > 0.1 * W[:, others].norm()     # and they alone
    numel = cls.weight_numel(24, 48, **arguments)
    assert numel == sum(p.numel() for p in module.parameters()) - 48 * bias
    torch.testing.assert_close(module(x), x @ module.dense_weight().t() + (0 if b is None else module.bias))


@each
def test_exact_columns_pay_where_a_few_inputs_are_massive(name):
    """At equal parameters, against more rank or terms; and never worse in the other columns than without them."""
    cls, arguments, method = built(name)
    plain = {'lowrank': {'rank': 6}, 'kron': {'m': 8, 'n': 6, 'terms': 5},
             'sum': {'parts': ('lowrank(5)', 'kron(8, 6)')}}[name]
    W, x = randn(48, 24), loud()
    assert cls.weight_numel(24, 48, **plain) >= cls.weight_numel(24, 48, **arguments)
    first, other = (cls.from_dense(W, None, method=method, stats=stats_of(x), **a) for a in (arguments, plain))
    assert (first(x) - x @ W.t()).norm() < (other(x) - x @ W.t()).norm()


def test_low_rank_beside_exact_columns_is_the_best_of_the_rest():
    """Against the SVD of W without those columns."""
    W = randn(48, 24)
    W[:, 7] *= 10
    module = LowRankLinear.from_dense(W, None, rank=4, exact_columns=1)
    rest = [j for j in range(24) if j != 7]
    S = torch.linalg.svdvals(W[:, rest])
    assert (W - module.dense_weight()).square().sum().item() == pytest.approx(S[4:].square().sum().item(), rel=1e-10)


@pytest.mark.parametrize('method', ['van_loan', 'als'])
def test_a_kronecker_sum_is_never_worse_beside_exact_columns(method):
    W, x = randn(48, 24), loud()
    stats = stats_of(x)
    with_it, without = (KroneckerLinear.from_dense(W, None, method=method, stats=stats, m=8, n=6, terms=2, exact_columns=k)
                        for k in (3, 0))
    rest = silenced(stats, loudest(W, stats, 3))
    C = rest.covariance + torch.outer(rest.mean, rest.mean)
    errors = [((W - m.dense_weight()) @ C * (W - m.dense_weight())).sum().item() for m in (with_it, without)]
    assert errors[0] <= errors[1]


def test_from_scratch_they_start_at_zero_and_train():
    module = KroneckerLinear(24, 48, True, 8, 6, exact_columns=2)
    assert not module.columns.any() and module.index.tolist() == [0, 1]
    module(randn(5, 24).float()).square().sum().backward()
    assert module.columns.grad.abs().sum() > 0


def test_checkpoints_carry_the_inputs(tmp_path):
    """A model decomposed with exact columns, through a checkpoint's state, and decomposed again into something else."""
    config = dict(block_size=16, vocab_size=23, n_layer=2, n_head=4, n_embd=32, bias=True)
    torch.manual_seed(0)
    source = GPT(GPTConfig(**config)).double()
    with torch.no_grad():
        for p in source.parameters():
            p.add_(0.1 * torch.randn_like(p))
    rules = {'*.c_fc': 'lowrank(3, exact_columns=2) + kron(8, 8)', '*.c_proj': 'kron(4, 4, terms=2, exact_columns=3)'}
    made = GPT(GPTConfig(**config, linear=rules)).double()
    x = torch.randint(23, (16, 16), generator=torch.Generator().manual_seed(1))
    how = Decomposition('svd_whitened_sequential,als_sequential', [(x, x)] * 2)
    initialise(made, source.config, source.state_dict(), how=how)
    names = {name for name in made.state_dict() if name.endswith('.index')}
    assert len(names) == 2 + 4 and any(made.state_dict()[n].tolist() != [0, 1, 2] for n in names if 'c_proj' in n)
    again = GPT(GPTConfig(**config, linear=rules)).double()
    again.load_state_dict(copy.deepcopy(made.state_dict()))
    assert torch.equal(again(x, x)[0], made(x, x)[0])
    dense = GPT(GPTConfig(**config)).double()
    initialise(dense, made.config, made.state_dict())
    torch.testing.assert_close(dense(x, x)[0], made(x, x)[0], rtol=1e-9, atol=1e-9)
    lost = copy.deepcopy(made.state_dict())
    for name in names:
        lost[name] = (lost[name] + 1) % 32
    again.load_state_dict(lost)
    assert not torch.allclose(again(x, x)[0], made(x, x)[0])            # negative control: other inputs, other function


# ---------------------------------------------------------------------------------------------------
# weight norm

@pytest.mark.parametrize('name', ['lowrank', 'kron'])
def test_weight_norm_is_its_definition(name):
    cls, arguments, _ = CASES[name]
    module = cls(24, 48, False, **arguments, weight_norm=True).double()
    bare = cls(24, 48, False, **arguments).double()
    bare.load_state_dict({n: t for n, t in module.state_dict().items() if n != 'magnitude'})
    P = bare.dense_weight()
    torch.testing.assert_close(module.dense_weight(), P, rtol=1e-6, atol=1e-9)          # at first nothing changes
    with torch.no_grad():
        module.magnitude.copy_(randn(48))
    expected = module.magnitude[:, None] * P / P.norm(dim=1, keepdim=True)
    torch.testing.assert_close(module.dense_weight(), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(module.dense_weight().norm(dim=1), module.magnitude.abs(), rtol=1e-12, atol=1e-12)
    factor = {'lowrank': 'U', 'kron': 'A'}[name]
    before = module.dense_weight()
    with torch.no_grad():
        getattr(module, factor).mul_(7)
    torch.testing.assert_close(module.dense_weight(), before, rtol=1e-12, atol=1e-12)   # the factors' size is free
    assert not torch.allclose(bare.dense_weight() * 7, P)


@pytest.mark.parametrize('name', ['lowrank', 'kron'])
def test_from_dense_gives_the_same_function_with_weight_norm(name):
    cls, arguments, _ = CASES[name]
    W = randn(48, 24)
    plain, normed = (cls.from_dense(W, None, **arguments, weight_norm=flag) for flag in (False, True))
    torch.testing.assert_close(plain.dense_weight(), normed.dense_weight(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('spec', ['lowrank(4, weight_norm=True)', 'kron(4, 4, terms=3, weight_norm=True)'])
def test_ngpt_normalises_rows_by_the_magnitude(spec):
    made = GPT(GPTConfig(block_size=16, vocab_size=23, n_layer=1, n_head=4, n_embd=32, ngpt='full', linear={'*.c_fc': spec}))
    rows = made.sites()['h.0.mlp.c_fc'].dense_weight().norm(dim=1)
    torch.testing.assert_close(rows, torch.ones_like(rows))


@pytest.mark.parametrize('arguments, words', [
    ({'exact_columns': -1}, 'exact_columns=-1'), ({'exact_columns': 25}, '24 inputs'), ({'exact_columns': True}, 'True'),
    ({'weight_norm': 1}, 'weight_norm=1'), ({'guide': 'yes'}, "guide='yes'"),
], ids=str)
def test_bad_options_are_refused_in_one_sentence(arguments, words):
    for cls, sizes in ((LowRankLinear, {'rank': 2}), (KroneckerLinear, {'m': 8, 'n': 6})):
        with pytest.raises(ValueError) as caught:
            cls(24, 48, True, **sizes, **arguments)
        assert words in str(caught.value)


def test_stats_without_what_exact_columns_need_are_refused():
    with pytest.raises(ValueError, match='covariance'):
        LowRankLinear.from_dense(randn(48, 24), None, stats={'mean': randn(24)}, rank=2, exact_columns=1)
