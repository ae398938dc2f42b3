"""Compiled models against eager ones, for bench/check.py and tests/training/test_gpu.py."""
import math

import torch
import torch.distributed as dist
from torch._dynamo.utils import counters
from torch.nn.parallel import DistributedDataParallel

from bench.cases import DDP_LIMIT, LIMIT, STEPS, cases
from configurator import Config
from model import GPT, GPTConfig
from optimizers import optim
from reporting import hardware

SCALE = 2.0 ** 10                                       # of the loss in float16, so that small gradients are not 0


def make(settings, device, **changes):
    """(model, x, y): two blocks and a random batch, the same for equal settings."""
    torch.manual_seed(0)
    sizes = dict(n_layer=2, n_head=2, n_embd=settings.n_embd, block_size=settings.block_size, vocab_size=settings.vocab_size)
    model = GPT(GPTConfig(**(sizes | changes))).to(device).train()
    x, y = torch.randint(settings.vocab_size, (2, settings.batch_size, settings.block_size)).to(device)
    return model, x, y


def gradients(model, net, x, y, dtype):
    """(loss, {name: gradient}) of `net`, which is the model or the model compiled."""
    scale = SCALE if dtype == torch.float16 else 1.0
    model.zero_grad(set_to_none=True)
    with hardware.autocast(x.device, dtype):
        loss = net(x, y)[1]
    (loss * scale).backward()
    return loss.item(), {name: p.grad / scale for name, p in model.named_parameters() if p.grad is not None}


def distances(found, expected):
    """{name: |found - expected| / |expected|}, in fp64; infinite for a gradient that one side lacks."""
    far = dict.fromkeys(found.keys() ^ expected.keys(), math.inf)
    for name in found.keys() & expected.keys():
        a, b = found[name].double(), expected[name].double()
        ratio = ((a - b).norm() / b.norm().clamp_min(1e-12)).item()
        far[name] = ratio if math.isfinite(ratio) else math.inf
    return far


def verdict(far, rounding, limit):
    """{'gradients', 'wrong', 'wrong_names', 'worst', 'rounding', 'worst_name'} of distances and rounding errors."""
    allowed = {name: max(limit, 2 * rounding.get(name, 0.0)) for name in far}
    wrong = sorted(name for name in far if not far[name] <= allowed[name])
    worst = max(far, key=lambda name: far[name] / allowed[name] if allowed[name] < math.inf else 0.0)
    return {'gradients': len(far), 'wrong': len(wrong), 'wrong_names': wrong[:20], 'worst_name': worst,
            'worst': finite(far[worst]), 'rounding': finite(rounding.get(worst, 0.0))}


def finite(value):
    """The number, or None, as JSON has no non-finite numbers."""
    return value if math.isfinite(value) else None


def graphs():
    """(graphs, graph breaks) that dynamo has made since its last reset."""
    return counters['stats']['unique_graphs'], sum(sum(counters[kind].values()) for kind in ('graph_break', 'unimplemented'))


def compare(name, case, settings, device):
    """The row of a case as bench.cases has it. `recompiled` counts the graphs beyond those of the first call."""
    torch._dynamo.reset()
    counters.clear()
    kind, changes = case
    dtype, (model, x, y) = getattr(torch, kind), make(settings, device, **changes)
    net, far, rounding, same, first = torch.compile(model, backend=settings.backend), {}, {}, True, None
    for progress in (0.5, 1.0):
        model.set_progress(progress)
        exact = gradients(model, model, x, y, torch.float32)[1]
        loss, eager = gradients(model, model, x, y, dtype)
        compiled_loss, found = gradients(model, net, x, y, dtype)
        first = first or graphs()
        again = gradients(model, net, x, y, dtype)[1]
        same = same and all(torch.equal(again[key], found[key]) for key in found)
        for into, more in ((far, distances(found, eager)), (rounding, distances(eager, exact))):
            into.update({key: max(value, into.get(key, 0.0)) for key, value in more.items()})
    judged = verdict(far, rounding, LIMIT[kind])
    near = abs(loss - compiled_loss) <= LIMIT[kind] * abs(loss)
    return {'name': name, 'dtype': kind, 'loss': finite(loss), 'compiled_loss': finite(compiled_loss), **judged,
            'same_bits': same, 'graphs': first[0], 'breaks': graphs()[1], 'recompiled': graphs()[0] - first[0],
            'passed': judged['wrong'] == 0 and near}


def losses(name, settings, device, ddp):
    """The losses of STEPS Muon steps of a case, with DDP in a group of one rank or without.

    As parallel.wrap has it, but the buckets are small, so that there are several: torch.compile cuts the graph at them.
    """
    torch._dynamo.reset()
    kind, changes = cases(settings)[name]
    model, x, y = make(settings, device, **changes)
    optimizer = optim.build(model, Config(optimizer='muon', learning_rate=1e-3), device.type,
                            dist.group.WORLD if ddp else None)
    net, found = torch.compile(model, backend=settings.backend), []
    if ddp:
        net = DistributedDataParallel(net, device_ids=[device] if device.type == 'cuda' else None, bucket_cap_mb=1,
                                      broadcast_buffers=False, gradient_as_bucket_view=True)
    for _ in range(STEPS):
        with hardware.autocast(device, getattr(torch, kind)):
            loss = net(x, y)[1]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def one_rank(name, settings, device):
    """A case trained without DDP and in a group of one rank (NCCL on a GPU, else gloo): its row."""
    dist.init_process_group('nccl' if device.type == 'cuda' else 'gloo', store=dist.HashStore(), rank=0, world_size=1)
    try:
        plain, ranked = (losses(name, settings, device, ddp) for ddp in (False, True))
    finally:
        dist.destroy_process_group()
    near = all(abs(a - b) <= DDP_LIMIT * abs(a) for a, b in zip(plain, ranked))
    return {'name': f'ddp {name}', 'passed': near and ranked[-1] < ranked[0], 'plain': list(map(finite, plain)),
            'ranked': list(map(finite, ranked)), 'words': f'losses {rounded(plain)}, with DDP {rounded(ranked)}'}


def rounded(values):
    return ' '.join(f'{value:.3f}' for value in values)


def getter():
    """The row of torch.get_float32_matmul_precision, which raises where the old and the new settings were mixed.

    Inductor's max-autotune calls it.
    """
    return {'name': 'getter', 'passed': True, 'words': f'fp32 precision {torch.get_float32_matmul_precision()!r}'}
