"""Sharded checkpoints: a folder into which every rank writes its own shards, by torch.distributed.checkpoint (DCP).

    state.pt                            what is not sharded: settings, progress, step counts, which tensor belongs where
    shard-00001-model-....safetensors   the parts of one rank, each with its place in the whole tensor

DCP's default files cannot be used: its index, .metadata, is a pickle that FileSystemReader passes to pickle.load, which
runs code from it (torch 2.11 to 2.13). DCP's safetensors files have no index but JSON in their headers. Files read here
were hashed before (manifest.py), and are checked for gaps and sizes all the same.
"""
import math
import warnings

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from checkpoints import torchfile
from checkpoints.durable import write_whole
from checkpoints.manifest import digest, folder_digest

WHOLE = 'state.pt'


def split(state):
    """(state without its sharded tensors, {key: sharded tensor}); the former lists their places under 'sharded'.

    A tensor that occurs twice (tied weights) is kept once.
    """
    tensors, keys, places = {}, {}, []

    def rest(value, path):
        if hasattr(value, 'full_tensor'):
            key = keys.setdefault(id(value), '/'.join(path))
            tensors[key] = value.detach()
            places.append([list(path), key, list(value.shape)])
            return None
        if isinstance(value, dict):
            kept = ((k, v, rest(v, (*path, str(k)))) for k, v in value.items())
            return {k: left for k, v, left in kept if not hasattr(v, 'full_tensor')}
        return value
    return {**rest(state, ()), 'sharded': places}, tensors


def together(group, action):
    """action() on every rank; an OSError or ValueError on any rank is raised on all of them, the first rank's first."""
    result = error = None
    try:
        result = action()
    except dcp.CheckpointException as failed:
        error = next(iter(failed.failures.values()))[0]
    except (OSError, ValueError) as failed:
        error = failed
    told = [None] * dist.get_world_size(group)
    words = error and (isinstance(error, ValueError), getattr(error, 'errno', None), torchfile.one_line(error))
    dist.all_gather_object(told, words, group)
    for rank, words in enumerate(told):
        if words:
            raise ValueError(words[2]) if words[0] else OSError(words[1], f'{words[2]} (rank {rank})')
    return result


def write(folder, state, group, ops):
    """Write a state's parts into a new folder, synced; returns folder_digest of it. All ranks of the group call.

    state: as checkpoint.save takes it, with DTensors where tensors are sharded, the same keys on every rank. A rank
    writes and reads back (for the hash) only its own parts. Raises OSError and ValueError, on all ranks alike.
    """
    main, number = dist.get_rank(group) == 0, dist.get_rank(group) + 1
    plain, tensors = split(state)

    def begin():
        if main:
            if folder.exists():
                ops.remove(folder)
            folder.mkdir(parents=True)
            write_whole(folder / WHOLE, torchfile.dumps(plain), ops)

    def store():
        dcp.save(tensors, storage_writer=dcp.HuggingFaceStorageWriter(folder, save_distributed=True), process_group=group)

    def entries():
        mine = [*folder.glob(f'shard-{number:05d}-*'), *([folder / WHOLE] if main else [])]
        if main:
            ops.fsync_dir(folder)
        return [(file.name, *digest(file)) for file in mine]
    together(group, begin)
    together(group, store)
    everyone = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, together(group, entries), group)
    return folder_digest([entry for rank in everyone for entry in rank])


def read(folder):
    """The state of a folder with full tensors on the CPU; no ranks are needed. Raises torchfile.Refused and OSError.

    No code in it is run: JSON, safetensors, and torch.save's format as torchfile reads it. It never allocates more than
    the folder's bytes at 8 bytes per element.
    """
    state = torchfile.load(folder / WHOLE)
    places = state.pop('sharded', None)
    if not isinstance(places, list):
        raise torchfile.Refused(f'holds no list of sharded tensors in {WHOLE}')
    try:
        tensors = load_tensors(folder)
    except (MemoryError, OSError, torchfile.Refused):
        raise
    except (Exception, dcp.CheckpointException) as error:       # safetensors and DCP raise several kinds
        raise torchfile.Refused(f'cannot be read: {torchfile.one_line(error)}') from error
    for place in places:
        put(state, place, tensors)
    return state


def load_tensors(folder):
    """{key: whole tensor} of all parts in a folder."""
    reader, tensors = dcp.HuggingFaceStorageReader(folder), {}
    for key, noted in reader.read_metadata().state_dict_metadata.items():
        if math.prod(noted.size) != sum(math.prod(chunk.sizes) for chunk in noted.chunks):
            raise torchfile.Refused(f'lacks a part of {key}')
        tensors[key] = torch.zeros(noted.size, dtype=noted.properties.dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', message='torch.distributed is disabled')          # it sets no_dist and says so
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def put(state, place, tensors):
    """Put the tensor of [path, key, shape] into the nested dicts of a state."""
    try:
        (*path, last), key, shape = place
        if list(tensors[key].shape) != shape:           # the parts at its end are missing
            raise KeyError
        for name in path:
            state = state.setdefault(name, {})
        state[last] = tensors[key]
    except (ValueError, TypeError, KeyError, AttributeError, IndexError):
        raise torchfile.Refused(f'lacks the tensor of {str(place)[:100]}') from None
