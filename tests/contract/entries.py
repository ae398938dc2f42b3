"""What the contract tests try of each entry: the specs that they list, and those that a newcomer's class names itself."""
import pytest

import variants
from variants import UserError

TABLES = {'linear': variants.LINEARS, 'attention': variants.ATTENTIONS, 'mlp': variants.MLPS}
LEADING = {'linear': (48, 96, True), 'attention': (None, 'h.0.attn'), 'mlp': (None, 'h.0.mlp')}


def arguments(key, text):
    """The arguments of a spec by name, defaults filled in; UserError for one that its class does not take."""
    spec = variants.parse_spec(text, TABLES[key])
    return variants.check_arguments(key, TABLES[key][spec.name], 'examples', spec, *LEADING[key])


def lacks(key, name, listed=()):
    """What is missing before an entry can be tested, in sentences; '' for nothing. listed: names with specs in the tests."""
    try:
        cls = TABLES[key][name]
    except UserError as error:
        return str(error)
    missing = variants.incomplete(key, cls)
    if missing or name in listed:
        return missing
    if not isinstance(cls.examples, (list, tuple)) or not cls.examples:
        return f"{cls.__name__} lacks examples: define the list examples = ['{name}(...)'] with the specs to be tested"
    for text in cls.examples:
        try:
            if variants.parse_spec(text).name != name:
                return f'{cls.__name__}.examples has {text!r}, which is no spec of {name}; write {name!r} or {name}(...)'
            arguments(key, text)
        except UserError as error:
            return f'{cls.__name__}.examples: {error}'
    return ''


def specs(key, listed):
    """{name: specs to be tested} of the entries that are complete; the others fail in `complete` alone."""
    return {name: list(listed[name] if name in listed else TABLES[key][name].examples)
            for name in TABLES[key] if not lacks(key, name, listed)}


def complete(key, name, listed):
    """Fail with what an entry lacks."""
    missing = lacks(key, name, listed)
    if missing:
        pytest.fail(f'{name}: {missing}. CONTRIBUTING.md has an example', pytrace=False)
