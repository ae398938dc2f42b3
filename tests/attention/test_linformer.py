"""Causal Linformer: against the formula one query at a time, its exact special cases, its cache and its start."""
import math

import pytest
import torch
from torch.nn import functional as F

from attention.linformer import block_average
from model import GPT, GPTConfig
from variants import UserError

SMALL = dict(block_size=40, vocab_size=65, n_layer=2, n_head=4, n_embd=32)


def small(attention, dtype=torch.float64, **settings):
    """A model with random parameters; E, F and W_p are drawn last, so that the others agree with causal attention's."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**SMALL, 'attention': attention, **settings})).to(dtype).eval()
    mixing = ('E', 'F', 'W_p')
    with torch.no_grad():
        for last in (False, True):
            for name, parameter in model.named_parameters():
                if (name.rpartition('.')[2] in mixing) == last:
                    generator = torch.Generator().manual_seed(sum(map(ord, name)))
                    parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        model.normalise_weights()
    return model


def tokens(*shape, seed=0):
    return torch.randint(65, shape, generator=torch.Generator().manual_seed(seed))


def logits_of(model, idx, **more):
    return model(idx, idx, **more)[0]


def difference(a, b):
    return (a - b).abs().max().item()


def attention_of(model, idx, **more):
    """(input, output) of the first block's attention."""
    held = []
    hook = model.transformer.h[0].attn.register_forward_hook(lambda module, inputs, out: held.extend((inputs[0], out)))
    logits_of(model, idx, **more)
    hook.remove()
    return held


def each_attention(model):
    return [block.attn for block in model.transformer.h]


def set_mixing(model, E, F=None):
    with torch.no_grad():
        for attn in each_attention(model):
            attn.E.copy_(E)
            attn.F.copy_(E if F is None else F)
    return model


# ---------------------------------------------------------------------------------------------------
# the formula, in the plainest way

def turned(x, position):
    """RoPE of one vector by complex numbers."""
    half = x.numel() // 2
    frequency = 10000.0 ** (-2 * torch.arange(half, dtype=torch.float64) / x.numel())
    phase = torch.polar(torch.ones(half, dtype=torch.float64), position * frequency)
    return torch.view_as_real(torch.view_as_complex(x.reshape(half, 2).contiguous()) * phase).flatten()


def key_norm(attn, x, head, config):
    if config.qk_norm == 'standard':
        return x / (x.square().mean() + 1e-6).sqrt()
    if config.ngpt == 'full':
        return x / x.norm() * attn.norm_qk.s_qk()[head, 0]
    return x


def mixing(attn, x, chunk, head):
    """(r, c) weights of keys and of values, from the inputs x (c, C) of that chunk."""
    if attn.dynamic:
        logits = (x @ attn.W_p.T).unflatten(-1, (attn.n_kv_head, attn.slots))[:, head]
        return (logits.T.softmax(-1),) * 2
    at = head if attn.E.size(0) > 1 else 0
    return attn.E[at], attn.F[at]


def by_formula(model, x):
    """For each row, head and query: slots of earlier complete chunks, raw keys of its own, one softmax. x (B, T, C)."""
    attn, config = model.transformer.h[0].attn, model.config
    H, c, D = attn.n_head, attn.chunk, attn.head_dim
    turn = turned if config.rope else (lambda vector, position: vector)
    q, k, v = (site(x).unflatten(-1, (-1, D)) for site in (attn.c_q, attn.c_k, attn.c_v))          # (B, T, heads, D)
    scale = math.sqrt(D) if config.ngpt == 'full' else 1 / math.sqrt(D)
    y = torch.empty_like(q)
    for b in range(x.size(0)):
        for h in range(H):
            g = h // (H // attn.n_kv_head)
            for t in range(x.size(1)):
                query, keys, values = turn(key_norm(attn, q[b, t, h], h, config), t), [], []
                for start in range(0, t // c * c, c):
                    if not attn.slots:
                        break
                    E, F_ = mixing(attn, x[b, start:start + c], start // c, g)
                    for i in range(attn.slots):
                        slot = sum(E[i, j] * k[b, start + j, g] for j in range(c))
                        if attn.slot_norm is not None:
                            slot = slot / (slot.square().mean() + 1e-5).sqrt() * attn.slot_norm.weight
                        keys.append(turn(key_norm(attn, slot, h, config), start + c - 1))
                        values.append(sum(F_[i, j] * v[b, start + j, g] for j in range(c)))
                for j in range(t // c * c, t + 1):
                    keys.append(turn(key_norm(attn, k[b, j, g], h, config), j))
                    values.append(v[b, j, g])
                weights = (scale * torch.stack(keys) @ query).softmax(0)
                y[b, t, h] = weights @ torch.stack(values)
    return attn.c_proj(y.flatten(2))


FORMULA = [
    ('linformer(2, chunk=4)', {}), ('linformer(2, chunk=4)', dict(rope=True)),
    ('linformer(3, chunk=5, per_head=True)', dict(rope=True, n_kv_head=2)),
    ('linformer(2, chunk=5, dynamic=True)', dict(rope=True, n_kv_head=2)),
    ('linformer(2, chunk=4, slot_norm=True)', dict(rope=True)), ('linformer(0, chunk=5)', dict(rope=True)),
    ('linformer(2, chunk=4)', dict(qk_norm='standard', rope=True)),
    ('linformer(2, chunk=4)', dict(ngpt='full', rope=True)),
    ('linformer(1, chunk=1)', dict(rope=True)), ('linformer(7, chunk=7)', dict(bias=True))]


@pytest.mark.parametrize('attention, settings', FORMULA, ids=lambda value: str(value))
@torch.no_grad()
def test_f5_equals_the_formula_at_lengths_that_no_chunk_divides(attention, settings):
    model = small(attention, **settings)
    for T in (13, 3):
        x, y = attention_of(model, tokens(2, T))
        assert difference(y, by_formula(model, x)) < 1e-10, T


@torch.no_grad()
def test_f5_fp32_follows():
    model = small('linformer(2, chunk=4)', torch.float32, rope=True)
    x, y = attention_of(model, tokens(2, 13))
    expected = by_formula(model.double(), x.double())
    assert difference(y.double(), expected) < 1e-5 * max(1, expected.abs().max().item())


@torch.no_grad()
def test_f5_the_last_partial_chunk_is_never_compressed():
    """T between two borders: what is there does not depend on T, and E has no effect before the first border."""
    model = small('linformer(2, chunk=6)')
    full = logits_of(model, tokens(1, 40))
    for T in (5, 6, 7, 11, 12, 13, 39):
        assert difference(logits_of(model, tokens(1, 40)[:, :T]), full[:, :T]) < 1e-10


# ---------------------------------------------------------------------------------------------------
# special cases that are exact

@pytest.mark.parametrize('permuted', [False, True])
@pytest.mark.parametrize('settings', [{}, dict(n_kv_head=2, value_residual=True), dict(qk_norm='standard'),
                                      dict(ngpt='full'), dict(ngpt='simple')], ids=str)
@torch.no_grad()
def test_f1_as_many_slots_as_tokens_and_the_identity_are_exact_attention(settings, permuted):
    model, idx = small('linformer(5, chunk=5)', **settings), tokens(2, 33)
    identity = torch.eye(5)[torch.randperm(5, generator=torch.Generator().manual_seed(1))] if permuted else torch.eye(5)
    exact = logits_of(small('causal', **settings), idx)
    assert difference(logits_of(set_mixing(model, identity), idx), exact) < 1e-10
    if permuted:                                        # keys and values in different orders are something else
        assert difference(logits_of(set_mixing(model, identity, torch.eye(5)), idx), exact) > 1e-6


@torch.no_grad()
def test_f1_holds_without_rope_on_slots_only():
    """A slot stands at its chunk's last position, so that with RoPE even the identity is no exact attention."""
    model = set_mixing(small('linformer(5, chunk=5)', rope=True), torch.eye(5))
    assert difference(logits_of(model, tokens(2, 33)), logits_of(small('causal', rope=True), tokens(2, 33))) > 1e-4
    one = set_mixing(small('linformer(1, chunk=1)', rope=True), torch.ones(1, 1))      # ... but for chunks of one token
    assert difference(logits_of(one, tokens(2, 33)), logits_of(small('causal', rope=True), tokens(2, 33))) < 1e-10


@pytest.mark.parametrize('settings', [{}, dict(rope=True, n_kv_head=2), dict(ngpt='simple', rope=True)], ids=str)
@torch.no_grad()
def test_f2_a_chunk_as_long_as_the_text_is_exact_attention(settings):
    model, causal = small('linformer(3, chunk=12)', **settings), small('causal', **settings)
    for T in (1, 7, 12):
        assert difference(logits_of(model, tokens(2, T)), logits_of(causal, tokens(2, T))) < 1e-10
    assert difference(logits_of(model, tokens(2, 13)), logits_of(causal, tokens(2, 13))) > 1e-6


@torch.no_grad()
def test_f3_no_slots_is_attention_within_chunks_and_zero_slots_are_not():
    model, idx = small('linformer(0, chunk=5)', rope=True), tokens(2, 18)
    x, y = attention_of(model, idx)
    attn = model.transformer.h[0].attn
    q, k, v = (site(x).unflatten(-1, (4, 8)).transpose(1, 2) for site in (attn.c_q, attn.c_k, attn.c_v))
    q, k = (torch.stack([torch.stack([turned(t[b, h, m], m) for m in range(18)]) for b in range(2) for h in range(4)])
            .view(2, 4, 18, 8) for t in (q, k))
    chunk = torch.arange(18) // 5
    mask = (chunk[:, None] == chunk) & torch.ones(18, 18, dtype=torch.bool).tril()
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
    assert difference(y, attn.c_proj(expected)) < 1e-10

    zero = set_mixing(small('linformer(2, chunk=5)', rope=True), torch.zeros(2, 5))
    _, found = attention_of(zero, idx)
    scores = (q @ k.mT / math.sqrt(8)).masked_fill(~mask, -torch.inf)
    slots = torch.where(torch.arange(6) < 2 * chunk[:, None], 0.0, -torch.inf).double().expand(2, 4, 18, 6)
    weights = torch.cat((slots, scores), -1).softmax(-1)[..., 6:]                       # logits 0 take their share
    expected = attn.c_proj((weights @ v).transpose(1, 2).flatten(2))
    assert difference(found, expected) < 1e-10 and difference(found, y) > 1e-3


@pytest.mark.parametrize('shift', [5, 15])
@torch.no_grad()
def test_p1_scores_do_not_change_when_all_moves_by_whole_chunks(shift):
    model, idx = small('linformer(2, chunk=5)', rope=True), tokens(2, 18)
    assert difference(logits_of(model, idx, start=shift), logits_of(model, idx)) < 1e-10


# ---------------------------------------------------------------------------------------------------
# the cache

def in_pieces(model, idx, pieces):
    """(logits, caches) of idx read in pieces."""
    caches, start, found = [{} for _ in model.transformer.h], 0, []
    for n in pieces:
        found.append(logits_of(model, idx[:, start:start + n], caches=caches, start=start))
        start += n
    return torch.cat(found, 1), caches


@pytest.mark.parametrize('attention, settings', FORMULA, ids=lambda value: str(value))
@torch.no_grad()
def test_f4_decode_across_chunk_borders(attention, settings):
    model, idx = small(attention, **settings), tokens(2, 40)
    full = logits_of(model, idx)
    for pieces in ([1] * 40, [4] + [1] * 36, [5] + [1] * 35, [3, 9, 1, 1, 20, 6], [6, 4, 5, 5, 20], [40]):
        assert difference(in_pieces(model, idx, pieces)[0], full) < 1e-10, pieces


@torch.no_grad()
def test_f4_text_is_the_same_with_and_without_the_cache():
    model, idx = small('linformer(2, chunk=7)', rope=True), tokens(2, 5)
    texts = [model.generate(idx, 50, temperature=0, use_cache=use_cache) for use_cache in (True, False)]
    assert torch.equal(*texts) and len(set(texts[0].flatten().tolist())) > 3


@pytest.mark.parametrize('attention, settings, more', [('linformer(2, chunk=5)', {}, 0),
                                                       ('linformer(2, chunk=5)', dict(n_kv_head=2), 0),
                                                       ('linformer(2, chunk=5, dynamic=True)', {}, 8)])
@torch.no_grad()
def test_cache_holds_the_open_chunk_and_the_slots(attention, settings, more):
    """2 D (open tokens + r chunks) numbers, at most 2 D (c + r T / c), and no storage behind them."""
    width = 8 * settings.get('n_kv_head', 4)
    for pieces in ([1] * 33, [33], [12, 21]):
        for cache in in_pieces(small(attention, **settings), tokens(1, 33), pieces)[1]:
            tensors = [t for t in cache.values() if torch.is_tensor(t)]
            assert sum(t.numel() for t in tensors) == 2 * width * (33 % 5 + 2 * (33 // 5)) + more * (33 % 5)
            stored = sum(t.untyped_storage().nbytes() // t.itemsize for t in tensors)
            assert stored <= 2 * width * (5 + 2 * 33 / 5) + more * 5


# ---------------------------------------------------------------------------------------------------
# start, accounting, refusals

def test_mixing_starts_as_block_averages():
    assert block_average(2, 4).tolist() == [[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]]
    assert block_average(3, 4).tolist() == [[0.5, 0.5, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    assert torch.equal(block_average(5, 5), torch.eye(5))
    torch.manual_seed(0)
    attn = GPT(GPTConfig(**{**SMALL, 'block_size': 256}, attention='linformer(16, chunk=128)')).transformer.h[0].attn
    for found in (attn.E, attn.F):
        noise = found[0] - block_average(16, 128)
        assert noise.std().item() == pytest.approx(0.02, rel=0.1) and abs(noise.mean().item()) < 2e-3
    assert not torch.equal(attn.E, attn.F)


def test_u7_parameters_and_flops():
    numel = lambda spec, **s: sum(p.numel() for p in small(spec, **s).transformer.h[0].attn.parameters())   # noqa: E731
    assert numel('linformer(3, chunk=5)') == 4 * 32 ** 2 + 2 * 3 * 5
    assert numel('linformer(3, chunk=5, per_head=True)', n_kv_head=2) == 3 * 32 ** 2 + 2 * 2 * 3 * 5
    assert numel('linformer(3, chunk=5, dynamic=True, slot_norm=True)') == 4 * 32 ** 2 + 32 * 4 * 3 + 8
    assert numel('linformer(0, chunk=5)') == 4 * 32 ** 2
    attn = small('linformer(3, chunk=5)').transformer.h[0].attn
    assert attn.flops(40) == 4 * 32 * (5 + 3 * 8) + 4 * 3 * 32 and attn.flops(3) == 4 * 32 * 3 + 4 * 3 * 32


def test_slots_learn_even_from_texts_without_a_complete_chunk():
    """Gradients of 0 rather than None, which a job of several ranks could not wait for."""
    model = small('linformer(2, chunk=8)')
    model(tokens(1, 5), tokens(1, 5))[1].backward()
    assert not model.transformer.h[0].attn.E.grad.any()
    model(tokens(1, 9), tokens(1, 9))[1].backward()
    assert model.transformer.h[0].attn.E.grad.any()


@pytest.mark.parametrize('spec, settings, sentence', [
    ('linformer(6, chunk=5)', {}, r'slots \(6\) must not exceed chunk \(5\), which they stand for; lower slots'),
    ('linformer(-1, chunk=5)', {}, r'slots is a whole number from 0 and chunk one from 1, got -1 and 5'),
    ('linformer(1, chunk=0)', {}, 'got 1 and 0'), ('linformer(2.0, chunk=5)', {}, 'whole number'),
    ('linformer(2, chunk=40)', {}, r'no token would ever see a slot: chunk \(40\) must be below block_size \(40\)'),
    ('linformer(2, chunk=5, dynamic=1)', {}, 'are True or False'),
    ('linformer(0, chunk=5, per_head=True)', {}, 'slots=0 has nothing to mix; drop per_head'),
    ('linformer(2, chunk=5, dynamic=True, per_head=True)', {}, 'each head already; drop per_head'),
    ('linformer(2, chunk=5, slot_norm=True)', dict(qk_norm='standard'), "slot_norm goes with qk_norm='none'"),
    ('linformer(2, chunk=5, slot_norm=True)', dict(ngpt='simple'), "slot_norm goes with qk_norm='none'"),
])
def test_refused_arguments(spec, settings, sentence):
    with pytest.raises(UserError, match=sentence) as error:
        small(spec, **settings)
    assert 'h.0.attn' in str(error.value) and '\n' not in str(error.value)
