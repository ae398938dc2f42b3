"""Optimizers and parameter groups, which read tags (basic.tags_of) and never ndim; weight averages; outliers."""
import contextlib
import statistics

import torch
from torch.distributed.tensor import distribute_tensor

from layers.basic import tags_of
from optimizers.muon import COEFFICIENTS, Muon
from optimizers.products import products_of
from variants import UserError

DECAYED = ('matrix', 'factor', 'embedding', 'head')     # vectors (norms, biases, scales) are not
MUON = ('matrix', 'factor')                             # what Muon takes; the rest is AdamW's
MOMENTS = {torch.optim.AdamW: {'step', 'exp_avg', 'exp_avg_sq'}, Muon: {'step', 'momentum'}}       # of each, at least


def whole(tensor):
    """The full tensor of one that may be sharded; every rank must call."""
    return tensor.full_tensor() if hasattr(tensor, 'full_tensor') else tensor


def groups(model, weight_decay, leave=(), factor_lr='none', factor_decay='tensors', by_tag=()):
    """Two AdamW groups, decayed and not, over the parameters that train; each parameter is in exactly one.

    leave: tags that another optimizer handles. With factor_lr, factor_decay or by_tag, {tag: share of the learning rate},
    further groups, each with an lr_scale.
    """
    if (factor_lr, factor_decay) != ('none', 'tensors') or by_tag:
        return factor_groups(model, weight_decay, leave, factor_lr, factor_decay, dict(by_tag))
    tags = tags_of(model)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad and tags[name] not in leave}
    decayed = [p for name, p in trained.items() if tags[name] in DECAYED]
    rest = [p for name, p in trained.items() if tags[name] not in DECAYED]
    assert len(decayed) + len(rest) == len(trained)
    return [{'params': decayed, 'weight_decay': weight_decay}, {'params': rest, 'weight_decay': 0.0}]


def factor_groups(model, weight_decay, leave, factor_lr, factor_decay, by_tag):
    """AdamW groups by (lr_scale, weight decay).

    factor_lr 'fan_in': lr times in_features / fan_in / factors for a factor, as an output moves by lr times the inputs that
    it sums: Qiu et al. 2024, Compute Better Spent; structures without `fans` (abba) keep lr. factor_decay 'product': a
    product of k factors decays by lr weight_decay per step, to first order, as a dense W would, so each factor by
    1 / k of it whatever its lr; where a magnitude sets the norm, it decays and the factors do not.
    """
    tags, scales, decays = tags_of(model), {}, {}
    for prefix, module in model.named_modules():
        own = [n for n, _ in module.named_parameters(recurse=False) if module.tags.get(n) == 'factor']
        fans = module.fans() if factor_lr == 'fan_in' and hasattr(module, 'fans') else {}
        free = getattr(module, 'magnitude', None) is not None and factor_decay == 'product'
        for name in own:
            full = f'{prefix}.{name}'
            scales[full] = module.in_features / fans[name] / len(fans) if name in fans else 1.0
            if factor_decay == 'product':
                decays[full] = 0.0 if free else weight_decay / len(own) / scales[full]
        if free:
            decays[f'{prefix}.magnitude'] = weight_decay
    found = {}
    for name, p in model.named_parameters():
        if p.requires_grad and tags[name] not in leave:
            decay = decays.get(name, weight_decay if tags[name] in DECAYED else 0.0)
            found.setdefault((scales.get(name, by_tag.get(tags[name], 1.0)), decay), []).append(p)
    return [{'params': params, 'weight_decay': decay, 'lr_scale': scale} for (scale, decay), params in found.items()]


def adamw(model, weight_decay, learning_rate, betas, device_type, leave=(), eps=1e-8, **more):
    """AdamW (Loshchilov & Hutter 2019), fused where there is a fused kernel; more: see groups."""
    fused = device_type in ('cuda', 'cpu')
    return torch.optim.AdamW(groups(model, weight_decay, leave, **more), lr=learning_rate, betas=betas, eps=eps, fused=fused)


def rates_by_tag(config):
    """{tag: share of learning_rate} of the tags with a rate of their own."""
    own = {'embedding': config.embedding_lr, 'head': config.head_lr, 'vector': config.vector_lr}
    return {tag: rate / config.learning_rate for tag, rate in own.items() if rate}


def muon(model, config, process_group=None):
    """Muon for the matrices and factors that train (docs/muon.md); its learning rate is scaled by the same schedule."""
    tags = tags_of(model)
    params = [p for name, p in model.named_parameters() if p.requires_grad and tags[name] in MUON]
    scale = config.muon_lr / config.learning_rate if config.learning_rate else 0.0
    return Muon([{'params': params, 'lr_scale': scale}], lr=config.muon_lr, weight_decay=config.muon_weight_decay,
                momentum=config.muon_momentum, momentum_warmup=config.muon_momentum_warmup,
                coefficients=COEFFICIENTS[config.muon_coefficients][:config.muon_steps], adjust_lr=config.muon_adjust_lr,
                cautious=config.muon_cautious, process_group=process_group,
                ns_dtype=None if config.muon_dtype == 'auto' else getattr(torch, config.muon_dtype),
                row_beta=config.muon_row_beta, products=products_of(model) if config.muon_product == 'spectron' else ())


class Optimizers:
    """Several optimizers as one, as far as train.py, the loss scaler and checkpoints need; each parameter has one."""

    def __init__(self, *parts):
        self.parts = parts

    @property
    def param_groups(self):
        return [group for part in self.parts for group in part.param_groups]

    @property
    def state(self):
        """{parameter: state} of all; a new dict that shares the optimizers' state."""
        return {p: entries for part in self.parts for p, entries in part.state.items()}

    def step(self):
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none=True):
        for part in self.parts:
            part.zero_grad(set_to_none)

    def register_step_pre_hook(self, hook):
        return self.parts[0].register_step_pre_hook(hook)


def build(model, config, device_type, process_group=None):
    """The optimizer of config.optimizer: AdamW, or Muon for matrices and factors and AdamW for the rest; maybe OrthoGrad."""
    rest = MUON if config.optimizer == 'muon' else ()
    optimizers = [adamw(model, config.weight_decay, config.learning_rate, (config.beta1, config.beta2), device_type, rest,
                        config.adam_eps, factor_lr=config.factor_lr, factor_decay=config.factor_decay,
                        by_tag=rates_by_tag(config))]
    if config.optimizer == 'muon':
        optimizers.append(muon(model, config, process_group))
    optimizer = Optimizers(*optimizers)
    if config.orthograd:
        add_orthograd(optimizer, model)
    return optimizer


def add_orthograd(optimizer, model):
    """OrthoGrad: before every step, g <- (g - (w.g / w.w) w) ||g|| / ||that|| for each tensor tagged matrix or factor.

    A step pre-hook, so that groups, state, saving and loading stay the optimizer's own, AdamW's or Muon's. In fp32 at
    least; a gradient along w becomes 0 and not noise; w = 0 leaves g. Cost: two passes over weights and gradients.
    Source: Prieto et al. 2025, arXiv 2501.04697, whose code keeps the norm too.
    """
    tags = tags_of(model)
    matrices = [p for name, p in model.named_parameters() if tags[name] in ('matrix', 'factor')]

    def before_step(optimizer, args, kwargs):
        for p in matrices:
            if p.grad is not None:
                p.grad.copy_(orthogonal(p.grad, p.detach()))
    return optimizer.register_step_pre_hook(before_step)


def orthogonal(gradient, weight):
    """The gradient without its component along the weight, rescaled to its original norm."""
    wide = torch.promote_types(gradient.dtype, torch.float32)
    g, w = gradient.to(wide), weight.to(wide)
    rest = g - (w * g).sum() / (w * w).sum().clamp_min(1e-30) * w
    norm, kept = g.norm(), rest.norm()
    return torch.where(kept < 1e-6 * norm, torch.zeros_like(rest), rest * (norm / kept.clamp_min(1e-30)))


def set_learning_rate(optimizer, rate):
    for group in optimizer.param_groups:
        group['lr'] = rate * group.get('lr_scale', 1.0)


class Outliers:
    """Detects a loss or a gradient norm more than `limit` standard deviations above the last `window` ones.

    With limit 0, or fewer values than the window, there is none. An outlier does not enter the window's statistics.
    `state` is saved in checkpoints. Source: llm.c's outlier detector.
    """

    def __init__(self, limit, window=128):
        self.limit, self.window, self.state = limit, window, {'loss': [], 'grad_norm': []}

    def check(self, **values):
        """True when one of the values (loss=..., grad_norm=...) is an outlier; keeps them all otherwise."""
        if not self.limit:
            return False
        if any(self.far(self.state[name], value) for name, value in values.items()):
            return True
        for name, value in values.items():
            self.state[name] = [*self.state[name], value][-self.window:]
        return False

    def far(self, past, value):
        spread = statistics.pstdev(past) if len(past) == self.window else 0.0
        return spread > 0 and (value - statistics.fmean(past)) / spread > self.limit


class Average:
    """A moving average of the weights (EMA), a <- d a + (1 - d) w after each step, evaluated and sampled in their place.

    d = min(decay, (1 + step) / (10 + step)), so that the start is soon forgotten; decay 0 keeps no average. In fp32 at
    least, memory of one more copy. state: {parameter name: average}, for checkpoints.
    """

    def __init__(self, model, decay, state=None):
        self.decay, self.parameters = decay, dict(model.named_parameters()) if decay else {}
        self.state = {name: (p.detach() if not state else like(p, state[name])).clone().to(
            torch.promote_types(p.dtype, torch.float32)) for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self, step):
        if self.state:
            weights = [p.detach().to(self.state[name].dtype) for name, p in self.parameters.items()]
            torch._foreach_lerp_(list(self.state.values()), weights, 1 - min(self.decay, (1 + step) / (10 + step)))

    @contextlib.contextmanager
    def swapped_in(self):
        """Context in which the model has the averaged weights."""
        own = {name: p.detach().clone() for name, p in self.parameters.items()}
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(self.state[name])
            yield
            for name, p in self.parameters.items():
                p.copy_(own[name])


def state_by_name(optimizer, model, gather=whole):
    """{parameter name: {entry: tensor}}, as in checkpoints: by name, since positions change when a model grows."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: {key: gather(value) for key, value in entries.items()} for p, entries in optimizer.state.items()}


def load_state_by_name(optimizer, model, state):
    """Restore a state_by_name, dtypes kept. A parameter without state starts afresh; an unknown name is an error."""
    parameters, parts = dict(model.named_parameters()), getattr(optimizer, 'parts', [optimizer])
    trained = {id(p): (part, group) for part in parts for group in part.param_groups for p in group['params']}
    for name, entries in state.items():
        if name not in parameters:
            raise UserError(f'the checkpoint has optimizer state for {name!r}, which this model does not have')
        p = parameters[name]
        if id(p) not in trained:
            continue                                    # frozen now
        part, group = trained[id(p)]
        if not MOMENTS[type(part)] <= entries.keys():
            raise ValueError(f"the optimizer's state of {name} ({', '.join(sorted(map(str, entries)))[:60]}) is not "
                             f"{type(part).__name__}'s; a run keeps its optimizer, another takes init_from=FOLDER")
        on_device = group.get('fused') or group.get('capturable')
        steps = {key: value.to(p.device) if on_device else value for key, value in entries.items() if key == 'step'}
        part.state[p] = {key: steps[key] if key == 'step' else like(p, value) for key, value in entries.items()}


def like(p, value):
    """A tensor of a checkpoint placed as the parameter is: on its device, and sharded alike where it has as many axes."""
    if hasattr(p, 'placements') and value.ndim == p.ndim:
        return distribute_tensor(value.to(p.device), p.device_mesh, p.placements)
    return value.to(p.device)
