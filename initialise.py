"""Fill a model from another one, site by site: dense weights are decomposed, structured ones realised or copied."""
import inspect

import torch

import variants
from model import GPT
from variants import UserError


@torch.no_grad()
def initialise(model, source_config, source_state, method='van_loan', progress=None):
    """Give `model` the weights of a source with the same n_layer, n_head, n_embd and bias; return what it cost.

    A site with the source's own structure is copied bit by bit; any other is decomposed from the source's dense
    weight by its class's from_dense(method=...). A shorter block_size takes the first positions. A larger vocab_size
    takes the mean of the source's rows in its new ones: their logit is the mean logit, so that by Jensen they get at
    most (new rows) / (old rows) of the probability, whereas rows near zero would win over GPT-2's logits near -100.
    progress: called with one line a decomposed site. Memory: the model, the source and one site.
    Returns one dict a site: site, spec, error = ||W - What|| / ||W||, norm = ||What|| / ||W||, parameters.
    Raises UserError in one line for sizes, sites or tensors that do not fit, or an unknown method.
    """
    check_sizes(model.config, source_config)
    with torch.device('meta'):
        sources = GPT(source_config).sites()
    if sources.keys() != model.sites().keys():
        raise UserError(f'the linears are not those of the source: {min(sources.keys() ^ model.sites().keys())} is in '
                        'one only; take its attention and mlp', 'init_from')
    report = []
    for site, module in model.sites().items():
        prefix = f'transformer.{site}.'
        tensors = {name[len(prefix):]: t for name, t in source_state.items() if name.startswith(prefix)}
        try:
            error, norm = fill_site(module, sources.pop(site), tensors, method)
        except (ValueError, RuntimeError) as fault:
            if isinstance(fault, torch.OutOfMemoryError) or 'allocate memory' in str(fault):
                raise
            raise UserError(f'{site}: {fault}'.replace('\n', ' ')) from None
        report.append({'site': site, 'spec': module.spec, 'error': error, 'norm': norm,
                       'parameters': sum(p.numel() for p in module.parameters())})
        if progress and error:
            progress(f'{site}: {module.spec}, relative error {error:.4f}, norm kept {norm:.4f}')
    fill_rest(model, source_config, source_state)
    return report


def check_sizes(config, source):
    """Refuse what cannot be filled: other sizes, more positions, fewer tokens, a tied head from an untied one."""
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
        raise UserError('the source has a head of its own; set tie_weights=False', 'tie_weights')


def structure(module):
    """(name, {argument: value}) of a site's spec, so that kron(8, 8) and kron(8, n=8, terms=1) are the same."""
    spec = variants.parse_spec(module.spec)
    bound = inspect.signature(variants.LINEARS[spec.name]).bind(0, 0, False, *spec.args, **spec.kwargs)
    bound.apply_defaults()
    return spec.name, dict(list(bound.arguments.items())[3:])       # without in_features, out_features and bias


def fill_site(module, source, tensors, method):
    """Fill one site from `source`, the source's module without values, and its tensors -> (error, norm kept)."""
    name, arguments = structure(module)
    if (name, arguments) == structure(source):
        module.load_state_dict(tensors)
        return 0.0, 1.0
    like = next(module.parameters())
    source.load_state_dict({key: t.to(like.device, like.dtype) for key, t in tensors.items()}, assign=True)
    weight = source.dense_weight()
    made = variants.LINEARS[name].from_dense(weight, source.bias, method=method, **arguments)
    module.load_state_dict(made.state_dict())
    kept, norm = made.dense_weight(), weight.norm().clamp_min(1e-30)
    return ((weight - kept).norm() / norm).item(), (kept.norm() / norm).item()


def fill_rest(model, source_config, source_state):
    """Everything that is no site, by name: embeddings, norms, the head."""
    sites = tuple(f'transformer.{site}.' for site in model.sites())
    if source_config.tie_weights:
        source_state = {'lm_head.weight': source_state['transformer.wte.weight'], **source_state}
    rest = {name: t for name, t in model.state_dict().items() if not name.startswith(sites)}
    buffers = {name for name, _ in model.named_buffers()}       # a window, say: the model's own where the source has none
    rest = {name: t for name, t in rest.items() if name in source_state or name not in buffers}
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
