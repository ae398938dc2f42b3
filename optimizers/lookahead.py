"""EMA-Nesterov: gradients are taken ahead of the weights, along a moving average of past steps."""
import torch

from optimizers.optim import like


class LookAhead:
    """w' = w + b d, gradient and optimizer step from w', then d <- g d + (1 - g) (w_new - w).

    b = look_ahead * lr / peak lr from step look_ahead_from to before look_ahead_until, else 0; g = look_ahead_decay. Around
    every optimizer and its state; evaluation and checkpoints see w. Memory of one copy of the weights, of two within a
    step. state: {parameter name: d}, for checkpoints; what is missing there, or has another shape, starts at 0. With
    look_ahead=0 nothing is kept.
    Source: arXiv 2605.25395; modded-nanogpt, track 3, result #39.
    """

    def __init__(self, model, config, state=None):
        self.config, self.kept, self.state = config, {}, {}
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad} if config.look_ahead else {}
        for name, p in self.parameters.items():
            known = (state or {}).get(name)
            same = known is not None and known.shape == p.shape
            self.state[name] = like(p, known).clone() if same else torch.zeros_like(p.detach())

    @torch.no_grad()
    def move(self, step, share):
        """To w', before the step's gradients; share: lr / peak lr."""
        config = self.config
        self.kept = {name: p.detach().clone() for name, p in self.parameters.items()}
        if self.kept and config.look_ahead_from <= step < (config.look_ahead_until or step + 1):
            torch._foreach_add_([*self.parameters.values()], [*self.state.values()], alpha=config.look_ahead * share)

    @torch.no_grad()
    def settle(self, applied):
        """After the step: d, where the optimizer's step was applied; else back to w, bit for bit."""
        if applied and self.kept:
            steps = torch._foreach_sub([*self.parameters.values()], [*self.kept.values()])
            torch._foreach_lerp_([*self.state.values()], steps, 1 - self.config.look_ahead_decay)
        for name, before in ({} if applied else self.kept).items():
            self.parameters[name].copy_(before)
        self.kept = {}
