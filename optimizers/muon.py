"""Muon: momentum, orthogonalised by a Newton-Schulz iteration, as the update of weight matrices. docs/muon.md says why.

Matrices of one shape are stacked and iterated together, and the stack is divided over the ranks of a distributed run.
"""
import functools
import importlib.util
import math

import torch
import torch.distributed as dist

from optimizers.products import Products
from optimizers.sharing import by_rows, exchange_rows, local_stack, rows_group, split_over_ranks

# One (a, b, c) per step. Singular values of at least 0.003 of the norm come out in [0.68, 1.21] after five steps.
QUINTIC = ((3.4445, -4.7750, 2.0315),) * 5
# Polar Express (Amsel et al. 2025, arXiv 2505.16932): each triple is the minimax one for what the previous steps leave,
# from 0.001 on; the first five of the published table. [0.87, 1.13] after five steps.
_TABLE = ((8.28721201814563, -23.595886519098837, 17.300387312530933),
          (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
          (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
          (3.3184196573706015, -2.488488024314874, 0.51004894012372),
          (2.300652019954817, -1.6689039845747493, 0.4188073119525673))
# at x / 1.01, the paper's margin: rounding in bf16 may push a singular value past the end of a polynomial's interval
POLAR_EXPRESS = tuple((a / 1.01, b / 1.01 ** 3, c / 1.01 ** 5) for a, b, c in _TABLE)
# Newton-Schulz proper: converges to 1, slowly, as its slope at 0 is 2. Of modded-nanogpt's track 3, for which time is free.
CONVERGENT = ((2.0, -1.5, 0.5),) * 12
COEFFICIENTS = {'quintic': QUINTIC, 'polar_express': POLAR_EXPRESS, 'convergent': CONVERGENT}

# factor of the learning rate for a (rows, cols) matrix
ADJUST_LR = {
    'original': lambda rows, cols: math.sqrt(max(1, rows / cols)),
    'match_rms': lambda rows, cols: 0.2 * math.sqrt(max(rows, cols)),
}


def newton_schulz(x, coefficients=QUINTIC):
    """x = U S V^T -> U f(S / ||x||_F) V^T, f near 1: X <- X / ||X||_F, then X <- a X + (b A + c A^2) X with A = X X^T.

    x: (..., rows, cols), in whose dtype all is computed; coefficients: (a, b, c) per step. Zeros stay zeros. FLOPs
    per step and matrix 2 r^2 (2 c + r) with r = min(rows, cols), c = max. Source: Jordan et al. 2024, Muon.
    """
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x                             # A is the smaller Gram matrix
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    multiply_add = torch.addmm if x.ndim == 2 else torch.baddbmm
    for a, b, c in coefficients:
        A = x @ x.mT
        B = multiply_add(A, A, A, beta=b, alpha=c)
        x = multiply_add(x, B, x, beta=a)
    return x.mT if tall else x


@functools.lru_cache(maxsize=1)
def compiled_newton_schulz():
    """newton_schulz compiled for each shape (past the compiler's limit of 8 the others run eagerly)."""
    return torch.compile(newton_schulz, dynamic=False)


def momentum_at(step, start, end, warmup):
    """Momentum of step 0, 1, ...: linear from start to end over warmup steps."""
    return end if step >= warmup else start + (end - start) * step / warmup


def chunked(stacks, most):
    """Lists of tuples of stacks, with at most `most` matrices per list; a larger stack is split."""
    chunk, count = [], 0
    for entry in stacks:
        for part in [entry] if len(entry[0]) <= most else zip(*(t.split(most) for t in entry)):
            if chunk and count + len(part[0]) > most:
                yield chunk
                chunk, count = [], 0
            chunk.append(part)
            count += len(part[0])
    if chunk:
        yield chunk


def descend(weights, updates, rate, decay, cautious):
    """W <- W (1 - decay) - rate U for each pair; a cautious decay acts only where U W >= 0. In fp32 at least."""
    wide = [w.to(torch.promote_types(w.dtype, torch.float32)) for w in weights]
    if cautious:
        for w, u in zip(wide, updates):
            w.sub_(decay * w * (w * u >= 0))
    elif decay:
        torch._foreach_mul_(wide, 1 - decay)
    torch._foreach_add_(wide, updates, alpha=-rate)
    for w, v in zip(weights, wide):
        if v is not w:
            w.copy_(v)


def by_neuron(updates, moments, beta, group=None):
    """NorMuon: u_i / sqrt(v_i) for each row of an update, v_i a moving average of mean(u_i^2); then the old ||U||_F.

    updates, moments: lists of (n, rows, cols) and (n, rows, 1), the latter changed in place; group: the ranks that hold the
    rows. v starts at 0 without a correction, which the norm removes. Source: Li et al. 2025, arXiv 2510.05491.
    """
    for u, v in zip(updates, moments):
        u = u.to(v.dtype)
        v.lerp_(u.square().mean(-1, keepdim=True), 1 - beta)
        even = u / (v.sqrt() + 1e-10)
        squares = torch.stack([t.square().sum((-2, -1)) for t in (u, even)])            # (2, n)
        if group is not None:
            dist.all_reduce(squares, group=group)
        before, after = squares
        yield even * (before / after.clamp(min=1e-30)).sqrt()[:, None, None]


class Muon(torch.optim.Optimizer):
    """M <- lerp(M, G, 1 - mu); U = newton_schulz(lerp(G, M, mu)); W <- W (1 - lr wd) - lr f U, f of the shape.

    params: matrices (rows, cols), or stacks of them (..., rows, cols) whose slices are orthogonalised one by one: what
    basic.tags_of calls matrix and factor. lr: the update's size in spectral norm (adjust_lr='original', f =
    sqrt(max(1, rows / cols))) or AdamW's ('match_rms', f = 0.2 sqrt(max(rows, cols))). weight_decay: decoupled, where
    `cautious` only on entries whose update has the weight's sign (or is 0). momentum, nesterov: mu rises from
    momentum_start over momentum_warmup of a parameter's own steps. coefficients: COEFFICIENTS has two. ns_dtype: None
    is bf16 on CUDA, elsewhere the momentum's, which is fp32 at least. compile: None = on CUDA where triton is installed.
    process_group: ranks with equal gradients (DDP) that share the work; parameters from fully_shard have their own.
    chunk: most elements in a stack, at least one matrix.
    row_beta: decay of NorMuon's average per row, 0 = off. products: [((out, in), [factors])] (products.products_of), whose
    factors take steps of lr f(out, in) / (prod(|F_i| + 1) - prod |F_i|), so that the product moves by at most lr f |U|_2.
    State by parameter: 'step' and 'momentum', the latter sharded like the parameter; 'rows' with row_beta, 'vector' with
    products. A gradient of None skips its parameter; a frozen one loses its state and starts afresh when it trains again.
    Raises ValueError for vectors, unknown adjust_lr and other shardings than on dim 0.
    Source: Jordan et al. 2024, kellerjordan.github.io/posts/muon; match_rms: Liu et al. 2025, arXiv 2502.16982;
    cautious: Chen et al. 2025, arXiv 2510.12402.
    """

    def __init__(self, params, lr=0.02, weight_decay=0.0, momentum=0.95, nesterov=True, momentum_warmup=300,
                 momentum_start=0.85, coefficients=QUINTIC, adjust_lr='original', cautious=False, ns_dtype=None,
                 compile=None, process_group=None, chunk=None, row_beta=0.0, products=()):
        if adjust_lr not in ADJUST_LR:
            raise ValueError(f'adjust_lr is {adjust_lr!r}; take one of {", ".join(ADJUST_LR)}')
        self.ns_dtype, self.compile, self.process_group, self.chunk = ns_dtype, compile, process_group, chunk
        self.products = Products(products)
        super().__init__(params, dict(
            lr=lr, weight_decay=weight_decay, momentum=momentum, nesterov=nesterov, momentum_warmup=momentum_warmup,
            momentum_start=momentum_start, coefficients=coefficients, adjust_lr=adjust_lr, cautious=cautious,
            row_beta=row_beta))

    def add_param_group(self, param_group):
        super().add_param_group(param_group)
        for p in self.param_groups[-1]['params']:
            if p.ndim < 2 or not p.is_floating_point():
                raise ValueError(f'Muon takes matrices and stacks of them, not a {p.dtype} of shape {tuple(p.shape)}')
            if hasattr(p, 'placements'):
                rows_group(p)                           # refuses other shardings

    @torch.no_grad()
    def step(self, closure=None):
        """One step over all parameters with gradients; on every rank of a group, as all work together."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        work = [(group, self.buckets(group)) for group in self.param_groups]
        shares = self.products.shares(self.state)
        for group, buckets in work:
            for bucket in buckets.values():
                self.update(bucket, group, shares)
        return loss

    def buckets(self, group):
        """{what parameters must share to be computed together: [parameters]}, in their order; creates missing state."""
        found = {}
        for p in group['params']:
            if not p.requires_grad:
                self.state.pop(p, None)
            elif p.grad is not None:
                state, wide = self.state[p], torch.promote_types(p.dtype, torch.float32)
                if not state:
                    state.update(step=torch.tensor(0.0), momentum=torch.zeros_like(p))
                if group['row_beta'] and 'rows' not in state:
                    state['rows'] = torch.zeros_like(p[..., :1])
                for name in ('momentum', 'rows') if group['row_beta'] else ('momentum',):
                    state[name] = state[name].to(wide)  # and after load_state_dict, which casts
                shape = tuple(p.shape[-2:]) if by_rows(p) else tuple(sorted(p.shape[-2:]))
                mesh = getattr(p, 'device_mesh', None)
                key = (shape, by_rows(p), mesh, p.device, p.dtype, state['step'].item(), p in self.products.shapes)
                found.setdefault(key, []).append(p)
        return found

    def update(self, bucket, group, shares):
        """One step of parameters whose matrices have one shape (some transposed), a chunk at a time."""
        first, states, scale = bucket[0], [self.state[p] for p in bucket], ADJUST_LR[group['adjust_lr']]
        mu = momentum_at(states[0]['step'].item(), group['momentum_start'], group['momentum'], group['momentum_warmup'])
        stacks = [(local_stack(p), local_stack(p.grad.to(s['momentum'].dtype).contiguous()), local_stack(s['momentum']),
                   *([local_stack(s['rows'])] if group['row_beta'] else []),
                   *([scale(*self.products.shapes[p]) * shares[p]] if p in shares else []))
                  for p, s in zip(bucket, states)]
        limit = self.chunk or (2 ** 25 if first.is_cuda else 2 ** 20)
        ranks = dist.get_world_size(rows_group(first)) if by_rows(first) else 1
        for chunk in chunked(stacks, max(1, limit // (first.shape[-2] * first.shape[-1])) * ranks):
            weights, gradients, momenta, *more = zip(*chunk)
            torch._foreach_lerp_(momenta, gradients, 1 - mu)
            directions = torch._foreach_lerp(gradients, momenta, mu) if group['nesterov'] else momenta
            updates = self.orthogonal(directions, first, group['coefficients'])
            if group['row_beta']:
                updates = [*by_neuron(updates, more[0], group['row_beta'], rows_group(first) if by_rows(first) else None)]
            shapes = [first.shape if by_rows(first) else w.shape[-2:] for w in weights]
            rates = [group['lr'] * scale(*shape) for shape in shapes]
            if first in shares:
                updates, rates = [u * s for u, s in zip(updates, more[-1])], [group['lr']] * len(weights)
            for rate in set(rates):
                pairs = [(w, u) for w, u, own in zip(weights, updates, rates) if own == rate]
                descend(*zip(*pairs), rate, group['lr'] * group['weight_decay'], group['cautious'])
        for state in states:
            state['step'] += 1

    def orthogonal(self, directions, first, coefficients):
        """The orthogonalised directions, a list of stacks of equal-shaped (or transposed) matrices, in ns_dtype."""
        dtype = self.ns_dtype or (torch.bfloat16 if first.is_cuda else directions[0].dtype)
        counts = [len(d) for d in directions]
        turned = [d.shape[-2] > d.shape[-1] and not by_rows(first) for d in directions]
        shape = (directions[0].mT if turned[0] else directions[0]).shape[1:]

        def parts(x):
            return [part.mT if t else part for part, t in zip(x.split(counts), turned)]
        x = torch.empty(sum(counts), *shape, dtype=dtype, device=first.device)
        torch._foreach_copy_(parts(x), directions)      # stacks, transposes and casts in one pass
        compile = self.compile if self.compile is not None else x.is_cuda and importlib.util.find_spec('triton')
        run = functools.partial(compiled_newton_schulz() if compile else newton_schulz, coefficients=coefficients)
        if by_rows(first):
            x = exchange_rows(x, run, first.shape[0], rows_group(first))
        elif self.process_group is not None and not hasattr(first, 'placements'):
            x = split_over_ranks(x, run, self.process_group)
        else:
            x = run(x)
        return parts(x)
