"""Folders of runs, grids and studies with damaged files: they are read, or refused in one short line.

A file is cut, has bytes changed, has a value of its JSON replaced or taken away, or something else lies in its place.
"""
import json
import os
import random
import shutil
import signal
import time

import pytest

import ablate
import compare
import compress
import configurator
import train
from ablation import plots
from ablation.grid import Grid
from commandline import bounds
from compression import tables
from compression.study import Study
from growth import recovery
from tests.tiny import arguments, make_data
from variants import UserError

SHORT, LONG, SECONDS = 30, 500, 2       # cases per reader, in 5 readers: 150 and 2,500

ODD = [None, True, 0, -1, 1.5, 10 ** 12, -10 ** 400, 1e308, float('nan'), float('inf'), '', 'x', '../..', 'a\x1b\nb', [],
       [[]], [5], {}, {'a': 1}, {'': {}}, 'x' * 70_000]


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """The files of a real run, in the course of which structures replaced dense matrices; without its checkpoints."""
    folder = tmp_path_factory.mktemp('damaged')
    data = make_data(folder / 'data')
    train.STOP.update(signal=None, time=0.0)
    train.main(configurator.load([*arguments(data, folder / 'run'), '--drop_in=sequential', '--drop_in_from=2',
                                  '--drop_in_every=4', '--drop_in_unit=layer', '--drop_in_report=2']))
    for path in (folder / 'run').glob('ckpt_*'):
        path.unlink()
    return folder / 'run'


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    return path.parent


def a_run(run, out):
    return shutil.copytree(run, out / 'run')


def a_grid(run, out):
    """The folder of a grid of two variants, of which one has a searched value, after its runs."""
    grid = Grid(base='config/kron_mlp.py', out_dir=str(out / 'grid'), seeds=1, search={'learning_rate': [0.01, 0.02]},
                variants={'dense': {'linear': {}}, 'kron': {'linear': {'h.*.mlp.*': 'kron(8, 8)'}}})
    folder = write(out / 'grid' / 'grid.json', configurator.as_dict(grid))
    for variant in grid.variants:
        for rate in (0.01, 0.02):
            place = shutil.copytree(run, folder / variant / f'learning_rate={rate}_seed=1337')
            write(place / 'outcome.json', {'state': 'done', 'words': '', 'seconds': 2.5})
    return folder


TEXT = {'loss': 2.5, 'perplexity': 12.2, 'tokens': 64}
LINE = {'kind': 'zero', 'parameters': 4096, 'share': 0.5, 'total': 30000, 'output_error': 0.25, 'decompose_cpu_s': 0.5,
        'linear': {'h.*.mlp.*': 'lowrank(4)'}, 'select': TEXT, 'test': TEXT}


def a_study(run, out):
    """The folder of a study with its finished trials."""
    study = Study(source='x', dataset='tiny', budgets={'half': 0.5}, select='val:0:64', test='val:64:128',
                  variants={'a': {'linear': 'lowrank(4)'}, 'b': {'linear': 'lowrank(4)', 'decompose': 'svd'}},
                  baseline='svd')
    folder = write(out / 'study' / 'study.json', configurator.as_dict(study))
    lines = [{**LINE, 'signature': compress.signature(study, trial), 'variant': trial.variant, 'budget': trial.budget,
              'source': trial.source, 'seed': trial.seed, 'time': ''} for trial in compress.trials(study)]
    (folder / compress.RESULTS).write_text(''.join(json.dumps(line) + '\n' for line in lines))
    return folder


# what reads a folder -> (who makes one, what is done)
READERS = {
    'compare': (a_run, lambda folder: compare.report(compare.compare, [str(folder)], compare.CompareConfig())),
    'recovery': (a_run, lambda folder: compare.report(compare.recover, [str(folder)], compare.RecoveryConfig())),
    'savings': (a_run, lambda folder: compare.report(compare.recover, [str(folder)], compare.RecoveryConfig(baseline='*'))),
    'ablate report': (a_grid, lambda folder: ablate.report(str(folder))),
    'compress report': (a_study, lambda folder: compress.report(str(folder))),
}


# ----------------------------------------------------------------------------------------------------
# damage

def places(value, path=()):
    """The paths to all parts of a JSON value."""
    yield path
    for key, part in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(part, (*path, key))


def odd_part(value, draw):
    """The JSON value with one part replaced by an odd one, or taken away."""
    path = draw.choice(list(places(value)))
    if not path:
        return draw.choice(ODD)
    inner = value
    for key in path[:-1]:
        inner = inner[key]
    if draw.random() < 0.2:
        del inner[path[-1]]
    else:
        inner[path[-1]] = draw.choice(ODD)
    return value


def odd_json(data, draw):
    """A file of JSON, or of lines of JSON, with one odd part."""
    lines = data.split(b'\n') if data.count(b'\n{') else [data]
    at = draw.randrange(len([line for line in lines if line]))
    lines[at] = json.dumps(odd_part(json.loads(lines[at]), draw)).encode()
    return b'\n'.join(lines)


def odd_bytes(data, draw):
    changed = bytearray(data)
    for _ in range(draw.randrange(1, 9)):
        changed[draw.randrange(len(changed))] = draw.choice(b'0123456789"[]{}:,-.eEnt \\\n\x00\xff')
    return bytes(changed)


def damage(path, draw):
    """Damage one file; returns what was done."""
    kind = draw.choice(['part'] * 12 + ['bytes'] * 5 + ['cut', 'empty', 'deep', 'gone', 'folder', 'pipe', 'loop'])
    data = path.read_bytes()
    if kind in ('part', 'bytes', 'cut', 'empty', 'deep'):
        path.write_bytes({'part': odd_json, 'bytes': odd_bytes, 'cut': lambda d, r: d[:r.randrange(len(d))],
                          'empty': lambda d, r: b'', 'deep': lambda d, r: b'[' * 100_000}[kind](data, draw))
        return kind
    path.unlink()
    {'gone': lambda p: None, 'folder': os.mkdir, 'pipe': os.mkfifo, 'loop': lambda p: p.symlink_to(p)}[kind](path)
    return kind


def overdue(*arguments):
    raise AssertionError('it hangs')


def drive(reader, run, tmp_path, cases, count, capsys, monkeypatch):
    """Damage a folder anew for each case. No pictures: they would take most of the time."""
    make, act = READERS[reader]
    for module, name in ((plots, 'draw'), (recovery, 'draw'), (tables, 'plot')):
        monkeypatch.setattr(module, name, lambda *arguments: [])
    whole = make(run, tmp_path / 'whole')
    act(whole)                                          # what is whole is read
    before, draw, ends = signal.signal(signal.SIGALRM, overdue), random.Random(reader), set()
    files = sorted(path.relative_to(whole) for path in whole.rglob('*.json*'))
    try:
        for number in range(cases):
            folder = shutil.copytree(whole, tmp_path / f'{number}')
            file = draw.choice(files)
            what = damage(folder / file, draw)
            with count():
                ends.add(attempt(act, folder, f'case {number}: {what} in {file}'))
            shutil.rmtree(folder)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert 'read' in ends and ('refused' in ends or cases == SHORT)


def attempt(act, folder, case):
    """'read' or 'refused'; anything else fails, a hang included."""
    signal.alarm(20)
    began = time.process_time()
    try:
        act(folder)
        end = 'read'
    except UserError as error:
        assert 0 < len(str(error)) <= bounds.MESSAGE and str(error).isprintable(), case
        end = 'refused'
    except SystemExit:
        raise AssertionError(case) from None
    assert time.process_time() - began < SECONDS, case
    return end


@pytest.mark.parametrize('reader', READERS)
def test_no_damaged_folder_escapes(reader, run, tmp_path, count, capsys, monkeypatch):
    drive(reader, run, tmp_path, SHORT, count, capsys, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize('reader', READERS)
def test_none_of_2_500_damaged_folders_escapes(reader, run, tmp_path, count, capsys, monkeypatch):
    drive(reader, run, tmp_path, LONG, count, capsys, monkeypatch)
