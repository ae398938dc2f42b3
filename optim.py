"""Optimizers, parameter groups and schedules. Groups read tags (layers.tags_of), never ndim."""
import math

import torch

from layers import tags_of
from variants import UserError

DECAYED = ('matrix', 'factor', 'embedding', 'head')     # vectors (norms, biases, scales) are not


def groups(model, weight_decay):
    """Two AdamW groups, decayed and not, over the parameters that train; each parameter stands in exactly one."""
    tags = tags_of(model)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    decayed = [p for name, p in trained.items() if tags[name] in DECAYED]
    rest = [p for name, p in trained.items() if tags[name] not in DECAYED]
    assert len(decayed) + len(rest) == len(trained)
    return [{'params': decayed, 'weight_decay': weight_decay}, {'params': rest, 'weight_decay': 0.0}]


def adamw(model, weight_decay, learning_rate, betas, device_type):
    """AdamW (Loshchilov & Hutter 2019), fused where there is a fused kernel."""
    fused = device_type in ('cuda', 'cpu')
    return torch.optim.AdamW(groups(model, weight_decay), lr=learning_rate, betas=betas, fused=fused)


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
    """The gradient without its part along the weight, at its old norm."""
    wide = torch.promote_types(gradient.dtype, torch.float32)
    g, w = gradient.to(wide), weight.to(wide)
    rest = g - (w * g).sum() / (w * w).sum().clamp_min(1e-30) * w
    norm, kept = g.norm(), rest.norm()
    return torch.where(kept < 1e-6 * norm, torch.zeros_like(rest), rest * (norm / kept.clamp_min(1e-30)))


def learning_rate(step, config):
    """Learning rate of step 0, 1, ...: linear warm-up to learning_rate, cosine to min_lr at lr_decay_iters, then min_lr."""
    if not config.decay_lr:
        return config.learning_rate
    if step < config.warmup_iters:
        return config.learning_rate * (step + 1) / (config.warmup_iters + 1)
    if step >= config.lr_decay_iters:
        return config.min_lr
    done = (step - config.warmup_iters) / (config.lr_decay_iters - config.warmup_iters)
    return config.min_lr + 0.5 * (1 + math.cos(math.pi * done)) * (config.learning_rate - config.min_lr)


def set_learning_rate(optimizer, rate):
    for group in optimizer.param_groups:
        group['lr'] = rate


def state_by_name(optimizer, model):
    """{parameter name: {entry: tensor}}, as checkpoints hold it: by name, since positions change when a model grows."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: dict(entries) for p, entries in optimizer.state.items()}


def load_state_by_name(optimizer, model, state):
    """Put a state_by_name back, dtypes kept. A parameter without state starts afresh; an unknown name is an error."""
    parameters = dict(model.named_parameters())
    trained = {id(p): group for group in optimizer.param_groups for p in group['params']}
    for name, entries in state.items():
        if name not in parameters:
            raise UserError(f'the checkpoint has optimizer state for {name!r}, which this model does not have')
        p = parameters[name]
        if id(p) not in trained:
            continue                                    # frozen by now
        group = trained[id(p)]
        on_device = group.get('fused') or group.get('capturable')
        optimizer.state[p] = {key: value.to(p.device) if key != 'step' or on_device else value
                              for key, value in entries.items()}
