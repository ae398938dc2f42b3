"""The table of docs/reliability.md, from the counters of the tests: `python -m tests.reliability [--quick] [ROW ...]`.

It runs the tests of every row R1 to R20 (rows.py; about half an hour) and writes what they counted. --quick leaves the slow
ones out, --to=FILE writes elsewhere, --jobs=N runs N at a time. A row whose tests did not run says so. Exit code 1 when a
test failed.
"""
import datetime
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.reliability.counters import Collector
from tests.reliability.rows import ROWS, listed

ROOT = Path(__file__).resolve().parents[2]
TOP = """# Reliability

What is done to runs, files and command lines, and what of it they survive. The numbers are what the tests counted in one
run of

    python -m tests.reliability
"""
BOTTOM = """Controls are tests of the tests: a writer without care, a reader without a check or a run with another seed
must be found out. nanoGPT: its commit 3adf61e, each figure measured once; an empty cell was not measured."""
HEAD = ('| | what is tried | what counts as survived | tried | survived | controls | nanoGPT |', '|---' * 7 + '|')


def read(arguments):
    """(rows, options) of a command line; raises SystemExit with a sentence."""
    options = {'quick': '', 'to': str(ROOT / 'docs' / 'reliability.md'), 'jobs': '1'}
    given = dict(word[2:].partition('=')[::2] for word in arguments if word.startswith('--'))
    rows = [word for word in arguments if not word.startswith('--')] or list(ROWS)
    if '--help' in arguments or '-h' in rows:
        print(__doc__.strip())
        raise SystemExit(0)
    wrong = [name for name in given if name not in options] + [row for row in rows if row not in ROWS]
    if wrong or not given.get('jobs', '1').isdigit():
        raise SystemExit(f'tests.reliability: {(wrong or given)!r} is none of --quick, --to=FILE, --jobs=N, R1 ... R20')
    return rows, {**options, **given, 'quick': 'quick' in given}


def sums(names, collector):
    """(tried, survived, failed names, [(name, why)] that did not run) over some tests."""
    idle = [(name, '; '.join(sorted(collector.skipped[name])) or 'left out') for name in names if not collector.tests[name]]
    return (sum(collector.tried[name] for name in names), sum(collector.survived[name] for name in names),
            [name for name in names if collector.failed[name]], idle)


def cells(label, row, collector):
    """One line of the table."""
    tried, survived, _, idle = sums(listed(row.tests), collector)
    ran = len(listed(row.tests)) - len(idle)
    numbers = f'{tried:,} | {survived:,}' if ran else 'not run | not run'
    good, held, *_ = sums(listed(row.controls), collector)
    controls = f'{held} of {good}' if good else ''
    return f'| {label} | {row.what} | {row.survived} | {numbers} | {controls} | {row.nanogpt} |'


def notes(collector, rows):
    """What did not run, or failed, by row."""
    lines = []
    for label in rows:
        names = listed(ROWS[label].tests) + listed(ROWS[label].controls)
        *_, failed, idle = sums(names, collector)
        lines += [f'- {label}: {name.split("::")[1]} was not run ({why})' for name, why in idle]
        lines += [f'- {label}: {name.split("::")[1]} FAILED' for name in failed]
    return lines


def page(collector, words, rows=ROWS):
    """The text of docs/reliability.md; rows: those that were asked for, the others say that they did not run."""
    lines = [cells(label, row, collector) for label, row in ROWS.items()]
    told = notes(collector, [label for label in ROWS if label in rows])
    left = ['', 'Not in these numbers:', '', *told] if told else []
    return '\n'.join([TOP, words, '', *HEAD, *lines, '', BOTTOM, *left]) + '\n'


def machine(quick, seconds):
    """A sentence on when, where and how long."""
    import torch
    commit = subprocess.run(['git', 'rev-parse', '--short', 'HEAD'], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    return (f'on {datetime.date.today()} at commit {commit or "unknown"}: {"the short" if quick else "short and slow"} '
            f'tests, {seconds / 60:.0f} minutes, torch {torch.__version__}, Python {platform.python_version()}, '
            f'{os.cpu_count()} CPUs.')


def main(arguments):
    rows, options = read(arguments)
    asked = [name for row in rows for name in listed(ROWS[row].tests) + listed(ROWS[row].controls)]
    words = ['-q', '-p', 'no:cacheprovider', '-m', 'not gpu and not slow' if options['quick'] else 'not gpu',
             *(['-n', options['jobs']] if options['jobs'] != '1' else []), *dict.fromkeys(asked)]
    os.chdir(ROOT)
    collector, begin = Collector(), time.monotonic()
    code = pytest.main(words, plugins=[collector])
    Path(options['to']).write_text(page(collector, machine(options['quick'], time.monotonic() - begin), rows),
                                   encoding='utf-8')
    print(f'written to {options["to"]}')
    return int(code != 0)


if __name__ == '__main__':
    raise SystemExit(main(sys.argv[1:]))
