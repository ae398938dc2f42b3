"""The methods by which a sum of Kronecker products stands for a dense matrix, by name."""
import copy

import torch

from kron.als import FITTED, dense, moment, seen, shifted
from kron.van_loan import nearest_kronecker_sum, pruned_sum
from layers.structured import silenced


def van_loan(weight, stats, m, n, terms):
    """The nearest sum in Frobenius norm -> A, B, s = 1."""
    return *nearest_kronecker_sum(weight, m, n, terms), 1.0


def van_loan_normalised(weight, stats, m, n, terms):
    """The nearest sum times s = ||W||_F / ||sum_i A_i ⊗ B_i||_F, Krony-PT's scale -> A, B, s.

    Gives back the norm, and so the size of activations, that truncation took; the Frobenius error grows, as the
    nearest sum is its own least-squares scale. A zero W keeps s = 1. Source: Krony-PT, arXiv 2412.12351.
    """
    A, B = nearest_kronecker_sum(weight.double(), m, n, terms)
    kept = (A.square().sum((1, 2)) * B.square().sum((1, 2))).sum().sqrt()      # the terms are orthogonal
    return A, B, (weight.double().norm() / kept).item() if kept > 0 else 1.0


def prune(weight, stats, m, n, terms):
    """Krony-PT's pruning form: entries of W themselves in the larger factor -> A, B, s = 1."""
    return *pruned_sum(weight, m, n, terms), 1.0


# method of from_dense -> function (weight (out, in) detached, stats, m, n, terms) -> A, B and a number that scales them
METHODS = {
    'van_loan': van_loan,
    'van_loan_normalised': van_loan_normalised,
    'prune': prune,
    **FITTED,
}
CALIBRATED = frozenset(FITTED)          # the methods that need stats


def fit_beside(method, weight, stats, index, m, n, terms):
    """A, B, s of a method for weight (out, in) where the columns of `index`, None for none, are kept exactly beside it.

    Those columns of the sum count for nothing, and what they had best be is not known: fitted twice, to W and to W with
    zeros there, both with the inputs of `index` silenced, and the one of less error in the other columns is taken; so it
    is never worse there than the sum without exact columns. Cost: two fits.
    """
    if index is None:
        return method(weight, stats, m, n, terms)
    left = silenced(stats, index)
    C = None if left is None else moment(left, weight)

    def error(found):
        A, B, s = found
        D = (weight.double() - s * dense(A.double(), B.double())).index_fill(1, index, 0)
        return (D * (D if C is None else D @ C)).sum().item()
    return min((method(W, left, m, n, terms) for W in (weight.index_fill(1, index, 0), weight)), key=error)


def centred(stats):
    """The same stats about their means: what is left to fit once the bias follows the means."""
    stats = copy.copy(stats)
    stats.mean = torch.zeros_like(stats.mean)
    if getattr(stats, 'source_mean', None) is not None:
        stats.source_mean = torch.zeros_like(stats.source_mean)
    return stats


def bias_shift(weight, kept, stats):
    """W E[x] - Ŵ E[x'], (out,): what the bias gains so that the mean output is as it was (x' = x without a source)."""
    mean = seen(stats, 'mean', weight)
    source = mean if getattr(stats, 'source_mean', None) is None else seen(stats, 'source_mean', weight)
    return weight.double() @ source - kept.double() @ mean


def moved(weight, bias, stats):
    """The target, bias and stats with which a plain method fits E||W x - Ŵ x'||^2, x of the dense model: see shifted."""
    T = shifted(weight, stats if bias is None else centred(stats))[0]
    if bias is not None:
        bias = bias + bias_shift(weight, T, stats).to(bias)
    stats = copy.copy(stats)
    stats.cross = stats.source_mean = None
    return T.to(weight.dtype), bias, stats
