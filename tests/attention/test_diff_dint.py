"""DIFF and DINT against their formulas, written out a head and a row at a time. I5: contract/test_attention.py."""
import copy
import math

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import attention.dint
from attention.heads import rotate, rotation
from layers.basic import tags_of
from model import GPT, Context, GPTConfig
from variants import UserError

SIZES = dict(block_size=16, vocab_size=65, n_layer=2, n_head=8, n_embd=32)
VERSION_1 = ['diff', 'dint', 'dint(version=2)']         # two keys per head, a norm per head
ALL = [*VERSION_1, 'diff(version=2)']


def build(spec, random=0.2, **changes):
    """A float64 model with random parameters."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**SIZES, 'attention': spec, **changes})).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=random)
    model.normalise_weights()
    return model


def tokens(*shape, seed=0):
    return torch.randint(65, shape, generator=torch.Generator().manual_seed(seed))


def inputs(T=12, rows=2, width=32):
    return torch.randn(rows, T, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def context(model, T=12, rows=2, idx=None, cache=None):
    return Context(tokens(rows, T) if idx is None else idx, torch.arange(T), model.config, cache)


def before_projection(attn, x, ctx):
    """What c_proj is given, (B, T, P, D_v)."""
    held = []
    hook = attn.c_proj.register_forward_pre_hook(lambda module, args: held.append(args[0]))
    attn(x, ctx)
    hook.remove()
    return held[0].unflatten(-1, (attn.pairs, -1))


def mixed(attn, x, ctx, v=None):
    """The heads before their norm, (B, P, T, D_v), with other values if v is given."""
    q, k, own = attn.project(x, ctx)
    return attn.mix(q, k, own if v is None else v, attn.lam(x), ctx)


def difference(a, b):
    return (a - b).abs().max().item()


def set_lambda(attn, value):
    """exp(log(value - lambda_init + 1)) - exp(0) + lambda_init = value"""
    with torch.no_grad():
        attn.lambdas.zero_()
        attn.lambdas[0, 0], attn.lambdas[1, 0] = math.log(value - attn.lambda_init + 1), 1.0
    assert attn.lam(None).item() == pytest.approx(value, abs=1e-12)


# ---------------------------------------------------------------------------------------------------
# the formulas, a head and a row at a time, from the weights alone

def head_vectors(attn, config, x):
    """([[q1, q2] a pair], [[k1, k2] a pair], [v per pair]), each (T, size), of x (T, C)."""
    D, T = config.n_embd // config.n_head, len(x)
    table = rotation(torch.arange(T), D, config.rope_base, torch.float64)
    q, k, v = (x @ site.weight.T for site in (attn.c_q, attn.c_k, attn.c_v))
    maps = attn.key_maps
    shared = attn.pairs * maps * D // k.size(1)         # pairs of queries a group

    def norm(vectors, pair):
        if config.qk_norm == 'standard':
            size = (torch.cat(vectors, 1).square().mean(1, keepdim=True) + 1e-6).sqrt()
            vectors = [u / size for u in vectors]
        if config.qk_norm == 'split':
            vectors = [u / (u.square().mean(1, keepdim=True) + 1e-6).sqrt() for u in vectors]
        if config.ngpt == 'full':
            vectors = [u / u.norm(dim=1, keepdim=True) for u in vectors]
        if config.ngpt != 'none':
            vectors = [u * attn.norm_qk.s_qk.stored[pair] * config.n_embd ** 0.5 for u in vectors]
        return [rotate(u, table) if config.rope else u for u in vectors]

    queries, keys, values = [], [], []
    for i in range(attn.pairs):
        g = i // shared
        queries.append(norm([q[:, (2 * i + m) * D:(2 * i + m + 1) * D] for m in (0, 1)], i))
        keys.append((norm([k[:, (maps * g + m) * D:(maps * g + m + 1) * D] for m in range(maps)], i) * 2)[:2])
        values.append(v[:, g * maps * D:(g + 1) * maps * D])
    return queries, keys, values


def softmax_rows(scores):
    """Causal softmax, row by row."""
    weights = torch.zeros_like(scores)
    for t in range(len(scores)):
        e = (scores[t, :t + 1] - scores[t, :t + 1].max()).exp()
        weights[t, :t + 1] = e / e.sum()
    return weights


def third_map(a, version):
    """A3 of DINT by its definition, from A1 (T, T)."""
    T, found = len(a), torch.zeros_like(a)
    for t in range(T):
        for j in range(T):
            if version == 1:
                found[t, j] = sum(a[i, j] for i in range(t + 1)) / (t + 1)
            elif version == 2 and j <= t:
                found[t, j] = sum(a[i, j] for i in range(j, t + 1)) / (t - j + 1)
            elif version == 'published':
                found[t, j] = sum(a[i, j] for i in range(T)) / T
            elif version == 'visible' and j <= t:
                found[t, j] = sum(a[i, j] for i in range(j, T)) / (T - j)
    return found / found.sum(1, keepdim=True) if version == 2 else found


def reference(attn, config, x, site_index, dint=None):
    """What c_proj is given for x (T, C): (T, P, D_v)."""
    D, C = config.n_embd // config.n_head, config.n_embd
    scale = {'none': D ** -0.5, 'full': D ** 0.5, 'simple': C * D ** -0.5}[config.ngpt]
    heads = []
    for i, ((q1, q2), (k1, k2), v) in enumerate(zip(*head_vectors(attn, config, x))):
        a1, a2 = softmax_rows(q1 @ k1.T * scale), softmax_rows(q2 @ k2.T * scale)
        if attn.version == 2:
            w = attn.w_lambda[i] if config.ngpt == 'none' else attn.w_lambda[i] / attn.w_lambda[i].norm() * C ** 0.5
            heads.append((a1 - a2 / (1 + (-(x @ w)).exp())[:, None]) @ v)
            continue
        init = 0.8 - 0.6 * math.exp(-0.3 * site_index)
        l1, l2, l3, l4 = attn.lambdas
        lam = math.exp(l1 @ l2) - math.exp(l3 @ l4) + init
        y = (a1 - lam * a2 + (lam * third_map(a1, dint) if dint else 0)) @ v
        if config.ngpt == 'none':
            y = y / (y.square().mean(1, keepdim=True) + 1e-5).sqrt() * attn.norm_head.weight
        else:
            y = y / y.norm(dim=1, keepdim=True) * (2 * D) ** 0.5
        heads.append(y if dint else y * (1 - init))
    return torch.stack(heads, 1)


SETTINGS = [{}, dict(rope=True, n_kv_head=4), dict(qk_norm='standard'), dict(qk_norm='split', rope=True),
            dict(qk_norm='standard', n_kv_head=2), dict(qk_norm='split', n_kv_head=4), dict(ngpt='full', rope=True),
            dict(ngpt='simple')]
FORMS = {'diff': None, 'diff(version=2)': None, 'dint': 1, 'dint(version=2)': 2,
         "dint(version='published')": 'published', "dint(version='visible')": 'visible'}


@pytest.mark.parametrize('settings', SETTINGS, ids=lambda s: '-'.join(f'{k}={v}' for k, v in s.items()) or 'plain')
@pytest.mark.parametrize('spec', FORMS)
@pytest.mark.parametrize('pad_from', [4, 256])
@torch.no_grad()
def test_d7_i3_the_sdpa_form_equals_the_map_form(spec, settings, pad_from, monkeypatch):
    """D7: DIFF by SDPA, padded or not, equals maps. I3: DINT's running mean of outputs is A3 v by definition."""
    monkeypatch.setattr(attention.diff, 'PAD_FROM', pad_from)
    model, x = build(spec, **settings), inputs()
    for i, block in enumerate(model.transformer.h):
        found = before_projection(block.attn, x, context(model))
        for row in (0, 1):
            assert difference(found[row], reference(block.attn, model.config, x[row], i, FORMS[spec])) < 1e-10


@pytest.mark.parametrize('spec', FORMS)
@torch.no_grad()
def test_fp32_equals_the_formula_to_1e_5(spec):
    model, x = build(spec, rope=True), inputs()
    single = copy.deepcopy(model).float()
    found = before_projection(single.transformer.h[1].attn, x.float(), context(single))
    expected = torch.stack([reference(model.transformer.h[1].attn, model.config, row, 1, FORMS[spec]) for row in x])
    assert difference(found.double(), expected) < 1e-5 * expected.abs().max()


# ---------------------------------------------------------------------------------------------------
# DIFF

def plain_heads(attn, x, ctx, which=0):
    """softmax(q k) v of one of the maps, (B, P, T, D_v)."""
    q, k, v = attn.project(x, ctx)
    k, v = (t.repeat_interleave(attn.pairs // attn.groups, 1) for t in (k[:, which % attn.key_maps], v))
    return F.scaled_dot_product_attention(q[:, which], k, v, is_causal=True, scale=attn.norm_qk.scale)


@pytest.mark.parametrize('spec', VERSION_1)
@pytest.mark.parametrize('groups', [None, 4])
@torch.no_grad()
def test_d1_i4_lambda_zero_is_plain_attention_and_a_norm_a_head(spec, groups):
    model = build(spec, n_kv_head=groups)
    attn, x, ctx = model.transformer.h[1].attn, inputs(), context(model)
    set_lambda(attn, 0.0)
    y = plain_heads(attn, x, ctx)
    y = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * attn.norm_head.weight
    factor = 1 - 0.35551 if spec == 'diff' else 1.0     # DIFF's 1 - lambda_init of the second layer
    assert difference(before_projection(attn, x, ctx), factor * y.transpose(1, 2)) < 1e-5
    set_lambda(attn, 0.3)
    assert difference(before_projection(attn, x, ctx), factor * y.transpose(1, 2)) > 1e-2


@torch.no_grad()
def test_d1_version_2_with_a_vanishing_lambda_is_plain_attention():
    model = build('diff(version=2)', n_kv_head=4)
    attn, x, ctx = model.transformer.h[1].attn, inputs(), context(model)
    ones = torch.ones(2, 12, 32, dtype=torch.float64)
    attn.w_lambda.fill_(-10.0)                          # sigmoid(-320) = 0 for x of ones
    q, k, v = attn.project(x, ctx)
    assert difference(attn.mix(q, k, v, attn.lam(ones), ctx), plain_heads(attn, x, ctx)) < 1e-12


@pytest.mark.parametrize('spec', ['diff', 'diff(version=2)'])
@torch.no_grad()
def test_d2_rows_of_the_difference_sum_to_one_minus_lambda(spec):
    model = build(spec, n_kv_head=4)
    attn, x, ctx = model.transformer.h[1].attn, inputs(), context(model)
    ones = torch.ones(2, attn.groups, 12, attn.value_dim, dtype=torch.float64)
    lam = attn.lam(x)
    assert difference(mixed(attn, x, ctx, ones), (1 - lam).expand(2, attn.pairs, 12, 1)) < 1e-12
    assert attn.version == 1 or ((0 < lam) & (lam < 1)).all() and lam.shape == (2, 8, 12, 1) and lam.std() > 0.01


@pytest.mark.parametrize('spec', ['diff', 'diff(version=2)'])
@torch.no_grad()
def test_d3_two_equal_maps_leave_one_minus_lambda_of_one(spec):
    model = build(spec)
    attn, x, ctx = model.transformer.h[1].attn, inputs(), context(model)
    for site in (attn.c_q, attn.c_k) if attn.version == 1 else (attn.c_q,):
        by_map = site.weight.view(attn.pairs, 2, attn.head_dim, 32)
        by_map[:, 1] = by_map[:, 0]
    assert difference(mixed(attn, x, ctx), (1 - attn.lam(x)) * plain_heads(attn, x, ctx)) < 1e-12


@pytest.mark.parametrize('spec', ['diff', 'diff(version=2)'])
@torch.no_grad()
def test_d4_the_first_token_gives_one_minus_lambda_of_its_value(spec):
    model = build(spec)
    attn, x, ctx = model.transformer.h[1].attn, inputs(), context(model)
    v = attn.project(x, ctx)[2]
    lam = attn.lam(x) if attn.version == 1 else attn.lam(x)[:, :, 0]
    assert difference(mixed(attn, x, ctx)[:, :, 0], (1 - lam) * v[:, :, 0]) < 1e-12


@pytest.mark.parametrize('spec', VERSION_1)
@torch.no_grad()
def test_d5_the_second_map_of_a_head_touches_that_head_alone_and_maps_can_swap(spec):
    model = build(spec)
    attn, x, ctx = model.transformer.h[1].attn, inputs(), context(model)
    y, first, second = mixed(attn, x, ctx), plain_heads(attn, x, ctx), plain_heads(attn, x, ctx, 1)
    kept = [site.weight.clone() for site in (attn.c_q, attn.c_k)]
    for site in (attn.c_q, attn.c_k):                   # swap the maps of head 2
        by_map = site.weight.view(attn.pairs, 2, attn.head_dim, 32)
        by_map[2] = by_map[2].flip(0)
    swapped = mixed(attn, x, ctx)
    changed = [i for i in range(attn.pairs) if difference(swapped[:, i], y[:, i]) > 1e-6]
    assert changed == [2] and torch.equal(swapped[:, 3], y[:, 3])
    if spec == 'diff':
        assert difference(swapped[:, 2], second[:, 2] - attn.lam(x) * first[:, 2]) < 1e-12
    for site, weight in zip((attn.c_q, attn.c_k), kept):
        site.weight.copy_(weight)
        site.weight.view(attn.pairs, 2, attn.head_dim, 32)[2, 1] += 1               # other q2, k2 in head 2
    other = mixed(attn, x, ctx)
    assert [i for i in range(attn.pairs) if difference(other[:, i], y[:, i]) > 1e-6] == [2]
    assert difference(other[:, 2] + attn.lam(x) * plain_heads(attn, x, ctx, 1)[:, 2],
                      y[:, 2] + attn.lam(x) * second[:, 2]) < 1e-12                 # A1 (and A3) of that head stay


@pytest.mark.parametrize('spec', ALL)
@torch.no_grad()
def test_d6_permuted_heads_permute_their_slices(spec):
    model = build(spec, rope=True)
    attn, x, ctx = model.transformer.h[1].attn, inputs(), context(model)
    before = before_projection(attn, x, ctx)
    order = torch.arange(attn.pairs).roll(1)
    for site in (attn.c_q, attn.c_k, attn.c_v):
        site.weight.copy_(site.weight.unflatten(0, (attn.pairs, -1))[order].flatten(0, 1))
    if attn.version == 2:
        attn.w_lambda.copy_(attn.w_lambda[order])
    assert difference(before_projection(attn, x, ctx), before[:, :, order]) < 1e-12


def test_lambda_init_counts_layers_from_zero():
    model = build('diff', n_layer=7)
    found = [block.attn.lambda_init for block in model.transformer.h]
    assert found == pytest.approx([0.2, 0.3555, 0.4707, 0.5561, 0.6193, 0.6661, 0.7008], abs=5e-5)


@torch.no_grad()
def test_lambda_at_the_start():
    """Version 1 near lambda_init (vectors of std 0.1), version 2 near one half."""
    model = build('diff', random=0, n_embd=256)
    for block in model.transformer.h:
        assert block.attn.lambdas.std() == pytest.approx(0.1, rel=0.2)
        assert block.attn.lam(None).item() == pytest.approx(block.attn.lambda_init, abs=0.3)
    for ngpt in ('none', 'full'):
        model = build('diff(version=2)', random=0, n_embd=256, ngpt=ngpt)
        x = F.normalize(inputs(64, width=256), dim=-1) * (16 if ngpt == 'none' else 1)
        lam = model.transformer.h[0].attn.lam(x)
        assert lam.mean() == pytest.approx(0.5, abs=0.05) and 0.02 < lam.std() < 0.25


def test_lambda_is_computed_in_fp32_and_never_decays():
    for spec in ALL:
        model = build(spec)
        exact = model.transformer.h[1].attn.bfloat16()
        x = inputs().bfloat16()
        assert exact.lam(x).dtype == torch.float32
        with torch.autocast('cpu', torch.bfloat16):
            lam = copy.deepcopy(exact).float().lam(x.float())
        assert lam.dtype == torch.float32
        if exact.version == 1:
            assert lam.item() == pytest.approx(copy.deepcopy(exact).double().lam(None).item(), abs=1e-6)
        assert {tag for name, tag in tags_of(model).items() if 'lambda' in name} == {'vector'}


@torch.no_grad()
def test_grouped_queries_of_version_1_repeat_pairs():
    """Each head keeps two different keys, those of its group: the trap is one key for both of its maps."""
    model = build('diff', n_kv_head=4)                  # 4 heads, 2 pairs of keys
    attn, x, ctx = model.transformer.h[1].attn, inputs(), context(model)
    y = mixed(attn, x, ctx)
    attn.c_k.weight.view(2, 2, 4, 32)[1, 1] += 1        # the second key of the second pair
    changed = [i for i in range(4) if difference(mixed(attn, x, ctx)[:, i], y[:, i]) > 1e-6]
    assert changed == [2, 3]


@torch.no_grad()
def test_version_2_subtracts_heads_that_share_key_and_value():
    model = build('diff(version=2)', n_kv_head=2)
    attn, x, ctx = model.transformer.h[1].attn, inputs(), context(model)
    y = mixed(attn, x, ctx)
    attn.c_k.weight.view(2, 4, 32)[0] += 1
    attn.c_v.weight.view(2, 4, 32)[0] += 1
    changed = [i for i in range(8) if difference(mixed(attn, x, ctx)[:, i], y[:, i]) > 1e-6]
    assert changed == [0, 1, 2, 3]                      # the other group's heads know nothing of it


# ---------------------------------------------------------------------------------------------------
# DINT

@pytest.mark.parametrize('spec, whole', [('dint', True), ('dint(version=2)', True), ("dint(version='published')", True),
                                         ("dint(version='visible')", False), ('diff', False),
                                         ('dint(documents=54)', True), ('dint(version=2, documents=54)', True)])
@torch.no_grad()
def test_i1_rows_sum_to_one(spec, whole):
    """Values of one go through the maps as they are; the 'visible' form's rows do not sum to one, nor do DIFF's."""
    model = build(spec, random=0.5)
    attn, x, ctx = model.transformer.h[1].attn, inputs(), context(model)
    y = mixed(attn, x, ctx, torch.ones(2, 4, 12, 8, dtype=torch.float64))
    assert (difference(y, torch.ones_like(y)) < 1e-12) == whole


@pytest.mark.parametrize('spec', ['dint', 'dint(version=2)'])
@torch.no_grad()
def test_i2_the_first_token_gives_its_value_exactly(spec):
    model = build(spec)
    attn, x, ctx = model.transformer.h[1].attn, inputs(), context(model)
    assert torch.equal(mixed(attn, x, ctx)[:, :, 0], attn.project(x, ctx)[2][:, :, 0])


def separate(idx, end):
    """The documents of one row of tokens: each begins at an end-of-text token."""
    starts = [0, *(t for t in range(1, len(idx)) if idx[t] == end), len(idx)]
    return [idx[a:b] for a, b in zip(starts, starts[1:])]


@pytest.mark.parametrize('spec', ['dint(documents=9)', 'dint(version=2, documents=9)'])
@torch.no_grad()
def test_i6_the_mean_starts_anew_with_each_document(spec):
    """Packed documents give the logits of the documents alone, in one call and in pieces (under RoPE, to no shift)."""
    model, idx = build(spec, rope=True, n_kv_head=4), tokens(3, 16)
    idx[idx == 9] = 8
    for row, places in enumerate(((4, 11), (0, 1, 15), (6, 7, 8))):
        idx[row, list(places)] = 9
    full = model(idx, idx)[0]
    for row in range(3):
        alone = [model(document[None], document[None])[0][0] for document in separate(idx[row], 9)]
        assert difference(full[row], torch.cat(alone)) < 1e-10 and len(alone) > 2
    for pieces in ([1] * 16, [4, 1, 6, 5], [7, 9]):
        caches, start = [{}, {}], 0
        for n in pieces:
            part = idx[:, start:start + n]
            assert difference(model(part, part, caches=caches, start=start)[0], full[:, start:start + n]) < 1e-10
            start += n
    plain = build(spec.replace('documents=9', 'documents=None'), rope=True, n_kv_head=4)
    assert difference(plain(idx, idx)[0], full) > 1e-3                              # negative control


def test_the_running_mean_of_half_precision_is_taken_in_fp32():
    y = torch.randn(1, 1, 4096, 4, generator=torch.Generator().manual_seed(0)) + 0.5
    expected = y.double().cumsum(2) / torch.arange(1, 4097)[:, None]
    assert difference(attention.dint.running_mean(y, 0).double(), expected) < 1e-5
    assert difference(attention.dint.running_mean(y.bfloat16(), 0).double(), expected) > 1e-3       # what bf16 would do
    halves = [attention.dint.running_mean(y[:, :, :3000], 0)]
    halves.append(attention.dint.running_mean(y[:, :, 3000:], 3000, halves[0][:, :, -1:]))
    assert difference(torch.cat(halves, 2).double(), expected) < 1e-5
    for spec in ('dint', 'dint(version=2)', 'dint(documents=54)'):
        model = build(spec)
        attn, x = model.transformer.h[1].attn.bfloat16(), inputs().bfloat16()
        assert mixed(attn, x, context(model)).dtype == torch.float32


@torch.no_grad()
def test_head_scale_restores_diffs_factor():
    plain, scaled = build('dint'), build('dint(head_scale=True)')
    x = inputs()
    for i, (a, b) in enumerate(zip(plain.transformer.h, scaled.transformer.h)):
        factor = 1 - (0.8 - 0.6 * math.exp(-0.3 * i))
        y, z = (before_projection(block.attn, x, context(plain)) for block in (a, b))
        assert difference(z, factor * y) < 1e-12 and factor < 0.9


@pytest.mark.parametrize('form', ['published', 'visible'])
@torch.no_grad()
def test_leaking_forms_say_that_they_leak_and_take_no_cache(form):
    model, idx = build(f'dint(version={form!r})'), tokens(1, 4)
    assert all(block.attn.leaks for block in model.transformer.h)
    assert not any(block.attn.leaks for spec in ALL for block in build(spec).transformer.h)
    assert model.generate(idx, 3, use_cache=False).shape == (1, 7)
    with pytest.raises(UserError, match='use_cache=False'):
        model.generate(idx, 3)


# ---------------------------------------------------------------------------------------------------
# nGPT, cache, costs, refusals

@pytest.mark.parametrize('ngpt', ['full', 'simple'])
@pytest.mark.parametrize('spec', ALL)
@torch.no_grad()
def test_n5_scores_start_with_std_one_in_both_maps(spec, ngpt):
    model = build(spec, random=0, ngpt=ngpt, n_embd=128)
    attn, x = model.transformer.h[0].attn, F.normalize(inputs(64, 4, 128), dim=-1)
    q, k, _ = attn.project(x, context(model, 64, 4))
    scores = attn.norm_qk.scale * q @ k.expand_as(q).mT
    for i in (0, 1):
        assert 0.8 < scores[:, i].std() < 1.2


@pytest.mark.parametrize('ngpt', ['full', 'simple'])
@torch.no_grad()
def test_ngpts_branch_norm_hides_the_factor_and_the_size_of_w_lambda(ngpt):
    model, idx = build('diff', ngpt=ngpt), tokens(2, 16)
    logits = model(idx, idx)[0]
    for block in model.transformer.h:
        assert block.attn.head_scale < 1 and block.attn.norm_head is None
        block.attn.head_scale *= 3
    assert difference(model(idx, idx)[0], logits) < 1e-10
    model = build('diff(version=2)', ngpt=ngpt)
    logits = model(idx, idx)[0]
    for block in model.transformer.h:
        block.attn.w_lambda.mul_(3)
    assert difference(model(idx, idx)[0], logits) < 1e-10


@torch.no_grad()
def test_ngpt_norms_each_map_alone_and_both_share_s_qk():
    model = build('dint', ngpt='full')
    attn, x = model.transformer.h[0].attn, inputs()
    q, k, _ = attn.project(x, context(model))
    s = attn.norm_qk.s_qk()                             # (P, 1, D)
    assert s.shape == (4, 1, 4)
    for vectors in (q, k):
        assert difference((vectors / s).norm(dim=-1), torch.ones(2, 2, 4, 12, dtype=torch.float64)) < 1e-12


@pytest.mark.parametrize('spec, extra', [('diff', 0), ('diff(version=2)', 0), ('dint', 32), ('dint(version=2)', 64)])
@pytest.mark.parametrize('n_kv_head', [None, 4])
@torch.no_grad()
def test_cache_holds_what_the_sheet_says(spec, extra, n_kv_head):
    """2 n_kv_head D numbers per token, and DINT's mean (C) or column sums (P T), a layer and sequence."""
    model, caches, idx = build(spec, n_kv_head=n_kv_head), [{}, {}], tokens(2, 16)
    for start, n in ((0, 10), (10, 6)):
        model(idx[:, start:start + n], caches=caches, start=start)
    for cache in caches:
        numbers = sum(t.numel() for t in cache.values() if torch.is_tensor(t) and t.is_floating_point())
        assert numbers == 2 * (2 * (n_kv_head or 8) * 4 * 16 + extra)


@pytest.mark.parametrize('spec', [*ALL, 'dint(documents=54)'])
@torch.no_grad()
def test_flops_are_those_of_the_products(spec):
    model, ctx = build(spec, n_kv_head=4), None
    attn, x = model.transformer.h[0].attn, inputs(16)
    ctx = context(model, 16)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        attn(x, ctx)
    sites = sum(site.flops(32) for site in (attn.c_q, attn.c_k, attn.c_v, attn.c_proj))
    mean = 32 if spec == 'dint' else 0                  # additions are not products
    assert counter.get_total_flops() - sites == 32 * (attn.flops(16) - mean)
    formula = {'diff': 6 * 16 * 32, 'diff(version=2)': 8 * 16 * 32 + 2 * 8 * 32, 'dint': 6 * 16 * 32 + 32,
               'dint(version=2)': 4 * 16 * 32, 'dint(documents=54)': 8 * 16 * 32}
    assert attn.flops(16) == formula[spec]


class Largest(TorchDispatchMode):
    """Records the most elements of any tensor that an operation returns."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(t.numel() for t in tree_leaves(result) if isinstance(t, torch.Tensor))])
        return result


@pytest.mark.parametrize('spec, makes_maps', [('diff', False), ('diff(version=2)', False), ('dint', False),
                                              ('dint(version=2)', True)])
def test_d7_no_map_is_made_where_none_is_needed(spec, makes_maps):
    """Forward and backward of 512 tokens: the largest tensor is a few T x C, or else holds 512 x 512 a head."""
    model = build(spec, block_size=512).float()
    x = inputs(512, 1).float().requires_grad_()
    with Largest() as record:
        model.transformer.h[0].attn(x, context(model, 512, 1)).sum().backward()
    assert (record.numel >= 512 * 512) == makes_maps
    assert makes_maps or record.numel <= 4 * 512 * 32


@pytest.mark.parametrize('spec', [*ALL, 'dint(documents=54)'])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_weights_stay_near(spec, dtype):
    """Pure half weights, no autocast: forward and cached forward run and follow float64."""
    model, idx = build(spec, random=0.1, rope=True), tokens(2, 16)
    expected = model(idx, idx)[0]
    half, caches = copy.deepcopy(model).to(dtype), [{}, {}]
    whole = half(idx, idx)[0]
    pieces = torch.cat([half(idx[:, a:b], idx[:, a:b], caches=caches, start=a)[0]
                        for a, b in ((0, 9), (9, 10), (10, 16))], 1)
    for found in (whole, pieces):
        assert found.dtype == dtype and (found.double() - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize('spec, changes, words', [
    ('diff(version=3)', {}, 'version is 1 or 2, got 3'),
    ('diff(version=True)', {}, 'version is 1 or 2, got True'),
    ("dint(version='causal')", {}, "version is 1 or 2 .* got 'causal'"),
    ('dint(head_scale=1)', {}, 'head_scale is True or False, got 1'),
    ('dint(documents=65)', {}, r'token below vocab_size \(65\), got 65'),
    ('dint(documents=True)', {}, 'got True'),
    ("dint(version='visible', documents=3)", {}, "documents needs version 1 or 2, got 'visible'"),
    ('diff', dict(n_head=1), 'n_head and n_kv_head must be even, got 1 and 1'),
    ('dint', dict(n_kv_head=1), 'n_head and n_kv_head must be even, got 8 and 1')])
def test_mistakes_are_one_sentence(spec, changes, words):
    with pytest.raises(UserError, match=words) as caught:
        build(spec, **changes)
    assert str(caught.value).startswith(f'h.0.attn: {spec}: ') and '\n' not in str(caught.value)
    assert caught.value.key == 'attention'


def test_odd_heads_fit_version_2():
    model = build('diff(version=2)', n_head=1, n_embd=8)
    assert model(tokens(2, 5))[0].isfinite().all()
