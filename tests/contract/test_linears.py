"""What every entry of variants.LINEARS must keep. A new linear: one line in LINEARS, then
`pytest tests/contract/test_linears.py -k NAME`, which takes the specs of the class's `examples`."""
import ast
import copy
import importlib
import inspect
import sys

import pytest
import torch
import torch.nn as nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from kron.linear import KroneckerLinear
from kron.plan import by_rule
from layers.basic import tags_of, zero_
from model import GPT, GPTConfig
from tests.contract import entries
from variants import LINEARS, Spec, UserError

# name -> spec arguments that save parameters, each fit for 48 -> 96 and 96 -> 48 (`saving`: one test a line),
# spec arguments under which from_dense reproduces any such matrix (`full`), and the structured classes
# may not form W ('forms_W' marks one that does, or lists the specs that do at some numbers of tokens); 'fits' is the
# relative error, of the largest entry, of from_dense on a matrix of the structure itself, 1e-10 unless a fit is local
EXAMPLES = {
    'dense': {'saving': [{}], 'full': {}, 'forms_W': True},
    'kron': {'saving': [{'m': 8, 'n': 6, 'terms': 3}, {'m': 24, 'n': 24, 'terms': 2, 'scale': True},
                        {'m': 48, 'n': 48}, {'m': 3, 'n': 4, 'scale': True},
                        {'m': 8, 'n': 6, 'terms': 2, 'exact_columns': 3},
                        {'m': 6, 'n': 8, 'terms': 2, 'scale': True, 'weight_norm': True}],
             'full': {'m': 8, 'n': 6, 'terms': 48},
             'local': [{'m': 6, 'n': 8, 'terms': 2, 'scale': True, 'weight_norm': True}]},  # rows scaled: no sum
    'kron_pivot': {'saving': [{'m': 8, 'n': 6, 'terms': 3}, {'m': 12, 'n': 6, 'terms': 3}, {'m': 48, 'n': 48},
                              {'m': 8, 'n': 6, 'terms': 2, 'exact_columns': 3},
                              {'m': 6, 'n': 8, 'terms': 2, 'weight_norm': True}],
                   'full': {'m': 8, 'n': 6, 'terms': 48},
                   'local': [{'m': 6, 'n': 8, 'terms': 2, 'weight_norm': True}]},
    'lowrank': {'saving': [{'rank': 5}, {'rank': 4, 'exact_columns': 2}, {'rank': 5, 'weight_norm': True},
                           {'rank': 3, 'exact_columns': 4, 'weight_norm': True}], 'full': {'rank': 48}},
    'pivot': {'saving': [{'rank': 5}, {'rank': 30}, {'rank': 4, 'exact_columns': 2}, {'rank': 5, 'weight_norm': True},
                         {'rank': 3, 'exact_columns': 4, 'weight_norm': True}], 'full': {'rank': 48}},
    'abba': {'saving': [{'rank1': 3, 'rank2': 2}, {'rank1': 4, 'rank2': 4, 'scale': True}, {'rank1': 2, 'rank2': 5},
                        {'rank1': 16, 'rank2': 9}],
             'full': {'rank1': 48, 'rank2': 1}, 'forms_W': [{'rank1': 16, 'rank2': 9}], 'fits': 1.0},
    'sum': {'saving': [{'parts': ('lowrank(5)', 'kron(8, 6, terms=3)')},
                       {'parts': ('lowrank(4, exact_columns=2)', 'kron(8, 6, terms=3, weight_norm=True)')},
                       {'parts': ('kron(3, 4, scale=True)', 'abba(2, 3)', 'lowrank(2)')}],
            'full': {'parts': ('lowrank(48)', 'kron(8, 6)')}, 'fits': 1.0},
}


def example(name):
    """The line of EXAMPLES, or the same made of what a newcomer's class says."""
    if name in EXAMPLES:
        return EXAMPLES[name]
    cls = LINEARS[name]
    return {'saving': [entries.arguments('linear', text) for text in cls.examples], 'fits': cls.tolerance,
            **({} if cls.exact is None else {'full': entries.arguments('linear', cls.exact)})}


TESTED = {name: example(name) for name in entries.specs('linear', EXAMPLES)}
SIZES = [(48, 96), (96, 48)]                    # (in, out)
TAGS = {'matrix', 'factor', 'vector', 'embedding', 'head'}


class Case:
    """One class with one set of spec arguments."""

    def __init__(self, name, spec):
        self.name, self.spec = name, spec

    def __repr__(self):
        return f'{self.name}({",".join(f"{k}={v}" for k, v in self.spec.items())})'

    @property
    def cls(self):
        return LINEARS[self.name]

    def build(self, in_features=48, out_features=96, bias=True, dtype=torch.float64, seed=0):
        """A module all of whose parameters are random, vectors too."""
        torch.manual_seed(seed)
        module = self.cls(in_features, out_features, bias, **self.spec).to(dtype)
        with torch.no_grad():
            tags = tags_of(module)
            for name, parameter in module.named_parameters():
                if tags[name] == 'vector':
                    parameter.normal_().add_(1)
        return module


def cases(kind):
    """A Case for each table entry: for each of its saving specs, or for its full one, where there is one."""
    return [Case(name, spec) for name, example in TESTED.items()
            for spec in (example['saving'] if kind == 'saving' else [example[kind]] if kind in example else [])]


each_case = pytest.mark.parametrize('case', cases('saving'), ids=repr)
each_full = pytest.mark.parametrize('case', cases('full'), ids=repr)
each_size = pytest.mark.parametrize('sizes', SIZES, ids=lambda s: f'{s[0]}to{s[1]}')


def forms_dense(case):
    """Whether the class may form W: always, or with these arguments."""
    forms = TESTED[case.name].get('forms_W', [])
    return forms is True or case.spec in forms


def formula(module, x):
    """The same map through the dense weight."""
    y = x @ module.dense_weight().transpose(0, 1)
    return y if module.bias is None else y + module.bias


def relative_error(actual, expected):
    return ((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()


def gradients(module, x, function):
    """[d/dx, d/d each parameter] of a fixed random projection of function(x)."""
    y = function(x)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.dtype)
    return torch.autograd.grad((y * weights).sum(), [x, *module.parameters()])


@pytest.mark.parametrize('name', list(LINEARS))
def test_its_class_is_complete(name):
    """First: until this passes no other test runs for that name."""
    entries.complete('linear', name, EXAMPLES)


# ---------------------------------------------------------------------------------------------------
# the function

@each_case
@each_size
@pytest.mark.parametrize('bias', [True, False], ids=['bias', 'nobias'])
@pytest.mark.parametrize('dtype, tolerance', [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=['fp64', 'fp32'])
def test_forward_and_gradients_equal_the_dense_weight(case, sizes, bias, dtype, tolerance):
    module = case.build(*sizes, bias, dtype)
    assert (module.bias is not None) == bias
    assert module.dense_weight().shape == (sizes[1], sizes[0])
    x = torch.randn(7, sizes[0], dtype=dtype, requires_grad=True)
    assert relative_error(module(x), formula(module, x)) < tolerance
    for mine, expected in zip(gradients(module, x, module), gradients(module, x, lambda x: formula(module, x))):
        assert relative_error(mine, expected) < tolerance


@each_case
def test_another_weight_is_seen(case):
    """Negative control of the one above."""
    module, other = case.build(seed=0), case.build(seed=1)
    x = torch.randn(7, 48, dtype=torch.float64, requires_grad=True)
    assert relative_error(module(x), formula(other, x)) > 1e-2
    mine, expected = gradients(module, x, module)[0], gradients(other, x, other)[0]
    assert relative_error(mine, expected) > 1e-2


@each_case
def test_gradcheck(case):
    module = case.build()
    x = torch.randn(2, module.in_features, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: module(x), (x, *module.parameters()), fast_mode=True)


@each_case
@each_size
@pytest.mark.parametrize('leading', [(), (1,), (5,), (2, 3), (2, 1, 3), (0,), (2, 0)], ids=str)
def test_any_leading_shape(case, sizes, leading):
    module = case.build(*sizes)
    x = torch.randn(*leading, sizes[0], dtype=torch.float64, requires_grad=True)
    y = module(x)
    assert y.shape == (*leading, sizes[1])
    torch.testing.assert_close(y, formula(module, x), rtol=1e-10, atol=1e-10)
    y.sum().backward()
    assert x.grad.shape == x.shape


@each_case
def test_input_need_not_be_contiguous(case):
    module = case.build()
    base = torch.randn(48, 3, 5, dtype=torch.float64)
    views = (base.permute(1, 2, 0), base.permute(2, 1, 0), base[:, 0].t(), base[:, 0, :1].expand(48, 4).t(),
             torch.randn(4, 96, dtype=torch.float64)[:, ::2])
    for x in views:
        assert not x.is_contiguous()
        torch.testing.assert_close(module(x), module(x.contiguous()), rtol=1e-12, atol=1e-12)
        module(x.detach().requires_grad_()).sum().backward()


@each_case
def test_a_wrong_input_width_is_refused(case):
    with pytest.raises(RuntimeError):
        case.build()(torch.randn(4, 24, dtype=torch.float64))


@each_case
@each_size
def test_autocast_gives_bf16_as_dense_does(case, sizes):
    module = case.build(*sizes, dtype=torch.float32)
    x = torch.randn(32, sizes[0])
    with torch.autocast('cpu', torch.bfloat16):
        y = module(x)
        assert module.dense_weight().dtype == torch.float32
        exact = relative_error(module.dense_weight(), copy.deepcopy(module).double().dense_weight())
    assert y.dtype == torch.bfloat16
    assert relative_error(y.float(), formula(module, x)) < 0.03
    assert exact < 1e-6                         # the product of factors is not taken in bf16
    y.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in module.parameters())


@each_case
def test_bf16_parameters_multiply_in_fp32(case):
    module = case.build(dtype=torch.bfloat16)
    exact = copy.deepcopy(module).double().dense_weight()
    weight = module.dense_weight()
    assert weight.dtype == torch.bfloat16
    assert (weight == exact.to(torch.bfloat16)).float().mean() > 0.99       # one rounding, at the end
    assert module(torch.randn(3, 48, dtype=torch.bfloat16)).dtype == torch.bfloat16


# ---------------------------------------------------------------------------------------------------
# accounting

@each_case
@each_size
def test_weight_numel_is_what_there_is(case, sizes):
    numel = case.cls.weight_numel(*sizes, **case.spec)
    for bias in (True, False):
        module = case.build(*sizes, bias)
        assert sum(p.numel() for p in module.parameters()) == numel + bias * sizes[1]
        assert (module.in_features, module.out_features) == sizes
    assert case.name == 'dense' or numel < sizes[0] * sizes[1]


@each_case
def test_size_argument_names_what_to_lower(case):
    if case.cls.size_argument is None:                  # dense has none, and a sum's parts have theirs
        return
    name = case.cls.size_argument
    assert name in inspect.signature(case.cls.weight_numel).parameters
    numels = [case.cls.weight_numel(48, 96, **{**case.spec, name: k}) for k in (1, 2, 3)]
    assert numels[0] < numels[1] < numels[2]


@each_case
def test_every_parameter_has_one_tag(case):
    module = case.build()
    tags = tags_of(module)
    assert list(tags) == [name for name, _ in module.named_parameters()]
    assert set(tags.values()) <= TAGS
    assert tags['bias'] == 'vector'


@pytest.fixture
def fewest_flops(monkeypatch):
    """The plan of fewest FLOPs, as on a GPU: by its cost on a CPU a small W would be formed."""
    monkeypatch.setattr(KroneckerLinear, 'plan', lambda self, tokens, kind: by_rule(self.rule, tokens))


@each_case
@each_size
def test_flops_are_those_of_forward(fewest_flops, case, sizes):
    module = case.build(*sizes)
    for tokens in (1, 6, 250):
        with FlopCounterMode(display=False) as counter:
            module(torch.randn(tokens, sizes[0], dtype=torch.float64))
        assert module.flops(tokens) == counter.get_total_flops()
        once = case.name != 'dense' and (forms_dense(case) or 'weight_norm' in repr(case))
        assert module.flops(tokens) == tokens * module.flops(1) or once


class Largest(TorchDispatchMode):
    """Records the most elements of any tensor that an operation returns."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(t.numel() for t in tree_leaves(result) if isinstance(t, torch.Tensor))])
        return result


def largest_tensor(module, in_features, tokens):
    """Elements of the largest tensor in one forward and backward."""
    x = torch.randn(tokens, in_features, dtype=torch.float64, requires_grad=True)
    with Largest() as record:
        module(x).square().sum().backward()
    return record.numel


@each_case
@each_size
def test_forward_and_backward_form_no_dense_matrix(fewest_flops, case, sizes):
    module = case.build(*sizes)
    largest = largest_tensor(module, sizes[0], tokens=3)
    if forms_dense(case):
        assert largest >= sizes[0] * sizes[1]           # and so the recorder sees one where there is one
    else:
        assert largest < sizes[0] * sizes[1]


@each_case
def test_the_recorder_sees_a_dense_matrix(case):
    """Negative control: the same map through dense_weight."""
    class Materialising(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return formula(self.inner, x)

    assert largest_tensor(Materialising(case.build()), 48, tokens=3) >= 48 * 96


@each_case
def test_memory_a_token_is_a_few_widths(case):
    """No tensor of tokens x factor, as the gradient of a broadcast factor would be."""
    tokens, numel = 512, case.cls.weight_numel(48, 96, **case.spec)
    assert largest_tensor(case.build(), 48, tokens) <= max(tokens * 4 * 96, numel)


# ---------------------------------------------------------------------------------------------------
# initialisation and construction

@each_case
@each_size
@pytest.mark.parametrize('std', [0.02, 0.3])
def test_reset_parameters_gives_the_std(case, sizes, std):
    module = case.build(*sizes)
    squares, means = [], []
    for seed in range(20):
        torch.manual_seed(seed)
        module.reset_parameters(std)
        assert not module.bias.any()
        weight = module.dense_weight().detach()
        squares.append(weight.square().mean().item())
        means.append(weight.mean().item())
    assert (sum(squares) / 20) ** 0.5 == pytest.approx(std, rel=0.05)
    assert abs(sum(means) / 20) < 0.1 * std
    assert len(set(squares)) > 1 or len(set(means)) > 1, 'every seed gave the same weight'


@each_case
def test_reset_parameters_follows_the_seed(case):
    first, second, third = (case.build(seed=s) for s in (3, 3, 4))
    assert torch.equal(first.dense_weight(), second.dense_weight())
    assert not torch.equal(first.dense_weight(), third.dense_weight())


@each_case
def test_meta_construction(case):
    with torch.device('meta'):
        module = case.cls(48, 96, True, **case.spec)
        assert module(torch.empty(5, 48)).shape == (5, 96)
    assert all(p.is_meta for p in module.parameters())
    assert sum(p.numel() for p in module.parameters()) == case.cls.weight_numel(48, 96, **case.spec) + 96
    module.to_empty(device='cpu').reset_parameters(0.02)
    assert module.dense_weight().std().item() == pytest.approx(0.02, rel=0.5)


@each_case
def test_state_dict_round_trip(case):
    source, target = case.build(seed=0), case.build(seed=1)
    x = torch.randn(3, 48, dtype=torch.float64)
    assert not torch.equal(source(x), target(x))
    target.load_state_dict(source.state_dict())
    assert torch.equal(source(x), target(x))


@each_case
def test_deepcopy_is_independent(case):
    source = case.build()
    x = torch.randn(3, 48, dtype=torch.float64)
    twin, before = copy.deepcopy(source), source(x)
    assert torch.equal(twin(x), before)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1)
    assert torch.equal(source(x), before) and not torch.equal(twin(x), before)


@each_case
@pytest.mark.parametrize('bad', [0, -1, 2.5, '8', None], ids=repr)
def test_bad_sizes_are_refused_in_one_sentence(case, bad):
    if case.name == 'dense':
        return
    for name in ('in_features', 'out_features', *(k for k, v in case.spec.items() if type(v) is int)):
        if name == 'exact_columns' and bad == 0:        # none
            continue
        arguments = {'in_features': 48, 'out_features': 96, **case.spec, name: bad}
        with pytest.raises(ValueError) as caught:
            case.cls.weight_numel(**arguments)
        assert name in str(caught.value) and repr(bad) in str(caught.value) and '\n' not in str(caught.value)
        with pytest.raises(ValueError):
            case.cls(bias=True, **arguments)


# ---------------------------------------------------------------------------------------------------
# from a dense matrix

@each_full
@each_size
def test_from_dense_of_full_rank_is_exact(case, sizes):
    torch.manual_seed(0)
    weight, bias = torch.randn(sizes[1], sizes[0], dtype=torch.float64), torch.randn(sizes[1], dtype=torch.float64)
    module = case.cls.from_dense(weight, bias, **case.spec)
    assert relative_error(module.dense_weight(), weight) < 1e-10
    x = torch.randn(5, sizes[0], dtype=torch.float64)
    assert relative_error(module(x), x @ weight.t() + bias) < 1e-10


@each_case
def test_from_dense_of_its_own_product_is_exact(case):
    source = case.build()
    module = case.cls.from_dense(source.dense_weight(), source.bias, method='van_loan', stats=None, **case.spec)
    assert type(module) is case.cls
    example = TESTED[case.name]
    limit = example.get('fits', 1.0 if case.spec in example.get('local', []) else 1e-10)
    assert relative_error(module.dense_weight(), source.dense_weight()) < limit


@each_case
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_from_dense_keeps_bias_dtype_and_the_original(case, dtype):
    torch.manual_seed(0)
    weight, bias = nn.Parameter(torch.randn(96, 48, dtype=dtype)), nn.Parameter(torch.randn(96, dtype=dtype))
    before = weight.detach().clone(), bias.detach().clone()
    module = case.cls.from_dense(weight, bias, **case.spec)
    assert torch.equal(module.bias, bias)
    assert all(p.dtype == dtype and p.requires_grad and p.is_leaf and not p.is_meta for p in module.parameters())
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1)
    assert torch.equal(weight, before[0]) and torch.equal(bias, before[1])
    assert case.cls.from_dense(weight, None, **case.spec).bias is None


@each_case
def test_from_dense_refuses_an_unknown_method(case):
    if case.name == 'dense':                    # every method is exact for it
        return
    with pytest.raises(ValueError, match='van_loan'):
        case.cls.from_dense(torch.randn(96, 48), None, method='no_such_method', **case.spec)


# ---------------------------------------------------------------------------------------------------
# in a model

def as_text(case):
    """The case as a spec."""
    return ' + '.join(case.spec['parts']) if case.name == 'sum' else str(Spec(case.name, (), case.spec))


def model_of(case, **changes):
    """A small model with it in the MLPs: 48 -> 96 -> 48."""
    torch.manual_seed(0)
    return GPT(GPTConfig(n_layer=2, n_head=4, n_embd=48, block_size=8, vocab_size=17, mlp='swiglu(96)',
                         linear={'h.*.mlp.*': as_text(case)}, **changes)).double().eval()


@each_case
def test_zeros_in_its_zero_factor_make_it_zero_and_it_learns(case):
    module = case.build(bias=False)
    assert module.zero_factor, f'{case.cls.__name__} lacks zero_factor: name parameters whose zeros make W zero'
    zero_(module)
    assert not module.dense_weight().any(), f'W is not 0 with zeros in {module.zero_factor!r}: name others in zero_factor'
    x = torch.randn(5, 48, dtype=torch.float64)
    (module(x) * torch.randn(5, 96, dtype=torch.float64)).sum().backward()
    assert any(module.get_parameter(name).grad.any() for name in module.zero_factor.split()), (
        f'with zeros in {module.zero_factor!r} nothing gets a gradient: name fewer parameters in zero_factor')


@each_case
def test_a_model_has_it_grows_with_it_and_makes_it_dense(case):
    """zero_init, add_block, the site table, realise and a checkpoint's state dict."""
    x = torch.arange(8)[None]
    first, model = model_of(case, zero_init=True), model_of(case)
    assert not first.transformer.h[0].mlp.c_proj.dense_weight().any()
    assert {row['spec'] for row in model.site_table() if '.mlp.' in row['site']} == {
        'dense' if case.name == 'dense' else as_text(case)}
    before = model(x, x)[0]
    model.add_block()
    assert torch.equal(model(x, x)[0], before)
    again = GPT(model.config).double().eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x, x)[0], before)
    again.realise()
    assert (again(x, x)[0] - before).abs().max() < 1e-10


@each_case
def test_ngpt_makes_unit_rows_or_is_refused_in_a_sentence(case):
    try:
        model = model_of(case, ngpt='full')
    except UserError as error:
        assert '\n' not in str(error) and error.key == 'ngpt'
        return
    rows = model.transformer.h[0].mlp.c_fc.dense_weight().norm(dim=1)
    assert (rows - 1).abs().max() < 1e-5


@each_case
def test_it_is_a_part_of_a_sum(case):
    if case.name in ('dense', 'sum') or 'exact_columns' in case.spec:
        return
    parts = as_text(case), 'lowrank(1)'
    module = LINEARS['sum'](48, 96, True, parts).double()
    x = torch.randn(3, 48, dtype=torch.float64)
    assert relative_error(module(x), formula(module, x)) < 1e-10
    weight = torch.randn(96, 48, dtype=torch.float64)
    alone = case.cls.from_dense(weight, None, **case.spec).dense_weight()
    both = LINEARS['sum'].from_dense(weight, None, parts=parts).dense_weight()
    assert (weight - both).norm() <= (weight - alone).norm() * (1 + 1e-10)


# ---------------------------------------------------------------------------------------------------
# compilation and imports

def assert_compiled_equals_eager(case, backend):
    torch._dynamo.reset()
    module = case.build(dtype=torch.float32)
    compiled = torch.compile(module, backend=backend, fullgraph=True)           # a graph break is an error
    for tokens in (8, 12):
        x = torch.randn(tokens, 48, requires_grad=True)
        assert relative_error(compiled(x), module(x)) < 1e-5
        for mine, expected in zip(gradients(module, x, compiled), gradients(module, x, module)):
            assert relative_error(mine, expected) < 1e-5


@each_case
def test_traces_without_a_graph_break(case):
    assert_compiled_equals_eager(case, 'aot_eager')


@pytest.mark.slow
@each_case
def test_compiled_equals_eager(case):
    assert_compiled_equals_eager(case, 'inductor')


@pytest.mark.parametrize('name', list(LINEARS))
def test_its_package_imports_torch_layers_and_itself_only(name):
    path = LINEARS[name].__module__
    package = path.partition('.')[0]
    allowed = {'torch', 'layers', 'variants', package, *sys.stdlib_module_names}
    tree = ast.parse(inspect.getsource(importlib.import_module(path)))
    names = [a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names]
    names += [node.module or '' for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert {n.partition('.')[0] for n in names} <= allowed
