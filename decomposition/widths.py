"""Widths of MLPs and attention under one budget, alone or together with the sizes of structures on what stays."""
import dataclasses

import torch

import lowrank.svd
import variants
from decomposition import allocate, menus, narrow, units
from decomposition.allocate import root
from decomposition.rules import rules
from variants import UserError, match, parse_spec

RATIOS = (1.0, 1.1, 1.2, 1.35, 1.6)     # of the budget: the widths that a part may take when structures follow
MULTIPLE = 8                            # widths of MLPs: what matrix products like
EIGHTHS = 8                             # steps of v_head_dim
KINDS = {'mlp': 'mlp', 'heads': 'attn', 'values': 'attn'}


@dataclasses.dataclass
class Wanted:
    """What forms() is asked for."""
    narrow: str
    linear: dict | str
    decompose: str
    sizes: str
    split: float = 0.0


def parts_of(dense, narrowing, counted=None):
    """[narrow.Part] of the dense model that `narrowing`, words of KINDS with commas, names; all in `counted`, if given."""
    wanted = [word.strip() for word in narrowing.split(',') if word.strip()]
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
                if counted is not None and matrices(part).keys() - counted.keys():
                    raise UserError(f'narrow changes {part.site}, which `sites` does not count; widen it', 'narrow')
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


def forms(config, dense, variant, share, counted, stats, known):
    """{'linear', 'mlp', 'attention': rules} for `share` of the dense parameters of the counted matrices, never more.

    dense: the model; counted: {site: module}; variant: an object with linear, decompose and narrow as train.py takes
    them, sizes 'uniform' or 'curvature', and split, the budget of the widths over the whole one (0: by predicted nats);
    stats: [sites], gradients -> what calibrate.passes yields; known: a dict that serves the next budget on the same
    statistics. Matrices that nothing narrows and no rule compresses stay as they are and use up the same budget.
    Raises UserError for a budget out of reach.
    """
    parts = parts_of(dense, variant.narrow, counted)
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


def for_run(config, dense, stats):
    """(forms of a run by its rank_budget, known): the budget counts the matrices that become narrower or get a structure."""
    wanted, known = Wanted(config.narrow, config.linear, config.decompose, config.rank_allocation), {}
    taken = {site for part in parts_of(dense, config.narrow) for site in matrices(part)}
    counted = {site: m for site, m in dense.sites(experts=True).items() if site in taken or sized_rule(wanted, site)}
    if not counted:
        raise UserError('rank_budget needs sites with a size to choose: neither narrow nor linear names any', 'rank_budget')
    return forms(dense.config, dense, wanted, config.rank_budget, counted, stats, known), known


def orders(known):
    """{(site of a c_proj, method): order}, what Decomposition.orders takes."""
    return {key: found[0] for key, found in known.items() if key[1] in units.METHODS}


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
