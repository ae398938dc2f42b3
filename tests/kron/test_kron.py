"""KroneckerLinear beyond the common contract: contraction orders and layouts, initialisation, and Van Loan's sums."""
import ast
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kron.linear import KroneckerLinear
from kron.plan import PLANS, cheaper_is_a_first, order_flops, rule
from kron.van_loan import nearest_kronecker_sum, pruned_sum, rearrange

ROOT = Path(__file__).resolve().parents[2]

# (m, n, p, q, terms): thin and thick B, single rows and columns, wide and tall
SHAPES = [(6, 4, 2, 3, 1), (6, 4, 2, 3, 3), (4, 6, 9, 5, 2), (5, 3, 10, 12, 2), (3, 5, 1, 12, 2), (4, 4, 4, 1, 2),
          (12, 1, 1, 7, 3), (1, 7, 12, 1, 2), (1, 1, 5, 6, 1), (5, 6, 1, 1, 4)]


def factors(m, n, p, q, terms, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(terms, m, n, generator=generator, dtype=torch.float64).to(dtype),
            torch.randn(terms, p, q, generator=generator, dtype=torch.float64).to(dtype))


def by_definition(A, B):
    """W[a p + c, b q + d] = sum_i A_i[a, b] B_i[c, d], entry by entry."""
    (_, m, n), (_, p, q) = A.shape, B.shape
    W = torch.empty(m * p, n * q, dtype=A.dtype)
    for row in range(m * p):
        for column in range(n * q):
            W[row, column] = (A[:, row // p, column // q] * B[:, row % p, column % q]).sum()
    return W


def kron_sum(A, B):
    return sum(torch.kron(a, b) for a, b in zip(A, B))


# ---------------------------------------------------------------------------------------------------
# contraction

@pytest.mark.parametrize('name', [name for name in PLANS if not name.endswith('_fused')])
@pytest.mark.parametrize('shape', SHAPES, ids=str)
def test_each_order_and_layout_is_the_definition(name, shape):
    A, B = factors(*shape)
    x = torch.randn(5, A.shape[2] * B.shape[2], dtype=torch.float64)
    torch.testing.assert_close(PLANS[name].apply(x, A, B), x @ by_definition(A, B).t(), rtol=1e-10, atol=1e-10)


def test_dense_weight_is_the_definition_with_scale():
    torch.manual_seed(0)
    module = KroneckerLinear(15, 12, False, 4, 3, terms=2, scale=True).double()
    with torch.no_grad():
        module.scale.copy_(torch.tensor([0.5, -3.0]))
    expected = by_definition(module.A * module.scale[:, None, None], module.B)
    torch.testing.assert_close(module.dense_weight(), expected, rtol=1e-12, atol=1e-12)
    swapped = by_definition(module.A * module.scale.flip(0)[:, None, None], module.B)
    assert not torch.allclose(module.dense_weight(), swapped)


# Krony-PT's shapes: (in, out, m, n, terms) -> FLOPs relative to dense of A-first and B-first, worked out by hand
RATIOS = {
    (768, 3072, 768, 768, 1): (0.2513, 1.0013),
    (3072, 768, 768, 768, 1): (1.0013, 0.2513),
    (768, 3072, 3072, 384, 1): (1.0026, 0.5003),
    (768, 3072, 1024, 256, 1): (0.3372, 0.3343),
    (768, 3072, 1024, 256, 4): (1.3490, 1.3372),
    (768, 3072, 192, 48, 8): (0.6667, 0.5417),
}


@pytest.mark.parametrize('shape, ratios', RATIOS.items(), ids=str)
def test_the_order_with_fewer_flops_is_taken(shape, ratios):
    in_features, out_features = shape[:2]
    with torch.device('meta'):
        module = KroneckerLinear(in_features, out_features, True, *shape[2:])
    dense = 2 * in_features * out_features
    flops = order_flops(module.A.shape, module.B.shape)
    assert [f / dense for f in flops] == pytest.approx(ratios, abs=1e-4)
    assert module.flops(10) == 10 * min(flops)
    assert cheaper_is_a_first(module.A.shape, module.B.shape) == (ratios[0] < ratios[1])


def test_expanding_and_contracting_linears_take_opposite_orders():
    up = KroneckerLinear(128, 512, False, 256, 64)
    down = KroneckerLinear(512, 128, False, 64, 256)
    assert not cheaper_is_a_first(up.A.shape, up.B.shape)
    assert cheaper_is_a_first(down.A.shape, down.B.shape)


def test_forward_never_calls_kron(monkeypatch):
    def forbidden(*_):
        raise AssertionError('torch.kron forms the matrix')
    monkeypatch.setattr(torch, 'kron', forbidden)
    module = KroneckerLinear(24, 36, True, 6, 4, terms=2, scale=True)
    module(torch.randn(3, 24)).sum().backward()


@pytest.mark.parametrize('shape', [(128, 512, 256, 64, 1), (512, 128, 64, 256, 1), (128, 512, 16, 8, 2)], ids=str)
def test_activations_saved_for_backward_are_a_few_widths(shape):
    """Bytes that autograd keeps for T tokens: the input, its copy, one intermediate and its copy."""
    torch.manual_seed(0)
    module, tokens, saved = KroneckerLinear(shape[0], shape[1], True, *shape[2:]), 1000, {}
    x = torch.randn(tokens, shape[0], requires_grad=True)

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // 4
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = module(x)
    y.sum().backward()
    A_first = cheaper_is_a_first(module.A.shape, module.B.shape)
    (r, m, n), (_, p, q) = module.A.shape, module.B.shape
    intermediate = r * m * q if A_first else r * n * p
    weights = 3 * (module.A.numel() + module.B.numel())
    assert sum(saved.values()) <= tokens * (2 * shape[0] + 2 * intermediate) + weights


class Largest(TorchDispatchMode):
    """Records the most elements of any tensor that an operation returns."""
    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(t.numel() for t in tree_leaves(result) if isinstance(t, torch.Tensor))])
        return result


def broadcast_b_first(x, A, B):
    """The same sum by a product per token, whose backward makes a gradient of A a token."""
    x = x.reshape(-1, 1, A.shape[2], B.shape[2])
    return (A @ (x @ B.mT)).sum(1).flatten(1)


@pytest.mark.parametrize('large', [(24, 32, 12, 16, 2), (12, 16, 24, 32, 2)], ids=['large_A', 'large_B'])
@pytest.mark.parametrize('name', [name for name, plan in PLANS.items() if plan.order != 'W' and not name.endswith('_fused')])
def test_no_tensor_of_tokens_by_factor(name, large):
    A, B = (f.requires_grad_() for f in factors(*large))
    (r, m, n), (_, p, q), tokens = A.shape, B.shape, 64
    intermediate = r * m * q if PLANS[name].order == 'A' else r * n * p
    x = torch.randn(tokens, n * q, dtype=torch.float64, requires_grad=True)
    records = []
    for function in (PLANS[name].apply, broadcast_b_first):
        with Largest() as record:
            function(x, A, B).square().sum().backward()
        records.append(record.numel)
    assert records[0] == tokens * max(n * q, m * p, intermediate)
    assert records[1] >= tokens * max(r * m * n, r * p * q) > records[0]    # negative control


# ---------------------------------------------------------------------------------------------------
# initialisation

@pytest.mark.parametrize('shape', [(128, 512, 256, 64, 1), (512, 128, 64, 256, 2), (768, 3072, 1024, 256, 4),
                                   (768, 768, 32, 32, 4), (64, 256, 1, 64, 1), (128, 512, 8, 8, 16)], ids=str)
@pytest.mark.parametrize('std', [0.02, 0.02 / 24 ** 0.5], ids=['std', 'residual'])
def test_entries_have_the_std_asked_for(shape, std):
    torch.manual_seed(0)
    module = KroneckerLinear(shape[0], shape[1], True, *shape[2:], scale=True)
    with torch.no_grad():
        module.scale.fill_(7), module.bias.fill_(7)
    module.reset_parameters(std)
    weight = module.dense_weight()
    assert weight.std().item() == pytest.approx(std, rel=0.05)
    assert abs(weight.mean().item()) < 0.1 * std
    assert (module.scale == 1).all() and not module.bias.any()


def test_each_term_is_balanced_and_has_its_share():
    module = KroneckerLinear(128, 512, False, 64, 32, terms=3)
    norms_A, norms_B = (f.detach().norm(dim=(1, 2)) for f in (module.A, module.B))
    torch.testing.assert_close(norms_A, norms_B)
    torch.testing.assert_close(norms_A * norms_B, torch.full((3,), 0.02 * (128 * 512 / 3) ** 0.5))


def test_the_naive_initialisation_is_fifty_times_too_small():
    """Negative control: N(0, 0.02) for both factors, as where only the names of dense weights are initialised."""
    torch.manual_seed(0)
    module = KroneckerLinear(128, 512, False, 16, 16)
    with torch.no_grad():
        module.A.normal_(std=0.02), module.B.normal_(std=0.02)
    assert 40 < 0.02 / module.dense_weight().std().item() < 60


@pytest.mark.parametrize('arguments, words', [
    ((128, 512, 100, 64), ('100 x 64', '512 x 128', '128 x 64')),
    ((128, 512, 256, 60), ('256 x 60', '256 x 64')),
    ((128, 512, 1024, 64), ('512 x 64',)),
    ((128, 512, 256, 64, 1, 2), ('scale=2', 'True')),
    ((128, 512, True, 64), ('m=True',)),
], ids=str)
def test_sizes_that_do_not_divide_are_refused_with_a_remedy(arguments, words):
    with pytest.raises(ValueError) as caught:
        KroneckerLinear.weight_numel(*arguments)
    assert all(word in str(caught.value) for word in words), caught.value


def test_parameter_counts_of_krony_pt():
    count = KroneckerLinear.weight_numel
    assert count(768, 3072, 768, 768) == 589_828                            # 81M
    assert count(768, 3072, 1024, 256, 2) == 524_306                        # 80M-2
    assert count(768, 3072, 1024, 256, terms=4, scale=True) == 1_048_612 + 4


# ---------------------------------------------------------------------------------------------------
# the nearest sum

def test_rearrange_by_definition():
    W = torch.arange(6 * 20.).view(6, 20)                                   # m, n, p, q = 2, 4, 3, 5
    R = rearrange(W, 2, 4)
    assert R.shape == (8, 15)
    for a, b, c, d in torch.cartesian_prod(*(torch.arange(k) for k in (2, 4, 3, 5))):
        assert R[a * 4 + b, c * 5 + d] == W[a * 3 + c, b * 5 + d]


@pytest.mark.parametrize('shape', SHAPES, ids=str)
def test_a_sum_of_products_is_recovered(shape):
    A, B = factors(*shape)
    W = kron_sum(A, B)
    torch.testing.assert_close(kron_sum(*nearest_kronecker_sum(W, *shape[:2], shape[4])), W, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('terms', [1, 3, 6])
def test_the_error_is_the_tail_of_the_singular_values(terms):
    torch.manual_seed(0)
    W = torch.randn(24, 30, dtype=torch.float64)
    error = (W - kron_sum(*nearest_kronecker_sum(W, 6, 5, terms))).norm()
    tail = torch.linalg.svdvals(rearrange(W, 6, 5))[terms:].norm()
    assert error.item() == pytest.approx(tail.item(), rel=1e-10)


def test_no_perturbation_is_nearer():
    torch.manual_seed(0)
    W = torch.randn(24, 30, dtype=torch.float64)
    A, B = nearest_kronecker_sum(W, 6, 5, 2)
    error = (W - kron_sum(A, B)).norm()
    for size in (1e-3, 1e-2, 1e-1, 1) * 5:
        near = kron_sum(A + size * torch.randn_like(A), B + size * torch.randn_like(B))
        assert (W - near).norm() > error
    assert (W - kron_sum(A, B * 0.99)).norm() > error and (W - kron_sum(A, B * 1.01)).norm() > error


def test_more_terms_are_nearer_until_exact():
    torch.manual_seed(0)
    W = torch.randn(24, 30, dtype=torch.float64)                            # min(m n, p q) = min(30, 24)
    errors = [(W - kron_sum(*nearest_kronecker_sum(W, 6, 5, k))).norm().item() for k in range(1, 25)]
    assert all(later < earlier for earlier, later in zip(errors, errors[1:]))
    assert errors[-1] < 1e-10 * W.norm() < errors[-2]


def test_terms_beyond_the_full_rank_are_zero():
    W = torch.randn(6, 8, dtype=torch.float64)
    A, B = nearest_kronecker_sum(W, 3, 4, 6)                                # B (2, 2): four terms suffice
    assert A.shape == (6, 3, 4) and B.shape == (6, 2, 2)
    assert not A[4:].any() and not B[4:].any()
    torch.testing.assert_close(kron_sum(A, B), W, rtol=1e-10, atol=1e-10)


def test_terms_are_balanced_sorted_and_of_one_sign():
    torch.manual_seed(0)
    W = torch.randn(24, 30, dtype=torch.float64)
    A, B = nearest_kronecker_sum(W, 6, 5, 4)
    norms = A.norm(dim=(1, 2))
    torch.testing.assert_close(norms, B.norm(dim=(1, 2)), rtol=1e-10, atol=0)
    assert (norms.diff() < 0).all()
    for a in A:
        assert a.flatten()[a.abs().argmax()] > 0
    for flipped, expected in zip(nearest_kronecker_sum(-W, 6, 5, 4), (A, -B)):
        torch.testing.assert_close(flipped, expected, rtol=1e-10, atol=1e-10)


def test_the_same_weight_gives_the_same_factors_whatever_its_strides():
    torch.manual_seed(0)
    big = torch.randn(60, 48, dtype=torch.float64)
    for view in (big.t(), big[::2, :], big.t()[:, ::2]):
        state = torch.get_rng_state()
        mine, plain = (nearest_kronecker_sum(w, 6, 6, 2) for w in (view, view.contiguous()))
        assert torch.equal(mine[0], plain[0]) and torch.equal(mine[1], plain[1])
        assert torch.equal(torch.get_rng_state(), state), 'a decomposition drew random numbers'


def test_zero_and_rank_deficient_weights():
    zero = KroneckerLinear.from_dense(torch.zeros(24, 30), None, m=6, n=5, terms=2, method='van_loan_normalised')
    assert not zero.dense_weight().any()
    one = torch.ones(24, 30, dtype=torch.float64)                           # a single product
    A, B = nearest_kronecker_sum(one, 6, 5, 3)
    assert A.isfinite().all() and B.isfinite().all()
    torch.testing.assert_close(kron_sum(A, B), one, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_low_precision_weights_are_decomposed_in_fp64(dtype):
    W = torch.randn(24, 30, generator=torch.Generator().manual_seed(0)).to(dtype)
    for mine, exact in zip(nearest_kronecker_sum(W, 6, 5, 2), nearest_kronecker_sum(W.double(), 6, 5, 2)):
        assert mine.dtype == dtype and torch.equal(mine, exact.to(dtype))


@pytest.mark.slow
@pytest.mark.parametrize('m, n, terms', [(768, 768, 1), (768, 768, 4), (1024, 256, 2)], ids=str)
def test_sizes_of_gpt2(m, n, terms):
    torch.manual_seed(0)
    W = torch.randn(3072, 768)
    module = KroneckerLinear.from_dense(W, None, m=m, n=n, terms=terms)
    tail = torch.linalg.eigvalsh((R := rearrange(W.double(), m, n)).t() @ R).flip(0)[terms:].clamp(min=0).sum()
    assert (W - module.dense_weight()).double().square().sum().item() == pytest.approx(tail.item(), rel=1e-5, abs=1e-5)


# ---------------------------------------------------------------------------------------------------
# from_dense's methods

@pytest.mark.parametrize('scale', [False, True])
@pytest.mark.parametrize('terms', [1, 3])
def test_the_normalised_method_keeps_the_norm(scale, terms):
    torch.manual_seed(0)
    W = torch.randn(24, 30, dtype=torch.float64)
    plain = KroneckerLinear.from_dense(W, None, m=6, n=5, terms=terms, scale=scale)
    module = KroneckerLinear.from_dense(W, None, method='van_loan_normalised', m=6, n=5, terms=terms, scale=scale)
    assert module.dense_weight().norm().item() == pytest.approx(W.norm().item(), rel=1e-12)
    assert plain.dense_weight().norm() < 0.9 * W.norm()
    assert (W - module.dense_weight()).norm() > (W - plain.dense_weight()).norm()
    ratio = module.dense_weight() / plain.dense_weight()
    torch.testing.assert_close(ratio, torch.full_like(ratio, (W.norm() / plain.dense_weight().norm()).item()))
    if scale:
        assert torch.equal(module.A, plain.A) and torch.equal(module.B, plain.B)
        assert (module.scale > 1).all() and (plain.scale == 1).all()


def test_the_pruning_form_keeps_every_second_input_or_output():
    """Krony-PT's 96M: columns of c_fc, rows of c_proj, and a tenth of each for its neighbour."""
    W = torch.randn(24, 30, generator=torch.Generator().manual_seed(0))
    A, B = pruned_sum(W, 24, 15, 1)
    assert torch.equal(A[0], W[:, 0::2]) and B.tolist() == [[[1, pytest.approx(0.1)]]]
    A, B = pruned_sum(W, 12, 30, 1)
    assert torch.equal(A[0], W[0::2]) and B.tolist() == [[[1], [pytest.approx(0.1)]]]
    module = KroneckerLinear.from_dense(W, None, method='prune', m=24, n=15)
    assert torch.equal(module.dense_weight()[:, 0::2], W[:, 0::2])
    torch.testing.assert_close(module.dense_weight()[:, 1::2], 0.1 * W[:, 0::2])


@pytest.mark.parametrize('m, n', [(12, 10), (2, 3)], ids=str)
def test_the_pruning_form_keeps_one_entry_of_each_block_a_term(m, n):
    """Whichever factor is the larger; with all terms it is exact, with more they are zero."""
    W = torch.randn(24, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for terms in (1, 4, 6, 8):
        A, B = pruned_sum(W, m, n, terms)
        kept = rearrange(kron_sum(A, B), m, n) == rearrange(W, m, n)
        axis = 0 if m == 12 else 1                                          # one entry of each block, or one block
        assert kept.all(axis).sum() == min(terms, 6) and A.shape == (terms, m, n)
    assert kept.all() and A.isfinite().all()


def test_from_dense_draws_no_random_numbers():
    W, state = torch.ones(24, 30), torch.get_rng_state()
    KroneckerLinear.from_dense(W, None, m=6, n=5)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_decomposition_is_exact_by_construction():
    """No randomised SVD, whatever its speed: reproductions lost most of the quality to one."""
    for path in (ROOT / 'kron' / 'van_loan.py', ROOT / 'lowrank' / 'svd.py'):
        names = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
        assert 'svd' in names and not names & {'svd_lowrank', 'pca_lowrank', 'randn'}


def test_the_rule_uses_both_layouts():
    """In this file's and the contract's shapes: a B of 12 x 8 is thick, one of 2 x 2 thin."""
    assert rule((3, 8, 6), (3, 12, 8))[0].endswith('rows')
    assert rule((1, 48, 24), (1, 2, 2))[0].endswith('planes')
