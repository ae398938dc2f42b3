"""compress.py on tiny models: sizes against counts by hand, curvature against its formula, files, resuming, the report."""
import dataclasses
import json
import math
import os

import pytest
import torch

import compress
import configurator
from ablation import runner
from checkpoints import checkpoint
from compression import calibration, sizes, study, tables
from configurator import GPTConfig
from data.dataset import open_dataset
from decomposition import allocate, calibrate
from decomposition.allocate import candidates
from decomposition.calibrate import Stats
from decomposition.initialise import initialise
from decomposition.sites import Decomposition
from lowrank.svd import GRADIENT_RIDGE, two_sided_svd, whitened_svd, with_ridge
from model import GPT
from reporting import webpage
from tests.tiny import make_data
from variants import UserError

CONFIG = GPTConfig(block_size=16, vocab_size=23, n_layer=2, n_head=2, n_embd=16)
MLP = 'h.*.mlp.*'


def random_model(config=CONFIG, seed=0):
    torch.manual_seed(seed)
    model = GPT(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model.eval()


# ---------------------------------------------------------------------------------------------------
# sizes

RULES = {
    'low rank': {MLP: 'lowrank'},
    'kron': {'h.*.mlp.c_fc': 'kron(8, 4)', 'h.*.mlp.c_proj': 'kron(4, 8)'},
    'two kinds': {'h.*.mlp.c_fc': 'kron(8, 4)', MLP: 'lowrank'},
    'abba': {MLP: 'abba'},
    'sum': {MLP: 'lowrank + kron(4, 4)'},
    'exact': {MLP: 'lowrank(exact_columns=2)'},
    'layer 0 dense': {'h.0.*': 'dense', MLP: 'lowrank'},
}


@pytest.mark.parametrize('share', [0.6, 0.75])
@pytest.mark.parametrize('name', RULES)
def test_a_budget_is_filled_and_never_passed(name, share):
    rules = sizes.fitted(CONFIG, study.Variant(linear=RULES[name]), share, MLP)
    model = GPT(dataclasses.replace(CONFIG, linear=rules))
    used = sum(p.numel() for n, p in model.named_parameters() if '.mlp.' in n)
    assert sizes.cost(model.config, MLP)[:2] == (used, 2 * 2 * 16 * 64)
    step = min(site.step for site in candidates(dataclasses.replace(CONFIG, linear=RULES[name])))
    count = sum(n.startswith('h.1') or name != 'layer 0 dense' for n in model.sites() if '.mlp.' in n)
    assert share * 4096 - count * step < used <= share * 4096           # uniform sizes rise together


def test_what_stays_dense_is_paid_for_by_the_others():
    free = sizes.fitted(CONFIG, study.Variant(linear={'h.0.*': 'dense', MLP: 'lowrank'}), 0.75, MLP)
    assert free == {'h.0.*': 'dense', MLP: 'lowrank(6)'}                # 3072 - 2048 left for two of 80 a rank
    with pytest.raises(UserError, match='leaves -.* parameters for 2 matrices'):
        sizes.fitted(CONFIG, study.Variant(linear={'h.0.*': 'dense', MLP: 'lowrank'}), 0.4, MLP)


def test_rules_outside_the_counted_sites_and_sizes_that_miss_are_refused():
    with pytest.raises(UserError, match='compresses h.0.attn.c_v'):
        sizes.fitted(CONFIG, study.Variant(linear={'h.0.attn.c_v': 'lowrank'}), 0.5, MLP)
    given = study.Variant(linear={MLP: 'lowrank(5)'}, sizes='given')
    assert sizes.fitted(CONFIG, given, 0.39, MLP) == {MLP: 'lowrank(5)'}                # 5 x 80 of 1024: 0.3906
    assert sizes.fitted(CONFIG, given, 0, MLP) == {MLP: 'lowrank(5)'}
    with pytest.raises(UserError, match='take 0.3906 of the parameters, and the budget is 0.5'):
        sizes.fitted(CONFIG, given, 0.5, MLP)
    with pytest.raises(UserError, match="sites='x' matches none"):
        sizes.fitted(CONFIG, given, 0.5, 'x')


# ---------------------------------------------------------------------------------------------------
# curvature

def random_moment(n, seed, spread=1.0):
    g = torch.Generator().manual_seed(seed)
    X = torch.randn(4 * n, n, generator=g, dtype=torch.float64) * torch.logspace(0, -spread, n, dtype=torch.float64)
    return X.t() @ X / len(X)


def cost_of(D, C, H):
    return (with_ridge(H, ridge=GRADIENT_RIDGE) @ D @ with_ridge(C) * D).sum().item() / 2


@pytest.mark.parametrize('shape', [(12, 8), (8, 12)], ids=str)
def test_two_sided_svd_is_the_best_of_its_rank(shape):
    out, width = shape
    W = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    C, H = random_moment(width, 2), random_moment(out, 3)
    U, V = two_sided_svd(W, 4, C, H)
    best = cost_of(W - U @ V, C, H)
    assert torch.allclose(U.t() @ U, V @ V.t(), atol=1e-10)                             # balanced
    roots = allocate.root(with_ridge(H, ridge=GRADIENT_RIDGE)), allocate.root(with_ridge(C))  # Eckart and Young
    tail = torch.linalg.svdvals(roots[0] @ W @ roots[1])[4:].square().sum().item() / 2
    assert abs(best - tail) <= 1e-10 * tail
    for other in (whitened_svd(W, 4, C), two_sided_svd(W, 4, C, torch.eye(out))):
        assert cost_of(W - other[0] @ other[1], C, H) > 1.01 * best
    P, Q = whitened_svd(W, 4, C), two_sided_svd(W, 4, C, torch.eye(out))
    assert torch.allclose(P[0] @ P[1], Q[0] @ Q[1], atol=1e-10)
    generator = torch.Generator().manual_seed(5)
    for _ in range(20):                                 # no neighbour is better
        near = (t + 1e-3 * torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in (U, V))
        assert cost_of(W - torch.matmul(*near), C, H) > best


def stats_of(site, seed, loud=1.0):
    C, H = random_moment(site.shape[1], seed), loud * random_moment(site.shape[0], seed + 1)
    return Stats(100, torch.zeros(site.shape[1], dtype=torch.float64), C, H)


def test_curvature_gains_are_the_loss_that_ranks_save_and_loud_sites_get_more():
    model, rules = random_model(), {MLP: 'lowrank'}
    sites = candidates(dataclasses.replace(CONFIG, linear=rules))
    seen = {site.name: stats_of(site, i, 100.0 if i == 2 else 1.0) for i, site in enumerate(sites)}
    weights = {name: m.dense_weight().detach() for name, m in model.sites().items()}
    variant = study.Variant(linear=rules, sizes='curvature')
    found = sizes.gains(sites, variant, weights.get, lambda names, gradients: [seen] if gradients else None, {})
    for site in sites:
        C, H, W = seen[site.name].covariance, seen[site.name].gradient, weights[site.name].double()
        U, V = two_sided_svd(W, 5, C, H)
        saved = cost_of(W, C, H) - cost_of(W - U @ V, C, H)
        assert abs(sum(found[site.name][:5]) - saved) <= 1e-10 * saved
    chosen = sizes.fitted(CONFIG, variant, 0.5, MLP, weights.get, lambda *_: [seen])
    ranks = {name: GPT(dataclasses.replace(CONFIG, linear=chosen)).sites()[name].rank for name in weights if '.mlp.' in name}
    assert ranks[sites[2].name] > max(rank for name, rank in ranks.items() if name != sites[2].name)
    assert 0.5 * 4096 - 80 < sum(80 * rank for rank in ranks.values()) <= 0.5 * 4096
    spectrum = sizes.fitted(CONFIG, dataclasses.replace(variant, sizes='spectrum'), 0.5, MLP, weights.get, lambda *_: [seen])
    assert spectrum != chosen                           # shares of each site's own outputs know nothing of the loss


# ---------------------------------------------------------------------------------------------------
# one calibration for all

def text(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [tuple(torch.randint(23, (8, 16), generator=generator) for _ in range(2)) for _ in range(3)]


def kept(tmp_path, model, identity='a', batches=None):
    names = [name for name in model.sites() if '.mlp.' in name]
    return calibration.Calibration(model, names, batches or text(), tmp_path, 'x', [identity])


@pytest.mark.parametrize('gradients', [False, True])
def test_a_calibration_from_its_file_is_the_pass(tmp_path, monkeypatch, gradients):
    model = random_model(dataclasses.replace(CONFIG, mlp='swiglu(32)'))                 # c_gate and c_fc share an input
    seen = kept(tmp_path, model)
    plain = {k: v for found in calibrate.passes(model, seen.sites, text(), gradients) for k, v in found.items()}
    first = {k: v for found in seen.passes(model, seen.sites, seen.text, gradients) for k, v in found.items()}
    monkeypatch.setattr(calibrate, 'passes', None)                                      # no second pass
    again = kept(tmp_path, model)
    second = {k: v for found in again.passes(model, again.sites, again.text, gradients) for k, v in found.items()}
    for stats in (first, second):
        assert list(stats) == seen.sites
        for site, expected in plain.items():
            assert stats[site].count == expected.count
            for part in ('mean', 'covariance', 'gradient'):
                pair = getattr(stats[site], part), getattr(expected, part)
                assert pair == (None, None) if pair[1] is None else torch.equal(*pair)


def test_a_calibration_of_other_text_or_a_damaged_file_is_measured_again(tmp_path):
    model = random_model()
    seen = kept(tmp_path, model)
    list(seen.passes(model, seen.sites, seen.text))
    assert seen.there(False) and not seen.there(True)
    other = kept(tmp_path, model, 'b', text(1))
    assert not other.there(False)
    site = other.sites[0]
    measured = next(iter(other.passes(model, [site], other.text)))[site].covariance
    assert torch.equal(measured, next(calibrate.passes(model, [site], text(1)))[site].covariance)
    path = tmp_path / 'x.safetensors'
    path.write_bytes(path.read_bytes()[:50])
    assert not other.there(False)
    assert torch.equal(next(iter(other.passes(model, [site], other.text)))[site].covariance, measured)
    assert other.there(False)


def test_a_calibration_that_cannot_be_kept_is_still_given(tmp_path, capsys):
    (tmp_path / 'file').write_text('')
    model = random_model()
    seen = kept(tmp_path / 'file' / 'below', model)
    found = {k: v for part in seen.passes(model, seen.sites, seen.text) for k, v in part.items()}
    assert set(found) == set(seen.sites) and 'is not cached' in capsys.readouterr().err


def test_sequential_hessian_takes_its_gradients_from_the_file(tmp_path):
    model = random_model(dataclasses.replace(CONFIG, mlp='swiglu(32)'))
    rules = {MLP: 'lowrank(6)'}
    config = dataclasses.replace(model.config, linear=rules)
    seen, made = kept(tmp_path, model), []
    for how in ({'batches': text()}, {'batches': seen.text, 'passes': seen.passes}):
        made.append(GPT(config))
        initialise(made[-1], model.config, model.state_dict(), how=Decomposition('svd_whitened_hessian_sequential', **how))
    assert all(torch.equal(a, b) for a, b in zip(*(m.state_dict().values() for m in made)))
    plain = GPT(config)
    initialise(plain, model.config, model.state_dict(), how=Decomposition('svd_whitened_sequential', text()))
    assert not torch.allclose(plain.sites()['h.1.mlp.c_fc'].dense_weight(), made[0].sites()['h.1.mlp.c_fc'].dense_weight())


# ---------------------------------------------------------------------------------------------------
# the program

STUDY = '''"""A tiny study."""
dataset = 'tiny'
select = 'val:0:200'
test = 'val:200:500'
calibration_tokens = 256
budgets = {'75%': 0.75, '50%': 0.5}
variants = {
    'svd': {'linear': {'h.*.mlp.*': 'lowrank'}, 'decompose': 'svd', 'heal': '50%'},
    'broken': {'linear': {'h.0.*': 'dense', 'h.*.mlp.*': 'lowrank'}, 'budgets': '50%'},
    'als': {'linear': {'h.*.mlp.c_fc': 'kron(16, 4)', 'h.*.mlp.c_proj': 'kron(4, 16)'}, 'decompose': 'als',
            'calibration_seeds': 2},
    'given': {'linear': {'h.*.mlp.*': 'lowrank(6)'}, 'decompose': 'svd_whitened_hessian', 'sizes': 'given',
              'budgets': '50%',
              'at': {'50%': {'linear': {'h.*.mlp.c_fc': 'lowrank(6)', 'h.*.mlp.*': 'lowrank(6, exact_columns=4)'}}}},
}
heal = {'max_iters': 3, 'eval_interval': 3, 'eval_iters': 2, 'warmup_iters': 0, 'lr_decay_iters': 3, 'batch_size': 2,
        'gradient_accumulation_steps': 1, 'learning_rate': 1e-2, 'min_lr': 1e-3}
'''


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    """A folder with the data set `tiny`, a dense model of it and a study."""
    folder = tmp_path_factory.mktemp('study')
    data = open_dataset(make_data(folder / 'data') / 'tiny')
    model = random_model(dataclasses.replace(CONFIG, vocab_size=data.vocab_size, block_size=32))
    checkpoint.save(folder / 'dense', {'step': 7, 'config': configurator.as_dict(model.config),
                                       'model': model.state_dict(), 'data': data.tokenizer})
    (folder / 'study.py').write_text(STUDY)
    return folder


def arguments(place, out, *more):
    return [str(place / 'study.py'), f'--data_dir={place / "data"}', f'--source={place / "dense"}', f'--out_dir={out}',
            '--block_size=16', '--device=cpu', *more]


def lines(out):
    return [json.loads(line) for line in (out / 'results.jsonl').read_text().splitlines()]


@pytest.fixture
def run(monkeypatch, place, tmp_path):
    """run(*arguments) -> exit code of main_run in this process, whose signals stay as they are."""
    monkeypatch.setattr(compress, 'stop_on_signals', lambda: None)
    monkeypatch.setattr(runner, 'STOP', type(runner.STOP)())

    def start(*more, out=tmp_path / 'out'):
        try:
            compress.main_run(arguments(place, out, *more))
        except SystemExit as left:
            return left.code
        return 0
    return start


def expected_loss(place, rules, method, seed, where):
    """The zero-shot loss by initialise and a plain loop over windows."""
    from decomposition.initialise import read_folder
    source, state, _ = read_folder(str(place / 'dense'))
    source = dataclasses.replace(source, block_size=16)
    state['transformer.wpe.weight'] = state['transformer.wpe.weight'][:16]
    data = open_dataset(place / 'data' / 'tiny')
    model = GPT(dataclasses.replace(source, linear=rules))
    initialise(model, source, state, how=Decomposition(method, calibrate.batches(data, 256, 16, seed)))
    tokens = torch.from_numpy(data.splits['val'].read(*where))
    nats = 0.0
    with torch.no_grad():
        for start in range(0, len(tokens) - 1, 16):
            x, y = tokens[start:start + 16], tokens[start + 1:start + 17]
            nats += model.eval()(x[None, :len(y)], y[None])[1].item() * len(y)
    return nats / (len(tokens) - 1)


def test_a_study_runs_survives_a_failure_and_is_not_run_twice(place, tmp_path, run, capsys):
    assert run('--only=als,broken,given,dense') == 1                    # one trial failed
    shown = capsys.readouterr()
    assert 'broken 50% seed=1337: failed: a budget of 0.5 leaves' in shown.out and 'failed:\nbroken 50%' in shown.err
    out = tmp_path / 'out'
    found = {(x['variant'], x['budget'], x['seed']): x for x in lines(out) if x['kind'] == 'zero'}
    assert set(found) == {('dense', '', 1337), ('given', '50%', 1337),
                          *(('als', label, seed) for label in ('75%', '50%') for seed in (1337, 1))}
    for key, method, rules in ((('als', '50%', 1), 'als', None), (('dense', '', 1337), 'van_loan', {}),
                               (('given', '50%', 1337), 'svd_whitened_hessian', None)):
        line = found[key]
        rules = line['linear'] if rules is None else rules
        for name, where in (('select', (0, 200)), ('test', (200, 500))):
            assert abs(line[name]['loss'] - expected_loss(place, rules, method, key[2], where)) < 1e-5
            assert line[name]['perplexity'] == math.exp(line[name]['loss'])
            assert line[name]['tokens'] == where[1] - where[0] - 1
    assert found['given', '50%', 1337]['linear'] == {'h.*.mlp.c_fc': 'lowrank(6)', MLP: 'lowrank(6, exact_columns=4)'}
    assert found['als', '50%', 1337]['select'] != found['als', '50%', 1]['select']
    assert found['als', '75%', 1337]['share'] <= 0.75 and found['als', '75%', 1337]['parameters'] > 0.7 * 4096
    calibrated = [(x['variant'], x['seed']) for x in found.values() if x['calibrate_cpu_s'] > 0]
    # `given` needs gradients too, which als had not left in a file
    assert sorted(calibrated) == [('als', 1), ('als', 1337), ('given', 1337)]
    assert all(x['decompose_cpu_s'] >= 0 for x in found.values())
    before = lines(out)
    assert run('--only=als,given,dense') == 0 and lines(out) == before
    assert '6 trials, 6 of them done before' in capsys.readouterr().out
    assert (out / 'compression.png').stat().st_size > 1000 and '| als |' in (out / 'report.md').read_text()
    html = (out / 'report.html').read_text()
    for key, line in found.items():                     # every trial by name, with both of its losses
        name = f'{key[0]} {key[1]}'.strip() + f', seed={key[2]}, test {line["test"]["loss"]:.4f}, select'
        assert html.count(name) == 1
    assert 'broken 50% seed=1337: a budget of 0.5 leaves' in html and f'python compress.py report {out}' in html
    assert f'commit {webpage.commit(json.loads((out / "env.json").read_text()))}' in html and 'data-row="als"' in html


def test_a_line_that_a_kill_cut_short_is_done_again_and_changed_settings_too(tmp_path, run, capsys):
    assert run('--only=svd', '--budgets={"75%": 0.75}', '--variants={"svd": {"linear": {"h.*.mlp.*": "lowrank"}}}') == 0
    path = tmp_path / 'out' / 'results.jsonl'
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])                       # of the only line
    again = ['--budgets={"75%": 0.75}', '--only=svd']
    assert run(*again, '--variants={"svd": {"linear": {"h.*.mlp.*": "lowrank"}}}') == 0
    rows = path.read_bytes().splitlines()
    assert len(rows) == 2 and json.loads(rows[1])['select'] == json.loads(whole)['select']
    capsys.readouterr()
    assert run(*again, '--variants={"svd": {"linear": {"h.*.mlp.*": "lowrank"}, "prune_before": "magnitude", '
               '"prune_fraction": 0.5}}') == 0
    assert '1 trials, 0 of them done before' in capsys.readouterr().out
    assert lines_after(path)[-1]['select'] != json.loads(whole)['select']


def lines_after(path):
    return [json.loads(row) for row in path.read_bytes().splitlines() if row.endswith(b'}')]


@pytest.mark.slow
def test_healing_with_other_settings_does_not_take_the_run_of_the_old_ones(tmp_path, run):
    def healed(more):
        assert run('--only=svd', '--budgets={"50%": 0.5}', '--variants={"svd": {"linear": {"h.*.mlp.*": "lowrank"}, '
                   f'"heal": "50%"{more}}}}}') == 0
        return [x['healed'] for x in lines(tmp_path / 'out') if x['kind'] == 'healed']
    first, = healed('')
    again = healed(', "heal_settings": {"learning_rate": 1e-6, "min_lr": 1e-7}')
    assert len(again) == 2 and again[1]['test']['loss'] > first['test']['loss']
    assert json.loads((tmp_path / 'out/healed/svd 50% 0/run/config.json').read_text())['learning_rate'] == 1e-6


@pytest.mark.slow
def test_healing_lowers_the_loss_and_is_not_run_twice(tmp_path, run, monkeypatch):
    only = ('--only=svd', '--variants={"svd": {"linear": {"h.*.mlp.*": "lowrank"}, "heal": "50%"}}')
    assert run(*only) == 0
    out = tmp_path / 'out'
    zero, healed = (next(x for x in lines(out) if x['kind'] == kind and x['budget'] == '50%') for kind in ('zero', 'healed'))
    assert healed['healed']['test']['loss'] < zero['test']['loss'] and healed['healed']['settings']['max_iters'] == 3
    folder = out / 'healed' / 'svd 50% 0'
    assert not (folder / 'start').exists() and not list((folder / 'run').glob('ckpt_*'))
    assert json.loads((folder / 'run' / 'config.json').read_text())['linear'] == zero['linear']
    monkeypatch.setattr(runner, 'carry_out', None)
    assert run(*only) == 0
    report = (out / 'report.md').read_text()
    assert '→' in report and f'{healed["healed"]["seconds"]:.0f} |' in report.split('healing s')[-1]


def test_a_refined_trial_is_better_and_heals_by_the_sources_logits(place, tmp_path, run):
    low = {'linear': {'h.*.mlp.*': 'lowrank'}, 'decompose': 'svd', 'budgets': '50%', 'calibration_tokens': 2048}
    more = {'refine': 30, 'heal': '50%', 'heal_settings': {'distill': 'dense', 'distill_top_k': 4, 'trainable': 'h.*.mlp.*'}}
    assert run(f'--variants={json.dumps({"plain": low, "refined": {**low, **more}})}') == 0
    zero = {line['variant']: line for line in lines(tmp_path / 'out') if line['kind'] == 'zero'}
    assert zero['refined']['test']['loss'] < zero['plain']['test']['loss'] - 0.01
    assert 'refine' in zero['refined']['signature'] and 'refine' not in zero['plain']['signature']
    settings = next(line['healed']['settings'] for line in lines(tmp_path / 'out') if line['kind'] == 'healed')
    assert settings['distill'] == 'dense'               # as it was asked for: the same study heals nothing twice
    text = (tmp_path / 'out/healed/refined 50% 0/run/log.jsonl').read_text()
    assert '"kl": ' in text and not list((tmp_path / 'out' / 'refined').iterdir())


# ---------------------------------------------------------------------------------------------------
# mistakes and reports

MISTAKES = {
    '--test=val:100:300': 'select (val:0:200) and test (val:100:300) overlap',
    '--test=val:5': "test is SPLIT:START:STOP with at least 2 tokens, as 'val:0:8192', or SPLIT, got 'val:5'",
    '--budgets={"a": 1.5}': "budgets: 'a' needs a share from 0 to below 1, got 1.5",
    '--budgets={"75%": 0, "50%": 0.5}': "by which no sizes can be chosen; take sizes='given'",
    '--variants={"a": {"method": "als"}}': "there is no setting 'method'",
    '--variants={"a": {"sizes": "fair"}}': "sizes must be one of uniform, spectrum, curvature, given, got 'fair'",
    '--variants={"a": {"heal": "10%"}}': "heal names '10%', which is none of the budgets 75%, 50%",
    '--variants={"a, b": {}}': 'a name without commas',
    '--variants={}': 'a study needs `variants`',
    '--train=x.py': 'either `source`',
    '--models=3': 'models=3 needs `train`',
    '--only=alz': "there is no variant 'alz', did you mean 'als'?",
    '--test=dev:0:100': "has no split 'dev'; it has",
    '--test=val:200:9999': 'ends after the',
    '--sites=x.*': "sites='x.*' matches none of the matrices",
    '--block_size=64': 'block_size can be at most 32',
    '--device=cuda:99': 'is not on this machine',
}


@pytest.mark.parametrize('argument', MISTAKES)
def test_mistakes_are_one_sentence(place, tmp_path, monkeypatch, capsys, argument):
    monkeypatch.setattr(compress, 'stop_on_signals', lambda: None)
    monkeypatch.setattr('sys.argv', ['compress.py', *arguments(place, tmp_path / 'out'), argument])
    with pytest.raises(SystemExit) as left:
        compress.main()
    shown = capsys.readouterr().err
    assert MISTAKES[argument] in shown and shown.count('\n') == 1 and left.value.code == 2


def test_a_mistake_of_the_command_line_is_said_without_torch(run_program, tmp_path):
    for words, given in (('name a study', []), ('there is no such config file', ['none.py']),
                         ('name the folder of a study', ['report']), ('name the out_dir of a study', ['report', tmp_path])):
        done = run_program('compress.py', *given, code=2)
        assert words in done.stderr and done.stderr.count('\n') == 1 and 'Traceback' not in done.stderr


@pytest.mark.parametrize('name', ['char', 'smollm2'])
def test_our_studies_are_read(name):
    found = compress.read([f'config/compression/{name}.py'])
    todo = study.trials(found)
    assert found.out_dir == os.path.join('out', f'compression_{name}') and len(set(todo)) == len(todo) > 10
    assert todo[0].variant == study.DENSE and sum(trial.variant == study.DENSE for trial in todo) == found.models


def line(variant, source, test, healed=None, budget='b', seed=1337):
    zero = {'variant': variant, 'budget': budget, 'source': source, 'seed': seed, 'parameters': 10, 'share': 0.1,
            'total': 20, 'output_error': None, 'decompose_cpu_s': 1.0, 'test': {'loss': test, 'tokens': 99},
            'select': {'loss': test, 'tokens': 50}}
    return {'zero': zero, 'healed': healed and {'healed': {'test': {'loss': healed}, 'select': {'loss': healed}}}}


def test_the_gap_is_closed_by_the_right_share():
    rules = {MLP: 'kron(4, 4)'}
    given = study.Study(train='x', budgets={'b': 0}, baseline='van_loan', variants={
        'base': {'linear': rules, 'decompose': 'van_loan'}, 'als': {'linear': rules, 'decompose': 'als'},
        'apart': {'linear': {MLP: 'kron(8, 8)'}, 'decompose': 'als'}})
    found = tables.grouped(given, [line('dense', 0, 1.0, 0.9, ''), line('dense', 1, 2.0, None, ''),
                                   line('base', 0, 3.0, 1.9), line('base', 1, 6.0), line('als', 0, 1.5, 1.4),
                                   line('als', 1, 3.0), line('apart', 0, 1.1)])
    rows = {name: (zero, healed) for name, _, zero, healed in tables.gaps(given, found, 'test')}
    assert rows['als'] == ([0.75, 0.75], [pytest.approx(0.5)])
    assert rows['apart'] == ([], [])                    # no baseline with its shape
    shown = tables.text(given, [x for lines in found.values() for x in lines])
    assert '| als b | 75.0% (n=2) | 50.0% |' in shown and '| als | 2.2500 ± 1.0607 (n=2) → 1.4000 |' in shown


def test_a_record_holds_table_plot_results_and_machine(place, tmp_path, run, monkeypatch, capsys):
    assert run('--only=als', '--budgets={"50%": 0.5}', '--variants={"als": {"linear": {"h.*.mlp.*": "lowrank"}}}') == 0
    monkeypatch.setattr(compress, 'ROOT', str(tmp_path))
    compress.main_report([str(tmp_path / 'out'), '--record=tiny', '--title=Tiny'])
    folder = next((tmp_path / 'records').iterdir())
    page = (folder / 'README.md').read_text()
    assert page.startswith('# Tiny') and '| als |' in page and 'Machine: torch' in page and 'Commands:' in page
    assert (folder / 'compression.png').exists() and (folder / 'report.html').exists()
    assert json.loads((folder / 'env.json').read_text())
    assert json.loads((folder / 'log.jsonl').read_text().splitlines()[0])['variant'] == 'als'


def test_points_beyond_the_axis_are_arrows_with_their_values():
    from compression import tables
    from reporting import palette
    axes = palette.figure(4, 3).subplots()
    tables.dots(axes, [(25.0, 0), (4.3e5, 1)], False, 1000.0)
    places = {line.get_marker(): [*zip(line.get_xdata(), line.get_ydata())] for line in axes.lines}
    assert places == {'o': [(25.0, 0)], '>': [(1000.0, 1)]} and [text.get_text() for text in axes.texts] == ['4.3e+05']
