"""Bars of a price series from a CSV: columns, formats of times, bad rows, and the order of rows.

Nothing is repaired: a bad row is dropped, counted by its fault, and leaves a break that no return spans.
"""
import csv
import math
import re
from dataclasses import dataclass
from datetime import datetime, timezone

import numpy as np

from data.shards import reason
from variants import UserError, did_you_mean

TIMES = ('timestamp', 'datetime', 'opentime', 'date', 'time', 'unix', 'unixtime')      # the first one present
ALIASES = {'close': ('close', 'closelast', 'last', 'price'), 'high': ('high',), 'low': ('low',), 'open': ('open',)}
UNITS = ((1e11, 1), (1e14, 1e3), (1e17, 1e6), (math.inf, 1e9))                          # seconds, ms, us, ns by size
ROUNDING = 1e-6                             # by which a close may leave [low, high]: files in single precision
TWICE = 'a time that stood before'


@dataclass
class Bars:
    """The rows of a file in order of time, bad ones included, so that positions do not depend on faults.

    time: seconds since 1970 UTC; price; line: in the file; good: the rows to use; spoilt: dropped in a way that leaves
    a break, (rows,) each. faults: what is wrong -> line numbers. notes: about the order.
    """
    time: np.ndarray
    price: np.ndarray
    line: np.ndarray
    good: np.ndarray
    spoilt: np.ndarray
    faults: dict
    notes: list

    def summary(self):
        """'2 with ... (lines 3, 9), 1 with ... (line 4)', or ''."""
        return ', '.join(f'{len(lines)} with {fault} ({places(lines)})' for fault, lines in self.faults.items())


def places(lines):
    """'line 3', 'lines 3, 9', 'lines 3, 9, 12 ...': where to look first."""
    more = ' ...' if len(lines) > 3 else ''
    return f'line{"s" if len(lines) > 1 else ""} {", ".join(str(line) for line in sorted(lines)[:3])}{more}'


def plain(name):
    """A column's name without case, spaces and signs: 'Adj Close' -> 'adjclose'."""
    return re.sub('[^a-z0-9]', '', name.lower())


def read_bars(path, column='close'):
    """The Bars of a CSV with a header; column: the one whose values are the prices. About 3 microseconds per value.

    Raises UserError in one line for a file that is not such a table.
    """
    try:
        with open(path, encoding='utf-8-sig', newline='') as file:
            first = file.readline()
            file.seek(0)
            rows = csv.reader(file, delimiter=max(',;\t', key=first.count))
            columns = find_columns(next(rows, []), column, path)
            return arrange([(rows.line_num, *read_row(fields, columns)) for fields in rows if fields], path)
    except OSError as error:
        raise UserError(f'{path}: expected a CSV file, found {reason(error)}') from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f'{path}: expected a CSV file in UTF-8: {error}') from None


def find_columns(header, column, path):
    """{'time': [indices], 'price': index, 'open' ...: index} of a header in any order and case."""
    names = [plain(name) for name in header]
    if not any(names):
        raise UserError(f'{path}: expected a header such as date,open,high,low,close,volume, found an empty file')
    found = {kind: names.index(alias) for kind, aliases in ALIASES.items() for alias in aliases[::-1] if alias in names}
    shown = ', '.join(name.strip()[:20] for name in header[:12])
    times = [name for name in TIMES if name in names]
    if not times and names[0] == 'price':
        raise UserError(f"{path}: expected one header row with a column of times, found yfinance's three; write the file by "
                        'yf.download(TICKER, multi_level_index=False).to_csv(FILE)')
    if not times:
        raise UserError(f'{path}: expected a column of times (date, time, timestamp ...) in the header, found {shown}')
    wanted = found.get(column) if plain(column) not in names else names.index(plain(column))
    if wanted is None:
        raise UserError(f'{path}: there is no column {column!r} among {shown}{did_you_mean(column, header)}')
    if names.count(names[wanted]) > 1:
        raise UserError(f'{path}: there are {names.count(names[wanted])} columns {column!r}; rename one')
    apart = times[:2] == ['date', 'time']                           # a day and a time of the day
    return {**found, 'price': wanted, 'time': [names.index(name) for name in (times[:2] if apart else times[:1])]}


def read_row(fields, columns):
    """(time or NaN, price or NaN, what is wrong or None) of one row."""
    time = math.nan
    try:
        time = read_time(' '.join(fields[i].strip() for i in columns['time']))
        values = {name: float(fields[i]) for name, i in columns.items() if name != 'time'}
    except IndexError:
        return time, math.nan, 'too few fields'
    except (ValueError, OverflowError):
        return time, math.nan, 'a price that is no number' if time == time else 'a time that cannot be read'
    return time, values['price'], fault_of(**values)


def fault_of(price, close=None, high=None, low=None, open=None):
    """What contradicts itself in the prices of one bar, or None."""
    given = [value for value in (price, close, high, low, open) if value is not None]
    if not all(math.isfinite(value) for value in given):
        return 'a price that is no number'
    if min(given) <= 0:
        return 'a price that is not above 0'
    if None not in (high, low) and high < low:
        return 'high below low'
    slack = ROUNDING * max(given)
    if close is not None and (high is not None and close > high + slack or low is not None and close < low - slack):
        return 'close outside low and high'
    return None


def read_time(text):
    """Seconds since 1970 UTC of an ISO date or time (without a zone: UTC), 20200131, or unix s, ms, us or ns."""
    if re.fullmatch(r'\d{8}', text) and '19' <= text[:2] <= '21':
        text = f'{text[:4]}-{text[4:6]}-{text[6:]}'
    if re.fullmatch(r'\d+(\.\d+)?', text):
        value = float(text)
        return value / next(unit for most, unit in UNITS if value < most)
    text = re.sub(r'^(\d{4})[./](\d{2})[./](\d{2})', r'\1-\2-\3', text)
    moment = datetime.fromisoformat(re.sub(r' ?(Z|UTC)$', '+00:00', text))
    return (moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).timestamp()


def arrange(rows, path):
    """Bars of [(line, time, price, fault)] in order of time; a row without a time stays behind the one before it."""
    faults, notes = {}, []
    for line, _, _, fault in rows:
        if fault:
            faults.setdefault(fault, []).append(line)
    line, time, price = (np.array([row[k] for row in rows]) for k in range(3))
    good = np.array([not row[3] for row in rows], bool)
    known = np.isfinite(time) if rows else good
    if not known.any():
        raise UserError(f'{path}: no row has a time that can be read; write 2020-01-31, 2020-01-31 09:30 or unix seconds')
    steps = np.diff(time[known])
    if (steps < 0).sum() > (steps > 0).sum():
        notes.append('the newest row stood first: turned round')
        line, time, price, good, known = (array[::-1] for array in (line, time, price, good, known))
    time = time[np.maximum(np.maximum.accumulate(np.where(known, np.arange(len(time)), -1)), np.argmax(known))]
    early = np.flatnonzero(np.diff(time) < 0) + 1
    if early.size:
        notes.append(f'{early.size:,} rows out of order ({places(line[early].tolist())}): sorted by time')
    order = np.argsort(time, kind='stable')
    line, time, price, good = (array[order] for array in (line, time, price, good))
    spoilt, kept = ~good, np.flatnonzero(good)
    again = kept[1:][np.diff(time[kept]) == 0]
    if again.size:
        faults[TWICE], good = sorted(line[again].tolist()), good.copy()
        good[again] = False
    return Bars(time, price, line, good, spoilt, faults, notes)
