"""The GPT. One file, read from top to bottom: attention, MLP, block, model.

Every matrix of a block is made by `variants.linear(config, site, ...)`, so that `config.linear` can
put a Kronecker sum or a low-rank product in its place; attention and MLP classes are chosen the same
way. Without rules it is GPT-2 exactly, with nanoGPT's names.

Shapes: B batch, T tokens, C = n_embd, H heads, D = C / H.
"""
import math
from dataclasses import dataclass, field

import torch
import torch.nn as nn
from torch.nn import functional as F

import variants
from configurator import GPTConfig
from layers import LayerNorm, tags_of
from variants import UserError

__all__ = ['CausalSelfAttention', 'MLP', 'Block', 'GPT', 'GPTConfig', 'Context', 'UserError']


@dataclass
class Context:
    """What one call of GPT.forward tells every layer; nothing else survives a call."""
    positions: torch.Tensor                             # (T,) of the tokens of this call
    block_size: int
    cache: dict | None = None                           # this layer's own, {} at first; None while training
    losses: list = field(default_factory=list)          # auxiliary losses, added to the training loss only


class CausalSelfAttention(nn.Module):
    """softmax(q k^T / sqrt(D) + causal mask) v, by heads (GPT-2; Radford et al. 2019).

    Parameters 4 C^2; FLOPs 8 C^2 + 4 T C a token at full context; cache 2 C numbers a token.
    """

    def __init__(self, config, site):
        super().__init__()
        width = config.n_embd
        self.c_q = variants.linear(config, f'{site}.c_q', width, width)
        self.c_k = variants.linear(config, f'{site}.c_k', width, width)
        self.c_v = variants.linear(config, f'{site}.c_v', width, width)
        self.c_proj = variants.linear(config, f'{site}.c_proj', width, width)
        self.n_head, self.dropout = config.n_head, config.dropout
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x, ctx):
        B, T, C = x.shape
        # (B, T, C) -> (B, H, T, D)
        q, k, v = (c(x).view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
                   for c in (self.c_q, self.c_k, self.c_v))
        k, v = extend_cache(ctx, k, v)
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0,
                                           **causal_mask(T, k.size(2), x.device))
        y = y.transpose(1, 2).reshape(B, T, C)
        return self.resid_dropout(self.c_proj(y))

    def flops(self, context):
        """Forward FLOPs a token of q k^T and of the weighted sum, with `context` keys."""
        return 4 * context * self.c_q.out_features


def extend_cache(ctx, k, v):
    """Append k, v (B, H, T, D) to this layer's cache, if there is one; return all keys and values so far."""
    if ctx.cache is None:
        return k, v
    if not ctx.cache:
        B, H, _, D = k.shape
        ctx.cache.update(k=k.new_empty(B, H, ctx.block_size, D), v=v.new_empty(B, H, ctx.block_size, D), length=0)
    start, end = ctx.cache['length'], ctx.cache['length'] + k.size(2)
    ctx.cache['k'][:, :, start:end], ctx.cache['v'][:, :, start:end], ctx.cache['length'] = k, v, end
    return ctx.cache['k'][:, :, :end], ctx.cache['v'][:, :, :end]


def causal_mask(queries, keys, device):
    """SDPA's arguments for the last `queries` of `keys` positions: its is_causal aligns at the wrong corner for a cache."""
    if queries == keys:
        return {'is_causal': True}
    if queries == 1:
        return {}
    return {'attn_mask': torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)}


class MLP(nn.Module):
    """c_proj(gelu(c_fc x)), 4 C wide. approximate='tanh' is what GPT-2's own weights were trained with."""

    def __init__(self, config, site, approximate='none'):
        super().__init__()
        if approximate not in ('none', 'tanh'):
            raise ValueError(f"approximate is 'none' or 'tanh', got {approximate!r}")
        self.c_fc = variants.linear(config, f'{site}.c_fc', config.n_embd, 4 * config.n_embd)
        self.c_proj = variants.linear(config, f'{site}.c_proj', 4 * config.n_embd, config.n_embd)
        self.approximate, self.dropout = approximate, nn.Dropout(config.dropout)

    def forward(self, x, ctx):
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate=self.approximate)))


class Block(nn.Module):
    """x + attn(ln_1 x), then x + mlp(ln_2 x)."""

    def __init__(self, config, site):
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, config.bias)
        self.attn = variants.attention(config, f'{site}.attn', site)
        self.ln_2 = LayerNorm(config.n_embd, config.bias)
        self.mlp = variants.mlp(config, f'{site}.mlp', site)

    def forward(self, x, ctx):
        x = x + self.attn(self.ln_1(x), ctx)
        return x + self.mlp(self.ln_2(x), ctx)


class GPT(nn.Module):
    """GPT-2 with swappable linears, attention and MLPs. Raises UserError for specs that do not fit."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict({
            'wte': nn.Embedding(config.vocab_size, config.n_embd),
            'wpe': nn.Embedding(config.block_size, config.n_embd),
            'drop': nn.Dropout(config.dropout),
            'h': nn.ModuleList(Block(config, f'h.{i}') for i in range(config.n_layer)),
            'ln_f': LayerNorm(config.n_embd, config.bias),
        })
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer.wte.tags = self.transformer.wpe.tags = {'weight': 'embedding'}
        self.lm_head.tags = {'weight': 'head'}
        if config.tie_weights:
            self.lm_head.weight = self.transformer.wte.weight
        idle = variants.idle_rules(config.linear, self.sites())
        if idle:
            raise UserError(f'linear: the pattern {idle[0]!r} wins at no site; the sites are h.0.attn.c_q, ... '
                            'and the first match wins', 'linear')
        self.init_weights()
        tags_of(self)                                   # a parameter without a tag is found here

    # ------------------------------------------------------------------------------------------------
    # construction and accounting

    def sites(self):
        """{site: linear module}, in depth order: `h.3.mlp.c_fc` is `transformer.h.3.mlp.c_fc` in the state dict."""
        return {name: module for name, module in self.transformer.named_modules() if hasattr(module, 'spec')}

    def init_weights(self):
        """GPT-2: N(0, 0.02), and 0.02 / sqrt(2 n_layer) where a branch joins the residual stream."""
        for module in (self.transformer.wte, self.transformer.wpe, self.lm_head):
            nn.init.normal_(module.weight, mean=0.0, std=0.02)
        for site, module in self.sites().items():
            joins = site.endswith('.c_proj')
            module.reset_parameters(0.02 / math.sqrt(2 * self.config.n_layer) if joins else 0.02)

    def num_params(self, positions=True):
        """Parameters, tied ones once (gpt2: 124,439,808); positions=False leaves out the position table (nanoGPT)."""
        total = sum(p.numel() for p in self.parameters())
        return total if positions else total - self.transformer.wpe.weight.numel()

    def flops_per_token(self):
        """Forward FLOPs a token at full context: sites, attention (no causal halving) and head; a multiply-add is 2."""
        sites = sum(module.flops(1) for module in self.sites().values())
        attention = sum(block.attn.flops(self.config.block_size) for block in self.transformer.h)
        return sites + attention + 2 * self.lm_head.weight.numel()

    def site_table(self):
        """One dict a site: site, spec, shape (out, in), parameters with bias, forward FLOPs a token, share of all."""
        total = self.num_params()
        rows = []
        for site, module in self.sites().items():
            numel = sum(p.numel() for p in module.parameters())
            rows.append({'site': site, 'spec': module.spec, 'shape': (module.out_features, module.in_features),
                         'parameters': numel, 'flops': module.flops(1), 'share': numel / total})
        return rows

    def estimate_mfu(self, fwdbwd_per_iter, dt, peak_flops=312e12):
        """Model FLOPs utilisation: 3 x the true forward FLOPs of fwdbwd_per_iter sequences in dt s over the peak (A100)."""
        flops = 3 * self.flops_per_token() * self.config.block_size * fwdbwd_per_iter
        return flops / dt / peak_flops

    def crop_block_size(self, block_size):
        """Shorten the context: the first block_size rows of the position table stay."""
        if not 1 <= block_size <= self.config.block_size:
            raise UserError(f'block_size can be cropped to 1 .. {self.config.block_size}, got {block_size}')
        self.config.block_size = block_size
        self.transformer.wpe.weight = nn.Parameter(self.transformer.wpe.weight[:block_size].detach().clone())
        self.transformer.wpe.num_embeddings = block_size

    @classmethod
    def from_pretrained(cls, name_or_folder, override_args=None):
        """A GPT-2 by hub name (gpt2, gpt2-medium, gpt2-large, gpt2-xl) or from a folder that transformers wrote.

        override_args: GPTConfig fields to change (dropout, block_size to crop, linear rules ...). Raises UserError
        when the weights cannot be had or do not fit.
        """
        import interop
        return interop.pretrained_gpt(name_or_folder, override_args or {})

    # ------------------------------------------------------------------------------------------------
    # forward and generation

    def forward(self, idx, targets=None, caches=None, start=0):
        """idx (B, T) -> (logits, loss): all logits with targets (-1 is ignored), the last position's without.

        caches: one dict a layer, filled here; start: position of idx[:, 0] when caches hold the tokens before it.
        """
        T = idx.size(1)
        if start + T > self.config.block_size:
            raise ValueError(f'{start + T} tokens do not fit block_size {self.config.block_size}')
        ctx = Context(torch.arange(start, start + T, device=idx.device), self.config.block_size)
        x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe(ctx.positions))   # (B, T, C)
        for i, block in enumerate(self.transformer.h):
            ctx.cache = caches[i] if caches is not None else None
            x = block(x, ctx)
        x = self.transformer.ln_f(x)
        if targets is None:
            return self.lm_head(x[:, -1:]), None
        logits = self.lm_head(x)                        # (B, T, V)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
        return logits, loss + sum(ctx.losses) if self.training and ctx.losses else loss

    @torch.no_grad()
    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, use_cache=True, generator=None,
               n_tokens=None):
        """Yield one (B, 1) tensor a new token. temperature 0 is greedy; see generate.

        n_tokens: the tokenizer's vocabulary size; rows beyond it are padding and never chosen.

        Beyond block_size the last block_size tokens are read afresh for every token: learned positions shift.
        """
        caches, seen = [{} for _ in self.transformer.h], 0
        for _ in range(max_new_tokens):
            if use_cache and idx.size(1) <= self.config.block_size:
                logits, _ = self(idx[:, seen:], caches=caches, start=seen)
                seen = idx.size(1)
            else:
                logits, _ = self(idx[:, -self.config.block_size:])
            token = choose(logits[:, -1, :n_tokens], temperature, top_k, top_p, generator)
            idx = torch.cat((idx, token), dim=1)
            yield token

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, use_cache=True):
        """idx (B, T) -> (B, T + max_new_tokens), sampled one token at a time.

        temperature: divides the logits, 0 takes the likeliest; top_k: keep the k likeliest; top_p: keep the fewest
        whose probabilities sum to top_p. The cache changes the speed and not the text.
        """
        return torch.cat((idx, *self.stream(idx, max_new_tokens, temperature, top_k, top_p, use_cache)), dim=1)


def choose(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    """One token id a row, (B, 1), from logits (B, V): temperature, then top-k, then nucleus (Holtzman et al. 2020)."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.size(-1):
        kth = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    probs = F.softmax(logits, dim=-1)
    if top_p is not None and top_p < 1:
        ranked, order = probs.sort(descending=True)
        before = ranked.cumsum(-1) - ranked             # mass in front of a token; the first always stays
        probs = probs.masked_fill(torch.zeros_like(probs, dtype=torch.bool).scatter(-1, order, before >= top_p), 0)
    return torch.multinomial(probs, 1, generator=generator)
