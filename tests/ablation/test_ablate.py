"""ablate.py in a second process, on a grid of tiny runs."""
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.tiny import ROOT, make_data

GRID = '''"""A tiny grid."""
base = 'config/attention/causal.py'
variants = {'plain': {}, 'low rank': {'linear': {'h.*.mlp.*': 'lowrank(4)', 'h.*.attn.c_v': 'lowrank(3)'}}}
tasks = {'a': {'dataset': 'tiny'}, 'b': {'dataset': 'tiny', 'n_layer': 1}}
only = {'low rank': ['a']}
search = {'learning_rate': [1e-3, 1e-2]}
seeds = 2
'''
SETTINGS = ['--n_head=2', '--n_embd=32', '--block_size=16', '--batch_size=4', '--max_iters=4', '--eval_interval=4',
            '--eval_iters=2', '--warmup_iters=0', '--lr_decay_iters=4', '--min_lr=1e-4', '--device=cpu', '--log_interval=1']


def ablate(*arguments):
    return subprocess.run([sys.executable, ROOT / 'ablate.py', *map(str, arguments)], capture_output=True, text=True,
                          cwd=ROOT, timeout=300)


@pytest.fixture
def grid(tmp_path):
    def write(text=GRID, **changes):
        path = tmp_path / 'grid.py'
        path.write_text(text + ''.join(f'{name} = {value!r}\n' for name, value in changes.items()))
        return path
    return write


def complaint(result):
    assert result.returncode == 2 and 'Traceback' not in result.stderr
    assert result.stderr.count('\n') == 1
    return result.stderr


@pytest.mark.slow
def test_a_grid_searches_runs_the_other_seeds_and_is_not_run_twice(tmp_path, grid):
    data, out = make_data(tmp_path / 'data'), tmp_path / 'out'
    command = [grid(), f'--out_dir={out}', f'--data_dir={data}', '--jobs=2', *SETTINGS]
    result = ablate(*command)
    assert result.returncode == 0, result.stderr
    losses = {}
    for path in out.glob('*/*/*/log.jsonl'):
        values = [json.loads(line) for line in path.read_text().splitlines()]
        losses[str(path.parent.relative_to(out))] = values[-1]['val_loss']
    assert len(losses) == 3 * 2 + 3                                     # the search, then one more seed each
    for where in ('a/plain', 'a/low rank', 'b/plain'):
        first = {rate: losses[f'{where}/learning_rate={rate}_seed=1337'] for rate in ('0.001', '0.01')}
        best = min(first, key=first.get)
        assert f'{where}/learning_rate={best}_seed=1' in losses
    row = next(line for line in result.stdout.splitlines() if line.startswith('| low rank'))
    pair = [v for k, v in losses.items() if k.startswith('a/low rank/learning_rate=0.01')]
    assert f'{sum(pair) / 2:.4f}' in row and '(n=2)' in row
    before = {path: path.stat().st_mtime_ns for path in out.glob('*/*/*/log.jsonl')}
    again = ablate(*command)
    assert again.returncode == 0 and again.stdout.count('(done before)') == 9
    assert {path: path.stat().st_mtime_ns for path in out.glob('*/*/*/log.jsonl')} == before
    report = ablate('report', out)
    assert report.returncode == 0 and row in report.stdout


@pytest.mark.slow
def test_a_failing_variant_is_named_and_the_others_go_on(tmp_path, grid):
    data, out = make_data(tmp_path / 'data'), tmp_path / 'out'
    path = grid(variants={'plain': {}, 'broken': {'device': 'cuda:99'}}, only={}, search={}, seeds=1)
    result = ablate(path, f'--out_dir={out}', f'--data_dir={data}', *SETTINGS)
    assert result.returncode == 1 and 'broken' in result.stderr and 'cuda:99' in result.stderr
    assert '- a broken seed=1337:' in result.stdout.partition('### Failed')[2]
    assert result.stdout.count('| plain |') == 2


@pytest.mark.slow
def test_a_killed_run_goes_on_from_its_checkpoint(tmp_path, grid):
    data, out = make_data(tmp_path / 'data'), tmp_path / 'out'
    path = grid(variants={'plain': {}}, only={}, search={}, seeds=1, tasks={'a': {'dataset': 'tiny'}})
    run = out / 'a' / 'plain' / 'seed=1337'
    command = [path, f'--out_dir={out}', f'--data_dir={data}', *SETTINGS]
    assert ablate(*command, '--save_interval=2').returncode == 0
    whole = (run / 'log.jsonl').read_text().splitlines()
    for newest in sorted(run.glob('ckpt_*'))[-2:]:                      # as if killed after step 2
        newest.unlink()
    (run / 'log.jsonl').write_text('\n'.join(whole[:-1]) + '\n')
    assert ablate(*command, '--save_interval=2').returncode == 0
    assert 'ckpt_00000004.pt' in {p.name for p in run.iterdir()}
    last = json.loads((run / 'log.jsonl').read_text().splitlines()[-1])
    assert last['val_loss'] == json.loads(whole[-1])['val_loss']
    assert json.loads((run / 'env.json').read_text())['command'][-1] == '--init_from=resume'


@pytest.mark.slow
def test_a_grid_killed_in_the_middle_goes_on_and_loses_the_running_run_only(tmp_path, grid):
    """kill -9 of ablate.py and its train.py while the second of three runs trains."""
    data, out = make_data(tmp_path / 'data'), tmp_path / 'out'
    path = grid("base = 'config/attention/causal.py'\n", axes={'mlp': {'linear': {'h.*.mlp.*': 'lowrank(4)'}},
                                                               'finish': {'finish_dense_at': 0.5}},
                needs={'finish': ['mlp']}, tasks={'': {'dataset': 'tiny'}}, seeds=1, controls=False)
    command = [path, f'--out_dir={out}', f'--data_dir={data}', *SETTINGS, '--max_iters=200', '--lr_decay_iters=200',
               '--eval_interval=200', '--save_interval=10']
    first = subprocess.Popen([sys.executable, ROOT / 'ablate.py', *map(str, command)], stdout=subprocess.DEVNULL, cwd=ROOT,
                             start_new_session=True)
    second = out / 'mlp' / 'seed=1337'
    deadline = time.monotonic() + 240
    while not list(second.glob('ckpt_*.json')) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    steps = len((second / 'log.jsonl').read_text().splitlines())
    assert 0 < steps < 200 and not (out / 'mlp+finish').exists()
    finished = (out / 'dense' / 'seed=1337' / 'log.jsonl').stat().st_mtime_ns
    again = ablate(*command)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count('(done before)') == 1 and 'mlp+finish seed=1337: ' in again.stdout
    assert (out / 'dense' / 'seed=1337' / 'log.jsonl').stat().st_mtime_ns == finished
    assert json.loads((second / 'env.json').read_text())['command'][-1] == '--init_from=resume'
    assert (out / 'report.html').exists() and '### Main effects' in again.stdout


def test_the_committed_grids_are_valid(tmp_path):
    for path in (ROOT / 'config' / 'ablation').glob('*.py'):
        result = ablate(path, '--dry_run=True', f'--out_dir={tmp_path}', '--vocab_size=64')
        assert result.returncode == 0, result.stderr


@pytest.mark.parametrize('changes, words', [
    (dict(variants={}), 'needs `base` and `variants`'),
    (dict(variants={'plain': 3}), "variants: 'plain' needs a dict, got 3"),
    (dict(search={'learning_rate': []}), "search: 'learning_rate' needs a list"),
    (dict(only={'plane': ['a']}), "no variant 'plane', did you mean 'plain'?"),
    (dict(variants={'plain': {'n_lyer': 2}}, only={}), "no setting 'n_lyer', did you mean 'n_layer'?"),
    (dict(search={'learning_rate': [-1.0]}), 'learning_rate must be at least 0'),
    (dict(base='config/nowhere.py'), 'config/nowhere.py: there is no such config file'),
    (dict(seeds=11), 'seeds must be at most 10'),
    (dict(jobs=0), 'jobs must be at least 1'),
])
def test_mistakes_are_one_line(grid, changes, words):
    assert words in complaint(ablate(grid(**changes)))


def test_mistakes_of_a_report_are_one_line(tmp_path):
    assert 'name the folder of a grid' in complaint(ablate('report'))
    assert str(tmp_path) in complaint(ablate('report', tmp_path))
