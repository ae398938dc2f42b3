"""Steps of factors whose product moves by lr, whatever the factors' norms: Spectron's, for any number of factors.

A product is W = A B or a Kronecker product A ⊗ B: both satisfy |W|_2 <= |A|_2 |B|_2. Where each of k factors moves by at
most r <= 1 in spectral norm, W moves by at most prod(|F_i| + r) - prod |F_i|, a polynomial in r without a constant, hence at
most r times its value at 1. So r = lr / (prod(|F_i| + 1) - prod |F_i|), of two factors lr / (|A| + |B| + 1), moves W by at
most lr. The bound holds for Hadamard products too, but is loose there. Source: Spectron, arXiv 2602.12429, for A B.
"""
import math

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, distribute_tensor

from optimizers.sharing import by_rows, local_stack, rows_group

START = 20              # power iterations of a vector that is new; later one per step, as weights move little per step


def products_of(model):
    """[((out, in), [factors])]: the `products` that the classes of a model's modules declare, where all factors exist."""
    found = []
    for module in model.modules():
        for names in getattr(module, 'products', ()):
            factors = [getattr(module, name, None) for name in names]
            if all(isinstance(factor, torch.nn.Parameter) for factor in factors):
                found.append(((module.out_features, module.in_features), factors))
    return found


def power_step(x, v, group=None):
    """One power iteration of every matrix x (n, r, c) from a unit v (n, c): (|x|_2 from below (n,), the next v).

    With y = x v and z = x^T y, |z| / |y| is between |y| and |x|_2. group: the ranks that hold the rows of x. Zeros: 0 and v.
    """
    y = (x @ v[..., None])[..., 0]                                                      # (n, r)
    z = (x.mT @ y[..., None])[..., 0]                                                   # (n, c)
    sums = torch.cat((z, y.square().sum(-1, keepdim=True)), -1)
    if group is not None:
        dist.all_reduce(sums, group=group)
    z, length = sums[:, :-1], sums[:, -1].sqrt()
    size, tiny = z.norm(dim=-1), torch.finfo(x.dtype).tiny
    return size / length.clamp(min=tiny), torch.where(size[:, None] > 0, z / size[:, None].clamp(min=tiny), v)


def first_vector(p, dtype):
    """The vectors from which a new power iteration starts, the same on every rank: (cols,), or (..., 1, cols) for stacks.

    As many axes as a stack has, so that it is sharded as the stack is; a matrix's is whole on every rank.
    """
    cols = p.shape[-1]
    v = torch.randn(cols, generator=torch.Generator().manual_seed(cols), dtype=torch.float64)
    v = (v / v.norm()).to(p.device, dtype)
    if p.ndim == 2:
        return v
    v = v.expand(*p.shape[:-2], 1, cols).contiguous()
    return distribute_tensor(v, p.device_mesh, p.placements) if hasattr(p, 'placements') else v


class Products:
    """The products that Muon knows of, and the shares of lr by which their factors move.

    found: [((out, in), [factors])], factors being matrices or stacks of them (terms, rows, cols), which are products slice
    by slice; a stack of one goes with every slice of the others. Spectral norms are those of one power iteration per step,
    4 elements FLOPs, whose vector is the state 'vector' of the factor; a factor that does not train has none, and START
    iterations per step instead.
    """

    def __init__(self, found=()):
        self.found = list(found)
        self.shapes = {factor: shape for shape, factors in self.found for factor in factors}

    def shares(self, state):
        """{factor: (slices of this rank, 1, 1)}, 1 / (prod(|F_i| + 1) - prod |F_i|); moves the vectors in state."""
        norms, found = self.norms(state), {}
        for _, factors in self.found:
            total = math.prod(norms[f] + 1 for f in factors) - math.prod(norms[f] for f in factors)     # (slices,)
            for factor in factors:
                mine = total if len(norms[factor]) == len(total) else total.amax(0, keepdim=True)
                found[factor] = own_slices(factor, 1 / mine)[:, None, None]
        return found

    def norms(self, state):
        """{factor: spectral norms of all its slices (slices,)}, from below; one batch per shape."""
        batches, found = {}, {}
        for p in self.shapes:
            entries, wide = state[p] if p in state else {}, torch.promote_types(p.dtype, torch.float32)
            new = 'vector' not in entries
            vector = first_vector(p, wide) if new else entries['vector'].to(wide)       # load_state_dict casts it
            if entries:
                entries['vector'] = vector
            key = (tuple(p.shape[-2:]), by_rows(p), getattr(p, 'device_mesh', None), p.device, p.dtype, new)
            batches.setdefault(key, []).append((p, vector))
        for (*_, new), batch in batches.items():
            x = torch.cat([local_stack(p).to(vector.dtype) for p, vector in batch])
            own = [local(vector).reshape(-1, x.shape[-1]) for _, vector in batch]
            v, group = torch.cat(own), rows_group(batch[0][0]) if by_rows(batch[0][0]) else None
            for _ in range(START if new else 1):
                norms, v = power_step(x, v, group)
            counts = [len(part) for part in own]
            torch._foreach_copy_(own, v.split(counts))
            found.update({p: all_slices(p, part) for (p, _), part in zip(batch, norms.split(counts))})
        return found


def local(tensor):
    return tensor.to_local() if hasattr(tensor, 'to_local') else tensor


def all_slices(p, values):
    """Values of the slices of p on this rank (slices,) -> those of all its slices; every rank must call."""
    if not hasattr(p, 'placements') or by_rows(p):
        return values
    lead = p.shape[:-2]
    values = values.view(-1, *lead[1:])
    return DTensor.from_local(values, p.device_mesh, p.placements, run_check=False, shape=lead,
                              stride=torch.empty(lead, device='meta').stride()).full_tensor().flatten()


def own_slices(p, values):
    """The inverse: of values of all slices, those of this rank."""
    if not hasattr(p, 'placements') or by_rows(p):
        return values
    return distribute_tensor(values.view(p.shape[:-2]), p.device_mesh, p.placements).to_local().flatten()
