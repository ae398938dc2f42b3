"""Part parent: our train step against nanoGPT's, the same model and batch, interleaved in one process.

    git clone https://github.com/karpathy/nanoGPT FOLDER
    python bench.py parent --baseline=FOLDER --batch_size=15 --block_size=1024

The parent is its model.py, its AdamW (configure_optimizers) and the loop of its train.py: micro-steps, scaler, clipping;
both are compiled or both not. Its batch is on the device already, ours comes from the loader. x is the median over rounds
of its time over ours.
"""
import os
import sys
import tempfile
from dataclasses import dataclass

from bench import Output
from bench.step import chosen, random_data
from configurator import Config, key
from variants import UserError


@dataclass
class Settings(Output, Config):
    """The two sides; every setting of train.py besides, for ours."""
    config: str = key('config/train_gpt2.py', 'config file of ours; sizes, batch and learning rate are those of both')
    baseline: str = key('', 'folder of a clone of nanoGPT')
    micro_steps: int = key(8, 'before each optimizer step', low=1)
    rounds: int = key(7, 'rounds in which both are timed', low=1)
    vocabulary: int = key(50257, 'of the random tokens', low=2)
    threads: int = key(1, 'torch threads on a CPU', low=1)


def check(settings, part):
    """Refuse bad settings before torch is imported; raises UserError."""
    if not settings.baseline:
        raise UserError('name the clone of nanoGPT: --baseline=FOLDER', 'baseline')
    if not os.path.isfile(os.path.join(settings.baseline, 'model.py')):
        raise UserError(f'{settings.baseline!r} is not a clone of nanoGPT: it lacks model.py', 'baseline')
    chosen(settings)


def run(settings, part):
    """Time both in interleaved rounds."""
    import torch

    from bench.steps import Steps
    from data.loader import open_dataset
    from training import parallel
    torch.set_num_threads(settings.threads)
    config = chosen(settings)
    job = parallel.start(config)
    with tempfile.TemporaryDirectory() as made:
        random_data(made, settings.vocabulary, config.block_size)
        ours = Steps(config, job, open_dataset(made, notice=lambda text: None), 0.0)
        return measure(settings, ours, parent_step(settings, ours), job)


def parent_step(settings, ours):
    """-> one optimizer step of nanoGPT's model after some micro-steps, as a call."""
    import torch

    from training import precision
    config, job, theirs = ours.config, ours.job, load(settings.baseline)
    sizes = {name: getattr(config, name) for name in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd', 'dropout',
                                                      'bias')}
    model = theirs.GPT(theirs.GPTConfig(**sizes)).to(job.device).train()
    optimizer = model.configure_optimizers(config.weight_decay, config.learning_rate, (config.beta1, config.beta2),
                                           job.device.type)
    net, scaler = torch.compile(model) if ours.compiled else model, precision.scaler(config, job)
    x, y = (t.to(job.device) for t in ours.loader.batch(0))

    def step():
        for _ in range(settings.micro_steps):
            with job.autocast():
                loss = net(x, y)[1] / settings.micro_steps
            scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or float('inf'))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
    return step


def load(folder):
    """nanoGPT's model.py as a module."""
    import importlib.util
    spec = importlib.util.spec_from_file_location('nanogpt_model', os.path.join(folder, 'model.py'))
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def measure(settings, ours, theirs, job):
    """The result."""
    from bench.modules import machine
    from bench.training import by_turns, spread
    from data.loader import Prefetcher
    ahead = 2 * (job.device.type == 'cuda')
    with Prefetcher(ours.loader, 0, ahead, job.device) as batches:
        calls = [lambda: ours.whole(batches, settings.micro_steps), theirs]
        for call in (*calls, *calls):                   # compiles, and creates the optimizers' states
            call()
        rounds = by_turns(calls, settings.rounds, 0, job.device)
    ms, parent_ms = (spread(column)['median'] for column in zip(*rounds))
    config = ours.config
    tokens = config.batch_size * config.block_size * settings.micro_steps
    return {'part': 'parent', 'config': settings.config, 'dtype': str(job.dtype).removeprefix('torch.'),
            'compiled': ours.compiled, 'parameters': ours.model.num_params(), 'tokens': tokens, 'ms': ms,
            'parent_ms': parent_ms, 'tokens_per_s': 1e3 * tokens / ms, 'parent_tokens_per_s': 1e3 * tokens / parent_ms,
            'x': spread([theirs_ms / ours_ms for ours_ms, theirs_ms in rounds]), 'machine': machine(job.device)}


def text(result):
    """The result as text."""
    machine, x, how = result['machine'], result['x'], result['dtype'] + ', compiled' * result['compiled']
    return (f'{result["config"]}: {result["parameters"]:,} parameters, {how}, {machine["gpu"] or machine["device"]}, '
            f'torch {machine["torch"]}\n{result["tokens"]:,} tokens: '
            f'{result["ms"]:.4g} ms, {result["tokens_per_s"]:,.0f} tokens/s; nanoGPT {result["parent_ms"]:.4g} ms, '
            f'{result["parent_tokens_per_s"]:,.0f} tokens/s; x {x["median"]:.2f} ({x["min"]:.2f} to {x["max"]:.2f})')
