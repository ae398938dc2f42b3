"""Rank allocation: the choice against brute force, the budget's range, and runs that hold what was chosen."""
import itertools
import json
import random

import pytest
import torch

import configurator
import train
from checkpoints import checkpoint
from configurator import Config, GPTConfig
from decomposition import allocate, sizing
from decomposition.allocate import Site
from decomposition.sizing import best_counts, by_price, spectrum, uniform
from model import GPT
from tests.tiny import arguments, make_data
from variants import Spec, UserError

CONFIG = dict(block_size=16, vocab_size=23, n_layer=2, n_head=4, n_embd=32)
RULES = {'h.*.mlp.*': 'lowrank', '*.c_v': 'kron(4, 4)'}


def config(**changes):
    return Config(**{**CONFIG, 'linear': RULES, 'rank_budget': 0.5, **changes})


def brute(gains, budget):
    """The largest gain over all numbers of steps."""
    best = 0
    for counts in itertools.product(*(range(len(found) + 1) for found in gains.values())):
        if sum(c * n for c, n in zip(gains, counts)) <= budget:
            best = max(best, sum(sum(found[:n]) for found, n in zip(gains.values(), counts)))
    return best


@pytest.mark.parametrize('costs', [(2,), (2, 5), (3, 4, 7), (10, 11), (2, 3, 8)], ids=str)
def test_the_choice_is_the_best_there_is(costs):
    rng = random.Random(0)
    for _ in range(60):
        gains = {c: sorted((rng.random() ** 3 for _ in range(rng.randint(1, 9))), reverse=True) for c in costs}
        budget = rng.randint(0, sum(c * len(g) for c, g in gains.items()) + 3)
        found = best_counts(gains, budget)
        assert sum(c * n for c, n in found.items()) <= budget
        assert sum(sum(gains[c][:n]) for c, n in found.items()) == pytest.approx(brute(gains, budget), abs=1e-12)


def test_many_steps_are_chosen_by_gain_a_parameter():
    """More steps than the window holds: the greedy part must lead near the optimum."""
    rng = random.Random(1)
    for _ in range(5):
        gains = {c: sorted((least + 0.2 * rng.random() for _ in range(60)), reverse=True)
                 for c, least in ((3, 0.8), (20, 1.1))}
        found = best_counts(gains, 500)
        value = sum(sum(gains[c][:n]) for c, n in found.items())
        best = max(sum(gains[20][:n]) + sum(gains[3][:(500 - 20 * n) // 3]) for n in range(26))
        assert value == pytest.approx(best, abs=1e-12)


def test_without_the_window_the_greedy_choice_misses_some(monkeypatch):
    """Negative control: steps by gain per parameter alone leave a budget that a dearer step would have used."""
    gains = {2: [1.0], 5: [2.4]}
    assert best_counts(gains, 5) == {2: 0, 5: 1}
    monkeypatch.setattr(sizing, 'WINDOW', -1)
    assert best_counts(gains, 5) == {2: 1, 5: 0}


def sites(count=4, seed=0):
    rng = random.Random(seed)
    shapes = [rng.choice([(6, 4), (8, 4), (8, 6)]) for _ in range(count)]
    return [Site(f's{i}', Spec('lowrank', (1,)), s, sum(s), sum(s), (s[0] * s[1] - 1) // sum(s))
            for i, s in enumerate(shapes)]


@pytest.mark.parametrize('seed', range(5))
def test_sizes_by_spectrum_are_brute_forces(seed):
    found, rng = sites(seed=seed), random.Random(seed)
    gains = {s.name: sorted((rng.random() ** 2 for _ in range(s.most)), reverse=True) for s in found}
    for fraction in (0.6, 0.75, 0.9):
        budget = int(fraction * sum(s.dense for s in found))
        if budget < sum(s.first for s in found):
            continue
        best = max(sum(sum(gains[s.name][:k]) for s, k in zip(found, sizes))
                   for sizes in itertools.product(*(range(1, s.most + 1) for s in found))
                   if sum(s.numel(k) for s, k in zip(found, sizes)) <= budget)
        chosen = spectrum(found, budget, gains)
        assert sum(s.numel(chosen[s.name]) for s in found) <= budget
        assert sum(sum(gains[s.name][:chosen[s.name]]) for s in found) == pytest.approx(best, abs=1e-12)


def bent(count=4, seed=0):
    """Sites whose steps get cheaper, as a pivoted low rank's do."""
    rng = random.Random(seed)
    shapes = [rng.choice([(9, 6), (8, 5), (7, 6)]) for _ in range(count)]
    return [Site(f's{i}', Spec('pivot', (1,)), s, sum(s) - 1, sum(s) - 3, min(s) - 1, -2) for i, s in enumerate(shapes)]


@pytest.mark.parametrize('seed', range(8))
def test_sizes_by_price_are_near_brute_forces(seed):
    """What is lost is less than one step's gain, and nothing where the steps cost the same and the budget is used up."""
    found, rng = bent(seed=seed), random.Random(seed)
    assert all(s.numel(k) == k * (sum(s.shape) - k) for s in found for k in range(1, s.most + 1))
    gains = {s.name: sorted((rng.random() ** 2 for _ in range(s.most)), reverse=True) for s in found}
    for fraction in (0.5, 0.7, 0.9):
        budget = int(fraction * sum(s.dense for s in found))
        best = max(sum(sum(gains[s.name][:k]) for s, k in zip(found, sizes))
                   for sizes in itertools.product(*(range(1, s.most + 1) for s in found))
                   if sum(s.numel(k) for s, k in zip(found, sizes)) <= budget)
        chosen = spectrum(found, budget, gains)
        assert sum(s.numel(chosen[s.name]) for s in found) <= budget
        value = sum(sum(gains[s.name][:chosen[s.name]]) for s in found)
        worst = sum(sum(gains[s.name][:k]) for s, k in zip(found, uniform(found, budget).values()))
        assert best - max(max(g) for g in gains.values()) / 2 < value <= best + 1e-12 and value >= worst


@pytest.mark.parametrize('seed', range(3))
def test_steps_of_one_cost_by_price_are_the_best(seed):
    """Against best_counts, which is exact: one shape, so that nothing is left of the budget that a step could use."""
    found, rng = [Site(f's{i}', Spec('lowrank', (1,)), (40, 30), 70, 70, 17) for i in range(6)], random.Random(seed)
    gains = {s.name: sorted((rng.random() ** 3 for _ in range(s.most)), reverse=True) for s in found}
    for budget in (70 * 20, 70 * 41 + 3, 70 * 90):
        one, two = (sum(sum(gains[n][:k]) for n, k in way(found, budget, gains).items()) for way in (by_price, spectrum))
        assert one == pytest.approx(two, abs=1e-12)


@pytest.mark.parametrize('seed', range(3))
def test_uniform_gives_each_site_the_same_fraction(seed):
    found = [Site(f's{i}', Spec('lowrank', (1,)), s, sum(s), sum(s), s[0] * s[1] // sum(s)) for i, s in
             enumerate([(32, 128), (128, 32), (32, 32), (96, 32)])]
    for fraction in (0.2, 0.5, 0.77):
        budget = int(fraction * sum(s.dense for s in found))
        chosen = uniform(found, budget)
        used = sum(s.numel(chosen[s.name]) for s in found)
        assert budget - max(s.step for s in found) * len(found) < used <= budget
        shares = {s.name: s.numel(chosen[s.name]) / s.dense for s in found}
        assert all(abs(shares[s.name] - fraction) < 2 * s.step / s.dense for s in found)
        assert chosen['s0'] == chosen['s1']


# ---------------------------------------------------------------------------------------------------
# in a configuration

def test_sizes_are_written_into_the_rules():
    made, said = config(), []
    allocate.resolve(made, said.append)
    assert made.linear == {'h.*.mlp.*': 'lowrank(12)', '*.c_v': 'kron(4, 4, terms=6)'}
    rows = [row for row in GPT(configurator.model_config(made)).site_table() if row['spec'] != 'dense']
    dense = sum(a * b for a, b in (row['shape'] for row in rows))
    assert sum(row['parameters'] for row in rows) <= 0.5 * dense
    assert said == [f'rank_budget=0.5, uniform: {sum(row["parameters"] for row in rows):,} of {dense:,} parameters '
                    f'({sum(row["parameters"] for row in rows) / dense:.4f}) at 6 sites, sizes 6 to 12']
    none = config(rank_budget=0.0, linear={'*.c_v': 'lowrank(3)'})
    allocate.resolve(none, said.append)
    assert none.linear == {'*.c_v': 'lowrank(3)'} and len(said) == 1


@pytest.mark.parametrize('spec, size, expected', [
    ('lowrank', 5, 'lowrank(5)'),
    ('lowrank(64, exact_columns=2)', 5, 'lowrank(5, exact_columns=2)'),
    ('lowrank(rank=9)', 5, 'lowrank(5)'), ('pivot', 5, 'pivot(5)'), ('kron_pivot(8, 8)', 3, 'kron_pivot(8, 8, terms=3)'),
    ('kron(8, 8)', 3, 'kron(8, 8, terms=3)'), ('kron(8, 8, 2)', 3, 'kron(8, 8, 3)'),
    ('kron(n=8, m=4)', 3, 'kron(n=8, m=4, terms=3)'), ('abba', 4, 'abba(4, 4)'),
    ('abba(16, rank2=9)', 4, 'abba(4, rank2=4)'),
    ('lowrank(64) + kron(8, 8, terms=2)', 3, 'lowrank(3) + kron(8, 8, terms=2)'),
    ("sum(('lowrank', 'kron(4, 4)'), guide=True)", 2, "sum(('lowrank(2)', 'kron(4, 4)'), guide=True)"),
], ids=str)
def test_a_spec_takes_its_size(spec, size, expected):
    assert str(allocate.sized(allocate.parse_spec(spec), size)) == expected


@pytest.mark.parametrize('rules', [
    {'h.*.mlp.*': 'abba', '*.c_v': 'lowrank(1, weight_norm=True)'}, {'*.c_fc': 'lowrank + kron(8, 8, terms=2)'},
    {'*.c_q': 'kron_pivot(1, 2)', '*.c_fc': 'pivot', '*.mlp.c_proj': 'kron_pivot(2, 4)',
     'h.1.*': 'pivot(1, weight_norm=True)'},
    {'*.c_fc': 'kron(8, 8, scale=True, exact_columns=2)', 'h.1.*': 'lowrank(exact_columns=1)'}], ids=str)
def test_every_structure_is_counted_as_it_is_built(rules):
    made = config(linear=rules)
    allocate.resolve(made, lambda words: None)
    rows = [row for row in GPT(configurator.model_config(made)).site_table() if row['spec'] != 'dense']
    dense = sum(a * b for a, b in (row['shape'] for row in rows))
    assert 0.4 * dense < sum(row['parameters'] for row in rows) <= 0.5 * dense


@pytest.mark.parametrize('changes, words', [
    ({'rank_budget': 0.01}, 'these 6 sites reach 0.0435, with size 1 everywhere, to 0.97'),
    ({'rank_budget': 0.999}, 'reach 0.0435'), ({'linear': {}}, 'none that is not dense'),
], ids=str)
def test_a_budget_out_of_reach_says_the_range(changes, words):
    with pytest.raises(UserError) as caught:
        allocate.resolve(config(**changes))
    assert words in str(caught.value) and '\n' not in str(caught.value)


def test_the_range_is_reachable_at_both_ends():
    found = allocate.candidates(config())
    dense = sum(s.dense for s in found)
    for size in (lambda s: 1, lambda s: s.most):
        ends = sum(s.numel(size(s)) for s in found)
        chosen = uniform(found, allocate.budget_of(found, ends / dense + 1e-9))
        assert all(chosen[s.name] == size(s) for s in found)
    for s in found:                                     # one more would save nothing, or be of no use
        assert s.numel(s.most) < s.dense
        assert s.numel(s.most + 1) >= s.dense or s.most == allocate.full_size(s.spec, s.shape)


def test_gains_are_the_output_power_that_a_rank_keeps():
    from tests.kron.test_als import inputs, randn, stats_of
    W, x = randn(24, 16), inputs(500, 16)
    stats = stats_of(x)
    site = Site('s', Spec('lowrank', (1,)), (24, 16), 40, 40, 9)
    plain, whitened = allocate.gain_of(site, W), allocate.gain_of(site, W, stats)
    S = torch.linalg.svdvals(W)
    assert plain == pytest.approx((S.square() / S.square().sum())[:9].tolist())
    values = torch.linalg.svdvals(W @ torch.linalg.cholesky(allocate.with_ridge(stats.covariance + torch.outer(
        stats.mean, stats.mean), stats.count)))
    assert whitened == pytest.approx((values.square() / values.square().sum())[:9].tolist(), rel=1e-8)
    assert all(a >= b for a, b in itertools.pairwise(whitened)) and whitened[0] > plain[0]
    kron = Site('s', Spec('kron', (4, 4)), (24, 16), 40, 40, 9)
    K = torch.kron(randn(4, 4), randn(6, 4, seed=1))
    assert allocate.gain_of(kron, K) == pytest.approx([1] + [0] * 8, abs=1e-12)
    pairs = allocate.gain_of(Site('s', Spec('abba', (1, 1)), (24, 16), 80, 80, 4), W)
    assert pairs == pytest.approx([sum(plain[2 * k:2 * k + 2]) for k in range(4)])


def test_rules_that_differ_by_sizes_agree():
    chosen = {'h.0.mlp.c_fc': 'lowrank(3)', 'h.1.mlp.c_fc': 'lowrank(5)', '*.c_v': 'kron(4, 4, terms=7)', 'h.*': 'dense'}
    given = {'*.c_fc': 'lowrank', '*.c_v': 'kron(4, 4)', 'h.*': 'dense'}
    assert allocate.agrees(given, chosen)
    assert not allocate.agrees({**given, '*.c_v': 'kron(4, 2)'}, chosen)
    assert not allocate.agrees({'*': 'lowrank'}, chosen)


def test_merging_keeps_patterns_whose_sites_agree_and_the_order():
    rules = {'h.0.*': 'dense', '*.c_fc': 'lowrank', '*.c_v': 'lowrank(9)'}
    specs = {'h.1.mlp.c_fc': 'lowrank(3)', 'h.2.mlp.c_fc': 'lowrank(4)', 'h.1.attn.c_v': 'lowrank(2)',
             'h.2.attn.c_v': 'lowrank(2)'}
    assert list(allocate.merged(rules, specs).items()) == [
        ('h.0.*', 'dense'), ('h.1.mlp.c_fc', 'lowrank(3)'), ('h.2.mlp.c_fc', 'lowrank(4)'), ('*.c_v', 'lowrank(2)')]


# ---------------------------------------------------------------------------------------------------
# in a run

@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp('data'))


def run(data, out, *more):
    train.main(configurator.load(arguments(data, out, '--log_interval=1', *more)))
    return checkpoint.load(str(out))


def test_checkpoints_hold_the_sizes_and_resume_without_choosing(data, tmp_path, monkeypatch):
    rules = '--linear=h.*.mlp.*=lowrank; h.1.attn.c_v=kron(4,4)'
    whole = run(data, tmp_path / 'whole', rules, '--rank_budget=0.4')
    assert whole['config']['linear'] == {'h.*.mlp.*': 'lowrank(10)', 'h.1.attn.c_v': 'kron(4, 4, terms=5)'}
    assert json.loads((tmp_path / 'whole' / 'config.json').read_text())['linear'] == whole['config']['linear']
    run(data, tmp_path / 'cut', rules, '--rank_budget=0.4', '--max_iters=6', '--lr_decay_iters=12')
    monkeypatch.setattr(allocate, 'resolve', lambda *_: pytest.fail('chosen twice'))
    again = run(data, tmp_path / 'cut', rules, '--rank_budget=0.4', '--init_from=resume')
    assert again['config']['linear'] == whole['config']['linear'] and again['step'] == 12
    assert all(torch.equal(again['model'][name], t) for name, t in whole['model'].items())
    with pytest.raises(SystemExit):
        run(data, tmp_path / 'cut', '--linear=h.*=kron(4,4)', '--rank_budget=0.4', '--init_from=resume')


def test_a_dense_model_is_decomposed_by_its_spectra(data, tmp_path, capsys):
    run(data, tmp_path / 'dense', '--linear=*=dense')
    common = [f'--init_from={tmp_path / "dense"}', '--linear=h.*.mlp.*=lowrank', '--rank_budget=0.4', '--max_iters=0',
              '--rank_allocation=spectrum', '--decompose=svd_whitened', '--calibration_tokens=1024']
    chosen = run(data, tmp_path / 'spectrum', *common)['config']['linear']
    assert set(chosen) == {f'h.{i}.mlp.{n}' for i in range(2) for n in ('c_fc', 'c_proj')}
    assert len(set(chosen.values())) > 1
    plain = run(data, tmp_path / 'plain', *common, '--decompose=svd')['config']['linear']
    assert plain != chosen                              # the text has a say
    capsys.readouterr()
    train.main(configurator.load(arguments(data, tmp_path / 'none', *common, '--dry_run=True')))
    printed = capsys.readouterr().out
    assert all(spec in printed for spec in chosen.values()) and 'rank_budget=0.4, spectrum' in printed


def test_mistakes_are_one_line(data, tmp_path, capsys):
    for more, words in ((['--rank_budget=0.01', '--linear=h.*.mlp.*=lowrank'], 'reach 0.'),
                        (['--rank_budget=0.4', '--linear=h.*=dense'], 'none that is not dense')):
        with pytest.raises(SystemExit) as left:
            run(data, tmp_path / 'x', *more)
        error = capsys.readouterr().err
        assert left.value.code == 2 and words in error and error.count('\n') == 1
    for more, words in ((['--rank_budget=1.0'], 'below 1'),
                        (['--rank_budget=0.4', '--rank_allocation=spectrum'], 'scratch')):
        with pytest.raises(UserError, match=words):
            configurator.load(arguments(data, tmp_path, *more))
    assert isinstance(config(), GPTConfig)
