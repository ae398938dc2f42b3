"""Which units stay, what c_proj becomes, and one budget for all kinds of saving: against brute force, in float64."""
import itertools

import pytest
import torch

from decomposition import menus, units


def problem(n=12, d=5, rows=300, seed=0):
    """(C, A) of correlated inputs."""
    g = torch.Generator().manual_seed(seed)
    X = torch.randn(rows, n, generator=g, dtype=torch.float64) @ torch.randn(n, n, generator=g, dtype=torch.float64)
    return X.t() @ X / rows + 1e-3 * torch.eye(n), torch.randn(d, n, generator=g, dtype=torch.float64)


def left(C, A, columns):
    """tr(A R A^T) / 2 by the definition of the residual R."""
    columns = torch.as_tensor(columns)
    R = C - C[:, columns] @ torch.linalg.inv(C[columns][:, columns]) @ C[columns] if len(columns) else C
    return (((A @ R) * A).sum() / 2).item()


@pytest.mark.parametrize('size', [1, 3])
def test_the_greedy_order_takes_the_best_next_unit(size):
    C, A = problem()
    order, kept = units.curvature(C, A, size, block=1).tolist(), []
    for unit in order[:-1]:
        rest = [u for u in range(12 // size) if u not in kept]
        each = {u: left(C, A, units.expand(torch.tensor(kept + [u]), size)) for u in rest}
        assert each[unit] == pytest.approx(min(each.values()), rel=1e-9)
        kept.append(unit)


@pytest.mark.parametrize('size', [1, 3])
@pytest.mark.parametrize('method', units.METHODS)
def test_losses_are_those_of_the_residual(method, size):
    C, A = problem(seed=1)
    order = units.METHODS[method][0](C, A, size)
    assert sorted(order.tolist()) == list(range(12 // size))
    nats = units.losses(C, A, order, size)
    by_hand = [left(C, A, units.expand(order[:k], size)) for k in range(12 // size + 1)]
    assert nats.tolist() == pytest.approx(by_hand, abs=1e-9)
    assert (nats.diff() <= 1e-12).all()


def test_blocks_of_pivots_lose_little():
    C, A = problem(n=96, d=20, rows=2000, seed=2)
    exact, blocked = (units.losses(C, A, units.curvature(C, A, block=block)) for block in (1, units.BLOCK))
    assert blocked[24].item() <= 1.01 * exact[24].item() and blocked[60].item() <= 1.01 * exact[60].item()
    by_norm = units.losses(C, A, units.norms(C, A))
    assert exact[48].item() < by_norm[48].item()                        # so that the order matters here


def test_the_predictor_is_the_least_squares_fit_on_the_rows():
    torch.manual_seed(3)
    h = torch.randn(200, 9, dtype=torch.float64) @ torch.randn(9, 9, dtype=torch.float64)
    S = torch.tensor([0, 4, 7])
    T = units.predictor(h.t() @ h / 200, S)
    torch.testing.assert_close(T.t(), torch.linalg.lstsq(h[:, S], h).solution, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(T[S], torch.eye(3, dtype=torch.float64), rtol=1e-9, atol=1e-9)


# ---------------------------------------------------------------------------------------------------
# one budget

def menu(site, seed, sizes=4):
    g = torch.Generator().manual_seed(seed)
    costs = torch.randint(2, 9, (sizes,), generator=g).cumsum(0).double()
    gains = torch.rand(sizes, generator=g, dtype=torch.float64).sort(descending=True).values       # a convex menu
    return menus.Menu(site, list(range(sizes)), costs, gains.sum() - (gains * costs.diff(prepend=costs[:1])).cumsum(0) / 9)


def test_the_choice_is_the_best_of_all_up_to_one_step():
    for seed in range(20):
        parts = {f'p{i}': [menus.Width(k, 0.1 * k, [menu('a', 10 * seed + i + k), menu('b', 7 * seed + i - k)])
                           for k in (1, 2)] for i in range(2)}
        budget = 60
        forms = [[(w, places) for w in widths for places in itertools.product(range(4), repeat=2)]
                 for widths in parts.values()]
        best = min(sum(menus.Choice('', w, p).nats for w, p in pair) for pair in itertools.product(*forms)
                   if sum(menus.Choice('', w, p).cost for w, p in pair) <= budget)
        found = menus.choose(parts, budget)
        assert sum(c.cost for c in found) <= budget
        spread = max(c.width.menus[0].nats.max().item() for c in found)
        assert best - 1e-9 <= sum(c.nats for c in found) <= best + 0.5 * spread


def test_a_budget_below_everything_is_refused():
    with pytest.raises(ValueError, match='smallest forms'):
        menus.choose({'p': [menus.Width(1, 0.0, [menu('a', 0)])]}, 1)


def test_what_is_left_goes_to_the_best_step():
    one = menus.Menu('a', [1, 2, 3], torch.tensor([10., 20., 30.]).double(), torch.tensor([3., 1., 0.9]).double())
    two = menus.Menu('b', [1, 2], torch.tensor([10., 20.]).double(), torch.tensor([2., 1.9]).double())
    found = menus.choose({'p': [menus.Width(1, 0.0, [one, two])]}, 35)
    assert found[0].sizes == {'a': 2, 'b': 1} and found[0].cost == 30
    assert menus.choose({'p': [menus.Width(1, 0.0, [one, two])]}, 40)[0].cost == 40
