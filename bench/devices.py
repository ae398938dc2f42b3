"""Part devices: tokens per second of DDP and FSDP2 on 1, 2, ... ranks of this machine, tokens per rank unchanged.

    python bench.py devices --config=config/train_shakespeare_char.py --max_ranks=2

Each is a torchrun of train.py on random tokens, with as many accumulated micro-steps as ranks; efficiency is tokens per
second and rank, relative to one rank. On a CPU the ranks use gloo and one thread each (--threads).
"""
import os
import statistics
import sys
import tempfile
from dataclasses import dataclass

from bench import Output, tables
from bench.step import chosen, random_data
from configurator import Config, key
from variants import UserError


@dataclass
class Settings(Output, Config):
    """What is trained, on how many ranks; every setting of train.py besides."""
    config: str = key('', 'config file of what is trained')
    max_ranks: int = key(0, 'most ranks; 0 = the GPUs, or the CPUs', low=0)
    kinds: str = key('ddp,fsdp', 'parallel settings to measure, by commas')
    steps: int = key(12, 'steps of a run; the first third is not counted', low=2)
    vocabulary: int = key(50257, 'of the random tokens', low=2)
    threads: int = key(1, 'torch threads of a rank', low=1)
    limit: float = key(600.0, 'seconds that a run may take', low=1)


OWN = ('config', 'max_ranks', 'kinds', 'steps', 'vocabulary', 'threads', 'limit', 'json', 'debug')
FORCED = ('dataset', 'data_dir', 'out_dir', 'max_iters', 'gradient_accumulation_steps', 'parallel')


def check(settings, part):
    """Refuse bad settings before torch is imported; raises UserError."""
    if not settings.config:
        raise UserError('name what is trained: --config=config/X.py', 'config')
    for kind in settings.kinds.split(','):
        if kind not in ('ddp', 'fsdp'):
            raise UserError(f"kinds takes 'ddp', 'fsdp' or 'ddp,fsdp', got {settings.kinds!r}", 'kinds')
    for name in FORCED:
        if str(settings.sources.get(name, '')).startswith('--'):
            raise UserError(f'{name} is set by this part itself; drop it', name)
    chosen(settings)


def rank_counts(most):
    """1, 2, 4, ... up to `most`, and `most` itself."""
    return sorted({2 ** k for k in range(most.bit_length()) if 2 ** k <= most} | {most})


def run(settings, part):
    """Run train.py for every kind and number of ranks."""
    import torch

    from bench.modules import machine
    from bench.processes import keep
    from reporting import hardware
    device = hardware.device(settings.device)
    most = settings.max_ranks or (torch.cuda.device_count() if device.type == 'cuda' else os.cpu_count())
    result = {'part': 'devices', 'config': settings.config, 'rows': [], 'machine': machine(device)}
    with tempfile.TemporaryDirectory() as folder:
        random_data(os.path.join(folder, 'random'), settings.vocabulary, chosen(settings).block_size)
        for kind in settings.kinds.split(','):
            alone = None
            for ranks in rank_counts(most):
                row = measure(settings, kind, ranks, folder)
                alone = alone or row.get('tokens_per_s')
                if alone and 'tokens_per_s' in row:
                    row['efficiency'] = row['tokens_per_s'] / ranks / alone
                result['rows'].append(row)
                keep(result, settings.json)
    return result


def measure(settings, kind, ranks, folder):
    """One run: {'parallel', 'ranks', 'tokens_per_s', 'ms', 'loss'}, or 'error' in place of the figures."""
    from bench.processes import last_line, read_log, timed
    out = os.path.join(folder, f'{kind}{ranks}')
    given = [f'--{name}={getattr(settings, name)}' for name in settings.sources if name not in OWN]
    launch = [sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={ranks}']
    done = timed([*launch, 'train.py', os.path.abspath(settings.config), *given, f'--data_dir={folder}', '--dataset=random',
                  f'--out_dir={out}', f'--parallel={kind}', f'--gradient_accumulation_steps={ranks}',
                  f'--max_iters={settings.steps}', '--eval_iters=1', f'--eval_interval={settings.steps}',
                  '--log_interval=1', '--save_interval=0'], threads=settings.threads, timeout=settings.limit)
    row = {'parallel': kind, 'ranks': ranks}
    if done['code'] != 0:
        return {**row, 'error': last_line(done)}
    lines = read_log(out)[0][settings.steps // 3:]
    return {**row, 'tokens_per_s': statistics.median(line['tokens_per_s'] for line in lines),
            'ms': statistics.median(line['ms'] for line in lines), 'loss': lines[-1]['loss']}


def text(result):
    """One line per run."""
    lines = [['parallel', 'ranks', 'ms', 'tokens/s', 'efficiency']]
    for row in result['rows']:
        cells = [f'{row["ms"]:.4g}', f'{row["tokens_per_s"]:,.0f}', f'{row["efficiency"]:.0%}'] if 'ms' in row else (
            ['', row['error'], ''])
        lines.append([row['parallel'], str(row['ranks']), *cells])
    where = result['machine']['gpu'] or result['machine']['device']
    return f'{result["config"]} on {where}, random tokens, tokens per rank unchanged\n\n{tables.aligned(lines)}'
