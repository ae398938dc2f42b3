"""MLA with DIFF's and DINT's heads: against the formulas a head and a row at a time, absorbed against naive, the cache."""
import copy
import math

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from attention import latent_diff
from layers.basic import tags_of
from model import GPT, Context, GPTConfig
from tests.attention.test_diff_dint import Largest
from variants import UserError

SMALL = dict(block_size=24, vocab_size=65, n_layer=3, n_head=4, n_embd=32)
NAMES = ['mla_diff', 'mla_dint']
ARGUMENTS = ['(12, qk_rope_head_dim=4)', '(20, q_lora_rank=12, qk_nope_head_dim=6, qk_rope_head_dim=2)']
SPECS = [name + arguments for name in NAMES for arguments in ARGUMENTS]


def small(attention, dtype=torch.float64, random=0.2, **settings):
    """A model with random parameters."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**SMALL, 'attention': attention, **settings})).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=random)
    model.normalise_weights()
    return model


def tokens(*shape, seed=0):
    return torch.randint(65, shape, generator=torch.Generator().manual_seed(seed))


def inputs(T=12, rows=2, width=32):
    return torch.randn(rows, T, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def context(model, T=12, rows=2, cache=None):
    return Context(tokens(rows, T), torch.arange(T), model.config, cache)


def difference(a, b):
    return (a - b).abs().max().item()


def logits_of(model, idx, **more):
    return model(idx, idx, **more)[0]


def in_pieces(model, idx, pieces):
    """(logits, caches) of idx read in pieces."""
    caches, start, found = [{} for _ in model.transformer.h], 0, []
    for n in pieces:
        found.append(logits_of(model, idx[:, start:start + n], caches=caches, start=start))
        start += n
    return torch.cat(found, 1), caches


def before_projection(attn, x, ctx):
    """What c_proj is given, (B, T, P, d_v)."""
    held = []
    hook = attn.c_proj.register_forward_pre_hook(lambda module, args: held.append(args[0]))
    attn(x, ctx)
    hook.remove()
    return held[0].unflatten(-1, (attn.n_head, -1))


def mixed(attn, x, ctx):
    """The heads before their norm, (B, T, P, d_v)."""
    attn.finish, kept = lambda y: y, attn.finish        # shadows the method of this module alone
    try:
        return before_projection(attn, x, ctx)
    finally:
        attn.finish = kept


def decoded(attn, model, x, take=mixed):
    """As `take`, by the absorbed path: one token after another."""
    cache, found = {}, []
    for t in range(x.size(1)):
        ctx = Context(tokens(x.size(0), 1), torch.arange(t, t + 1), model.config, cache)
        found.append(take(attn, x[:, t:t + 1], ctx))
    return torch.cat(found, 1)


def set_lambda(attn, value):
    """exp(log(value - lambda_init + 1)) - exp(0) + lambda_init = value"""
    with torch.no_grad():
        attn.lambdas.zero_()
        attn.lambdas[0, 0], attn.lambdas[1, 0] = math.log(value - attn.lambda_init + 1), 1.0
    assert attn.lam(None).item() == pytest.approx(value, abs=1e-12)


# ---------------------------------------------------------------------------------------------------
# the formula, a head, a map and a row at a time, from the weights alone

def turned(x):
    """RoPE of x (T, d_r) by complex numbers."""
    half = x.size(-1) // 2
    frequency = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    phase = torch.polar(torch.ones(()).double(), torch.arange(len(x)).double()[:, None] * frequency)
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (half, 2)).contiguous()) * phase).flatten(-2)


def softmax_rows(scores):
    """Causal softmax, row by row."""
    weights = torch.zeros_like(scores)
    for t in range(len(scores)):
        e = (scores[t, :t + 1] - scores[t, :t + 1].max()).exp()
        weights[t, :t + 1] = e / e.sum()
    return weights


def running_mean_of_rows(a):
    return torch.stack([a[:t + 1].sum(0) / (t + 1) for t in range(len(a))])


class Formula:
    """One block's attention on x (T, C). d, n, r, v: sizes of a query, its nope part, its rope part, a value."""

    def __init__(self, model, layer, first_values=None):
        self.attn, self.config, self.layer, self.first = model.transformer.h[layer].attn, model.config, layer, first_values
        self.n, self.r = self.attn.nope, self.attn.rope
        self.d, self.v, self.pairs = self.n + self.r, self.attn.value, self.config.n_head // 2

    def through(self, site, x):
        module = getattr(self.attn, site)
        y = x @ module.dense_weight().T
        return y if module.bias is None else y + module.bias

    def latent(self, z, norm):
        if self.config.ngpt != 'none':
            return z / z.norm(dim=-1, keepdim=True)
        return z / (z.square().mean(-1, keepdim=True) + self.config.norm_eps).sqrt() * norm.weight

    def maps_and_values(self, x):
        """[(A1, A2, v) a head]."""
        queries = (self.through('c_q', x) if self.attn.c_q_a is None else
                   self.through('c_q_b', self.latent(self.through('c_q_a', x), self.attn.norm_q)))
        down, rank = self.through('c_kv_a', x), self.attn.rank
        up = self.through('c_kv_b', self.latent(down[:, :rank], self.attn.norm_kv))
        width, found = 2 * self.n + self.v, []
        for p in range(self.pairs):
            rows, maps = up[:, p * width:(p + 1) * width], []
            for m in (0, 1):
                q = queries[:, (2 * p + m) * self.d:(2 * p + m + 1) * self.d]
                k = torch.cat((rows[:, m * self.n:(m + 1) * self.n],
                               down[:, rank + m * self.r:rank + (m + 1) * self.r]), 1)
                maps.append(softmax_rows(self.scores(q, k, p)))
            v = rows[:, 2 * self.n:]
            if self.first is not None:
                lam = self.attn.mix_v.lam
                v = (1 - lam) * v + lam * self.first[:, p * self.v:(p + 1) * self.v]
            found.append((*maps, v))
        return found

    def scores(self, q, k, p):
        scale = self.attn.scale
        if self.config.ngpt == 'full':
            s = torch.cat((scale.s_qk.stored[p, 0], scale.s_rope.stored)) * self.config.n_embd ** 0.5
            q, k = q / q.norm(dim=1, keepdim=True) * s, k / k.norm(dim=1, keepdim=True) * s
        if self.config.ngpt == 'simple':
            s = scale.s_qk.stored[p, 0] * self.config.n_embd ** 0.5
            q, k = q * s, k * s
        q, k = (torch.cat((u[:, :self.n], turned(u[:, self.n:])), 1) for u in (q, k))
        C, rank, query_rank = self.config.n_embd, self.attn.rank, 12 if self.attn.c_q_a is not None else self.config.n_embd
        factor = {'none': self.d ** -0.5, 'full': self.d ** 0.5,
                  'simple': (self.n / (query_rank * rank) + self.r / (query_rank * C)) ** -0.5}[self.config.ngpt]
        return factor * q @ k.T

    def lam(self):
        l1, l2, l3, l4 = self.attn.lambdas
        return math.exp(l1 @ l2) - math.exp(l3 @ l4) + self.init

    @property
    def init(self):
        return 0.8 - 0.6 * math.exp(-0.3 * self.layer)

    def heads(self, x, normed=True):
        """What c_proj is given, (T, P, d_v)."""
        dint, lam, heads = 'dint' in str(self.config.attention), self.lam(), []
        for a1, a2, v in self.maps_and_values(x):
            y = (a1 - lam * a2 + (lam * running_mean_of_rows(a1) if dint else 0)) @ v
            if normed and self.config.ngpt == 'none':
                y = y / (y.square().mean(1, keepdim=True) + 1e-5).sqrt() * self.attn.norm_head.weight
            elif normed:
                y = y / y.norm(dim=1, keepdim=True) * self.v ** 0.5
            heads.append(y if dint or not normed else y * (1 - self.init))
        return torch.stack(heads, 1)


SETTINGS = [{}, dict(rope=True, bias=True), dict(ngpt='full', rope=True), dict(ngpt='simple'),
            dict(linear={'*.attn.*': 'lowrank(3)'}), dict(linear={'*.c_kv_*': 'kron(4, 4)'}, ngpt='full')]


def words(settings):
    return '-'.join(f'{k}={v}' for k, v in settings.items()) or 'plain'


@pytest.mark.parametrize('settings', SETTINGS, ids=words)
@pytest.mark.parametrize('spec', SPECS)
@torch.no_grad()
def test_d7_i3_both_paths_equal_the_formula(spec, settings):
    """By SDPA, absorbed, and with DINT's mean as a mean of outputs: the maps' formula."""
    model, x = small(spec, **settings), inputs()
    for layer, block in enumerate(model.transformer.h):
        expected = torch.stack([Formula(model, layer).heads(row) for row in x])
        assert difference(before_projection(block.attn, x, context(model)), expected) < 1e-10
        assert difference(decoded(block.attn, model, x, before_projection), expected) < 1e-10


@pytest.mark.parametrize('spec', SPECS)
@torch.no_grad()
def test_d7_i3_in_fp32_and_padded(spec, monkeypatch):
    from attention import diff
    model, x = small(spec, rope=True), inputs()
    expected = torch.stack([Formula(model, 1).heads(row) for row in x])
    single = copy.deepcopy(model).float()
    found = before_projection(single.transformer.h[1].attn, x.float(), context(single))
    assert difference(found.double(), expected) < 1e-5 * expected.abs().max()
    monkeypatch.setattr(diff, 'PAD_FROM', 4)
    assert difference(before_projection(model.transformer.h[1].attn, x, context(model)), expected) < 1e-10


@pytest.mark.parametrize('spec', SPECS)
@torch.no_grad()
def test_v1_v2_the_value_residual_mixes_block_0s_values(spec):
    """In both paths; with a share of one W_UV of the block plays no part."""
    model, x = small(spec, value_residual=True), inputs()
    first = [torch.cat([v for *_, v in Formula(model, 0).maps_and_values(row)], 1) for row in x]
    for layer in (1, 2):
        expected = torch.stack([Formula(model, layer, v0).heads(row) for row, v0 in zip(x, first)])
        ctx = context(model)
        model.transformer.h[0].attn(x, ctx)
        assert difference(before_projection(model.transformer.h[layer].attn, x, ctx), expected) < 1e-10
    attn, idx = model.transformer.h[2].attn, tokens(2, 24)
    attn.mix_v.lam.fill_(1.0)
    before = logits_of(model, idx), in_pieces(model, idx, [5] + [1] * 19)[0]
    attn.c_kv_b.weight.unflatten(0, (2, -1))[:, 2 * attn.nope:].normal_()
    after = logits_of(model, idx), in_pieces(model, idx, [5] + [1] * 19)[0]
    assert all(difference(a, b) < 1e-10 for a, b in zip(before, after))
    attn.c_kv_b.weight.unflatten(0, (2, -1))[:, :attn.nope] = 0
    assert difference(logits_of(model, idx), before[0]) > 1e-4      # its keys do


# ---------------------------------------------------------------------------------------------------
# absorbed decoding

ABSORBED = [
    {}, dict(rope=True, bias=True), dict(ngpt='full', rope=True), dict(ngpt='simple'),
    dict(value_residual=True, bias=True, rope=True), dict(value_residual=True, ngpt='full'),
    dict(linear={'*.c_kv_b': 'lowrank(3)', '*.c_q*': 'kron(4, 4, terms=2)'}, bias=True, value_residual=True),
    dict(linear={'*.c_kv_b': 'kron(4, 4)'}, ngpt='full', value_residual=True)]


@pytest.mark.parametrize('settings', ABSORBED, ids=words)
@pytest.mark.parametrize('spec', SPECS)
@torch.no_grad()
def test_m1_absorbed_decode_equals_the_naive_forward(spec, settings, monkeypatch):
    model, idx = small(spec, **settings), tokens(2, 24)
    full, calls = logits_of(model, idx), []
    naive = latent_diff.LatentDifferentialAttention.outputs
    monkeypatch.setattr(latent_diff.LatentDifferentialAttention, 'outputs',
                        lambda *more: calls.append(1) or naive(*more))
    for pieces in ([1] * 24, [5] + [1] * 19, [7, 17], [3, 1, 8, 1, 11], [24]):
        assert difference(in_pieces(model, idx, pieces)[0], full) < 1e-10, pieces
    assert len(calls) == 5 * SMALL['n_layer']           # the first piece alone is multiplied out


@pytest.mark.parametrize('rules', [
    {'h.0': 'mla(12)', 'h.1': 'mla_diff(20)', 'h.2': 'mla_dint(8)'},
    {'h.0': 'mla_dint(12)', 'h.1': 'mla(20)', 'h.2': 'causal'},
    {'h.0': 'mla_diff(12)', 'h.1': 'dint', 'h.2': 'mla_dint(16)'}], ids=str)
@pytest.mark.parametrize('settings', [dict(bias=True), dict(ngpt='full'), dict(rope=True)], ids=words)
@torch.no_grad()
def test_m1_blocks_of_other_heads_share_block_0s_values(rules, settings):
    """Value residual between blocks with 4 heads of 8 and 2 heads of 16: the same 32 features, shared out anew."""
    model, idx = small(rules, value_residual=True, **settings), tokens(2, 24)
    full = logits_of(model, idx)
    for pieces in ([1] * 24, [5] + [1] * 19, [7, 17]):
        assert difference(in_pieces(model, idx, pieces)[0], full) < 1e-10


@pytest.mark.parametrize('spec', SPECS)
@torch.no_grad()
def test_m1_in_fp32(spec):
    model, idx = small(spec, torch.float32, ngpt='full'), tokens(2, 24)
    full = logits_of(model, idx)
    assert difference(in_pieces(model, idx, [5] + [1] * 19)[0], full) < 1e-5 * max(1, full.abs().max().item())


@pytest.mark.parametrize('settings, more', [({}, 0), (dict(value_residual=True), 0), (dict(ngpt='simple'), 0),
                                            (dict(ngpt='full'), 4)], ids=str)
@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('arguments, numbers', [(ARGUMENTS[0], 12 + 2 * 4), (ARGUMENTS[1], 20 + 2 * 2)])
@torch.no_grad()
def test_m2_the_cache_holds_a_latent_and_a_rotated_key_a_map(name, arguments, numbers, settings, more):
    """d_c + 2 d_r numbers per token (4 norms more under full nGPT), and the mean of DINT: d_v a head."""
    mean = {'mla_diff': 0, 'mla_dint': 2 * 16}[name]
    for pieces in ([1] * 24, [20, 4]):
        for cache in in_pieces(small(name + arguments, **settings), tokens(2, 24), pieces)[1]:
            tensors = [t for t in cache.values() if torch.is_tensor(t)]
            assert sum(t.numel() for t in tensors) == 2 * (24 * (numbers + more) + mean)


@pytest.mark.parametrize('name', NAMES)
@torch.no_grad()
def test_m2_the_cached_latent_is_normed_and_the_cached_keys_turned(name):
    model, x = small(name + ARGUMENTS[0], rope=True), inputs(rows=1)
    attn, cache = model.transformer.h[0].attn, {}
    attn(x, context(model, rows=1, cache=cache))
    down = (x @ attn.c_kv_a.weight.T)[0]
    latent = down[:, :12] / (down[:, :12].square().mean(-1, keepdim=True) + 1e-5).sqrt() * attn.norm_kv.weight
    expected = torch.cat((latent, turned(down[:, 12:16]), turned(down[:, 16:])), 1)
    assert difference(cache['latent'][0, 0, :12], expected) < 1e-10
    if name == 'mla_dint':
        outputs = torch.stack([(a1 @ v)[:12].mean(0) for a1, _, v in Formula(model, 0).maps_and_values(x[0])])
        assert difference(cache['mean'][0, :, 0], outputs) < 1e-10


# ---------------------------------------------------------------------------------------------------
# what makes them DIFF and DINT, in both paths

def both_paths(attn, model, x, take=mixed):
    """(naive, absorbed)."""
    return take(attn, x, context(model, x.size(1), x.size(0))), decoded(attn, model, x, take)


def first_map(model, layer, x, which=0):
    """softmax(...) v of one map by the formula, (B, T, P, d_v)."""
    return torch.stack([torch.stack([maps[which] @ maps[2] for maps in Formula(model, layer).maps_and_values(row)], 1)
                        for row in x])


@pytest.mark.parametrize('spec', SPECS)
@torch.no_grad()
def test_d1_i4_lambda_zero_is_plain_attention_and_a_norm_a_head(spec):
    model, x = small(spec), inputs()
    attn = model.transformer.h[1].attn
    set_lambda(attn, 0.0)
    y = first_map(model, 1, x)
    y = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * attn.norm_head.weight
    factor = 1 - (0.8 - 0.6 * math.exp(-0.3)) if 'diff' in spec else 1.0
    for found in both_paths(attn, model, x, before_projection):
        assert difference(found, factor * y) < 1e-10
    set_lambda(attn, 0.3)
    assert difference(before_projection(attn, x, context(model)), factor * y) > 1e-2


@pytest.mark.parametrize('spec', SPECS)
@torch.no_grad()
def test_d2_i1_rows_sum_to_one_minus_lambda_or_to_one(spec):
    """Values of one, made by the bias of W_UKV, come through the maps as the rows' sums."""
    model, x = small(spec, bias=True, random=0.5), inputs()
    attn = model.transformer.h[1].attn
    for tensor, value in ((attn.c_kv_b.weight, 0.0), (attn.c_kv_b.bias, 1.0)):
        tensor.unflatten(0, (2, -1))[:, 2 * attn.nope:] = value
    expected = 1 - attn.lam(None).item() if 'diff' in spec else 1.0
    for found in both_paths(attn, model, x):
        assert difference(found, torch.full_like(found, expected)) < 1e-12
    assert abs(attn.lam(None).item()) > 0.01


@pytest.mark.parametrize('name', NAMES)
@torch.no_grad()
def test_d3_two_equal_maps_leave_one_minus_lambda_of_one(name):
    """For DINT with its mean: A + lam (mean - A)."""
    model, x = small(name + ARGUMENTS[0]), inputs()
    attn = model.transformer.h[1].attn
    queries, keys = attn.c_q.weight.view(2, 2, 12, 32), attn.c_kv_b.weight.view(2, 32, 12)
    queries[:, 1], keys[:, 8:16] = queries[:, 0], keys[:, :8].clone()
    attn.c_kv_a.weight[16:] = attn.c_kv_a.weight[12:16].clone()
    y, lam = first_map(model, 1, x), attn.lam(None)
    mean = torch.stack([running_mean_of_rows(row) for row in y])
    expected = (1 - lam) * y if name == 'mla_diff' else y + lam * (mean - y)
    for found in both_paths(attn, model, x):
        assert difference(found, expected) < 1e-10


@pytest.mark.parametrize('spec', SPECS)
@torch.no_grad()
def test_d4_i2_the_first_token_gives_its_value(spec):
    """Times 1 - lam for DIFF."""
    model, x = small(spec), inputs()
    attn = model.transformer.h[1].attn
    value = torch.stack([torch.stack([v[0] for *_, v in Formula(model, 1).maps_and_values(row)]) for row in x])
    for found in both_paths(attn, model, x):
        assert difference(found[:, 0], value * (1 - attn.lam(None) if 'diff' in spec else 1)) < 1e-12


@pytest.mark.parametrize('name', NAMES)
@torch.no_grad()
def test_d5_the_second_map_of_a_head_touches_that_head_alone(name):
    model, x = small(name + ARGUMENTS[0]), inputs()
    attn = model.transformer.h[1].attn
    for weight in (attn.c_q.weight.view(2, 2, 12, 32)[1, 1], attn.c_kv_b.weight.view(2, 32, 12)[1, 8:16]):
        before, first, second = mixed(attn, x, context(model)), first_map(model, 1, x), first_map(model, 1, x, 1)
        weight += 1
        after, other = mixed(attn, x, context(model)), first_map(model, 1, x, 1)
        assert [p for p in (0, 1) if difference(before[:, :, p], after[:, :, p]) > 1e-6] == [1]
        assert difference(first, first_map(model, 1, x)) < 1e-12                    # A1 stays
        assert difference(after - before, -attn.lam(None) * (other - second)) < 1e-10
    attn.c_kv_a.weight[16:] += 1                        # the second rotated key is that of all second maps
    last = mixed(attn, x, context(model))
    assert [p for p in (0, 1) if difference(last[:, :, p], after[:, :, p]) > 1e-6] == [0, 1]
    assert difference(first_map(model, 1, x), first) < 1e-12


@pytest.mark.parametrize('name', NAMES)
@torch.no_grad()
def test_d6_permuted_heads_permute_their_slices(name):
    model, x = small(name + ARGUMENTS[0], ngpt='full', rope=True), inputs()
    attn = model.transformer.h[1].attn
    before = before_projection(attn, x, context(model))
    for tensor in (attn.c_q.weight, attn.c_kv_b.weight, attn.scale.s_qk.stored):
        tensor.copy_(tensor.unflatten(0, (2, -1)).flip(0).flatten(0, 1))
    for found in both_paths(attn, model, x, before_projection):
        assert difference(found, before.flip(2)) < 1e-12


def test_lambda_counts_layers_from_zero_and_is_a_vector_in_fp32():
    for spec in SPECS:
        model = small(spec)
        found = [block.attn.lambda_init for block in model.transformer.h]
        assert found == pytest.approx([0.2, 0.3555, 0.4707], abs=5e-5)
        assert {tag for name, tag in tags_of(model).items() if 'lambda' in name} == {'vector'}
        scales = [block.attn.head_scale for block in model.transformer.h]
        assert scales == ([1 - i for i in found] if 'diff' in spec else [1.0] * 3)
        assert model.transformer.h[1].attn.bfloat16().lam(None).dtype == torch.float32


# ---------------------------------------------------------------------------------------------------
# nGPT

@pytest.mark.parametrize('name', NAMES)
@torch.no_grad()
def test_ngpt_norms_each_map_alone_and_both_share_s_qk(name):
    model, x = small(name + ARGUMENTS[0], ngpt='full', rope=True), inputs()
    attn, ctx = model.transformer.h[0].attn, context(model)
    assert attn.scale.s_qk().shape == (2, 1, 8) and attn.scale.s_rope().shape == (4,)
    c, k_r = attn.latents(x)
    assert difference(c.norm(dim=-1), torch.ones(2, 12).double()) < 1e-12
    k_n, v = attn.multiply_out(c, ctx)
    inverse = attn.scale.inverse(k_n, k_r)
    assert inverse.shape == (2, 2, 2, 12) and k_r.shape == (2, 2, 12, 4)
    for m in (0, 1):                                    # [k_n, k_r] of each map alone, for every head
        k = torch.cat((k_n[:, m], k_r[:, m, None].expand(-1, 2, -1, -1)), -1) * inverse[:, m, ..., None]
        assert difference(k.norm(dim=-1), torch.ones(2, 2, 12).double()) < 1e-12
    for learned in (attn.scale.s_qk, attn.scale.s_rope):
        learned.stored.fill_(32 ** -0.5)                # 1
    q = torch.cat(attn.queries(x, ctx), -1)             # RoPE keeps the norm
    assert q.shape == (2, 2, 2, 12, 12) and difference(q.norm(dim=-1), torch.ones(2, 2, 2, 12).double()) < 1e-12
    assert (v.norm(dim=-1) - 1).abs().min() > 1e-3      # values are not normed


@pytest.mark.parametrize('ngpt', ['full', 'simple'])
@pytest.mark.parametrize('name', NAMES)
@torch.no_grad()
def test_ngpts_branch_norm_hides_the_factor(name, ngpt):
    model, idx = small(name + ARGUMENTS[1], ngpt=ngpt), tokens(2, 24)
    logits = logits_of(model, idx)
    for block in model.transformer.h:
        assert block.attn.norm_head is None
        block.attn.head_scale *= 3
    assert difference(logits_of(model, idx), logits) < 1e-10


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('arguments', ['(64, qk_rope_head_dim=16)', '(64, q_lora_rank=96, qk_rope_head_dim=16)'])
@pytest.mark.parametrize('ngpt', ['full', 'simple'])
@torch.no_grad()
def test_n5_scores_start_with_std_one_in_both_maps(name, arguments, ngpt):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**SMALL, 'n_embd': 256, 'n_layer': 1}, attention=name + arguments, ngpt=ngpt))
    attn, ctx = model.transformer.h[0].attn, context(model, 24, 8)
    x = F.normalize(torch.randn(8, 24, 256), dim=-1)
    q = torch.cat(attn.queries(x, ctx), -1)
    c, k_r = attn.latents(x)
    k_n, _ = attn.multiply_out(c, ctx)
    k = torch.cat((k_n, attn.turn(attn.scale.shared(k_r), ctx)[:, :, None].expand(-1, -1, 2, -1, -1)), -1)
    if ngpt == 'full':
        k = k * attn.scale.inverse(k_n, k_r)[..., None]
    for m in (0, 1):
        assert 0.8 < (attn.scale.scale * q @ k.mT)[:, m].std().item() < 1.2


@pytest.mark.parametrize('spec', SPECS)
@torch.no_grad()
def test_n1_every_site_is_normalised_along_its_sphere(spec):
    """Rows of W_DQ, W_DKV (its rotated keys too), W_Q, W_UQ, W_UK and W_UV; columns of W_O."""
    model = small(spec, ngpt='full', linear={'*.attn.c_kv_b': 'kron(4, 2)', '*.attn.c_q*': 'lowrank(3)'})
    for site, module in model.sites().items():
        norms = module.dense_weight().norm(dim=0 if site.endswith('.c_proj') else 1)
        assert difference(norms, torch.ones_like(norms)) < 1e-10, site


# ---------------------------------------------------------------------------------------------------
# costs, half precision, refusals

def numel(spec, **settings):
    with torch.device('meta'):
        model = GPT(GPTConfig(**{**dict(n_layer=1, n_embd=768, n_head=12), **settings}, attention=spec))
    return sum(p.numel() for p in model.transformer.h[0].attn.parameters())


@pytest.mark.parametrize('name', NAMES)
def test_u7_the_sizes_of_gpt2(name):
    C, P, d_c, d_n, d_r, d_v = 768, 6, 256, 64, 32, 128
    plain = C * 2 * P * (d_n + d_r) + C * (d_c + 2 * d_r) + d_c * P * (2 * d_n + d_v) + P * d_v * C + d_c + 4 * 96 + d_v
    assert numel(f'{name}(256)') == plain == 2_114_304
    compressed = plain - C * 2 * P * 96 + C * 384 + 384 * 2 * P * 96 + 384
    assert numel(f'{name}(256, q_lora_rank=384)') == compressed == 1_967_232      # the causal attention has 2,359,296
    assert numel(f'{name}(256)', ngpt='full') == plain - d_c - d_v + P * d_n + d_r
    assert numel(f'{name}(256)', ngpt='simple') == plain - d_c - d_v + P


@pytest.mark.parametrize('spec', SPECS)
@torch.no_grad()
def test_flops_are_those_of_the_naive_products(spec):
    model, x = small(spec), inputs(16)
    attn, ctx = model.transformer.h[0].attn, context(model, 16)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        attn(x, ctx)
    sites = sum(module.flops(32) for name, module in attn.named_modules() if hasattr(module, 'spec'))
    mean = 2 * attn.value if 'dint' in spec else 0      # additions are not products
    assert counter.get_total_flops() - sites == 32 * (attn.flops(16) - mean)
    assert attn.flops(16) == 4 * 16 * 2 * (attn.nope + attn.rope + attn.value) + mean


@pytest.mark.parametrize('name', NAMES)
def test_d7_training_makes_no_map(name):
    """Forward and backward of 512 tokens: the largest tensor is a few T x C, not 512 x 512."""
    model = small(f'{name}(12, qk_rope_head_dim=4)', block_size=512).float()
    x = inputs(512, 1).float().requires_grad_()
    with Largest() as record:
        model.transformer.h[0].attn(x, context(model, 512, 1)).sum().backward()
    assert record.numel <= 4 * 512 * 32


@pytest.mark.parametrize('spec', SPECS)
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_weights_stay_near(spec, dtype):
    """Pure half weights, no autocast: forward and cached forward run and follow float64; the mean is kept in fp32."""
    model, idx = small(spec, random=0.1, rope=True), tokens(2, 24)
    expected = logits_of(model, idx)
    half = copy.deepcopy(model).to(dtype)
    pieces, caches = in_pieces(half, idx, [9, 1, 14])
    for found in (logits_of(half, idx), pieces):
        assert found.dtype == dtype and (found.double() - expected).norm() < 0.05 * expected.norm()
    assert 'dint' not in spec or caches[0]['mean'].dtype == torch.float32


@pytest.mark.parametrize('arguments, settings, sentence', [
    ('(0)', {}, 'kv_lora_rank must be a whole number of at least 1, got 0'),
    ('(8, qk_rope_head_dim=3)', {}, 'must be an even whole number, 0 for none, got 3'),
    ('(8, qk_rope_head_dim=0)', dict(rope=True), 'leave mla without positions; take an even number such as 32'),
    ('(8)', dict(n_head=1), 'a head is a pair of maps, so that n_head must be even, got 1'),
    ('(8)', dict(n_kv_head=2), 'one latent for all heads, so there are no groups of heads; set n_kv_head=None'),
    ('(8)', dict(qk_norm='split'), "norms its latents instead of queries and keys; set qk_norm='none'"),
    ('(8, v_head_dim=8)', dict(value_residual=True), 'values of n_embd features; set v_head_dim=16')], ids=str)
@pytest.mark.parametrize('name', NAMES)
def test_mistakes_are_one_sentence(name, arguments, settings, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        small(name + arguments, **settings)
    assert str(caught.value).startswith(f'h.0.attn: {name}{arguments}: ') and '\n' not in str(caught.value)


def test_a_plain_block_0_is_refused_with_a_value_residual():
    with pytest.raises(UserError, match="and block 0 is diff; give it mla too"):
        small({'h.2': 'mla_dint(8)', '*': 'diff'}, value_residual=True)


@pytest.mark.parametrize('name', NAMES)
@torch.no_grad()
def test_without_rope_features_it_still_decodes(name):
    model, idx = small(f'{name}(12, qk_rope_head_dim=0)'), tokens(2, 24)
    assert difference(in_pieces(model, idx, [5] + [1] * 19)[0], logits_of(model, idx)) < 1e-10
    assert not any(block.attn.leaks for block in model.transformer.h)
