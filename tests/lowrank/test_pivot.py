"""PivotLinear beyond the common contract: low rank's matrices with rank^2 fewer parameters."""
import pytest
import torch

from lowrank.linear import LowRankLinear
from lowrank.pivot import PivotLinear, Reordered, pivoted, with_others


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def stats(size, seed=3):
    x = randn(400, size, seed=seed) @ randn(size, size, seed=seed + 1) + 0.5
    g = randn(400, 30, seed=seed + 2) @ randn(30, 30, seed=seed + 4)
    return {'count': 400, 'mean': x.mean(0), 'covariance': torch.cov(x.t(), correction=0), 'gradient': g.t() @ g / 400}


def test_forward_by_hand():
    module = PivotLinear(3, 2, True, 1).double()
    with torch.no_grad():
        module.order.copy_(torch.tensor([1, 0, 2]))             # input 1 is the pivot
        module.U.copy_(torch.tensor([[2.], [-1.]]))
        module.R.copy_(torch.tensor([[3., 0.5]]))
        module.bias.copy_(torch.tensor([0., 1.]))
    assert module.dense_weight().tolist() == [[6., 2., 1.], [-3., -1., -0.5]]
    assert module(torch.tensor([1., 10., 2.], dtype=torch.float64)).tolist() == [28., -13.]      # 2 (10 + 3 + 1)


@pytest.mark.parametrize('method', ['svd', 'svd_whitened', 'svd_whitened_bias', 'svd_whitened_hessian'])
@pytest.mark.parametrize('size, rank', [(20, 4), (20, 19), (50, 30)], ids=str)
def test_the_product_is_low_ranks_own(method, size, rank):
    W, b, seen = randn(30, size), randn(30, seed=9), stats(size)
    mine, other = (cls.from_dense(W, b, method=method, stats=seen, rank=rank) for cls in (PivotLinear, LowRankLinear))
    torch.testing.assert_close(mine.dense_weight(), other.dense_weight(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(mine.bias, other.bias, rtol=1e-10, atol=1e-10)
    fewer = sum(p.numel() for p in other.parameters()) - sum(p.numel() for p in mine.parameters())
    assert fewer == rank ** 2 and other.flops(7) - mine.flops(7) == 14 * rank ** 2


def test_it_saves_at_every_rank_below_full():
    assert all(PivotLinear.weight_numel(12, 9, rank) < 12 * 9 for rank in range(1, 9))
    assert PivotLinear.weight_numel(12, 9, 9) == 12 * 9
    assert not LowRankLinear.weight_numel(12, 9, 6) < 12 * 9
    assert PivotLinear.weight_numel(576, 1536, 384) <= 0.75 * 576 * 1536 < LowRankLinear.weight_numel(576, 1536, 315)


def test_a_matrix_of_lower_rank_is_kept():
    W = randn(12, 3) @ randn(3, 16, seed=1)
    module = PivotLinear.from_dense(W, None, rank=6)
    torch.testing.assert_close(module.dense_weight(), W, rtol=1e-9, atol=1e-9)
    zero = PivotLinear.from_dense(torch.zeros(5, 8), None, rank=2)
    assert not zero.dense_weight().any() and zero.R.isfinite().all()


def test_columns_of_zeros_are_no_pivots_and_others_stay_small():
    V = randn(20, 60)
    V[:, ::2] = 0
    V[:, 1::6] *= 1e-3
    chosen = pivoted(V)
    assert len(set(chosen.tolist())) == 20 and (chosen % 2 == 1).all()
    order = with_others(chosen, 60)
    R = torch.linalg.solve(V[:, order[:20]], V[:, order[20:]])
    plain = torch.linalg.solve(V[:, 1::2][:, :20], V)           # negative control: the first 20 that are not 0
    assert R.abs().max() < 5 < plain.abs().max()
    assert order.sort().values.tolist() == list(range(60))


def test_entries_have_the_std_asked_for():
    torch.manual_seed(0)
    module = PivotLinear(128, 512, False, 32)
    module.reset_parameters(0.02)
    W = module.dense_weight()
    assert all(part.std().item() == pytest.approx(0.02, rel=0.05) for part in (W, W[:, module.order[:32]]))


def test_the_order_is_in_a_checkpoint_and_no_parameter():
    W = randn(12, 16)
    module, other = PivotLinear.from_dense(W, None, rank=5), PivotLinear(16, 12, False, 5).double()
    assert 'order' not in dict(module.named_parameters())
    other.load_state_dict(module.state_dict())
    assert torch.equal(other.dense_weight(), module.dense_weight())


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match='rank=9 must be at most the 8 inputs'):
        PivotLinear(8, 12, False, 9)
    with pytest.raises(ValueError, match='rank=0 must be a whole number of at least 1'):
        PivotLinear(8, 12, False, 0)


def test_inputs_are_put_in_order_and_gradients_back():
    x, order = randn(3, 4, 7).requires_grad_(), torch.tensor([4, 0, 6, 2, 5, 1, 3])
    assert torch.equal(Reordered.apply(x, order), x[..., order])
    gradient, = torch.autograd.grad(Reordered.apply(x, order), x, randn(3, 4, 7, seed=1))
    assert torch.equal(gradient, torch.autograd.grad(x[..., order], x, randn(3, 4, 7, seed=1))[0])
    assert torch.autograd.gradgradcheck(lambda x: Reordered.apply(x, order) ** 2, x)
