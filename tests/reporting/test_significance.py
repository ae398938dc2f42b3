"""t tests and intervals of a few seeds, beside quadrature, tables, and draws."""
import math
import random
import statistics

import pytest

from reporting import significance as s


def by_quadrature(t, degrees, count=4000):
    """P(T >= t), t >= 0, by the midpoint rule over the angle: c times the integral of cos ** (degrees - 1)."""
    begin = math.atan2(t, math.sqrt(degrees))
    width = (math.pi / 2 - begin) / count
    total = math.fsum(math.cos(begin + (k + 0.5) * width) ** (degrees - 1) for k in range(count)) * width
    return total * math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)) / math.sqrt(math.pi)


@pytest.mark.parametrize('degrees', [1, 2, 2.5, 4, 7.3, 30])
def test_the_survival_function_is_the_integral_of_the_density(degrees):
    for t in (0.0, 0.3, 2.7, 9.0):
        assert s.t_survival(t, degrees) == pytest.approx(by_quadrature(t, degrees), rel=1e-6)
        assert s.t_survival(-t, degrees) == pytest.approx(1 - s.t_survival(t, degrees), abs=1e-14)


def test_closed_forms_and_far_tails():
    for t in (0.5, 3.0, 1e3, 1e6):
        assert s.t_survival(t, 1) == pytest.approx(math.atan(1 / t) / math.pi, rel=1e-9)                # Cauchy
        root = math.sqrt(2 + t * t)
        assert s.t_survival(t, 2) == pytest.approx(1 / (root * (root + t)), rel=1e-9)
    assert s.t_survival(math.inf, 3) == 0 and s.t_survival(-math.inf, 3) == 1 and s.t_survival(0, 3) == pytest.approx(0.5)
    assert s.t_survival(1.3, 1e4) == pytest.approx(1 - statistics.NormalDist().cdf(1.3), rel=1e-3)


@pytest.mark.parametrize('degrees, quantile', [(1, 12.7062), (2, 4.30265), (3, 3.18245), (7, 2.36462), (24, 2.06390)])
def test_quantiles_of_the_tables(degrees, quantile):
    assert s.t_quantile(degrees) == pytest.approx(quantile, rel=1e-5)


def test_student_s_own_sleep_data():
    """Ten patients, two drugs (Student, 1908): the paired and the Welch test of it are in every textbook."""
    first = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    second = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    mean, half, p = s.paired([a - b for a, b in zip(first, second)])
    assert (mean, mean - half, mean + half) == pytest.approx((-1.58, -2.4598858, -0.7001142), abs=1e-6)
    assert p == pytest.approx(0.002833 / 2, abs=1e-6)
    mean, half, p = s.welch(first, second)
    assert (mean - half, mean + half) == pytest.approx((-3.3654832, 0.2054832), abs=1e-6)
    assert p == pytest.approx(0.03969707, abs=1e-7)
    assert s.welch(second, first)[2] == pytest.approx(1 - p)


def test_p_is_uniform_where_there_is_no_difference():
    rng = random.Random(0)
    draws = [[rng.gauss(1, 1) for _ in range(5)] + [rng.gauss(1, 1) for _ in range(5)] for _ in range(500)]
    for test in (lambda d: s.welch(d[:5], d[5:])[2], lambda d: s.paired([a - b for a, b in zip(d[:5], d[5:])])[2]):
        found = [test(d) for d in draws]
        assert statistics.fmean(p < 0.05 for p in found) == pytest.approx(0.05, abs=0.03)
        assert statistics.fmean(found) == pytest.approx(0.5, abs=0.04)


def test_few_values_and_no_spread():
    assert s.paired([0.5]) == (0.5, None, None) and s.welch([1.0], [2.0, 3.0])[1:] == (None, None)
    assert s.paired([-1.0, -1.0]) == (-1.0, 0.0, 0.0) and s.paired([0.0, 0.0])[2] == 0.5
    assert s.welch([2.0, 2.0], [1.0, 1.0]) == (1.0, 0.0, 1.0)
