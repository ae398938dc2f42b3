"""The model's options of the tuned recipe (track 3), each against an independent formula; caches, export, first weights."""
import math

import pytest
import torch

import configurator
from attention import decoding
from attention.heads import rotation
from model import GPT, GPTConfig
from pretrained import gpt2, llama
from tests.contract.test_attention import SPECS, in_pieces
from variants import UserError

SIZES = dict(block_size=16, vocab_size=65, n_layer=2, n_head=4, n_embd=32, norm='rmsnorm', rope=True, tie_weights=False)
RECIPE = dict(rope_half=True, rope_base=1024.0, attention_scale=0.12, embed_norm=True, qk_norm='standard', softcap=15.0)


def build(seed=0, **settings):
    """A float64 model with every parameter random, in evaluation mode."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**{**SIZES, **settings})).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
    return model


def tokens(*shape):
    return torch.randint(65, shape, generator=torch.Generator().manual_seed(1))


def logits(model, idx, **more):
    return model(idx, targets=idx, **more)[0].detach()


# ---- formulas ----

@pytest.mark.parametrize('size', [4, 8, 12, 128, 6, 2])
def test_half_of_the_pairs_turn(size):
    """theta_i = position base^(-i / (n - 1)) for the first n of size / 2 pairs, 0 for the others."""
    positions, base = torch.tensor([0, 1, 7, 1000]), 1024.0
    cos, sin = rotation(positions, size, base, torch.float64, half=True)
    n = -(-size // 4)
    for column in range(size // 2):
        turn = base ** (-column / (n - 1)) if 0 < column < n else float(column == 0)
        for row, place in enumerate(positions.tolist()):
            assert cos[row, column].item() == pytest.approx(math.cos(place * turn), abs=1e-9)
            assert sin[row, column].item() == pytest.approx(math.sin(place * turn), abs=1e-9)
    whole = rotation(positions, size, base, torch.float64)
    assert size == 2 or not torch.equal(whole[0], cos)                          # control


def test_attention_by_hand():
    """One head: softmax(0.12 q' k'^T) v with complex rotations of RMS-normalised q, k, in float64."""
    model = build(n_head=1, n_layer=1, **RECIPE)
    attn, x = model.transformer.h[0].attn, torch.randn(1, 9, 32, dtype=torch.float64)
    q, k, v = (linear(x)[0] for linear in (attn.c_q, attn.c_k, attn.c_v))       # (9, 32)
    n = 8
    turns = torch.tensor([1024.0 ** (-i / (n - 1)) for i in range(n)] + [0.0] * 8, dtype=torch.float64)
    angles = torch.arange(9, dtype=torch.float64)[:, None] * turns

    def turned(t):
        t = t / (t.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return torch.view_as_complex(t.view(9, 16, 2)) * torch.polar(torch.ones_like(angles), angles)
    scores = 0.12 * (turned(q)[:, None] * turned(k)[None].conj()).sum(-1).real
    scores = scores.masked_fill(torch.ones(9, 9).triu(1).bool(), -torch.inf)
    expected = attn.c_proj(scores.softmax(-1) @ v)
    from attention.context import Context
    found = attn(x, Context(tokens(1, 9), torch.arange(9), model.config))[0]
    assert (found - expected).abs().max() < 1e-10
    model.config.rope_half = False                      # control
    assert (attn(x, Context(tokens(1, 9), torch.arange(9), model.config))[0] - expected).abs().max() > 1e-3


@pytest.mark.parametrize('spec', [spec for specs in SPECS.values() for spec in specs])
def test_every_attention_has_the_scale(spec):
    """Its own scale written out changes no bit, another one does."""
    width = dict(attention=spec, n_head=8)
    model, idx = build(**width), tokens(2, 16)
    attn = model.transformer.h[0].attn
    own = attn.scale.scale if hasattr(attn, 'scale') else attn.norm_qk.scale
    assert torch.equal(logits(model, idx), logits(build(attention_scale=own, **width), idx))
    assert not torch.allclose(logits(model, idx), logits(build(attention_scale=3 * own, **width), idx))


@pytest.mark.parametrize('rope', [True, False])
def test_the_norm_after_the_embedding(rope):
    """Block 0 reads g e / sqrt(mean(e^2) + eps), positions added before; and the scale of the table does not matter."""
    model, idx, seen = build(embed_norm=True, rope=rope), tokens(2, 16), []
    model.transformer.h[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    first = logits(model, idx)
    e = model.transformer.wte.weight[idx] + (0 if rope else model.transformer.wpe.weight)
    g = model.transformer.ln_e.weight
    assert (seen[0] - g * e / (e.square().mean(-1, keepdim=True) + 1e-5).sqrt()).abs().max() < 1e-12
    with torch.no_grad():
        for name in ('wte',) if rope else ('wte', 'wpe'):
            model.transformer[name].weight.mul_(1000)
    assert (logits(model, idx) - first).abs().max() < 1e-3 * first.abs().max()      # eps alone tells the scales apart
    assert 'ln_e' not in build().transformer


def test_first_weights():
    settings = dict(n_embd=256, n_layer=3, embed_std=1.0, head_std=0.0, hidden_gain=0.33, mlp='relu2', zero_init=True,
                    vocab_size=512, linear={'h.1.mlp.c_fc': 'lowrank(64)', 'h.2.mlp.c_fc': 'kron(16, 16)'})
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**SIZES, **settings}))
    assert model.transformer.wte.weight.std().item() == pytest.approx(1.0, rel=0.01)
    assert not model.lm_head.weight.any()
    for site, module in model.sites().items():
        W = module.dense_weight()
        wanted = 0.0 if site.endswith('.c_proj') else math.sqrt(0.33 / W.shape[1])
        assert W.std().item() == pytest.approx(wanted, rel=0.05), site
    loss = model(tokens(2, 16), tokens(2, 16))[1].item()
    assert loss == pytest.approx(math.log(512), abs=1e-6)
    joined = GPT(GPTConfig(**{**SIZES, **settings, 'zero_init': False})).transformer.h[0].mlp.c_proj.weight
    assert joined.std().item() == pytest.approx(math.sqrt(0.33 / 1024 / 6), rel=0.05)


def test_off_by_default_nothing_changes():
    """The options' defaults, written out, give the bits of a config that does not name them."""
    torch.manual_seed(0)
    a = GPT(GPTConfig(**SIZES))
    torch.manual_seed(0)
    b = GPT(GPTConfig(**SIZES, rope_half=False, attention_scale=0.0, embed_norm=False, embed_std=0.02, head_std=0.02,
                      hidden_gain=0.0))
    assert a.state_dict().keys() == b.state_dict().keys()
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
    assert torch.equal(logits(a, tokens(2, 16)), logits(b, tokens(2, 16)))


# ---- caches ----

@pytest.mark.parametrize('spec', [specs[0] for specs in SPECS.values()])
@torch.no_grad()
def test_caches_and_static_steps_give_the_logits_of_the_whole(spec):
    own = {'qk_norm': 'none'} if spec.startswith('mla') else {}                 # which norms its latents
    model, idx = build(attention=spec, n_head=8, **{**RECIPE, **own}), tokens(2, 16)
    full = logits(model, idx)
    for pieces in ([1] * 16, [5] + [1] * 11, [7, 9]):
        assert (in_pieces(model, idx, pieces) - full).abs().max() < 1e-10, pieces
    caches = [{} for _ in model.transformer.h]
    model(idx[:, :7], caches=caches)
    step = decoding.prepared(model, caches, idx[:, :1], 7, compile=False)
    for t in range(7, 16):
        assert (step(idx[:, t:t + 1], t)[:, 0] - full[:, t]).abs().max() < 1e-10, t
    changed = idx.clone()
    changed[:, 12:] = 64 - changed[:, 12:]
    assert torch.equal(logits(model, changed)[:, :12], full[:, :12])            # causal


# ---- export, refusals ----

@pytest.mark.parametrize('name', ['rope_half', 'attention_scale', 'embed_norm'])
def test_what_transformers_cannot_say_is_no_llama(name):
    plain = dict(SIZES, n_head=4, mlp='swiglu')
    assert llama.difference(GPT(GPTConfig(**plain))) is None
    assert llama.difference(GPT(GPTConfig(**plain, **{name: RECIPE[name]}))).startswith(f'{name}=')
    if name != 'rope_half':
        assert gpt2.difference(GPT(GPTConfig(**{name: RECIPE[name]}, n_layer=1, n_embd=32, n_head=4))).startswith(f'{name}=')


def test_first_weights_alone_keep_the_layout():
    starts = dict(embed_std=1.0, head_std=0.0, hidden_gain=0.33)
    assert llama.difference(GPT(GPTConfig(**dict(SIZES, mlp='swiglu'), **starts))) is None


@pytest.mark.parametrize('arguments, words', [
    (['--rope_half=True'], 'rope_half halves rotary positions'), (['--ngpt=full', '--embed_norm=True'], 'contradicts ngpt'),
    (['--ngpt=full', '--attention_scale=0.1'], 'contradicts ngpt'), (['--hidden_gain=-1'], 'hidden_gain')])
def test_refusals(arguments, words):
    with pytest.raises(UserError, match=words):
        configurator.load(arguments)
