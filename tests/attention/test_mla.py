"""Latent attention: naive against the formula, absorbed against naive, the size of the cache, and special cases."""
import math

import pytest
import torch
from torch.nn import functional as F

from attention import mla
from model import GPT, GPTConfig
from variants import UserError

SMALL = dict(block_size=24, vocab_size=65, n_layer=3, n_head=4, n_embd=32)
SPEC = 'mla(12, qk_rope_head_dim=4)'
LARGE = 'mla(20, q_lora_rank=12, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=8)'


def small(attention=SPEC, dtype=torch.float64, **settings):
    """A model with random parameters."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**SMALL, 'attention': attention, **settings})).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    model.normalise_weights()
    return model


def tokens(*shape, seed=0):
    return torch.randint(65, shape, generator=torch.Generator().manual_seed(seed))


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


def attention_of(model, idx, **more):
    """(input, output) of the first block's attention."""
    held = []
    hook = model.transformer.h[0].attn.register_forward_hook(lambda module, inputs, out: held.extend((inputs[0], out)))
    logits_of(model, idx, **more)
    hook.remove()
    return held


# ---------------------------------------------------------------------------------------------------
# the formula, head by head

def turned(x, first=0):
    """RoPE of x (B, T, d_r) by complex numbers, from position `first` on."""
    half = x.size(-1) // 2
    frequency = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    phase = torch.polar(torch.ones(()).double(), torch.arange(first, first + x.size(1)).double()[:, None] * frequency)
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (half, 2)).contiguous()) * phase).flatten(-2)


def by_formula(model, x):
    """One softmax per head over [k_n, k_r] of that head, from the dense weights alone. x (B, T, C)."""
    attn, config = model.transformer.h[0].attn, model.config
    W = lambda site: getattr(attn, site).dense_weight()                                 # noqa: E731
    full, simple = config.ngpt == 'full', config.ngpt == 'simple'

    def latent_norm(z, norm):
        if config.ngpt != 'none':
            return z / z.norm(dim=-1, keepdim=True)
        return z / (z.square().mean(-1, keepdim=True) + config.norm_eps).sqrt() * norm.weight

    d, n = attn.nope + attn.rope, attn.nope
    q = x @ W('c_q').T if attn.c_q_a is None else latent_norm(x @ W('c_q_a').T, attn.norm_q) @ W('c_q_b').T
    raw, k_r = (x @ W('c_kv_a').T).split((attn.rank, attn.rope), -1)
    up = latent_norm(raw, attn.norm_kv) @ W('c_kv_b').T
    mask, heads = torch.ones(x.size(1), x.size(1), dtype=torch.bool).tril(), []
    for h in range(config.n_head):
        q_h, kv_h = q[..., h * d:(h + 1) * d], up[..., h * (n + attn.value):(h + 1) * (n + attn.value)]
        k_h, v_h, scale = torch.cat((kv_h[..., :n], k_r), -1), kv_h[..., n:], d ** -0.5
        if full:
            s = torch.cat((attn.scale.s_qk()[h, 0], attn.scale.s_rope()))
            q_h, k_h, scale = F.normalize(q_h, dim=-1) * s, F.normalize(k_h, dim=-1) * s, math.sqrt(d)
        if simple:
            q_h, k_h, scale = q_h * attn.scale.s_qk()[h], k_h * attn.scale.s_qk()[h], attn.scale.scale
        q_h, k_h = (torch.cat((t[..., :n], turned(t[..., n:])), -1) for t in (q_h, k_h))
        heads.append((scale * q_h @ k_h.mT).masked_fill(~mask, -torch.inf).softmax(-1) @ v_h)
    return torch.cat(heads, -1) @ W('c_proj').T


@pytest.mark.parametrize('dtype, bound', [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize('spec', [SPEC, LARGE])
@pytest.mark.parametrize('settings', [{}, dict(rope=True), dict(ngpt='full'), dict(ngpt='simple', rope=True),
                                      dict(linear={'*.attn.*': 'lowrank(3)'}),
                                      dict(linear={'*.c_kv_*': 'kron(4, 4)'}, ngpt='full')], ids=str)
@torch.no_grad()
def test_the_naive_path_equals_the_formula(spec, settings, dtype, bound):
    model = small(spec, dtype, **settings)
    x, y = attention_of(model, tokens(2, 24))
    expected = by_formula(model.double(), x.double())
    assert difference(y, expected) < bound * max(1, expected.abs().max().item())


# ---------------------------------------------------------------------------------------------------
# absorbed decoding

ABSORBED = [
    {}, dict(rope=True, bias=True), dict(ngpt='full', rope=True), dict(ngpt='simple'),
    dict(value_residual=True, bias=True, rope=True), dict(value_residual=True, ngpt='full'),
    dict(linear={'*.c_kv_b': 'lowrank(3)', '*.c_q*': 'kron(4, 4, terms=2)'}, bias=True, value_residual=True),
    dict(linear={'*.c_kv_b': 'kron(4, 4)'}, ngpt='full', value_residual=True)]


@pytest.mark.parametrize('settings', ABSORBED, ids=str)
@pytest.mark.parametrize('spec', [SPEC, LARGE])
@torch.no_grad()
def test_m1_absorbed_decode_equals_the_naive_forward(spec, settings, monkeypatch):
    model, idx = small(spec, **settings), tokens(2, 24)
    full, naive, calls = logits_of(model, idx), mla.attend, []
    monkeypatch.setattr(mla, 'attend', lambda *more: calls.append(1) or naive(*more))
    for pieces in ([1] * 24, [5] + [1] * 19, [7, 17], [3, 1, 8, 1, 11], [24]):
        assert difference(in_pieces(model, idx, pieces)[0], full) < 1e-10, pieces
    assert len(calls) == 5 * SMALL['n_layer']           # the first piece alone is multiplied out


@torch.no_grad()
def test_m1_in_fp32():
    model, idx = small(dtype=torch.float32, ngpt='full'), tokens(2, 24)
    full = logits_of(model, idx)
    assert difference(in_pieces(model, idx, [5] + [1] * 19)[0], full) < 1e-5 * max(1, full.abs().max().item())


@torch.no_grad()
def test_m1_other_blocks_get_the_values_of_a_latent_block_0():
    """Value residual across classes: block 0 is mla, and a causal block mixes its values while it decodes absorbed."""
    rules = {'h.1': 'causal', 'h.2': LARGE, 'h.0': SPEC}
    model, idx = small(rules, value_residual=True, bias=True), tokens(2, 24)
    assert difference(in_pieces(model, idx, [5] + [1] * 19)[0], logits_of(model, idx)) < 1e-10


@torch.no_grad()
def test_m1_text_is_the_same_with_and_without_the_cache():
    model, idx = small(rope=True), tokens(2, 5)
    texts = [model.generate(idx, 40, temperature=0, use_cache=use_cache) for use_cache in (True, False)]
    assert torch.equal(*texts) and len(set(texts[0].flatten().tolist())) > 3


@torch.no_grad()
def test_v2_a_share_of_one_takes_block_0s_values_alone():
    model, idx = small(value_residual=True), tokens(2, 24)
    model.transformer.h[2].attn.mix_v.lam.fill_(1.0)
    changed = small(value_residual=True)
    changed.load_state_dict(model.state_dict())
    rows = changed.transformer.h[2].attn.c_kv_b.weight.view(4, 16, 12)
    rows[:, 8:] = torch.randn(4, 8, 12)                 # W_UV of block 2; its keys stay
    for pieces in ([24], [5] + [1] * 19):
        assert difference(in_pieces(changed, idx, pieces)[0], in_pieces(model, idx, pieces)[0]) < 1e-10
    rows[:, :8] = 0
    assert difference(logits_of(changed, idx), logits_of(model, idx)) > 1e-4


@pytest.mark.parametrize('spec, settings, numbers', [(SPEC, {}, 12 + 4), (LARGE, {}, 20 + 4),
                                                     (SPEC, dict(value_residual=True), 12 + 4),
                                                     (SPEC, dict(ngpt='simple'), 12 + 4),
                                                     (SPEC, dict(ngpt='full'), 12 + 4 + 4)], ids=str)
@torch.no_grad()
def test_m2_the_cache_holds_the_latent_and_one_rotated_key(spec, settings, numbers):
    for pieces in ([1] * 24, [20, 4]):
        for cache in in_pieces(small(spec, **settings), tokens(2, 24), pieces)[1]:
            tensors = [t for t in cache.values() if torch.is_tensor(t)]
            assert sum(t.numel() for t in tensors) == 2 * 24 * numbers
            assert sum(t.untyped_storage().nbytes() // t.itemsize for t in tensors) == 2 * 24 * numbers


@torch.no_grad()
def test_m2_the_cached_latent_is_normed_and_the_cached_key_turned():
    model, idx = small(rope=True), tokens(1, 24)
    cache = in_pieces(model, idx, [9] + [1] * 15)[1][0]
    x, _ = attention_of(model, idx)
    attn = model.transformer.h[0].attn
    raw, k_r = attn.c_kv_a(x).split((12, 4), -1)
    latent = raw / (raw.square().mean(-1, keepdim=True) + 1e-5).sqrt() * attn.norm_kv.weight
    assert difference(cache['latent'][:, 0], torch.cat((latent, turned(k_r)), -1)) < 1e-10


# ---------------------------------------------------------------------------------------------------
# special cases, positions, start

@torch.no_grad()
def test_m3_without_compression_and_rope_it_is_plain_attention_on_normed_inputs():
    """d_r = 0, d_c = C, W_DKV = I: queries of x, keys and values of rms(x)."""
    model = small('mla(32, qk_rope_head_dim=0)', n_layer=1)
    attn = model.transformer.h[0].attn
    attn.c_kv_a.weight.copy_(torch.eye(32))
    attn.norm_kv.weight.fill_(1.0)
    x, y = attention_of(model, tokens(2, 24))
    normed = F.rms_norm(x, (32,), eps=1e-5)
    rows = attn.c_kv_b.weight.view(4, 16, 32)
    plain = small('causal', n_layer=1).transformer.h[0].attn
    for site, weight in (('c_q', attn.c_q.weight), ('c_k', rows[:, :8].flatten(0, 1)),
                         ('c_v', rows[:, 8:].flatten(0, 1)), ('c_proj', attn.c_proj.weight)):
        getattr(plain, site).weight.copy_(weight)
    q, k, v = (t.unflatten(-1, (4, 8)).transpose(1, 2) for t in (plain.c_q(x), plain.c_k(normed), plain.c_v(normed)))
    expected = plain.c_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
    assert difference(y, expected) < 1e-10
    attn.c_kv_a.weight.mul_(2)                          # the norm takes a factor away, up to its eps
    assert difference(attention_of(model, tokens(2, 24))[1], expected) < 1e-3


def context_of(model, idx, first=0):
    from model import Context
    return Context(idx, torch.arange(first, first + idx.size(1)), model.config)


@pytest.mark.parametrize('ngpt', ['none', 'full', 'simple'])
@torch.no_grad()
def test_m4_p1_p2_rope_scores_depend_on_the_distance_and_nope_scores_not(ngpt):
    model = small(ngpt=ngpt)
    attn, ctx = model.transformer.h[0].attn, context_of(model, tokens(1, 24))
    x = torch.randn(1, 1, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).expand(1, 24, 32)
    q_n, q_r = attn.queries(x, ctx)
    c, k_r = attn.latents(x)
    scores = (q_r @ attn.turn(attn.scale.shared(k_r), ctx)[:, None].mT)[0]             # (H, T, T)
    for k in range(-22, 23):
        diagonal = scores.diagonal(k, 1, 2)
        assert (diagonal - diagonal[:, :1]).abs().max() < 1e-10
    assert (scores.amax((1, 2)) - scores.amin((1, 2))).min() > 1e-3
    assert difference(q_n, q_n[:, :, :1]) < 1e-12 and difference(c, c[:, :1]) < 1e-12   # no rotation in the nope part


@pytest.mark.parametrize('settings', [dict(rope=True), dict(rope=True, ngpt='full'),
                                      dict(rope=True, value_residual=True)], ids=str)
@torch.no_grad()
def test_m5_shifted_positions_change_nothing(settings):
    model, idx = small(LARGE, **settings), tokens(2, 11)
    assert difference(logits_of(model, idx, start=13), logits_of(model, idx)) < 1e-10
    x, y = attention_of(model, idx)
    attn = model.transformer.h[0].attn
    still = context_of(model, idx)
    still.positions = torch.zeros(11, dtype=torch.long)
    assert difference(attn(x, still), y) > 1e-6         # but positions do matter


@torch.no_grad()
def test_with_a_position_table_the_rope_part_comes_on_top():
    model, idx = small(rope=False), tokens(2, 11)
    assert 'wpe' in model.transformer and difference(logits_of(model, idx, start=9), logits_of(model, idx)) > 1e-6
    model.transformer.wpe.weight.zero_()
    assert difference(logits_of(model, idx, start=9), logits_of(model, idx)) < 1e-10


@pytest.mark.parametrize('spec', ['mla(64, qk_rope_head_dim=16)', 'mla(64, q_lora_rank=96, qk_rope_head_dim=16)',
                                  'mla(32, qk_nope_head_dim=16, qk_rope_head_dim=64)'])
@pytest.mark.parametrize('ngpt', ['full', 'simple'])
@torch.no_grad()
def test_n5_ngpt_logits_start_at_std_1(spec, ngpt):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**SMALL, 'n_embd': 256, 'n_layer': 1}, attention=spec, ngpt=ngpt))
    attn, idx = model.transformer.h[0].attn, tokens(8, 24)
    x, ctx = F.normalize(torch.randn(8, 24, 256), dim=-1), context_of(model, idx)
    q = torch.cat(attn.queries(x, ctx), -1)
    c, k_r = attn.latents(x)
    k_n, _ = attn.multiply_out(c, ctx)
    k = torch.cat((k_n, attn.turn(attn.scale.shared(k_r), ctx)[:, None].expand(-1, 4, -1, -1)), -1)
    if ngpt == 'full':
        k = k * attn.scale.inverse(k_n, k_r)[..., None]
    logits = attn.scale.scale * q @ k.mT
    assert 0.8 < logits.std().item() < 1.2


@torch.no_grad()
def test_ngpt_survives_a_key_of_zeros():
    attn = small(ngpt='full').transformer.h[0].attn
    assert attn.scale.inverse(torch.zeros(1, 4, 3, 8), torch.zeros(1, 3, 4)).isfinite().all()


# ---------------------------------------------------------------------------------------------------
# accounting and refusals

def numel(spec, **settings):
    with torch.device('meta'):
        model = GPT(GPTConfig(**{**dict(n_layer=1, n_embd=768, n_head=12), **settings}, attention=spec))
    return sum(p.numel() for p in model.transformer.h[0].attn.parameters())


def test_u7_the_sizes_of_gpt2():
    C, H = 768, 12
    assert numel('mla(256, q_lora_rank=384)') == 1_942_144          # the causal attention has 2,359,296
    assert numel('mla(256)') == C * H * 96 + C * 288 + 256 * H * 128 + H * 64 * C + 256
    assert numel('mla(256)', ngpt='full') == numel('mla(256)') - 256 + H * 64 + 32
    assert numel('mla(256)', ngpt='simple') == numel('mla(256)') - 256 + H


def test_flops_are_those_of_the_naive_path():
    assert small(LARGE).transformer.h[0].attn.flops(100) == 100 * 4 * (2 * (6 + 4) + 2 * 8)


@pytest.mark.parametrize('spec, settings, sentence', [
    ('mla(0)', {}, 'kv_lora_rank must be a whole number of at least 1, got 0'),
    ('mla(8, q_lora_rank=0)', {}, 'q_lora_rank must be'), ('mla(8, v_head_dim=True)', {}, 'v_head_dim must be'),
    ('mla(8, qk_rope_head_dim=3)', {}, 'must be an even whole number, 0 for none, got 3'),
    ('mla(8, qk_rope_head_dim=0)', dict(rope=True), 'leave mla without positions; take an even number such as 32'),
    ('mla(8)', dict(n_kv_head=2), 'one latent for all heads, so there are no groups of heads; set n_kv_head=None'),
    ('mla(8)', dict(qk_norm='standard'), "norms its latents instead of queries and keys; set qk_norm='none'"),
    ('mla(8, v_head_dim=5)', dict(value_residual=True), 'values of n_embd features; set v_head_dim=8'),
    ({'h.2': 'mla(8)', '*': 'causal'}, dict(value_residual=True),
     "value_residual reads block 0's latents while decoding, and block 0 is causal; give it mla too"),
], ids=str)
def test_refused_arguments(spec, settings, sentence):
    with pytest.raises(UserError, match=sentence) as error:
        small(spec, **settings)
    assert '.attn' in str(error.value) and '\n' not in str(error.value)
