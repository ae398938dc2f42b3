"""Parallel work in order, and the one-line report of a prepare.py's user error. Imports no torch."""
import collections
import concurrent.futures
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
from concurrent.futures.process import BrokenProcessPool

from data.shards import reason
from variants import UserError

AHEAD = 3                                   # items per process that are read before their results are taken


def cores():
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def in_order(function, items, processes):
    """Yield function(item) for each item, in the order of the items, computed by `processes` processes; 1: by this one.

    function: defined in a module, since it is sent to them. Items are taken as needed, AHEAD per process, so that an
    endless stream fits into memory (multiprocessing's imap reads all of it). Exceptions of `items` and of the function
    are raised here. Raises UserError when a process dies.
    """
    if processes <= 1:
        yield from map(function, items)
        return
    context = multiprocessing.get_context('spawn')
    pool = concurrent.futures.ProcessPoolExecutor(processes, context, begin_worker)
    waiting = collections.deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > AHEAD * processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise UserError(f'one of {processes} processes died, perhaps out of memory; take fewer by --processes=N') \
            from None
    finally:
        pool.shutdown(cancel_futures=True)


def begin_worker():
    """In each process: leave Ctrl-C to the parent, and end when the parent ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=leave_with_parent, daemon=True).start()


def leave_with_parent():
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def run_prepare(work, *arguments):
    """Call work(*arguments), the body of a prepare.py; a user error is one line on stderr and exit code 2."""
    try:
        work(*arguments)
    except UserError as error:
        complain(error)
    except OSError as error:
        complain(f'{error.filename or "a file"}: {reason(error)}')
    except KeyboardInterrupt:
        complain('stopped; run the same command to continue', 130)


def complain(message, code=2):
    """Print an error in one line and exit with this code."""
    print(f'prepare.py: {message}'.replace('\n', ' '), file=sys.stderr)
    raise SystemExit(code)
