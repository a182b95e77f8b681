"""Losses over two views that need no negatives: they keep the channels of a projection apart instead of the samples.

Symbols: Z, Z' the projections of two views, ``(n, d)``, not normalised; n counts the global batch. Every statistic is a
sum over all workers' samples, so that each worker returns the loss of the whole batch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from armillary import collectives
from armillary.losses.tensors import check_choice, check_embeddings, float32_math


class _TwoViews(nn.Module):
    """Two ``(batch, dim)`` views of equal shape, and sums over the batch of all workers."""

    def __init__(self, gather: bool) -> None:
        super().__init__()
        self.gather = gather

    def total(self, local: Tensor) -> Tensor:
        """A sum over workers, with gradient."""
        return collectives.all_reduce_sum(local) if self.gather else local

    def batch_size(self, view: Tensor) -> int:
        """n, over all workers."""
        return len(view) * (collectives.world_size() if self.gather else 1)

    def centred(self, view: Tensor) -> Tensor:
        """Z less the mean of each channel."""
        return view - self.total(view.sum(0)) / self.batch_size(view)

    def second_moment(self, left: Tensor, right: Tensor) -> Tensor:
        """``sum_b left_bi right_bj``, ``(dim, dim)``."""
        return self.total(left.T @ right)

    def moments(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """The diagonal ``(dim,)`` of M = :meth:`second_moment`, and the sum of the squares beside it, a scalar.

        Where M is as wide as twice the samples or more, it is never made: ``|X^T Y|^2 = sum (X X^T) * (Y Y^T)``, whose
        matrices are as wide as the samples are many. As M then has a rank of at most half its width, the diagonal can
        not be most of those squares, and taking it off does not cancel.
        """
        if 2 * self.batch_size(left) <= left.shape[1]:
            diagonal = self.total((left * right).sum(0))
            lefts, rights = (self.rows(view) for view in (left, right))
            squares = self.total(((left @ lefts.T) * (right @ rights.T)).sum())
            return diagonal, squares - diagonal.square().sum()
        moment = self.second_moment(left, right)
        # In a copy, so that the matrix itself may be kept for the gradient.
        return moment.diagonal(), moment.clone().fill_diagonal_(0).square().sum()

    def rows(self, local: Tensor) -> Tensor:
        """The samples of all workers, with gradient."""
        return collectives.all_gather(local) if self.gather else local

    @staticmethod
    def check(view1: Tensor, view2: Tensor) -> None:
        """Refuses views of different shape."""
        check_embeddings(view1)
        if view1.shape != view2.shape:
            raise ValueError(f"the views differ in shape: {tuple(view1.shape)} and {tuple(view2.shape)}")


class VICReg(_TwoViews):
    """Variance, invariance, covariance. Bardes, Ponce, LeCun, "VICReg", ICLR 2022, arXiv 2105.04906, eqs. 1-6.

    ::

        s = 1/n sum_i |z_i - z'_i|^2                                   invariance
        v = 1/d sum_j max(0, gamma - sqrt(Var(z^j) + eps))             variance, with n - 1
        c = 1/d sum_{i != j} Cov(Z)_ij^2                               covariance, with n - 1
        L = lambda s + mu (v(Z) + v(Z')) + nu (c(Z) + c(Z'))

    The equation, the paper's pseudocode and the released code disagree by constant factors, all three are in use:
    ``paper`` is the equation; ``pseudo`` takes the mean over channels in s; ``code`` does and halves the variance term.

    Args:
        invariance: lambda >= 0.
        variance: mu >= 0.
        covariance: nu >= 0.
        gamma: standard deviation that every channel should reach, > 0.
        eps: under the root, > 0.
        variant: ``code`` (the one that was trained), ``pseudo`` or ``paper``.
        gather: statistics over all workers.
    """

    def __init__(
        self,
        invariance: float = 25.0,
        variance: float = 25.0,
        covariance: float = 1.0,
        gamma: float = 1.0,
        eps: float = 1e-4,
        variant: str = "code",
        gather: bool = True,
    ) -> None:
        super().__init__(gather)
        check_choice("variant", variant, ("code", "pseudo", "paper"))
        self.invariance, self.variance, self.covariance = invariance, variance, covariance
        self.gamma, self.eps, self.variant = gamma, eps, variant

    @float32_math
    def forward(self, view1: Tensor, view2: Tensor, *, metrics: dict[str, Tensor] | None = None) -> Tensor:
        """The loss of two views ``(batch, dim)``; ``metrics`` receives the three terms."""
        self.check(view1, view2)
        s = self.total((view1 - view2).square().sum()) / self.batch_size(view1)
        if self.variant != "paper":
            s = s / view1.shape[1]
        terms = [self._variance_covariance(view) for view in (view1, view2)]
        v, c = terms[0][0] + terms[1][0], terms[0][1] + terms[1][1]
        if self.variant == "code":
            v = v / 2
        if metrics is not None:
            metrics.update(invariance=s.detach(), variance=v.detach(), covariance=c.detach())
        return self.invariance * s + self.variance * v + self.covariance * c

    def _variance_covariance(self, view: Tensor) -> tuple[Tensor, Tensor]:
        # One sample has no variance: n - 1 would divide by zero.
        centred = self.centred(view) / math.sqrt(max(self.batch_size(view) - 1, 1))
        variances, squares = self.moments(centred, centred)
        return torch.relu(self.gamma - (variances + self.eps).sqrt()).mean(), squares / view.shape[1]


class BarlowTwins(_TwoViews):
    """Cross-correlation of two views against the identity. Zbontar et al., "Barlow Twins", ICML 2021, arXiv 2103.03230.

    ``L = sum_i (1 - C_ii)^2 + lambda sum_{i != j} C_ij^2``, with C the correlation over the batch between channel i of
    one view and channel j of the other.

    Args:
        redundancy: lambda >= 0; 0.005 in the paper, 0.0051 in its code.
        eps: added to the variances, as the last batch norm of the authors' code does; 0 is the paper's equation, which
            a channel that is constant over the batch makes undefined.
        scale: a factor on the loss, > 0; some releases use 1/32 or 0.024.
        gather: statistics over all workers.
    """

    def __init__(self, redundancy: float = 0.005, eps: float = 1e-5, scale: float = 1.0, gather: bool = True) -> None:
        super().__init__(gather)
        self.redundancy, self.eps, self.scale = redundancy, eps, scale

    @float32_math
    def forward(self, view1: Tensor, view2: Tensor, *, metrics: dict[str, Tensor] | None = None) -> Tensor:
        """The loss of two views ``(batch, dim)``; ``metrics`` receives ``on_diagonal`` and ``off_diagonal``."""
        self.check(view1, view2)
        n = self.batch_size(view1)
        left, right = self.centred(view1), self.centred(view2)
        roots = [(self.total(view.square().sum(0)) / n + self.eps).sqrt() for view in (left, right)]
        correlations, off = self.moments(left / (n * roots[0]), right / roots[1])
        on = (1 - correlations).square().sum()
        if metrics is not None:
            metrics.update(on_diagonal=on.detach(), off_diagonal=off.detach())
        return self.scale * (on + self.redundancy * off)


class AlignWithBase(_TwoViews):
    """Each view's channels against the nearest orthonormal base of the other view. Zhang et al., CVPR 2022 (ARB).

    ::

        Zb = Z standardised by channel (mean 0, deviation 1 with n - 1),  Sigma = Zb^T Zb / (n - 1)
        B(Zb) = Zb Sigma^(-1/2)                          argmin |Zb - B| over B^T B = (n - 1) I
        L = sum_d (1 - 1/n Zb_d . sg B(Zb')_d)^2 + sum_d (1 - 1/n Zb'_d . sg B(Zb)_d)^2

    The authors' code adds 1e-5 to the deviations, regularises Sigma to ``(1 - shrink) Sigma + shrink I`` and adds 1e-5
    to its eigenvalues; so does this, unless ``shrink`` is 0, which is the exact base. Their
    statistics are those of each worker; here they are the global batch's. With ``groups`` G the channels are dealt into
    G blocks with a base each, which needs more samples than channels only within a block.

    Args:
        groups: G >= 1; must divide the width.
        shrink: weight of the identity in Sigma, 0 to 1.
        gather: statistics over all workers.
    """

    STANDARDISE_EPS, EIGENVALUE_EPS = 1e-5, 1e-5

    def __init__(self, groups: int = 1, shrink: float = 1e-4, gather: bool = True) -> None:
        super().__init__(gather)
        self.groups, self.shrink = groups, shrink

    @float32_math
    def forward(
        self,
        view1: Tensor,
        view2: Tensor,
        *,
        order: Tensor | None = None,
        metrics: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """The loss of two views ``(batch, dim)``.

        Args:
            view1: projections of the first view.
            view2: of the second.
            order: a permutation of the channels ``(dim,)``, before they are dealt into groups.
            metrics: receives ``base_cosine``, the mean correlation of a channel with its base vector.
        """
        self.check(view1, view2)
        if view1.shape[1] % self.groups:
            raise ValueError(f"{view1.shape[1]} channels cannot be dealt into {self.groups} groups evenly")
        if order is not None:
            view1, view2 = view1[:, order], view2[:, order]
        n = self.batch_size(view1)
        left, right = self.standardised(view1), self.standardised(view2)
        correlations = torch.cat(
            [self.total((z * self.base(other.detach())).sum(0)) / n for z, other in ((left, right), (right, left))]
        )
        if metrics is not None:
            metrics["base_cosine"] = correlations.detach().mean()
        return (1 - correlations).square().sum()

    def standardised(self, view: Tensor) -> Tensor:
        """Zb: every channel with mean 0 and deviation 1 over the batch."""
        centred = self.centred(view)
        variance = self.total(centred.square().sum(0)) / max(self.batch_size(view) - 1, 1)
        # The tiny number keeps the root's slope finite where a channel is constant.
        return centred / ((variance + 1e-24).sqrt() + self._eps(self.STANDARDISE_EPS))

    def base(self, standardised: Tensor) -> Tensor:
        """B: the nearest orthonormal base of each group of channels, ``(batch, dim)``."""
        width = standardised.shape[1] // self.groups
        # Of fewer samples than channels Sigma's other directions meet no sample; without regularisation they are 0 / 0.
        turned = self.batch_size(standardised) < width and self.shrink > 0
        make = self._base_by_samples if turned else self._base_by_channels
        return torch.cat([make(block) for block in standardised.split(width, dim=1)], dim=1)

    def _base_by_channels(self, block: Tensor) -> Tensor:
        root = self._inverse_root(self.second_moment(block, block).double() / max(self.batch_size(block) - 1, 1))
        return block @ root.to(block.dtype)

    def _base_by_samples(self, block: Tensor) -> Tensor:
        """The same: ``f(Z Z^T) Z = Z f(Z^T Z)``, and a decomposition as small as the batch."""
        rows = self.rows(block)
        root = self._inverse_root((rows @ rows.T).double() / max(len(rows) - 1, 1))
        start = collectives.rank() * len(block) if self.gather else 0
        return root[start : start + len(block)].to(block.dtype) @ rows

    def _inverse_root(self, moment: Tensor) -> Tensor:
        """``((1 - shrink) moment + shrink I)^(-1/2)``."""
        # A decomposition refuses NaN; what it is multiplied with carries it on to the loss.
        values, vectors = torch.linalg.eigh(moment.nan_to_num())
        values = (1 - self.shrink) * values.clamp_min(0) + self.shrink
        inverse: Tensor = (vectors * (values + self._eps(self.EIGENVALUE_EPS)).rsqrt()) @ vectors.T
        return inverse

    def _eps(self, value: float) -> float:
        return value if self.shrink else 0.0
