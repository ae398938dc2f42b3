"""The cost of a run before it starts: parameters and training FLOPs, including growth, freezing and the dense finish."""
import functools
import json
from pathlib import Path

import torch

import configurator
from data.dataset import read_meta
from growth import changes
from model import GPT
from training.startup import padded
from variants import UserError

STEPS = ('max_iters', 'lr_decay_iters', 'warmup_iters', 'eval_interval', 'save_interval', 'grow_every', 'grow_rewarm')


def with_vocabulary(config):
    """The config with the vocabulary of its data set, where that exists and the config names none."""
    meta = None if 'vocab_size' in config.sources else read_meta(Path(config.data_dir, config.dataset))
    if meta:
        config.vocab_size = padded(meta['vocab_size'])
    return config


@functools.lru_cache(1024)
def measured(settings):
    """(parameters, {part: forward FLOPs per token}) of a GPTConfig as JSON; parts: sites of each block, and the rest."""
    with torch.device('meta'):
        model = GPT(configurator.GPTConfig(**json.loads(settings)))
    T, sites = model.config.block_size, {}
    for site, module in model.sites().items():
        block = int(site.split('.')[1])
        sites[block] = sites.get(block, 0) + module.flops(T) / T
    return model.num_params(), sites, model.flops_per_token() - sum(sites.values())


def model_cost(config):
    """(parameters, {block: forward FLOPs per token of its sites}, forward FLOPs per token of all else)."""
    return measured(json.dumps(configurator.as_dict(configurator.model_config(config)), sort_keys=True))


def stages(config, evaluations=()):
    """[(steps, GPTConfig, indices of frozen blocks)] of a run as growth/changes.py will change its model.

    evaluations: its log lines, which decide about growth with grow_on_plateau.
    """
    losses = {line['step']: line['val_loss'] for line in evaluations}
    built, found, first = changes.begin(config), [], 0

    def stage(until):
        found.append((until - first, changes.model_config(config, built), changes.frozen(config, built)))
    for step in range(config.max_iters):
        if step in losses:
            built['losses'] = [*built['losses'], losses[step]][-4:]
        action = changes.due(config, built, step)
        if action:
            stage(step)
            first, built['dense'] = step, built['dense'] or action == 'dense'
            built.update(changed=step, losses=[], layers=built['layers'] + (action == 'grow'))
            built['model'] = changes.fields(config, built['layers'], built['dense'])
    stage(config.max_iters)
    return found


def training_cost(config, evaluations=()):
    """{'parameters': of the final model, 'trained': of the one before the dense finish, 'flops': of the training}.

    FLOPs: 3 x forward per token (forward, gradient of the inputs, gradient of the weights), 2 x for the sites of frozen
    blocks, whose weights take no gradient; times tokens, without validation.
    """
    tokens = config.batch_size * config.gradient_accumulation_steps * config.block_size
    flops, sizes = 0, []
    for steps, model, frozen in stages(config, evaluations):
        parameters, sites, rest = model_cost(model)
        per_token = 3 * rest + sum((2 if block in frozen else 3) * cost for block, cost in sites.items())
        flops += steps * tokens * per_token
        sizes.append(parameters)
    finish = len(sizes) > 1 and config.finish_dense_at
    return {'parameters': sizes[-1], 'trained': sizes[-2] if finish else sizes[-1], 'flops': round(flops)}


def size_of(config, measure):
    """Parameters of the whole model, or training FLOPs of the run, as a budget counts them. Parameters ignore growth."""
    return model_cost(config)[0] if measure == 'parameters' else training_cost(config)['flops']


def narrow_width(config, target, measure='parameters'):
    """The smallest n_embd of a dense model like config's with at least `target` parameters (or training FLOPs).

    So rounding favours the narrow model. n_embd stays a multiple of n_head (of 2 n_head with rope).
    """
    step = config.n_head * (2 if config.rope else 1)
    for width in range(step, config.n_embd, step):
        narrow = configurator.Config(**{**configurator.as_dict(config), 'n_embd': width})
        if size_of(narrow, measure) >= target:
            return width
    return config.n_embd


def steps_for(config, flops):
    """{setting: steps} with which the run takes that many training FLOPs, all step counts scaled alike."""
    factor = flops / training_cost(config)['flops']
    for _ in range(3):                                  # growth by whole steps makes the cost a staircase
        scaled = {name: max(1, round(getattr(config, name) * factor)) for name in STEPS if getattr(config, name)}
        scaled['max_iters'] = max(1, round(config.max_iters * factor))
        cost = training_cost(configurator.Config(**{**configurator.as_dict(config), **scaled}))['flops']
        factor *= flops / cost
    if config.eval_interval >= config.max_iters:        # one evaluation, at the end
        scaled['eval_interval'] = scaled['max_iters']
    return scaled


def check_model(config):
    """Build the model of a config on no device: a spec that does not fit, or saves nothing, is a UserError."""
    model_cost(config)
    if config.max_iters < 1:
        raise UserError(f'max_iters must be at least 1 in a grid, got {config.max_iters}', 'max_iters')
