"""compare.py over a run's folder in which every key has every odd value: a table, or one line, and no traceback."""
import copy
import json
import math
import sys

import pytest

import compare
from growth import recovery
from reporting import webpage

ODD = [{}, [], 5, 'x', None, math.inf, math.nan, True, -1, 10**30, 0, [[]], {'a': {}}, 'x' * 3000, 0.5, [1], '\x1b[31m\n']
STEP = {'step': 0, 'loss': 3.0, 'tokens': 128, 'tokens_per_s': 9.0, 'lr': 0.1}
DROP = {'step': 1, 'change': 'x dropped in', 'drop_in': 'h.0.mlp.c_fc', 'sites': ['h.0.mlp.c_fc'], 'parameters': [9, 5],
        'rows': [{'error': 0.5, 'output_error': 0.4}], 'probe_before': 3.0, 'probe_after': 3.5,
        'damage': {'h.0.mlp.c_fc': 0.1}}
RUN = {'config': {'seed': 1, 'n_layer': 2},
       'env': {'parameters': 9, 'flops_per_token': 18, 'command': ['python'],
               'from': {'init_from': 'y', 'tokens': 7, 'flops': 8.0}},
       'log': [STEP, DROP, {'step': 2, 'probe_loss': 3.1}, {'step': 3, 'change': 'every site is dense', 'probe_before': 3.0,
                                                            'probe_after': 3.1},
               {'step': 4, 'train_loss': 2.5, 'val_loss': 2.6, 'tokens': 512, 'flops': 1e6}]}


def paths(value, prefix=()):
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield *prefix, key
        yield from paths(inner, (*prefix, key))


def put(path, value):
    run = copy.deepcopy(RUN)
    owner = run
    for key in path[:-1]:
        owner = owner[key]
    owner[path[-1]] = value
    return run


def write(folder, run):
    lines = run['log'] if isinstance(run['log'], list) else [run['log']]
    for name, text in (('config.json', json.dumps(run['config'])), ('env.json', json.dumps(run['env'])),
                       ('log.jsonl', ''.join(json.dumps(line) + '\n' for line in lines))):
        (folder / name).write_text(text)


@pytest.mark.parametrize('words', [[], ['--html=page.html'], ['recovery'], ['recovery', '--baseline=*']], ids=' '.join)
def test_every_key_of_a_run_with_every_odd_value(words, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(recovery, 'draw', lambda *arguments: None)
    monkeypatch.setattr(webpage.hardware, 'git', lambda *arguments: '')
    monkeypatch.setattr(webpage, 'write_whole', lambda path, data, disk: path.write_bytes(data))        # without fsync
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'argv', ['compare.py', *words, str(tmp_path)])
    given, codes = list(sys.argv), []
    for run in [RUN, *(put(path, value) for path in paths(RUN) for value in ODD)]:
        write(tmp_path, run)
        sys.argv[:] = given
        try:
            compare.main()
            codes.append(0)
        except SystemExit as leave:
            codes.append(leave.code)
        said = [line for line in capsys.readouterr().err.splitlines() if 'damaged lines are left out' not in line]
        assert codes[-1] in (0, 2) and len(said) == (codes[-1] == 2) and all(len(line) < 450 for line in said)
    assert codes[0] == 0 and {*codes} == {0, 2}


def test_damaged_lines_are_counted_and_left_out(tmp_path, monkeypatch, capsys):
    write(tmp_path, {**RUN, 'log': [*RUN['log'], {'step': 'x', 'val_loss': 1.0}, {'step': 9, 'val_loss': None}]})
    monkeypatch.setattr(sys, 'argv', ['compare.py', str(tmp_path)])
    compare.main()
    out, err = capsys.readouterr()
    assert '| 2.6000 |' in out and err == f'{tmp_path}/log.jsonl: 2 damaged lines are left out\n'
