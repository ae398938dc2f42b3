"""A sum of structures as one linear map, W = W_1 + W_2 + ...; `lowrank(64) + kron(8, 8, terms=2)` in the site language."""
import copy
import inspect
import sys

import torch
import torch.nn as nn

import variants
from layers.structured import Structured, loudest, options_numel, silenced
from variants import did_you_mean

# in a method's name, both under the inputs x' that the compressed layers in front really give
SEQUENTIAL = '_sequential'      # fitted to the dense model's outputs W x
STREAMED = '_streamed'          # fitted to W x'
METHODS = {}                    # none of its own: each part takes the first method that its class knows
ROUNDS, GAIN = 3, 1e-3          # of refitting every part to what the others leave; a round that gains less is the last
RIDGE = 0.01                    # of the typical power of an input, in the measure of a fit


def choose(cls, wanted, arguments):
    """(method, whether it needs stats): the first of `wanted`, names with commas, that the class knows.

    A name may end in _sequential or _streamed where the class knows it without. Of a sum: one name a part, with commas.
    Raises ValueError in one sentence when none is known.
    """
    if cls is SumLinear:
        chosen = [choose(part, wanted, given) for part, given in map(part_of, arguments['parts'])]
        return ','.join(name for name, _ in chosen), any(needs for _, needs in chosen)
    module = sys.modules[cls.__module__]
    known, names = getattr(module, 'METHODS', None), [name.strip() for name in wanted.split(',')]
    if known is None:                                   # dense: every method is exact
        return 'van_loan', False
    for name in names:
        plain = next((name.removesuffix(end) for end in (SEQUENTIAL, STREAMED) if name.endswith(end)), name)
        if name in known or plain in known and SEQUENTIAL not in plain:
            return name, name != plain or plain in getattr(module, 'CALIBRATED', ())
    raise ValueError(f'method={wanted!r} is unknown; {name_of(cls)} knows {", ".join(known)}'
                     f'{did_you_mean(names[0], known)}; with commas each structure takes the first that it knows')


def unstreamed(method):
    """The methods, names with commas, under the dense model's inputs."""
    return method.replace(SEQUENTIAL, '').replace(STREAMED, '')


def name_of(cls):
    """The name of a class in the table."""
    return next((name for name in variants.LINEARS if variants.LINEARS[name] is cls), cls.__name__)


def part_of(text):
    """(class, arguments) of one part's spec; ValueError in one sentence for one that is no linear or takes no such thing."""
    try:
        spec = variants.parse_spec(text, variants.LINEARS)
        cls = variants.LINEARS[spec.name]
        bound = inspect.signature(cls).bind(0, 0, False, *spec.args, **spec.kwargs)
    except (variants.UserError, TypeError, AttributeError) as error:
        raise ValueError(f'{text}: {error}') from None
    if spec.name == 'sum':
        raise ValueError(f'{text}: a sum within a sum; write its parts')
    bound.apply_defaults()
    return cls, dict(list(bound.arguments.items())[3:])


class SumLinear(Structured):
    """y = sum_i W_i x + b, each W_i a linear of its own without a bias.

    in_features, out_features: sizes; bias: bool; parts: specs of two or more linears, as texts; guide: see
    structured.Structured. Parameters, FLOPs and intermediates are the sums of the parts'.
    Raises ValueError for a part that is no spec or does not fit the sizes.
    """
    tags, zero_factor = {}, ''                          # the parts have their own

    def __init__(self, in_features, out_features, bias, parts, *, guide=False):
        super().__init__()
        self.weight_numel(in_features, out_features, parts, guide)              # refuses bad parts
        self.parts = nn.ModuleList(cls(in_features, out_features, False, **arguments)
                                   for cls, arguments in map(part_of, parts))
        self.add_options(in_features, out_features, bias, guide=guide)
        zero = [f'parts.{i}.{name}' for i, part in enumerate(self.parts) for name in part.zero_factor.split()]
        self.zero_factor = ' '.join([*zero, self.zero_factor])
        self.reset_parameters()

    @classmethod
    def weight_numel(cls, in_features, out_features, parts, guide=False):
        """Parameters without the bias."""
        options_numel(in_features, out_features, guide=guide)
        if not isinstance(parts, (tuple, list)) or len(parts) < 2:
            raise ValueError(f'parts={parts!r} must be the specs of two or more linears, as lowrank(8) + kron(4, 4)')
        return sum(part.weight_numel(in_features, out_features, **arguments) for part, arguments in map(part_of, parts))

    @classmethod
    def remedy(cls, in_features, out_features, parts, guide=False):
        """What to change in one part, so that the sum has fewer parameters than the dense matrix; '' where no part can."""
        numel = cls.weight_numel(in_features, out_features, parts)
        for text, (part, arguments) in zip(parts, map(part_of, parts)):
            limit = in_features * out_features - numel + part.weight_numel(in_features, out_features, **arguments)
            found = hasattr(part, 'size_argument') and variants.saving_size(part, in_features, out_features, arguments,
                                                                            limit)
            if found:
                return f'in {text}, {found}'
        return 'choose smaller parts'

    def reset_factors(self, std):
        """Each of n parts with entries of std / sqrt(n), so that those of W have std."""
        for part in self.parts:
            part.reset_parameters(std / len(self.parts) ** 0.5)

    def product(self, x, bias=None):
        """sum_i W_i x + bias for x (..., in); no part forms its W unless it would alone."""
        y = sum(part(x) for part in self.parts)
        return y if bias is None else y + bias.to(y.dtype)

    def product_weight(self):
        """sum_i W_i, (out, in), in fp32 at least."""
        return sum(getattr(part, 'wide_weight', part.dense_weight)() for part in self.parts)

    def flops(self, tokens):
        """Forward FLOPs for that many tokens, a multiply-add counted as 2."""
        return sum(part.flops(tokens) for part in self.parts) + self.option_flops(tokens)

    @classmethod
    def from_dense(cls, weight, bias, *, method='van_loan', stats=None, parts, guide=False):
        """The sum that stands for a dense matrix: the first part fitted to W, each next one to what is left, then rounds.

        weight (out, in), bias (out,) or None; method: names with commas, of which each part takes the first that it
        knows; stats: as the parts' methods want them. A round refits every part to W minus the others, and keeps what
        lowers the error: E||(W - Ŵ) x||^2 plus a ridge where a method is calibrated (weighted by the gradients' covariance
        with a hessian one), ||W - Ŵ||^2 elsewhere. Never worse than the first pass. With a bias and calibrated methods
        all is fitted about the means, and the bias takes (W - Ŵ) E[x]. Fits in float64.
        Cost: up to ROUNDS + 1 fits of each part. Raises ValueError for a method that a part does not know, missing stats.
        """
        cls.weight_numel(weight.shape[1], weight.shape[0], parts)
        classes, names = list(map(part_of, parts)), choose(cls, method, {'parts': parts})
        if SEQUENTIAL in names[0]:
            raise ValueError(f'method={method!r}: a sum is fitted to the dense outputs through decompose alone')
        if names[1] and stats is None:
            raise ValueError(f'method={method!r} needs what a calibration pass saw; give it text, or take van_loan')
        centre = names[1] and bias is not None
        seen, W = about_mean(stats) if centre else stats, weight.detach().double()
        kept = next((loudest(W, seen, a['exact_columns']) for _, a in classes if a.get('exact_columns')), None)
        quiet = silenced(seen, kept)                    # of inputs whose columns one part keeps exactly
        fits = [lambda rest, c=c, a=a, n=n: fitted(c, rest, a | {'index': kept}, n, seen, bias) if a.get('exact_columns')
                else fitted(c, rest, a, n, quiet, bias) for (c, a), n in zip(classes, names[0].split(','))]
        made = alternate(W, fits, measure(W, seen, names))
        lost = W - sum(part.wide_weight().detach() for part in made)
        for part in (part for part in made if kept is not None and part.columns is not None):
            part.columns.data += lost[:, kept]          # where another part was fitted after it
            lost = lost.index_fill(1, kept, 0)
        if centre:
            bias = bias.detach().double() + lost @ stats.mean.to(W)
        factors = {f'parts.{i}.{name}': t for i, part in enumerate(made) for name, t in part.state_dict().items()}
        return cls.settled(weight.detach(), bias, factors, parts=parts, guide=guide)

    def extra_repr(self):
        return f'in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}'


# ---------------------------------------------------------------------------------------------------
# the fit

def alternate(W, fits, error):
    """The modules of all parts: in turn, each to what the others leave of W (out, in) float64; see from_dense."""
    made, kept = [], [torch.zeros_like(W) for _ in fits]
    for i, fit in enumerate(fits):
        made.append(fit(W - sum(kept)))
        kept[i] = made[i].dense_weight().detach()
    best = error(W - sum(kept))
    for _ in range(ROUNDS):
        before = best
        for i, fit in enumerate(fits):
            rest = W - sum(kept[:i] + kept[i + 1:])
            module = fit(rest)
            weight = module.dense_weight().detach()
            now = error(rest - weight)
            if now < best:
                made[i], kept[i], best = module, weight, now
        if best >= (1 - GAIN) * before:
            break
    return made


def fitted(cls, rest, arguments, method, stats, bias):
    """One part, without a bias, for what is left: the zero bias is for methods that ask for one."""
    zeros = None if bias is None else rest.new_zeros(len(rest))
    part = cls.from_dense(rest, zeros, method=method, stats=stats, **arguments)
    part.bias = None
    return part


def about_mean(stats):
    """The same stats about their means: what is left to fit once the bias follows the means."""
    stats = copy.copy(stats)
    stats.mean = torch.zeros_like(stats.mean)
    return stats


def measure(W, stats, names):
    """A function (out, in) -> the error that a fit lowers."""
    if not names[1]:
        return lambda D: D.square().sum().item()
    C = stats.covariance.to(W) + torch.outer(stats.mean, stats.mean).to(W)
    diagonal = C.diagonal()
    typical = min(diagonal.mean().item(), 3 * diagonal.median().item()) or diagonal.mean().item() or 1.0
    C = C + RIDGE * typical * torch.eye(len(C), dtype=C.dtype, device=C.device)
    H = stats.gradient if 'hessian' in names[0] else None
    if H is None:
        return lambda D: (D @ C * D).sum().item()
    H = H.to(W) + H.diagonal().mean().to(W) * torch.eye(len(H), dtype=W.dtype, device=W.device)
    return lambda D: (H @ D @ C * D).sum().item()
