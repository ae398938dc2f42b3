"""Sums of Kronecker products fitted to what a linear does to its inputs, not to its weights: alternating least squares.

    minimise over A_i, B_i    tr(H (T - Ŵ) C (T - Ŵ)^T),    Ŵ = sum_i A_i ⊗ B_i

C (in, in) is E[x x^T] of the linear's inputs plus a ridge, H (out, out) the identity or E[g g^T] of the loss's gradients
g with respect to its outputs, T the dense weight or what stands for it. With C = H = I this is Van Loan's problem. For
fixed B it is a linear least-squares problem in A, and for fixed A one in B, so that solving them in turn never raises
the objective. Sizes as in linear.py: A (terms, m, n), B (terms, p, q), out = m p, in = n q, r = terms. All in float64.

Let RC = R(C), (n n, q q), and RT = R(H T C), (m n, p q), be rearranged as in van_loan.py. With B fixed and H = I, all m
rows of A share one normal matrix, (r n, r n):

    G[(i, b), (j, b')] = sum_{d d'} RC[(b, b'), (d, d')] K_ij[d, d'],  K_ij = B_i^T B_j,  A_rows G = RT contracted with B

and with A fixed the same holds for R(C)^T, RT^T. Where n = 1 or q = 1 there is a closed form for H = I. With an H that is
not I the rows are coupled, (r m n)^2 numbers, unless m = 1 or p = 1, and with many terms of long rows G itself is large:
then the normal equations are solved by a few steps of conjugate gradients, which lower the objective at each step too, and
G is never formed. The other half-step, of the shorter rows, may still be direct.
"""
import torch

from kron import solve
from kron.solve import by_products, conjugate_gradients, dense, normal_matrix, rows, unrows
from kron.van_loan import canonical, nearest_in_outputs, nearest_kronecker_sum, rearrange

RIDGE = 0.01            # of C's typical diagonal entry; 0.003 to 0.03 do equally well, 0.3 is too much
HESSIAN_RIDGE = 1.0     # of H's: what the gradients show holds near the dense model, and errors are not small
SWEEPS = 60             # at most
GAIN = 3e-4             # a sweep that lowers the objective by less than this share of it is the last
CG_STEPS = 3            # of a half-step with a large G, which starts near its end
H_STEPS = 6             # of one with H
DIRECT = 4096           # unknowns r n or r q above which G is large: half a second of a core to factorise, 134 MB
EXTRAPOLATION = 0.7     # of B's last change, in front of the next sweep: fewer sweeps for as low an objective
PROXIMAL = 1e-12        # of the mean diagonal of G: keeps terms that G does not determine where they are


def als(weight, stats, m, n, terms):
    """argmin E||W x - Ŵ x||^2, C = E[x x^T] + ridge, started from the nearest sum -> A, B, s = 1."""
    return *fit(weight.double(), with_ridge(moment(stats, weight)), m, n, terms)[:2], 1.0


def als_hessian(weight, stats, m, n, terms):
    """The same weighted by H = stats.gradient + ridge, (out, out): errors count by what they do to the loss -> A, B, s = 1.

    Two-sided, as K-FAC's curvature is. Source of the weighting: Martens and Grosse 2015, arXiv 1503.05671.
    """
    H = with_ridge(seen(stats, 'gradient', weight), HESSIAN_RIDGE)
    return *fit(weight.double(), with_ridge(moment(stats, weight)), m, n, terms, H)[:2], 1.0


def als_sequential(weight, stats, m, n, terms):
    """argmin E||W x - Ŵ x'||^2, x what the dense model feeds this site, x' what the compressed one does; s = 1."""
    return *fit(*shifted(weight, stats), m, n, terms)[:2], 1.0


def als_sequential_hessian(weight, stats, m, n, terms):
    """als_sequential weighted as als_hessian is -> A, B, s = 1."""
    H = with_ridge(seen(stats, 'gradient', weight), HESSIAN_RIDGE)
    return *fit(*shifted(weight, stats), m, n, terms, H)[:2], 1.0


FITTED = {'als': als, 'als_hessian': als_hessian, 'als_sequential': als_sequential,
          'als_sequential_hessian': als_sequential_hessian}


# ---------------------------------------------------------------------------------------------------
# what is minimised

def seen(stats, name, weight):
    """stats.name in float64 where weight is; ValueError in one sentence when the calibration pass did not gather it."""
    value = getattr(stats, name, None)
    if value is None:
        raise ValueError(f'this method needs stats.{name}, which the calibration pass did not gather')
    return value.to(weight.device, torch.float64)


def moment(stats, weight):
    """E[x x^T] = covariance + mean mean^T, (in, in)."""
    mean = seen(stats, 'mean', weight)
    return seen(stats, 'covariance', weight) + torch.outer(mean, mean)


def ridge_of(C, share=RIDGE):
    """share * typical, typical = min(mean, 3 median) of C's diagonal (mean where the median is 0, 1 where C is 0).

    The median keeps the ridge from a few massive activations, which would drown all other inputs.
    """
    mean, median = C.diagonal().mean().item(), C.diagonal().median().item()
    return share * (min(mean, 3 * median) or mean or 1.0)


def with_ridge(C, share=RIDGE):
    """C + ridge I, symmetric, positive definite."""
    return (C + C.t()) / 2 + ridge_of(C, share) * torch.eye(len(C), dtype=C.dtype, device=C.device)


def shifted(weight, stats):
    """T = W (M + ridge I)(C + ridge I)^-1 with M = E[x x'^T] and C = E[x' x'^T] -> T, C + ridge I.

    E||W x - Ŵ x'||^2 = tr((T - Ŵ) C (T - Ŵ)^T) + a constant: the best matrix for the shifted inputs is T, and
    the sum is fitted to that. The ridge stands on both, so that T = W where the inputs say nothing.
    """
    C = moment(stats, weight)
    M = seen(stats, 'cross', weight) + torch.outer(seen(stats, 'source_mean', weight), seen(stats, 'mean', weight))
    M.diagonal().add_(ridge_of(C))
    C = with_ridge(C)
    return torch.linalg.solve(C, (weight.double() @ M).t()).t(), C


# ---------------------------------------------------------------------------------------------------
# the fit

def fit(target, C, m, n, terms, H=None, sweeps=SWEEPS, gain=GAIN):
    """A, B and the objectives, that of the nearest sum first: they never rise. The sweeps are extrapolated.

    target (m*p, n*q), C (n*q, n*q) positive definite, H (m*p, m*p) or None. Stops after `sweeps`, or when a sweep gains
    less than `gain` of the objective. Cost of a sweep without H: solves of r n and of r q unknowns,
    (r n)^3/3 + 2 m (r n)^2 and (r q)^3/3 + 2 p (r q)^2 multiply-adds, and r^2 in^2 + r^2 (m n^2 + p q^2) for the normal
    matrices; with H, unless m = 1 or p = 1, 2 H_STEPS (out^2 in + out in^2). Memory: 8 bytes times 2 in^2 + 2 out in +
    2 r^2 max(n, q)^2, + out^2.
    """
    if H is not None and 1 in (m, len(H) // m):
        return fit_rows(target, C, m, n, terms, H, sweeps, gain)
    A, B = nearest_kronecker_sum(target, m, n, terms)
    problem = Problem(target, C, H, m, n)
    objectives = [problem.objective(A, B)]
    if 1 in (n, len(C) // n):
        best = nearest_in_outputs(target, torch.linalg.cholesky(C), m, n, terms)
        if problem.objective(*best) < objectives[0]:
            A, B, sweeps = *best, sweeps * (H is not None)
            objectives.append(problem.objective(A, B))
    old = B                                             # of the sweep before
    for _ in range(sweeps):
        new = problem.sweep(A, B, B + EXTRAPOLATION * (B - old))
        now, last = problem.objective(*new), objectives[-1]
        if not now < last and old is B:                 # rounding
            break
        if not now < last:                              # too far: a plain sweep never rises
            old = B
            continue
        old, (A, B) = B, new
        objectives.append(now)
        if last - now <= gain * now or now <= 1e-15 * problem.constant:
            break
    return *canonical(A, B), objectives


def fit_rows(target, C, m, n, terms, H, sweeps, gain):
    """fit where H meets one factor alone, m = 1 or p = 1: with H = L L^T the objective is that of L^T T without H.

    L^T (A ⊗ B) is A ⊗ (L^T B) for m = 1 and (L^T A) ⊗ B for p = 1.
    """
    L, nearest = torch.linalg.cholesky(H), nearest_kronecker_sum(target, m, n, terms)
    A, B, objectives = fit(L.t() @ target, C, m, n, terms, None, sweeps, gain)
    met = B if m == 1 else A
    back = unrows(torch.linalg.solve_triangular(L.t(), rows(met), upper=True), met.shape)      # at once, not term by term
    error = L.t() @ (target - dense(*nearest))
    first = (error @ C * error).sum().item()
    lower = [value for value in objectives if value < first]
    return *((canonical(A, back) if m == 1 else canonical(back, B)) if lower else nearest), [first, *lower]


class Problem:
    """tr(H (T - Ŵ) C (T - Ŵ)^T) with what all half-steps share."""

    def __init__(self, target, C, H, m, n):
        self.C, self.H, self.kept, self.steps = C, H, (None, None), CG_STEPS if H is None else H_STEPS
        weighted = self.weighted(target)
        self.constant = (weighted * target).sum().item()
        self.RT, self.RC = rearrange(weighted, m, n), rearrange(C, n, n)

    def weighted(self, W):
        """H W C"""
        return W @ self.C if self.H is None else self.H @ W @ self.C

    def direct(self, moving, fixed):
        """Whether a half-step forms its normal matrix: it is small, and so is what it takes to form it."""
        (r, _, width), (_, height, inner) = moving.shape, fixed.shape
        steps = self.steps * self.RT.numel() * len(self.C)                        # multiply-adds of the other way
        return r * width <= DIRECT and (r * inner <= DIRECT or solve.gram_cost(r, height, inner, width) <= steps)

    def objective(self, A, B):
        """The objective at a sum: constant - 2 <RT, R(Ŵ)> + tr(H Ŵ C Ŵ^T)."""
        r = len(A)
        cross = (self.RT * (A.reshape(r, -1).t() @ B.reshape(r, -1))).sum()
        moving, fixed = (B, A) if self.direct(B, A) else (A, B)             # G of B's rows is there behind a sweep
        if self.H is not None or not self.direct(moving, fixed):
            W = dense(A, B)
            return (self.constant - 2 * cross + (self.weighted(W) * W).sum()).item()
        X, G = rows(moving), self.normal_matrix(fixed, moving is A)
        return (self.constant - 2 * cross + (X @ G * X).sum()).item()

    def normal_matrix(self, fixed, left):
        """G (r n, r n) for A's rows with B fixed (left), (r q, r q) for B's rows with A fixed; the last one is kept."""
        if self.kept[0] is not fixed:
            self.kept = fixed, normal_matrix(fixed, self.RC if left else self.RC.t(), DIRECT)
        return self.kept[1]

    def right_hand_side(self, fixed, moving, left, RT=None):
        """RT contracted with the fixed factors, as rows: (m, r n) or (p, r q)."""
        RT = self.RT if RT is None else RT
        r, height, width = moving.shape
        return ((RT if left else RT.t()) @ fixed.reshape(r, -1).t()).view(height, width, r).transpose(1, 2).reshape(
            height, r * width)

    def sweep(self, A, B, near):
        """Better A for the factors B = near, then better B for these, from A and B."""
        new = self.half_step(near, A, left=True)
        return new, self.half_step(new, B, left=False)

    def half_step(self, fixed, moving, left):
        """The best moving factors with the others fixed (with H or a large G: better ones)."""
        if not self.direct(moving, fixed):
            inverse = solve.separable_inverse(fixed, self.RC if left else self.RC.t(), PROXIMAL)
            rhs = self.right_hand_side(fixed, moving, left)
            return unrows(self.conjugate_gradients(fixed, moving, left, rhs, inverse), moving.shape)
        rhs, X = self.right_hand_side(fixed, moving, left), rows(moving)
        factor, eps = solve.factorise(self.normal_matrix(fixed, left), PROXIMAL)
        if self.H is None:
            X = torch.cholesky_solve((rhs + eps * X).t(), factor).t()
        else:
            X = self.conjugate_gradients(fixed, moving, left, rhs,
                                         lambda X: torch.cholesky_solve(X.t(), factor).t())
        return unrows(X, moving.shape)

    def conjugate_gradients(self, fixed, moving, left, rhs, inverse):
        """A few steps from the moving factors, preconditioned by `inverse`, X -> X G^-1 or near it, and H's partial trace.

        Exact at the first step for H = h ⊗ I and an exact inverse.
        """
        precondition, (r, inner, across) = inverse, fixed.shape
        few = self.H is None and r < inner and r * across <= DIRECT
        products = by_products(fixed, self.RC if left else self.RC.t()) if few else None
        if self.H is not None:
            height = moving.shape[1]
            H = self.H.view(height, -1, height, len(self.H) // height) if left else (
                self.H.view(-1, height, len(self.H) // height, height).permute(1, 0, 3, 2))
            partial, _ = solve.factorise(H.diagonal(dim1=1, dim2=3).mean(-1), PROXIMAL)

            def precondition(residual):
                return torch.cholesky_solve(inverse(residual), partial)

        def apply(X):
            if products is not None:
                return products(X)
            new = unrows(X, moving.shape)
            W = dense(new, fixed) if left else dense(fixed, new)
            (_, m, n) = (new if left else fixed).shape
            return self.right_hand_side(fixed, moving, left, rearrange(self.weighted(W), m, n))
        return conjugate_gradients(apply, precondition, rows(moving), rhs, self.steps)
