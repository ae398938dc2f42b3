"""The train step of a Config in one process, whole and in parts, as bench/step.py measures it."""
import dataclasses
import statistics

import torch

from bench.training import step_memory, stopwatch
from data.loader import Loader, Prefetcher
from optimizers import optim
from training import parallel, precision
from training.startup import build, check_shapes, choose_plans, padded, use_plans

PARTS = ('data', 'forward', 'backward', 'optimizer')


class Steps:
    """Model, optimizer and loader as train.py makes them; a step is one micro-step and one optimizer step."""

    def __init__(self, config, job, dataset, progress):
        self.config = config = dataclasses.replace(config)
        if 'vocab_size' not in config.sources:
            config.vocab_size = padded(dataset.vocab_size)
        check_shapes(config)
        self.job, self.rows = job, parallel.split_batch(config, 1)
        self.accumulation, self.tokens = self.rows[1], self.rows[0] * self.rows[1] * config.block_size
        self.model = build(config, dataset, None, job)
        choose_plans(config, job, say=lambda words: None)
        use_plans(self.model, config, job)
        self.model.train().set_progress(progress)
        self.optimizer = optim.build(self.model, config, job.device.type)
        self.net = parallel.wrap(self.model, config, job)[0]
        self.compiled = self.net is not self.model
        self.scaler = precision.scaler(config, job)
        self.loader = Loader(dataset, 'train', config.block_size, config.batch_size, seed=config.seed)
        self.number, self.now = 0, stopwatch(job.device)

    def load(self, batches):
        self.number += 1
        return (t.to(self.job.device, non_blocking=True) for t in batches.batch(self.number))

    def forward(self, x, y):
        with self.job.autocast():
            return self.net(x, y)[1]

    def update(self):
        """The part of a step after the last backward pass, as in train.py."""
        with precision.widened(self.optimizer, self.job.half_weights, self.config.master_weights):
            self.scaler.unscale_(self.optimizer)
            if self.config.grad_clip:
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.model.normalise_weights()
        self.optimizer.zero_grad(set_to_none=True)

    def split(self, batches):
        """{part: ms} of one step, with a wait for the device after each part."""
        times = [self.now()]
        x, y = self.load(batches)
        times.append(self.now())
        loss = self.forward(x, y)
        times.append(self.now())
        self.scaler.scale(loss).backward()
        times.append(self.now())
        self.update()
        times.append(self.now())
        return {name: 1e3 * (end - begin) for name, begin, end in zip(PARTS, times, times[1:])}

    def whole(self, batches, micro_steps=2):
        """ms of `micro_steps` micro-steps and one optimizer step, without waits in between."""
        begin = self.now()
        for _ in range(micro_steps):
            x, y = self.load(batches)
            self.scaler.scale(self.forward(x, y)).backward()
        self.update()
        return 1e3 * (self.now() - begin)

    def measure(self, rounds):
        """{'ms' of a whole step, 'parts': {part: ms of a whole step}, 'shares' of their sum, 'first_s'}, medians.

        With consecutive micro-steps the loader's thread works while the device does, as in train.py.
        """
        config, begin = self.config, self.now()
        ahead = config.prefetch if config.prefetch is not None else 2 * (self.job.device.type == 'cuda')
        micro = min(2, self.accumulation)
        with Prefetcher(self.loader, 0, ahead, self.job.device) as batches:
            self.split(batches)                         # compiles, and creates the optimizer's state
            first = self.now() - begin
            self.whole(batches, micro)
            taken = [(self.split(batches), self.whole(batches, micro)) for _ in range(rounds)]
        parts = {name: statistics.median(split[name] for split, _ in taken) for name in PARTS}
        parts = {name: ms * (1 if name == 'optimizer' else self.accumulation) for name, ms in parts.items()}
        whole, more = statistics.median(ms for _, ms in taken), (self.accumulation - micro) / micro
        ms = whole + more * max(0.0, whole - parts['optimizer'])
        total = sum(parts.values())
        return {'ms': ms, 'parts': parts, 'shares': {name: part / total for name, part in parts.items()}, 'first_s': first}

    def memory(self):
        """Peak bytes of a step; None where torch.compile hides them on a CPU."""
        if self.compiled and self.job.device.type == 'cpu':
            return None
        x, y = (t.to(self.job.device) for t in self.loader.batch(0))

        def step():
            self.scaler.scale(self.forward(x, y)).backward()
            self.update()
        return step_memory(step, self.model, self.optimizer, self.job.device)

    def forward_shares(self, rounds):
        """Share of a forward pass, not compiled, by hooks: attention, MLP, head and loss, the rest (embedding, norms).

        Of at most 8 sequences, as much more would be kept than by the compiled step.
        """
        x, y = (t[:8].to(self.job.device) for t in self.loader.batch(0))
        spent, hooks = {'attention': 0.0, 'mlp': 0.0, 'head and loss': 0.0}, []
        marks = {}

        def before(name):
            return lambda *call: marks.update({name: self.now()})

        def after(name):
            return lambda *call: spent.update({name: spent[name] + self.now() - marks[name]})
        for block in self.model.transformer.h:
            for name, module in (('attention', block.attn), ('mlp', block.mlp)):
                hooks += [module.register_forward_pre_hook(before(name)), module.register_forward_hook(after(name))]
        hooks.append(self.model.transformer.ln_f.register_forward_hook(before('head and loss')))
        begin = self.now()
        for _ in range(rounds):
            with self.job.autocast():
                self.model(x, y)
            after('head and loss')()
        total = self.now() - begin
        for hook in hooks:
            hook.remove()
        return {**{name: s / total for name, s in spent.items()}, 'rest': 1 - sum(spent.values()) / total}
