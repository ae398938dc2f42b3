"""ABBALinear beyond the common contract: the plan, the initialisation, the fit, nGPT's norms."""
import copy

import pytest
import torch

import variants
from lowrank import hadamard
from lowrank.abba import ABBALinear
from lowrank.svd import truncated_svd
from model import GPT, GPTConfig
from variants import UserError


def build(in_features=48, out_features=96, rank1=4, rank2=4, scale=False, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    module = ABBALinear(in_features, out_features, True, rank1, rank2, scale).to(dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module


def gaussian(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def loops(module):
    """W from its definition, entry by entry."""
    s = 1 if module.scale is None else module.scale
    rows = []
    for i in range(module.out_features):
        row = []
        for j in range(module.in_features):
            first = sum(module.B1[i, a] * module.A1[a, j] for a in range(module.rank1))
            second = sum(module.B2[i, b] * module.A2[b, j] for b in range(module.rank2))
            row.append(s * first * second)
        rows.append(torch.stack([entry.reshape(()) for entry in row]))
    return torch.stack(rows)


@pytest.mark.parametrize('ranks', [(1, 1), (2, 3), (3, 2)], ids=str)
@pytest.mark.parametrize('scale', [False, True])
def test_the_matrix_is_the_hadamard_product_by_its_definition(ranks, scale):
    module = build(5, 4, *ranks, scale)
    torch.testing.assert_close(module.dense_weight(), loops(module), rtol=1e-12, atol=1e-12)
    assert torch.linalg.matrix_rank(module.dense_weight()) == min(4, ranks[0] * ranks[1])


# ---------------------------------------------------------------------------------------------------
# the plan

# ways of one map: (in, out, rank1, rank2, tokens) -> whether W is formed, whether the tokens go one by one
WAYS = [((48, 96, 4, 4, 7), (False, False)), ((96, 48, 4, 4, 7), (False, False)), ((48, 96, 4, 4, 2), (False, True)),
        ((48, 96, 9, 16, 3), (False, True)), ((48, 96, 7, 6, 500), (True, False)), ((96, 48, 16, 9, 9), (True, False)),
        ((48, 96, 16, 9, 3), (True, False)), ((48, 96, 3, 2, 1), (False, True))]


@pytest.mark.parametrize('sizes, way', WAYS, ids=str)
@pytest.mark.parametrize('scale', [False, True])
@pytest.mark.parametrize('dtype, tolerance', [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=['fp64', 'fp32'])
def test_every_way_gives_the_same_outputs_and_gradients(sizes, way, scale, dtype, tolerance, monkeypatch):
    """Factorised = materialised, forward and all gradients."""
    *sizes, tokens = sizes
    module, taken = build(*sizes, scale, dtype), []
    for name in ('weight', 'few_tokens'):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, name=name, original=original: taken.append(name) or original(*a))
    x = gaussian(tokens, sizes[0]).to(dtype).requires_grad_()
    y = module(x)
    assert (('weight' in taken), ('few_tokens' in taken)) == way
    assert module.materialises(tokens) == way[0]
    s = 1 if module.scale is None else module.scale
    expected = x @ (s * (module.B1 @ module.A1) * (module.B2 @ module.A2)).t() + module.bias
    directions = gaussian(tokens, sizes[1], seed=1).to(dtype)
    wanted = [x, *module.parameters()]
    for mine, true in zip([y, *torch.autograd.grad(y, wanted, directions)],
                          [expected, *torch.autograd.grad(expected, wanted, directions)]):
        assert (mine - true).abs().max() < tolerance * true.abs().max()


@pytest.mark.parametrize('sizes', [(48, 96, 4, 4), (48, 96, 7, 6), (96, 48, 16, 9), (128, 512, 10, 10), (768, 768, 30, 31)],
                         ids=str)
def test_the_plan_takes_fewer_flops_unless_memory_forbids(sizes):
    in_features, out_features, r1, r2 = sizes
    with torch.device('meta'):
        module = ABBALinear(in_features, out_features, False, r1, r2)
    for tokens in (1, 2, 5, 16, 50, 96, 97, 1000, 10 ** 6):
        applied = 2 * tokens * r1 * r2 * (in_features + out_features)
        formed = 2 * in_features * out_features * (r1 + r2 + tokens)
        holds = min(tokens, r2) * r1 * max(in_features, out_features)
        assert module.flops(tokens) == min(applied, formed) or holds >= in_features * out_features
        assert module.flops(tokens) == (formed if module.materialises(tokens) else applied)
    assert ABBALinear(768, 3072, False, 24, 24).materialises(10 ** 6) is False          # 24^2 < 768 3072 / 3840 < 25^2
    assert ABBALinear(768, 3072, False, 25, 25).materialises(10 ** 6) is True


@pytest.mark.parametrize('sizes, way', WAYS, ids=str)
def test_autocast_keeps_every_way_in_bf16(sizes, way):
    *sizes, tokens = sizes
    module = build(*sizes, scale=True, dtype=torch.float32)
    x = torch.randn(tokens, sizes[0])
    with torch.autocast('cpu', torch.bfloat16):
        y = module(x)
    assert y.dtype == torch.bfloat16
    exact = module(x)
    assert (y.float() - exact).abs().max() < 0.03 * exact.abs().max()
    assert module.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize('tokens', [1, 2, 7])
def test_an_input_of_one_feature_is_not_spread_over_all(tokens):
    with pytest.raises(RuntimeError):
        build()(torch.randn(tokens, 1, dtype=torch.float64))


# ---------------------------------------------------------------------------------------------------
# initialisation

@pytest.mark.parametrize('ranks', [(8, 8), (2, 12), (1, 1), (40, 3)], ids=str)
@pytest.mark.parametrize('std', [0.02, 0.02 / 24 ** 0.5], ids=['std', 'residual'])
def test_the_eighth_root_rule(ranks, std):
    """All four factors N(0, sigma^2) with sigma^8 rank1 rank2 = std^2, so that entries of W have std."""
    torch.manual_seed(0)
    module = ABBALinear(256, 512, True, *ranks)
    sigma = (std ** 2 / (ranks[0] * ranks[1])) ** (1 / 8)
    squares = []
    for _ in range(8):
        module.reset_parameters(std)
        for name in ('B1', 'A1', 'B2', 'A2'):
            factor = getattr(module, name)
            assert factor.std().item() == pytest.approx(sigma, rel=0.15 if min(ranks) == 1 else 0.1)
        weight = module.dense_weight().detach()
        squares.append(weight.square().mean().item())
        assert abs(weight.mean().item()) < 0.1 * std
    assert (sum(squares) / 8) ** 0.5 == pytest.approx(std, rel=0.08)


def test_the_init_has_heavy_tails_as_stated():
    torch.manual_seed(0)
    module = ABBALinear(1024, 1024, False, 8, 8)
    kurtosis = []
    for _ in range(4):
        module.reset_parameters()
        weight = module.dense_weight().double()
        kurtosis.append((weight ** 4).mean().item() / weight.square().mean().item() ** 2)
    assert sum(kurtosis) / 4 == pytest.approx((3 + 6 / 8) ** 2, rel=0.15)
    assert module.B1.std().item() == pytest.approx(0.2236, rel=0.05)


def test_zero_factor_makes_a_weight_of_zero_that_trains():
    module = build()
    with torch.no_grad():
        getattr(module, ABBALinear.zero_factor).zero_()
    assert not module.dense_weight().any()
    module(gaussian(5, 48)).square().sum().add(module(gaussian(5, 48)).sum()).backward()
    assert module.B1.grad.any()


# ---------------------------------------------------------------------------------------------------
# the fit

def relative_error(W, factors):
    return hadamard.error(W, factors) / W.norm().item()


def svd_error(W, rank):
    return (W - torch.matmul(*truncated_svd(W, rank))).norm().item() / W.norm().item()


def spectrum_one_over_i():
    left, right = (torch.linalg.qr(gaussian(n, 96, seed=n))[0] for n in (96, 128))
    return left @ torch.diag(1 / torch.arange(1, 97).double()) @ right.t()


MATRICES = {'flat': gaussian(96, 128), 'product': gaussian(96, 8) @ gaussian(8, 128, seed=1),
            'product and noise': gaussian(96, 8) @ gaussian(8, 128, seed=1) / 8 ** 0.5 + 0.23 * gaussian(96, 128, seed=2),
            '1/i': spectrum_one_over_i(), 'sparse': gaussian(96, 128) * (gaussian(96, 128, seed=3) > 1),
            'a zero row': gaussian(96, 128) * (torch.arange(96) != 7)[:, None]}


@pytest.mark.parametrize('ranks', [(8, 8), (12, 4), (4, 12), (15, 1)], ids=str)
@pytest.mark.parametrize('name', MATRICES)
def test_the_fit_is_never_worse_than_its_starts(name, ranks):
    W = MATRICES[name]
    fitted = relative_error(W, hadamard.nearest_hadamard(W, *ranks))
    assert fitted <= svd_error(W, max(ranks)) * (1 + 1e-9) + 1e-13
    for start in (hadamard.svd_and_ones, hadamard.signed_roots):
        factors = start(W, max(ranks), min(ranks))
        assert fitted <= relative_error(W, factors) * (1 + 1e-9) + 1e-13
        assert fitted <= relative_error(W, hadamard.improved(W, factors, 3)) * (1 + 1e-9) + 1e-13


def test_the_first_start_is_the_truncated_svd_and_the_second_the_roots():
    W = MATRICES['flat']
    B1, A1, B2, A2 = hadamard.svd_and_ones(W, 8, 5)
    torch.testing.assert_close(B2 @ A2, torch.ones_like(W), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(B1 @ A1, torch.matmul(*truncated_svd(W, 8)), rtol=1e-12, atol=1e-12)
    assert (A2[1:].norm(dim=1) > 1).all()                       # and its other components can grow
    full = hadamard.signed_roots(W, 96, 96)
    torch.testing.assert_close(hadamard.product(full), W, rtol=1e-9, atol=1e-9)


def test_a_solved_factor_is_the_least_squares_one():
    """Against lstsq, row by row: rows of B1 for the rest fixed; no random change of them lowers the error."""
    W, factors = MATRICES['flat'], hadamard.signed_roots(MATRICES['flat'], 5, 6)
    B1, A1, B2, A2 = factors
    Q = B2 @ A2
    solved = hadamard.solved_rows(W, B1, A1, Q, steps=5)        # as many as ranks: exact
    for i in (0, 17, 95):
        exact = torch.linalg.lstsq((A1 * Q[i]).t(), W[i][:, None]).solution[:, 0]
        torch.testing.assert_close(solved[i], exact, rtol=1e-8, atol=1e-8)
    errors = [hadamard.error(W, (hadamard.solved_rows(W, B1, A1, Q, steps), A1, B2, A2)) for steps in range(6)]
    assert all(later < earlier for earlier, later in zip(errors, errors[1:]))
    least = hadamard.error(W, (solved, A1, B2, A2))
    assert least < hadamard.error(W, factors)
    for size in (1e-3, 1e-2, 1e-1):
        assert hadamard.error(W, (solved + size * gaussian(96, 5, seed=4), A1, B2, A2)) > least


def test_every_sweep_lowers_the_error():
    W = MATRICES['flat']
    factors = hadamard.signed_roots(W, 6, 6)
    errors = [hadamard.error(W, factors)]
    for _ in range(6):
        B1, A1, B2, A2 = factors
        B1, A1 = hadamard.refitted(W, B1, A1, B2 @ A2)
        errors.append(hadamard.error(W, (B1, A1, B2, A2)))
        B2, A2 = hadamard.refitted(W, B2, A2, B1 @ A1)
        factors = (B1, A1, B2, A2)
        errors.append(hadamard.error(W, factors))
    assert all(later < earlier for earlier, later in zip(errors, errors[1:]))


def test_the_best_iterate_is_kept(monkeypatch):
    """Sweeps that make it worse, as rounding might, change nothing."""
    W, worse = MATRICES['flat'], lambda W, B, A, Q: (2 * B, A)
    start = hadamard.signed_roots(W, 5, 6)
    monkeypatch.setattr(hadamard, 'refitted', worse)
    kept = hadamard.improved(W, start, 3)
    assert all(torch.equal(a, b) for a, b in zip(kept, start))


def test_where_abba_is_better_than_the_svd_of_equal_parameters_and_where_not():
    """96 x 128, 16 ranks in all: better on a flat spectrum, no better on a low rank with noise, worse on 1 / i."""
    ratio = {name: relative_error(W, hadamard.nearest_hadamard(W, 8, 8)) / svd_error(W, 16) for name, W in MATRICES.items()}
    assert ratio['flat'] < 0.93 and 0.97 < ratio['product and noise'] < 1.06 and 1.1 < ratio['1/i'] < 1.3
    W = MATRICES['product and noise']
    assert relative_error(W, hadamard.nearest_hadamard(W, 4, 4)) > 1.5 * svd_error(W, 8)


def test_a_random_start_is_worse():
    """Negative control: the starts matter."""
    W = MATRICES['1/i']
    random = [0.3 * gaussian(*shape, seed=9) for shape in ((96, 8), (8, 128), (96, 8), (8, 128))]
    assert relative_error(W, hadamard.improved(W, random, 60)) > relative_error(W, hadamard.nearest_hadamard(W, 8, 8))


def test_balanced_keeps_the_function_and_shares_the_norms():
    factors = [gaussian(9, 3), 100 * gaussian(3, 7), gaussian(9, 2, seed=1), 0.01 * gaussian(2, 7)]
    found = hadamard.balanced(*factors)
    torch.testing.assert_close(hadamard.product(found), hadamard.product(factors), rtol=1e-12, atol=1e-12)
    B1, A1, B2, A2 = found
    torch.testing.assert_close(B1.norm(dim=0), A1.norm(dim=1), rtol=1e-12, atol=0)
    torch.testing.assert_close(B2.norm(dim=0), A2.norm(dim=1), rtol=1e-12, atol=0)
    torch.testing.assert_close((B1 @ A1).norm(), (B2 @ A2).norm(), rtol=1e-12, atol=0)


def test_components_at_zero_can_still_learn():
    """A fit that needs no second component leaves it at zero on one side only."""
    module = ABBALinear.from_dense(MATRICES['product'], None, rank1=8, rank2=3)
    module(gaussian(20, 128)).square().sum().backward()
    dead = (module.B2.grad.abs().amax(0) == 0) & (module.A2.grad.abs().amax(1) == 0)
    assert not dead.any()


def test_no_random_numbers_and_odd_weights():
    W, state = torch.randn(18, 25), torch.get_rng_state()
    first, second = (ABBALinear.from_dense(W, None, rank1=3, rank2=2).dense_weight() for _ in range(2))
    assert torch.equal(first, second) and torch.equal(torch.get_rng_state(), state)
    zero = ABBALinear.from_dense(torch.zeros(4, 6), None, rank1=2, rank2=2, scale=True)
    assert not zero.dense_weight().any() and all(p.isfinite().all() for p in zero.parameters())
    tall = ABBALinear.from_dense(gaussian(6, 4).t(), None, rank1=9, rank2=1)          # ranks beyond the full one
    torch.testing.assert_close(tall.dense_weight(), gaussian(6, 4).t(), rtol=1e-9, atol=1e-9)
    assert ABBALinear.from_dense(gaussian(18, 25), None, rank1=2, rank2=3, scale=True).scale.item() == 1


def test_als_weighs_the_columns_by_the_second_moment():
    """Less error where the inputs are large, and never more weighed error than the weighed SVD."""
    W, seen = gaussian(24, 30), torch.linspace(0.01, 4, 30, dtype=torch.float64) ** 2
    covariance = torch.diag(seen) + 0.001                       # what is off the diagonal does not count
    stats = {'count': 1000, 'mean': torch.zeros(30), 'covariance': covariance}
    plain = ABBALinear.from_dense(W, None, rank1=4, rank2=3).dense_weight()
    fitted = ABBALinear.from_dense(W, None, method='als', stats=stats, rank1=4, rank2=3).dense_weight()

    def weighed(V):
        return ((W - V).square() * covariance.diagonal()).sum().item()
    assert weighed(fitted) < 0.95 * weighed(plain) and (W - fitted).norm() > (W - plain).norm()
    root = covariance.diagonal().sqrt()
    assert weighed(fitted) < weighed(torch.matmul(*truncated_svd(W * root, 4)) / root)
    even = dict(stats, covariance=torch.eye(30) * 2.5)
    fitted = ABBALinear.from_dense(W, None, method='als', stats=even, rank1=4, rank2=3).dense_weight()
    torch.testing.assert_close(fitted, plain, rtol=1e-6, atol=1e-6)
    blind = dict(stats, covariance=torch.zeros(30, 30))
    assert ABBALinear.from_dense(W, None, method='als', stats=blind, rank1=4, rank2=3).dense_weight().isfinite().all()


@pytest.mark.parametrize('stats', [None, {}, {'covariance': torch.eye(7)}], ids=str)
def test_als_needs_what_a_calibration_pass_saw(stats):
    with pytest.raises(ValueError, match='covariance') as caught:
        ABBALinear.from_dense(gaussian(6, 8), None, method='als', stats=stats, rank1=1, rank2=1)
    assert '\n' not in str(caught.value)


# ---------------------------------------------------------------------------------------------------
# in a model

@pytest.mark.parametrize('dim', [0, 1])
@pytest.mark.parametrize('scale', [False, True])
@pytest.mark.parametrize('sizes', [(300, 520, 3, 2), (40, 24, 6, 6)], ids=str)
def test_normalise_gives_unit_rows_or_columns(dim, scale, sizes):
    module = build(*sizes, scale)
    before, product = module.dense_weight().detach(), copy.deepcopy(module)
    with torch.no_grad():
        module.normalise_(dim)
    norms = module.dense_weight().norm(dim=dim)
    torch.testing.assert_close(norms, torch.ones_like(norms), rtol=1e-12, atol=1e-12)
    directions = torch.nn.functional.normalize(before, dim=dim)
    # a negative scale keeps its sign: only lengths change
    torch.testing.assert_close(module.dense_weight(), directions, rtol=1e-9, atol=1e-9)
    B, A = ((product.B1[:, :, None] * product.B2[:, None]).flatten(1), (product.A1[:, None] * product.A2).flatten(0, 1))
    if dim == 1 and not scale:                  # the closed form: ||W_i||^2 = B*_i (A* A*^T) B*_i^T
        squares = torch.einsum('ir,rs,is->i', B, A @ A.t(), B)
        torch.testing.assert_close(module.B1, product.B1 / squares.sqrt()[:, None], rtol=1e-9, atol=1e-9)


SMALL = dict(n_layer=2, n_head=2, n_embd=16, block_size=16, vocab_size=32, bias=False, dropout=0.0)


@pytest.mark.parametrize('ngpt', ['none', 'simple', 'full'])
def test_a_model_of_it_trains(ngpt):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SMALL, ngpt=ngpt, rope=ngpt != 'none', linear={'*': 'abba(3, 2)'}))
    idx = torch.randint(32, (4, 17))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(25):
        loss = model(idx[:, :-1], idx[:, 1:])[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.normalise_weights()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    if ngpt != 'none':
        norms = torch.cat([site.dense_weight().norm(dim=0 if name.endswith('.c_proj') else 1)
                           for name, site in model.sites().items()])
        torch.testing.assert_close(norms, torch.ones_like(norms), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('spec, sentence', [
    ('abba(5, 4)', 'abba(5, 4) saves nothing: 288 parameters where dense has 256; rank1=3 is the largest that saves some'),
    ('abba(1, 9)', 'abba(1, 9) saves nothing'),
    ('abba(0, 4)', 'rank1=0 must be a whole number of at least 1'),
    ('abba(4)', "rank2"),
    ('abba(2, 2, scale=2)', 'scale=2 is neither True nor False')])
def test_a_spec_that_makes_no_sense_is_one_sentence(spec, sentence):
    with pytest.raises(UserError) as caught:
        GPT(GPTConfig(**SMALL, linear={'*.c_q': spec}))
    assert sentence in str(caught.value) and '\n' not in str(caught.value) and 'h.0.attn.c_q' in str(caught.value)


def test_it_stands_in_the_table():
    assert variants.LINEARS['abba'] is ABBALinear
