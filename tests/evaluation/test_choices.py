"""Multiple choice and last words against a direct computation, and batches against single questions."""
import json
import math

import pytest
import torch

from data import tokenizer
from evaluation import choices, likelihood
from tests.test_evaluate import META, random_model, refusal, run, save  # noqa: F401

CHARS = META['chars']
CPU = torch.device('cpu')


def text(rng, low, high):
    """A word of the model's letters; of é, which has two bytes, often."""
    size = int(torch.randint(low, high, (1,), generator=rng))
    return ''.join('abcdefghééé'[int(torch.randint(0, 11, (1,), generator=rng))] for _ in range(size))


def drawn_questions(count, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return [{'ctx': text(rng, 1, 30), 'endings': [text(rng, 1, 9) for _ in range(int(2 + i % 3))], 'label': i % 2}
            for i in range(count)]


@torch.no_grad()
def alone(model, context, continuation):
    """Log-likelihood of one continuation token by token, in float64, from the last block_size tokens."""
    tokens, total, greedy = [CHARS.index(c) for c in context + continuation], 0.0, True
    size = model.config.block_size
    first = max(0, len(tokens) - size - 1)
    for at in range(len(context), len(tokens)):
        logits = model(torch.tensor([tokens[first:at]]))[0][0, -1].double()
        total += logits.log_softmax(-1)[tokens[at]].item()
        greedy &= int(logits.argmax()) == tokens[at]
    return total, greedy


def test_every_question_by_hand(tmp_path, run):         # noqa: F811
    model, asked = save(tmp_path / 'run', random_model()), drawn_questions(40)
    (tmp_path / 'q.jsonl').write_text('\n'.join(map(json.dumps, asked)) + '\n', encoding='utf-8')
    code, out, err = run(tmp_path / 'run', f'--choices={tmp_path}/q.jsonl', '--json')
    assert code == 0 and err == ''
    hits = {'acc': 0, 'acc_norm': 0, 'acc_bytes': 0}
    for q in asked:
        scores = [alone(model, q['ctx'], f' {ending}')[0] for ending in q['endings']]
        for name, sizes in (('acc', [1] * 9), ('acc_norm', [len(e) for e in q['endings']]),
                            ('acc_bytes', [len(e.encode()) for e in q['endings']])):
            hits[name] += max(range(len(scores)), key=lambda i: scores[i] / sizes[i]) == q['label']
    found = json.loads(out)
    assert {name: found[name] * 40 for name in hits} == pytest.approx(hits) and len(set(hits.values())) > 1
    assert found['acc_stderr'] == pytest.approx(math.sqrt(found['acc'] * (1 - found['acc']) / 39))
    assert found['questions'] == 40 and 0.25 <= found['chance'] <= 0.5
    code, out, _ = run(tmp_path / 'run', f'--choices={tmp_path}/q.jsonl', '--limit=7')
    assert code == 0 and '7 questions' in out and 'acc_norm' in out


def test_batches_are_single_questions(monkeypatch):
    model, kind = random_model(), tokenizer.load(META)
    pairs = [likelihood.cut(kind, q['ctx'], f' {ending}') for q in drawn_questions(30, 1) for ending in q['endings']]
    together = likelihood.likelihoods(model, pairs, CPU, torch.float32)
    single = [likelihood.likelihoods(model, [pair], CPU, torch.float32)[0] for pair in pairs]
    hand = [alone(model, ''.join(CHARS[t] for t in a), ''.join(CHARS[t] for t in b)) for a, b in pairs]
    for other in (single, hand):
        assert [loss for loss, _ in together] == pytest.approx([loss for loss, _ in other], abs=1e-4)
        assert [greedy for _, greedy in together] == [greedy for _, greedy in other]
    assert max(len(a) + len(b) for a, b in pairs) > model.config.block_size         # some contexts are cut
    with pytest.raises(Exception, match='a continuation has 17 tokens'):
        likelihood.likelihoods(model, [([1], [2] * 17)], CPU, torch.float32)


def test_blanks_belong_to_the_continuation():
    kind = tokenizer.load({'tokenizer': 'gpt2'})
    assert likelihood.cut(kind, 'The cat ', 'sat') == likelihood.cut(kind, 'The cat', ' sat')
    head, rest = likelihood.cut(kind, 'The cat', ' sat down')
    assert kind.decode(head) == 'The cat' and kind.decode(rest) == ' sat down' and len(rest) == 2


def test_last_words_of_lambada_from_a_file(tmp_path, run):      # noqa: F811
    pytest.importorskip('datasets')
    model = save(tmp_path / 'run', random_model())
    passages = ['ab cd efg', 'a hgf dd', 'bb a ab a']
    (tmp_path / 'lambada_test.txt').write_text('\n'.join(passages))
    code, out, err = run(tmp_path / 'run', '--benchmark=lambada', f'--text={tmp_path}/lambada_test.txt', '--json')
    assert code == 0, err
    hand = [alone(model, p.rsplit(' ', 1)[0], ' ' + p.rsplit(' ', 1)[1]) for p in passages]
    found = json.loads(out)
    assert found['perplexity'] == pytest.approx(math.exp(-sum(loss for loss, _ in hand) / 3), rel=1e-5)
    assert found['acc'] * 3 == pytest.approx(sum(greedy for _, greedy in hand)) and found['questions'] == 3


@pytest.mark.parametrize('name', ['wikitext2', 'wikitext103'])
def test_a_published_text_from_a_file(name, tmp_path, run):     # noqa: F811
    pytest.importorskip('datasets')
    save(tmp_path / 'run', random_model())
    lines = ['', 'abc de', '', 'f gg h', '']
    (tmp_path / 'w').mkdir()
    (tmp_path / 'w' / 'wiki.test.raw').write_text('\n'.join(lines) + '\n')
    (tmp_path / 'w' / 'wiki.train.raw').write_text('hhhh\n')
    (tmp_path / 'x.txt').write_text('\n\n'.join(line + '\n' if line else '' for line in lines))
    code, out, err = run(tmp_path / 'run', f'--benchmark={name}', f'--text={tmp_path}/w', '--json')
    assert code == 0, err
    plain = json.loads(run(tmp_path / 'run', f'--text={tmp_path}/x.txt', '--json')[1])
    assert json.loads(out)['nats'] == plain['nats'] and json.loads(out)['bytes'] == plain['bytes']


@pytest.mark.parametrize('line, words', [
    ('x', 'line 2: Expecting value'), ('[]', 'an object is wanted'), ('{"ctx": "", "endings": ["a", "b"]}', 'ctx must be'),
    ('{"ctx": "a", "endings": ["a"], "label": 0}', 'a list of 2 to'),
    ('{"ctx": "a", "endings": ["a", "b"], "label": 2}', 'from 0 to 1'),
    ('{"ctx": "a", "endings": ["a", "b"], "label": ""}', 'from 0 to 1'),
    ('{"ctx": "a", "endings": ["a", "b"], "label": true}', 'from 0 to 1')])
def test_a_question_that_is_none_is_named(line, words, tmp_path, run):     # noqa: F811
    save(tmp_path / 'run', random_model())
    (tmp_path / 'q.jsonl').write_text(f'{json.dumps(drawn_questions(1)[0])}\n{line}\n', encoding='utf-8')
    assert words in refusal(run(tmp_path / 'run', f'--choices={tmp_path}/q.jsonl'))


def test_labels_may_be_texts():
    assert choices.question({'ctx': 'a', 'endings': ['b', 'c'], 'label': '1'}).label == 1


@pytest.mark.parametrize('words, expected', [
    (['--choices={}/none'], 'No such file'), (['--choices=x', '--lm_eval=y'], 'two things'),
    (['--choices=x', '--text=y'], 'two things'), (['--choices=x', '--against={}/run'], 'two models are compared on a text'),
    (['--text=x', '--convention=transformers', '--window=1'], 'at least 2'),
    (['--text=x', '--convention=harness', '--stride=3'], 'stride is the window'),
    (['--text=x', '--convention=hugging'], 'must be one of tokens, transformers, harness'),
    (['--text=x', '--against={}/nowhere'], '--against=FOLDER'), (['--text=x', '--out_dir=tests/none'], 'no folder or file'),
    (['--benchmark=wikitext3'], 'wikitext2')])
def test_mistakes_are_one_line(words, expected, tmp_path, run):     # noqa: F811
    save(tmp_path / 'run', random_model())
    assert expected in refusal(run(f'--out_dir={tmp_path}/run', *(word.format(tmp_path) for word in words)))
