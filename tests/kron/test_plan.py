"""Contraction plans: every one is the materialised product, the choice, what a module keeps, and what runs store."""
import copy
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import configurator
import train
from checkpoints import checkpoint
from kron import lean, plan, products, timing
from kron.linear import KroneckerLinear
from kron.plan import PLANS, Shape, by_rule, rule, rule_flops
from tests.tiny import arguments, make_data
from training import parallel, startup

# (m, n, p, q, terms): thin and thick B, one term and several, each side of A or B of one, wide, tall and square
SHAPES = [(12, 12, 4, 1, 1), (12, 12, 1, 4, 1), (24, 6, 1, 2, 1), (8, 4, 3, 3, 1), (8, 4, 3, 3, 4), (6, 9, 2, 2, 2),
          (8, 8, 4, 1, 3), (8, 8, 1, 4, 3), (3, 4, 10, 12, 2), (5, 1, 2, 7, 2), (1, 7, 12, 1, 2), (1, 1, 5, 6, 1)]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
each_count = pytest.mark.parametrize('tokens', [1, 9])
EXACT = [name for name in PLANS if not name.endswith('_fused')]          # the others sum in fp32: test_fused.py
each_plan = pytest.mark.parametrize('name', EXACT)
each_shape = pytest.mark.parametrize('shape', SHAPES, ids=str)


def tensors(shape, tokens, dtype, seed=0):
    """x, A, B that want gradients, and a gradient of y."""
    m, n, p, q, r = shape
    rng = torch.Generator().manual_seed(seed)
    sizes = ((tokens, n * q), (r, m, n), (r, p, q), (tokens, m * p))
    x, A, B, g = (torch.randn(*size, generator=rng, dtype=torch.float64).to(dtype) for size in sizes)
    return x.requires_grad_(), A.requires_grad_(), B.requires_grad_(), g


def kron_sum(A, B):
    return sum(torch.kron(a.contiguous(), b.contiguous()) for a, b in zip(A, B))


def all_of(function, x, A, B, g):
    """[y, dx, dA, dB]"""
    y = function(x, A, B)
    return [y, *torch.autograd.grad(y, (x, A, B), g.to(y.dtype))]


def error(found, expected):
    """The largest of the differences, each relative to its largest entry."""
    return max(((a.double() - b.double()).abs().max() / b.abs().max()).item() for a, b in zip(found, expected))


# ---------------------------------------------------------------------------------------------------
# exactness

@each_plan
@each_shape
@each_count
@pytest.mark.parametrize('dtype', TOLERANCE, ids=str)
def test_forward_and_all_gradients_are_those_of_the_materialised_product(name, shape, tokens, dtype):
    given_ = tensors(shape, tokens, dtype)
    expected = all_of(lambda x, A, B: x @ kron_sum(A, B).t(), *tensors(shape, tokens, torch.float64))
    assert error(all_of(PLANS[name].apply, *given_), expected) < TOLERANCE[dtype]


@each_plan
def test_other_factors_give_another_result(name):
    """Negative control of the test above."""
    given_, other = (tensors((8, 4, 3, 3, 2), 9, torch.float64, seed) for seed in (0, 1))
    other = (given_[0], other[1], *given_[2:])
    assert error(all_of(PLANS[name].apply, *given_), all_of(PLANS[name].apply, *other)) > 1e-2


@each_plan
@given(st.tuples(*[st.integers(1, 6)] * 4, st.integers(1, 4)), st.integers(0, 5), st.integers(0, 99))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_any_shape_and_number_of_tokens(name, shape, tokens, seed):
    x, A, B, g = tensors(shape, tokens, torch.float64, seed)
    expected = all_of(lambda x, A, B: x @ kron_sum(A, B).t(), x, A, B, g)
    for mine, right in zip(all_of(PLANS[name].apply, x, A, B, g), expected):
        torch.testing.assert_close(mine, right, rtol=1e-10, atol=1e-10)


@each_plan
@each_shape
@pytest.mark.parametrize('tokens', [1, 64])
def test_under_autocast_a_plan_is_as_near_as_dense(name, shape, tokens):
    x, A, B, g = tensors(shape, tokens, torch.float32)
    exact = all_of(lambda x, A, B: x @ kron_sum(A, B).t(), *tensors(shape, tokens, torch.float64))
    with torch.autocast('cpu', torch.bfloat16):
        y = PLANS[name].apply(x, A, B)
    assert y.dtype == torch.bfloat16
    found = [y, *torch.autograd.grad(y, (x, A, B), g.bfloat16())]
    assert [t.dtype for t in found[1:]] == [torch.float32] * 3
    assert error(found, exact) < 0.05


@each_plan
def test_double_backward(name):
    x, A, B, _ = tensors((4, 3, 2, 3, 2), 3, torch.float64)
    assert torch.autograd.gradgradcheck(PLANS[name].apply, (x, A, B), fast_mode=True)


# a single column or row, thin and thick, both at once, beside A of one row or column
SINGLE = [(12, 12, 4, 1, 1), (12, 12, 1, 4, 1), (6, 9, 10, 1, 1), (9, 6, 1, 10, 1), (8, 4, 1, 1, 1), (1, 7, 5, 1, 1),
          (7, 1, 1, 5, 1), (7, 1, 5, 1, 1), (1, 7, 1, 5, 1)]
each_single = pytest.mark.parametrize('shape', SINGLE, ids=str)


@pytest.fixture
def broadcast(monkeypatch):
    """Single columns and rows are broadcast, as on a GPU."""
    for module in (lean, products):
        monkeypatch.setattr(module, 'broadcasts', lambda x: True)


@each_plan
@each_single
@each_count
@pytest.mark.parametrize('dtype', TOLERANCE, ids=str)
def test_broadcast_too_a_plan_is_the_materialised_product(name, shape, tokens, dtype, broadcast):
    expected = all_of(lambda x, A, B: x @ kron_sum(A, B).t(), *tensors(shape, tokens, torch.float64))
    assert error(all_of(PLANS[name].apply, *tensors(shape, tokens, dtype)), expected) < TOLERANCE[dtype]
    with torch.no_grad():
        x, A, B, _ = tensors(shape, tokens, dtype)
        assert error([PLANS[name].apply(x, A, B)], expected) < TOLERANCE[dtype]


@each_plan
@pytest.mark.parametrize('shape', SINGLE[:4], ids=str)
def test_broadcast_under_autocast_and_twice_differentiated(name, shape, broadcast):
    test_under_autocast_a_plan_is_as_near_as_dense(name, shape, 64)
    x, A, B, _ = tensors((3, 2, *shape[2:]), 3, torch.float64)
    assert torch.autograd.gradgradcheck(PLANS[name].apply, (x, A, B), fast_mode=True)


class Inner(TorchDispatchMode):
    """The inner sizes of all matrix products."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm):
            self.sizes.append(args[0].shape[-1])
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize('name, shape', [('a_planes', SINGLE[0]), ('a_rows', SINGLE[0]), ('a_rows', SINGLE[2]),
                                         ('b_planes', SINGLE[1]), ('b_rows', SINGLE[1]), ('b_rows', SINGLE[3])], ids=str)
def test_broadcast_no_product_has_an_inner_size_of_one(name, shape, request):
    """A's products are left: forward, for x and for A, B-first's once more."""
    found = []
    for broadcast in (False, True):
        if broadcast:
            request.getfixturevalue('broadcast')
        with Inner() as inner:
            all_of(PLANS[name].apply, *tensors(shape, 9, torch.float64))
        found.append(inner.sizes)
    assert 1 in found[0] and 1 not in found[1] and len(found[1]) == 3


@pytest.mark.parametrize('name, shape', [('a_planes', SINGLE[0]), ('a_rows', SINGLE[2]), ('b_planes', SINGLE[1]),
                                         ('b_rows', SINGLE[3])], ids=str)
def test_compiled_a_single_column_or_row_is_broadcast_and_right(name, shape, monkeypatch):
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd
    inner = []

    def keep(graph, inputs):
        inner.extend(node.args[0].meta['val'].shape[-1] for node in graph.graph.nodes
                     if node.target is torch.ops.aten.mm.default)
        return make_boxed_func(graph.forward)
    expected = all_of(lambda x, A, B: x @ kron_sum(A, B).t(), *tensors(shape, 9, torch.float64))
    for broadcast in (True, False):
        if not broadcast:                               # negative control
            for module in (lean, products):
                monkeypatch.setattr(module, 'broadcasts', lambda x: False)
        torch._dynamo.reset()
        inner.clear()
        compiled = torch.compile(PLANS[name].apply, backend=aot_autograd(fw_compiler=keep), fullgraph=True)
        found = error(all_of(compiled, *tensors(shape, 9, torch.float64)), expected)
        assert len(inner) >= 3 and (1 not in inner) == broadcast and (found < 1e-10 or not broadcast)


@pytest.mark.parametrize('frozen', [(0,), (1, 2), (1,), (2,)], ids=str)
def test_the_materialised_gradient_of_what_is_frozen_is_none(frozen):
    x, A, B, g = tensors((8, 4, 3, 3, 2), 9, torch.float64)
    expected = all_of(lambda x, A, B: x @ kron_sum(A, B).t(), x, A, B, g)[1:]
    leaves = [t.detach().requires_grad_(i not in frozen) for i, t in enumerate((x, A, B))]
    products.materialise(*leaves).backward(g)
    for i, (leaf, right) in enumerate(zip(leaves, expected)):
        assert leaf.grad is None if i in frozen else torch.allclose(leaf.grad, right)


class Sizes(TorchDispatchMode):
    """The sizes of all tensors that operations return."""

    def __init__(self):
        super().__init__()
        self.numels = set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        self.numels |= {t.numel() for t in tree_leaves(result) if isinstance(t, torch.Tensor)}
        return result


def test_materialise_forms_w_and_keeps_no_more_than_its_arguments():
    x, A, B, g = tensors((8, 4, 3, 3, 2), 50, torch.float64)
    kept = []
    with Sizes() as seen, torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = products.materialise(x, A, B)
    assert 24 * 12 in seen.numels
    assert sorted(t.data_ptr() for t in kept) == sorted(t.data_ptr() for t in (x, A, B))
    with Sizes() as seen:
        y.backward(g)
    assert 24 * 12 in seen.numels                           # formed again, and dW


@each_plan
def test_compiled_without_a_graph_break(name):
    torch._dynamo.reset()
    x, A, B, g = tensors((8, 4, 3, 3, 2), 9, torch.float32)
    compiled = torch.compile(PLANS[name].apply, backend='aot_eager', fullgraph=True)
    assert error(all_of(compiled, x, A, B, g), all_of(PLANS[name].apply, x, A, B, g)) < 1e-5


# ---------------------------------------------------------------------------------------------------
# the rule

@pytest.mark.parametrize('shape, tokens, name', [
    ((768, 768, 4, 1, 1), 512, 'a_planes'), ((768, 768, 1, 4, 1), 512, 'b_planes'),
    ((1024, 256, 3, 3, 4), 10, 'b_planes'), ((1024, 256, 3, 3, 4), 512, 'materialise'),
    ((64, 32, 48, 24, 1), 512, 'a_rows'), ((8, 2, 16, 16, 32), 4096, 'materialise')], ids=str)
def test_the_rule_takes_the_fewest_flops(shape, tokens, name):
    sizes = plan.sizes_of(Shape(*shape))
    dense = 2 * shape[0] * shape[1] * shape[2] * shape[3]
    assert by_rule(rule(*sizes), tokens) == name
    for count in (tokens, 1, 12, 99999):
        assert rule_flops(*sizes, count) == min(count * min(plan.order_flops(*sizes)), dense * (count + shape[4]))


def test_a_module_counts_the_flops_of_the_rule_and_takes_its_plan():
    from torch.utils.flop_counter import FlopCounterMode
    module = KroneckerLinear(16, 32, False, 8, 4, terms=8).double()                # both orders cost twice dense
    for tokens, name in ((3, 'b_planes'), (64, 'materialise')):
        module.plans = ((), ())
        assert module.plan(tokens, 'cuda') == name
        module.plans = (((tokens, name),),) * 2
        with FlopCounterMode(display=False) as counter:
            module(torch.randn(tokens, 16, dtype=torch.float64))
        assert counter.get_total_flops() == module.flops(tokens)


# ---------------------------------------------------------------------------------------------------
# a choice by the clock

def test_candidates_leave_out_the_wrong_order_and_layouts_for_thin_factors():
    found = timing.candidates(Shape(768, 768, 4, 1, 1), 16, 'cpu')
    assert found == ['a_rows', 'a_planes', 'a_blocks', 'a_outer', 'materialise']
    assert 'a_dot' in timing.candidates(Shape(768, 768, 4, 1, 1), 1, 'cpu')
    assert timing.candidates(Shape(64, 32, 48, 24, 1), 1, 'cpu') == ['a_rows', 'b_rows', 'materialise']


@pytest.mark.parametrize('shape, expected', [
    ((768, 768, 4, 1, 1), ['a_planes', 'a_blocks']), ((768, 768, 1, 4, 1), ['b_planes', 'b_blocks']),
    ((96, 768, 32, 1, 1), ['a_rows']), ((768, 96, 1, 32, 1), ['b_rows']),
    ((8, 8, 1, 1, 1), ['b_planes', 'a_blocks', 'b_blocks'])], ids=str)
def test_plans_that_are_the_same_compiled_are_timed_once(shape, expected):
    """The rule's stays, which another must beat."""
    shape = Shape(*shape)
    found = timing.candidates(shape, 16, 'cpu', compiled=True)
    assert sorted(name for name in found if name != 'materialise') == sorted(expected)
    assert rule(*plan.sizes_of(shape))[0] in found
    on_gpu = timing.candidates(shape, 16, 'cuda')
    assert set(on_gpu) - {'a_fused', 'b_fused'} == set(found)


def clock(monkeypatch, speeds):
    """Plans take `speeds` seconds, and no time passes."""
    monkeypatch.setattr(timing.Trial, 'call', lambda self, name: name)
    monkeypatch.setattr(timing, 'timings', lambda calls, device, warm: {name: speeds[name] for name in calls})


@pytest.mark.parametrize('planes, blocks, outer, formed, expected', [
    (2.0, 1.9, 9.0, 9.0, 'a_blocks'), (2.0, 1.99, 9.0, 9.0, 'a_planes'),                # the rule's, within GAIN
    (2.0, 4.1, 9.0, 1.0, 'materialise'), (2.0, 1.9, 1.8, 1.9, 'a_outer')])
def test_the_fastest_wins_and_the_rule_stays_where_little_is_gained(monkeypatch, planes, blocks, outer, formed, expected):
    clock(monkeypatch, {'a_rows': 3.0, 'a_planes': planes, 'a_blocks': blocks, 'a_outer': outer, 'materialise': formed})
    monkeypatch.setattr(timing.cost, 'ruled', lambda *call: 'a_planes')
    assert timing.fastest(Shape(24, 24, 4, 1, 1), 8, torch.float32, 'cpu', True)[0] == expected


def test_a_plan_must_stay_near_the_best_as_tokens_grow(monkeypatch):
    seen = []

    def timings(calls, device, warm):
        seen.append(sorted(calls))
        return {name: {'a_planes': 1.0, 'a_rows': 1.9, 'a_blocks': 1.3, 'materialise': 2.1}[name] * (
            2 if len(seen) == 3 and name == 'a_planes' else 1) for name in calls}
    monkeypatch.setattr(timing, 'timings', timings)
    assert timing.fastest(Shape(24, 24, 4, 2, 1), 8192, torch.float32, 'cpu', False)[0] == 'a_blocks'
    assert seen == [['a_blocks', 'a_planes', 'a_rows', 'materialise'], ['a_blocks', 'a_planes', 'a_rows'],
                    ['a_blocks', 'a_planes']]


def test_one_hiccup_does_not_drop_a_plan(monkeypatch):
    took = iter([1e-4, 9e-3, 1e-4])                     # of first calls: steady, hiccup; later ones are steady
    monkeypatch.setattr(timing, 'seconds', lambda call, times, device: times * next(took, 1e-4 if call() else 5e-5))
    found = timing.timings({'steady': lambda: True, 'hiccup': lambda: False}, torch.device('cpu'))
    assert found['hiccup'] == pytest.approx(5e-5) and found['steady'] == pytest.approx(1e-4)


def test_one_lucky_round_does_not_choose_a_plan(monkeypatch):
    rounds = {'better': 0, 'lucky': 0}

    def seconds(call, times, device):
        name = call()
        rounds[name] += 1
        return times * (1e-2 if name == 'better' else 5e-3 if rounds[name] == 9 else 1.3e-2)
    monkeypatch.setattr(timing, 'seconds', seconds)
    found = timing.timings({name: (lambda name=name: name) for name in rounds}, torch.device('cpu'))
    assert rounds['lucky'] > 9 and found == {'better': pytest.approx(1e-2), 'lucky': pytest.approx(1.3e-2)}


def test_a_burst_that_outlasts_the_first_rounds_does_not_choose_a_plan(monkeypatch):
    rounds = {'better': 0, 'other': 0, 'far': 0}

    def seconds(call, times, device):                   # the first of them is a first call, three are the first rounds
        name = call()
        rounds[name] += 1
        return times * {'better': 0.2 if rounds[name] in (2, 3, 4) else 0.17, 'other': 0.19, 'far': 0.3}[name]
    monkeypatch.setattr(timing, 'seconds', seconds)
    calls = {name: (lambda name=name: name) for name in rounds}
    found = timing.timings(calls, torch.device('cpu'))
    assert found['better'] == pytest.approx(0.17) and found['other'] == pytest.approx(0.19)
    assert rounds == {'better': 9, 'other': 9, 'far': 4}                    # the second time only between the best
    monkeypatch.setattr(timing, 'CLOSE', 1.0)           # without the second time
    rounds.update(dict.fromkeys(rounds, 0))
    assert timing.timings(calls, torch.device('cpu'))['better'] == pytest.approx(0.2)


def test_timings_are_of_calls_and_a_slow_plan_is_called_four_times_at_most():
    calls = {'fast': 0, 'slow': 0}

    def make(name, work):
        def call():
            calls[name] += 1
            sum(range(work))
        return call
    found = timing.timings({'fast': make('fast', 2000), 'slow': make('slow', 400_000)}, torch.device('cpu'))
    assert found['fast'] < found['slow'] and calls['slow'] in (2, 4) and calls['fast'] > 4


@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('dtype, half', [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)], ids=str)
def test_every_candidate_runs_in_a_trial(training, dtype, half):
    shape = Shape(8, 8, 2, 2, 2)
    name, found = timing.fastest(shape, 16, dtype, 'cpu', training, half=half)
    assert set(found) == set(timing.candidates(shape, 16, 'cpu')) and name in found and all(t > 0 for t in found.values())


def test_a_trial_draws_no_random_numbers_of_the_run():
    state = torch.get_rng_state()
    timing.fastest(Shape(4, 4, 2, 2, 1), 4, torch.float32, 'cpu', True)
    assert torch.equal(torch.get_rng_state(), state)


def counting(monkeypatch, backend):
    """The backend of timed plans, which counts its graphs; every plan is called twice, and no time passes."""
    from torch._dynamo.testing import CompileCounterWithBackend
    torch._dynamo.reset()
    monkeypatch.setattr(timing, 'timings', lambda calls, *a: {name: len([call(), call()]) for name, call in calls.items()})
    monkeypatch.setattr(timing, 'BACKEND', counter := CompileCounterWithBackend(backend))
    return counter


@pytest.mark.slow
@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('shape', [Shape(8, 8, 2, 2, 2), Shape(8, 8, 4, 1, 1), Shape(8, 8, 1, 4, 1)], ids=str)
def test_compiled_every_candidate_is_timed_as_one_graph(shape, training, monkeypatch):
    counter = counting(monkeypatch, 'aot_eager')
    name, found = timing.fastest(shape, 16, torch.bfloat16, 'cpu', training, compiled=True)
    assert set(found) == set(timing.candidates(shape, 16, 'cpu', compiled=True)) and name in found
    assert counter.frame_count == len(found)


def test_compiled_plans_are_timed_for_any_number_of_shapes(monkeypatch):
    """Dynamo compiles 8 versions of a function, and then runs it eagerly in silence."""
    counter = counting(monkeypatch, 'eager')
    monkeypatch.setattr(timing, 'candidates', lambda shape, *a: ['a_rows'])
    for n in range(2, 11):
        timing.fastest(Shape(n, n, 2, 2, 1), 4, torch.float32, 'cpu', False, compiled=True)
    assert counter.frame_count == 9
    timing.fastest(Shape(n, n, 2, 2, 1), 4, torch.float32, 'cpu', False)
    assert counter.frame_count == 9


def test_compiled_plans_are_looked_at_once(monkeypatch):
    sizes = []
    clock(monkeypatch, dict.fromkeys(PLANS, 1.0))
    monkeypatch.setattr(timing.Trial, '__init__', lambda self, shape, tokens, *a: (
        sizes.append((tokens, a[-1])), setattr(self, 'factors', [1]))[0])
    for compiled in (True, False):
        timing.fastest(Shape(24, 24, 4, 1, 1), 10 ** 5, torch.float32, 'cpu', True, compiled=compiled)
    assert sizes == [(8192, True), (512, False), (2048, False), (8192, False)]


# ---------------------------------------------------------------------------------------------------
# modules

def module_of(seed=0, **options):
    torch.manual_seed(seed)
    return KroneckerLinear(24, 32, True, 8, 12, terms=2, **options).double()


KEYS = ['32x24 by 8x12x2 train 64 float64 cpu', '32x24 by 8x12x2 eval 64 float64 cpu', '32x24 by 8x12x2 eval 1 float64 cpu']


def test_plans_are_found_by_shape_phase_tokens_type_and_device():
    module = torch.nn.ModuleDict({'a': module_of(), 'b': KroneckerLinear(24, 32, True, 4, 12)})
    plan.assign(module, {KEYS[0]: 'a_blocks', KEYS[1]: 'materialise', KEYS[2]: 'a_rows',
                         KEYS[0].replace('float64', 'float32'): 'b_rows', KEYS[0].replace('cpu', 'cuda'): 'b_rows',
                         KEYS[0].replace('x2 ', 'x3 '): 'b_rows'}, torch.float64, 'cpu')
    assert module['b'].plans == ((), ())
    assert [module['a'].plan(tokens) for tokens in (1, 64, 65, 9999)] == ['a_blocks'] * 4
    with torch.no_grad():
        assert [module['a'].plan(tokens) for tokens in (0, 1, 2, 64, 9999)] == ['a_rows'] * 2 + ['materialise'] * 3
    json.dumps(timing.measured(module, [3], torch.float64, 'cpu'))


@pytest.mark.parametrize('plans', [{'3072x768': 'a_rows'}, {KEYS[0]: 'fast'}], ids=str)
def test_an_entry_that_is_none_is_refused(plans):
    with pytest.raises(ValueError, match='is no plan; an entry is written'):
        plan.assign(module_of(), plans, torch.float64, 'cpu')


def test_what_is_known_is_not_measured_again(monkeypatch):
    asked = []
    monkeypatch.setattr(timing, 'fastest', lambda *a: (asked.append(a[1]), ('b_rows', {}))[1])
    model = torch.nn.ModuleList([module_of(0), module_of(1)])
    first = timing.measured(model, [64, 1, 64], torch.float64, 'cpu', {KEYS[0]: 'a_rows'})
    assert first[KEYS[0]] == 'a_rows' and sorted(asked) == [1, 1, 64] and len(first) == 4
    assert timing.measured(model, [64, 1], torch.float64, 'cpu', first) == first and len(asked) == 3


@each_plan
def test_a_module_takes_the_plan_that_it_is_given(name, monkeypatch):
    module, x = module_of(scale=True), torch.randn(5, 24, dtype=torch.float64)
    expected = x @ module.dense_weight().t() + module.bias
    plan.assign(module, {KEYS[0]: name}, torch.float64, 'cpu')
    called, apply = [], PLANS[name].apply
    monkeypatch.setitem(PLANS, name, PLANS[name]._replace(apply=lambda *a: called.append(name) or apply(*a)))
    torch.testing.assert_close(module(x), expected, rtol=1e-10, atol=1e-10)
    assert called == [name]


@pytest.mark.slow
@each_plan
def test_a_module_with_a_plan_compiles_without_a_graph_break(name):
    torch._dynamo.reset()
    module = module_of().float()
    plan.assign(module, {key.replace('float64', 'float32'): name for key in KEYS}, torch.float32, 'cpu')
    compiled = torch.compile(module, backend='aot_eager', fullgraph=True)
    for tokens in (8, 12, 200):
        x = torch.randn(tokens, 24)
        torch.testing.assert_close(compiled(x), module(x), rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------------------------------
# the kept W

def keeping():
    module = module_of(scale=True).eval()
    module.merge = True
    plan.assign(module, dict.fromkeys(KEYS, 'materialise'), torch.float64, 'cpu')
    return module, torch.randn(5, 24, dtype=torch.float64)


def test_w_is_made_once_a_version_of_the_factors(monkeypatch):
    module, x = keeping()
    expected, made = x @ module.dense_weight().t() + module.bias, []
    monkeypatch.setattr(module, 'product_weight', lambda f=module.product_weight: made.append(1) or f())
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(module(x), expected, rtol=1e-10, atol=1e-10)
        assert made == [1]
        before = module.merged[1]
        for change in (lambda: module.A.add_(1), lambda: module.B.mul_(2), lambda: module.scale.add_(1),
                       lambda: module.load_state_dict(module_of(1, scale=True).state_dict()),
                       lambda: setattr(module.A, 'data', module.A.data * 3)):
            change()
            torch.testing.assert_close(module(x), x @ module.dense_weight().t() + module.bias, rtol=1e-10, atol=1e-10)
            assert module.merged[1] is not before
            before = module.merged[1]
            module(x)
            assert module.merged[1] is before


def test_the_kept_w_goes_where_training_begins_and_is_in_no_account():
    module, x = keeping()
    names, count = list(module.state_dict()), sum(p.numel() for p in module.parameters())
    with torch.no_grad():
        module(x)
    assert module.merged is not None and list(module.state_dict()) == names
    assert sum(p.numel() for p in module.parameters()) == count
    module.train()
    assert module.merged is None
    module(x).sum().backward()
    assert module.merged is None and module.A.grad is not None


def test_gradients_never_come_through_a_kept_w():
    module, x = keeping()
    with torch.no_grad():
        module(x)
    module(x).sum().backward()                                       # still in evaluation, but with gradients
    assert module.A.grad.any() and module.B.grad.any()


def test_a_copy_of_the_module_has_its_own():
    module, x = keeping()
    with torch.no_grad():
        before = module(x)
        twin = copy.deepcopy(module)
        twin.A.add_(1)
        assert torch.equal(module(x), before) and not torch.equal(twin(x), before)


def test_no_w_is_kept_unless_asked():
    module, x = keeping()
    module.merge = False
    with torch.no_grad():
        module(x)
    assert module.merged is None


# ---------------------------------------------------------------------------------------------------
# runs

@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp('data'))


def run(data, out, *more):
    train.STOP.update(signal=None, time=0.0)
    train.main(configurator.load([*arguments(data, out), '--kron_plan=measure', *more]))
    return checkpoint.load(out)


def stub(monkeypatch, name):
    """Every timing finds `name`; returns the shapes that were timed."""
    asked = []
    monkeypatch.setattr(timing, 'fastest', lambda shape, *a, **k: (asked.append(shape), (name, {}))[1])
    return asked


def test_a_run_times_once_stores_and_resumes_to_the_same_bits(data, tmp_path, monkeypatch):
    first = run(data, tmp_path / 'a', '--max_iters=6')
    found = first['config']['kron_plans']
    assert sorted(found) == sorted(f'{shape} by 8x8x2 {phase} 64 float32 cpu' for shape in ('128x32', '32x128')
                                   for phase in ('train', 'eval')) and set(found.values()) <= set(PLANS)
    assert json.load(open(tmp_path / 'a' / 'config.json'))['kron_plans'] == found
    asked = stub(monkeypatch, 'materialise')
    resumed = run(data, tmp_path / 'a', '--init_from=resume', '--max_iters=12')
    whole = run(data, tmp_path / 'b', f'--kron_plans={found!r}')
    assert not asked and resumed['config']['kron_plans'] == whole['config']['kron_plans'] == found
    assert all(torch.equal(t, whole['model'][name]) for name, t in resumed['model'].items())


@pytest.mark.parametrize('setting, expected', [('True', True), ('False', False), ('None', False)])
def test_plans_are_timed_as_the_run_is_compiled(setting, expected, data, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(timing, 'fastest', lambda *a: (asked.append(a[-1]), ('a_rows', {}))[1])
    known = {'128x32 by 8x8x2 train 64 float32 cpu': 'b_rows'}
    config = configurator.load([*arguments(data, tmp_path), '--kron_plan=measure', f'--compile={setting}',
                                f'--kron_plans={known!r}'])
    job = parallel.start(config)
    startup.choose_plans(config, job)
    assert asked == [expected] * 3
    assert config.kron_plans.items() > known.items()            # of whatever kind: a resumed run takes what it has
    assert parallel.compiles(config, dataclasses.replace(job, device=torch.device('cuda'))) == (setting != 'False')


def test_another_plan_rounds_otherwise_and_the_rule_takes_none(data, tmp_path, monkeypatch):
    """Negative control of the test above."""
    asked = stub(monkeypatch, 'a_rows')    # the rule forms W here
    rows = run(data, tmp_path / 'a')
    plain, ruled = run(data, tmp_path / 'b', '--kron_plan=rule'), run(data, tmp_path / 'c', '--kron_plan=rule')
    assert len(asked) == 4 and not plain['config']['kron_plans']
    assert any(not torch.equal(t, plain['model'][name]) for name, t in rows['model'].items())
    assert all(torch.allclose(t, plain['model'][name], atol=1e-4) for name, t in rows['model'].items())
    assert all(torch.equal(t, plain['model'][name]) for name, t in ruled['model'].items())


def test_shapes_to_come_are_timed_at_the_start(data, tmp_path, monkeypatch):
    asked = stub(monkeypatch, 'a_rows')
    used = []
    monkeypatch.setattr(train, 'use_plans', lambda model, *a: (startup.use_plans(model, *a), used.append(
        [module.plans[1] for module in plan.kronecker(model)]))[0])
    state = run(data, tmp_path, '--drop_in=all', '--drop_in_from=2', '--max_iters=4', '--decompose=van_loan')
    assert len(asked) == 4 and len(state['config']['kron_plans']) == 4
    assert used == [[], [((64, 'a_rows'),)] * 4]                    # dense at first, then as was timed at the start


def test_an_entry_that_is_none_is_one_line(data, tmp_path, capsys):
    with pytest.raises(SystemExit) as leave:
        run(data, tmp_path, "--kron_plans={'3072x768': 'a_rows'}")
    assert leave.value.code == 2 and "'3072x768': 'a_rows' is no plan" in capsys.readouterr().err


def choose(data, out):
    """One rank's choice, in which every rank's clock says something else, to a file."""
    job = parallel.start(config := configurator.load([*arguments(data, out), '--kron_plan=measure']))
    timing.fastest = lambda *a, **k: (('a_rows', 'b_rows')[job.rank], {})
    startup.choose_plans(config, job)
    (Path(out) / f'{job.rank}.json').write_text(json.dumps(config.kron_plans))
    torch.distributed.destroy_process_group()


def test_all_ranks_take_what_rank_0_has_timed(data, tmp_path):
    from tests.reliability.ranks import together
    assert [code for code, _ in together(2, tmp_path, choose, data, tmp_path)] == [0, 0]
    first, second = (json.loads((tmp_path / f'{rank}.json').read_text()) for rank in (0, 1))
    assert first == second and set(first.values()) == {'a_rows'}


def test_sample_with_plans_says_the_same(data, tmp_path, run_program):
    train.main(configurator.load([*arguments(data, tmp_path), '--max_iters=2']))
    texts = [run_program('sample.py', f'--out_dir={tmp_path}', '--num_samples=1', '--max_new_tokens=8', '--start=the cat',
                         '--temperature=0', f'--kron_plan={how}').stdout for how in ('rule', 'measure')]
    assert texts[0] == texts[1] and len(texts[0]) > 20


# ---------------------------------------------------------------------------------------------------
# memory

PAIRS = {'81M': (768, 768, 1), '96M': (1536, 768, 1), '80M-2': (1024, 256, 2), '92M-4': (1024, 256, 4)}


def step_bytes(tokens, linear, recompute=False, name=None):
    """Most bytes of a training step of GPT-2's size on tensors without contents; plans: the rule's, or one for all."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from bench.training import step_memory, train_step
    from model import GPT, GPTConfig
    from optimizers import optim
    from reporting.hardware import autocast
    with FakeTensorMode():
        model = GPT(GPTConfig(linear=linear, recompute=recompute, loss_chunk=4096))
        for module in plan.kronecker(model) if name else ():
            module.plans = (((1, name),),) * 2
        optimizer = torch.optim.AdamW(optim.groups(model, 0.1), lr=1e-3)
        x = torch.zeros(tokens // 1024, 1024, dtype=torch.long)

        def step():
            train_step(model, optimizer, x, x, autocast(torch.device('cpu'), torch.float32))
        step()
        return step_memory(step, model, optimizer, torch.device('cpu'))


def both(m, n, terms):
    return {'h.*.mlp.c_fc': f'kron({m}, {n}, terms={terms})', 'h.*.mlp.c_proj': f'kron({n}, {m}, terms={terms})'}


@pytest.mark.slow
@pytest.mark.parametrize('tokens, recompute', [(4096, False), (65536, True)], ids=str)
def test_a_step_with_kronecker_mlps_needs_no_more_memory_than_dense(tokens, recompute):
    dense = step_bytes(tokens, {}, recompute)
    assert all(step_bytes(tokens, both(*shape), recompute) <= dense for shape in PAIRS.values())


@pytest.mark.slow
def test_a_plan_that_keeps_what_it_makes_needs_more():
    """Negative control of the test above."""
    assert step_bytes(4096, both(*PAIRS['92M-4']), name='a_rows') > step_bytes(4096, {})


@pytest.mark.parametrize('name', ['b_rows', 'b_planes', 'b_blocks', 'b_inner', 'materialise'])
def test_b_first_and_w_keep_their_arguments_alone(name):
    shape = (8, 24, 1, 4, 1) if name == 'b_inner' else (8, 24, 3, 4, 2)
    (x, A, B, _), kept = tensors(shape, 50, torch.float64), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        PLANS[name].apply(x, A, B)
    assert sorted({t.data_ptr() for t in kept}) == sorted(t.data_ptr() for t in (x, A, B))
