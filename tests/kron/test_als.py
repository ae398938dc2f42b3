"""Kronecker sums fitted to outputs: every claim of kron/als.py against independent dense algebra."""
from types import SimpleNamespace

import pytest
import torch

import kron.als as als
from kron.als import FITTED, Problem, dense, fit, with_ridge
from kron.linear import CALIBRATED, METHODS, KroneckerLinear
from kron.solve import by_products, normal_matrix, separable_inverse
from kron.van_loan import canonical, nearest_kronecker_sum, rearrange

SHAPES = [(6, 4, 2, 3, 1), (3, 2, 4, 5, 2), (8, 6, 3, 1, 2), (1, 5, 6, 2, 2), (4, 1, 3, 6, 2)]      # m, n, p, q, terms
EXACT = {'rtol': 1e-10, 'atol': 1e-10}


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def covariance(size, seed=1, decay=3.0):
    """Positive definite, with a spectrum that falls by 10^decay."""
    Q = torch.linalg.qr(randn(size, size, seed=seed))[0]
    return Q @ torch.diag(torch.logspace(0, -decay, size, dtype=torch.float64)) @ Q.t()


def loss(W, What, C, H=None):
    """tr(H D C D^T), as it is written."""
    D = W - What
    H = torch.eye(len(W), dtype=W.dtype) if H is None else H
    return torch.trace(H @ D @ C @ D.t()).item()


def stats_of(x, y=None, gradient=None):
    """The statistics of rows x (count, in), of the compressed model, and y, of the dense one, by definition."""
    found = SimpleNamespace(count=len(x), mean=x.mean(0), covariance=torch.cov(x.t(), correction=0), gradient=gradient,
                            cross=None, source_mean=None)
    if y is not None:
        found.cross = (y - y.mean(0)).t() @ (x - x.mean(0)) / len(x)
        found.source_mean = y.mean(0)
    return found


def inputs(count, size, seed=2):
    """Rows with a mean and strong correlations."""
    return randn(count, size, seed=seed) @ torch.linalg.cholesky(covariance(size, decay=2)).t() + 0.3 * randn(size, seed=3)


# ---------------------------------------------------------------------------------------------------
# the fit

@pytest.mark.parametrize('weighted', [False, True])
@pytest.mark.parametrize('m, n, p, q, terms', SHAPES, ids=str)
def test_the_objective_never_rises_and_is_what_it_says(m, n, p, q, terms, weighted):
    W, C, H = randn(m * p, n * q), covariance(n * q), covariance(m * p, seed=5) if weighted else None
    A, B, objectives = fit(W, C, m, n, terms, H, sweeps=10)
    assert all(now < before for before, now in zip(objectives, objectives[1:]))
    assert objectives[0] == pytest.approx(loss(W, dense(*nearest_kronecker_sum(W, m, n, terms)), C, H), rel=1e-10)
    assert objectives[-1] == pytest.approx(loss(W, dense(A, B), C, H), rel=1e-10)
    assert objectives[-1] < 0.9 * objectives[0]


@pytest.mark.parametrize('m, n, p, q, terms', SHAPES, ids=str)
def test_white_inputs_give_van_loan(m, n, p, q, terms):
    """With C = I the nearest sum is the optimum already."""
    W, C = randn(m * p, n * q), torch.eye(n * q, dtype=torch.float64)
    A, B, objectives = fit(W, C, m, n, terms)
    assert objectives[-1] == pytest.approx(objectives[0], rel=1e-8)
    torch.testing.assert_close(dense(A, B), dense(*nearest_kronecker_sum(W, m, n, terms)), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize('weighted', [False, True])
def test_a_matrix_that_is_such_a_sum_is_found(weighted):
    W = dense(randn(2, 6, 4), randn(2, 3, 5, seed=1))
    A, B, _ = fit(W, covariance(20), 6, 4, 2, covariance(18, seed=5) if weighted else None)
    torch.testing.assert_close(dense(A, B), W, **EXACT)


def by_weights(target, C, m, n, terms):
    """In place of the closed form: sweeps from the nearest sum alone."""
    return nearest_kronecker_sum(target, m, n, terms)


@pytest.mark.parametrize('m, n, p, q, terms', [(2, 12, 8, 1, 3), (8, 1, 2, 12, 3), (12, 1, 1, 8, 4)], ids=str)
def test_a_column_has_a_closed_form_that_no_sweeps_beat(monkeypatch, m, n, p, q, terms):
    """Sweeps from the nearest sum end no lower, and near it."""
    W, C = randn(m * p, n * q), covariance(n * q, decay=2)
    A, B, objectives = fit(W, C, m, n, terms)
    monkeypatch.setattr(als, 'nearest_in_outputs', by_weights)
    swept = fit(W, C, m, n, terms, sweeps=500, gain=1e-9)[2]
    assert objectives[-1] <= swept[-1] * (1 + 1e-9)
    assert objectives[-1] == pytest.approx(loss(W, dense(A, B), C), rel=1e-9)
    assert len(objectives) == 2 and objectives[-1] == pytest.approx(swept[-1], rel=1e-2)


@pytest.mark.parametrize('m, n, p, q, terms', SHAPES, ids=str)
def test_a_large_system_is_never_formed_and_ends_as_low(monkeypatch, m, n, p, q, terms):
    W, C = randn(m * p, n * q), covariance(n * q, decay=2)
    monkeypatch.setattr(als, 'nearest_in_outputs', by_weights)
    direct = fit(W, C, m, n, terms, sweeps=40)[2]
    monkeypatch.setattr(als, 'DIRECT', 0)
    monkeypatch.setattr(Problem, 'normal_matrix', None)
    A, B, objectives = fit(W, C, m, n, terms, sweeps=40)
    assert all(now < before for before, now in zip(objectives, objectives[1:]))
    assert objectives[0] == pytest.approx(direct[0], rel=1e-10)
    assert objectives[-1] == pytest.approx(loss(W, dense(A, B), C), rel=1e-10)
    assert objectives[-1] < 1.02 * direct[-1]


@pytest.mark.parametrize('left', [True, False])
def test_the_separable_inverse_is_exact_where_the_covariance_is_a_product(left):
    C = torch.kron(covariance(4), covariance(5, seed=2))
    problem = Problem(randn(18, 20), C, None, 6, 4)
    fixed = randn(2, 3, 5, seed=7) if left else randn(2, 6, 4, seed=7)
    X = randn(6 if left else 3, 2 * (4 if left else 5), seed=8)
    inverse = separable_inverse(fixed, problem.RC if left else problem.RC.t(), 0.0)
    torch.testing.assert_close(inverse(X @ problem.normal_matrix(fixed, left)), X, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize('left', [True, False])
@pytest.mark.parametrize('m, n, p, q, terms', SHAPES, ids=str)
def test_the_normal_matrix_by_rows_and_its_products_without_it(m, n, p, q, terms, left):
    C = covariance(n * q)
    RC = rearrange(C, n, n) if left else rearrange(C, n, n).t()
    fixed, X = (randn(terms, p, q), randn(m, terms * n)) if left else (randn(terms, m, n), randn(p, terms * q))
    G = normal_matrix(fixed, RC, 10 ** 9)
    torch.testing.assert_close(normal_matrix(fixed, RC, 0), G, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(by_products(fixed, RC)(X), X @ G, rtol=1e-12, atol=1e-11)


def test_a_row_of_many_factors_is_solved_where_the_others_are_small(monkeypatch):
    """A (1, 96) has too many unknowns, B (24, 2) has few: A by conjugate gradients without the dense sum, B at once."""
    W, C = randn(24, 192), covariance(192, decay=2)
    direct = fit(W, C, 1, 96, 8, sweeps=30)
    monkeypatch.setattr(als, 'DIRECT', 100)
    calls = []
    monkeypatch.setattr(als, 'normal_matrix', lambda *args: calls.append(args[0].shape) or normal_matrix(*args))
    monkeypatch.setattr(als, 'dense', None)             # of objective() and of the slow products
    monkeypatch.setattr(Problem, 'objective', lambda self, A, B: loss(W, dense(A, B), C))
    A, B, objectives = fit(W, C, 1, 96, 8, sweeps=30)
    assert set(calls) == {(8, 1, 96)}
    assert all(now < before for before, now in zip(objectives, objectives[1:]))
    assert objectives[-1] < 1.02 * direct[2][-1]


@pytest.mark.parametrize('left', [True, False])
@pytest.mark.parametrize('m, n, p, q, terms', SHAPES[:3], ids=str)
def test_a_half_step_is_the_least_squares_solution(m, n, p, q, terms, left):
    """Against a dense least-squares solve, of a design matrix built entry by entry."""
    W, C = randn(m * p, n * q), covariance(n * q)
    A, B = nearest_kronecker_sum(W, m, n, terms)
    moving = A if left else B
    S = torch.linalg.cholesky(C)                                            # ||(W - What) S||^2
    columns = []
    for i in range(moving.numel()):
        unit = torch.zeros(moving.numel(), dtype=torch.float64)
        unit[i] = 1
        unit = unit.view_as(moving)
        columns.append(((dense(unit, B) if left else dense(A, unit)) @ S).flatten())
    expected = torch.linalg.lstsq(torch.stack(columns, 1), (W @ S).flatten()[:, None]).solution.view_as(moving)
    found = Problem(W, C, None, m, n).half_step(B if left else A, moving, left)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)
    best = dense(expected, B) if left else dense(A, expected)
    mine = dense(found, B) if left else dense(A, found)
    assert loss(W, mine, C) == pytest.approx(loss(W, best, C), rel=1e-10)


@pytest.mark.parametrize('left', [True, False])
def test_a_weighted_half_step_is_brute_force(left, monkeypatch):
    """H couples the rows: with as many steps as unknowns, conjugate gradients are the full normal equations."""
    monkeypatch.setattr(als, 'H_STEPS', 200)
    m, n, W = 3, 2, randn(6, 8)
    C, H = covariance(8, decay=1), covariance(6, seed=5, decay=1)
    A, B = nearest_kronecker_sum(W, m, n, 2)
    moving = A if left else B
    basis = torch.eye(moving.numel(), dtype=torch.float64).view(-1, *moving.shape)
    D = torch.stack([(dense(e, B) if left else dense(A, e)).flatten() for e in basis], 1)     # (out in, unknowns)
    weight = torch.kron(H, C)                                               # of vec, row by row
    expected = torch.linalg.solve(D.t() @ weight @ D, D.t() @ weight @ W.flatten()).view_as(moving)
    found = Problem(W, C, H, m, n).half_step(B if left else A, moving, left)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)


def test_the_optimum_is_stationary():
    """After many sweeps the gradient of the objective with respect to both factors is 0."""
    W, C = randn(24, 20), covariance(20, decay=1)
    A, B, _ = fit(W, C, 6, 4, 2, sweeps=2000, gain=1e-14)
    A, B = A.requires_grad_(), B.requires_grad_()
    D = W - dense(A, B)
    value = (D @ C * D).sum()
    value.backward()
    assert max(A.grad.norm(), B.grad.norm()) < 1e-5 * value


@pytest.mark.parametrize('m, n, p, q, terms', [(1, 6, 12, 4, 3), (12, 6, 1, 4, 3), (1, 12, 6, 2, 4)], ids=str)
def test_where_one_factor_has_all_outputs_the_weight_costs_no_more(monkeypatch, m, n, p, q, terms):
    """m = 1 or p = 1: no conjugate gradients, and the weighted objective is stationary and below an unweighted fit's."""
    W, C, H = randn(m * p, n * q), covariance(n * q, decay=1), covariance(m * p, seed=5, decay=2)
    plain = loss(W, dense(*fit(W, C, m, n, terms)[:2]), C, H)
    monkeypatch.setattr(Problem, 'conjugate_gradients', None)
    A, B, objectives = fit(W, C, m, n, terms, H, sweeps=3000, gain=1e-14)
    A, B = A.requires_grad_(), B.requires_grad_()
    value = ((H @ (W - dense(A, B)) @ C) * (W - dense(A, B))).sum()
    assert value.item() == pytest.approx(objectives[-1], rel=1e-9) and value < 0.9 * plain
    value.backward()
    assert max(A.grad.norm(), B.grad.norm()) < 1e-4 * value


def test_beats_the_nearest_sum_where_inputs_are_not_white():
    W, C = randn(32, 24), covariance(24)
    _, _, objectives = fit(W, C, 8, 6, 2)
    assert objectives[-1] < 0.5 * objectives[0]
    white = fit(W, torch.eye(24, dtype=torch.float64), 8, 6, 2)
    assert loss(W, dense(*white[:2]), C) > objectives[-1]                   # negative control: the wrong C does not help


def test_massive_activations_do_not_stall_the_fit():
    """One input of 1000 times the others' power, and terms enough for its column: the others fare as without it."""
    W, x = randn(32, 24), inputs(1000, 24)
    loud_x = x.clone()
    loud_x[:, 5] *= 1000 ** 0.5 * x.std() / x[:, 5].std()
    quiet, loud = stats_of(x), stats_of(loud_x)
    off = als.moment(quiet, W)
    off[5], off[:, 5] = 0, 0
    base, kept = (dense(*als.als(W, s, 8, 6, 4)[:2]) for s in (quiet, loud))
    assert loss(W, kept, off) < 1.5 * loss(W, base, off)
    drowned = fit(W, loud.covariance + 0.01 * loud.covariance.diagonal().mean() * torch.eye(24, dtype=W.dtype), 8, 6, 4)
    assert loss(W, dense(*drowned[:2]), off) > 1.1 * loss(W, kept, off)     # negative control: the mean alone as ridge
    assert als.ridge_of(loud.covariance) <= 3.01 * als.RIDGE * loud.covariance.diagonal().median()


def test_terms_without_effect_are_no_trouble():
    """More terms than can matter, a zero matrix, inputs that are always 0, and inputs of low rank."""
    W = randn(6, 8)
    for C in (with_ridge(torch.zeros(8, 8, dtype=torch.float64)), with_ridge(torch.ones(8, 8, dtype=torch.float64))):
        A, B, _ = fit(W, C, 3, 2, 9)
        torch.testing.assert_close(dense(A, B), W, rtol=1e-7, atol=1e-7)
    A, B, _ = fit(torch.zeros_like(W), covariance(8), 3, 2, 2)
    assert not dense(A, B).any()
    A, B, _ = fit(torch.ones_like(W), covariance(8), 3, 2, 2)               # one product, two terms
    torch.testing.assert_close(dense(A, B), torch.ones_like(W), **EXACT)


@pytest.mark.parametrize('m, n, p, q, terms', [(1, 48, 24, 2, 9), (6, 4, 4, 6, 5)])
def test_extrapolated_sweeps_are_fewer_and_end_as_low(monkeypatch, m, n, p, q, terms):
    """Against plain alternating least squares, whose optimum is approached slowly; a step too far is taken back."""
    W, C = randn(m * p, n * q), covariance(n * q)
    ours = fit(W, C, m, n, terms, sweeps=300, gain=1e-7)[2]
    monkeypatch.setattr(als, 'EXTRAPOLATION', 0.0)
    plain = fit(W, C, m, n, terms, sweeps=300, gain=1e-7)[2]
    reached = next(step for step, value in enumerate(ours) if value <= plain[-1] * (1 + 1e-4))
    assert reached < 0.75 * next(step for step, value in enumerate(plain) if value <= plain[-1] * (1 + 1e-4))
    monkeypatch.setattr(als, 'EXTRAPOLATION', 30.0)
    A, B, far = fit(W, C, m, n, terms, sweeps=300, gain=1e-7)
    assert all(now < before for before, now in zip(far, far[1:])) and far[-1] < 1.02 * plain[-1]
    assert far[-1] == pytest.approx(loss(W, dense(A, B), C), rel=1e-9)


def test_canonical_keeps_the_matrix_and_orders_the_terms():
    A, B = randn(3, 6, 4), 100 * randn(3, 2, 5, seed=1)
    a, b = canonical(A, B)
    torch.testing.assert_close(dense(a, b), dense(A, B), rtol=1e-10, atol=1e-8)
    torch.testing.assert_close(a.norm(dim=(1, 2)), b.norm(dim=(1, 2)), **EXACT)
    assert (a.norm(dim=(1, 2)).diff() < 0).all()
    gram = torch.einsum('imn,jmn->ij', a, a)
    assert (gram - gram.diag().diag()).abs().max() < 1e-8 * gram.max()
    for again, once in zip(canonical(a, b), (a, b)):
        torch.testing.assert_close(again, once, **EXACT)


# ---------------------------------------------------------------------------------------------------
# from_dense with stats

def made(method, W, bias, stats, **keywords):
    return KroneckerLinear.from_dense(W, bias, method=method, stats=stats, m=8, n=6, terms=2, **keywords)


def test_every_fitted_method_beats_the_nearest_sum_at_what_it_minimises():
    W, y = randn(32, 24), inputs(500, 24)
    x = 0.8 * y + 0.2 * inputs(500, 24, seed=9)
    H = covariance(32, seed=5)
    stats = stats_of(x, y, H)
    plain = made('van_loan', W, None, stats).dense_weight()
    I = torch.eye(32, dtype=torch.float64)
    kept = {method: made(method, W, None, stats).dense_weight() for method in FITTED}
    for method in kept:
        weight = als.with_ridge(H, als.HESSIAN_RIDGE) if 'hessian' in method else I
        source = y if 'sequential' in method else x
        errors = {name: (e @ weight * e).sum() for name, other in {**kept, 'van_loan': plain}.items()
                  for e in [source @ W.t() - x @ other.t()]}
        assert errors[method] < 0.8 * errors['van_loan'], method
        assert errors[method] < 1.05 * min(errors.values()), method             # local optima differ a little
    assert CALIBRATED == set(FITTED) and set(FITTED) < set(METHODS)


def test_the_shifted_target_is_the_regression_on_what_is_really_fed():
    W, y = randn(32, 24), inputs(500, 24)
    x = 0.8 * y + 0.2 * inputs(500, 24, seed=9)
    T, C = als.shifted(W, stats_of(x, y))
    ridge = als.ridge_of(x.t() @ x / 500)
    eye = torch.eye(24, dtype=torch.float64) * (500 * ridge) ** 0.5
    expected = torch.linalg.lstsq(torch.cat((x, eye)), torch.cat((y @ W.t(), eye @ W.t()))).solution.t()
    torch.testing.assert_close(T, expected, **EXACT)
    torch.testing.assert_close(als.shifted(W, stats_of(y, y))[0], W, **EXACT)       # nothing shifted


def test_the_bias_takes_the_mean_error():
    W, b, x = randn(32, 24), randn(32, seed=4), inputs(500, 24)
    for method, y in (('als', None), ('als_sequential', x + 0.3)):
        stats = stats_of(x, y)
        target = (x if y is None else y) @ W.t() + b
        on, off = made(method, W, b, stats), made(method, W, b, stats, correct_bias=False)
        torch.testing.assert_close(on(x).mean(0), target.mean(0), **EXACT)
        assert torch.equal(off.bias, b)
        assert (on(x) - target).square().sum() < (off(x) - target).square().sum()
        none = made(method, W, None, stats)                                 # without a bias the second moments are fitted
        torch.testing.assert_close(none.dense_weight(), off.dense_weight(), **EXACT)
    assert torch.equal(made('van_loan', W, b, stats_of(x)).bias, b)


def test_methods_say_what_they_lack():
    W, stats = randn(32, 24), stats_of(inputs(500, 24))
    with pytest.raises(ValueError, match="method='als' needs what a calibration pass saw"):
        made('als', W, None, None)
    with pytest.raises(ValueError, match="did you mean 'als_hessian'"):
        made('als_hesian', W, None, stats)
    for method, name in (('als_hessian', 'gradient'), ('als_sequential', 'cross')):
        with pytest.raises(ValueError, match=f'stats.{name}'):
            made(method, W, None, stats)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_low_precision_weights_are_fitted_in_fp64(dtype):
    W, stats = randn(32, 24).to(dtype), stats_of(inputs(500, 24))
    mine, exact = made('als', W, None, stats), made('als', W.double(), None, stats)
    assert mine.A.dtype == dtype and torch.equal(mine.A, exact.A.to(dtype))


def test_calibration_is_left_as_it_was():
    """No stats are changed by a fit, and a second fit is the first one bit by bit."""
    W, b, x = randn(32, 24), randn(32, seed=4), inputs(500, 24)
    stats = stats_of(x, x + 0.1, covariance(32, seed=5))
    before = {name: value.clone() for name, value in vars(stats).items() if torch.is_tensor(value)}
    state = torch.get_rng_state()
    for method in FITTED:
        assert torch.equal(made(method, W, b, stats).B, made(method, W, b, stats).B)
    assert all(torch.equal(getattr(stats, name), value) for name, value in before.items())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.slow
def test_sizes_of_gpt2_take_seconds():
    W, x = randn(3072, 768), randn(2000, 768) * torch.logspace(0, -1, 768, dtype=torch.float64)
    _, _, objectives = fit(W, with_ridge(x.t() @ x / 2000), 1024, 256, 4)
    assert objectives[-1] < objectives[0]
