"""LowRankLinear beyond the common contract: the spectral initialisation and the nearest product."""
import pytest
import torch

from lowrank.linear import LowRankLinear
from lowrank.svd import truncated_svd, whitened_svd, with_ridge


def test_forward_by_hand():
    module = LowRankLinear(2, 3, True, 1).double()
    with torch.no_grad():
        module.U.copy_(torch.tensor([[1.], [2.], [-1.]]))
        module.V.copy_(torch.tensor([[3., 4.]]))
        module.bias.copy_(torch.tensor([0.5, 0., 0.]))
    assert module(torch.tensor([1., 10.], dtype=torch.float64)).tolist() == [43.5, 86., -43.]
    assert module.dense_weight().tolist() == [[3., 4.], [6., 8.], [-3., -4.]]


def test_accounting():
    assert LowRankLinear.weight_numel(768, 3072, 153) == 153 * 3840
    with torch.device('meta'):
        assert LowRankLinear(768, 3072, True, 153).flops(10) == 20 * 153 * 3840


# ---------------------------------------------------------------------------------------------------
# initialisation

@pytest.mark.parametrize('shape', [(128, 512, 16), (512, 128, 16), (128, 128, 1), (96, 96, 96), (768, 3072, 64)],
                         ids=str)
@pytest.mark.parametrize('std', [0.02, 0.02 / 24 ** 0.5], ids=['std', 'residual'])
def test_entries_have_the_std_asked_for(shape, std):
    torch.manual_seed(0)
    module = LowRankLinear(shape[0], shape[1], True, shape[2])
    module.reset_parameters(std)
    weight = module.dense_weight()
    assert weight.square().mean().sqrt().item() == pytest.approx(std, rel=1e-4)
    assert weight.std().item() == pytest.approx(std, rel=0.05)
    assert abs(weight.mean().item()) < 0.1 * std


@pytest.mark.parametrize('shape', [(128, 512, 16), (512, 128, 16), (96, 96, 96)], ids=str)
def test_the_factors_are_balanced_and_spectral(shape):
    """U^T U = V V^T = diag(S) with S the largest singular values of a Gaussian matrix, rescaled."""
    torch.manual_seed(0)
    module = LowRankLinear(*shape[:2], False, shape[2]).double()
    module.reset_parameters(0.02)
    S = torch.linalg.svdvals(module.dense_weight())[:shape[2]]
    for gram in (module.U.t() @ module.U, module.V @ module.V.t()):
        torch.testing.assert_close(gram, S.diag(), rtol=1e-5, atol=1e-5 * S[0].item())
    gaussian = torch.linalg.svdvals(torch.randn(shape[1], shape[0]).double())[:shape[2]]
    torch.testing.assert_close(S / S.norm(), gaussian / gaussian.norm(), rtol=0.1, atol=0.02)


def test_gaussian_factors_are_not_spectral():
    """Negative control of the one above."""
    torch.manual_seed(0)
    V = torch.randn(16, 128)
    gram = V @ V.t()
    assert (gram - gram.diag().diag()).abs().max() > 0.1 * gram.diag().mean()


def test_a_rank_beyond_the_full_one_is_finite_and_trains():
    torch.manual_seed(0)
    module = LowRankLinear(6, 4, False, 9)
    assert module.dense_weight().square().mean().sqrt().item() == pytest.approx(0.02, rel=1e-4)
    module(torch.randn(5, 6)).square().sum().backward()
    assert module.U.grad.isfinite().all() and module.U.grad.any(dim=0).all()


def test_the_meta_device_costs_no_decomposition(monkeypatch):
    def forbidden(*_):
        raise AssertionError('decomposed a matrix that has no values')
    monkeypatch.setattr(torch.linalg, 'eigh', forbidden)
    with torch.device('meta'):
        assert LowRankLinear(48, 96, True, 7).U.is_meta
    with pytest.raises(AssertionError):
        LowRankLinear(48, 96, True, 7)


def test_bf16_parameters_are_initialised_in_fp32():
    torch.manual_seed(0)
    module = LowRankLinear(48, 96, True, 7).to(torch.bfloat16)
    module.reset_parameters(0.02)
    assert module.dense_weight().float().std().item() == pytest.approx(0.02, rel=0.05)


# ---------------------------------------------------------------------------------------------------
# the nearest product

@pytest.mark.parametrize('rank', [1, 5, 17])
def test_the_error_is_the_tail_of_the_singular_values(rank):
    torch.manual_seed(0)
    W = torch.randn(18, 25, dtype=torch.float64)
    U, V = truncated_svd(W, rank)
    assert (W - U @ V).norm().item() == pytest.approx(torch.linalg.svdvals(W)[rank:].norm().item(), rel=1e-10)
    for size in (1e-3, 1e-2, 1e-1, 1) * 5:
        near = (U + size * torch.randn_like(U)) @ (V + size * torch.randn_like(V))
        assert (W - near).norm() > (W - U @ V).norm()


@pytest.mark.parametrize('shape', [(18, 25), (25, 18)], ids=str)
def test_a_product_is_recovered_and_more_rank_is_nearer(shape):
    torch.manual_seed(0)
    W = torch.randn(shape[0], 4, dtype=torch.float64) @ torch.randn(4, shape[1], dtype=torch.float64)
    errors = [(W - torch.matmul(*truncated_svd(W, k))).norm().item() for k in range(1, 5)]
    assert all(later < earlier for earlier, later in zip(errors, errors[1:]))
    assert errors[-1] < 1e-10 * W.norm()


def test_factors_are_balanced_and_of_one_sign():
    torch.manual_seed(0)
    W = torch.randn(18, 25, dtype=torch.float64)
    U, V = truncated_svd(W, 6)
    S = torch.linalg.svdvals(W)[:6].diag()
    torch.testing.assert_close(U.t() @ U, S, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(V @ V.t(), S, rtol=1e-10, atol=1e-10)
    assert (U.gather(0, U.abs().argmax(0, keepdim=True)) > 0).all()
    flipped = truncated_svd(-W, 6)
    torch.testing.assert_close(flipped[0], U, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(flipped[1], -V, rtol=1e-10, atol=1e-10)


def test_odd_weights():
    zero = LowRankLinear.from_dense(torch.zeros(4, 6), None, rank=2)
    assert not zero.dense_weight().any() and zero.dense_weight().isfinite().all()
    W = torch.randn(6, 4, dtype=torch.float64)
    U, V = truncated_svd(W.t(), 9)                                          # not contiguous, rank beyond the full one
    assert U.shape == (4, 9) and V.shape == (9, 6) and not U[:, 4:].any() and not V[4:].any()
    torch.testing.assert_close(U @ V, W.t(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_low_precision_weights_are_decomposed_in_fp64(dtype):
    W = torch.randn(18, 25, generator=torch.Generator().manual_seed(0)).to(dtype)
    for mine, exact in zip(truncated_svd(W, 3), truncated_svd(W.double(), 3)):
        assert mine.dtype == dtype and torch.equal(mine, exact.to(dtype))


def test_both_method_names_are_the_nearest_product():
    torch.manual_seed(0)
    W, state = torch.randn(18, 25), torch.get_rng_state()
    weights = [LowRankLinear.from_dense(W, None, method=m, rank=4).dense_weight() for m in ('svd', 'van_loan')]
    assert torch.equal(*weights)
    assert torch.equal(torch.get_rng_state(), state), 'from_dense drew random numbers'


# ---------------------------------------------------------------------------------------------------
# the nearest outputs

def calibration(size=25, rows=200, seed=0, shift=0.0):
    """Correlated inputs of very different sizes -> what a calibration pass says of them."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(size, size, dtype=torch.float64, generator=generator) * torch.logspace(-2, 1, size).double()
    x = torch.randn(rows, size, dtype=torch.float64, generator=generator) @ mix + shift
    mean = x.mean(0)
    return x, {'count': rows, 'mean': mean, 'covariance': (x - mean).t() @ (x - mean) / rows}


def loss(W, near, C):
    """tr((W - near) C (W - near)^T)."""
    return ((W - near) @ C @ (W - near).t()).trace().item()


def reference(W, C, rank):
    """Least loss and its matrix by another road: the symmetric root of C and its inverse."""
    L, Q = torch.linalg.eigh(C)
    root, inverse = Q * L.sqrt() @ Q.t(), Q / L.sqrt() @ Q.t()
    left, S, right = torch.linalg.svd(W @ root)
    return (left[:, :rank] * S[:rank]) @ right[:rank] @ inverse, S[rank:].square().sum().item()


@pytest.mark.parametrize('rank', [1, 5, 17])
def test_whitening_minimises_the_error_of_the_outputs(rank):
    torch.manual_seed(0)
    W, (_, stats) = torch.randn(18, 25, dtype=torch.float64), calibration()
    moment = stats['covariance'] + torch.outer(stats['mean'], stats['mean'])
    C = with_ridge(moment, stats['count'])
    U, V = whitened_svd(W, rank, moment, stats['count'])
    nearest, least = reference(W, C, rank)
    assert loss(W, U @ V, C) == pytest.approx(least, rel=1e-8)
    torch.testing.assert_close(U @ V, nearest, rtol=1e-6, atol=1e-8)
    assert loss(W, torch.matmul(*truncated_svd(W, rank)), C) > 1.1 * least
    for size in (1e-4, 1e-3, 1e-2, 1e-1) * 5:
        assert loss(W, (U + size * torch.randn_like(U)) @ (V + size * torch.randn_like(V)), C) > least


def test_whitened_factors_are_balanced_and_in_order():
    torch.manual_seed(0)
    W, (_, stats) = torch.randn(18, 25, dtype=torch.float64), calibration()
    U, V = whitened_svd(W, 6, stats['covariance'])
    S = torch.linalg.svdvals(U @ V)[:6].diag()
    torch.testing.assert_close(U.t() @ U, S, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(V @ V.t(), S, rtol=1e-9, atol=1e-9)


def test_uncorrelated_inputs_of_one_size_give_the_plain_svd():
    torch.manual_seed(0)
    W = torch.randn(18, 25)
    stats = {'count': 10 ** 6, 'mean': torch.zeros(25), 'covariance': 3 * torch.eye(25)}
    white = LowRankLinear.from_dense(W, None, method='svd_whitened', stats=stats, rank=4)
    plain = LowRankLinear.from_dense(W, None, method='svd', rank=4)
    torch.testing.assert_close(white.U, plain.U, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(white.V, plain.V, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('rows', [1, 5, 24, 2000])
def test_few_inputs_and_silent_ones_are_no_obstacle(rows):
    """A singular covariance: finite, near on what was seen, and near W itself where nothing was."""
    torch.manual_seed(0)
    W, (x, stats) = torch.randn(18, 25, dtype=torch.float64), calibration(rows=rows)
    x[:, 20:] = 0
    stats['mean'] = x.mean(0)
    stats['covariance'] = (x - x.mean(0)).t() @ (x - x.mean(0)) / rows
    white = LowRankLinear.from_dense(W, None, method='svd_whitened', stats=stats, rank=12)
    near = white.dense_weight()
    assert near.isfinite().all()
    plain = torch.matmul(*truncated_svd(W, 12))
    assert (x @ (W - near).t()).norm() < (x @ (W - plain).t()).norm()
    assert (W - near)[:, 20:].norm() < W[:, 20:].norm()


def test_the_ridge_grows_where_the_count_is_low_and_ignores_massive_inputs():
    C = torch.eye(10, dtype=torch.float64)
    ridge = [(with_ridge(C, count) - C).diagonal() for count in (None, 10, 2)]
    assert torch.allclose(ridge[0], ridge[1]) and torch.allclose(ridge[2], 5 * ridge[0])
    massive = C.clone()
    massive[3, 3] = 1e6
    assert torch.allclose((with_ridge(massive) - massive).diagonal(), 3 * ridge[0])
    assert torch.equal(with_ridge(0 * C), C)                                # a site that saw nothing


def test_a_bias_takes_over_what_the_mean_input_loses():
    torch.manual_seed(0)
    W, b = torch.randn(18, 25, dtype=torch.float64), torch.randn(18, dtype=torch.float64)
    x, stats = calibration(shift=5.0)
    modules = {m: LowRankLinear.from_dense(W, b, method=m, stats=stats, rank=6)
               for m in ('svd', 'svd_whitened', 'svd_whitened_bias')}
    lost = {m: (x @ W.t() + b - module(x)).square().mean().item() for m, module in modules.items()}
    assert lost['svd_whitened_bias'] < lost['svd_whitened'] < lost['svd']
    mean = {m: (x @ W.t() + b - module(x)).mean(0).abs().max().item() for m, module in modules.items()}
    assert mean['svd_whitened_bias'] < 1e-9 < mean['svd_whitened']
    centred = with_ridge((x - x.mean(0)).t() @ (x - x.mean(0)) / len(x))
    fitted = loss(W, modules['svd_whitened_bias'].dense_weight(), centred)
    assert fitted == pytest.approx(reference(W, centred, 6)[1], rel=1e-6)       # W need fit x - mean only
    assert fitted < 0.999 * loss(W, modules['svd_whitened'].dense_weight(), centred)
    assert torch.equal(modules['svd_whitened'].bias, b) and torch.equal(modules['svd'].bias, b)


class Seen:
    def __init__(self, **entries):
        self.__dict__.update(entries)


@pytest.mark.parametrize('stats, sentence', [
    (None, 'needs the count of the inputs'),
    ({'count': 5, 'mean': torch.zeros(8)}, 'needs the covariance of the inputs'),
    (Seen(count=5), 'needs the covariance'),
    ({'count': 5, 'covariance': torch.eye(7)}, 'is (7, 7), and the matrix takes 8 inputs'),
    ({'count': 5, 'mean': torch.zeros(8), 'covariance': torch.eye(8) * float('nan')}, 'is not finite')],
    ids=['none', 'no covariance', 'an object', 'another size', 'nan'])
def test_stats_that_are_missing_or_wrong_are_refused(stats, sentence):
    with pytest.raises(ValueError) as caught:
        LowRankLinear.from_dense(torch.randn(6, 8), None, method='svd_whitened', stats=stats, rank=1)
    assert sentence in str(caught.value) and '\n' not in str(caught.value)


def test_an_object_serves_as_a_dict_does_and_a_bias_is_asked_for():
    W, (_, stats) = torch.randn(18, 25), calibration()
    weights = [LowRankLinear.from_dense(W, None, method='svd_whitened', stats=s, rank=3).dense_weight()
               for s in (stats, Seen(**stats))]
    assert torch.equal(*weights)
    with pytest.raises(ValueError, match='needs a bias'):
        LowRankLinear.from_dense(W, None, method='svd_whitened_bias', stats=stats, rank=3)


# ---------------------------------------------------------------------------------------------------
# under the inputs that compressed layers give

def two_models(rows=400, size=24):
    """Inputs x of a dense model, x' of a compressed one: a distorted copy with noise and another mean; their stats."""
    from tests.kron.test_als import inputs, randn, stats_of
    x = inputs(rows, size)
    other = x @ (torch.eye(size) + 0.2 * randn(size, size, seed=11)) + 0.1 * randn(rows, size, seed=12) + 0.3
    return x, other, stats_of(other, x)


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('rank', [1, 5, 24])
def test_the_sequential_method_is_reduced_rank_regression(rank, bias):
    """Against the textbook form on the rows themselves: the fitted values, projected on their leading directions.

    The ridge is rows of its own, sqrt(lambda N) I on both sides.
    """
    x, other, stats = two_models()
    W = torch.randn(48, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    b = torch.arange(48, dtype=torch.float64) if bias else None
    module = LowRankLinear.from_dense(W, b, method='svd_whitened_sequential', stats=stats, rank=rank)
    X, Y = (other - other.mean(0), x - x.mean(0)) if bias else (other, x)
    power = X.square().mean(0)
    ridge = (0.01 * min(power.mean(), 3 * power.median()) * len(x)).sqrt() * torch.eye(24, dtype=torch.float64)
    X, Y = torch.cat((X, ridge)), torch.cat((Y, ridge)) @ W.t()
    fitted = X @ torch.linalg.lstsq(X, Y).solution
    leading = torch.linalg.svd(fitted, full_matrices=False)[2][:rank]
    expected = (torch.linalg.lstsq(X, Y).solution @ leading.t() @ leading).t()
    torch.testing.assert_close(module.dense_weight(), expected, rtol=1e-10, atol=1e-10)
    if bias:
        torch.testing.assert_close(module(other).mean(0), x.mean(0) @ W.t() + b, rtol=1e-10, atol=1e-10)


def test_the_sequential_method_is_never_worse_than_the_plain_one_in_its_metric():
    x, other, stats = two_models()
    for seed in range(5):
        W = torch.randn(48, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        error = {}
        for method in ('svd_whitened_sequential', 'svd_whitened', 'svd'):
            K = LowRankLinear.from_dense(W, None, method=method, stats=stats, rank=5).dense_weight()
            error[method] = (x @ W.t() - other @ K.t()).square().sum().item()
        assert error['svd_whitened_sequential'] < 0.99 * min(error['svd_whitened'], error['svd'])


def test_equal_inputs_give_the_plain_whitened_svd():
    from tests.kron.test_als import stats_of
    x, _, _ = two_models()
    W = torch.randn(48, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    same = stats_of(x, x)
    found, plain = (LowRankLinear.from_dense(W, None, method=method, stats=same, rank=5).dense_weight()
                    for method in ('svd_whitened_sequential', 'svd_whitened'))
    torch.testing.assert_close(found, plain, rtol=1e-9, atol=1e-9)


def test_the_sequential_method_asks_for_the_cross_moment():
    from tests.kron.test_als import stats_of
    x, other, stats = two_models()
    with pytest.raises(ValueError, match='cross'):
        LowRankLinear.from_dense(torch.randn(48, 24).double(), None, method='svd_whitened_sequential', stats=stats_of(other),
                                 rank=5)
    module = LowRankLinear.from_dense(torch.randn(48, 24), torch.zeros(48), method='svd_whitened_sequential', stats=stats,
                                      rank=3, exact_columns=2)
    assert module.U.dtype == torch.float32 and module.columns.shape == (48, 2)
