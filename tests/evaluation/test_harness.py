"""The adapter under lm-evaluation-harness, on local tasks: its numbers beside evaluate.py's and its own `hf` model's."""
import json
import math

import pytest
import torch

from data import tokenizer
from tests.test_evaluate import META, answer, drawn, random_model, refusal, run, save  # noqa: F401

lm_eval = pytest.importorskip('lm_eval', reason='lm_eval is not installed (extra `evaluate`)')
CHARS = META['chars']

ROLLING = """
task: ours_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {place}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: bits_per_byte
  - metric: word_perplexity
"""
CHOICES = """
task: ours_choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {place}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{ctx}}}}"
doc_to_target: "{{{{label}}}}"
doc_to_choice: "{{{{endings}}}}"
metric_list:
  - metric: acc
  - metric: acc_norm
"""
UNTIL = """
task: ours_answers
dataset_path: json
dataset_kwargs: {{data_files: {{test: {place}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{ctx}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["g"], max_gen_toks: 6, do_sample: false}}
metric_list:
  - metric: exact_match
"""


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """tasks(yaml, rows) adds a task with its file of JSON lines; all in one folder."""
    monkeypatch.setenv('HF_DATASETS_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setattr('datasets.config.HF_DATASETS_CACHE', tmp_path / 'cache')
    folder = tmp_path / 'tasks'
    folder.mkdir()

    def add(name, text, rows):
        place = tmp_path / f'{name}.jsonl'
        place.write_text('\n'.join(map(json.dumps, rows)) + '\n', encoding='utf-8')
        (folder / f'{name}.yaml').write_text(text.format(place=place))
        return f'--lm_eval_folder={folder}'
    return add


def asked(run, *words):                                 # noqa: F811
    code, out, err = run(*words, '--json')
    assert code == 0, err[-2000:]
    return json.loads(out.splitlines()[-1])['tasks']


@pytest.mark.parametrize('count', [5, 16, 17, 200])
def test_bits_per_byte_are_evaluate_py_s_on_the_same_windows(count, tmp_path, run, answer, tasks):      # noqa: F811
    save(tmp_path / 'run', random_model())
    text = ''.join(CHARS[t] for t in drawn(count, seed=4)).strip() or 'ab'
    (tmp_path / 'x.txt').write_text(text, encoding='utf-8')
    folder = tasks('rolling', ROLLING, [{'text': text}])
    theirs = asked(run, tmp_path / 'run', '--lm_eval=ours_text', folder)['ours_text']
    ours = answer(f'--out_dir={tmp_path}/run', f'--text={tmp_path}/x.txt', '--convention=harness')
    assert theirs['bits_per_byte,none'] == pytest.approx(ours['bits_per_byte'], abs=1e-4)
    assert ours['scored'] == ours['tokens'] == len(text)
    assert theirs['word_perplexity,none'] == pytest.approx(ours['word_perplexity'], rel=1e-4)


def test_choices_are_those_of_evaluate_py(tmp_path, run, tasks):        # noqa: F811
    from tests.evaluation.test_choices import drawn_questions
    save(tmp_path / 'run', random_model())
    rows = drawn_questions(30, 2)
    folder = tasks('choices', CHOICES, rows)
    theirs = asked(run, tmp_path / 'run', '--lm_eval=ours_choices', folder)['ours_choices']
    code, out, _ = run(tmp_path / 'run', f'--choices={tmp_path}/choices.jsonl', '--json')
    ours = json.loads(out)
    assert code == 0 and theirs['acc,none'] == pytest.approx(ours['acc'], abs=1e-9)
    assert theirs['acc_norm,none'] == pytest.approx(ours['acc_norm'], abs=1e-9)
    assert theirs['acc_stderr,none'] == pytest.approx(ours['acc_stderr'])


def test_answers_end_at_the_task_s_stops(tmp_path, run, tasks):         # noqa: F811
    model, kind = save(tmp_path / 'run', random_model()), tokenizer.load(META)
    rows = []
    for context in ('abc', 'hgf', 'dd e'):
        tokens = model.generate(torch.tensor([kind.encode(context)]), 6, temperature=0)[0, len(context):].tolist()
        rows.append({'ctx': context, 'answer': kind.decode(tokens).split('g')[0]})
    folder = tasks('answers', UNTIL, rows)
    found = asked(run, tmp_path / 'run', '--lm_eval=ours_answers', folder)['ours_answers']
    assert found['exact_match,none'] == 1.0
    rows[0]['answer'] += 'x'
    tasks_again = tmp_path / 'answers.jsonl'
    tasks_again.write_text('\n'.join(map(json.dumps, rows)) + '\n')
    assert asked(run, tmp_path / 'run', '--lm_eval=ours_answers', folder)['ours_answers']['exact_match,none'] < 1


def test_the_harness_s_own_model_gives_the_same_numbers(tmp_path):
    """Its `hf` adapter on transformers' GPT-2 with the same tokenizer, against ours on the same folder."""
    transformers = pytest.importorskip('transformers')
    HFLM = pytest.importorskip('lm_eval.models.huggingface', reason='lm_eval without accelerate',
                               exc_type=ImportError).HFLM
    from lm_eval.api.instance import Instance

    import evaluate
    from data import tokenizer_json
    from evaluation import harness, likelihood
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=300,
                                                                  n_positions=32, initializer_range=0.3)).eval()
    theirs.save_pretrained(tmp_path)
    meta = {'tokenizer': 'gpt2', 'vocab_size': 300}
    (tmp_path / 'tokenizer.json').write_text(tokenizer_json.text_of(meta), encoding='utf-8')
    words = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / 'tokenizer.json'),
                                                 eos_token='<|endoftext|>', bos_token='<|endoftext|>')
    model, info = evaluate.load_model(str(tmp_path), 'last')
    kind = tokenizer.load(info['data'])
    ours = harness.Adapter(model.eval(), kind, kind.end_of_text, torch.device('cpu'), torch.float32)
    hf = HFLM(pretrained=theirs, tokenizer=words, device='cpu', batch_size=1)       # in batches its sums may differ
    pairs = [('The cat', ' sat'), ('', 'hello there'), ('a b c ', 'd'), ('long ' * 40, ' end of it'), ('x', 'y')]
    requests = [Instance('loglikelihood', {}, pair, 0) for pair in pairs]
    for (a, b), (c, d) in zip(ours.loglikelihood(requests), hf.loglikelihood(requests)):
        assert a == pytest.approx(c, abs=1e-3) and b == d
    rolling = [Instance('loglikelihood_rolling', {}, (text,), 0) for text in ('It was a dark night. ' * 9, 'short')]
    assert ours.loglikelihood_rolling(rolling) == pytest.approx(hf.loglikelihood_rolling(rolling), abs=1e-3)
    until = [Instance('generate_until', {}, ('Once upon a', {'until': ['e'], 'max_gen_toks': 12, 'do_sample': False}), 0)]
    assert ours.generate_until(until) == hf.generate_until(until)
    assert math.isfinite(likelihood.first_token(kind, info['source']))


def test_unknown_tasks_and_folders_are_one_line(tmp_path, run):         # noqa: F811
    save(tmp_path / 'run', random_model())
    assert 'lm_eval_folder' in refusal(run(tmp_path / 'run', '--lm_eval=x', '--lm_eval_folder=no/such'))
    assert "no task 'no_such_task'" in run(tmp_path / 'run', '--lm_eval=no_such_task')[2]
