"""One trial: the dense model, its calibration, the decomposition, the loss on the study's texts."""
import dataclasses
import math
import os
import shutil
import time

import torch

from compression import memory, sizes
from compression.calibration import Calibration, StreamedCalibration, digest
from compression.study import DENSE, WHOLE, settings_of, slice_of
from data import identity
from decomposition import calibrate, wide, widths
from decomposition.initialise import empty, initialise, read_source
from decomposition.refine import Refinement, refine
from decomposition.sites import Decomposition, runnable
from evaluation import texts, windows
from pretrained import said
from reporting import hardware
from variants import UserError


class Source:
    """A dense model of a study with its data: config, state, and calibrations by (tokens, seed).

    With weights in half precision it stays so and computes in float32 (decomposition/wide.py), and the calibration goes by
    the memory of the device (memory.py).
    """

    def __init__(self, study, place, dataset):
        self.study, self.place, self.dataset = study, place, dataset
        self.device = hardware.device(study.device)
        config, state, info = read_source(place)
        length = study.block_size or config.block_size
        if length > config.block_size:
            raise UserError(f'block_size can be at most {config.block_size}, that of {place}, got {length}', 'block_size')
        self.config = dataclasses.replace(config, block_size=length, dropout=0.0, loss_chunk=0, recompute=False)
        if not config.rope:
            state = {**state, 'transformer.wpe.weight': state['transformer.wpe.weight'][:length]}
        if config.linear:
            raise UserError(f'{place} has structured matrices (linear={config.linear!r}); take a dense model', 'source')
        self.said = said.begun(info, place, config, state)
        identity.check(info['data'], config.vocab_size, dataset.tokenizer, dataset.folder, place)
        self.slices = {name: self.slice_of(getattr(study, name), name) for name in ('select', 'test')}
        self.dtype, self.memory = getattr(torch, study.weights), calibrate.MEMORY
        self.in_half = self.dtype in wide.HALF
        if self.in_half:
            state = {name: t.to(self.dtype) if t.is_floating_point() else t for name, t in state.items()}
            self.memory = memory.allowed(self.config, study, self.device)
        self.digest = digest(state)
        self.dense = runnable(self.config, state, self.device, self.in_half)
        self.sites, self.calibrations = sizes.counted(self.dense, study.sites), {}

    @property
    def state(self):
        """The state dict, on the device: who builds a model of it shares its tensors."""
        return self.dense.state_dict()

    def slice_of(self, where, name):
        """The texts.Source of SPLIT:START:STOP."""
        split, start, stop = slice_of(where, name)
        if split not in self.dataset.splits:
            raise UserError(f'{self.dataset.folder} has no split {split!r}; it has {", ".join(self.dataset.splits)}', name)
        tokens = self.dataset.splits[split]
        stop = len(tokens) if stop == WHOLE else stop
        if stop > len(tokens):
            raise UserError(f'{name}={where} ends after the {len(tokens):,} tokens of {split!r}; lower STOP', name)
        if self.study.score == 'inside' and stop - start < self.config.block_size:
            raise UserError(f"{name}={where} has {stop - start:,} tokens, and score='inside' takes whole windows of "
                            f'{self.config.block_size:,}; take more text or a smaller block_size', name)
        return texts.Source(where, lambda a, b: tokens.read(start + a, start + b), stop - start, None, None)

    def calibration(self, tokens, seed, name):
        """The Calibration of that text; the previous one is dropped from memory, its file stays."""
        if (tokens, seed) not in self.calibrations:
            length, kind = self.config.block_size, StreamedCalibration if self.in_half else Calibration
            text = calibrate.batches(self.dataset, tokens, length, seed, at_once=length if self.in_half
                                     else calibrate.BATCH_TOKENS)
            self.calibrations = {(tokens, seed): kind(
                self.dense, self.sites, text, os.path.join(self.study.out_dir, 'calibration'), name,
                [self.digest, self.dataset.digest, tokens, length, seed], self.study.gradient_tokens, self.memory)}
        return self.calibrations[tokens, seed]


# ----------------------------------------------------------------------------------------------------
# zero-shot

def carry_out(source, trial):
    """(result of a trial as JSON values, the structured model); raises UserError."""
    study, begin, busy = source.study, time.perf_counter(), time.process_time()
    if trial.variant == DENSE:
        model, rows, rules, calibrating = source.dense.to(source.device), [], {}, 0.0
    else:
        model, rows, rules, calibrating = compressed(source, trial)
    used, _, total = sizes.cost(model.config, study.sites)
    dense = sum(module.in_features * module.out_features for module in source.sites.values())
    middle = time.process_time()
    losses = perplexities(model, source)
    shutil.rmtree(refined_folder(study, trial), ignore_errors=True)
    errors = [row['output_error'] for row in rows if 'output_error' in row]
    return {'variant': trial.variant, 'budget': trial.budget, 'source': trial.source, 'seed': trial.seed,
            'parameters': used, 'share': used / dense, 'total': total, **losses,
            'output_error': sum(errors) / len(errors) if errors else None, 'linear': rules,
            'calibrate_cpu_s': calibrating, 'decompose_cpu_s': middle - busy - calibrating,
            'seconds': time.perf_counter() - begin}, model


def compressed(source, trial):
    """(the structured model on the CPU's or GPU's side, rows of initialise, its rules, CPU seconds to calibrate)."""
    study = source.study
    variant = settings_of(study, trial.variant, trial.budget)
    source.dense.to(source.device)
    seen = source.calibration(variant.calibration_tokens, trial.seed, calibration_name(trial, variant))
    before = seen.cpu_s                                 # the first trial without a file measures for all others too

    def stats(sites, gradients):
        return seen.passes(source.dense, sites, seen.text, gradients)
    config = dataclasses.replace(source.config, **sizes.rules_of(
        source.dense, source.config, variant, study.budgets[trial.budget], study.sites,
        lambda site: source.sites[site].dense_weight(), stats, seen.gains))
    model = empty(config, source.dtype)
    rows = initialise(model, source.config, source.state, how=Decomposition(
        variant.decompose, seen.text, variant.prune_before, variant.prune_fraction, device=source.device,
        passes=seen.passes, orders=widths.orders(seen.gains), dense=source.dense, wide=source.in_half))
    if source.in_half:
        source.dense.to('cpu')                          # two models may be too much for the device
        wide.widened(model)
    model.to(source.device)
    if variant.refine:
        refine(source.dense, model, list(seen.text), Refinement(
            variant.refine, variant.refine_learning_rate, variant.refine_parameters, variant.refine_error, trial.seed),
            refined_folder(study, trial))
    return model, rows, config.linear, seen.cpu_s - before


def refined_folder(study, trial):
    """Where finished blocks of a refinement are until the trial has no more use for them."""
    return os.path.join(study.out_dir, 'refined', str(trial).replace('/', '_'))


def calibration_name(trial, variant):
    return f'source{trial.source}_seed{trial.seed}_{variant.calibration_tokens}'


def perplexities(model, source):
    """{'select' and 'test': {'loss', 'perplexity', 'tokens'}}, in independent windows of block_size.

    study.score 'inside': a window predicts its tokens but the first, and what is left of the text is not read.
    """
    return {name: perplexity(model, source, text) for name, text in source.slices.items()}


def perplexity(model, source, text):
    length, training = model.config.block_size, model.training
    inside = source.study.score == 'inside'
    if inside:
        text = dataclasses.replace(text, count=text.count // length * length)
    found = windows.score(model.eval(), text, length - inside, length, windows.batch_rows(length, model.config.vocab_size),
                           source.device, torch.float32)
    model.train(training)
    loss = found['nats'] / found['scored']
    return {'loss': loss, 'perplexity': math.exp(loss) if loss < 700 else None, 'tokens': found['scored']}
