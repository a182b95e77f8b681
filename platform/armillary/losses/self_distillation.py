"""Losses that make a student repeat what a teacher says of another view; the teacher's side carries no gradient.

Symbols: B images, V views of each of which the first G are global, K prototypes, tau_s and tau_t the temperatures of
student and teacher. Each loss is a mean over this worker's images, so that its mean over workers (which hold equally
many) is that of the global batch.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from armillary import collectives
from armillary.losses.soft_targets import soft_cross_entropy, soft_targets
from armillary.losses.tensors import check_choice, float32_math, normalize

# Rows whose cosines with others are computed in one product.
_BLOCK = 256


def cosine_distance(predicted: Tensor, target: Tensor) -> Tensor:
    """``1 - cos`` of rows ``(batch, dim)``, ``(batch,)``; 1 for a row of zeros."""
    return 1 - (normalize(predicted) * normalize(target)).sum(dim=-1)


class BYOL(nn.Module):
    """Distance of predictions from the other view's targets. Grill et al., "BYOL", NeurIPS 2020, equation 2.

    ::

        L = |p1/|p1| - z2/|z2||^2 + |p2/|p2| - z1/|z1||^2  =  4 - 2 cos(p1, z2) - 2 cos(p2, z1),  in [0, 8]

    ``formulation="survey"`` is ``|p1 - z2|^2 / 2 + |p2 - z1|^2 / 2`` of the raw vectors, which a network can also lower
    by making them short.

    Args:
        formulation: ``paper`` or ``survey``.

    Raises:
        ValueError: another formulation.
    """

    def __init__(self, formulation: str = "paper") -> None:
        super().__init__()
        check_choice("formulation", formulation, ("paper", "survey"))
        self.formulation = formulation

    @float32_math
    def forward(self, prediction1: Tensor, target2: Tensor, prediction2: Tensor, target1: Tensor) -> Tensor:
        """Predictions from a view and targets of the other, all ``(batch, dim)``; targets are taken as constants."""
        target1, target2 = target1.detach(), target2.detach()
        if self.formulation == "survey":
            squares = (prediction1 - target2).square() + (prediction2 - target1).square()
            return squares.sum(dim=1).mean() / 2
        return 2 * (cosine_distance(prediction1, target2) + cosine_distance(prediction2, target1)).mean()


class SimSiam(nn.Module):
    """Negative cosine of predictions and the other view's projections. Chen and He, CVPR 2021, equations 1-4.

    ``L = D(p1, sg z2) / 2 + D(p2, sg z1) / 2`` with ``D(p, z) = -cos(p, z)``, in [-1, 1].

    Args:
        target_gradient: share of the gradient that passes to the projections, in [0, 1]; 0 is the paper's
            stop-gradient (sg), 1 goes without.
        prediction_gradient: the same for the predictions; 0 with ``target_gradient=1`` puts the stop-gradient on the
            wrong side. Neither changes the loss's value.
    """

    def __init__(self, target_gradient: float = 0.0, prediction_gradient: float = 1.0) -> None:
        super().__init__()
        self.target_gradient, self.prediction_gradient = target_gradient, prediction_gradient

    @float32_math
    def forward(self, prediction1: Tensor, projection2: Tensor, prediction2: Tensor, projection1: Tensor) -> Tensor:
        """Predictions from a view and projections of the other one, all ``(batch, dim)``."""
        distances = [
            cosine_distance(
                scale_gradient(prediction, self.prediction_gradient), scale_gradient(projection, self.target_gradient)
            )
            for prediction, projection in ((prediction1, projection2), (prediction2, projection1))
        ]
        return (distances[0] + distances[1]).mean() / 2 - 1


def scale_gradient(value: Tensor, share: float) -> Tensor:
    """The value itself, with a gradient ``share`` times as large."""
    if share == 1:
        return value
    return value.detach() if share == 0 else value * share + value.detach() * (1 - share)


def centered_targets(logits: Tensor, center: Tensor, temperature: float) -> Tensor:
    """``softmax((logits - center) / tau_t)`` over the last dimension, in float32 at least, without gradient."""
    with torch.autocast(logits.device.type, enabled=False):
        wide = logits.detach() if logits.dtype == torch.float64 else logits.detach().float()
        return soft_targets(wide, center, temperature)


class CrossViewEntropy(nn.Module):
    """DINO's loss. Caron et al., "Emerging Properties in Self-Supervised Vision Transformers", ICCV 2021, equation 3.

    ::

        L = 1 / (G (V - 1))  sum_{g <= G}  sum_{v != g}  H(P_t(x_g), softmax(s_v / tau_s)),   H(q, p) = -1/B sum q log p

    The sums over g and v are taken before the product with the log-probabilities, so that no pair of views costs one.

    Args:
        temperature: tau_s > 0.
    """

    def __init__(self, temperature: float = 0.1) -> None:
        super().__init__()
        self.temperature = temperature

    @float32_math
    def forward(self, student: Tensor, targets: Tensor) -> Tensor:
        """The loss.

        Args:
            student: logits ``(V, B, K)``, global views first; V at least 2.
            targets: ``(G, B, K)``, non-negative with sum 1 over K, of the global views in the same order.
        """
        targets = targets.detach()
        log_shares = (student / self.temperature).log_softmax(dim=-1)
        views, (count, batch, _) = len(student), targets.shape
        agreement = (targets.sum(dim=0) * log_shares.sum(dim=0)).sum() - (targets * log_shares[:count]).sum()
        return -agreement / (batch * count * (views - 1))


class MaskedPatchEntropy(nn.Module):
    """iBOT's patch loss. Zhou et al., "iBOT: Image BERT Pre-Training with Online Tokenizer", ICLR 2022, equation 2.

    ``1/C sum_c 1 / max(1, |M_c|) sum_{p in M_c} H(q_cp, softmax(u_cp / tau_s))`` over C crops with masked patches M_c:
    the teacher's target of a patch against what the student says in its place. A crop without mask adds 0 and counts.

    Args:
        temperature: tau_s > 0.
    """

    def __init__(self, temperature: float = 0.1) -> None:
        super().__init__()
        self.temperature = temperature

    @float32_math
    def forward(self, student: Tensor, targets: Tensor, masked: Tensor) -> Tensor:
        """The loss.

        Args:
            student: logits ``(N, K)`` of the masked patches alone, as ``tokens[masked]`` takes them.
            targets: ``(N, K)``, of the same patches.
            masked: ``(C, T)`` bool with N true places.
        """
        return (self.weights(masked, student.dtype) * soft_cross_entropy(student, targets, self.temperature)).sum()

    @staticmethod
    def weights(masked: Tensor, dtype: torch.dtype) -> Tensor:
        """How much each masked patch counts, ``(N,)``; see ``forward`` for ``masked``."""
        shares = masked.to(dtype) / masked.sum(dim=1, keepdim=True).clamp_min(1)
        return shares[masked] / len(masked)


class Distillation(nn.Module):
    """A student's class probabilities against a teacher's. Hinton, Vinyals, Dean 2015; SimCLR v2 (2020), eqs. 2 and 3.

    ::

        L = alpha * -sum_y P_T(y; tau) log P_S(y; tau) + (1 - alpha) * -log P_S(label; 1),   P(y; tau) ~ exp(f[y] / tau)

    Args:
        temperature: tau > 0, of both sides; 0.1 for a teacher as large as the student, 1 for a larger one.
        alpha: weight of the teacher's term, in [0, 1].
        tau_squared: multiply that term by tau^2, which keeps its gradient's size (Hinton et al.); SimCLR v2 does not.
    """

    def __init__(self, temperature: float = 1.0, alpha: float = 1.0, tau_squared: bool = False) -> None:
        super().__init__()
        self.temperature, self.alpha = temperature, alpha
        self.factor = temperature**2 if tau_squared else 1.0

    @float32_math
    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor | None = None) -> Tensor:
        """The loss of logits ``(batch, classes)``; ``labels (batch,)`` are needed when alpha is below 1.

        Raises:
            ValueError: alpha is below 1 and there are no labels.
        """
        targets = (teacher.detach() / self.temperature).softmax(dim=1)
        loss = self.alpha * self.factor * soft_cross_entropy(student, targets, self.temperature).mean()
        if self.alpha < 1:
            if labels is None:
                raise ValueError(f"alpha {self.alpha} mixes in labels, found none")
            loss = loss + (1 - self.alpha) * F.cross_entropy(student, labels)
        return loss


class GramAnchor(nn.Module):
    """Similarities between patches stay those of an earlier teacher. Siméoni et al., "DINOv3", 2025, section 4.2.

    ``|X_S X_S^T - X_G X_G^T|^2`` of patch features with rows of unit length, as the mean over images and pairs of
    patches that the released code takes (the equation sums).

    ``formulation="survey"`` compares channels: ``|F_S^T F_S - F_G^T F_G|^2``, summed, of raw features, per image. The
    survey's print says that these are C x C matrices of an F of C x N, whose F^T F would be N x N.

    Args:
        image_level: pairs within an image; otherwise all pairs of the global batch.
        remove_negative: negative similarities count as 0, on both sides.
        formulation: ``paper`` or ``survey``.
    """

    def __init__(self, image_level: bool = True, remove_negative: bool = False, formulation: str = "paper") -> None:
        super().__init__()
        check_choice("formulation", formulation, ("paper", "survey"))
        self.image_level, self.remove_negative, self.formulation = image_level, remove_negative, formulation

    @float32_math
    def forward(self, student: Tensor, anchor: Tensor) -> Tensor:
        """Patch features ``(images, patches, dim)`` of both; the anchor's are constants."""
        squares = (self._gram(student) - self._gram(anchor.detach())).square()
        return squares.sum(dim=(1, 2)).mean() if self.formulation == "survey" else squares.mean()

    def _gram(self, features: Tensor) -> Tensor:
        """The compared matrices, one an image; without ``image_level`` one, this worker's patches against all."""
        if self.formulation == "survey":
            return features.transpose(1, 2) @ features
        rows = columns = normalize(features)
        if not self.image_level:
            rows, columns = rows.flatten(0, 1)[None], collectives.all_gather(rows).flatten(0, 1)[None]
        similarity = rows @ columns.transpose(1, 2)
        return similarity.clamp_min(0) if self.remove_negative else similarity


class KoLeo(nn.Module):
    """Keeps each sample away from its nearest one. Sablayrolles et al., ICLR 2019, equation 4 (Kozachenko, Leonenko).

    ``L = -1/n sum_i log min_{j != i} |x_i - x_j|`` of rows of unit length; the neighbour is chosen without gradient,
    which then flows to both. As in DINOv2's released code eps is added to the difference and to the distance.

    Args:
        eps: > 0 bounds the loss of exact duplicates, whose gradient reaches 1/eps: clip it. 0 is the equation.
        neighbours: nearest ones that count, at least 1.
        gather: neighbours among all workers' samples. DINOv2 looks at the worker's own.
    """

    def __init__(self, eps: float = 1e-8, neighbours: int = 1, gather: bool = True) -> None:
        super().__init__()
        self.eps, self.neighbours, self.gather = eps, neighbours, gather

    @float32_math
    def forward(self, embeddings: Tensor) -> Tensor:
        """The loss of ``(batch, dim)``, one view; 0 for a sample alone."""
        rows = normalize(embeddings)
        columns = collectives.all_gather(rows) if self.gather else rows
        if len(columns) < 2:
            return (rows * 0).sum()
        with torch.no_grad():
            count = min(self.neighbours, len(columns) - 1)
            if count == 1 and len(columns) == len(rows):
                nearest = _nearest(rows)[:, None]
            else:
                cosine = rows @ columns.T
                cosine.diagonal(collectives.rank() * len(rows) if self.gather else 0).fill_(-math.inf)
                # A maximum is found in half of the time.
                nearest = cosine.max(dim=1).indices[:, None] if count == 1 else cosine.topk(count, dim=1).indices
        repeated = rows.repeat_interleave(count, dim=0) if count > 1 else rows
        distance = F.pairwise_distance(repeated, columns[nearest.flatten()], eps=self.eps) + self.eps
        loss: Tensor = -distance.log().mean()
        return loss


def _nearest(rows: Tensor) -> Tensor:
    """The most similar other one of unit rows ``(n, dim)``, ``(n,)``; every pair's cosine is computed once."""
    best, nearest = (
        rows.new_full((len(rows),), -math.inf),
        torch.zeros(len(rows), dtype=torch.int64, device=rows.device),
    )
    for start in range(0, len(rows), _BLOCK):
        block = rows[start : start + _BLOCK]
        cosine = block @ rows[start:].T
        cosine.fill_diagonal_(-math.inf)
        mine, later = slice(start, start + len(block)), slice(start + len(block), len(rows))
        for place, (value, index) in ((mine, cosine.max(dim=1)), (later, cosine[:, len(block) :].max(dim=0))):
            closer = value > best[place]
            best[place] = torch.where(closer, value, best[place])
            nearest[place] = torch.where(closer, index + start, nearest[place])
    return nearest
