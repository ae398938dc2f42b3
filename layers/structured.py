"""What linears made of factors share: columns kept exactly, a learned norm per row, a dense guide."""
import copy

import torch
import torch.nn as nn
from torch.nn import functional as F

from layers.base import BaseLinear, whole


class Structured(BaseLinear):
    """y = W x + b with W = diag(magnitude / ||P_i||) P, + columns at `index`; P, (out, in), is a product of factors.

    A subclass makes its factors, calls `add_options`, and has product(x, bias=None) = P x + bias for x (..., in),
    product_weight() = P in fp32 at least, reset_factors(std), and for weight_norm row_norms() (out,) and norm_flops().

    exact_columns=k: k columns (out, k) are added to P's at the inputs of the buffer `index`, which checkpoints carry:
    from a dense matrix, what P lacks there, so that W has those columns exactly; from scratch 0, at the first k inputs.
    weight_norm: each row of P has the learned norm `magnitude` (Salimans & Kingma 2016, arXiv 1602.07868), at first its own.
    guide: y = (1 - g) W x + g G x + b with a dense G (out, in), W at first, and a number g that fades (growth/guided.py).
    Parameters out k, out, and out in; FLOPs 2 out k, r^2 times the factors' once per call, and 2 out in a token.
    """

    def add_options(self, in_features, out_features, bias, exact_columns=0, weight_norm=False, guide=False):
        """Parameters and buffers of the options; those that are off are None, and not in a checkpoint."""
        self.in_features, self.out_features = in_features, out_features
        self.columns = nn.Parameter(torch.empty(out_features, exact_columns)) if exact_columns else None
        self.register_buffer('index', torch.arange(exact_columns) if exact_columns else None)
        self.magnitude = nn.Parameter(torch.empty(out_features)) if weight_norm else None
        self.guide = nn.Parameter(torch.empty(out_features, in_features)) if guide else None
        self.register_buffer('guidance', torch.ones(()) if guide else None)
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        self.tags = {**type(self).tags, 'columns': 'matrix', 'magnitude': 'vector', 'guide': 'matrix', 'bias': 'vector'}
        zero = 'magnitude' if weight_norm else type(self).zero_factor
        self.zero_factor = ' '.join([zero, *['columns'] * bool(exact_columns), *['guide'] * guide])

    @torch.no_grad()
    def reset_parameters(self, std=0.02):
        """Factors as the class says; columns and b = 0, magnitude and guide so that they change nothing."""
        self.reset_factors(std)
        if self.columns is not None:
            nn.init.zeros_(self.columns)
            self.index.copy_(torch.arange(len(self.index)))
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        self.settle()

    def settle(self):
        """The norms of P's rows to the magnitude, W to the guide."""
        if self.magnitude is not None:
            self.magnitude.copy_(self.row_norms())
        if self.guide is not None:
            self.guidance.fill_(1)
            self.guide.copy_(self.factors_weight())

    def forward(self, x):
        """x (..., in) -> (..., out); forms no W but the guide's."""
        if self.columns is None and self.magnitude is None and self.guide is None:
            return self.product(x, self.bias)
        y = self.product(x)
        if self.magnitude is not None:
            y = y * self.row_scale().to(y.dtype)
        if self.columns is not None:
            y = y + F.linear(x[..., self.index], self.columns)
        if self.guide is not None:
            y = y + self.guidance.to(y.dtype) * (F.linear(x, self.guide) - y)
        return y if self.bias is None else y + self.bias.to(y.dtype)        # autocast leaves it in fp32 and would widen y

    def row_scale(self):
        """magnitude / ||P_i||, (out,), in fp32 at least."""
        with no_autocast(self.magnitude):
            norms = self.row_norms()
            return self.magnitude.to(norms.dtype) / norms

    def factors_weight(self):
        """W without the guide, (out, in), differentiable, in fp32 at least."""
        P = self.product_weight()
        if self.magnitude is not None:
            P = P * self.row_scale()[:, None]
        return P if self.columns is None else P.index_add(1, self.index, self.columns.to(P.dtype))

    def wide_weight(self):
        """dense_weight() before its cast."""
        W = self.factors_weight()
        return W if self.guide is None else W + self.guidance.to(W.dtype) * (self.guide.to(W.dtype) - W)

    def dense_weight(self):
        """W (out, in), the guide's share in it, differentiable; multiplied in fp32 at least and cast back."""
        return self.wide_weight().to(next(self.parameters()).dtype)

    def option_flops(self, tokens):
        """Forward FLOPs of columns, guide and row norms, the last once per call; entrywise products are not counted."""
        extra = sum(0 if p is None else p.numel() for p in (self.columns, self.guide))
        return 2 * tokens * extra + (0 if self.magnitude is None else self.norm_flops())

    def refuse_to_normalise(self, dim):
        """True when the magnitudes alone make rows of unit length; ValueError for options that no scaling undoes."""
        if self.columns is not None or self.guide is not None or self.magnitude is not None and dim == 0:
            raise ValueError('exact_columns, guide, and weight_norm at c_proj do not go with it; leave them out')
        return self.magnitude is not None

    @classmethod
    def settled(cls, weight, bias, factors, index=None, **arguments):
        """A module with weight's type and device from its factors, {name: values}, and the options of W (out, in)."""
        with torch.device('meta'):                  # no memory and no random numbers for values that are replaced
            module = cls(weight.shape[1], weight.shape[0], bias is not None, **arguments)
        module.to(weight.dtype).to_empty(device=weight.device)
        with torch.no_grad():
            own = module.state_dict(keep_vars=True)
            for name, values in factors.items():
                own[name].copy_(values)
            if module.magnitude is not None:
                module.magnitude.copy_(module.row_norms())
            if index is not None:
                module.columns.zero_()
                module.index.copy_(index)
                module.columns.copy_((weight.to(torch.float64) - module.factors_weight().double())[:, index])
            module.settle()
            if bias is not None:
                module.bias.copy_(bias)
        return module


def options_numel(in_features, out_features, exact_columns=0, weight_norm=False, guide=False):
    """Parameters of the options; a guide's are not counted, as it leaves. ValueError in one sentence for bad ones."""
    whole(in_features=in_features, out_features=out_features)
    if type(exact_columns) is not int or not 0 <= exact_columns <= in_features:
        raise ValueError(f'exact_columns={exact_columns!r} must be a whole number from 0 to the {in_features} inputs')
    for name, value in {'weight_norm': weight_norm, 'guide': guide}.items():
        if not isinstance(value, bool):
            raise ValueError(f'{name}={value!r} is neither True nor False')
    return out_features * (exact_columns + weight_norm)


def no_autocast(tensor):
    """A context without autocast on the tensor's device."""
    return torch.autocast('cpu' if tensor.is_meta else tensor.device.type, enabled=False)       # 'meta' is refused there


def loudest(weight, stats, count):
    """The `count` inputs of largest E[x_j^2] by stats, or largest columns of W (out, in) without; rising; None for 0."""
    if not count:
        return None
    if stats is None:
        energy = weight.detach().double().square().sum(0)
    else:
        covariance, mean = (torch.as_tensor(entry(stats, name)).double() for name in ('covariance', 'mean'))
        energy = covariance.diagonal() + mean.square()
    return energy.argsort(descending=True, stable=True)[:count].sort().values.to(weight.device)


def entry(stats, name):
    found = stats.get(name) if isinstance(stats, dict) else getattr(stats, name, None)
    if found is None:
        raise ValueError(f'exact_columns needs the {name} of the inputs that a calibration pass saw')
    return found


def silenced(stats, index):
    """The same stats with 0 for the inputs of `index`, which something else takes care of; None stays None."""
    if stats is None or index is None:
        return stats
    values = dict(stats) if isinstance(stats, dict) else copy.copy(stats)
    for name in ('covariance', 'mean'):
        t = torch.as_tensor(entry(stats, name)).clone()
        t[index.to(t.device)] = 0
        if t.ndim == 2:
            t[:, index.to(t.device)] = 0
        values.update({name: t}) if isinstance(values, dict) else setattr(values, name, t)
    return values


def with_others(chosen, size):
    """The numbers 0 .. size - 1, (size,), the chosen ones first and both parts in rising order."""
    free = torch.ones(size, dtype=torch.bool, device=chosen.device).index_fill(0, chosen, False)
    return torch.cat((chosen.sort().values, free.nonzero(as_tuple=True)[0]))


def pivoted(V):
    """As many columns of V (rank, in) as it has rows, each the longest beside the span of those before: pivoted QR.

    So that the others are no large multiples of these. Where V has a lower rank the last ones are any.
    """
    left, chosen = V.detach().double().clone(), []
    for _ in range(len(V)):
        lengths = left.square().sum(0)
        lengths[chosen] = -1.0
        chosen.append(lengths.argmax().item())
        q = left[:, chosen[-1]] / lengths[chosen[-1]].sqrt().clamp(min=1e-150)
        left -= torch.outer(q, q @ left)
    return torch.tensor(chosen, device=V.device)
