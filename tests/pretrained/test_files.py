"""Models are recognised by what is in their files, and a refusal names the remedy."""
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints import checkpoint
from data import tokenizer_json
from decomposition import initialise
from pretrained import files, gpt2
from tests.pretrained.test_sources import hf, logits_of, random_model, refusal, save_nanogpt  # noqa: F401
from tests.test_evaluate import save
from variants import UserError


def same(place, ours):
    config, state, _ = initialise.read_source(str(place))
    return torch.equal(logits_of(initialise.build(config, config, state)), logits_of(ours))


@pytest.mark.parametrize('name', ['ckpt.pt', 'weights', 'model.safetensors'])
def test_a_checkpoint_of_nanogpt_given_as_a_file(name, tmp_path):
    ours = random_model(mlp='gelu')
    save_nanogpt(tmp_path / name, ours)
    assert same(tmp_path / name, ours)


@pytest.mark.parametrize('name', ['model.safetensors', 'weights.st'])
def test_safetensors_given_as_a_file(name, hf, tmp_path):  # noqa: F811
    shutil.copy(f'{hf[1]}/config.json', tmp_path)
    shutil.copy(f'{hf[1]}/model.safetensors', tmp_path / name)
    assert torch.equal(*(logits_of(initialise.build(config, config, state)) for config, state, _ in (
        initialise.read_source(str(tmp_path / name)), initialise.read_source(str(hf[1])))))
    (tmp_path / 'config.json').unlink()
    assert 'pass its folder beside a config.json' in refusal(initialise.read_source, str(tmp_path / name))


@pytest.mark.parametrize('prefix', ['module.', 'base_model.model.', '_orig_mod.module.', 'module._orig_mod.'])
def test_prefixes_of_wrappers(prefix, hf, tmp_path):  # noqa: F811
    ours = random_model(mlp='gelu')
    save_nanogpt(tmp_path / 'ckpt.pt', ours, prefix)
    assert same(tmp_path, ours)
    shutil.copytree(hf[1], tmp_path / 'hf')
    tensors = load_file(tmp_path / 'hf/model.safetensors')
    save_file({prefix + name: t for name, t in tensors.items()}, tmp_path / 'hf/model.safetensors')
    assert same(tmp_path / 'hf', initialise.build(*(lambda c, s, _: (c, c, s))(*initialise.read_source(str(hf[1])))))


def test_names_that_cannot_be_told_apart():
    assert list(files.plain_names({'layers.0.x': 1, 'norm.weight': 2, 'lm_head.weight': 3}, 'here')) == [
        'model.layers.0.x', 'model.norm.weight', 'lm_head.weight']
    with pytest.raises(UserError, match='twice'):
        files.plain_names({'module.a': 1, 'a': 2}, 'here')
    with pytest.raises(UserError, match='merge_and_unload'):
        files.plain_names({'base_model.model.a.lora_A.weight': 1}, 'here')


def test_refusals_name_the_remedy(tmp_path):
    ours, path = random_model(mlp='gelu'), tmp_path / 'ckpt.pt'
    save_nanogpt(path, ours)
    saved = torch.load(path, weights_only=True)
    torch.save({**saved, 'best_val_loss': np.float64(1.5)}, path)
    line = refusal(initialise.read_source, str(tmp_path))
    assert 'numpy' in line and "'iter_num': int(c['iter_num'])" in line and len(line) < 400 + len(str(path))
    c = torch.load(path, weights_only=False)                            # the remedy is one
    (tmp_path / 'new').mkdir()
    torch.save({'model': c['model'], 'model_args': c['model_args'], 'iter_num': int(c['iter_num'])},
               tmp_path / 'new/ckpt.pt')
    assert same(tmp_path / 'new', ours)
    torch.save(saved, path, _use_new_zipfile_serialization=False)
    assert 'torch.save(torch.load(' in refusal(initialise.read_source, str(tmp_path))
    torch.save(torch.load(path, map_location='cpu', weights_only=True), path)
    assert same(tmp_path, ours)


@pytest.mark.parametrize('form', ['tokenizer.json', 'vocab.json'])
@pytest.mark.parametrize('own', [True, False])
def test_a_gpt2_of_50257_tokens_has_its_own_or_openais(form, own, tmp_path):
    """By what its tokenizer says and not by their number: two merges changed places."""
    raw, tensors = gpt2.from_ours(random_model(vocab_size=50257, n_layer=1, n_embd=8, n_head=2))
    save_file(tensors, tmp_path / 'model.safetensors')
    (tmp_path / 'config.json').write_text(json.dumps(raw))
    found = json.loads(tokenizer_json.gpt2_text(50257))
    model = found['model']
    if own:
        model['merges'][0], model['merges'][9] = model['merges'][9], model['merges'][0]
    if form == 'vocab.json':
        (tmp_path / 'vocab.json').write_text(json.dumps(model['vocab']))
        (tmp_path / 'merges.txt').write_text('#version: 0.2\n' + ''.join(f'{a} {b}\n' for a, b in model['merges']))
    else:
        (tmp_path / 'tokenizer.json').write_text(json.dumps(found))
    data = initialise.read_source(str(tmp_path))[2]['data']
    assert data['vocab_size'] == 50257 and data['tokenizer'] == ('hub' if own else 'gpt2')


def test_one_file_of_a_run(tmp_path):
    save(tmp_path, random_model(mlp='gelu'))
    file = next(tmp_path.glob('ckpt_*.pt'))
    assert 'pass its folder' in refusal(initialise.read_source, str(file)) and checkpoint.steps(tmp_path) == [1]


@pytest.mark.parametrize('data', [b'', b'x', b'\x00' * 64, b'{"a": 1}' * 9, b'\xff' * 8 + b'{'])
def test_what_is_no_model(data, tmp_path):
    (tmp_path / 'x').write_bytes(data)
    assert files.kind(tmp_path / 'x') == '' and 'is no model' in refusal(initialise.read_source, str(tmp_path / 'x'))


def test_a_home_is_found(tmp_path, monkeypatch):
    import configurator
    monkeypatch.setenv('HOME', str(tmp_path))
    ours = random_model(mlp='gelu')
    save_nanogpt(tmp_path / 'ckpt.pt', ours)
    assert same('~/ckpt.pt', ours)
    config = configurator.load(['--out_dir=~/out', '--data_dir=~/d', '--dataset=~x'])
    assert (config.out_dir, config.data_dir, config.dataset) == (f'{tmp_path}/out', f'{tmp_path}/d', '~x')
