"""What every entry of variants.MLPS must keep. A new MLP: one line in MLPS, then
`pytest tests/contract/test_mlps.py -k NAME`, which takes the specs of the class's `examples`.

Models are small and in float64, with every parameter random.
"""
import itertools

import pytest
import torch

from layers.basic import tags_of
from model import GPT, GPTConfig
from tests.contract import entries
from variants import MLPS

# what is kept in this repository, name -> specs for n_embd 32
EXAMPLES = {
    'gelu': ['gelu', "gelu(approximate='tanh')"],
    'relu2': ['relu2'],
    'swiglu': ['swiglu', 'swiglu(40)'],
    'latent': ['latent(8)', 'latent(6, hidden=40, norm=True)'],
    'kron_moe': ['kron_moe(4)', 'kron_moe(8, 16, 8, top_k=3, share=None)', "kron_moe(3, 16, 8, top_k=1, share='A')"],
}
SPECS = entries.specs('mlp', EXAMPLES)                  # newcomers too
# specs whose tokens are grouped by expert: products of other shapes round otherwise
REGROUPED = ('kron_moe',)
NORMALISED = ('gelu', 'relu2', 'swiglu', 'latent')              # those that ngpt takes
SIZES = dict(block_size=16, vocab_size=65, n_layer=2, n_head=4, n_embd=32)

each_spec = pytest.mark.parametrize('name, spec', [(name, spec) for name in SPECS for spec in SPECS[name]])


@pytest.mark.parametrize('name', list(MLPS))
def test_its_class_is_complete(name):
    """First: until this passes no other test runs for that name."""
    entries.complete('mlp', name, EXAMPLES)


def build(spec, dtype=torch.float64, **changes):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**SIZES, 'mlp': spec, **changes})).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def tokens(*shape, seed=0):
    return torch.randint(65, shape, generator=torch.Generator().manual_seed(seed))


@each_spec
@torch.no_grad()
def test_u1_u3_no_token_sees_the_future(name, spec):
    model, x = build(spec), tokens(2, 16)
    full = model(x, x)[0]
    for t in (0, 5, 14):
        y = x.clone()
        y[:, t + 1:] = tokens(2, 15 - t, seed=9)
        changed = model(y, y)[0]
        same = (changed - full)[:, :t + 1].abs().max()
        assert same == 0 or name in REGROUPED and same < 1e-10
        assert not torch.equal(changed[:, t + 1:], full[:, t + 1:])
        prefix = x[:, :t + 1]
        assert (model(prefix, prefix)[0] - full[:, :t + 1]).abs().max() < 1e-10


@each_spec
@torch.no_grad()
def test_u4_cached_decoding_equals_the_full_forward(name, spec):
    model, x = build(spec), tokens(2, 16)
    full, caches, start = model(x, x)[0], [{}, {}], 0
    for n in (5, 4, *itertools.repeat(1, 7)):
        logits, _ = model(x[:, start:start + n], caches=caches, start=start)
        start += n
        assert (logits[:, -1] - full[:, start - 1]).abs().max() < 1e-10
    greedy = [model.generate(x[:, :4], 6, temperature=0, use_cache=use) for use in (True, False)]
    assert torch.equal(*greedy)


@each_spec
@torch.no_grad()
def test_u5_rows_of_a_batch_do_not_meet(name, spec):
    model, x = build(spec), tokens(3, 12)
    y = tokens(3, 12, seed=4)
    y[1] = x[1]
    assert (model(y, y)[0][1] - model(x, x)[0][1]).abs().max() < 1e-10


@each_spec
def test_u8_every_parameter_has_a_tag_and_a_gradient(name, spec):
    model, x = build(spec).train(), tokens(4, 16)
    model(x, x.roll(-1, 1))[1].backward()
    assert tags_of(model).keys() == dict(model.named_parameters()).keys()
    for n, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), n


@each_spec
def test_the_config_rebuilds_it_and_realise_keeps_the_function(name, spec):
    model, x = build(spec, linear={'*.attn.*': 'kron(4, 4)'}), tokens(3, 16)
    before = model(x, x)[0]
    for _ in range(2):
        again = GPT(model.config).double().eval()
        again.load_state_dict(model.state_dict())
        assert (again(x, x)[0] - before).abs().max() < 1e-10
        model.realise()


@each_spec
def test_zero_init_and_a_new_block_change_nothing(name, spec):
    model, x = build(spec), tokens(2, 16)
    before = model(x, x)[0]
    model.add_block()
    assert torch.equal(model(x, x)[0], before)


@each_spec
def test_the_site_table_counts_all_but_norms_and_embeddings(name, spec):
    model = build(spec)
    rows = model.site_table()
    rest = sum(p.numel() for n, p in model.named_parameters() if 'wte' in n or 'wpe' in n or 'ln_' in n)
    extra = sum(p.numel() for n, p in model.named_parameters() if '.mlp.norm.' in n)
    assert sum(row['parameters'] for row in rows) + rest + extra == model.num_params()
    assert all(0 < row.get('active', 1) <= row['parameters'] and row['flops'] > 0 for row in rows)
