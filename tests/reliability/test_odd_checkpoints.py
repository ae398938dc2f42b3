"""Every key of a checkpoint with every odd value, for every program that reads one: one line or a run, and no traceback."""
import copy
import io
import math
import sys
import time
from contextlib import redirect_stderr, redirect_stdout

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import configurator
import evaluate
import export
import sample
import train
from checkpoints import checkpoint
from reporting import runlog
from tests.tiny import arguments, make_data

MISSING = 'left out'
ODD = [{}, [], 5, 'x', None, math.inf, math.nan, True, -1, 10**30, -10**400, 0, 0.5, [[]], {'a': {}}, {5: 5}, {'': None},
       'x' * 3000, '\x1b[31m\n', (1, 2), torch.ones(3), torch.tensor(math.nan), MISSING]
KINDS = {'plain': ['--ema_decay=0.9', '--skip_zscore=5.0'],
         'growing': ['--grow_from=1', '--grow_every=3', '--grow_freeze=True', '--linear=h.*.mlp.*=kron(8, 8, terms=2)'],
         'dropping': ['--drop_in=sequential', '--drop_in_every=1', '--drop_in_from=1']}
LARGE = 'model', 'optimizer', 'average'                # of their tensors the first, second and last


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """(data, {kind: (folder, its checkpoint of step 4)})."""
    root, made = tmp_path_factory.mktemp('odd'), {}
    data = make_data(root / 'data')
    (root / 'text').write_text('the cat and a dog sat on my old mat')
    for kind, more in KINDS.items():
        train.STOP.update(signal=None, time=0.0)
        with redirect_stdout(io.StringIO()):
            train.main(configurator.load(arguments(data, root / kind, '--max_iters=8', '--eval_interval=4', '--eval_iters=1',
                                                   *more)))
        (root / kind / 'ckpt_00000008.json').unlink()
        made[kind] = root / kind, checkpoint.load(root / kind)
    return root, made


def paths(value, depth=3, prefix=()):
    """The keys of a checkpoint and of what is in it."""
    if isinstance(value, dict):
        keys = list(value)
        for key in keys if len(prefix) != 1 or prefix[0] not in LARGE else dict.fromkeys([*keys[:2], *keys[-1:]]):
            yield *prefix, key
            if depth:
                yield from paths(value[key], depth - 1, (*prefix, key))
    elif isinstance(value, list) and value and depth:
        yield *prefix, 0


def put(state, path, value):
    state = copy.deepcopy(state)
    owner = state
    for key in path[:-1]:
        owner = owner[key]
    owner[path[-1]] = value
    if value is MISSING:
        del owner[path[-1]]
    return state


def program(module, *words):
    sys.argv = [f'{module.__name__}.py', *map(str, words)]
    module.main()


def one_step(root, out, *more):
    train.main(configurator.load(arguments(root / 'data', root / 'new', '--max_iters=1', '--eval_first=False', '--linear={}',
                                           '--eval_interval=1000', f'--init_from={out}', *more)))


PROGRAMS = {
    'resume': lambda root, out: train.main(configurator.load([f'--out_dir={out}', '--init_from=resume', '--max_iters=5',
                                                              '--eval_interval=1000'])),
    'resume --dry_run': lambda root, out: train.main(configurator.load([f'--out_dir={out}', '--init_from=resume',
                                                                        '--dry_run=True'])),
    'init_from': one_step,
    'init_from --dry_run': lambda root, out: one_step(root, out, '--dry_run=True'),
    'sample': lambda root, out: program(sample, f'--out_dir={out}', '--max_new_tokens=2', '--num_samples=1', '--start=a',
                                        '--device=cpu'),
    'evaluate': lambda root, out: program(evaluate, f'--out_dir={out}', f'--text={root}/text', '--device=cpu'),
    'export': lambda root, out: program(export, f'--out_dir={out}', f'--to={root}/exported')}


def attempt(name, runs, kind, state, monkeypatch):
    """Exit code 0, or 2 with one short line; within two seconds."""
    root, made = runs
    monkeypatch.setattr(checkpoint, 'load', lambda *arguments, **keywords: copy.deepcopy(state))
    train.STOP.update(signal=None, time=0.0)
    said, code, began = io.StringIO(), 0, time.process_time()
    try:
        with redirect_stderr(said), redirect_stdout(io.StringIO()):
            PROGRAMS[name](root, made[kind][0])
    except SystemExit as leave:
        code = leave.code
    assert code in (0, 2), said.getvalue()
    assert code == 0 or said.getvalue().count('\n') == 1 and len(said.getvalue()) < 450, said.getvalue()
    assert time.process_time() - began < 2
    return code


@pytest.fixture
def quiet(monkeypatch):
    """Nothing is written but logs: what is tried here is what is read."""
    monkeypatch.setattr(sys, 'argv', sys.argv)
    monkeypatch.setattr(checkpoint, 'save', lambda *arguments, **keywords: None)
    monkeypatch.setattr(checkpoint, 'set_best', lambda *arguments, **keywords: None)
    monkeypatch.setattr(export, 'write', lambda *arguments: None)
    monkeypatch.setattr(runlog.losses, 'draw', lambda *arguments: None)
    return monkeypatch


def drive(name, runs, quiet, examples, random):
    cases, codes = [(kind, path) for kind, (_, state) in runs[1].items() for path in paths(state)], []
    tops = [(kind, path) for kind, path in cases if path[0] != 'config']

    @settings(max_examples=examples, deadline=None, database=None, derandomize=not random,
              suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(tops) | st.sampled_from(cases), st.sampled_from(ODD))
    def one(case, value):
        codes.append(attempt(name, runs, case[0], put(runs[1][case[0]][1], case[1], value), quiet))
    one()
    assert 2 in codes and (0 in codes or examples < 40)


@pytest.mark.parametrize('name', PROGRAMS)
def test_odd_parts_of_a_checkpoint(name, runs, quiet):
    drive(name, runs, quiet, 40, random=False)


@pytest.mark.slow
@pytest.mark.parametrize('name', PROGRAMS)
def test_many_odd_parts_of_a_checkpoint(name, runs, quiet):
    drive(name, runs, quiet, 1500, random=True)


READERS = ['init_from', 'sample', 'evaluate', 'export']
MOMENT = 'optimizer', 'transformer.wte.weight', 'exp_avg'


@pytest.mark.parametrize('path, value, who', [
    (('data',), 5, READERS), (('data',), {}, READERS),
    (('data',), {'tokenizer': 'hub', 'json': '{"model": {"vocab": {"a": 0}, "merges": 5}}'}, READERS),
    (('built',), 5, PROGRAMS), (('built',), torch.ones(3), PROGRAMS), (('built', 'model'), {'n_layer': 10**12}, PROGRAMS),
    (('built', 'model'), {'n_layer': 2, 'n_embd': 2**20}, PROGRAMS), (('built', 'layers'), 5, ['resume']),
    (('average',), torch.ones(3), PROGRAMS),
    (('average', 'transformer.wte.weight'), MISSING, ['resume']), (('tokens',), 'many', ['resume', *READERS]),
    (MOMENT, torch.ones(3), ['resume']), (MOMENT, MISSING, ['resume']),             # a kernel wrote past the tensor's end
    (('optimizer', 'transformer.wte.weight', 'step'), torch.ones(3), ['resume'])])
def test_parts_that_were_tracebacks_or_worse(path, value, who, runs, quiet):
    for name in PROGRAMS:
        code = attempt(name, runs, 'plain', put(runs[1]['plain'][1], path, value), quiet)
        assert code == 2 or name not in who, name
