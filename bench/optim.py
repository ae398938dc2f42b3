"""Part optim: a step of our batched Muon, and of its options, against our loop and torch.optim.Muon, in one run."""
import statistics
import time
from types import SimpleNamespace

import torch

from optimizers.lookahead import LookAhead
from optimizers.muon import ADJUST_LR, CONVERGENT, Muon, newton_schulz

# name -> (layers, hidden size) of a GPT's matrices, with terms where all are kron(8, 8, terms), or lowrank(rank)
SIZES = {'char': (4, 128), '6x384': (6, 384), '6x384 kron': (6, 384, 4), '6x384 lowrank': (6, 384, 0, 96), '124M': (12, 768)}


def shapes(layers, width, terms=0, rank=0):
    """Shapes of the matrices that Muon takes: c_q, c_k, c_v, c_proj, and c_fc and c_proj of the MLP; pairs of factors."""
    block = 4 * [(width, width)] + [(4 * width, width), (width, 4 * width)]
    if terms:
        block = [shape for out, cols in block for shape in ((terms, 8, 8), (terms, out // 8, cols // 8))]
    if rank:
        block = [shape for out, cols in block for shape in ((out, rank), (rank, cols))]
    return block * layers


def flops(sizes, steps=5):
    """FLOPs of the Newton-Schulz iterations of one optimizer step, a multiply-add counted as 2."""
    total = 0
    for shape in sizes:
        r, c = sorted(shape[-2:])
        total += (shape[0] if len(shape) == 3 else 1) * steps * 2 * r * r * (2 * c + r)
    return total


class Loop:
    """The same update, one matrix after the other, without batches, lists or several ranks: the reference for batching."""

    def __init__(self, params, dtype):
        self.params, self.momenta, self.dtype = params, [torch.zeros_like(p) for p in params], dtype

    @torch.no_grad()
    def step(self):
        for p, momentum in zip(self.params, self.momenta):
            momentum.lerp_(p.grad, 0.05)
            u = p.grad.lerp(momentum, 0.95)
            for weight, direction in zip(p, u) if p.ndim == 3 else [(p, u)]:
                rate = 0.02 * ADJUST_LR['original'](*weight.shape)
                weight.add_(newton_schulz(direction.to(self.dtype)), alpha=-rate)


class Ahead:
    """A step of Muon with the two moves of a look ahead around it."""

    def __init__(self, params, **settings):
        self.muon, self.number = Muon(params, **settings), 0
        self.ahead = LookAhead(torch.nn.ParameterList(params), SimpleNamespace(
            look_ahead=0.6, look_ahead_decay=0.99, look_ahead_from=0, look_ahead_until=0))

    def step(self):
        self.ahead.move(self.number, 1.0)
        self.muon.step()
        self.ahead.settle(True)
        self.number += 1


def options(copies, pairs, settings):
    """{name: optimizer} of the options, each over its own copies; pairs: whether two parameters in a row are a product."""
    found = {'convergent, 12 steps': Muon(copies(), coefficients=CONVERGENT, **settings),
             'row_beta': Muon(copies(), row_beta=0.95, **settings), 'look_ahead': Ahead(copies(), **settings)}
    if pairs:
        params = copies()
        products = [((1, 1), [a, b]) for a, b in zip(params[::2], params[1::2])]
        found['product'] = Muon(params, products=products, **settings)
    return found


def contestants(size, device, dtype):
    """{name: step function} over equal weights and gradients; torch.optim.Muon takes no stacks."""
    rng = torch.Generator(device).manual_seed(0)
    start = [torch.randn(shape, generator=rng, device=device) for shape in shapes(*SIZES[size])]
    grads = [torch.randn(w.shape, generator=rng, device=device) for w in start]

    def copies():
        params = [torch.nn.Parameter(w.clone()) for w in start]
        for p, g in zip(params, grads):
            p.grad = g
        return params
    found = {'batched': Muon(copies(), momentum_warmup=0, ns_dtype=dtype), 'loop': Loop(copies(), dtype)}
    found |= options(copies, len(SIZES[size]) > 2, dict(momentum_warmup=0, ns_dtype=dtype))
    if all(w.ndim == 2 for w in start):
        found['torch'] = torch.optim.Muon(copies(), lr=0.02, weight_decay=0.0)
    for optimizer in found.values():
        optimizer.step()
    ours, loop = found['batched'].param_groups[0]['params'], found['loop'].params
    apart = max((p - q).abs().max().item() for p, q in zip(ours, loop))
    assert apart < 0.02 * 0.05, f'the batched step and the loop differ by {apart}'
    return {name: optimizer.step for name, optimizer in found.items()}


def timed(step, repeats, device):
    """Milliseconds per call; CPU time where one CPU thread does the work, as other programs disturb it less."""
    alone = device.type == 'cpu' and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter
    if device.type == 'cuda':
        torch.cuda.synchronize()
    begin = clock()
    for _ in range(repeats):
        step()
    if device.type == 'cuda':
        torch.cuda.synchronize()
    return 1000 * (clock() - begin) / repeats


def spread(values):
    return {'median': statistics.median(values), 'min': min(values), 'max': max(values)}


def measure(sizes=None, device='cpu', rounds=15, round_ms=100, dtype=None):
    """{size: {'matrices', 'flops', 'ms': {name: median}, 'speedup': {name: its time / batched, median, min, max}}}.

    sizes: names of SIZES, None = all ('124M' on CUDA only). Every round times each contestant for about round_ms in
    turn, so that other load on the machine affects all; a speedup is the median of the rounds' ratios, above 1 where
    the batched step is faster; of an option, its cost. dtype: of the iterations, None = Muon's own; torch.optim.Muon's is
    always bf16.
    """
    device, table = torch.device(device), {}
    dtype = dtype or (torch.bfloat16 if device.type == 'cuda' else torch.float32)
    for size in sizes or [s for s in SIZES if s != '124M' or device.type == 'cuda']:
        steps = contestants(size, device, dtype)
        repeats = {name: max(1, round(round_ms / max(timed(step, 2, device), 1e-3))) for name, step in steps.items()}
        times = {name: [] for name in steps}
        for _ in range(rounds):
            for name, step in steps.items():
                times[name].append(timed(step, repeats[name], device))
        ratios = {name: [t / b for t, b in zip(times[name], times['batched'])] for name in steps if name != 'batched'}
        listed = shapes(*SIZES[size])
        table[size] = {
            'matrices': sum(shape[0] if len(shape) == 3 else 1 for shape in listed), 'flops': flops(listed),
            'ms': {name: statistics.median(values) for name, values in times.items()},
            'speedup': {name: spread(values) for name, values in ratios.items()}}
    return {'device': str(device), 'dtype': str(dtype).removeprefix('torch.'), 'threads': torch.get_num_threads(),
            'torch': torch.__version__, 'rounds': rounds, 'sizes': table}
