"""Structured matrices dropped into a dense model in the course of a run: growth/dropin.py, growth/recovery.py."""
import dataclasses
import json
import os
import shutil
import signal

import pytest
import torch

import configurator
import train
from checkpoints import checkpoint
from decomposition import initialise
from decomposition.sites import Decomposition
from growth import dropin, recovery
from model import GPT
from tests.reliability.test_processes import fingerprint, finish, start, wait_for
from tests.tiny import arguments, make_data
from variants import UserError

SITES = ['h.0.mlp.c_fc', 'h.0.mlp.c_proj', 'h.1.attn.c_v', 'h.1.mlp.c_fc', 'h.1.mlp.c_proj']       # what tiny's rules name


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp('data'))


@pytest.fixture(scope='module')
def dense(data, tmp_path_factory):
    """A trained dense model."""
    out = tmp_path_factory.mktemp('dense')
    train_in_process(arguments(data, out, '--linear=dense', '--bias=True', '--dropout=0', '--max_iters=30',
                               '--lr_decay_iters=30', '--eval_interval=30'))
    return out


def train_in_process(words):
    train.STOP.update(signal=None, time=0.0)
    train.main(configurator.load(words))


def run(data, dense, out, *more):
    train_in_process([*arguments(data, out), f'--init_from={dense}', '--save_interval=1', '--keep_checkpoints=20', *more])
    return checkpoint.load(out)


def at(out, step):
    return checkpoint.load(out / f'ckpt_{step:08d}.pt')


def lines(out, name):
    return [line for line in map(json.loads, (out / 'log.jsonl').read_text().splitlines()) if name in line]


WAYS = {
    'sequential': ['--drop_in=sequential', '--drop_in_every=2', '--drop_in_rewarm=1'],
    'sensitivity': ['--drop_in=sensitivity', '--drop_in_every=2', '--drop_in_freeze=1', '--ema_decay=0.9',
                    '--decompose=als,svd_whitened', '--calibration_tokens=512', '--drop_in_report=1'],
    'layer': ['--drop_in=sensitivity', '--drop_in_unit=layer', '--drop_in_from=1', '--drop_in_every=4', '--drop_in_freeze=4',
              '--decompose=als_sequential,svd_sequential', '--calibration_tokens=256', '--optimizer=muon'],
    'all': ['--init_from=scratch', '--drop_in=all', '--drop_in_from=3', '--drop_in_freeze=2', '--finish_dense_at=0.75',
            '--decompose=als_sequential,svd', '--calibration_tokens=256'],
}
KILLED_AT = {'sequential': (2, 3), 'sensitivity': (2, 5), 'layer': (1, 3, 5), 'all': (3, 4, 9)}


@pytest.fixture(scope='module')
def whole(data, dense, tmp_path_factory):
    """whole(way): the folder of that way's uninterrupted run, made once."""
    made = {}

    def folder(way):
        if way not in made:
            made[way] = tmp_path_factory.mktemp(way)
            run(data, dense, made[way], *WAYS[way])
        return made[way]
    return folder


@pytest.mark.parametrize('way', WAYS)
def test_runs_that_drop_in_resume_to_the_same_bits(whole, tmp_path, way):
    """From a checkpoint before, in and after a replacement, or while the newest trains alone."""
    first = whole(way)
    whole = checkpoint.load(first)
    drop = whole['built']['drop']
    assert whole['step'] == 12 and drop['done'] == drop['units'] == {'layer': 2, 'all': 1}.get(way, 5)
    for step in KILLED_AT[way]:
        out = tmp_path / str(step)
        out.mkdir()
        for file in (*first.glob(f'ckpt_{step:08d}*'), first / 'log.jsonl'):
            shutil.copy(file, out)
        train_in_process([f'--out_dir={out}', '--init_from=resume', '--save_interval=0'])
        again = checkpoint.load(out)
        assert again['model'].keys() == whole['model'].keys()
        assert all(torch.equal(t, again['model'][n]) for n, t in whole['model'].items()), step
        assert again['optimizer'].keys() == whole['optimizer'].keys() and again['flops'] == whole['flops'] > 0
        assert all(torch.equal(v, again['optimizer'][n][k]) for n, e in whole['optimizer'].items() for k, v in e.items())
        assert again['built'] == whole['built']
        assert lines(out, 'drop_in') == lines(first, 'drop_in')
        assert lines(out, 'probe_loss') == lines(first, 'probe_loss')
        assert [(e['step'], e['flops'], e['val_loss']) for e in lines(out, 'flops')] == (
            [(e['step'], e['flops'], e['val_loss']) for e in lines(first, 'flops')])


def specs(state):
    config = configurator.model_config({**state['config'], **state['built']['model']})
    with torch.device('meta'):
        return {site: module.spec for site, module in GPT(config).sites().items() if module.spec != 'dense'}


def van_loan_error(W, terms, shape):
    """||W - nearest sum|| / ||W|| by the SVD of the rearranged matrix, block by block."""
    (m, n), (p, q) = shape, (W.shape[0] // shape[0], W.shape[1] // shape[1])
    R = torch.stack([W[a * p:(a + 1) * p, b * q:(b + 1) * q].flatten() for a in range(m) for b in range(n)])
    s = torch.linalg.svdvals(R.double())
    return (s[terms:].square().sum() / s.square().sum()).sqrt().item()


def test_matrices_go_in_depth_order_from_the_weights_that_they_have_by_then(whole, dense):
    folder = whole('sequential')
    assert specs(at(folder, 1)).keys() == {SITES[0]} and list(specs(at(folder, 5))) == SITES[:3]
    full = specs(at(folder, 9))
    assert list(full) == SITES and full['h.0.mlp.c_fc'] == 'kron(8, 8, terms=2)' and full['h.1.attn.c_v'] == 'lowrank(4)'
    assert checkpoint.load(folder)['built']['drop']['order'] == [[site] for site in SITES]
    drops = lines(folder, 'drop_in')
    assert [(line['step'], line['drop_in']) for line in drops] == [(2 * k, site) for k, site in enumerate(SITES)]
    for k in (0, 1, 3, 4):
        before = (at(folder, 2 * k) if k else checkpoint.load(dense))['model'][f'transformer.{SITES[k]}.weight']
        assert drops[k]['rows'][0]['error'] == pytest.approx(van_loan_error(before, 2, (8, 8)), rel=1e-5)
    stale = checkpoint.load(dense)['model'][f'transformer.{SITES[4]}.weight']      # the control: not those of the start
    assert abs(drops[4]['rows'][0]['error'] - van_loan_error(stale, 2, (8, 8))) > 5e-5


def test_what_is_not_replaced_keeps_weights_and_optimizer_entries(whole):
    state = checkpoint.load(whole('sequential'))
    entry = {name: int(e['step']) for name, e in state['optimizer'].items()}
    assert entry['transformer.wte.weight'] == entry['transformer.h.1.mlp.c_fc.bias'] == 12
    assert entry['transformer.h.1.mlp.c_fc.A'] == 12 - 6 and 'transformer.h.1.mlp.c_fc.weight' not in entry


def test_a_run_that_does_not_learn_ends_at_the_decomposed_source(data, dense, tmp_path):
    """Learning rate 0: the same bits as init_from with the same rules, in any order of replacement."""
    still = ['--learning_rate=0', '--min_lr=0', '--weight_decay=0']
    state = run(data, dense, tmp_path, '--drop_in=sensitivity', '--drop_in_every=2', *still)
    source_config, source, _ = initialise.read_source(str(dense))
    config = configurator.model_config({**state['config'], **state['built']['model']})
    expected = initialise.build(config, source_config, source).state_dict()
    assert all(torch.equal(t, expected[name]) for name, t in state['model'].items())


def test_statistics_are_those_of_the_model_as_it_is(data, dense):
    """als in a model whose block 0 was moved: the outputs under its own inputs come out right, not under the old ones."""
    source_config, source, _ = initialise.read_source(str(dense))
    spec, x = {'h.1.mlp.c_fc': 'kron(8, 8, terms=2)'}, torch.randint(20, (8, 16), generator=torch.Generator().manual_seed(0))
    how = Decomposition('als', batches=[(x, x)])
    errors = {}
    for moved in (False, True):
        model = initialise.build(dataclasses.replace(source_config), source_config, source)
        if moved:
            with torch.no_grad():
                for p in model.transformer.h[0].parameters():
                    p.mul_(1.5)
        inputs, W = [], model.sites()['h.1.mlp.c_fc'].weight.detach().clone()
        handle = model.sites()['h.1.mlp.c_fc'].register_forward_pre_hook(
            lambda _, a, inputs=inputs: inputs.append(a[0].detach()))
        model.eval()(x)
        handle.remove()
        rows = dropin.replace(model, spec, how)
        D = W - model.sites()['h.1.mlp.c_fc'].dense_weight().detach()
        X = inputs[0].flatten(0, 1) - inputs[0].flatten(0, 1).mean(0)           # the bias takes the mean
        errors[moved] = ((X @ D.T).norm() / (inputs[0].flatten(0, 1) @ W.T).norm()).item()
        assert [row['site'] for row in rows] == list(spec)
        assert rows[0]['output_error'] == pytest.approx(errors[moved], rel=1e-4)
    assert errors[True] != pytest.approx(errors[False], rel=1e-3)


def test_sensitivity_is_the_loss_with_one_matrix_replaced_and_orders_by_it(data, dense, whole):
    state = checkpoint.load(whole('sensitivity'))
    config, source_config, source = configurator.load(arguments(data, 'out')), *initialise.read_source(str(dense))[:2]
    loader = dropin.Loader(dropin_dataset(data), 'train', 16, 256, seed=config.seed)
    batches, rules = list(loader.fixed(2, 'train')), {**state['config']['linear']}
    text = [(x, y) for x, y in calibration(data)]

    def loss(linear):
        model = initialise.build(dataclasses.replace(source_config), source_config, source)
        if linear:
            dropin.replace(model, linear, Decomposition('als,svd_whitened', batches=text))
        model.eval()
        with torch.no_grad():
            return sum(model(x, y)[1].item() for x, y in batches) / len(batches)
    base, full = loss({}), specs(state)
    damage = {site: loss({site: full[site]}) - base for site in SITES}
    drop = state['built']['drop']
    assert drop['damage'] == pytest.approx(damage, abs=1e-5) and len(rules) == 2
    first, rest = [s for s in SITES if s.startswith('h.0.')], [s for s in SITES if not s.startswith('h.0.')]
    assert drop['order'] == [[s] for part in (rest, first) for s in sorted(part, key=damage.get)]
    assert len({round(d, 6) for d in damage.values()}) == 5


def test_block_0_goes_last_even_when_it_costs_least(monkeypatch):
    damage = {'h.0.mlp.c_fc': -1.0, 'h.1.mlp.c_fc': 0.3, 'h.2.mlp.c_fc': float('nan'), 'h.3.mlp.c_fc': 0.1}
    monkeypatch.setattr(dropin, 'damages', lambda *given: damage)
    run = type('Run', (), {'config': configurator.Config(drop_in='sensitivity')})
    order = dropin.plan(None, run, dict.fromkeys(damage, 'lowrank(4)'), None)['order']
    assert order == [['h.3.mlp.c_fc'], ['h.1.mlp.c_fc'], ['h.2.mlp.c_fc'], ['h.0.mlp.c_fc']]


def dropin_dataset(data):
    from data.loader import open_dataset
    return open_dataset(str(data / 'tiny'), print)


def calibration(data):
    from decomposition import calibrate
    return calibrate.batches(dropin_dataset(data), 512, 16, 1337)


def test_the_newest_trains_alone_and_then_everything_goes_on_with_its_state(data, dense, tmp_path):
    run(data, dense, tmp_path, '--drop_in=sequential', '--drop_in_every=2', '--drop_in_freeze=1')

    def moved(a, b):
        one, two = at(tmp_path, a)['model'], at(tmp_path, b)['model']
        return {name for name, t in two.items() if name in one and not torch.equal(t, one[name])}
    assert not moved(2, 3) - {f'transformer.{SITES[1]}.bias'}           # its bias trains on, its factors are new
    assert moved(3, 4) >= {'transformer.wte.weight', f'transformer.{SITES[0]}.A', f'transformer.{SITES[1]}.A'}
    held = at(tmp_path, 3)
    assert held['built']['drop']['frozen'] and held['optimizer'].keys() == {
        f'transformer.{SITES[1]}.{name}' for name in ('A', 'B', 'bias')}
    entry = {name: int(e['step']) for name, e in at(tmp_path, 4)['optimizer'].items()}
    assert entry['transformer.wte.weight'] == 2 and entry[f'transformer.{SITES[0]}.A'] == 3
    assert entry[f'transformer.{SITES[1]}.A'] == 2 and not at(tmp_path, 4)['built']['drop']['held']


def test_the_rate_comes_back_after_each_replacement(data, dense, tmp_path):
    run(data, dense, tmp_path, '--drop_in=sequential', '--drop_in_every=2', '--drop_in_rewarm=3', '--decay_lr=False')
    shares = [line['lr'] / 1e-2 for line in lines(tmp_path, 'lr')]
    assert shares == pytest.approx([.25, .5] * 5 + [.75, 1])


def test_training_is_the_same_with_and_without_a_report(data, dense, whole, tmp_path):
    one, two = checkpoint.load(whole('sequential')), run(data, dense, tmp_path, *WAYS['sequential'], '--drop_in_report=1')
    assert all(torch.equal(t, two['model'][name]) for name, t in one['model'].items())
    assert not (whole('sequential') / 'drop_in.md').exists() and (tmp_path / 'drop_in.md').exists()


def test_the_report_says_what_was_before_after_and_as_it_recovered(data, dense, whole, tmp_path, run_program):
    shutil.copytree(whole('sensitivity'), tmp_path / 'one', ignore=shutil.ignore_patterns('ckpt*'))
    run(data, dense, tmp_path / 'all', '--drop_in=all', '--drop_in_report=3')
    report = json.loads((tmp_path / 'one' / 'drop_in.json').read_text())
    losses, changes = {p[0]: p[1] for p in report['probes']}, report['changes']
    assert len(changes) == 5 and list(losses) == list(range(13))                # every step, from the first to the last
    for k, c in enumerate(changes):
        assert c['curve'] == [[0, c['after']], [1, losses[c['step'] + 1]], *(
            [[2, changes[k + 1]['before']]] if k < 4 else [[s, losses[8 + s]] for s in (2, 3, 4)])]
        assert c['after'] == losses[c['step']] and c['spike'] == c['after'] - c['before'] and c['end'] == c['curve'][-1][1]
        assert c['back_after'] == next((s for s, loss in c['curve'] if loss <= c['before']), None)
    page = (tmp_path / 'one' / 'drop_in.md').read_text()
    assert all(f'| {site} |' in page for site in SITES) and (tmp_path / 'one' / 'drop_in.png').stat().st_size > 10_000
    both = run_program('compare.py', 'recovery', tmp_path / 'one', tmp_path / 'all', f'--to={tmp_path / "both"}')
    assert '| one | 5 |' in both.stdout and '| all | 1 |' in both.stdout and '| h.1.attn.c_v | +' in both.stdout
    assert {p.name for p in (tmp_path / 'both').iterdir()} == {'drop_in.md', 'drop_in.json', 'drop_in.png'}
    for seed in (1, 2):                                 # runs of several seeds are one row
        shutil.copytree(tmp_path / 'one', tmp_path / 'seeds' / f'one/seed={seed}')
    folders = [*(tmp_path / 'seeds' / 'one').iterdir(), tmp_path / 'all']
    seeds = run_program('compare.py', 'recovery', *folders, f'--to={tmp_path / "s"}').stdout
    assert '| seeds/one | 5 |' in seeds and '± 0.0000 (n=2)' in seeds and '## seeds/one/seed=2' in seeds
    mistake = run_program('compare.py', 'recovery', dense, code=2)
    assert mistake.stderr.count('\n') == 1 and 'no measured replacement' in mistake.stderr
    assert recovery.write(str(dense)) == '' and not (dense / 'drop_in.md').exists()


MISTAKES = {
    'no rules': (['--drop_in=all', '--linear=dense'], 'linear names nothing'),
    'growth': (['--drop_in=all', '--grow_from=1', '--grow_every=2', '--init_from=scratch', '--drop_in_from=1'],
               'drop_in and grow_from change the same model'),
    'scratch': (['--drop_in=all', '--init_from=scratch'], 'would decompose random weights'),
    'no steps': (['--drop_in=sequential'], "drop_in='sequential' needs drop_in_every=STEPS"),
    'freeze': (['--drop_in=sequential', '--drop_in_every=2', '--drop_in_freeze=3'],
               'drop_in_freeze must not exceed drop_in_every (2), got 3'),
    'too far apart': (['--drop_in=sequential', '--drop_in_every=3'],
                      'the last of 5 replacements at step 12, and the run ends at step 12; take drop_in_every=2'),
    'too many': (['--drop_in=sequential', '--drop_in_every=3', '--max_iters=3'],
                 "raise max_iters, or take drop_in_unit='layer'"),
    'late': (['--drop_in=all', '--drop_in_from=12'], 'lower drop_in_from'),
    'dense finish': (['--drop_in=sequential', '--drop_in_every=2', '--finish_dense_at=0.6'],
                     'the dense finish comes at step 8'),
    'method': (['--drop_in=all', '--decompose=svd_whitend'], "method='svd_whitend' is unknown"),
    'no text': (['--drop_in=all', '--decompose=als,svd', '--calibration_tokens=0'], 'set calibration_tokens above 0'),
    'little text': (['--drop_in=all', '--decompose=als,svd', '--calibration_tokens=16'],
                    'calibration_tokens must be at least 128'),
    'kind': (['--drop_in=sensitive'], "did you mean 'sensitivity'?"),
}


@pytest.mark.parametrize('name', MISTAKES)
def test_mistakes_are_one_line(data, dense, tmp_path, name, capsys):
    more, words = MISTAKES[name]
    with pytest.raises((SystemExit, UserError)) as error:
        run(data, dense, tmp_path, *more)
    said = str(error.value) + capsys.readouterr().err
    assert words in said and 'Traceback' not in said


@pytest.mark.slow
def test_a_killed_process_goes_on_in_the_middle_of_a_drop_in(data, dense, tmp_path):
    more = [*WAYS['sensitivity'], f'--init_from={dense}', '--save_interval=1']
    assert finish(start(data, tmp_path / 'a', *more)).returncode == 0
    process = start(data, tmp_path / 'b', *more)
    wait_for(tmp_path / 'b' / 'log.jsonl', '"step": 5, "loss"', process)
    os.kill(process.pid, signal.SIGKILL)
    assert finish(process).returncode == -signal.SIGKILL
    assert 3 <= checkpoint.load(tmp_path / 'b')['step'] < 12
    more = [*WAYS['sensitivity'], '--save_interval=1', '--init_from=resume']
    assert finish(start(data, tmp_path / 'b', *more)).returncode == 0
    assert fingerprint(tmp_path / 'a') == fingerprint(tmp_path / 'b')
    assert lines(tmp_path / 'a', 'drop_in') == lines(tmp_path / 'b', 'drop_in')


@pytest.mark.slow
@pytest.mark.parametrize('kind, bound', [('ddp', 1e-4), ('fsdp', 1e-3)])
def test_two_ranks_drop_in_as_one_does(data, dense, tmp_path, kind, bound):
    """But for rounding, which FSDP has more of, and which the fits carry into directions of small singular values."""
    more = [*WAYS['sensitivity'], f'--init_from={dense}', '--dropout=0']
    done = [finish(start(data, tmp_path / name, *more, *extra, ranks=ranks)) for name, extra, ranks in
            (('one', [], None), ('two', [f'--parallel={kind}'], 2))]
    assert [d.returncode for d in done] == [0, 0], done[1].stderr[-2000:]
    one, two = (checkpoint.load(tmp_path / name) for name in ('one', 'two'))
    assert one['built']['drop']['order'] == two['built']['drop']['order']
    assert max((t - two['model'][name]).abs().max().item() for name, t in one['model'].items()) < bound
