"""A checkpoint that is whole may still hold what no run has written: it is looked at before a run goes on from it."""
import contextlib

import torch

import configurator
from variants import UserError

NUMBER = (int, float)
NONE = type(None)
# what a run writes: a type or some of them, [of each item], {of each key}; 'name?' is missing in older checkpoints
DROP = {'specs': dict, 'order': (list, NONE), 'done': int, 'units': int, 'damage': dict, 'frozen': bool, 'held': dict}
BUILT = {'layers': int, 'dense': bool, 'changed': (int, NONE), 'losses': [NUMBER], 'model': dict, 'guided?': bool,
         'drop?': DROP}
PARTS = {'step': int, 'config': dict, 'model': dict, 'optimizer': dict, 'scaler': dict, 'tokens': int, 'data_digest': str,
         'best_val_loss': float, 'evaluated': (int, NONE), 'average?': dict, 'ahead?': dict, 'built?': BUILT,
         'seconds?': NUMBER, 'flops?': NUMBER, 'outliers?': {'loss': [NUMBER], 'grad_norm': [NUMBER]}, 'teacher?': str,
         'source?': dict}

SHAPES = {'rows': lambda shape: (*shape[:-1], 1),       # of Muon's other state, where it is not the parameter's
          'vector': lambda shape: shape[-1:] if len(shape) == 2 else (*shape[:-2], 1, shape[-1])}


def check(state, folder):
    """Refuse a state without a run's parts, of other kinds, or with settings or sizes that are none; raises UserError."""
    said = misfit(state, PARTS, 'checkpoint')
    if said:
        refuse(folder, said)
    model, given, built = state['model'], state['config'], state.get('built', {})
    if not all(isinstance(name, str) and torch.is_tensor(value) for name, value in model.items()):
        refuse(folder, 'a model of other things than tensors')
    drop = built.get('drop', {})
    for entries in (state['optimizer'], drop.get('held', {})):
        check_optimizer(entries, model, folder)
    for part in ('average', 'ahead'):
        if not all(fits(value, model.get(name)) for name, value in state.get(part, {}).items()):
            refuse(folder, 'an average that is none of its model')
    if not all(type(value) in NUMBER for value in state['scaler'].values()) or not is_drop(drop, built):
        refuse(folder, 'a scaler, or matrices that become structured, as no run has them')
    for cls, settings in ((configurator.Config, given), (configurator.GPTConfig, built.get('model', {}))):
        check_settings(cls, settings, folder)
    table, sizes = model.get('transformer.wte.weight'), (given.get('vocab_size'), given.get('n_embd'))
    if table is None or tuple(table.shape) != sizes:
        refuse(folder, f'another embedding than {sizes}, which its settings say')
    blocks = len({name.split('.')[2] for name in model if name.startswith('transformer.h.')})
    if built and built['layers'] != blocks:
        refuse(folder, f'{blocks} blocks and says that there are {built["layers"]}')
    if given.get('n_layer', 1) > len(model) and not given.get('grow_from'):
        refuse(folder, f'{len(model)} tensors where its settings say {given["n_layer"]} blocks')


def misfit(value, wanted, name):
    """How a value differs from what is wanted of it, in a few words, or None."""
    if isinstance(wanted, dict) and isinstance(value, dict):
        lacking = [f'no {key!r}' for key in wanted if key[-1] != '?' and key not in value]
        found = (misfit(value[key.rstrip('?')], kind, key.rstrip('?')) for key, kind in wanted.items()
                 if key.rstrip('?') in value)
        return next(iter(lacking), None) or next(filter(None, found), None)
    if isinstance(wanted, list) and isinstance(value, list):
        return next(filter(None, (misfit(item, wanted[0], f'one of {name}') for item in value)), None)
    kinds = wanted if isinstance(wanted, tuple) else (type(wanted) if isinstance(wanted, (dict, list)) else wanted,)
    if type(value) not in kinds:
        return f'a {type(value).__name__} as {name!r}'
    low, high = (-1e300, 1e300) if wanted is NUMBER else (0, 1e18)
    if type(value) is int and not low <= value <= high or wanted is NUMBER and not low < value < high:
        return f'{str(value)[:20]} as {name!r}'
    return None


def fits(tensor, like, entry=''):
    """Whether it is a tensor of numbers of the shape of another one, or of what an optimizer keeps of it as `entry`."""
    if not (torch.is_tensor(tensor) and torch.is_tensor(like) and tensor.is_floating_point()):
        return False
    return tuple(tensor.shape) == SHAPES.get(entry, lambda shape: shape)(tuple(like.shape))


def check_optimizer(entries, model, folder):
    """{parameter: {'step' and moments of its shape}}: a fused optimizer looks at no shape and writes past a tensor's end."""
    for name, found in entries.items():
        if not isinstance(name, str) or name not in model or not isinstance(found, dict) or not all(
                torch.is_tensor(value) and value.numel() == 1 if key == 'step' else fits(value, model[name], key)
                for key, value in found.items()):
            refuse(folder, f'optimizer state for {str(name)[:80]!r} that is none of its parameter')


def is_drop(drop, built):
    """Whether the matrices that become structured, their order and their count go together."""
    order, done = drop.get('order'), drop.get('done', 0)
    if not all(isinstance(text, str) for text in (*drop.get('specs', {}), *drop.get('specs', {}).values())):
        return False
    if order is None:
        return done == 0 and not drop.get('frozen')
    known = all(isinstance(unit, list) and unit and all(isinstance(s, str) and s in drop['specs'] for s in unit)
                for unit in order)
    thaws = not drop['frozen'] or done > 0 and built['changed'] is not None
    return known and thaws and len(order) == drop['units'] >= done


def check_settings(cls, given, folder):
    fields = configurator.settings(cls)
    for name in given.keys() & fields.keys():
        try:
            configurator.coerce(fields[name], given[name])
        except UserError as error:
            refuse(folder, f'settings that are none: {error}')


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
