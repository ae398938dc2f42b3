"""Chosen widths and sizes in the site language: the rules of `linear`, `mlp` and `attention`."""
import variants
from decomposition import allocate
from variants import Spec, match, parse_spec


def rules(config, widths, sizes, variant):
    """{'linear', 'mlp', 'attention'} for GPTConfig: one spec where all blocks agree."""
    found = {'linear': variant.linear or {}, 'mlp': config.mlp, 'attention': config.attention}
    if sizes:
        specs = {site: 'dense' if size is None else str(allocate.sized(
            parse_spec(match(variant.linear, site, 'dense')[1]), size)) for site, size in sizes.items()}
        found['linear'] = allocate.merged(variant.linear, specs)
    for key, kind in (('mlp', 'mlp'), ('attention', 'attn')):
        specs = {part.rpartition('.')[0]: with_shape(config, key, part.rpartition('.')[0], shape)
                 for part, shape in widths.items() if part.endswith(kind)}
        if specs:
            alike = len(specs) == config.n_layer and len(set(specs.values())) == 1
            found[key] = next(iter(specs.values())) if alike else in_front(
                specs, variants.as_rules(getattr(config, key)), config.n_layer)
    return found


def in_front(specs, rules, n_layer):
    """The rules behind those of `specs`, without patterns that win at no block, which a GPT refuses."""
    found = {**specs, **{pattern: spec for pattern, spec in rules.items() if pattern not in specs}}
    idle = variants.idle_rules(found, [f'h.{i}' for i in range(n_layer)])
    return {pattern: spec for pattern, spec in found.items() if pattern not in idle}


def with_shape(config, key, block, shape):
    """The spec of a block with those units and v_head_dim, without what is default."""
    table, default = (variants.MLPS, 'gelu') if key == 'mlp' else (variants.ATTENTIONS, 'causal')
    spec = parse_spec(match(getattr(config, key), block, default)[1], table)
    changed = {'hidden': shape[0]} if key == 'mlp' else {'kv_heads': shape[0], 'v_head_dim': shape[1]}
    neutral = {'kv_heads': config.n_kv_head or config.n_head, 'v_head_dim': config.n_embd // config.n_head}
    plain, given = (variants.check_arguments(key, table[spec.name], block, each, config, block)
                    for each in (Spec(spec.name), spec))
    kept = {name: v for name, v in (given | changed).items() if v != plain[name] and neutral.get(name) != v}
    first = next(iter(plain))
    return str(Spec(spec.name, (kept.pop(first),) if first in kept else (), kept))
