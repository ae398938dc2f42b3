"""What a terminal shows while a grid runs: a bar for each running job, and the runs that have ended of all."""
import threading

from ablation.grid import by_variant, first_runs
from ablation.ranks import searched_variants
from reporting import live

FORMAT = '{desc}|{bar}| {remaining} left'


def total(grid):
    """Runs of a grid when none fails: the search, the other seeds, and drawn ranks with theirs."""
    first = first_runs(grid)
    later = (len(first) if grid.every_seed else len(by_variant(first))) * (grid.seeds - 1)
    return len(first) + later + len(searched_variants(grid)) * (grid.trials + grid.confirm * (grid.seeds - 1))


class Board:
    """The bars of a grid. ended: () -> runs that have ended so far, those of earlier starts too.

    The time left counts every run alike, and the running ones by the share of their steps.
    """

    def __init__(self, grid, ended):
        self.ended, self.slots, self.lock, self.count = ended, {}, threading.Lock(), max(1, total(grid))
        self.bar = live.bar(self.count, form=FORMAT, position=grid.jobs, smoothing=0)
        self.first = None

    def follow(self, name, folder, slot):
        """The bar of a run that begins in the slot-th job."""
        found = live.Followed(name, folder, position=slot)
        with self.lock:
            self.slots[slot] = found
            self.draw()
        return Looked(found, self)

    def draw(self):
        """The last bar, by what has ended and the shares of those that run."""
        ended, shares = self.ended(), sum(found.share for found in self.slots.values())
        self.first = ended if self.first is None else self.first
        self.bar.initial, self.bar.n = min(self.first, self.count), min(self.count, ended + shares)
        live.describe(self.bar, f'{ended} of {self.count} runs')

    def close(self):
        self.bar.close()


class Looked:
    """One job's bar; a look at it moves the last bar too."""

    def __init__(self, found, board):
        self.found, self.board, self.share = found, board, 0.0

    def look(self):
        self.found.look()
        if self.found.share != self.share:
            self.share = self.found.share
            with self.board.lock:
                self.board.draw()

    def close(self):
        self.found.close()
        with self.board.lock:
            self.found.share = 0.0
