"""wandb and tensorboard: the lines of log.jsonl under the same names, all of which docs/training.md lists; grids grouped."""
import json
import re
import sys
import types

import pytest

import configurator
import train
from ablation import runner
from tests.test_setup import ROOT
from tests.tiny import arguments, make_data


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp('data'))


def run(data, out, *more):
    train.STOP.update(signal=None, time=0.0)
    train.main(configurator.load(arguments(data, out, *more)))
    return [json.loads(line) for line in (out / 'log.jsonl').read_text().splitlines()]


def numbers(lines):
    """{(name, step): value} of the plain numbers in lines of a log."""
    return {(name, line['step']): value for line in lines for name, value in line.items()
            if type(value) in (int, float, bool)}


def test_trackers_get_the_lines_of_the_log(data, tmp_path, monkeypatch):
    tracked, scalars, asked = [], {}, []

    def init(**keywords):
        asked.append(keywords)
        return types.SimpleNamespace(id='a', log=lambda line, step: tracked.append(dict(line)), finish=lambda: None)

    class Writer:
        def __init__(self, folder):
            assert folder == str(tmp_path / 'kron_run' / 'tensorboard')

        def add_scalar(self, name, value, step):
            scalars[name, step] = value

        def close(self):
            scalars['closed'] = True
    monkeypatch.setitem(sys.modules, 'wandb', types.SimpleNamespace(init=init))
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', types.SimpleNamespace(SummaryWriter=Writer))
    monkeypatch.delenv('WANDB_NAME', raising=False)
    lines = run(data, tmp_path / 'kron_run', '--wandb_log=True', '--tensorboard_log=True', '--mlp=kron_moe(experts=4)',
                '--linear={}')
    assert tracked == lines and scalars.pop('closed') and scalars == numbers(lines)
    assert [(k['project'], k['name'], k['resume']) for k in asked] == [('nanokron', 'kron_run', 'allow')]
    assert {'loss', 'val_loss', 'balance_loss', 'expert_load'} <= names(lines)
    assert names(lines) <= documented()


def names(lines):
    return {name for line in lines for name in line}


def documented():
    """The names of the table of metrics in docs/training.md."""
    table = (ROOT / 'docs/training.md').read_text(encoding='utf-8').partition('| metric | unit | when |')[2].split('\n\n')[0]
    return {name for row in table.splitlines() for name in re.findall(r'`(\w+)`', row.split('|')[1] if '|' in row else '')}


def test_names_of_changes_of_the_model_are_documented_too(data, tmp_path):
    lines = run(data, tmp_path, '--grow_from=1', '--grow_every=4', '--linear={}')
    assert 'change' in names(lines) and names(lines) <= documented()


def test_tensorboard_reads_what_was_written(data, tmp_path):
    pytest.importorskip('tensorboard')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    lines = run(data, tmp_path, '--tensorboard_log=True')
    events = EventAccumulator(str(tmp_path / 'tensorboard')).Reload()
    found = {(name, event.step): event.value for name in events.Tags()['scalars'] for event in events.Scalars(name)}
    assert found == {key: pytest.approx(value, rel=1e-6) for key, value in numbers(lines).items()}


def test_a_run_of_a_grid_has_its_name_and_the_grids(tmp_path, monkeypatch):
    seen = {}

    class Process:
        returncode = 1

        def __init__(self, command, env, **_):
            seen.update(env)

        def poll(self):
            return 1
    monkeypatch.setattr(runner.subprocess, 'Popen', Process)
    assert runner.carry_out('dense seed=1', str(tmp_path), [], group='scratch')[0] == 'failed'
    assert (seen['WANDB_NAME'], seen['WANDB_RUN_GROUP']) == ('dense seed=1', 'scratch')
