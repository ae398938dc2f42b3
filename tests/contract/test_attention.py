"""What every entry of variants.ATTENTIONS must keep. A new attention: one line in ATTENTIONS, one in EXAMPLES and one
in NUMEL below, then `pytest tests/contract/test_attention.py -k NAME`.

The models are small and in float64, with every parameter random, so that no gate is 1 and no scale trivial.
"""
import ast
import copy
import functools
import importlib
import inspect
import itertools
import math
import re
import sys
import types
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

import configurator
import variants
from attention import context, decoding, heads
from layers.basic import tags_of
from model import GPT, GPTConfig
from variants import ATTENTIONS, UserError

# name -> specs, each for blocks of n_embd 32, n_head 8 and block_size 16
EXAMPLES = {
    'causal': ['causal', 'causal(gate=True, softcap=5.0)'],
    'window': ['window(5)', 'window(6, long=(0,), documents=54)'],
    'linformer': ['linformer(2, chunk=4)', 'linformer(3, chunk=5, per_head=True)',
                  'linformer(2, chunk=4, dynamic=True)', 'linformer(0, chunk=4)'],
    'mla': ['mla(12, qk_rope_head_dim=4)',
            'mla(20, q_lora_rank=12, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=4)'],
    'diff': ['diff', 'diff(version=2)'],
    'dint': ['dint', 'dint(version=2)', 'dint(head_scale=True, documents=54)', 'dint(version=2, documents=54)'],
    'mla_diff': ['mla_diff(12, qk_rope_head_dim=4)',
                 'mla_diff(20, q_lora_rank=12, qk_nope_head_dim=6, qk_rope_head_dim=2, v_head_dim=8)'],
    'mla_dint': ['mla_dint(12, qk_rope_head_dim=4)',
                 'mla_dint(20, q_lora_rank=12, qk_nope_head_dim=6, qk_rope_head_dim=2, v_head_dim=8)'],
}

# name -> what its specs refuse: {pattern of the sentence: how many combinations below, over all examples}
LATENT_REFUSALS = {'one latent for all heads, so there are no groups': 16, 'norms its latents instead of queries': 14}
REFUSALS = {'mla': LATENT_REFUSALS, 'mla_diff': LATENT_REFUSALS, 'mla_dint': LATENT_REFUSALS}


def scales(s, heads, features):
    """Numbers of nGPT's s_qk: one per feature ('full') or one per head ('simple')."""
    return {'none': 0, 'simple': heads, 'full': features}[s.ngpt]


def diff_numel(s, version=1):
    if version == 2:
        return 3 * s.C ** 2 + 2 * s.C * s.C_kv + s.H * s.C + scales(s, s.H, s.C)
    gain = 2 * s.D if s.ngpt == 'none' else 0
    return 2 * s.C ** 2 + 2 * s.C * s.C_kv + 4 * s.D + gain + scales(s, s.H // 2, s.C // 2)


def linformer_numel(s, slots, chunk=64, per_head=False, dynamic=False):
    heads = s.C_kv // s.D
    mixing = heads * slots * s.C if dynamic else 2 * slots * chunk * (heads if per_head else 1)
    return 2 * s.C ** 2 + 2 * s.C * s.C_kv + mixing + scales(s, s.H, s.C)


def mla_numel(s, kv_lora_rank, q_lora_rank=None, qk_nope_head_dim=None, qk_rope_head_dim=32, v_head_dim=None):
    n, r, v, rank = qk_nope_head_dim or s.D, qk_rope_head_dim, v_head_dim or s.D, kv_lora_rank
    queries = (q_lora_rank or s.C) * s.H * (n + r) + s.C * (q_lora_rank or 0)
    gains = (rank + (q_lora_rank or 0)) if s.ngpt == 'none' else 0
    rest = s.C * (rank + r) + rank * s.H * (n + v) + s.H * v * s.C
    return queries + rest + gains + scales(s, s.H, s.H * n + r)


def latent_diff_numel(s, kv_lora_rank, q_lora_rank=None, qk_nope_head_dim=None, qk_rope_head_dim=32, v_head_dim=None):
    n, r, v, pairs = qk_nope_head_dim or s.D, qk_rope_head_dim, v_head_dim or 2 * s.D, s.H // 2
    queries = (q_lora_rank or s.C) * s.H * (n + r) + s.C * (q_lora_rank or 0)
    gains = (kv_lora_rank + (q_lora_rank or 0) + v) if s.ngpt == 'none' else 0
    rest = s.C * (kv_lora_rank + 2 * r) + kv_lora_rank * pairs * (2 * n + v) + pairs * v * s.C
    return queries + rest + gains + 4 * (n + r) + scales(s, pairs, pairs * n + r)


# name -> parameters of one attention with dense projections and without the value residual's lam: f(s, *spec arguments)
# with s.C = n_embd, s.H heads, s.D = C / H, s.C_kv = D n_kv_head, s.ngpt
NUMEL = {
    'window': lambda s, size, **more: 2 * s.C ** 2 + 2 * s.C * s.C_kv + scales(s, s.H, s.C),
    'linformer': linformer_numel,
    'mla': mla_numel,
    'causal': lambda s, gate=False, softcap=0.0: (2 * s.C ** 2 + 2 * s.C * s.C_kv + gate * s.H * s.C
                                                  + scales(s, s.H, s.C)),
    'diff': diff_numel,
    'dint': lambda s, version=1, head_scale=False, documents=None: diff_numel(s),
    'mla_diff': latent_diff_numel,
    'mla_dint': latent_diff_numel,
}

# parameters whose gradient may be zero everywhere: {name of the attention: pattern of the parameter}
NO_GRADIENT = {
}

# {name of the attention: (functions that break a graph in a forward for training, in decoding)}; none where none stands
GRAPH_BREAKS = {
    'window': (set(), {'remember'}),                    # reads the window from its buffer, once per text and block
}

# they see the future: only the negative control may have them
LEAKING = ["dint(version='published')", "dint(version='visible')"]

SIZES = dict(block_size=16, vocab_size=65, n_layer=2, n_head=8, n_embd=32)


# ---------------------------------------------------------------------------------------------------
# the cases

LINEAR_RULES = {'dense': {}, 'kron': {'*.attn.*': 'kron(4, 4, terms=2)'}, 'lowrank': {'*.attn.*': 'lowrank(3)'}}
AXES = {'ngpt': ('none', 'simple', 'full'), 'linear': tuple(LINEAR_RULES), 'value_residual': (False, True),
        'qk_norm': ('none', 'standard', 'split'), 'rope': (False, True), 'grouped': (False, True)}


def combinations():
    """{label: value of each axis}: every ngpt x linear x value residual x QK-norm, RoPE and grouped queries in between.

    The configuration refuses ngpt with a QK-norm or with grouped queries, so that they are not here.
    """
    found = {}
    for ngpt, linear, residual, qk_norm in itertools.product(*(AXES[axis] for axis in list(AXES)[:4])):
        if ngpt != 'none' and qk_norm != 'none':
            continue
        n = len(found)
        combination = dict(ngpt=ngpt, linear=linear, value_residual=residual, qk_norm=qk_norm,
                           rope=n % 2 == 1, grouped=ngpt == 'none' and n % 4 > 1)
        words = [linear, f'ngpt_{ngpt}', 'vrl' * residual, f'qk_{qk_norm}', 'rope' * combination['rope'],
                 'grouped' * combination['grouped']]
        found['-'.join(word for word in words if word and not word.endswith('_none'))] = combination
    return found


COMBINATIONS = combinations()
# in these every two values of two axes meet, but for what is refused; the rest is slow
QUICK = ('dense', 'kron-vrl-qk_split-rope-grouped', 'lowrank-ngpt_simple-vrl-rope', 'lowrank-qk_split-grouped',
         'kron-ngpt_full', 'dense-qk_standard-rope', 'kron-vrl-qk_standard-grouped', 'dense-ngpt_full-vrl-rope',
         'dense-ngpt_simple', 'dense-qk_split-grouped', 'dense-vrl-rope-grouped', 'dense-vrl-qk_split-rope',
         'lowrank-qk_standard-rope', 'kron-ngpt_simple', 'lowrank-ngpt_full')


class Case:
    """One spec of the attention with one of the settings."""

    def __init__(self, name, spec, label='dense'):
        self.name, self.spec, self.label = name, spec, label

    def __repr__(self):
        return f'{self.spec or self.name}-{self.label}'

    def model(self):
        """The model of this case, shared by the tests; skips where the spec refuses the setting in a known sentence."""
        if self.spec is None:
            pytest.fail(f'ATTENTIONS has {self.name!r} but EXAMPLES in tests/contract/test_attention.py has not; add a '
                        f"line {self.name!r}: ['{self.name}(...)'] with the specs to be tested")
        try:
            return shared_model(self.spec, self.label)
        except UserError as error:
            if any(re.search(pattern, str(error)) for pattern in REFUSALS.get(self.name, {})):
                pytest.skip(str(error))
            raise

    @property
    def arguments(self):
        """The spec's arguments by position and by name."""
        parsed = variants.parse_spec(self.spec)
        return parsed.args, parsed.kwargs


def config_of(spec, label, **changes):
    """The GPTConfig of a spec and a combination. nGPT normalises single Kronecker products only."""
    values = dict(COMBINATIONS[label])
    linear, grouped = LINEAR_RULES[values.pop('linear')], values.pop('grouped')
    if values['ngpt'] != 'none':
        linear = {site: rule.replace(', terms=2', '') for site, rule in linear.items()}
    return GPTConfig(**{**SIZES, **values, 'linear': linear, 'n_kv_head': 4 if grouped else None, 'attention': spec,
                        **changes})


def build(spec, label, dtype=torch.float64, **changes):
    """A model all of whose parameters are random."""
    torch.manual_seed(0)
    model = GPT(config_of(spec, label, **changes)).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    model.normalise_weights()
    return model


shared_model = functools.cache(build)


def cases(labels):
    return [Case(name, spec, label) for name in ATTENTIONS for spec in EXAMPLES.get(name, [None]) for label in labels]


def each(labels, quick=QUICK):
    """Parametrise over every spec and these combinations; those that are not in `quick` are slow."""
    marked = [case if case.label in quick else pytest.param(case, marks=pytest.mark.slow) for case in cases(labels)]
    return pytest.mark.parametrize('case', marked, ids=repr)


each_case = each(COMBINATIONS)
each_rope = each([label for label in COMBINATIONS if COMBINATIONS[label]['rope']])
each_dense = each([label for label in COMBINATIONS if COMBINATIONS[label]['linear'] == 'dense'])
each_spec = each(['dense'])
FEW = ('dense', 'kron-vrl-qk_split-rope-grouped', 'dense-ngpt_full-vrl-rope', 'lowrank-ngpt_simple-vrl-rope')
less_each_case = each(COMBINATIONS, FEW)


def tokens(*shape, seed=0):
    return torch.randint(65, shape, generator=torch.Generator().manual_seed(seed))


def logits_of(model, idx, **more):
    """Logits of every position, (B, T, V)."""
    return model(idx, idx, **more)[0]


def difference(a, b):
    return (a - b).abs().max().item()


# ---------------------------------------------------------------------------------------------------
# which combinations there are

def pairs(combination):
    """Every two axes with their values."""
    return set(itertools.combinations(combination.items(), 2))


def test_the_combinations_cover_every_two_values_but_what_the_configuration_refuses():
    wanted = set()
    for first, second in itertools.combinations(AXES, 2):
        wanted |= {((first, a), (second, b)) for a in AXES[first] for b in AXES[second]}
    wanted -= {(('ngpt', kind), other) for kind in ('simple', 'full')
               for other in (('qk_norm', 'standard'), ('qk_norm', 'split'), ('grouped', True))}
    for labels in (COMBINATIONS, QUICK):
        assert set().union(*(pairs(COMBINATIONS[label]) for label in labels)) == wanted
    for label in COMBINATIONS:
        assert not list(configurator.check(config_of('causal', label))), label
    for changes in (dict(qk_norm='standard'), dict(qk_norm='split'), dict(n_kv_head=4)):
        assert list(configurator.check(config_of('causal', 'dense-ngpt_full', **changes))), changes


@pytest.mark.parametrize('name', list(ATTENTIONS))
def test_refused_combinations_are_the_known_ones(name):
    """A refusal is one sentence that stands in REFUSALS, as often as it says there: none is silent, none is stale."""
    counts = dict.fromkeys(REFUSALS.get(name, {}), 0)
    for spec, label in itertools.product(EXAMPLES.get(name, []), COMBINATIONS):
        try:
            GPT(config_of(spec, label))
        except UserError as error:
            known = [pattern for pattern in counts if re.search(pattern, str(error))]
            assert known, f'{spec} with {label} is refused, and REFUSALS does not say so: {error}'
            assert '\n' not in str(error) and label != 'dense', 'the plain combination must be there'
            counts[known[0]] += 1
    assert counts == REFUSALS.get(name, {})


def test_a_newcomer_without_an_example_is_told_what_to_add():
    with pytest.raises(pytest.fail.Exception, match="add a line 'newcomer'"):
        Case('newcomer', None).model()


# ---------------------------------------------------------------------------------------------------
# causality: checks as functions, so that the negative control can run them on forms that leak

TIMES = (0, 1, 3, 4, 5, 14)                             # 3, 4, 5: beside the border of a chunk of 4; 14 = T - 2


def check_u1(model):
    """Other tokens after t: the logits up to t are the same to the last bit, and the later ones are not."""
    idx = tokens(2, 16)
    with torch.no_grad():
        full = logits_of(model, idx)
        for t in TIMES:
            other = idx.clone()
            other[:, t + 1:] = (idx[:, t + 1:] + 1 + tokens(2, 15 - t, seed=t) % 64) % 65
            changed = logits_of(model, other)
            assert torch.equal(changed[:, :t + 1], full[:, :t + 1]), f'token {t} sees the future'
            assert (changed[:, t + 1:] != full[:, t + 1:]).any(), 'the check changes nothing'


def check_u2(model):
    """d logits[:, :t+1] / d embedding[:, t+1:] is exactly 0."""
    idx, held = tokens(2, 16), []
    hook = model.transformer.wte.register_forward_hook(lambda module, inputs, out: held.append(out))
    logits = logits_of(model, idx)
    hook.remove()
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for t in TIMES:
        grad, = torch.autograd.grad((logits * weights)[:, :t + 1].sum(), held[0], retain_graph=True)
        assert not grad[:, t + 1:].any(), f'the gradient of token {t} reaches the future'
        assert grad[:, t].any(), 'the check sees no gradient at all'


def check_u3(model):
    """The logits of the first n tokens do not depend on how many follow."""
    idx = tokens(2, 16)
    with torch.no_grad():
        full = logits_of(model, idx)
        for n in (1, 2, 3, 5, 11, 15):
            assert difference(logits_of(model, idx[:, :n]), full[:, :n]) < 1e-10, f'{n} tokens alone differ'


@each_case
def test_u1_replacing_the_future_changes_no_logit(case):
    check_u1(case.model())


@each_case
def test_u2_the_gradient_of_the_future_is_exactly_zero(case):
    check_u2(case.model())


@each_case
def test_u3_a_prefix_alone_gives_the_same_logits(case):
    check_u3(case.model())


@pytest.mark.parametrize('check', [check_u1, check_u2, check_u3], ids=['u1', 'u2', 'u3'])
@pytest.mark.parametrize('spec', LEAKING)
@pytest.mark.parametrize('label', ['dense', 'dense-vrl-qk_split-rope', 'dense-ngpt_full-vrl-rope'])
def test_i5_forms_that_leak_fail(check, spec, label):
    """Negative control: the same checks find the leaks that are known."""
    with pytest.raises(AssertionError, match='sees the future|reaches the future|tokens alone differ'):
        check(build(spec, label))


# ---------------------------------------------------------------------------------------------------
# the cache

def in_pieces(model, idx, pieces):
    """Logits of idx read in pieces of these lengths, onto one cache."""
    caches, start, found = [{} for _ in model.transformer.h], 0, []
    for n in pieces:
        found.append(logits_of(model, idx[:, start:start + n], caches=caches, start=start))
        start += n
    return torch.cat(found, 1)


@each_case
@torch.no_grad()
def test_u4_cached_pieces_equal_the_whole(case):
    """Token by token; prefill, then decode; prefill in two and more chunks, beside the border of a chunk of 4."""
    model, idx = case.model(), tokens(2, 16)
    full = logits_of(model, idx)
    for pieces in ([1] * 16, [5] + [1] * 11, [7, 9], [3, 1, 1, 3, 5, 1, 2], [4, 4, 1, 7], [16]):
        assert difference(in_pieces(model, idx, pieces), full) < 1e-10, pieces


@each_case
@torch.no_grad()
def test_cached_greedy_text_equals_uncached_text_past_block_size(case):
    model, idx = case.model(), tokens(2, 5)
    texts = [model.generate(idx, 15, temperature=0, use_cache=use_cache) for use_cache in (True, False)]
    assert torch.equal(*texts) and texts[0].shape == (2, 20)
    assert len(set(texts[0].flatten().tolist())) > 3, 'one token over and over says little'


@each_case
@torch.no_grad()
def test_static_steps_give_the_logits_of_the_whole(case):
    """After prompts that end inside and at the border of a chunk of 4, before and after a window of 5 is full."""
    model, idx = case.model(), tokens(2, 16)
    full = logits_of(model, idx)
    for start in (1, 4, 7):
        caches = [{} for _ in model.transformer.h]
        model(idx[:, :start], caches=caches)
        step = decoding.prepared(model, caches, idx[:, :1], start, compile=False)
        for t in range(start, 16):
            assert difference(step(idx[:, t:t + 1], t)[:, 0], full[:, t]) < 1e-10, (start, t)


@each_case
@torch.no_grad()
def test_static_text_equals_eager_text_past_block_size(case):
    model, idx = case.model(), tokens(2, 5)
    assert decoding.able(model), 'its static step is not there: see attention/decoding.py'
    texts = [model.generate(idx, 15, temperature=0, decode=decode) for decode in ('static', 'eager')]
    assert torch.equal(*texts)


# ---------------------------------------------------------------------------------------------------
# batch, lengths, parameters, gradients, start

@less_each_case
@torch.no_grad()
def test_u5_rows_of_a_batch_do_not_meet(case):
    model, idx = case.model(), tokens(3, 16)
    other = tokens(3, 16, seed=9)
    other[1] = idx[1]
    assert difference(logits_of(model, other)[1], logits_of(model, idx)[1]) < 1e-10
    assert difference(logits_of(model, idx[1:2])[0], logits_of(model, idx)[1]) < 1e-10


@less_each_case
@torch.no_grad()
def test_u6_lengths_from_one_to_block_size_and_no_more(case):
    model = case.model()
    for length in (1, 2, 3, 16):
        logits, loss = model(tokens(2, length), tokens(2, length))
        assert logits.shape == (2, length, 65) and logits.isfinite().all() and loss.isfinite()
    with pytest.raises(ValueError, match='do not fit block_size 16'):
        model(tokens(1, 17))
    with pytest.raises(ValueError, match='do not fit block_size 16'):
        model(tokens(1, 2), caches=[{}, {}], start=15)


@each_dense
def test_u7_parameters_are_those_of_the_formula(case):
    model, (args, kwargs) = case.model(), case.arguments
    if case.name not in NUMEL:
        pytest.fail(f'add a line {case.name!r}: lambda s, ...: ... to NUMEL with the number of parameters')
    config = model.config
    sizes = types.SimpleNamespace(C=32, H=8, D=4, C_kv=4 * (config.n_kv_head or 8), ngpt=config.ngpt)
    for i, block in enumerate(model.transformer.h):
        lam = config.value_residual and i > 0
        assert sum(p.numel() for p in block.attn.parameters()) == NUMEL[case.name](sizes, *args, **kwargs) + lam


@each_case
def test_u8_every_parameter_has_a_gradient(case):
    model = case.model()
    loss = model(tokens(2, 16), tokens(2, 16, seed=1))[1]
    names, parameters = zip(*model.named_parameters())
    idle = NO_GRADIENT.get(case.name)
    for name, grad in zip(names, torch.autograd.grad(loss, parameters, allow_unused=True)):
        assert grad is not None and grad.isfinite().all(), name
        assert grad.any() or idle and re.search(idle, name), f'{name} has no effect'


@less_each_case
def test_every_parameter_has_a_tag_and_every_projection_is_a_site(case):
    model = case.model()
    assert set(tags_of(model).values()) <= {'matrix', 'factor', 'vector', 'embedding', 'head'}
    sites = {site.rpartition('.')[2] for site in model.sites() if '.attn.' in site}
    assert sites <= {'c_q', 'c_q_a', 'c_q_b', 'c_k', 'c_v', 'c_kv_a', 'c_kv_b', 'c_proj'} and 'c_proj' in sites
    for name, tag in tags_of(model).items():
        if '.attn.' in name and tag in ('matrix', 'factor'):
            assert re.search(r'attn\.c_\w+\.', name), f'{name} is a matrix besides the sites'


@each_spec
def test_flops_grow_with_the_context(case):
    attn = case.model().transformer.h[0].attn
    assert 0 < attn.flops(16) <= attn.flops(64) and attn.flops(16) == int(attn.flops(16))


@each(FEW)
@torch.no_grad()
def test_e1_embeddings_enter_the_first_block_unscaled(case):
    """The residual stream starts at RMS 0.02 with RoPE, 0.028 with a position table, and at norm 1 under nGPT."""
    case.model()
    torch.manual_seed(1)
    model, held = GPT(config_of(case.spec, case.label)), []
    model.transformer.h[0].register_forward_pre_hook(lambda module, inputs: held.append(inputs[0]))
    model(tokens(8, 16))
    if model.config.ngpt != 'none':
        assert held[0].norm(dim=-1).sub(1).abs().max() < 1e-5
    else:
        rms = held[0].square().mean().sqrt().item()
        assert rms == pytest.approx(0.02 if model.config.rope else 0.02 * math.sqrt(2), rel=0.2)


@each_spec
def test_same_seed_same_start_and_a_state_dict_makes_a_twin(case):
    case.model()
    first, second = build(case.spec, case.label), build(case.spec, case.label)
    assert torch.equal(logits_of(first, tokens(2, 16)), logits_of(second, tokens(2, 16)))
    torch.manual_seed(5)
    other = GPT(config_of(case.spec, case.label)).double().eval()
    assert difference(logits_of(other, tokens(2, 16)), logits_of(first, tokens(2, 16))) > 1e-3
    other.load_state_dict(first.state_dict())
    assert torch.equal(logits_of(other, tokens(2, 16)), logits_of(first, tokens(2, 16)))


@each_spec
def test_fp32_follows_float64_and_maps_have_dropout(case):
    exact = case.model()
    single = copy.deepcopy(exact).float()
    a, b = (logits_of(m, tokens(2, 16)) for m in (single, exact))
    assert a.dtype == torch.float32 and difference(a.double(), b) < 1e-5 * b.abs().max().item()
    assert difference(in_pieces(single, tokens(2, 16), [5] + [1] * 11), a) < 1e-5 * b.abs().max().item()
    noisy = build(case.spec, case.label, dropout=0.5)
    assert torch.equal(logits_of(noisy, tokens(2, 16)), b)
    for module in noisy.train().modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0                              # what is left is that of the attention maps
    assert difference(logits_of(noisy, tokens(2, 16)), logits_of(noisy, tokens(2, 16))) > 1e-3


@each(FEW)
def test_bfloat16_autocast_keeps_near(case):
    """Under autocast, as on a GPU: no error about types, and logits near the exact ones."""
    exact = case.model()
    single = copy.deepcopy(exact).float()
    with torch.autocast('cpu', torch.bfloat16):
        rough = logits_of(single, tokens(2, 16))
        pieces = in_pieces(single, tokens(2, 16), [5, 1, 10])
        logits_of(single, tokens(2, 16)).float().sum().backward()
    expected = logits_of(exact, tokens(2, 16))
    for found in (rough, pieces):
        assert (found.double() - expected).norm() < 0.05 * expected.norm()


# ---------------------------------------------------------------------------------------------------
# RoPE

def score_spread(scores):
    """(largest difference within a diagonal, largest difference of all) of scores (T, T)."""
    diagonals = [scores.diagonal(k) for k in range(-scores.size(0) + 2, scores.size(0) - 1)]
    return max((d.max() - d.min()).item() for d in diagonals), (scores.max() - scores.min()).item()


def turned_scores(positions, table_positions, dtype=torch.float32):
    """q . k of one q and one k, the same at all positions, after RoPE with the angles of table_positions."""
    q, k = torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(0)).to(dtype).expand(2, len(positions), 8)
    table = heads.rotation(table_positions, 8, 10000.0, dtype)
    return heads.rotate(q, table) @ heads.rotate(k, table).mT


def test_p1_p2_scores_depend_on_the_distance_and_do_depend_on_it():
    positions = torch.arange(64)
    within, among = score_spread(turned_scores(positions, positions))
    assert within < 1e-4 and among > 1
    within, among = score_spread(turned_scores(positions, torch.zeros_like(positions)))
    assert within < 1e-4 and among < 1e-4           # the same rotation everywhere passes P1: only P2 finds it


@each_rope
@torch.no_grad()
def test_p1_p2_shifted_positions_change_nothing_and_missing_ones_do(case, monkeypatch):
    """Through the model, s_qk and norms random: all angles 8 positions on, then the angle of position 3 for all."""
    model, idx = case.model(), tokens(2, 16)
    full = logits_of(model, idx)
    plain = heads.rotation
    for place, differs in ((lambda p: p + 8, False), (lambda p: p * 0 + 3, True)):
        monkeypatch.setattr(context, 'rotation', lambda p, *more, place=place: plain(place(p), *more))
        assert (difference(logits_of(model, idx), full) > 1e-6) == differs


def test_p1_n7_a_gain_after_rope_would_be_found():
    """Negative control: a gain per feature after RoPE destroys what P1 checks, one before RoPE does not."""
    positions, gain = torch.arange(64), 1 + torch.rand(8, generator=torch.Generator().manual_seed(3))
    table = heads.rotation(positions, 8, 10000.0, torch.float32)
    q, k = torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(0)).expand(2, 64, 8)
    after = (heads.rotate(q, table) * gain) @ (heads.rotate(k, table) * gain).mT
    before = heads.rotate(q * gain, table) @ heads.rotate(k * gain, table).mT
    assert score_spread(after)[0] > 0.1 and score_spread(before)[0] < 1e-4


def test_p3_rotation_keeps_the_norm_and_turns_adjacent_pairs():
    x = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    table = heads.rotation(torch.arange(5) * 100, 6, 10000.0, torch.float64)
    assert difference(heads.rotate(x, table).norm(dim=-1), x.norm(dim=-1)) < 1e-12
    one = heads.rotate(torch.tensor([[1.0, 0.0, 0.0, 2.0]], dtype=torch.float64),
                       heads.rotation(torch.tensor([3]), 4, 10000.0, torch.float64))
    angles = 3.0, 3.0 / 100
    expected = [math.cos(angles[0]), math.sin(angles[0]), -2 * math.sin(angles[1]), 2 * math.cos(angles[1])]
    assert difference(one[0], torch.tensor(expected, dtype=torch.float64)) < 1e-12
    assert heads.rotate(x.bfloat16(), table).dtype == torch.bfloat16


def test_p4_later_positions_are_a_slice_of_the_longer_table():
    for dtype in (torch.float32, torch.float64):
        long = heads.rotation(torch.arange(40), 8, 10000.0, dtype)
        part = heads.rotation(torch.arange(17, 29), 8, 10000.0, dtype)
        assert all(torch.equal(a[17:29], b) for a, b in zip(long, part))


@pytest.mark.parametrize('shape', [(2, 4, 7, 6), (9, 4, 3, 6), (1, 3, 3, 6), (5, 1, 1, 6)], ids=str)
def test_p5_batch_heads_and_time_are_not_confused(shape):
    """Position t turns x[..., t, :] for every row and head, whatever the sizes."""
    x = torch.randn(shape, dtype=torch.float64)
    turned = heads.rotate(x, heads.rotation(torch.arange(shape[2]), 6, 10000.0, torch.float64))
    for t in range(shape[2]):
        frequency = 10000.0 ** (-torch.arange(0, 6, 2, dtype=torch.float64) / 6)
        phase = torch.polar(torch.ones(3, dtype=torch.float64), t * frequency)
        expected = torch.view_as_real(torch.view_as_complex(x[:, :, t].unflatten(-1, (3, 2))) * phase).flatten(-2)
        assert difference(turned[:, :, t], expected) < 1e-12


# ---------------------------------------------------------------------------------------------------
# compilation and imports

def compiled_again(model, **more):
    torch._dynamo.reset()
    return torch.compile(model, **more)


@pytest.mark.slow
@pytest.mark.parametrize('name', list(ATTENTIONS))
def test_compiled_logits_equal_eager(name):
    """By the compiler proper; one spec a class, as each takes it a quarter of a minute."""
    model = build(EXAMPLES[name][0], 'dense-ngpt_full-vrl-rope', dtype=torch.float32)
    compiled = compiled_again(model, fullgraph=True)    # a graph break is an error that names it
    with torch.no_grad():
        eager = logits_of(model, tokens(2, 16))
        assert difference(logits_of(compiled, tokens(2, 16)), eager) < 1e-5 * max(1, eager.abs().max().item())


@pytest.mark.slow
@each(['dense', 'dense-vrl-qk_split-rope', 'dense-ngpt_full-vrl-rope'])
def test_traces_without_a_graph_break_and_trains(case):
    """Forward and backward as torch.compile sees them, without the compiler's minutes."""
    case.model()
    model = build(case.spec, case.label, dtype=torch.float32)
    compiled = compiled_again(model, backend='aot_eager', fullgraph=True)
    found = []
    for run in (model, compiled):
        model.zero_grad()
        loss = F.cross_entropy(logits_of(run, tokens(2, 16)).flatten(0, 1), tokens(32, seed=1))
        loss.backward()
        found.append((loss.item(), [p.grad.clone() for p in model.parameters()]))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    for a, b in zip(found[0][1], found[1][1]):
        assert difference(a, b) < 1e-5 * max(1, a.abs().max().item())


def breaks(model, *args, **kwargs):
    """(graph breaks, names of the functions that make them) of one call, whose cache is filled on the way."""
    torch._dynamo.reset()
    found = torch._dynamo.explain(model)(*args, **kwargs)
    return found.graph_break_count, {reason.user_stack[-1].name for reason in found.break_reasons}


@pytest.mark.slow
@each_spec
@torch.no_grad()
def test_graph_breaks_are_those_of_the_table(case):
    """Training forward and decoding: prefill, then tokens one by one. docs/attention.md has the same table."""
    case.model()
    model, idx = build(case.spec, case.label, dtype=torch.float32), tokens(2, 16)
    forward, decoding = GRAPH_BREAKS.get(case.name, (set(), set()))
    number, found = breaks(model, idx, idx)
    assert found == forward and bool(number) == bool(forward)
    caches, start = [{}, {}], 0
    for n in (5, 1, 1):
        number, found = breaks(model, idx[:, start:start + n], caches=caches, start=start)
        assert found == (decoding if start == 0 else set()) and bool(number) == bool(found)
        start += n


def test_the_count_finds_a_graph_break():
    """Negative control: a module that asks for a number."""
    class Asks(torch.nn.Module):
        def forward(self, x):
            return x * int(x.sum())
    number, found = breaks(Asks(), torch.ones(3, requires_grad=False))
    assert number and found == {'forward'}


@pytest.mark.slow
@pytest.mark.parametrize('name', list(ATTENTIONS))
@torch.no_grad()
def test_compiled_decoding_equals_eager(name):
    """As sample.py --compile=True decodes, dynamic shapes, a prompt and then tokens; by the compiler's front half."""
    model, idx = build(EXAMPLES[name][0], 'dense', dtype=torch.float32), tokens(1, 12)
    compiled = compiled_again(model, backend='eager', dynamic=True)
    found = [in_pieces(run, idx, [5] + [1] * 7) for run in (compiled, model)]
    assert difference(*found) < 1e-5 * max(1, found[1].abs().max().item())


@pytest.mark.slow
@each_spec
def test_a_static_step_is_one_graph_for_fifty_tokens(case):
    """No graph break and no position that is baked in, by the compiler's front half; the texts are the eager ones."""
    case.model()
    torch._dynamo.reset()
    model, idx = build(case.spec, case.label, dtype=torch.float32, block_size=64), tokens(2, 5)
    counter, texts = CompileCounterWithBackend('aot_eager'), []
    for more in ({}, dict(decode='static', compile=counter)):
        stream = model.stream(idx, 50, generator=torch.Generator().manual_seed(0), **more)
        texts.append(torch.cat(list(stream), 1))
    assert torch.equal(*texts) and counter.frame_count == 1


@pytest.mark.parametrize('name', list(ATTENTIONS))
def test_the_page_for_newcomers_describes_it(name):
    page = (Path(__file__).parents[2] / 'docs' / 'attention.md').read_text(encoding='utf-8')
    assert f'\n### `{name}(' in page, f'docs/attention.md has no section ### `{name}(...)`'
    table = page.partition('## Under torch.compile')[2]
    row = re.search(rf'^\| `{name}` \|(.+)\|(.+)\|$', table, re.MULTILINE)
    assert row, f'docs/attention.md has no row for {name} in its table of graph breaks'
    for cell, functions in zip(row.groups(), GRAPH_BREAKS.get(name, (set(), set()))):
        assert set(re.findall(r'`(\w+)`', cell)) == functions


@pytest.mark.parametrize('name', [n for n in ATTENTIONS if n != 'causal'])
def test_its_file_imports_torch_heads_layers_and_variants_only(name):
    path = ATTENTIONS[name].__module__
    allowed = {'torch', 'layers', 'variants', 'attention', *sys.stdlib_module_names}
    tree = ast.parse(inspect.getsource(importlib.import_module(path)))
    names = [a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names]
    names += [node.module or '' for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert {n.partition('.')[0] for n in names} <= allowed
