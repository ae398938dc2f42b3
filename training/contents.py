"""A checkpoint that is whole may still hold what no run has written: it is looked at before a run goes on from it."""
import contextlib

import torch

import configurator
from variants import UserError

KINDS = {'step': int, 'config': dict, 'model': dict, 'optimizer': dict, 'scaler': dict, 'tokens': int, 'data_digest': str,
         'best_val_loss': float, 'evaluated': (int, type(None))}
LATER = {'average': dict, 'outliers': dict, 'built': dict, 'seconds': (int, float), 'flops': (int, float),
         'source': dict}                # newer ones'


def check(state, folder):
    """Refuse a state without a run's parts, of other kinds, or with settings or sizes that are none; raises UserError."""
    for name, kind in (*KINDS.items(), *LATER.items()):
        if name not in state and name in KINDS:
            refuse(folder, f'no {name!r}')
        if name in state and (not isinstance(state[name], kind) or isinstance(state[name], bool)):
            refuse(folder, f'a {type(state[name]).__name__} as {name!r}')
    if not all(isinstance(name, str) and torch.is_tensor(value) for name, value in state['model'].items()):
        refuse(folder, 'a model of other things than tensors')
    fields, given = configurator.settings(configurator.Config), state['config']
    for name in given.keys() & fields.keys():
        try:
            configurator.coerce(fields[name], given[name])
        except UserError as error:
            refuse(folder, f'settings that are none: {error}')
    table = state['model'].get('transformer.wte.weight')
    sizes = given.get('vocab_size'), given.get('n_embd')
    if table is None or tuple(table.shape) != sizes:
        refuse(folder, f'another embedding than {sizes}, which its settings say')
    if given.get('n_layer', 1) > len(state['model']) and not given.get('grow_from'):
        refuse(folder, f'{len(state["model"])} tensors where its settings say {given["n_layer"]} blocks')


def refuse(folder, what):
    raise UserError(f'the checkpoint in {folder} holds {what[:200]}; it is as it was written, so no copy will help: start '
                    'afresh in another out_dir')


@contextlib.contextmanager
def taken_from(folder):
    """While a checkpoint's parts are put to use: what does not fit is a UserError that says so."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError, RuntimeError) as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
        refuse(folder, f'parts that do not fit its settings ({type(error).__name__}: {said})')
