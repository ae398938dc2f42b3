"""Checkpoint files against kills at every point, lost writes, damage, hostile contents, full disks and neighbours."""
import errno
import json
import os
import pickle
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from checkpoints import checkpoint, torchfile
from checkpoints.checkpoint import Lock, best, load, newest, save, set_aside, set_best, steps
from tests.reliability.disks import Counting, Full, Hasty, Journal, Killed, in_child
from tests.reliability.hostile import HOSTILE, container, pickled, shell, stream, tensor, text
from variants import UserError

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / 'tests' / 'golden'
MIB, GIB = 2 ** 20, 2 ** 30


def state(step, size=24, flavour=0):
    """What a checkpoint holds, in small: values follow from (step, flavour)."""
    draw = torch.Generator().manual_seed(1000 * step + flavour)
    weight = torch.randn(size, size, generator=draw)
    return {
        'step': step,
        'model': {'h.0.c_fc.weight': weight, 'h.0.bias': torch.arange(5.).bfloat16() + step, 'tied': weight},
        'optimizer': {'h.0.c_fc.weight': {'exp_avg': weight / 3, 'step': torch.tensor(float(step))}},
        'rng': torch.randint(0, 256, (64,), generator=draw, dtype=torch.uint8),
        'config': {'n_layer': 2, 'linear': {'h.*': 'kron(8, 8)'}, 'bias': False, 'note': None, 'betas': (0.9, 0.95)},
        'best_val_loss': float('inf'), 'flavour': flavour, 'losses': [1.5, 2.5], 'big': 2 ** 80, 'text': 'grüße\nc a\n',
    }


def same(a, b):
    if torch.is_tensor(a) or torch.is_tensor(b):
        return (type(a) is type(b) and a.dtype == b.dtype and a.shape == b.shape
                and a.contiguous().view(-1).view(torch.uint8).equal(b.contiguous().view(-1).view(torch.uint8)))
    if isinstance(a, dict) and isinstance(b, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def is_state(got, *arguments, **keywords):
    return same(got, {**state(*arguments, **keywords), 'schema': checkpoint.SCHEMA})


def filled(folder, *numbers, best_step=None, keep=9, **keywords):
    for step in numbers:
        save(folder, state(step, **keywords), keep, Hasty())
    if best_step is not None:
        set_best(folder, best_step, 1.25, Hasty())
    return folder


def refused(function, *arguments, error=UserError, **keywords):
    """The one line with which a call is refused."""
    with pytest.raises(error) as caught:
        function(*arguments, **keywords)
    assert '\n' not in str(caught.value) and len(str(caught.value)) < 1000
    return str(caught.value)


def leftovers(folder):
    return [path.name for path in folder.iterdir() if '.tmp' in path.name]


# ----------------------------------------------------------------------------------------------------
# what a checkpoint is

def test_what_was_saved_comes_back(tmp_path):
    path = save(tmp_path / 'a' / 'b', state(20))
    assert path == tmp_path / 'a' / 'b' / 'ckpt_00000020.pt' == newest(path.parent)
    for place in (path.parent, str(path.parent), path):
        assert is_state(load(place), 20)
    assert sorted(os.listdir(path.parent)) == ['ckpt_00000020.json', 'ckpt_00000020.pt']


def test_files_are_the_ones_that_the_design_names(tmp_path):
    import hashlib
    path = save(tmp_path, state(7))
    assert is_state(torch.load(path, weights_only=True), 7)             # readable without us
    assert json.loads(path.with_suffix('.json').read_text()) == {
        'sha256': hashlib.sha256(path.read_bytes()).hexdigest(), 'size': path.stat().st_size, 'step': 7, 'schema': 1}
    set_best(tmp_path, 7, 1.5)
    assert json.loads((tmp_path / 'best.json').read_text()) == {'step': 7, 'val_loss': 1.5} == best(tmp_path)


def test_state_dicts_of_modules_and_tied_weights(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    model[1].weight = model[0].weight
    save(tmp_path, {'step': 0, 'model': model.state_dict(), 'parameter': model[0].weight})
    got = load(tmp_path)['model']
    assert got['0.weight'].data_ptr() == got['1.weight'].data_ptr()
    model.load_state_dict(got)


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64,
                                   torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool])
def test_dtypes_are_kept(tmp_path, dtype):
    save(tmp_path, {'step': 1, 'model': {'x': torch.arange(6).to(dtype).view(2, 3).t(), 'empty': torch.zeros(0, 3)}})
    got = load(tmp_path)['model']
    assert got['x'].dtype == dtype and got['x'].equal(torch.arange(6).to(dtype).view(2, 3).t())
    assert got['empty'].shape == (0, 3)


class Odd:
    pass


@pytest.mark.parametrize('value, word', [
    (Odd(), 'Odd'), (lambda: 0, 'lambda'), (np.float64(1), 'numpy'), (np.zeros(2), 'numpy'), ({1}, 'set'),
    (torch.__version__, 'TorchVersion'), (Path('x'), 'Path'), (1j, 'complex'), (torch.zeros(2, dtype=torch.uint16), 'v3'),
    (torch.float32, 'float32'), (torch.zeros(1).expand(10 ** 9), 'larger than the file'),
    (torch.zeros(2, 2).to_sparse(), 'sparse'), (bytearray(3), 'bytearray')], ids=lambda value: str(type(value).__name__))
def test_what_could_not_be_read_back_is_not_written(tmp_path, value, word):
    filled(tmp_path, 10)
    assert word in refused(save, tmp_path, {**state(20), 'extra': [value]}, error=ValueError)
    assert steps(tmp_path) == [10] and not leftovers(tmp_path)


def test_deep_and_circular_states_are_not_written(tmp_path):
    deep, ring = [], []
    for _ in range(40):
        deep = [deep]
    ring.append(ring)
    assert '32 levels' in refused(save, tmp_path, {**state(1), 'x': deep}, error=ValueError)
    save(tmp_path, {**state(2), 'x': ring})             # one list, and it says so
    assert load(tmp_path)['x'][0][0] is load(tmp_path)['x'] or steps(tmp_path) == [2]


@pytest.mark.parametrize('value', [float('nan'), float('inf'), -float('inf')])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_weights_that_are_not_finite_are_never_saved(tmp_path, value, dtype):
    filled(tmp_path, 10)
    broken = state(20)
    broken['model']['h.0.bias'] = torch.tensor([1, value, 2], dtype=dtype)
    assert 'h.0.bias holds values that are not finite' in refused(save, tmp_path, broken, error=ValueError)
    assert sorted(os.listdir(tmp_path)) == ['ckpt_00000010.json', 'ckpt_00000010.pt']


@pytest.mark.parametrize('step', [-1, 1.0, True, None, '3', torch.tensor(3)])
def test_steps_are_whole_numbers(tmp_path, step):
    refused(save, tmp_path, {**state(0), 'step': step}, error=ValueError)
    assert not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------------------------------
# which are kept, which are taken

def test_the_newest_stay_and_the_best(tmp_path):
    for step in range(0, 80, 10):
        save(tmp_path, state(step), keep=3)
        if step == 20:
            set_best(tmp_path, 20, 1.0)
    assert steps(tmp_path) == [20, 50, 60, 70] and is_state(load(tmp_path, 'best'), 20)
    set_best(tmp_path, 70, 0.5)
    save(tmp_path, state(80), keep=2)                   # the best is not counted
    assert steps(tmp_path) == [60, 70, 80] and newest(tmp_path, 'best').name == 'ckpt_00000070.pt'
    assert sorted(os.listdir(tmp_path)) == sorted([f'ckpt_000000{s}.{x}' for s in (60, 70, 80) for x in ('pt', 'json')]
                                                  + ['best.json'])


@pytest.mark.parametrize('keep', [1, 0, -3])
def test_one_checkpoint_is_not_enough(tmp_path, keep):
    assert f'at least 2, so that one can be damaged, got {keep}' in refused(save, tmp_path, state(1), keep=keep)


def test_steps_are_numbers_not_words(tmp_path):
    filled(tmp_path, 99_999_999, 5)
    filled(tmp_path, 5, 99_999_999, 100_000_000, keep=2)
    assert steps(tmp_path) == [99_999_999, 100_000_000] and is_state(load(tmp_path), 100_000_000)


def test_going_on_from_an_older_step_gives_the_newer_ones_up(tmp_path):
    filled(tmp_path, 10, 20, 30)
    save(tmp_path, state(15))
    assert steps(tmp_path) == [10, 15]


def test_other_files_are_left_alone(tmp_path):
    names = ['notes.txt', 'ckpt.pt', 'ckpt_1.pt', 'ckpt_final.json', 'log.jsonl', 'ckpt_00000005.pt.bak']
    for name in names:
        (tmp_path / name).write_text('mine')
    filled(tmp_path, *range(9), keep=2)
    assert {path.name for path in tmp_path.iterdir() if path.read_bytes() == b'mine'} == set(names)
    assert steps(tmp_path) == [7, 8]


def test_no_checkpoint_and_no_best(tmp_path):
    for folder in (tmp_path, tmp_path / 'nowhere'):
        assert 'has no checkpoint' in refused(load, folder) and str(folder) in refused(load, folder)
        assert newest(folder) is None and steps(folder) == [] and best(folder) is None
        assert 'has no checkpoint' in refused(load, folder, 'best')
    filled(tmp_path, 3)
    assert '--which=last' in refused(load, tmp_path, 'best') and newest(tmp_path, 'best') is None
    assert "'newest'" in refused(load, tmp_path, 'newest')
    assert 'no-such.pt' in refused(load, tmp_path / 'no-such.pt')


@pytest.mark.parametrize('step, loss', [(4, 1.0), (3, float('nan')), (3, float('inf'))])
def test_the_best_must_be_saved_and_finite(tmp_path, step, loss):
    filled(tmp_path, 3)
    refused(set_best, tmp_path, step, loss, error=ValueError)
    assert best(tmp_path) is None


@pytest.mark.parametrize('words', ['', 'x', '[' * 4000, '{"step": "../../x", "val_loss": 1.0}', '{"step": 3}', '[]',
                                   '{"step": true, "val_loss": 1.0}', '{"step": 3, "val_loss": NaN}', '\0' * 30])
def test_a_damaged_best_json_names_nothing(tmp_path, words):
    filled(tmp_path, 3)
    (tmp_path / 'best.json').write_text(words)
    assert best(tmp_path) is None and is_state(load(tmp_path), 3)
    assert 'no checkpoint named as the best' in refused(load, tmp_path, 'best')
    save(tmp_path, state(4))


def test_a_best_that_is_damaged_has_no_stand_in(tmp_path):
    filled(tmp_path, 10, 20, best_step=10)
    (tmp_path / 'ckpt_00000010.pt').write_bytes(b'x')
    assert 'ckpt_00000010.pt is damaged' in refused(load, tmp_path, 'best')
    assert newest(tmp_path, 'best') is None


# ----------------------------------------------------------------------------------------------------
# R2: killed after every operation of a save

SCENES = {                      # name: (saved before, best before, what is done, newest before, newest after)
    'first save': ([], None, lambda f, ops: save(f, state(10), ops=ops), None, (10,)),
    'save with prune': ([10, 20, 30], None, lambda f, ops: save(f, state(40), keep=2, ops=ops), (30,), (40,)),
    'save that spares the best': ([10, 20, 30], 10, lambda f, ops: save(f, state(40), keep=2, ops=ops), (30,), (40,)),
    'save of the best': ([10, 20], 10, lambda f, ops: set_best(f, 20, 0.5, ops), (20,), (20,)),
    'same step again': ([10, 20], 10, lambda f, ops: save(f, state(20, flavour=1), ops=ops), (20,), (20, 24, 1)),
    'only step again': ([20], 20, lambda f, ops: save(f, state(20, flavour=1), ops=ops), (20,), (20, 24, 1)),
    'back to an older step': ([10, 20, 30], None, lambda f, ops: save(f, state(15), ops=ops), (30,), (15,)),
}


def setting(folder, name):
    """The scene's folder, with what a killed save left behind."""
    before, best_step, *_ = SCENES[name]
    folder.mkdir()
    filled(folder, *before, best_step=best_step)
    (folder / 'ckpt_00000035.pt.tmp').write_bytes(b'half')
    return folder


def newest_state(folder, name):
    """'old' or 'new': which one a reader finds; anything else fails."""
    _, best_step, _, old, new = SCENES[name]
    try:
        got = load(folder)
    except UserError as error:
        assert old is None and 'has no checkpoint' in str(error), error
        return 'old'
    matches = [word for word, expected in (('old', old), ('new', new)) if expected and is_state(got, *expected)]
    assert matches, f'step {got["step"]} is neither the old nor the new state'
    for step in steps(folder):
        assert load(folder / f'ckpt_{step:08d}.pt')['step'] == step
    if best_step:
        named = best(folder)['step']
        assert named == best_step or (name == 'save of the best' and named == 20)
        assert load(folder, 'best')['step'] == named
    return matches[0] if old != new else 'new' if best(folder)['step'] == 20 else 'old'


def goes_on(folder):
    """The next save works and tidies up."""
    save(folder, state(50), 2, Hasty())
    assert is_state(load(folder), 50) and not leftovers(folder)
    data = {path.stem for path in folder.glob('ckpt_*.pt')}
    assert data == {f'ckpt_{step:08d}' for step in steps(folder)} and len(data) <= 3


@pytest.mark.parametrize('half', [False, True], ids=['between', 'inside writes'])
@pytest.mark.parametrize('name', SCENES)
def test_r2_killed_after_every_operation(tmp_path, capfd, count, name, half):
    counting = Counting()
    SCENES[name][2](setting(tmp_path / 'whole', name), counting)
    total, seen = len(counting.done), []
    assert newest_state(tmp_path / 'whole', name) == 'new' and total >= 5
    for k in range(total + 1):
        if half and 'write' != (counting.done + [None])[k]:
            continue
        folder = setting(tmp_path / str(k), name)
        with count():
            status = in_child(SCENES[name][2], folder, Killed(k + half, half))
            assert status == signal.SIGKILL
            seen.append(newest_state(folder, name))
            goes_on(folder)
    assert seen == sorted(seen, reverse=True) and seen[0] == 'old' and (half or seen[-1] == 'new')
    assert len(seen) == (counting.done.count('write') if half else total + 1)
    assert capfd.readouterr().err == ''                 # nothing looked damaged on the way


def test_r2_a_damaged_step_is_saved_again(tmp_path, capfd, count):
    """What was damaged before the save must not count after a kill in its midst."""
    seen, k, status = [], 0, signal.SIGKILL
    while status == signal.SIGKILL:
        folder = filled(tmp_path / str(k), 10, 20)
        path = folder / 'ckpt_00000020.pt'
        path.write_bytes(path.read_bytes().replace(state(20)['rng'].numpy().tobytes(), bytes(64)))
        with count():
            status = in_child(save, folder, state(20, flavour=1), 3, Killed(k))
            got = load(folder)
            assert is_state(got, 10) or is_state(got, 20, flavour=1)
        seen.append(got['step'])
        k += 1
    assert status == 0 and seen == sorted(seen) and set(seen) == {10, 20} and k >= 11
    assert 'Traceback' not in capfd.readouterr().err


def naive_save(folder, state, ops):
    """nanoGPT's way: over the only file, in place."""
    with ops.open(folder / 'ckpt.pt') as file:
        ops.write(file, torchfile.dumps(state))


def test_r2_would_catch_a_writer_in_place(tmp_path):
    outcomes = set()
    for k in range(1, 3):
        for half in (False, True):
            naive_save(tmp_path, state(10), Counting())
            in_child(naive_save, tmp_path, state(20), Killed(k, half))
            try:
                outcomes.add(torch.load(tmp_path / 'ckpt.pt', weights_only=True)['step'])
            except Exception:
                outcomes.add('lost')
    assert 'lost' in outcomes


# ----------------------------------------------------------------------------------------------------
# R3: the power goes, and with it what was not synced

def after_power_cuts(folder, name, syncs=True):
    """[(which state was found or what went wrong)] over every folder that a power cut during the scene could leave."""
    journal = Journal(setting(folder / 'live', name), syncs)
    SCENES[name][2](folder / 'live', journal)
    found = []
    for number_, disk in enumerate(journal.disks):
        cut = folder / str(number_)
        cut.mkdir()
        for file, data in disk:
            (cut / file).write_bytes(data)
        try:
            found.append(newest_state(cut, name))
            goes_on(cut)
        except (AssertionError, UserError) as error:
            found.append(f'wrong: {error}')
    return found


@pytest.mark.parametrize('name', SCENES)
def test_r3_writes_that_were_not_synced_are_lost(tmp_path, capfd, count, name):
    found = after_power_cuts(tmp_path, name)
    count.add(len(found), sum(word in ('old', 'new') for word in found))
    assert set(found) == {'old', 'new'} and len(found) >= 6, (len(found), set(found))
    assert 'damaged' not in capfd.readouterr().err


def test_r3_would_catch_a_save_that_does_not_sync(tmp_path):
    assert any(word.startswith('wrong') for word in after_power_cuts(tmp_path, 'first save', syncs=False))


# ----------------------------------------------------------------------------------------------------
# R6: damage

def flip(data, draw):
    place = draw.randrange(8 * len(data))
    return data[:place // 8] + bytes([data[place // 8] ^ 1 << place % 8]) + data[place // 8 + 1:]


def cut(data, draw):
    return data[:draw.randrange(len(data))]


def zero_page(data, draw):
    start = draw.randrange(len(data) // 4096) * 4096
    return data[:start] + bytes(4096) + data[start + 4096:]


DAMAGE = {'flipped bits': flip, 'truncations': cut, 'zeroed pages': zero_page}


@pytest.fixture(scope='module')
def two(tmp_path_factory):
    """A folder with steps 10 and 20 of 0.4 MiB each."""
    return filled(tmp_path_factory.mktemp('two'), 10, 20, size=224)


@pytest.mark.parametrize('kind', DAMAGE)
def test_r6_a_damaged_newest_checkpoint_is_passed_over(two, capsys, count, kind):
    path, draw, caught = two / 'ckpt_00000020.pt', random.Random(kind), 0
    whole = path.read_bytes()
    try:
        for _ in range(100):
            damaged = DAMAGE[kind](whole, draw)
            assert damaged != whole
            path.write_bytes(damaged)
            with count():
                assert newest(two).name == 'ckpt_00000010.pt'
                assert is_state(load(two), 10, size=224)
                warning = capsys.readouterr().err
                assert warning.count('\n') == 1 and 'ckpt_00000020.pt is damaged' in warning
            caught += 1
    finally:
        path.write_bytes(whole)
    assert caught == 100 and is_state(load(two), 20, size=224)


def test_r6_torch_alone_would_let_it_pass(two, tmp_path):
    """The control: the same flips without our hash."""
    whole, draw, silent = (two / 'ckpt_00000020.pt').read_bytes(), random.Random(0), 0
    for _ in range(20):
        (tmp_path / 'x.pt').write_bytes(flip(whole, draw))
        try:
            silent += not is_state(torch.load(tmp_path / 'x.pt', weights_only=True), 20, size=224)
        except Exception:
            continue
    assert silent >= 10


def test_r6_a_damaged_manifest_never_gives_wrong_values(two, capsys, count):
    path, draw = two / 'ckpt_00000020.json', random.Random(1)
    whole = path.read_bytes()
    kinds = [flip] * 60 + [cut] * 20 + [lambda data, draw: b'', lambda data, draw: bytes(len(data)),
                                        lambda data, draw: b'[' * 100_000]
    try:
        for kind in kinds:
            path.write_bytes(kind(whole, draw))
            with count():
                got = load(two)
                warning = capsys.readouterr().err
                assert is_state(got, got['step'], size=224) and warning.count('\n') == (got['step'] == 10)
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize('kind', DAMAGE)
def test_r6_the_only_checkpoint_is_damaged(tmp_path, capsys, count, kind):
    filled(tmp_path, 20, size=64)
    path, draw = tmp_path / 'ckpt_00000020.pt', random.Random(kind)
    whole = path.read_bytes()
    for _ in range(10):
        path.write_bytes(DAMAGE[kind](whole, draw))
        with count():
            line = refused(load, tmp_path)
            assert 'no usable checkpoint: ckpt_00000020.pt is damaged' in line and str(tmp_path) in line
            assert 'is damaged' in refused(load, path) and 'is damaged' in refused(load, path, allow_unverified=True)
    assert capsys.readouterr().err == ''                # the one line is the error's


def test_r6_several_damaged_ones(tmp_path, capsys):
    filled(tmp_path, 10, 20, 30, 40)
    (tmp_path / 'ckpt_00000040.pt').write_bytes(b'')
    (tmp_path / 'ckpt_00000030.json').write_text('{}')
    assert is_state(load(tmp_path), 20)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and 'ckpt_00000040.pt' in lines[0] and 'ckpt_00000030.json' in lines[1]
    save(tmp_path, state(25))
    assert steps(tmp_path) == [10, 20, 25]              # and later runs are not warned for ever


def test_files_that_changed_names_or_cannot_be_read(tmp_path, capsys):
    filled(tmp_path, 10, 20)
    for suffix in ('.pt', '.json'):
        (tmp_path / f'ckpt_00000010{suffix}').rename(tmp_path / f'ckpt_00000030{suffix}')
    assert is_state(load(tmp_path), 20) and 'manifest of step 10' in capsys.readouterr().err
    (tmp_path / 'ckpt_00000020.pt').unlink()
    assert 'manifest of step 10' in refused(load, tmp_path)


# ----------------------------------------------------------------------------------------------------
# R7: files made to harm

def agree(path, **changes):
    """A manifest that takes the file at path, as an attacker would write it."""
    import hashlib
    manifest = {'sha256': hashlib.sha256(path.read_bytes()).hexdigest(), 'size': path.stat().st_size, 'step': 1,
                'schema': 1, **changes}
    path.with_suffix('.json').write_text(json.dumps(manifest))
    return path


def memory(key):
    return next(int(line.split()[1]) * 1024 for line in open('/proc/self/status') if line.startswith(key))


def attacked(folder, data, **keywords):
    """Load it in a child that fails if it takes 2 s of CPU or 1 GiB, or if the answer is not one line."""
    def attempt():
        resource.setrlimit(resource.RLIMIT_AS, (memory('VmSize') + 32 * GIB,) * 2)
        start = memory('VmSize'), memory('VmRSS'), time.process_time()
        message = refused(load, folder, **keywords)
        used = time.process_time() - start[2]
        assert used < 2 and memory('VmPeak') - start[0] < GIB and memory('VmHWM') - start[1] < GIB, (used, message)
    assert in_child(attempt) == 0


@pytest.mark.parametrize('name', HOSTILE)
def test_r7_hostile_files_are_refused(tmp_path, capfd, count, name):
    canary, path = tmp_path / 'canary', tmp_path / 'out' / 'ckpt_00000001.pt'
    path.parent.mkdir()
    path.write_bytes(HOSTILE[name](canary))
    with count():
        attacked(path, name, allow_unverified=True)
    agree(path)
    with count():
        attacked(path.parent, name)
    assert not canary.exists() and sorted(os.listdir(tmp_path)) == ['out']
    assert sorted(os.listdir(path.parent)) == ['ckpt_00000001.json', 'ckpt_00000001.pt']
    assert capfd.readouterr().err == ''


def test_r7_the_canary_is_alive(tmp_path):
    """The control: a reader that trusts the file runs its code."""
    assert in_child(pickle.loads, shell(tmp_path / 'canary')) == 0 and (tmp_path / 'canary').exists()


def test_r7_the_tools_that_make_them_can_make_good_ones(tmp_path):
    path = tmp_path / 'ckpt_00000001.pt'
    path.write_bytes(container(stream(tensor(3, 2, 1, offset=1)), [('data/0', torch.arange(3.).numpy().tobytes())]))
    assert load(agree(path))['model'].tolist() == [1, 2]
    path.write_bytes(container(pickled({'paths': ['../../etc/passwd', '/dev/zero']})))
    assert load(agree(path))['model'] == {'paths': ['../../etc/passwd', '/dev/zero']}       # text stays text


@pytest.mark.parametrize('changes', [
    {'size': float('nan')}, {'size': float('inf')}, {'size': -1}, {'size': '400'}, {'sha256': None}, {'sha256': 5},
    {'sha256': ['x']}, {'step': True}, {'step': 1.0}, {'step': -1}, {'schema': '1'}, {'schema': None}, {'step': 10 ** 30}])
def test_r7_hostile_manifests(tmp_path, changes):
    path = tmp_path / 'ckpt_00000001.pt'
    path.write_bytes(container(stream(b'K\x01')))
    assert load(agree(path))['model'] == 1
    agree(path, **changes)
    assert 'no usable checkpoint' in refused(load, tmp_path)


def test_r7_a_manifest_is_short(tmp_path):
    path = agree(save(tmp_path, state(1)))
    assert is_state(load(tmp_path), 1)
    path.with_suffix('.json').write_text(' ' * 5000 + path.with_suffix('.json').read_text())
    assert 'ckpt_00000001.json is damaged' in refused(load, tmp_path)


def test_r7_contents_must_agree_with_the_name(tmp_path):
    path = tmp_path / 'ckpt_00000001.pt'
    index = stream(b'K\x01')
    for changed in (index.replace(text('step') + b'K\x01', text('step') + b'K\x02'),
                    index.replace(text('schema') + b'K\x01', text('schema') + b'N')):
        path.write_bytes(container(changed))
        assert 'another step than its name says, or no schema' in refused(load, agree(path).parent)


def test_a_single_file_without_manifest_needs_leave(tmp_path):
    path = filled(tmp_path, 10) / 'ckpt_00000010.pt'
    path.with_suffix('.json').rename(tmp_path / 'elsewhere.json')
    assert 'ckpt_00000010.json' in refused(load, path)
    assert 'has no checkpoint' in refused(load, tmp_path) and newest(tmp_path) is None
    assert is_state(load(path, allow_unverified=True), 10)


# ----------------------------------------------------------------------------------------------------
# R12: disks that are full or may not be written

def filled_up(folder, name, k, capfd):
    """Whether a scene whose k-th operation finds the disk full failed; what is there afterwards is sound either way."""
    failed = False
    try:
        SCENES[name][2](folder, Full(k))
        found = newest_state(folder, name)                          # only the pruning failed
        assert found == 'new' or name == 'back to an older step'
        assert 'older checkpoints could not be removed: [Errno 28]' in capfd.readouterr().err
    except OSError as error:
        assert error.errno == errno.ENOSPC and 'No space left on device' in str(error)
        assert 'MiB; the checkpoints before it are intact' in str(error) or name == 'save of the best'
        assert {int(path.stem[5:]) for path in folder.glob('ckpt_*.pt')} == set(steps(folder))
        assert not leftovers(folder) or k == 1 or name == 'save of the best'
        newest_state(folder, name)
        failed = True
    goes_on(folder)
    return failed


@pytest.mark.parametrize('name', SCENES)
def test_r12_the_disk_fills_up_at_every_operation(tmp_path, capfd, count, name):
    counting, failed = Counting(), 0
    SCENES[name][2](setting(tmp_path / 'whole', name), counting)
    for k in range(1, len(counting.done) + 1):
        with count():
            failed += filled_up(setting(tmp_path / str(k), name), name, k, capfd)
    assert failed >= 5 and capfd.readouterr().err == ''


@pytest.mark.parametrize('limit', [0, 1, 50, 100, 512, 1000, 4096, 5000, 8192, 9000])
def test_r12_a_real_limit_on_the_file_size(tmp_path, limit):
    filled(tmp_path, 10, size=64)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def attempt():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        line = refused(save, tmp_path, state(20, size=64), error=OSError)
        assert 'File too large' in line and 'needs 0.03' in line and 'MiB' in line and 'intact' in line
    assert in_child(attempt) == 0
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    goes_on(tmp_path)


class DevFull(checkpoint.FileOps):
    def open(self, path):
        path.write_bytes(b'')
        return open('/dev/full', 'wb')


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='no /dev/full here')
def test_r12_dev_full(tmp_path):
    filled(tmp_path, 10)
    line = refused(save, tmp_path, state(20), ops=DevFull(), error=OSError)
    assert 'No space left on device' in line and 'ckpt_00000020.pt needs 0.0' in line and not leftovers(tmp_path)
    assert is_state(load(tmp_path), 10)


def test_r12_a_folder_that_may_not_be_written(tmp_path):
    filled(tmp_path, 10)
    tmp_path.chmod(0o555)

    def attempt():
        os.chdir(tmp_path)
        if os.getuid() == 0:
            os.setgid(65534)
            os.setuid(65534)            # root may write anywhere
        line = refused(save, '.', state(20), error=OSError)
        assert 'Permission denied' in line and 'MiB' in line
        assert is_state(load('.'), 10)
    try:
        assert in_child(attempt) == 0
    finally:
        tmp_path.chmod(0o755)
    assert steps(tmp_path) == [10]


# ----------------------------------------------------------------------------------------------------
# R17: files of the past

def golden_state():
    """What tests/golden/ckpt_schema1.pt holds; write it with python -m tests.reliability.test_checkpoint_files."""
    weight = torch.arange(48.).view(8, 6) / 8 - 3
    return {
        'step': 12, 'tokens': 12 * 4 * 32, 'torch': '2.13.0',
        'config': {'n_layer': 1, 'n_head': 2, 'n_embd': 6, 'bias': False, 'linear': {'h.*.mlp.*': 'kron(2, 2, terms=2)'}},
        'model': {'transformer.wte.weight': weight, 'lm_head.weight': weight,
                  'transformer.h.0.mlp.c_fc.left': torch.arange(8.).view(2, 2, 2).bfloat16()},
        'optimizer': {'transformer.wte.weight': {'step': torch.tensor(12.), 'exp_avg': weight / 16,
                                                 'exp_avg_sq': weight.square()}},
        'scaler': {}, 'rng': torch.arange(32, dtype=torch.uint8), 'best_val_loss': 2.5, 'data': {'vocab_size': 8},
    }


@pytest.mark.parametrize('schema', range(1, checkpoint.SCHEMA + 1))
def test_r17_golden_files_still_load(schema):
    path = GOLDEN / f'ckpt_schema{schema}.pt'
    assert path.stat().st_size <= 100_000
    assert same(load(path), {**golden_state(), 'schema': schema})


def test_r17_a_newer_schema_is_named(tmp_path):
    path = tmp_path / 'ckpt_00000001.pt'
    path.write_bytes(container(stream(b'K\x01').replace(text('schema') + b'K\x01', text('schema') + b'K\x07')))
    assert 'schema 7, this version reads up to 1; update' in refused(load, path, allow_unverified=True)
    agree(path, schema=7)
    assert 'schema 7, this version reads up to 1; update' in refused(load, tmp_path)
    agree(path)
    assert 'schema 7, this version reads up to 1; update' in refused(load, tmp_path)
    path.write_bytes(b'something of the future')
    agree(path, schema=7)
    assert 'schema 7, this version reads up to 1; update' in refused(load, tmp_path)


# ----------------------------------------------------------------------------------------------------
# R19: neighbours

HOLDER = ('import sys; from checkpoints.durable import Lock; lock = Lock(sys.argv[1]); '
          'print("held", flush=True); sys.stdin.read()')


def test_r19_a_second_trainer_is_refused(tmp_path):
    other = subprocess.Popen([sys.executable, '-c', HOLDER, tmp_path], cwd=ROOT, stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == 'held\n'
        line = refused(Lock, tmp_path)
        assert f'pid {other.pid})' in line and str(tmp_path) in line
        assert f'pid {other.pid})' in refused(Lock, tmp_path)           # and the refusal did not erase it
    finally:
        other.kill()                                                     # it has no chance to tidy up
        other.communicate()
    assert (tmp_path / '.lock').read_text() == f'{other.pid}\n'
    lock = Lock(tmp_path)
    assert (tmp_path / '.lock').read_text() == f'{os.getpid()}\n'
    assert f'pid {os.getpid()})' in refused(Lock, tmp_path)
    lock.release()
    Lock(tmp_path).release()


def test_r19_stale_and_odd_lock_files(tmp_path):
    (tmp_path / '.lock').write_bytes(b'\xff\0nonsense' * 100)
    Lock(tmp_path / 'new' / 'folder').release()
    Lock(tmp_path).release()
    assert (tmp_path / '.lock').read_text() == f'{os.getpid()}\n'


# ----------------------------------------------------------------------------------------------------
# a fresh run in a used folder

RUN = ['config.json', 'env.json', 'log.jsonl', 'loss.png']


def run_folder(folder, generation=True):
    """A run of steps 10 and 20, with an older generation in previous/ -> {file name: bytes} of the run."""
    filled(folder, 10, 20, best_step=10)
    for name in RUN:
        (folder / name).write_text(f'new {name}')
    (folder / 'notes.txt').write_text('mine')
    contents = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != 'notes.txt'}
    if generation:
        (folder / 'previous').mkdir()
        filled(folder / 'previous', 5)
        (folder / 'previous' / 'log.jsonl').write_text('old log')
    return contents


def everything(folder):
    """{name: bytes} of the run's files wherever they are now."""
    return {path.name: path.read_bytes() for place in ('previous', 'previous.1', 'previous.new', '.')
            for path in (folder / place).glob('*') if path.is_file() and path.name not in ('notes.txt', '.lock')}


def whole(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_set_aside(tmp_path):
    contents = run_folder(tmp_path)
    assert set_aside(tmp_path) == tmp_path / 'previous.1'
    assert whole(tmp_path / 'previous.1') == contents
    assert sorted(os.listdir(tmp_path)) == ['notes.txt', 'previous', 'previous.1']
    assert is_state(load(tmp_path / 'previous.1'), 20) and is_state(load(tmp_path / 'previous.1', 'best'), 10)
    assert set_aside(tmp_path) is None                  # nothing to move
    assert whole(tmp_path / 'previous.1') == contents and steps(tmp_path / 'previous') == [5]


def test_set_aside_of_nothing(tmp_path):
    assert set_aside(tmp_path) is None and set_aside(tmp_path / 'nowhere') is None
    assert not list(tmp_path.iterdir())


def test_fresh_starts_without_a_checkpoint_replace_none(tmp_path):
    """A supervisor that starts afresh after every crash: the finished run and every log stay, whatever their number."""
    contents = run_folder(tmp_path, generation=False)
    for number in range(12):
        assert set_aside(tmp_path).name == ('previous' if number == 0 else f'previous.{number}')
        (tmp_path / 'log.jsonl').write_text(f'log {number}')
        (tmp_path / 'config.json').write_text('{}')
    assert whole(tmp_path / 'previous') == contents
    assert [(tmp_path / f'previous.{n}' / 'log.jsonl').read_text() for n in range(1, 12)] == [f'log {n}' for n in range(11)]


def test_set_aside_takes_the_number_after_the_highest(tmp_path):
    run_folder(tmp_path, generation=False)
    (tmp_path / 'previous.7').mkdir()                   # the user removed the others
    (tmp_path / 'previous.old').mkdir()                 # and this is no number
    assert set_aside(tmp_path).name == 'previous.8'


def test_set_aside_replaces_nothing_that_an_interrupted_one_left(tmp_path):
    run_folder(tmp_path, generation=False)
    (tmp_path / 'previous.new').mkdir()
    (tmp_path / 'previous.new' / 'log.jsonl').write_text('another log')
    assert set_aside(tmp_path).name == 'previous.1'
    assert whole(tmp_path / 'previous') == {'log.jsonl': b'another log'}


def test_set_aside_killed_after_every_operation(tmp_path, count):
    counting = Counting()
    run_folder(tmp_path / 'whole')
    set_aside(tmp_path / 'whole', counting)
    assert len(counting.done) >= 12
    for k in range(len(counting.done) + 1):
        folder = tmp_path / str(k)
        contents = run_folder(folder)
        with count():
            assert in_child(set_aside, folder, Killed(k)) == signal.SIGKILL
            now = everything(folder)
            assert all(now[name] == data for name, data in contents.items())    # nothing is lost
            if len(steps(folder)):
                assert is_state(load(folder), 20)       # caught half-way, the run can be resumed
            set_aside(folder)
            assert whole(folder / 'previous.1') == contents
        assert (folder / 'previous' / 'log.jsonl').read_text() == 'old log' and steps(folder / 'previous') == [5]
        assert sorted(os.listdir(folder)) == ['notes.txt', 'previous', 'previous.1']


if __name__ == '__main__':
    print(save(GOLDEN, golden_state()).rename(GOLDEN / 'ckpt_schema1.pt'))
    (GOLDEN / 'ckpt_00000012.json').rename(GOLDEN / 'ckpt_schema1.json')
