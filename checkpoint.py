"""Durable checkpoints: files that are whole or not there, whatever stops the machine, and that no one can trap.

    ckpt_00000020.pt      torch.save of {schema, step, model, ...}: tensors and plain values only
    ckpt_00000020.json    its manifest {sha256, size, step, schema}, written last: without it the .pt does not count
    best.json             {step, val_loss}: the checkpoint that pruning spares
    previous/             what set_aside moved out of the way of a fresh run
    .lock                 held by the trainer

torch.load compares no checksums: of 200 flipped bits it let 198 through as wrong weights (we measured), so the
SHA-256 comes first. Nothing here opens a path that a checkpoint names.
"""
import contextlib
import hashlib
import json
import math
import re
import sys
from pathlib import Path

import torch

import torchfile
from durable import DISK, FileOps, Lock, write_whole  # noqa: F401 - callers take FileOps and Lock from here
from variants import UserError

SCHEMA = 1                          # goes up when an older reader would misread a newer file
MAX_JSON = 4096                     # bytes of a manifest or best.json that are read
NAME = re.compile(r'ckpt_(\d{8,})\.(pt|json)')
RUN_FILES = ('best.json', 'config.json', 'env.json', 'loss.png', 'log.jsonl')          # a run's, besides checkpoints


class Damaged(ValueError):
    """One line: which file is not what was saved, and how that shows."""


def save(folder, state, keep=3, ops=DISK):
    """Write ckpt_<step>.pt and its manifest, then prune; returns the path.

    state: dict of tensors, numbers, strings, None, lists and dicts with an int state['step']; the schema is added.
    keep: newest checkpoints that stay (>= 2), besides the best; those of later steps go, for that run was given up.
    Needs the file's size in memory once more. A process killed or a machine stopped at any point leaves the old
    newest checkpoint or the new one. Raises ValueError (nothing written) for a non-finite model tensor or for what
    load would refuse, and OSError with the MiB needed when the disk does; what was there before is intact then.
    """
    if keep < 2:
        raise UserError(f'keep_checkpoints must be at least 2, so that one can be damaged, got {keep}')
    step, folder = state.get('step'), Path(folder)
    if type(step) is not int or step < 0:
        raise ValueError(f"state['step'] must be a whole number from 0, got {step!r}")
    _refuse_non_finite(state.get('model', {}))
    data, path = torchfile.dumps({**state, 'schema': SCHEMA}), _path(folder, step)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for stale in filter(Path.is_file, folder.glob('*.tmp')):
            ops.remove(stale)
        _commit(path, data, step, ops)
    except OSError as error:
        raise OSError(error.errno, f'{error.strerror or error}: {path} needs {len(data) / 2**20:.3f} MiB; '
                                   'the checkpoints before it are intact') from error
    try:
        _prune(folder, step, keep, ops)
    except OSError as error:            # the new one is safe, so that is no failed save
        print(f'{folder}: older checkpoints could not be removed: {error}', file=sys.stderr, flush=True)
    return path


def set_best(folder, step, val_loss, ops=DISK):
    """Name the saved checkpoint of this step as the best; val_loss in nats. best.json is replaced at one stroke."""
    if step not in steps(folder) or not math.isfinite(val_loss):
        raise ValueError(f'step {step} with loss {val_loss} cannot be the best: it must be saved and finite')
    write_whole(Path(folder) / 'best.json', json.dumps({'step': step, 'val_loss': float(val_loss)}).encode(), ops)


def best(folder):
    """{step, val_loss} of the best checkpoint; None where there is no readable best.json."""
    with contextlib.suppress(OSError, Damaged):
        named = _read_json(Path(folder) / 'best.json', step=int, val_loss=float)
        return named if math.isfinite(named['val_loss']) else None


def steps(folder):
    """Ascending steps that have a data file and a manifest; neither is read."""
    found = [NAME.fullmatch(path.name) for path in Path(folder).glob('ckpt_*.json')]
    return sorted(int(m[1]) for m in found if m and (Path(folder) / f'ckpt_{m[1]}.pt').is_file())


def newest(folder, which='last'):
    """Path of the newest checkpoint ('last') or of the best one whose size and hash agree; None if there is none."""
    for path in _candidates(folder, which):
        with contextlib.suppress(Damaged):
            _verify(path)
            return path
    return None


def load(folder, which='last', *, allow_unverified=False):
    """The state of the newest valid checkpoint, or of the best, on the CPU; folder may also be one .pt file.

    A damaged one costs one line on stderr, and the next older is taken ('best' has none). allow_unverified takes a
    single file that has no manifest. Raises UserError if nothing is left. Time: one SHA-256 pass, then torch.load.
    """
    single = Path(folder).suffix == '.pt' and not Path(folder).is_dir()
    paths, wrong = [Path(folder)] if single else _candidates(folder, which), []
    for path in paths:
        try:
            state = _read(path, unverified=single and allow_unverified and not path.with_suffix('.json').exists())
        except Damaged as error:
            wrong.append(str(error))
            continue
        for line in wrong:
            print(f'{folder}: {line}; taking the next older checkpoint', file=sys.stderr, flush=True)
        return state
    if wrong:
        raise UserError(f'{folder} has no usable checkpoint: {"; ".join(wrong)}; restore a copy or start afresh')
    if which == 'best' and steps(folder):
        raise UserError(f'{folder} has no checkpoint named as the best; take --which=last')
    raise UserError(f'{folder} has no checkpoint (ckpt_<step>.pt with its .json); train there first or correct it')


def set_aside(folder, ops=DISK):
    """Move a former run's files into <folder>/previous, replacing what was there; nothing happens without any.

    Stopped anywhere it loses nothing: the rest follows at the next call. The oldest checkpoint goes first and the log
    last, so that a run caught half-way can still be resumed, and the older generation goes when all are safe.
    """
    folder = Path(folder)
    incoming, previous = folder / 'previous.new', folder / 'previous'
    files = sorted(path for path in folder.glob('ckpt_*') if NAME.fullmatch(path.name))
    files += [folder / name for name in RUN_FILES if (folder / name).exists()]
    if not files and not incoming.exists():
        return
    incoming.mkdir(exist_ok=True)
    for path in files:
        ops.replace(path, incoming / path.name)
    ops.fsync_dir(incoming)
    ops.fsync_dir(folder)
    if previous.exists():
        ops.remove(previous)
    ops.replace(incoming, previous)
    ops.fsync_dir(folder)


def _path(folder, step):
    return Path(folder) / f'ckpt_{step:08d}.pt'


def _commit(path, data, step, ops):
    """Data, then manifest. A step that is saved again has a manifest that takes either content in between."""
    note = path.with_suffix('.json')
    manifest = {'sha256': hashlib.sha256(data).hexdigest(), 'size': len(data), 'step': step, 'schema': SCHEMA}
    if path.exists() and note.exists():
        with contextlib.suppress(Damaged):
            write_whole(note, json.dumps({**manifest, 'before': _verify(path)}).encode(), ops)
    try:
        write_whole(path, data, ops)
        write_whole(note, json.dumps(manifest).encode(), ops)
    except OSError:
        if not note.exists():           # data that nothing vouches for would only fill the disk
            with contextlib.suppress(OSError):
                ops.remove(path)
        raise


def _prune(folder, step, keep, ops):
    """Remove what save no longer keeps, half-written leftovers too; the manifest goes before its data."""
    spared = (best(folder) or {}).get('step')
    kept = {spared, *[s for s in steps(folder) if s <= step and s != spared][-keep:]}
    for path in sorted(folder.glob('ckpt_*')):
        name = NAME.fullmatch(path.name)
        if name and int(name[1]) not in kept:
            ops.remove(path)
            if int(name[1]) > step:         # one at a time, or a power cut could bring back one between step and newest
                ops.fsync_dir(folder)


def _refuse_non_finite(model):
    for name, value in model.items():
        if torch.is_tensor(value) and value.is_floating_point() and not value.isfinite().all():
            raise ValueError(f'{name} holds values that are not finite; such weights are not saved')


def _candidates(folder, which):
    if which not in ('last', 'best'):
        raise UserError(f"which must be 'last' or 'best', got {which!r}")
    if which == 'best':
        return [_path(folder, best(folder)['step'])] if best(folder) else []
    return [_path(folder, step) for step in reversed(steps(folder))]


def _read_json(path, **kinds):
    """The small JSON object at path that has these keys with exactly these types; raises Damaged."""
    with open(path, 'rb') as file:
        text = file.read(MAX_JSON)
    try:
        value = json.loads(text)
        if all(type(value[key]) is kind for key, kind in kinds.items()):
            return value
    except (ValueError, TypeError, KeyError, RecursionError):
        pass
    raise Damaged(f'{path.name} is damaged')


def _verify(path):
    """SHA-256 of a data file whose manifest takes it; raises Damaged, and UserError for a newer schema."""
    try:
        manifest = _read_json(path.with_suffix('.json'), sha256=str, size=int, step=int, schema=int)
        size, name = path.stat().st_size, NAME.fullmatch(path.name)
        if manifest['schema'] > SCHEMA:
            raise _newer(path, manifest['schema'])
        if name and int(name[1]) != manifest['step']:
            raise Damaged(f'{path.name} has the manifest of step {manifest["step"]}')
        if size != manifest['size'] and 'before' not in manifest:
            raise Damaged(f'{path.name} is damaged: {size:,} bytes where {manifest["size"]:,} were written')
        digest = hashlib.sha256()
        with open(path, 'rb') as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
    except OSError as error:
        raise Damaged(f'{Path(error.filename or path).name} cannot be read: {error.strerror}') from error
    if digest.hexdigest() not in (manifest['sha256'], manifest.get('before')):
        raise Damaged(f'{path.name} is damaged: its SHA-256 is not the one of its manifest')
    return digest.hexdigest()


def _read(path, unverified):
    """The state in a data file; raises Damaged, and UserError for a newer schema."""
    if not unverified:
        _verify(path)
    try:
        state = torchfile.load(path)
    except OSError as error:
        raise Damaged(f'{path.name} cannot be read: {error.strerror}') from error
    except torchfile.Refused as error:
        raise Damaged(f'{path.name} {error}') from error
    schema, name = state.get('schema'), NAME.fullmatch(path.name)
    if type(schema) is int and schema > SCHEMA:
        raise _newer(path, schema)
    if not unverified and (type(schema) is not int or name and state.get('step') != int(name[1])):
        raise Damaged(f'{path.name} holds another step than its name says, or no schema')
    return state


def _newer(path, schema):
    return UserError(f'{path} has checkpoint schema {schema}, this version reads up to {SCHEMA}; update nanokron')
