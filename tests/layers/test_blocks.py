"""Blocks and what they share: LLaMA's block, QK norm, value residual, gates, soft caps, nGPT."""
import math

import pytest
import torch

import configurator
from attention.heads import QueryKeyNorm
from layers.basic import RMSNorm, rms, unit
from layers.losses import stablemax
from model import GPT, GPTConfig
from optimizers import optim
from variants import UserError

SMALL = dict(block_size=16, vocab_size=65, n_layer=2, n_head=4, n_embd=64)
LLAMA = dict(norm='rmsnorm', rope=True, mlp='swiglu(128)')


def small(seed=0, **settings):
    torch.manual_seed(seed)
    return GPT(GPTConfig(**{**SMALL, **settings})).double().eval()


def tokens(*shape, seed=0):
    return torch.randint(65, shape, generator=torch.Generator().manual_seed(seed))


def logits(model, seed=0):
    idx = tokens(2, 16, seed=seed)
    return model(idx, idx)[0]


# ---- LLaMA's block ----

def test_rms_norm_is_its_formula_and_takes_zeros():
    torch.manual_seed(0)
    norm, x = RMSNorm(8, 1e-5).double(), torch.randn(3, 8).double()
    with torch.no_grad():
        norm.weight.normal_()
    expected = x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight
    assert (norm(x) - expected).abs().max() < 1e-12
    assert rms(torch.zeros(2, 4)).eq(0).all() and unit(torch.zeros(2, 4)).eq(0).all()
    assert norm(x.bfloat16()).dtype == torch.float64 and rms(x.bfloat16()).dtype == torch.bfloat16


def test_llama_block_is_its_formula():
    """h + attn(rms h), then h + W2 (silu(W1 x) * W3 x), against the plainest writing."""
    model = small(**LLAMA)
    block, x = model.transformer.h[0], torch.randn(2, 16, 64, dtype=torch.float64)
    y = block.ln_2(x)
    w = dict(block.mlp.named_parameters())
    gate = y @ w['c_gate.weight'].T
    expected = (gate * torch.sigmoid(gate) * (y @ w['c_fc.weight'].T)) @ w['c_proj.weight'].T
    assert (block.mlp(y, None) - expected).abs().max() < 1e-10
    count = 2 * (4 * 64 ** 2 + 3 * 64 * 128 + 2 * 64) + 65 * 64 + 64       # no biases, no position table
    assert model.num_params() == model.num_params(positions=False) == count


def test_l1_gqa_with_all_heads_is_mha_and_groups_share():
    assert torch.equal(logits(small()), logits(small(n_kv_head=4)))
    model = small(n_kv_head=2)
    assert model.transformer.h[0].attn.c_k.out_features == 32
    full = small()
    with torch.no_grad():                                       # MHA whose heads repeat their group's keys and values
        for ours, theirs in zip(full.transformer.h, model.transformer.h):
            for name in ('c_k', 'c_v'):
                w = getattr(theirs.attn, name).weight.view(2, 16, 64).repeat_interleave(2, 0)
                getattr(ours.attn, name).weight.copy_(w.reshape(64, 64))
        state = {n: t for n, t in model.state_dict().items() if '.c_k.' not in n and '.c_v.' not in n}
        full.load_state_dict(state, strict=False)
    assert (logits(full) - logits(model)).abs().max() < 1e-10


def test_l2_a_block_whose_branches_end_in_zero_is_the_identity():
    model = small(**LLAMA)
    block, x = model.transformer.h[0], torch.randn(2, 16, 64, dtype=torch.float64)
    torch.nn.init.zeros_(block.attn.c_proj.weight)
    torch.nn.init.zeros_(block.mlp.c_proj.weight)
    model.transformer.h[1].forward = lambda x, ctx: x
    assert torch.equal(model.transformer.h[0].mlp(x, None), torch.zeros_like(x))
    seen = []
    block.register_forward_hook(lambda m, args, out: seen.append((args[0], out)))
    logits(model)
    assert torch.equal(*seen[0])


@pytest.mark.parametrize('settings', [dict(**LLAMA, tie_weights=False), dict(mlp='relu2'),
                                      dict(qk_norm='standard', value_residual=True)])
def test_l3_loss_at_init(settings):
    losses = []
    for seed in range(3):
        torch.manual_seed(seed)
        model = GPT(GPTConfig(block_size=64, vocab_size=65, n_layer=4, n_head=4, n_embd=128, **settings))
        losses.append(model(tokens(8, 64), tokens(8, 64, seed=1))[1].item())
    assert sum(losses) / 3 == pytest.approx(math.log(65) + 128 * 0.02 ** 2 / 2, abs=0.06)


def test_relu2_is_its_formula():
    mlp, x = small(mlp='relu2').transformer.h[0].mlp, torch.randn(5, 64, dtype=torch.float64)
    expected = (x @ mlp.c_fc.weight.T).clamp(min=0).pow(2) @ mlp.c_proj.weight.T
    assert (mlp(x, None) - expected).abs().max() < 1e-10


def test_swiglu_width_is_two_thirds_of_four_in_64s():
    assert small(mlp='swiglu').transformer.h[0].mlp.c_fc.out_features == 192
    with torch.device('meta'):
        assert GPT(GPTConfig(mlp='swiglu')).transformer.h[0].mlp.c_gate.out_features == 2048


# ---- QK norm, gate, soft caps ----

def test_qk_norm_bounds_the_logits():
    norm = QueryKeyNorm(GPTConfig(**SMALL, qk_norm='standard'), 4, 16)
    q, k = norm(*(torch.randn(2, 4, 16, 16).double() * 100 for _ in range(2)))
    assert (norm.scale * q @ k.mT).abs().max() <= 16 ** 0.5 * (1 + 1e-9)
    assert (q.square().mean(-1) - 1).abs().max() < 1e-6


def test_gate_starts_at_one_and_acts_a_head():
    plain, gated = small(), small(attention='causal(gate=True)')
    gated.load_state_dict(plain.state_dict(), strict=False)
    assert torch.equal(logits(plain), logits(gated))
    with torch.no_grad():
        gated.transformer.h[0].attn.gate.weight[1].normal_()
    assert not torch.allclose(logits(plain), logits(gated))
    assert 'transformer.h.0.attn.gate.weight' not in {
        n for n, p in gated.named_parameters() if any(p is q for q in optim.groups(gated, 0.1)[0]['params'])}


@pytest.mark.parametrize('cap, expected', [(30, (4.954, 22.85)), (15, (4.823, 14.46))])
def test_softcap_of_the_head_has_the_published_values(cap, expected):
    model = small(softcap=float(cap))
    model.lm_head = torch.nn.Identity()
    assert model.head(torch.tensor([5.0, 30.0])).tolist() == pytest.approx(expected, abs=5e-3)


def test_softcap_of_the_scores_bounds_and_a_wide_one_changes_nothing():
    plain, capped = small(), small(attention='causal(softcap=1e6)')
    assert (logits(plain) - logits(capped)).abs().max() < 1e-8
    assert (logits(plain) - logits(small(attention='causal(softcap=0.01)'))).abs().max() > 1e-6


# ---- value residual ----

def test_v1_no_share_is_no_value_residual_and_v2_all_of_it_ignores_the_own_values():
    plain, mixed = small(), small(value_residual=True)
    mixed.load_state_dict(plain.state_dict(), strict=False)
    with torch.no_grad():
        mixed.transformer.h[1].attn.mix_v.lam.fill_(0.0)
        assert torch.equal(logits(plain), logits(mixed))
        mixed.transformer.h[1].attn.mix_v.lam.fill_(1.0)
        before = logits(mixed)
        mixed.transformer.h[1].attn.c_v.weight.normal_()
        assert (logits(mixed) - before).abs().max() < 1e-10
        mixed.transformer.h[0].attn.c_v.weight.normal_()
        assert (logits(mixed) - before).abs().max() > 1e-6


def test_v3_v4_value_residual_keeps_nothing_between_calls():
    model = small(value_residual=True)
    first = logits(model)
    logits(model, seed=3)
    assert torch.equal(logits(model), first)
    assert [n for n, _ in model.named_parameters() if 'lam' in n] == ['transformer.h.1.attn.mix_v.lam']


# ---- nGPT ----

NGPT = dict(rope=True, tie_weights=False, mlp='swiglu(128)')
KINDS = pytest.mark.parametrize('kind', ['simple', 'full'])


def stepped(kind, count=1, **settings):
    """An nGPT after some AdamW steps with normalisation."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**SMALL, **NGPT, **settings}, ngpt=kind))
    optimizer = optim.adamw(model, 0.0, 3e-3, (0.9, 0.95), 'cpu')
    for step in range(count):
        model(tokens(4, 16, seed=step), tokens(4, 16, seed=step + 9))[1].backward()
        optimizer.step()
        optimizer.zero_grad()
        model.normalise_weights()
    return model


@KINDS
@pytest.mark.parametrize('linear', [{}, {'*.mlp.*': 'kron(16, 8)', '*.c_v': 'lowrank(8)', '*.attn.c_proj': 'lowrank(8)'}])
def test_n1_weights_are_unit_after_every_step(kind, linear):
    model = stepped(kind, 2, linear=linear)
    for weight in (model.transformer.wte.weight, model.lm_head.weight):
        assert (weight.norm(dim=1) - 1).abs().max() < 1e-6
    for site, module in model.sites().items():
        norms = module.dense_weight().norm(dim=0 if site.endswith('c_proj') else 1)
        assert (norms - 1).abs().max() < 2e-6, site


@KINDS
def test_n2_every_block_gives_unit_vectors(kind):
    model, seen = stepped(kind), []
    for block in model.transformer.h:
        block.register_forward_hook(lambda m, a, out: seen.append(out.norm(dim=-1)))
    logits(model)
    assert len(seen) == 2 and all((n - 1).abs().max() < 1e-5 for n in seen)


@KINDS
def test_n3_the_length_of_a_branch_does_not_matter(kind):
    model = stepped(kind).double().eval()
    before = logits(model)
    with torch.no_grad():
        model.transformer.h[0].attn.c_proj.weight.mul_(7.0)
        model.transformer.h[1].mlp.c_proj.weight.mul_(0.3)
    assert (logits(model) - before).abs().max() < 1e-10


@KINDS
def test_n4_rates_start_at_0_05_and_zero_is_the_identity(kind):
    model = small(**NGPT, ngpt=kind)
    block = model.transformer.h[0]
    assert block.a_attn().numel() == (64 if kind == 'full' else 1)
    assert (block.a_mlp() - 0.05).abs().max() < 1e-6
    x = unit(torch.randn(2, 16, 64, dtype=torch.float64))
    torch.nn.init.zeros_(block.a_attn.stored)
    torch.nn.init.zeros_(block.a_mlp.stored)
    block.attn.forward = block.mlp.forward = lambda x, ctx: torch.randn_like(x)
    assert (block(x, None) - x).abs().max() < 1e-12


@KINDS
def test_n5_scores_start_with_std_one(kind):
    torch.manual_seed(0)
    settings = {**NGPT, 'mlp': 'gelu', 'n_layer': 1, 'n_embd': 256, 'block_size': 64}
    model = GPT(GPTConfig(**{**SMALL, **settings}, ngpt=kind))
    attn, x = model.transformer.h[0].attn, unit(torch.randn(1, 64, 256))
    q, k = attn.norm_qk(*(c(x).unflatten(-1, (4, 64)).transpose(1, 2) for c in (attn.c_q, attn.c_k)))
    assert 0.8 < (attn.norm_qk.scale * q @ k.mT).std().item() < 1.2


@KINDS
def test_n6_loss_at_init_is_that_of_uniform_guesses(kind):
    model = small(**NGPT, ngpt=kind)
    loss = model(tokens(200, 16), tokens(200, 16, seed=1))[1].item()
    assert loss == pytest.approx(math.log(65) + 1 / (2 * 64), abs=0.02)


@KINDS
def test_n7_rope_stays_relative_under_any_scale(kind):
    """P1 and P2 with random s_qk: with q, k constant over positions the scores depend on the distance alone."""
    from attention.heads import rotate, rotation
    norm = QueryKeyNorm(GPTConfig(**SMALL, ngpt=kind, bias=False), 4, 16).double()
    torch.nn.init.normal_(norm.s_qk.stored)
    table = rotation(torch.arange(16), 16, 10000.0, torch.float64)
    q, k = norm(*(torch.randn(1, 4, 1, 16).double().expand(1, 4, 16, 16) for _ in range(2)))
    scores = rotate(q, table) @ rotate(k, table).mT
    diagonals = [scores[0, h].diagonal(o) for h in range(4) for o in range(-9, 9)]
    spread = max((d.max() - d.min()).item() for d in diagonals)
    assert spread < 1e-10 and scores.std() > 1e-3


def test_n8_normalisation_skips_frozen_tensors_and_plain_models():
    model = stepped('full')
    frozen = model.transformer.h[0].attn.c_q
    frozen.weight.requires_grad_(False)
    with torch.no_grad():
        frozen.weight.mul_(2)
        model.normalise_weights()
    assert (frozen.weight.norm(dim=1) - 2).abs().max() < 1e-5
    plain = small()
    before = {n: p.clone() for n, p in plain.named_parameters()}
    plain.normalise_weights()
    assert all(torch.equal(p, before[n]) for n, p in plain.named_parameters())


def test_n9_a_tied_embedding_stays_one_tensor():
    model = stepped('full', tie_weights=True)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert (model.lm_head.weight.norm(dim=1) - 1).abs().max() < 1e-6


def test_ngpt_learns_when_its_logits_may_grow():
    """Short runs look dead with s_z = 1, as the best probability is small then; ngpt_sz_init=10 lets them move."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SMALL, **NGPT, ngpt='full', ngpt_sz_init=10.0))
    optimizer, x = optim.adamw(model, 0.0, 1e-2, (0.9, 0.95), 'cpu'), tokens(4, 17)
    for _ in range(40):
        loss = model(x[:, :-1], x[:, 1:])[1]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.normalise_weights()
    assert loss.item() < 2.0


@pytest.mark.parametrize('settings, words', [
    (dict(ngpt='full', bias=True), 'bias=True contradicts ngpt'),
    (dict(ngpt='full', qk_norm='standard'), 'contradicts ngpt'),
    (dict(ngpt='simple', softcap=15.0), 'contradicts ngpt'), (dict(ngpt='full', n_kv_head=2), 'leave n_kv_head=None'),
    (dict(n_kv_head=3), 'n_kv_head must divide n_head (4), got 3'), (dict(n_embd=60, rope=True), 'even head size')])
def test_settings_that_contradict_are_refused(settings, words):
    config = GPTConfig(**{**SMALL, **settings})
    assert any(words in sentence for _, sentence in configurator.check(config))


def test_ngpt_refuses_a_sum_of_kronecker_products():
    with pytest.raises(UserError, match='take terms=1'):
        small(**NGPT, ngpt='full', linear={'*.c_fc': 'kron(8, 8, terms=2)'})


# ---- the loss function ----

def test_stablemax_is_its_formula_and_has_finite_gradients():
    """s(x) = x + 1 for x >= 0, 1 / (1 - x) below; at x = 1 the unused branch must not spoil the gradient."""
    z = torch.tensor([[-3.0, -0.5, 0.0, 1.0, 4.0]], dtype=torch.float64, requires_grad=True)
    s = torch.tensor([1 / 4, 1 / 1.5, 1.0, 2.0, 5.0], dtype=torch.float64)
    for target in range(5):
        loss = stablemax(z, torch.tensor([target]))
        assert loss.item() == pytest.approx(-math.log(s[target] / s.sum()), abs=1e-12)
        assert torch.autograd.grad(loss, z)[0].isfinite().all()
    f = z.detach().float().requires_grad_()
    stablemax(f, torch.tensor([2])).backward()
    assert f.grad.isfinite().all() and f.grad.dtype == torch.float32
    assert stablemax(torch.zeros(2, 7), torch.tensor([1, 3])).item() == pytest.approx(math.log(7))
    assert stablemax(torch.randn(3, 7), torch.tensor([1, -1, -1])).isfinite()


def test_a_model_trains_with_stablemax():
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SMALL, loss='stablemax'))
    optimizer, x = optim.adamw(model, 0.0, 1e-2, (0.9, 0.95), 'cpu'), tokens(4, 17)
    losses = []
    for _ in range(30):
        losses.append(model(x[:, :-1], x[:, 1:])[1])
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.5
