"""Cases that a test tries and survives. `python -m tests.reliability` adds them up; every other run ignores them."""
import collections
import contextlib


class Cases:
    """What the fixture `count` gives: a test that uses it has as many cases as it counts, any other test has one."""

    def __init__(self):
        self.numbers = {'tried': 0, 'survived': 0}

    @contextlib.contextmanager
    def __call__(self, number=1):
        """`with count():` around a case, or `number` of them that end together; after an exception none has survived."""
        self.add(number, 0)
        yield
        self.add(0, number)

    def add(self, tried, survived):
        self.numbers['tried'] += tried
        self.numbers['survived'] += survived


class Collector:
    """A pytest plugin: what became of each function of a module, over all its parameters."""

    def __init__(self):
        self.tried, self.survived, self.tests = collections.Counter(), collections.Counter(), collections.Counter()
        self.failed, self.skipped = collections.Counter(), collections.defaultdict(set)

    def pytest_runtest_logreport(self, report):
        name = report.nodeid.partition('[')[0]
        if report.skipped:
            self.skipped[name].add(report.longrepr[2].removeprefix('Skipped: '))
        elif report.when == 'call' or report.failed:
            one = {'tried': 1, 'survived': int(report.passed)}
            numbers = dict(report.user_properties).get('cases') or one
            if report.failed and numbers['tried'] == numbers['survived']:       # it failed outside of the cases
                numbers = {**numbers, 'tried': numbers['tried'] + 1}
            self.tests[name] += 1
            self.tried[name] += numbers['tried']
            self.survived[name] += numbers['survived']
            self.failed[name] += report.failed
