"""The Hadamard product of two low-rank products, W ~ (B1 A1) o (B2 A2), near a matrix in Frobenius norm.

No closed form is known, unlike for a single low-rank product: two starts, then alternating least squares. With all but
one factor fixed the error is a separate least-squares problem in every row (or column) of that factor: row i of B1 is
fitted to row i of W by the rows of A1, each multiplied by row i of Q = B2 A2, so Q^2 weights the entries.
"""
import torch

from lowrank.svd import truncated_svd

TRIAL = 5                       # sweeps from either start, before the better one continues
SWEEPS, ENOUGH = 50, 1e-3       # a fit ends after that many more, or when one lowers the error by less than this share
STEPS = 3                       # of conjugate gradients in a least-squares problem


def nearest_hadamard(weight, rank1, rank2, importance=None):
    """B1 (out, rank1), A1 (rank1, in), B2 (out, rank2), A2 (rank2, in) with a small ||W - (B1 A1) o (B2 A2)||_F.

    weight (out, in), of any floating dtype, which the factors get too; importance (in,), zero or more: weight of the
    squared error of column j. Never a larger error than that of the nearest matrix of rank max(rank1, rank2), which is
    one of the starts (up to rounding into the dtype), nor than the other start; a local minimum at best.
    Deterministic, no random numbers; float64 inside. The two products have the same norm, and component k of a
    product is balanced: ||B[:, k]|| = ||A[k]||.
    Cost: up to 2 TRIAL + SWEEPS sweeps of about 20 out in (rank1 + rank2) multiply-adds, a few matrices of W's size in
    memory; a few seconds for 1536 x 384 at ranks 38 and 38 to 77 and 76 on one CPU thread.
    Source: the starts are FedPara's and ABBA's form (arXiv 2108.06098, 2505.14238) solved for a given W, our own.
    """
    if rank1 < rank2:
        B1, A1, B2, A2 = nearest_hadamard(weight, rank2, rank1, importance)
        return B2, A2, B1, A1
    W, scale = weight.detach().double(), None
    if importance is not None:              # sum_j d_j (w - p q)_j^2 is the plain error of W and A1 with columns * sqrt(d_j)
        scale = importance.detach().to(W).clamp(min=1e-12 * importance.max().item()).sqrt()
        W = W * scale if scale.any() else W
    tried = [improved(W, start(W, rank1, rank2), TRIAL) for start in (svd_and_ones, signed_roots)]
    B1, A1, B2, A2 = improved(W, min(tried, key=lambda factors: error(W, factors)), SWEEPS)
    if scale is not None and scale.any():
        A1 = A1 / scale
    return tuple(factor.to(weight.dtype) for factor in balanced(B1, A1, B2, A2))


def product(factors):
    B1, A1, B2, A2 = factors
    return (B1 @ A1) * (B2 @ A2)


def error(W, factors):
    return (W - product(factors)).norm().item()


def svd_and_ones(W, rank1, rank2):
    """The nearest matrix P of rank1, times ones: the other components of B2 A2 are zero in B2.

    Their rows of A2 are the leading right singular vectors of P o (W - P), the direction in which the error falls
    fastest as B2 A2 moves away from the ones; zeros there would stay zeros.
    """
    B1, A1 = truncated_svd(W, rank1)
    P = B1 @ A1
    B2, A2 = W.new_zeros(W.shape[0], rank2), W.new_ones(rank2, W.shape[1])
    B2[:, 0] = 1
    A2[1:] = truncated_svd(P * (W - P), rank2 - 1)[1] if rank2 > 1 else 0
    A2[1:] /= A2[1:].norm(dim=1, keepdim=True).clamp(min=1e-300) / W.shape[1] ** 0.5        # entries of size 1
    return B1, A1, B2, A2


def signed_roots(W, rank1, rank2):
    """The nearest products to sqrt|W| and to sign(W) sqrt|W|, whose Hadamard product is W."""
    root = W.abs().sqrt()
    return *truncated_svd(root, rank1), *truncated_svd(W.sign() * root, rank2)


def improved(W, factors, sweeps):
    """Alternating least squares from these factors; the best of all sweeps, the start among them."""
    best, least = factors, error(W, factors)
    for _ in range(sweeps):
        B1, A1, B2, A2 = factors
        B1, A1 = refitted(W, B1, A1, B2 @ A2)
        B2, A2 = refitted(W, B2, A2, B1 @ A1)
        factors = balanced(B1, A1, B2, A2)
        now, before = error(W, factors), least
        if now < least:
            best, least = factors, now
        if now > (1 - ENOUGH) * before:
            break
    return best


def refitted(W, B, A, Q):
    """B, then A, by least squares in W ~ (B A) o Q."""
    B = solved_rows(W, B, A, Q)
    return B, solved_rows(W.t(), A.t(), B.t(), Q.t()).t()


def solved_rows(W, B, A, Q, steps=STEPS):
    """argmin over B of ||W - (B A) o Q||_F, row by row, from its value now: never a larger error.

    Row i has the normal matrix N_i = sum_j Q_ij^2 A_:j A_:j^T. To form it takes rank^2 out in multiply-adds; `steps` of
    conjugate gradients, in all rows at once and scaled by the diagonals, take 2 steps rank out in and no r x r matrix,
    and lower the error at each step. As many steps as ranks solve the rows exactly; fewer do, for the next sweep
    begins from there.
    """
    weights = Q.square()                                                        # (out, in)
    scale = (weights @ A.square().t()).clamp(min=1e-200)                        # diagonals of N_i, (out, r)
    residual = ((W - (B @ A) * Q) * Q) @ A.t()                                  # minus the gradient, (out, r)
    direction = residual / scale
    length = (residual * direction).sum(1, keepdim=True)
    for _ in range(steps):
        image = ((direction @ A) * weights) @ A.t()                             # N_i direction_i
        step = length / (direction * image).sum(1, keepdim=True).clamp(min=1e-200)
        B, residual = B + step * direction, residual - step * image
        shorter = (residual * residual / scale).sum(1, keepdim=True)
        direction = residual / scale + shorter / length.clamp(min=1e-200) * direction
        length = shorter
    return B


def balanced(B1, A1, B2, A2):
    """The same function with ||B[:, k]|| = ||A[k]|| in every component, and the same norm of both products.

    A component with one zero side is not changed: with both at zero no gradient would ever reach it.
    """
    norms = [(B1 @ A1).norm(), (B2 @ A2).norm()]
    share = (norms[1] / norms[0]).sqrt().item() if min(norms) > 0 else 1.0
    pairs = []
    for B, A, gain in ((B1, A1, share), (B2, A2, 1 / share)):
        left, right = B.norm(dim=0), A.norm(dim=1)
        alive = (left > 0) & (right > 0)
        up = torch.where(alive, (right / left * gain).sqrt(), gain ** 0.5)      # times left is (left right gain)^1/2
        pairs += [B * up, A * (gain / up)[:, None]]
    return pairs
