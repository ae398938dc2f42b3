"""The time that a study still takes, by what its trials took so far, and the line that says it on a terminal."""
import contextlib
import threading
import time

from reporting import live


class Clock:
    """The time that the trials of todo still take, each as long as trials known so far.

    kinds: of each trial, most alike first: what another trial of the first kind took on average, else of the second ...
    """

    def __init__(self, todo, kinds):
        self.todo, self.kinds, self.took = todo, kinds, {}
        self.number, self.then = 0, time.monotonic()

    def add(self, trial, seconds):
        for kind in self.kinds(trial):
            self.took.setdefault(kind, []).append(seconds)

    def tick(self, trial):
        """A trial has ended."""
        then, self.then = self.then, time.monotonic()
        self.add(trial, self.then - then)
        self.number += 1

    def guess(self, trial):
        """Seconds, None where nothing is known."""
        known = next((self.took[kind] for kind in self.kinds(trial) if kind in self.took), None)
        return known and sum(known) / len(known)

    def left(self):
        """Seconds to the end, None where nothing is known; a trial that takes longer than usual is about to end."""
        guesses = [self.guess(trial) for trial in self.todo[self.number:]]
        if not guesses or None in guesses:
            return None
        return max(0, guesses[0] - (time.monotonic() - self.then)) + sum(guesses[1:])

    def words(self):
        left, name = self.left(), self.todo[self.number] if self.number < len(self.todo) else ''
        when = 'time left unknown' if left is None else f'about {live.clock(left)} left'
        return f'{min(self.number + 1, len(self.todo))} of {len(self.todo)}, {when}: {name}'


@contextlib.contextmanager
def shown(clock):
    """On a terminal clock.words() stand below the bar of what goes on, and are renewed every second."""
    with live.bar(1, position=1, form='{desc}') as line:
        ended = threading.Event()

        def renew():
            while not ended.wait(1.0):
                live.describe(line, clock.words())
        live.describe(line, clock.words())
        thread = threading.Thread(target=renew, name='clock', daemon=True)
        if not line.disable:
            thread.start()
        try:
            yield
        finally:
            ended.set()
            if thread.ident:
                thread.join()
