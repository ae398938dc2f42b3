"""Which units of a layer to keep when it becomes narrower, and how the matrix behind them makes up for the others.

A *unit* is a hidden neuron of an MLP or a group of heads of an attention: `size` columns of c_proj, whose inputs h have
C = E[h h^T]. Keep the columns S, and replace W = c_proj by W T with T = C_:S (C_SS)^-1, which predicts h from h_S by least
squares. With the residual R = C - C_:S (C_SS)^-1 C_S: the loss rises by tr(H W R W^T) / 2 nats per token, H = E[g g^T] of
its gradients at the outputs: K-FAC's second-order term, so that layers can be compared. Sources: MoDeGPT (Lin et al.
2024, arXiv 2408.09632) for the refit, by the scores of `leverage`; the greedy choice is a pivoted Cholesky factorisation
of C, weighted by W^T H W.
"""
import torch

from lowrank import svd

BLOCK, CANDIDATES = 8, 8                # pivots per update of the residual, chosen among BLOCK x CANDIDATES columns


def weighted(weight, gradient=None):
    """A (d, n) with A^T A = W^T H W: R^T W for R R^T = H + ridge, in float64; W itself without H."""
    W = weight.detach().double()
    if gradient is None:
        return W
    return torch.linalg.cholesky(svd.with_ridge(gradient.to(W.device), ridge=svd.GRADIENT_RIDGE)).t() @ W


def predictor(moment, kept, cross=None):
    """T (n, k) = M_:S (C_SS)^-1, the least-squares prediction from h_S: of h, M = C, or of others with M = E[. h^T].

    moment C (n, n), positive definite (with_ridge); kept: the columns S, (k,). Cost: a Cholesky of k x k, 2 n k^2 FLOPs.
    """
    C = moment[kept][:, kept]
    M = (moment if cross is None else cross)[:, kept]
    return torch.cholesky_solve(M.t(), torch.linalg.cholesky(C)).t()


def losses(moment, A, order, size=1):
    """nats[k], k = 0 .. units: what tr(A R A^T) / 2 is when the first k units of `order` are kept, refitted.

    With C in that order = L L^T the residual of k units is that of the columns of L behind theirs.
    """
    columns = expand(order, size)
    L = torch.linalg.cholesky(moment[columns][:, columns])
    each = (A[:, columns] @ L).square().sum(0).view(-1, size).sum(1) / 2
    return torch.cat((each.flip(0).cumsum(0).flip(0), each.new_zeros(1)))


def expand(order, size):
    """The columns of units, in their order."""
    return (order[:, None] * size + torch.arange(size, device=order.device)).flatten()


# ---------------------------------------------------------------------------------------------------
# orders: which unit to keep first

def curvature(moment, A, size=1, block=BLOCK):
    """Greedy: at each step the unit whose inclusion lowers tr(A R A^T) most, by tr(B_j R_jj^-1 B_j^T) with B = A R.

    `block` of them are taken among the best candidates before the whole residual is updated; 1 is exact.
    Cost: about 2 n^3 (1 + d / n) FLOPs in matrix products. Returns the order of all units, (units,).
    """
    R, B = moment.clone(), A @ moment
    units = R.shape[0] // size
    left, chosen = torch.arange(units, device=R.device), []
    while len(left):
        found = best(R, B, size, min(block, len(left)))                 # places in `left`
        chosen.append(left[found])
        columns = expand(found, size)
        rest = torch.ones(len(left), dtype=torch.bool, device=R.device)
        rest[found] = False
        others = expand(rest.nonzero()[:, 0], size)
        step = torch.linalg.solve(R[columns][:, columns], R[columns][:, others])          # (block, others)
        B = B[:, others] - B[:, columns] @ step
        R, left = R[others][:, others] - R[others][:, columns] @ step, left[rest]
    return torch.cat(chosen)


def best(R, B, size, count):
    """The `count` units that one after the other lower tr(A R A^T) most, among the CANDIDATES x count best at the start."""
    near = gains(R, B, size).topk(min(count * CANDIDATES, len(R) // size)).indices
    columns = expand(near, size)
    R, B, found = R[columns][:, columns], B[:, columns], []
    for _ in range(count):
        gain = gains(R, B, size)
        gain[found] = -torch.inf                        # of what is chosen nothing is left
        found.append(int(gain.argmax()))
        one = expand(torch.tensor(found[-1:], device=R.device), size)
        step = torch.linalg.solve(R[one][:, one], R[one])
        R, B = R - R[:, one] @ step, B - B[:, one] @ step
    return near[found]


def gains(R, B, size):
    """(units,): tr(B_j R_jj^-1 B_j^T)."""
    if size == 1:
        return B.square().sum(0) / R.diagonal().clamp_min(torch.finfo(R.dtype).tiny)
    units = len(R) // size
    blocks = R.view(units, size, units, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)             # (units, size, size)
    columns = B.t().view(units, size, -1)
    return (columns * torch.linalg.lstsq(blocks, columns).solution).sum((1, 2))


def scored(score, size):
    """Units by falling score of their columns, summed."""
    return score.view(-1, size).sum(1).argsort(descending=True, stable=True)


def leverage(moment, A, size=1, ridge=0.1):
    """By ridge leverage scores, the diagonal of C (C + r mean(diag C) I)^-1 (MoDeGPT's choice)."""
    eye = torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    return scored(torch.linalg.solve(moment + ridge * moment.diagonal().mean() * eye, moment).diagonal(), size)


def norms(moment, A, size=1):
    """By E[h_j^2] |A_j|^2: with A = W activation norm times weight norm, with H^1/2 W the second-order Taylor term."""
    return scored(moment.diagonal() * A.square().sum(0), size)


# method -> (order, whether A holds the curvature of the loss)
METHODS = {
    'neurons': (curvature, True),
    'neurons_leverage': (leverage, False),
    'neurons_norm': (norms, False),
    'neurons_taylor': (norms, True),
}
