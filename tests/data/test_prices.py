"""Prices as tokens: what is read, dropped and cut; no look-ahead; and what a model gains where the answer is known."""
import csv
import json
import math
import subprocess
import sys
from datetime import date, timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sample
from data import tokenizer
from data.dataset import open_dataset
from data.prices import bars, prepare
from variants import UserError

ROOT = Path(__file__).resolve().parents[2]
HEADER = ['Date', 'Open', 'High', 'Low', 'Close', 'Volume']
META = {'tokenizer': 'prices', 'vocab_size': 5,
        'returns': {'edges': [-0.01, 0.0, 0.01], 'centres': [-0.02, -0.004, 0.004, 0.02]}}


def weekdays(count, first=date(2015, 1, 5)):
    days = (first + timedelta(days=k) for k in range(2 * count))
    return [day.isoformat() for day in days if day.weekday() < 5][:count]


def table(count=400, seed=0):
    """Rows [day, open, high, low, close, volume] of a random walk on weekdays."""
    closes = 50 * np.exp(np.cumsum(np.random.default_rng(seed).normal(0, 0.01, count)))
    opens = np.append(50, closes[:-1])
    return [[day, o, max(o, c) * 1.001, min(o, c) * 0.999, c, 1000]
            for day, o, c in zip(weekdays(count), opens.tolist(), closes.tolist())]


def write(path, rows, header=HEADER, delimiter=','):
    with open(path, 'w', newline='') as file:
        csv.writer(file, delimiter=delimiter).writerows([header, *rows])
    return path


@pytest.fixture
def make(tmp_path, capsys):
    """make(rows, '--bins=8', ...) -> (tokens of train, of val, meta, what was printed)."""
    def build(rows, *words, header=HEADER, delimiter=',', out='d'):
        path = write(tmp_path / 'prices.csv', rows, header, delimiter)
        prepare.main([f'--input={path}', f'--out={tmp_path / out}', '--bins=8', *words])
        dataset = open_dataset(tmp_path / out, print)
        train, val = (dataset.splits[name].read(0, len(dataset.splits[name])) for name in ('train', 'val'))
        return train, val, dataset.meta, capsys.readouterr().out
    return build


@pytest.fixture
def refused(tmp_path, capsys):
    """refused(rows or text, '--option') -> the one line that it is refused with."""
    def try_it(rows, *words, header=HEADER):
        path = tmp_path / 'bad.csv'
        if isinstance(rows, (bytes, str)):
            path.write_bytes(rows.encode() if isinstance(rows, str) else rows)
        else:
            write(path, rows, header)
        with pytest.raises(SystemExit) as stop:
            prepare.main([f'--input={path}', f'--out={tmp_path}/bad', *words])
        out, err = capsys.readouterr()
        assert stop.value.code == 2 and err.count('\n') == 1 and err.startswith('prepare.py: '), err
        assert not (tmp_path / 'bad').exists()
        return err
    return try_it


# ---- reading ----

@pytest.mark.parametrize('text, day', [
    ('2020-01-31', 18292), ('2020-01-31 12:00', 18292.5), ('2020-01-31T12:00:00Z', 18292.5), ('20200131', 18292),
    ('2020-01-31 12:00:00+06:00', 18292.25), ('2020-01-31 12:00:00 UTC', 18292.5), ('2020/01/31', 18292),
    ('2020.01.31 06:00:00', 18292.25), ('1580428800', 18292), ('1580428800.0', 18292), ('1580428800000', 18292),
    ('1580428800000000', 18292), ('1580428800000000000', 18292)])
def test_times(text, day):
    assert bars.read_time(text) == day * 86400


@pytest.mark.parametrize('text', ['', 'x', '31/01/2020', '2020-13-01', 'nan', '-5'])
def test_what_is_no_time(text):
    with pytest.raises(ValueError):
        bars.read_time(text)


@pytest.mark.parametrize('header', [HEADER, ['timestamp', 'open', 'high', 'low', 'close', 'volume'],
                                    ['DATETIME', ' Open', 'HIGH', 'low ', 'Close/Last', 'Vol.']])
def test_headers(make, header):
    rows = table()
    train, val, meta, _ = make(rows, header=header)
    assert len(train) == 359 and len(val) == 40 and meta['vocab_size'] == 9


def test_columns_in_any_order_and_files_of_other_sorts(make, tmp_path):
    rows = table()
    plain = make(rows)
    order = [4, 0, 5, 2, 1, 3]
    assert same(make([[row[k] for k in order] for row in rows], header=[HEADER[k] for k in order]), plain)
    assert same(make(rows, delimiter=';'), plain) and same(make(rows[::-1]), plain)
    millis = [[int(bars.read_time(row[0]) * 1000), *row[1:]] for row in rows]
    assert same(make(millis, header=['Unix', *HEADER[1:]]), plain)
    assert same(make([[row[0], '00:00', *row[1:]] for row in rows], header=['<DATE>', '<TIME>', *HEADER[1:]]), plain)
    close_only = make([[row[0], row[4]] for row in rows], header=['date', 'close'])
    assert same(close_only, plain)


def same(a, b):
    return np.array_equal(a[0], b[0]) and np.array_equal(a[1], b[1]) and a[2]['returns'] == b[2]['returns']


def test_another_column_holds_the_prices(make):
    rows = [[*row, row[4] * (0.5 + k / 1000)] for k, row in enumerate(table())]         # dividends taken off
    plain, adjusted = make(table()), make(rows, '--column=adj_close', header=[*HEADER, 'Adj Close'])
    assert 'dropped' not in adjusted[3]                             # it may lie outside low and high
    closes = np.array([row[6] for row in rows])
    assert not same(plain, adjusted)
    edges = adjusted[2]['returns']['edges']
    assert np.array_equal(adjusted[0], np.searchsorted(edges, np.diff(np.log(closes[:360])), 'right'))


def test_rows_out_of_order_are_sorted_and_said(make):
    rows = table()
    moved = rows[:50] + rows[60:70] + rows[50:60] + rows[70:]
    found = make(moved)
    assert same(found, make(rows)) and '1 rows out of order (line 62): sorted by time' in found[3]
    assert 'newest row stood first' in make(rows[::-1])[3]


# ---- tokens ----

def test_tokens_by_hand(make):
    """Returns, quantiles of the training part, bins closed below, centres as means."""
    rows = table()
    train, val, meta, out = make(rows)
    closes = [row[4] for row in rows]
    returns = [math.log(b / a) for a, b in zip(closes, closes[1:])]
    edges, centres = meta['returns']['edges'], meta['returns']['centres']
    assert len(edges) == 7 and meta['vocab_size'] == 9
    by_hand = [sum(r >= edge for edge in edges) for r in returns]
    assert train.tolist() == by_hand[:359] and val.tolist() == by_hand[359:]
    assert np.bincount(train).tolist() == pytest.approx([45] * 8, abs=1)
    for k in range(8):
        inside = [r for r in returns[:359] if ([-math.inf, *edges][k] <= r < [*edges, math.inf][k])]
        assert centres[k] == pytest.approx(np.mean(inside), abs=1e-12)
    assert '2015-01-05 to 2016-07-15' in meta['source'] and 'train has 359' in out and 'gap' in out


FAULTS = {'too few fields': lambda row: row[:3], 'a time that cannot be read': lambda row: ['soon', *row[1:]],
          'a price that is no number': lambda row: [*row[:4], 'null', 0],
          'a price that is not above 0': lambda row: [*row[:4], -row[4], 0],
          'high below low': lambda row: [row[0], row[1], row[3] * 0.9, *row[3:]],
          'close outside low and high': lambda row: [*row[:4], row[2] * 1.1, 0]}


@pytest.mark.parametrize('fault', FAULTS)
@pytest.mark.parametrize('turned', [False, True])
def test_a_bad_row_is_dropped_said_and_leaves_a_gap(make, fault, turned):
    rows = table()
    broken = rows[:100] + [FAULTS[fault](rows[100])] + rows[101:]
    train, val, meta, out = make(broken[::-1] if turned else broken)
    line, after = (301, 300) if turned else (102, 103)
    assert f'dropped 1 rows: 1 with {fault} (line {line})' in out
    assert f'gaps over dropped rows: 1 (line {after})' in out
    assert len(train) == 358 and len(val) == 40
    assert np.flatnonzero(train == 8).tolist() == [99]              # in place of the return from row 99 to row 101
    edges = meta['returns']['edges']
    returns = np.diff(np.log([row[4] for row in rows]))[[98, 101]]
    assert train[[98, 100]].tolist() == np.searchsorted(edges, returns, 'right').tolist()


@pytest.mark.parametrize('value', ['nan', 'inf', '', '0', '1e999', '-1'])
def test_prices_that_are_none(make, value):
    rows = table()
    rows[7][4] = value
    assert 'dropped 1 rows' in make(rows)[3]
    train, _, meta, out = make([[row[0], row[4]] for row in rows], header=['date', 'close'])
    assert 'dropped 1 rows: 1 with a price that is no' in out and train[6] == 8


def test_a_time_that_stands_twice_keeps_its_first_row(make):
    rows = table()
    train, val, meta, out = make(rows[:51] + [[rows[50][0], *rows[10][1:]]] + rows[51:])
    plain = make(rows)
    assert np.array_equal(train, plain[0]) and 'a time that stood before (line 53)' in out and 'gaps' not in out


def test_a_good_row_at_the_time_of_a_bad_one_stays(make):
    rows = table()
    train, val, meta, out = make(rows[:50] + [[*rows[50][:4], 'null', 0]] + rows[50:])
    assert 'dropped 1 rows: 1 with a price that is no number (line 52)\n' in out and 'stood before' not in out
    assert len(train) == 359 and np.flatnonzero(train == 8).tolist() == [49]


def test_gaps_in_time(make):
    """A week is missing: a gap. A long weekend is none, unless the bars know weekends."""
    rows = table()
    train, val, _, out = make(rows[:100] + rows[105:])
    assert 'gaps of more than 5 days: 1 (line 102)' in out and np.flatnonzero(train == 8).tolist() == [99]
    assert 'gaps' not in make(rows[:99] + rows[101:])[3]            # a weekend and two days: 5 days
    assert (make(rows, '--max_gap=1.5')[0] == 8).sum() == 71        # every weekend
    daily = [[(date(2015, 1, 5) + timedelta(days=k)).isoformat(), *row[1:]] for k, row in enumerate(rows)]
    assert 'gaps' not in make(daily)[3]
    assert 'gaps of more than 1.5 days: 1 (line 102)' in make(daily[:100] + daily[101:])[3]
    hourly = [[1_600_000_000 + 3600 * k, *row[1:]] for k, row in enumerate(rows)]
    assert 'gaps of more than 1.5 hours: 1 (line 102)' in make(hourly[:100] + hourly[101:])[3]


def test_returns_that_repeat_share_a_bin(make):
    rows = [[row[0], c := 50 + k // 4 % 3, c, c, c, 1] for k, row in enumerate(table())]
    train, val, meta, out = make(rows)
    assert 'bins instead of 8, as returns repeat' in out
    assert sorted(set(train.tolist())) == list(range(meta['vocab_size'] - 1))
    tokenizer.load(meta)                                            # centres lie in their bins, though they are edges
    rare = [[row[0], c := 50 + (k > 200), c, c, c, 1] for k, row in enumerate(rows)]    # one return that is not 0
    assert make(rare)[2]['vocab_size'] == 3


# ---- no look-ahead ----

def train_side(folder):
    meta = json.loads((folder / 'meta.json').read_text())
    return (folder / 'train.bin').read_bytes(), meta['returns'], meta['vocab_size']


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_no_validation_row_reaches_the_training_part(data, tmp_path_factory):
    """Other values, absurd values and bad rows there: train.bin, edges and centres are the same bits."""
    folder, rows = tmp_path_factory.mktemp('look'), table()
    for k in data.draw(st.lists(st.integers(360, 399), min_size=1)):
        price = data.draw(st.sampled_from(['nan', '', 1e-9, 1e9, -3, rows[k][4] * 2, 50]))
        rows[k] = [rows[k][0] if data.draw(st.booleans()) else 'never', price, price, price, price, 0]
    for name, content in (('a', table()), ('b', rows)):
        path = write(folder / f'{name}.csv', content)
        try:
            prepare.prepare(path, 'close', 8, 0.1, None, folder / name)
        except UserError as error:
            assert 'for validation' in str(error)
            return
    assert train_side(folder / 'a') == train_side(folder / 'b')


def test_no_time_of_the_validation_part_decides_what_a_gap_is(make):
    """Nine tenths of the rows follow one another by seconds: their median would make a gap of every day."""
    rows, words = table(), ('--bins=2', '--val_fraction=0.9')
    quick = rows[:40] + [[f'2020-01-01 00:{k // 60:02}:{k % 60:02}', *row[1:]] for k, row in enumerate(rows[40:])]
    assert np.array_equal(make(rows, *words)[0], make(quick, *words)[0])


def test_a_look_ahead_would_be_seen(tmp_path, monkeypatch):
    """Negative control: edges from all returns, and a cut that counts good rows only."""
    rows = table()
    wild = rows[:360] + [[row[0], *[50 + 20 * (k % 2)] * 4, 0] for k, row in enumerate(rows[360:])]
    bad = rows[:380] + [[row[0], 'x', 'x', 'x', 'x', 0] for row in rows[380:]]
    kept = prepare.quantiles
    for changed, name in ((wild, 'edges'), (bad, 'cut')):
        found = []
        for k, content in enumerate((rows, changed)):
            path = write(tmp_path / 'x.csv', content)
            if name == 'edges':
                everything = np.diff(np.log([row[4] for row in content]))
                monkeypatch.setattr(prepare, 'quantiles', lambda returns, bins, path, r=everything: kept(r, bins, path))
                prepare.prepare(path, 'close', 8, 0.1, None, tmp_path / f'{name}{k}')
            else:
                monkeypatch.setattr(prepare, 'quantiles', kept)
                content = [row for row in content if row[1] != 'x']
                prepare.prepare(write(path, content), 'close', 8, 0.1, None, tmp_path / f'{name}{k}')
            found.append(train_side(tmp_path / f'{name}{k}'))
        assert found[0] != found[1], name


def test_the_first_validation_return_starts_at_the_last_training_price(make):
    rows = table()
    plain = make(rows)

    def changed(k):
        """Which tokens (of train, of val) the price of row k moves, upwards or downwards."""
        moved = [make(rows[:k] + [[rows[k][0], *[rows[k][4] * f] * 4, 0]] + rows[k + 1:]) for f in (0.5, 1.5)]
        return [{i for other in moved for i in np.flatnonzero(plain[part] != other[part])} for part in (0, 1)]
    train, val = changed(359)                                       # the last row of training
    assert 358 in train and 0 in val
    assert changed(360) == [set(), {0, 1}]                          # the first of validation


# ---- the tokenizer ----

def test_words():
    kind = tokenizer.load(META)
    assert kind.decode([0, 1, 2, 3, 4, 9]) == ' -1.98% -0.40% +0.40% +2.02% gap (unknown)'
    assert kind.encode('-1.98%  -0.40%\n+0.40% +2.02% gap') == [0, 1, 2, 3, 4]
    assert kind.encode('0% 0.0 -0.001% 5 -99% 1e5%') == [2, 2, 1, 3, 0, 3]
    assert kind.encode('<|endoftext|>') == [2] and kind.encode('\n') == []
    for word in ('up', '-100%', 'nan', '%', '1e999', '--1'):
        with pytest.raises(UserError, match='is no change of a price'):
            kind.encode(f'+1% {word}')


@settings(max_examples=60, deadline=None)
@given(centres=st.lists(st.floats(-0.5, 0.5), min_size=2, max_size=80, unique=True), data=st.data())
def test_text_and_tokens_round_trip(centres, data):
    centres = sorted(c for c in {round(c, 9) for c in centres})
    if len(centres) < 2:
        return
    edges = [(a + b) / 2 for a, b in zip(centres, centres[1:])]
    kind = tokenizer.load({'tokenizer': 'prices', 'vocab_size': len(centres) + 1,
                           'returns': {'edges': edges, 'centres': centres}})
    tokens = data.draw(st.lists(st.integers(0, len(centres))))
    assert kind.encode(kind.decode(tokens)) == tokens


@pytest.mark.parametrize('returns', [
    None, [], {}, {'edges': [0.0]}, {'edges': [0.0], 'centres': [-1.0]}, {'edges': [0.0], 'centres': [1.0, 2.0]},
    {'edges': [0.0], 'centres': [-1.0, -0.5]}, {'edges': [0.0, 0.0], 'centres': [-1.0, 0.0, 1.0]},
    {'edges': [float('nan')], 'centres': [-1.0, 1.0]}, {'edges': [0.0], 'centres': [-1e9, 1.0]},
    {'edges': [True], 'centres': [-1.0, 2.0]}, {'edges': ['0'], 'centres': [-1.0, 1.0]}, {'edges': [], 'centres': [0.0]},
    {'edges': [0.0], 'centres': [0.0, 1.0]}, {'edges': list(range(5000)), 'centres': [0.0]}])
def test_descriptions_that_contradict_themselves(returns):
    with pytest.raises(UserError) as caught:
        tokenizer.load({'tokenizer': 'prices', 'vocab_size': 3, 'returns': returns})
    assert '\n' not in str(caught.value)


def test_a_checkpoint_keeps_what_tokens_mean(make):
    described = tokenizer.describe(make(table())[2])
    kind = tokenizer.load(json.loads(json.dumps(described)))
    assert kind.vocab_size == 9 and kind.centres == described['returns']['centres']
    config = sample.SampleConfig()
    assert sample.encode('\n', sample.load_tokenizer(config, described, 9)) == [
        sum(edge <= 0 for edge in kind.edges)]                      # no prompt: a bar without change


# ---- mistakes ----

@pytest.mark.parametrize('words, expected', [
    (['--column=clsoe'], "no column 'clsoe' among Date, Open"), (['--column=Adj Close'], "no column 'Adj Close'"),
    (['--bins=1'], '--bins must be from 2'), (['--bins=64'], 'expected at least 640 returns for training'),
    (['--val_fraction=-0.1'], '--val_fraction must be between 0 and 1, got -0.1'), (['--val_fraction=1'], '--val_frac'),
    (['--val_fraction=nan'], '--val_fraction'), (['--val_fraction=0.001', '--bins=8'], 'at least 2 returns for valid'),
    (['--max_gap=0.5'], '--max_gap must be at least 1'), (['--generate=ar1'], 'two different series'),
    (['--generate=ar2'], 'ar2'), (['--bins=x'], '--bins'), (['--seed=-1'], '--seed must be at least 0'),
    (['--rows=1'], '--rows must be from 3'), (['--inputs=x'], '--inputs')])
def test_options_that_cannot_be(refused, words, expected):
    assert expected in refused(table(), *words)


@pytest.mark.parametrize('text, expected', [
    ('', 'an empty file'), ('\n\n', 'an empty file'), ('a,b\n1,2\n', 'expected a column of times'),
    ('1600000000000,1,2,1,2,5\n' * 50, 'expected a column of times'), ('date,close,close\n', "2 columns 'close'"),
    ('date,open\n', "no column 'close'"), ('date,close\n', 'no row has a time'), (b'\xff\xfed\x00', 'in UTF-8'),
    ('date,close\n31/12/2020,5\n', 'no row has a time that can be read'), ('date,close\n2020-01-01,5\n', 'found 0'),
    ('date,close\n' + ''.join(f'{day},5\n' for day in weekdays(900)), 'returns of the training part are equal'),
    ('date,close\n' + ''.join(f'{day},x\n' for day in weekdays(900)), 'dropped: 900 with a price that is no number')])
def test_files_that_are_no_series(refused, text, expected):
    assert expected in refused(text)


def test_no_such_file(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        prepare.main([f'--input={tmp_path}/none.csv', f'--out={tmp_path}/o'])
    assert stop.value.code == 2 and 'no such file' in capsys.readouterr().err


def test_preparing_needs_no_torch():
    done = subprocess.run([sys.executable, '-c', 'import sys, data.prices.prepare; sys.exit("torch" in sys.modules)'],
                          cwd=ROOT)
    assert done.returncode == 0


# ---- a series whose structure is known ----

@pytest.mark.parametrize('kind, a', [('ar1', 0.6), ('random_walk', 0.0)])
def test_generated_series(kind, a, tmp_path):
    returns = np.diff(np.log(prepare.series(kind, 50_001, 3)))
    assert np.corrcoef(returns[1:], returns[:-1])[0, 1] == pytest.approx(a, abs=0.015)
    assert np.corrcoef(returns[2:], returns[:-2])[0, 1] == pytest.approx(a * a, abs=0.015)
    assert returns.std() == pytest.approx(0.01 / math.sqrt(1 - a * a), rel=0.02)
    read = bars.read_bars(prepare.generate(kind, 500, 3, tmp_path))
    assert read.good.all() and not read.notes and read.price == pytest.approx(prepare.series(kind, 500, 3), rel=1e-9)
    assert not np.array_equal(prepare.series(kind, 500, 3), prepare.series(kind, 500, 4))


def possible_gap(edges, a=0.6, noise=prepare.NOISE):
    """Nats a token that the past tells of the next bin: H(bin) - H(bin | last return), by quadrature over that return.

    The most that any model can gain over the unigram, since the bins of the past tell less than the last return.
    """
    spread, edges = noise / math.sqrt(1 - a * a), torch.tensor(edges, dtype=torch.float64)
    last = spread * torch.special.ndtri((torch.arange(2_000, dtype=torch.float64) + 0.5) / 2_000)     # equally likely

    def entropy(mean, scale):
        below = torch.special.ndtr((edges - mean[:, None]) / scale)
        ends = torch.zeros(len(mean), 1, dtype=torch.float64)
        p = torch.cat((ends, below, ends + 1), 1).diff()
        return -torch.xlogy(p, p).sum(1).mean().item()
    return entropy(torch.zeros(1, dtype=torch.float64), spread) - entropy(a * last, noise)


def test_the_possible_gap():
    """-ln(1 - a^2) / 2 for ever finer bins; nothing without dependence; and as counted in a long series."""
    fine = (torch.special.ndtri(torch.arange(1, 512, dtype=torch.float64) / 512) * 0.0125).tolist()
    assert possible_gap(fine) == pytest.approx(-0.5 * math.log(1 - 0.36), abs=2e-3)
    assert possible_gap(fine, a=0.0) == pytest.approx(0, abs=1e-9)
    coarse = [-0.0125, 0.0, 0.0125]
    returns = np.diff(np.log(prepare.series('ar1', 200_001, 5)))
    last, now = np.digitize(returns[:-1], fine[::8]), np.digitize(returns[1:], coarse)
    joint = np.histogram2d(last, now, [64, 4])[0] / len(now)
    product = joint.sum(1, keepdims=True) * joint.sum(0)
    told = (joint[joint > 0] * np.log(joint[joint > 0] / product[joint > 0])).sum()
    assert possible_gap(coarse) == pytest.approx(told, abs=3e-3)


def gain_of(folder, name, run_program):
    """(nats per token that the model of config/train_prices.py gains over the unigram, what evaluate.py printed)."""
    run_program('train.py', 'config/train_prices.py', f'--data_dir={folder}', f'--dataset={name}',
                f'--out_dir={folder}/out_{name}', '--device=cpu', '--eval_interval=300', timeout=300)
    done = run_program('evaluate.py', f'--out_dir={folder}/out_{name}', f'--data_dir={folder}', f'--dataset={name}',
                       '--device=cpu', '--json')
    found = json.loads(done.stdout)
    return found['unigram']['loss'] - found['loss'], found


@pytest.mark.slow
def test_ar1_gains_half_of_what_can_be_gained(tmp_path, run_program):
    run_program('data/prices/prepare.py', '--generate=ar1', f'--out={tmp_path}/ar1')
    gain, found = gain_of(tmp_path, 'ar1', run_program)
    most = possible_gap(json.loads((tmp_path / 'ar1' / 'meta.json').read_text())['returns']['edges'])
    assert 0.21 < most < 0.2232 and found['unigram']['loss'] == pytest.approx(math.log(64), abs=2e-3)
    assert 0.5 * most <= gain <= most + 0.01, (gain, most)
    assert found['forecast']['model'] < 0.85 * found['forecast']['last_price']          # sqrt(1 - 0.36) = 0.8
    assert found['forecast']['model'] < 0.95 * found['forecast']['same_return']


@pytest.mark.slow
def test_a_random_walk_gains_nothing(tmp_path, run_program):
    run_program('data/prices/prepare.py', '--generate=random_walk', f'--out={tmp_path}/walk')
    gain, found = gain_of(tmp_path, 'walk', run_program)
    assert abs(gain) < 0.01, gain
    assert found['forecast']['model'] == pytest.approx(found['forecast']['last_price'], rel=0.01)


@pytest.mark.slow
def test_a_preparation_that_looks_one_bar_ahead_gains_on_a_random_walk(tmp_path, run_program, monkeypatch):
    """Negative control: each return ends one bar too late, log(c_(t+1) / c_(t-1)), so that neighbours share a bar."""
    monkeypatch.setattr(prepare, 'log_returns', lambda prices: np.log(np.append(prices[2:], prices[-1]) / prices[:-1]))
    prepare.prepare(prepare.generate('random_walk', 100_000, 1, tmp_path), 'close', 64, 0.1, None, tmp_path / 'leak')
    gain, _ = gain_of(tmp_path, 'leak', run_program)
    assert gain > 0.1, gain
