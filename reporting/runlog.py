"""The log of a run: config.json, env.json, log.jsonl, loss.png, a progress line, wandb, tensorboard."""
import contextlib
import functools
import json
import os
import sys
import time
from pathlib import Path

import torch

import configurator
from checkpoints.durable import DISK, write_whole
from reporting import hardware, live, losses
from reporting.outlets import Lines, Outlets, noted


def write_json(path, value):
    """Write the value as JSON; the file is replaced atomically."""
    write_whole(Path(path), json.dumps(value, indent=1).encode(), DISK)


NUMBERS = 'step', 'loss', 'train_loss', 'val_loss', 'tokens', 'flops', 'ms', 'tokens_per_s'     # in a line that has them


def read_log(path, bad=None):
    """The lines of a log.jsonl as dicts; a last line that a kill cut short is left out.

    bad: a list that gets the other lines that are no JSON objects with numbers where a run writes numbers, as bytes. What
    is no regular file has no lines.
    """
    lines, texts = [], []
    if os.path.isfile(path):
        with open(path, 'rb') as file:
            texts = file.read().split(b'\n')
    for number, text in enumerate(texts, 1):
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            value = None
        if isinstance(value, dict) and all(type(value.get(name, 0)) in (int, float) for name in NUMBERS):
            lines.append(value)
        elif text and number < len(texts) and bad is not None:
            bad.append(text)
    return lines


def rewind(path, step, evaluated):
    """Drop the lines that a resumed run will write again: steps from `step` on, evaluations after `evaluated`.

    Lines that are none of a run's go to <path>.damaged, with a warning. Raises OSError.
    """
    bad, kept = [], []
    for line in read_log(path, bad):
        if type(line.get('step')) not in (int, float):
            bad.append(json.dumps(line).encode())
        elif line['step'] < step or line['step'] == step == evaluated and 'val_loss' in line:
            kept.append(line)
    if bad:
        print(f'{path}: {len(bad)} damaged lines are set aside in {path}.damaged', file=sys.stderr, flush=True)
        with open(f'{path}.damaged', 'ab') as file:
            file.write(b''.join(text + b'\n' for text in bad))
    write_whole(Path(path), ''.join(json.dumps(line) + '\n' for line in kept).encode(), DISK)


@functools.cache
def peak_flops(device, dtype):
    """hardware.peak_flops, timed once per process: a run that changes its model opens a log each time."""
    return hardware.peak_flops(device, dtype)


class RunLog:
    """The log of one run; only rank 0 writes. Logging draws no random number, changes no training, and ends none."""

    def __init__(self, config, model, progress, job, outlets=None):
        self.outlets = outlets or Outlets(config, job.main)
        self.config, self.job, self.progress, self.started = config, job, progress, None
        self.parts, self.late, self.seconds = [], [], 0.0           # (name, begin, end) of this line and of the next
        self.flops, self.tokens = model.flops_per_token(), progress['tokens']
        self.peak = peak_flops(job.device, job.dtype) if job.main else 1.0
        self.sheet = hardware.data_sheet_flops(job.device, job.dtype)
        self.file = self.bar = None
        self.first_step, self.val = progress['step'], ''
        if job.main and not config.eval_only:
            self.open(model)
        if job.main and sys.stdout.isatty():
            self.bar = live.bar(config.max_iters, file=sys.stdout, form=live.FORMAT, initial=progress['step'])

    def open(self, model):
        """config.json, env.json and log.jsonl of a run that begins or goes on."""
        config, folder, attempt = self.config, self.config.out_dir, self.outlets.attempt
        attempt('out_dir', functools.partial(os.makedirs, folder, exist_ok=True))
        attempt('config.json', write_json, os.path.join(folder, 'config.json'), configurator.as_dict(config))
        facts = {'parameters': model.num_params(), 'flops_per_token': self.flops, 'data': self.job.data}
        place = os.path.join(folder, 'env.json')
        notes = {'from': self.job.source or noted(place, 'from'), 'wandb': self.outlets.wandb_id}
        facts |= {name: value for name, value in notes.items() if value}
        attempt('env.json', lambda: write_json(place, hardware.environment(self.job.device) | facts))
        path = os.path.join(folder, 'log.jsonl')
        attempt('log.jsonl', rewind, path, self.progress['step'], self.progress['evaluated'])
        self.file = Lines(path)

    def write(self, line):
        """One line to log.jsonl and the trackers."""
        if self.file:
            self.outlets.attempt('log.jsonl', self.file.write, line)
        self.outlets.track(line)

    def evaluation(self, step, losses):
        """An evaluation line: step, tokens and flops of training so far, losses, accuracies, expert_load."""
        if self.job.main:
            self.write({'step': step, 'tokens': self.progress['tokens'], 'flops': self.progress['flops'], **losses})
            self.val = f', val loss {losses["val_loss"]:.4f}'
            self.job.say(f'step {step}: train loss {losses["train_loss"]:.4f}{self.val}')

    def reached(self, val_loss):
        """Write target.json, the record of a run to target_val_loss; returns the message."""
        config, progress = self.config, self.progress
        if self.file:
            self.outlets.attempt('target.json', write_json, os.path.join(config.out_dir, 'target.json'), {
                'target_val_loss': config.target_val_loss, 'val_loss': val_loss, 'step': progress['step'],
                'tokens': progress['tokens'], 'training_seconds': progress['seconds'],
                'training_flops': 3 * self.flops * progress['tokens'], 'ranks': self.job.world_size, 'seed': config.seed,
                **hardware.environment(self.job.device)})
        return (f'target_val_loss {config.target_val_loss} reached at step {progress["step"]}: {progress["tokens"]:,} '
                f'tokens, {progress["seconds"]:.1f} s of training')

    @contextlib.contextmanager
    def part(self, name):
        """Time spent inside counts for `name` in the next line: data, forward_backward, optimizer, eval, save.

        On a GPU work is queued and nothing waits for it here: two events in the queue take the time. A step waits for its
        losses before the weight update, so its optimizer time is not known when its line is written: the next line has it.
        """
        begin = self.mark()
        yield
        late = name == 'optimizer' and self.job.device.type == 'cuda'
        (self.late if late else self.parts).append((name, begin, self.mark()))

    def mark(self):
        """Now: seconds, or on a GPU an event after the queued work."""
        if self.job.device.type != 'cuda':
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def spent(self):
        """{part_ms: milliseconds} of the parts of this line, which are then reset."""
        found = {}
        for name, begin, end in self.parts:
            took = 1e3 * (end - begin) if isinstance(end, float) else begin.elapsed_time(end)
            found[f'{name}_ms'] = found.get(f'{name}_ms', 0.0) + took
        self.parts = []
        return found

    def begin(self):
        """Start of a step: time between two steps, for evaluation and saving, counts for neither."""
        self.then, self.cpu_then = time.perf_counter(), time.process_time()
        self.parts = [part for part in self.parts if part[0] in ('eval', 'save')] + self.late
        self.late = []

    def step(self, step, result):
        """A training line: step, loss, lr, grad_norm, tokens, ms, cpu_ms, tokens_per_s, mfu, peak_memory, and parts.

        loss is that of the tokens alone; the auxiliary losses of mixtures are separate, under their names.

        cpu_ms is the CPU time of this rank: compare it on a machine that does other work too.
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
        self.tell(step, line, (now - self.started) / max(1, step - self.first_step) * (self.config.max_iters - step - 1))

    def tell(self, step, line, left):
        """A training line for people: on a terminal the bar's, else 20 of the run. left: seconds to the end."""
        later = step > self.first_step                  # the first step tells nothing about the time
        if self.bar is not None:
            words = f'loss {line["loss"]:.4f}{self.val}, {line["tokens_per_s"]:,.0f} tokens/s'
            self.bar.set_postfix_str(words + f', {live.clock(left)} left' * later, refresh=False)
            self.bar.update(step + 1 - self.bar.n)
        elif not later or step % max(1, self.config.max_iters // 20) == 0:
            print(f'iter {step}: loss {line["loss"]:.4f}, {line["ms"]:.0f} ms, {line["tokens_per_s"]:,.0f} tokens/s, '
                  f'mfu {line["mfu"]:.0%}' + f', {left:.0f} s left' * later, flush=True)

    def doing(self, words):
        """The bar says why it stands still."""
        if self.bar is not None:
            self.bar.set_postfix_str(words)

    def leave(self):
        """Close the files for another RunLog that continues."""
        for thing in (self.bar, self.file):
            if thing is not None:
                thing.close()

    def close(self, words):
        """Close the files, draw loss.png if there are losses, and say where it is and why the run ends."""
        if self.bar is not None:
            self.bar.close()
        if self.file:
            self.file.close()
            if self.progress['step'] or self.progress['evaluated'] is not None:         # there are losses
                self.draw()
        if words:
            self.job.say(words)
        self.outlets.close()

    def draw(self):
        folder = self.config.out_dir
        self.outlets.attempt('loss.png', lambda: losses.draw(folder, read_log(os.path.join(folder, 'log.jsonl')),
                                                             self.config.figures))
        if 'loss.png' not in self.outlets.warned:
            self.job.say(f'loss curves: {os.path.join(folder, "loss.png")}')
