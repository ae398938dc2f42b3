"""Which linear, attention and MLP is used where: the tables, and the functions that build from them. Imports no torch.

The three tables below are the only place to register a variant: a new one is one file and one line here.
Specs and rules are in specs.py, whose names are re-exported.
"""
import importlib
import inspect

from specs import Spec, UserError, as_rules, did_you_mean, idle_rules, match, parse_rules, parse_spec, spec_of, summands  # noqa: F401


class Table(dict):
    """name -> class. An entry is written 'module:Class' and imported when it is first used."""

    def __getitem__(self, name):
        entry = super().__getitem__(name)
        if isinstance(entry, str):
            module, _, attribute = entry.partition(':')
            entry = self[name] = getattr(importlib.import_module(module), attribute)
        return entry


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
    bound.apply_defaults()
    return dict(list(bound.arguments.items())[len(leading):])


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
        remedy = cls.remedy(in_features, out_features, **arguments) if hasattr(cls, 'remedy') else saving_size(
            cls, in_features, out_features, arguments, dense)
    except (ValueError, TypeError) as error:
        raise sentence('linear', site, spec, error) from None
    raise UserError(f'{site}: {spec} saves nothing: {numel:,} parameters where dense has {dense:,}; '
                    f'{remedy or "choose other factor sizes"}', 'linear')


def saving_size(cls, in_features, out_features, arguments, limit):
    """'rank=5 is the largest that saves some': the size below the given one with fewer than `limit` parameters, or ''."""
    size = cls.size_argument
    for k in range(min(arguments[size] - 1, in_features * out_features), 0, -1):
        if cls.weight_numel(in_features, out_features, **{**arguments, size: k}) < limit:
            return f'{size}={k} is the largest that saves some'
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
    if hasattr(cls, 'refuse_waste'):
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
        if hasattr(cls, 'realised'):
            arguments = cls.realised(check_arguments('mlp', cls, pattern, spec, config, pattern), config.n_embd)
            text = str(Spec(spec.name, (), arguments))
        rules[pattern] = text
    return rules['*'] if isinstance(config.mlp, str) else rules
