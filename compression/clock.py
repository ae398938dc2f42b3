"""The time that a study still takes, by what its trials took so far."""
import time

from reporting import live


class Clock:
    """The time that the trials of todo still take: a variant what it took at other budgets, else the mean of those known.

    done: Runner.done.
    """

    def __init__(self, done, todo):
        self.todo, self.took, self.then = todo, {}, time.monotonic()
        for found in done.values():
            if 'zero' in found:
                healed = (found['healed'] or {}).get('healed') or {}
                self.add(found['zero']['variant'], (found['zero'].get('seconds') or 0) + (healed.get('seconds') or 0))

    def add(self, variant, seconds):
        self.took.setdefault(variant, []).append(seconds)

    def tick(self, trial):
        """A trial has ended."""
        then, self.then = self.then, time.monotonic()
        self.add(trial.variant, self.then - then)

    def left(self, number):
        """What is said of the trials from this number on."""
        if not self.took:
            return 'the first one tells the time'
        means = {variant: sum(each) / len(each) for variant, each in self.took.items()}
        usual = sum(means.values()) / len(means)
        return f'about {live.clock(sum(means.get(t.variant, usual) for t in self.todo[number:]))} left'
