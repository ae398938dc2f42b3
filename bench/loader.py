"""The time of the loader, alone and during a train step of GPT-2 124M.

measure() is what the bench program calls; nothing here is part of a training run.
"""
import tempfile
import time

import numpy as np
import torch

from configurator import GPTConfig
from data.loader import Loader, Prefetcher, open_dataset
from data.prepare_text import write_dataset

VOCABULARY, TOKENS = 50257, 20_000_000      # of the random data set: 40 MB
GPT2 = dict(vocab_size=50304, n_layer=12, n_head=12, n_embd=768)
QUICK = 500e3                               # tokens per second of a fast machine: one H200, GPT-2 124M, as published


def measure(folder=None, block_size=1024, batch_size=12, seconds=1.0, device='cpu'):
    """Figures of loading (B, T) batches; returns a dict.

    folder: a data set, by default one of 20 million random tokens in a temporary folder; seconds: for each timing;
    device: 'cpu' or 'cuda'. Keys: batch_ms and tokens_per_s of loader.batch() alone, in this thread; step_ms of a 124M
    train step with the same batch and step_how it was found; share = batch_ms / step_ms; quick_step_ms of a machine that
    trains 500,000 tokens per second, and quick_share of that; wait_share, the share of time that a trainer waits for
    prefetched batches, during matrix products that take as long as such a step.
    """
    with tempfile.TemporaryDirectory() as made:
        loader = Loader(open_dataset(folder or make(made), notice=print), 'train', block_size, batch_size)
        batch_s = time_batches(loader, seconds)
        step_s, how = step_seconds(block_size, batch_size, torch.device(device), seconds)
        quick_s = batch_size * block_size / QUICK
        busy_s, wait_s = beside_work(loader, quick_s, seconds, device)
    return {'block_size': block_size, 'batch_size': batch_size, 'batch_ms': 1e3 * batch_s,
            'tokens_per_s': batch_size * block_size / batch_s, 'step_ms': 1e3 * step_s, 'step_how': how,
            'share': batch_s / step_s, 'quick_step_ms': 1e3 * quick_s, 'quick_share': batch_s / quick_s,
            'wait_share': wait_s / (busy_s + wait_s)}


def make(folder):
    """A data set of random GPT-2 tokens in `folder`."""
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, TOKENS, np.uint16)
    described = {'tokenizer': 'gpt2', 'vocab_size': VOCABULARY, 'source': 'random tokens'}
    write_dataset(folder, described, {'train': tokens, 'val': tokens[:100_000]})
    return folder


def time_batches(loader, seconds):
    """Median time of loader.batch() in seconds, measured for `seconds`."""
    loader.batch(0)                         # draws the order of the epoch
    took, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end or len(took) < 3:
        begin = time.perf_counter()
        loader.batch(len(took) + 1)
        took.append(time.perf_counter() - begin)
    return float(np.median(took))


def step_seconds(block_size, batch_size, device, seconds):
    """(time of a train step of GPT-2 124M, s; how it was found).

    On a GPU measured: forward, backward and AdamW in bfloat16. On a CPU, where it takes a minute, estimated as the FLOPs
    of forward and backward at the rate of a large matrix product here: a lower bound.
    """
    from model import GPT
    with torch.device('meta' if device.type == 'cpu' else device):
        model = GPT(GPTConfig(block_size=block_size, **GPT2))
    if device.type == 'cpu':
        rate = matmul_flops(seconds)
        flops = 3 * model.flops_per_token() * block_size * batch_size
        return flops / rate, f'{flops / 1e12:.1f} TFLOP at the {rate / 1e9:.0f} GFLOP/s of a matrix product'
    return time_step(model, block_size, batch_size, seconds), f'measured on {torch.cuda.get_device_name(device)}'


def matmul_flops(seconds, size=1024):
    """FLOP/s of a float32 matrix product with torch's threads, the best of several."""
    a, best, end = torch.ones(size, size), 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end or not best:
        begin = time.perf_counter()
        a @ a
        best = max(best, 2 * size ** 3 / (time.perf_counter() - begin))
    return best


def time_step(model, block_size, batch_size, seconds):
    """Median time of a train step on a GPU, s."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    x = torch.randint(VOCABULARY, (batch_size, block_size), device='cuda')
    took, end = [], time.perf_counter() + seconds + 5
    while time.perf_counter() < end or len(took) < 5:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        with torch.autocast('cuda', torch.bfloat16):
            loss = model(x, x)[1]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        took.append(time.perf_counter() - begin)
    return float(np.median(took))


def beside_work(loader, step_s, seconds, device):
    """(median time of the work of a step of about step_s, median time of waiting for a prefetched batch), s."""
    a, busy, waits, end = torch.ones(256, 256), [], [], time.perf_counter() + seconds
    with Prefetcher(loader, device=device) as ready:
        while time.perf_counter() < end or len(busy) < 5:
            begin = time.perf_counter()
            ready.batch(len(busy))
            got = time.perf_counter()
            waits.append(got - begin)
            while time.perf_counter() - got < step_s:
                a @ a
            busy.append(time.perf_counter() - got)
    return float(np.median(busy)), float(np.median(waits))
