"""Prices as tokens: quantised log-returns of your OHLCV CSV file; writes train.bin, val.bin and meta.json.

    python data/prices/prepare.py --input=FILE.csv [--column=close] [--bins=64] [--val_fraction=0.1] [--max_gap=N]
                                  [--out=DIR]
    python data/prices/prepare.py --generate=ar1|random_walk [--rows=100000] [--seed=1]

Needs no network and no torch. Without --input and --generate it generates an AR(1) series to try. The README.md in this
folder says what a token is, what is dropped, and why no row of the validation part affects the training part. A user
error is reported in one line and ends the program with exit code 2.
"""
import argparse
import csv
import math
import sys
from datetime import datetime, timedelta, timezone
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parents[1]))

from commandline import ends

if __name__ == '__main__':
    ends.watch('prepare.py')

import numpy as np

from data.prepare_text import complain, write_dataset
from data.prices.bars import places, read_bars
from data.prices.returns import MOST_BINS
from data.shards import reason
from variants import UserError

COEFFICIENTS = {'ar1': 0.6, 'random_walk': 0.0}
NOISE = 0.01                                # standard deviation of the noise in a generated log-return
LEAST_PER_BIN = 10                          # training returns
DAY = 86400.0


class Parser(argparse.ArgumentParser):
    def error(self, message):
        sys.exit(complain(message))


def arguments(argv):
    parser = Parser(allow_abbrev=False, description='Make train.bin, val.bin and meta.json of a price series.')
    parser.add_argument('--input', metavar='FILE', help='CSV with a header: a time and open, high, low, close, volume')
    parser.add_argument('--generate', choices=list(COEFFICIENTS), help='a series with known structure instead')
    parser.add_argument('--rows', type=int, default=100_000, help='bars to generate (default: 100000)')
    parser.add_argument('--seed', type=int, default=1, help='of the generated series (default: 1)')
    parser.add_argument('--column', default='close', help='column that holds the prices (default: close)')
    parser.add_argument('--bins', type=int, default=64, help='quantile bins of returns (default: 64)')
    parser.add_argument('--val_fraction', type=float, default=0.1, help='the last part of the rows (default: 0.1)')
    parser.add_argument('--max_gap', type=float, help='a longer time between bars is a gap, in median intervals '
                                                      '(default: 5 for daily bars without weekends, else 1.5)')
    parser.add_argument('--out', metavar='DIR', default=FOLDER, help='where to write (default: beside the script)')
    return check(parser.parse_args(argv))


def check(args):
    """Raise UserError for an invalid value."""
    for name, good, words in [('bins', 2 <= args.bins <= MOST_BINS, f'from 2 to {MOST_BINS}'),
                              ('val_fraction', 0 < args.val_fraction < 1, 'between 0 and 1'),
                              ('rows', 3 <= args.rows <= 10_000_000, 'from 3 to 10,000,000'),
                              ('seed', args.seed >= 0, 'at least 0'),
                              ('max_gap', args.max_gap is None or 1 <= args.max_gap < math.inf, 'at least 1')]:
        if not good:
            raise UserError(f'--{name} must be {words}, got {getattr(args, name)}')
    if args.input and args.generate:
        raise UserError('--input and --generate are two different series; give one of them')
    return args


def main(argv=None):
    args = None
    try:
        args = arguments(argv)
        path = args.input or generate(args.generate or 'ar1', args.rows, args.seed, Path(args.out))
        prepare(path, args.column, args.bins, args.val_fraction, args.max_gap, args.out)
    except UserError as error:
        sys.exit(complain(error))
    except OSError as error:
        sys.exit(complain(f'{error.filename or args.out}: {reason(error)}'))


# ---- a generated series ----

def series(kind, rows, seed):
    """`rows` prices from 100: r_t = a r_(t-1) + 0.01 e_t in log-returns, e Gaussian, a = 0.6 (ar1) or 0 (random_walk)."""
    a, noise = COEFFICIENTS[kind], np.random.default_rng(seed).standard_normal(rows - 1) * NOISE
    returns = np.empty(rows - 1)
    last = noise[0] / math.sqrt(1 - a * a)                          # stationary from the first one on
    for t in range(rows - 1):
        last = returns[t] = last if t == 0 else a * last + noise[t]
    return 100 * np.exp(np.concatenate(([0.0], np.cumsum(returns))))


def generate(kind, rows, seed, folder):
    """Write such a series as an OHLCV file of hourly bars without gaps, <kind>.csv in the folder; returns its path."""
    closes, chance = series(kind, rows, seed), np.random.default_rng([seed, 1])
    wicks, volumes = chance.random((rows, 2)) * NOISE / 4, chance.integers(1000, 100_000, rows)
    folder.mkdir(parents=True, exist_ok=True)
    path, start = folder / f'{kind}.csv', datetime(2000, 1, 1, tzinfo=timezone.utc)
    with open(path, 'w', encoding='utf-8', newline='') as file:
        writer = csv.writer(file)
        writer.writerow(['Date', 'Open', 'High', 'Low', 'Close', 'Volume'])
        for t, close in enumerate(closes):
            first = closes[t - 1] if t else close
            high, low = max(first, close) * (1 + wicks[t, 0]), min(first, close) * (1 - wicks[t, 1])
            stamp = (start + timedelta(hours=t)).strftime('%Y-%m-%d %H:%M:%S')
            writer.writerow([stamp, *(f'{value:.10g}' for value in (first, high, low, close)), volumes[t]])
    print(f'{path}: {rows:,} generated bars, {kind}, coefficient {COEFFICIENTS[kind]}, seed {seed}: no real prices')
    return path


# ---- tokens ----

def prepare(path, column, bins, val_fraction, max_gap, out):
    """Read, check, cut by time, quantise with the edges of the training part, write the folder and print a summary."""
    bars = read_bars(path, column)
    rows = len(bars.good)
    cut = rows - max(1, round(rows * val_fraction))                 # counts bad rows too: their number changes nothing
    kept = np.flatnonzero(bars.good)
    training = kept[1:] < cut                                       # by the later row of a return
    enough(path, bars, training, ~training, bins)
    returns = log_returns(bars.price[kept])
    limit, interval = gap_limit(bars.time[kept[kept < cut]], max_gap)
    spoilt = np.diff(np.cumsum(bars.spoilt)[kept]) > 0              # a dropped row lies between
    late = ~spoilt & (np.diff(bars.time[kept]) > limit)
    usable = training & ~spoilt & ~late
    enough(path, bars, usable, ~training, bins)
    edges, centres = quantiles(returns[usable], bins, path)
    tokens = np.where(spoilt | late, len(centres), np.searchsorted(edges, returns, 'right'))
    days = [datetime.fromtimestamp(t, timezone.utc).strftime('%Y-%m-%d') for t in bars.time[kept[[0, -1]]]]
    described = {'tokenizer': 'prices', 'vocab_size': len(centres) + 1,
                 'returns': {'edges': edges.tolist(), 'centres': centres.tolist()},
                 'source': f'{Path(path).name}, {column}, {days[0]} to {days[1]}'}
    report(bars, described['source'], interval, limit, bars.line[kept[1:]], late, spoilt)
    meta = write_dataset(out, described, {'train': tokens[training], 'val': tokens[~training]})
    print(f'{len(centres)} bins{"" if len(centres) == bins else f" instead of {bins}, as returns repeat"}, their edges '
          f'from the training part alone; token {len(centres)} is a gap')
    for split, content in meta['splits'].items():
        print(f'{split} has {content["tokens"]:,} tokens')


def log_returns(prices):
    """r_t = log(c_t / c_(t-1)): one value fewer than prices."""
    return np.diff(np.log(prices))


def enough(path, bars, training, validation, bins):
    """Raise UserError unless both parts (masks of returns) have some, and the training part some for every bin."""
    dropped = f'; dropped: {bars.summary()}' if bars.faults else ''
    least, found = LEAST_PER_BIN * bins, int(training.sum())
    if found < least:
        raise UserError(f'{path}: expected at least {least:,} returns for training ({LEAST_PER_BIN} a bin), found '
                        f'{found:,}; lower --bins or take more rows{dropped}')
    if validation.sum() < 2:
        raise UserError(f'{path}: expected at least 2 returns for validation, found {validation.sum()}; raise '
                        f'--val_fraction{dropped}')


def gap_limit(times, max_gap):
    """(longest time between two bars that is not a gap, median interval), seconds, both from the training part's times.

    Daily bars without weekends may be 5 days apart: a weekend with a holiday on either side.
    """
    interval = float(np.median(np.diff(times)))
    weekend = np.isin((times // DAY + 3) % 7, (5, 6)).mean()        # 1970-01-01 was a Thursday
    daily = 0.5 < interval / DAY < 1.5 and weekend < 0.05
    return interval * ((5 if daily else 1.5) if max_gap is None else max_gap), interval


def quantiles(returns, bins, path):
    """(edges, centres) of quantile bins of training returns; fewer bins where returns repeat, so that none is empty.

    Bin k contains edges[k-1] <= r < edges[k]; its centre is the mean of its returns.
    """
    if not np.ptp(returns):
        raise UserError(f'{path}: all returns of the training part are equal ({returns[0]:+.3g}); there is nothing to learn')
    edges = np.unique(np.quantile(returns, np.arange(1, bins) / bins))
    edges = edges[np.unique(np.searchsorted(edges, returns, 'right'))[1:] - 1]
    if not edges.size:
        edges = np.unique(returns)[1:2]                             # nearly all returns are one and the same
    counts = np.bincount(np.searchsorted(edges, returns, 'right'))
    sums = np.bincount(np.searchsorted(edges, returns, 'right'), returns)
    ceilings = np.nextafter(np.append(edges, np.inf), -np.inf)      # rounding must not push a mean over its edge
    return edges, np.clip(sums / counts, np.append(-np.inf, edges), ceilings)


def report(bars, source, interval, limit, lines, late, spoilt):
    """Rows that were read, dropped or treated as gaps, with the first lines of each."""
    print(f'{source}: {len(bars.good):,} rows, median interval {duration(interval)}')
    for note in bars.notes:
        print(note)
    if bars.faults:
        print(f'dropped {len(bars.good) - bars.good.sum():,} rows: {bars.summary()}')
    for what, where in ((f'of more than {duration(limit)}', late), ('over dropped rows', spoilt)):
        if where.any():
            print(f'gaps {what}: {where.sum():,} ({places(lines[where].tolist())}); no return spans them')


def duration(seconds):
    """A time in the largest unit that it fills: '5 days', '90 minutes'."""
    name, unit = next(((n, u) for n, u in (('days', DAY), ('hours', 3600), ('minutes', 60)) if seconds >= u and
                       seconds / u == round(seconds / u, 1)), ('seconds', 1))
    return f'{seconds / unit:g} {name if seconds != unit else name[:-1]}'


if __name__ == '__main__':
    main()
