"""Time and memory: two calls timed in interleaved rounds, the peak memory of a call, the size of a cache."""
import contextlib
import gc
import statistics
import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kron.timing import seconds

MIN_ROUNDS = 5
ROUNDS = 10                             # about that many fit into min_time


@contextlib.contextmanager
def no_collection():
    """Without Python's garbage collection, which would hit one of two calls."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def side_by_side(baseline, call, min_time, device):
    """Time two calls in interleaved rounds, so that other load on the machine affects both.

    A round is one timing of each, of as many calls as take about min_time / ROUNDS s; rounds continue until both
    had min_time s each, and at least MIN_ROUNDS. Returns the median ms per call of each, and median, least and largest
    of the rounds' ratios call / baseline: above 1 is slower than the baseline.
    """
    pair = (baseline, call)
    for one in pair:                    # kernels are chosen, compiled and loaded at the first call
        seconds(one, 2, device)
    times = [max(1, round(min_time / ROUNDS / max(seconds(one, 1, device), 1e-9))) for one in pair]
    rounds, spent = [], 0.0
    with no_collection():
        while len(rounds) < MIN_ROUNDS or spent < 2 * min_time:
            took = [seconds(one, n, device) for one, n in zip(pair, times)]
            rounds.append([t / n for t, n in zip(took, times)])
            spent += sum(took)
    ratios = [second / first for first, second in rounds]
    base_ms, ms = (1e3 * statistics.median(column) for column in zip(*rounds))
    return {'ms': ms, 'baseline_ms': base_ms, 'ratio': statistics.median(ratios), 'ratio_min': min(ratios),
            'ratio_max': max(ratios), 'rounds': len(rounds)}


class LiveBytes(TorchDispatchMode):
    """Bytes of tensors that are made while the mode is on: `live` now, `peak` at most.

    Every operation's results are recorded below autograd, so that tensors saved for backward and the gradients count too,
    each storage once however many views it has, from its creation until it is freed (by a weak reference). Not recorded:
    tensors from before, storage that is resized, and scratch space inside a kernel. Deterministic, as nothing is timed.
    """

    def __init__(self):
        super().__init__()
        self.live, self.peak, self.known = 0, 0, set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        given = {id(storage) for storage in storages((args, kwargs))}
        for storage in storages(result):
            if id(storage) not in given | self.known:
                self.known.add(id(storage))
                self.live += storage.nbytes()
                weakref.finalize(storage, self.forget, id(storage), storage.nbytes())
        self.peak = max(self.peak, self.live)
        return result

    def forget(self, name, size):
        self.known.discard(name)
        self.live -= size


def storages(tree):
    """The storages of all tensors in nested containers."""
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def peak_memory(call, device):
    """Peak bytes of one call beyond those before it: by the allocator on a CUDA GPU, else LiveBytes."""
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        with no_collection():
            call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with LiveBytes() as count, no_collection():
        call()
    return count.peak


def filled(cache):
    """(floating-point elements, bytes of all tensors) of one layer's cache, without unused room.

    heads.extend_cache and the window's ring keep tensors (B, H, room, ...) of which cache['length'] positions, at most
    `room`, are written; other tensors are full.
    """
    numbers = size = 0
    for tensor in (value for value in cache.values() if torch.is_tensor(value)):
        kept = tensor.numel()
        if 'length' in cache and tensor.ndim > 2:
            kept = kept // tensor.size(2) * min(cache['length'], tensor.size(2))
        numbers += kept * tensor.is_floating_point()
        size += kept * tensor.element_size()
    return numbers, size
