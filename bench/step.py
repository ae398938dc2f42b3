"""Part step: a config's train step: time by part, tokens per second, MFU and memory.

    python bench.py step --config=config/train_gpt2.py --batch_size=16

Every setting of train.py may be given and overrides the config's. One process; a step of `gradient_accumulation_steps`
micro-steps is measured as one micro-step and one optimizer step, and combined: accumulation * micro + optimizer.
Where the config's data set is missing, random tokens are used; the result says which. The parts are timed with a wait
for the device after each, `ms` without.
"""
import os
from dataclasses import dataclass

import configurator
from bench import Output, tables
from configurator import Config, key
from variants import UserError


@dataclass
class Settings(Output, Config):
    """What is trained, and how long to measure; every setting of train.py besides."""
    config: str = key('', 'config file of what is trained')
    rounds: int = key(7, 'rounds in which everything is timed', low=1)
    progress: float = key(0.0, 'progress of the run, 0 to 1, for windows on a schedule', low=0)
    random_tokens: bool = key(False, 'random tokens even where the data set exists')
    vocabulary: int = key(50257, 'of the random tokens', low=2)
    threads: int = key(1, 'torch threads on a CPU', low=1)


OWN = ('config', 'rounds', 'progress', 'random_tokens', 'vocabulary', 'threads', 'json', 'debug')


def check(settings, part):
    """Refuse bad settings before torch is imported; raises UserError."""
    if not settings.config:
        raise UserError('name what is trained: --config=config/X.py', 'config')
    if settings.init_from != 'scratch':
        raise UserError(f"init_from must be 'scratch' here, got {settings.init_from!r}", 'init_from')
    if settings.progress > 1:
        raise UserError(f'progress must be at most 1, got {settings.progress}', 'progress')
    chosen(settings)


def chosen(settings):
    """The Config of --config, with the given settings in place of the file's."""
    config = configurator.load([settings.config])
    for name, where in settings.sources.items():
        if name not in OWN:
            setattr(config, name, getattr(settings, name))
            config.sources[name] = where
    for name, sentence in configurator.check(config):
        raise UserError(f'{configurator.place(config, name)}{sentence}')
    return config


def random_data(folder, vocab_size, block_size):
    """A data set of random tokens in `folder`, enough for some batches."""
    import numpy as np

    from data.prepare_text import write_dataset
    size = max(100_000, 40 * block_size)
    tokens = np.random.default_rng(0).integers(0, vocab_size, size, np.uint16)
    described = {'tokenizer': 'gpt2', 'vocab_size': vocab_size}
    if vocab_size < 257:                                # fewer than GPT-2's tokenizer supports
        described = {'tokenizer': 'char', 'vocab_size': vocab_size, 'chars': [chr(0x100 + i) for i in range(vocab_size)]}
    write_dataset(folder, described, {'train': tokens, 'val': tokens[:size // 4]})


def run(settings, part):
    """Build what train.py would train, and measure it."""
    import tempfile

    import torch

    from data.loader import open_dataset
    from training import parallel
    config = chosen(settings)
    torch.set_num_threads(settings.threads)
    job = parallel.start(config)
    if job.world_size > 1:
        raise UserError('step measures one process; python bench.py devices measures several')
    with tempfile.TemporaryDirectory() as made:
        folder = os.path.join(config.data_dir, config.dataset)
        real = not settings.random_tokens and os.path.isfile(os.path.join(folder, 'train.bin'))
        if not real:
            random_data(made, settings.vocabulary, config.block_size)
        dataset = open_dataset(folder if real else made, notice=lambda text: None)
        return measure(settings, config, job, dataset, folder if real else 'random tokens')


def measure(settings, config, job, dataset, source):
    """The result, from an open data set."""
    from bench.modules import machine
    from bench.processes import keep
    from bench.steps import Steps
    from bench.training import matmul_peak
    from reporting import hardware
    steps = Steps(config, job, dataset, settings.progress)
    times, flops = steps.measure(settings.rounds), 3 * steps.model.flops_per_token()
    rate = steps.tokens / times['ms'] * 1e3
    timed = {'part': 'step', 'config': settings.config, 'data': source, 'compiled': steps.compiled,
             'dtype': str(job.dtype).removeprefix('torch.'), 'parameters': steps.model.num_params(),
             'tokens': steps.tokens, 'micro_steps': steps.accumulation, 'batch_size': config.batch_size,
             'block_size': config.block_size, **times, 'tokens_per_s': rate, 'flops_per_token': flops}
    keep(timed, settings.json)                          # what follows may run out of memory
    memory = steps.memory()
    peak, sheet = matmul_peak(job.device, job.dtype), hardware.data_sheet_flops(job.device, job.dtype)
    return {**timed, 'measured_peak': peak, 'mfu_measured': flops * rate / peak,
            'sheet_peak': sheet, 'mfu_sheet': sheet and flops * rate / sheet, 'peak_memory': memory,
            'forward_shares': steps.forward_shares(settings.rounds), 'machine': machine(job.device)}


def text(result):
    """The result as text."""
    machine, tokens = result['machine'], result['tokens']
    where = machine['gpu'] or f'{machine["device"]} ({machine["threads"]} threads)'
    sheet = '' if result['mfu_sheet'] is None else f', {result["mfu_sheet"]:.1%} of the data sheet'
    parts = [['part', 'ms', 'share'], *([name, f'{result["parts"][name]:.4g}', f'{share:.1%}']
                                        for name, share in result['shares'].items())]
    forward = [['of the forward pass', 'share'], *([name, f'{share:.1%}'] for name, share in
                                                   result['forward_shares'].items())]
    memory = '' if result['peak_memory'] is None else f', peak memory {result["peak_memory"] / 1e9:.3g} GB'
    return '\n\n'.join([
        f'{result["config"]} on {result["data"]}: {result["parameters"]:,} parameters, {result["dtype"]}'
        f'{", compiled" * result["compiled"]}, {where}, torch {machine["torch"]}',
        f'{tokens:,} tokens per step of {result["micro_steps"]} x {result["batch_size"]} x {result["block_size"]}: '
        f'{result["ms"]:.4g} ms, {result["tokens_per_s"]:,.0f} tokens/s{memory}\nMFU {result["mfu_measured"]:.1%} of a '
        f'measured matrix product ({result["measured_peak"] / 1e12:.3g} TFLOP/s){sheet}',
        tables.aligned(parts), tables.aligned(forward)])
