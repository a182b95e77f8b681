"""Bounds on the mutual information between a vector of an image and the places of its feature map.

Symbols: T[j, i, p] the score of image j's vector (local rows) with place p of image i (all workers' rows). The joint
distribution pairs a vector with the places of its own image, the product of marginals with those of all others. Other
places of the same image are neither positives nor negatives of a place.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from armillary import collectives
from armillary.losses.global_batch import global_rows, self_mask
from armillary.losses.tensors import check_choice, float32_math

MEASURES = ("jsd", "infonce", "dv")


def scores_of_places(vectors: Tensor, places: Tensor, gather: bool = True) -> Tensor:
    """Dot products of local ``vectors (B, d)`` with all workers' ``places (B, P, d)``: T, ``(B, N, P)``."""
    return torch.einsum("jd,ipd->jip", vectors, global_rows(places, gather))


def own_scores(scores: Tensor, gather: bool = True) -> tuple[Tensor, Tensor]:
    """T of the joint distribution ``(B, P)``, and where T is of the product of marginals ``(B, N)`` bool."""
    own = self_mask(scores[..., 0], gather)
    return scores[own], ~own


def place_nce(scores: Tensor, gather: bool = True) -> Tensor:
    """``-mean_{j,p} log( e^T[j,j,p] / (e^T[j,j,p] + sum_{i != j} sum_q e^T[j,i,q]) )``; 0 for a single image.

    Args:
        scores: T, ``(B, N, P)``.
        gather: whether N counts all workers' images.
    """
    positive, others = own_scores(scores, gather)
    if scores.shape[1] == 1:
        return (positive * 0).sum()
    negative = scores.masked_fill(~others[..., None], -torch.inf).flatten(1).logsumexp(dim=1, keepdim=True)
    return (torch.logaddexp(positive, negative) - positive).mean()


class InformationBound(nn.Module):
    """A lower bound on mutual information, negated. Hjelm et al., "Deep InfoMax", ICLR 2019, arXiv 1808.06670.

    With P the joint and Q the product of marginals, sp(u) = log(1 + e^u)::

        jsd      I = E_P[-sp(-T)] - E_Q[sp(T)]                        at most 0; -2 log 2 for T = 0
        infonce  I = E_P[ T - log(e^T + sum of the others' e^T) ]     at most 0; plus log N it bounds in nats
        dv       I = E_P[T] - log E_Q[e^T]                            Donsker and Varadhan; noisy in small batches

    The released code adds constants to the first: its value is ``-I - 2 log 2``. A batch of one image has no Q: the
    terms in it are 0.

    Args:
        measure: which of the three.
        gather: see the other workers' images.
    """

    def __init__(self, measure: str = "jsd", gather: bool = True) -> None:
        super().__init__()
        check_choice("measure", measure, MEASURES)
        self.measure, self.gather = measure, gather

    @float32_math
    def forward(self, scores: Tensor, *, metrics: dict[str, Tensor] | None = None) -> Tensor:
        """``-I`` of T ``(B, N, P)``; ``metrics`` receives the mean scores of P and Q."""
        joint, others = own_scores(scores, self.gather)
        # Every image has as many negatives on every worker: means of local means are global means.
        product = scores[others]
        if metrics is not None:
            metrics["joint_score"] = joint.detach().mean()
            metrics["product_score"] = product.detach().mean() if len(product) else joint.detach().sum() * 0
        if self.measure == "infonce":
            return place_nce(scores, self.gather)
        if not len(product):
            return F.softplus(-joint).mean() if self.measure == "jsd" else -joint.mean()
        if self.measure == "jsd":
            return F.softplus(-joint).mean() + F.softplus(product).mean()
        return self._log_mean_exp(product) - joint.mean()

    def _log_mean_exp(self, product: Tensor) -> Tensor:
        largest = product.detach().max()
        largest = collectives.all_reduce_max(largest) if self.gather else largest
        total = (product - largest).exp().mean()
        if self.gather:
            total = collectives.all_reduce_sum(total) / collectives.world_size()
        return total.log() + largest


class AcrossScales(nn.Module):
    """One term of AMDIM: vectors of one view against the places of the other. Bachman et al., NeurIPS 2019, 1906.00910.

    ``u = a.b / sqrt(d)``, clipped to ``c tanh(u / c)`` in :func:`place_nce`, plus ``lambda mean(u^2)`` of the scores
    before they are clipped. As in the authors' released ``LossMultiNCE``.

    Args:
        clip: c > 0.
        penalty: lambda >= 0.
        gather: see the other workers' images.
    """

    def __init__(self, clip: float = 10.0, penalty: float = 0.04, gather: bool = True) -> None:
        super().__init__()
        self.clip, self.penalty, self.gather = clip, penalty, gather

    @float32_math
    def forward(self, vectors: Tensor, places: Tensor, *, metrics: dict[str, Tensor] | None = None) -> Tensor:
        """The term of ``vectors (B, d)`` and ``places (B, P, d)``; ``metrics`` receives ``nce`` and ``penalty``."""
        u = scores_of_places(vectors, places, self.gather) / math.sqrt(vectors.shape[1])
        nce = place_nce(self.clip * torch.tanh(u / self.clip), self.gather)
        penalty = self.penalty * u.square().mean()
        if metrics is not None:
            metrics.update(nce=nce.detach(), penalty=penalty.detach())
        return nce + penalty


class _Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return -grad


class PriorMatching(nn.Module):
    """Draws a distribution towards another through a discriminator (Hjelm et al. 2019, eq. 7).

    ``min_E max_D E_v[log D(v)] + E_x[log(1 - D(E(x)))]`` in one backward pass: the loss is the discriminator's,
    ``mean sp(-d(v)) + mean sp(d(y))`` with D = sigmoid(d), and its gradient is turned round on the way to y.

    Args:
        discriminator: maps ``(batch, dim)`` to logits d ``(batch, 1)``.
    """

    def __init__(self, discriminator: nn.Module) -> None:
        super().__init__()
        self.discriminator = discriminator

    @float32_math
    def forward(self, vectors: Tensor, prior: Tensor) -> Tensor:
        """The discriminator's loss on ``vectors`` y and samples ``prior`` v, both ``(batch, dim)``."""
        reversed_vectors: Tensor = _Reverse.apply(vectors)
        told = self.discriminator(reversed_vectors)
        return F.softplus(-self.discriminator(prior)).mean() + F.softplus(told).mean()
