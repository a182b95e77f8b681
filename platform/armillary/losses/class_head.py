"""The pipeline of every loss that classifies over a head with one weight row per class.

::

    embeddings -> similarity -> target rule T -> non-target rule N -> scale -> log-sum-exp -> sample weight -> mean
                  cos_ij        T(cos_iy, m)     N(cos_ij, T)         s

    loss_i = w_i * -log( exp(s T_i) / (exp(s T_i) + sum_{j != y_i} exp(s N_ij)) )

A loss states only the steps in which it departs from plain normalised softmax, for most that is ``target``. The steps
are called in this order, on this worker's samples unless said otherwise:

``own_class``     columns that only the holder of the sample's own row can compute: ``similarity``, a row's norm ...
``observe``       statistics of the batch, before anything is computed with them; training only, without gradient. Those
                  of the global batch are gathered with :mod:`armillary.collectives`
``margins``, ``target``, ``logit_scale``, ``sample_weight``
``columns``       further per-sample columns for ``non_target``
``non_target``    on a chunk of classes at a time, for the samples of *all* workers: of a sample it sees only ``target``
                  and ``columns``, which travel with it. The sample's own class may be among the chunk; what stands
                  there is ignored
``similarity``    likewise on a chunk of classes

Per-sample quantities are columns ``(batch, 1)``, so that they broadcast against ``(batch, classes)``. Tensors with one
entry per class (``row_names``: ``weight``, a bias, class margins) may be split over workers: read them through
``rows``, which holds the entries of the chunk, never through ``self``. Other sums over all classes (AdaCos' B_avg,
P2SGrad's squares) go through ``samples.classes.sum`` and ``.log_sum_exp``.

Every loss spells out its constructor, though ``num_classes, embedding_dim, margin, scale, ..., reduction`` stand in
most: which of them a loss has, in which order and with which of its paper's defaults is what a user reads and what
editors and type checkers know of it. As ``**options`` they would lose their places and their defaults.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from armillary import collectives
from armillary.losses.class_chunks import CHUNK, Rows
from armillary.losses.class_rows import Classes, RowSampler, RowSplit
from armillary.losses.tensors import (
    check_choice,
    check_embeddings,
    check_labels,
    float32_math,
    half_products_pay,
    normalize,
    widen,
)

Columns = Mapping[str, Tensor]


@dataclass(frozen=True)
class Samples:
    """What is known of a batch: ``embeddings (batch, dim)``, ``labels (batch, 1)``, further columns by name.

    ``own`` holds what :meth:`ClassHeadLoss.own_class` says of each sample and its class, with gradient; ``classes``
    sums over all other classes.
    """

    embeddings: Tensor
    labels: Tensor
    classes: Classes
    info: Columns = field(default_factory=dict)
    own: Columns = field(default_factory=dict)

    @property
    def norms(self) -> Tensor:
        """Lengths of the embeddings, ``(batch, 1)``, with gradient."""
        norms: Tensor = torch.linalg.vector_norm(self.embeddings, dim=1, keepdim=True)
        return norms

    @property
    def similarity(self) -> Tensor:
        """To the own class, before any margin, ``(batch, 1)``, with gradient."""
        return self.own["similarity"]

    def correct(self) -> Tensor:
        """Whether no other class is nearer, ``(batch, 1)`` bool; known after the first reduction over the classes."""
        return self.classes.best_other() <= self.similarity.detach()

    def predicted(self) -> Tensor:
        """The class of the largest similarity, ``(batch, 1)``; it takes a pass over the classes."""
        best, nearest = self.classes.nearest_other()
        return torch.where(best > self.similarity.detach(), nearest, self.labels)


@dataclass(frozen=True)
class HeadTerms:
    """What the head says of each sample, all ``(batch, 1)``.

    ``losses`` before weighting; ``similarity`` to the own class, before the margin; ``correct``, no other is nearer.
    """

    losses: Tensor
    similarity: Tensor
    correct: Tensor


def softmax_head_loss(head: ClassHeadLoss, samples: Samples) -> HeadTerms:
    """The cross-entropy of each sample over all classes, with the head's rules applied.

    Classes are visited in chunks, forward and backward; see :mod:`armillary.losses.class_chunks`.
    """
    target = head.target_of(samples)
    scale = head.logit_scale(samples).expand_as(target)
    if getattr(head.non_target, "__func__", None) is ClassHeadLoss.non_target:
        others = samples.classes.scaled_log_sum_exp(scale)
    else:
        columns = {**head.columns(samples, target), "_target": target, "_scale": scale}
        others = samples.classes.log_sum_exp(
            lambda similarity, known: known["_scale"] * head.non_target(similarity, known["_target"], known), columns
        )
    # -log(e^t / (e^t + e^o)) = log(1 + e^(o - t)): exact for any size of o - t, and never negative.
    losses = torch.logaddexp(torch.zeros_like(others), others - scale * target)
    return HeadTerms(losses, samples.similarity.detach(), samples.correct())


class ClassHeadLoss(nn.Module):
    """Base: normalised softmax with ``scale`` and no margin; subclasses override single steps.

    Each worker averages over its own samples; with equal parts the mean over workers is the mean over the global batch.
    The rows are parameters that every worker holds whole, or, after :meth:`split_rows`, this worker's part of them.

    Args:
        num_classes: rows of the head, at least 1.
        embedding_dim: width of the embeddings.
        margin: m, in the unit of the loss's target rule.
        scale: s, the logits' factor (inverse temperature), > 0.
        reduction: ``mean`` gives a scalar, ``none`` the samples' losses ``(batch,)``.

    Attributes:
        row_names: parameters and buffers with one entry per class, which are split together.
        row_sampler: chooses the rows a step uses beside those it must (Partial FC); ``None`` uses all.
        sampled_rows: with split and sampled rows, for each forward pass the positions of those that took part and the
            leaves that receive their gradients; whoever trains the rows takes them away.

    Raises:
        ValueError: an option out of range; in ``forward`` a wrong shape, or a label outside the classes.
    """

    similarity_name: ClassVar[str] = "cosine"
    row_names: ClassVar[tuple[str, ...]] = ("weight",)

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
        self.row_split: RowSplit | None = None
        self.row_sampler: RowSampler | None = None
        self.sampled_rows: list[tuple[Tensor, dict[str, Tensor]]] = []
        self.weight = nn.Parameter(torch.empty(num_classes, embedding_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Gaussian rows of expected length 1: under cosines the length only sets the step size."""
        nn.init.normal_(self.weight, std=self.embedding_dim**-0.5)

    def extra_repr(self) -> str:
        """The options, for ``print(loss)``."""
        return f"num_classes={self.num_classes}, embedding_dim={self.embedding_dim}, margin={self.margin}"

    def rows(self) -> dict[str, Tensor]:
        """This worker's row tensors by name, ``(rows, ...)``; absent ones (no bias) are left out."""
        found = {name: getattr(self, name) for name in self.row_names}
        return {name: row for name, row in found.items() if row is not None}

    @torch.no_grad()
    def rows_of(self, labels: Tensor) -> Tensor:
        """The weights of some classes, ``(n, ...)``, without gradient.

        Args:
            labels: ``(n,)`` of this worker; every worker must ask for as many.
        """
        weight, split = self.weight.detach(), self.row_split
        if split is None:
            return weight[labels]
        wanted = collectives.gather_no_grad(labels) - split.first
        here = ((wanted >= 0) & (wanted < split.count)).nonzero().squeeze(1)
        found = weight.new_zeros(len(wanted), *weight.shape[1:]).index_copy_(0, here, weight[wanted[here]])
        start = collectives.rank() * len(labels)
        return collectives.all_reduce_sum(found)[start : start + len(labels)]

    def split_rows(self, rank: int, workers: int) -> RowSplit:
        """Keeps only the ``rank``-th part of the rows, from now on as plain tensors that no longer are the module's.

        Whoever trains the module must then train them: nothing averages, shards, moves or saves them with it.
        """
        split = RowSplit.of_worker(self.num_classes, rank, workers)
        for name, row in self.rows().items():
            part = row.detach()[split.first : split.first + split.count].clone().requires_grad_(row.requires_grad)
            delattr(self, name)
            setattr(self, name, part)
        self.row_split = split
        return split

    # The steps ---------------------------------------------------------------------------------------------------

    def similarity(self, embeddings: Tensor, rows: Rows | None = None) -> Tensor:
        """Head: cosines between embeddings and class rows, ``(batch, classes in rows)``; all rows without ``rows``."""
        return normalize(embeddings) @ normalize(_rows(self, rows)["weight"].to(embeddings.dtype)).T

    def own_class(self, embeddings: Tensor, rows: Rows, similarity: Tensor) -> Columns:
        """What of a sample needs its own class' row, as columns ``(n, k)``.

        Args:
            embeddings: ``(n, dim)``.
            rows: the row of each one's class, ``(n, ...)``.
            similarity: to that row, ``(n, 1)``.
        """
        return {"similarity": similarity}

    def observe(self, samples: Samples) -> None:
        """Statistics of the batch, kept in buffers."""

    def margins(self, samples: Samples) -> Tensor:
        """The margin m of each sample, ``(batch, 1)`` or a scalar tensor."""
        return samples.embeddings.new_full((), self.margin)

    def target(self, cosine: Tensor, margin: Tensor) -> Tensor:
        """T: what stands for the cosine to the own class, ``(batch, 1)``."""
        return cosine

    def target_of(self, samples: Samples) -> Tensor:
        """T of each sample; for rules that need more than the similarity and the margin."""
        return self.target(samples.similarity, self.margins(samples))

    def columns(self, samples: Samples, target: Tensor) -> Columns:
        """What :meth:`non_target` must know of a sample beside its target, as columns ``(batch, k)``."""
        return {}

    def non_target(self, cosine: Tensor, target: Tensor, columns: Columns) -> Tensor:
        """N: what stands for the cosines to other classes, ``(n, classes)``; per-sample arguments ``(n, k)``."""
        return cosine

    def logit_scale(self, samples: Samples) -> Tensor:
        """The factor s, a scalar tensor or ``(batch, 1)``."""
        return samples.embeddings.new_full((), self.scale)

    def sample_weight(self, samples: Samples) -> Tensor | None:
        """The gate w on each sample's loss, ``(batch, 1)``; ``None`` weighs all alike."""
        return None

    def head_terms(self, samples: Samples) -> HeadTerms:
        """The samples' losses: softmax; for losses that are none."""
        return softmax_head_loss(self, samples)

    def monitors(self, samples: Samples) -> dict[str, Tensor]:
        """What is logged beside accuracy and similarity, by name: scalars without gradient; here the mean of s."""
        return {"scale": self.logit_scale(samples).detach().mean()}

    # -------------------------------------------------------------------------------------------------------------

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        *,
        metrics: dict[str, Tensor] | None = None,
        **info: Tensor,
    ) -> Tensor:
        """The loss of this worker's samples.

        Under autocast products with more than a chunk of classes run in autocast's type where that is quicker
        (:func:`armillary.losses.tensors.half_products_pay`), everything else in float32.

        Args:
            embeddings: ``(batch, embedding_dim)``, of any length: they are normalised here where the loss wants that.
            labels: ``(batch,)`` integers from 0.
            metrics: receives ``accuracy`` (of the head, without the margin), ``target_<similarity>`` and what
                :meth:`monitors` says: ``scale``, where the logits have one.
            info: per-sample columns that the loss's rules use, each ``(batch, ...)``.
        """
        device, product_type = embeddings.device.type, None
        if torch.is_autocast_enabled(device) and self.num_classes > CHUNK:
            halved = torch.get_autocast_dtype(device)
            product_type = halved if half_products_pay(device, halved) else None
        return self._loss(embeddings, labels, metrics, info, product_type)

    @float32_math
    def _loss(
        self,
        embeddings: Tensor,
        labels: Tensor,
        metrics: dict[str, Tensor] | None,
        info: Columns,
        product_type: torch.dtype | None,
    ) -> Tensor:
        check_embeddings(embeddings, labels)
        check_labels(labels, self.num_classes)
        samples = self._samples(embeddings, labels.long()[:, None], info, product_type)
        terms = self.head_terms(samples)
        if metrics is not None:
            metrics["accuracy"] = terms.correct.to(embeddings.dtype).mean()
            metrics[f"target_{self.similarity_name}"] = terms.similarity.mean()
            metrics.update(self.monitors(samples))
        weight = self.sample_weight(samples)
        losses = terms.losses if weight is None else weight * terms.losses
        return losses.mean() if self.reduction == "mean" else losses.squeeze(1)

    def _samples(self, embeddings: Tensor, labels: Tensor, info: Columns, product_type: torch.dtype | None) -> Samples:
        classes = Classes(
            {name: row.to(embeddings.dtype) if row.is_floating_point() else row for name, row in self.rows().items()},
            self.row_split,
            embeddings,
            labels,
            similarity=self.similarity,
            plain=_plain(self),
            sampler=self.row_sampler,
            product_type=product_type,
        )
        if classes.sampled is not None and torch.is_grad_enabled():
            self.sampled_rows.append(classes.sampled)
        own = classes.own(lambda vectors, rows: self.own_class(vectors, rows, classes.paired_similarity(vectors, rows)))
        samples = Samples(embeddings, labels, classes, {name: widen(value) for name, value in info.items()}, own)
        if self.training:
            with torch.no_grad():
                self.observe(samples)
        return samples


class LinearHeadLoss(ClassHeadLoss):
    """A head whose similarities are linear logits, ``z_ij = W_j . x_i + b_j``.

    Args:
        num_classes: rows of the head, at least 1.
        embedding_dim: width of the embeddings.
        margin: m, in the unit of the loss's target rule.
        bias: whether the head has b.
        reduction: ``mean`` or ``none``.
    """

    similarity_name = "logit"
    row_names = ("weight", "bias")
    bias: Tensor | None

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int,
        margin: float = 0.0,
        bias: bool = True,
        reduction: str = "mean",
    ) -> None:
        super().__init__(num_classes, embedding_dim, margin, scale=1.0, reduction=reduction)
        self.register_parameter("bias", nn.Parameter(torch.zeros(num_classes)) if bias else None)

    def similarity(self, embeddings: Tensor, rows: Rows | None = None) -> Tensor:
        """z, ``(batch, classes in rows)``; all rows without ``rows``."""
        rows = _rows(self, rows)
        logits = embeddings @ rows["weight"].to(embeddings.dtype).T
        return logits + rows["bias"].to(embeddings.dtype) if "bias" in rows else logits

    def monitors(self, samples: Samples) -> dict[str, Tensor]:
        """Nothing: the size of linear logits is that of rows and embeddings."""
        return {}


def _rows(head: ClassHeadLoss, rows: Rows | None) -> Rows:
    return head.rows() if rows is None else rows


def _plain(head: ClassHeadLoss) -> str | None:
    """Which of the similarities that have a quick way the head's is."""
    defined = getattr(head.similarity, "__func__", None)
    if defined is ClassHeadLoss.similarity:
        return "cosine"
    return "linear" if defined is LinearHeadLoss.similarity else None
