"""Drop structured matrices into a trained dense model, one by one: which, when, in which order, and what is frozen.

A run with drop_in begins dense. A *unit* is a matrix (drop_in_unit='site'), the matrices of a block ('layer'), or all
(drop_in='all'); linear's rules say which matrices, and which structure each gets. Every drop_in_every steps the next unit
is decomposed from its current weights; methods that need statistics of the inputs measure them on the current model.
Progressive replacement is an old idea without published figures for Kronecker sums; recovery.py shows ours.

built['drop'], a part of every checkpoint: {'specs': {site: spec} of all that become structured, 'order': [[site, ...], ...]
or None before the first replacement, 'units': their number, 'done': how many are structured, 'damage': {unit: nats},
'frozen': whether only the newest trains, 'held': {name: optimizer state} of the frozen parameters}.
"""
import copy
import dataclasses
import math

import torch
import torch.distributed as dist

import configurator
import variants
from data.loader import Loader
from decomposition.calibrate import device_of
from decomposition.initialise import initialise
from decomposition.sites import Decomposition, Work
from layers.sums import unstreamed
from model import GPT
from variants import UserError

PROBE_TOKENS = 8192                     # of the fixed batches on which losses around a replacement are measured
AFTER = 50                              # steps in which the loss is watched after other changes of the model
IDLE = {'specs': {}, 'order': None, 'done': 0, 'units': 0, 'damage': {}, 'frozen': False, 'held': {}}


def split(sites, kind):
    """[[site, ...], ...] in depth order: units of one matrix ('site'), or of a block's ('layer')."""
    found = {}
    for site in sites:
        found.setdefault(site if kind == 'site' else site.split('.')[1], []).append(site)
    return list(found.values())


def name_of(unit):
    """Name of a unit in logs and reports."""
    blocks = sorted({int(site.split('.')[1]) for site in unit})
    if len(unit) == 1:
        return unit[0]
    return f'h.{blocks[0]} ({len(unit)} matrices)' if len(blocks) == 1 else f'all {len(unit)} matrices'


def begin(config):
    """built['drop'] of a run before its first step; raises UserError for an impossible schedule or method."""
    if config.drop_in == 'none':
        return copy.deepcopy(IDLE)
    with torch.device('meta'):
        model = GPT(configurator.model_config(config))
    specs = {site: module.spec for site, module in model.sites().items() if module.spec != 'dense'}
    count = 1 if config.drop_in == 'all' else len(split(specs, config.drop_in_unit))
    check_schedule(config, count)
    check_methods(config, model, specs)
    return {**copy.deepcopy(IDLE), 'specs': specs, 'units': count}


def check_schedule(config, count):
    """Refuse a last replacement that comes after the end of the run, or after the dense finish."""
    last = config.drop_in_from + (count - 1) * config.drop_in_every
    ends = math.ceil(config.finish_dense_at * config.max_iters) if config.finish_dense_at else config.max_iters
    if last >= ends:
        fits = max(0, ends - 1 - config.drop_in_from) // max(1, count - 1)
        remedy = (f'take drop_in_every={fits}' if count > 1 and fits else
                  "raise max_iters, or take drop_in_unit='layer'" if count > 1 else 'lower drop_in_from')
        what = 'the dense finish comes' if config.finish_dense_at else 'the run ends'
        raise UserError(f'drop_in_every={config.drop_in_every} puts the last of {count} replacements at step {last}, and '
                        f'{what} at step {ends}; {remedy}', 'drop_in_every')


def check_methods(config, model, specs):
    """Refuse a method that a structure does not have, or that needs text where there is none, before any step."""
    work = Work(model, model.config, {}, Decomposition(config.decompose, prune_before=config.prune_before,
                                                       prune_fraction=config.prune_fraction))
    for site in specs:
        if work.method(site)[1] and not config.calibration_tokens:
            raise UserError(f'decompose={config.decompose} measures the inputs of {site} before it is replaced; set '
                            'calibration_tokens above 0, or take decompose=van_loan', 'calibration_tokens')


def due(config, built, step):
    """'drop', 'thaw' or None: what happens before this step."""
    drop = built['drop']
    if config.drop_in == 'none' or built['dense']:
        return None
    if drop['done'] < drop['units'] and step >= config.drop_in_from + drop['done'] * config.drop_in_every:
        return 'drop'
    return 'thaw' if drop['frozen'] and step >= built['changed'] + config.drop_in_freeze else None


def freeze(model, drop):
    """While only the newest unit trains, no other parameter has gradients."""
    if drop['frozen']:
        newest = tuple(f'transformer.{site}.' for site in drop['order'][drop['done'] - 1])
        for name, p in model.named_parameters():
            p.requires_grad_(name.startswith(newest))


def release(state):
    """Everything trains again: the held optimizer state is restored."""
    drop = state['built']['drop']
    state['optimizer'] = {**drop['held'], **state['optimizer']}
    drop.update(frozen=False, held={})


def replace_next(model, run, state, how):
    """Make the next unit structured, in a plain model and in the run's state, in place -> (words, line of log.jsonl)."""
    config, built, drop = run.config, state['built'], state['built']['drop']
    release(state)
    line = {}
    if drop['order'] is None:
        drop.update(plan(model, run, drop['specs'], how))
        line = {'damage': drop['damage']}
    unit, before = drop['order'][drop['done']], model.num_params()
    line.update(drop_in=name_of(unit), sites=unit)
    line['rows'] = replace(model, {site: drop['specs'][site] for site in unit}, how)
    share(model, unit)
    line['parameters'] = [before, model.num_params()]
    drop['done'] += 1
    state['best_val_loss'] = math.inf                   # of the previous model
    built.update(changed=state['step'], losses=[], model={'n_layer': built['layers'], 'linear': model.config.linear})
    names = dict(model.named_parameters())
    state['optimizer'] = {name: entries for name, entries in state['optimizer'].items() if name in names}
    if config.drop_in_freeze:                           # the newest has no state yet
        drop.update(frozen=True, held=state['optimizer'])
        state['optimizer'] = {}
    return f'{name_of(unit)} dropped in ({drop["done"]} of {drop["units"]})', line


@torch.no_grad()
def replace(model, specs, how):
    """Replace these sites by the structures of specs {site: spec}, fitted to the model's weights; rows of a report."""
    source_config, source, old = dataclasses.replace(model.config), model.state_dict(), model.sites()
    model.config.linear = {site: m.spec for site, m in old.items() if m.spec != 'dense'} | specs
    for site in specs:
        like = next(old[site].parameters())
        made = variants.linear(model.config, site, old[site].in_features, old[site].out_features,
                               old[site].bias is not None)
        model.transformer.set_submodule(site, made.to(like.device, like.dtype))
    return [row for row in initialise(model, source_config, source, how=how) if row['site'] in specs]


def share(model, unit):
    """Rank 0's factors on every rank, as solvers may differ between GPUs."""
    if dist.is_initialized():
        sites = model.sites()
        for tensor in (t for site in unit for t in sites[site].state_dict().values()):
            dist.broadcast(tensor, 0)


# ---------------------------------------------------------------------------------------------------
# order, and losses

def plan(model, run, specs, how):
    """{'order', 'damage'}: all units at once, in depth order, or by damage (loss increase), block 0 last.

    Block 0 is last whatever its damage: errors there pass through all other blocks.
    """
    config = run.config
    units = split(specs, config.drop_in_unit)
    damage = damages(model, run, specs, units, how) if config.drop_in == 'sensitivity' or config.drop_in_report else {}
    if config.drop_in == 'sensitivity':
        cost = {unit[0]: damage[name_of(unit)] for unit in units}
        units.sort(key=lambda unit: (unit[0].startswith('h.0.'), math.isnan(cost[unit[0]]), cost[unit[0]]))
    return {'order': [list(specs)] if config.drop_in == 'all' else units, 'damage': damage}


@torch.no_grad()
def damages(model, run, specs, units, how):
    """{unit: increase of the loss on training text, in nats, when only this unit is replaced}; the model is unchanged.

    Every site is decomposed once, with the inputs of the dense model: for a single unit, _sequential and _streamed are the
    plain method. Memory: a copy of the model. Cost: one calibration pass, all fits, one PROBE_TOKENS forward pass per unit.
    """
    plain = dataclasses.replace(how, method=unstreamed(how.method), validation=None)
    whole, batches, found = copy.deepcopy(model), probes(run, 'train'), {}
    replace(whole, specs, plain)
    made, own = whole.sites(), model.sites()
    dense = mean_loss(model, batches, run.job)
    for unit in units:
        for site in unit:
            model.transformer.set_submodule(site, made[site])
        found[name_of(unit)] = run.job.agree(mean_loss(model, batches, run.job) - dense)
        for site in unit:
            model.transformer.set_submodule(site, own[site])
    return found


def probes(run, split):
    """[(x, y)]: PROBE_TOKENS tokens of a split, always the same."""
    length = run.config.block_size
    rows = max(1, min(PROBE_TOKENS, 4096) // length)
    loader = Loader(run.dataset, split, length, rows, seed=run.config.seed)
    return list(loader.fixed(max(1, PROBE_TOKENS // (rows * length)), split))


def interval(config):
    """Steps between measurements around changes of the model, 0 = none."""
    return config.drop_in_report if config.drop_in != 'none' else config.grow_report


def probe(model, run):
    """Loss on the fixed batches of validation text, None without a report. All ranks compute the same."""
    return mean_loss(model, probes(run, 'val'), run.job) if interval(run.config) else None


@torch.no_grad()
def mean_loss(model, batches, job):
    """Mean loss per token over [(x, y)], the model in eval mode meanwhile; draws no random numbers."""
    training, total, count, device = model.training, 0.0, 0, device_of(model)
    model.eval()
    for x, y in batches:
        with job.autocast():
            total += model(x.to(device), y.to(device), guess=True)[1].item() * y.numel()
        count += y.numel()
    model.train(training)
    return total / count


def watch(run, step):
    """A line with the loss on the fixed batches: every drop_in_report steps from the first replacement to the end; every
    grow_report steps in the AFTER steps that follow a new block or the dense finish."""
    config, every = run.config, interval(run.config)
    begin = config.drop_in_from if config.drop_in != 'none' else run.built['changed']
    until = config.max_iters if config.drop_in != 'none' else (begin or 0) + AFTER
    if not every or begin is None or not begin <= step <= until or config.eval_only:
        return
    if (step - begin) % every == 0 or step == until:
        run.log.write({'step': step, 'probe_loss': probe(run.model, run)})
