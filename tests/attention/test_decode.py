"""decoding.py: static steps give the eager text, compiled as one graph, and captured (on a CPU by a tape that stands in)."""
import copy
import dataclasses
import pickle

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from attention import decoding, heads
from kron import timing
from kron.linear import KroneckerLinear
from model import GPT, GPTConfig

BASE = GPTConfig(block_size=64, vocab_size=65, n_layer=2, n_head=4, n_embd=32, tie_weights=False)
MODELS = {
    'dense': {},
    'grouped': dict(n_kv_head=2, rope=True, attention={'h.0': 'window(7)', '*': 'causal'}),
    'kron': dict(linear={'*.attn.*': 'kron(4, 4, terms=2)', '*': 'kron(8, 4)'}),
    'lowrank': dict(linear='lowrank(3)', attention='dint'),
    'kron_moe': dict(mlp='kron_moe(8)'),
    'sum': dict(linear={'*.c_fc': 'kron(8, 4) + lowrank(2)', '*.c_proj': 'abba(1, 2)'}, attention='linformer(2, chunk=8)'),
}


def build(name, dtype=torch.float64, **changes):
    """A model all of whose parameters are random."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = GPT(dataclasses.replace(BASE, **MODELS.get(name, {}), **changes)).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def prompt(rows=2, length=5):
    return torch.randint(65, (rows, length), generator=torch.Generator().manual_seed(1))


def text(model, idx, decode, count=50, temperature=1.0, device='cpu', **more):
    """(B, count) sampled tokens."""
    generator = torch.Generator(device).manual_seed(3)
    return torch.cat([*model.stream(idx, count, temperature, generator=generator, decode=decode, **more)], 1)


def same_texts(model, idx, **more):
    for temperature in (0, 1.0):
        eager = text(model, idx, 'eager', temperature=temperature)
        assert torch.equal(text(model, idx, temperature=temperature, **{'decode': 'static', **more}), eager)
    assert len(eager.unique()) > 8, 'few tokens say little'


@pytest.mark.parametrize('changes', [{}, {'attention': 'mla(12, qk_rope_head_dim=4)'}, {'attention': 'diff', 'rope': True}])
def test_a_cache_grows_beyond_its_first_room(changes, monkeypatch):
    """A context of 8,192 tokens takes no memory for them before they come."""
    idx, model = prompt(), build('dense', **changes)
    wanted = text(model, idx, 'eager')
    monkeypatch.setattr(heads, 'ROOM', 8)
    assert torch.equal(text(model, idx, 'eager'), wanted) and torch.equal(text(model, idx, 'static'), wanted)
    caches = [{} for _ in model.transformer.h]
    for start in range(9):
        model(idx[:, start % 5, None], caches=caches, start=start)
    sizes = {t.size(2) for cache in caches for t in cache.values() if torch.is_tensor(t)}
    assert sizes == {18} and {cache['length'] for cache in caches} == {9}


@pytest.fixture
def steps(monkeypatch):
    """A list with an entry for every static step that was made."""
    made, plain = [], decoding.Step.record
    monkeypatch.setattr(decoding.Step, 'record', lambda step, *more: (made.append(step), plain(step, *more)) and None)
    return made


# ---------------------------------------------------------------------------------------------------
# texts, in eager mode

@pytest.mark.parametrize('dtype', [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize('name', MODELS)
def test_static_text_is_the_eager_text_also_past_block_size(name, dtype, steps):
    model = build(name, dtype)
    same_texts(model, prompt())
    assert torch.equal(text(model, prompt(1), 'static', 70), text(model, prompt(1), 'eager', 70))
    assert torch.equal(text(model, prompt(2, 1), 'static'), text(model, prompt(2, 1), 'eager'))
    assert len(steps) == 3                              # one a batch size and turn; the second of same_texts takes the first


def test_a_mixture_takes_more_choices_than_experts(steps):
    same_texts(build('kron_moe'), prompt(5))            # 10 choices, 8 experts
    assert len(steps) == 1


@pytest.mark.parametrize('name', ['dense', 'kron', 'lowrank', 'kron_moe'])
def test_under_autocast_logits_are_the_eager_ones(name):
    """Weights of dense linears are cast once, and are what autocast makes of them."""
    model, idx = build(name, torch.float32, tie_weights=True), prompt(2, 30)
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        caches = [{} for _ in model.transformer.h]
        model(idx[:, :8], caches=caches)
        step = decoding.prepared(model, copy.deepcopy(caches), idx[:, :1], 8, False)
        for t in range(8, 30):
            eager = model(idx[:, t:t + 1], caches=caches, start=t)[0]
            found = step(idx[:, t:t + 1], t)
            assert found.dtype == eager.dtype and (found - eager).abs().max() < 0.02 * eager.abs().max()
        assert step.model.lm_head.weight.dtype == torch.bfloat16 and step.model.transformer.wte.weight.dtype == torch.float32
    assert model.lm_head.weight is model.transformer.wte.weight and model.lm_head.weight.dtype == torch.float32


def test_bf16_models_follow_float64():
    exact = build('grouped')
    model, idx = copy.deepcopy(exact).bfloat16(), prompt(2, 40)
    with torch.no_grad():
        caches = [{} for _ in model.transformer.h]
        model(idx[:, :8], caches=caches)
        step = decoding.prepared(model, caches, idx[:, :1], 8, False)
        for t in range(8, 40):
            expected, found = exact(idx[:, :t + 1])[0], step(idx[:, t:t + 1], t)
            assert found.dtype == torch.bfloat16 and (found.double() - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize('spec', ['causal', 'window(40)', 'mla(12, qk_rope_head_dim=4)', 'diff'])
def test_what_a_buffer_held_before_does_no_harm(spec, monkeypatch):
    monkeypatch.setattr(torch.Tensor, 'new_empty', lambda t, *size: t.new_full(size, torch.iinfo(t.dtype).min // 2
                                                                               if t.dtype == torch.long else torch.nan))
    same_texts(build('dense', attention=spec), prompt())


# ---------------------------------------------------------------------------------------------------
# when

def test_a_cpu_decodes_eagerly_by_default(steps):
    model = build('dense')
    assert torch.equal(text(model, prompt(), 'auto'), text(model, prompt(), 'eager')) and not steps
    with pytest.raises(ValueError, match='decode is one of auto, eager, static'):
        text(model, prompt(), 'graph')


def test_what_has_no_static_step_is_decoded_eagerly(steps, monkeypatch):
    same_texts(build('dense'), prompt(2), use_cache=False)
    assert not decoding.able(build('dense').train())
    monkeypatch.delattr('model.CausalSelfAttention.static_cache')
    same_texts(build('dense'), prompt())
    assert not steps


# ---------------------------------------------------------------------------------------------------
# one step per model

def test_a_step_is_kept_for_the_next_text_while_nothing_has_changed(steps):
    model = build('kron')
    for _ in range(2):
        same_texts(model, prompt())
    assert len(steps) == 1
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.B.mul_(1.5)
    same_texts(model, prompt())
    model.transformer.h[1].mlp.c_fc.plans = ((10 ** 9, 'materialise'),), ()
    same_texts(model, prompt())
    model.realise()
    same_texts(model, prompt())
    assert len(steps) == 4


def test_two_texts_at_once_have_a_step_each(steps):
    model = build('dense')
    alone = [text(model, idx, 'eager') for idx in (prompt(), prompt().flip(0))]
    text(model, prompt(), 'static')                     # leaves a step, which one of the two takes
    streams = [model.stream(idx, 50, generator=torch.Generator().manual_seed(3), decode='static')
               for idx in (prompt(), prompt().flip(0))]
    both = [torch.cat(tokens, 1) for tokens in zip(*zip(*streams))]
    assert all(torch.equal(*pair) for pair in zip(alone, both)) and len(steps) == 2


def test_copies_and_pickles_take_no_step_with_them(steps):
    model = build('dense')
    text(model, prompt(), 'static')
    assert model.kept.step is not None
    assert copy.deepcopy(model).kept.step is None and pickle.loads(pickle.dumps(model.kept)).step is None
    assert not any('kept' in name for name in model.state_dict())


def test_a_step_shares_the_weights(steps):
    model = build('lowrank')
    text(model, prompt(), 'static')
    shared = {p.data_ptr() for p in model.parameters()}
    assert {p.data_ptr() for p in steps[0].model.parameters()} == shared


# ---------------------------------------------------------------------------------------------------
# compiled

def graphs(model, idx, backend, **more):
    """Graphs that static steps of two texts are compiled to; texts are compared."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    same_texts(model, idx, compile=counter, **more)
    return counter.frame_count


@pytest.mark.parametrize('name', ['dense', 'grouped', 'kron', pytest.param('lowrank', marks=pytest.mark.slow),
                                  'kron_moe', pytest.param('sum', marks=pytest.mark.slow)])
def test_one_graph_serves_fifty_tokens(name):
    assert graphs(build(name, torch.float32), prompt(), 'aot_eager') == 1


@pytest.mark.slow
@pytest.mark.parametrize('name', MODELS)
def test_inductor_too(name):
    assert graphs(build(name, torch.float32), prompt(), 'inductor') == 1


# ---------------------------------------------------------------------------------------------------
# Kronecker sums whose W is formed once

def merging(dtype=torch.float32):
    """A model whose Kronecker sums form W for single tokens and keep it, as timing.prepare may leave them."""
    model = build('kron', dtype)
    for module in timing.kronecker(model):
        module.merge, module.plans = True, (((4, 'materialise'), (10 ** 9, 'b_rows')), ())
    return model


@pytest.fixture
def formed(monkeypatch):
    """A list with an entry for every W that is formed, eagerly or while a graph is traced."""
    calls, plain = [], KroneckerLinear.product_weight
    monkeypatch.setattr(KroneckerLinear, 'product_weight', lambda module: calls.append(module) or plain(module))
    monkeypatch.setattr('kron.lean.form', None)         # the plan itself forms it anew: not once here
    return calls


@pytest.mark.parametrize('compile', [False, 'aot_eager'])
def test_a_kept_w_is_formed_once(formed, compile):
    model = merging()
    torch._dynamo.reset()
    assert len(timing.kronecker(model)) == 12
    for _ in range(2):
        formed.clear()
        static = text(model, prompt(), 'static', compile=compile)       # before any eager call that would keep them
        assert len(formed) == 12
        assert torch.equal(static, text(model, prompt(), 'eager')) and len(formed) <= 24
        with torch.no_grad():
            for module in timing.kronecker(model):
                module.B.mul_(1.2)


# ---------------------------------------------------------------------------------------------------
# captured: a tape in place of a CUDA graph

class Tape(TorchDispatchMode):
    """Records the operations of a call with the very tensors they had, and repeats them: what Python did is not repeated."""
    waits = ('aten::_local_scalar_dense', 'aten::nonzero', 'aten::equal', 'aten::is_nonzero', 'aten::unique')

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert not function.name().startswith(self.waits), f'{function.name()} waits for the device'
        out = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, out))
        return out

    def replay(self):
        for function, args, kwargs, out in self.calls:
            for old, new in zip(tree_leaves(out), tree_leaves(function(*args, **kwargs))):
                if torch.is_tensor(old) and old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                    old.copy_(new)


def taped(call, device):
    call()
    with Tape() as tape:
        output = call()
    return tape, output


@pytest.fixture
def tape(monkeypatch):
    monkeypatch.setitem(decoding.CAPTURE, 'cpu', taped)


SPECS = ['causal(gate=True, softcap=5.0)', 'window(6, documents=54)', 'linformer(2, chunk=8, dynamic=True)',
         'mla(12, qk_rope_head_dim=4)', 'diff(version=2)', 'dint(version=2, documents=54)', 'dint(documents=54)',
         'mla_dint(12, qk_rope_head_dim=4)']


@pytest.mark.parametrize('spec', SPECS)
def test_captured_text_is_the_eager_text(spec, tape, steps):
    """Nothing of a step is left to Python, and no operation waits for the device."""
    model = build('dense', attention=spec)
    same_texts(model, prompt(), decode='auto')
    assert len(steps) == 1 and isinstance(steps[0].graph, Tape)


@pytest.mark.parametrize('name', MODELS)
def test_captured_structures(name, tape):
    same_texts(build(name, torch.float32), prompt(), decode='auto')


def test_a_captured_step_follows_weights_and_kept_matrices(tape, steps):
    model = merging(torch.float64)
    same_texts(model, prompt())
    model.train().eval()                                # forgets the matrices, which the step still reads
    same_texts(model, prompt())
    assert len(steps) == 1
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.1)
    same_texts(model, prompt())
    assert len(steps) == 2


def test_few_tokens_do_not_pay_for_a_capture(tape, steps):
    text(build('dense'), prompt(), 'auto', count=decoding.ENOUGH)
    text(build('dense'), prompt(length=60), 'auto', count=50)          # block_size leaves 4
    assert not steps
    text(build('dense'), prompt(), 'auto', count=decoding.ENOUGH + 1)
    assert len(steps) == 1


def test_a_tape_finds_a_number_that_is_read():
    """Negative control."""
    with pytest.raises(AssertionError, match='_local_scalar_dense waits'):
        taped(lambda: int(torch.ones(3).sum()), None)


# ---------------------------------------------------------------------------------------------------
# on a GPU

@pytest.mark.gpu
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize('name', [*MODELS, *SPECS])
def test_cuda_graphs_give_the_eager_text(name, dtype, steps):
    model = build(name, dtype, **({} if name in MODELS else {'attention': name})).cuda()
    for _ in range(2):
        same = [text(model, prompt().cuda(), decode, device='cuda') for decode in ('eager', 'auto')]
        assert torch.equal(*same)
    assert len(steps) == 1 and steps[0].graph is not None


@pytest.mark.gpu
@pytest.mark.parametrize('name', ['dense', 'kron', 'lowrank'])
def test_cuda_graphs_under_autocast_and_kept_matrices(name, steps):
    model, idx = build(name, torch.float32).cuda(), prompt(2, 40).cuda()
    for module in timing.kronecker(model):
        module.merge, module.plans = True, (((10 ** 9, 'materialise'),), ())
    for _ in range(2):                                  # the second time autocast's cache of the first is gone
        with torch.no_grad(), torch.autocast('cuda', torch.bfloat16):
            caches = [{} for _ in model.transformer.h]
            model(idx[:, :8], caches=caches)
            step = decoding.prepared(model, caches, idx[:, :1], 8, False)
            for t in range(8, 40):
                eager = model(idx[:, t:t + 1], caches=caches, start=t)[0]
                found = step(idx[:, t:t + 1], t)
                assert (found - eager).abs().max() < 0.03 * eager.abs().max()
        model.kept.step = step
    assert len(steps) == 1


@pytest.mark.gpu
def test_a_compiled_step_is_captured(steps):
    model = build('kron', torch.float32).cuda()
    torch._dynamo.reset()
    with torch.no_grad():
        exact = model(prompt(2, 30).cuda())[0]
        caches = [{} for _ in model.transformer.h]
        model(prompt(2, 30).cuda()[:, :29], caches=caches)
        step = decoding.prepared(model, caches, prompt(2, 1).cuda(), 29, True)
        assert (step(prompt(2, 30).cuda()[:, 29:], 29) - exact).abs().max() < 1e-3 * exact.abs().max()
    assert step.graph is not None
