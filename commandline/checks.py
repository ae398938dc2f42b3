"""Rules of settings that need several of them at once, a part of configurator.check. Imports no torch."""
import variants
from commandline import bounds
from variants import UserError


def check_rules(config, name, table):
    rules = getattr(config, name)
    if not all(isinstance(part, str) for pair in variants.as_rules(rules).items() for part in pair):
        raise UserError(f'{name} takes texts only, {{pattern: spec}}, got {bounds.shown(rules)}')
    if len(variants.as_rules(rules)) > bounds.RULES:
        raise UserError(f'{name} takes at most {bounds.RULES} rules, got {len(rules)}')
    try:
        variants.check_rules(rules, table)
    except UserError as error:
        raise UserError(f'{name}: {error}') from None


def check_ngpt(config):
    """nGPT has no norms, no biases and its own scales: what would contradict that."""
    for name, allowed in (('bias', False), ('qk_norm', 'none'), ('softcap', 0.0), ('zero_init', False),
                          ('attention_scale', 0.0), ('embed_norm', False)):
        if getattr(config, name) != allowed:
            yield name, f'{name}={getattr(config, name)!r} contradicts ngpt, which has its own; set {name}={allowed!r}'
    if config.n_kv_head not in (None, config.n_head):
        yield 'n_kv_head', 'ngpt scales queries and keys by one table of n_head rows; leave n_kv_head=None'


def check_optimizer(config):
    """Settings of the optimizers that exclude one another or have nothing to act on."""
    if config.optimizer == 'muon' and (config.factor_lr != 'none' or config.factor_decay != 'tensors'):
        yield 'optimizer', "factor_lr and factor_decay are AdamW's, and optimizer='muon' takes the factors; drop them"
    if config.muon_steps > 5 and config.muon_coefficients != 'convergent':
        yield 'muon_steps', (f'muon_steps must be at most 5 with muon_coefficients={config.muon_coefficients!r}, got '
                             f"{config.muon_steps}; 'convergent' has 12")
    if config.muon_row_beta and config.muon_product != 'none':
        yield 'muon_row_beta', ("muon_row_beta makes updates of a spectral norm that muon_product='spectron' does not know; "
                                'drop one of them')
    own = [name for name in ('embedding_lr', 'head_lr', 'vector_lr') if getattr(config, name)]
    if own and not config.learning_rate:
        yield own[0], f'{own[0]} follows the schedule of learning_rate, which is 0; set it above 0'
    if config.head_lr and config.tie_weights:
        yield 'head_lr', 'head_lr is for a head of its own, and tie_weights=True shares it; set tie_weights=False or drop it'
    if config.look_ahead and (config.weights != 'float32' or config.ngpt != 'none'):
        yield 'look_ahead', ("look_ahead moves fp32 weights off their place for the gradient; it needs weights='float32' "
                             "and ngpt='none'")


def check_budget(config):
    """What a budget of parameters can be, and what it needs."""
    if config.rank_budget >= 1:
        yield 'rank_budget', f'rank_budget must be below 1, got {config.rank_budget}'
    if config.rank_budget and config.rank_allocation != 'uniform' and config.init_from == 'scratch':
        yield 'rank_allocation', (f'rank_allocation={config.rank_allocation!r} looks at trained weights, and '
                                  "init_from='scratch' has none; take rank_allocation='uniform'")
    yield from check_narrow(config)


def check_narrow(config):
    """Parts that become narrower: which, and by what budget."""
    odd = [word for word in map(str.strip, config.narrow.split(',')) if word not in ('mlp', 'heads', 'values', '')]
    if odd:
        yield 'narrow', f'narrow takes mlp, heads and values, with commas, got {odd[0]!r}'
    if config.narrow and not (config.rank_budget and config.init_from != 'scratch'):
        yield 'narrow', 'narrow removes units of a trained model by a budget; set rank_budget and init_from, or drop it'
    if config.narrow and config.rank_allocation == 'spectrum' or config.narrow and config.linear and (
            config.rank_allocation != 'curvature'):
        yield 'rank_allocation', (f"narrow takes rank_allocation='curvature', or 'uniform' without linear, got "
                                  f'{config.rank_allocation!r}')


def check_growth(config):
    """Guided structures, blocks that are added, and dense matrices at the end."""
    if config.self_guided >= 1:
        yield 'self_guided', f'self_guided must be below 1, got {config.self_guided}'
    rivals = {'grow_from': config.grow_from, 'ngpt': config.ngpt != 'none', 'drop_in': config.drop_in != 'none'}
    if config.self_guided and any(rivals.values()):
        yield 'self_guided', f'self_guided does not go with {next(n for n, on in rivals.items() if on)}; drop one of them'
    if 0 < config.finish_dense_at <= config.self_guided:
        yield 'finish_dense_at', (f'finish_dense_at must be after self_guided ({config.self_guided}), got '
                                  f'{config.finish_dense_at}')
    if config.grow_from > config.n_layer:
        yield 'grow_from', f'grow_from must not exceed n_layer ({config.n_layer}), got {config.grow_from}'
    if config.grow_from and config.grow_from < config.n_layer and not (config.grow_every or config.grow_on_plateau):
        yield 'grow_from', 'grow_from needs grow_every=STEPS or grow_on_plateau=True, or no block is ever added'
    if config.grow_from and config.init_from not in ('scratch', 'resume'):
        yield 'grow_from', f"grow_from grows a model from scratch, and init_from is {config.init_from!r}; drop one of them"


def check_drop_in(config):
    """What a run that drops structures in cannot do; dropin.begin checks the schedule once the sites are known."""
    specs = variants.as_rules(config.linear).values()
    if all(isinstance(spec, str) and spec.strip() == 'dense' for spec in specs):
        yield 'drop_in', (f"drop_in={config.drop_in!r} puts what linear names in place of dense matrices, and linear names "
                          "nothing; set it, say --linear='h.*.mlp.*=kron(8, 8)'")
    if config.grow_from:
        yield 'drop_in', 'drop_in and grow_from change the same model; take one of them'
    if config.init_from == 'scratch' and not config.drop_in_from:
        yield 'drop_in_from', ('drop_in from scratch would decompose random weights; set drop_in_from=STEPS of dense '
                               'training, or init_from=FOLDER of a dense run')
    if config.drop_in != 'all' and not config.drop_in_every:
        yield 'drop_in_every', f'drop_in={config.drop_in!r} needs drop_in_every=STEPS from one replacement to the next'
    if config.drop_in != 'all' and config.drop_in_freeze > config.drop_in_every:
        yield 'drop_in_freeze', (f'drop_in_freeze must not exceed drop_in_every ({config.drop_in_every}), got '
                                 f'{config.drop_in_freeze}')


def check_refine(config):
    """What the refinement of a compressed model needs: a dense one to start from, text, and nothing that changes it."""
    if not config.refine:
        return
    if config.init_from == 'scratch':
        yield 'refine', "refine meets the blocks of a dense model, and init_from='scratch' has none; set init_from=DENSE"
    if not config.calibration_tokens:
        yield 'refine', 'refine learns on the calibration text; set calibration_tokens above 0'
    rivals = {'drop_in': config.drop_in != 'none', 'self_guided': config.self_guided > 0}
    if any(rivals.values()):
        yield 'refine', f'refine does not go with {next(n for n, on in rivals.items() if on)}; drop one of them'


def check_distill(config):
    """What a teacher cannot be, and losses that it cannot give."""
    if not config.distill:
        return
    if config.distill in ('scratch', 'resume') or config.distill == 'init_from' and config.init_from == 'scratch':
        source = "init_from='scratch'" if config.distill == 'init_from' else f'distill={config.distill!r}'
        yield 'distill', f'{source} is no model to learn from; set distill to the folder of one'
    if config.loss != 'cross_entropy':
        yield 'distill', f"distill is for loss='cross_entropy', got {config.loss!r}; drop one of them"
    if not 0 < config.distill_weight <= 1:
        yield 'distill_weight', (f'distill_weight must be above 0 and at most 1, got {config.distill_weight}; without a '
                                 "teacher's share drop distill")


def blocks(config):
    """Names of the blocks, which the patterns of attention and mlp match."""
    return [f'h.{i}' for i in range(config.n_layer)]
