"""Changes of the model during a run: blocks are added, earlier ones frozen, structured sites made dense, and (dropin.py)
dense ones structured.

A change is a checkpoint in memory that another model resumes: the state of the run is collected, the model is changed,
and everything around it (optimizer, DDP or FSDP2, compile) is rebuilt from that state. `built` is the part of it in a
checkpoint: {'layers', 'dense', 'changed', 'losses', 'drop'} and the model's fields that differ from the configuration.
"""
import fnmatch
import math

import torch

import configurator
import variants
from growth import dropin, guided
from layers.basic import tags_of
from model import GPT
from variants import UserError

PLATEAU = 0.005                                         # nats that three evaluations must gain together


def begin(config):
    """`built` of a run from scratch before its first step."""
    layers = config.grow_from or config.n_layer
    model = fields(config, layers, dense=config.drop_in != 'none')      # which drops structures into a dense model
    return {'layers': layers, 'dense': False, 'changed': None, 'losses': [], 'guided': config.self_guided > 0,
            'model': model | (guided.fields(config) if config.self_guided else {}), 'drop': dropin.begin(config)}


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
    """'unguide', 'dense', 'grow', 'drop', 'thaw' or None: what happens to the model before this step."""
    if built.get('guided') and step >= math.ceil(config.self_guided * config.max_iters):
        return 'unguide'
    if config.finish_dense_at and not built['dense'] and step >= math.ceil(config.finish_dense_at * config.max_iters):
        return 'dense'
    if not config.grow_from or built['layers'] == config.n_layer:
        return dropin.due(config, built, step)
    since, losses = step - (built['changed'] or 0), built['losses']
    stands = config.grow_on_plateau and len(losses) > 3 and losses[-4] - min(losses[-3:]) < PLATEAU
    return 'grow' if stands or config.grow_every and since >= config.grow_every else None


def frozen(config, built):
    """Indices of the blocks that do not train: with grow_freeze all but the newest, until the model is made dense."""
    grown = built['layers'] > (config.grow_from or config.n_layer)
    return range(built['layers'] - 1) if config.grow_freeze and grown and not built['dense'] else range(0)


def freeze(model, config, built):
    """No gradients for what does not train at this stage of the run; before the optimizer is built."""
    for index in frozen(config, built):
        model.freeze_block(index)
    dropin.freeze(model, built['drop'])


def keep_trainable(model, patterns):
    """No gradients for parameters that none of the patterns names, as 'h.*.mlp.*, ln_f.*'; '' names all."""
    wanted = [pattern.strip() for pattern in patterns.split(',') if pattern.strip()]
    names = {name.removeprefix('transformer.'): p for name, p in model.named_parameters()}
    for pattern in wanted:
        if not fnmatch.filter(names, pattern):
            raise UserError(f'trainable: {pattern!r} matches no parameter, such as {next(reversed(names))}; --dry_run=True '
                            'lists the matrices', 'trainable')
    for name, p in names.items() if wanted else ():
        if not any(fnmatch.fnmatchcase(name, pattern) for pattern in wanted):
            p.requires_grad_(False)


def warmth(config, built, step):
    """Factor of the learning rate: linear from 1 / (rewarm + 1) to 1 after a change."""
    if built['changed'] is None:
        return 1.0
    rewarm = config.drop_in_rewarm if built['drop']['done'] and not built['dense'] else config.grow_rewarm
    return min(1.0, (step - built['changed'] + 1) / (rewarm + 1))


def training_flops(model):
    """FLOPs per token of a forward and a backward pass at full context; nothing frozen: 3 x the forward pass.

    A frozen matrix needs no gradient of its weight: 2 x. Blocks below the first parameter that trains are reached by no
    gradient: 1 x, attention too. Recomputation is not counted.
    """
    length, blocks = model.config.block_size, model.transformer.h
    trains = [any(p.requires_grad for p in block.parameters()) for block in blocks]
    outside = [p for name, p in model.named_parameters() if name.startswith('transformer.w')]         # wte, wpe
    first = 0 if any(p.requires_grad for p in outside) else (*trains, True).index(True)
    sites = {site: sum(p.requires_grad for p in module.parameters()) > 0 for site, module in model.sites().items()}
    reached = {site: int(site.split('.')[1]) >= first for site in sites}
    total = sum(module.flops(length) * (1 + reached[site] * (1 + sites[site])) for site, module in model.sites().items())
    attention = sum(block.attn.flops(length) * (3 if i >= first else 1) for i, block in enumerate(blocks))
    head = 2 * model.lm_head.weight.numel() * (2 + model.lm_head.weight.requires_grad)
    return total // length + attention + head


def change(action, model, run, state, how=None):
    """Carry out an action on a plain model and on the run's state, in place -> (words, line for log.jsonl).

    how: the Decomposition of the matrices that are dropped in.
    """
    before = dropin.probe(model, run)
    if action == 'drop':
        words, line = dropin.replace_next(model, run, state, how)
    else:
        words, line = (thaw(state) if action == 'thaw' else reshape(action, model, run.config, state)), {}
    if state['average']:                                # the average continues from the new weights
        state['average'] = {n: state['average'].get(n, p.detach().clone()) for n, p in model.named_parameters()}
    line = {'change': words, 'probe_before': before, 'probe_after': dropin.probe(model, run), **line}
    return words + ('' if before is None else f', loss {before:.4f} -> {line["probe_after"]:.4f}'), line


def thaw(state):
    """After the newest matrices trained alone, everything trains."""
    dropin.release(state)
    return 'everything trains again'


def reshape(action, model, config, state):
    """Add a block, or make every site dense; returns words for the log."""
    dropin.release(state)
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
        words = 'structured sites continue without their guides'
    else:
        model.config.linear = {} if built['dense'] else config.linear
        grow(model, config.grow_init)
        built.update(layers=built['layers'] + 1)
        words = f'block {built["layers"] - 1} added'
    built['model'] = fields(config, built['layers'], built['dense']) | ({'mlp': model.config.mlp} if built['dense'] else {})
    return words


def grow(model, kind):
    """Append a block: 'zero', random with branches at 0; 'copy', the last one with branches at 0; 'stack', a full copy.

    zero and copy change no logit, stack does (Gong et al. 2019, progressive stacking).
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
    """{name of a future dense weight: AdamW's state}, estimated from the state of its factors.

    W is linear in each factor f, so W = J_f f. The gradient of f is J_f^T G, whose scale is that of G times ||W|| / ||f||;
    hence exp_avg = mean_f J_f m_f ||f||^2 / ||W||^2, and exp_avg_sq the same for every entry, mean_f mean(v_f) ||f||^2 /
    ||W||^2. A site without AdamW state for all of its factors starts afresh.
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
    """J_f by: the change of W when factor f is `by` and not 0; W is linear in f apart from the other parts of a sum."""
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
