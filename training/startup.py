"""The start of a run: from a checkpoint's settings, from another model's sizes and weights, or from scratch."""
import contextlib
import dataclasses

import torch
import torch.distributed as dist

import configurator
import variants
from commandline import checks
from data import identity
from data.loader import Loader
from decomposition import allocate, calibrate, initialise, widths
from decomposition.sites import Decomposition, runnable, structure
from growth import changes
from kron import plan, timing
from layers import sums
from model import GPT
from reporting import hardware
from training import contents, parallel, precision
from variants import UserError

MACHINE = 'device', 'compile', 'prefetch'                # settings that go with a device
FREE = ('dropout', 'zero_init', 'loss_chunk', 'recompute', 'residual')     # model settings that checkpoints do not depend on


def resumed(config, state):
    """The configuration of a resumed run: settings given now, else the checkpoint's; the model is the checkpoint's.

    Checked as a whole only here: settings given now were not meant for the defaults of the rest.
    """
    contents.check(state, config.out_dir)
    model_keys = configurator.settings(configurator.GPTConfig)
    for name, value in state['config'].items():
        if name in ('init_from', 'out_dir', 'dry_run', 'eval_only', 'debug') or name not in configurator.as_dict(config):
            continue
        if name in model_keys and name not in (*FREE, 'vocab_size') and name in config.sources:
            if name == 'linear' and state['config'].get('rank_budget') and allocate.agrees(config.linear, value):
                config.linear = value                   # the given rules, with their chosen sizes
            if getattr(config, name) != value:
                raise UserError(f'{name} is {value!r} in the checkpoint of {config.out_dir}, got '
                                f'{getattr(config, name)!r}; drop it or start in another out_dir', name)
        elif name not in config.sources or name == 'vocab_size':
            setattr(config, name, value)
    settle(config)
    for name, sentence in configurator.check(config):
        raise UserError(sentence, name)
    return config


def settle(config):
    """Where the checkpoint's device is missing here, the settings that go with a device are this machine's, unless given.

    Where it is there it stays, as its bits do; dtype and weights are the run's arithmetic and stay in any case.
    """
    if 'device' in config.sources:
        return
    try:
        hardware.device(config.device)                  # of rank 0: the same on all
    except UserError:
        for name in {*MACHINE} - {*config.sources}:
            setattr(config, name, configurator.settings(configurator.Config)[name].default)


def remarks(config, state):
    """What to say of a run that goes on: another device, that it is finished, or that its learning rate is at its end."""
    if not state or config.eval_only:
        return
    before, device = state['config'].get('max_iters', config.max_iters), state['config'].get('device', config.device)
    if device != config.device and 'device' not in config.sources:
        yield f'the device {device!r} of the checkpoint is not on this machine: device={config.device!r}'
    if state['step'] >= config.max_iters:
        yield (f'{config.out_dir} is finished: it is at step {state["step"]}, and max_iters is {config.max_iters}; to go on '
               'pass a larger --max_iters, and --lr_decay_iters')
    elif config.decay_lr and before < config.max_iters > config.lr_decay_iters and 'lr_decay_iters' not in config.sources:
        yield (f'lr_decay_iters is {config.lr_decay_iters}, as in the checkpoint: from there on the learning rate stays at '
               f'min_lr ({config.min_lr:g}); pass --lr_decay_iters={config.max_iters} too if it should not')


def padded(vocab_size):
    """Rows of the embedding: a large vocabulary is padded to a multiple of 64, faster on GPUs (50257 -> 50304)."""
    return vocab_size if vocab_size <= 1024 else -(-vocab_size // 64) * 64


def check_shapes(config):
    """Build the model without memory, so that a spec that does not fit is refused in one line before anything changes."""
    with torch.device('meta'):
        model = GPT(configurator.model_config(config))
    leaks = [i for i, block in enumerate(model.transformer.h) if block.attn.leaks]
    if leaks and not config.allow_leak:
        raise UserError(f'attention of block {leaks[0]} sees the future, so that its loss means nothing; take a causal '
                        'form, or --allow_leak=True for a negative control', 'attention')
    return model


def build(config, dataset, state, job):
    """The model on its device: from a checkpoint, from another model's weights, or from scratch."""
    torch.manual_seed(config.seed)
    if state is None and config.init_from != 'scratch':
        source_config, source, info = initialise.read_source(config.init_from)
        identity.check(info['data'], source_config.vocab_size, dataset.tokenizer, dataset.folder, config.init_from, job.say)
        job.source = {'init_from': config.init_from, **{k: info.get(k) for k in ('kind', 'step', 'tokens', 'flops')}}
        adopt(config, source_config)
        orders = choose_sizes(config, job, dataset, source_config, source)
        check_shapes(config)
        for name in ('attention', 'mlp'):               # once n_layer is known; of a run from scratch by the configurator
            variants.refuse_idle(name, getattr(config, name), checks.blocks(config))
        model = GPT(changes.model_config(config, changes.begin(config)))
        initialise.initialise(model, source_config, source, progress=job.say,
                              how=decomposition(config, dataset, job, orders))
    else:
        built = changes.begin(config) if state is None else state['built']
        with contents.taken_from(config.out_dir) if state else contextlib.nullcontext():
            model = GPT(changes.model_config(config, built))
            if state is not None:
                model.load_state_dict(state['model'])
    if dataset.vocab_size > config.vocab_size:
        raise UserError(f'{dataset.folder} has {dataset.vocab_size} tokens, the model {config.vocab_size}', 'dataset')
    if job.half_weights:
        precision.halve(model, job.dtype)
    return model.to(job.device)


def choose_plans(config, job, say=None):
    """With kron_plan='measure': add the missing entries for the run's shapes to config.kron_plans, timed on rank 0.

    All shapes of the whole run, those of future blocks and sites too, so that a resumed run times nothing. Raises
    UserError for an invalid entry.
    """
    if config.kron_plan != 'measure':
        return
    try:
        plan.check(config.kron_plans)
    except ValueError as error:
        raise UserError(f'kron_plans: {error}', 'kron_plans') from None

    def choose(*call):
        """Rank 0's choice, one at a time: compiled plans take seconds each, and no rank waits for all of them at once."""
        found = [timing.fastest(*call)[0] if job.main else None]
        if job.world_size > 1:
            dist.broadcast_object_list(found, group=job.control)
        return found[0]
    tokens, known = parallel.split_batch(config, job.world_size)[0] * config.block_size, config.kron_plans
    config.kron_plans = timing.measured(check_shapes(config), [tokens], job.dtype, job.device, known, job.half_weights,
                                        compiled=parallel.compiles(config, job), choose=choose)
    new = {call: name for call, name in config.kron_plans.items() if call not in known}
    (say or job.say)(''.join(f'timed: {call}: {name}\n' for call, name in new.items()) +
                     f'{len(new)} contraction plans timed')


def use_plans(model, config, job):
    """Assign contraction plans to the Kronecker sums of a built model."""
    plan.assign(model, config.kron_plans if config.kron_plan == 'measure' else {}, job.dtype, job.device)


def choose_sizes(config, job, dataset=None, source_config=None, source=None):
    """Widths, ranks and terms by rank_budget, into the config: from scratch, or for a source that will be decomposed.

    Returns the orders of units that were found, for the decomposition.
    """
    by_nats = config.narrow or config.rank_allocation == 'curvature'
    if not config.rank_budget or config.rank_allocation == 'uniform' and not by_nats:
        allocate.resolve(config, job.say)
        return {}
    how, dense = decomposition(config, dataset, job), runnable(source_config, source, job.device)
    if by_nats:
        return choose_widths(config, job, how, dense)

    def seen(names):
        """Statistics of the calibration text, if a method needs them."""
        plain = check_shapes(dataclasses.replace(config, linear=allocate.with_sizes(config.linear, 1))).sites()
        structures = [structure(plain[site]) for site in names]
        if not how.batches or not any(sums.choose(variants.LINEARS[n], how.method, a)[1] for n, a in structures):
            return {}
        return {site: s for found in calibrate.passes(dense, names, how.batches()) for site, s in found.items()}
    allocate.resolve(config, job.say, lambda site: dense.sites()[site].dense_weight(), seen)
    return {}


def choose_widths(config, job, how, dense):
    """choose_sizes where parts become narrower, or sizes follow the curvature of the loss."""
    if not how.batches and config.rank_allocation == 'curvature':
        raise UserError("rank_allocation='curvature' needs text to calibrate on; set calibration_tokens above 0",
                        'rank_allocation')
    found, known = widths.for_run(config, dense, lambda sites, gradients: calibrate.passes(
        dense, sites, how.batches(), gradients))
    for name, rules in found.items():
        setattr(config, name, rules)
    slim = check_shapes(config)
    job.say(f'rank_budget={config.rank_budget:g}, {config.rank_allocation}, narrow={config.narrow!r}: '
            f'{slim.num_params():,} of {dense.num_params():,} parameters in the whole model')
    return widths.orders(known)


def decomposition(config, dataset, job, orders=None):
    """How dense weights become structured ones: the settings, the text they need, and a message about it."""
    def batches():
        return calibrate.batches(dataset, config.calibration_tokens, config.block_size, config.seed)
    how = Decomposition(config.decompose, config.calibration_tokens and batches, config.prune_before,
                        config.prune_fraction, device=job.device, orders=orders or {})
    if config.decompose_report:
        loader = Loader(dataset, 'val', config.block_size, max(1, 4096 // config.block_size), seed=config.seed)
        how.validation = list(loader.fixed(config.eval_iters or 20, 'val'))
    return how


def adopt(config, source):
    """Use the sizes of the model that init_from names, where they were not set; refuse sizes that contradict them."""
    for name in configurator.settings(configurator.GPTConfig):
        if name in (*FREE, 'linear', 'loss'):           # the new run's own
            continue
        theirs = getattr(source, name)
        if name == 'block_size':
            if name in config.sources and config.block_size > theirs:
                raise UserError(f'block_size is {theirs} in {config.init_from}, got {config.block_size}; lower it', name)
            theirs = min(theirs, config.block_size)     # shorter is cropped
        if name in config.sources and name in ('n_layer', 'n_head', 'n_embd') and getattr(config, name) != theirs:
            raise UserError(f'{name} is {theirs} in {config.init_from}, got {getattr(config, name)}; drop it', name)
        if name not in config.sources or name == 'block_size':
            setattr(config, name, theirs)
