"""Windows by the conventions of transformers and of lm-evaluation-harness, against the other programs' own computations."""
import json
import math
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import evaluate
from data import prepare_text
from evaluation import texts, windows
from tests.test_evaluate import META, drawn, random_model, save, source_of

transformers = pytest.importorskip('transformers')
CHARS = META['chars']


def theirs_of(kind):
    """A small random model of transformers with 11 tokens and a context of 24."""
    torch.manual_seed(1)
    if kind == 'gpt2':
        config = transformers.GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=11, n_positions=24,
                                         initializer_range=0.4)
        return transformers.GPT2LMHeadModel(config).eval()
    config = transformers.LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                                      num_key_value_heads=2, vocab_size=11, max_position_embeddings=24,
                                      initializer_range=0.4)
    return transformers.LlamaForCausalLM(config).eval()


@torch.no_grad()
def documented(model, tokens, window, stride):
    """Perplexity by the rule of the documentation: labels of old tokens are off, the library's mean per window counts as
    often as there are labels, less one."""
    total = count = 0.0
    held = 0
    for begin in range(0, len(tokens), stride):
        stop = min(begin + window, len(tokens))
        x = torch.tensor([tokens[begin:stop]])
        labels = x.clone()
        labels[:, :x.size(1) - (stop - held)] = -100
        counted = int((labels != -100).sum()) - 1
        if counted:
            total += model(x, labels=labels).loss.item() * counted
        count, held = count + counted, stop
        if stop == len(tokens):
            break
    return math.exp(total / count)


@torch.no_grad()
def directly(model, tokens, window, stride):
    """Perplexity of every token but the first, by the library's logits, each from the first window that predicts it."""
    nats = 0.0
    for target in range(1, len(tokens)):
        begin = max(0, math.ceil((target - window) / stride)) * stride
        nats -= model(torch.tensor([tokens[begin:target]])).logits[0, -1].double().log_softmax(-1)[tokens[target]].item()
    return math.exp(nats / (len(tokens) - 1))


@pytest.fixture
def answer(capsys, monkeypatch):
    def program(*words):
        monkeypatch.setattr(sys, 'argv', ['evaluate.py', '--device=cpu', *map(str, words), '--json'])
        capsys.readouterr()
        evaluate.main()
        return json.loads(capsys.readouterr().out)
    return program


@pytest.mark.parametrize('kind', ['gpt2', 'llama'])
@pytest.mark.parametrize('window, stride', [(24, 12), (24, 24), (10, 3), (24, 7)])
def test_perplexity_is_that_of_transformers_in_both_conventions(kind, window, stride, tmp_path, answer):
    model, tokens = theirs_of(kind), drawn(150, seed=3).tolist()
    model.save_pretrained(tmp_path / 'hf')
    (tmp_path / 'x.txt').write_text(''.join(CHARS[t] for t in tokens), encoding='utf-8')
    prepare_text.write_dataset(tmp_path / 'd', META, {'train': np.array(tokens), 'val': np.array(tokens)})
    words = f'--out_dir={tmp_path}/hf', f'--text={tmp_path}/x.txt', '--dataset=d', f'--data_dir={tmp_path}'
    sizes = f'--window={window}', f'--stride={stride}'
    found = {name: answer(*words, *sizes, f'--convention={name}')['perplexity'] for name in ('tokens', 'transformers')}
    assert found['transformers'] == pytest.approx(documented(model, tokens, window, stride), abs=1e-4)
    assert found['tokens'] == pytest.approx(directly(model, tokens, window, stride), abs=1e-4)
    assert abs(found['transformers'] - found['tokens']) > 1e-3                      # and they are two numbers


@settings(max_examples=200, deadline=None)
@given(count=st.integers(1, 200), window=st.integers(1, 40))
def test_the_harness_s_windows_are_its_own(count, window):
    """Against its two functions for them; skipped without the package, where the next test still counts the targets."""
    utils = pytest.importorskip('lm_eval.utils', reason='lm_eval is not installed (extra `evaluate`)')
    tokens = list(range(1, count + 1))
    theirs = [utils.make_disjoint_window(pair) for pair in utils.get_rolling_token_windows(tokens, 0, window, 1)]
    whole, ours = [0, *tokens], []
    for start, stop, fresh, weight in windows.spans('harness', count + 1, window, window):
        assert fresh == weight
        ours.append((whole[start:stop - fresh + 1], whole[stop - fresh + 1:stop + 1]))
    assert ours == [(list(context), list(targets)) for context, targets in theirs]


@settings(max_examples=100, deadline=None)
@given(count=st.integers(2, 200), window=st.integers(1, 40))
def test_with_one_token_in_front_every_token_is_scored_once(count, window):
    source = texts.prefixed(source_of(np.arange(5, count + 5)), 3)
    seen = [t for _, y in windows.batches(source, window, window, 2, 'harness') for t in y[y >= 0].tolist()]
    assert sorted(seen) == list(range(5, count + 5)) and source.count == count + 1
    assert source.read(0, 2).tolist() == [3, 5] and source.read(1, 3).tolist() == [5, 6]


def test_losses_by_window_add_up_to_the_whole():
    model, source = random_model(), source_of(drawn(120))
    device = torch.device('cpu')
    plain = windows.score(model, source, 16, 8, 3, device, torch.float32)
    by_window = windows.score(model, source, 16, 8, 3, device, torch.float32, by_window=True)
    assert by_window['nats'] == pytest.approx(plain['nats'], rel=1e-6) and by_window['right'] == plain['right']
    assert sum(by_window['window_nats']) == pytest.approx(plain['nats'], rel=1e-6)
    assert sum(by_window['window_scored']) == 119
    stable = random_model(loss='stablemax')
    found = [windows.score(stable, source, 16, 8, 3, device, torch.float32, by_window=flag)['nats'] for flag in (0, 1)]
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_perplexity_per_word(tmp_path, answer):
    save(tmp_path / 'run', random_model())
    (tmp_path / 'x.txt').write_text('abc de\nfgh  a')
    found = answer(f'--out_dir={tmp_path}/run', f'--text={tmp_path}/x.txt')
    assert found['words'] == 4 and found['word_perplexity'] == pytest.approx(math.exp(found['nats'] / 4))
