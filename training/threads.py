"""How many CPU threads a run takes: measured at its start where nothing says it, and kept on resume."""
import copy
import os
import time

import torch

from growth import changes
from training import parallel

LARGE = 3e10                            # FLOPs of a micro-step, about half a second: threads help, and measuring takes long
GAIN = 0.95                             # more threads are taken where a pass takes less than this share of the time
REPEATS = 3


def choose(config, model, job, fresh):
    """Set the number of CPU threads: config.threads, else, for a fresh run of one process on a CPU, the fastest.

    What was measured goes into config.threads, which checkpoints keep: a resumed run computes the same bits. Nothing is
    measured where OMP_NUM_THREADS is set (torchrun and ablate.py set it), with deterministic=True, or where a micro-step has
    LARGE FLOPs. config: the run's, changed in place; model: the GPT before it is wrapped; job: parallel.Job; fresh: whether
    the run does not resume. Costs four passes per number tried, on a copy of the model.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    elif fresh and measurable(config, model, job):
        config.threads, times = climb(passes(config, model, job), counts(torch.get_num_threads()))
        torch.set_num_threads(config.threads)
        seen = ', '.join(f'{seconds * 1e3:.0f} ms with {count}' for count, seconds in times.items())
        job.say(f'CPU threads: {config.threads}, as a forward and backward pass takes {seen}; --threads=N sets it')


def measurable(config, model, job):
    """Whether there is a choice of threads, and measuring it takes less than seconds."""
    free = job.device.type == 'cpu' and job.world_size == 1 and 'OMP_NUM_THREADS' not in os.environ
    batch_size, _ = parallel.split_batch(config, 1)
    flops = changes.training_flops(model) * batch_size * config.block_size
    return free and torch.get_num_threads() > 1 and not config.deterministic and not config.eval_only and flops < LARGE


def counts(most):
    """1, 2, 4 and so on, up to most."""
    return [*(2 ** i for i in range(most.bit_length()) if 2 ** i < most), most]


def passes(config, model, job):
    """A function that times one forward and backward pass of a micro-step, on a copy of the model."""
    model, (batch_size, _) = copy.deepcopy(model).train(), parallel.split_batch(config, 1)
    x = torch.arange(batch_size * config.block_size).view(batch_size, -1) % config.vocab_size           # (B, T)

    def once(count):
        torch.set_num_threads(count)
        start = time.perf_counter()
        with job.autocast():                            # its dropout may draw: train.py seeds every step anew
            _, loss = model(x, x)
        loss.backward()
        return time.perf_counter() - start
    return once


def climb(once, among):
    """(the best count, {count: seconds of its fastest pass}): more threads are tried as long as they gain."""
    best, times = among[0], {}
    for count in among:
        once(count)                                     # the first pass makes threads and their memory
        times[count] = min(once(count) for _ in range(REPEATS))
        if count != best and times[count] > GAIN * times[best]:
            break
        best = count
    return best, times
