"""Sliding windows: the mask, its reach, the ring of keys, schedules, documents, FlexAttention, checkpoints."""
import math

import pytest
import torch
from torch.nn import functional as F

import configurator
import train
from attention import window
from attention.window import scheduled
from decomposition import initialise
from model import GPT, Context, GPTConfig
from tests.tiny import arguments, make_data
from variants import UserError

SMALL = dict(block_size=48, vocab_size=65, n_layer=2, n_head=4, n_embd=32)


def small(attention, dtype=torch.float64, **settings):
    """A model with random parameters, the same for every attention that has the same ones."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**SMALL, 'attention': attention, **settings})).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def tokens(*shape, seed=0):
    return torch.randint(1, 65, shape, generator=torch.Generator().manual_seed(seed))


def logits_of(model, idx, **more):
    return model(idx, idx, **more)[0]


def difference(a, b):
    return (a - b).abs().max().item()


def in_pieces(model, idx, pieces):
    """(logits, caches) of idx read in pieces."""
    caches, start, found = [{} for _ in model.transformer.h], 0, []
    for n in pieces:
        found.append(logits_of(model, idx[:, start:start + n], caches=caches, start=start))
        start += n
    return torch.cat(found, 1), caches


def attention_by_formula(model, x, size, documents=None):
    """Softmax over t - size < j <= t of the same document, one query at a time, in the first block of a model."""
    attn, H = model.transformer.h[0].attn, model.config.n_head
    q, k, v = (c(x).unflatten(-1, (H, -1)).transpose(1, 2) for c in (attn.c_q, attn.c_k, attn.c_v))
    y = torch.empty_like(q)
    for b in range(x.size(0)):
        for t in range(x.size(1)):
            seen = [j for j in range(max(0, t - size + 1), t + 1)
                    if documents is None or documents[b][j] == documents[b][t]]
            weights = torch.softmax((k[b, :, seen] @ q[b, :, t, :, None])[..., 0] / math.sqrt(q.size(-1)), -1)
            y[b, :, t] = (weights[..., None] * v[b, :, seen]).sum(1)
    return attn.c_proj(y.transpose(1, 2).flatten(2))


def attention_of(model, idx, **more):
    """(input, output) of the first block's attention."""
    held = []
    hook = model.transformer.h[0].attn.register_forward_hook(lambda module, inputs, out: held.extend((inputs[0], out)))
    logits_of(model, idx, **more)
    hook.remove()
    return held


# ---------------------------------------------------------------------------------------------------
# mask and reach

@pytest.mark.parametrize('dtype, bound', [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize('size', [1, 2, 7, 24, 48, 1000])
@torch.no_grad()
def test_w1_equals_the_masked_softmax_of_the_formula(size, dtype, bound):
    model = small(f'window({size})', dtype)
    x, y = attention_of(model, tokens(2, 24))
    expected = attention_by_formula(model, x, size)
    assert difference(y, expected) < bound * max(1, expected.abs().max().item())
    if 1 < size < 24:
        assert difference(y, attention_by_formula(model, x, size + 1)) > 1e-3


@pytest.mark.parametrize('settings', [{}, dict(rope=True, n_kv_head=2, qk_norm='standard'), dict(ngpt='full'),
                                      dict(value_residual=True, ngpt='simple', rope=True)], ids=str)
@torch.no_grad()
def test_w1_a_window_of_all_tokens_is_causal_attention(settings):
    idx = tokens(2, 48)
    causal = logits_of(small('causal', **settings), idx)
    assert difference(logits_of(small('window(48)', **settings), idx), causal) < 1e-10
    assert difference(logits_of(small('window(47)', **settings), idx), causal) > 1e-6


@pytest.mark.parametrize('size', [1, 3, 8])
@torch.no_grad()
def test_w2_the_last_token_inside_counts_and_the_first_outside_does_not(size):
    model, idx, t = small(f'window({size})', n_layer=1), tokens(1, 30), 20
    full = logits_of(model, idx)
    for back, same in ((size, True), (size - 1, False)):
        other = idx.clone()
        other[0, t - back] = other[0, t - back] % 64 + 1
        assert torch.equal(logits_of(model, other)[:, t], full[:, t]) == same, back


@pytest.mark.parametrize('layers', [1, 2, 3])
def test_w3_layers_reach_back_one_window_each(layers):
    size, t, held = 4, 20, []
    model = small(f'window({size})', n_layer=layers)
    model.transformer.wte.register_forward_hook(lambda module, inputs, out: held.append(out))
    logits = logits_of(model, tokens(1, 24))
    grad, = torch.autograd.grad(logits[:, t].square().sum(), held[0])
    far = t - layers * (size - 1)
    assert not grad[:, :far].any() and grad[:, far].any() and not grad[:, t + 1:].any()


# ---------------------------------------------------------------------------------------------------
# the ring

PIECES = [[1] * 40, [13] + [1] * 27, [3, 20, 1, 1, 9, 6], [5, 5, 4, 1, 25], [40]]


@pytest.mark.parametrize('settings', [{}, dict(rope=True, n_kv_head=1, value_residual=True)], ids=str)
@pytest.mark.parametrize('attention', ['window(1)', 'window(5)', 'window(13)', 'window(60)', 'window(8, long=(1,))',
                                       'window(6, documents=3)'])
@torch.no_grad()
def test_w4_ring_decode_goes_past_the_window(attention, settings):
    model, idx = small(attention, **settings), tokens(2, 40)
    idx[0, [9, 10, 23]] = idx[1, [0, 13]] = 3
    full = logits_of(model, idx)
    for pieces in PIECES:
        assert difference(in_pieces(model, idx, pieces)[0], full) < 1e-10, pieces


@pytest.mark.parametrize('size, kept', [(5, 5), (1, 1), (100, 48)])
@torch.no_grad()
def test_w4_the_ring_holds_2_d_w_numbers(size, kept):
    model = small(f'window({size})')
    for pieces in ([1] * 30, [17, 13]):
        for cache in in_pieces(model, tokens(1, 30), pieces)[1]:
            floats = [t for t in cache.values() if torch.is_tensor(t) and t.is_floating_point()]
            assert sum(t.numel() for t in floats) == 2 * 32 * kept
            assert {t.untyped_storage().nbytes() // t.itemsize for t in floats} == {32 * kept}


@torch.no_grad()
def test_w4_keys_are_stored_at_their_absolute_positions():
    """Turned again at their place in the ring they would be wrong, which one write beyond the ring would show."""
    model, idx = small('window(4)', rope=True), tokens(1, 12)
    cache = in_pieces(model, idx, [1] * 12)[1][0]
    x = model.transformer.h[0].ln_1(model.transformer.wte(idx))
    k = model.transformer.h[0].attn.c_k(x).unflatten(-1, (4, 8)).transpose(1, 2)[0, :, 8:]      # positions 8 .. 11
    frequency = 10000.0 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    phase = torch.polar(torch.ones(4, 4, dtype=torch.float64), torch.arange(8, 12).double()[:, None] * frequency)
    turned = torch.view_as_real(torch.view_as_complex(k.unflatten(-1, (4, 2)).contiguous()) * phase).flatten(-2)
    assert difference(cache['k'][0], turned) < 1e-10


@torch.no_grad()
def test_w4_text_is_the_same_with_and_without_the_ring():
    model, idx = small('window(6, documents=3)', rope=True), tokens(2, 5)
    texts = [model.generate(idx, 60, temperature=0, use_cache=use_cache) for use_cache in (True, False)]
    assert torch.equal(*texts) and len(set(texts[0].flatten().tolist())) > 3


# ---------------------------------------------------------------------------------------------------
# schedules

X = (0, .05, .1, .2, .3, .4, .5, .6, .7, .8, .9, 1)
CUBIC = (128, 512, 896, 1408, 1664, 1792, 1792, 1792, 1920, 2176, 2688, 3456)
LINEAR = (128, 128, 256, 384, 640, 768, 896, 1152, 1280, 1408, 1664, 1792)


def test_w5_schedules_equal_the_table():
    assert tuple(scheduled(3456, 'cubic', x) for x in X) == CUBIC
    assert tuple(scheduled(1728, 'linear', x) for x in X) == LINEAR


def test_w5_schedules_grow_in_steps_of_128_and_end_at_their_size():
    for schedule in ('linear', 'cubic'):
        for size in (128, 200, 1024, 1280):
            found = [scheduled(size, schedule, i / 1000) for i in range(1001)]
            assert found == sorted(found) and found[0] == 128 and found[-1] == math.ceil(size / 128) * 128
            assert all(w % 128 == 0 for w in found)
        assert scheduled(1280, schedule, -1) == 128 and scheduled(1280, schedule, 7) == 1280
    assert scheduled(1280, 'linear', 0.3) == 384 and scheduled(1920, 'linear', 0.7) == 1344 // 128 * 128 + 128
    assert [scheduled(12800, 'linear', i / 100) for i in range(1, 101)] == [128 * i for i in range(1, 101)]


def windows(model):
    return [block.attn.window.item() for block in model.transformer.h]


def test_w5_progress_moves_the_windows_of_long_and_short_layers():
    model = small('window(1024, schedule="linear", long=(0, 2))', n_layer=3)
    assert windows(model) == [1024, 512, 1024]          # until somebody tells where the run is
    for fraction, expected in ((0, [128, 128, 128]), (0.3, [384, 192, 384]), (0.15, [256, 128, 256]),
                               (1, [1024, 512, 1024])):
        model.set_progress(fraction)
        assert windows(model) == expected
    model = small({'h.0': 'window(7)', 'h.1': 'causal', 'h.2': 'window(9, long=())'}, n_layer=3)
    model.set_progress(0.5)
    assert windows(GPT(GPTConfig(**SMALL, attention='window(1, long=())'))) == [1, 1]
    assert [model.transformer.h[i].attn.window.item() for i in (0, 2)] == [7, 4]


@torch.no_grad()
def test_w5_the_moved_window_is_the_one_that_attention_uses():
    model, idx = small('window(256, schedule="linear")', block_size=300, n_layer=1), tokens(1, 300)
    full = logits_of(model, idx)
    model.set_progress(0.5)
    half = logits_of(model, idx)
    assert difference(half[:, :128], full[:, :128]) < 1e-12 and difference(half[:, 129:], full[:, 129:]) > 1e-4
    assert difference(half, logits_of(small('window(128)', block_size=300, n_layer=1), idx)) < 1e-12
    caches = in_pieces(model, idx[:, :200], [200])[1]
    assert caches[0]['k'].size(2) == 128


def test_the_window_is_a_number_that_casts_and_moves_keep():
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        model = small('window(3333)').to(dtype)
        assert windows(model) == [3333, 3333] and model.state_dict()['transformer.h.1.attn.window'].dtype == torch.int64


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp('data'))


def test_training_moves_the_window_and_checkpoints_hold_it(data, tmp_path, monkeypatch):
    """Evaluation takes the window of its step, the last one the final window; a loaded model the one that was saved."""
    seen, evaluate = [], train.evaluate
    monkeypatch.setattr(train, 'evaluate', lambda model, *more: seen.append(windows(model)) or evaluate(model, *more))
    more = ['--attention=window(1728, schedule="linear", long=(0,))', '--eval_interval=3', '--keep_checkpoints=9']
    train.STOP.update(signal=None)
    train.main(configurator.load(arguments(data, tmp_path, *more)))
    steps = [[128, 128], [512, 256], [896, 448], [1408, 704], [1792, 896]]          # 0, 3, 6, 9, 12 of 12
    assert seen == steps
    for step, expected in ((12, steps[4]), (9, steps[3]), (6, steps[2])):
        config, state, _ = initialise.read_folder(str(tmp_path))                      # as sample.py does
        assert windows(initialise.build(config, config, state)) == expected
        evaluation = [f'--init_from={tmp_path}', '--eval_only=True']
        train.main(configurator.load(arguments(data, tmp_path / 'none', *more, *evaluation)))
        assert seen.pop() == expected
        for file in tmp_path.glob(f'ckpt_{step:08d}*'):
            file.unlink()


# ---------------------------------------------------------------------------------------------------
# documents

@torch.no_grad()
def test_w6_packed_documents_equal_separate_ones():
    """The end-of-text token belongs to the document that it begins."""
    model, eot = small('window(6, documents=64)', rope=True), 64
    parts = [tokens(1, n, seed=n) % 64 for n in (7, 12, 1, 14)]
    for part in parts[1:]:
        part[0, 0] = eot
    packed = logits_of(model, torch.cat(parts, 1))
    apart = torch.cat([logits_of(model, part) for part in parts], 1)
    assert difference(packed, apart) < 1e-10
    assert difference(logits_of(small('window(6)', rope=True), torch.cat(parts, 1)), apart) > 1e-3
    for pieces in ([1] * 34, [9, 1, 1, 8, 15]):
        assert difference(in_pieces(model, torch.cat(parts, 1), pieces)[0], apart) < 1e-10


@torch.no_grad()
def test_w6_equals_the_formula_with_documents():
    model, idx = small('window(5, documents=3)'), tokens(2, 24)
    idx[0, [0, 4, 5, 17]] = idx[1, [9, 23]] = 3
    x, y = attention_of(model, idx)
    documents = [[sum(row[:t + 1] == 3).item() for t in range(24)] for row in idx]
    assert difference(y, attention_by_formula(model, x, 5, documents)) < 1e-10


# ---------------------------------------------------------------------------------------------------
# FlexAttention

needs_flex = pytest.mark.skipif(window.flex_attention is None, reason='this torch has no FlexAttention')
ignore_slow_flex = pytest.mark.filterwarnings('ignore:flex_attention called without torch.compile')


@needs_flex
@ignore_slow_flex
@pytest.mark.parametrize('dtype, bound', [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize('T, kv_heads, eot', [(130, 2, 3), (16, 4, None)])
@torch.no_grad()
def test_w1_flex_on_a_cpu_equals_sdpa(T, kv_heads, eot, dtype, bound, monkeypatch):
    """A whole model through FlexAttention, which works forward only on a CPU."""
    attention = f'window(7, documents={eot})'
    model, idx = small(attention, dtype, block_size=160, n_kv_head=kv_heads, rope=True), tokens(2, T)
    idx[:, 9] = 3
    expected = logits_of(model, idx)
    monkeypatch.setattr(window.WindowAttention, 'flex_fits', lambda self, ctx: True)
    monkeypatch.setattr(window, 'compiled', lambda function: function)
    monkeypatch.setattr(F, 'scaled_dot_product_attention', None)
    assert difference(logits_of(model, idx), expected) < bound * max(1, expected.abs().max().item())
    model.transformer.h[0].attn.window.fill_(8)
    assert difference(logits_of(model, idx), expected) > 1e-4


@needs_flex
@torch.no_grad()
def test_one_graph_serves_all_windows_and_documents(monkeypatch):
    """FlexAttention and its masks compiled on their own, as for models that are not compiled as a whole."""
    from torch._dynamo.testing import CompileCounter
    q, k, v = torch.randn(3, 2, 2, 160, 16)
    places, found = torch.arange(160), []
    for kind in (torch.tensor, int):                    # a plain number would be compiled in: the negative control
        torch._dynamo.reset()
        counters = {function: CompileCounter() for function in (window.block_mask, window.flex)}
        mask, attend = (torch.compile(function, backend=count, dynamic=False) for function, count in counters.items())
        for seed, size in enumerate((3, 90)):
            texts = (tokens(2, 160, seed=seed) == 3).cumsum(1)
            blocks = mask(kind(size), places, texts)
            assert difference(attend(q, k, v, blocks, 0.25), F.scaled_dot_product_attention(
                q, k, v, window.visible(size, places, places, texts, texts), scale=0.25)) < 1e-5
        found.append([counter.frame_count for counter in counters.values()])
    assert found == [[1, 1], [2, 2]]


def builds(monkeypatch, model, idx, name):
    """How often window.`name` is called in one call of the model."""
    made, real = [], getattr(window, name)
    with monkeypatch.context() as patch:
        patch.setattr(window, name, lambda *a, **k: made.append(1) or real(*a, **k))
        model(idx, idx)
    return len(made)


TWELVE = dict(n_layer=12, block_size=160, n_embd=16, n_head=1)
MIXED = {'h.0': 'window(256, schedule="linear", long=(0, 5), documents=3)', 'h.1': 'window(256, documents=3)',
         'h.*': 'window(256, schedule="linear", long=(0, 5), documents=3)', 'h.7': 'causal'}


@needs_flex
@ignore_slow_flex
@pytest.mark.parametrize('attention, expected', [('window(128)', 1), ('window(256, schedule="linear", long=(0, 5, 11))', 2),
                                                 ('window(7, long=(), documents=3)', 1), (MIXED, 3)], ids=str)
@pytest.mark.parametrize('name', ['create_block_mask', 'visible'])
def test_every_window_is_made_once_a_call(name, attention, expected, monkeypatch):
    """Twelve layers: a mask for every distinct window, two for the long and the short ones of a schedule."""
    model, counts = small(attention, torch.float32, **TWELVE), []
    monkeypatch.setattr(window.WindowAttention, 'flex_fits', lambda self, ctx: name == 'create_block_mask')
    monkeypatch.setattr(window, 'compiled', lambda function: function)
    cumsum, counted = torch.Tensor.cumsum, []
    monkeypatch.setattr(torch.Tensor, 'cumsum', lambda *a: counted.append(1) or cumsum(*a))
    with torch.no_grad():
        for fraction in (0.3, 0.6):
            model.set_progress(fraction)
            counts.append(builds(monkeypatch, model, tokens(1, 130), name))
    assert counts == [expected] * 2 and len(counted) == 2 * ('documents' in str(attention))


def test_recompute_makes_no_mask_again(monkeypatch):
    """Blocks that run again for backward find what was made before the first one ran."""
    model = small('window(7, documents=3)', recompute=True, n_layer=3)
    made, real = [], window.visible
    monkeypatch.setattr(window, 'visible', lambda *a: made.append(1) or real(*a))
    model(tokens(2, 24), tokens(2, 24))[1].backward()
    assert made == [1]


@needs_flex
@pytest.mark.slow
@pytest.mark.parametrize('recompute', [False, True])
def test_compiled_as_a_whole_it_is_one_graph_with_the_gradients_of_sdpa(recompute, monkeypatch):
    """FlexAttention refuses gradients on a CPU, where its formula does without the kernel."""
    from torch._dynamo.testing import CompileCounterWithBackend
    module = __import__('importlib').import_module('torch.nn.attention.flex_attention')
    monkeypatch.setattr(module, '_validate_device', lambda *a: None)
    torch._dynamo.reset()
    model = small('window(400, schedule="linear", long=(0, 2), documents=3)', torch.float32, n_layer=4, block_size=300,
                  recompute=recompute).train()
    counter, losses = CompileCounterWithBackend('aot_eager'), []
    compiled, idx = torch.compile(model, backend=counter, fullgraph=True), tokens(2, 300) % 60 + 4
    idx[0, 250] = 3                                     # documents longer than windows
    for fraction in (0.1, 0.6, 1.0):
        model.set_progress(fraction)
        found = []
        for by_flex, run in ((True, compiled), (False, model)):
            monkeypatch.setattr(window.WindowAttention, 'flex_fits', lambda self, ctx, by_flex=by_flex: by_flex)
            model.zero_grad()
            loss = run(idx, idx)[1]
            loss.backward()
            found.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
        for mine, right in zip(*found):
            assert difference(mine, right) < 1e-4 * max(1e-3, right.abs().max().item())
        losses.append(found[0][0].item())
    assert counter.frame_count == 1 and len(set(losses)) == 3


@needs_flex
@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize('documents', [False, True])
def test_a_compiled_mask_has_no_tensor_of_all_pairs(documents):
    """By the buffers of inductor's code: 16 x 4,096 x 4,096 booleans would be 268 MB."""
    import re

    from torch._inductor.utils import run_and_get_code
    T, B = 1024, 4
    texts = (tokens(B, T) == 3).cumsum(1) if documents else None
    torch._dynamo.reset()
    blocks, code = run_and_get_code(torch.compile(window.block_mask), torch.tensor(200), torch.arange(T), texts)
    sizes = [math.prod(map(int, re.findall(r'\d+', size)))
             for size in re.findall(r'empty_strided_cpu\((\([^)]*\))', ''.join(code))]
    assert sizes and max(sizes) <= B * (T // 128) * (T // 128 + 1) < T * T
    assert blocks.kv_num_blocks.shape == (B if documents else 1, 1, T // 128)


@needs_flex
def test_flex_is_for_cuda_only():
    model = small('window(4)')
    assert not model.transformer.h[0].attn.flex_fits(Context(tokens(1, 4), torch.arange(4), model.config))


@pytest.mark.gpu
def test_w1_flex_on_a_gpu_equals_sdpa(monkeypatch):
    """Logits and gradients, with windows that move, compiled as a whole and not."""
    settings = dict(block_size=256, n_head=2, rope=True)
    for compiled in (False, True):
        model = small('window(40, documents=3)', torch.float32, **settings).cuda()
        run = torch.compile(model) if compiled else model
        for size in (40, 7, 130):
            for block in model.transformer.h:
                block.attn.window.fill_(size)
            found = []
            for kernel in (True, False):
                with monkeypatch.context() as patch:
                    if not kernel:
                        patch.setattr(window.WindowAttention, 'flex_fits', lambda self, ctx: False)
                    idx = tokens(2, 200).cuda()
                    model.zero_grad()
                    logits, loss = (run if kernel else model)(idx, idx)
                    loss.backward()
                    found.append((logits.detach(), model.transformer.wte.weight.grad.clone()))
            for a, b in zip(*found):
                assert difference(a, b) < 1e-3 * max(1, b.abs().max().item()), (compiled, size)


# ---------------------------------------------------------------------------------------------------
# accounting and refusals

def test_flops_count_the_window_and_not_the_schedule():
    attn = small('window(6, long=(1,))').transformer.h
    assert attn[1].attn.flops(100) == 4 * 6 * 32 and attn[0].attn.flops(100) == 4 * 3 * 32
    assert attn[1].attn.flops(4) == 4 * 4 * 32
    model = small('window(512, schedule="cubic")')
    model.set_progress(0.0)
    assert model.transformer.h[0].attn.flops(1024) == 4 * 512 * 32


@pytest.mark.parametrize('spec, sentence', [
    ('window(0)', 'size is the window in tokens, a whole number of at least 1, got 0'),
    ('window(2.5)', 'whole number'),
    ('window(256, schedule="fast")', "schedule is None, 'linear' or 'cubic', got 'fast'"),
    ('window(64, schedule="linear")', 'size must be at least 128, got 64; enlarge it or drop schedule'),
    ('window(9, long=3)', r'long lists blocks from 0 to 1, such as \(0,\), got 3'),
    ('window(9, long=(2,))', r'from 0 to 1'),
    ('window(9, documents=65)', r'documents is the token that begins one, below vocab_size \(65\), such as'),
    ('window()', 'it takes window'),
])
def test_refused_arguments(spec, sentence):
    with pytest.raises(UserError, match=sentence) as error:
        small(spec)
    assert 'h.0.attn' in str(error.value) and '\n' not in str(error.value)
