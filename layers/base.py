"""The base of every class in the tables of variants.py: what it must define, and defaults of what it may leave out."""
import inspect

import torch
import torch.nn as nn

import variants


def whole(**sizes):
    """ValueError, one sentence that names it, for the first that is no whole number of at least 1."""
    for name, value in sizes.items():
        if type(value) is not int or value < 1:
            raise ValueError(f'{name}={value!r} must be a whole number of at least 1')


class Entry(nn.Module):
    """A class that a table names. required: {member: what it is}; examples: specs that the contract tests try."""
    required, examples = {}, ()
    tags = {}                               # {own parameter: 'matrix', 'factor' or 'vector'}: see basic.tags_of

    @classmethod
    def defines(cls, member):
        """Whether the class has a member of its own, not the base's."""
        base = next(c for c in cls.__mro__ if c.__module__ == __name__)
        return inspect.getattr_static(cls, member, None) is not inspect.getattr_static(base, member, None)

    @classmethod
    def lacking(cls):
        """The entries of `required` that the class does not define."""
        return {member: what for member, what in cls.required.items() if not cls.defines(member)}


class BaseLinear(Entry):
    """A linear y = W x + b that can stand at any site, built as (in_features, out_features, bias, **spec arguments).

    in_features, out_features: sizes; bias: bool. __init__ sets both sizes and `bias`, a Parameter (out,) or None. Raises
    ValueError, from weight_numel, for arguments that do not fit; its sentence reaches the user behind site and spec.
    """
    required = {
        'tags': "a dict {parameter: 'factor', ..., 'bias': 'vector'}, which optimizers read",
        'forward': 'forward(x), x (..., in) -> (..., out)',
        'dense_weight': 'dense_weight(), W (out, in), its products taken in fp32 at least',
        'flops': 'flops(tokens), forward FLOPs for that many tokens, a multiply-add counted as 2',
        'weight_numel': 'a classmethod weight_numel(in_features, out_features, **spec arguments), the parameters without '
                        'the bias; ValueError for arguments that do not fit',
        'nearest': 'a classmethod nearest(weight, **spec arguments), {parameter: values} of the structure nearest to '
                   'weight (out, in), fp32 at least',
    }
    examples = ()                           # specs that save parameters where 48 are mapped to 96 and 96 to 48
    exact = None                            # a spec whose `nearest` is any such matrix itself, where there is one
    tolerance = 1e-10                       # relative error of `nearest` to a matrix of the structure; 1 for a local fit
    methods, calibrated = ('van_loan',), ()     # names that from_dense takes, None for any; those that need stats
    size_argument = None                    # the argument to lower for fewer parameters, such as 'rank'
    zero_factor = None                      # the parameters whose zeros make W zero while they get gradients

    def __init_subclass__(cls, **more):
        """zero_factor where a class names none: its first factor, which is right for products."""
        super().__init_subclass__(**more)
        if cls.zero_factor is None:
            cls.zero_factor = next((name for name, tag in cls.tags.items() if tag in ('factor', 'matrix')), None)

    @classmethod
    def lacking(cls):
        """As Entry's; a class with a from_dense of its own, for methods of its own, needs no `nearest`."""
        found = super().lacking()
        return {member: found[member] for member in found if member != 'nearest' or not cls.defines('from_dense')}

    @classmethod
    def remedy(cls, in_features, out_features, **arguments):
        """What to change so that a spec has fewer parameters than the dense matrix; '' where nothing is found."""
        return variants.saving_size(cls, in_features, out_features, arguments, in_features * out_features)

    @torch.no_grad()
    def reset_parameters(self, std=0.02):
        """Gaussian factors, scaled alike so that the mean square of W's entries is std^2; b = 0. Forms W once.

        For a W that is a product of its factors; others define their own.
        """
        factors = [p for name, p in self.named_parameters(recurse=False) if self.tags.get(name) in ('factor', 'matrix')]
        for factor in factors:
            nn.init.normal_(factor)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        scale = std / self.wide_weight().square().mean().sqrt()
        for factor in factors:
            factor.mul_(scale ** (1 / len(factors)))

    def wide_weight(self):
        """dense_weight() in fp32 at least."""
        weight = self.dense_weight()
        return weight.to(torch.promote_types(weight.dtype, torch.float32))

    def normalise_(self, dim):
        """Every row (dim=1) or column (dim=0) of W to unit length, in place, for nGPT. ValueError where that cannot be."""
        raise ValueError(f'{getattr(self, "spec", type(self).__name__)} cannot be normalised, as {type(self).__name__} '
                         "defines no normalise_(dim); take another linear, or ngpt='none'")

    @classmethod
    def from_dense(cls, weight, bias, *, method='van_loan', stats=None, **arguments):
        """The structure that stands for a dense matrix by `nearest`, with its dtype and device.

        weight (out, in), bias (out,) or None, kept as it is; stats: unused. Raises ValueError for another method.
        """
        if method not in cls.methods:
            raise ValueError(f'method={method!r} is unknown; {cls.__name__} knows {", ".join(cls.methods)}')
        module = cls(weight.shape[1], weight.shape[0], bias is not None, **arguments).to(weight.device, weight.dtype)
        wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))         # no SVD in half precision
        found = cls.nearest(wide, **arguments) | ({} if bias is None else {'bias': bias})
        own = module.state_dict(keep_vars=True)
        if found.keys() != own.keys():
            raise ValueError(f'{cls.__name__}.nearest gives {", ".join(sorted(found))}, and the module holds '
                             f'{", ".join(sorted(own))}; give each of these but the bias')
        with torch.no_grad():
            for name, values in found.items():
                own[name].copy_(values)
        return module


class BaseAttention(Entry):
    """The attention of a block, built as (config, site, **spec arguments); forward(x, ctx) maps (B, T, C) to (B, T, C).

    ctx: attention.context.Context of this call. Raises ValueError for arguments that do not fit.
    """
    required = {
        'forward': 'forward(x, ctx), x (B, T, C) -> (B, T, C), with the projections of variants.linear',
        'flops': 'flops(context), forward FLOPs per token of what is no site, with that many keys',
    }
    examples = ()                           # specs that fit n_embd 32, n_head 8 and block_size 16
    refuses = ()                            # patterns of the sentences with which the examples refuse settings
    leaks = False                           # whether it sees the future: train.py refuses it then
    static_cache = None                     # a method where it decodes by static steps too: see attention/decoding.py
    units = ()                              # as BaseMLP's: groups of heads

    def prepare(self, ctx):
        """Called in front of the blocks, without a cache: what is shared through ctx is made here."""

    def set_progress(self, fraction):
        """Called before every step with the share of the run that is over: schedules read it."""


class BaseMLP(Entry):
    """The MLP of a block, built as (config, site, **spec arguments); forward(x, ctx) maps (B, T, C) to (B, T, C).

    ctx: attention.context.Context of this call. Raises ValueError for arguments that do not fit.
    """
    required = {'forward': 'forward(x, ctx), x (B, T, C) -> (B, T, C), with the projections of variants.linear'}
    examples = ()                           # specs that fit n_embd 32
    units = ()                              # modules with rows per hidden neuron, column of c_proj, where neurons can be
                                            # removed (decomposition/narrow.py); `hidden` is their number

    @property
    def n_units(self):
        """Hidden neurons, the inputs of c_proj."""
        return self.c_proj.in_features

    @staticmethod
    def refuse_waste(config, **arguments):
        """ValueError for arguments that save nothing, before anything is built."""

    def realise(self):
        """Make dense, in place, what is structured and no site."""

    @staticmethod
    def realised(arguments, width):
        """The spec arguments of what realise leaves; None: the given ones."""
