"""The linear systems of kron/als.py's half-steps: factors as rows, a direct solve, and what conjugate gradients need."""
import torch


def rows(factor):
    """(r, height, width) -> (height, r width)"""
    return factor.transpose(0, 1).reshape(factor.shape[1], -1)


def unrows(X, shape):
    """(height, r width) -> (r, height, width)"""
    return X.view(shape[1], shape[0], shape[2]).transpose(0, 1).contiguous()


def dense(A, B):
    """sum_i A_i ⊗ B_i, (m p, n q)."""
    (r, m, n), (_, p, q) = A.shape, B.shape
    R = A.reshape(r, -1).t() @ B.reshape(r, -1)                                 # its rearrangement, (m n, p q)
    return R.view(m, n, p, q).permute(0, 2, 1, 3).reshape(m * p, n * q)


def factorise(G, proximal):
    """Cholesky factor of G + eps I, and eps: `proximal` of G's mean diagonal, more where G is not definite to rounding."""
    eps = proximal * max(G.diagonal().mean().item(), 1e-300)
    eye = torch.eye(len(G), dtype=G.dtype, device=G.device)
    for _ in range(10):
        factor, failed = torch.linalg.cholesky_ex(G + eps * eye)
        if not failed:
            break
        eps *= 10
    return factor, eps


def products_of(fixed):
    """K (r, w, r, w), K_ij = F_i^T F_j of the fixed factors F (r, height, w)."""
    r, _, width = fixed.shape
    stacked = fixed.permute(1, 0, 2).reshape(-1, r * width)
    return (stacked.t() @ stacked).view(r, width, r, width)


def normal_matrix(fixed, RC, most):
    """G (r s, r s) of the moving factors' rows, G[(i, b), (j, b')] = sum_{d d'} RC[(b, b'), (d, d')] K_ij[d, d'].

    fixed (r, height, w) are the other factors, RC (s^2, w^2) is C rearranged. With more than `most` = r w numbers a side
    K is not formed, and C is multiplied by the fixed factors' rows, one after another.
    """
    (r, height, width), side = fixed.shape, int(RC.shape[0] ** 0.5 + 0.5)
    if r * width <= most:
        G = RC @ products_of(fixed).permute(1, 3, 0, 2).reshape(width * width, r * r)
    else:
        C = RC.reshape(-1, width, width)
        G = sum(fixed[:, h] @ C @ fixed[:, h].t() for h in range(height))
    return G.view(side, side, r, r).permute(2, 0, 3, 1).reshape(r * side, r * side)


def gram_cost(r, height, width, side):
    """Multiply-adds of normal_matrix where K is not formed."""
    return height * side * side * r * width * (width + r)


def by_products(fixed, RC):
    """A function X (height, r s) -> X G without G, see normal_matrix: r s^2 w^2 + s r^2 w^2 multiply-adds a row of X."""
    (r, _, width), side = fixed.shape, int(RC.shape[0] ** 0.5 + 0.5)
    K = products_of(fixed).permute(0, 1, 3, 2).reshape(r * width * width, r)
    C = RC.reshape(side, -1)

    def apply(X):
        Y = (X.reshape(-1, side) @ C).view(len(X), r, side, -1)                 # (height, r, s, w w)
        return (Y.transpose(1, 2).reshape(len(X), side, -1) @ K).transpose(1, 2).reshape(len(X), -1)
    return apply


def separable_inverse(fixed, RC, proximal):
    """A function X (height, r width) -> X G'^-1 for G' = M ⊗ C1 near the normal matrix G of the moving factors' rows.

    fixed (r, p, q) are the other factors, RC (width^2, q^2) is C rearranged. With C near C1 ⊗ C2, both traces of C over
    one of its parts, M_ij = tr(F_i C2 F_j^T): exact where C is such a product, and so where q = 1. Cost: a Cholesky
    factor of r and of width unknowns, and r + width multiply-adds a number of X, where G has (r width)^2.
    """
    (r, _, q), width = fixed.shape, int(RC.shape[0] ** 0.5 + 0.5)
    C1 = (RC @ torch.eye(q, dtype=RC.dtype, device=RC.device).flatten()).view(width, width)
    C2 = (RC.t() @ torch.eye(width, dtype=RC.dtype, device=RC.device).flatten()).view(q, q) / C1.trace()
    M = (fixed @ C2).reshape(r, -1) @ fixed.reshape(r, -1).t()
    (left, _), (right, _) = factorise((M + M.t()) / 2, proximal), factorise((C1 + C1.t()) / 2, proximal)

    def apply(X):
        height = len(X)
        X = torch.cholesky_solve(X.view(height * r, width).t(), right).t().reshape(height, r, width)
        return torch.cholesky_solve(X.transpose(0, 1).reshape(r, -1), left).view(r, height, width).transpose(0, 1).reshape(
            height, -1)
    return apply


def conjugate_gradients(apply, precondition, X, rhs, steps):
    """`steps` of preconditioned conjugate gradients for apply(X) = rhs from X; each lowers <X, apply(X)> / 2 - <X, rhs>."""
    residual = rhs - apply(X)
    direction = z = precondition(residual)
    rho = (residual * z).sum()
    for _ in range(steps):
        if not rho > 0:
            break
        image = apply(direction)
        step = rho / (direction * image).sum()
        X, residual = X + step * direction, residual - step * image
        z = precondition(residual)
        rho, old = (residual * z).sum(), rho
        direction = z + rho / old * direction
    return X
