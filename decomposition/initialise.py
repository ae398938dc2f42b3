"""Initialise a model from another one, site by site: dense weights are decomposed, structured ones realised or copied.

The other one may be a source of pretrained/sources.py, which is checked against the model of its config.
"""
import contextlib
import functools
import os

import torch

import configurator
from decomposition import narrow, wide
from decomposition.progress import with_bar
from decomposition.sites import Decomposition, Work, fillable, runnable, structure, tensors_of
from model import GPT
from pretrained import gpt2, sources
from variants import UserError


def pretrained_gpt(name_or_folder, override_args):
    """The GPT of read_source with GPTConfig fields changed: dropout, block_size (crops), linear (decomposes) ...

    GPT-2's vocabulary stays 50257, and dropout is 0 unless overridden. Raises UserError as read_source and
    initialise do.
    """
    config, state, _ = read_source(name_or_folder)
    return build(sources.checked_config({**configurator.as_dict(config), **override_args}, 'override_args'), config, state)


def build(config, source_config, source_state):
    """GPT(config) on the CPU, initialised from a source."""
    model = empty(config)
    initialise(model, source_config, source_state)
    return model


def empty(config, dtype=torch.float32):
    """GPT(config) on the CPU in that type, without values, as all will be filled: no time for random numbers."""
    with torch.device('meta'):
        model = GPT(config)
    if any(True for _ in model.buffers()):              # tables that a layer computes at construction
        return wide.halve(GPT(config), dtype)
    wide.halve(model, dtype).to_empty(device='cpu')
    if config.tie_weights:
        model.lm_head.weight = model.transformer.wte.weight
    return model


def source_config(init_from, which='last'):
    """The GPTConfig of read_source; GPT-2's published sizes are known without a download."""
    if init_from in gpt2.PUBLISHED and not os.path.isdir(init_from):
        return gpt2.published(init_from)
    return read_source(init_from, which)[0]


def read_source(init_from, which='last'):
    """read_folder of a folder, a .gguf, or a model's name on the Hugging Face hub.

    Raises UserError in one line when there is neither such a place nor such a download.
    """
    return read_folder(sources.find(init_from), which)


def read_folder(folder, which='last'):
    """sources.read of a folder or a .gguf, its names and shapes checked; raises UserError in one line."""
    config, state, info = sources.read(folder, which)
    check_state(config, state, folder)
    return config, state, info


def check_state(config, state, where):
    """Refuse missing, unknown, misshapen and contradicting tensors of a state dict for GPT(config)."""
    with torch.device('meta'):
        expected = GPT(config).state_dict()
    for verb, odd in (('lacks', expected.keys() - state.keys()), ('holds unknown', state.keys() - expected.keys())):
        if odd:
            more = f' and {len(odd) - 1} more' if len(odd) > 1 else ''
            raise UserError(f'{where} {verb} {min(odd)}{more}', 'init_from')
    for name, tensor in expected.items():
        if state[name].shape != tensor.shape or state[name].is_floating_point() != tensor.is_floating_point():
            raise UserError(f'{where}: {name} is {tuple(state[name].shape)} in {state[name].dtype}, and its config '
                            f'says {tuple(tensor.shape)}', 'init_from')
    wte, head = state['transformer.wte.weight'], state['lm_head.weight']
    if config.tie_weights and head is not wte and not torch.equal(head, wte):
        raise UserError(f'{where}: lm_head.weight differs from the embedding that it is tied to; set '
                        '"tie_word_embeddings": false in config.json', 'init_from')


@torch.no_grad()
def initialise(model, source_config, source_state, method='van_loan', progress=None, how=None):
    """Give `model` the weights of a source with the same n_layer, n_head, n_embd and bias; return the errors per site.

    A site with the source's own structure is copied bit by bit; any other is decomposed from the source's dense
    weight by its class's from_dense, as `how`, a Decomposition, says (None: Decomposition(method)). A shorter block_size
    takes the first positions. With a larger vocab_size the new rows are the mean of the source's rows: their logit is the
    mean logit, so that by Jensen they get at most (new rows) / (old rows) of the probability, whereas rows near zero
    would win over GPT-2's logits near -100.
    progress: called with one line per decomposed site. Memory: the model, the source, one site, and calibration's.
    Returns one dict per site: site, spec, error = ||W - Ŵ|| / ||W||, norm = ||What|| / ||W||, parameters; with
    calibration output_error, the rms of the outputs' error over that of the outputs without bias; with validation loss,
    that of the source with this site alone replaced, and dense_loss.
    Raises UserError in one line for sizes, sites or tensors that do not fit, an unknown method, or too little text.
    """
    how = how or Decomposition(method)
    check_sizes(model.config, source_config)
    build_source = functools.partial(runnable, in_half=how.wide)
    source_config, source_state, how, slim = narrow.narrowed(model, source_config, source_state, how, build_source)
    with torch.device('meta'):
        sources = fillable(GPT(source_config))
    sites = fillable(model)
    if sources.keys() != sites.keys():
        raise UserError(f'the linears are not those of the source: {min(sources.keys() ^ sites.keys())} is in '
                        'one only; take its attention and mlp', 'init_from')
    rows, work = {}, Work(model, source_config, source_state, how)
    for site, module in sites.items():
        if structure(module) == structure(sources[site]):
            with one_line(site):
                module.load_state_dict(tensors_of(source_state, site))
            rows[site] = {'error': 0.0, 'norm': 1.0} | slim.pop(site, {})
        elif hasattr(sources[site], 'experts'):
            raise UserError(f'{site} is a mixture in the source ({sources[site].spec}) and not the same here; take its mlp',
                            'mlp')
    todo = [site for site in sites if site not in rows]
    for site, stats in with_bar(work.walk(todo), 'decompose', 'site', len(todo)):
        with one_line(site):
            rows[site] = slim.pop(site, {}) | work.fill(site, sources.pop(site), stats)
        if progress and (rows[site]['error'] or 'units' in rows[site]):
            progress(describe(site, sites[site].spec, rows[site]))
    fill_rest(model, source_config, source_state)
    return [{'site': site, 'spec': module.spec, **rows[site], 'parameters': sum(p.numel() for p in module.parameters())}
            for site, module in sites.items()]


def describe(site, spec, row):
    """One line of a report's row."""
    words = f'{site}: {spec}, relative error {row["error"]:.4f}, norm kept {row["norm"]:.4f}'
    if 'units' in row:
        words += f', {row["units"]} units'
    if 'output_error' in row:
        words += f', output error {row["output_error"]:.4f}'
    if 'loss' in row:
        words += f', loss with it alone {row["loss"]:.4f} (dense {row["dense_loss"]:.4f})'
    return words


@contextlib.contextmanager
def one_line(site):
    """Errors of a site as one sentence; out-of-memory errors pass through."""
    try:
        yield
    except (ValueError, RuntimeError) as fault:
        if isinstance(fault, torch.OutOfMemoryError) or 'allocate memory' in str(fault):
            raise
        raise UserError(f'{site}: {fault}'.replace('\n', ' ')) from None


def check_sizes(config, source):
    """Refuse models that cannot be filled: other sizes, more positions, fewer tokens, a tied head from an untied one."""
    for name in ('n_layer', 'n_head', 'n_embd', 'bias'):
        ours, theirs = getattr(config, name), getattr(source, name)
        if ours != theirs:
            raise UserError(f'{name} is {theirs} in the source and {ours} here; they must be equal', name)
    if config.block_size > source.block_size:
        raise UserError(f'block_size can be at most {source.block_size}, that of the source, got {config.block_size}',
                        'block_size')
    if config.vocab_size < source.vocab_size:
        raise UserError(f'vocab_size must be at least {source.vocab_size}, that of the source, got {config.vocab_size}',
                        'vocab_size')
    if config.tie_weights and not source.tie_weights:
        raise UserError('the source has an untied head; set tie_weights=False', 'tie_weights')


def fill_rest(model, source_config, source_state):
    """Copy all other tensors, by name: embeddings, norms, the head."""
    sites = tuple(f'transformer.{site}.' for site in fillable(model))
    if source_config.tie_weights:
        source_state = {'lm_head.weight': source_state['transformer.wte.weight'], **source_state}
    rest = {name: t for name, t in model.state_dict().items() if not name.startswith(sites)}
    buffers = {name for name, _ in model.named_buffers()}       # such as a window: the model's own where the source has none
    rest = {name: t for name, t in rest.items() if name in source_state or name not in buffers}
    for name in [name for name in rest if name.endswith('.router.weight') and name not in source_state]:
        rest.pop(name).zero_()                          # equal gates: experts.ExpertLinear.from_dense relies on it
    odd = rest.keys() ^ {name for name in source_state if not name.startswith(sites)}
    if odd:
        raise UserError(f'{min(odd)} is in the source or the model only', 'init_from')
    for name, target in rest.items():
        source = source_state[name].to(target)                      # its device and dtype
        if name == 'transformer.wpe.weight':
            source = source[:target.shape[0]]
        elif name in ('transformer.wte.weight', 'lm_head.weight') and target.shape[0] > source.shape[0]:
            target[source.shape[0]:] = source.mean(0)
            target = target[:source.shape[0]]
        if source.shape != target.shape:
            raise UserError(f'{name} is {tuple(source.shape)} in the source and {tuple(target.shape)} here',
                            'init_from')
        target.copy_(source)
