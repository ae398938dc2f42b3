"""Batches of tokens as a pure function of (seed, step, micro-step, rank): no state to save.

An epoch cuts the stream of a split into windows of block_size tokens and takes each of them once, in random order.
Prefetcher makes the next batches on a thread, and changes nothing else. Documents are not handled here: a window may
contain several, and attention that keeps them apart (`documents=` of window and dint) finds their starts in the tokens.
"""
import collections
import concurrent.futures
import threading
import zlib

import numpy as np
import torch

from data.dataset import Dataset, open_dataset
from data.shards import refuse, write_shard

__all__ = ['Dataset', 'Loader', 'Prefetcher', 'open_dataset', 'write_shard']

ORDER, FIXED = 0, 1                         # keys of the streams of random numbers


def random_bits(count, *key):
    """`count` uint64 numbers that depend on the key (integers >= 0) only.

    Philox and SeedSequence guarantee the same bits in every numpy version; numpy's shuffles do not, and are not used.
    """
    return np.random.Philox(np.random.SeedSequence(key)).random_raw(count)


class Loader:
    """Batches of one split.

    dataset: from open_dataset; split: 'train', 'val' or 'test'; block_size: tokens T per row; batch_size: rows B per
    micro-batch; accumulation: micro-batches per step, all ranks together; world_size: ranks; seed: of the order.
    Raises UserError when the split is shorter than block_size + 1, or accumulation is not a multiple of world_size.
    """

    def __init__(self, dataset, split, block_size, batch_size, accumulation=1, world_size=1, seed=1337):
        if split not in dataset.splits:
            refuse(dataset.folder, f'a split {split!r}', ', '.join(dataset.splits))
        self.tokens = dataset.splits[split]
        if len(self.tokens) <= block_size:
            refuse(self.tokens.path, f'at least block_size + 1 = {block_size + 1:,} tokens in split {split!r}',
                   f'{len(self.tokens):,}', 'lower block_size')
        if accumulation % world_size:
            refuse(dataset.folder, f'gradient accumulation steps that divide by the {world_size} ranks', accumulation)
        self.block_size, self.batch_size = block_size, batch_size
        self.accumulation, self.world_size = accumulation, world_size
        self.seed = seed % 2**64
        self.windows = max(1, (len(self.tokens) - block_size) // block_size)            # per epoch, in every epoch
        self.orders, self.lock = {}, threading.Lock()

    def batch(self, step, micro_step=0, rank=0):
        """(x, y) of one micro-batch, each (B, T) int64 with y one token ahead of x: a pure function of its arguments.

        Rows are numbered over the whole job, g = ((step * accumulation) + micro_step * world_size + rank) * B + row,
        so that the order of all rows does not depend on the number of ranks. About 20 microseconds per row.
        """
        if step < 0 or not 0 <= rank < self.world_size or not 0 <= micro_step < self.accumulation // self.world_size:
            raise ValueError(f'no such batch: step {step}, micro-step {micro_step} of '
                             f'{self.accumulation // self.world_size}, rank {rank} of {self.world_size}')
        first = (step * self.accumulation + micro_step * self.world_size + rank) * self.batch_size
        return self.rows([self.start(g) for g in range(first, first + self.batch_size)])

    def start(self, g):
        """The start in the stream of row number g of the whole training run."""
        epoch, index = divmod(g, self.windows)
        with self.lock:                                             # a Prefetcher asks from another thread
            if epoch not in self.orders:
                if len(self.orders) > 1:                            # a batch may straddle two epochs
                    del self.orders[min(self.orders)]
                self.orders[epoch] = self.order(epoch)
            phase, order = self.orders[epoch]
        return phase + int(order[index]) * self.block_size

    def order(self, epoch):
        """(phase, permutation of the windows) of one epoch, drawn from (seed, epoch).

        The phase shifts the cuts by less than a window, so that the same tokens do not always share a window.
        """
        bits = random_bits(self.windows + 1, ORDER, self.seed, epoch)
        slack = len(self.tokens) - 1 - self.windows * self.block_size
        return int(bits[0]) % min(slack + 1, self.block_size), np.argsort(bits[1:], kind='stable')

    def sequential(self, batch_size=None, rank=0, world_size=1):
        """Yield (x, y) over the whole split in order: windows side by side, each token but the first predicted once.

        The windows are dealt to the ranks in turn; a last, shorter one is a batch of its own. batch_size: rows, by
        default the loader's.
        """
        size, last = self.block_size, len(self.tokens) - 1                              # last: number of targets
        mine = range(rank, last // size, world_size)
        rows = batch_size or self.batch_size
        for k in range(0, len(mine), rows):
            yield self.rows([window * size for window in mine[k:k + rows]])
        if last % size and last // size % world_size == rank:
            yield self.rows([last - last % size], last % size)

    def fixed(self, count, tag, rank=0, world_size=1):
        """Yield this rank's share of `count` evaluation batches (x, y), drawn with replacement.

        The same at every call and for every seed of training, so that losses of different runs compare. tag: a string
        that names the draw.
        """
        starts = len(self.tokens) - self.block_size
        for number in range(rank, count, world_size):
            bits = random_bits(self.batch_size, FIXED, zlib.crc32(tag.encode()), number)
            yield self.rows([int(b) % starts for b in bits])

    def rows(self, starts, length=None):
        """(x, y), each (len(starts), length), of the windows that begin at `starts`."""
        length = length or self.block_size
        windows = torch.from_numpy(np.stack([self.tokens.read(s, s + length + 1) for s in starts]))     # (B, T + 1)
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


class Prefetcher:
    """The micro-batches of one rank, made before they are asked for by a thread: batch() gives what loader.batch() does.

    loader: a Loader; rank: whose batches; prefetch: micro-batches made ahead, 0 = none and no thread; device: their
    destination: for a GPU they are made in pinned memory, from which a copy with non_blocking=True overlaps other work;
    last_step: the first step that is not needed. Use it in a `with`, or close() it: this ends its thread. An exception in
    the thread is raised by the batch() that needs its result.
    """

    def __init__(self, loader, rank=0, prefetch=2, device='cpu', last_step=None):
        self.loader, self.rank, self.prefetch, self.last_step = loader, rank, prefetch, last_step
        self.device, self.per_step = torch.device(device), loader.accumulation // loader.world_size
        self.waiting, self.thread = collections.deque(), None       # ((step, micro_step), future) in order
        if prefetch > 0:
            here = [torch.cuda.set_device, (self.gpu(),)] if self.device.type == 'cuda' else []
            self.thread = concurrent.futures.ThreadPoolExecutor(1, 'prefetch', *here)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def close(self):
        """End the thread; waits for the batch that it is making. A second call does nothing."""
        if self.thread:
            self.drop()
            self.thread.shutdown(cancel_futures=True)
            self.thread = None

    def batch(self, step, micro_step=0):
        """(x, y) of a micro-batch, bit for bit those of loader.batch(step, micro_step, rank).

        Any order is valid; in training order the batches are ready. Raises what loader.batch raises.
        """
        if not self.thread:
            return self.make(step, micro_step)
        if not self.waiting or self.waiting[0][0] != (step, micro_step):
            self.drop()                                             # the first call, or a jump
            self.submit(step, micro_step)
        batch = self.waiting.popleft()[1].result()
        while len(self.waiting) < self.prefetch:
            ahead = self.after(*(self.waiting[-1][0] if self.waiting else (step, micro_step)))
            if self.last_step is not None and ahead[0] >= self.last_step:
                break
            self.submit(*ahead)
        return batch

    def after(self, step, micro_step):
        """(step, micro_step) of the batch that follows."""
        return divmod(step * self.per_step + micro_step + 1, self.per_step)

    def submit(self, step, micro_step):
        self.waiting.append(((step, micro_step), self.thread.submit(self.make, step, micro_step)))

    def make(self, step, micro_step):
        x, y = self.loader.batch(step, micro_step, self.rank)
        return (x.pin_memory(), y.pin_memory()) if self.device.type == 'cuda' else (x, y)

    def gpu(self):
        """Number of the GPU; the thread must be told, else it pins through the first one, on every rank."""
        return torch.cuda.current_device() if self.device.index is None else self.device.index

    def drop(self):
        """Drop the batches made ahead, and their exceptions, as they are not needed."""
        for _, future in self.waiting:
            future.cancel()
        self.waiting.clear()
