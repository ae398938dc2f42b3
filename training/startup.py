"""What a run starts from: a checkpoint's settings, another model's sizes and weights, or nothing."""
import dataclasses

import torch
import torch.distributed as dist

import configurator
import variants
from data import identity
from data.loader import Loader
from decomposition import allocate, calibrate, initialise
from decomposition.sites import Decomposition, runnable, structure
from growth import changes
from kron import plan, timing
from layers import sums
from model import GPT
from training import parallel, precision
from variants import UserError

FREE = ('dropout', 'zero_init', 'loss_chunk', 'recompute', 'residual')     # model settings that no checkpoint depends on


def resumed(config, state):
    """The configuration of a resumed run: what was given now, else what the checkpoint holds; the model is its own."""
    model_keys = configurator.settings(configurator.GPTConfig)
    for name, value in state['config'].items():
        if name in ('init_from', 'out_dir', 'dry_run', 'eval_only', 'debug') or name not in configurator.as_dict(config):
            continue
        if name in model_keys and name not in (*FREE, 'vocab_size') and name in config.sources:
            if name == 'linear' and state['config'].get('rank_budget') and allocate.agrees(config.linear, value):
                config.linear = value                   # the given rules, with the sizes that were chosen for them
            if getattr(config, name) != value:
                raise UserError(f'{name} is {value!r} in the checkpoint of {config.out_dir}, got '
                                f'{getattr(config, name)!r}; drop it or start in another out_dir', name)
        elif name not in config.sources or name == 'vocab_size':
            setattr(config, name, value)
    return config


def padded(vocab_size):
    """Rows of the embedding: a large vocabulary is padded to a multiple of 64, which GPUs like (50257 -> 50304)."""
    return vocab_size if vocab_size <= 1024 else -(-vocab_size // 64) * 64


def check_shapes(config):
    """Build the model without memory, so that a spec that does not fit is said in one line before anything is touched."""
    with torch.device('meta'):
        model = GPT(configurator.model_config(config))
    leaks = [i for i, block in enumerate(model.transformer.h) if getattr(block.attn, 'leaks', False)]
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
        adopt(config, source_config)
        choose_sizes(config, job, dataset, source_config, source)
        check_shapes(config)
        model = GPT(changes.model_config(config, changes.begin(config)))
        initialise.initialise(model, source_config, source, progress=job.say, how=decomposition(config, dataset, job))
    else:
        built = changes.begin(config) if state is None else state['built']
        model = GPT(changes.model_config(config, built))
        if state is not None:
            model.load_state_dict(state['model'])
    if dataset.vocab_size > config.vocab_size:
        raise UserError(f'{dataset.folder} has {dataset.vocab_size} tokens, the model {config.vocab_size}', 'dataset')
    if job.half_weights:
        precision.halve(model, job.dtype)
    return model.to(job.device)


def choose_plans(config, job, say=None):
    """With kron_plan='measure': config.kron_plans gains what it lacks for the run's shapes, timed on rank 0 for all ranks.

    All shapes of the whole run, those of blocks and sites to come too, so that a resumed run times nothing. Raises
    UserError for an entry that is none.
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
    """Contraction plans to the Kronecker sums of a model that was built."""
    plan.assign(model, config.kron_plans if config.kron_plan == 'measure' else {}, job.dtype, job.device)


def choose_sizes(config, job, dataset=None, source_config=None, source=None):
    """Ranks and terms by rank_budget, into config.linear: from scratch, or for a source that is to be decomposed."""
    if not config.rank_budget or config.rank_allocation == 'uniform':
        allocate.resolve(config, job.say)
        return
    how, dense = decomposition(config, dataset, job), runnable(source_config, source, job.device)

    def seen(names):
        """What calibration text shows, where a method looks at it."""
        plain = check_shapes(dataclasses.replace(config, linear=allocate.with_sizes(config.linear, 1))).sites()
        structures = [structure(plain[site]) for site in names]
        if not how.batches or not any(sums.choose(variants.LINEARS[n], how.method, a)[1] for n, a in structures):
            return {}
        return {site: s for found in calibrate.passes(dense, names, how.batches()) for site, s in found.items()}
    allocate.resolve(config, job.say, lambda site: dense.sites()[site].dense_weight(), seen)


def decomposition(config, dataset, job):
    """How dense weights become structured ones: the settings, the text that they need, and a word on it."""
    def batches():
        return calibrate.batches(dataset, config.calibration_tokens, config.block_size, config.seed)
    how = Decomposition(config.decompose, config.calibration_tokens and batches, config.prune_before,
                        config.prune_fraction, device=job.device)
    if config.decompose_report:
        loader = Loader(dataset, 'val', config.block_size, max(1, 4096 // config.block_size), seed=config.seed)
        how.validation = list(loader.fixed(config.eval_iters or 20, 'val'))
    return how


def adopt(config, source):
    """Take the sizes of the model that init_from names, where they were not set; refuse sizes that contradict them."""
    for name in configurator.settings(configurator.GPTConfig):
        if name in (*FREE, 'linear', 'loss'):           # the new run's own
            continue
        theirs = getattr(source, name)
        if name == 'block_size':
            theirs = min(theirs, config.block_size)     # shorter is cropped
        if name in config.sources and name in ('n_layer', 'n_head', 'n_embd') and getattr(config, name) != theirs:
            raise UserError(f'{name} is {theirs} in {config.init_from}, got {getattr(config, name)}; drop it', name)
        if name not in config.sources or name == 'block_size':
            setattr(config, name, theirs)
