"""Durable checkpoints: files that are complete or absent, whatever stops the machine, and that cannot run code.

    ckpt_00000020.pt      torch.save of {schema, step, model, ...}: tensors and plain values only
    ckpt_00000020/        instead, where every rank saves its own shards: see sharded.py
    ckpt_00000020.json    its manifest {sha256, size, step, schema}, written last: without it the data is not valid
    best.json             {step, val_loss}: the checkpoint that pruning keeps
    previous/, previous.1/ earlier runs that set_aside moved out of the way: see previous.py
    .lock                 held by the trainer

torch.load compares no checksums: of 200 flipped bits it loaded 198 as wrong weights (measured), so the SHA-256 is checked
first. Nothing here opens a path that a checkpoint names.
"""
import contextlib
import hashlib
import json
import math
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from checkpoints import sharded, torchfile
from checkpoints.durable import DISK, FileOps, Lock, write_whole  # noqa: F401 - callers import FileOps and Lock from here
from checkpoints.manifest import NAME, SCHEMA, Damaged, data_path, data_paths, in_order, newer, read_json, verify
from checkpoints.previous import set_aside  # noqa: F401 - and from here
from variants import UserError


def save(folder, state, keep=3, ops=DISK, group=None):
    """Write ckpt_<step>.pt and its manifest, then prune; returns the path.

    state: dict of tensors, numbers, strings, None, lists and dicts with an int state['step']; the schema is added.
    keep: newest checkpoints to keep (>= 2), besides the best; those of later steps are deleted: that run was abandoned.
    group: ranks that hold shards of the state's tensors; all of them call, and write a folder ckpt_<step>/.
    A file needs its size in memory once more. A process killed or a machine stopped at any point leaves the previous
    newest checkpoint or the new one. Raises ValueError (nothing written) for a non-finite model tensor or a state that
    load would refuse, and OSError with the MiB needed when the disk fails; earlier checkpoints are intact then.
    """
    if keep < 2:
        raise UserError(f'keep_checkpoints must be at least 2, so that one can be damaged, got {keep}')
    step, folder = state.get('step'), Path(folder)
    if type(step) is not int or step < 0:
        raise ValueError(f"state['step'] must be a whole number from 0, got {step!r}")
    if group is not None:
        return _save_parts(folder, state, keep, ops, group)
    _refuse_non_finite(state.get('model', {}))
    data, path = torchfile.dumps({**state, 'schema': SCHEMA}), data_path(folder, step)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _clear(folder, ops)
        facts = hashlib.sha256(data).hexdigest(), len(data)
        _commit(path, lambda: write_whole(path, data, ops), facts, step, ops)
    except OSError as error:
        raise OSError(error.errno, f'{error.strerror or error}: {path} needs {len(data) / 2**20:.3f} MiB; '
                                   'the checkpoints before it are intact') from error
    _prune(folder, step, keep, ops)
    return path


def _save_parts(folder, state, keep, ops, group):
    """save() of a folder: written under a temporary name by all ranks, renamed and given its manifest by the first."""
    path, main = data_path(folder, state['step'], ''), dist.get_rank(group) == 0
    aside = path.with_suffix('.tmp')
    sharded.together(group, lambda: _refuse_non_finite(state.get('model', {})))
    sharded.together(group, lambda: main and _clear(folder, ops))
    try:
        facts = sharded.write(aside, {**state, 'schema': SCHEMA}, group, ops)
        sharded.together(group, lambda: main and _commit(path, lambda: _swap(aside, path, ops), facts, state['step'], ops))
    except OSError as error:
        if main:
            with contextlib.suppress(OSError):
                ops.remove(aside)
        raise OSError(error.errno, f'{error.strerror or error}: {path} is not written; '
                                   'the checkpoints before it are intact') from error
    if main:
        _prune(folder, state['step'], keep, ops)
    return path


def set_best(folder, step, val_loss, ops=DISK):
    """Name the saved checkpoint of this step as the best; val_loss in nats. best.json is replaced atomically."""
    if step not in steps(folder) or not math.isfinite(val_loss):
        raise ValueError(f'step {step} with loss {val_loss} cannot be the best: it must be saved and finite')
    write_whole(Path(folder) / 'best.json', json.dumps({'step': step, 'val_loss': float(val_loss)}).encode(), ops)


def best(folder):
    """{step, val_loss} of the best checkpoint; None where there is no readable best.json."""
    with contextlib.suppress(OSError, Damaged):
        named = read_json(Path(folder) / 'best.json', step=int, val_loss=float)
        return named if math.isfinite(named['val_loss']) else None


def steps(folder):
    """Ascending steps that have data and a manifest; neither is read."""
    found = [NAME.fullmatch(path.name) for path in Path(folder).glob('ckpt_*.json')]
    return sorted(int(m[1]) for m in found if m and data_paths(folder, int(m[1])))


def newest(folder, which='last'):
    """Path of the newest checkpoint ('last') or of the best one whose size and hash agree; None if there is none."""
    for path in _candidates(folder, which):
        with contextlib.suppress(Damaged):
            verify(path)
            return path
    return None


def load(folder, which='last', *, allow_unverified=False, quiet=False):
    """The state of the newest valid checkpoint, or of the best, on the CPU; folder may also be one .pt file.

    For a damaged one it prints one line on stderr and takes the next older (not for 'best'). allow_unverified accepts a
    single file without a manifest; quiet prints no line. Raises UserError if nothing is left. Time: one SHA-256 pass,
    then torch.load.
    """
    single = Path(folder).suffix == '.pt' and not Path(folder).is_dir()
    paths, wrong = [Path(folder)] if single else _candidates(folder, which), []
    for path in paths:
        try:
            state = _read(path, unverified=single and allow_unverified and not path.with_suffix('.json').exists())
        except Damaged as error:
            wrong.append(str(error))
            continue
        for line in () if quiet else wrong:
            print(f'{folder}: {line}; taking the next older checkpoint', file=sys.stderr, flush=True)
        return state
    if wrong:
        raise UserError(f'{folder} has no usable checkpoint: {"; ".join(wrong)}; restore a copy or start afresh')
    if which == 'best' and steps(folder):
        raise UserError(f'{folder} has no checkpoint named as the best; take --which=last')
    raise UserError(f'{folder} has no checkpoint (ckpt_<step>.pt or a folder ckpt_<step>/, with its .json); train there '
                    'first or correct it')


def _clear(folder, ops):
    """Remove the leftovers of interrupted saves."""
    for path in folder.glob('*.tmp'):
        if path.is_file() or NAME.fullmatch(path.stem):
            ops.remove(path)


def _commit(path, put, facts, step, ops):
    """Data by put(), then manifest. A step that is saved again has a manifest that accepts either content in between."""
    note = path.with_suffix('.json')
    manifest = {'sha256': facts[0], 'size': facts[1], 'step': step, 'schema': SCHEMA}
    for former in data_paths(path.parent, step) if note.exists() else ():
        with contextlib.suppress(Damaged):
            write_whole(note, json.dumps({**manifest, 'before': verify(former)}).encode(), ops)
            break
    try:
        put()
        write_whole(note, json.dumps(manifest).encode(), ops)
    except OSError:
        if not note.exists():           # data without a manifest would only fill the disk
            with contextlib.suppress(OSError):
                ops.remove(path)
        raise
    for former in data_paths(path.parent, step):
        if former != path:
            ops.remove(former)


def _swap(aside, path, ops):
    """Put the folder `aside` in the place of `path`; the folder there remains valid as .old until then."""
    old = path.with_suffix('.old')
    if path.exists():
        if old.exists():
            ops.remove(old)
        ops.replace(path, old)
    ops.replace(aside, path)
    ops.fsync_dir(path.parent)


def _prune(folder, step, keep, ops):
    """Remove what save no longer keeps; the manifest before its data. A failure is only reported: the new one is safe."""
    spared = (best(folder) or {}).get('step')
    kept = {spared, *[s for s in steps(folder) if s <= step and s != spared][-keep:]}
    try:
        for path in sorted(filter(in_order, folder.glob('ckpt_*')), key=in_order):
            number = in_order(path)[0]
            if number not in kept:
                ops.remove(path)
                if number > step:       # one at a time, or a power cut could bring back one between step and newest
                    ops.fsync_dir(folder)
    except OSError as error:
        print(f'{folder}: older checkpoints could not be removed: {error}', file=sys.stderr, flush=True)


def _refuse_non_finite(model):
    for name, value in model.items():
        value = value.to_local() if hasattr(value, 'to_local') else value
        if torch.is_tensor(value) and value.is_floating_point() and not value.isfinite().all():
            raise ValueError(f'{name} holds values that are not finite; such weights are not saved')


def _candidates(folder, which):
    if which not in ('last', 'best'):
        raise UserError(f"which must be 'last' or 'best', got {which!r}")
    if which == 'best':
        step = (best(folder) or {}).get('step')
        return [] if step is None else data_paths(folder, step) or [data_path(folder, step)]
    noted = {int(name[1]) for name in map(NAME.fullmatch, (p.name for p in Path(folder).glob('ckpt_*.json'))) if name}
    return [path for step in sorted(noted, reverse=True)                        # one without data is told of, not passed
            for path in data_paths(folder, step) or [data_path(folder, step)]]


def _read(path, unverified):
    """The state in a data file; raises Damaged, and UserError for a newer schema."""
    if not unverified:
        verify(path)
    try:
        state = (sharded.read if path.is_dir() else torchfile.load)(path)
    except OSError as error:
        raise Damaged(f'{path.name} cannot be read: {error.strerror}') from error
    except torchfile.Refused as error:
        raise Damaged(f'{path.name} {error}') from error
    schema, name = state.get('schema'), NAME.fullmatch(path.name)
    if type(schema) is int and schema > SCHEMA:
        raise newer(path, schema)
    if not unverified and (type(schema) is not int or name and state.get('step') != int(name[1])):
        raise Damaged(f'{path.name} holds another step than its name says, or no schema')
    return state
