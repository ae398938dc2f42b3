"""Changes of the model in the course of a run: blocks are added, earlier ones frozen, structured sites made dense.

A change is a checkpoint in memory that another model resumes: the state of the run is gathered, the model is changed,
and everything around it (optimizer, DDP or FSDP2, compile) is built anew from that state. `built` is what a checkpoint
holds of it: {'layers', 'dense', 'changed', 'losses'} and the model's fields that differ from the configuration.
"""
import math

import torch

import configurator
import guided
import variants
from layers import tags_of
from model import GPT
from variants import UserError

PLATEAU = 0.005                                         # nats that three evaluations must gain


def begin(config):
    """What a run from scratch has built before its first step."""
    layers = config.grow_from or config.n_layer
    built = {'layers': layers, 'dense': False, 'changed': None, 'losses': [], 'guided': config.self_guided > 0}
    return {**built, 'model': fields(config, layers, False) | (guided.fields(config) if built['guided'] else {})}


def fields(config, layers, dense):
    """The model's fields that differ from the configuration with so many blocks; rules for later blocks are left out."""
    if layers == config.n_layer or dense:
        return {'n_layer': layers, **({'linear': {}} if dense else {})}
    with torch.device('meta'):
        sites = [site for site in GPT(configurator.model_config(config)).sites() if int(site.split('.')[1]) < layers]
    idle = variants.idle_rules(config.linear, sites)
    return {'n_layer': layers, 'linear': {p: s for p, s in variants.as_rules(config.linear).items() if p not in idle}}


def model_config(config, built):
    """The GPTConfig of the model as it is now."""
    return configurator.model_config({**configurator.as_dict(config), **built['model']})


def due(config, built, step):
    """'unguide', 'dense', 'grow' or None: what happens to the model before this step."""
    if built.get('guided') and step >= math.ceil(config.self_guided * config.max_iters):
        return 'unguide'
    if config.finish_dense_at and not built['dense'] and step >= math.ceil(config.finish_dense_at * config.max_iters):
        return 'dense'
    if not config.grow_from or built['layers'] == config.n_layer:
        return None
    since, losses = step - (built['changed'] or 0), built['losses']
    stands = config.grow_on_plateau and len(losses) > 3 and losses[-4] - min(losses[-3:]) < PLATEAU
    return 'grow' if stands or config.grow_every and since >= config.grow_every else None


def frozen(config, built):
    """Numbers of the blocks that do not train: with grow_freeze all but the newest, until the model is made dense."""
    grown = built['layers'] > (config.grow_from or config.n_layer)
    return range(built['layers'] - 1) if config.grow_freeze and grown and not built['dense'] else range(0)


def warmth(config, built, step):
    """What the learning rate is multiplied by: a line from 1 / (grow_rewarm + 1) to 1 after a change."""
    if built['changed'] is None:
        return 1.0
    return min(1.0, (step - built['changed'] + 1) / (config.grow_rewarm + 1))


def change(action, model, config, state):
    """Carry out an action on a plain model and on the run's state, in place; returns words for the log."""
    built = state['built']
    built.update(changed=state['step'], losses=[])
    if action == 'dense':
        entries = estimates(model, state['optimizer']) if config.finish_dense_state == 'estimate' else {}
        model.realise()
        built.update(dense=True)
        kept = {n: e for n, e in state['optimizer'].items() if n in dict(model.named_parameters())}
        state['optimizer'] = {**kept, **entries}
        words = 'every site is dense from here'
    elif action == 'unguide':
        guided.remove(model, config.linear)
        built.update(guided=False)
        state['optimizer'] = {n: e for n, e in state['optimizer'].items() if n in dict(model.named_parameters())}
        words = 'structured sites go on without their guides'
    else:
        model.config.linear = {} if built['dense'] else config.linear
        grow(model, config.grow_init)
        built.update(layers=built['layers'] + 1)
        words = f'block {built["layers"] - 1} added'
    built['model'] = fields(config, built['layers'], built['dense'])
    if state['average']:                                # the average goes on from the new weights
        state['average'] = {n: state['average'].get(n, p.detach().clone()) for n, p in model.named_parameters()}
    return words


def grow(model, kind):
    """Append a block: 'zero', random with branches at 0; 'copy', the last one with branches at 0; 'stack', it whole.

    zero and copy keep every logit, stack does not (Gong et al. 2019, progressive stacking).
    """
    last, block = model.transformer.h[-1], model.add_block()
    if kind == 'zero':
        return
    source, target = last.state_dict(), block.state_dict()
    if {n: t.shape for n, t in source.items()} != {n: t.shape for n, t in target.items() if n in source}:
        raise UserError(f'grow_init={kind!r} copies the block before, and the new one is built otherwise; take zero',
                        'grow_init')
    with torch.no_grad():
        for name, tensor in target.items():
            branch = name.split('.')[-2] == 'c_proj' or name.split('.')[0] in ('a_attn', 'a_mlp')
            if name in source and not (kind == 'copy' and branch):
                tensor.copy_(source[name])


def estimates(model, optimizer):
    """{name of a dense weight to come: AdamW's entries}, estimated from those of its factors.

    W is linear in each factor f, so W = J_f f. The gradient of f is J_f^T G, whose scale is that of G times ||W|| / ||f||;
    hence exp_avg = mean_f J_f m_f ||f||^2 / ||W||^2, and exp_avg_sq the same for every entry, mean_f mean(v_f) ||f||^2 /
    ||W||^2. A site without AdamW entries for all of its factors starts afresh.
    """
    found = {}
    for site, module in model.sites().items():
        names = {f: f'transformer.{site}.{f}' for f, tag in tags_of(module).items() if tag in ('factor', 'matrix')}
        entries = {f: optimizer.get(name, {}) for f, name in names.items()}
        if module.spec == 'dense' or not all('exp_avg' in e for e in entries.values()):
            continue
        factors = {f: module.get_parameter(f).detach() for f in names}
        squares = {f: moved(module, f, factors[f]).square().sum().clamp_min(1e-30) for f in names}
        weight = {f: factors[f].square().sum() / squares[f] / len(names) for f in names}
        first = sum(moved(module, f, entries[f]['exp_avg'].to(factors[f].device)) * weight[f] for f in names)
        second = sum(entries[f]['exp_avg_sq'].to(factors[f].device).mean() * weight[f] for f in names)
        found[f'transformer.{site}.weight'] = {'step': next(iter(entries.values()))['step'], 'exp_avg': first,
                                               'exp_avg_sq': torch.full_like(first, second.item())}
    return found


def moved(module, factor, by):
    """J_f by: what W gains when factor f is `by` and not 0; W is linear in f but for what other parts of a sum add."""
    own = module.get_parameter(factor)
    with_it, without = (torch.func.functional_call(Weight(module), {f'module.{factor}': f.to(own.dtype)}).detach()
                        for f in (by, torch.zeros_like(own)))
    return with_it - without


class Weight(torch.nn.Module):
    """A module whose output is another's dense weight."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self):
        return self.module.dense_weight()
