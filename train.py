"""Train a GPT: `python train.py config/X.py [--key=value ...]`, or the same under torchrun on many GPUs or nodes.

Every setting is in configurator.py (`--help` lists them). Exit codes: 0 done, or stopped by a signal after saving; 2 a
user error in the configuration, data or checkpoint; 3 a loss that is not finite; 4 out of memory or disk.
A signal before the loop, when there is nothing to save, ends the program at once.
"""
import os
import signal
import sys
import time

import configurator
from commandline import ends
from reporting import outlets

STOP = {'signal': None, 'time': 0.0}
SIGNALS = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP


def on_signal(number, frame):
    """Request a stop at the next micro-step; a second request after half a second exits at once, without saving.

    (torchrun forwards a signal to ranks that already got it from the terminal: within half a second it is one request.)
    """
    if STOP['signal'] and time.monotonic() - STOP['time'] > 0.5:
        sys.stdout.isatty() and os.write(1, b'\n')      # below the bar
        os._exit(128 + number)
    if not STOP['signal']:
        STOP.update(signal=number, time=time.monotonic())


def listen(handler):
    """Signals go to handler; a SIGHUP that nohup has switched off stays off."""
    for number in SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


if __name__ == '__main__':                              # before torch: its import takes seconds
    ends.watch('train.py')
    listen(signal.SIG_DFL)                              # even in long calls of C, where no handler of Python would run
    outlets.lasting_streams()
    CONFIG = configurator.run_program('train.py')

import copy
import dataclasses
import hashlib
import math

import torch
import torch.distributed as dist

from checkpoints import checkpoint
from data.loader import Loader, Prefetcher, open_dataset
from growth import changes, dropin, guided, recovery
from optimizers import lookahead, optim, schedules
from reporting.runlog import RunLog
from training import contents, distill, outdir, parallel, precision, restart, startup, threads
from training.dryrun import dry_run, fit_memory
from training.evaluation import evaluate
from training.parallel import split_batch
from training.startup import build, check_shapes, choose_plans, choose_sizes, decomposition, padded, use_plans
from variants import UserError


def seed_for(config, step, micro_step):
    """Seed the randomness of one micro-step by (seed, step, global micro-step): dropout is independent of rank and past."""
    text = f'{config.seed}/{step}/{micro_step}'.encode()
    torch.manual_seed(int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), 'little') >> 1)


@dataclasses.dataclass
class Run:
    """The state of a training run."""
    config: object
    job: parallel.Job
    dataset: object
    loaders: dict                                       # 'train', 'val'
    model: torch.nn.Module                              # plain, or sharded in place
    fast: torch.nn.Module                               # the same compiled, or the same
    net: torch.nn.Module                                # the same under DDP, or `fast`
    optimizer: optim.Optimizers
    scaler: torch.amp.GradScaler
    average: optim.Average
    ahead: lookahead.LookAhead
    outliers: optim.Outliers
    rounds: schedules.Rounds
    progress: dict
    built: dict                                         # changes that growth/changes.py made to the model
    flops: int                                          # of training, per token
    teacher: object = None                              # distill.Teacher
    log: RunLog = None


def train_step(run, batches, step):
    """One optimizer step: {'loss', 'grad_norm', 'applied'}, or None if a signal interrupted it (nothing is changed)."""
    config, job, optimizer, scaler = run.config, run.job, run.optimizer, run.scaler
    per_rank, length, sums = run.rounds.count(step), schedules.block_size(step, config), {}
    for micro in range(per_rank):
        with run.log.part('data'):
            x, y = (t.view(-1, length).to(job.device, non_blocking=True)
                    for t in batches.batch(run.rounds.before(step) + micro))
        parallel.sync_gradients(run.net, micro == per_rank - 1)
        seed_for(config, step, micro * job.world_size + job.rank)
        with run.log.part('forward_backward'):
            soft = run.teacher and run.teacher(x)
            with job.autocast():
                _, loss = run.net(x, y, soft=soft)
            scaler.scale(loss / per_rank).backward()
            add_losses(sums, loss, run.model.measures)
        if micro < per_rank - 1 and job.agree(bool(STOP['signal'])):
            optimizer.zero_grad(set_to_none=True)
            return None
    with run.log.part('optimizer'), precision.widened(optimizer, job.half_weights, config.master_weights):
        parallel.mean_gradients(run.model, job)
        scaler.unscale_(optimizer)
        norm = optim.whole(torch.nn.utils.clip_grad_norm_(run.model.parameters(), config.grad_clip or math.inf))
        loss, apart, norm = arrived(sums, norm, per_rank, job)
        sound = math.isfinite(loss) and math.isfinite(norm)
        applied = sound and not run.outliers.check(loss=loss, grad_norm=norm)
        if applied:
            optimizer.step()                            # what unscale_ left infinite has no finite norm
            run.model.normalise_weights()
            run.average.update(step)
        scaler.update()                                 # after every unscale_: halves after an overflow, else counts a step
    optimizer.zero_grad(set_to_none=True)
    overflow = scaler.is_enabled() and math.isfinite(loss)          # handled by the scaler: no reason to stop the run
    label = apart.pop('label', None)                    # against a teacher the loss is another one
    kl = {'kl': apart.pop('kl')} if label is not None else {}
    return {'loss': loss - sum(apart.values()) if label is None else label, 'grad_norm': norm, 'applied': applied,
            'finite': sound or overflow, 'auxiliary': {**apart, **kl}}


def add_losses(sums, loss, measures):
    """Add one micro-step's loss to sums['loss'], and its auxiliary losses to {name: sum over blocks}, with a teacher the
    labels' loss and the divergence too."""
    losses = [('loss', loss.detach())] + [(kind, value) for (kind, _), value in measures.items()
                                          if kind.endswith('_loss') or kind in ('label', 'kl')]
    for name, value in losses:
        sums[name] = sums.get(name, 0.0) + value.double()


def arrived(sums, norm, per_rank, job):
    """(loss, {auxiliary loss: value}, gradient norm) as numbers, losses averaged over micro-steps and ranks.

    The only place in a step that synchronises with the device: one transfer, and one sum over the ranks, of all of them.
    """
    *totals, norm = torch.stack((*sums.values(), norm.double())).tolist()
    means = job.agree([total / per_rank for total in totals], dist.ReduceOp.SUM)
    loss, *others = (mean / job.world_size for mean in means)
    return loss, dict(zip(list(sums)[1:], others)), norm


def state_of(run, parts=False):
    """The content of a checkpoint. Sharded tensors are gathered, by all ranks; with parts they stay sharded."""
    gather = (lambda tensor: tensor) if parts else optim.whole
    return {'step': run.progress['step'], 'config': configurator.as_dict(run.config),
            'model': {name: gather(t) for name, t in run.model.state_dict(keep_vars=parts).items()},
            'optimizer': optim.state_by_name(run.optimizer, run.model, gather), 'scaler': run.scaler.state_dict(),
            'average': {name: gather(t) for name, t in run.average.state.items()},
            **({'ahead': {name: gather(t) for name, t in run.ahead.state.items()}} if run.ahead.state else {}),
            'outliers': run.outliers.state, 'built': copy.deepcopy(run.built), 'data': run.dataset.tokenizer,
            'data_digest': run.dataset.digest, 'torch': str(torch.__version__),
            **({'source': run.job.said} if run.job.said else {}), **({'teacher': run.teacher.digest} if run.teacher else {}),
            **{k: run.progress[k] for k in ('tokens', 'flops', 'seconds', 'best_val_loss', 'evaluated')}}


def save(run, last=False):
    """Write a checkpoint (rank 0; all, if sharded). A failed write warns, and only a failed last one is fatal."""
    group = run.job.control if run.config.sharded_checkpoints else None         # one rank alone has no parts
    state, progress, folder, failed = state_of(run, bool(group)), run.progress, run.config.out_dir, 0
    if run.job.main or group:
        try:
            checkpoint.save(folder, state, keep=run.config.keep_checkpoints, group=group)
        except (OSError, ValueError) as error:
            failed = 1
            if run.job.main:
                print(f'train.py: step {progress["step"]} was not saved: {error}', file=sys.stderr, flush=True)
    if run.job.main and not failed and progress['best_step'] == progress['step']:
        run.log.outlets.attempt('best.json', checkpoint.set_best, folder, progress['step'], progress['best_val_loss'])
    if run.job.agree(failed) and last:                  # the others wait for the writer
        raise SystemExit(4)


def announce(config, model, dataset, loader, job):
    """The first lines of a run: model, data set, tokens per step."""
    if config.gradient_accumulation_steps == 40 and 'gradient_accumulation_steps' not in config.sources:
        job.say("gradient_accumulation_steps is nanoGPT's default 40, as no config sets it: 40 micro-steps per step")
    if config.decay_lr and config.warmup_iters >= config.max_iters > 0:
        job.say(f'warmup_iters ({config.warmup_iters}) is not over at max_iters ({config.max_iters})')
    if config.loss == 'stablemax' and config.vocab_size > 1024:
        job.say(f'loss=stablemax with {config.vocab_size:,} tokens: a probability of 0.9 needs a logit near '
                f'{9 * config.vocab_size:,}; it is for vocabularies of a few hundred tokens')
    tokens = split_batch(config, job.world_size)[1] * loader.batch_size * config.block_size
    job.say(f'{model.num_params():,} parameters ({model.num_params(positions=False):,} without positions), '
            f'{dataset.folder}, {tokens:,} tokens per step, {job.world_size} x {job.device} in {job.dtype}')


def open_data(config, job):
    """The data set, verified; rank 0 first, so that a large one is read completely only once."""
    folder = os.path.join(config.data_dir, config.dataset)
    dataset = open_dataset(folder, job.say) if job.main else None
    job.agree(0)
    return dataset or open_dataset(folder, job.say)


def train(config, job, found=None):
    """A run after its set-up: data, model, training loop. found: what restart.read gave."""
    state = restart.state(config, job, found)
    if state and state is not found:
        config = startup.resumed(config, state)
    precision.check(config, job)
    for words in startup.remarks(config, state):
        job.say(words)
    if job.main and not state and not config.eval_only:
        restart.announce(config, job.say)
    if state:                                           # missing in older checkpoints
        state = {'average': {}, 'outliers': optim.Outliers(0).state, 'seconds': 0.0, 'flops': 0, **state}
        state['built'] = state.get('built') or changes.begin(config)
        state['built'].setdefault('drop', copy.deepcopy(dropin.IDLE))
    dataset = open_data(config, job)
    if state and state['data_digest'] != dataset.digest:
        raise UserError(f'{dataset.folder} is not the data that {config.out_dir} was trained on; '
                        f'to continue with other data use --init_from={config.out_dir} and a new out_dir')
    if not state and 'vocab_size' not in config.sources:
        config.vocab_size = padded(dataset.vocab_size)
    if config.init_from == 'scratch':
        choose_sizes(config, job)
    if config.init_from in ('scratch', 'resume'):
        fit_memory(config, check_shapes(config), job)
    lock = checkpoint.Lock(config.out_dir) if job.main and not config.eval_only else None
    try:
        model = build(config, dataset, state, job)
        choose_plans(config, job)
        threads.choose(config, model, job, fresh=not state)
        teacher = None if config.eval_only else distill.teacher(config, dataset, state, job)
        ways = outlets.Outlets(config, job.main, bool(state))       # what asks for a login does so before anything moves
        if lock and not state:
            restart.set_aside(config)
        run = assemble(config, model, dataset, state, job, ways, teacher)
        announce(config, model, dataset, run.loaders['train'], job)
        loop(run)
    finally:
        if lock:
            lock.release()


def assemble(config, model, dataset, state, job, ways, teacher=None):
    """Loaders, optimizer and wrappers around a model, restored from a checkpoint's state."""
    batch_size, accumulation = split_batch(config, job.world_size)
    loaders = {split: Loader(dataset, split, config.block_size, batch_size, job.world_size, job.world_size, config.seed)
               for split in ('train', 'val')}
    if state:
        changes.freeze(model, config, state['built'])
    changes.keep_trainable(model, config.trainable)
    flops = changes.training_flops(model)
    use_plans(model, config, job)
    model = parallel.shard(model, config, job)
    optimizer = optim.build(model, config, job.device.type, dist.group.WORLD if job.world_size > 1 else None)
    fast, net = parallel.wrap(model, config, job)
    progress = {'step': 0, 'tokens': 0, 'flops': 0, 'seconds': 0.0, 'best_val_loss': math.inf, 'best_step': None,
                'evaluated': None}
    with contents.taken_from(config.out_dir):
        average = optim.Average(model, config.ema_decay, state and state['average'])
        ahead = lookahead.LookAhead(model, config, state and state.get('ahead'))
    run = Run(config, job, dataset, loaders, model, fast, net, optimizer, precision.scaler(config, job), average, ahead,
              optim.Outliers(config.skip_zscore),
              schedules.Rounds(config, accumulation, job.world_size), progress,
              copy.deepcopy(state['built']) if state else changes.begin(config), flops, teacher)
    if state:
        with contents.taken_from(config.out_dir):
            optim.load_state_by_name(optimizer, model, state['optimizer'])
            run.scaler.load_state_dict(state['scaler'])
            run.outliers.state = state['outliers']
            progress.update({k: state[k] for k in ('step', 'tokens', 'flops', 'seconds', 'best_val_loss', 'evaluated')})
    job.data = dataset.digest
    run.log = RunLog(config, model, progress, job, ways)
    return run


def check_in(run):
    """At the start of a step: maybe evaluate, maybe save. Returns the reason to end the run here, or None."""
    config, progress, step = run.config, run.progress, run.progress['step']
    due = step % config.eval_interval == 0 or step == config.max_iters or config.eval_only
    due = due and (step > 0 or config.eval_first or config.eval_only)
    fresh, losses, better = progress['evaluated'] != step or config.eval_only, None, False
    if due and fresh:
        run.log.doing('evaluates')
        with run.log.part('eval'), run.average.swapped_in():
            losses = evaluate(run.model, run.fast, run.loaders, config, run.job)
    if losses:
        better = losses['val_loss'] < progress['best_val_loss']
        progress.update(evaluated=step)
        if better:
            progress.update(best_val_loss=losses['val_loss'], best_step=step)
        run.built['losses'] = [*run.built['losses'], losses['val_loss']][-4:]
        run.log.evaluation(step, losses)
    reached = losses and losses['val_loss'] <= config.target_val_loss
    stop = run.job.agree(STOP['signal'] or 0)
    ends = step >= config.max_iters or stop or reached
    wanted = (losses and (better or config.always_save_checkpoint) or
              config.save_interval and step % config.save_interval == 0)
    if not config.eval_only and (ends or wanted and step > 0):
        run.log.doing('saves')
        with run.log.part('save'):
            save(run, ends)
    if stop:
        return f'stopped by {signal.Signals(int(stop)).name} at step {step}'
    if reached:
        return run.log.reached(losses['val_loss'])
    return '' if ends or config.eval_only else None


def loop(run):
    """for every step: maybe evaluate, maybe save, train, log."""
    config, job, progress, skipped = run.config, run.job, run.progress, 0
    if __name__ == '__main__':
        listen(on_signal)
    ahead = config.prefetch if config.prefetch is not None else 2 * (job.device.type == 'cuda')
    with Prefetcher(run.loaders['train'], job.rank, ahead, job.device, run.rounds.before(config.max_iters)) as batches:
        while True:
            step = progress['step']
            if not config.eval_only:                    # which uses the window of the checkpoint
                run.model.set_progress(step / config.max_iters if config.max_iters else 1.0)
                guided.fade(run.model, config, step)
            words = check_in(run)
            if words is not None:
                return finish(run, words)
            action = changes.due(config, run.built, step)
            if action:
                run = changed(run, action)
                progress = run.progress
            dropin.watch(run, step)
            rate = schedules.learning_rate(step, config) * changes.warmth(config, run.built, step)
            optim.set_learning_rate(run.optimizer, rate)
            run.log.begin()
            run.ahead.move(step, rate / (config.learning_rate or 1))
            result = train_step(run, batches, step)
            run.ahead.settle(bool(result and result['applied']))
            if result is None:
                continue                                # a signal: the loop saves the start of this step
            skipped = 0 if result['finite'] else skipped + 1
            if skipped and (config.nonfinite == 'stop' or skipped == 5):
                give_up(run, result, rate)
            progress['step'] += 1
            rows = run.rounds.count(step) * job.world_size * run.loaders['train'].batch_size
            progress['tokens'] += rows * config.block_size
            progress['flops'] += rows * config.block_size * run.flops
            run.log.step(step, {**result, 'lr': rate, 'tokens': progress['tokens']})
            progress['seconds'] += run.log.seconds


def changed(run, action):
    """The run with another model, rebuilt from its state as a resumed run would be."""
    state, job, best = state_of(run), run.job, run.progress['best_step']
    torch.manual_seed(run.config.seed + state['step'])
    model = build(run.config, run.dataset, state, job)
    words, line = changes.change(action, model, run, state, decomposition(run.config, run.dataset, job))
    job.say(f'step {state["step"]}: {words}, {model.num_params():,} parameters')
    if run.fast is not run.model:
        torch.compiler.reset()                          # dynamo counts the versions of one forward, and gives up at 8
    run.log.leave()
    run = assemble(run.config, model, run.dataset, state, job, run.log.outlets, run.teacher)
    run.progress['best_step'] = best
    run.log.write({'step': state['step'], **line})
    return run


def finish(run, words):
    """The end of a run: its last line, plots and reports."""
    dropin.watch(run, run.progress['step'])
    run.log.close(words)
    if run.job.main and run.config.drop_in_report and not run.config.eval_only:
        run.log.outlets.attempt('drop_in', recovery.write, run.config.out_dir, None, run.config.figures)


def give_up(run, result, rate):
    """Leave with exit code 3: the loss or the gradient is not finite."""
    run.log.close('')
    step = run.progress['step']
    run.job.say(f'train.py: loss {result["loss"]}, gradient norm {result["grad_norm"]} at step {step} is not finite; lower'
                f' learning_rate (now {rate:.2g}) or resume from the last checkpoint')
    raise SystemExit(3)


def lost(config):
    """Leave with one line when a rank does not answer; the first of those that do prints it."""
    gone, rank = parallel.absent(), dist.get_rank()
    if rank == min({*range(dist.get_world_size())} - {*gone}):
        who = f'rank {", ".join(map(str, gone))} does' if gone else 'some rank does'
        print(f'train.py: {who} not answer for {config.dist_timeout} s (dist_timeout); the job ends, and goes on from the '
              'last checkpoint with --init_from=resume', file=sys.stderr, flush=True)
    os._exit(1)                                         # leaving the process group would wait for the lost rank


def main(config):
    """Run, and turn user errors and out-of-memory into one line and an exit code."""
    try:
        first = os.environ.get('RANK', '0') == '0'
        if first and not config.eval_only and not config.dry_run:
            outdir.check(config.out_dir)
        found = restart.read(config, quiet=not first)
        if isinstance(found, dict):                     # device, dtype and weights are a checkpoint's too
            config = startup.resumed(config, found)
        job = parallel.start(config)
        job.stop = STOP
        dry_run(config, job, found) if config.dry_run else train(config, job, found)
    except UserError as error:
        if config.debug:
            raise
        configurator.say_mistake('train.py', configurator.placed(config, error))
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if 'have a deterministic implementation' in str(error) and not config.debug:
            configurator.say_mistake('train.py', f'deterministic=True: {str(error).partition(" does not")[0]} has no '
                                     'deterministic form here; set deterministic=False')
        if dist.is_initialized() and 'imed out' in str(error) and not config.debug:
            lost(config)
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
