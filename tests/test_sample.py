"""sample.py: what it prints, what it refuses, and that text arrives whole and at once."""
import dataclasses
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import configurator
import sample
import sampling.words
from attention import decoding
from checkpoints import checkpoint
from data import hub_tokenizer, tokenizer
from model import GPT, GPTConfig

ROOT = Path(__file__).resolve().parent.parent
CHARS = [*'\n abcdefgh']
META = {'tokenizer': 'char', 'vocab_size': len(CHARS), 'chars': CHARS, 'source': 'a test'}
CONFIG = GPTConfig(block_size=16, vocab_size=16, n_layer=2, n_head=2, n_embd=16, linear={'h.*.c_fc': 'kron(8, 2)'})
LINE = '\n---------------\n'


def save(folder, step=1, seed=0, meta=META, **changes):
    """A checkpoint of random weights, large enough that the text is no uniform noise."""
    torch.manual_seed(seed)
    model = GPT(dataclasses.replace(CONFIG, **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    checkpoint.save(folder, {'step': step, 'config': configurator.as_dict(model.config), 'model': model.state_dict(),
                             'data': meta})
    return model.eval()


@pytest.fixture
def run(capsys, monkeypatch):
    """run('--key=value', ...) -> (exit code, stdout, stderr), in this process."""
    def program(*arguments):
        monkeypatch.setattr(sys, 'argv', ['sample.py', '--device=cpu', *map(str, arguments)])
        code = 0
        try:
            sample.main()
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()
    return program


def refusal(result):
    code, out, err = result
    assert code == 2 and out == '' and err.count('\n') == 1 and err.startswith('sample.py: '), result
    return err


# ----------------------------------------------------------------------------------------------------
# what it prints

def test_a_checkpoint_as_a_user_samples_it(tmp_path, run_program):
    save(tmp_path)
    done = run_program('sample.py', f'--out_dir={tmp_path}', '--num_samples=3', '--max_new_tokens=40', '--start=abc')
    texts = done.stdout.split(LINE)
    assert len(texts) == 4 and texts[3] == '' and done.stderr == ''
    for text in texts[:3]:
        assert text.startswith('abc') and len(text) == 43 and set(text) <= set(CHARS)
    assert len(set(texts[:3])) == 3


def test_greedy_text_is_the_model_s(tmp_path, run):
    model = save(tmp_path, vocab_size=len(CHARS))
    tokens = model.generate(torch.tensor([[2, 3]]), 40, temperature=0)[0].tolist()
    code, out, _ = run(f'--out_dir={tmp_path}', '--num_samples=1', '--max_new_tokens=40', '--start=ab',
                       '--temperature=0')
    assert code == 0 and out == tokenizer.load(META).decode(tokens) + LINE


def test_static_steps_print_the_same_text(tmp_path, run, monkeypatch):
    save(tmp_path)
    steps, plain = [], decoding.Step.record
    monkeypatch.setattr(decoding.Step, 'record', lambda *more: steps.append(plain(*more)))
    texts = [run(f'--out_dir={tmp_path}', '--num_samples=2', '--max_new_tokens=30', f'--decode={decode}')
             for decode in ('auto', 'eager', 'static')]
    assert texts[0][0] == 0 and texts[0] == texts[1] == texts[2] and len(steps) == 1


def test_the_seed_decides(tmp_path, run):
    save(tmp_path)
    texts = [run(f'--out_dir={tmp_path}', '--num_samples=2', '--max_new_tokens=30', f'--seed={seed}')[1]
             for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_settings_reach_the_sampler(tmp_path, run):
    save(tmp_path)
    greedy = run(f'--out_dir={tmp_path}', '--num_samples=2', '--max_new_tokens=30', '--temperature=0')[1]
    for setting in ('--top_k=1', '--top_p=1e-9', '--temperature=1e-4'):
        assert run(f'--out_dir={tmp_path}', '--num_samples=2', '--max_new_tokens=30', setting)[1] == greedy, setting
    free = [run(f'--out_dir={tmp_path}', '--num_samples=2', '--max_new_tokens=30', f'--top_k={k}')[1] for k in (0, 200)]
    assert free[0] == free[1] != greedy


def test_padding_is_never_sampled(tmp_path, run):
    """Rows beyond the tokenizer's vocabulary, though they be the likeliest by far."""
    model = save(tmp_path)
    with torch.no_grad():
        model.transformer.wte.weight[len(CHARS):] = 5.0
        model.transformer.ln_f.weight.fill_(1e-3)
    model.transformer.ln_f.bias = torch.nn.Parameter(torch.ones(16))
    assert model.generate(torch.tensor([[2]]), 5, temperature=0)[0, 1:].min() >= len(CHARS)
    stream = model.stream(torch.tensor([[2]]), 40, generator=torch.Generator().manual_seed(0), n_tokens=len(CHARS))
    assert max(token.item() for token in stream) < len(CHARS)
    padded = save(tmp_path, step=2, bias=True, linear={})
    with torch.no_grad():
        padded.transformer.wte.weight[len(CHARS):] = 5.0
        padded.transformer.ln_f.bias.fill_(3.0)
    checkpoint.save(tmp_path, {'step': 3, 'config': configurator.as_dict(padded.config), 'model': padded.state_dict(),
                               'data': META})
    for temperature in (0, 1):
        code, out, _ = run(f'--out_dir={tmp_path}', '--num_samples=1', f'--temperature={temperature}',
                           '--max_new_tokens=60', '--top_k=3')
        assert code == 0 and len(out) == 61 + len(LINE) and set(out.removesuffix(LINE)) <= set(CHARS)


def test_prompts(tmp_path, run):
    save(tmp_path)
    arguments = [f'--out_dir={tmp_path}', '--num_samples=1', '--max_new_tokens=5']
    (tmp_path / 'prompt.txt').write_text('cab bag\n')
    assert run(*arguments, f'--start=FILE:{tmp_path}/prompt.txt')[1].startswith('cab bag\n')
    code, out, err = run(*arguments, '--start=' + 'abcdefgh' * 5)       # 40 tokens, block_size 16
    assert code == 0 and out.startswith('abcdefgh' * 5) and 'the last 16' in err and err.count('\n') == 1
    code, out, err = run(*arguments, '--start=')
    assert code == 0 and len(out) == 5 + len(LINE) and err == ''
    assert "'='" in refusal(run(*arguments, '--start=a=b'))             # a text, taken as it stands
    assert "'N'" in refusal(run(*arguments, '--start=None'))
    code, out, _ = run(f'--out_dir={tmp_path}', '--num_samples=2', '--max_new_tokens=0', '--start=abc')
    assert out == f'abc{LINE}' * 2


def test_an_empty_prompt_starts_a_new_text():
    assert sampling.words.encode('', tokenizer.load({'tokenizer': 'gpt2'})) == [50256]
    assert sampling.words.encode('', tokenizer.load(META)) == [0]
    assert sampling.words.encode('', tokenizer.load({'tokenizer': 'char', 'chars': ['x', 'y']})) == [0]
    assert sampling.words.encode('', tokenizer.load({'tokenizer': 'bytes'})) == [10]


def test_best_and_last(tmp_path, run):
    save(tmp_path, step=1, seed=1)
    checkpoint.set_best(tmp_path, 1, 2.0)
    save(tmp_path, step=2, seed=2)
    last, best = (run(f'--out_dir={tmp_path}', '--num_samples=1', '--max_new_tokens=30', f'--which={which}')[1]
                  for which in ('last', 'best'))
    assert last != best
    other = tmp_path / 'other'
    save(other, step=1, seed=1)
    assert run(f'--out_dir={other}', '--num_samples=1', '--max_new_tokens=30')[1] == best


def test_a_config_file_is_taken(tmp_path, run):
    save(tmp_path)
    (tmp_path / 'sample_config.py').write_text(f'out_dir = {str(tmp_path)!r}\nnum_samples = 1\nmax_new_tokens = 7\n')
    assert len(run(tmp_path / 'sample_config.py', '--start=a')[1]) == 8 + len(LINE)


# ----------------------------------------------------------------------------------------------------
# models from elsewhere

def test_a_gpt2_that_transformers_saved(tmp_path, run_program):
    """GPT-2's vocabulary means GPT-2's tokenizer; the folder is read without a network."""
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, n_positions=32)).eval()
    theirs.save_pretrained(tmp_path)
    done = run_program('sample.py', f'--init_from={tmp_path}', '--start=What is', '--num_samples=1', '--temperature=0',
                       '--max_new_tokens=20')
    bpe = tokenizer.load({'tokenizer': 'gpt2'})
    tokens = theirs.generate(torch.tensor([bpe.encode('What is')]), max_new_tokens=20, do_sample=False,
                             pad_token_id=0, eos_token_id=None)[0].tolist()
    assert done.stdout == bpe.decode(tokens) + LINE and done.stderr == ''


def nanogpt(folder, vocab_size=16):
    """A ckpt.pt as nanoGPT writes it."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(16, vocab_size, 1, 2, 8))
    attention = model.transformer.h[0].attn
    state = {name: t for name, t in model.state_dict().items() if name.split('.')[-2] not in ('c_q', 'c_k', 'c_v')}
    state['transformer.h.0.attn.c_attn.weight'] = torch.cat([c.weight for c in (attention.c_q, attention.c_k,
                                                                                attention.c_v)])
    arguments = {'n_layer': 1, 'n_head': 2, 'n_embd': 8, 'block_size': 16, 'bias': False, 'vocab_size': vocab_size,
                 'dropout': 0.0}
    torch.save({'model': state, 'model_args': arguments, 'iter_num': 3, 'config': {'dataset': 'x'}}, folder / 'ckpt.pt')


def test_nanogpt_with_a_data_set_s_tokenizer(tmp_path, run):
    nanogpt(tmp_path, len(CHARS))
    (tmp_path / 'letters').mkdir()
    entry = {'name': 'train.bin', 'tokens': 9, 'sha256': '0' * 64, 'size': 18}
    splits = {'train': {'tokens': 9, 'files': [entry]}, 'val': {'tokens': 9, 'files': [{**entry, 'name': 'val.bin'}]}}
    (tmp_path / 'letters' / 'meta.json').write_text(json.dumps({'format': 1, **META, 'splits': splits}))
    for source in ('--out_dir', '--init_from'):
        code, out, _ = run(f'{source}={tmp_path}', '--dataset=letters', f'--data_dir={tmp_path}', '--num_samples=1',
                           '--start=abc', '--max_new_tokens=9')
        assert code == 0 and out.startswith('abc') and len(out) == 12 + len(LINE)
    assert 'prepare it first' in refusal(run(f'--out_dir={tmp_path}', '--dataset=none', f'--data_dir={tmp_path}'))


def test_tokens_without_a_meaning_are_numbers(tmp_path, run):
    nanogpt(tmp_path)
    code, out, err = run(f'--out_dir={tmp_path}', '--num_samples=1', '--max_new_tokens=9', '--start=1 2 ')
    numbers = [int(word) for word in out.removesuffix(LINE).split()]
    assert code == 0 and numbers[:2] == [1, 2] and len(numbers) == 11 and max(numbers) < 16
    assert 'printed as numbers' in err
    assert 'token numbers' in refusal(run(f'--out_dir={tmp_path}', '--start=hello'))
    assert 'holds token 16' in refusal(run(f'--out_dir={tmp_path}', '--start=3 16'))
    assert 'holds token' in refusal(run(f'--out_dir={tmp_path}', '--start=-1'))


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path, run):
    save(tmp_path, vocab_size=5)
    assert 'do not belong together' in refusal(run(f'--out_dir={tmp_path}'))


def test_our_export_is_read(tmp_path, run):
    model = save(tmp_path)
    folder = tmp_path / 'exported'
    folder.mkdir()
    raw = {'model_type': 'nanokron', 'config': configurator.as_dict(model.config), 'step': 1, 'data': META}
    (folder / 'config.json').write_text(json.dumps(raw))
    save_file({n: t for n, t in model.state_dict().items() if n != 'lm_head.weight'}, folder / 'model.safetensors')
    arguments = ['--num_samples=1', '--max_new_tokens=30']
    assert run(f'--init_from={folder}', *arguments) == run(f'--out_dir={tmp_path}', *arguments)


@pytest.mark.slow
def test_scratch(run):
    code, out, _ = run('--init_from=scratch', '--num_samples=1', '--max_new_tokens=3', '--start=Hello')
    assert code == 0 and out.startswith('Hello')


@pytest.mark.slow
def test_compiled_text_is_the_same(tmp_path, run):
    save(tmp_path)
    arguments = [f'--out_dir={tmp_path}', '--num_samples=1', '--max_new_tokens=30', '--temperature=0']
    assert run(*arguments, '--compile=True') == run(*arguments)


@pytest.mark.gpu
def test_on_a_gpu(tmp_path, run):
    save(tmp_path)
    for dtype in ('float32', 'bfloat16'):
        arguments = [f'--out_dir={tmp_path}', '--device=cuda', f'--dtype={dtype}', '--max_new_tokens=40']
        code, out, _ = run(*arguments)
        assert code == 0 and out.count(LINE) == 10 and run(*arguments)[1] == out


# ----------------------------------------------------------------------------------------------------
# what it refuses

@pytest.mark.parametrize('arguments, words', [
    (['--start=axb'], "'x'"),
    (['--start=FILE:no/such/file'], "'no/such/file' cannot be read"),
    (['--top_p=0'], 'top_p must be above 0'),
    (['--top_p=1.5'], 'at most 1'),
    (['--temperature=-1'], 'temperature must be at least 0'),
    (['--num_samples=x'], 'num_samples takes a whole number'),
    (['--max_new_token=5'], "did you mean 'max_new_tokens'"),
    (['--which=newest'], 'which must be one of last, best'),
    (['--which=best'], 'best'),
    (['--device=tpu'], 'device must be'),
    (['no_such_config.py'], 'no such config file'),
    (['--init_from=resume', '--out_dir=no/such/folder'], 'no/such/folder'),
    (['--init_from=no/such/folder'], 'no folder'),
    (['--init_from=gpt2'], 'pass a local folder'),
])
def test_mistakes_are_one_line(arguments, words, tmp_path, run):
    save(tmp_path)
    assert words in refusal(run(f'--out_dir={tmp_path}', *arguments))


def test_a_folder_without_a_checkpoint(tmp_path, run):
    assert 'holds no checkpoint' in refusal(run(f'--out_dir={tmp_path}'))
    (tmp_path / 'prompt.txt').write_bytes(b'\xff\xfe')
    save(tmp_path)
    assert 'UTF-8' in refusal(run(f'--out_dir={tmp_path}', f'--start=FILE:{tmp_path}/prompt.txt'))
    path = next(tmp_path.glob('ckpt_*.pt'))
    path.write_bytes(path.read_bytes()[:-1] + b'x')
    assert 'no usable checkpoint' in refusal(run(f'--out_dir={tmp_path}'))


@pytest.mark.parametrize('arguments, imported', [
    (['--num_sample=5'], False), (['--out_dir=no/such/folder'], False), (['--start=FILE:no/such/file'], False),
    (['--top_p=2'], False), (['--init_from=gpt2'], True),       # the last one shows that the test can tell
])
def test_mistakes_are_said_before_torch_is_imported(arguments, imported, tmp_path):
    code = ('import runpy, sys\n'
            "sys.argv = ['sample.py', *sys.argv[1:]]\n"
            'try:\n'
            "    runpy.run_path('sample.py', run_name='__main__')\n"
            'except SystemExit as stop:\n'
            "    print(stop.code, 'torch' in sys.modules)\n")
    done = subprocess.run([sys.executable, '-c', code, f'--out_dir={tmp_path}', *arguments], cwd=ROOT, text=True,
                          capture_output=True)
    assert done.stdout.split() == ['2', str(imported)] and done.stderr.count('\n') == 1, done.stderr


# ----------------------------------------------------------------------------------------------------
# streaming

def test_characters_that_are_split_over_tokens():
    """Whatever the bytes, the pieces add up to the whole, and no piece shows a character that is not finished."""
    letters, rng = tokenizer.load({'tokenizer': 'bytes'}), random.Random(0)
    texts = ['häß', '日本語', '🙂🙃', 'a\ufffdb', 'é' * 3 + '\ufffd']
    streams = [list(text.encode()) for text in texts]
    streams += [[rng.choice([0x41, 0x80, 0xbf, 0xc3, 0xa9, 0xe2, 0x82, 0xac, 0xed, 0xa0, 0xf0, 0x9f, 0x98, 0xff])
                 for _ in range(rng.randrange(12))] for _ in range(2000)]
    for stream in streams:
        assert ''.join(sampling.words.decode(iter(stream), letters)) == letters.decode(stream)
    for text in texts[:3]:
        assert not any('\ufffd' in piece for piece in sampling.words.decode(iter(text.encode()), letters))


def test_gpt2_tokens_that_split_a_character():
    bpe = tokenizer.load({'tokenizer': 'gpt2'})
    tokens = bpe.encode('🙂 ok 語')
    assert any('\ufffd' in bpe.decode([token]) for token in tokens)
    pieces = list(sampling.words.decode(iter(tokens), bpe))
    assert ''.join(pieces) == '🙂 ok 語' and len([p for p in pieces if p]) > 2


@pytest.mark.parametrize('text', ['🙂🙃', '日本語 ok', 'a語', 'é', '\ufffda'])
def test_byte_fallback_shows_whole_characters_only(text):
    """Llama's decoder shows each byte of an unfinished character as U+FFFD; one that would not hold them back is seen."""
    library = pytest.importorskip('tokenizers')
    words = {**{f'<0x{byte:02X}>': byte for byte in range(256)}, 'a': 256, 'o': 257, 'k': 258, ' ': 259}
    maker = library.Tokenizer(library.models.BPE(words, [], byte_fallback=True))
    maker.decoder = library.decoders.Sequence([library.decoders.ByteFallback(), library.decoders.Fuse()])
    kind = tokenizer.load(hub_tokenizer.describe(maker.to_str(), 'a test'))
    tokens = kind.encode(text)
    pieces = list(sampling.words.decode(iter(tokens), kind))
    assert len(tokens) > len(text) and ''.join(pieces) == text
    assert '\ufffd' in text or not any('\ufffd' in piece for piece in pieces)
    assert text != '🙂🙃' or pieces[:4] == ['', '', '', '🙂']                  # as soon as it is whole
    spoilt = [0xff, 0xe2, 0x82, *tokens]
    assert ''.join(sampling.words.decode(iter(spoilt), kind)) == kind.decode(spoilt)


def test_text_is_printed_while_it_is_made():
    asked = []

    def tokens():
        for token in (2, 3, 4):
            asked.append(token)
            yield token
    pieces = sampling.words.decode(tokens(), tokenizer.load(META))
    assert next(pieces) == 'a' and asked == [2]
    assert next(pieces) == 'b' and asked == [2, 3]


def test_a_reader_that_leaves_is_no_error(tmp_path):
    save(tmp_path)
    reader, writer = os.pipe()
    process = subprocess.Popen([sys.executable, 'sample.py', f'--out_dir={tmp_path}', '--device=cpu'], cwd=ROOT,
                               stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    os.read(reader, 1)
    os.close(reader)
    assert process.communicate(timeout=60)[1] == b'' and process.returncode == 0
