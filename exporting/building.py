"""What stands for variants.py in an exported file: the same builders without the checks that a saved model has passed.

bundle.py puts these in the place of the names in variants.py, and the classes that a model uses into the tables.
"""
from specs import match, parse_spec

LINEARS, ATTENTIONS, MLPS = {}, {}, {}                  # filled at the end of this file

a_fused = b_fused = suits = available = None            # CUDA kernels of kron/fused.py, which only measured plans take


def incomplete(key, cls):
    """Nothing: the class was complete when the model was built."""
    return ''


def refuse_idle(key, rules, sites):
    """Nothing is refused: the rules are those of a model that was built."""


def linear(config, site, in_features, out_features, bias=None):
    """The linear map that config.linear names for this site; bias None means config.bias."""
    spec = parse_spec(match(config.linear, site, 'dense')[1])
    bias = config.bias if bias is None else bias
    module = LINEARS[spec.name](in_features, out_features, bias, *spec.args, **spec.kwargs)
    module.spec = str(spec)
    return module


def attention(config, site, block):
    """The attention that config.attention names for `block` (h.3), built for `site` (h.3.attn)."""
    spec = parse_spec(match(config.attention, block, 'causal')[1])
    return ATTENTIONS[spec.name](config, site, *spec.args, **spec.kwargs)


def mlp(config, site, block):
    """The MLP that config.mlp names for `block` (h.3), built for `site` (h.3.mlp)."""
    spec = parse_spec(match(config.mlp, block, 'gelu')[1])
    return MLPS[spec.name](config, site, *spec.args, **spec.kwargs)
