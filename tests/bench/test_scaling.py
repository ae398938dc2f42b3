"""bench/scaling.py: exponents of known curves, the FLOPs of each axis by hand, and a run of one axis."""
import pytest

import configurator
from bench import scaling
from model import GPT
from variants import UserError


@pytest.mark.parametrize('power', [0.0, 0.5, 1.0, 2.0])
def test_an_exponent_is_that_of_the_curve(power):
    sizes = (3, 8, 16, 64)
    assert scaling.exponent(sizes, [7 * size ** power for size in sizes]) == pytest.approx(power)


def test_the_first_size_does_not_count():
    assert scaling.exponent((1, 8, 16, 64), [1e9, *(size ** 1.5 for size in (8, 16, 64))]) == pytest.approx(1.5)


def test_an_offset_and_noise_lower_and_blur_it():
    sizes = (64, 128, 256, 512)
    assert 1.0 < scaling.exponent(sizes, [size ** 2 + 128 ** 2 for size in sizes]) < 2.0
    noisy = [size ** 2 * factor for size, factor in zip(sizes, (1.0, 1.05, 0.95, 1.02))]
    assert scaling.exponent(sizes, noisy) == pytest.approx(2.0, abs=0.1)


def by_hand(config):
    """FLOPs of one forward token of a dense GPT: 24 C^2 per block, 4 T C of attention, 2 C V of the head."""
    C = config.n_embd
    return config.n_layer * (24 * C * C + 4 * config.block_size * C) + 2 * C * config.vocab_size


@pytest.mark.parametrize('axis', ['width', 'depth', 'context', 'batch'])
def test_flops_grow_as_the_models_own_count_does(axis):
    sizes, counted, expected = scaling.AXES[axis][0], [], []
    for size in sizes:
        config, batch = scaling.config_of(axis, size)
        tokens = batch * config.block_size
        counted.append(3 * GPT(config).flops_per_token() * tokens)
        expected.append(3 * by_hand(config) * tokens)
    assert scaling.exponent(sizes, counted) == pytest.approx(scaling.exponent(sizes, expected), abs=1e-9)
    least, most = {'width': (1.7, 2), 'depth': (0.9, 1), 'context': (1, 1.5), 'batch': (1, 1)}[axis]
    assert least - 1e-9 <= scaling.exponent(sizes, counted) <= most + 1e-9


def test_growth_beyond_the_flops_is_named():
    slopes = {'ms': 1.5, 'bytes': 0.9, 'flops': 1.0, 'parameters': 1.0}
    assert scaling.faster(slopes) == ['time'] and scaling.faster(slopes | {'ms': 1.1, 'bytes': 1.3}) == ['memory']
    assert scaling.faster(slopes | {'ms': 1.0, 'bytes': 1.3, 'parameters': 1.3}) == []      # weights, not activations


def test_one_axis_quickly(monkeypatch):
    monkeypatch.setitem(scaling.BASE, 'n_embd', 32)
    settings = configurator.load(['--axes=batch', '--quick=True'], scaling.Settings)
    scaling.check(settings, 'scaling')
    result = scaling.run(settings, 'scaling')
    row = result['rows'][0]
    assert row['sizes'] == [2, 4, 8, 16] and row['exponents']['flops'] == pytest.approx(1) and min(row['ms']) > 0
    assert row['parameters'][0] == row['parameters'][-1] and 0 < row['exponents']['bytes'] < 1
    assert scaling.text(result).count('batch') == 5


def test_an_unknown_axis_is_refused():
    with pytest.raises(UserError, match='axes takes width, depth'):
        scaling.check(configurator.load(['--axes=height'], scaling.Settings), 'scaling')
