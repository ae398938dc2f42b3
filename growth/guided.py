"""Self-guided training: a dense guide G beside each structured matrix W that fades out, y = (1 - g) W x + g G x.

G starts as W, so that nothing changes, and learns as a dense layer does; g falls from 1 to 0 on a cosine over the first
`self_guided` of the run, then the guides are removed. Costs a dense layer per site for that time. Source: Wei et al. 2024,
Building on Efficient Foundations (structured feed-forward layers), section on self-guided training; from scratch they take
half of the run.
"""
import inspect
import math

import torch

import variants
from variants import LINEARS, Spec, UserError, parse_spec


def with_guide(text):
    """The spec with guide=True; a dense one unchanged. UserError for a structure that takes no guide."""
    spec = parse_spec(text, LINEARS)
    if spec.name == 'dense':
        return text
    if 'guide' not in inspect.signature(LINEARS[spec.name]).parameters:
        raise UserError(f'self_guided needs structures that take guide=True, and {spec} does not; set self_guided=0, or '
                        'derive its class from layers.structured.Structured, which has one', 'self_guided')
    return str(Spec(spec.name, spec.args, {**spec.kwargs, 'guide': True}))


def fields(config):
    """The model's fields while it is guided."""
    return {'linear': {pattern: with_guide(text) for pattern, text in variants.as_rules(config.linear).items()}}


def guides(model):
    """The site modules that have a guide."""
    return [module for module in model.sites().values() if getattr(module, 'guide', None) is not None]


@torch.no_grad()
def fade(model, config, step):
    """Set g for this step, (1 + cos(pi step / end)) / 2, at every guide."""
    if config.self_guided:
        share = min(1.0, step / max(1, math.ceil(config.self_guided * config.max_iters)))
        for module in guides(model):
            module.guidance.fill_((1 + math.cos(math.pi * share)) / 2)


def remove(model, rules):
    """Remove the guides, in place: the structured functions are left; rules: of the model from here on."""
    for site, module in model.sites().items():
        if getattr(module, 'guide', None) is not None:
            module.guide = module.guidance = None
            module.spec = str(parse_spec(variants.match(rules, site, 'dense')[1], LINEARS))
    model.config.linear = rules
