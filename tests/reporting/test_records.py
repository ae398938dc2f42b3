"""Records of runs."""
import json

from reporting import records


def run_of(count):
    lines = [{'step': i, 'loss': 1.0} if i % 100 or not i else {'step': i, 'val_loss': 1.0} for i in range(count)]
    return {'folder': 'out/x', 'config': {}, 'env': {'command': ['python', 'train.py']}, 'lines': lines}


def test_tokens_are_counted_to_the_last_step():
    """2,000 steps of 768 tokens, logged every tenth step: the last evaluation knows all of them."""
    lines = [{'step': i, 'loss': 1.0, 'tokens': 768 * (i + 1), 'tokens_per_s': 1.0} for i in range(0, 2000, 10)]
    old, new = {'step': 2000, 'val_loss': 1.0}, {'step': 2000, 'val_loss': 1.0, 'tokens': 768 * 2000}
    assert records.tokens_of([*lines, old]) == 768 * 1991 and records.tokens_of([*lines, new]) == 1_536_000
    run = {'folder': 'x', 'config': {}, 'env': {}, 'lines': [*lines, new], 'evals': [new], 'steps': lines}
    assert '| 1,536,000 |' in records.row([run]) and records.tokens_of([]) == 0


def test_a_long_log_is_thinned_and_keeps_every_evaluation(tmp_path, monkeypatch):
    monkeypatch.setattr(records, 'LINES', 300)
    records.write_record(tmp_path, 'title', 'note', [run_of(1001)], text='a table')
    kept = [json.loads(line) for line in (tmp_path / 'log.jsonl').read_text().splitlines()]
    assert [line['step'] for line in kept if 'val_loss' in line] == list(range(100, 1001, 100))
    assert [line['step'] for line in kept] == sorted({*range(0, 1001, 4), *range(100, 1001, 100)})
    records.write_record(tmp_path, 'title', 'note', [run_of(300)], text='a table')
    assert len((tmp_path / 'log.jsonl').read_text().splitlines()) == 300
