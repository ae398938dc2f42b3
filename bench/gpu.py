"""Part gpu: every measurement that wants a GPU, in one command of at most `minutes`, each in a second process.

    python bench.py gpu --json=gpu.json

A job that fails or takes too long is recorded as an error and the others go on. The file of --json is written again after
every job. The order is by importance, as time may run out; Inductor's cache makes later compilations shorter. --device=cpu
runs every job at a tiny size, to try the code.
"""
import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from typing import NamedTuple

from bench import Output, tables
from bench.processes import ROOT, keep, last_line, timed
from configurator import key
from variants import UserError

RUN_TOKENS = 524_288                    # tokens of the train step that Muon's share is of
PLAIN = 'config/train_gpt2.py'
SPEEDRUN = 'config/train_gpt_windows.py'        # the windowed recipe
WINDOWED = ['--attention=window(512)', '--rope=True', '--qk_norm=standard', '--mlp=relu2', '--norm=rmsnorm',
            '--optimizer=muon']         # where that config is not there
KRON = '--linear=h.*.mlp.*=kron(768, 768)'          # the model of 82 million parameters
SMALL = ['--n_layer=2', '--n_head=2', '--n_embd=32', '--block_size=16', '--batch_size=2']
FIGURES = ('tokens_per_s', 'mfu_measured', 'mfu_sheet', 'peak_memory')
TINY = [*SMALL, '--device=cpu']


@dataclass
class Settings(Output):
    """Where, for how long, and which."""
    device: str = key('cuda', "'cuda', or 'cpu' to try every job at a tiny size", choices=('cuda', 'cpu'))
    minutes: float = key(8.8, 'the whole may take; what does not fit is left out', low=0)
    only: str = key('', 'names of jobs, by commas; by default all')


class Job(NamedTuple):
    """One bench.py command: name, part, arguments on a GPU, the same at a tiny size, and the seconds it may take."""
    name: str
    part: str
    arguments: list
    tiny: list
    seconds: int


def step_job(name, config, arguments, seconds, tiny_attention='causal'):
    """A job of part step on random tokens; on a GPU compiled, in the device's half precision."""
    some = [f'--config={config}', '--random_tokens=True', *arguments]
    tiny = [word for word in some if word.split('=')[0] not in ('--batch_size', '--block_size', '--loss_chunk', '--linear')]
    tiny += ['--linear=h.*.mlp.*=kron(8, 8)'] * any(word.startswith('--linear') for word in some)
    chunk = ['--loss_chunk=8'] if any(word.startswith('--loss_chunk') for word in some) else []
    sizes = ['--gradient_accumulation_steps=1', '--vocabulary=300', '--rounds=1']
    return Job(name, 'step', ['--device=cuda', '--compile=True', '--rounds=5', *some],
               [*tiny, *TINY, *sizes, *chunk, f'--attention={tiny_attention}'], seconds)


def modules_job(part, arguments):
    tiny = ['--min_time=0', '--vocab_size=60', *TINY, *(['--tokens=1,6'] if part == 'linear' else [])]
    return Job(part, part, ['--device=cuda', '--dtype=bfloat16', '--n_embd=768', '--n_head=12', '--block_size=1024',
                            '--min_time=0.1', *arguments], tiny, 75)


def jobs():
    """All jobs, the most important first."""
    there = (ROOT / SPEEDRUN).exists()
    windowed, recipe = ([], SPEEDRUN) if there else (WINDOWED, PLAIN)
    one = '--gradient_accumulation_steps=8'
    return [
        step_job('plain 64 x 1024', PLAIN, ['--batch_size=64', '--block_size=1024', one], 120),
        step_job('chunked 64 x 1024', PLAIN, ['--batch_size=64', '--block_size=1024', one, '--loss_chunk=8192'], 120),
        Job('optim', 'optim', ['--device=cuda', '--sizes=124M', '--rounds=7'],
            ['--device=cpu', '--sizes=char', '--rounds=1', '--round_ms=0'], 60),
        step_job('windowed', recipe, [*windowed, one, '--progress=0.5'], 150, 'window(8)'),
        modules_job('linear', ['--tokens=8192,32768']),
        Job('plans', 'plans', ['--device=cuda', '--only=81M,80M-2', '--tokens=8192,32768', '--cell_s=0.2'],
            ['--device=cpu', '--only=small', '--tokens=1', '--cell_s=0'], 60),
        step_job('81M 16 x 1024', PLAIN, [KRON, '--kron_plan=measure', '--batch_size=16', '--block_size=1024', one], 90),
        step_job('plain 16 x 1024', PLAIN, ['--batch_size=16', '--block_size=1024', one], 90),
        Job('ladder', 'ladder', ['--device=cuda', '--rounds=5', '--max_seconds=130'],
            [*TINY, '--rounds=1', '--round_s=0', '--check_tokens=char', '--check_iters=2'], 240),
        modules_job('attention', ['--batch_size=8']),
        modules_job('mlp', ['--batch_size=8']),
        Job('sample', 'sample', [f'--config={PLAIN}', '--device=cuda', '--new_tokens=256', '--rounds=2'],
            [f'--config={PLAIN}', *TINY, '--prompt=4', '--new_tokens=4', '--rounds=1', '--vocab_size=60'], 60),
        Job('precision', 'precision', ['--device=cuda'],
            ['--device=cpu', '--sizes=1x1x32', '--batch_size=2', '--block_size=16', '--rounds=1', '--round_s=0'], 100),
        Job('loader', 'loader', ['--device=cuda', '--seconds=0.5'], ['--device=cpu', '--seconds=0', '--block_size=64'], 60),
    ]


def wanted(settings):
    """The jobs of `only`, in their order."""
    names = [name.strip() for name in settings.only.split(',')] if settings.only else [job.name for job in jobs()]
    for name in names:
        if name not in [job.name for job in jobs()]:
            raise UserError(f'only takes {", ".join(job.name for job in jobs())}, got {name!r}', 'only')
    return [job for job in jobs() if job.name in names]


def check(settings, part):
    """What can be refused before torch is imported; raises UserError."""
    wanted(settings)


def run(settings, part):
    """Run the jobs one after the other while there is time."""
    import hardware
    from bench.modules import machine
    try:
        device = hardware.device(settings.device)
    except UserError:
        raise UserError('gpu measures on a CUDA GPU, and this machine has none; --device=cpu tries every job at a tiny size',
                        'device') from None
    begin, result = time.monotonic(), {'part': 'gpu', 'machine': machine(device), 'jobs': {}}
    with tempfile.TemporaryDirectory() as folder:
        for job in wanted(settings):
            left = 60 * settings.minutes - (time.monotonic() - begin)
            result['jobs'][job.name] = measure(job, settings.device, left, folder)
            result['seconds'], result['summary'] = time.monotonic() - begin, summary(result['jobs'])
            keep(result, settings.json)
    return result


def measure(job, device, left, folder):
    """{'seconds', 'result'} of one job, or {'seconds', 'error'}."""
    if left < 10:
        return {'seconds': 0.0, 'error': 'no time was left'}
    print(f'bench.py: {job.name} ...', file=sys.stderr, flush=True)
    path = os.path.join(folder, 'result.json')
    done = timed([sys.executable, 'bench.py', job.part, *(job.tiny if device == 'cpu' else job.arguments),
                  f'--json={path}'], timeout=min(job.seconds, left))
    found = {'seconds': done['wall_s'], 'command': ' '.join(['bench.py', job.part, *job.arguments])}
    try:
        if done['code'] != 0:
            raise ValueError(last_line(done))
        with open(path, encoding='utf-8') as file:
            return {**found, 'result': json.load(file)}
    except (OSError, ValueError) as error:
        return {**found, 'error': str(error)}


def summary(done):
    """The figures that the aims are about; what could not be measured is missing."""
    results = {name: job['result'] for name, job in done.items() if 'result' in job}
    found = {}
    for name in ('plain 64 x 1024', 'chunked 64 x 1024', 'windowed', '81M 16 x 1024', 'plain 16 x 1024'):
        if name in results:
            found[name] = {figure: results[name][figure] for figure in FIGURES}
    if '81M 16 x 1024' in results and 'plain 16 x 1024' in results:
        found['kron_step_speedup'] = results['81M 16 x 1024']['tokens_per_s'] / results['plain 16 x 1024']['tokens_per_s']
    if 'plans' in results:
        found['plans'] = {clause['clause']: clause['worst'] for clause in results['plans']['clauses']}
    sizes = results['optim']['sizes'] if 'optim' in results else {}
    for size in sizes.values():
        found['muon_ms'] = size['ms']['batched']
        found['muon_speedup'] = size['speedup'].get('torch', {}).get('median')
        if 'plain 64 x 1024' in results:
            whole = 1e3 * RUN_TOKENS / results['plain 64 x 1024']['tokens_per_s']
            found['muon_share'] = size['ms']['batched'] / whole
    if 'ladder' in results:
        found['ladder'] = {row['name']: row['tokens_per_s'] for row in results['ladder']['rungs']}
    if 'sample' in results:
        found['sample_tokens_per_s'] = results['sample']['tokens_per_s']
    return found


def text(result):
    """One line a job, then the figures that the aims are about."""
    lines = [['job', 's', 'what came of it']]
    for name, job in result['jobs'].items():
        lines.append([name, f'{job["seconds"]:.0f}', job.get('error', 'measured')])
    where = result['machine']['gpu'] or result['machine']['device']
    return '\n\n'.join([f'{where}, torch {result["machine"]["torch"]}, {result["seconds"]:.0f} s', tables.aligned(lines),
                        json.dumps(result['summary'], indent=1)])
