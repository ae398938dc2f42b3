"""Sums of Kronecker products from a matrix alone: the nearest one in Frobenius norm, and Krony-PT's pruning form.

A rearrangement R turns A ⊗ B into the rank-one matrix vec(A) vec(B)^T and keeps the Frobenius norm, so the
best sum of r products is the best rank-r approximation of R(W) (Van Loan and Pitsianis, Approximation with
Kronecker Products, 1993; then Eckart-Young).
"""
import torch


def rearrange(weight, m, n):
    """R(W), (m*n, p*q) with R[(a, b), (c, d)] = W[a*p + c, b*q + d], for W (m*p, n*q). Cost: one copy of W."""
    p, q = weight.shape[0] // m, weight.shape[1] // n
    return weight.reshape(m, p, n, q).transpose(1, 2).reshape(m * n, p * q)


def nearest_kronecker_sum(weight, m, n, terms):
    """argmin ||W - sum_i A_i ⊗ B_i||_F: A (terms, m, n), B (terms, p, q), balanced: ||A_i||_F = ||B_i||_F.

    weight (m*p, n*q), of any floating dtype, which A and B take over. The squared error is the sum of the
    squared singular values of R(W) after the first `terms`. Terms come in falling order of norm, the entry of
    largest magnitude of each A_i is positive, and terms beyond min(m*n, p*q), which already reproduce any W,
    are zero. Deterministic; float64 inside; an exact SVD of (m*n, p*q), as a randomised one loses accuracy that
    shows in perplexity: O(m n p q min(m n, p q)), 0.1 s for GPT-2's 3072 x 768 with (768, 768) or (1024, 256).
    """
    p, q = weight.shape[0] // m, weight.shape[1] // n
    R = rearrange(weight.detach().double(), m, n)
    left, right = balanced(*torch.linalg.svd(R, full_matrices=False), terms)
    return left.view(terms, m, n).to(weight.dtype), right.view(terms, p, q).to(weight.dtype)


def nearest_in_outputs(target, L, m, n, terms):
    """argmin ||(T - sum_i A_i ⊗ B_i) L||_F in closed form, for n = 1 or q = 1: one SVD. L lower triangular.

    (A ⊗ B) L = (A L) ⊗ B where B is a column (q = 1), A ⊗ (B L) where A is one (n = 1): Van Loan's problem for T L.
    """
    A, B = nearest_kronecker_sum(target @ L, m, n, terms)
    white, other = (B, A) if n == 1 else (A, B)
    white = torch.linalg.solve_triangular(L, white.flatten(0, 1), upper=False, left=False).view_as(white)
    return canonical(*((other, white) if n == 1 else (white, other)))


def canonical(A, B):
    """The same sum as terms that are orthogonal, balanced and in falling order, as nearest_kronecker_sum gives them.

    Any invertible mix of the A_i, undone in the B_i, is the same matrix; this is the one that the SVD of R chooses. With
    R = U V^T, U (m n, terms), it comes from two QRs and an SVD of terms x terms: O((m n + p q) terms^2).
    """
    terms = A.shape[0]
    (Q, R), (P, S) = (torch.linalg.qr(factor.reshape(terms, -1).t()) for factor in (A, B))
    left, values, right = torch.linalg.svd(R @ S.t(), full_matrices=False)
    left, right = balanced(Q @ left, values, right @ P.t(), terms)
    return left.view_as(A), right.view_as(B)


def balanced(left, S, right, terms):
    """Singular vectors (mn, k), values (k,), vectors (k, pq) -> sqrt(S) left^T (terms, mn), sqrt(S) right (terms, pq)."""
    r = min(terms, S.shape[0])
    left, right, S = left.t()[:r], right[:r], S[:r, None]
    largest = left.gather(1, left.abs().argmax(1, keepdim=True))
    root = S.sqrt() * largest.sign()
    A, B = left.new_zeros(terms, left.shape[1]), left.new_zeros(terms, right.shape[1])
    A[:r], B[:r] = root * left, root * right
    return A, B


def pruned_sum(weight, m, n, terms, leak=0.1):
    """Krony-PT's pruning form: A_i = every p-th row and q-th column of W, B_i a unit matrix with 1 where A_i was taken.

    W is cut into blocks of p x q. Term i keeps entry i of every block, row by row: A_1 = W[0::p, 0::q]. Entries that no
    term keeps are not lost: B_1 holds `leak` there, so that they are that share of the first entry. With
    kron(out, in/2) that is Krony-PT's 96M: every second input survives and B = [1, 0.1]. Where B is the larger factor the
    roles change: B_i = block i of W. terms = min(m n, p q) is exact. weight (m*p, n*q) -> A, B of its dtype.
    Source: Krony-PT, arXiv 2412.12351, section III-G (its script has B = [1, 0]).
    """
    p, q = weight.shape[0] // m, weight.shape[1] // n
    R = rearrange(weight.detach(), m, n)
    R = R if m * n >= p * q else R.t()
    kept = min(terms, R.shape[1])
    large, small = R.new_zeros(terms, R.shape[0]), R.new_zeros(terms, R.shape[1])
    large[:kept], small[:kept, :kept] = R.t()[:kept], torch.eye(kept, dtype=R.dtype, device=R.device)
    small[0, kept:] = leak
    A, B = (large, small) if m * n >= p * q else (small, large)
    return A.reshape(terms, m, n), B.reshape(terms, p, q)
