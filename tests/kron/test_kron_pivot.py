"""KroneckerPivot beyond the common contract: kron's sums with terms^2 fewer parameters."""
import pytest
import torch

from kron.linear import KroneckerLinear
from kron.pivot import KroneckerPivot
from tests.lowrank.test_pivot import randn, stats


@pytest.mark.parametrize('method', ['van_loan', 'van_loan_normalised', 'prune', 'als', 'als_hessian'])
@pytest.mark.parametrize('m, n, terms', [(1, 10, 6), (6, 4, 5), (30, 20, 1), (5, 2, 10)], ids=str)
def test_the_sum_is_krons_own(method, m, n, terms):
    W, b, seen = randn(30, 20), randn(30, seed=9), stats(20)
    mine, other = (cls.from_dense(W, b, method=method, stats=namespace(seen), m=m, n=n, terms=terms)
                   for cls in (KroneckerPivot, KroneckerLinear))
    torch.testing.assert_close(mine.dense_weight(), other.dense_weight(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(mine.bias, other.bias, rtol=1e-9, atol=1e-9)
    assert sum(p.numel() for p in other.parameters()) - sum(p.numel() for p in mine.parameters()) == terms ** 2


def namespace(seen):
    from types import SimpleNamespace
    return SimpleNamespace(**seen)


def test_every_left_factor_has_a_unit_entry_of_its_own():
    module = KroneckerPivot.from_dense(randn(30, 20), None, m=6, n=4, terms=5)
    A = module.A.flatten(1)[:, module.order]
    assert torch.equal(A[:, :5], torch.eye(5, dtype=A.dtype)) and torch.equal(A[:, 5:], module.R)
    entry = module.order[0].item()                              # B_1 is the block of W there
    a, b = divmod(entry, 4)
    torch.testing.assert_close(module.dense_weight()[a * 5:a * 5 + 5, b * 5:b * 5 + 5], module.B[0])


def test_a_merged_weight_follows_the_factors():
    module = KroneckerPivot(20, 30, False, 6, 4, 5).double().eval()
    module.merge = True
    with torch.no_grad():
        kept = module.merged_weight(torch.float64)
        assert module.merged_weight(torch.float64) is kept
        module.R.add_(1)
        changed = module.merged_weight(torch.float64)
    torch.testing.assert_close(changed, module.dense_weight())
    assert not torch.equal(changed, kept)


def test_the_checkpoint_has_the_order_and_other_sizes_are_refused():
    module, other = KroneckerPivot.from_dense(randn(30, 20), None, m=6, n=4, terms=5), KroneckerPivot(20, 30, False, 6, 4, 5)
    other.double().load_state_dict(module.state_dict())
    assert torch.equal(other.dense_weight(), module.dense_weight())
    with pytest.raises(ValueError, match='terms=25 must be at most the 24 entries of a factor of 6 x 4'):
        KroneckerPivot(20, 30, False, 6, 4, 25)
    with pytest.raises(ValueError, match='take kron with terms=1, or weight_norm=True'):
        module.normalise_(1)
