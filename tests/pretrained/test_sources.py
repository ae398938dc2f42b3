"""Weights from elsewhere: transformers and nanoGPT are the oracles; what does not fit is refused in one line."""
import dataclasses
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import configurator
import variants
from checkpoints import checkpoint
from configurator import GPTConfig
from decomposition import initialise
from layers.basic import Linear
from model import GPT
from pretrained import gpt2, sources
from training import parallel, startup
from variants import UserError

SMALL = {'n_layer': 2, 'n_embd': 64, 'n_head': 4, 'vocab_size': 97, 'n_positions': 32}
OURS = GPTConfig(block_size=32, vocab_size=97, n_layer=2, n_head=4, n_embd=64, bias=True,
                 mlp="gelu(approximate='tanh')")
MLPS = {'h.*.mlp.c_fc': 'kron(16, 8, terms=3)', 'h.*.mlp.c_proj': 'kron(8, 16, terms=3)'}


def transformers_gpt2(**changes):
    """A random GPT-2 of transformers, with biases and gains that are not 0 and 1, so that none can be forgotten."""
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**{**SMALL, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope='module')
def hf(tmp_path_factory):
    """(transformers' model, the folder that it saved)."""
    model, folder = transformers_gpt2(), tmp_path_factory.mktemp('hf')
    model.save_pretrained(folder)
    return model, str(folder)


@pytest.fixture
def copy(hf, tmp_path):
    """A copy of the folder, to be damaged: copy(config={...}, tensors=function of the state dict)."""
    def make(config=None, tensors=None):
        folder = tmp_path / 'copy'
        shutil.copytree(hf[1], folder)
        if config:
            raw = {**json.loads((folder / 'config.json').read_text()), **config}
            raw = {name: value for name, value in raw.items() if value is not Path}     # Path: leave it out
            (folder / 'config.json').write_text(json.dumps(raw))
        if tensors:
            state = load_file(folder / 'model.safetensors')
            state = tensors(state) or state
            save_file({name: t.clone().contiguous() for name, t in state.items()}, folder / 'model.safetensors')
        return str(folder)
    return make


def logits_of(model, seed=1, length=32, vocab=97):
    """All logits of 3 random rows, by ours (targets make it give all) or transformers."""
    idx = torch.randint(vocab, (3, length), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        model.eval()
        return model(idx, targets=idx)[0] if isinstance(model, GPT) else model(idx).logits


def assert_close(ours, theirs, tolerance=1e-5):
    """Equal within tolerance of the largest logit."""
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


def refusal(function, *arguments, **keywords):
    with pytest.raises(UserError) as caught:
        function(*arguments, **keywords)
    assert '\n' not in str(caught.value)
    return str(caught.value)


# ----------------------------------------------------------------------------------------------------
# Hugging Face -> ours

def test_logits_equal_transformers(hf):
    model = GPT.from_pretrained(hf[1])
    assert model.config == OURS and model.lm_head.weight is model.transformer.wte.weight
    assert_close(logits_of(model), logits_of(hf[0]))


def test_greedy_text_equals_transformers(hf):
    model = GPT.from_pretrained(hf[1]).eval()
    for seed in range(4):
        prompt = torch.randint(97, (1, 5), generator=torch.Generator().manual_seed(seed))
        theirs = hf[0].generate(prompt, max_new_tokens=27, do_sample=False, pad_token_id=0, eos_token_id=None)
        assert torch.equal(model.generate(prompt, 27, temperature=0), theirs)


@pytest.mark.parametrize('name', ['gelu', 'gelu_new', 'gelu_pytorch_tanh'])
def test_each_gelu_equals_transformers(name, tmp_path):
    theirs = transformers_gpt2(activation_function=name)
    theirs.save_pretrained(tmp_path)
    assert_close(logits_of(GPT.from_pretrained(str(tmp_path))), logits_of(theirs))


def test_the_wrong_gelu_would_be_seen(hf):
    """Negative control: the tolerance tells the two GELUs apart."""
    model = GPT.from_pretrained(hf[1], {'mlp': 'gelu'})
    with pytest.raises(AssertionError):
        assert_close(logits_of(model), logits_of(hf[0]))


def test_a_head_of_its_own(tmp_path):
    theirs = transformers_gpt2(tie_word_embeddings=False)
    theirs.save_pretrained(tmp_path)
    model = GPT.from_pretrained(str(tmp_path))
    assert not model.config.tie_weights and model.lm_head.weight is not model.transformer.wte.weight
    assert_close(logits_of(model), logits_of(theirs))
    assert 'tie_weights=False' in refusal(GPT.from_pretrained, str(tmp_path), {'tie_weights': True})


def test_tied_weights_can_be_untied(hf):
    model = GPT.from_pretrained(hf[1], {'tie_weights': False})
    assert model.lm_head.weight is not model.transformer.wte.weight
    assert_close(logits_of(model), logits_of(hf[0]))


def hub_style(state):
    """As on the hub: no prefix, and the mask buffers that old versions saved."""
    mask = torch.ones(1, 1, 32, 32).tril()
    return {**{name.removeprefix('transformer.'): t for name, t in state.items()},
            **{f'h.{i}.attn.bias': mask for i in range(2)}, **{f'h.{i}.attn.masked_bias': mask.sum() for i in range(2)}}


def test_old_files_without_prefix(hf, copy):
    assert_close(logits_of(GPT.from_pretrained(copy(tensors=hub_style))), logits_of(hf[0]))


def test_an_explicit_tied_head_is_taken_when_equal(hf, copy):
    folder = copy(tensors=lambda state: {**state, 'lm_head.weight': state['transformer.wte.weight']})
    assert_close(logits_of(GPT.from_pretrained(folder)), logits_of(hf[0]))


def test_shards(hf, tmp_path):
    hf[0].save_pretrained(tmp_path, max_shard_size='100KB')
    assert len(list(tmp_path.glob('*.safetensors'))) > 1 and not (tmp_path / 'model.safetensors').exists()
    assert_close(logits_of(GPT.from_pretrained(str(tmp_path))), logits_of(hf[0]))


def test_a_shard_outside_the_folder_is_refused(hf, tmp_path):
    hf[0].save_pretrained(tmp_path / 'a', max_shard_size='100KB')
    index = tmp_path / 'a' / 'model.safetensors.index.json'
    text = index.read_text()
    shard = sorted(json.loads(text)['weight_map'].values())[0]
    os.rename(tmp_path / 'a' / shard, tmp_path / shard)
    assert f'lacks {shard!r}' in refusal(initialise.read_source, str(tmp_path / 'a'))
    index.write_text(text.replace(f'"{shard}"', f'"../{shard}"'))
    assert f"lacks '../{shard}'" in refusal(initialise.read_source, str(tmp_path / 'a'))


def test_half_precision_is_read(hf, copy):
    folder = copy(tensors=lambda state: {name: t.half() for name, t in state.items()})
    model = GPT.from_pretrained(folder)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert_close(logits_of(model), logits_of(hf[0]), 1e-2)


def test_overrides(hf):
    model = GPT.from_pretrained(hf[1], {'dropout': 0.25, 'block_size': 16, 'linear': MLPS})
    assert model.config.dropout == model.transformer.drop.p == 0.25
    assert model.transformer.wpe.weight.shape == (16, 64)
    assert model.sites()['h.1.mlp.c_fc'].A.shape == (3, 16, 8)
    theirs = hf[0].transformer.h[1].mlp.c_fc.weight.t()
    error = (model.sites()['h.1.mlp.c_fc'].dense_weight() - theirs).norm() / theirs.norm()
    assert 0.1 < error < 0.99                           # a random matrix: not exact, and better than nothing
    assert_close(logits_of(GPT.from_pretrained(hf[1], {'block_size': 16}), length=16), logits_of(hf[0], length=16))


@pytest.mark.parametrize('changes, words', [
    ({'activation_function': 'relu'}, "activation_function is 'relu'"),
    ({'activation_function': ['gelu']}, 'activation_function is'),
    ({'n_inner': 0}, 'n_inner is 0'),
    ({'n_inner': 128}, 'h.0.mlp.c_fc'),
    ({'scale_attn_by_inverse_layer_idx': True}, 'scale_attn_by_inverse_layer_idx is True'),
    ({'scale_attn_weights': False}, 'scale_attn_weights is False'),
    ({'reorder_and_upcast_attn': True}, 'reorder_and_upcast_attn is True'),
    ({'add_cross_attention': True}, 'add_cross_attention is True'),
    ({'layer_norm_epsilon': 1e-6}, 'layer_norm_epsilon is 1e-06'),
    ({'model_type': 'bert'}, "model_type is 'bert'"),
    ({'n_embd': Path}, 'lacks n_embd'),
    ({'n_layer': 3}, 'n_layer is 3, and the file holds 2 blocks'),
    ({'n_layer': 10 ** 12}, 'n_layer must be at most 2000'),
    ({'n_head': 3}, 'n_head must divide n_embd'),
    ({'n_head': '4'}, 'n_head takes a whole number'),
    ({'n_positions': 10 ** 14}, 'block_size must be at most 16777216'),
    ({'vocab_size': 98}, 'wte.weight is (97, 64)'),
    ({'n_embd': 0}, 'n_embd must be at least 1'),
])
def test_another_model_is_refused(changes, words, copy):
    assert words in refusal(initialise.read_source, copy(config=changes))


def without(name):
    return lambda state: {n: t for n, t in state.items() if n != name}


@pytest.mark.parametrize('tensors, words', [
    (without('transformer.h.1.ln_2.weight'), 'lacks transformer.h.1.ln_2.weight'),
    (without('transformer.h.1.attn.c_attn.bias'), 'lacks transformer.h.1.attn.c_k.bias and 2 more'),
    (without('transformer.wte.weight'), 'wte.weight is missing'),
    (lambda s: {**s, 'score.weight': torch.ones(2, 64)}, 'holds unknown transformer.score.weight'),
    (lambda s: {**s, 'transformer.h.0.mlp.c_fc.weight': torch.ones(256, 64)}, 'its config says (256, 64)'),
    (lambda s: {**s, 'transformer.h.0.mlp.c_fc.weight': torch.ones(64)}, 'c_fc.weight is (64,)'),
    (lambda s: {**s, 'transformer.h.0.attn.c_attn.weight': torch.ones(64, 191)}, 'not q, k and v'),
    (lambda s: {**s, 'transformer.h.0.attn.c_attn.weight': torch.tensor(1.0)}, 'not q, k and v'),
    (lambda s: {**s, 'transformer.ln_f.bias': torch.ones(64, dtype=torch.int8)}, 'ln_f.bias is (64,) in torch.int8'),
    (lambda s: {**s, 'lm_head.weight': torch.ones(97, 64)}, '"tie_word_embeddings": false'),
])
def test_tensors_that_do_not_fit_are_refused(tensors, words, copy):
    assert words in refusal(initialise.read_source, copy(tensors=tensors))


@pytest.mark.parametrize('overrides, words', [
    ({'block_size': 64}, 'block_size can be at most 32'),
    ({'vocab_size': 64}, 'vocab_size must be at least 97'),
    ({'n_layer': 3}, 'n_layer is 2 in the source and 3 here'),
    ({'bias': False}, 'bias is True in the source'),
    ({'droput': 0.1}, "did you mean 'dropout'"),
    ({'dropout': 'x'}, 'dropout takes a number'),
    ({'linear': {'*': 'kron(7, 8)'}}, 'do not divide'),
])
def test_overrides_that_do_not_fit_are_refused(overrides, words, hf):
    assert words in refusal(GPT.from_pretrained, hf[1], overrides)


def test_folders_that_hold_no_model(tmp_path, hf):
    assert 'holds no checkpoint' in refusal(initialise.read_source, str(tmp_path))
    (tmp_path / 'config.json').write_text('{}')
    assert 'holds no checkpoint' in refusal(initialise.read_source, str(tmp_path))
    (tmp_path / 'model.safetensors').write_bytes(b'no tensors')
    assert 'lacks n_positions' in refusal(initialise.read_source, str(tmp_path))
    shutil.copy(Path(hf[1], 'config.json'), tmp_path)
    assert 'damaged' in refusal(initialise.read_source, str(tmp_path))
    (tmp_path / 'config.json').write_text('{')
    assert 'not readable as JSON' in refusal(initialise.read_source, str(tmp_path))
    assert 'is no model' in refusal(initialise.read_source, str(tmp_path / 'config.json'))
    assert 'no folder' in refusal(initialise.read_source, str(tmp_path / 'nothing'))


def test_a_truncated_file_is_refused(copy):
    folder = copy()
    path = Path(folder, 'model.safetensors')
    path.write_bytes(path.read_bytes()[:-100])
    assert 'damaged' in refusal(initialise.read_source, folder)


def test_a_pickle_is_refused(tmp_path):
    (tmp_path / 'config.json').write_text('{}')
    (tmp_path / 'pytorch_model.bin').write_bytes(b'')
    assert 'save_pretrained' in refusal(initialise.read_source, str(tmp_path))


@pytest.mark.parametrize('name', ['gpt2', 'distilgpt2', 'no-such/model', 'a b'])
def test_without_a_network_one_line_says_what_to_pass(name):
    assert 'pass a local folder' in refusal(GPT.from_pretrained, name)


def test_published_sizes_need_no_download():
    config = initialise.source_config('gpt2-xl')
    assert (config.n_layer, config.n_head, config.n_embd, config.vocab_size) == (48, 25, 1600, 50257)
    with torch.device('meta'):
        assert GPT(initialise.source_config('gpt2')).num_params() == 124439808


# ----------------------------------------------------------------------------------------------------
# nanoGPT

def nanogpt_state(ours, prefix=''):
    """A state dict as nanoGPT saves it, fused by hand from a dense model of ours."""
    state = {}
    for name, t in ours.state_dict().items():
        if '.c_q.' in name:
            t = torch.cat([ours.state_dict()[name.replace('c_q', letter)] for letter in ('c_q', 'c_k', 'c_v')])
            name = name.replace('c_q', 'c_attn')
        if '.c_k.' not in name and '.c_v.' not in name:
            state[prefix + name] = t
    return state


def save_nanogpt(path, ours, prefix='', **changes):
    c = ours.config
    arguments = {'n_layer': c.n_layer, 'n_head': c.n_head, 'n_embd': c.n_embd, 'block_size': c.block_size,
                 'bias': c.bias, 'vocab_size': c.vocab_size, 'dropout': c.dropout}
    torch.save({'model': nanogpt_state(ours, prefix), 'optimizer': {}, 'model_args': {**arguments, **changes},
                'iter_num': 7, 'best_val_loss': torch.tensor(1.5), 'config': {'dataset': 'shakespeare_char'}}, path)


def random_model(seed=0, **changes):
    """A model of ours of which no two tensors are equal."""
    torch.manual_seed(seed)
    model = GPT(dataclasses.replace(OURS, **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize('prefix', ['', '_orig_mod.'])
@pytest.mark.parametrize('bias', [True, False])
def test_nanogpt(prefix, bias, tmp_path):
    ours = random_model(bias=bias, mlp='gelu')
    save_nanogpt(tmp_path / 'ckpt.pt', ours, prefix)
    config, state, info = initialise.read_source(str(tmp_path))
    assert config == ours.config and info == {'kind': 'nanogpt', 'step': 7, 'data': None, 'source': {}}
    assert torch.equal(logits_of(initialise.build(config, config, state)), logits_of(ours))


def test_nanogpt_c_attn_is_q_k_v_in_this_order(tmp_path):
    """By nanoGPT's own arithmetic: one product, split in three along the outputs."""
    ours = random_model(mlp='gelu')
    save_nanogpt(tmp_path / 'ckpt.pt', ours)
    x, fused = torch.randn(5, 64), torch.load(tmp_path / 'ckpt.pt', weights_only=True)['model']
    q, k, v = (x @ fused['transformer.h.1.attn.c_attn.weight'].t()).split(64, dim=1)
    _, state, _ = initialise.read_source(str(tmp_path))
    for letter, value in zip('qkv', (q, k, v)):
        assert torch.allclose(x @ state[f'transformer.h.1.attn.c_{letter}.weight'].t(), value, atol=1e-6)


def test_nanogpt_without_flash_attention_saved_masks(tmp_path):
    ours = random_model(mlp='gelu')
    save_nanogpt(tmp_path / 'ckpt.pt', ours)
    saved = torch.load(tmp_path / 'ckpt.pt', weights_only=True)
    saved['model'].update({f'transformer.h.{i}.attn.bias': torch.ones(1, 1, 32, 32).tril() for i in range(2)})
    torch.save(saved, tmp_path / 'ckpt.pt')
    config, state, _ = initialise.read_source(str(tmp_path))
    assert torch.equal(logits_of(initialise.build(config, config, state)), logits_of(ours))


def test_nanogpt_that_does_not_fit(tmp_path):
    save_nanogpt(tmp_path / 'ckpt.pt', random_model(mlp='gelu'), n_layer=3)
    assert 'the file holds 2 blocks' in refusal(initialise.read_source, str(tmp_path))
    save_nanogpt(tmp_path / 'ckpt.pt', random_model(mlp='gelu'), rotary=True)
    assert "no setting 'rotary'" in refusal(initialise.read_source, str(tmp_path))
    (tmp_path / 'ckpt.pt').write_bytes(b'\x80\x02}q\x00.')
    assert 'ckpt.pt' in refusal(initialise.read_source, str(tmp_path))
    torch.save({'model': [1], 'model_args': {}}, tmp_path / 'ckpt.pt')
    assert 'ckpt.pt' in refusal(initialise.read_source, str(tmp_path))


class Hostile:
    """Writes the canary file when it is unpickled."""

    def __init__(self, canary):
        self.canary = str(canary)

    def __reduce__(self):
        return open, (self.canary, 'w')


@pytest.mark.parametrize('zipped', [True, False])
def test_a_hostile_pickle_is_refused_and_not_run(zipped, tmp_path):
    canary = tmp_path / 'canary'
    torch.save({'model': {}, 'model_args': Hostile(canary)}, tmp_path / 'ckpt.pt',
               _use_new_zipfile_serialization=zipped)
    assert 'ckpt.pt' in refusal(initialise.read_source, str(tmp_path))
    assert not canary.exists()
    torch.load(tmp_path / 'ckpt.pt', weights_only=False)                # the file is hostile indeed
    assert canary.exists()


# ----------------------------------------------------------------------------------------------------
# initialise

def fill(model, source, **keywords):
    return initialise.initialise(model, source.config, source.state_dict(), **keywords)


def test_dense_to_full_rank_keeps_the_function(monkeypatch):
    monkeypatch.setattr(variants, 'refuse_waste', lambda *arguments: None)     # full rank saves nothing
    source, lines = random_model(), []
    model = random_model(1, linear={'h.*.mlp.c_fc': 'kron(4, 2, terms=8)', 'h.*.c_k': 'kron(8, 1, terms=8)'})
    report = fill(model, source, progress=lines.append)
    assert_close(logits_of(model), logits_of(source))
    assert [row['site'] for row in report] == list(model.sites()) and len(lines) == 4
    assert all(row['error'] < 1e-5 and abs(row['norm'] - 1) < 1e-5 for row in report)
    row = next(row for row in report if row['site'] == 'h.0.mlp.c_fc')
    assert row['spec'] == 'kron(4, 2, terms=8)' and row['parameters'] == 8 * (8 + 64 * 32) + 256


def test_truncation_reports_its_error():
    source, model = random_model(), random_model(1, linear=MLPS)
    report = {row['site']: row for row in fill(model, source)}
    for site in ('h.0.mlp.c_fc', 'h.1.mlp.c_proj'):
        weight, kept = source.sites()[site].weight, model.sites()[site].dense_weight()
        assert report[site]['error'] == pytest.approx(((weight - kept).norm() / weight.norm()).item(), rel=1e-5)
        assert report[site]['norm'] == pytest.approx((kept.norm() / weight.norm()).item(), rel=1e-5)
        assert report[site]['error'] > 0.1
    assert report['h.0.attn.c_q']['error'] == 0 and report['h.0.attn.c_q']['norm'] == 1


def test_the_method_reaches_from_dense():
    source, model = random_model(), random_model(1, linear=MLPS)
    report = {row['site']: row for row in fill(model, source, method='van_loan_normalised')}
    assert report['h.0.mlp.c_fc']['norm'] == pytest.approx(1, abs=1e-5)
    assert "h.0.mlp.c_fc: method='magic' is unknown" in refusal(fill, model, source, method='magic')


@pytest.mark.parametrize('linear', [MLPS, {**MLPS, 'h.*.mlp.c_fc': 'kron(16, n=8, terms=3, scale=False)'}])
def test_the_same_structure_is_copied_bit_by_bit(linear):
    source, model = random_model(linear=MLPS), random_model(1, linear=linear)
    report = fill(model, source)
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in model.state_dict().items())
    assert {row['error'] for row in report} == {0.0}


def test_structured_to_dense_realises():
    source, model = random_model(linear=MLPS), random_model(1)
    fill(model, source)
    assert type(model.sites()['h.0.mlp.c_fc']) is Linear
    assert_close(logits_of(model), logits_of(source))


def test_structured_to_another_structure():
    """More terms than the source has, of the same shape, hold it exactly."""
    source = random_model(linear={'h.*.mlp.c_fc': 'kron(16, 8, terms=3)'})
    model = random_model(1, linear={'h.*.mlp.c_fc': 'kron(16, 8, terms=5)'})
    report = {row['site']: row for row in fill(model, source)}
    assert report['h.0.mlp.c_fc']['error'] < 1e-5
    assert_close(logits_of(model), logits_of(source))


def test_a_padded_vocabulary_takes_no_probability():
    """New rows hold the mean: old logits are unchanged, and the new ones get at most new / old of the mass."""
    source, model = random_model(), random_model(1, vocab_size=128)
    with torch.no_grad():
        source.transformer.wte.weight.add_(torch.ones(64))
        source.transformer.ln_f.bias.fill_(-1)              # logits near -64, as GPT-2's are near -100
    fill(model, source)
    theirs, ours = logits_of(source), logits_of(model)
    assert theirs.max() < -30
    assert_close(ours[..., :97], theirs)
    padding = ours.softmax(-1)[..., 97:].sum(-1)
    assert 0 < padding.max() <= 31 / 97
    assert torch.equal(model.transformer.wte.weight[97:], source.transformer.wte.weight.mean(0).expand(31, 64))


def test_the_124m_config_takes_gpt2s_50257_rows_into_its_padded_vocabulary(tmp_path, monkeypatch):
    """As train.py builds it, at a small width."""
    monkeypatch.chdir(Path(__file__).parents[2])
    source = random_model(vocab_size=50257, n_layer=1, n_embd=8, n_head=2, block_size=16)
    raw, state = gpt2.from_ours(source)
    save_file(state, tmp_path / 'model.safetensors', metadata={'format': 'pt'})
    (tmp_path / 'config.json').write_text(json.dumps(raw))
    config = configurator.load(['config/gpt2_kron_mlp.py', f'--init_from={tmp_path}', '--device=cpu', '--n_layer=1',
                                '--n_embd=8', '--n_head=2', '--block_size=16', "--linear={'h.*.mlp.*': 'kron(8, 8)'}"])
    dataset = SimpleNamespace(folder='data', vocab_size=50257, tokenizer={'tokenizer': 'gpt2', 'vocab_size': 50257})
    model = startup.build(config, dataset, None, parallel.start(config))
    rows = model.transformer.wte.weight
    assert config.vocab_size == 50304 == len(rows) and model.lm_head.weight is rows
    assert torch.equal(rows[:50257], source.transformer.wte.weight)
    assert torch.equal(rows[50257:], source.transformer.wte.weight.mean(0).expand(47, 8))
    assert model.sites()['h.0.mlp.c_fc'].spec == 'kron(8, 8)' and logits_of(model, length=16).isfinite().all()


def test_another_data_set_is_refused_before_training(tmp_path):
    """Characters for a GPT-2, for a model of other characters, and for one that says nothing and has another number."""
    chars = {'tokenizer': 'char', 'vocab_size': 16, 'chars': [*'abcdefghijklmnop']}
    dataset = SimpleNamespace(folder='data', vocab_size=16, tokenizer=chars)
    job = parallel.start(configurator.load(['--device=cpu']))
    for name, rows, data, words in (
            ('gpt2', 50257, None, "GPT-2's by their number"),
            ('other', 16, {**chars, 'chars': chars['chars'][::-1]}, 'mean other'),
            ('silent', 17, None, 'has 17 tokens and does not say'), ('same', 16, chars, None)):
        source = random_model(vocab_size=rows, n_layer=1, n_embd=8, n_head=2, block_size=16, mlp='gelu')
        if data:
            checkpoint.save(tmp_path / name, {'step': 1, 'config': configurator.as_dict(source.config), 'data': data,
                                              'model': source.state_dict()})
        else:
            (tmp_path / name).mkdir()
            save_nanogpt(tmp_path / name / 'ckpt.pt', source)
        config = configurator.load([f'--init_from={tmp_path / name}', '--device=cpu', '--block_size=16'])
        if words:
            assert words in refusal(startup.build, config, dataset, None, job)
        else:
            assert startup.build(config, dataset, None, job).config.vocab_size == 16


def test_a_cropped_context():
    source, model = random_model(), random_model(1, block_size=16)
    fill(model, source)
    assert_close(logits_of(model, length=16), logits_of(source, length=16))


def test_values_are_copied_and_not_shared():
    source, model = random_model(), random_model(1)
    fill(model, source)
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.zero_()
    assert all(parameter.abs().sum() > 0 for parameter in model.parameters())


def test_filled_parameters_stay_the_same_objects():
    """An optimizer that was made before still holds them."""
    model = random_model(1, linear=MLPS)
    before = [id(p) for p in model.parameters()]
    fill(model, random_model())
    assert [id(p) for p in model.parameters()] == before and all(p.requires_grad for p in model.parameters())


def test_float64_and_another_dtype():
    source = random_model().double()
    model = random_model(1, linear=MLPS).double()
    fill(model, source)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    single = random_model(2)
    fill(single, source)
    assert {p.dtype for p in single.parameters()} == {torch.float32}


def test_build_fills_every_tensor(monkeypatch):
    """`build` starts from memory that nothing has written: NaN there must all be gone."""
    empty = GPT.to_empty

    def poisoned(self, **keywords):
        empty(self, **keywords)
        for parameter in self.parameters():
            torch.nn.init.constant_(parameter, float('nan'))
        return self
    monkeypatch.setattr(GPT, 'to_empty', poisoned)
    source = random_model()
    config = dataclasses.replace(source.config, vocab_size=128, block_size=16, linear=MLPS)
    model = initialise.build(config, source.config, source.state_dict())
    assert all(p.isfinite().all() for p in model.parameters())
    assert model.lm_head.weight is model.transformer.wte.weight


def test_a_model_that_does_not_fit_is_refused():
    source = random_model()
    for changes, words in [({'n_head': 2}, 'n_head is 4'), ({'block_size': 33}, 'at most 32'),
                           ({'vocab_size': 96}, 'at least 97'), ({'bias': False}, 'bias is True')]:
        assert words in refusal(fill, random_model(1, **changes), source)
    state = source.state_dict()
    assert 'ln_f.weight' in refusal(initialise.initialise, random_model(1), source.config,
                                    {name: t for name, t in state.items() if 'ln_f.weight' not in name})
    assert 'h.0.mlp.c_fc' in refusal(initialise.initialise, random_model(1), source.config,
                                     {name: t for name, t in state.items() if 'h.0.mlp.c_fc.weight' not in name})
    assert 'extra' in refusal(initialise.initialise, random_model(1), source.config, {**state, 'extra': torch.ones(1)})
    assert 'ln_f.bias' in refusal(initialise.initialise, random_model(1), source.config,
                                  {**state, 'transformer.ln_f.bias': torch.ones(3)})


# ----------------------------------------------------------------------------------------------------
# ours -> Hugging Face

def load_in_transformers(folder, config, state):
    from transformers import GPT2LMHeadModel
    save_file(state, folder / 'model.safetensors', metadata={'format': 'pt'})
    (folder / 'config.json').write_text(json.dumps(config))
    model, report = GPT2LMHeadModel.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


@pytest.mark.parametrize('changes', [{}, {'bias': False}, {'tie_weights': False}, {'mlp': 'gelu'}, {'linear': MLPS}])
def test_transformers_computes_the_same(changes, tmp_path):
    ours = random_model(**changes)
    theirs = load_in_transformers(tmp_path, *sources.to_hf_gpt2(ours))
    assert_close(logits_of(theirs), logits_of(ours))


def test_padding_is_dropped(tmp_path):
    ours = random_model(vocab_size=128)
    theirs = load_in_transformers(tmp_path, *gpt2.from_ours(ours, vocab_size=97))
    assert theirs.config.vocab_size == 97
    assert_close(logits_of(theirs), logits_of(ours)[..., :97])


def test_only_a_gpt2_goes_there():
    model = random_model(mlp={'h.0': 'gelu', 'h.1': "gelu(approximate='tanh')"})
    assert gpt2.difference(model).startswith('mlp=')
    with pytest.raises(ValueError, match='not GPT-2'):
        gpt2.from_ours(model)
    assert gpt2.difference(random_model(mlp={'h.0': 'gelu', 'h.*': 'gelu'}, linear=MLPS)) is None
    assert gpt2.difference(random_model(attention='causal(gate=True)')).startswith('attention=')
    assert gpt2.difference(random_model(attention='causal(softcap=5.0)')).startswith('attention=')
    assert gpt2.difference(random_model(recompute=True, loss_chunk=8, zero_init=True)) is None      # no logit knows of them
    assert gpt2.difference(random_model(attention='causal(False, softcap=0.0)')) is None
    assert gpt2.difference(random_model(attention={'h.1': 'window(4)', 'h.*': 'causal'})).startswith('attention=')
    assert gpt2.difference(random_model(mlp={'h.1': 'relu2', 'h.*': 'gelu'})).startswith('mlp=')
    grown = random_model()
    grown.add_block(attention='window(4)')
    assert gpt2.difference(grown).startswith('attention=')
