"""Rules with the sizes that fill a budget, which counts all matrices of a study together, also those that stay dense."""
import dataclasses
import fnmatch

import torch

import lowrank.svd
from decomposition import allocate, widths
from model import GPT
from variants import UserError

TOLERANCE = 0.01        # by which rules with given sizes may miss a budget, as a share of it


def counted(model, pattern):
    """{site: module} of the matrices that a study counts; raises UserError where there is none."""
    found = {site: module for site, module in model.sites().items() if fnmatch.fnmatchcase(site, pattern)}
    if not found:
        raise UserError(f'sites={pattern!r} matches none of the matrices {", ".join(list(model.sites())[:4])}, ...', 'sites')
    return found


def shapes(config):
    """The model without memory."""
    with torch.device('meta'):
        return GPT(config)


def weights_of(module):
    """Parameters of a linear without its bias."""
    return sum(p.numel() for name, p in module.named_parameters() if not name.endswith('bias'))


def cost(config, pattern):
    """(parameters of the counted matrices, their dense parameters, those of the whole model) for a GPTConfig."""
    model = shapes(config)
    sites = counted(model, pattern)
    return (sum(map(weights_of, sites.values())), sum(m.in_features * m.out_features for m in sites.values()),
            model.num_params())


def rules_of(dense, config, variant, share, pattern, weights=None, stats=None, known=None):
    """{'linear' and where they change 'mlp', 'attention': rules} of a variant for a budget: fitted, or widths.forms.

    dense: the dense model, on any device; the rest as for fitted.
    """
    if variant.narrow:
        return widths.forms(config, dense, variant, share, counted(dense, pattern), stats, {} if known is None else known)
    given = {key: getattr(variant, key) for key in ('mlp', 'attention') if getattr(variant, key)}
    return given | {'linear': fitted(dataclasses.replace(config, **given), variant, share, pattern, weights, stats, known)}


def fitted(config, variant, share, pattern, weights=None, stats=None, known=None):
    """The rules of a variant with sizes for `share` of the dense parameters of the counted matrices, never more.

    config: the dense model's GPTConfig; weights: site -> dense weight; stats: [sites], gradients -> {site: Stats}, both for
    sizes that follow a spectrum; known: a dict that caches the spectra, for the next budget on the same statistics.
    Matrices that stay dense use up the same budget. Raises UserError for a share out of reach, rules that name a
    structure outside the pattern, and given sizes that miss the share by more than TOLERANCE.
    """
    if variant.sizes == 'given':
        return checked(config, variant, share, pattern)
    sites = allocate.candidates(dataclasses.replace(config, linear=variant.linear))
    outside = [s.name for s in sites if not fnmatch.fnmatchcase(s.name, pattern)]
    if outside:
        raise UserError(f'linear compresses {outside[0]}, which sites={pattern!r} does not count; drop it or widen sites',
                        'linear')
    _, dense, _ = cost(dataclasses.replace(config, linear={}), pattern)
    rest = dense - sum(s.dense for s in sites)
    budget = int(share * dense) - rest
    least, most = sum(s.first for s in sites), sum(s.numel(s.most) for s in sites)
    if not least <= budget <= most:
        raise UserError(f'a budget of {share:g} leaves {budget:,} parameters for {len(sites)} matrices, which take '
                        f'{least:,} to {most:,}; leave fewer dense or take another budget', 'linear')
    if variant.sizes == 'uniform':
        chosen = allocate.uniform(sites, budget)
    else:
        chosen = allocate.spectrum(sites, budget, gains(sites, variant, weights, stats, {} if known is None else known))
    return allocate.merged(variant.linear, {s.name: str(allocate.sized(s.spec, chosen[s.name])) for s in sites})


def checked(config, variant, share, pattern):
    """Rules with given sizes, unchanged."""
    used, dense, _ = cost(dataclasses.replace(config, linear=variant.linear), pattern)
    if share and abs(used / dense - share) > TOLERANCE * share:
        raise UserError(f'the given sizes take {used / dense:.4f} of the parameters, and the budget is {share:g}; change '
                        'them, or leave them out', 'linear')
    return variant.linear


def gains(sites, variant, weights, stats, known):
    """{site: gains of sizes 1, 2, ..., falling}: shares of each site's outputs, or nats by the curvature of the loss.

    Curvature: half of tr(H D C D^T) for an error D, with C = E[x x^T] of the inputs and H = E[g g^T] of the loss's gradients
    at the outputs, the second-order term of the loss per token in K-FAC's approximation (Martens and Grosse 2015), so that
    sites can be compared. A size keeps the leading singular directions of H^1/2 W C^1/2.
    """
    curved = variant.sizes == 'curvature'
    keys = {site.name: (site.name, str(site.spec), curved) for site in sites}
    new = {site.name: site for site in sites if keys[site.name] not in known}
    for seen in stats(list(new), curved) if new else ():
        for name in seen.keys() & new.keys():
            weight, site = weights(name).double(), new[name]
            if curved:
                weight = two_sided(weight, seen[name], allocate.root if 'kron' in str(site.spec) else torch.linalg.cholesky)
                scale = weight.square().sum().item() / 2
                known[keys[name]] = [scale * gain for gain in allocate.gain_of(site, weight)]
            else:
                known[keys[name]] = allocate.gain_of(site, weight, seen[name])
    return {name: known[key] for name, key in keys.items()}


def two_sided(weight, seen, factor):
    """R^T W S, (out, in), with S S^T = E[x x^T] and R R^T = E[g g^T] + ridges: any factors have the same singular values."""
    C = lowrank.svd.with_ridge(seen.covariance + torch.outer(seen.mean, seen.mean), seen.count)
    return factor(lowrank.svd.with_ridge(seen.gradient, ridge=lowrank.svd.GRADIENT_RIDGE)).t() @ weight @ factor(C)
