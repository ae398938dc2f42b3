"""Part loader: the time of a batch, alone and as a share of a train step of GPT-2 124M."""
import os
from dataclasses import dataclass

from bench import Output
from configurator import key
from variants import UserError


@dataclass
class Settings(Output):
    """Which data, which batches, and how long."""
    data: str = key('', 'folder of a data set; by default one of 20 million random tokens')
    block_size: int = key(1024, 'tokens per sequence', low=1)
    batch_size: int = key(12, 'sequences per batch', low=1)
    seconds: float = key(1.0, 'of each timing', low=0)
    threads: int = key(1, 'torch threads on a CPU', low=1)
    device: str = key('auto', "'auto' = cuda, else cpu; 'cpu', 'cuda', 'cuda:1'")


def check(settings, part):
    """Refuse bad settings before torch is imported; raises UserError."""
    if settings.data and not os.path.isdir(settings.data):
        raise UserError(f'there is no folder {settings.data!r}', 'data')
    if settings.device.split(':')[0] not in ('auto', 'cpu', 'cuda'):
        raise UserError(f"device must be 'auto', 'cpu', 'cuda' or 'cuda:N', got {settings.device!r}", 'device')


def run(settings, part):
    """bench.loader.measure, with the machine."""
    import torch

    from bench import loader
    from bench.modules import machine
    from reporting import hardware
    torch.set_num_threads(settings.threads)
    device = hardware.device(settings.device)
    found = loader.measure(settings.data or None, settings.block_size, settings.batch_size, settings.seconds, device.type)
    return {'part': 'loader', **found, 'machine': machine(device)}


def text(result):
    """The figures as sentences."""
    return (f'{result["batch_size"]} x {result["block_size"]} tokens: {result["batch_ms"]:.3g} ms per batch, '
            f'{result["tokens_per_s"]:,.0f} tokens/s alone\n{result["share"]:.3%} of a 124M step of '
            f'{result["step_ms"]:,.0f} ms ({result["step_how"]}), {result["quick_share"]:.3%} of one of '
            f'{result["quick_step_ms"]:.0f} ms (500,000 tokens/s)\n'
            f'waiting for prefetched batches during such a step: {result["wait_share"]:.3%} of the time')
