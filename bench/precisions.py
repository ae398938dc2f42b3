"""Part precision: a train step in every precision against fp32, for models below and above 10 million parameters.

    python bench.py precision --json=precision.json

"Below 10M parameters fp32 is as fast" is a common rule of thumb; this measures it. Every step is
that of train.py (scaler, clipping, optimizer and rounding of the weights included) on random tokens. Rounds: every
precision is timed in turn, and x is the median over rounds of (time of the step in fp32) / (its time): above 1 is faster.
"""
import tempfile
from dataclasses import dataclass

from bench import Output, tables
from bench.step import random_data
from configurator import key
from variants import UserError

# name -> the settings of train.py; 'tf32' is for GPUs alone and is no setting, as train.py always takes it there
KINDS = {
    'fp32': {'dtype': 'float32'},
    'TF32': {'dtype': 'float32'},
    'bf16 autocast': {'dtype': 'bfloat16'},
    'fp16 autocast': {'dtype': 'float16'},
    'bf16 weights, fp32 masters': {'weights': 'bfloat16'},
    'bf16 weights': {'weights': 'bfloat16', 'master_weights': False},
    'fp16 weights, fp32 masters': {'weights': 'float16'},
    'fp16 weights': {'weights': 'float16', 'master_weights': False},
}
SIZES = {'cpu': '2x2x64, 4x4x128, 6x6x384', 'cuda': '4x4x128, 6x6x384, 12x12x768'}
TOKENS = {'cpu': (4, 128), 'cuda': (64, 256)}


@dataclass
class Settings(Output):
    """Which models, and how long to measure."""
    sizes: str = key('', 'models as layers x heads x hidden size, by commas; by default three, two below 10M parameters')
    batch_size: int = key(0, 'sequences per step; 0 = 64 on a GPU, 4 on a CPU', low=0)
    block_size: int = key(0, 'tokens per sequence; 0 = 256 on a GPU, 128 on a CPU', low=0)
    compile: bool | None = key(None, 'torch.compile; default True on a GPU, False elsewhere')
    rounds: int = key(5, 'rounds in which every precision is timed', low=1)
    round_s: float = key(0.2, "approximate time of a precision's turn, s", low=0)
    threads: int = key(1, 'torch threads on a CPU; one gives the steadiest ratios', low=1)
    device: str = key('auto', "'auto' = cuda, else cpu; 'cpu', 'cuda', 'cuda:1'")


def sizes_of(text):
    """[(layers, heads, hidden size)] of '4x4x128, ...'; raises UserError."""
    try:
        found = [tuple(int(n) for n in size.split('x')) for size in text.split(',')]
        if all(len(size) == 3 and min(size) > 0 and size[2] % size[1] == 0 for size in found):
            return found
    except ValueError:
        pass
    raise UserError(f"sizes are layers x heads x width, heads a divisor of width, as '4x4x128, 6x6x384', got "
                    f'{text!r}', 'sizes')


def check(settings, part):
    """Refuse bad settings before torch is imported; raises UserError."""
    if settings.device.split(':')[0] not in ('auto', 'cpu', 'cuda'):
        raise UserError(f"device must be 'auto', 'cpu', 'cuda' or 'cuda:N', got {settings.device!r}", 'device')
    if settings.sizes:
        sizes_of(settings.sizes)


def run(settings, part):
    """Every model in every precision."""
    import torch

    from bench.modules import machine
    from bench.processes import keep
    from data.loader import open_dataset
    from reporting import hardware
    device = hardware.device(settings.device)
    torch.set_num_threads(settings.threads)
    rows, length = (given or default for given, default in
                    zip((settings.batch_size, settings.block_size), TOKENS[device.type]))
    with tempfile.TemporaryDirectory() as folder:
        random_data(folder, 64, length)
        dataset = open_dataset(folder, notice=lambda text: None)
        result = {'part': 'precision', 'batch_size': rows, 'block_size': length, 'models': [], 'machine': machine(device)}
        for size in sizes_of(settings.sizes or SIZES[device.type]):
            result['models'].append(measure(size, rows, length, settings, dataset, device))
            keep(result, settings.json)
    return result


def measure(size, rows, length, settings, dataset, device):
    """{'size', 'parameters', 'compiled', 'rows': one dict per precision} of one model."""
    from bench.training import by_turns, spread
    names = [name for name in KINDS if name != 'TF32' or device.type == 'cuda']
    steps = [make(size, rows, length, settings, KINDS[name], dataset, device) for name in names]
    rounds = by_turns([caller(step, name, device) for step, name in zip(steps, names)], settings.rounds, settings.round_s,
                      device)
    found = [{'name': name, 'ms': spread([times[i] for times in rounds])['median'],
              **{f'x_{key}'.removesuffix('_median'): value
                 for key, value in spread([times[0] / times[i] for times in rounds]).items()},
              'peak_memory': steps[i].memory()} for i, name in enumerate(names)]
    return {'size': 'x'.join(map(str, size)), 'parameters': steps[0].model.num_params(), 'compiled': steps[0].compiled,
            'rounds': len(rounds), 'rows': found}


def make(size, rows, length, settings, kind, dataset, device):
    """The train step of one model in one precision, run once."""
    from bench.steps import Steps
    from configurator import Config
    from data.loader import Prefetcher
    from training import parallel
    n_layer, n_head, n_embd = size
    config = Config(n_layer=n_layer, n_head=n_head, n_embd=n_embd, block_size=length, batch_size=rows, dropout=0.0,
                    gradient_accumulation_steps=1, device=str(device), compile=settings.compile, **kind)
    step = Steps(config, parallel.start(config), dataset, 0.0)
    step.whole(Prefetcher(step.loader, prefetch=0), 1)
    return step


def caller(step, name, device):
    """The step as a call, in TF32 or in full fp32."""
    from bench.rung import tf32
    from data.loader import Prefetcher
    batches = Prefetcher(step.loader, prefetch=0)

    def call():
        if device.type == 'cuda':
            tf32(name != 'fp32')
        step.whole(batches, 1)
    return call


def text(result):
    """One table per model."""
    machine = result['machine']
    where = machine['gpu'] or f'{machine["device"]} ({machine["threads"]} threads)'
    found = [f'precision: a train step of {result["batch_size"]} x {result["block_size"]} tokens; {where}, torch '
             f'{machine["torch"]}. x: time in fp32 / its time, median of the rounds']
    for model in result['models']:
        head = f'{model["size"]}, {model["parameters"]:,} parameters{", compiled" * model["compiled"]}'
        lines = [[head, 'ms', 'x', 'least', 'most', 'peak memory, MB']]
        for row in model['rows']:
            memory = '' if row['peak_memory'] is None else f'{row["peak_memory"] / 1e6:,.1f}'
            ratios = (f'{row[name]:.2f}' for name in ('x', 'x_min', 'x_max'))
            lines.append([row['name'], f'{row["ms"]:.4g}', *ratios, memory])
        found.append(tables.aligned(lines))
    return '\n\n'.join(found)
