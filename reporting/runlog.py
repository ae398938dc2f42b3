"""What a run writes and shows: config.json, env.json, log.jsonl, loss.png, a progress line, wandb, tensorboard."""
import contextlib
import functools
import json
import os
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

import configurator
from checkpoints.durable import DISK, write_whole
from reporting import hardware


def write_json(path, value):
    """The value as JSON in a file that is old or new, never half."""
    write_whole(Path(path), json.dumps(value, indent=1).encode(), DISK)


def read_log(path):
    """The lines of a log.jsonl as dicts; a last line that a kill cut short is left out."""
    lines = []
    if os.path.exists(path):
        with open(path, encoding='utf-8') as file:
            for text in file:
                try:
                    lines.append(json.loads(text))
                except ValueError:
                    continue
    return lines


def rewind(path, step, evaluated):
    """Drop the lines that a resumed run will write again: steps from `step` on, evaluations after `evaluated`."""
    kept = [line for line in read_log(path)
            if line['step'] < step or line['step'] == step == evaluated and 'val_loss' in line]
    write_whole(Path(path), ''.join(json.dumps(line) + '\n' for line in kept).encode(), DISK)


def draw(folder):
    """loss.png from log.jsonl: training loss per step, training and validation loss at evaluations."""
    from matplotlib.figure import Figure  # without pyplot, which takes longer to import
    lines = read_log(os.path.join(folder, 'log.jsonl'))
    steps = [line for line in lines if 'loss' in line]
    evals = [line for line in lines if 'val_loss' in line]
    figure = Figure(figsize=(7, 4))
    axes = figure.subplots()
    axes.plot([s['step'] for s in steps], [s['loss'] for s in steps], color='0.75', linewidth=0.8, label='training step')
    for name, style in (('train_loss', 'o--'), ('val_loss', 'o-')):
        axes.plot([e['step'] for e in evals], [e[name] for e in evals], style, markersize=3, label=name.replace('_', ' '))
    axes.set(xlabel='step', ylabel='loss, nats per token', title=os.path.basename(os.path.normpath(folder)))
    axes.legend()
    figure.tight_layout()
    figure.savefig(os.path.join(folder, 'loss.png'), dpi=120)


@functools.cache
def peak_flops(device, dtype):
    """hardware.peak_flops, timed once a process: a run that changes its model opens a log each time."""
    return hardware.peak_flops(device, dtype)


class RunLog:
    """The log of one run; only rank 0 writes. Logging draws no random number and changes no state of training."""

    def __init__(self, config, model, progress, job):
        self.config, self.job, self.progress, self.started = config, job, progress, None
        self.parts, self.late, self.seconds = [], [], 0.0           # (name, begin, end) of this line and of the next
        self.flops, self.tokens = model.flops_per_token(), progress['tokens']
        self.peak = peak_flops(job.device, job.dtype) if job.main else 1.0
        self.sheet = hardware.data_sheet_flops(job.device, job.dtype)
        self.file = self.bar = self.wandb = self.board = None
        self.first_step = progress['step']
        if job.main and not config.eval_only:
            os.makedirs(config.out_dir, exist_ok=True)
            write_json(os.path.join(config.out_dir, 'config.json'), configurator.as_dict(config))
            model_facts = {'parameters': model.num_params(), 'flops_per_token': self.flops}
            write_json(os.path.join(config.out_dir, 'env.json'), hardware.environment(job.device) | model_facts)
            path = os.path.join(config.out_dir, 'log.jsonl')
            rewind(path, progress['step'], progress['evaluated'])
            self.file = open(path, 'a', encoding='utf-8')
            self.open_trackers()
        if job.main and sys.stdout.isatty():
            self.bar = tqdm(total=config.max_iters, initial=progress['step'], unit='step', dynamic_ncols=True)

    def open_trackers(self):
        """wandb and tensorboard where asked for; one warning each when they are not installed."""
        if self.config.wandb_log:
            try:
                import wandb
                self.wandb = wandb.init(project=self.config.wandb_project, name=self.config.wandb_run_name,
                                        config=configurator.as_dict(self.config))
            except ImportError:
                print('wandb_log: wandb is not installed (pip install wandb); the run goes on without it', file=sys.stderr)
        if self.config.tensorboard_log:
            try:
                from torch.utils.tensorboard import SummaryWriter
                self.board = SummaryWriter(os.path.join(self.config.out_dir, 'tensorboard'))
            except ImportError:
                print('tensorboard_log: tensorboard is not installed (pip install tensorboard); the run goes on '
                      'without it', file=sys.stderr)

    def write(self, line):
        """One line to log.jsonl and the trackers."""
        if self.file:
            self.file.write(json.dumps(line) + '\n')
            self.file.flush()
        if self.wandb:
            self.wandb.log(line, step=line['step'])
        if self.board:
            for name, value in line.items():
                if isinstance(value, (int, float)):
                    self.board.add_scalar(name, value, line['step'])

    def show(self, text):
        if self.bar is not None:
            self.bar.write(text)
        elif self.job.main:
            print(text, flush=True)

    def evaluation(self, step, losses):
        """An evaluation line: step, tokens and flops of training so far, losses, accuracies, expert_load."""
        if self.job.main:
            self.write({'step': step, 'tokens': self.progress['tokens'], 'flops': self.progress['flops'], **losses})
            self.show(f'step {step}: train loss {losses["train_loss"]:.4f}, val loss {losses["val_loss"]:.4f}')

    def reached(self, val_loss):
        """Write target.json, the record of a run to target_val_loss; returns the words that say it."""
        config, progress = self.config, self.progress
        if self.file:
            write_json(os.path.join(config.out_dir, 'target.json'), {
                'target_val_loss': config.target_val_loss, 'val_loss': val_loss, 'step': progress['step'],
                'tokens': progress['tokens'], 'training_seconds': progress['seconds'],
                'training_flops': 3 * self.flops * progress['tokens'], 'ranks': self.job.world_size, 'seed': config.seed,
                **hardware.environment(self.job.device)})
        return (f'target_val_loss {config.target_val_loss} reached at step {progress["step"]}: {progress["tokens"]:,} '
                f'tokens, {progress["seconds"]:.1f} s of training')

    @contextlib.contextmanager
    def part(self, name):
        """Time spent inside counts for `name` in the next line: data, forward_backward, optimizer, eval, save.

        On a GPU work is queued, and nothing waits for it here: two events in the queue take the time. A step waits for its
        losses before it moves the weights, so that its optimizer is not over when its line is written: the next line has it.
        """
        begin = self.mark()
        yield
        late = name == 'optimizer' and self.job.device.type == 'cuda'
        (self.late if late else self.parts).append((name, begin, self.mark()))

    def mark(self):
        """Now: seconds, or on a GPU an event behind the work that is queued."""
        if self.job.device.type != 'cuda':
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def spent(self):
        """{part_ms: milliseconds} of the parts that this line is about, which are forgotten."""
        found = {}
        for name, begin, end in self.parts:
            took = 1e3 * (end - begin) if isinstance(end, float) else begin.elapsed_time(end)
            found[f'{name}_ms'] = found.get(f'{name}_ms', 0.0) + took
        self.parts = []
        return found

    def begin(self):
        """A step begins: what lies between two steps, evaluation and saving, counts for neither."""
        self.then, self.cpu_then = time.perf_counter(), time.process_time()
        self.parts = [part for part in self.parts if part[0] in ('eval', 'save')] + self.late
        self.late = []

    def step(self, step, result):
        """A training line: step, loss, lr, grad_norm, tokens, ms, cpu_ms, tokens_per_s, mfu, peak_memory, and parts.

        loss is that of the tokens alone; the auxiliary losses of mixtures stand beside it under their names.

        cpu_ms is the processor time of this rank: what to compare on a machine that does other work too.
        """
        now = time.perf_counter()
        seconds, cpu = now - self.then, time.process_time() - self.cpu_then
        self.seconds = seconds
        self.started = self.started or now                  # the first step is slower than the others: not in the ETA
        done, self.tokens = result['tokens'] - self.tokens, result['tokens']
        if not self.job.main or step % self.config.log_interval:
            return
        line = {'step': step, 'loss': result['loss'], 'lr': result['lr'], 'grad_norm': result['grad_norm'],
                'tokens': result['tokens'], 'ms': seconds * 1e3, 'cpu_ms': cpu * 1e3, 'tokens_per_s': done / seconds,
                'mfu': 3 * self.flops * done / seconds / self.peak / self.job.world_size,
                'peak_memory': hardware.peak_memory(self.job.device)}
        line.update(result['auxiliary'])                    # balance_loss, z_loss: not in loss
        if self.sheet:
            line['mfu_data_sheet'] = line['mfu'] * self.peak / self.sheet
        line.update(self.spent())
        if not result['applied']:
            line['skipped'] = True
        self.write(line)
        text = f'loss {line["loss"]:.4f}, {line["ms"]:.0f} ms, {line["tokens_per_s"]:,.0f} tokens/s, mfu {line["mfu"]:.0%}'
        if self.bar is not None:
            self.bar.update(step + 1 - self.bar.n)
            self.bar.set_postfix_str(text)
        elif step == self.first_step or step % max(1, self.config.max_iters // 20) == 0:
            left = (now - self.started) / max(1, step - self.first_step) * (self.config.max_iters - step - 1)
            print(f'iter {step}: {text}' + f', {left:.0f} s left' * (step > self.first_step), flush=True)

    def leave(self):
        """Close the files for another RunLog that goes on."""
        for thing in (self.bar, self.file, self.board):
            if thing is not None:
                thing.close()

    def close(self, words):
        """Close the files, draw loss.png, and say why the run ends."""
        if self.bar is not None:
            self.bar.close()
        if words:
            print(words, flush=True) if self.job.main else None
        if self.file:
            self.file.close()
            draw(self.config.out_dir)
        if self.wandb:
            self.wandb.finish()
        if self.board:
            self.board.close()
