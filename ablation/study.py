"""The queue of a grid: an optuna study in a journal file, which several processes and machines may share.

Every run is a trial. A process holds a lock on a private folder while it runs (the kernel releases it however the process
ends), and takes trials under another lock, so that no two take the same one. A trial whose process died goes back into
the queue, and train.py resumes from its checkpoint. What is done is read from the runs' folders: a lost journal costs
only the samplers' history.
"""
import contextlib
import json
import os
import socket
import threading
import time
import warnings

from ablation import axes
from ablation.grid import Run
from ablation.runner import STOP, say, state_of
from checkpoints.durable import Lock
from variants import UserError

JOURNAL = 'study.jsonl'


def open_optuna():
    """The optuna module, quiet; a UserError with the install command if it is missing."""
    try:
        import optuna
    except ImportError:
        raise UserError('ablate.py runs its grids with optuna, which is not installed; pip install optuna') from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings('ignore', category=optuna.exceptions.ExperimentalWarning)
    return optuna


def open_storage(folder):
    """The journal of a grid's folder; an unreadable one is set aside, as results are in the runs' folders."""
    optuna = open_optuna()
    path = os.path.join(folder, JOURNAL)
    backend = optuna.storages.journal.JournalFileBackend(path)
    try:
        return optuna.storages.JournalStorage(backend)
    except ValueError as error:                         # a line truncated by a crash of the machine
        say(f'{path} is not readable ({error}); it is renamed to {JOURNAL}.broken')
        os.replace(path, f'{path}.broken')
        return optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(path))


class Held:
    """`with held:` a lock for one thread of one process at a time, among all that share the folder."""

    def __init__(self, folder):
        self.folder, self.thread, self.lock = folder, threading.Lock(), None

    def __enter__(self):
        self.thread.acquire()
        while self.lock is None:
            try:
                self.lock = Lock(self.folder)
            except UserError:
                time.sleep(0.02)

    def __exit__(self, *error):
        self.lock.release()
        self.lock = None
        self.thread.release()


class Worker:
    """This process as the owner of trials."""

    def __init__(self, grid):
        self.folder = os.path.join(grid.out_dir, '.workers')
        self.name = f'{socket.gethostname()}-{os.getpid()}'
        self.lock = Lock(os.path.join(self.folder, self.name))

    def alive(self, name):
        """Whether the process of that name still holds its lock."""
        if name == self.name:
            return True
        try:
            Lock(os.path.join(self.folder, name)).release()
        except UserError:
            return True
        return False


class Queue:
    """The runs of a grid as trials.

    take() -> (study, trial, run, watch); 'wait' while others run the rest; None when none is left. end(): its outcome.
    """

    def __init__(self, grid):
        self.grid, self.optuna = grid, open_optuna()
        os.makedirs(grid.out_dir, exist_ok=True)
        self.states = self.optuna.trial.TrialState
        self.held = Held(os.path.join(grid.out_dir, '.queue'))
        self.worker, self.losses, self.failures, self.taken = Worker(grid), {}, {}, set()
        with self.held:
            self.storage = open_storage(grid.out_dir)
            self.study = self.make_study('runs')
        self.flags = axes.switches(grid) if grid.axes else {}

    def make_study(self, name, **how):
        return self.optuna.create_study(storage=self.storage, study_name=name, load_if_exists=True, **how)

    def loss_of(self, run):
        """Loss of a finished run, inf of one that failed in this start, None of a pending one."""
        if run in self.failures:
            return float('inf')
        if run not in self.losses:
            state, loss = state_of(run.folder(self.grid))
            if state in ('done', 'pruned'):
                self.losses[run] = loss if state == 'done' else float('inf')
                if state == 'done' and run not in self.taken:       # its own thread tells of a run of this start
                    say(f'{run}: {loss:.4f} (done before)')
        return self.losses.get(run)

    def ended(self):
        """Runs that this start knows to have ended, one way or the other."""
        return len({*self.losses, *self.failures})

    def take(self, wanted):
        """The next of `wanted()`, a list of runs in their order that may grow as others end."""
        with self.held:
            self.give_back(self.study)
            runs = wanted(self.loss_of)
            active = {self.run_of(t) for t in self.trials(self.study, self.states.WAITING, self.states.RUNNING)}
            for run in runs:
                if self.loss_of(run) is None and run not in active:
                    self.study.enqueue_trial(self.parameters(run), {'run': self.described(run)})
            trial = self.first_waiting({*runs})
            if trial:
                for name, value in self.parameters(trial).items():
                    self.suggest(trial, name, value)
                run = self.run_of(trial)
                self.taken.add(run)
                return self.study, self.own(trial), run, None
            return 'wait' if self.trials(self.study, self.states.RUNNING) else None

    def first_waiting(self, runs):
        """The first trial in the queue that is one of these runs, now RUNNING, or None.

        An earlier start may have queued others, which this one must not train (--pick, fewer seeds): they stay there.
        """
        study_id = self.storage.get_study_id_from_name(self.study.study_name)
        for frozen in self.trials(self.study, self.states.WAITING):
            if self.run_of(frozen) in runs and self.loss_of(self.run_of(frozen)) is None:
                number = self.storage.get_trial_id_from_study_id_trial_number(study_id, frozen.number)
                if self.storage.set_trial_state_values(number, state=self.states.RUNNING):
                    return self.optuna.trial.Trial(self.study, number)
        return None

    def own(self, trial):
        trial.set_user_attr('worker', self.worker.name)
        return trial

    def give_back(self, study):
        """Tell the trials of dead processes: as their folders say, else FAIL; those runs are queued again where needed."""
        for trial in self.trials(study, self.states.RUNNING):
            if not self.worker.alive(trial.user_attrs.get('worker', 'nobody')):
                state, loss = self.folder_says(trial)
                told = {'values': loss} if state == 'done' else {
                    'state': self.states.PRUNED if state == 'pruned' else self.states.FAIL}
                with contextlib.suppress(ValueError):
                    study.tell(trial.number, **told)

    def folder_says(self, trial):
        """state_of the folder of a trial's run."""
        return state_of(self.run_of(trial).folder(self.grid)) if 'run' in trial.user_attrs else ('new', None)

    def trials(self, study, *states):
        return study.get_trials(deepcopy=False, states=states)

    def parameters(self, run):
        """A trial's parameters for optuna: the switches of its axes, its searched values, the seed."""
        run = run if isinstance(run, Run) else self.run_of(run)
        numbers = {name: value for name, value in run.searched if isinstance(value, (int, float))}
        return {**self.flags.get(run.variant, {}), **numbers, 'seed': run.seed}

    @staticmethod
    def suggest(trial, name, value):
        """Register a fixed value: optuna needs a range, which may differ between trials for numbers."""
        if isinstance(value, bool):
            return trial.suggest_categorical(name, [False, True])
        return trial.suggest_int(name, value, value) if isinstance(value, int) else trial.suggest_float(name, value, value)

    @staticmethod
    def described(run):
        return json.dumps([run.task, run.variant, run.searched, run.seed])

    @staticmethod
    def run_of(trial):
        task, variant, searched, seed = json.loads(trial.user_attrs['run'])
        return Run(task, variant, tuple(map(tuple, searched)), seed)

    def end(self, study, trial, run, state, loss, words):
        """Report to optuna and on stdout how a run ended."""
        with self.held:
            if state == 'done':
                self.losses[run] = loss
                study.tell(trial, loss)
            elif state == 'pruned':
                self.losses[run] = float('inf')
                study.tell(trial, state=self.states.PRUNED)
            else:
                if state == 'failed':
                    self.failures[run] = words
                    trial.set_user_attr('error', words)
                elif study is not self.study:           # the same ranks again, when the command is run again
                    study.enqueue_trial(trial.params)
                study.tell(trial, state=self.states.FAIL)
        told = {'done': f'{loss:.4f}' if loss is not None else '', 'pruned': f'pruned at {loss}',
                'stopped': 'stopped; run the same command to continue', 'failed': f'failed: {words}'}[state]
        say(f'{run}: {told}')


def work(queue, slot, take, train):
    """One job: take a trial, train it, report its outcome, until none is left or a signal arrives.

    take: () -> (study, trial, run, watch), 'wait' or None; train: (run, slot, watch) -> (state, loss, words).
    """
    while not STOP.is_set():
        found = take()
        if found is None:
            return
        if found == 'wait':                             # the results of running trials may add more
            STOP.wait(0.5)
            continue
        study, trial, run, watch = found
        queue.end(study, trial, run, *train(run, slot, watch))
