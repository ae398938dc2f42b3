"""export.py: transformers loads what it writes and computes the same; anything else is said."""
import dataclasses
import json
import sys

import pytest
import torch

import configurator
import export
from checkpoints import checkpoint
from data import tokenizer
from decomposition import initialise
from exporting import layouts
from model import GPT, GPTConfig

CONFIG = GPTConfig(block_size=16, vocab_size=64, n_layer=2, n_head=2, n_embd=32, bias=True,
                   linear={'h.*.mlp.*': 'kron(8, 8, terms=2)', 'h.1.attn.c_v': 'lowrank(4)'})
BYTES = {'tokenizer': 'char', 'vocab_size': 50, 'chars': [chr(64 + i) for i in range(50)], 'source': 'x', 'splits': {}}


def save(folder, step=1, data=BYTES, **changes):
    torch.manual_seed(step)
    model = GPT(dataclasses.replace(CONFIG, **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    checkpoint.save(folder, {'step': step, 'config': configurator.as_dict(model.config), 'model': model.state_dict(),
                             'data': data})
    return model.eval()


@pytest.fixture
def run(capsys, monkeypatch):
    """run('--key=value', ...) -> (exit code, stdout, stderr), in this process."""
    def program(*arguments):
        monkeypatch.setattr(sys, 'argv', ['export.py', *map(str, arguments)])
        code = 0
        try:
            export.main()
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()
    return program


def logits_of(model):
    idx = torch.randint(50, (3, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(idx, targets=idx)[0] if isinstance(model, GPT) else model(idx).logits


def load_in_transformers(folder):
    from transformers import GPT2LMHeadModel
    model, report = GPT2LMHeadModel.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


def assert_close(ours, theirs):
    assert ours.shape == theirs.shape and (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize('changes', [{}, {'bias': False}, {'tie_weights': False}, {'mlp': "gelu(approximate='tanh')"}])
def test_transformers_computes_the_same(changes, tmp_path, run):
    model = save(tmp_path / 'run', **changes)
    code, out, err = run(f'--out_dir={tmp_path}/run', f'--to={tmp_path}/new', '--dense=True')
    assert code == 0 and err == '' and 'for transformers, 14 padding rows' in out and out.count('\n') == 1
    raw = json.loads((tmp_path / 'new/config.json').read_text())
    assert raw['tie_word_embeddings'] is model.config.tie_weights       # transformers looks at the tensors too
    assert_close(load_in_transformers(tmp_path / 'new').lm_head.weight, model.lm_head.weight[:50])
    assert_close(logits_of(load_in_transformers(tmp_path / 'new')), logits_of(model)[..., :50])


def test_greedy_text_is_the_same(tmp_path, run):
    model = save(tmp_path / 'run', data=None)
    run(f'--out_dir={tmp_path}/run', f'--to={tmp_path}/new', '--dense=True')
    prompt = torch.tensor([[1, 2, 3]])
    theirs = load_in_transformers(tmp_path / 'new').generate(prompt, max_new_tokens=13, do_sample=False, pad_token_id=0,
                                                             eos_token_id=None)
    assert torch.equal(model.generate(prompt, 13, temperature=0), theirs)


def test_there_and_back(tmp_path, run):
    """Our reader takes the export for the same function, and the export of it for the same file."""
    model = save(tmp_path / 'run', data=None)
    run(f'--out_dir={tmp_path}/run', f'--to={tmp_path}/a', '--dense=True')
    again = GPT.from_pretrained(str(tmp_path / 'a')).eval()
    assert_close(logits_of(again), logits_of(model))
    run(f'--out_dir={tmp_path}/a', f'--to={tmp_path}/b')
    assert (tmp_path / 'a/model.safetensors').read_bytes() == (tmp_path / 'b/model.safetensors').read_bytes()


def test_unknown_vocabulary_is_kept(tmp_path, run):
    save(tmp_path / 'run', data=None)
    code, out, _ = run(f'--out_dir={tmp_path}/run', f'--to={tmp_path}/new', '--dense=True')
    assert 'padding' not in out and json.loads((tmp_path / 'new/config.json').read_text())['vocab_size'] == 64
    assert [layouts.known_tokens({'vocab_size': size}, 64) for size in (9, 64, 65, 0, 'x')] == [9, 64, 64, 64, 64]
    assert layouts.known_tokens(None, 64) == layouts.known_tokens({}, 64) == 64


def test_best_and_last(tmp_path, run):
    first = save(tmp_path / 'run', step=1)
    checkpoint.set_best(tmp_path / 'run', 1, 1.0)
    last = save(tmp_path / 'run', step=2)
    for which, model in (('best', first), ('last', last)):
        assert run(f'--out_dir={tmp_path}/run', f'--to={tmp_path}/{which}', f'--which={which}', '--dense=True')[0] == 0
        wte = initialise.read_folder(str(tmp_path / which))[1]['transformer.wte.weight']
        assert torch.equal(wte, model.transformer.wte.weight[:50])


@pytest.mark.parametrize('tie', [True, False])
def test_what_is_no_gpt2_keeps_our_layout(tie, tmp_path, run):
    model = save(tmp_path / 'run', mlp={'h.0': 'gelu', 'h.1': "gelu(approximate='tanh')"}, tie_weights=tie)
    code, out, _ = run(f'--out_dir={tmp_path}/run', f'--to={tmp_path}/new')
    assert code == 0 and 'is no GPT-2 block: for transformers with trust_remote_code=True' in out and 'mlp=' in out
    config, state, info = initialise.read_folder(str(tmp_path / 'new'))
    assert config == model.config and info['data'] == {k: v for k, v in BYTES.items() if k != 'splits'}
    assert torch.equal(logits_of(initialise.build(config, config, state).eval()), logits_of(model))


def refusal(result):
    code, out, err = result
    assert code == 2 and out == '' and err.count('\n') == 1 and err.startswith('export.py: '), result
    return err


def test_mistakes_are_one_line(tmp_path, run):
    save(tmp_path / 'run')
    here, full = f'--out_dir={tmp_path}/run', tmp_path / 'full'
    full.mkdir()
    assert run(here, f'--to={full}')[0] == 0            # empty is fine
    before = sorted((p.name, p.read_bytes()) for p in full.iterdir())
    assert 'nothing is overwritten' in refusal(run(here, f'--to={full}'))
    assert sorted((p.name, p.read_bytes()) for p in full.iterdir()) == before
    (tmp_path / 'file').write_text('')
    assert 'nothing is overwritten' in refusal(run(here, f'--to={tmp_path}/file'))
    assert '--to=FOLDER' in refusal(run(here))
    assert 'no folder' in refusal(run(f'--out_dir={tmp_path}/none', f'--to={tmp_path}/new'))
    assert 'no checkpoint' in refusal(run(f'--out_dir={tmp_path}', f'--to={tmp_path}/new'))
    assert not (tmp_path / 'new').exists()


def test_a_folder_that_cannot_be_written(tmp_path, run):
    save(tmp_path / 'run')
    (tmp_path / 'file').write_text('')
    code, _, err = run(f'--out_dir={tmp_path}/run', f'--to={tmp_path}/file/new')
    assert code == 4 and err.count('\n') == 1 and 'could not be written' in err


def test_as_a_user_runs_it(tmp_path, run_program):
    save(tmp_path / 'run')
    done = run_program('export.py', f'--out_dir={tmp_path}/run', f'--to={tmp_path}/new')
    assert 'for transformers with trust_remote_code' in done.stdout
    assert sorted(p.name for p in (tmp_path / 'new').iterdir()) == [
        'README.md', 'config.json', 'model.safetensors', 'modeling_nanokron.py', 'tokenizer.json', 'tokenizer_config.json']


@pytest.mark.parametrize('data, text', [
    ({'tokenizer': 'char', 'vocab_size': 7, 'chars': [*'\n abc\u00e9\U0001f600']}, 'a b\n\nc\u00e9 \U0001f600a'),
    ({'tokenizer': 'bytes', 'vocab_size': 256}, 'na\u00efve \u4f60 12\n\n x'),
    ({'tokenizer': 'gpt2', 'vocab_size': 300}, "She's 12  na\u00efve \u4f60\n\n sells"),
    ({'tokenizer': 'gpt2', 'vocab_size': 50257}, "She's 12  na\u00efve \u4f60\n\n sells")])
def test_the_tokens_go_along(data, text, tmp_path, run):
    from transformers import AutoTokenizer
    save(tmp_path / 'run', data=data, vocab_size=data['vocab_size'], n_layer=1, linear={})
    assert run(f'--out_dir={tmp_path}/run', f'--to={tmp_path}/new')[0] == 0
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path / 'new'), tokenizer.load(data)
    assert theirs(text).input_ids == ours.encode_ordinary(text) and theirs.decode(theirs(text).input_ids) == text
    found = initialise.read_folder(str(tmp_path / 'new'))[2]['data']
    assert {name: value for name, value in found.items() if name != 'source'} == data       # and we know what they are
    assert theirs.eos_token_id == (data['vocab_size'] - 1 if data['tokenizer'] == 'gpt2' else None)
