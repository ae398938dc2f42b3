"""The next token against transformers' processors, stops, batches against single texts, prompts from files."""
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data import tokenizer
from layers.basic import probabilities
from model import GPT, GPTConfig
from sampling import prompts, several
from sampling.choosing import Choice, Picker, penalised
from sampling.words import decode
from tests.test_sample import LINE, META, refusal, run, save  # noqa: F401

BYTES = tokenizer.load({'tokenizer': 'bytes'})


def logits_and_ids(rows=5, size=40, length=9):
    torch.manual_seed(0)
    return 3 * torch.randn(rows, size), torch.randint(0, size, (rows, length))


@pytest.mark.parametrize('penalty', [1.0, 1.3, 2.5, 0.7])
def test_the_repetition_penalty_is_transformers(penalty):
    from transformers import RepetitionPenaltyLogitsProcessor
    logits, ids = logits_and_ids()
    seen = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, ids, True)
    theirs = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits.clone())
    assert torch.equal(penalised(logits, seen, penalty), theirs)
    assert penalty == 1 or not torch.equal(theirs, logits)


@pytest.mark.parametrize('temperature, top_k, top_p, min_p', [
    (1.0, 0, 1.0, 0.1), (0.7, 0, 1.0, 0.02), (1.5, 7, 1.0, 0.3), (0.9, 20, 0.95, 0.2), (1.0, 0, 1.0, 1.0),
    (1.2, 0, 0.9, 0.0)])
def test_min_p_after_the_others_is_transformers(temperature, top_k, top_p, min_p):
    import transformers as tf
    logits, ids = logits_and_ids()
    theirs = tf.TemperatureLogitsWarper(temperature)(ids, logits)
    for warper in ([tf.TopKLogitsWarper(top_k)] if top_k else []) + ([tf.TopPLogitsWarper(top_p)] if top_p < 1 else []) + (
            [tf.MinPLogitsWarper(min_p)] if min_p else []):
        theirs = warper(ids, theirs)
    ours = probabilities(logits, temperature, top_k or None, top_p, min_p)
    assert torch.equal(ours > 0, theirs > -torch.inf)
    torch.testing.assert_close(ours / ours.sum(-1, keepdim=True), theirs.softmax(-1))
    if min_p:
        assert not torch.equal(ours > 0, probabilities(logits, temperature, top_k or None, top_p) > 0)


def test_the_penalty_counts_prompt_and_text():
    """Greedy tokens with the processor of transformers, step by step over a fixed table of logits."""
    from transformers import RepetitionPenaltyLogitsProcessor
    torch.manual_seed(1)
    table, ids = torch.rand(3, 12), torch.tensor([[0, 1], [2, 3], [4, 4]])
    pick, theirs = Picker(Choice(temperature=0, repetition_penalty=1.8), ids, 12, None), ids
    for _ in range(6):
        token = pick(table[:, None])
        expected = RepetitionPenaltyLogitsProcessor(1.8)(theirs, table.clone()).argmax(-1, keepdim=True)
        theirs = torch.cat((theirs, expected), 1)
        assert torch.equal(token, expected)
    assert len(set(theirs[0].tolist())) > 3             # without it the same token comes again and again


# ---- stops ----

@settings(max_examples=300, deadline=None)
@given(text=st.text('abé🙂', max_size=30), stops=st.lists(st.text('abé🙂', min_size=1, max_size=4), max_size=3))
def test_a_text_ends_before_the_first_stop(text, stops):
    """Tokens are bytes, so that every stop lies over several, and characters are cut."""
    ended = next((n for n in range(len(text) + 1) if any(stop in text[:n] for stop in stops)), None)
    whole = text if ended is None else text[:min(text[:ended].find(stop) for stop in stops if stop in text[:ended])]
    pieces = list(decode(iter(text.encode()), BYTES, stops))
    assert ''.join(pieces) == whole
    if not stops:
        assert len(pieces) >= len(text)                 # nothing is held back for nothing


def test_no_token_is_asked_for_after_a_stop():
    asked = []

    def tokens():
        for byte in b'abcdefg':
            asked.append(byte)
            yield byte
    assert ''.join(decode(tokens(), BYTES, ['cd'])) == 'ab' and bytes(asked) == b'abcd'
    asked.clear()
    assert ''.join(decode(tokens(), BYTES, (), [ord('e')])) == 'abcd' and bytes(asked) == b'abcde'


def test_held_text_comes_at_the_end():
    assert ''.join(decode(iter(b'abc'), BYTES, ['cde'])) == 'abc'
    assert [p for p in decode(iter(b'abcx'), BYTES, ['cde']) if p] == ['a', 'b', 'cx']


# ---- several at once ----

def texts_of(choice, **more):
    torch.manual_seed(0)
    model = GPT(GPTConfig(16, 11, 2, 2, 16)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return several.Texts(model, tokenizer.load({**META, 'chars': [*'\n abcdefghi'], 'vocab_size': 11}), choice, **more)


JOBS = [[2, 3], [4, 5, 6], [7, 8], [2, 2], [9], [3, 3, 3], list(range(2, 10)) * 3, [5, 5]]


@pytest.mark.parametrize('choice', [Choice(temperature=0), Choice(temperature=1.0, top_k=6, min_p=0.05),
                                    Choice(temperature=0, repetition_penalty=1.5)])
@pytest.mark.parametrize('use_cache', [True, False])
def test_a_batch_is_its_single_texts(choice, use_cache):
    """Beyond the context too: 24 new tokens, block_size 16. Each text has a generator of its own."""
    texts = texts_of(choice, use_cache=use_cache)
    single = [texts.together([job], 24, [torch.Generator().manual_seed(7 + i)])[0] for i, job in enumerate(JOBS)]
    assert len(set(single)) > 5
    for batch in (1, 2, 8):
        assert list(texts.all(JOBS, 24, batch, 7)) == single
    other = texts_of(choice, use_cache=not use_cache)
    assert list(other.all(JOBS, 24, 8, 7)) == single    # cached = uncached


def test_a_batch_stops_row_by_row():
    texts, plain = texts_of(Choice(temperature=0), stops=['a', 'f']), texts_of(Choice(temperature=0))
    for cut, whole in zip(texts.all(JOBS, 24, 8, 0), plain.all(JOBS, 24, 8, 0)):
        assert cut == whole.split('a')[0].split('f')[0]


def test_groups_have_one_length_and_all_indices():
    parts = several.grouped([2, 3, 2, 2, 1, 3], 2)
    assert parts == [[0, 2], [1, 5], [3], [4]]


def test_speed_is_counted():
    texts = texts_of(Choice())
    list(texts.all(JOBS[:2], 5, 2, 0))
    assert texts.made == 10 and 'per second' in texts.speed() and texts.speed().startswith('10 tokens in ')


# ---- the program ----

def test_prompts_of_a_file(tmp_path, run):              # noqa: F811
    save(tmp_path)
    (tmp_path / 'p.txt').write_text('abc\n\nde\n')
    (tmp_path / 'p.jsonl').write_text('{"prompt": "abc"}\n"de"\n')
    words = f'--out_dir={tmp_path}', '--num_samples=2', '--max_new_tokens=6', '--temperature=0'
    code, out, err = run(*words, f'--prompts={tmp_path}/p.txt')
    parts = out.split(LINE)
    assert code == 0 and err == '' and [part[:3] for part in parts[:2]] == ['abc', 'abc']
    assert [part[:2] for part in parts[2:4]] == ['de', 'de'] and parts[4] == '' and len(parts[0]) == 9
    for more in ([f'--prompts={tmp_path}/p.jsonl'], [f'--prompts={tmp_path}/p.txt', '--batch=3']):
        assert run(*words, *more)[1] == out


def test_settings_reach_the_sampler(tmp_path, run):     # noqa: F811
    save(tmp_path)
    words = f'--out_dir={tmp_path}', '--num_samples=1', '--max_new_tokens=14', '--start=ab'
    greedy = run(*words, '--temperature=0')[1]
    assert run(*words, '--min_p=1')[1] == greedy
    assert run(*words, '--temperature=0', '--repetition_penalty=50')[1] != greedy
    letter = greedy[5]
    assert run(*words, '--temperature=0', f'--stop={letter}||zz')[1] == greedy[:2] + greedy[2:].split(letter)[0] + LINE
    (tmp_path / 'p.txt').write_text('abcdefgh' * 5 + '\nab\n')
    code, _, err = run(*words[:-1], f'--prompts={tmp_path}/p.txt', '--temperature=0')
    assert code == 0 and err == 'sample.py: the longest of 2 prompts has 40 tokens; the model sees the last 16 of each\n'


@pytest.mark.parametrize('words, expected', [
    (['--prompts=none.txt'], "'none.txt' cannot be read"), (['--prompts=x', '--start=a'], 'drop one of them'),
    (['--prompts={}/empty'], 'holds no prompt'), (['--prompts={}/bad.jsonl'], 'line 2: no JSON'),
    (['--prompts={}/odd.jsonl'], 'line 1: a text or'), (['--min_p=1.5'], 'at most 1'), (['--min_p=-1'], 'at least 0'),
    (['--repetition_penalty=0'], 'repetition_penalty must be at least'), (['--batch=0'], 'batch must be at least 1'),
    (['--chat=True', '--start=a'], 'drop start'), (['--system=x'], 'for --chat=True'),
    (['--chat=True'], 'has no chat template')])
def test_mistakes_are_one_line(words, expected, tmp_path, run):     # noqa: F811
    save(tmp_path)
    (tmp_path / 'empty').write_text('\n')
    (tmp_path / 'bad.jsonl').write_text('"a"\n{\n')
    (tmp_path / 'odd.jsonl').write_text('{"text": 3}\n')
    assert expected in refusal(run(f'--out_dir={tmp_path}', *(word.format(tmp_path) for word in words)))


def test_a_line_of_json_is_a_text_or_has_a_prompt():
    assert [prompts.prompt_of(json.dumps(row), '') for row in ('a', {'prompt': 'b', 'id': 1})] == ['a', 'b']

