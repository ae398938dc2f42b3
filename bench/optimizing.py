"""Part optim: a step of batched Muon and of its options, a loop over the matrices and torch.optim.Muon, by size."""
from dataclasses import dataclass

from bench import Output, tables
from configurator import key
from variants import UserError, did_you_mean

NAMES = ('char', '6x384', '6x384 kron', '6x384 lowrank', '124M')        # bench.optim.SIZES


@dataclass
class Settings(Output):
    """Which sizes, where, and how long."""
    sizes: str = key('', f'names of sizes, by commas: {", ".join(NAMES)}; by default all, 124M on a GPU only')
    rounds: int = key(15, 'rounds in which every contestant is timed', low=1)
    round_ms: float = key(100.0, 'approximate time of a turn, ms', low=0)
    dtype: str = key('auto', "of the iterations; 'auto' = bfloat16 on a GPU, float32 elsewhere",
                     choices=('auto', 'float32', 'bfloat16'))
    threads: int = key(1, 'torch threads on a CPU', low=1)
    device: str = key('auto', "'auto' = cuda, else cpu; 'cpu', 'cuda', 'cuda:1'")


def wanted(settings):
    """The names of `sizes` as a list, None for all."""
    names = [name.strip() for name in settings.sizes.split(',')] if settings.sizes else None
    for name in names or ():
        if name not in NAMES:
            raise UserError(f'sizes takes {", ".join(NAMES)}, got {name!r}{did_you_mean(name, NAMES)}', 'sizes')
    return names


def check(settings, part):
    """Refuse bad settings before torch is imported; raises UserError."""
    wanted(settings)
    if settings.device.split(':')[0] not in ('auto', 'cpu', 'cuda'):
        raise UserError(f"device must be 'auto', 'cpu', 'cuda' or 'cuda:N', got {settings.device!r}", 'device')


def run(settings, part):
    """bench.optim.measure, with the machine."""
    import torch

    from bench import optim
    from bench.modules import machine
    from reporting import hardware
    torch.set_num_threads(settings.threads)
    device = hardware.device(settings.device)
    kind = None if settings.dtype == 'auto' else getattr(torch, settings.dtype)
    found = optim.measure(wanted(settings), device, settings.rounds, settings.round_ms, kind)
    return {'part': 'optim', **found, 'machine': machine(device)}


def text(result):
    """One line per size and contestant."""
    lines = [['size', 'contestant', 'ms', 'time / batched', 'least', 'most']]
    for size, found in result['sizes'].items():
        for name, ms in found['ms'].items():
            ratio = found['speedup'].get(name, {'median': 1, 'min': 1, 'max': 1})
            lines.append([f'{size}, {found["matrices"]} matrices', name, f'{ms:.4g}',
                          *(f'{ratio[which]:.2f}' for which in ('median', 'min', 'max'))])
    where = result['machine']['gpu'] or f'{result["device"]} ({result["threads"]} threads)'
    return f'Muon, {result["dtype"]} on {where}, torch {result["torch"]}\n\n{tables.aligned(lines)}'
