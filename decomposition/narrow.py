"""A dense model with fewer hidden neurons, groups of heads and value features per block, as a source for decomposition.

Which of them stay is chosen by decomposition/units.py, and c_proj is refitted to what stays; everything else keeps its rows.
The narrowed model is dense: it is as fast as its size, and structures may then be fitted to its matrices.
"""
import dataclasses

import torch

import variants
from decomposition import sequential, units
from decomposition.cuts import cut_of, cut_passes, cuts_of, predict, rows_of
from decomposition.progress import with_bar
from layers.sums import SEQUENTIAL, STREAMED
from lowrank.svd import with_ridge
from variants import UserError


@dataclasses.dataclass
class Part:
    """The MLP or the attention of a block that becomes narrower. site: its c_proj; source, target: the two modules."""
    name: str                                           # h.3.mlp
    source: torch.nn.Module
    target: torch.nn.Module

    @property
    def site(self):
        return f'{self.name}.c_proj'

    @property
    def size(self):
        """Columns of c_proj per unit."""
        return self.source.c_proj.in_features // self.source.n_units

    @property
    def heads(self):
        """Query heads per unit of an attention."""
        return getattr(self.source, 'n_head', 1) // getattr(self.source, 'n_kv_head', 1)


def parts(model, source):
    """[Part] of the blocks of `model` that are narrower than in `source`; UserError where that cannot be."""
    found = []
    for i, (ours, theirs) in enumerate(zip(model.transformer.h, source.transformer.h)):
        for kind in ('attn', 'mlp'):
            part = Part(f'h.{i}.{kind}', getattr(theirs, kind), getattr(ours, kind))
            if type(part.source) is type(part.target) and part.source.units and shape(part.source) != shape(part.target):
                check(part)
                found.append(part)
    return found


def shape(module):
    return module.n_units, getattr(module, 'v_head_dim', None)


def check(part):
    """Refuse parts that are wider, hold structures already, or are normalised."""
    for ours, theirs, what in zip(shape(part.target), shape(part.source), ('units', 'v_head_dim')):
        if ours is not None and ours > theirs:
            raise UserError(f'{part.name} has {ours} {what}, and the source {theirs}; units can be removed, not added',
                            part_key(part))
    for name in (*part.source.units, 'c_proj'):
        module = getattr(part.source, name, None)
        if module is not None and not hasattr(module, 'weight') or getattr(module, 'weight', ()) is None:
            raise UserError(f'{part.name}.{name} is {module.spec} in the source, and units are removed from dense matrices; '
                            'realise it first (train.py --finish=dense, or export.py --dense=True)', part_key(part))
    if getattr(part.source, 's_u', None) is not None:
        raise UserError(f'{part.name}: ngpt keeps the columns of c_proj at unit length, which a refit does not; keep its '
                        'width', part_key(part))


def part_key(part):
    return 'mlp' if part.name.endswith('mlp') else 'attention'


def narrowed(model, config, state, how, runnable):
    """(config, state, how, rows) of the source made as narrow as `model`; unchanged, with {}, where no width differs.

    config, state: of the dense source; how: sites.Decomposition, whose method may name one of units.METHODS, with
    _streamed or _sequential as for any other (default neurons); runnable: builds the source. rows: {site: its row of the
    report}. The `passes` of the returned how gives the dense model's statistics of what stays.
    Raises UserError for widths that do not fit and without text.
    """
    with torch.device('meta'):
        slim = parts(model, type(model)(config))
    if not slim:
        return config, state, how, {}
    batches = how.batches() if callable(how.batches) else how.batches
    if not batches:
        raise UserError(f'{slim[0].name} becomes narrower, which needs text to calibrate on; set calibration_tokens above 0',
                        'decompose')
    how = dataclasses.replace(how, batches=batches)
    source, here = how.dense or runnable(config, state, how.device), next(model.parameters()).device
    slim, state, cuts, rows = parts(model, source), dict(state), {}, {}
    target = dataclasses.replace(config, mlp=model.config.mlp, attention=model.config.attention)
    todo = walk(source, slim, how, runnable, config, state)
    for part, stats, place in with_bar(todo, 'narrow', 'part', len(slim)):
        tensors, found, rows[part.site] = narrow_part(part, stats, how)
        cuts |= found
        state |= {f'transformer.{part.name}.{name}': t.to(here) for name, t in tensors.items()}
        place(target, part, tensors)
    return target, state, dataclasses.replace(how, passes=cut_passes(how.passes, source, cuts), dense=None), rows


def method_of(methods):
    """(name in units.METHODS, '', '_streamed' or '_sequential'); UserError for a name that is none."""
    for name in (name.strip() for name in methods.split(',')):
        end = next((end for end in (STREAMED, SEQUENTIAL) if name.endswith(end)), '')
        if name.removesuffix(end) in units.METHODS:
            return name.removesuffix(end), end
        if name.startswith('neurons'):
            raise UserError(f'there is no method {name!r}; choose among {", ".join(units.METHODS)}'
                            f'{variants.did_you_mean(name, units.METHODS)}', 'decompose')
    return 'neurons', ''


def walk(source, slim, how, runnable, config, state):
    """Yield (Part, Stats of its c_proj, a function that puts the narrow part into the model whose inputs are measured)."""
    by_site, (name, end) = {part.site: part for part in slim}, method_of(how.method)
    known = all((site, name) in how.orders and shape(part.target)[1:] == shape(part.source)[1:]
                for site, part in by_site.items())
    curved = units.METHODS[name][1] and not known
    if not end:
        for found in how.passes(source, list(by_site), how.batches, curved):
            yield from ((by_site[site], stats, lambda *_: None) for site, stats in found.items())
        return
    mixed = runnable(config, source.state_dict(), how.device)

    def place(target, part, tensors):
        block = part.name.rpartition('.')[0]
        with torch.device('meta'):
            build = variants.mlp if part.name.endswith('mlp') else variants.attention
            made = build(dataclasses.replace(target, dropout=0.0), part.name, block)
        values = mixed.transformer.get_submodule(part.name).state_dict() | tensors
        like = next(mixed.parameters())
        made.load_state_dict({key: t.to(like) if t.is_floating_point() else t for key, t in values.items()}, assign=True)
        mixed.transformer.set_submodule(part.name, made.eval())
    for site, stats in sequential.walk(source, mixed, list(by_site), how.batches, units.METHODS[name][1], how.passes,
                                       end == SEQUENTIAL):
        yield by_site[site], stats, place


# ---------------------------------------------------------------------------------------------------
# one part

def moments(part, stats):
    """(C with a ridge, M or None) of c_proj's inputs: about their means where a bias absorbs these."""
    C, M = stats.covariance, stats.cross
    if part.source.c_proj.bias is None:
        C = C + torch.outer(stats.mean, stats.mean)
        M = M if M is None else M + torch.outer(stats.source_mean, stats.mean)
    ridged = with_ridge(C, stats.count)
    return ridged, M if M is None else M + (ridged - C)             # the ridge of svd.moved: without text T = selection


def order_of(part, stats, name):
    """(order of the units, nats that each number of them costs), as units.losses."""
    C, _ = moments(part, stats)
    function, curved = units.METHODS[name]
    weight = part.source.c_proj.weight.flatten(0, -2).to(C.device)
    bend = weights_of(part, stats)
    order = function(C, bend if curved else weight.double(), part.size)
    return order, units.losses(C, bend, order, part.size)


def weights_of(part, stats):
    """units.weighted of c_proj, of a mixture's experts below each other, each for its share of the tokens."""
    weight = part.source.c_proj.weight.detach()
    each = weight if weight.ndim == 3 else weight[None]
    A = torch.cat([units.weighted(W.to(stats.covariance.device), stats.gradient) for W in each])
    return A / len(each) ** 0.5


def value_nats(part, stats, order, shapes):
    """{(units, v_head_dim): predicted nats} of an attention with smaller value heads, refitted."""
    found, whole = {}, getattr(part.source, 'v_head_dim', None)
    A, (C, _) = weights_of(part, stats), moments(part, stats)
    for shape in shapes:
        if shape[1] != whole:
            cut = cut_of(part, A, C, order[:shape[0]].sort().values, shape[1])
            side = C @ cut.keep.t()
            lost = C - side @ torch.cholesky_solve(side.t(), torch.linalg.cholesky(cut.both(C)))
            found[shape] = ((A @ lost) * A).sum().item() / 2
    return found


def kept(part, stats, order, shape):
    """(places of the units kept, Cut of c_proj's inputs, T, {site: Cut of its outputs}) of a part at (units, v_head_dim)."""
    places = order[:shape[0]].sort().values
    C, M = moments(part, stats)
    cut = cut_of(part, weights_of(part, stats), C, places, shape[1])
    cuts = {site: outputs for site, (outputs, _) in cuts_of(part, places, cut).items() if outputs is not None}
    return places, cut, predict(C, M, cut), cuts


def narrow_part(part, stats, how):
    """({name below the part: tensor}, {site: (Cut of its outputs, Cut of its inputs)}, the row of the report)."""
    name, end = method_of(how.method)
    order = how.orders.get((part.site, name)) if not end else None
    order = order_of(part, stats, name)[0] if order is None else order
    places, cut, T, _ = kept(part, stats, order, shape(part.target))
    return refitted(part, places, cut, T, stats), cuts_of(part, places, cut), {
        'units': f'{part.target.n_units} of {part.source.n_units}', 'output_error': error(part, stats, cut, T)}


def refitted(part, kept, cut, T, stats):
    """{name below the part: tensor}: the rows that stay, and c_proj times T with its bias corrected."""
    found = {}
    for module in part.source.units:
        source = getattr(part.source, module, None)
        for name, t in source.named_parameters() if source is not None else ():
            found[f'{module}.{name}'] = rows_of(part, module, kept, cut).rows(t.detach()).contiguous()
    source = part.source.c_proj
    W, wide = source.weight.detach(), torch.promote_types(source.weight.dtype, torch.float32)
    found['c_proj.weight'] = (W.double() @ T.to(W.device)).to(wide)
    if source.bias is not None:
        here = stats.mean if stats.source_mean is None else stats.source_mean
        shift = (W.double() @ (here - T @ cut.rows(stats.mean)).to(W.device)).reshape(-1, W.shape[-2]).mean(0)
        found['c_proj.bias'] = (source.bias.detach().double() + shift).to(wide)
    return found


def error(part, stats, cut, T):
    """sqrt(E|W h - W T h_S|^2 / E|W h|^2) over the calibration tokens, experts alike."""
    W = part.source.c_proj.weight.detach().double().flatten(0, -2).to(stats.covariance.device)
    there = (stats.mean, stats.covariance) if stats.cross is None else (stats.source_mean, stats.source_covariance)
    about = 0.0 if part.source.c_proj.bias is not None else 1.0         # a bias absorbs the means
    C = there[1] + about * torch.outer(there[0], there[0])
    M = C if stats.cross is None else stats.cross + about * torch.outer(there[0], stats.mean)
    K = cut.both(stats.covariance + about * torch.outer(stats.mean, stats.mean))
    side = M @ cut.keep.t() if cut.back is not None else M[:, cut.keep]
    lost, whole = C - 2 * T @ side.t() + T @ K @ T.t(), there[1] + torch.outer(there[0], there[0])
    return (((W @ lost) * W).sum().clamp_min(0) / ((W @ whole) * W).sum().clamp_min(1e-300)).sqrt().item()
