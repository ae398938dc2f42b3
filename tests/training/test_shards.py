"""FSDP2 that gathers in bf16, on one rank: every variant computes what it does under autocast alone."""
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from model import GPT, GPTConfig
from optimizers import optim
from training import parallel

SIZES = dict(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=61)
MODELS = {'gpt2': dict(bias=True, softcap=15.0), 'llama': dict(rope=True, norm='rmsnorm', mlp='swiglu', qk_norm='standard'),
          'ngpt': dict(ngpt='full', rope=True, tie_weights=False), 'dint': dict(attention='dint', value_residual=True),
          'mixture': dict(mlp='kron_moe(4, top_k=2)'), 'latent': dict(mlp='latent(16)'),
          'mla': dict(attention='mla_dint(8, qk_rope_head_dim=4)'), 'linformer': dict(attention='linformer(4, chunk=8)'),
          'window': dict(attention='window(8)'), 'gate': dict(attention='causal(gate=True)'),
          'structured': dict(linear={'*.attn.*': 'lowrank(4, weight_norm=True)', '*.c_fc': 'kron(8, 8, exact_columns=2)',
                                     '*.mlp.c_proj': 'abba(2, 2)'}),
          'sums': dict(linear={'h.*.mlp.*': 'lowrank(4) + kron(8, 8)', '*': 'kron(4, 4, guide=True)'}, bias=True)}


@pytest.fixture(scope='module')
def one_rank():
    dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh('cpu', (1,))
    dist.destroy_process_group()


def gradients(name, residual, mesh=None, dtype=torch.bfloat16):
    """(loss, all gradients in a row, types of the parameters and of the stream in a block), sharded over a mesh or not."""
    torch.manual_seed(0)
    model, seen = GPT(GPTConfig(**SIZES, **MODELS[name], residual=residual)), []
    if mesh is not None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dist.device_mesh, 'init_device_mesh', lambda *args: mesh)
            job = parallel.Job(0, 2, torch.device('cpu'), dtype)
            model = parallel.shard(model, SimpleNamespace(parallel='fsdp'), job)
    block = model.transformer.h[1]
    block.register_forward_pre_hook(lambda own, args: seen.append((args[0].dtype, {p.dtype for p in own.parameters()})))
    x = torch.randint(61, (3, 16))
    with torch.autocast('cpu', dtype, enabled=dtype != torch.float32):
        loss = model(x, x.roll(-1, 1))[1]
    loss.backward()
    found = [optim.whole(p.grad) for _, p in sorted(model.named_parameters())]
    assert all(g.dtype == torch.float32 for g in found)
    return loss.item(), torch.cat([g.flatten() for g in found]), seen[0]


@pytest.mark.parametrize('residual', ['float32', 'bfloat16'])
@pytest.mark.parametrize('name', MODELS)
def test_gathered_in_bf16_it_is_autocast(one_rank, name, residual):
    loss, whole, (stream, kept) = gradients(name, residual)
    near, rounded, (same, gathered) = gradients(name, residual, one_rank)
    assert stream == same == getattr(torch, residual) and kept == {torch.float32} and gathered == {torch.bfloat16}
    assert abs(loss - near) < 2e-3 and (whole - rounded).norm() < 2e-2 * whole.norm()


def test_in_float32_nothing_is_rounded(one_rank):
    loss, whole, _ = gradients('gpt2', 'float32', dtype=torch.float32)
    near, same, (_, gathered) = gradients('gpt2', 'float32', one_rank, torch.float32)
    assert near == loss and torch.equal(whole, same) and gathered == {torch.float32}
