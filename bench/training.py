"""Shared by the parts that train: texts as batches, a train step as a call, its memory, the peak of matrix products."""
import statistics
import time

import torch

from bench.measure import peak_memory
from kron.timing import clock, seconds

KINDS = {'char': lambda text: {'tokenizer': 'char', 'chars': sorted(set(text))},
         'gpt2': lambda text: {'tokenizer': 'gpt2', 'vocab_size': 50257}}


def shakespeare(kind):
    """(tokens (N,) int64, vocabulary size) of the text in the repository; kind: 'char' or 'gpt2'."""
    from data import prepare_text, tokenizer
    text = prepare_text.shakespeare()
    chosen = tokenizer.load(KINDS[kind](text))
    return torch.tensor(chosen.encode_ordinary(text)), chosen.vocab_size


def batch(tokens, rows, length, number, device):
    """(x, y), each (rows, length): windows drawn for batch `number`, the same at every call."""
    rng = torch.Generator().manual_seed(number)
    starts = torch.randint(len(tokens) - length, (rows,), generator=rng)
    windows = tokens[starts[:, None] + torch.arange(length + 1)]                        # (rows, length + 1)
    return windows[:, :-1].contiguous().to(device), windows[:, 1:].contiguous().to(device)


def train_step(net, optimizer, x, y, autocast, clip=1.0):
    """One step on (x, y), gradients clipped to norm `clip` (0: not); returns the loss before it, a tensor."""
    with autocast:
        _, loss = net(x, y)
    loss.backward()
    if clip:
        parameters = [p for group in optimizer.param_groups for p in group['params']]
        torch.nn.utils.clip_grad_norm_(parameters, clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()


def state_bytes(model, optimizer):
    """Bytes of parameters, each once, and of the optimizer's state."""
    held = [*model.parameters(), *(t for entries in optimizer.state.values() for t in entries.values()
                                   if torch.is_tensor(t))]
    return sum({id(t): t.numel() * t.element_size() for t in held}.values())


def step_memory(step, model, optimizer, device):
    """Peak bytes of a step: weights, optimizer state, gradients, and tensors saved for backward.

    On a CUDA GPU by the allocator, elsewhere by bench.measure.LiveBytes; call it after a first step.
    """
    return state_bytes(model, optimizer) + peak_memory(step, device)


def by_turns(calls, rounds, round_s, device):
    """Time calls in interleaved rounds: [[ms of each call] of each round], so that other load affects all.

    calls: functions that ran before; round_s: approximate time of a call's turn, in repeats.
    """
    repeats = [max(1, min(100, round(round_s / max(seconds(call, 1, device), 1e-9)))) for call in calls]
    return [[1e3 * seconds(call, n, device) / n for call, n in zip(calls, repeats)] for _ in range(rounds)]


def spread(values):
    """Median, least and largest."""
    return {'median': statistics.median(values), 'min': min(values), 'max': max(values)}


def matmul_peak(device, dtype, at_least_s=0.3):
    """FLOP/s of the best of several large matrix products in `dtype`: 100% of the measured peak."""
    size = 8192 if device.type == 'cuda' else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best, spent, now = float('inf'), 0.0, clock(device)
    seconds(lambda: a @ b, 2, device)
    begin = now()
    while spent < at_least_s or best == float('inf'):
        best = min(best, max(seconds(lambda: a @ b, 3, device) / 3, 1e-9))
        spent = now() - begin
    return 2 * size ** 3 / best


def stopwatch(device):
    """-> a function that waits for the device and returns the time, s."""
    wait = getattr(torch, device.type).synchronize

    def now():
        wait()
        return time.perf_counter()
    return now
