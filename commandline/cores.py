"""How CPU threads wait for one another."""
import os


def let_threads_sleep():
    """Threads of OpenMP wait for some microseconds, then sleep; to be called before torch is imported.

    Spinning for long, as by default, is 10 to 60 times slower on cores that others use too, sleeping at once 2 times slower
    on idle ones (records/LOG.md). What the environment says stays.
    """
    os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')
    os.environ.setdefault('GOMP_SPINCOUNT', '1000')     # turns of a loop
