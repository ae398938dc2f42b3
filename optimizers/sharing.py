"""How Muon's matrices reach the ranks that orthogonalise them: shares of a stack under DDP, whole rows under FSDP2."""
import torch
import torch.distributed as dist
from torch.nn import functional as F


def split_over_ranks(x, orthogonalise, group):
    """orthogonalise(x) of a stack (N, r, c) that all ranks hold: each takes N / ranks matrices, then all gather."""
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    share = -(-len(x) // world)
    mine = x[rank * share:(rank + 1) * share]
    mine = F.pad(mine, (0, 0, 0, 0, 0, share - len(mine)))
    every = x.new_empty(share * world, *x.shape[1:])
    gather = getattr(dist, 'all_gather_single', None) or dist.all_gather_into_tensor        # its name before torch 2.13
    gather(every, orthogonalise(mine).contiguous(), group=group)
    return every[:len(x)]


def exchange(x, group):
    """Block i of dim 0 goes to rank i; the results are in the order of the senders."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    dist.all_to_all_single(out, x.contiguous(), group=group)
    return out


def exchange_rows(x, orthogonalise, rows, group):
    """The local rows of orthogonalise(whole matrices); x (N, local rows, c), the ranks holding `rows` rows in all.

    Each rank is sent N / ranks whole matrices, and sends their results' rows back: 2 N rows c / ranks elements per rank,
    where a gather would be N rows c. Shards are those of torch.chunk, so that padding each makes the pieces equal.
    """
    (n, local, c), world = x.shape, dist.get_world_size(group)
    share, height = -(-n // world), -(-rows // world)
    x = F.pad(x, (0, 0, 0, height - local, 0, share * world - n))                       # (world * share, height, c)
    x = exchange(x, group).view(world, share, height, c).transpose(0, 1)
    x = orthogonalise(x.reshape(share, world * height, c)[:, :rows])
    x = F.pad(x, (0, 0, 0, world * height - rows)).view(share, world, height, c).transpose(0, 1)
    return exchange(x.reshape(world * share, height, c), group)[:n, :local]


def by_rows(p):
    """Whether ranks hold rows of this matrix; stacks sharded on dim 0 are whole matrices, and need no exchange."""
    return hasattr(p, 'placements') and p.ndim == 2


def rows_group(p):
    """The process group over which dim 0 of a DTensor is sharded; ValueError for other placements than FSDP2's."""
    dims = [i for i, placement in enumerate(p.placements) if not placement.is_replicate()]
    if len(dims) != 1 or not p.placements[dims[0]].is_shard(0):
        raise ValueError(f'Muon takes parameters sharded on dim 0, as fully_shard does, not {p.placements}')
    return p.device_mesh.get_group(dims[0])


def local_stack(tensor):
    """This rank's part of a tensor as a stack of matrices (N, rows, cols), a view."""
    tensor = tensor.to_local() if hasattr(tensor, 'to_local') else tensor
    return tensor[None] if tensor.ndim == 2 else tensor.view(-1, *tensor.shape[-2:])
