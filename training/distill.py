"""The teacher of a run: a model whose predictions of each batch the loss compares with, docs/compression.md."""
import os

import torch

import configurator
from checkpoints.digest import of_tensors
from data import identity
from decomposition import initialise
from decomposition.sites import runnable
from layers.distillation import Soft, likeliest
from training import parallel, precision
from variants import UserError

ROWS = 1024                             # tokens whose logits exist at a time for the likeliest, without loss_chunk


class Teacher:
    """A model in eval mode, without gradients, in the run's precision; not a part of the run's state.

    model: a GPT on the job's device; digest: of its settings and weights. Cost per step: a forward pass, and with top_k
    its head. Memory: its weights; per micro-step (tokens, top_k + 1) numbers and as many ids, or (tokens, C).
    """

    def __init__(self, model, digest, config, job):
        self.model, self.digest, self.job, self.chunk = model.eval().requires_grad_(False), digest, job, config.loss_chunk
        rows = config.vocab_size if config.vocab_size < model.config.vocab_size else model.config.vocab_size
        self.top_k = config.distill_top_k if config.distill_top_k < rows else 0
        self.numbers = {'share': config.distill_weight, 'temperature': config.distill_temperature}
        self.hidden, self.rows = self.states, rows
        if parallel.compiles(config, job):
            self.hidden = torch.compile(self.states)

    def states(self, idx):
        return self.model.trunk(idx)[0]

    @torch.no_grad()
    def __call__(self, idx):
        """The Soft predictions of tokens (B, T)."""
        with self.job.autocast():
            states, head, softcap = self.hidden(idx).flatten(0, 1), self.model.head_weight(), self.model.config.softcap
            if not self.top_k:
                return Soft(states, None, head, softcap, **self.numbers)
            values, ids = likeliest(states, head[:self.rows], softcap, self.top_k, self.numbers['temperature'],
                                    self.chunk or ROWS)
        return Soft(values, ids, **self.numbers)


def teacher(config, dataset, state, job):
    """The Teacher that config.distill names, or None; the name in the config becomes a place.

    state: the checkpoint of a run that goes on, whose teacher must be the same. Raises UserError in one line.
    """
    if not config.distill:
        return None
    if config.distill == 'init_from':
        config.distill = state['config'].get('distill', '') if state else config.init_from
    where = config.distill
    source, tensors, info = initialise.read_source(where)
    identity.check(info['data'], source.vocab_size, dataset.tokenizer, dataset.folder, where, job.say)
    if source.block_size < config.block_size:
        raise UserError(f'distill: {where} has a block_size of {source.block_size}, less than {config.block_size}; lower '
                        'block_size or take another teacher', 'distill')
    digest = of_tensors(tensors, configurator.as_dict(source))
    if state and state.get('teacher') not in (None, digest):
        raise UserError(f'distill: {where} is not the model that {config.out_dir} has learned from; restore it, name its '
                        'place, or start in another out_dir', 'distill')
    model = runnable(source, tensors, job.device)
    if job.half_weights:
        precision.halve(model, job.dtype)
    job.say(f'teacher: {os.path.basename(os.path.normpath(where))}, {model.num_params():,} parameters, ' + (
        f'its {config.distill_top_k} likeliest tokens' if config.distill_top_k else 'every token'))
    return Teacher(model, digest, config, job)
