"""Small layers that every variant stands on: the dense linear, norms, and parameter tags."""
import torch
import torch.nn as nn
from torch.nn import functional as F


class Linear(nn.Linear):
    """The dense linear, y = x W^T + b, with the contract that every structured linear keeps.

    in_features, out_features: sizes; bias: bool. Parameters out*in (+ out); FLOPs 2*out*in a token.
    """
    tags = {'weight': 'matrix', 'bias': 'vector'}

    def __init__(self, in_features, out_features, bias):
        super().__init__(in_features, out_features, bias)

    @classmethod
    def weight_numel(cls, in_features, out_features):
        """Parameters without the bias."""
        return in_features * out_features

    def reset_parameters(self, std=0.02):
        """W ~ N(0, std^2), b = 0."""
        nn.init.normal_(self.weight, mean=0.0, std=std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def dense_weight(self):
        """W itself, (out, in)."""
        return self.weight

    def flops(self, tokens):
        """Forward FLOPs for that many tokens, a multiply-add counted as 2."""
        return 2 * tokens * self.in_features * self.out_features

    @classmethod
    def from_dense(cls, weight, bias, *, method='van_loan', stats=None):
        """The matrix as it is: every method is exact for the dense structure. weight (out, in), bias (out,) or None."""
        out_features, in_features = weight.shape
        module = cls(in_features, out_features, bias is not None).to(weight.device, weight.dtype)
        with torch.no_grad():
            module.weight.copy_(weight)
            if bias is not None:
                module.bias.copy_(bias)
        return module


class LayerNorm(nn.Module):
    """LayerNorm with an optional bias, (x - mean) / sqrt(var + 1e-5) * weight + bias over the last axis."""
    tags = {'weight': 'vector', 'bias': 'vector'}

    def __init__(self, features, bias):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(features))
        self.bias = nn.Parameter(torch.zeros(features)) if bias else None

    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


def tags_of(model):
    """{parameter name: tag}, each parameter once (a tied one under its first name).

    Optimizer groups, weight decay and freezing read these tags and never ndim. The tags stand on the
    modules, not on the tensors, so that they outlive a move to another device, a copy or sharding.
    Raises ValueError for a parameter whose module gives it no tag.
    """
    tags = {}
    names = {id(p): name for name, p in model.named_parameters()}   # a tied one once
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            full = f'{prefix}.{name}' if prefix else name
            if names.get(id(parameter)) != full:
                continue
            if name not in getattr(module, 'tags', {}):
                raise ValueError(f'{full} has no tag; add {name!r} to {type(module).__name__}.tags')
            tags[full] = module.tags[name]
    return tags
