"""What tokens mean, as a user meets it: public reports of this kind, with figures that are computed by themselves here."""
import json
import math
import pickle
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import configurator
import evaluate
import sample
import train
from data import prepare_text
from data.dataset import open_dataset
from data.tokenizer import gpt2_bytes
from model import GPT
from pretrained import llama
from tests.pretrained.test_sources import save_nanogpt

TEXT = 'She sells sea shells by the sea shore, and the shells she sells are sea shells I am sure.\n' * 16


@pytest.fixture
def run(capsys, monkeypatch):
    """run(module, words) -> (exit code, stdout, stderr), in this process."""
    def program(module, *words):
        monkeypatch.setattr(sys, 'argv', [f'{module.__name__}.py', *map(str, words)])
        capsys.readouterr()
        code = 0
        try:
            train.main(configurator.load([*map(str, words)])) if module is train else module.main()
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()
    return program


def refused(result):
    code, out, err = result
    assert code == 2 and err.count('\n') == 1 and len(err) < 420, result
    return err


# ---- a tokenizer.json that was saved with options ----

@pytest.mark.parametrize('option', ['truncation', 'padding'])
def test_a_tokenizer_saved_with_truncation_or_padding(option, tmp_path, run):
    """Data set and bits per byte are those of all tokens: by the library without options, and by torch's own loss."""
    letters = [letter for _, letter in gpt2_bytes()]
    library = Tokenizer(models.BPE({name: k for k, name in enumerate([*letters, 'sh', 'el'])}, [('s', 'h'), ('e', 'l')]))
    library.pre_tokenizer, library.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    ids = library.encode(TEXT).ids
    library.enable_truncation(16) if option == 'truncation' else library.enable_padding(length=2 * len(ids))
    library.save(str(tmp_path / 'tokenizer.json'))
    torch.manual_seed(0)
    model = GPT(configurator.GPTConfig(block_size=32, vocab_size=258, n_layer=1, n_head=2, n_embd=16, norm='rmsnorm',
                                       rope=True, mlp='swiglu(32)')).eval()
    raw, tensors = llama.from_ours(model)
    save_file(tensors, tmp_path / 'model.safetensors')
    (tmp_path / 'config.json').write_text(json.dumps(raw))
    (tmp_path / 'text').write_text(TEXT)
    code, out, err = run(evaluate, tmp_path, f'--text={tmp_path}/text', '--stride=32', '--json', '--device=cpu')
    found, nats = json.loads(out), 0.0
    with torch.no_grad():
        for start in range(0, len(ids) - 1, 32):
            x = torch.tensor([ids[start:start + 33]])
            logits = model(x[:, :-1], x[:, 1:])[0]
            nats += torch.nn.functional.cross_entropy(logits[0], x[0, 1:], reduction='sum').item()
    assert found['tokens'] == len(ids) and found['bits_per_byte'] == pytest.approx(nats / math.log(2) / len(TEXT), rel=1e-5)
    prepare_text.main('data/shakespeare', 'gpt2', [f'--input={tmp_path}/text', f'--tokenizer={tmp_path}',
                                                   f'--out={tmp_path}/d'])
    splits = open_dataset(tmp_path / 'd').splits
    cut = int(0.9 * len(TEXT))
    library.no_truncation()
    library.no_padding()
    for split, text in (('train', TEXT[:cut]), ('val', TEXT[cut:])):
        assert splits[split].read(0, len(splits[split])).tolist() == library.encode(text).ids


# ---- nanoGPT's 65 characters, our 64, and another 65 ----

def data_set(folder, chars, text):
    """A folder as nanoGPT's prepare.py leaves it."""
    folder.mkdir(parents=True)
    stoi = {c: k for k, c in enumerate(chars)}
    tokens = np.asarray([stoi[c] for c in text], '<u2')
    tokens[: 9 * len(tokens) // 10].tofile(folder / 'train.bin')
    tokens[9 * len(tokens) // 10:].tofile(folder / 'val.bin')
    (folder / 'meta.pkl').write_bytes(pickle.dumps({'vocab_size': len(chars), 'itos': dict(enumerate(chars)), 'stoi': stoi}))
    return tokens[9 * len(tokens) // 10:]


@pytest.fixture
def nanogpt(tmp_path):
    """(root, nanoGPT's model of 65 characters, its validation tokens) with the data sets own and ours beside it."""
    rare = [chr(48 + k) for k in range(80)]
    chars = sorted({*TEXT, *rare})[:65]
    text = TEXT + ''.join(chars) * 9
    val = data_set(tmp_path / 'data/own', chars, ''.join(c for c in text if c in chars))
    (tmp_path / 'text').write_text(''.join(c for c in text if c in chars[:64]))
    prepare_text.main('data/shakespeare_char', 'char', [f'--input={tmp_path}/text', f'--out={tmp_path}/data/ours'])
    torch.manual_seed(0)
    model = GPT(configurator.GPTConfig(block_size=32, vocab_size=65, n_layer=1, n_head=2, n_embd=16, bias=True))
    (tmp_path / 'run').mkdir()
    save_nanogpt(tmp_path / 'run/ckpt.pt', model.eval())
    return tmp_path, model, val


def test_characters_of_another_data_set_are_refused_by_every_program(nanogpt, run):
    root = nanogpt[0]
    place, ours = root / 'run', [f'--data_dir={root}/data', '--dataset=ours', '--device=cpu']
    assert open_dataset(root / 'data/ours').vocab_size == 64
    for module, words in ((evaluate, [place, *ours]), (sample, [f'--init_from={place}', *ours]),
                          (train, [f'--init_from={place}', f'--out_dir={root}/new', *ours]),
                          (train, [f'--init_from={place}', f'--out_dir={root}/new', *ours, '--dry_run=True'])):
        said = refused(run(module, *words))
        assert 'has 65 tokens and does not say what they mean' in said and 'data/ours has 64' in said
    assert not (root / 'new').exists() or not any(root.glob('new/ckpt*'))


def test_its_own_characters_are_taken_by_every_program(nanogpt, run):
    """The negative control, and the loss by torch's own formula."""
    root, model, val = nanogpt
    own = [f'--data_dir={root}/data', '--dataset=own', '--device=cpu']
    code, out, _ = run(evaluate, root / 'run', *own, '--stride=32', '--json')
    tokens, nats = torch.from_numpy(val.astype(np.int64)), 0.0
    with torch.no_grad():
        for start in range(0, len(tokens) - 1, 32):
            x = tokens[None, start:start + 33]
            nats += torch.nn.functional.cross_entropy(model(x[:, :-1], x[:, 1:])[0][0], x[0, 1:], reduction='sum').item()
    assert code == 0 and json.loads(out)['loss'] == pytest.approx(nats / (len(tokens) - 1), rel=1e-5)
    code, out, _ = run(sample, f'--init_from={root}/run', *own, '--start=She', '--max_new_tokens=3', '--num_samples=1')
    assert code == 0 and out.startswith('She')
    code, out, _ = run(train, f'--init_from={root}/run', f'--out_dir={root}/new', *own, '--dry_run=True')
    assert code == 0 and 'parameters' in out


def test_a_dry_run_compares_tokens_as_a_run_does(nanogpt, run, tmp_path):
    """Of a run with its own characters, on others of the same number; without data there is nothing to compare."""
    root = nanogpt[0]
    chars = sorted(set(TEXT))
    for name, text in (('a', TEXT), ('b', TEXT.replace('S', 'Z').replace('I', 'Y'))):
        (root / name).write_text(text)
        prepare_text.main('data/shakespeare_char', 'char', [f'--input={root}/{name}', f'--out={root}/data/{name}'])
    small = ['--n_layer=1', '--n_head=2', '--n_embd=16', '--block_size=16', '--batch_size=2', '--max_iters=1',
             '--device=cpu', '--gradient_accumulation_steps=1', '--eval_iters=1', '--warmup_iters=0',
             f'--data_dir={root}/data']
    assert run(train, *small, '--dataset=a', f'--out_dir={root}/a_run')[0] == 0 and len(chars) == len(
        open_dataset(root / 'data/b').tokenizer['chars'])
    given = [*small, f'--init_from={root}/a_run', f'--out_dir={root}/b_run']
    for more in ([], ['--dry_run=True']):
        assert 'mean other things' in refused(run(train, *given, '--dataset=b', *more))
    for name in ('a', 'not_there'):
        assert run(train, *given, f'--dataset={name}', '--dry_run=True')[0] == 0
