"""A bar for what takes long in a decomposition, on a terminal only."""
import sys

from tqdm import tqdm


def with_bar(items, what, unit, total=None):
    """The items one by one, under a bar that leaves no trace. total: how many, where len(items) does not say it."""
    silent = total == 0 or not sys.stderr.isatty()
    return tqdm(items, desc=what, unit=unit, total=total, leave=False, disable=silent)
