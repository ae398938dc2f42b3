"""Batches of tokens as a pure function of (seed, step, micro-step, rank): nothing to save, nothing that moves on.

An epoch cuts the stream of a split into windows of block_size tokens and takes each of them once, in a drawn order.
"""
import zlib

import numpy as np
import torch

from data.dataset import Dataset, open_dataset
from data.shards import refuse, write_shard

__all__ = ['Dataset', 'Loader', 'open_dataset', 'write_shard']

ORDER, FIXED = 0, 1                         # which stream of random numbers


def random_bits(count, *key):
    """`count` uint64 numbers that depend on the key (integers >= 0) only.

    Philox and SeedSequence promise the same bits in every numpy version; numpy's shuffles do not, and are not used.
    """
    return np.random.Philox(np.random.SeedSequence(key)).random_raw(count)


class Loader:
    """Batches of one split.

    dataset: from open_dataset; split: 'train', 'val' or 'test'; block_size: tokens T of a row; batch_size: rows B of
    a micro-batch; accumulation: micro-batches of a step, all ranks together; world_size: ranks; seed: of the order.
    Raises UserError when the split is shorter than block_size + 1, or accumulation is no multiple of world_size.
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
        self.orders = {}

    def batch(self, step, micro_step=0, rank=0):
        """(x, y) of one micro-batch, each (B, T) int64 with y one token ahead of x: a pure function of its arguments.

        Rows are numbered through the whole job, g = ((step * accumulation) + micro_step * world_size + rank) * B + row,
        so that the order of all rows does not depend on the number of ranks. About 40 microseconds a row.
        """
        if step < 0 or not 0 <= rank < self.world_size or not 0 <= micro_step < self.accumulation // self.world_size:
            raise ValueError(f'no such batch: step {step}, micro-step {micro_step} of '
                             f'{self.accumulation // self.world_size}, rank {rank} of {self.world_size}')
        first = (step * self.accumulation + micro_step * self.world_size + rank) * self.batch_size
        return self.rows([self.start(g) for g in range(first, first + self.batch_size)])

    def start(self, g):
        """Where row number g of the whole training run begins in the stream."""
        epoch, index = divmod(g, self.windows)
        if epoch not in self.orders:
            if len(self.orders) > 1:                                # a batch may straddle two epochs
                del self.orders[min(self.orders)]
            self.orders[epoch] = self.order(epoch)
        phase, order = self.orders[epoch]
        return phase + int(order[index]) * self.block_size

    def order(self, epoch):
        """(phase, permutation of the windows) of one epoch, drawn from (seed, epoch).

        The phase moves the cuts by less than a window, so that the same tokens do not always share one.
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
