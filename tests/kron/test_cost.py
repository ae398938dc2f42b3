"""kron/cost.py: the rule's plans on a CPU against recorded timings, which no test takes, and what a plan's steps count."""
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import rule as judge
from kron import cost, plan
from kron.linear import KroneckerLinear
from kron.plan import PLANS, Shape

RECORDS = Path(__file__).resolve().parents[2] / 'records'
LISTS = [RECORDS / '2026-11-22_plans' / 'plans_1.json', RECORDS / '2026-11-22_plans' / 'plans_2.json',
         *sorted((RECORDS / '2026-11-29_plans').glob('*.json'))]
# processor -> ratios (time of the chosen plan over the best) at most: the worst, the mean, and the share beyond 1.10
BOUNDS = {'Intel Xeon': (1.15, 1.015, 0.03), 'AMD EPYC': (1.40, 1.03, 0.10)}
SHAPES = [Shape(768, 768, 4, 1, 1), Shape(768, 768, 1, 4, 1), Shape(8, 4, 3, 3, 4), Shape(64, 32, 48, 24, 1)]


def ratios(by):
    """{processor: rows} of the record's cells at 1, 16 and 512 tokens."""
    found = judge.averaged([str(path) for path in LISTS], {1, 16, 512})
    return {name: [judge.judged(cell, judge.chosen(cell, by)) for cell in cells] for name, cells in found.items()}


def test_the_rule_is_near_the_best_recorded_plan_on_both_processors():
    found = ratios('cost')
    assert set(found) == set(BOUNDS)
    for name, rows in found.items():
        worst, mean, beyond = BOUNDS[name]
        values = [row['ratio'] for row in rows]
        assert max(values) <= worst and sum(values) / len(values) <= mean, name
        assert sum(value > judge.WITHIN for value in values) <= beyond * len(values), name


def test_fewest_flops_alone_are_not():
    """The record tells rules apart."""
    for name, rows in ratios('flops').items():
        single = [row['ratio'] for row in rows if row['tokens'] == 1]
        assert max(single) > 1.5 and sum(single) / len(single) > 1.08, name


@pytest.mark.parametrize('shape', SHAPES, ids=str)
@pytest.mark.parametrize('name', ['a_rows', 'b_rows', 'a_planes', 'b_planes', 'materialise'])
def test_steps_count_the_flops_of_the_products(shape, name):
    sizes, tokens = plan.sizes_of(shape), 6
    x, (A, B) = torch.randn(tokens, shape.n * shape.q), (torch.randn(*size) for size in sizes)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        PLANS[name].apply(x, A, B)
    formed = 2 * shape.terms * shape.m * shape.p * shape.n * shape.q * (name == 'materialise' and shape.terms > 1)
    assert cost.counts(name, shape, tokens)[1] == counter.get_total_flops() - formed


@pytest.mark.parametrize('shape', SHAPES, ids=str)
@pytest.mark.parametrize('training, kept', [(False, False), (False, True), (True, False)])
def test_choices_are_the_cheapest_plans_in_rising_order(shape, training, kept):
    found = cost.choices(shape, training, kept)
    assert [tokens for tokens, _ in found] == sorted({tokens for tokens, _ in found})
    assert all(first[1] != second[1] for first, second in zip(found, found[1:]))
    for tokens in cost.TOKENS:
        assert plan.taken(found, tokens) == cost.cheapest(shape, tokens, training, kept)


def test_no_plan_gets_cheaper_with_more_tokens_or_with_gradients():
    for shape in SHAPES:
        for name in plan.considered(shape, 2, 'cpu'):
            costs = [cost.seconds(name, shape, tokens) for tokens in cost.TOKENS[1:]]
            assert costs == sorted(costs) and cost.seconds(name, shape, 16, training=True) > costs[3]


def test_a_module_takes_the_least_cost_on_a_cpu_and_the_fewest_flops_elsewhere():
    module = KroneckerLinear(768, 3072, False, 1024, 256)
    ruled = plan.rule(module.A.shape, module.B.shape)[0]
    with torch.no_grad():
        assert module.plan(512, 'cuda') == module.plan(512, 'meta') == ruled
        assert module.plan(1) == cost.cheapest(Shape(1024, 256, 3, 3, 1), 1)
    assert module.plan(512) == cost.cheapest(Shape(1024, 256, 3, 3, 1), 512, training=True)
    assert cost.ruled(module.kron_shape(), 512, torch.device('cpu'), compiled=True) == ruled


def test_generation_keeps_a_W_only_where_that_is_best_for_a_single_token():
    model = torch.nn.ModuleList([KroneckerLinear(768, 3072, False, 1024, 256, terms=4),
                                 KroneckerLinear(768, 3072, False, 768, 768)])
    cost.keep_formed(model)
    assert [module.merge for module in model] == [True, False]
    with torch.no_grad():
        x = torch.randn(1, 768)
        assert torch.allclose(model[0](x), x @ model[0].dense_weight().t(), atol=1e-4)
    assert model[0].merged is not None


def test_a_fit_finds_the_constants_that_made_the_times():
    """Times that are costs exactly: the fit chooses as they do, from other constants."""
    cells, made = [], [1e-5, 1e-11, 1e-9, 1e-10, 1e-9]
    for shape in SHAPES:
        for tokens in (1, 16, 512):
            ms = {name: 1e3 * sum(a * b for a, b in zip(made, cost.counts(name, shape, tokens, kept=True)))
                  for name in plan.considered(shape, tokens, 'cpu')}
            cells.append({'matrix': shape.words, 'phase': 'forward', 'tokens': tokens, 'ms': ms})
    counts, found = judge.packed(cells)
    picks = (counts @ torch.tensor(judge.fitted(cells, 0), dtype=torch.float64)).argmin(1, keepdim=True)
    assert found.gather(1, picks).max() < judge.MARGIN + 1e-9
