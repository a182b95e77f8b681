"""Class-head losses that weigh the wrong classes a sample is close to, and heads with several centres a class."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from armillary import collectives
from armillary.losses.class_chunks import Rows
from armillary.losses.class_head import ClassHeadLoss, Columns, HeadTerms, Samples
from armillary.losses.margin_softmax import ArcFace, shifted_cosine
from armillary.losses.tensors import check_choice, normalize


def global_mean(local: Tensor) -> Tensor:
    """The mean over the samples of all workers, detached."""
    total = collectives.all_reduce_sum(torch.stack([local.detach().sum(), local.new_tensor(float(local.numel()))]))
    return total[0] / total[1].clamp_min(1)


class MVSoftmax(ClassHeadLoss):
    """Wrong classes above the margined target weigh more. Wang et al., "MV-Softmax", AAAI 2020, arXiv 1912.00833.

    ::

        L = mean_i -log( exp(s f) / (exp(s f) + sum_{k != y} h_k exp(s cos_k)) ),  I_k = [f < cos_k]
        f = cos_y - m (am)  or  cos(theta_y + m) (arc)
        h = exp(s t I_k) (fixed)  or  exp(s t (cos_k + 1) I_k) (adaptive)

    As in the authors' code the target carries the margin only where cos_y > 0 (``easy_margin``), while I_k always
    compares with the margined value. The survey prints another loss, :class:`DirectedArcFace`.

    Args:
        num_classes: C.
        embedding_dim: width of x.
        margin: m; 0.35 for ``am``, 0.5 radians for ``arc``.
        scale: s.
        emphasis: t >= 0.
        mode: ``adaptive`` or ``fixed``.
        base: ``am`` or ``arc``.
        easy_margin: the margin only where cos_y > 0.
        reduction: ``mean`` or ``none``.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int,
        margin: float = 0.35,
        scale: float = 32.0,
        emphasis: float = 0.2,
        mode: str = "adaptive",
        base: str = "am",
        easy_margin: bool = True,
        reduction: str = "mean",
    ) -> None:
        check_choice("mode", mode, ("adaptive", "fixed"))
        check_choice("base", base, ("am", "arc"))
        super().__init__(num_classes, embedding_dim, margin, scale, reduction)
        self.emphasis, self.mode, self.base, self.easy_margin = emphasis, mode, base, easy_margin

    def margined(self, cosine: Tensor) -> Tensor:
        """f, whatever the cosine."""
        margin = cosine.new_full((), self.margin)
        return cosine - margin if self.base == "am" else shifted_cosine(cosine, margin)

    def target(self, cosine: Tensor, margin: Tensor) -> Tensor:
        """f, or the plain cosine where the margin is easy."""
        return torch.where(cosine > 0, self.margined(cosine), cosine) if self.easy_margin else self.margined(cosine)

    def columns(self, samples: Samples, target: Tensor) -> Columns:
        """f, which I_k compares with."""
        return {"margined": self.margined(samples.similarity).detach()}

    def non_target(self, cosine: Tensor, target: Tensor, columns: Columns) -> Tensor:
        """Cos + t (fixed) or (1 + t) cos + t (adaptive) above f, the cosine below."""
        factor = 1 + self.emphasis if self.mode == "adaptive" else 1.0
        return torch.where(cosine > columns["margined"], factor * cosine + self.emphasis, cosine)


class DirectedArcFace(ArcFace):
    """The survey's reading of MV-Softmax: ArcFace, and features drawn along the direction to the predicted class.

    ``L = L_ArcFace + lambda mean_i |v_i / |v_i| . (c_y - x_i)|,  v_i = c_p - x_i``, p the predicted class; x and the
    class rows c at unit length, c without gradient.

    Args:
        num_classes: C.
        embedding_dim: width of x.
        margin: m in radians, 0 to pi / 2.
        scale: s.
        correction: lambda >= 0.
        reduction: ``mean`` or ``none``.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int,
        margin: float = 0.5,
        scale: float = 32.0,
        correction: float = 0.1,
        reduction: str = "mean",
    ) -> None:
        super().__init__(num_classes, embedding_dim, margin, scale, reduction=reduction)
        self.correction = correction

    def head_terms(self, samples: Samples) -> HeadTerms:
        """ArcFace's losses with the correction added."""
        terms = super().head_terms(samples)
        unit = normalize(samples.embeddings)
        own, predicted = (
            normalize(self.rows_of(labels.squeeze(1)).to(unit.dtype))
            for labels in (samples.labels, samples.predicted())
        )
        along = (normalize(predicted - unit) * (own - unit)).sum(dim=1, keepdim=True)
        return replace(terms, losses=terms.losses + self.correction * along.abs())


class CurricularFace(ArcFace):
    """Wrong classes above the margined target weigh more and more. Huang et al., CVPR 2020, arXiv 2004.00288.

    ::

        L = mean_i -log( exp(s T) / (exp(s T) + sum_{j != y} exp(s N_j)) ),  T = cos(theta_y + m)
        N_j = cos_j                 where cos(theta_y + m) >= cos_j
              cos_j (t + cos_j)     elsewhere
        t <- alpha t + (1 - alpha) mean_i cos_y           (over the global batch, before it is used)

    The printed equation gives alpha to the new mean; the authors' code keeps alpha of the old t, and so does this.
    ``formulation: survey`` weighs whole samples instead, ``w_i = (1 + cos_y - mean cos_y) / 2``, on plain ArcFace.

    Args:
        num_classes: C.
        embedding_dim: width of x.
        margin: m in radians, 0 to pi / 2.
        scale: s.
        momentum: alpha, in [0, 1].
        formulation: ``paper`` or ``survey``.
        reduction: ``mean`` or ``none``.
    """

    t: Tensor

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int,
        margin: float = 0.5,
        scale: float = 64.0,
        momentum: float = 0.99,
        formulation: str = "paper",
        reduction: str = "mean",
    ) -> None:
        check_choice("formulation", formulation, ("paper", "survey"))
        super().__init__(num_classes, embedding_dim, margin, scale, reduction=reduction)
        self.momentum, self.formulation = momentum, formulation
        self.register_buffer("t", torch.zeros(()))

    def observe(self, samples: Samples) -> None:
        """Moves t towards the mean cosine to the own class."""
        self.t.lerp_(global_mean(samples.similarity).to(self.t.dtype), 1 - self.momentum)

    def columns(self, samples: Samples, target: Tensor) -> Columns:
        """cos(theta_y + m), without the falling branch, which the cosines are compared with."""
        margined = shifted_cosine(samples.similarity, samples.embeddings.new_full((), self.margin))
        return {"margined": margined.detach()}

    def non_target(self, cosine: Tensor, target: Tensor, columns: Columns) -> Tensor:
        """Cos (t + cos) above the margined target; gradient through both factors."""
        if self.formulation == "survey":
            return cosine
        return torch.where(cosine > columns["margined"], cosine * (self.t.to(cosine.dtype) + cosine), cosine)

    def sample_weight(self, samples: Samples) -> Tensor | None:
        """w, of the survey's formulation."""
        if self.formulation == "paper":
            return None
        cosine = samples.similarity.detach()
        return (1 + cosine - global_mean(cosine)) / 2


class SubcenterArcFace(ArcFace):
    """ArcFace with K rows a class, of which the nearest counts. Deng et al., ECCV 2020, "Sub-center ArcFace", eq. 4.

    ``cos_ij = max_k W_jk . x_i / (|W_jk| |x_i|)`` for every class j; then ArcFace. Only the nearest sub-center of each
    class gets a gradient, so that noisy images gather around sub-centers of their own.

    Args:
        num_classes: C.
        embedding_dim: width of x.
        margin: m in radians, 0 to pi / 2.
        scale: s.
        subcenters: K >= 1.
        easy_margin: as in ArcFace.
        extension: as in ArcFace.
        reduction: ``mean`` or ``none``.

    Attributes:
        weight: ``(num_classes, subcenters, embedding_dim)``.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int,
        margin: float = 0.5,
        scale: float = 64.0,
        subcenters: int = 3,
        easy_margin: bool = False,
        extension: bool = True,
        reduction: str = "mean",
    ) -> None:
        if subcenters < 1:
            raise ValueError(f"subcenters must be at least 1, found {subcenters}")
        super().__init__(num_classes, embedding_dim, margin, scale, easy_margin, extension, reduction)
        self.subcenters = subcenters
        # Independent draws: sub-centers that start alike would never part.
        self.weight = nn.Parameter(torch.empty(num_classes, subcenters, embedding_dim))
        self.reset_parameters()

    def similarity(self, embeddings: Tensor, rows: Rows | None = None) -> Tensor:
        """Cosines to each class' nearest sub-center, ``(batch, classes in rows)``."""
        return self.subcenter_cosines(embeddings, rows).amax(dim=2)

    def subcenter_cosines(self, embeddings: Tensor, rows: Rows | None = None) -> Tensor:
        """Cosines to all sub-centers, ``(batch, classes in rows, K)``."""
        weight = (self.rows() if rows is None else rows)["weight"].to(embeddings.dtype)
        cosines = normalize(embeddings) @ normalize(weight).flatten(0, 1).T
        return cosines.view(len(embeddings), len(weight), self.subcenters)
