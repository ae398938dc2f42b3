"""What stays of the features of a narrower layer, and what becomes of statistics that were measured on all of them."""
import contextlib
import dataclasses

import torch

from decomposition import units


@dataclasses.dataclass
class Cut:
    """What stays of n features: places (k,), or a map (k, n) with its right inverse `back` (n, k)."""
    keep: torch.Tensor
    back: torch.Tensor | None = None

    def rows(self, t):
        """(..., n, m) or, of a vector, (n,) -> k in place of n."""
        keep = self.keep.to(t.device)
        if self.back is None:
            return t[keep] if t.ndim == 1 else t[..., keep, :]
        return keep.to(t.dtype) @ t

    def both(self, t, forward=True):
        """A moment (n, n) of the features -> (k, k); of gradients with forward=False, which go through `back`."""
        if self.back is None:
            return t[self.keep][:, self.keep]
        side = self.keep if forward else self.back.t()
        return side @ t @ side.t()


def value_cut(part, A, C, columns, rank):
    """The Cut of c_proj's inputs to `rank` features per head, the same map for all heads of a group.

    Per group the leading directions of K^1/2 G K^1/2, K the mean moment of its heads' values and G the sum of A_h^T A_h:
    for one head the best of that rank. Joint compression of W_V and W_O: A3 (Wong et al. 2025, arXiv 2505.12942).
    """
    size, per = part.source.v_head_dim, part.heads
    n, heads = part.source.c_proj.in_features, len(columns) // part.source.v_head_dim
    keep, back = C.new_zeros(heads * rank, n), C.new_zeros(n, heads * rank)
    for first in range(0, heads, per):
        places = [columns[h * size:(h + 1) * size] for h in range(first, first + per)]
        K = sum(C[p][:, p] for p in places) / per
        G = sum(A[:, h * size:(h + 1) * size].t() @ A[:, h * size:(h + 1) * size] for h in range(first, first + per))
        S = torch.linalg.cholesky(K)
        _, V = torch.linalg.eigh(S.t() @ G @ S)
        V = V[:, -rank:].flip(1)
        forward, inverse = torch.linalg.solve_triangular(S.t(), V, upper=True).t(), S @ V
        for h, p in zip(range(first, first + per), places):
            keep[h * rank:(h + 1) * rank, p], back[p, h * rank:(h + 1) * rank] = forward, inverse
    return Cut(keep, back)


def value_rows(part, kept, cut):
    """The Cut of c_v's outputs: the map of each group's first head."""
    size, per = part.source.v_head_dim, part.heads
    rank, n = len(cut.keep) // (len(kept) * per), part.source.n_kv_head * size
    keep, back = cut.keep.new_zeros(len(kept) * rank, n), cut.keep.new_zeros(n, len(kept) * rank)
    for i, group in enumerate(kept.tolist()):
        here = slice(group * per * size, group * per * size + size)
        rows, columns = slice(i * per * rank, i * per * rank + rank), slice(group * size, (group + 1) * size)
        keep[i * rank:(i + 1) * rank, columns] = cut.keep[rows, here]
        back[columns, i * rank:(i + 1) * rank] = cut.back[here, rows]
    return Cut(keep, back)


def cut_of(part, A, C, kept, v_head_dim):
    """The Cut of c_proj's inputs to these units, with that many features per value head (None: all)."""
    columns = units.expand(kept, part.size)
    if v_head_dim in (None, getattr(part.source, 'v_head_dim', None)):
        return Cut(columns)
    return value_cut(part, A[:, columns], C, columns, v_head_dim)


def predict(C, M, cut):
    """T (n, k): what c_proj is multiplied by, as units.predictor, for places or a map."""
    if cut.back is None:
        return units.predictor(C, cut.keep, M)
    side = (C if M is None else M) @ cut.keep.t()
    return torch.cholesky_solve(side.t(), torch.linalg.cholesky(cut.both(C))).t()


def rows_of(part, module, kept, cut):
    """The Cut of the outputs of one of the part's `units`."""
    source = getattr(part.source, module)
    if module == 'c_v' and cut.back is not None:
        return value_rows(part, kept, cut)
    weight = source.weight
    return Cut(units.expand(kept, weight.shape[-2] // part.source.n_units))


def cuts_of(part, kept, cut):
    """{site: (Cut of its outputs, Cut of its inputs)}, None where all stay."""
    found = {f'{part.name}.{module}': (rows_of(part, module, kept, cut), None)
             for module in part.source.units if getattr(part.source, module, None) is not None}
    return found | {part.site: (None, cut)}


def cut_passes(passes, source, cuts):
    """A `passes` that measures the source, whatever model it is given, and gives the statistics of what stays."""
    def found(model, sites, batches, gradients=False):
        with contextlib.closing(passes(source, sites, batches, gradients)) as given:
            for seen in given:
                yield {site: cut_stats(stats, *cuts.get(site, (None, None))) for site, stats in seen.items()}
    found.measures = source
    return found


def cut_stats(stats, outputs, inputs):
    changed = {}
    if outputs is not None and stats.gradient is not None:
        changed['gradient'] = outputs.both(stats.gradient, forward=False)
    if inputs is not None:
        changed |= {'mean': inputs.rows(stats.mean), 'covariance': inputs.both(stats.covariance)}
    return dataclasses.replace(stats, **changed)
