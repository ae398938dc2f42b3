"""Statistics of a few seeds: t intervals, one-sided tests of means (Welch) and of differences seed by seed. No torch."""
import functools
import math
import statistics


def beta_share(x, a, b):
    """The regularised incomplete beta function I_x(a, b), 0 <= x <= 1, by the continued fraction of Abramowitz & Stegun
    26.5.8, from its far end to its beginning; relative error below 1e-10 for a, b up to some hundreds."""
    if x in (0.0, 1.0):
        return x
    if x > (a + 1) / (a + b + 2):                       # the fraction converges slowly there
        return 1 - beta_share(1 - x, b, a)
    fraction = 1.0
    for n in range(120, 0, -1):
        m = n // 2
        term = (-(a + m) * (a + b + m) / ((a + 2 * m) * (a + 2 * m + 1)) if n % 2 else
                m * (b - m) / ((a + 2 * m - 1) * (a + 2 * m)))
        fraction = 1 + term * x / fraction
    scale = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    return math.exp(scale) / (a * fraction)


def t_survival(t, degrees):
    """P(T >= t) of Student's t; degrees of freedom need not be whole."""
    if math.isinf(t):
        return float(t < 0)
    beyond = beta_share(degrees / (degrees + t * t), degrees / 2, 0.5) / 2
    return beyond if t >= 0 else 1 - beyond


@functools.cache
def t_quantile(degrees, level=0.95):
    """t with P(|T| <= t) = level, by bisection."""
    low, high = 0.0, 1e5
    while high - low > 1e-10 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if 2 * t_survival(middle, degrees) > 1 - level else (low, middle)
    return (low + high) / 2


def interval(values, level=0.95):
    """(mean, half width): mean +- t(n - 1) s / sqrt(n), s the standard deviation; (mean, None) of one value."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, None
    return mean, t_quantile(len(values) - 1, level) * statistics.stdev(values) / math.sqrt(len(values))


def lower(difference, error, degrees):
    """One-sided p of a difference: P(T <= difference / error), that of one so far below 0 if there were none."""
    t = difference / error if error else math.copysign(math.inf, difference) if difference else 0.0
    return t_survival(-t, degrees)


def paired(differences):
    """(mean, half width of the 95 % interval, one-sided p that the mean is below 0) of differences seed by seed.

    The paired t test, n - 1 degrees of freedom; (mean, None, None) of one difference.
    """
    mean, half = interval(differences)
    if half is None:
        return mean, None, None
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return mean, half, lower(mean, error, len(differences) - 1)


def welch(values, others):
    """(difference of means, half width of its 95 % interval, one-sided p that the values are lower than the others).

    Welch's t test, which lets the two deviations differ; its degrees of freedom by Welch and Satterthwaite. (difference,
    None, None) where one of the two has a single value.
    """
    difference = statistics.fmean(values) - statistics.fmean(others)
    if min(len(values), len(others)) < 2:
        return difference, None, None
    parts = [(statistics.variance(v) / len(v), len(v) - 1) for v in (values, others)]
    square = sum(part for part, _ in parts)
    degrees = square ** 2 / sum(part ** 2 / n for part, n in parts) if square else sum(n for _, n in parts)
    return difference, t_quantile(degrees) * math.sqrt(square), lower(difference, math.sqrt(square), degrees)
