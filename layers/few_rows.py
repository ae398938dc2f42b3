"""Products of a few rows with a matrix, as generation has them: on a CPU, by all threads."""

import torch
from torch.nn import functional as F

MOST = 4                                # rows; more of them are shared among threads by BLAS itself
BLOCKS = 32
LEAST = 1 << 17                         # entries of W below which threads cost more than they gain


def linear(x, weight, bias=None):
    """y = x W^T + b for x (..., in), W (out, in), b (out,) or None: (..., out).

    BLAS gives a few rows of float32 to one thread, which then reads all of W: 17 of 32 GB/s with two threads of an AMD EPYC
    (records/LOG.md). So W is taken in blocks of its rows. The same products: equal bits where the blocks are whole.
    """
    if not in_blocks(x, weight):
        return F.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])                                                       # (R, in)
    y = blocks(rows, weight)
    return (y if bias is None else y + bias).view(*x.shape[:-1], len(weight))


def in_blocks(x, weight):
    """Whether the product is one that BLAS gives to a single thread though there are more."""
    return (not torch.compiler.is_compiling() and x.numel() <= MOST * x.shape[-1] and x.device.type == 'cpu'
            and x.dtype == weight.dtype == torch.float32 and weight.numel() >= LEAST and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled('cpu') and torch.get_num_threads() > 1)


def blocks(rows, weight):
    """rows (R, in) times W^T: (R, out), in a batch of BLOCKS parts of W's rows, and what is left of them by itself."""
    out, width = weight.shape
    whole = out - out % BLOCKS
    parts = weight[:whole].view(BLOCKS, -1, width).mT                                       # (blocks, in, out / blocks)
    y = torch.bmm(rows.expand(BLOCKS, *rows.shape), parts).transpose(0, 1).reshape(len(rows), whole)
    return y if whole == out else torch.cat([y, F.linear(rows, weight[whole:])], 1)
