"""Widths of MLPs and attention under one budget, alone or together with the sizes of structures on what stays."""
import fnmatch

import torch

import lowrank.svd
import variants
from compression.sizes import root
from decomposition import allocate, menus, narrow
from specs import Spec, UserError, match, parse_spec

RATIOS = (1.0, 1.1, 1.2, 1.35, 1.6)     # of the budget: the widths that a part may take when structures follow
MULTIPLE = 8                            # widths of MLPs: what matrix products like
EIGHTHS = 8                             # steps of v_head_dim
KINDS = {'mlp': 'mlp', 'heads': 'attn', 'values': 'attn'}


def parts_of(dense, narrowing, pattern):
    """[narrow.Part] of the dense model that a variant may narrow: words of KINDS with commas."""
    wanted = [word.strip() for word in narrowing.split(',')]
    odd = [word for word in wanted if word not in KINDS]
    if odd:
        raise UserError(f'narrow takes {", ".join(KINDS)}, with commas, got {odd[0]!r}', 'narrow')
    found = []
    for i, block in enumerate(dense.transformer.h):
        for kind in ('attn', 'mlp'):
            part = narrow.Part(f'h.{i}.{kind}', getattr(block, kind), getattr(block, kind))
            if kind in [KINDS[word] for word in wanted]:
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


def step(part):
    return MULTIPLE if part.name.endswith('mlp') else 1


def shapes(part, narrowing):
    """[(units, v_head_dim or None)] that a part may have, the source's last."""
    n, size = part.source.n_units, getattr(part.source, 'v_head_dim', None)
    mlp = part.name.endswith('mlp')
    counts = [n] if not mlp and 'heads' not in narrowing else [*range(step(part), n, step(part)), n]
    dims = sorted({-(-size * k // EIGHTHS) for k in range(1, EIGHTHS + 1)}) if not mlp and 'values' in narrowing else [size]
    return [(k, r) for k in counts for r in dims]


def cost(part, shape):
    """Parameters of the part's matrices at (units, v_head_dim), without biases."""
    (units_kept, r), n, found = shape, part.source.n_units, 0
    for site, module in matrices(part).items():
        share = r / part.source.v_head_dim if r and site.endswith(('.c_v', '.c_proj')) else 1
        found += round(module.weight.numel() * units_kept * share / n)
    return found


def ordered(parts, variant, stats, known):
    """{part name: {shape: predicted nats}}; orders and nats are kept in `known` by (site, method)."""
    name, _ = narrow.method_of(variant.decompose)
    todo = {part.site: part for part in parts if (part.site, name) not in known}
    for seen in stats(list(todo), True) if todo else ():
        for site, found in seen.items():
            order, nats = narrow.order_of(todo[site], found, name)
            known[site, name] = order, nats, narrow.value_nats(todo[site], found, order, shapes(todo[site], 'heads, values'))
    found = {}
    for part in parts:
        _, nats, values = known[part.site, name]
        whole = getattr(part.source, 'v_head_dim', None)
        found[part.name] = {(k, r): float(nats[k]) if r == whole else values[k, r] for k, r in shapes(part, variant.narrow)}
    return found


def forms(config, dense, variant, share, pattern, stats, known):
    """{'linear', 'mlp', 'attention': rules} for `share` of the dense parameters of the counted matrices, never more.

    dense: the model; variant: a study.Variant with `narrow`; stats and known as for sizes.fitted. Matrices that nothing
    narrows and no rule of `linear` compresses stay as they are and use up the same budget. Raises UserError.
    """
    parts = parts_of(dense, variant.narrow, pattern)
    counted = {s: m for s, m in dense.sites(experts=True).items() if fnmatch.fnmatchcase(s, pattern)}
    whole = sum(m.weight.numel() for m in counted.values())
    budget = int(share * whole) - sum(m.weight.numel() for s, m in counted.items()
                                      if not sized_rule(variant, s) and not any(s in matrices(part) for part in parts))
    if variant.sizes == 'uniform':
        return rules(config, uniform(parts, budget, variant), {}, variant)
    nats = ordered(parts, variant, stats, known)
    try:
        if not variant.linear:
            return rules(config, narrowest(parts, nats, budget), {}, variant)
        grid = [narrowest(parts, nats, int(ratio * budget)) for ratio in ((variant.split,) if variant.split else RATIOS)]
        table = dict(both(parts, nats, grid, variant, stats, known)) | dict(loose(counted, parts, variant, stats, known))
        found = menus.choose(table, budget)
    except ValueError as error:
        raise UserError(f'a budget of {share:g} cannot be met: {error}', 'budgets') from None
    return rules(config, {c.part: c.width.units for c in found if c.width.units},
                 {site: size for c in found for site, size in c.sizes.items()}, variant)


def uniform(parts, budget, variant):
    """{part: shape}: the same share of its units for each, as large as the budget allows."""
    tables = {p.name: (p, shapes(p, variant.narrow)) for p in parts}

    def at(share):
        whole = {name: cost(p, found[-1]) for name, (p, found) in tables.items()}
        return {name: max((s for s in found if cost(p, s) <= share * whole[name]), key=lambda s, p=p: cost(p, s),
                          default=found[0]) for name, (p, found) in tables.items()}
    for share in (k / 512 for k in range(512, 0, -1)):
        chosen = at(share)
        if sum(cost(p, chosen[p.name]) for p in parts) <= budget:
            return chosen
    raise UserError(f'a budget of {budget:,} parameters is below the narrowest widths', 'budgets')


def narrowest(parts, nats, budget):
    """{part: shape} of least predicted nats within the budget."""
    table = {}
    for part in parts:
        found = sorted(nats[part.name], key=lambda shape: cost(part, shape))
        costs, losses = zip(*((cost(part, shape), nats[part.name][shape]) for shape in found))
        menu = menus.Menu(part.name, found, torch.tensor(costs).double(), torch.tensor(losses).double())
        table[part.name] = [menus.Width(None, 0.0, [menu])]
    return {choice.part: choice.sizes[choice.part] for choice in menus.choose(table, budget)}


# ---------------------------------------------------------------------------------------------------
# structures on what stays

def sized_rule(variant, site):
    """Whether a rule of `linear` gives the site a structure."""
    return bool(variant.linear) and allocate.is_sized(parse_spec(match(variant.linear, site, 'dense')[1], variants.LINEARS))


def loose(counted, parts, variant, stats, known):
    """Yield (site, [menus.Width]) of matrices that get a structure and belong to no part."""
    taken = {site for part in parts for site in matrices(part)}
    todo = [site for site in counted if site not in taken and sized_rule(variant, site)]
    new = [site for site in todo if (site, str(variant.linear)) not in known]
    for seen in stats(new, True) if new else ():
        for site, found in seen.items():
            spec = parse_spec(match(variant.linear, site, 'dense')[1], variants.LINEARS)
            known[site, str(variant.linear)] = menu_of(site, spec, counted[site].weight.detach().double(), found, None, None)
    for site in todo:
        yield site, [menus.Width(None, 0.0, [known[site, str(variant.linear)]])]


def both(parts, nats, grid, variant, stats, known):
    """Yield (part, [menus.Width]): each shape of the grid, with the sizes of the structures that `linear` names."""
    name, _ = narrow.method_of(variant.decompose)
    for part in parts:
        order, widths = known[part.site, name][0], []
        chosen = sorted({one[part.name] for one in grid}, key=lambda shape: cost(part, shape))
        new = [shape for shape in chosen if (part.name, shape, str(variant.linear)) not in known]
        seen = {site: s for found in stats(list(matrices(part)), True) for site, s in found.items()} if new else {}
        for shape in chosen:
            key = (part.name, shape, str(variant.linear))
            if key not in known:
                known[key] = list(sized(part, order, shape, variant, seen))
            widths.append(menus.Width(shape, nats[part.name][shape], known[key]))
        yield part.name, widths


def sized(part, order, shape, variant, seen):
    """Yield the menus.Menu of each matrix of a part that keeps the first units of the order."""
    kept, inputs, T, rows = narrow.kept(part, seen[part.site], order, shape)
    for site, module in matrices(part).items():
        weight = module.weight.detach().double()
        outputs = None if site == part.site else rows[site]
        weight = weight @ T if outputs is None else outputs.rows(weight)
        spec = parse_spec(match(variant.linear, site, 'dense')[1], variants.LINEARS)
        yield menu_of(site, spec, weight, seen[site], inputs if outputs is None else None, outputs)


def menu_of(site, spec, weight, stats, inputs, outputs):
    """The menus.Menu of one narrowed matrix: dense, or the structure at each size, by the curvature of the loss."""
    number = torch.tensor([weight.numel()], dtype=torch.float64)
    dense = menus.Menu(site, [None], number, torch.zeros_like(number))
    if not allocate.is_sized(spec):
        return dense
    here = allocate.site_of(site, spec, tuple(weight.shape))
    C = lowrank.svd.with_ridge(stats.covariance + torch.outer(stats.mean, stats.mean), stats.count)
    H = lowrank.svd.with_ridge(stats.gradient, ridge=lowrank.svd.GRADIENT_RIDGE)
    C, H = C if inputs is None else inputs.both(C), H if outputs is None else outputs.both(H, forward=False)
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
    for key, kind in (('mlp', 'mlp'), ('attention', 'attn')):
        specs = {part.rpartition('.')[0]: with_shape(config, key, part.rpartition('.')[0], shape)
                 for part, shape in widths.items() if part.endswith(kind)}
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


def with_shape(config, key, block, shape):
    """The spec of a block with those units and v_head_dim, without what is default."""
    table, default = (variants.MLPS, 'gelu') if key == 'mlp' else (variants.ATTENTIONS, 'causal')
    spec = parse_spec(match(getattr(config, key), block, default)[1], table)
    changed = {'hidden': shape[0]} if key == 'mlp' else {'kv_heads': shape[0], 'v_head_dim': shape[1]}
    neutral = {'kv_heads': config.n_kv_head or config.n_head, 'v_head_dim': config.n_embd // config.n_head}
    plain, given = (variants.check_arguments(key, table[spec.name], block, each, config, block)
                    for each in (Spec(spec.name), spec))
    kept = {name: v for name, v in (given | changed).items() if v != plain[name] and neutral.get(name) != v}
    first = next(iter(plain))
    return str(Spec(spec.name, (kept.pop(first),) if first in kept else (), kept))
