"""What the contract tests try of each entry: the specs that they list, and those that a newcomer's class names itself."""
import traceback

import pytest
import torch

import variants
from layers.basic import tags_of
from model import GPT, GPTConfig
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
            given = arguments(key, text)
        except UserError as error:
            return f'{cls.__name__}.examples: {error}'
        fault = built(key, cls, text, given)
        if fault:
            return f'{cls.__name__}.examples: {text!r} cannot be built: {fault}'
    return ''


def built(key, cls, text, given):
    """Why an example cannot be built or has a parameter without a tag; '' for one that can."""
    sizes = dict(n_layer=2, n_head=8, n_embd=32, block_size=16, vocab_size=65)
    try:
        if key == 'linear':
            tags_of(cls(48, 96, True, **given))
        else:
            with torch.device('meta'):
                GPT(GPTConfig(**sizes, **{key: text}))
    except Exception as error:                          # whatever a newcomer's own lines raise
        file, line = traceback.extract_tb(error.__traceback__)[-1][:2]
        return f'{type(error).__name__}: {error} ({file}, line {line})'
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
