"""The site language: which linear, attention and MLP stands where. Imports no torch.

A *site* is a module path below `transformer`, such as `h.3.mlp.c_fc`. A *rule* maps a pattern of
sites to a *spec*; a spec is a name with literal arguments, `kron(8, 8, terms=4)`. Patterns are
fnmatch patterns in which `*` crosses dots, and the first that matches a site wins:

    linear = {'h.0.*': 'dense', 'h.*.mlp.*': 'kron(8, 8, terms=4)', 'h.*.attn.c_v': 'lowrank(64)'}

Linears may be added, `lowrank(64) + kron(8, 8)`: the spec `sum`, whose argument is the parts.

The three tables below are all there is to register: a new variant is one file and one line here.
"""
import ast
import difflib
import fnmatch
import importlib
import inspect
from dataclasses import dataclass, field


class UserError(Exception):
    """A mistake of the user's: one sentence with the setting, the value and the remedy; exit code 2.

    key: the setting that it is about, where that is known, so that a program can name file and line.
    """

    def __init__(self, sentence, key=None):
        super().__init__(sentence)
        self.key = key


class Table(dict):
    """name -> class. An entry is written 'module:Class' and imported when it is first used."""

    def __getitem__(self, name):
        entry = super().__getitem__(name)
        if isinstance(entry, str):
            module, _, attribute = entry.partition(':')
            entry = self[name] = getattr(importlib.import_module(module), attribute)
        return entry


LINEARS = Table({
    'dense': 'layers:Linear',
    'kron': 'kron.linear:KroneckerLinear',
    'lowrank': 'lowrank.linear:LowRankLinear',
    'abba': 'lowrank.abba:ABBALinear',
    'sum': 'sums:SumLinear',
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
})


@dataclass(frozen=True)
class Spec:
    """One parsed spec: `kron(8, 8, terms=4)` is Spec('kron', (8, 8), {'terms': 4})."""
    name: str
    args: tuple = ()
    kwargs: dict = field(default_factory=dict)

    def __str__(self):
        if self.name == 'sum' and len(self.args) == 1 and not self.kwargs:
            return ' + '.join(self.args[0])
        words = [repr(a) for a in self.args] + [f'{k}={v!r}' for k, v in self.kwargs.items()]
        return f'{self.name}({", ".join(words)})' if words else self.name


def did_you_mean(word, known):
    """', did you mean X?' with the known word nearest to `word`, or ''."""
    near = difflib.get_close_matches(str(word), list(known), n=1)
    return f', did you mean {near[0]!r}?' if near else ''


def parse_spec(text, table=None):
    """Parse `name` or `name(literals)`; with a table, the name must stand in it.

    Raises UserError in one sentence. Nothing is executed: the text is read with ast.
    """
    try:
        parts = [spec_of(node) for node in summands(ast.parse(text.strip(), mode='eval').body)]
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError, AttributeError):
        raise UserError(f'{str(text)[:80]!r} is no spec; write a name or a name with literal arguments, '
                        "such as 'kron(8, 8, terms=4)', or a sum of such") from None
    spec = parts[0] if len(parts) == 1 else Spec('sum', (tuple(map(str, parts)),))
    for part in (spec, *parts) if table is not None else ():
        if part.name not in table:
            known = [name for name in table if name != 'sum']           # which is written with +
            raise UserError(f'{part.name!r} is not one of {", ".join(known)}{did_you_mean(part.name, known)}')
    return spec


def summands(node):
    """The nodes that a tree of + holds, from left to right."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return summands(node.left) + summands(node.right)
    return [node]


def spec_of(node):
    """The Spec of `name` or `name(literals)`; ValueError or TypeError for any other node."""
    call = node if isinstance(node, ast.Call) else ast.Call(func=node, args=[], keywords=[])
    if not isinstance(call.func, ast.Name) or any(k.arg is None for k in call.keywords):
        raise ValueError
    return Spec(call.func.id, tuple(ast.literal_eval(a) for a in call.args),
                {k.arg: ast.literal_eval(k.value) for k in call.keywords})


def parse_rules(text):
    """'pattern=spec; pattern=spec' -> {pattern: spec}; a text that holds no pattern is one spec for all sites."""
    rules = {}
    for item in text.split(';'):
        pattern, equals, spec = item.partition('=')
        if not equals or '(' in pattern:                # the first '=' belongs to an argument
            pattern, spec = '*', item
        pattern = pattern.strip()
        if not pattern or not spec.strip():
            raise UserError(f"{item.strip()!r} is no rule; write 'h.*.mlp.*=kron(8,8,terms=4)'")
        if pattern in rules:
            raise UserError(f'the pattern {pattern!r} stands there twice; the first match wins, so drop one')
        rules[pattern] = spec.strip()
    return rules


def as_rules(value):
    """A spec for every site, or rules already: both become rules."""
    return {'*': value} if isinstance(value, str) else value


def match(rules, site, default):
    """The first pattern that matches the site, and its spec: (None, default) when none does."""
    for pattern, spec in as_rules(rules).items():
        if fnmatch.fnmatchcase(site, pattern):
            return pattern, spec
    return None, default


def idle_rules(rules, sites):
    """The patterns that win at none of the sites, in order: an error, since the user meant something by them."""
    winners = {match(rules, site, None)[0] for site in sites}
    return [pattern for pattern in as_rules(rules) if pattern not in winners]


def check_rules(rules, table):
    """Parse every spec of the rules and look its name up in the table; raises UserError."""
    for spec in as_rules(rules).values():
        parse_spec(spec, table)


def sentence(key, site, spec, error):
    """A complaint about a spec as a UserError that names key, site and spec."""
    return UserError(f'{site}: {spec}: {error}', key)


def check_arguments(key, cls, site, spec, *leading):
    """Refuse arguments that cls does not take; returns those that it takes, defaults filled in, without the leading ones."""
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
    """cls(*leading, *spec arguments), every complaint turned into one sentence that names key, site and spec."""
    check_arguments(key, cls, site, spec, *leading)
    try:
        return cls(*leading, *spec.args, **spec.kwargs)
    except (ValueError, TypeError) as error:
        raise sentence(key, site, spec, error) from None


def refuse_waste(cls, site, spec, in_features, out_features):
    """Refuse a structure with as many parameters as the dense matrix, before it is built; say which size would save some."""
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
