"""training/threads.py: the number of CPU threads is measured once, said, kept, and changes nothing else."""
import json

import pytest
import torch

import configurator
import train
from checkpoints import checkpoint
from tests.tiny import arguments, make_data
from training import threads


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp('data'))


@pytest.fixture
def four(monkeypatch):
    """A machine of four cores on which nothing says how many to use: the calls of set_num_threads."""
    calls = []
    monkeypatch.delenv('OMP_NUM_THREADS', raising=False)
    monkeypatch.setattr(torch, 'get_num_threads', lambda: 4)
    monkeypatch.setattr(torch, 'set_num_threads', calls.append)
    return calls


def run(data, out, *more):
    train.STOP.update(signal=None, time=0.0)
    train.main(configurator.load([*arguments(data, out), *more]))
    return checkpoint.load(out)


def climb(times, monkeypatch):
    monkeypatch.setattr(threads, 'REPEATS', 1)
    return threads.climb(times.__getitem__, threads.counts(max(times)))


@pytest.mark.parametrize('times,best', [
    ({1: 1.0, 2: 2.0, 4: 0.1}, 1),                      # two slow each other: four are not tried
    ({1: 1.0, 2: 0.6, 4: 0.5}, 4),
    ({1: 1.0, 2: 0.6, 4: 0.59}, 2),                     # a gain too small for two more threads
    ({1: 1.0, 2: 0.97}, 1),
    ({1: 1.0, 2: 0.6, 4: 0.4, 6: 0.35}, 6)])
def test_threads_are_added_while_they_gain(times, best, monkeypatch):
    assert climb(times, monkeypatch)[0] == best


def test_counts_end_at_the_most():
    assert [threads.counts(n) for n in (1, 2, 3, 8, 12)] == [[1], [1, 2], [1, 2, 3], [1, 2, 4, 8], [1, 2, 4, 8, 12]]


def test_the_choice_is_said_and_kept_on_resume(data, tmp_path, four, monkeypatch, capsys):
    monkeypatch.setattr(threads, 'passes', lambda *run: {1: 0.03, 2: 0.02, 4: 0.05}.__getitem__)
    state = run(data, tmp_path / 'out')
    said = 'CPU threads: 2, as a forward and backward pass takes 30 ms with 1, 20 ms with 2, 50 ms with 4; --threads='
    assert said in capsys.readouterr().out and four == [2]
    assert state['config']['threads'] == json.loads((tmp_path / 'out/config.json').read_text())['threads'] == 2
    monkeypatch.setattr(threads, 'passes', None)
    run(data, tmp_path / 'out', '--init_from=resume', '--max_iters=22')
    assert four == [2, 2] and 'CPU threads' not in capsys.readouterr().out


@pytest.mark.parametrize('given', [{'OMP_NUM_THREADS': '4'}, {'--deterministic': 'True'}, {'--threads': '3'}])
def test_nothing_is_measured_where_it_is_said(given, data, tmp_path, four, monkeypatch):
    monkeypatch.setattr(threads, 'passes', None)
    options = [f'{name}={value}' for name, value in given.items() if name.startswith('--')]
    for name in given.keys() - {'--deterministic', '--threads'}:
        monkeypatch.setenv(name, given[name])
    run(data, tmp_path / 'out', *options)
    assert four == ([3] if '--threads' in given else [])


def test_long_steps_are_not_measured(data, tmp_path, four, monkeypatch):
    monkeypatch.setattr(threads, 'passes', None)
    monkeypatch.setattr(threads, 'LARGE', 0)
    run(data, tmp_path / 'out')
    assert four == []


def test_measuring_changes_no_weight_and_no_randomness(data, tmp_path, four):
    """The same run with and without it, dropout and a mixture of experts included, whose buffers a pass moves."""
    more = ['--dropout=0.2', '--mlp=kron_moe(4, top_k=2)', '--linear=dense']
    measured = run(data, tmp_path / 'a', *more)
    assert len(four) > 2                                # it was measured
    said = run(data, tmp_path / 'b', '--threads=1', *more)
    assert measured['model'].keys() == said['model'].keys()
    assert all(torch.equal(value, said['model'][name]) for name, value in measured['model'].items())
