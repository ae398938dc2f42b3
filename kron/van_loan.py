"""The sum of Kronecker products nearest to a matrix in Frobenius norm.

A rearrangement R turns A (x) B into the rank-one matrix vec(A) vec(B)^T and keeps the Frobenius norm, so the
best sum of r products is the best rank-r approximation of R(W) (Van Loan and Pitsianis, Approximation with
Kronecker Products, 1993; then Eckart-Young).
"""
import torch


def rearrange(weight, m, n):
    """R(W), (m*n, p*q) with R[(a, b), (c, d)] = W[a*p + c, b*q + d], for W (m*p, n*q). Cost: one copy of W."""
    p, q = weight.shape[0] // m, weight.shape[1] // n
    return weight.reshape(m, p, n, q).transpose(1, 2).reshape(m * n, p * q)


def nearest_kronecker_sum(weight, m, n, terms):
    """argmin ||W - sum_i A_i (x) B_i||_F: A (terms, m, n), B (terms, p, q), balanced: ||A_i||_F = ||B_i||_F.

    weight (m*p, n*q), of any floating dtype, which A and B take over. The squared error is the sum of the
    squared singular values of R(W) after the first `terms`. Terms come in falling order of norm, the entry of
    largest magnitude of each A_i is positive, and terms beyond min(m*n, p*q), which already reproduce any W,
    are zero. Deterministic; float64 inside; an exact SVD of (m*n, p*q), as a randomised one loses accuracy that
    shows in perplexity: O(m n p q min(m n, p q)), 0.1 s for GPT-2's 3072 x 768 with (768, 768) or (1024, 256).
    """
    p, q = weight.shape[0] // m, weight.shape[1] // n
    R = rearrange(weight.detach().double(), m, n)
    U, S, Vh = torch.linalg.svd(R, full_matrices=False)
    r = min(terms, S.shape[0])
    left, right, S = U.t()[:r], Vh[:r], S[:r, None]             # (r, m n), (r, p q)
    largest = left.gather(1, left.abs().argmax(1, keepdim=True))
    root = S.sqrt() * largest.sign()
    A, B = R.new_zeros(terms, m, n), R.new_zeros(terms, p, q)
    A[:r], B[:r] = (root * left).view(r, m, n), (root * right).view(r, p, q)
    return A.to(weight.dtype), B.to(weight.dtype)
