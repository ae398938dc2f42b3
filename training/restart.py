"""The checkpoint to resume from: none, that of --init_from=resume, or that of the run which torchrun restarts.

With --max-restarts torchrun starts all ranks again, with the same arguments, when one of them died. They must resume from
the checkpoints of their own launch, and a first start must not use earlier ones in out_dir. So a launch writes its name to
out_dir/.launch when it has moved an earlier run aside.
"""
import dataclasses
import os
from pathlib import Path

import torch.distributed as dist

from checkpoints import checkpoint
from checkpoints.durable import DISK, write_whole
from training import outdir
from variants import UserError

MARK = '.launch'


def launch():
    """The name of this torchrun launch, the same after its restarts; '' without torchrun.

    Its --rdzv_id. On one node also the process id of torchrun, as the rdzv id is 'none' there unless one is given.
    """
    if 'TORCHELASTIC_RUN_ID' not in os.environ:
        return ''
    alone = os.environ.get('LOCAL_WORLD_SIZE') == os.environ.get('WORLD_SIZE')
    return f'{os.environ["TORCHELASTIC_RUN_ID"]} {os.getppid() if alone else ""}'


def begun(config):
    """Whether the run in out_dir is from this launch."""
    mark = Path(config.out_dir, MARK)
    return bool(launch()) and mark.is_file() and mark.read_text(encoding='utf-8', errors='replace') == launch()


def read(config, quiet=False):
    """With --init_from=resume the state in out_dir, before there is a process group; a UserError for what is wrong."""
    if config.init_from != 'resume':
        return None
    try:
        return checkpoint.load(config.out_dir, quiet=quiet)
    except UserError as error:
        return error


def state(config, job, found=None):
    """The state to resume from, the same on all ranks, or None; raises UserError when it cannot be read.

    found: what read() gave.

    A restart before the first checkpoint starts from scratch. Every rank reads out_dir: on several nodes it must be
    one folder visible to all of them, else the ranks would resume from different steps.
    """
    restarts = job.agree(int(os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)))      # only a failed agent counts its own
    if not restarts and job.main and begun(config) and not config.eval_only:        # an earlier launch of the same name
        Path(config.out_dir, MARK).unlink()
    again = restarts and job.agree(bool(job.main and begun(config) and checkpoint.steps(config.out_dir)))
    if config.init_from != 'resume' and not again:
        return None
    found = found or read(dataclasses.replace(config, init_from='resume'), quiet=not job.main)
    wrong = isinstance(found, UserError)
    step = -1 if wrong else found['step']
    if job.agree(step, dist.ReduceOp.MIN) != job.agree(step):
        raise UserError(f'{config.out_dir} has another newest checkpoint on some ranks; it must be one folder that all '
                        'nodes see', 'out_dir')
    if wrong:
        raise found
    if again:
        job.say(f'restarted by torchrun: resuming from step {step}')
    return found


def announce(config, say):
    """The first line of a fresh run in a used folder; see outdir.announce."""
    if not begun(config):
        outdir.announce(config.out_dir, say)


def set_aside(config):
    """Move an earlier run's files away, but not those of this launch; then write the launch's name."""
    if begun(config):
        return
    try:
        checkpoint.set_aside(config.out_dir)
        if launch():
            write_whole(Path(config.out_dir, MARK), launch().encode(), DISK)
    except OSError as error:
        raise UserError(f'the earlier run in {config.out_dir} could not be set aside: {error.strerror or error}; nothing '
                        'of it is lost', 'out_dir') from None
