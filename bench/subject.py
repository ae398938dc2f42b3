"""One attention, MLP or linear at one shape, built as the model builds it, and the calls that are measured."""
import dataclasses

import torch

import configurator
import variants
from bench.measure import filled, peak_memory
from layers.basic import unit
from model import Context
from reporting import hardware


def build_linear(config, settings):
    return variants.linear(config, 'h.0.mlp.c_fc', *reversed(settings.shape))


# part -> (GPTConfig, settings) -> module of block 0
BUILDERS = {
    'attention': lambda config, settings: variants.attention(config, 'h.0.attn', 'h.0'),
    'linear': build_linear,
    'mlp': lambda config, settings: variants.mlp(config, 'h.0.mlp', 'h.0'),
}


@torch.no_grad()
def initialise(module, config):
    """Weights as GPT.init_weights and normalise_weights give block 0; raises UserError where ngpt cannot have them."""
    for name, site in module.named_modules():
        if hasattr(site, 'spec'):
            joins = name == 'c_proj'
            site.reset_parameters(0.02 / (2 * config.n_layer) ** 0.5 if joins else 0.02)
            if config.ngpt != 'none':
                try:
                    site.normalise_(0 if joins else 1)
                except (AttributeError, ValueError) as error:
                    raise variants.UserError(f'ngpt: {site.spec} cannot be normalised: {error}', 'ngpt') from None


class Subject:
    """A module of `part` made of `spec`, with inputs as the block's norm hands them over: rms 1, under ngpt length 1.

    Equal specs have equal weights and inputs. RoPE's tables and masks of windows are made before anything is timed, as all
    blocks of a model share them.
    """

    def __init__(self, part, spec, settings):
        self.config = dataclasses.replace(configurator.model_config(settings), **{part: spec})
        self.part, self.spec, self.settings, self.shared = part, spec, settings, {}
        self.device = hardware.device(settings.device)
        self.dtype = hardware.dtype(settings.dtype, self.device)
        torch.manual_seed(settings.seed)
        self.module = BUILDERS[part](self.config, settings)
        initialise(self.module, self.config)
        self.module.to(self.device)
        self.width = self.module.in_features if part == 'linear' else self.config.n_embd

    def inputs(self, batch, T):
        """(B, T, C) random, the same for every subject of that width; fewer tokens are the first of more."""
        x = torch.randn(T, batch, self.width, generator=torch.Generator().manual_seed(self.settings.seed))
        return (x if self.config.ngpt == 'none' else unit(x)).transpose(0, 1).contiguous().to(self.device)

    def apply(self, x, cache=None, start=0):
        """(output, auxiliary losses) of x (B, T, C), whose first token stands at position `start`."""
        if self.part == 'linear':
            return self.module(x), []
        B, T = x.shape[:2]
        tokens = torch.arange(start, start + T, device=x.device)
        ctx = Context((tokens % self.config.vocab_size).expand(B, T), tokens, self.config, cache,
                      shared=self.shared.setdefault((B, start, T), {}))
        return self.module(x, ctx), ctx.losses

    def forward(self, batch, T):
        """-> a call: one forward pass in evaluation, without gradients."""
        self.module.eval()
        x = self.inputs(batch, T)

        def call():
            with torch.no_grad(), hardware.autocast(self.device, self.dtype):
                return self.apply(x)[0]
        return call

    def step(self, batch, T):
        """-> a call: forward in training and backward, to parameters and input; the gradients are dropped at its end."""
        self.module.train()
        x = self.inputs(batch, T).requires_grad_()
        parameters = [x, *self.module.parameters()]
        with torch.no_grad(), hardware.autocast(self.device, self.dtype):
            gradient = torch.ones_like(self.apply(x)[0])

        def call():
            with hardware.autocast(self.device, self.dtype):
                y, losses = self.apply(x)
            torch.autograd.backward([y, *losses], [gradient, *map(torch.ones_like, losses)])
            for parameter in parameters:
                parameter.grad = None
        return call

    def peak_memory(self, batch, T):
        """Most bytes that a step holds beyond weights and input: what is saved for backward, gradients, the rest."""
        call = self.step(batch, T)
        call()                          # libraries take their workspace
        return peak_memory(call, self.device)

    def prefill(self, batch, T):
        """The cache after T tokens in one call."""
        self.module.eval()
        cache = {}
        with torch.no_grad(), hardware.autocast(self.device, self.dtype):
            self.apply(self.inputs(batch, T), cache)
        return cache

    def decode(self, batch, T):
        """-> a call: one token a row on a cache of T tokens, always the same one.

        Each call gets a shallow copy of the cache: a token writes nothing into the tensors there but its own entry.
        """
        cache, x = self.prefill(batch, T), self.inputs(batch, T + 1)[:, -1:]

        def call():
            with torch.no_grad(), hardware.autocast(self.device, self.dtype):
                return self.apply(x, dict(cache), T)[0]
        return call

    def cache_per_token(self):
        """{numbers and bytes per token and row} of the cache on which the last token of block_size is decoded."""
        T = self.config.block_size - 1
        numbers, size = filled(self.prefill(1, T))
        return {'cache_numbers_per_token': numbers / T, 'cache_bytes_per_token': size / T}

    def parameters(self):
        return sum(p.numel() for p in self.module.parameters())

    def flops(self):
        """Forward FLOPs per token at full context, a multiply-add counted as 2: the sites, and attention over block_size."""
        T = self.config.block_size                      # many at once: some structures are cheaper per token then
        sites = sum(m.flops(T) for m in self.module.modules() if hasattr(m, 'spec')) // T
        return sites + (self.module.flops(self.config.block_size) if self.part == 'attention' else 0)


def largest_difference(a, b, batch, T):
    """Largest absolute difference of the outputs of two subjects after b has taken over a's parameters.

    None when their parameters differ in name or shape. Buffers stay: they are part of what a spec says (a window's
    size is one).
    """
    theirs, ours = dict(a.module.named_parameters()), dict(b.module.named_parameters())
    if {n: p.shape for n, p in theirs.items()} != {n: p.shape for n, p in ours.items()}:
        return None
    with torch.no_grad():
        for name, parameter in ours.items():
            parameter.copy_(theirs[name])
    return (a.forward(batch, T)().float() - b.forward(batch, T)().float()).abs().max().item()
