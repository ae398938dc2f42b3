"""The MLP with compression in the middle: lowrank/latent_mlp.py."""
import pytest
import torch
from torch.nn import functional as F

from model import GPT, GPTConfig, UserError

SMALL = dict(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=61, rope=True)


def small(dtype=torch.float64, **settings):
    torch.manual_seed(0)
    return GPT(GPTConfig(**{**SMALL, **settings})).to(dtype)


def product(module, first, second):
    return getattr(module, second).dense_weight() @ getattr(module, first).dense_weight()


def dense(mlp, x):
    """The same function with the products multiplied out."""
    up, gate = product(mlp, 'c_a', 'c_fc'), product(mlp, 'c_a', 'c_gate')
    return F.silu(x @ gate.T) * (x @ up.T) @ product(mlp, 'c_b', 'c_proj').T


@pytest.mark.parametrize('linear', [{}, {'*.mlp.c_fc': 'kron(8, 4)', '*.mlp.c_proj': 'lowrank(3)'}])
def test_c1_without_norm_equals_the_dense_mlp_of_the_products(linear):
    mlp, x = small(mlp='latent(8)', linear=linear).transformer.h[0].mlp, torch.randn(3, 5, 32, dtype=torch.float64)
    assert (mlp(x, None) - dense(mlp, x)).abs().max() < 1e-10
    mlp, x = mlp.float(), x.float()
    assert (mlp(x, None) - dense(mlp, x)).abs().max() < 1e-5


def test_c1_would_see_a_norm():
    mlp, x = small(mlp='latent(8, norm=True)').transformer.h[0].mlp, torch.randn(5, 32, dtype=torch.float64)
    assert (mlp(x, None) - dense(mlp, x)).abs().max() > 1e-3


def test_c2_full_rank_with_identities_equals_swiglu():
    """The class takes any rank; only the site language refuses one that saves nothing."""
    from lowrank.latent_mlp import LatentMLP
    torch.manual_seed(0)
    config = GPTConfig(**SMALL, mlp='swiglu(48)')
    plain, latent = GPT(config).double().transformer.h[0].mlp, LatentMLP(config, 'h.0.mlp', 32, hidden=48).double()
    with torch.no_grad():
        torch.nn.init.eye_(latent.c_a.weight)
        torch.nn.init.eye_(latent.c_proj.weight)
        for ours, theirs in ((latent.c_fc, plain.c_fc), (latent.c_gate, plain.c_gate), (latent.c_b, plain.c_proj)):
            ours.weight.copy_(theirs.weight)
    x = torch.randn(2, 7, 32, dtype=torch.float64)
    assert (latent(x, None) - plain(x, None)).abs().max() < 1e-10


@pytest.mark.parametrize('rank, hidden, norm', [(8, 96, False), (5, 40, True)])
def test_c3_parameters(rank, hidden, norm):
    mlp = small(mlp=f'latent({rank}, hidden={hidden}, norm={norm})').transformer.h[1].mlp
    assert sum(p.numel() for p in mlp.parameters()) == rank * (2 * 32 + 3 * hidden) + rank * norm


def test_c3_a_quarter_of_gpt2s_width_is_31_percent_of_its_swiglu():
    with torch.device('meta'):
        mlp = GPT(GPTConfig(n_layer=1, mlp='latent(192)')).transformer.h[0].mlp
    assert sum(p.numel() for p in mlp.parameters()) / (3 * 768 * 2048) == pytest.approx(0.3125)


def test_the_products_start_with_the_dense_standard_deviations():
    config = GPTConfig(n_layer=2, n_head=4, n_embd=256, block_size=16, vocab_size=61, mlp='latent(64)')
    mlp = GPT(config).transformer.h[0].mlp
    assert product(mlp, 'c_a', 'c_fc').std().item() == pytest.approx(0.02, rel=0.05)
    assert product(mlp, 'c_a', 'c_gate').std().item() == pytest.approx(0.02, rel=0.05)
    assert product(mlp, 'c_b', 'c_proj').std().item() == pytest.approx(0.02 / 2, rel=0.05)
    assert mlp.c_a.weight.std().item() == pytest.approx(256 ** -0.5, rel=0.05)


def test_u1_u3_no_token_sees_the_future():
    model, x = small(mlp='latent(8, norm=True)').eval(), torch.randint(61, (2, 12))
    y, logits = x.clone(), small(mlp='latent(8, norm=True)').eval()(x, x)[0]
    y[:, 6:] = torch.randint(61, (2, 6))
    assert torch.equal(model(y, y)[0][:, :6], logits[:, :6])
    assert (model(x[:, :7], x[:, :7])[0] - logits[:, :7]).abs().max() < 1e-12


@pytest.mark.parametrize('kind', ['full', 'simple'])
def test_ngpt_latents_are_unit_vectors_and_gates_start_at_std_1(kind):
    config = dict(n_layer=1, n_head=4, n_embd=256, block_size=64, vocab_size=999, rope=True, tie_weights=False, ngpt=kind,
                  mlp='latent(64)')
    torch.manual_seed(0)
    model = GPT(GPTConfig(**config))
    mlp, seen = model.transformer.h[0].mlp, {}
    mlp.c_fc.register_forward_pre_hook(lambda module, inputs: seen.update(latent=inputs[0]))
    mlp.c_gate.register_forward_hook(lambda module, inputs, output: seen.update(gate=output * mlp.s_u()))
    model(torch.randint(999, (4, 64)))
    assert (seen['latent'].norm(dim=-1) - 1).abs().max() < 1e-5
    assert 0.8 < seen['gate'].std() < 1.2
    assert (mlp.c_proj.weight.norm(dim=0) - 1).abs().max() < 1e-6


def test_every_parameter_gets_a_gradient():
    model, x = small(mlp='latent(8, norm=True)'), torch.randint(61, (2, 16))
    model(x, x)[1].backward()
    for p in model.transformer.h[0].mlp.parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.any()


@pytest.mark.parametrize('spec, words', [
    ('latent(0)', 'rank must be a whole number of at least 1'),
    ('latent(8, hidden=0)', 'hidden must be a whole number of at least 1'),
    ('latent(8, norm=1)', 'norm is True or False'),
    ('latent(28)', 'saves nothing'),
    ('latent', 'missing a required argument'),
])
def test_refusals_are_one_sentence(spec, words):
    with pytest.raises(UserError, match=words) as error:
        small(mlp=spec)
    assert 'h.0.mlp' in str(error.value) and '\n' not in str(error.value)


def test_the_refusal_names_the_largest_rank_that_saves_some():
    with pytest.raises(UserError, match='rank=27 is the largest'):                 # 448 rank < 12,288
        small(mlp='latent(30)')
    assert small(mlp='latent(27)').transformer.h[0].mlp.rank == 27
