"""One budget of parameters for all structured sites: which rank, or how many terms, each of them gets.

`rank_budget` is the fraction of the sites' dense parameters that their structures may have. The sizes in the specs are
placeholders then (`lowrank` alone is enough), and the chosen sizes are written to `config.linear`, so that checkpoints
contain them and nothing is chosen twice.
"""
import dataclasses
import inspect
import math

import torch

import configurator
import variants
from decomposition.sizing import spectrum, uniform
from kron.van_loan import rearrange
from lowrank.svd import with_ridge
from model import GPT
from variants import LINEARS, Spec, UserError, parse_spec

SIZES = {'lowrank': ('rank',), 'pivot': ('rank',), 'kron': ('terms',), 'kron_pivot': ('terms',),
         'abba': ('rank1', 'rank2')}                    # the arguments that are chosen, as one size
KRONECKER = ('kron', 'kron_pivot')


@dataclasses.dataclass
class Site:
    """A site whose size is chosen, 1 .. most; the first step costs `step` parameters, each next one `bend` more."""
    name: str
    spec: Spec
    shape: tuple                                        # (out, in)
    first: int                                          # parameters at size 1
    step: int
    most: int                                           # the largest size that saves parameters and still gains
    bend: int = 0

    @property
    def dense(self):
        return self.shape[0] * self.shape[1]

    def numel(self, size):
        return self.first + (size - 1) * self.step + self.bend * (size - 1) * (size - 2) // 2


def sized(spec, size):
    """The spec with that size: of a sum, that of its first part."""
    if spec.name == 'sum':
        parts = spec.args[0] if spec.args else spec.kwargs['parts']
        return Spec('sum', ((str(sized(parse_spec(parts[0]), size)), *parts[1:]),), {
            k: v for k, v in spec.kwargs.items() if k != 'parts'})
    names = SIZES.get(spec.name)
    if not names:
        raise UserError(f'rank_budget knows no size of {spec.name}; give it rules of {", ".join(SIZES)} and dense',
                        'rank_budget')
    given = list(inspect.signature(LINEARS[spec.name]).parameters)[3:]
    values = dict(zip(given, spec.args)) | spec.kwargs | dict.fromkeys(names, size)
    placed = given[:len(spec.args)] or [name for name in given if name in names and given[0] in names]
    return Spec(spec.name, tuple(values.pop(name) for name in placed), values)


def arguments_of(spec):
    """{argument: value} of a spec, defaults filled in."""
    return variants.check_arguments('linear', LINEARS[spec.name], '', spec, 0, 0, False)


def is_sized(spec):
    return spec.name != 'dense'


def with_sizes(rules, size):
    """The rules with that size everywhere."""
    found = {}
    for pattern, text in variants.as_rules(rules).items():
        spec = parse_spec(text, LINEARS)
        found[pattern] = str(sized(spec, size)) if is_sized(spec) else text
    return found


def candidates(config):
    """[Site] of a configuration, whose structures are built at size 1 and without memory."""
    rules = with_sizes(config.linear, 1)
    with torch.device('meta'):
        modules = GPT(dataclasses.replace(configurator.model_config(config), linear=rules)).sites()
    found = [site_of(name, parse_spec(module.spec), (module.out_features, module.in_features))
             for name, module in modules.items() if is_sized(parse_spec(module.spec))]
    if not found:
        raise UserError('rank_budget needs sites with a size to choose: linear names none that is not dense', 'rank_budget')
    return found


def site_of(name, spec, shape):
    """The Site of a structure, whatever its size in the spec, for a matrix of that shape."""
    cls, full = LINEARS[spec.name], full_size(spec, shape)
    numel = [cls.weight_numel(*shape[::-1], **arguments_of(sized(spec, size))) for size in range(1, min(full, 3) + 1)]
    step = numel[1] - numel[0] if full > 1 else numel[0]
    site = Site(name, spec, shape, numel[0], step, full, numel[2] - numel[1] - step if full > 2 else 0)
    site.most = max((k for k in range(1, full + 1) if site.numel(k) < site.dense), default=0)
    return site


def full_size(spec, shape):
    """The size above which a structure gains nothing: the rank, or the Kronecker rank, of a full matrix."""
    if spec.name == 'sum':
        return full_size(parse_spec(spec.args[0][0]), shape)
    if spec.name not in KRONECKER:
        return min(shape)
    arguments = arguments_of(spec)
    left = arguments['m'] * arguments['n']
    return min(left, shape[0] * shape[1] // left)


# ---------------------------------------------------------------------------------------------------
# the choice

def budget_of(sites, fraction):
    """Parameters that the fraction allows; UserError with the reachable range where it cannot be met."""
    dense, least, most = (sum(values) for values in zip(*((s.dense, s.first, s.numel(s.most)) for s in sites)))
    budget = int(fraction * dense)
    if not least <= budget <= most:
        low, high = math.ceil(least / dense * 1e4) / 1e4, math.floor(most / dense * 1e4) / 1e4
        raise UserError(f'rank_budget={fraction:g} cannot be met: these {len(sites)} sites reach {low:g}, with size 1 '
                        f'everywhere, to {high:g}', 'rank_budget')
    return budget


def gain_of(site, weight, stats=None):
    """Gains of sizes 1, 2, ..., falling: the share of the site's output power that each further rank or term keeps.

    Squared singular values of W C^1/2 over their sum, C = E[x x^T] with a ridge (I without stats): exactly what
    svd_whitened keeps. For terms those of its rearrangement R(W C^1/2), an estimate of what a fit keeps; abba(k, k) counts
    as lowrank(2 k), a sum as its first part. Float64, one SVD and with stats an eigendecomposition.
    """
    W = weight.detach().double()
    if stats is not None:
        C = stats.covariance + torch.outer(stats.mean, stats.mean)
        W = W @ root(with_ridge(C.to(W.device), stats.count))
    spec = parse_spec(site.spec.args[0][0]) if site.spec.name == 'sum' else site.spec
    if spec.name in KRONECKER:
        arguments = arguments_of(spec)
        W = rearrange(W, arguments['m'], arguments['n'])
    squares = torch.linalg.svdvals(W).square()
    squares = (squares / squares.sum().clamp_min(1e-300)).tolist()
    each = len(SIZES[spec.name])
    squares += [0.0] * (each * site.most)
    return [sum(squares[each * k:each * (k + 1)]) for k in range(site.most)]


def root(matrix):
    """The symmetric square root of a positive semidefinite matrix."""
    values, Q = torch.linalg.eigh(matrix)
    return (Q * values.clamp_min(0).sqrt()) @ Q.t()


# ---------------------------------------------------------------------------------------------------
# a run's

def resolve(config, say=print, weights=None, seen=None):
    """Choose the sizes of config.linear in place, as rank_budget and rank_allocation say; nothing without a budget.

    weights: a function site -> dense weight, needed by 'spectrum'; seen: {site: Stats} for whitening, or a function that
    returns it.
    Raises UserError for a budget out of reach.
    """
    if not config.rank_budget:
        return
    sites = candidates(config)
    budget = budget_of(sites, config.rank_budget)
    if config.rank_allocation == 'uniform':
        chosen = uniform(sites, budget)
    else:
        seen = (seen([s.name for s in sites]) if callable(seen) else seen) or {}
        chosen = spectrum(sites, budget, {s.name: gain_of(s, weights(s.name), seen.get(s.name)) for s in sites})
    used, dense = sum(s.numel(chosen[s.name]) for s in sites), sum(s.dense for s in sites)
    config.linear = merged(config.linear, {s.name: str(sized(s.spec, chosen[s.name])) for s in sites})
    say(f'rank_budget={config.rank_budget:g}, {config.rank_allocation}: {used:,} of {dense:,} parameters '
        f'({used / dense:.4f}) at {len(sites)} sites, sizes {min(chosen.values())} to {max(chosen.values())}')


def merged(rules, specs):
    """Rules that give the sites their `specs`: a pattern whose sites agree stays, others are split into sites."""
    winners, found = {}, {}
    for site in specs:
        winners.setdefault(variants.match(rules, site, None)[0], []).append(site)
    for pattern, text in variants.as_rules(rules).items():
        here = {site: specs[site] for site in winners.get(pattern, ())}
        found |= {pattern: here.popitem()[1]} if len(set(here.values())) == 1 else here or {pattern: text}
    return found


def agrees(given, resolved):
    """Whether rules with chosen sizes come from the given ones: a resumed run may be given the rules it started from."""
    def bare(text):
        spec = parse_spec(text, LINEARS)
        return str(sized(spec, 1)) if is_sized(spec) else text
    return all(bare(variants.match(given, pattern, 'dense')[1]) == bare(spec) for pattern, spec in resolved.items())

