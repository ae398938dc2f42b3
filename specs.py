"""The site language: specs and rules. Imports no torch.

A *site* is a module path below `transformer`, such as `h.3.mlp.c_fc`. A *rule* maps a pattern of
sites to a *spec*; a spec is a name with literal arguments, `kron(8, 8, terms=4)`. Patterns are
fnmatch patterns in which `*` crosses dots, and the first that matches a site wins:

    linear = {'h.0.*': 'dense', 'h.*.mlp.*': 'kron(8, 8, terms=4)', 'h.*.attn.c_v': 'lowrank(64)'}

Linears may be added, `lowrank(64) + kron(8, 8)`: the spec `sum`, whose argument is the parts.
"""
import ast
import difflib
import fnmatch
from dataclasses import dataclass, field

from commandline import bounds


class UserError(Exception):
    """A mistake of the user's: one sentence with the setting, the value and the remedy; exit code 2.

    Control characters of the input are written out, and the middle of a long sentence is left out.

    key: the setting concerned, where it is known, so that a program can name file and line.
    """

    def __init__(self, sentence, key=None):
        super().__init__(bounds.one_line(str(sentence)))
        self.key = key


@dataclass(frozen=True)
class Spec:
    """One parsed spec: `kron(8, 8, terms=4)` is Spec('kron', (8, 8), {'terms': 4})."""
    name: str
    args: tuple = ()
    kwargs: dict = field(default_factory=dict)

    def __str__(self):
        parts = self.args[0] if self.name == 'sum' and len(self.args) == 1 and not self.kwargs else ()
        if isinstance(parts, (tuple, list)) and parts and all(isinstance(part, str) for part in parts):
            return ' + '.join(parts)
        words = [repr(a) for a in self.args] + [f'{k}={v!r}' for k, v in self.kwargs.items()]
        return f'{self.name}({", ".join(words)})' if words else self.name


def did_you_mean(word, known):
    """', did you mean X?' with the known word closest to `word`, or ''."""
    near = difflib.get_close_matches(str(word), list(known), n=1)
    return f', did you mean {near[0]!r}?' if near else ''


def parse_spec(text, table=None):
    """Parse `name` or `name(literals)`; with a table, the name must be in it.

    Raises UserError in one sentence. Nothing is executed: the text is read with ast.
    """
    if len(text) > bounds.SPEC:
        raise UserError(f'{bounds.shown(text)} is too long for a spec; at most {bounds.SPEC} characters are read')
    try:
        parts = [spec_of(node) for node in summands(ast.parse(text.strip(), mode='eval').body)]
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError, AttributeError):
        raise UserError(f'{str(text)[:80]!r} is not a spec; write a name or a name with literal arguments, '
                        "such as 'kron(8, 8, terms=4)', or a sum of such") from None
    for part in parts:
        check_numbers(part)
    spec = parts[0] if len(parts) == 1 else Spec('sum', (tuple(map(str, parts)),))
    for part in (spec, *parts) if table is not None else ():
        if part.name not in table:
            known = [name for name in table if name != 'sum']           # which is written with +
            raise UserError(f'{part.name!r} is not one of {", ".join(known)}{did_you_mean(part.name, known)}')
    return spec


def check_numbers(spec):
    """Refuse literals that no size can be: sizes are computed with, and printed."""
    for value in (*spec.args, *spec.kwargs.values()):
        if bounds.fault(value) or isinstance(value, (int, float)) and not abs(value) <= bounds.SPEC_NUMBER:
            raise UserError(f'{spec.name} is given {bounds.shown(value)}; its numbers are at most {bounds.SPEC_NUMBER}')


def summands(node):
    """The operands of a tree of +, from left to right."""
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
    """'pattern=spec; pattern=spec' -> {pattern: spec}; a text without a pattern is one spec for all sites.

    A dict as a config file has it, "{'pattern': 'spec'}", is taken too.
    """
    rules = {}
    if text.lstrip().startswith('{'):
        try:
            return ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            raise UserError(f"{text[:60]!r} is not a dict; write 'h.*.mlp.*=kron(8,8,terms=4); h.0.*=dense'") from None
    for item in text.split(';'):
        pattern, equals, spec = item.partition('=')
        if not equals or '(' in pattern:                # the first '=' belongs to an argument
            pattern, spec = '*', item
        pattern = pattern.strip()
        if not pattern or not spec.strip():
            raise UserError(f"{item.strip()!r} is not a rule; write 'h.*.mlp.*=kron(8,8,terms=4)'")
        if pattern in rules:
            raise UserError(f'the pattern {pattern!r} is given twice; the first match wins, so drop one')
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


def refuse_idle(key, rules, sites):
    """UserError for a pattern of the table `key` that wins at none of its sites (linear) or blocks (attention, mlp)."""
    idle = idle_rules(rules, sites)
    if idle:
        place, names = ('site', 'sites are h.0.attn.c_q, ...') if key == 'linear' else ('block', 'blocks are h.0, h.1, ...')
        raise UserError(f'{key}: the pattern {idle[0]!r} wins at no {place} (the first match wins); the {names}', key)
