"""docs/reliability.md: what stands in it is what was counted, and nothing else."""
import ast
import re

import pytest

from tests.reliability import __main__ as command
from tests.reliability.counters import Collector
from tests.reliability.rows import ROWS, listed
from tests.tiny import ROOT

pytest_plugins = ['pytester']


def everything():
    return [name for row in ROWS.values() for name in listed(row.tests) + listed(row.controls)]


def test_rows_name_tests_that_are_there_and_every_r_test_has_a_row():
    assert list(ROWS) == [f'R{number}' for number in range(1, 21)]
    known = {}
    for path in (ROOT / 'tests').rglob('test_*.py'):
        for node in ast.parse(path.read_text(encoding='utf-8')).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith('test_'):
                known[f'{path.relative_to(ROOT)}::{node.name}'] = re.match(r'test_r\d+_', node.name)
    assert not set(everything()) - known.keys()
    meta = {'test_r1_every_pair_is_killed_and_every_moment_five_times', 'test_r5_every_pair_of_choices_is_tried'}
    assert {name.split('::')[1] for name, match in known.items() if match and name not in everything()} == meta


TESTS = '''
import pytest

@pytest.mark.parametrize('n', [1, 2, 3])
def test_one(n):
    assert n < 3

def test_many(count):
    for n in range(10):
        with count():
            assert n < 7

def test_added(count):
    count.add(5, 4)
    assert False

def test_beside(count):
    with count(25):
        pass
    assert False

@pytest.mark.skip(reason='no disk')
def test_skipped():
    pass

@pytest.fixture
def broken():
    raise OSError

def test_set_up(broken):
    pass
'''


def test_cases_are_counted_and_what_fails_does_not_survive(pytester):
    pytester.copy_example(str(ROOT / 'tests' / 'conftest.py'))
    pytester.makepyfile(TESTS)
    collector = Collector()
    pytester.inline_run('-p', 'no:cacheprovider', plugins=[collector])
    short = {name.split('::')[1]: (collector.tried[name], collector.survived[name], collector.failed[name])
             for name in collector.tests}
    assert short == {'test_one': (3, 2, 1), 'test_many': (8, 7, 1), 'test_added': (5, 4, 1), 'test_beside': (26, 25, 1),
                     'test_set_up': (1, 0, 1)}
    assert list(collector.skipped.values()) == [{'no disk'}]


def lines_of(text):
    return {line.split(' | ')[0].strip('| '): line for line in text.splitlines() if line.startswith('| R')}


def test_a_row_that_did_not_run_says_so():
    collector, names = Collector(), listed(ROWS['R2'].tests)
    for name, numbers in zip(names, ((100, 100), (7, 6))):
        collector.tests[name], (collector.tried[name], collector.survived[name]) = 1, numbers
    collector.failed[names[1]] = 1
    collector.skipped[names[2]].add('no fork')
    text = command.page(collector, 'words', ['R2'])
    rows = lines_of(text)
    assert list(rows) == list(ROWS) and '| 107 | 106 |' in rows['R2']
    assert all('| not run | not run |' in line for label, line in rows.items() if label != 'R2')
    names = [name.split('::')[1] for name in names]
    assert f'- R2: {names[1]} FAILED' in text and f'- R2: {names[2]} was not run (no fork)' in text
    assert f'- R2: {names[3]} was not run (left out)' in text


def test_the_page_that_is_committed_has_this_form_and_no_failure():
    text = (ROOT / 'docs' / 'reliability.md').read_text(encoding='utf-8')
    rows = lines_of(text)
    assert list(rows) == list(ROWS) and 'FAILED' not in text
    for label, row in ROWS.items():
        cells = [cell.strip() for cell in rows[label].strip('|').split(' | ')]
        assert cells[1] == row.what and cells[3] == cells[4] and re.fullmatch(r'[\d,]+|not run', cells[3]), label


@pytest.mark.parametrize('words', [['R21'], ['--quik'], ['--jobs=x']])
def test_a_mistake_is_a_sentence(words):
    with pytest.raises(SystemExit, match='is none of'):
        command.read(words)
    assert command.read(['--quick', 'R3'])[0] == ['R3'] and command.read([])[0] == list(ROWS)
