"""Two models on one text: the difference of their losses and its standard error, paired by window. Imports no torch."""
import math

from variants import UserError

T95 = 1.959964                          # normal quantile of a two-sided 95% interval


def difference(ours, theirs):
    """{'difference', 'standard_error', 'low', 'high', 'windows'} of two results of windows.score, by window.

    d = sum_w (a_w - b_w) / N with a_w, b_w the nats of window w, n_w its scored tokens, N their sum, K windows;
    se^2 = K / (K - 1) sum_w (a_w - b_w - d n_w)^2 / N^2, the ratio estimator's (Cochran 1977, section 2.11), which for equal
    n_w is the variance of the K means over K. low, high: d -+ 1.96 se. Windows of one text are taken as independent; where
    stride is shorter than the window they share context, and se is somewhat too small. Raises UserError for one window.
    """
    counts = ours['window_scored']
    gaps = [a - b for a, b in zip(ours['window_nats'], theirs['window_nats'])]
    number, total = len(counts), sum(counts)
    if number < 2:
        raise UserError('two models are compared over at least two windows; take a longer text or a smaller --window',
                        'window')
    d = sum(gaps) / total
    se = math.sqrt(number / (number - 1) * sum((gap - d * n) ** 2 for gap, n in zip(gaps, counts))) / total
    return {'difference': d, 'standard_error': se, 'low': d - T95 * se, 'high': d + T95 * se, 'windows': number}


def table(name, other, found):
    """One line."""
    better = name if found['difference'] < 0 else other
    clear = found['low'] > 0 or found['high'] < 0
    return (f'difference of losses, {name} - {other}: {found["difference"]:+.4f} ± {found["standard_error"]:.4f} nats per '
            f'token (standard error over {found["windows"]} windows, paired; 95%: {found["low"]:+.4f} to '
            f'{found["high"]:+.4f}): ' + (f'{better} is better' if clear else 'not told apart by this text'))
