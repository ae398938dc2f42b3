"""The GPT. One file, read from top to bottom: attention, MLP, block, model.

Every matrix of a block is built by `variants.linear(config, site, ...)`, so that `config.linear` can
replace it by a Kronecker sum or a low-rank product. Attention and MLP classes are chosen the same
way. Without rules it is exactly GPT-2, with nanoGPT's names.

Shapes: B batch, T tokens, C = n_embd, H heads, D = C / H.
"""
import math

import torch
import torch.nn as nn
from torch.nn import functional as F

import variants
from attention.context import Context, again
from attention.decoding import Kept, stream
from attention.heads import QueryKeyNorm, ValueMix, attend, extend_cache, merge_heads, padded, sizes, split_heads, stretch_of
from configurator import GPTConfig
from layers.base import BaseAttention, BaseMLP, whole
from layers.basic import Head, Learned, RMSNorm, as_stream, choose, hidden_scale, norm, tags_of, unit, zero_
from layers.distillation import distilled
from layers.losses import LOSSES, ChunkedCrossEntropy, likeliest
from variants import UserError

__all__ = ['CausalSelfAttention', 'MLP', 'Block', 'GPT', 'GPTConfig', 'Context', 'UserError']


class CausalSelfAttention(BaseAttention):
    """softmax(q k^T / sqrt(D) + causal mask) v, by heads (GPT-2; Radford et al. 2019).

    config: n_kv_head groups queries (GQA), rope, qk_norm, value_residual, ngpt. gate: y of head h times
    2 sigmoid(w_h . x), initially 1 (Qiu et al. 2025, arXiv 2505.06708). softcap: bounds the scores, without SDPA.
    qkv_bias: biases on q, k, v whatever config.bias says (Qwen2). rope_llama3: heads.stretched's four numbers (Llama 3.1).
    kv_heads: of this block where some were removed, with their queries; v_head_dim: size of a value head, None = D.
    Parameters 2 C^2 (1 + H_kv/H); FLOPs per token 2 per parameter + 4 T C; cache 2 H_kv D elements per token.
    """
    units = ('c_q', 'c_k', 'c_v', 'gate')               # what has rows per group of heads: see decomposition/narrow.py

    def __init__(self, config, site, gate=False, softcap=0.0, qkv_bias=False, rope_llama3=(), kv_heads=None,
                 v_head_dim=None):
        super().__init__()
        if not isinstance(gate, bool) or not isinstance(softcap, (int, float)) or softcap < 0:
            raise ValueError(f'gate is True or False and softcap a number of at least 0, got {gate!r} and {softcap!r}')
        if not isinstance(qkv_bias, bool):
            raise ValueError(f'qkv_bias is True or False, got {qkv_bias!r}')
        if rope_llama3 and not config.rope:
            raise ValueError('rope_llama3 stretches rotary positions; set rope=True')
        width, self.head_dim, self.stretch = config.n_embd, config.n_embd // config.n_head, stretch_of(rope_llama3)
        self.n_head, self.n_kv_head, self.v_head_dim = sizes(config, self.head_dim, kv_heads, v_head_dim)
        bias = config.bias or qkv_bias
        self.c_q = variants.linear(config, f'{site}.c_q', width, self.n_head * self.head_dim, bias)
        self.c_k = variants.linear(config, f'{site}.c_k', width, self.n_kv_head * self.head_dim, bias)
        self.c_v = variants.linear(config, f'{site}.c_v', width, self.n_kv_head * self.v_head_dim, bias)
        self.c_proj = variants.linear(config, f'{site}.c_proj', self.n_head * self.v_head_dim, width)
        self.norm_qk, self.mix_v = QueryKeyNorm(config, self.n_head, self.head_dim), ValueMix(config, site)
        self.gate = Gate(width, self.n_head) if gate else None
        self.dropout, self.softcap = config.dropout, float(softcap)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x, ctx):
        q, k = split_heads(self.c_q(x), self.n_head), split_heads(self.c_k(x), self.n_kv_head)    # (B, H, T, D)
        v = split_heads(self.mix_v(self.c_v(x), ctx), self.n_kv_head)
        q, k = self.norm_qk(q, k)
        k, v = extend_cache(ctx, k=ctx.rotate(k, stretch=self.stretch), v=v)
        y = attend(ctx.rotate(q, stretch=self.stretch), k, v, self.norm_qk.scale, self.dropout if self.training else 0.0,
                   self.softcap, ctx.seen)
        if self.gate is not None:
            y = y * self.gate(x)
        return self.resid_dropout(self.c_proj(merge_heads(y)))

    def static_cache(self, cache, size):
        """The cache as tensors of fixed shape for `size` positions: see attention/decoding.py."""
        return padded(cache, size, ('k', 'v'), filled=cache['length'])

    def flops(self, context):
        """Forward FLOPs per token of q k^T and of the weighted sum, with `context` keys."""
        return 2 * context * self.n_head * (self.head_dim + self.v_head_dim)

    @property
    def n_units(self):
        """Groups of heads that can be removed."""
        return self.n_kv_head


class Gate(nn.Module):
    """2 sigmoid(W x) per head, (B, T, C) -> (B, H, T, 1); W starts at 0, so the gate at 1."""
    tags = {'weight': 'vector'}                         # AdamW without weight decay, as all gates

    def __init__(self, width, heads):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(heads, width))

    def forward(self, x):
        return 2 * torch.sigmoid(F.linear(x, self.weight)).mT.unsqueeze(-1)


class MLP(BaseMLP):
    """c_proj(gelu(c_fc x)) of size `hidden`, None = 4 C. approximate='tanh' is what GPT-2's weights were trained with."""
    units = ('c_fc',)

    def __init__(self, config, site, hidden=None, approximate='none'):
        super().__init__()
        if approximate not in ('none', 'tanh'):
            raise ValueError(f"approximate is 'none' or 'tanh', got {approximate!r}")
        hidden = 4 * config.n_embd if hidden is None else hidden
        whole(hidden=hidden)
        self.c_fc = variants.linear(config, f'{site}.c_fc', config.n_embd, hidden)
        self.c_proj = variants.linear(config, f'{site}.c_proj', hidden, config.n_embd)
        self.approximate, self.dropout = approximate, nn.Dropout(config.dropout)
        self.s_u = hidden_scale(config, hidden, config.n_embd)

    def activation(self, u):
        return F.gelu(u, approximate=self.approximate)

    def forward(self, x, ctx):
        u = self.c_fc(x) if self.s_u is None else self.c_fc(x) * self.s_u()
        return self.dropout(self.c_proj(self.activation(u)))


class ReLU2MLP(MLP):
    """c_proj(relu(c_fc x)^2) of size `hidden`, None = 4 C (So et al. 2021, Primer)."""

    def __init__(self, config, site, hidden=None):
        super().__init__(config, site, hidden)

    def activation(self, u):
        return F.relu(u).square()


class SwiGLU(BaseMLP):
    """c_proj(silu(c_gate x) * c_fc x) of size `hidden`; None = 8/3 C, up to a multiple of 64 (Shazeer 2020; LLaMA)."""
    units = ('c_fc', 'c_gate')

    def __init__(self, config, site, hidden=None):
        super().__init__()
        width = config.n_embd
        hidden = -(-8 * width // 3 // 64) * 64 if hidden is None else hidden
        whole(hidden=hidden)
        self.c_fc = variants.linear(config, f'{site}.c_fc', width, hidden)
        self.c_gate = variants.linear(config, f'{site}.c_gate', width, hidden)
        self.c_proj = variants.linear(config, f'{site}.c_proj', hidden, width)
        self.dropout, self.s_u = nn.Dropout(config.dropout), hidden_scale(config, hidden, width)

    def forward(self, x, ctx):
        gate = self.c_gate(x) if self.s_u is None else self.c_gate(x) * self.s_u()
        return self.dropout(self.c_proj(F.silu(gate) * self.c_fc(x)))


class Block(nn.Module):
    """x + attn(ln_1 x), then x + mlp(ln_2 x); under ngpt each branch is a step of the unit vector x towards its own.

    nGPT (Loshchilov et al. 2024): x <- unit(x + |a| (unit(branch(x)) - x)), initially a = 0.05, one per feature ('full')
    or a single one ('simple').
    """

    def __init__(self, config, site):
        super().__init__()
        self.ln_1 = norm(config)
        self.attn = variants.attention(config, f'{site}.attn', site)
        self.ln_2 = norm(config)
        self.mlp = variants.mlp(config, f'{site}.mlp', site)
        self.ngpt = config.ngpt != 'none'
        if self.ngpt:
            shape = (config.n_embd,) if config.ngpt == 'full' else (1,)
            self.a_attn = Learned(shape, 0.05, config.n_embd ** -0.5)
            self.a_mlp = Learned(shape, 0.05, config.n_embd ** -0.5)

    def forward(self, x, ctx):
        if self.ngpt:
            x = unit(x + self.a_attn().abs() * (unit(self.attn(x, ctx)) - x)).to(x.dtype)
            return unit(x + self.a_mlp().abs() * (unit(self.mlp(x, ctx)) - x)).to(x.dtype)
        x = (x + self.attn(self.ln_1(x), ctx)).to(x.dtype)
        return (x + self.mlp(self.ln_2(x), ctx)).to(x.dtype)


class GPT(nn.Module):
    """GPT-2 with swappable linears, attention and MLPs. Raises UserError for specs that do not fit."""

    def __init__(self, config):
        super().__init__()
        self.config, self.measures, self.kept = config, {}, Kept()      # measures: of the last call, see Context
        self.transformer = nn.ModuleDict({
            'wte': nn.Embedding(config.vocab_size, config.n_embd),
            'drop': nn.Dropout(config.dropout),
            'h': nn.ModuleList(Block(config, f'h.{i}') for i in range(config.n_layer)),
            'ln_f': norm(config),
        })
        if config.embed_norm:
            self.transformer['ln_e'] = RMSNorm(config.n_embd, config.norm_eps)
        if not config.rope:
            self.transformer['wpe'] = nn.Embedding(config.block_size, config.n_embd)
            self.transformer.wpe.tags = {'weight': 'embedding'}
        self.lm_head = Head(config.n_embd, config.vocab_size, bias=False)
        self.s_z = None if config.ngpt == 'none' else Learned((config.vocab_size,), config.ngpt_sz_init,
                                                              config.n_embd ** -0.5)
        self.transformer.wte.tags = {'weight': 'embedding'}
        self.lm_head.tags = {'weight': 'head'}
        if config.tie_weights:
            self.lm_head.weight = self.transformer.wte.weight
        variants.refuse_idle('linear', config.linear, self.sites())
        try:
            self.init_weights()
        except ValueError as error:
            raise UserError(f'ngpt: {error}', 'ngpt') from None
        tags_of(self)                                   # a parameter without a tag is found here

    # ------------------------------------------------------------------------------------------------
    # construction and accounting

    def sites(self, experts=False):
        """{site: linear module}, in depth order: `h.3.mlp.c_fc` is `transformer.h.3.mlp.c_fc` in the state dict.

        experts: the parts of mixtures too, which `linear` does not choose: routers, and linears of many experts.
        """
        return {name: module for name, module in self.transformer.named_modules()
                if hasattr(module, 'spec') and (experts or not hasattr(module, 'experts'))}

    def init_weights(self):
        """GPT-2: N(0, 0.02), and 0.02 / sqrt(2 n_layer) where a branch is added to the residual stream.

        Where a module gives a site another `std`, that replaces 0.02. config: embed_std, head_std, hidden_gain.
        """
        for module in (self.transformer[n] for n in ('wte', 'wpe') if n in self.transformer):
            nn.init.normal_(module.weight, mean=0.0, std=self.config.embed_std)
        if not self.config.tie_weights:
            nn.init.normal_(self.lm_head.weight, mean=0.0, std=self.config.head_std)
        self.init_sites('', self.config.zero_init)
        self.normalise_weights()

    def init_sites(self, prefix, zero):
        """Random weights and zero biases for the sites that begin with prefix; zero: c_proj starts at 0."""
        for site, module in self.sites(experts=True).items():
            if site.startswith(prefix):
                joins, gain = site.endswith('.c_proj'), self.config.hidden_gain
                std = getattr(module, 'std', math.sqrt(gain / module.in_features) if gain else 0.02)
                module.reset_parameters(std / (math.sqrt(2 * self.config.n_layer) if joins else 1))
                if joins and zero:
                    zero_(module)

    @torch.no_grad()
    def normalise_weights(self, prefix=''):
        """nGPT, after every optimizer step: unit length along the axis of the residual stream; nothing without ngpt.

        Rows (the input axis) of embedding, head and every site; columns of c_proj, whose output is added to the stream.
        Frozen tensors are not changed. prefix: of the sites alone that begin with it, as 'h.3.'.
        """
        if self.config.ngpt == 'none':
            return
        for module in () if prefix else (self.transformer.wte, self.lm_head):
            if module.weight.requires_grad:
                module.weight.copy_(unit(module.weight))
        for site, module in self.sites().items():
            if site.startswith(prefix) and all(p.requires_grad for p in module.parameters()):
                module.normalise_(0 if site.endswith('.c_proj') else 1)

    def add_block(self, linear=None, attention=None, mlp=None, compile=False):
        """Append a block whose branches are 0, so that the logits do not change; returns it.

        linear, attention, mlp: specs for its sites where they differ from config's (linear may be rules too); they are
        added to the config. compile: torch.compile the block. Raises UserError for specs that do not fit.
        """
        config, site = self.config, f'h.{len(self.transformer.h)}'
        if linear is not None:
            config.linear = {f'{site}.*' if p == '*' else p: s for p, s in variants.as_rules(linear).items()} | (
                variants.as_rules(config.linear))
        for name, spec in (('attention', attention), ('mlp', mlp)):
            if spec is not None:
                setattr(config, name, {site: spec} | variants.as_rules(getattr(config, name)))
        config.n_layer += 1
        block = Block(config, site).to(self.lm_head.weight.device, self.lm_head.weight.dtype).train(self.training)
        self.transformer.h.append(block)
        self.init_sites(f'{site}.', zero=config.ngpt == 'none')
        for scale in (block.a_attn, block.a_mlp) if block.ngpt else ():
            nn.init.zeros_(scale.stored)                # a branch of unit length cannot be 0, its step can
        self.normalise_weights()
        if compile:
            block.compile()
        return block

    def freeze_block(self, index, frozen=True):
        """No gradients for block `index`; rebuild the optimizer, so that the block is neither decayed nor moved."""
        for p in self.transformer.h[index].requires_grad_(not frozen).parameters():
            p.grad = None

    def unfreeze_block(self, index):
        """Gradients for block `index` again; rebuild the optimizer."""
        self.freeze_block(index, frozen=False)

    @torch.no_grad()
    def realise(self):
        """Replace every structured matrix by its dense matrix, in place: the same function, config dense.

        Logits stay equal up to rounding. Parameters are new tensors; rebuild the optimizer. A frozen site stays frozen.
        """
        for name, module in ((n, m) for n, m in self.sites().items() if m.spec != 'dense'):
            dense = variants.LINEARS['dense'].from_dense(module.dense_weight(), module.bias)
            dense.requires_grad_(next(module.parameters()).requires_grad).spec = 'dense'
            self.transformer.set_submodule(name, dense)
        for block in self.transformer.h:
            block.mlp.realise()
        self.config.linear, self.config.mlp = {}, variants.realised_mlp(self.config)

    def set_progress(self, fraction):
        """Tell every attention with a schedule the progress of the run, step / max_iters."""
        for block in self.transformer.h:
            block.attn.set_progress(fraction)

    def num_params(self, positions=True):
        """Number of parameters, tied ones once (gpt2: 124,439,808); positions=False omits the position table (nanoGPT)."""
        total = sum(p.numel() for p in self.parameters())
        table = self.transformer.wpe.weight.numel() if 'wpe' in self.transformer else 0
        return total if positions else total - table

    def flops_per_token(self):
        """Forward FLOPs per token at full context: sites, attention (no causal halving) and head; a multiply-add is 2."""
        T = self.config.block_size
        sites = sum(module.flops(T) for module in self.sites(experts=True).values()) // T   # of many at once: see ABBALinear
        attention = sum(block.attn.flops(self.config.block_size) for block in self.transformer.h)
        return sites + attention + 2 * self.lm_head.weight.numel()

    def site_table(self):
        """One dict per site: site, spec, shape (out, in), parameters with bias, forward FLOPs per token, share of all.

        A linear of many experts also has `active`, the parameters used per token.
        """
        total, length, rows = self.num_params(), self.config.block_size, []
        for site, module in self.sites(experts=True).items():
            numel = sum(p.numel() for p in module.parameters())
            rows.append({'site': site, 'spec': module.spec, 'shape': (module.out_features, module.in_features),
                         'parameters': numel, 'flops': module.flops(length) // length, 'share': numel / total,
                         **({'active': module.active()} if hasattr(module, 'active') else {})})
        return rows

    def estimate_mfu(self, fwdbwd_per_iter, dt, peak_flops=312e12):
        """Model FLOPs utilisation: 3 x forward FLOPs of fwdbwd_per_iter sequences in dt seconds, over the peak (A100)."""
        flops = 3 * self.flops_per_token() * self.config.block_size * fwdbwd_per_iter
        return flops / dt / peak_flops

    def crop_block_size(self, block_size):
        """Shorten the context: keep the first block_size rows of the position table."""
        if not 1 <= block_size <= self.config.block_size:
            raise UserError(f'block_size can be cropped to 1 .. {self.config.block_size}, got {block_size}')
        self.config.block_size = block_size
        if 'wpe' in self.transformer:
            wpe = self.transformer.wpe
            wpe.weight, wpe.num_embeddings = nn.Parameter(wpe.weight[:block_size].detach().clone()), block_size

    @classmethod
    def from_pretrained(cls, name_or_folder, override_args=None):
        """A GPT-2 or Llama: a hub name (gpt2, gpt2-xl ...), a folder that transformers wrote, or a .gguf file.

        override_args: GPTConfig fields to change (dropout, block_size to crop, linear rules ...). Raises UserError
        when the weights cannot be loaded or do not fit.
        """
        from decomposition import initialise
        return initialise.pretrained_gpt(name_or_folder, override_args or {})

    # ------------------------------------------------------------------------------------------------
    # forward and generation

    def forward(self, idx, targets=None, caches=None, start=0, guess=False, soft=None):
        """idx (B, T) -> (logits, loss): all logits with targets (-1 is ignored), the last position's without.

        While training with loss_chunk > 0 logits are None. guess: returns the likeliest tokens (B, T) instead of logits,
        for evaluation, with the logits of loss_chunk tokens at a time. soft: a teacher's predictions of these tokens
        (layers/distillation.py), against which the loss is then taken; logits are None.

        caches: one dict per layer, filled here; start: position of idx[:, 0] when caches contain the tokens before it; a
        tensor (1,) in a static step, see attention/decoding.py.
        """
        x, ctx = self.trunk(idx, caches, start)
        if targets is None:
            return self.head(x[:, -1:]), None
        if guess:
            return likeliest(x, targets, self.head, LOSSES[self.config.loss], self.config.loss_chunk)
        if soft is not None:
            logits, loss = None, distilled(x, self.head_weight(), targets, soft, self.config, self.measures)
        elif self.training and self.config.loss_chunk:
            logits, loss = None, self.chunked_loss(x.flatten(0, 1), targets.flatten())
        else:
            logits = self.head(x)                       # (B, T, V)
            loss = LOSSES[self.config.loss](logits.flatten(0, 1), targets.flatten())
        return logits, loss + sum(ctx.losses) if self.training and ctx.losses else loss

    def trunk(self, idx, caches=None, start=0):
        """idx (B, T) -> the last block's output after its norm (B, T, C), and the Context; arguments as forward's."""
        T, size = idx.size(1), self.config.block_size
        if torch.is_tensor(start):
            ctx = Context(idx, start, self.config, seen=(torch.arange(size, device=idx.device) <= start)[None])
        elif start + T > size:
            raise ValueError(f'{start + T} tokens do not fit block_size {size}')
        else:
            ctx = Context(idx, torch.arange(start, start + T, device=idx.device), self.config)
        x = self.transformer.wte(idx)                   # (B, T, C)
        if 'wpe' in self.transformer:
            x = x + self.transformer.wpe(ctx.positions)
        if 'ln_e' in self.transformer:
            x = self.transformer.ln_e(x)
        x = self.transformer.drop(as_stream(x if self.s_z is None else unit(x), self.config.residual))
        for block in self.transformer.h if caches is None else ():
            block.attn.prepare(ctx)                     # outside of checkpoint(), which may not write into ctx
        thrifty = self.config.recompute and torch.is_grad_enabled()
        for i, block in enumerate(self.transformer.h):
            ctx.cache = caches[i] if caches is not None else None
            x = again(block, x, ctx) if thrifty else block(x, ctx)
        x, self.measures = self.transformer.ln_f(x), ctx.measures
        return x, ctx

    def head(self, x):
        """(B, T, C) -> logits (B, T, V); nGPT's scales and the soft cap in fp32 at least."""
        logits = self.lm_head(x)
        if self.s_z is not None:
            logits = logits * self.s_z()
        if self.config.softcap:
            wide = torch.promote_types(logits.dtype, torch.float32)
            logits = self.config.softcap * torch.tanh(logits.to(wide) / self.config.softcap)
        return logits

    def head_weight(self):
        """W of the head, (V, C), with nGPT's scales of the logits, which act on its rows."""
        return self.lm_head.weight if self.s_z is None else self.lm_head.weight * self.s_z()[:, None]

    def chunked_loss(self, x, targets):
        """The loss of x (N, C), a chunk of logits at a time."""
        return ChunkedCrossEntropy.apply(x, self.head_weight(), targets, self.config.softcap, self.config.loss_chunk)

    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, use_cache=True, generator=None,
               n_tokens=None, decode='auto', compile=False):
        """Yield one (B, 1) tensor per new token. temperature 0 is greedy; see generate.

        n_tokens: the tokenizer's vocabulary size; rows beyond it are padding and never chosen. compile: the static step.
        """
        def pick(logits):
            return choose(logits[:, -1, :n_tokens], temperature, top_k, top_p, generator)
        return stream(self, idx, max_new_tokens, pick, use_cache, decode, compile)

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, use_cache=True, decode='auto'):
        """idx (B, T) -> (B, T + max_new_tokens), sampled one token at a time.

        temperature: divides the logits, 0 takes the likeliest; top_k: keep the k likeliest; top_p: keep the fewest
        whose probabilities sum to top_p. use_cache and decode change the speed, not the text; see decoding.py.
        """
        new = self.stream(idx, max_new_tokens, temperature, top_k, top_p, use_cache, decode=decode)
        return torch.cat((idx, *new), dim=1)
