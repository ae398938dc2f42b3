"""Part ranks: train.py on several ranks that share one device, over gloo; the same resumed half way; and one rank.

    python bench.py ranks --config=config/train_gpt_windows.py --device=cuda:0 --ranks=2

NCCL refuses two ranks on one GPU and gloo does not, so that DDP can be tried where there is one GPU. On random tokens; all
three are the same optimisation, so their validation losses agree within `tolerance`, a share. The file of --json is written
after every run.
"""
import os
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from bench import Output, tables
from bench.step import chosen, random_data
from configurator import Config, key
from variants import UserError


@dataclass
class Settings(Output, Config):
    """What is trained, on how many ranks; every setting of train.py besides."""
    config: str = key('', 'config file of what is trained')
    ranks: int = key(2, 'ranks that share the device', low=2)
    steps: int = key(20, 'steps of a run; the checkpoint to resume from is in the middle', low=2)
    tolerance: float = key(0.01, 'relative difference allowed between validation losses', low=0)
    vocabulary: int = key(1024, 'of the random tokens', low=2)
    threads: int = key(1, 'torch threads of a rank on a CPU', low=1)
    limit: float = key(120.0, 'seconds that a run may take', low=1)


OWN = ('config', 'ranks', 'steps', 'tolerance', 'vocabulary', 'threads', 'limit', 'json', 'debug')
FORCED = ('dataset', 'data_dir', 'out_dir', 'max_iters', 'lr_decay_iters', 'eval_interval', 'init_from', 'backend')


def check(settings, part):
    """Refuse bad settings before torch is imported; raises UserError."""
    if not settings.config:
        raise UserError('name what is trained: --config=config/X.py', 'config')
    for name in FORCED:
        if str(settings.sources.get(name, '')).startswith('--'):
            raise UserError(f'{name} is set by this part itself; drop it', name)
    chosen(settings)


def run(settings, part):
    """The three runs."""
    from bench.modules import machine
    from bench.processes import keep
    from reporting import hardware
    result = {'part': 'ranks', 'config': settings.config, 'ranks': settings.ranks, 'rows': [],
              'machine': machine(hardware.device(settings.device))}
    with tempfile.TemporaryDirectory() as folder:
        random_data(os.path.join(folder, 'random'), settings.vocabulary, chosen(settings).block_size)
        most = settings.ranks
        for name, count, resume in (('together', most, False), ('resumed', most, True), ('one', 1, False)):
            result['rows'].append({'name': name, 'ranks': count, **train(settings, count, resume, folder)})
            result['failed'] = failed(result['rows'], settings.tolerance)
            keep(result, settings.json)
    return result


def train(settings, count, resume, folder):
    """One run: {'s', 'from', 'kept', 'loss', 'val_loss', 'ms', 'tokens_per_s'}, or {'s', 'error'}.

    resume: without the last checkpoint of the previous run, so that it resumes from the middle.
    """
    from bench.processes import last_line, read_log, timed
    out, half = os.path.join(folder, f'out{count}'), settings.steps // 2
    before = read_log(out)[0] if resume and os.path.isdir(out) else []
    for path in Path(out).glob(f'ckpt_{settings.steps:08d}*') if resume else ():
        path.unlink()
    given = [f'--{name}={getattr(settings, name)}' for name in settings.sources if name not in OWN]
    launch = [] if count == 1 else ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={count}']
    done = timed([sys.executable, *launch, 'train.py', os.path.abspath(settings.config), *given, f'--data_dir={folder}',
                  '--dataset=random', f'--out_dir={out}', '--backend=gloo', f'--max_iters={settings.steps}',
                  f'--lr_decay_iters={settings.steps}', f'--eval_interval={half}', '--log_interval=1',
                  f'--init_from={"resume" if resume else "scratch"}'], threads=settings.threads, timeout=settings.limit)
    if done['code'] != 0:
        return {'s': done['wall_s'], 'error': last_line(done)}
    steps, evaluations = read_log(out)
    return {'s': done['wall_s'], 'from': half if resume else 0, 'loss': steps[-1]['loss'],
            'val_loss': evaluations[-1]['val_loss'],
            'kept': sum(old == new for old, new in zip(before, steps)),         # steps that were not repeated
            **{name: statistics.median(line[name] for line in steps[len(steps) // 2:]) for name in ('ms', 'tokens_per_s')}}


def failed(rows, tolerance):
    """The runs that ended with an error or another loss than the first, and a resumed run that began at another step."""
    expected = rows[0].get('val_loss', 0.0)
    return [row['name'] for row in rows if 'error' in row or row['kept'] != row['from'] or
            not abs(row['val_loss'] - expected) <= tolerance * abs(expected)]


def text(result):
    """One line per run."""
    lines = [['run', 'ranks', 's', 'ms per step', 'tokens/s', 'loss', 'validation loss']]
    for row in result['rows']:
        cells = [f'{row["ms"]:.4g}', f'{row["tokens_per_s"]:,.0f}', f'{row["loss"]:.4f}', f'{row["val_loss"]:.4f}'] if (
            'ms' in row) else ['', '', '', row['error']]
        lines.append([row['name'], str(row['ranks']), f'{row["s"]:.1f}', *cells])
    where = result['machine']['gpu'] or result['machine']['device']
    words = f'not the same: {", ".join(result["failed"])}' if result['failed'] else 'the losses agree'
    return f'{result["config"]} on {where} over gloo, random tokens\n\n{tables.aligned(lines)}\n\n{words}'
