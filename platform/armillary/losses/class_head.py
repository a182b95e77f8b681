"""The pipeline of every loss that classifies over a head with one weight row per class.

::

    embeddings -> similarity -> target rule T -> non-target rule N -> scale -> log-sum-exp -> sample weight -> mean
                  cos_ij        T(cos_iy, m)     N(cos_ij, T)         s

    loss_i = w_i * -log( exp(s T_i) / (exp(s T_i) + sum_{j != y_i} exp(s N_ij)) )

A loss states only the steps in which it departs from plain normalised softmax, for most that is ``target``.
Per-sample quantities are columns ``(batch, 1)``, so that they broadcast against ``(batch, num_classes)``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from armillary.losses.tensors import check_choice, check_embeddings, check_labels, float32_math, normalize

ALL_CLASSES = slice(None)


@dataclass(frozen=True)
class Samples:
    """What is known of a batch: ``embeddings (batch, dim)``, ``labels (batch, 1)``, further columns by name."""

    embeddings: Tensor
    labels: Tensor
    info: dict[str, Tensor] = field(default_factory=dict)

    @property
    def norms(self) -> Tensor:
        """Lengths of the embeddings, ``(batch, 1)``, with gradient."""
        norms: Tensor = torch.linalg.vector_norm(self.embeddings, dim=1, keepdim=True)
        return norms


@dataclass(frozen=True)
class HeadTerms:
    """What the head says of each sample, all ``(batch, 1)``.

    ``losses`` before weighting; ``similarity`` to the own class, before the margin; ``predicted``, the nearest class.
    """

    losses: Tensor
    similarity: Tensor
    predicted: Tensor


def softmax_head_loss(head: ClassHeadLoss, samples: Samples) -> HeadTerms:
    """The cross-entropy of each sample over all classes, with the head's rules applied.

    This is the one place that touches a ``(batch, num_classes)`` matrix.
    """
    similarity = head.similarity(samples.embeddings)
    own = similarity.gather(1, samples.labels)
    target = head.target(own, head.margins(samples))
    others = head.non_target(similarity, target)
    scale = head.logit_scale(samples)
    logits = scale * others.scatter(1, samples.labels, target)
    # -log(e^t / sum_j e^z_j) = log sum_j e^(z_j - t): the own term is exactly e^0, so that the loss is never negative.
    losses = torch.logsumexp(logits - scale * target, dim=1, keepdim=True)
    return HeadTerms(losses, own.detach(), similarity.detach().argmax(dim=1, keepdim=True))


class ClassHeadLoss(nn.Module):
    """Base: normalised softmax with ``scale`` and no margin; subclasses override single steps.

    Each worker averages over its own samples; with equal parts the mean over workers is the mean over the global batch,
    so nothing is gathered.

    Args:
        num_classes: rows of the head, at least 1.
        embedding_dim: width of the embeddings.
        margin: m, in the unit of the loss's target rule.
        scale: s, the logits' factor (inverse temperature), > 0.
        reduction: ``mean`` gives a scalar, ``none`` the samples' losses ``(batch,)``.

    Raises:
        ValueError: an option out of range; in ``forward`` a wrong shape, or a label outside the classes.
    """

    similarity_name: ClassVar[str] = "cosine"

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int,
        margin: float = 0.0,
        scale: float = 64.0,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        check_choice("reduction", reduction, ("mean", "none"))
        if num_classes < 1 or embedding_dim < 1:
            raise ValueError(f"num_classes and embedding_dim must be at least 1, found {num_classes}, {embedding_dim}")
        if not scale > 0:
            raise ValueError(f"scale must be above 0, found {scale}")
        self.num_classes, self.embedding_dim = num_classes, embedding_dim
        self.margin, self.scale, self.reduction = margin, scale, reduction
        self.weight = nn.Parameter(torch.empty(num_classes, embedding_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Gaussian rows of expected length 1: under cosines the length only sets the step size."""
        nn.init.normal_(self.weight, std=self.embedding_dim**-0.5)

    def extra_repr(self) -> str:
        """The options, for ``print(loss)``."""
        return f"num_classes={self.num_classes}, embedding_dim={self.embedding_dim}, margin={self.margin}"

    def similarity(self, embeddings: Tensor, rows: slice = ALL_CLASSES) -> Tensor:
        """Head: cosines between embeddings and class rows, ``(batch, classes in rows)``."""
        return normalize(embeddings) @ normalize(self.weight[rows].to(embeddings.dtype)).T

    def margins(self, samples: Samples) -> Tensor:
        """The margin m of each sample, ``(batch, 1)`` or a scalar tensor."""
        return samples.embeddings.new_full((), self.margin)

    def target(self, cosine: Tensor, margin: Tensor) -> Tensor:
        """T: what stands for the cosine to the own class, ``(batch, 1)``."""
        return cosine

    def non_target(self, cosine: Tensor, target: Tensor) -> Tensor:
        """N: what stands for the cosines to the other classes, ``(batch, num_classes)``."""
        return cosine

    def logit_scale(self, samples: Samples) -> Tensor:
        """The factor s, a scalar tensor or ``(batch, 1)``."""
        return samples.embeddings.new_full((), self.scale)

    def sample_weight(self, samples: Samples) -> Tensor | None:
        """The gate w on each sample's loss, ``(batch, 1)``; ``None`` weighs all alike."""
        return None

    @float32_math
    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        *,
        metrics: dict[str, Tensor] | None = None,
        **info: Tensor,
    ) -> Tensor:
        """The loss of this worker's samples.

        Args:
            embeddings: ``(batch, embedding_dim)``, of any length: they are normalised here where the loss wants that.
            labels: ``(batch,)`` integers from 0.
            metrics: receives ``accuracy`` (of the head, without the margin), ``target_<similarity>`` and ``scale``.
            info: per-sample columns that the loss's rules use, each ``(batch, ...)``.
        """
        check_embeddings(embeddings, labels)
        check_labels(labels, self.num_classes)
        samples = Samples(embeddings, labels.long()[:, None], info)
        terms = softmax_head_loss(self, samples)
        if metrics is not None:
            metrics["accuracy"] = (terms.predicted == samples.labels).to(embeddings.dtype).mean()
            metrics[f"target_{self.similarity_name}"] = terms.similarity.mean()
            metrics["scale"] = self.logit_scale(samples).detach().mean()
        weight = self.sample_weight(samples)
        losses = terms.losses if weight is None else weight * terms.losses
        return losses.mean() if self.reduction == "mean" else losses.squeeze(1)
