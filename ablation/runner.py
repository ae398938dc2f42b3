"""One run of a grid in a separate process: start, watch, prune, stop; the outcome is written to its folder."""
import contextlib
import os
import subprocess
import sys
import threading
import time

from checkpoints.durable import Lock
from reporting import live, masking
from reporting.runlog import read_log, write_json
from reporting.written import read_json
from variants import UserError

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PRINTING = threading.Lock()
STOP = threading.Event()                # set by a signal: runs save and stop, and no new ones start
POLL = 0.1                              # seconds between checks of a running process


def say(text):
    with PRINTING:
        print(text, flush=True)


def evaluations(folder):
    return [line for line in read_log(os.path.join(folder, 'log.jsonl')) if 'val_loss' in line]


def outcome(folder):
    """Content of a run's outcome.json: {'state': 'done', 'failed', 'pruned' or 'stopped', 'words', 'seconds'}, or {}."""
    try:
        found = read_json(os.path.join(folder, 'outcome.json'))
    except UserError:
        return {}
    return found if type(found.get('seconds', 0.0)) in (int, float) and isinstance(found.get('words', ''), str) else {}


def state_of(folder):
    """('done' or 'pruned', its last validation loss), ('started', None) or ('new', None)."""
    try:
        steps = read_json(os.path.join(folder, 'config.json')).get('max_iters')
    except UserError:
        steps = None
    if type(steps) is not int:
        return 'new', None
    found = evaluations(folder)
    if found and found[-1]['step'] >= steps:
        return 'done', found[-1]['val_loss']
    if found and outcome(folder).get('state') == 'pruned':
        return 'pruned', found[-1]['val_loss']
    saved = any(name.startswith('ckpt_') and name.endswith('.json') for name in os.listdir(folder))
    return ('started' if saved else 'new'), None


def wait_for_orphan(folder, name):
    """Wait for a train.py that outlived the ablate.py which started it: it holds the lock of its folder."""
    said = False
    while not STOP.is_set():
        try:
            Lock(folder).release()
            return
        except UserError:
            if not said:
                say(f'{name}: still trained by a process of an earlier start; waiting for it')
            said = True
            time.sleep(1)


def watched(process, folder, watch, look=None):
    """Wait for the process; a watch gets every new evaluation line. True when the watch said no and the run stopped.

    look: called again and again meanwhile.
    """
    seen, told, pruned = 0, 0.0, False
    while process.poll() is None:
        time.sleep(POLL)
        if look:
            look()
        if watch and not pruned:
            lines = evaluations(folder)
            for line in lines[seen:]:
                pruned = pruned or not watch(line['step'], line['val_loss'])
            seen = max(seen, len(lines))
        if pruned or STOP.is_set():
            if not told:
                process.terminate()                     # train.py saves and leaves
            told = told or time.monotonic()
            if time.monotonic() - told > 60:
                process.kill()
    return pruned


def gpu_environment(gpus, slot):
    """{'CUDA_VISIBLE_DEVICES': one of the first `gpus` visible to this process} for the slot-th job, {} without."""
    if not gpus:
        return {}
    visible = [name for name in os.environ.get('CUDA_VISIBLE_DEVICES', '').split(',') if name]
    return {'CUDA_VISIBLE_DEVICES': (visible or [str(i) for i in range(gpus)])[slot % gpus]}


def carry_out(name, folder, arguments, threads=1, gpus=0, slot=0, watch=None, show=live.Followed,
              group=''):
    """Run train.py with these arguments in folder, or resume it there -> (state, loss, words).

    state: 'done', 'pruned', 'failed' or 'stopped' (by a signal to this process; the run has saved).

    watch: (step, loss) -> whether to continue, for every evaluation; when False the run is told to save and stop.
    show: (name, folder) -> its bar on a terminal, a live.Followed. group: of the run on Weights & Biases.
    """
    wait_for_orphan(folder, name)
    state, loss = state_of(folder)
    if state in ('done', 'pruned'):
        return state, loss, ''
    command = [sys.executable, os.path.join(ROOT, 'train.py'), *arguments, f'--out_dir={folder}']
    if state == 'started':
        command.append('--init_from=resume')
    os.makedirs(folder, exist_ok=True)
    begin, before = time.monotonic(), outcome(folder).get('seconds', 0.0)
    with open(os.path.join(folder, 'train.log'), 'w+', encoding='utf-8', errors='replace') as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, env={
            **os.environ, 'OMP_NUM_THREADS': str(threads), 'WANDB_NAME': name,
            'WANDB_RUN_GROUP': group, **gpu_environment(gpus, slot)})
        with contextlib.closing(show(name, folder)) as shown:
            pruned = watched(process, folder, watch, shown.look)
        log.seek(0)
        last = masking.text((log.read().strip().splitlines() or ['no output'])[-1])     # the report is published
    state, loss = state_of(folder)
    words = '' if state == 'done' else last[:200]
    if process.returncode or state != 'done':
        state = 'pruned' if pruned else 'stopped' if STOP.is_set() else 'failed'
        loss = (evaluations(folder) or [{'val_loss': None}])[-1]['val_loss'] if pruned else None
        words = words or f'exit code {process.returncode} after its last step: {last[:200]}'
    with contextlib.suppress(OSError):                  # a full disk must not end the grid
        write_json(os.path.join(folder, 'outcome.json'), {
            'state': state, 'words': words, 'code': process.returncode, 'seconds': before + time.monotonic() - begin})
    return state, loss, words
