"""The model: GPT-2's counts and start, the parameter table of Krony-PT, causality, cache and generation."""
import math

import pytest
import torch
from torch.nn import functional as F

from layers.basic import tags_of
from model import GPT, GPTConfig, choose
from optimizers import optim
from variants import UserError

GPT2 = dict(block_size=1024, vocab_size=50257, n_layer=12, n_head=12, n_embd=768, bias=True)
SMALL = dict(block_size=16, vocab_size=65, n_layer=2, n_head=4, n_embd=64)


def meta(**settings):
    with torch.device('meta'):
        return GPT(GPTConfig(**settings))


def small(seed=0, **settings):
    torch.manual_seed(seed)
    return GPT(GPTConfig(**{**SMALL, **settings}))


def tokens(*shape, seed=0):
    return torch.randint(65, shape, generator=torch.Generator().manual_seed(seed))


def test_gpt2_counts():
    model = meta(**GPT2)
    assert model.num_params() == 124_439_808
    assert model.num_params(positions=False) == 124_439_808 - 1024 * 768
    assert meta(**GPT2, tie_weights=False).num_params() == 163_037_184


@pytest.mark.parametrize('layers, heads, width, total', [
    (24, 16, 1024, 354_823_168), (36, 20, 1280, 774_030_080), (48, 25, 1600, 1_557_611_200)])
def test_larger_gpt2_counts(layers, heads, width, total):
    assert meta(**{**GPT2, 'n_layer': layers, 'n_head': heads, 'n_embd': width}).num_params() == total


# every compressing row of the Krony-PT table: (m of c_fc, n of c_fc, terms) -> parameters in all
KRONY = [
    (64, 32, 1, 67_893_504), (64, 48, 1, 67_908_864), (96, 32, 1, 67_908_864), (64, 64, 1, 67_928_832),
    (128, 32, 1, 67_928_832), (96, 48, 1, 67_939_584), (96, 64, 1, 67_973_376), (128, 48, 1, 67_973_376),
    (128, 64, 1, 68_020_224), (96, 96, 1, 68_044_032), (192, 48, 1, 68_044_032), (128, 96, 1, 68_116_224),
    (192, 64, 1, 68_116_224), (128, 128, 1, 68_213_376), (256, 64, 1, 68_213_376), (1024, 256, 1, 74_108_376),
    (768, 384, 1, 74_894_784), (1024, 384, 1, 77_254_032), (768, 768, 1, 81_972_576), (1536, 384, 1, 81_972_576),
    (1024, 768, 1, 86_691_144), (1536, 768, 1, 96_128_304), (3072, 384, 1, 96_128_304), (1024, 256, 2, 80_400_048),
    (1024, 256, 3, 86_691_720), (1024, 256, 4, 92_983_392), (64, 256, 10, 71_783_424)]


@pytest.mark.parametrize('m, n, terms, total', KRONY)
def test_krony_pt_counts_to_the_last_digit(m, n, terms, total):
    linear = {'h.*.mlp.c_fc': f'kron({m}, {n}, terms={terms})', 'h.*.mlp.c_proj': f'kron({n}, {m}, terms={terms})'}
    assert meta(**GPT2, linear=linear).num_params() == total


def test_scales_add_96_parameters():
    linear = {'h.*.mlp.c_fc': 'kron(1024, 256, terms=4, scale=True)',
              'h.*.mlp.c_proj': 'kron(256, 1024, terms=4, scale=True)'}
    assert meta(**GPT2, linear=linear).num_params() == 92_983_392 + 96


def test_flops_of_gpt2_and_of_structured_sites():
    matrices = 12 * 12 * 768 ** 2 + 50257 * 768
    assert meta(**GPT2).flops_per_token() == 2 * matrices + 12 * 4 * 1024 * 768
    cheaper = meta(**GPT2, linear={'h.*.mlp.c_fc': 'kron(768, 768)', 'h.*.mlp.c_proj': 'kron(768, 768)'})
    mlp = sum(row['flops'] for row in cheaper.site_table() if '.mlp.' in row['site'])
    assert mlp == pytest.approx(0.251 * 2 * 24 * 768 * 3072, rel=2e-3)
    assert cheaper.estimate_mfu(1, 1.0, 1e12) == pytest.approx(3 * 1024 * cheaper.flops_per_token() / 1e12)


def test_site_table():
    model = small(linear={'*.c_fc': 'kron(16, 8)'})
    rows = model.site_table()
    assert [row['site'] for row in rows[:6]] == [f'h.0.{s}' for s in ('attn.c_q', 'attn.c_k', 'attn.c_v', 'attn.c_proj',
                                                                     'mlp.c_fc', 'mlp.c_proj')]
    assert rows[4] == {'site': 'h.0.mlp.c_fc', 'spec': 'kron(16, 8)', 'shape': (256, 64), 'parameters': 128 + 128,
                       'flops': rows[4]['flops'], 'share': 256 / model.num_params()}


@pytest.mark.parametrize('spec', ['dense', 'kron(16, 4, terms=2)', 'kron(32, 64)', 'lowrank(8)'])
def test_loss_at_init_is_that_of_gpt2s_start(spec):
    """ln V + C 0.02^2 / 2 within 0.06, whatever stands in the MLP: 4.187 + 0.026 here, 10.98 for gpt2."""
    config = dict(block_size=64, vocab_size=65, n_layer=4, n_head=4, n_embd=128)
    losses = []
    for seed in range(3):
        model = small(seed, **config, linear={'*.c_fc': spec} if spec != 'dense' else {})
        losses.append(model(tokens(8, 64), tokens(8, 64, seed=1))[1].item())
    assert sum(losses) / 3 == pytest.approx(math.log(65) + 128 * 0.02 ** 2 / 2, abs=0.06)


def test_e1_embeddings_are_not_scaled():
    model = small()
    x = model.transformer.wte(tokens(4, 16)) + model.transformer.wpe(torch.arange(16))
    assert x.pow(2).mean().sqrt().item() == pytest.approx(0.02 * 2 ** 0.5, rel=0.2)


@pytest.mark.parametrize('spec', ['dense', 'kron(16, 4, terms=2)', 'lowrank(8)'])
def test_residual_projections_start_smaller(spec):
    model = small(n_embd=128, linear={'*.mlp.*': spec})
    for site, module in model.sites().items():
        std = 0.02 / math.sqrt(2 * 2) if site.endswith('c_proj') else 0.02
        assert module.dense_weight().std().item() == pytest.approx(std, rel=0.06), site


def test_every_parameter_has_one_tag():
    model = small(bias=True, tie_weights=False, linear={'*.c_fc': 'kron(16, 8, scale=True)', '*.c_v': 'lowrank(4)'})
    tags = tags_of(model)
    assert list(tags) == [name for name, _ in model.named_parameters()]
    assert tags['transformer.wte.weight'] == 'embedding' and tags['lm_head.weight'] == 'head'
    assert tags['transformer.h.0.mlp.c_fc.A'] == 'factor' and tags['transformer.h.0.mlp.c_fc.scale'] == 'vector'
    model.stray = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match='stray has no tag'):
        tags_of(model)


def reference(model, idx):
    """GPT-2's forward from its formulas, in the plainest way, from the state dict alone."""
    w = model.state_dict()
    T, heads = idx.shape[1], model.config.n_head
    x = w['transformer.wte.weight'][idx] + w['transformer.wpe.weight'][:T]

    def norm(x, name):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return x * w[name + '.weight'] + w[name + '.bias']

    for i in range(model.config.n_layer):
        at = f'transformer.h.{i}.'
        h = norm(x, at + 'ln_1')
        q, k, v = ((h @ w[at + f'attn.{c}.weight'].T + w[at + f'attn.{c}.bias']).unflatten(-1, (heads, -1)).transpose(1, 2)
                   for c in ('c_q', 'c_k', 'c_v'))
        score = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        score = score.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
        y = (score.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + y @ w[at + 'attn.c_proj.weight'].T + w[at + 'attn.c_proj.bias']
        h = norm(x, at + 'ln_2') @ w[at + 'mlp.c_fc.weight'].T + w[at + 'mlp.c_fc.bias']
        h = 0.5 * h * (1 + torch.erf(h / math.sqrt(2)))
        x = x + h @ w[at + 'mlp.c_proj.weight'].T + w[at + 'mlp.c_proj.bias']
    return norm(x, 'transformer.ln_f') @ w['lm_head.weight'].T


def test_forward_equals_the_formulas():
    model = small(bias=True).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, dtype=torch.float64) * 0.1)     # so that no bias is zero and no gain one
        idx, y = tokens(3, 16), tokens(3, 16, seed=1)
        logits, loss = model(idx, y)
        expected = reference(model, idx)
    assert (logits - expected).abs().max() < 1e-10
    assert (loss - F.cross_entropy(expected.flatten(0, 1), y.flatten())).abs() < 1e-10
    assert (model(idx)[0] - expected[:, -1:]).abs().max() < 1e-10 and model(idx)[1] is None


def test_targets_of_minus_one_are_ignored():
    model, y = small(), tokens(2, 16, seed=1)
    y[:, :8] = -1
    logits, loss = model(tokens(2, 16), y)
    assert loss.item() == pytest.approx(F.cross_entropy(logits[:, 8:].flatten(0, 1), y[:, 8:].flatten()).item(), rel=1e-6)


@pytest.mark.parametrize('at', [0, 1, 7, 14])
def test_u1_u2_the_future_does_not_matter(at):
    model = small().double()
    a, b = tokens(2, 16), tokens(2, 16)
    b[:, at + 1:] = tokens(2, 15 - at, seed=5)
    assert torch.equal(model(a, a)[0][:, :at + 1], model(b, b)[0][:, :at + 1])
    embedded = []
    model.transformer.wte.register_forward_hook(lambda m, i, out: embedded.append(out) or out.retain_grad())
    model(a, a)[0][:, :at + 1].sum().backward()
    assert (embedded[0].grad[:, at + 1:] == 0).all() and (embedded[0].grad[:, :at + 1] != 0).any()


def test_u3_u5_u6_prefix_rows_and_limits():
    model = small().double()
    idx = tokens(3, 16)
    full = model(idx, idx)[0]
    for n in (1, 5, 11):
        assert (model(idx[:, :n], idx[:, :n])[0] - full[:, :n]).abs().max() < 1e-10
    other = idx.clone()
    other[1:] = tokens(2, 16, seed=3)
    assert (model(other, other)[0][0] - full[0]).abs().max() < 1e-10
    with pytest.raises(ValueError, match='do not fit block_size 16'):
        model(tokens(1, 17))


@pytest.mark.parametrize('pieces', [[1] * 16, [5, 1, 1, 9], [16], [7, 9]])
def test_u4_cached_pieces_equal_the_whole(pieces):
    model, idx = small(linear={'*.c_v': 'lowrank(8)'}).double().eval(), tokens(2, 16)
    full, caches, start = model(idx, idx)[0], [{} for _ in range(2)], 0
    for n in pieces:
        logits, _ = model(idx[:, start:start + n], idx[:, start:start + n], caches=caches, start=start)
        assert (logits - full[:, start:start + n]).abs().max() < 1e-10
        start += n


def test_u8_every_parameter_has_a_gradient():
    model = small(bias=True, linear={'*.c_fc': 'kron(16, 8, scale=True)', '*.c_v': 'lowrank(4)'})
    model(tokens(2, 16), tokens(2, 16, seed=1))[1].backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name


@pytest.mark.parametrize('settings', [dict(temperature=0), dict(temperature=0.8, top_k=5), dict(top_p=0.7)])
def test_generation_with_and_without_cache_is_one_text(settings):
    model, idx = small().double().eval(), tokens(2, 3)
    texts = []
    for use_cache in (True, False):
        torch.manual_seed(7)
        texts.append(model.generate(idx, 30, use_cache=use_cache, **settings))         # past block_size 16
    assert torch.equal(*texts) and texts[0].shape == (2, 33) and torch.equal(texts[0][:, :3], idx)


def test_generation_past_block_size_reads_the_last_block_afresh():
    model, idx = small().eval(), tokens(1, 20)
    grown = model.generate(idx, 3, temperature=0)
    for n in range(20, 23):
        assert grown[0, n] == model(grown[:, n - 16:n])[0][0, -1].argmax()


def test_choose():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))
    draw = lambda **s: {choose(logits, **s).item() for _ in range(300)}                # noqa: E731
    assert draw(temperature=0) == {0} and draw(top_k=1) == {0} and draw(top_k=2) == {0, 1}
    assert draw(top_p=0.5) == {0} and draw(top_p=0.81) == {0, 1, 2} and draw(top_p=1e-9) == {0}
    assert draw(top_k=9) == {0, 1, 2, 3} and draw(temperature=1e-3) == {0}


def test_crop_block_size():
    model, idx = small().eval(), tokens(2, 8)
    before = model(idx, idx)[0]
    model.crop_block_size(8)
    assert torch.equal(model(idx, idx)[0], before) and model.num_params() == small().num_params() - 8 * 64
    with pytest.raises(ValueError):
        model(tokens(1, 9))
    with pytest.raises(UserError, match='1 .. 8'):
        model.crop_block_size(9)


@pytest.mark.slow
def test_gpt2_starts_at_10_98():
    torch.manual_seed(0)
    model = GPT(GPTConfig(**GPT2))
    x = torch.randint(50257, (2, 257), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        loss = model(x[:, :-1], x[:, 1:])[1].item()
    assert loss == pytest.approx(math.log(50257) + 768 * 0.02 ** 2 / 2, abs=0.06)


@pytest.mark.slow
def test_overfits_one_batch_in_50_steps():
    """4 x 32 tokens, 124M, tied, AdamW 3e-4, betas 0.9/0.95, clip 1.0: below 0.01 at step 50 (note 002: 0.003)."""
    torch.set_num_threads(2)
    torch.manual_seed(1337)
    model = GPT(GPTConfig(**GPT2))
    optimizer = optim.adamw(model, 0.1, 3e-4, (0.9, 0.95), 'cpu')
    from data.tokenizer import gpt2_encoding
    text = 'First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, speak.\n\n'
    ids = gpt2_encoding().encode(text * 8)
    x = torch.tensor(ids[:129])
    for step in range(51):
        loss = model(x[:-1].view(4, 32), x[1:].view(4, 32))[1]
        if step < 50:
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    torch.set_num_threads(1)
    assert loss.item() < 0.01


@pytest.mark.parametrize('heads, groups', [(2, 2), (4, 2)])
def test_attention_in_the_open_is_sdpa(heads, groups):
    """What training in bf16 on a CPU takes, in float64 against SDPA, gradients too; and that it is taken there alone."""
    from attention import heads as module
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, h, 50, 16, dtype=torch.float64, generator=draw).requires_grad_()
               for h in (heads, groups, groups))
    found, expected = module.attend_openly(q, k, v, 0.25), module.attend(q, k, v, 0.25)
    assert (found - expected).abs().max() < 1e-12
    for a, b in zip(torch.autograd.grad(found.sin().sum(), (q, k, v)), torch.autograd.grad(expected.sin().sum(), (q, k, v))):
        assert (a - b).abs().max() < 1e-10
    half = [t.detach().bfloat16().requires_grad_() for t in (q, k, v)]
    assert module.attend(*half, 0.25).grad_fn.name() != module.attend(q, k, v, 0.25).grad_fn.name()
    assert (module.attend(*half, 0.25).double() - expected).abs().max() < 0.02
