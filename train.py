"""Train a GPT: `python train.py config/X.py [--key=value ...]`, or the same under torchrun on many GPUs or nodes.

Every setting stands in configurator.py (`--help` lists them). Exit codes: 0 done, or stopped by a signal after
saving; 2 a mistake in the configuration, data or checkpoint; 3 a loss that is not finite; 4 out of memory or disk.
"""
import os
import signal
import sys
import time

import configurator

STOP = {'signal': None, 'time': 0.0}


def on_signal(number, frame):
    """Ask for a stop at the next micro-step; the same wish again after half a second leaves at once, without saving.

    (torchrun sends a signal on to ranks that had it from the terminal already: within half a second it is one wish.)
    """
    if STOP['signal'] and time.monotonic() - STOP['time'] > 0.5:
        os._exit(128 + number)
    if not STOP['signal']:
        STOP.update(signal=number, time=time.monotonic())


if __name__ == '__main__':                              # before torch: its import takes seconds
    for _number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(_number, on_signal)
    CONFIG = configurator.run_program('train.py')
    # waiting CPU threads sleep instead of spinning: 6 times faster on 2 busy cores, no slower on idle ones
    os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')

import hashlib
import math

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import checkpoint
import optim
import parallel
import precision
from data.loader import Loader, open_dataset
from dryrun import dry_run
from evaluation import evaluate
from parallel import split_batch
from runlog import RunLog
from startup import build, check_shapes, padded, resumed
from variants import UserError


def seed_for(config, step, micro_step):
    """Seed all randomness of one micro-step from (seed, step, global micro-step): dropout knows no rank and no history."""
    text = f'{config.seed}/{step}/{micro_step}'.encode()
    torch.manual_seed(int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), 'little') >> 1)


def train_step(raw, model, optimizer, scaler, loader, step, config, job):
    """One optimizer step: {'loss', 'grad_norm', 'applied'}, or None when a signal came in between (nothing is changed)."""
    per_rank, total = loader.accumulation // job.world_size, 0.0
    for micro in range(per_rank):
        x, y = (t.to(job.device, non_blocking=True) for t in loader.batch(step, micro, job.rank))
        if job.world_size > 1:
            model.require_backward_grad_sync = micro == per_rank - 1
        seed_for(config, step, micro * job.world_size + job.rank)
        with job.autocast():
            _, loss = model(x, y)
        scaler.scale(loss / per_rank).backward()
        total = total + loss.detach().double()
        if micro < per_rank - 1 and job.agree(bool(STOP['signal'])):
            optimizer.zero_grad(set_to_none=True)
            return None
    loss = job.agree(total.item() / per_rank, dist.ReduceOp.SUM) / job.world_size
    with precision.widened(optimizer, job.half_weights, config.master_weights):
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf).item()
        applied = math.isfinite(loss) and (math.isfinite(norm) or scaler.is_enabled())
        if applied:
            scaler.step(optimizer)                      # skips by itself where half precision overflowed
            scaler.update()
            raw.normalise_weights()
    optimizer.zero_grad(set_to_none=True)
    return {'loss': loss, 'grad_norm': norm, 'applied': applied}


def save(config, model, optimizer, scaler, dataset, progress, job, last=False):
    """Write a checkpoint (rank 0). A failed write warns and training goes on; only a failed last one is fatal."""
    if job.main:
        state = {'step': progress['step'], 'config': configurator.as_dict(config), 'model': model.state_dict(),
                 'optimizer': optim.state_by_name(optimizer, model), 'scaler': scaler.state_dict(),
                 'data': dataset.tokenizer, 'data_digest': dataset.digest, 'torch': str(torch.__version__),
                 **{k: progress[k] for k in ('tokens', 'best_val_loss', 'evaluated')}}
        try:
            checkpoint.save(config.out_dir, state, keep=config.keep_checkpoints)
            if progress['best_step'] == progress['step']:
                checkpoint.set_best(config.out_dir, progress['step'], progress['best_val_loss'])
        except (OSError, ValueError) as error:
            print(f'train.py: step {progress["step"]} was not saved: {error}', file=sys.stderr, flush=True)
            if last:
                raise SystemExit(4) from None
    job.agree(0)                                        # the others wait for the writer


def announce(config, model, dataset, loader, job):
    """The first lines of a run: what is trained, on what, and with how many tokens a step."""
    if config.gradient_accumulation_steps == 40 and 'gradient_accumulation_steps' not in config.sources:
        job.say("gradient_accumulation_steps is nanoGPT's default 40, as no config sets it: 40 micro-steps for every step")
    if config.decay_lr and config.warmup_iters >= config.max_iters > 0:
        job.say(f'warmup_iters ({config.warmup_iters}) is not over at max_iters ({config.max_iters})')
    tokens = loader.accumulation * loader.batch_size * config.block_size
    job.say(f'{model.num_params():,} parameters ({model.num_params(positions=False):,} without positions), '
            f'{dataset.folder}, {tokens:,} tokens a step, {job.world_size} x {job.device} in {job.dtype}')


def open_data(config, job):
    """The data set, checked; rank 0 first, so that a large one is read whole and remembered only once."""
    folder = os.path.join(config.data_dir, config.dataset)
    dataset = open_dataset(folder, job.say) if job.main else None
    job.agree(0)
    return dataset or open_dataset(folder, job.say)


def train(config, job):
    """Everything of a run but its set-up: data, model, the loop."""
    state = checkpoint.load(config.out_dir) if config.init_from == 'resume' else None
    config = resumed(config, state) if state else config
    dataset = open_data(config, job)
    if state and state['data_digest'] != dataset.digest:
        raise UserError(f'{dataset.folder} is not the data that {config.out_dir} was trained on; '
                        f'to go on with other data take --init_from={config.out_dir} and a new out_dir')
    if not state and 'vocab_size' not in config.sources:
        config.vocab_size = padded(dataset.vocab_size)
    if config.init_from in ('scratch', 'resume'):
        check_shapes(config)
    batch_size, accumulation = split_batch(config, job.world_size)
    loaders = {split: Loader(dataset, split, config.block_size, batch_size, accumulation, job.world_size, config.seed)
               for split in ('train', 'val')}
    lock = checkpoint.Lock(config.out_dir) if job.main and not config.eval_only else None
    try:
        model = build(config, dataset, state, job)
        if lock and not state:
            checkpoint.set_aside(config.out_dir)
        announce(config, model, dataset, loaders['train'], job)
        loop(config, model, dataset, loaders, state, job)
    finally:
        if lock:
            lock.release()


def loop(config, model, dataset, loaders, state, job):
    """for every step: maybe evaluate, maybe save, train, log."""
    optimizer = optim.adamw(model, config.weight_decay, config.learning_rate, (config.beta1, config.beta2),
                            job.device.type)
    if config.orthograd:
        optim.add_orthograd(optimizer, model)
    scaler = precision.scaler(config, job)
    progress = {'step': 0, 'tokens': 0, 'best_val_loss': math.inf, 'best_step': None, 'evaluated': None}
    if state:
        optim.load_state_by_name(optimizer, model, state['optimizer'])
        scaler.load_state_dict(state['scaler'])
        progress.update({k: state[k] for k in ('step', 'tokens', 'best_val_loss', 'evaluated')})
    compiled = config.compile if config.compile is not None else job.device.type == 'cuda'
    fast = torch.compile(model) if compiled else model
    net = fast
    if job.world_size > 1:
        net = DistributedDataParallel(fast, device_ids=[job.device] if job.device.type == 'cuda' else None)
    log = RunLog(config, model, progress, job)
    skipped = 0
    while True:
        step = progress['step']
        if not config.eval_only:                        # which takes the window of the checkpoint
            model.set_progress(step / config.max_iters if config.max_iters else 1.0)
        due = step % config.eval_interval == 0 or step == config.max_iters or config.eval_only
        fresh = progress['evaluated'] != step or config.eval_only
        losses = evaluate(model, fast, loaders, config, job) if due and fresh else None
        if losses:
            better = losses['val_loss'] < progress['best_val_loss']
            progress.update(evaluated=step)
            if better:
                progress.update(best_val_loss=losses['val_loss'], best_step=step)
            log.evaluation(step, losses)
        last = step >= config.max_iters
        wanted = (losses and (better or config.always_save_checkpoint) or
                  config.save_interval and step % config.save_interval == 0)
        stop = job.agree(STOP['signal'] or 0)
        if not config.eval_only and (last or stop or wanted and step > 0):
            save(config, model, optimizer, scaler, dataset, progress, job, last or stop)
        if last or stop or config.eval_only:
            log.close(f'stopped by {signal.Signals(int(stop)).name} at step {step}' if stop else '')
            return
        rate = optim.learning_rate(step, config)
        optim.set_learning_rate(optimizer, rate)
        log.begin()
        result = train_step(model, net, optimizer, scaler, loaders['train'], step, config, job)
        if result is None:
            continue                                    # a signal: the loop saves this step's beginning
        skipped = 0 if result['applied'] else skipped + 1
        if skipped and (config.nonfinite == 'stop' or skipped == 5):
            log.close('')
            job.say(f'train.py: loss {result["loss"]}, gradient norm {result["grad_norm"]} at step {step} is not finite; '
                    f'lower learning_rate (now {rate:.2g}) or resume from the last checkpoint')
            raise SystemExit(3)
        progress['step'] += 1
        progress['tokens'] += loaders['train'].accumulation * loaders['train'].batch_size * config.block_size
        log.step(step, {**result, 'lr': rate, 'tokens': progress['tokens']})


def main(config):
    """Run, and turn mistakes and full memory into one line and an exit code."""
    try:
        job = parallel.start(config)
        job.stop = STOP
        (dry_run if config.dry_run else train)(config, job)
    except UserError as error:
        if config.debug:
            raise
        configurator.say_mistake('train.py', configurator.placed(config, error))
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "can't allocate memory" not in str(error):
            raise
        print(f'train.py: out of memory; lower batch_size ({config.batch_size}) or block_size ({config.block_size}), '
              'and raise gradient_accumulation_steps instead', file=sys.stderr, flush=True)
        raise SystemExit(4) from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == '__main__':
    main(CONFIG)
