"""torch.compile: one graph for every model, the gradients of the eager one, and no recompilation but for new shapes."""
import ast
import itertools

import pytest
import torch

from attention.window import WindowAttention
from decomposition import wide
from kron import fused, lean, products
from kron.linear import KroneckerLinear
from kron.plan import by_rule
from layers.distillation import Distilled
from layers.losses import ChunkedCrossEntropy
from lowrank.pivot import Reordered
from tests import compiled
from tests.contract.test_attention import SPECS as ATTENTION
from tests.contract.test_linears import EXAMPLES, TESTED
from tests.contract.test_mlps import SPECS as MLP
from tests.tiny import ROOT
from variants import LINEARS

# ----------------------------------------------------------------------------------------------------
# our autograd.Functions return tensors of their own: torch 2.11 loses gradients of a returned view of an input

SIZES = list(itertools.product((1, 3), repeat=4))           # with sizes of 1, where a transposed tensor lies right


def random(*shape):
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


# Function -> arguments for four sizes
FUNCTIONS = {
    'Interleave': (products.Interleave, lambda a, b, c, d: (random(a, b),)),
    'BFirst': (lean.BFirst, lambda a, b, c, d: (random(a, b * c), random(d, 3, b), random(d, a, c), a % 2)),
    'Materialised': (lean.Materialised, lambda a, b, c, d: (random(a, b * c), random(d, 3, b), random(d, a, c))),
    'Reordered': (Reordered, lambda a, b, c, d: (random(a, b), torch.arange(b))),
    'ChunkedCrossEntropy': (ChunkedCrossEntropy,
                            lambda a, b, c, d: (random(a, b), random(c, b), torch.zeros(a).long(), 0.0, d)),
    'Distilled': (Distilled, lambda a, b, c, d: (random(a, b), random(c, b), torch.zeros(a).long(), random(a, b).detach(),
                                                 None, random(c, b).detach(), (0.0, 0.0, 0.5, 1.0, d))),
    'Product': (wide.Product, lambda a, b, c, d: (random(a, b).detach().float().requires_grad_(),
                                                  random(c, b).detach().half())),
    'Mix': (fused.Mix, lambda a, b, c, d: (random(a, b, c), random(b, d))),
    'Unmix': (fused.Unmix, lambda a, b, c, d: (random(a, b, c), random(d, c))),
}


def shared(tensors, others):
    """Whether any two tensors of the lists lie in one storage."""
    found = ({t.untyped_storage().data_ptr() for t in some if isinstance(t, torch.Tensor) and t.numel()}
             for some in (tensors, others))
    return bool(set.intersection(*found))


def test_every_function_of_ours_is_in_the_list():
    found = {node.name for path in ROOT.rglob('*.py') if not {'.venv', '.venv-oldest', 'tests'} & set(path.parts)
             for node in ast.walk(ast.parse(path.read_text(encoding='utf-8')))
             if isinstance(node, ast.ClassDef) and any('autograd.Function' in ast.unparse(base) for base in node.bases)}
    assert found == set(FUNCTIONS), 'add the arguments of a new autograd.Function to FUNCTIONS'


@pytest.mark.parametrize('name', list(FUNCTIONS))
def test_a_function_returns_no_view_of_what_it_was_given(name):
    """Forward: of an argument; backward: of the gradient that came in."""
    function, arguments = FUNCTIONS[name]
    if name in ('Mix', 'Unmix') and not fused.available('cpu'):
        pytest.skip('kernels run on a CPU with TRITON_INTERPRET=1 alone, see test_fused.py')
    for sizes in SIZES:
        given = arguments(*sizes)
        y = function.apply(*given)
        assert not shared([y], given), sizes
        gradient = torch.ones_like(y)
        wanted = [t for t in given if isinstance(t, torch.Tensor) and t.requires_grad]
        assert not shared(torch.autograd.grad(y, wanted, gradient), [gradient]), sizes


def test_the_check_finds_a_view():
    """Negative control: what Interleave did for one plane."""
    class View(torch.autograd.Function):
        @staticmethod
        def forward(ctx, planes):
            return planes.t().contiguous()
    planes = random(1, 3)
    assert shared([View.apply(planes)], [planes]) and not shared([View.apply(random(2, 3))], [planes])


# ----------------------------------------------------------------------------------------------------
# gradients

ENTRIES = compiled.entries()
QUICK = ('linear kron', 'attention causal', 'mlp kron_moe(4)', 'one column, one row', 'recipe, kron, recomputed')
PROPER = [*(f'linear {name}' for name in TESTED), *(f'attention {specs[0]}' for specs in ATTENTION.values()),
          *(f'mlp {specs[0]}' for specs in MLP.values()), *compiled.COMBINATIONS]


def some_slow(labels, quick):
    return [label if label in quick else pytest.param(label, marks=pytest.mark.slow) for label in labels]


def test_every_linear_has_rules():
    assert set(compiled.RULES) == set(EXAMPLES), 'add rules of a linear that is kept here to RULES in tests/compiled.py'


@pytest.mark.parametrize('label', some_slow(ENTRIES, QUICK))
def test_compiled_gradients_are_the_eager_ones(label):
    count, wrong = compiled.compared(ENTRIES[label], 'aot_eager')
    assert count >= 18 and not wrong


@pytest.mark.slow
@pytest.mark.parametrize('label', PROPER)
def test_gradients_by_the_compiler_proper_are_the_eager_ones(label):
    count, wrong = compiled.compared(ENTRIES[label], 'inductor')
    assert count >= 18 and not wrong


def test_a_lost_gradient_is_found(monkeypatch):
    """Negative control: one gradient of Interleave's is another."""
    monkeypatch.setattr(KroneckerLinear, 'plan', lambda self, tokens, kind: by_rule(self.rule, tokens))    # no W is formed
    monkeypatch.setattr(products.Interleave, 'backward', staticmethod(lambda ctx, gradient: 1.01 * gradient.t().clone()))
    eager = compiled.gradients
    monkeypatch.setattr(compiled, 'gradients', lambda model, run, x, y: (monkeypatch.undo() if run is not model else None)
                        or eager(model, run, x, y))
    assert compiled.compared(ENTRIES['one column, one row'], 'aot_eager')[1]


# ----------------------------------------------------------------------------------------------------
# graphs

CONFIGS = ('config/gpt2_kron_mlp.py', 'config/kron_moe.py', 'config/train_gpt.py')


@pytest.mark.parametrize('path', some_slow(compiled.TRAINED, CONFIGS))
@pytest.mark.parametrize('recompute', [False, True])
def test_every_config_is_one_graph_and_compiles_anew_for_new_shapes_only(path, recompute):
    """Twenty steps of a run whose windows move and whose batches and contexts grow."""
    first, more, shapes = compiled.graphs(path, recompute=recompute)
    assert first == 1 and shapes == 3
    assert more <= shapes - 1, f'{more} recompilations for {shapes} shapes'


@pytest.mark.slow
@pytest.mark.parametrize('linear', compiled.RULES)
@pytest.mark.parametrize('attention', ATTENTION)
def test_every_combination_is_one_graph(linear, attention):
    for mlp, recompute in itertools.product(MLP, (False, True)):
        fields = dict(linear=compiled.RULES[linear], attention=ATTENTION[attention][0], mlp=MLP[mlp][0], rope=True,
                      value_residual=True, recompute=recompute)
        assert compiled.graphs_of(fields) == 1, (mlp, recompute)


def test_the_count_finds_a_break(monkeypatch):
    """Negative control: a linear that asks for a number."""
    forward = LINEARS['dense'].forward
    monkeypatch.setattr(LINEARS['dense'], 'forward', lambda self, x: forward(self, x * float(x.sum() == x.sum())))
    assert compiled.graphs_of({}) > 1


MOVING = dict(attention="window(1024, schedule='linear', long=(0,))")


def test_moving_windows_recompile_nothing():
    assert compiled.recompilations(MOVING) == 0


def test_the_count_finds_a_recompilation(monkeypatch):
    """Negative control: a window that is a plain number is compiled in."""
    def set_progress(self, fraction):
        self._buffers.pop('window', None)
        self.window = self.window_at(fraction)
    monkeypatch.setattr(WindowAttention, 'set_progress', set_progress)
    assert compiled.recompilations(MOVING) > 0
