"""Sums over rows in float64, and what a calibration knows of a site."""
from dataclasses import dataclass

import torch


@dataclass
class Stats:
    """Statistics of one site: x its inputs, one row per token; g the gradient of the summed loss at its outputs.

    All in float64, and covariances about the means. With two models x is the input in the compressed one, and source
    that of the dense one at the same token.
    """
    count: int                                          # tokens
    mean: torch.Tensor                                  # E[x], (in,)
    covariance: torch.Tensor                            # E[(x - mean)(x - mean)^T], (in, in)
    gradient: torch.Tensor | None = None                # E[g g^T], (out, out), not about its mean, which is near 0
    cross: torch.Tensor | None = None                   # E[(source - source_mean)(x - mean)^T], (in, in)
    source_mean: torch.Tensor | None = None             # E[source], (in,)
    source_covariance: torch.Tensor | None = None       # (in, in)


class Moments:
    """Running sums of x, y and x y^T over rows, in float64; y = x unless given.

    Rows are taken relative to the first one, so that a mean far from 0 costs the covariance no precision.
    """

    def __init__(self):
        self.count, self.x, self.y, self.xy, self.origin = 0, 0, 0, 0, None

    def add(self, x, y=None):
        """x (..., features), y (..., features of y) or None: one more batch of rows."""
        x = x.detach().flatten(0, -2).double()
        y = x if y is None else y.detach().flatten(0, -2).double()
        if self.origin is None:
            self.origin = x[0].clone(), y[0].clone()
        x, y = x - self.origin[0], y - self.origin[1]
        self.count += len(x)
        self.x, self.y, product = self.x + x.sum(0), self.y + y.sum(0), x.t() @ y
        self.xy = product if self.count == len(x) else self.xy.add_(product)            # one product beside the sum

    @property
    def mean(self):
        """E[x]"""
        return self.origin[0] + self.x / self.count

    @property
    def covariance(self):
        """E[(x - E x)(y - E y)^T]"""
        return self.xy / self.count - torch.outer(self.x, self.y) / self.count ** 2
