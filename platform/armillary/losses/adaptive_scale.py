"""Class-head losses that choose the logits' scale, or do without one: L2-softmax, AdaCos, P2SGrad."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from armillary import collectives
from armillary.losses.class_head import ClassHeadLoss, HeadTerms, LinearHeadLoss, Samples
from armillary.losses.hard_classes import global_mean
from armillary.losses.margin_softmax import ArcFace
from armillary.losses.tensors import check_choice, check_embeddings, normalize, widen

LEAST_SCALE, LARGEST_SCALE = 0.01, 1000.0


def lowest_radius(num_classes: int, probability: float) -> float:
    """The smallest feature radius at which C unit class rows can give their class this probability.

    ``log(p (C - 2) / (1 - p))``, Ranjan et al. 2017, eq. 7.
    """
    return math.log(probability * (num_classes - 2) / (1 - probability))


class L2Softmax(LinearHeadLoss):
    """Softmax over features of one length: only they are constrained. Ranjan et al. 2017, arXiv 1703.09507, eq. 3.

    ``L = mean_i -log( exp(W_y . u_i + b_y) / sum_j exp(W_j . u_i + b_j) ),  u_i = alpha x_i / |x_i|``

    The rows keep free lengths and a bias; with unit rows and no bias, as the survey prints it, it would be NormFace.

    Args:
        num_classes: C.
        embedding_dim: width of x.
        radius: alpha > 0, or its start when it is learned.
        learn_radius: train alpha, kept within [0.01, 1000]; it drifts upwards.
        reduction: ``mean`` or ``none``.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int,
        radius: float = 40.0,
        learn_radius: bool = False,
        reduction: str = "mean",
    ) -> None:
        super().__init__(num_classes, embedding_dim, reduction=reduction)
        self.radius = radius
        self.learned_radius = nn.Parameter(torch.full((1,), radius)) if learn_radius else None

    def forward(
        self, embeddings: Tensor, labels: Tensor, *, metrics: dict[str, Tensor] | None = None, **info: Tensor
    ) -> Tensor:
        """The loss of this worker's samples, as :meth:`ClassHeadLoss.forward`; ``metrics`` receives ``radius`` too."""
        check_embeddings(embeddings)
        radius = embeddings.new_full((1,), self.radius) if self.learned_radius is None else self.learned_radius
        radius = widen(radius).clamp(LEAST_SCALE, LARGEST_SCALE)
        if metrics is not None:
            metrics["radius"] = radius.detach().squeeze()
        unit = normalize(widen(embeddings))
        return super().forward(radius.to(unit.dtype) * unit, labels, metrics=metrics, **info)


class AdaCos(ClassHeadLoss):
    """Cosine softmax whose scale follows the batch. Zhang et al., CVPR 2019, arXiv 1905.00292, eqs. 8, 12-15.

    ::

        s_0 = sqrt(2) log(C - 1)                                           fixed for good with ``mode: fixed``
        s_t = log B_avg / cos(min(pi / 4, theta_med))
        B_avg = mean_i sum_{k != y} exp(s_{t-1} cos_ik),  theta_med = median_i theta_iy

    over the global batch, without gradient, used at once. The median of an even batch is the mean of the middle two.
    s is kept within [0.01, 1000]: with two or three classes the formula reaches 0. ``mode: survey`` is another rule,
    ``s = log(C - 1) / mean_i (cos_iy - mean cos_y)^2``.

    Args:
        num_classes: C.
        embedding_dim: width of x.
        mode: ``dynamic``, ``fixed`` or ``survey``.
        angle_cap: cap on theta_med as a share of pi; 0.25.
        reduction: ``mean`` or ``none``.
    """

    current_scale: Tensor

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int,
        mode: str = "dynamic",
        angle_cap: float = 0.25,
        reduction: str = "mean",
    ) -> None:
        check_choice("mode", mode, ("dynamic", "fixed", "survey"))
        first = min(max(math.sqrt(2) * math.log(max(num_classes - 1, 1)), LEAST_SCALE), LARGEST_SCALE)
        super().__init__(num_classes, embedding_dim, scale=first, reduction=reduction)
        self.mode, self.angle_cap = mode, angle_cap
        self.register_buffer("current_scale", torch.full((), first))

    def observe(self, samples: Samples) -> None:
        """The scale of this step."""
        if self.mode == "fixed":
            return
        cosine = samples.similarity
        if self.mode == "survey":
            spread = global_mean((cosine - global_mean(cosine)).square())
            scale = math.log(max(self.num_classes - 1, 1)) / spread.clamp_min(1e-12)
        else:
            before = self.current_scale.to(cosine.dtype)
            masses = samples.classes.log_sum_exp(lambda similarity, _: before * similarity)
            everyone = collectives.gather_no_grad(masses)
            log_mean = everyone.logsumexp(dim=0).squeeze() - math.log(len(everyone))
            angles = collectives.gather_no_grad(cosine.clamp(-1, 1).acos())
            scale = log_mean / angles.flatten().quantile(0.5).clamp_max(self.angle_cap * math.pi).cos()
        self.current_scale.copy_(scale.clamp(LEAST_SCALE, LARGEST_SCALE))

    def logit_scale(self, samples: Samples) -> Tensor:
        """S of this step."""
        return self.current_scale.to(samples.embeddings.dtype)


class P2SGrad(ClassHeadLoss):
    """The cosines themselves in place of probabilities in the gradient. Zhang et al., CVPR 2019, arXiv 1905.02479.

    The paper's gradient, ``dL / dcos_ij = cos_ij - [j = y_i]`` (eq. 11), is that of the potential

    ``L = 1/2 mean_i sum_j (cos_ij - [j = y_i])^2``

    which is what this returns: no scale, no margin, no softmax.

    Args:
        num_classes: C.
        embedding_dim: width of x.
        multiplier: factor on the loss, > 0; these gradients are small beside those of a scaled softmax.
        per_class: mean over classes instead of their sum (a factor of 1 / C).
        reduction: ``mean`` or ``none``.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int,
        multiplier: float = 1.0,
        per_class: bool = False,
        reduction: str = "mean",
    ) -> None:
        super().__init__(num_classes, embedding_dim, scale=1.0, reduction=reduction)
        self.factor = multiplier / (num_classes if per_class else 1)

    def head_terms(self, samples: Samples) -> HeadTerms:
        """Half the squared errors of all cosines."""
        others = samples.classes.sum(lambda similarity, _: similarity.square())
        own = samples.similarity
        return HeadTerms(self.factor * ((own - 1).square() + others) / 2, own.detach(), samples.correct())

    def monitors(self, samples: Samples) -> dict[str, Tensor]:
        """Nothing: there are no logits to scale."""
        return {}


class SigmoidWeightedArcFace(ArcFace):
    """The survey's reading of P2SGrad: ArcFace whose samples weigh ``1 / (1 + exp(kappa cos_y))``.

    Args:
        num_classes: C.
        embedding_dim: width of x.
        margin: m in radians, 0 to pi / 2.
        scale: s.
        kappa: steepness.
        reduction: ``mean`` or ``none``.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int,
        margin: float = 0.5,
        scale: float = 64.0,
        kappa: float = 1.0,
        reduction: str = "mean",
    ) -> None:
        super().__init__(num_classes, embedding_dim, margin, scale, reduction=reduction)
        self.kappa = kappa

    def sample_weight(self, samples: Samples) -> Tensor:
        """gamma, without gradient."""
        return torch.sigmoid(-self.kappa * samples.similarity.detach())
