"""Part scaling: how time and memory of a train step grow along each axis of the model, beside how its FLOPs grow.

    python bench.py scaling
    python bench.py scaling --axes=width,context --rounds=5
    python bench.py scaling --quick=True        # whether it runs

An exponent is the slope of a least-squares line through the logarithms of the last three sizes: cost ~ size^exponent. A
step is forward, backward and AdamW of a small GPT. FLOPs: 3 x model.flops_per_token() x tokens. Memory: peak bytes of
weights, optimizer state, gradients and tensors that live during the step (bench.measure; on CUDA by the allocator).
Sizes of all axes are timed in interleaved rounds, so that other work on the machine meets them alike.
"""
import math
import statistics
import sys
from dataclasses import dataclass

from bench import Output, tables
from configurator import key
from variants import UserError

BASE = {'n_layer': 4, 'n_head': 4, 'n_embd': 128, 'block_size': 128, 'vocab_size': 256, 'batch': 4}
# axis -> (sizes, settings of a size)
AXES = {
    'width': ((64, 128, 256, 512), lambda size: {'n_embd': size, 'n_head': size // 32}),
    'depth': ((2, 4, 8, 16), lambda size: {'n_layer': size}),
    'context': ((128, 256, 512, 1024), lambda size: {'block_size': size, 'batch': 1}),
    'batch': ((2, 4, 8, 16), lambda size: {'batch': size}),
    'experts': ((4, 8, 16, 32), lambda size: {'mlp': f'kron_moe({size})'}),
    'ranks': ((8, 16, 32, 64), lambda size: {'linear': {'h.*': f'lowrank({size})'}, 'n_embd': 256}),
    'terms': ((2, 4, 8, 16), lambda size: {'linear': {'h.*.mlp.*': f'kron(16, 16, terms={size})'}, 'n_embd': 256}),
}
FITTED = 3                              # last sizes that an exponent is fitted to
FASTER = 0.15                           # more than the exponent of the FLOPs: growth that wants a reason


@dataclass
class Settings(Output):
    """Which axes, and where."""
    axes: str = key(','.join(AXES), 'axes to measure, by commas')
    quick: bool = key(False, 'short contexts, half the layers and one round: whether it works, not what it costs')
    rounds: int = key(5, 'rounds in which all sizes of an axis are timed', low=1)
    threads: int = key(1, 'torch threads on a CPU', low=1)
    device: str = key('cpu', "'cpu', 'cuda', 'cuda:1'")
    dtype: str = key('float32', "autocast type; 'auto' = bfloat16 where the GPU has it, else as sample.py's",
                     choices=('auto', 'float32', 'bfloat16', 'float16'))
    seed: int = key(1337, 'of weights and tokens', low=0)


def check(settings, part):
    """Refuse bad settings before torch is imported; raises UserError."""
    for axis in settings.axes.split(','):
        if axis not in AXES:
            raise UserError(f'axes takes {", ".join(AXES)} by commas, got {settings.axes!r}', 'axes')


def exponent(sizes, values):
    """Slope of the least-squares line of log value over log size, of the last FITTED sizes."""
    x, y = ([math.log(number) for number in numbers[-FITTED:]] for numbers in (sizes, values))
    return statistics.linear_regression(x, y).slope


def config_of(axis, size, quick=False):
    """(GPTConfig, sequences per step) of one size; quick: shorter and fewer sequences, half the layers."""
    from configurator import GPTConfig
    given = BASE | AXES[axis][1](size)
    batch = given.pop('batch')
    if quick:
        given |= {'n_layer': max(1, given['n_layer'] // 2), 'block_size': max(16, given['block_size'] // 8)}
    return GPTConfig(**given), batch


class Subject:
    """The model, optimizer and tokens of one size, and its step."""

    def __init__(self, axis, size, settings, device, dtype):
        import torch

        from model import GPT
        from reporting import hardware
        torch.manual_seed(settings.seed)
        config, batch = config_of(axis, size, settings.quick)
        self.model, self.size, self.device = GPT(config).to(device).train(), size, device
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True)
        self.x, self.y = torch.randint(config.vocab_size, (2, batch, config.block_size), device=device)
        self.autocast = lambda: hardware.autocast(device, dtype)
        self.flops = 3 * self.model.flops_per_token() * self.x.numel()

    def step(self):
        from bench.training import train_step
        train_step(self.model, self.optimizer, self.x, self.y, self.autocast())

    def memory(self):
        from bench.training import step_memory
        return step_memory(self.step, self.model, self.optimizer, self.device)


def measure(axis, settings, device, dtype):
    """One axis: sizes, ms, bytes and FLOPs of a step, and their exponents."""
    from bench.training import by_turns
    subjects = [Subject(axis, size, settings, device, dtype) for size in AXES[axis][0]]
    for subject in subjects:
        subject.step()                                  # allocates the optimizer's state
    rounds = by_turns([subject.step for subject in subjects], 1 if settings.quick else settings.rounds, 0.05, device)
    found = {'axis': axis, 'sizes': [subject.size for subject in subjects],
             'ms': [statistics.median(column) for column in zip(*rounds)],
             'bytes': [subject.memory() for subject in subjects],
             'flops': [subject.flops for subject in subjects],
             'parameters': [subject.model.num_params() for subject in subjects]}
    return found | {'exponents': {name: exponent(found['sizes'], found[name])
                                  for name in ('ms', 'bytes', 'flops', 'parameters')}}


def run(settings, part):
    """Every axis."""
    import torch

    from bench.modules import machine
    from bench.processes import keep
    from reporting import hardware
    torch.set_num_threads(settings.threads)
    device = hardware.device(settings.device)
    dtype, result = hardware.dtype(settings.dtype, device), {'part': 'scaling', 'quick': settings.quick, 'rows': []}
    result |= {'machine': machine(device), 'processor': hardware.processor()}
    for axis in settings.axes.split(','):
        print(f'bench.py: {axis} ...', file=sys.stderr, flush=True)
        result['rows'].append(measure(axis, settings, device, dtype))
        keep(result, settings.json)
    return result


def text(result):
    """A table of exponents, and one of what they are fitted to."""
    heads = [['axis', 'sizes', 'time', 'FLOPs', 'memory', 'parameters', 'grows faster']]
    facts = [['axis', 'size', 'ms', 'MiB', 'GFLOP', 'GFLOP/s', 'parameters']]
    for row in result['rows']:
        slopes = row['exponents']
        heads.append([row['axis'], f'{row["sizes"][-FITTED]} to {row["sizes"][-1]}',
                      *(f'{slopes[name]:.2f}' for name in ('ms', 'flops', 'bytes', 'parameters')),
                      ', '.join(faster(slopes))])
        for size, ms, held, flops, parameters in zip(*(row[k] for k in ('sizes', 'ms', 'bytes', 'flops', 'parameters'))):
            facts.append([row['axis'], str(size), f'{ms:.4g}', f'{held / 2 ** 20:.4g}', f'{flops / 1e9:.4g}',
                          f'{flops / ms / 1e6:.4g}', f'{parameters:,}'])
    where = result['machine']['gpu'] or f'{result["processor"]}, {result["machine"]["threads"]} threads'
    return (f'exponents of a train step on {where}, torch {result["machine"]["torch"]}\n\n{tables.aligned(heads)}\n\n'
            f'{tables.aligned(facts)}')


def faster(slopes):
    """What grows faster than the FLOPs do: time, or memory beyond parameters too."""
    return [word for word, name, most in (('time', 'ms', slopes['flops']),
                                          ('memory', 'bytes', max(slopes['flops'], slopes['parameters'])))
            if slopes[name] > most + FASTER]
