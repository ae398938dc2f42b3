"""Which linear, attention and MLP is used where: the tables, and the functions that build from them. Imports no torch.

The three tables below are the only place to register a variant: a new one is one file and one line here.
Specs and rules are in specs.py, whose names are re-exported.
"""
import bisect
import contextlib
import importlib
import inspect

from specs import (  # noqa: F401
    Spec,
    UserError,
    as_rules,
    did_you_mean,
    idle_rules,
    match,
    parse_rules,
    parse_spec,
    refuse_idle,
    spec_of,
    summands,
)


class Table(dict):
    """name -> class. An entry is written 'module:Class' and imported when it is first used."""

    def __getitem__(self, name):
        entry = super().__getitem__(name)
        if isinstance(entry, str):
            entry = self[name] = named(name, entry)
        return entry


def named(name, entry):
    """The class that an entry of a table names; UserError for a module or a class that is not there."""
    path, _, attribute = entry.partition(':')
    try:
        module = importlib.import_module(path)
    except ModuleNotFoundError as error:
        if not f'{path}.'.startswith(f'{error.name}.'):                 # another one, which that file imports
            raise
        raise UserError(f'variants.py: {name!r} is {entry!r}, and there is no module {error.name}; write '
                        "'folder.file:Class'") from None
    if not hasattr(module, attribute):
        raise UserError(f'variants.py: {name!r} is {entry!r}, and {path} has no class {attribute!r}'
                        f'{did_you_mean(attribute, vars(module))}')
    return getattr(module, attribute)


LINEARS = Table({
    'dense': 'layers.basic:Linear',
    'kron': 'kron.linear:KroneckerLinear',
    'kron_pivot': 'kron.pivot:KroneckerPivot',
    'lowrank': 'lowrank.linear:LowRankLinear',
    'pivot': 'lowrank.pivot:PivotLinear',
    'abba': 'lowrank.abba:ABBALinear',
    'sum': 'layers.sums:SumLinear',
})

ATTENTIONS = Table({
    'causal': 'model:CausalSelfAttention',
    'window': 'attention.window:WindowAttention',
    'linformer': 'attention.linformer:LinformerAttention',
    'mla': 'attention.mla:LatentAttention',
    'diff': 'attention.diff:DifferentialAttention',
    'dint': 'attention.dint:DINTAttention',
    'mla_diff': 'attention.latent_diff:LatentDifferentialAttention',
    'mla_dint': 'attention.latent_diff:LatentDINTAttention',
})

MLPS = Table({
    'gelu': 'model:MLP',
    'relu2': 'model:ReLU2MLP',
    'swiglu': 'model:SwiGLU',
    'latent': 'lowrank.latent_mlp:LatentMLP',
    'kron_moe': 'kron.moe:KronMoE',
})

NEAR = 2000                             # values below and above a bad one that are tried in search of one that saves
BASES = {'linear': 'BaseLinear', 'attention': 'BaseAttention', 'mlp': 'BaseMLP'}        # in layers/base.py


def check_rules(rules, table):
    """Parse every spec of the rules and look up its name in the table; raises UserError."""
    for spec in as_rules(rules).values():
        parse_spec(spec, table)


def sentence(key, site, spec, error):
    """An error about a spec as a UserError that names key, site and spec."""
    return UserError(f'{site}: {spec}: {error}', key)


def check_arguments(key, cls, site, spec, *leading):
    """Refuse arguments that cls does not take; returns those that it takes, with defaults, without the leading ones."""
    signature = inspect.signature(cls)
    try:
        bound = signature.bind(*leading, *spec.args, **spec.kwargs)
    except TypeError as error:
        placed, named = [], []
        for parameter in list(signature.parameters.values())[len(leading):]:
            (named if parameter.kind == parameter.KEYWORD_ONLY else placed).append(str(parameter))
        takes = f'{spec.name}({", ".join(placed)})' + (f', and by name {", ".join(named)}' if named else '')
        raise sentence(key, site, spec, f'{error}; it takes {takes}') from None
    missing = incomplete(key, cls)
    if missing:
        raise sentence(key, site, spec, missing)
    bound.apply_defaults()
    return dict(list(bound.arguments.items())[len(leading):])


def incomplete(key, cls):
    """What a class does not define and its base asks for, in one sentence; '' for nothing."""
    base = getattr(importlib.import_module('layers.base'), BASES[key])
    if not issubclass(cls, base):
        return (f'{cls.__name__} is no {base.__name__}; derive it from layers.base.{base.__name__}, which says what to '
                'define and has the rest')
    return '; '.join(f'{cls.__name__} lacks {member}: define {what}' for member, what in cls.lacking().items())


def build(key, cls, site, spec, *leading):
    """cls(*leading, *spec arguments), every error turned into one sentence that names key, site and spec."""
    check_arguments(key, cls, site, spec, *leading)
    try:
        return cls(*leading, *spec.args, **spec.kwargs)
    except (ValueError, TypeError) as error:
        raise sentence(key, site, spec, error) from None


def refuse_waste(cls, site, spec, in_features, out_features):
    """Refuse a structure with as many parameters as the dense matrix, before it is built; name a size that saves some."""
    arguments = check_arguments('linear', cls, site, spec, in_features, out_features, None)
    dense = in_features * out_features
    try:
        numel = cls.weight_numel(in_features, out_features, **arguments)
        if numel < dense:
            return
        remedy = cls.remedy(in_features, out_features, **arguments)
    except (ValueError, TypeError) as error:
        raise sentence('linear', site, spec, error) from None
    raise UserError(f'{site}: {spec} saves nothing: {numel:,} parameters where dense has {dense:,}; '
                    f'{remedy or "choose other factor sizes"}', 'linear')


def saving_size(cls, in_features, out_features, arguments, limit):
    """'rank=5 is the largest that saves some': the size below the given one with fewer than `limit` parameters, or ''.

    Of a class without a size_argument the nearest value of one argument that saves some.
    """
    def saves(name, value):
        return cls.weight_numel(in_features, out_features, **{**arguments, name: value}) < limit

    size = cls.size_argument
    if size is not None:                                # parameters grow with it: bisection
        below = range(1, min(arguments[size] - 1, in_features * out_features) + 1)
        k = bisect.bisect_left(below, True, key=lambda k: not saves(size, k))
        return f'{size}={k} is the largest that saves some' if k else ''
    for name in (name for name, value in arguments.items() if type(value) is int):
        middle = min(max(arguments[name], 1), max(in_features, out_features))
        near = range(max(1, middle - NEAR), min(middle + NEAR, max(in_features, out_features)) + 1)
        for k in sorted(near, key=lambda k: abs(k - middle)):
            with contextlib.suppress(ValueError):       # it does not divide the sizes, say
                if saves(name, k):
                    return f'{name}={k} saves some'
    return ''


def linear(config, site, in_features, out_features, bias=None):
    """The linear map that `config.linear` names for this site, in -> out; bias None means config.bias.

    Raises UserError when the spec does not fit the sizes or saves nothing.
    """
    spec = parse_spec(match(config.linear, site, 'dense')[1], LINEARS)
    cls = LINEARS[spec.name]
    if spec.name != 'dense':
        refuse_waste(cls, site, spec, in_features, out_features)
    module = build('linear', cls, site, spec, in_features, out_features, config.bias if bias is None else bias)
    for name in ('in_features', 'out_features', 'bias'):
        if not hasattr(module, name):
            raise sentence('linear', site, spec, f'{cls.__name__} sets no self.{name}; its __init__ must')
    module.spec = str(spec)
    return module


def attention(config, site, block):
    """The attention that `config.attention` names for `block` (h.3), built for `site` (h.3.attn)."""
    spec = parse_spec(match(config.attention, block, 'causal')[1], ATTENTIONS)
    return build('attention', ATTENTIONS[spec.name], site, spec, config, site)


def mlp(config, site, block):
    """The MLP that `config.mlp` names for `block` (h.3), built for `site` (h.3.mlp)."""
    spec = parse_spec(match(config.mlp, block, 'gelu')[1], MLPS)
    cls = MLPS[spec.name]
    arguments = check_arguments('mlp', cls, site, spec, config, site)
    try:
        cls.refuse_waste(config, **arguments)
    except ValueError as error:
        raise sentence('mlp', site, spec, error) from None
    return build('mlp', cls, site, spec, config, site)


def realised_mlp(config):
    """config.mlp with the specs that GPT.realise leaves: a class that has structured experts names its dense form."""
    rules = {}
    for pattern, text in as_rules(config.mlp).items():
        spec = parse_spec(text, MLPS)
        cls = MLPS[spec.name]
        arguments = cls.realised(check_arguments('mlp', cls, pattern, spec, config, pattern), config.n_embd)
        rules[pattern] = text if arguments is None else str(Spec(spec.name, (), arguments))
    return rules['*'] if isinstance(config.mlp, str) else rules
