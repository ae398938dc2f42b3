"""One rung of the ladder: a model, its optimizer and its batch, and a train step of them as a call."""
import time

import torch
from torch.nn import functional as F

from attention.heads import causal_mask, merge_heads, split_heads
from bench.training import batch, step_memory, train_step
from configurator import Config, GPTConfig, check, model_config
from model import GPT, CausalSelfAttention
from optimizers import optim
from reporting import hardware
from training.startup import padded
from variants import UserError


class OpenAttention(CausalSelfAttention):
    """CausalSelfAttention with the (T, T) scores written out, as below the SDPA rung; the same function and parameters."""

    def forward(self, x, ctx):
        q, k, v = (split_heads(site(x), self.n_head) for site in (self.c_q, self.c_k, self.c_v))    # (B, H, T, D)
        scores = (q @ k.mT) * self.head_dim ** -0.5                                                  # (B, H, T, T)
        scores = scores.masked_fill(~causal_mask(x.size(1), x.size(1), x.device), -torch.inf)
        return self.c_proj(merge_heads(F.softmax(scores, -1) @ v))


def tf32(wanted):
    """Set the precision of fp32 matrix products on a CUDA GPU: TF32 (10-bit mantissa) or full."""
    torch.set_float32_matmul_precision('high' if wanted else 'highest')


class Rung:
    """A model whose weights and batch follow from the seed, so that all rungs begin with the same loss.

    step() is one train step. first_s: the time of the first one, which compiles; first_loss; memory: see
    training.step_memory, None where torch.compile hides it on a CPU.
    """

    def __init__(self, name, state, aside, settings, tokens, vocab_size, device):
        self.name, self.state, self.aside, self.device = name, state, aside, device
        model = make_model(settings, padded(vocab_size) if state.padded else vocab_size,
                           settings.loss_chunk if state.chunk else 0, device)
        if not state.sdpa:
            for block in model.transformer.h:
                block.attn.__class__ = OpenAttention
        self.model, self.optimizer = model, make_optimizer(model, state, device)
        self.net = torch.compile(model, dynamic=False) if state.compiled else model
        self.kind = half(device) if state.half else torch.float32
        self.x, self.y = batch(tokens, settings.batch_size, settings.block_size, settings.seed, device)
        begin = time.perf_counter()
        self.first_loss = self.step().item()
        self.first_s = time.perf_counter() - begin
        hidden = state.compiled and device.type == 'cpu'
        self.memory = None if hidden else step_memory(self.step, model, self.optimizer, device)

    def step(self):
        if self.device.type == 'cuda':
            tf32(self.state.tf32)
        return train_step(self.net, self.optimizer, self.x, self.y, hardware.autocast(self.device, self.kind))


def half(device):
    """bfloat16, but float16 on a GPU without it."""
    return hardware.dtype('auto', device) if device.type == 'cuda' else torch.bfloat16


def make_model(settings, vocab_size, loss_chunk, device, **changes):
    """GPT-2 of these sizes, weights from the seed; raises UserError for sizes that do not fit."""
    config = GPTConfig(n_layer=settings.n_layer, n_head=settings.n_head, n_embd=settings.n_embd,
                       block_size=settings.block_size, vocab_size=vocab_size, loss_chunk=loss_chunk, **changes)
    for name, sentence in check(config):
        raise UserError(sentence, name)
    torch.manual_seed(settings.seed)
    if hasattr(torch, '_dynamo') and device.type == 'cuda':
        torch._dynamo.config.recompile_limit = 64       # the rungs share the code of GPT.forward
    return GPT(model_config(config.__dict__)).to(device).train()


def make_optimizer(model, state, device):
    """AdamW in torch's own default form, AdamW fused, or Muon with fused AdamW for the rest."""
    config = Config(optimizer='muon' if state.muon else 'adamw', learning_rate=1e-4, muon_lr=1e-3)
    if state.fused:
        return optim.build(model, config, device.type)
    groups = optim.groups(model, config.weight_decay)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=False)
