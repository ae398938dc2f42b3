"""The parts of ablate.py in this process: axes, effects, costs, rank search without training, the report of made-up runs."""
import itertools
import json
import math
import random
import statistics

import pytest

torch = pytest.importorskip('torch')
optuna = pytest.importorskip('optuna')

import ablate
import configurator
from ablation import axes, cost, effects, plots, ranks, results, runner, study, tables
from ablation.grid import Run, first_runs, later_runs, run_at, settings_of
from ablation.plan import Plan
from model import GPT
from tests.reporting.browser import needs_chromium, visit
from tests.tiny import ROOT, make_data
from variants import UserError

COMMITTED = ROOT / 'config' / 'ablation' / 'approximations.py'
TINY = ['--n_head=2', '--n_embd=32', '--n_layer=2', '--block_size=16', '--batch_size=4', '--vocab_size=40', '--max_iters=40',
        '--lr_decay_iters=40', '--warmup_iters=0', '--eval_interval=40', '--min_lr=1e-4', '--device=cpu', '--grow_every=10']
GRID = '''base = 'config/attention/causal.py'
axes = {'grow': {'grow_from': 1}, 'v': {'linear': {'h.*.attn.c_v': 'lowrank(4)'}},
        'mlp': {'linear': {'h.*.mlp.*': 'lowrank(6)'}}, 'abba': {}, 'freeze': {'grow_freeze': True},
        'finish': {'finish_dense_at': 0.75}}
needs = {'abba': ['v', 'mlp'], 'freeze': ['grow'], 'finish': ['v', 'mlp']}
exchange = {'abba': {'lowrank(4)': 'abba(2, 2)', 'lowrank(6)': 'abba(3, 3)'}}
grids = {'small': {'grow': [False], 'finish': [False]}, 'none': {'freeze': [True], 'grow': [False]}}
tasks = {'': {'mlp': 'gelu'}}
'''
RANKS = '''base = 'config/attention/causal.py'
variants = {'low rank': {'linear': {'h.*.attn.c_v': 'lowrank({v})', 'h.*.mlp.*': 'lowrank({mlp})'}}}
ranks = {'v': [1, 15], 'mlp': [1, 25]}
budget = 0.6
trials = 6
tasks = {'': {'mlp': 'gelu'}}
search = {'learning_rate': [1e-3, 3e-3]}
'''


@pytest.fixture
def plan(tmp_path):
    def make(text=GRID, *arguments):
        path = tmp_path / 'grid.py'
        path.write_text(text)
        return ablate.plan_of(*ablate.read([str(path), f'--out_dir={tmp_path / "out"}', *TINY, *arguments]))
    return make


# ----------------------------------------------------------------------------------------------------
# axes

def by_hand(note):
    """The valid combinations as the issue words them: (layers, abba, v, mlp, linformer, freeze, finish)."""
    count = 0
    for layers, abba, v, mlp, linformer, freeze, finish in itertools.product((0, 1), repeat=7):
        ok = (layers or not freeze) and (v or mlp or not (abba or finish))
        count += bool(ok and (not note or layers and not linformer))
    return count


def test_the_committed_grid_has_78_variants_and_the_notes_26():
    grid, _ = ablate.read([str(COMMITTED)])
    assert len(axes.switches(grid)) == by_hand(note=False) == 78
    grid, _ = ablate.read([str(COMMITTED), '--axes=note'])
    assert len(axes.switches(grid)) == by_hand(note=True) == 26
    assert all(on['grow'] and not on['linformer'] for on in axes.combinations(grid))


def test_abba_has_the_parameters_of_low_rank():
    grid, _ = ablate.read([str(COMMITTED)])
    axes.spread(grid)
    made = Plan(grid)

    def size(name):
        return cost.size_of(made.load(Run('', name, (), 1)), 'parameters')
    assert 'abba' in made.grid.variants['v+mlp+abba']['linear']['h.*.mlp.*']
    assert size('v+mlp+abba') == size('v+mlp') < size('v+abba') == size('v') < size('dense')


def test_some_variants_are_picked_by_name(plan):
    grid = plan(GRID, '--pick=v+*, dense').grid
    assert {run.variant for run in first_runs(grid)} == {n for n in grid.variants if n.startswith('v+')} | {'dense'}
    assert not ranks.searched_variants(plan(RANKS, '--pick=dense').grid) and ranks.searched_variants(plan(RANKS).grid)


def test_settings_of_a_combination_are_merged(plan):
    grid = plan().grid
    assert grid.variants['grow+v+mlp+abba'] == {
        'grow_from': 1, 'linear': {'h.*.attn.c_v': 'abba(2, 2)', 'h.*.mlp.*': 'abba(3, 3)'}}
    assert axes.name_of({'grow': False, 'v': False}) == 'dense'


@pytest.mark.parametrize('changes, words', [
    (['--axes=none'], 'no combination of the axes is valid in --axes=none'),
    (['--pick=w*'], "no variant is called 'w*'; the variants are"),
    (['--axes=smal'], "--axes=smal: there is no such part of the grid, did you mean 'small'?"),
    ("needs = {'abba': ['q']}", "needs: there is no axis 'q'"),
    ("exchange = {'aba': {}}", "exchange: there is no axis 'aba', did you mean 'abba'?"),
    ("grids = {'small': {'grown': [True]}}", "grids: 'small': there is no axis 'grown', did you mean 'grow'?"),
    ("grids = {'small': {'grow': [1]}}", "'grow' takes a list of True and False, got [1]"),
    ("variants = {'a': {}}", 'drop one of `axes` and `variants`'),
    ("axes = {'v': {'linear': {'h.*.attn.c_v': 'lowrank(16)'}}}\nneeds = exchange = {}", 'is not read'),
    ("axes = {'v': {'linear': {'h.*.attn.c_v': 'lowrank(16)'}}}\nneeds = {}\nexchange = {}\ngrids = {}",
     'lowrank(16) saves nothing'),
])
def test_mistakes_in_axes_are_one_sentence(plan, changes, words):
    with pytest.raises(UserError) as error:
        plan(GRID if isinstance(changes, list) else GRID + changes + '\n', *(changes if isinstance(changes, list) else []))
    assert words in str(error.value) and '\n' not in str(error.value)


def test_controls_are_dense_and_narrow_enough(plan):
    made = plan(GRID, '--axes=small')
    assert 'dense' in made.grid.variants
    narrow = [name for name in made.grid.variants if name.startswith('narrow ')]
    assert narrow
    for name in narrow:                                 # each has at least a variant's parameters, the next width has not
        width, base = int(name.split()[1]), made.base('')
        sizes = [cost.size_of(made.load(Run('', v, (), 1)), 'parameters') for v in made.structured()]
        assert GPT(configurator.model_config(made.load(Run('', name, (), 1)))).config.n_embd == width
        assert any(cost.size_of(made.load(Run('', name, (), 1)), 'parameters') >= size >
                   cost.size_of(configurator.Config(**{**configurator.as_dict(base), 'n_embd': width - 4}), 'parameters')
                   for size in sizes)


# ----------------------------------------------------------------------------------------------------
# effects

def made_up(names, missing=(), seeds=(1, 2, 3)):
    rng = random.Random(5)
    return {frozenset(on): {seed: rng.gauss(2, 0.1) for seed in seeds}
            for size in range(len(names) + 1) for on in itertools.combinations(names, size) if frozenset(on) not in missing}


def test_effects_by_hand():
    """Two axes, two seeds, all numbers worked out with pencil."""
    off, a, b, both = frozenset(), frozenset('a'), frozenset('b'), frozenset('ab')
    losses = {off: {1: 2.0, 2: 2.2}, a: {1: 2.1, 2: 2.4}, b: {1: 1.9, 2: 2.0}, both: {1: 2.3, 2: 2.5}}
    (main_a, main_b), (pair,) = effects.effects(losses, ['a', 'b'])
    # a: pairs off -> a (0.1, 0.2), b -> both (0.4, 0.5); means 0.15 and 0.45; s = 0.3 / sqrt 2, t(1) = 12.706
    assert main_a['mean'] == pytest.approx(0.30) and main_a['pairs'] == 2
    assert main_a['over_pairs'] == pytest.approx(12.7062 * 0.15, rel=1e-4)
    assert main_a['over_seeds'] == pytest.approx(12.7062 * 0.05, rel=1e-4)          # seed means 0.25 and 0.35
    assert main_b['mean'] == pytest.approx((-0.15 + 0.15) / 2, abs=1e-12)
    assert pair['mean'] == pytest.approx(0.30) and pair['pairs'] == 1 and pair['over_pairs'] is None
    assert pair['over_seeds'] == pytest.approx(0.0, abs=1e-9)                       # 0.3 on both seeds


def test_effects_are_least_squares_where_the_design_is_full():
    names = list('abcd')
    losses = made_up(names)
    cells = sorted(losses, key=sorted)
    coded = {n: torch.tensor([0.5 if n in on else -0.5 for on in cells], dtype=torch.float64) for n in names}
    pairs = list(itertools.combinations(names, 2))
    ones = torch.ones(len(cells), dtype=torch.float64)
    X = torch.stack([ones, *coded.values(), *(coded[p] * coded[q] for p, q in pairs)], 1)
    y = torch.tensor([sum(losses[on].values()) / 3 for on in cells], dtype=torch.float64)
    fitted = torch.linalg.lstsq(X, y[:, None]).solution[1:, 0].tolist()
    mains, both = effects.effects(losses, names)
    assert [e['mean'] for e in mains + both] == pytest.approx(fitted, abs=1e-12)


def test_only_matched_pairs_count():
    losses = made_up('ab', missing={frozenset('b')})
    (main_a, main_b), pairs = effects.effects(losses, ['a', 'b'])
    assert main_a['pairs'] == main_b['pairs'] == 1 and pairs == []
    both, only_a = losses[frozenset('ab')], losses[frozenset('a')]
    assert main_b['mean'] == pytest.approx(sum(both[seed] - only_a[seed] for seed in (1, 2, 3)) / 3)


def test_seeds_are_matched_too():
    losses = {frozenset(): {1: 2.0, 2: 9.0}, frozenset('a'): {1: 2.5}}
    (main,), _ = effects.effects(losses, ['a'])
    assert main['mean'] == pytest.approx(0.5) and main['seeds'] == 1


def test_pareto_front():
    points = [(3, 1.0), (1, 2.0), (2, 2.5), (2, 1.5), (4, 1.0), (5, 0.5)]
    assert effects.pareto(points) == [1, 3, 0, 5]


# ----------------------------------------------------------------------------------------------------
# cost

def test_training_flops_over_growth_freezing_and_finish(plan):
    made = plan()
    def spent(name):
        return cost.training_cost(made.load(Run('', name, (), 1)))
    one, two = (GPT(configurator.model_config(configurator.load([
        'config/attention/causal.py', *TINY, '--mlp=gelu', f'--n_layer={layers}', '--grow_every=0']))) for layers in (1, 2))
    tokens, block = 4 * 16, two.flops_per_token() - one.flops_per_token()
    sites = sum(module.flops(16) // 16 for module in one.sites().values())
    assert spent('dense')['flops'] == 40 * tokens * 3 * two.flops_per_token()
    assert spent('grow')['flops'] == tokens * 3 * (40 * one.flops_per_token() + 30 * block)
    assert spent('grow')['flops'] - spent('grow+freeze')['flops'] == 30 * tokens * sites    # no gradient of the weights
    low = GPT(configurator.model_config(made.load(Run('', 'mlp', (), 1))))
    assert spent('mlp+finish') == {'parameters': two.num_params(), 'trained': low.num_params(), 'flops': tokens * 3 * (
        30 * low.flops_per_token() + 10 * two.flops_per_token())}


def test_equal_flops_gives_every_variant_the_same_flops(plan):
    made = plan(GRID, '--equal=flops', '--max_iters=200', '--lr_decay_iters=200', '--eval_interval=200', '--grow_every=100')
    budget = cost.training_cost(made.base(''))['flops']
    steps = {}
    for name in ('dense', 'mlp', 'grow', 'grow+mlp+freeze+finish'):
        config = made.load(Run('', name, (), 1))
        assert cost.training_cost(config)['flops'] == pytest.approx(budget, rel=0.01)
        assert config.lr_decay_iters == config.max_iters == config.eval_interval
        steps[name] = config.max_iters
    assert steps['dense'] == 200 < steps['mlp'] < steps['grow+mlp+freeze+finish']
    given = [a for a in made.arguments(Run('', 'mlp', (), 1)) if a.startswith('--max_iters')]
    assert given[-1] == f'--max_iters={steps["mlp"]}'


# ----------------------------------------------------------------------------------------------------
# rank search and the queue, with made-up training

def test_names_of_folders_are_read_back(plan):
    made = plan(RANKS)
    run = Run('', 'low rank', (('v', 3), ('mlp', 7), ('learning_rate', 0.003)), 1)
    assert run_at('', 'low rank', run.folder(made.grid).rpartition('/')[2], made.grid) == run
    assert '--linear=h.*.attn.c_v=lowrank(3); h.*.mlp.*=lowrank(7)' in settings_of(run, made.grid)
    assert run_at('', 'low rank', 'v=3_learning_rate=0.003_seed=1', made.grid) is None
    assert run_at('', 'low rank', 'v=3_mlp=x_learning_rate=0.003_seed=1', made.grid) is None


@pytest.mark.parametrize('change, words', [
    ('budget = 0.0', 'needs a budget'),
    ('budget = 0.1', 'below the'),
    ("ranks = {'v': [1, 16], 'mlp': [1, 25]}", 'lowrank(16) saves nothing'),
    ("ranks = {'v': [0, 3], 'mlp': [1, 25]}", "'v' takes [lowest, highest]"),
    ("ranks = {'v': [1, 3], 'mlp': [1, 25], 'w': [1, 2]}", 'no variant has {w}'),
])
def test_mistakes_in_a_rank_search_are_one_sentence(plan, change, words):
    with pytest.raises(UserError) as error:
        plan(RANKS + change + '\n')
    assert words in str(error.value) and '\n' not in str(error.value)


def test_a_rank_search_keeps_to_its_budget_prunes_and_confirms(plan):
    made = plan(RANKS, '--seeds=2', '--confirm=2')
    queue = study.Queue(made.grid)
    search = ranks.Search(queue, made, '', 'low rank')
    drawn = []
    while (found := search.take()) is not None:
        studied, trial, run, watch = found
        assert cost.size_of(made.load(run), 'parameters') <= search.limit
        loss = 3 - 0.01 * dict(run.searched)['mlp']
        goes_on = watch(10, loss) and len(drawn) != 4       # the fifth is pruned, whatever its loss
        drawn.append((run, loss if goes_on else math.inf))
        queue.end(studied, trial, run, 'done' if goes_on else 'pruned', loss, '')
    assert len(drawn) == len({run for run, _ in drawn}) == 6
    best = sorted((pair for pair in drawn if pair[1] < math.inf), key=lambda pair: pair[1])[:2]
    assert search.confirmed() == [Run('', 'low rank', run.searched, 1) for run, _ in best]


def test_a_trial_whose_process_is_gone_goes_back(plan):
    made = plan(GRID, '--axes=small')
    queue = study.Queue(made.grid)
    runs = first_runs(made.grid)[:2]
    def wanted(loss_of):
        return runs
    _, trial, run, _ = queue.take(wanted)
    assert run == runs[0]
    assert queue.take(wanted)[2] == runs[1] and queue.take(wanted) == 'wait'
    trial.set_user_attr('worker', 'another-1')              # nobody holds that lock
    _, again, run, _ = queue.take(wanted)
    assert run == runs[0] and again.number != trial.number
    queue.end(queue.study, again, run, 'failed', None, 'broken')
    assert queue.take(wanted) == 'wait' and queue.failures == {run: 'broken'}       # not tried twice


def finished(made, run, loss, steps=40):
    """The folder of a run that train.py has ended."""
    folder = ROOT / run.folder(made.grid)
    folder.mkdir(parents=True)
    (folder / 'config.json').write_text(json.dumps({'max_iters': 40}))
    (folder / 'log.jsonl').write_text(json.dumps({'step': steps, 'val_loss': loss}) + '\n')


def test_a_killed_trial_whose_folder_is_done_is_complete(plan):
    """And one whose folder is not done is FAIL, as before."""
    made = plan(GRID, '--axes=small')
    queue, runs = study.Queue(made.grid), first_runs(made.grid)[:2]
    for trial in [queue.take(lambda loss_of: runs)[1] for _ in runs]:
        trial.set_user_attr('worker', 'another-1')
    finished(made, runs[0], 2.5)
    finished(made, runs[1], 2.75, steps=20)
    assert queue.take(lambda loss_of: runs)[2] == runs[1]
    told = queue.study.get_trials()
    assert told[0].state == queue.states.COMPLETE and told[0].value == 2.5 and told[1].state == queue.states.FAIL


def test_a_killed_trial_of_a_rank_search_whose_folder_is_done_is_complete_and_not_trained_again(plan):
    made = plan(RANKS)
    queue = study.Queue(made.grid)
    search = ranks.Search(queue, made, '', 'low rank')
    _, trial, run, _ = search.take()
    trial.set_user_attr('worker', 'another-1')
    finished(made, run, 2.5)
    assert search.take()[2] != run
    told = search.study.get_trials()[trial.number]
    assert told.state == queue.states.COMPLETE and told.value == 2.5 and search.ended()[run] == 2.5
    assert not any(run == queue.run_of(t) for t in queue.trials(search.study, queue.states.WAITING) if 'run' in t.user_attrs)


def test_a_pick_is_kept_to_after_an_interrupted_start(plan):
    """The first start queued all runs; the second may train its own only, and leaves the rest for a third."""
    made = plan(GRID, '--axes=small')
    runs = first_runs(made.grid)
    queue = study.Queue(made.grid)
    _, trial, _, _ = queue.take(lambda loss_of: runs)
    trial.set_user_attr('worker', 'another-1')
    picked = runs[3:4]
    _, trial, run, _ = queue.take(lambda loss_of: picked)
    assert run == picked[0] and trial.user_attrs['worker'] == queue.worker.name
    queue.end(queue.study, trial, run, 'done', 2.0, '')
    assert queue.take(lambda loss_of: picked) is None
    left = [queue.take(lambda loss_of: runs)[2] for _ in runs[1:]]
    assert {*left} == {*runs} - {*picked} and queue.take(lambda loss_of: runs) == 'wait'


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp('data'))


@pytest.mark.parametrize('text, words, place', [
    ("tasks = {'a': {'dataset': 'tiny'}, 'b': {'dataset': 'missing'}}", ['--data_dir={data}'], 'missing'),
    ("tasks = {'a': {'dataset': 'tiny'}}", ['--data_dir={data}/nowhere'], 'nowhere'),
    ("tasks = {'a': {'dataset': 'tiny'}}\nvariants = {'x': {}, 'y': {'init_from': './no_run'}}\naxes = {}\nneeds = {}\n"
     'exchange = {}\ngrids = {}', ['--data_dir={data}'], 'no_run'),
    ("tasks = {'a': {}}\nsearch = {'dataset': ['tiny', 'missing']}", ['--data_dir={data}'], 'missing')])
def test_a_missing_data_set_or_source_is_refused_once_before_the_first_run(data, tmp_path, monkeypatch, text, words, place):
    words = [word.format(data=data) for word in (*words, '--controls=False')]
    (tmp_path / 'grid.py').write_text(f'{GRID}{text}\n')
    monkeypatch.setattr(ablate, 'carry_out_all', lambda plan: pytest.fail('a run began'))
    with pytest.raises(UserError, match=place):
        ablate.main_run([str(tmp_path / 'grid.py'), f'--out_dir={tmp_path / "out"}', *TINY, *words])
    assert not (tmp_path / 'out').exists()


def test_data_that_are_there_and_sources_of_the_grid_itself_pass(plan, data, tmp_path):
    out = tmp_path / 'out'
    text = GRID.partition('axes')[0] + f"variants = {{'x': {{}}, 'y': {{'init_from': '{out}/x/seed=1337'}}}}"
    made = plan(text, f'--data_dir={data}', '--dataset=tiny')
    assert [*made.places()] == [str(data / 'tiny'), f'{out}/x/seed=1337'] and made.check_places() is None


def test_a_journal_that_cannot_be_read_is_set_aside(plan, capsys):
    grid = plan(GRID, '--axes=small').grid
    study.Queue(grid)
    path = ROOT / grid.out_dir / study.JOURNAL
    path.write_text(path.read_text() + '{"op_code": 4, "wor\n{"op_code": 4}\n')
    study.Queue(grid)
    assert (path.parent / f'{study.JOURNAL}.broken').exists() and 'not readable' in capsys.readouterr().out


def test_gpus_are_dealt_out(monkeypatch):
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
    assert [runner.gpu_environment(2, slot)['CUDA_VISIBLE_DEVICES'] for slot in range(3)] == ['0', '1', '0']
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '4,7')
    assert runner.gpu_environment(2, 1) == {'CUDA_VISIBLE_DEVICES': '7'} and runner.gpu_environment(0, 1) == {}


# ----------------------------------------------------------------------------------------------------
# the report

def pretend(made, run, loss, **said):
    """A finished run's folder without training."""
    folder = ROOT / run.folder(made.grid)
    folder.mkdir(parents=True)
    config = made.load(run)
    size = cost.model_cost(config)
    (folder / 'config.json').write_text(json.dumps(configurator.as_dict(config)))
    (folder / 'env.json').write_text(json.dumps({'parameters': size[0], 'flops_per_token': 1}))
    lines = [{'step': 0, 'loss': 3.0, 'ms': 10.0, 'cpu_ms': 9.0, 'tokens': 64, 'tokens_per_s': 6400.0}] * 2
    lines.append({'step': config.max_iters, 'train_loss': loss, 'val_loss': loss})
    (folder / 'log.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in (lines if loss else lines[:1])))
    (folder / 'outcome.json').write_text(json.dumps({'state': 'done', 'words': '', 'seconds': 12.0, **said}))


@pytest.fixture
def reported(plan, tmp_path):
    made = plan()
    rng = random.Random(1)
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out' / 'grid.json').write_text(json.dumps(configurator.as_dict(made.grid)))
    for i, first in enumerate(first_runs(made.grid)):
        for seed in (1337, 1, 2)[:3 if i % 2 else 2]:
            pretend(made, Run('', first.variant, (), seed), 2 + 0.1 * ('mlp' in first.variant) + rng.gauss(0, 0.01))
    broken = Run('', first.variant, (), 2)
    if not (ROOT / broken.folder(made.grid)).exists():
        pretend(made, broken, None, state='failed', words='out of <memory>')
    return made, tmp_path / 'out'


def test_the_report_writes_tables_pictures_and_a_page_of_its_own(reported):
    made, folder = reported
    grid, found, text, files = ablate.report(str(folder))
    assert all((folder / name).stat().st_size > 1000 for name in files)
    assert {'pareto_parameters.png', 'pareto_flops.png', 'losses.png', 'effects.png', 'interactions.png'} <= set(files)
    rows = results.rows_of(grid, found, '')
    assert len(rows) == len(made.grid.variants)
    mains, pairs = results.effects_of(grid, rows)
    by_axis = {e['axes'][0]: e for e in mains}
    assert by_axis['mlp']['mean'] == pytest.approx(0.1, abs=0.02) and by_axis['mlp']['over_pairs'] < 0.02
    assert abs(by_axis['freeze']['mean']) < 0.02 and len(by_axis) == 6
    assert not any(set(e['axes']) == {'grow', 'freeze'} for e in pairs)             # freezing needs growth
    html = (folder / 'report.html').read_text()
    assert "default-src 'none'" in html and '<link' not in html and '@import' not in html and ' src="/' not in html
    assert html.count('<img') == len(files) - 2 and html.count('data:image/png;base64,') == len(files) - 2
    assert 'main effects' in html.lower() and 'narrow' in text
    assert html.count('<figure class="chart">') == 2 and f'data-row="/{rows[0]["variant"]}"' in html    # curves, front
    assert f'python ablate.py report {folder}' in html and 'page made 20' in html and 'runs by commit unknown' in html


def test_a_record_names_the_commands_that_made_it(reported, tmp_path, monkeypatch):
    _, folder = reported
    monkeypatch.setattr(ablate, 'ROOT', str(tmp_path))
    for word in ('--jobs=2', '--pick=a b', '--jobs=2'):
        ablate.remember(str(folder), ['config/ablation/x.py', word])
    ablate.main_report([str(folder), '--record=tried', '--claim=none', '--title=What was tried'])
    record = next((tmp_path / 'records').glob('*_tried'))
    lines = (record / 'README.md').read_text().splitlines()
    assert lines[0] == '# What was tried' and '<h1>What was tried</h1>' in (record / 'report.html').read_text()
    assert [line.strip() for line in lines if 'ablate.py config' in line] == [
        'python ablate.py config/ablation/x.py --jobs=2', "python ablate.py config/ablation/x.py '--pick=a b'"]


def test_a_failed_run_stands_in_the_report(reported):
    _, folder = reported
    broken = next(folder.glob('*/seed=1337'))
    (broken / 'log.jsonl').write_text('')
    (broken / 'outcome.json').write_text(json.dumps({'state': 'failed', 'words': 'out of <memory>'}))
    text = ablate.report(str(folder))[2]
    assert f'- {broken.parent.name} seed=1337: out of <memory>' in text.partition('### Failed')[2]
    html = (folder / 'report.html').read_text()
    assert 'out of &lt;memory&gt;' in html and '<memory>' not in html


def test_every_searched_value_has_all_seeds_where_a_grid_says_so(plan, tmp_path):
    text = RANKS.replace("({v})", "(4)").replace("({mlp})", "(6)").replace("ranks = {'v': [1, 15], 'mlp': [1, 25]}\n", '')
    made = plan(text.replace('budget = 0.6\ntrials = 6\n', 'every_seed = True\nseeds = 2\n'))
    (tmp_path / 'out' / 'grid.json').parent.mkdir(exist_ok=True)
    (tmp_path / 'out' / 'grid.json').write_text(json.dumps(configurator.as_dict(made.grid)))
    runs = first_runs(made.grid)
    later = later_runs(made.grid, runs, lambda run: None)
    assert [run.seed for run in later] == [1, 1] and {run.searched for run in later} == {run.searched for run in runs}
    for run in (*runs, *later):
        fast = dict(run.searched)['learning_rate'] == 3e-3              # the better one, though not on the first seed
        pretend(made, run, 2.2 + 0.1 * fast - 0.4 * (fast and run.seed == 1))
    text = ablate.report(str(tmp_path / 'out'))[2]
    assert '### The search, every seed' in text
    assert '| low rank | 2.2000 ± 0.0000 (n=2) | 2.1000 ± 0.2828 (n=2) |' in text
    assert '| low rank | 0.003 | 2.1000 ± 0.2828 (n=2) |' in text
    assert '<h3>The search, every seed</h3>' in (tmp_path / 'out' / 'report.html').read_text()


def test_a_part_of_the_grid_is_reported_alone(reported):
    grid, found, text, _ = ablate.report(str(reported[1]), 'small')
    assert set(axes.switches(grid)) <= {variant for _, variant in found}
    assert not any('grow' in variant for _, variant in found) and '| grow+' not in text


@needs_chromium
def test_the_table_of_the_page_fits_in_1280_pixels_and_its_rows_rule_the_charts(reported, monkeypatch):
    monkeypatch.setattr(plots, 'draw', lambda *_: [])
    ablate.report(str(reported[1]))
    found = visit(reported[1] / 'report.html', '''
      const box = document.querySelector(".scroll"), rows = [...box.querySelectorAll("tbody tr")];
      const count = () => [...document.querySelectorAll("figure svg")].map(svg => svg.querySelectorAll("g > g").length);
      const before = count(), filter = document.querySelector("[name=filter0]");
      filter.value = "narrow"; filter.dispatchEvent(new Event("input"));
      return { wide: [box.scrollWidth, box.clientWidth], rows: rows.length, before, after: count(),
               shown: rows.filter(row => !row.hidden).length };''')
    assert found['wide'][0] <= found['wide'][1]
    assert found['before'][1] == found['rows'] and found['after'][1] == found['shown'] < found['rows']
    assert found['after'][0] < found['before'][0]


def test_the_interval_beside_the_baseline_is_student_s():
    """Against scipy's quantile for 4 degrees of freedom, 2.7764451."""
    beside = [0.01, 0.03, -0.02, 0.04, 0.00]
    half = 2.7764451 * statistics.stdev(beside) / 5 ** 0.5
    assert tables.reach({'beside': beside}) == f'{0.012 - half:+.4f} to {0.012 + half:+.4f}'
    assert tables.reach({'beside': [0.0] * 5}) == tables.reach({'beside': [0.01]}) == tables.reach({'beside': []}) == ''
