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

import dataclasses
import datetime
import hashlib
import math
import warnings

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import checkpoint
import hardware
import interop
import optim
from data.loader import Loader, open_dataset
from model import GPT
from runlog import RunLog
from variants import UserError


@dataclasses.dataclass
class Job:
    """This process's place among the ranks, and its device and precision."""
    rank: int
    world_size: int
    device: torch.device
    dtype: torch.dtype
    control: object = None                              # gloo group for small agreements that must not wait for a GPU

    @property
    def main(self):
        return self.rank == 0

    def agree(self, value, op=dist.ReduceOp.MAX):
        """The same number on every rank: the largest (or the sum) of all."""
        if self.world_size == 1:
            return value
        tensor = torch.tensor(float(value), dtype=torch.float64)
        dist.all_reduce(tensor, op, group=self.control)
        return tensor.item()

    def say(self, text):
        if self.main:
            print(text, flush=True)


def start(config):
    """Find rank, device and precision; join the process group under torchrun."""
    rank, world_size = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
    device = hardware.device(config.device, int(os.environ.get('LOCAL_RANK', 0)))
    job = Job(rank, world_size, device, hardware.dtype(config.dtype, device))
    if device.type == 'cuda':
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.fp32_precision = 'tf32'
        torch.backends.cudnn.conv.fp32_precision = 'tf32'
    if world_size > 1:
        timeout = datetime.timedelta(seconds=config.dist_timeout)
        backend = config.backend if device.type == 'cuda' else 'gloo'
        warnings.filterwarnings('ignore', message='Grad strides do not match')      # of factors with one term: harmless
        dist.init_process_group(backend, timeout=timeout)
        job.control = dist.new_group(backend='gloo', timeout=timeout)
    return job


def split_batch(config, world_size):
    """(sequences a micro-step, micro-steps of the whole job) for this many ranks, tokens a step unchanged.

    Accumulation counts the whole job, as in nanoGPT; where the ranks do not divide it, micro-steps get smaller instead.
    """
    accumulation, sequences = config.gradient_accumulation_steps, config.batch_size
    if accumulation % world_size == 0:
        return sequences, accumulation
    total = accumulation * sequences
    if total % world_size:
        raise UserError(f'{total} sequences a step (batch_size * gradient_accumulation_steps) do not divide over '
                        f'{world_size} ranks', 'gradient_accumulation_steps')
    micro = next(n for n in range(math.ceil(total / sequences / world_size), total + 1)
                 if total % (n * world_size) == 0) * world_size
    return total // micro, micro


def resumed(config, state):
    """The configuration of a resumed run: what was given now, else what the checkpoint holds; the model is its own."""
    model_keys = configurator.settings(configurator.GPTConfig)
    for name, value in state['config'].items():
        if name in ('init_from', 'out_dir', 'dry_run', 'eval_only', 'debug') or name not in configurator.as_dict(config):
            continue
        if name in model_keys and name not in ('dropout', 'vocab_size') and name in config.sources:
            if getattr(config, name) != value:
                raise UserError(f'{name} is {value!r} in the checkpoint of {config.out_dir}, got '
                                f'{getattr(config, name)!r}; drop it or start in another out_dir', name)
        elif name not in config.sources or name == 'vocab_size':
            setattr(config, name, value)
    return config


def padded(vocab_size):
    """Rows of the embedding: a large vocabulary is padded to a multiple of 64, which GPUs like (50257 -> 50304)."""
    return vocab_size if vocab_size <= 1024 else -(-vocab_size // 64) * 64


def check_shapes(config):
    """Build the model without memory, so that a spec that does not fit is said in one line before anything is touched."""
    with torch.device('meta'):
        model = GPT(configurator.model_config(config))
    leaks = [i for i, block in enumerate(model.transformer.h) if getattr(block.attn, 'leaks', False)]
    if leaks and not config.allow_leak:
        raise UserError(f'attention of block {leaks[0]} sees the future, so that its loss means nothing; take a causal '
                        'form, or --allow_leak=True for a negative control', 'attention')
    return model


def build(config, dataset, state, job):
    """The model on its device: from a checkpoint, from another model's weights, or from scratch."""
    torch.manual_seed(config.seed)
    if state is None and config.init_from != 'scratch':
        source_config, source, _ = interop.read_source(config.init_from)
        adopt(config, source_config)
        check_shapes(config)
        model = GPT(configurator.model_config(config))
        for row in interop.initialise(model, source_config, source, config.decompose):
            if row['spec'] != 'dense':
                job.say(f'{row["site"]}: {row["spec"]}, relative error {row["error"]:.3f}, norm kept {row["norm"]:.3f}')
    else:
        model = GPT(configurator.model_config(config))
        if state is not None:
            model.load_state_dict(state['model'])
    if dataset.vocab_size > config.vocab_size:
        raise UserError(f'{dataset.folder} has {dataset.vocab_size} tokens, the model {config.vocab_size}', 'dataset')
    return model.to(job.device)


def adopt(config, source):
    """Take the sizes of the model that init_from names, where they were not set; refuse sizes that contradict them."""
    for name in configurator.settings(configurator.GPTConfig):
        if name in ('dropout', 'linear', 'loss'):       # the new run's own
            continue
        theirs = getattr(source, name)
        if name == 'block_size':
            theirs = min(theirs, config.block_size)     # shorter is cropped
        if name in config.sources and name in ('n_layer', 'n_head', 'n_embd') and getattr(config, name) != theirs:
            raise UserError(f'{name} is {theirs} in {config.init_from}, got {getattr(config, name)}; drop it', name)
        if name not in config.sources or name == 'block_size':
            setattr(config, name, theirs)


def seed_for(config, step, micro_step):
    """Seed all randomness of one micro-step from (seed, step, global micro-step): dropout knows no rank and no history."""
    text = f'{config.seed}/{step}/{micro_step}'.encode()
    torch.manual_seed(int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), 'little') >> 1)


@torch.no_grad()
def mean_loss(model, fast, batches, job):
    """(mean loss a token, share of tokens guessed right) over all ranks' batches; full-size batches take the compiled model.

    None when asked to stop.
    """
    total, count, shape = torch.zeros(2, device=job.device, dtype=torch.float64), 0, None
    for x, y in batches:
        shape = shape or x.shape
        with hardware.autocast(job.device, job.dtype):
            logits, loss = (fast if x.shape == shape else model)(x.to(job.device), y.to(job.device))
        right = (logits.argmax(-1) == y.to(job.device)).sum()
        total += torch.stack((loss.double() * y.numel(), right.double()))
        count += y.numel()
        if job.world_size == 1 and STOP['signal']:
            return None
    sums = [job.agree(value, dist.ReduceOp.SUM) for value in (*total.tolist(), count)]
    return sums[0] / sums[2], sums[1] / sums[2]


def evaluate(model, fast, loaders, config, job):
    """{'train_loss', 'val_loss', 'train_accuracy', 'val_accuracy'}.

    eval_iters=0 takes the whole validation split in order, and 20 batches of training.
    """
    model.eval()
    losses, rows = {}, max(config.batch_size, 4096 // config.block_size)        # small windows: fewer, larger batches
    for split in ('train', 'val'):
        whole = split == 'val' and config.eval_iters == 0
        batches = (loaders[split].sequential(rows, rank=job.rank, world_size=job.world_size) if whole else
                   loaders[split].fixed(config.eval_iters or 20, split, rank=job.rank, world_size=job.world_size))
        losses[split] = mean_loss(model, fast, batches, job)
    model.train()
    if None in losses.values():
        return None
    return {f'{split}_{name}': value for i, name in enumerate(('loss', 'accuracy')) for split, value in (
        (split, pair[i]) for split, pair in losses.items())}


def train_step(raw, model, optimizer, scaler, loader, step, config, job):
    """One optimizer step: {'loss', 'grad_norm', 'applied'}, or None when a signal came in between (nothing is changed)."""
    per_rank, total = loader.accumulation // job.world_size, 0.0
    for micro in range(per_rank):
        x, y = (t.to(job.device, non_blocking=True) for t in loader.batch(step, micro, job.rank))
        if job.world_size > 1:
            model.require_backward_grad_sync = micro == per_rank - 1
        seed_for(config, step, micro * job.world_size + job.rank)
        with hardware.autocast(job.device, job.dtype):
            _, loss = model(x, y)
        scaler.scale(loss / per_rank).backward()
        total = total + loss.detach().double()
        if micro < per_rank - 1 and job.agree(bool(STOP['signal'])):
            optimizer.zero_grad(set_to_none=True)
            return None
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf).item()
    loss = job.agree(total.item() / per_rank, dist.ReduceOp.SUM) / job.world_size
    applied = math.isfinite(loss) and (math.isfinite(norm) or scaler.is_enabled())
    if applied:
        scaler.step(optimizer)                          # skips by itself where half precision overflowed
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


def dry_run(config, job):
    """Print the site table, parameters in three conventions, FLOPs a token and the memory to expect."""
    folder = os.path.join(config.data_dir, config.dataset)
    if 'vocab_size' not in config.sources and os.path.exists(os.path.join(folder, 'meta.json')):
        config.vocab_size = padded(open_dataset(folder, job.say).vocab_size)
    if config.init_from == 'resume':
        config = resumed(config, checkpoint.load(config.out_dir))
    elif config.init_from != 'scratch':
        adopt(config, interop.source_config(config.init_from))
    model = check_shapes(config)
    job.say(f'{"site":24}{"spec":36}{"out x in":>14}{"parameters":>14}{"FLOPs/token":>14}{"share":>8}')
    for row in model.site_table():
        shape = '{} x {}'.format(*row['shape'])
        job.say(f'{row["site"]:24}{row["spec"]:36}{shape:>14}{row["parameters"]:14,}{row["flops"]:14,}{row["share"]:8.2%}')
    embeddings = model.num_params(positions=False) - model.transformer.wte.weight.numel()
    job.say(f'parameters: {model.num_params():,} in all, {model.num_params(positions=False):,} without the position '
            f'table, {embeddings:,} without embeddings')
    job.say(f'FLOPs a token: {model.flops_per_token():,} forward, {3 * model.flops_per_token():,} training')
    job.say(f'memory: about {memory_estimate(model, config, job.dtype.itemsize) / 2**30:.2f} GiB a device (weights, '
            'gradients, AdamW, activations, logits)')


def memory_estimate(model, config, itemsize):
    """Bytes: 16 a parameter (weight, gradient, two moments), about 17 C activations a token and block, two fp32 logits."""
    tokens = config.batch_size * config.block_size
    activations = 17 * config.n_embd * tokens * config.n_layer * itemsize
    return 16 * model.num_params() + activations + 2 * 4 * tokens * config.vocab_size


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
    scaler = torch.amp.GradScaler(job.device.type, enabled=job.dtype == torch.float16)
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
        job = start(config)
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
