"""Child processes of the parts that race or launch: wall-clock and CPU time, and results saved as they come."""
import json
import os
import resource
import signal
import subprocess
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def timed(command, cwd=ROOT, threads=None, timeout=None, watch=None, **environment):
    """Run a command from start to exit: {'wall_s', 'cpu_s', 'code', 'out', 'err'}; cpu_s is of it and of its children.

    threads: of torch and BLAS. timeout: s, after which it and its children are killed and code is None. watch: is called
    every second in between.
    """
    values = {**os.environ, **environment}
    if threads:
        values.update(OMP_NUM_THREADS=str(threads), MKL_NUM_THREADS=str(threads))
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    process = subprocess.Popen(list(map(str, command)), cwd=cwd, env=values, stdin=subprocess.DEVNULL, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    try:
        out, err = wait(process, timeout, watch)
        code = process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        (out, err), code = process.communicate(), None
    except BaseException:                               # Ctrl-C: no process is left behind
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise
    wall, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {'wall_s': wall, 'cpu_s': cpu, 'code': code, 'out': out, 'err': err}


def wait(process, timeout, watch):
    """(stdout, stderr) at the end of a process; raises subprocess.TimeoutExpired after `timeout` s."""
    end = time.monotonic() + timeout if timeout is not None else float('inf')
    while watch is not None and (left := end - time.monotonic()) > 0:
        try:
            return process.communicate(timeout=min(1.0, left))
        except subprocess.TimeoutExpired:
            watch()
    return process.communicate(timeout=timeout if watch is None else 0)


def last_line(done):
    """The last line of a failed process."""
    if done['code'] is None:
        return f'stopped after {done["wall_s"]:.0f} s'
    lines = [line for line in (done['err'] or done['out']).splitlines() if line.strip()]
    return f'exit code {done["code"]}: {lines[-1][:300] if lines else "no output"}'


def keep(result, path):
    """Write the results so far into the file of --json; bench.py writes all at the end."""
    if path not in ('', '-'):
        from checkpoints.durable import DISK, write_whole
        write_whole(Path(path), json.dumps(result, indent=1, allow_nan=False).encode(), DISK)


def read_log(folder):
    """(training lines, evaluation lines) of a run's log.jsonl."""
    lines = [json.loads(line) for line in Path(folder, 'log.jsonl').read_text().splitlines()]
    return [x for x in lines if 'ms' in x], [x for x in lines if 'val_loss' in x]
