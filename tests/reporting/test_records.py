"""Records of runs."""
import json

from reporting import records


def run_of(count):
    lines = [{'step': i, 'loss': 1.0} if i % 100 or not i else {'step': i, 'val_loss': 1.0} for i in range(count)]
    return {'folder': 'out/x', 'config': {}, 'env': {'command': ['python', 'train.py']}, 'lines': lines}


def test_a_long_log_is_thinned_and_keeps_every_evaluation(tmp_path, monkeypatch):
    monkeypatch.setattr(records, 'LINES', 300)
    records.write_record(tmp_path, 'title', 'note', [run_of(1001)], text='a table')
    kept = [json.loads(line) for line in (tmp_path / 'log.jsonl').read_text().splitlines()]
    assert [line['step'] for line in kept if 'val_loss' in line] == list(range(100, 1001, 100))
    assert [line['step'] for line in kept] == sorted({*range(0, 1001, 4), *range(100, 1001, 100)})
    records.write_record(tmp_path, 'title', 'note', [run_of(300)], text='a table')
    assert len((tmp_path / 'log.jsonl').read_text().splitlines()) == 300
