"""Small layers that every variant uses: the dense linear, norms, learned scales, and parameter tags."""
import math

import torch
import torch.nn as nn
from torch.nn import functional as F

from layers import few_rows
from layers.base import BaseLinear


class Head(nn.Linear):
    """torch's linear, whose products of a few rows take all threads of a CPU."""

    def forward(self, x):
        return few_rows.linear(x, self.weight, self.bias)


class Linear(Head, BaseLinear):
    """The dense linear, y = x W^T + b, with the contract that every structured linear keeps.

    in_features, out_features: sizes; bias: bool. Parameters out*in (+ out); FLOPs per token 2*out*in.
    """
    tags = {'weight': 'matrix', 'bias': 'vector'}
    methods = None                          # every method is exact

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

    def normalise_(self, dim):
        """Every row (dim=1) or column (dim=0) of W to unit length, in place."""
        self.weight.copy_(F.normalize(self.weight, dim=dim, eps=1e-12))

    @classmethod
    def from_dense(cls, weight, bias, *, method='van_loan', stats=None):
        """The matrix unchanged: every method is exact for the dense structure. weight (out, in), bias (out,) or None."""
        out_features, in_features = weight.shape
        module = cls(in_features, out_features, bias is not None).to(weight.device, weight.dtype)
        with torch.no_grad():
            module.weight.copy_(weight)
            if bias is not None:
                module.bias.copy_(bias)
        return module


@torch.no_grad()
def zero_(module):
    """Set a linear's W to 0 by the tensors that its zero_factor names; gradients still flow."""
    for name in module.zero_factor.split():
        module.get_parameter(name).zero_()


class LayerNorm(nn.LayerNorm):
    """LayerNorm with an optional bias, (x - mean) / sqrt(var + eps) * weight + bias over the last axis."""
    tags = {'weight': 'vector', 'bias': 'vector'}

    def __init__(self, features, bias, eps=1e-5):
        super().__init__(features, eps, bias=bias)

    def forward(self, x):
        wide = torch.promote_types(self.weight.dtype, x.dtype)          # FSDP2 may have gathered the weight in bf16
        bias = None if self.bias is None else self.bias.to(wide)
        return F.layer_norm(x, self.normalized_shape, self.weight.to(wide), bias, self.eps)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, in fp32 at least (Zhang & Sennrich 2019)."""
    tags = {'weight': 'vector'}

    def __init__(self, features, eps=1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(features))
        self.eps = eps

    def forward(self, x):
        return rms(x, self.eps) * self.weight       # within F.rms_norm it rounds elsewhere in half precision: other bits


def rms(x, eps=1e-6):
    """x / sqrt(mean(x^2) + eps) over the last axis, computed in fp32 at least; zeros stay zeros."""
    return F.rms_norm(x, x.shape[-1:], None, eps).to(x.dtype)       # autocast must not widen it


def unit(x):
    """x / ||x|| over the last axis in fp32 at least; zeros stay zeros."""
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    return F.normalize(wide, dim=-1, eps=1e-12).to(x.dtype)


def as_stream(x, kind):
    """x in the residual stream's type: bfloat16 where config.residual says so and autocast computes in it."""
    device = x.device.type
    half = kind == 'bfloat16' and device != 'meta' and torch.is_autocast_enabled(device)
    return x.bfloat16() if half and torch.get_autocast_dtype(device) == torch.bfloat16 else x


NORMS = {'layernorm': lambda config: LayerNorm(config.n_embd, config.bias, config.norm_eps),
         'rmsnorm': lambda config: RMSNorm(config.n_embd, config.norm_eps)}


def norm(config):
    """The norm of the residual stream that config.norm names; none under nGPT, whose stream has norm 1."""
    return nn.Identity() if config.ngpt != 'none' else NORMS[config.norm](config)


class Learned(nn.Module):
    """nGPT's scale: stored at init_scale, initially acts as init_value, so that AdamW moves it lr * value / scale per step.

    shape: of the scale. forward() -> the effective scale. Source: NVIDIA/ngpt.
    """
    tags = {'stored': 'vector'}

    def __init__(self, shape, value, scale):
        super().__init__()
        self.stored, self.gain = nn.Parameter(torch.full(shape, float(scale))), value / scale

    def forward(self):
        return self.stored * self.gain


def hidden_scale(config, hidden, features):
    """nGPT's s_u sqrt(features), which gives the inputs of the activation std 1; None without ngpt.

    hidden: size of the scale; features: size of the unit vectors whose products it scales.
    """
    return None if config.ngpt == 'none' else Learned((hidden,), features ** 0.5, 1.0)


class UnitNorm(nn.Module):
    """x / ||x|| over the last axis: the norm of nGPT's latents."""

    def forward(self, x):
        return unit(x)


def choose(logits, temperature=1.0, top_k=None, top_p=None, generator=None, min_p=0.0):
    """One token id per row, (B, 1), from logits (B, V); temperature 0 takes the likeliest."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    return torch.multinomial(probabilities(logits, temperature, top_k, top_p, min_p), 1, generator=generator)


def probabilities(logits, temperature, top_k=None, top_p=None, min_p=0.0):
    """What a token is drawn by, (B, V), not normalised: temperature, top-k, nucleus (Holtzman et al. 2020), then min-p, the
    tokens with at least min_p times the largest probability (Nguyen et al. 2024, arXiv 2407.01082)."""
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.size(-1):
        kth = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    probs = F.softmax(logits, dim=-1)
    if top_p is not None and top_p < 1:
        ranked, order = probs.sort(descending=True)
        before = ranked.cumsum(-1) - ranked             # mass before a token; the first is always kept
        probs = probs.masked_fill(torch.zeros_like(probs, dtype=torch.bool).scatter(-1, order, before >= top_p), 0)
    return probs.masked_fill(probs < min_p * probs.amax(-1, keepdim=True), 0) if min_p else probs


def tags_of(model):
    """{parameter name: tag}, each parameter once (a tied one under its first name).

    Optimizer groups, weight decay and freezing read these tags and never ndim. The tags are on the
    modules, not on the tensors, so that they survive a move to another device, a copy or sharding.
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
