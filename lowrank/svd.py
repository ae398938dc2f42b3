"""The matrix of a given rank nearest to a matrix: in Frobenius norm, or in what it does to the inputs it meets."""
import torch

RIDGE = 0.01            # of a covariance, as a part of its typical diagonal entry
GRADIENT_RIDGE = 0.1    # of the gradients', likewise: what they show holds near the dense model


def truncated_svd(weight, rank):
    """argmin ||W - U V||_F: U (out, rank), V (rank, in), balanced: U^T U = V V^T = diag(singular values).

    weight (out, in), of any floating dtype, which U and V take over. The squared error is the sum of the squared
    singular values after the first `rank`, which come in falling order; the entry of largest magnitude of each
    column of U is positive; a rank beyond min(out, in), which already reproduces any W, adds zeros.
    Deterministic; float64 inside; an exact SVD, as a randomised one loses accuracy that shows in perplexity:
    O(out in min(out, in)), 0.4 s for 3072 x 768. Source: Eckart and Young, 1936.
    """
    left, S, right = torch.linalg.svd(weight.detach().double(), full_matrices=False)
    r = min(rank, S.shape[0])
    left, S, right = left[:, :r], S[:r], right[:r]
    sign = left.gather(0, left.abs().argmax(0, keepdim=True)).sign()[0]
    root = S.sqrt() * sign
    U, V = left.new_zeros(weight.shape[0], rank), left.new_zeros(rank, weight.shape[1])
    U[:, :r], V[:r] = left * root, root[:, None] * right
    return U.to(weight.dtype), V.to(weight.dtype)


def whitened_svd(weight, rank, moment, count=None):
    """argmin tr((W - U V) (C + ridge) (W - U V)^T): U (out, rank), V (rank, in), balanced as truncated_svd's.

    weight (out, in); moment C (in, in): E[x x^T] of the inputs, or their covariance where the bias takes their mean;
    count: of the inputs seen, None for plenty. With C + ridge = S S^T (Cholesky) the objective is ||W S - U V S||_F^2,
    so that U V = P W with P the projection on the `rank` leading left singular vectors of W S: the same as their
    truncated SVD times S^-1, without the inverse. C = I gives truncated_svd. Float64 inside; two exact SVDs and a
    Cholesky of C. Raises ValueError when C is not finite. Source: SVD-LLM (arXiv 2403.07378); it has no ridge.
    """
    W = weight.detach().double()
    S = torch.linalg.cholesky(with_ridge(moment, count))
    P = torch.linalg.svd(W @ S, full_matrices=False)[0][:, :rank]               # (out, rank)
    U, V = truncated_svd(P @ (P.t() @ W), rank)
    return U.to(weight.dtype), V.to(weight.dtype)


def two_sided_svd(weight, rank, moment, gradient, count=None):
    """argmin tr((H + ridge) (W - U V) (C + ridge) (W - U V)^T): U (out, rank), V (rank, in), balanced as truncated_svd's.

    moment C (in, in) and count as for whitened_svd; gradient H = E[g g^T], (out, out), of the loss's gradients at the
    outputs: half the objective is the loss that the error costs, to second order, in K-FAC's approximation. With
    H + ridge = R^T R and C + ridge = S S^T it is ||R W S - R U V S||_F^2, so that U V = R^-1 P R W with P the projection on
    the leading left singular vectors of R W S. H = I gives whitened_svd. Float64 inside; two SVDs, two Cholesky factors.
    Sources: Martens and Grosse 2015 (arXiv 1503.05671) for the curvature; the closed form is Eckart and Young's.
    """
    W = weight.detach().double()
    S = torch.linalg.cholesky(with_ridge(moment, count))
    R = torch.linalg.cholesky(with_ridge(gradient, ridge=GRADIENT_RIDGE)).t()
    P = torch.linalg.svd(R @ W @ S, full_matrices=False)[0][:, :rank]           # (out, rank)
    U, V = truncated_svd(torch.linalg.solve_triangular(R, P @ (P.t() @ (R @ W)), upper=True), rank)
    return U.to(weight.dtype), V.to(weight.dtype)


def moved(weight, bias, stats):
    """What a plain method is to fit for E||W x + b - Ŵ x' - b'||^2, x of the dense model, x' of the compressed one.

    T = W (M + lambda) (C + lambda)^-1, M = E[x x'^T], C = E[x' x'^T], lambda that of with_ridge: the least-squares matrix
    on the new inputs, as the error is tr((T - Ŵ)(C + lambda)(T - Ŵ)^T) + a constant. With a bias all is about the
    means, and it takes W E[x] - T E[x']. -> T in float64, the bias, stats of x' alone. One solve of `in` unknowns.
    """
    method = 'svd_whitened_sequential'
    W, parts = weight.detach().double(), ('count', 'mean', 'covariance', 'cross', 'source_mean')
    count, mean, C, M, source = (seen(stats, name, weight, method) for name in parts)
    plain = {'count': count, 'mean': mean, 'covariance': C}
    if bias is None:
        C, M = C + torch.outer(mean, mean), M + torch.outer(source, mean)
    ridged = with_ridge(C, count)
    size = ridged[0, 0] - C[0, 0]
    T = torch.linalg.solve(ridged, (W @ M + size * W).t()).t()
    return T, bias if bias is None else bias.double() + W @ source - T @ mean, plain


def with_ridge(moment, count=None, ridge=RIDGE):
    """C + lambda I, positive definite, in float64: lambda = ridge min(mean, 3 median) of C's diagonal.

    The median bounds what a few massive inputs do to it. Fewer inputs than features leave C singular and say little of
    the directions that they missed: lambda grows by features / count. C = 0, of a site that saw nothing, becomes I.
    """
    C = moment.double()
    if not C.isfinite().all():
        raise ValueError('the covariance of the inputs is not finite; calibrate again on other text')
    C, diagonal = (C + C.t()) / 2, C.diagonal()
    mean, median = diagonal.mean().item(), diagonal.median().item()
    size = min(mean, 3 * median) if median > 0 else mean
    if size <= 0:
        return torch.eye(C.shape[0], dtype=C.dtype, device=C.device)
    few = 1.0 if count is None else max(1.0, C.shape[0] / max(float(count), 1.0))
    return C + ridge * size * few * torch.eye(C.shape[0], dtype=C.dtype, device=C.device)


def seen(stats, name, weight, method):
    """One entry of stats, an object or a dict, on the device of weight (out, in) in float64.

    stats hold of the inputs x of a site: count, mean = E[x] (in,), covariance = E[(x - mean)(x - mean)^T] (in, in); the
    entry 'moment', E[x x^T], is made of them. Raises ValueError, in one sentence, where they are missing or of another
    size.
    """
    if name == 'moment':
        covariance, mean = (seen(stats, part, weight, method) for part in ('covariance', 'mean'))
        return covariance + torch.outer(mean, mean)
    entry = stats.get(name) if isinstance(stats, dict) else getattr(stats, name, None)
    if entry is None:
        raise ValueError(f"method={method!r} needs the {name} of the inputs that a calibration pass saw; "
                         "without one take 'van_loan'")
    entry, size = torch.as_tensor(entry).to(weight.device, torch.float64), weight.shape[name != 'gradient']
    if entry.ndim and (entry.shape[0], entry.shape[-1]) != (size, size):
        what = 'gives {} outputs' if name == 'gradient' else 'takes {} inputs'
        raise ValueError(f'the {name} is {tuple(entry.shape)}, and the matrix {what.format(size)}')
    return entry
