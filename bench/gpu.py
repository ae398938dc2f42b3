"""Part gpu: every measurement that wants a GPU, in one or two commands of at most `minutes`, each job a second process.

    python bench.py gpu --list=True
    python bench.py gpu --only=first --minutes=9 --json=first.json --baseline=FOLDER_OF_A_nanoGPT_CLONE
    python bench.py gpu --only=second --minutes=9 --json=second.json

Jobs are in the order of their importance, as time may run out; the group `first` is what must be right and has an aim,
`second` the rest. The file of --json is written again after every job and, within a job, whenever its part has one more row,
so that it is whole whenever this process is stopped. A job that fails or takes too long is an error beside what it had
measured, and the others go on. Inductor's cache makes later compilations shorter. --device=cpu runs every job at a tiny
size, to try the code.
"""
import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from typing import NamedTuple

from bench import Output, aims, tables
from bench.processes import keep, last_line, timed
from configurator import key
from variants import UserError

PLAIN = 'config/train_gpt2.py'
GROUPS = ('first', 'second')
KRON = '--linear=h.*.mlp.*=kron(768, 768)'          # the model of 82 million parameters
SMALL = ['--n_layer=2', '--n_head=2', '--n_embd=32', '--block_size=16', '--batch_size=2']
TINY = [*SMALL, '--device=cpu']
TINY_CHECK = ['--device=cpu', '--backend=aot_eager', '--n_embd=64', '--block_size=32', '--batch_size=2', '--vocab_size=64']
SHORT = ['--gradient_accumulation_steps=4', '--eval_iters=4', '--skip_zscore=0', '--target_val_loss=0']       # a short run


@dataclass
class Settings(Output):
    """Where, for how long, and which."""
    device: str = key('cuda', "'cuda', or 'cpu' to try every job at a tiny size", choices=('cuda', 'cpu'))
    minutes: float = key(8.8, 'the whole may take; what does not fit is left out', low=0)
    only: str = key('', "names of jobs, by commas, or of the groups 'first' and 'second'; by default all")
    baseline: str = key('', 'folder of a clone of nanoGPT, for the job nanogpt; without it that is left out')
    list: bool = key(False, 'show the jobs with the most seconds that each may take, and measure nothing')


class Job(NamedTuple):
    """One bench.py command: name, part, arguments on a GPU, the same at a tiny size, and the seconds it may take."""
    name: str
    part: str
    arguments: list
    tiny: list
    seconds: int
    group: str = 'second'


# ----------------------------------------------------------------------------------------------------
# the jobs

def step_job(name, config, arguments, seconds, group='first', attention='causal'):
    """A job of part step on random tokens; on a GPU compiled, in the device's half precision. attention: at a tiny size."""
    some = [f'--config={config}', '--random_tokens=True', *arguments]
    tiny = [word for word in some if word.split('=')[0] not in ('--batch_size', '--block_size', '--loss_chunk', '--linear')]
    tiny += ['--linear=h.*.mlp.*=kron(8, 8)'] * any(word.startswith('--linear') for word in some)
    sizes = ['--gradient_accumulation_steps=1', '--vocabulary=300', '--rounds=1', '--loss_chunk=8']
    return Job(name, 'step', ['--device=cuda', '--compile=True', '--rounds=5', *some],
               [*tiny, *TINY, *sizes, f'--attention={attention}'], seconds, group)


def modules_job(part, arguments):
    tiny = ['--min_time=0', '--vocab_size=60', *TINY, *(['--tokens=1,6'] if part == 'linear' else [])]
    return Job(part, part, ['--device=cuda', '--dtype=bfloat16', '--n_embd=768', '--n_head=12', '--block_size=1024',
                            '--min_time=0.1', *arguments], tiny, 75)


def first_jobs(baseline):
    """What must be right, and what has an aim."""
    eight = '--gradient_accumulation_steps=8'
    dense = ['--batch_size=15', '--block_size=1024', eight]
    tiny_nanogpt = [*TINY, '--rounds=1', '--micro_steps=1', '--vocabulary=300']
    return [
        Job('check', 'check', ['--device=cuda'], TINY_CHECK, 170, 'first'),
        step_job('train_gpt', 'config/train_gpt.py', [eight], 100),
        step_job('windows', 'config/train_gpt_windows.py', [eight, '--progress=0.5'], 120, attention='window(8)'),
        step_job('dense', PLAIN, dense, 60),
        step_job('kron rule', PLAIN, [*dense, KRON], 60),
        step_job('kron measured', PLAIN, [*dense, KRON, '--kron_plan=measure'], 80),
        *[Job('nanogpt', 'parent', ['--device=cuda', f'--baseline={baseline}', *dense[:2], '--rounds=5'],
              [f'--baseline={baseline}', *tiny_nanogpt], 80, 'first')] * bool(baseline),
        Job('plans', 'plans', ['--device=cuda', '--only=81M,80M-2', '--tokens=8192,32768', '--cell_s=0.2'],
            ['--device=cpu', '--only=small', '--tokens=1', '--cell_s=0'], 60, 'first'),
    ]


def second_jobs():
    """Everything else."""
    wide, eight = ['--batch_size=64', '--block_size=1024'], '--gradient_accumulation_steps=8'
    ranks = ['--config=config/train_gpt_windows.py', *SHORT]
    return [
        Job('two ranks', 'ranks', [*ranks, '--device=cuda:0', '--n_layer=4', '--block_size=1024', '--batch_size=8',
                                   "--attention=window(512, schedule='linear', long=(0, 3))"],
            [*ranks, *TINY, '--attention=window(8)', '--loss_chunk=8', '--vocabulary=300', '--steps=4'], 200),
        Job('optim', 'optim', ['--device=cuda', '--sizes=124M', '--rounds=7'],
            ['--device=cpu', '--sizes=char', '--rounds=1', '--round_ms=0'], 60),
        Job('sample', 'sample', [f'--config={PLAIN}', '--device=cuda', '--new_tokens=256', '--rounds=2'],
            [f'--config={PLAIN}', *TINY, '--prompt=4', '--new_tokens=4', '--rounds=1', '--vocab_size=60',
             '--static=True'], 90),
        modules_job('linear', ['--tokens=8192,32768']),
        Job('ladder', 'ladder', ['--device=cuda', '--rounds=5', '--max_seconds=130'],
            [*TINY, '--rounds=1', '--round_s=0', '--check_tokens=char', '--check_iters=2'], 240),
        modules_job('attention', ['--batch_size=8']),
        modules_job('mlp', ['--batch_size=8']),
        step_job('plain 64 x 1024', PLAIN, [*wide, eight], 100, 'second'),
        step_job('chunked 64 x 1024', PLAIN, [*wide, eight, '--loss_chunk=8192'], 100, 'second'),
        Job('precision', 'precision', ['--device=cuda'],
            ['--device=cpu', '--sizes=1x1x32', '--batch_size=2', '--block_size=16', '--rounds=1', '--round_s=0'], 100),
        Job('loader', 'loader', ['--device=cuda', '--seconds=0.5'], ['--device=cpu', '--seconds=0', '--block_size=64'], 60),
    ]


def jobs(baseline=''):
    """All jobs, the most important first."""
    return [*first_jobs(baseline), *second_jobs()]


def wanted(settings):
    """The jobs of `only`, in their order."""
    every = jobs(os.path.abspath(settings.baseline) if settings.baseline else '')
    known = [*GROUPS, *(job.name for job in every)]
    names = [name.strip() for name in settings.only.split(',')] if settings.only else GROUPS
    for name in names:
        if name not in known:
            more = '; nanogpt wants --baseline=FOLDER' * (name == 'nanogpt')
            raise UserError(f'only takes {", ".join(known)}, got {name!r}{more}', 'only')
    return [job for job in every if job.name in names or job.group in names]


def check(settings, part):
    """What can be refused before torch is imported; raises UserError."""
    if settings.baseline and not os.path.isfile(os.path.join(settings.baseline, 'model.py')):
        raise UserError(f'{settings.baseline!r} is no clone of nanoGPT: it lacks model.py', 'baseline')
    wanted(settings)


# ----------------------------------------------------------------------------------------------------
# running

def run(settings, part):
    """Run the jobs one after the other while there is time; with `list` only name them."""
    if settings.list:
        return {'part': 'gpu', 'plan': [{'job': job.name, 'part': job.part, 'group': job.group, 'seconds': job.seconds}
                                        for job in wanted(settings)]}
    from bench.modules import machine
    from reporting import hardware
    try:
        device = hardware.device(settings.device)
    except UserError:
        raise UserError('gpu measures on a CUDA GPU, and this machine has none; --device=cpu tries every job at a tiny size',
                        'device') from None
    begin, result = time.monotonic(), {'part': 'gpu', 'machine': machine(device), 'jobs': {}}

    def record(name, found):
        result['jobs'][name] = found
        result['seconds'], result['summary'] = time.monotonic() - begin, aims.summary(result['jobs'])
        keep(result, settings.json)
    with tempfile.TemporaryDirectory() as folder:
        for job in wanted(settings):
            left = 60 * settings.minutes - (time.monotonic() - begin)
            record(job.name, measure(job, settings.device, left, folder, record))
    return result


def measure(job, device, left, folder, record):
    """{'seconds', 'command', 'result'} of one job, 'error' beside or in place of the result.

    record: takes (name, what there is so far) whenever the job's own file has more.
    """
    if left < 10:
        return {'seconds': 0.0, 'error': 'no time was left'}
    print(f'bench.py: {job.name} ...', file=sys.stderr, flush=True)
    arguments, seen = job.tiny if device == 'cpu' else job.arguments, [None]
    path = os.path.join(folder, f'{job.name.replace(" ", "_")}.json')
    found = {'command': ' '.join(['bench.py', job.part, *arguments])}
    begin = time.monotonic()

    def look():
        changed = os.path.getmtime(path) if os.path.exists(path) else None
        if changed != seen[0]:
            seen[0] = changed
            record(job.name, {**found, 'seconds': time.monotonic() - begin, 'error': 'not done', **result_of(path)})
    limit = job.seconds * (3 if device == 'cpu' else 1)             # the seconds are those of a GPU
    done = timed([sys.executable, 'bench.py', job.part, *arguments, f'--json={path}'], timeout=min(limit, left), watch=look)
    error = {} if done['code'] == 0 else {'error': last_line(done)}
    there = result_of(path)
    return {**found, 'seconds': done['wall_s'], **there, **(error or ({} if there else {'error': 'no result was written'}))}


def result_of(path):
    """{'result'} of a file that a job has written, {} of none."""
    try:
        with open(path, encoding='utf-8') as file:
            return {'result': json.load(file)}
    except (OSError, ValueError):
        return {}


def text(result):
    """One line a job, the aims, then the other figures."""
    if 'plan' in result:
        return listing(result['plan'])
    lines = [['job', 's', 'what came of it']]
    for name, job in result['jobs'].items():
        cut = 'measured in part; ' * ('error' in job and 'result' in job)
        lines.append([name, f'{job["seconds"]:.0f}', cut + job.get('error', 'measured')])
    where = result['machine']['gpu'] or result['machine']['device']
    rest = {name: figure for name, figure in result['summary'].items() if name != 'aims'}
    return '\n\n'.join([f'{where}, torch {result["machine"]["torch"]}, {result["seconds"]:.0f} s', tables.aligned(lines),
                        aims.text(result['summary']['aims']), json.dumps(rest, indent=1)])


def listing(plan):
    """The jobs and the most that they may take."""
    lines, total = [['job', 'part', 'group', 'at most, s', 'so far, min']], 0
    for job in plan:
        total += job['seconds']
        lines.append([job['job'], job['part'], job['group'], str(job['seconds']), f'{total / 60:.1f}'])
    return tables.aligned(lines)
