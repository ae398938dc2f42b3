"""What follows a decomposition: the compressed model as a checkpoint, and the healing run, by train.py as a process."""
import os
import shutil
import threading

import configurator
from ablation import runner
from ablation.grid import SEEDS, argument
from checkpoints import checkpoint
from compression import squeeze
from compression.study import DENSE, heal_settings, settings_of, signature
from decomposition.initialise import build, read_folder
from reporting.runlog import write_json
from reporting.written import read_json
from variants import UserError

BEGUN = 'healing.json'                  # what the run in a folder is: the trial's signature and its settings
CHILD = threading.Event()               # while train.py runs: a signal is passed on to it


def model_folder(study, trial):
    """Where a compressed model is kept, with keep=True, for export.py, sample.py and train.py."""
    return os.path.join(study.out_dir, 'models', str(trial).replace('/', '_'))


def folder_of(study, trial):
    return os.path.join(study.out_dir, 'healed', f'{trial.variant} {trial.budget} {trial.source}'.replace('/', '_'))


def forget_others(study, trial):
    """Remove what a healing run with other settings, or from another start, left in the trial's folder."""
    folder, wanted = folder_of(study, trial), {'of': signature(study, trial), 'settings': heal_settings(study, trial)}
    path = os.path.join(folder, BEGUN)
    try:
        found = read_json(path)
    except UserError:
        found = None
    if found != wanted:
        shutil.rmtree(folder, ignore_errors=True)
        os.makedirs(folder)
        write_json(path, wanted)


def heal(source, trial, model, rules):
    """The same losses after a training run by train.py in a separate process, {} when a signal stopped it.

    model: the compressed one, or None when the run has begun already. Raises UserError when the run fails.
    """
    study, folder = source.study, folder_of(source.study, trial)
    start = os.path.join(folder, 'start')
    if model is not None:
        save_start(source, model, start, trial)
        shutil.rmtree(squeeze.refined_folder(study, trial), ignore_errors=True)
    wanted = heal_settings(study, trial)
    given = wanted | ({'distill': source.place} if wanted.get('distill') == DENSE else {})
    arguments = [argument(name, value) for name, value in {
        'dataset': study.dataset, 'data_dir': study.data_dir, 'block_size': source.config.block_size,
        'device': str(source.device), **given, 'init_from': start, **({'linear': rules} if rules else {})}.items()]
    run = os.path.join(folder, 'run')
    state, loss, words = train(study, str(trial), run, arguments)
    if state == 'stopped':
        return {}
    if state != 'done':
        raise UserError(f'healing failed: {words}')
    config, weights, _ = read_folder(run)
    healed = build(config, config, weights)
    losses = squeeze.perplexities(healed.to(source.device), source)
    spare = [] if study.keep else [os.path.join(run, n) for n in os.listdir(run) if n.startswith('ckpt_')]
    for name in [start, *spare]:
        shutil.rmtree(name) if os.path.isdir(name) else os.remove(name)         # large, and everything in them is recorded
    return {'val_loss': loss, 'settings': wanted, 'seconds': runner.outcome(run).get('seconds'), **losses}


def save_start(source, model, folder, trial):
    """The compressed model as a checkpoint that train.py starts from, with what its source said and what was done to it."""
    done = f'compress.py, {trial}'
    if trial.variant != DENSE:
        variant = settings_of(source.study, trial.variant, trial.budget)
        done += (f': {variant.decompose} on {variant.calibration_tokens:,} calibration tokens, '
                 f'{model.num_params():,} parameters')
    checkpoint.save(folder, {'step': 0, 'config': configurator.as_dict(model.config), 'model': model.state_dict(),
                             'data': source.dataset.tokenizer,
                             'source': {**source.said, 'history': [*source.said['history'], done]}})


def has_start(study, trial):
    """Whether a healing run can start, or resume, without the compressed model."""
    folder = folder_of(study, trial)
    return any(checkpoint.steps(os.path.join(folder, part)) for part in ('start', 'run')
               if os.path.isdir(os.path.join(folder, part)))


# ----------------------------------------------------------------------------------------------------
# train.py

def train(study, name, folder, arguments):
    """runner.carry_out while CHILD is set."""
    CHILD.set()
    try:
        return runner.carry_out(name, folder, arguments, study.threads,
                                group=os.path.basename(os.path.abspath(study.out_dir)))
    finally:
        CHILD.clear()


def trained(study, index):
    """The folder of the index-th dense model of `train`, trained now if missing; '' when a signal stopped it."""
    folder = os.path.join(study.out_dir, 'dense', f'seed={SEEDS[index]}')
    state, _, words = train(study, f'dense seed={SEEDS[index]}', folder, [
        study.train, f'--dataset={study.dataset}', f'--data_dir={study.data_dir}', f'--device={study.device}',
        f'--seed={SEEDS[index]}'])
    if state == 'failed':
        raise UserError(f'{study.train}: {words}', 'train')
    return folder if state == 'done' else ''
