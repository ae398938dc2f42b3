"""Resume in one process: over structures and optimizers (R5), from damage (R6), without a part (R4), after signals (R11)."""
import itertools
import os
import random
import shutil
import signal

import pytest

import configurator
import train
from checkpoints import checkpoint
from tests.reliability.test_checkpoint_files import DAMAGE
from tests.reliability.test_processes import fingerprint
from tests.tiny import arguments, make_data

STEPS, CHANGED = 20, 7
LINEARS = {'dense': 'dense', 'kron': 'kron(8, 8, terms=2)', 'lowrank': 'lowrank(4)', 'abba': 'abba(2, 2)'}
ATTENTIONS = {'causal': ['--attention=causal'], 'linformer': ['--attention=linformer(4, chunk=8)'],
              'mla': ['--rope=True', '--attention=mla(8, qk_rope_head_dim=4)'], 'dint': ['--attention=dint']}
OPTIMIZERS = ('adamw', 'muon')
CHANGES = {'growing': ['--grow_from=1', f'--grow_every={CHANGED}', '--grow_rewarm=2'],
           'frozen': ['--grow_from=1', f'--grow_every={CHANGED}', '--grow_freeze=True', '--ema_decay=0.9'],
           'realised': [f'--finish_dense_at={CHANGED / STEPS}']}
CASES = [(linear, attention, OPTIMIZERS[(i + j) % 2], list(CHANGES)[(i + j) % 3])
         for (i, linear), (j, attention) in itertools.product(enumerate(LINEARS), enumerate(ATTENTIONS))]


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp('data'))


@pytest.fixture(autouse=True)
def no_signal():
    train.STOP.update(signal=None, time=0.0)


def run(data, out, *more):
    train.main(configurator.load(arguments(data, out, *more)))
    return fingerprint(out)


def go_on(out, *more):
    train.main(configurator.load([f'--out_dir={out}', '--init_from=resume', *more]))
    return fingerprint(out)


def up_to(step, source, out):
    """The folder that a kill after the checkpoint of that step leaves, with two checkpoints."""
    out.mkdir()
    for file in source.iterdir():
        if file.is_file() and (not file.name.startswith('ckpt_') or int(file.name[5:13]) in (step - 1, step)):
            shutil.copy(file, out)
    return out


# ----------------------------------------------------------------------------------------------------
# R5

def test_r5_every_pair_of_choices_is_tried():
    choices = [LINEARS, ATTENTIONS, OPTIMIZERS, CHANGES]
    for a, b in itertools.combinations(range(4), 2):
        assert {(case[a], case[b]) for case in CASES} == set(itertools.product(choices[a], choices[b]))


@pytest.mark.parametrize('linear, attention, optimizer, change', [
    pytest.param(*case, marks=[] if case == ('kron', 'mla', 'muon', 'realised') else pytest.mark.slow) for case in CASES])
def test_r5_resume_from_any_step_ends_in_the_same_bits(data, tmp_path, count, linear, attention, optimizer, change):
    """After the first step, before, at and after a change of the model, and before the last step."""
    more = [f'--max_iters={STEPS}', f'--lr_decay_iters={STEPS}', '--save_interval=1', f'--keep_checkpoints={STEPS}',
            f'--linear=h.*.mlp.*={LINEARS[linear]}', *ATTENTIONS[attention], f'--optimizer={optimizer}', *CHANGES[change]]
    whole = run(data, tmp_path / 'whole', *more)
    for step in (1, CHANGED - 1, CHANGED, CHANGED + 1, STEPS - 1):
        with count():
            out = up_to(step, tmp_path / 'whole', tmp_path / str(step))
            assert max(checkpoint.steps(out)) == step and go_on(out, '--save_interval=0') == whole


# ----------------------------------------------------------------------------------------------------
# R4: what a checkpoint must not lose; the bits of the resumed run tell

MUTANTS = {
    'the growth stage': (['--grow_from=1', '--grow_every=7'], lambda s: s['built'].update(changed=2)),
    'what is frozen': (['--grow_from=1', '--grow_every=4', '--grow_freeze=True'], lambda s: s['built'].update(layers=1)),
    'the moving average': (['--ema_decay=0.9'], lambda s: s.update(average=dict(s['model']))),
    'which state a parameter has': ([], lambda s: s.update(optimizer=dict(zip(s['optimizer'], reversed(
        s['optimizer'].values()))))),
}


@pytest.mark.parametrize('name', MUTANTS)
def test_r4_a_resume_without_it_is_told_by_its_bits_or_refused(data, tmp_path, capsys, name):
    more, change = MUTANTS[name]
    run(data, tmp_path / 'whole', *more, '--save_interval=1', '--keep_checkpoints=12')
    whole = checkpoint.load(tmp_path / 'whole')
    ends = {}
    for what in ('kept', 'lost'):
        out = up_to(5, tmp_path / 'whole', tmp_path / what)
        state = checkpoint.load(out)
        change(state) if what == 'lost' else None
        checkpoint.save(out, state)
        try:
            go_on(out, '--save_interval=0')
            ends[what] = differences(whole, checkpoint.load(out))
        except SystemExit as leave:
            assert leave.code == 2 and capsys.readouterr().err.count('\n') == 1
            ends[what] = 'refused'
    assert not ends['kept'] and ends['lost']


def differences(a, b):
    """Names of the tensors of the model and its average that two checkpoints do not share bit by bit."""
    return [name for part in ('model', 'average') for name in a[part].keys() | b[part].keys()
            if name not in a[part] or name not in b[part] or not a[part][name].equal(b[part][name])]


# ----------------------------------------------------------------------------------------------------
# R6: the newest checkpoint of a run is damaged

def test_r6_a_run_goes_on_from_the_one_before_and_ends_in_the_same_bits(data, tmp_path, count, capsys):
    whole = run(data, tmp_path / 'whole', '--save_interval=1', '--keep_checkpoints=12')
    draw = random.Random(6)
    for number in range(10):
        step, kind = draw.randrange(2, 12), sorted(DAMAGE)[number % 3]
        out = up_to(step, tmp_path / 'whole', tmp_path / f'{number}')
        path = out / f'ckpt_{step:08d}.pt'
        path.write_bytes(DAMAGE[kind](path.read_bytes(), draw))
        capsys.readouterr()
        with count():
            assert go_on(out, '--save_interval=0') == whole
            warned = capsys.readouterr().err
            assert warned.count('\n') == 1 and f'{path.name} is damaged' in warned


# ----------------------------------------------------------------------------------------------------
# R11: signals at moments that a test of real processes does not hit

def at_call(monkeypatch, place, name, number, act):
    """Call act() before the number-th call of place.name."""
    real, calls = getattr(place, name), itertools.count(1)

    def called(*arguments, **keywords):
        if next(calls) == number:
            act()
        return real(*arguments, **keywords)
    monkeypatch.setattr(place, name, called)


MOMENTS = {'before step 1': (train.schedules, 'learning_rate', 1, 0), 'between micro-steps': (train, 'add_losses', 9, 4),
           'evaluation': (train, 'evaluate', 2, 6), 'save': (checkpoint, 'save', 1, 6),
           'the last step': (train, 'add_losses', 24, 12)}


@pytest.mark.parametrize('moment', MOMENTS)
@pytest.mark.parametrize('number', [pytest.param(n, id=n.name, marks=[] if n == signal.SIGTERM else pytest.mark.slow)
                                    for n in train.SIGNALS])
def test_r11_a_signal_at_any_moment_saves_that_step_and_resumes(data, tmp_path, monkeypatch, capsys, moment, number):
    whole = run(data, tmp_path / 'whole')
    before = {n: signal.getsignal(n) for n in train.SIGNALS}
    *place, step = MOMENTS[moment]
    try:
        train.listen(train.on_signal)
        at_call(monkeypatch, *place, lambda: os.kill(os.getpid(), number))
        run(data, tmp_path / 'out')
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)
    assert f'stopped by {number.name} at step {step}' in capsys.readouterr().out
    assert max(checkpoint.steps(tmp_path / 'out')) == step
    train.STOP.update(signal=None, time=0.0)
    monkeypatch.undo()
    assert go_on(tmp_path / 'out') == whole
