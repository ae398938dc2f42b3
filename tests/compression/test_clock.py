"""The time a study still takes: trials of one variant alike, those known least like the mean; and its line on a terminal."""
import threading
from types import SimpleNamespace

from compression import clock


def test_the_time_left_goes_by_the_trials_most_alike(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(clock, 'time', SimpleNamespace(monotonic=lambda: now[0]))
    times = clock.Clock(['a1', 'b1', 'a2', 'c1'], lambda trial: (trial[0], ''))
    assert times.left() is None and times.words() == '1 of 4, time left unknown: a1'
    now[0] = 10.0
    times.tick('a1')
    assert times.left() == 30                           # as long as a1 each
    now[0] = 25.0
    assert times.left() == 20                           # b1 is over its time
    now[0] = 40.0
    times.tick('b1')
    assert times.left() == 10 + 20                      # a2 like a1, c1 like the mean
    now[0] = 44.0
    assert times.left() == 6 + 20 and times.words() == '3 of 4, about 00:26 left: a2'
    for trial in ('a2', 'c1'):
        times.tick(trial)
    assert times.words().startswith('4 of 4')


def test_without_a_terminal_no_thread_and_no_line(capsys):
    with clock.shown(clock.Clock(['a'], lambda trial: ((),))):
        assert 'clock' not in [thread.name for thread in threading.enumerate()]
    assert capsys.readouterr() == ('', '')
