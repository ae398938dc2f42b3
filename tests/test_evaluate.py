"""evaluate.py: every token once, the same numbers as a direct computation in float64, baselines, refusals."""
import dataclasses
import json
import math
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import configurator
import evaluate
import train
from checkpoints import checkpoint
from data import prepare_text, tokenizer
from evaluation import baselines, texts, windows
from model import GPT, GPTConfig
from tests.tiny import arguments, make_data

CHARS = [*'\n abcdefgh\u00e9']
META = {'tokenizer': 'char', 'vocab_size': len(CHARS), 'chars': CHARS, 'source': 'a test'}
CONFIG = GPTConfig(block_size=16, vocab_size=len(CHARS), n_layer=2, n_head=2, n_embd=16, bias=True)
PRICES = {'tokenizer': 'prices', 'vocab_size': 5,
          'returns': {'edges': [-0.01, 0.0, 0.01], 'centres': [-0.02, -0.004, 0.004, 0.02]}, 'source': 'a test'}


def random_model(seed=0, **changes):
    """Random weights, large enough that no two distributions are alike."""
    torch.manual_seed(seed)
    model = GPT(dataclasses.replace(CONFIG, **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def save(folder, model, meta=META):
    checkpoint.save(folder, {'step': 1, 'config': configurator.as_dict(model.config), 'model': model.state_dict(),
                             'data': meta})
    return model


def make(folder, train, val, meta=META):
    prepare_text.write_dataset(folder, meta, {'train': np.asarray(train), 'val': np.asarray(val)})
    return folder


def drawn(count, size=11, seed=0):
    return np.random.default_rng(seed).integers(0, size, count)


def source_of(tokens, kind=None):
    tokens = np.asarray(tokens)
    return texts.Source('tokens', lambda a, b: tokens[a:b], len(tokens), kind or tokenizer.load(META), None)


@pytest.fixture
def run(capsys, monkeypatch):
    """run('--key=value', ...) -> (exit code, stdout, stderr), in this process."""
    def program(*words):
        monkeypatch.setattr(sys, 'argv', ['evaluate.py', '--device=cpu', *map(str, words)])
        capsys.readouterr()
        code = 0
        try:
            evaluate.main()
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()
    return program


@pytest.fixture
def answer(run):
    """run(..., '--json') -> the object."""
    def program(*words):
        code, out, err = run(*words, '--json')
        assert code == 0 and err == '' and out.count('\n') == 1, err
        return json.loads(out)
    return program


def refusal(result):
    code, out, err = result
    assert code == 2 and out == '' and err.count('\n') == 1 and err.startswith('evaluate.py: '), result
    return err


# ---- which tokens are scored ----

@settings(max_examples=200, deadline=None)
@given(count=st.integers(2, 300), window=st.integers(1, 40), stride=st.integers(1, 40))
def test_every_token_is_scored_once_with_the_context_that_is_promised(count, window, stride):
    stride, scored = min(stride, window), []
    for start, stop, fresh in windows.windows(count, window, stride):
        assert 0 <= start and stop - start <= window and stop <= count - 1 and 0 < fresh <= stop - start
        for target in range(stop - fresh + 1, stop + 1):
            before = target - start                     # tokens of this window in front of it
            assert before >= min(target, window - stride + 1)
            scored.append(target)
    assert scored == list(range(1, count))


@settings(max_examples=50, deadline=None)
@given(count=st.integers(2, 120), window=st.integers(1, 20), stride=st.integers(1, 20), rows=st.integers(1, 5))
def test_batches_hold_each_target_once(count, window, stride, rows):
    tokens = np.arange(count)
    seen = []
    for x, y in windows.batches(source_of(tokens), window, min(stride, window), rows):
        assert x.shape == y.shape and len(x) <= rows
        assert ((y == x + 1) | (y == -1)).all()
        seen += y[y >= 0].tolist()
    assert seen == list(range(1, count))


def by_hand(model, tokens, window, stride):
    """(nats, right) in float64: each token alone, from the context that the docstring of evaluate.py promises it."""
    nats = right = 0.0
    for target in range(1, len(tokens)):
        number = max(0, math.ceil((target - window) / stride))      # the first window that reaches the target
        context = torch.tensor([tokens[number * stride:target]])
        with torch.no_grad():
            logits = model(context)[0][0, -1].double()
        p = (logits - logits.max()).exp()
        nats -= math.log(p[tokens[target]] / p.sum())
        right += int(p.argmax() == tokens[target])
    return nats, right


@pytest.mark.parametrize('window, stride', [(16, 8), (16, 16), (16, 1), (7, 3), (1, 1)])
def test_equal_to_a_direct_computation_in_float64(window, stride):
    model, tokens = random_model().double(), drawn(90).tolist()
    found = windows.score(model, source_of(tokens), window, stride, 3, torch.device('cpu'), torch.float32)
    nats, right = by_hand(model, tokens, window, stride)
    assert found['nats'] == pytest.approx(nats, rel=1e-12) and found['right'] == right and found['scored'] == 89


def test_the_context_matters():
    """Negative control of the test above: other windows, other numbers."""
    model, tokens = random_model().double(), drawn(90).tolist()
    found = {by_hand(model, tokens, *pair)[0] for pair in ((16, 8), (16, 16), (7, 3), (16, 7))}
    assert len({round(nats, 6) for nats in found}) == 4


def test_the_program_equals_it_too(tmp_path, answer):
    model, text = save(tmp_path / 'run', random_model()), ''.join(CHARS[t] for t in drawn(200))
    (tmp_path / 'x.txt').write_text(text, encoding='utf-8')
    found = answer(f'--out_dir={tmp_path}/run', f'--text={tmp_path}/x.txt', '--window=12', '--stride=5')
    tokens = tokenizer.load(META).encode(text)
    nats, right = by_hand(model.double(), tokens, 12, 5)
    size = len(text.encode())
    assert size > 200 and found['bytes'] == size and found['tokens'] == 200 and found['scored'] == 199
    assert found['nats'] == pytest.approx(nats, rel=1e-6) and found['loss'] == pytest.approx(nats / 199, rel=1e-6)
    assert found['perplexity'] == pytest.approx(math.exp(nats / 199), rel=1e-5)
    assert found['bits_per_byte'] == pytest.approx(nats / math.log(2) / size, rel=1e-6)
    assert found['accuracy'] == right / 199 and found['window'] == 12 and found['stride'] == 5
    assert found['unigram'] is None and found['forecast'] is None and found['seconds'] > 0


def test_uniform_logits_cost_ln_v(tmp_path, answer):
    model = random_model()
    with torch.no_grad():
        model.transformer.wte.weight.zero_()
    save(tmp_path / 'run', model)
    make(tmp_path / 'd', drawn(300), drawn(77, seed=1))
    for more in ([], ['--stride=16'], ['--window=3', '--stride=2']):
        found = answer(f'--out_dir={tmp_path}/run', f'--data_dir={tmp_path}', '--dataset=d', *more)
        assert found['loss'] == pytest.approx(math.log(len(CHARS)), rel=1e-6) and found['scored'] == 76
        assert found['perplexity'] == pytest.approx(len(CHARS), rel=1e-5)


def test_the_batch_size_changes_nothing(tmp_path, answer):
    save(tmp_path / 'run', random_model())
    make(tmp_path / 'd', drawn(300), drawn(150, seed=1))
    losses = [answer(f'--out_dir={tmp_path}/run', f'--data_dir={tmp_path}', '--dataset=d', f'--batch_size={rows}')['loss']
              for rows in (0, 1, 2, 50)]
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-6)


def test_defaults_are_block_size_and_half_of_it(tmp_path, answer):
    save(tmp_path / 'run', random_model())
    make(tmp_path / 'd', drawn(300), drawn(150, seed=1))
    found = answer(f'--out_dir={tmp_path}/run', f'--data_dir={tmp_path}', '--dataset=d')
    assert (found['window'], found['stride'], found['step']) == (16, 8, 1)
    assert answer(f'--out_dir={tmp_path}/run', f'--data_dir={tmp_path}', '--dataset=d', '--window=1')['stride'] == 1


def test_stride_window_is_what_train_py_evaluates(tmp_path, answer):
    train.main(configurator.load(arguments(make_data(tmp_path), tmp_path / 'run', '--eval_iters=0', '--max_iters=6')))
    logged = [json.loads(line) for line in open(tmp_path / 'run' / 'log.jsonl')][-1]
    words = f'--out_dir={tmp_path}/run', f'--data_dir={tmp_path}', '--dataset=tiny'
    found = answer(*words, '--stride=16')
    assert found['loss'] == pytest.approx(logged['val_loss'], abs=1e-6)
    assert found['accuracy'] == pytest.approx(logged['val_accuracy'], abs=1e-9)
    assert abs(answer(*words)['loss'] - logged['val_loss']) > 1e-4      # another stride is another number


# ---- other people's models ----

def test_a_folder_of_transformers(tmp_path, run):
    transformers = pytest.importorskip('transformers')
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=11,
                                                                  n_positions=32)).eval()
    theirs.save_pretrained(tmp_path / 'hf')
    train, val = drawn(500), drawn(33, seed=1)
    make(tmp_path / 'd', train, val)
    text = ''.join(CHARS[t] for t in val)
    (tmp_path / 'x.txt').write_text(text, encoding='utf-8')
    with torch.no_grad():
        loss = theirs(torch.tensor([val.tolist()[:32]]), labels=torch.tensor([val.tolist()[:32]])).loss.item()
        logits = theirs(torch.tensor([val.tolist()[:32]])).logits[0]
    last = -logits[-1].log_softmax(-1)[val[32]].item()              # labels leave out the last token
    for more in (['--dataset=d'], [f'--text={tmp_path}/x.txt', '--dataset=d']):
        code, out, err = run(f'--out_dir={tmp_path}/hf', f'--data_dir={tmp_path}', '--json', *more)
        assert code == 0 and 'nothing says what the tokens' in err and err.count('\n') == 1
        found = json.loads(out)
        assert found['nats'] == pytest.approx(31 * loss + last, rel=1e-5) and found['bytes'] == len(text.encode())
        assert found['step'] is None and found['unigram']['loss'] > 0
    assert '--dataset=NAME' in refusal(run(f'--out_dir={tmp_path}/hf', f'--text={tmp_path}/x.txt'))
    make(tmp_path / 'few', train % 10, val % 10, {**META, 'vocab_size': 10, 'chars': CHARS[:10]})
    assert 'has 11 tokens and does not say what they mean' in refusal(run(
        f'--out_dir={tmp_path}/hf', f'--data_dir={tmp_path}', '--dataset=few'))


def test_gpt2_text_in_bytes(tmp_path, answer):
    """The tokenizer of a model that says nothing and has GPT-2's vocabulary; characters cut by tokens count once."""
    save(tmp_path / 'run', random_model(vocab_size=50257, n_embd=8, n_layer=1), meta=None)
    text = 'na\u00efve \u4f60\u597d \U0001f600 <|endoftext|> end\n' * 3
    (tmp_path / 'x.txt').write_text(text, encoding='utf-8')
    found = answer(f'--out_dir={tmp_path}/run', f'--text={tmp_path}/x.txt')
    tokens = tokenizer.load({'tokenizer': 'gpt2'}).encode_ordinary(text)
    assert found['tokens'] == len(tokens) and found['bytes'] == len(text.encode())
    assert found['bits_per_byte'] == pytest.approx(found['nats'] / math.log(2) / len(text.encode()))
    assert 50256 not in tokens


def test_stablemax_models_are_scored_by_their_own_loss(tmp_path, answer):
    model = save(tmp_path / 'run', random_model(loss='stablemax'))
    make(tmp_path / 'd', drawn(99), drawn(17, seed=1))
    x = torch.tensor([drawn(17, seed=1).tolist()])
    with torch.no_grad():
        logits = model.double()(x[:, :-1], x[:, 1:])[0][0]
    s = torch.where(logits >= 0, logits + 1, 1 / (1 - logits.clamp(max=0)))
    loss = -(s / s.sum(-1, keepdim=True)).gather(1, x[0, 1:, None]).log().mean().item()
    found = answer(f'--out_dir={tmp_path}/run', f'--data_dir={tmp_path}', '--dataset=d')
    assert found['loss'] == pytest.approx(loss, rel=1e-5)


def test_a_model_that_sees_the_future_is_said(tmp_path, run):
    save(tmp_path / 'run', random_model(attention="dint(version='published')"))
    make(tmp_path / 'd', drawn(99), drawn(60, seed=1))
    code, out, err = run(f'--out_dir={tmp_path}/run', f'--data_dir={tmp_path}', '--dataset=d', '--json')
    assert code == 0 and json.loads(out)['sees_the_future'] and 'sees the future' in err and err.count('\n') == 1


# ---- baselines ----

def test_unigram_by_hand(tmp_path, answer):
    save(tmp_path / 'run', random_model())
    train, val = np.array([0, 0, 0, 1, 2, 2]), np.array([5, 0, 0, 2, 10])
    make(tmp_path / 'd', np.tile(train, 5), val)
    found = answer(f'--out_dir={tmp_path}/run', f'--data_dir={tmp_path}', '--dataset=d')['unigram']
    share = {0: 16 / 41, 1: 6 / 41, 2: 11 / 41, 10: 1 / 41}         # (count + 1) / (30 + 11)
    nats = -sum(math.log(share[t]) for t in (0, 0, 2, 10))          # the first token is not scored
    assert found['loss'] == pytest.approx(nats / 4) and found['accuracy'] == 0.5
    size = len(''.join(CHARS[t] for t in val).encode())
    assert size == 6 and found['bits_per_byte'] == pytest.approx(nats / math.log(2) / 6)


def test_counting_goes_piece_by_piece(monkeypatch):
    tokens, kind = drawn(1000, 5), tokenizer.load(PRICES)
    whole = baselines.counts(source_of(tokens).read, 1, 1000, 5), baselines.naive_returns(source_of(tokens, kind))
    monkeypatch.setattr(baselines, 'PIECE', 7)
    assert (baselines.counts(source_of(tokens).read, 1, 1000, 5) == whole[0]).all()
    assert baselines.naive_returns(source_of(tokens, kind)) == pytest.approx(whole[1])


def test_forecasts_by_hand(tmp_path, answer):
    model = save(tmp_path / 'run', random_model(vocab_size=5), PRICES)
    val = drawn(40, 5, seed=3).tolist()
    make(tmp_path / 'd', drawn(99, 5), val, PRICES)
    found = answer(f'--out_dir={tmp_path}/run', f'--data_dir={tmp_path}', '--dataset=d', '--window=4', '--stride=1')
    centres, errors, repeats = PRICES['returns']['centres'], {'model': [], 'last_price': [], 'same_return': []}, []
    for t in range(1, 40):
        if val[t] == 4:
            continue
        with torch.no_grad():
            p = model(torch.tensor([val[max(0, t - 4):t]]))[0][0, -1, :4].softmax(-1).tolist()
        for name, guess in (('model', sum(a * b for a, b in zip(p, centres))), ('last_price', 0.0),
                            ('same_return', [*centres, 0.0][val[t - 1]])):
            errors[name].append(abs(guess - centres[val[t]]))
        repeats.append(val[t] == val[t - 1])
    assert 4 in val and found['forecast']['returns'] == len(repeats)
    for name, values in errors.items():
        assert found['forecast'][name] == pytest.approx(np.mean(values), rel=1e-5), name
    assert found['forecast']['same_bin'] == pytest.approx(np.mean(repeats))
    assert found['bytes'] is None and found['bits_per_byte'] is None


def test_the_table(tmp_path, run):
    save(tmp_path / 'run', random_model(vocab_size=5), PRICES)
    make(tmp_path / 'd', drawn(99, 5), drawn(40, 5), PRICES)
    code, out, err = run(f'--out_dir={tmp_path}/run', f'--data_dir={tmp_path}', '--dataset=d')
    assert code == 0 and err == '' and 'step 1' in out and '39 scored' in out and 'window 16, stride 8' in out
    lines = out.splitlines()
    assert [line.split()[0] for line in lines[3:5]] == ['model', 'unigram'] and 'last price' in lines[-1]
    model, frequencies = (float(line.split()[1]) for line in lines[3:5])
    assert f'{frequencies - model:.3f}'[:4] in lines[5]


# ---- refusals ----

@pytest.mark.parametrize('words, expected', [
    ([], '--text=FILE or --dataset=NAME'),
    (['--dataset=d', '--window=17'], 'window must not exceed block_size (16), got 17'),
    (['--dataset=d', '--window=8', '--stride=9'], 'stride must not exceed window (8)'),
    (['--dataset=d', '--stride=17'], 'stride must not exceed window (16)'),
    (['--dataset=d', '--window=-1'], 'at least 0'),
    (['--dataset=d', '--split=test'], "no split 'test'; it has train, val"),
    (['--dataset=d', '--split=dev'], 'must be one of train, val, test'),
    (['--dataset=nothing'], 'nothing'),
    (['--dataset=other'], 'mean other things'),
    (['--dataset=large'], 'mean other things'),
    (['--dataset=d', '--text={}/x.txt', '--split=train'], '--split'),
    (['--text={}/missing.txt'], 'no such file'),
    (['--text={}/short.txt'], 'two characters'),
    (['--text={}/latin.txt'], 'expected UTF-8'),
    (['--text={}/strange.txt'], "'Q' is not among"),
    (['--dataset=one'], 'at least 2 tokens, one to predict the other, found 1'),
    (['--dataset=d', '--device=tpu'], 'device'),
    (['--dataset=d', '--windw=4'], "did you mean 'window'"),
    (['--dataset=d', '--out_dir={}/nowhere'], 'there is no folder'),
    (['--dataset=d', '--out_dir={}'], 'no checkpoint')])
def test_mistakes_are_one_line(words, expected, tmp_path, run):
    save(tmp_path / 'run', random_model())
    make(tmp_path / 'd', drawn(99), drawn(40))
    make(tmp_path / 'one', drawn(99), [3])
    make(tmp_path / 'other', drawn(99), drawn(40), {**META, 'chars': CHARS[::-1]})
    make(tmp_path / 'large', drawn(99), drawn(40), {**META, 'vocab_size': 40, 'chars': [chr(97 + k) for k in range(40)]})
    for name, data in (('x', b'ab ab'), ('short', b'a'), ('latin', b'ab\xff'), ('strange', b'aQb')):
        (tmp_path / f'{name}.txt').write_bytes(data)
    line = refusal(run(f'--out_dir={tmp_path}/run', f'--data_dir={tmp_path}', *(w.format(tmp_path) for w in words)))
    assert expected in line


def test_another_label_is_no_other_meaning(tmp_path, answer):
    save(tmp_path / 'run', random_model())
    make(tmp_path / 'd', drawn(99), drawn(40), {**META, 'source': 'elsewhere'})
    assert answer(f'--out_dir={tmp_path}/run', f'--data_dir={tmp_path}', '--dataset=d')['tokens'] == 40


def test_a_loss_that_is_not_finite_is_exit_3(tmp_path, run):
    model = random_model()
    with torch.no_grad():
        model.transformer.ln_f.weight.fill_(1e38)
        model.transformer.wte.weight.mul_(1e3)
    save(tmp_path / 'run', model)
    make(tmp_path / 'd', drawn(99), drawn(40))
    code, out, err = run(f'--out_dir={tmp_path}/run', f'--data_dir={tmp_path}', '--dataset=d', '--json')
    assert code == 3 and out == '' and err.count('\n') == 1


def test_mistakes_are_said_before_torch_is_imported():
    import subprocess
    code = ('import sys; sys.argv[1:] = ["--text=x", "--window=4", "--stride=5", "--out_dir=tests"]\nimport evaluate\n'
            'try:\n    evaluate.main()\nexcept SystemExit as stop:\n    print(stop.code, "torch" in sys.modules)')
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.stdout.split() == ['2', 'False'], done.stderr
