"""The von Mises-Fisher distribution on a sphere of radius r, and how confident an embedding is under it.

::

    p(z | mu, kappa) = C_d(kappa) / r^d exp(kappa mu . z / r),    C_d(kappa) = kappa^nu / ((2 pi)^(d/2) I_nu(kappa))

with nu = d/2 - 1. Everything is computed in float64 through log I_nu: for d = 512 the Bessel function itself leaves the
range of float32 at kappa = 300.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import Function

from armillary.losses.tensors import float32_math

# The expansion for large orders is used from this order on; its error is then below 1e-10 of 1 (measured).
LARGE_ORDER = 64
# Coefficients of p^k, p^(k+2), ... of u_k (Abramowitz and Stegun, 9.3.9).
_EXPANSION = (
    (1, (3, -5), 24),
    (2, (81, -462, 385), 1152),
    (3, (30375, -369603, 765765, -425425), 414720),
    (4, (4465125, -94121676, 349922430, -446185740, 185910725), 39813120),
)


def _large_order(order: float, kappa: Tensor) -> Tensor:
    """Logarithm of I_order(kappa), uniformly in kappa > 0 (Abramowitz and Stegun, 9.7.7)."""
    z = kappa / order
    root = (1 + z.square()).sqrt()
    p = 1 / root
    eta = root + (z / (1 + root)).log()
    series = torch.ones_like(p)
    for power, coefficients, divisor in _EXPANSION:
        terms = sum(c * p ** (power + 2 * k) for k, c in enumerate(coefficients))
        series = series + terms / (divisor * order**power)
    return order * eta - 0.5 * math.log(2 * math.pi * order) - 0.5 * root.log() + series.log()


def bessel_terms(order: float, kappa: Tensor) -> tuple[Tensor, Tensor]:
    """``log I_order(kappa)`` and ``I_{order+1}(kappa) / I_order(kappa)``, float64, without gradient.

    Small orders are reached from large ones by the recurrence ``I_{v-1} / I_v = 2 v / kappa + I_{v+1} / I_v``, which is
    stable downwards.

    Args:
        order: at least 0.
        kappa: above 0, any shape.
    """
    kappa = kappa.detach().double()
    steps = max(0, math.ceil(LARGE_ORDER - order))
    top = order + steps
    log_bessel = _large_order(top, kappa)
    ratio = (_large_order(top + 1, kappa) - log_bessel).exp()
    for v in range(steps, 0, -1):
        inverse = 2 * (order + v) / kappa + ratio
        log_bessel = log_bessel + inverse.log()
        ratio = 1 / inverse
    return log_bessel, ratio


class _LogBessel(Function):
    @staticmethod
    def forward(ctx: Any, kappa: Tensor, order: float) -> Tensor:
        log_bessel, ratio = bessel_terms(order, kappa)
        ctx.save_for_backward(ratio + order / kappa.double())
        return log_bessel

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        # I_v' / I_v = I_{v+1} / I_v + v / kappa
        return gradients[0] * ctx.saved_tensors[0], None


def log_bessel(order: float, kappa: Tensor) -> Tensor:
    """``log I_order(kappa)``, float64, with gradient; ``order`` at least 0, ``kappa`` above 0."""
    result: Tensor = _LogBessel.apply(kappa.double(), order)
    return result


def mean_resultant(dim: int, kappa: Tensor) -> Tensor:
    """``A_d(kappa) = I_{d/2}(kappa) / I_{d/2-1}(kappa)``, the mean cosine to mu; float64, without gradient."""
    return bessel_terms(dim / 2 - 1, kappa)[1]


def log_normalizer(dim: int, kappa: Tensor) -> Tensor:
    """``log C_d(kappa)``, float64, with gradient; ``dim`` at least 2."""
    kappa, order = kappa.double(), dim / 2 - 1
    return order * kappa.log() - dim / 2 * math.log(2 * math.pi) - log_bessel(order, kappa)


class SphericalConfidence(nn.Module):
    """How sharply an embedding knows its class. Li et al., "Spherical Confidence Learning", CVPR 2021, eq. 9.

    ``L = mean_i [ -kappa_i cos(theta_i) - log C_d(kappa_i) + d log r ]``, theta_i the angle to the own class row; up to
    a constant the divergence from a point mass at the class's centre. ``dL / dkappa = A_d(kappa) - cos(theta)``, so
    that the best kappa has ``A_d(kappa) = cos(theta)``. r shifts the value only. The authors' code adds 1e-6 inside the
    logarithm of the scaled Bessel function, which at d = 512 decides the result for kappa below some 4000; this does
    not.

    Args:
        dim: d, width of the embeddings, at least 2.
        radius: r > 0.
        reduction: ``mean`` or ``none``.
    """

    def __init__(self, dim: int, radius: float = 64.0, reduction: str = "mean") -> None:
        super().__init__()
        if dim < 2 or not radius > 0:
            raise ValueError(f"dim must be at least 2 and radius above 0, found {dim} and {radius}")
        self.dim, self.radius, self.reduction = dim, radius, reduction

    @float32_math
    def forward(self, kappa: Tensor, cosine: Tensor) -> Tensor:
        """Both ``(batch,)``; kappa above 0. The loss has kappa's type."""
        wide = kappa.double()
        losses = -wide * cosine.double() - log_normalizer(self.dim, wide) + self.dim * math.log(self.radius)
        return (losses.mean() if self.reduction == "mean" else losses).to(kappa.dtype)


def pool_confident(directions: Tensor, kappa: Tensor) -> Tensor:
    """A template's direction: ``sum_k kappa_k mu_k / sum_k kappa_k``; ``(n, dim)`` and ``(n,)`` to ``(dim,)``."""
    return (kappa[:, None] * directions).sum(dim=0) / kappa.sum()


def mutual_likelihood(mu1: Tensor, kappa1: Tensor, mu2: Tensor, kappa2: Tensor, radius: float = 64.0) -> Tensor:
    """How likely two embeddings have one class (equation 12): a score that knows how confident both are.

    ``log C_d(k1) + log C_d(k2) - log C_d(|k1 mu1 + k2 mu2|) - d log r``

    Args:
        mu1: unit vectors ``(n, dim)``.
        kappa1: above 0, ``(n,)``.
        mu2: unit vectors ``(n, dim)``.
        kappa2: above 0, ``(n,)``.
        radius: r.

    Returns:
        ``(n,)`` float64.
    """
    dim = mu1.shape[-1]
    joint = torch.linalg.vector_norm(kappa1[:, None] * mu1 + kappa2[:, None] * mu2, dim=-1)
    one, two, both = (log_normalizer(dim, kappa) for kappa in (kappa1, kappa2, joint))
    return one + two - both - dim * math.log(radius)
