"""Widths of MLPs and attention under one budget, alone or together with the sizes of structures on what stays."""
import fnmatch

import torch

import lowrank.svd
import variants
from compression.sizes import root
from decomposition import allocate, menus, narrow, units
from decomposition.cuts import Cut
from specs import Spec, UserError, match, parse_spec

RATIOS = (1.0, 1.1, 1.2, 1.35, 1.6)     # of the budget: the widths that a part may take when structures follow
MULTIPLE = 8                            # widths of MLPs: what matrix products like


def parts_of(dense, narrowing, pattern):
    """[narrow.Part] of the dense model that a variant may narrow: 'mlp', 'heads' or both."""
    kinds, wanted = {'mlp': 'mlp', 'heads': 'attn'}, [word.strip() for word in narrowing.split(',')]
    odd = [word for word in wanted if word not in kinds]
    if odd:
        raise UserError(f'narrow takes {" and ".join(kinds)}, with commas, got {odd[0]!r}', 'narrow')
    found = []
    for i, block in enumerate(dense.transformer.h):
        for kind in ('attn', 'mlp'):
            part = narrow.Part(f'h.{i}.{kind}', getattr(block, kind), getattr(block, kind))
            if kind in [kinds[word] for word in wanted]:
                if not part.source.units:
                    raise UserError(f'{part.name}: {type(part.source).__name__} has no units that can be removed', 'narrow')
                if not all(fnmatch.fnmatchcase(site, pattern) for site in matrices(part)):
                    raise UserError(f'narrow changes {part.site}, which sites={pattern!r} does not count; widen sites',
                                    'narrow')
                found.append(part)
    return found


def matrices(part):
    """{site: module} of the matrices that have rows or columns per unit."""
    names = [name for name in (*part.source.units, 'c_proj') if hasattr(getattr(part.source, name, None), 'spec')]
    return {f'{part.name}.{name}': getattr(part.source, name) for name in names}


def per_unit(part):
    """Parameters of those matrices per unit, without biases."""
    return sum(module.weight.numel() for module in matrices(part).values()) // part.source.n_units


def step(part):
    return MULTIPLE if part.name.endswith('mlp') else 1


def ordered(parts, variant, stats, known):
    """{part name: nats by units kept}; orders and nats are kept in `known` by (site, method)."""
    name, _ = narrow.method_of(variant.decompose)
    todo = {part.site: part for part in parts if (part.site, name) not in known}
    for seen in stats(list(todo), True) if todo else ():
        for site, found in seen.items():
            known[site, name] = narrow.order_of(todo[site], found, name)
    return {part.name: known[part.site, name][1] for part in parts}


def forms(config, dense, variant, share, pattern, stats, known):
    """{'linear', 'mlp', 'attention': rules} for `share` of the dense parameters of the counted matrices, never more.

    dense: the model; variant: a study.Variant with `narrow`; stats and known as for sizes.fitted. Matrices that nothing
    narrows and no rule of `linear` compresses stay as they are and use up the same budget. Raises UserError.
    """
    parts = parts_of(dense, variant.narrow, pattern)
    counted = {s: m for s, m in dense.sites(experts=True).items() if fnmatch.fnmatchcase(s, pattern)}
    whole = sum(m.weight.numel() for m in counted.values())
    budget = int(share * whole) - sum(m.weight.numel() for s, m in counted.items()
                                      if not any(s in matrices(part) for part in parts))
    if variant.sizes == 'uniform':
        return rules(config, uniform(parts, budget), {}, variant)
    nats = ordered(parts, variant, stats, known)
    try:
        if not variant.linear:
            return rules(config, narrowest(parts, nats, budget), {}, variant)
        ratios = (variant.split,) if variant.split else RATIOS
        grid = [narrowest(parts, nats, min(int(ratio * budget), sum(per_unit(p) * p.source.n_units for p in parts)))
                for ratio in ratios]
        found = menus.choose(dict(both(parts, nats, grid, variant, stats, known)), budget)
    except ValueError as error:
        raise UserError(f'a budget of {share:g} cannot be met: {error}', 'budgets') from None
    return rules(config, {c.part: c.width.units for c in found},
                 {site: size for c in found for site, size in c.sizes.items()}, variant)


def uniform(parts, budget):
    """{part: units}: the same share of its units for each, as large as the budget allows."""
    def at(share):
        return {p.name: max(step(p), int(share * p.source.n_units) // step(p) * step(p)) for p in parts}
    for share in (k / 4096 for k in range(4096, 0, -1)):
        chosen = at(share)
        if sum(per_unit(p) * chosen[p.name] for p in parts) <= budget:
            return chosen
    raise UserError(f'a budget of {budget:,} parameters is below the narrowest widths', 'budgets')


def narrowest(parts, nats, budget):
    """{part: units} of least predicted nats within the budget."""
    table = {}
    for part in parts:
        sizes = list(range(step(part), part.source.n_units, step(part))) + [part.source.n_units]
        costs = torch.tensor([k * per_unit(part) for k in sizes], dtype=torch.float64)
        menu = menus.Menu(part.name, sizes, costs, nats[part.name].cpu()[sizes])
        table[part.name] = [menus.Width(None, 0.0, [menu])]
    return {choice.part: choice.sizes[choice.part] for choice in menus.choose(table, budget)}


# ---------------------------------------------------------------------------------------------------
# structures on what stays

def both(parts, nats, grid, variant, stats, known):
    """Yield (part, [menus.Width]): each width of the grid, with the sizes of the structures that `linear` names."""
    name, _ = narrow.method_of(variant.decompose)
    for part in parts:
        order, widths = known[part.site, name][0], []
        chosen = sorted({one[part.name] for one in grid})
        new = [k for k in chosen if (part.name, k, str(variant.linear)) not in known]
        seen = {site: s for found in stats(list(matrices(part)), True) for site, s in found.items()} if new else {}
        for k in chosen:
            key = (part.name, k, str(variant.linear))
            if key not in known:
                known[key] = list(sized(part, order, k, variant, seen))
            widths.append(menus.Width(k, float(nats[part.name][k]), known[key]))
        yield part.name, widths


def sized(part, order, kept, variant, seen):
    """Yield the menus.Menu of each matrix of a part that keeps the first `kept` units of the order."""
    columns = units.expand(order[:kept].sort().values, part.size)
    C, _ = narrow.moments(part, seen[part.site])
    for site, module in matrices(part).items():
        weight, inputs, outputs = module.weight.detach().double(), None, None
        if site == part.site:
            weight, inputs = weight @ units.predictor(C, columns), Cut(columns)
        else:
            outputs = Cut(units.expand(order[:kept].sort().values, weight.shape[-2] // part.source.n_units))
            weight = outputs.rows(weight)
        spec = parse_spec(match(variant.linear, site, 'dense')[1], variants.LINEARS)
        yield menu_of(site, spec, weight, seen[site], inputs, outputs)


def menu_of(site, spec, weight, stats, inputs, outputs):
    """The menus.Menu of one narrowed matrix: dense, or the structure at each size, by the curvature of the loss."""
    number = torch.tensor([weight.numel()], dtype=torch.float64)
    dense = menus.Menu(site, [None], number, torch.zeros_like(number))
    if not allocate.is_sized(spec):
        return dense
    here = allocate.site_of(site, spec, tuple(weight.shape))
    C = lowrank.svd.with_ridge(stats.covariance + torch.outer(stats.mean, stats.mean), stats.count)
    H = lowrank.svd.with_ridge(stats.gradient, ridge=lowrank.svd.GRADIENT_RIDGE)
    C, H = C if inputs is None else inputs.both(C), H if outputs is None else outputs.both(H)
    factor = root if 'kron' in str(spec) else torch.linalg.cholesky
    bent = factor(H).t() @ weight @ factor(C)
    squares = bent.square().sum() / 2
    gained = torch.tensor(allocate.gain_of(here, bent)[:here.most], dtype=torch.float64).cumsum(0)
    costs = torch.tensor([here.numel(k) for k in range(1, here.most + 1)], dtype=torch.float64)
    return menus.Menu(site, [*range(1, here.most + 1), None], torch.cat((costs, dense.costs)),
                      torch.cat((squares.cpu() * (1 - gained).clamp_min(0), dense.nats)))


# ---------------------------------------------------------------------------------------------------
# rules

def rules(config, widths, sizes, variant):
    """{'linear', 'mlp', 'attention'} for GPTConfig: one spec where all blocks agree."""
    found = {'linear': variant.linear or {}, 'mlp': config.mlp, 'attention': config.attention}
    if sizes:
        specs = {site: 'dense' if size is None else str(allocate.sized(
            parse_spec(match(variant.linear, site, 'dense')[1]), size)) for site, size in sizes.items()}
        found['linear'] = allocate.merged(variant.linear, specs)
    for key, kind, argument in (('mlp', 'mlp', 'hidden'), ('attention', 'attn', 'kv_heads')):
        specs = {part.rpartition('.')[0]: with_width(config, key, part.rpartition('.')[0], argument, k)
                 for part, k in widths.items() if part.endswith(kind)}
        if specs:
            alike = len(specs) == config.n_layer and len(set(specs.values())) == 1
            found[key] = next(iter(specs.values())) if alike else in_front(
                specs, variants.as_rules(getattr(config, key)), config.n_layer)
    return found


def in_front(specs, rules, n_layer):
    """The rules behind those of `specs`, without patterns that win at no block, which a GPT refuses."""
    found = {**specs, **{pattern: spec for pattern, spec in rules.items() if pattern not in specs}}
    idle = variants.idle_rules(found, [f'h.{i}' for i in range(n_layer)])
    return {pattern: spec for pattern, spec in found.items() if pattern not in idle}


def with_width(config, key, block, argument, width):
    """The spec of a block with that width."""
    table = variants.MLPS if key == 'mlp' else variants.ATTENTIONS
    default = 'gelu' if key == 'mlp' else 'causal'
    spec = parse_spec(match(getattr(config, key), block, default)[1], table)
    given = variants.check_arguments(key, table[spec.name], block, spec, config, block)
    plain = variants.check_arguments(key, table[spec.name], block, Spec(spec.name), config, block)
    kept = {name: value for name, value in given.items() if value != plain[name] and name != argument} | {argument: width}
    first = next(iter(plain))
    return str(Spec(spec.name, (kept.pop(first),) if first in kept else (), kept))
