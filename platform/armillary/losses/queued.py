"""Class-head losses that see samples of earlier steps, corrected for how far their class rows have moved since.

::

    e*_k = e_k + |e_k| / |W_k'| (W_k - W_k')

e_k is the raw embedding that was kept, W_k' the row of its class at that time and W_k the row now (Kim, Park, Shin,
"BroadFace", ECCV 2020, arXiv 2008.06674, eq. 5).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from armillary import collectives
from armillary.losses.class_head import ClassHeadLoss, HeadTerms, Samples
from armillary.losses.margin_softmax import ArcFace
from armillary.losses.sample_margins import AdaFace
from armillary.losses.tensors import float32_math, normalize


@dataclass(frozen=True)
class Past:
    """Samples of earlier steps, the same on every worker.

    ``embeddings (q, dim)`` raw, ``labels (q,)`` int64, ``rows (q, dim)``: their class rows when they were kept.
    """

    embeddings: Tensor
    labels: Tensor
    rows: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def share(self) -> tuple[Past, Tensor]:
        """This worker's share, as long on every worker, and which of its entries count; the rest fill it up."""
        workers, each = collectives.world_size(), -(-len(self) // collectives.world_size())
        places = torch.arange(collectives.rank() * each, collectives.rank() * each + each, device=self.labels.device)
        counts, places = places < len(self), places.clamp_max(max(0, len(self) - 1))
        return (self, counts) if workers == 1 else (self._at(places), counts)

    def _at(self, places: Tensor) -> Past:
        return Past(self.embeddings[places], self.labels[places], self.rows[places])


@float32_math
def compensated(embeddings: Tensor, rows_then: Tensor, rows_now: Tensor) -> Tensor:
    """e*, ``(q, dim)``; an embedding whose class row was zero stays as it was."""
    length = torch.linalg.vector_norm(rows_then, dim=1, keepdim=True)
    ratio = torch.linalg.vector_norm(embeddings, dim=1, keepdim=True) / length.masked_fill(length == 0, torch.inf)
    moved: Tensor = embeddings + ratio * (rows_now - rows_then)
    return moved


class BroadFace(ArcFace):
    """The classifier learns from the batch and a long queue, the encoder from the batch. Kim, Park, Shin, ECCV 2020.

    ::

        L = 1/|X| sum_{i in X} l(e_i, y_i; sg[W])  +  1/(|X| + |Q|) sum_{i in X + Q} l(sg[e_i or e*_i], y_i; W)

    l is ArcFace, sg stops gradients: the first term reaches the encoder only, the second the rows only. With an empty
    queue the gradients are ArcFace's and the value is twice its. X is the global batch; each worker takes its part of
    X and of Q.

    Args:
        num_classes: C.
        embedding_dim: width of e.
        margin: m in radians.
        scale: s.
        compensate: correct the queue's embeddings; the authors' released code leaves that off by default.

    Attributes:
        snapshot: class rows of the last forward pass's samples ``(batch, dim)``, detached, to be kept with them.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int,
        margin: float = 0.5,
        scale: float = 64.0,
        compensate: bool = True,
    ) -> None:
        super().__init__(num_classes, embedding_dim, margin, scale, reduction="none")
        self.compensate = compensate
        self.snapshot: Tensor | None = None
        self._held = False

    def rows(self) -> dict[str, Tensor]:
        """This worker's rows; without gradient in the first term."""
        rows = super().rows()
        return {name: row.detach() for name, row in rows.items()} if self._held else rows

    @contextmanager
    def _rows_held(self) -> Iterator[None]:
        sampled = len(self.sampled_rows)
        self._held = True
        try:
            yield
        finally:
            self._held = False
            # Nobody is to train the rows of a pass that gave them no gradient.
            del self.sampled_rows[sampled:]

    def forward(  # type: ignore[override]
        self,
        embeddings: Tensor,
        labels: Tensor,
        *,
        metrics: dict[str, Tensor] | None = None,
        past: Past | None = None,
    ) -> Tensor:
        """This worker's share of the loss; ``(batch, dim)``, ``(batch,)``, and the queue."""
        with self._rows_held():
            batch_loss = super().forward(embeddings, labels, metrics=metrics).mean()
        self.snapshot = self.rows_of(labels)
        everyone, all_labels, weights = embeddings.detach(), labels, embeddings.new_ones(len(labels))
        total = len(labels) * collectives.world_size()
        if past is not None and len(past):
            share, counts = past.share()
            kept = compensated(share.embeddings, share.rows, self.rows_of(share.labels)) if self.compensate else None
            everyone = torch.cat([everyone.to(share.embeddings.dtype), share.embeddings if kept is None else kept])
            all_labels, weights = torch.cat([labels, share.labels]), torch.cat([weights, counts.to(weights.dtype)])
            total += len(past)
        losses = super().forward(everyone, all_labels)
        broad_loss = collectives.world_size() * (weights.to(losses.dtype) * losses).sum() / total
        if metrics is not None:
            metrics.update(batch_loss=batch_loss.detach(), broad_loss=broad_loss.detach())
        return batch_loss + broad_loss


class QueuedCenters(ClassHeadLoss):
    """Softmax over the own class and a queue of other classes' past rows: what a survey takes BroadFace for.

    ``L = mean_i log(1 + sum_k exp(s (cos(e_i, c_k) - cos(e_i, W_{y_i}))))`` over queued rows c_k of classes other than
    y_i; no margin, no gradient to the queue.

    Args:
        num_classes: C.
        embedding_dim: width of e.
        scale: s.
        reduction: ``mean`` or ``none``.
    """

    def __init__(self, num_classes: int, embedding_dim: int, scale: float = 64.0, reduction: str = "mean") -> None:
        super().__init__(num_classes, embedding_dim, scale=scale, reduction=reduction)
        self.snapshot: Tensor | None = None
        self._centers: tuple[Tensor, Tensor] | None = None

    def forward(  # type: ignore[override]
        self,
        embeddings: Tensor,
        labels: Tensor,
        *,
        metrics: dict[str, Tensor] | None = None,
        centers: Tensor,
        center_labels: Tensor,
    ) -> Tensor:
        """``centers (K, dim)`` and their classes ``(K,)``, -1 for none, equal on all workers."""
        self._centers = (centers.detach(), center_labels)
        loss = super().forward(embeddings, labels, metrics=metrics)
        self.snapshot = self.rows_of(labels)
        return loss

    def head_terms(self, samples: Samples) -> HeadTerms:
        """The queue's rows take the place of the head's."""
        assert self._centers is not None
        centers, center_labels = self._centers
        own = samples.similarity
        cosine = normalize(samples.embeddings) @ normalize(centers.to(own.dtype)).T
        cosine = cosine.masked_fill(center_labels == samples.labels, -math.inf)
        others = (self.scale * cosine).logsumexp(dim=1, keepdim=True)
        losses = torch.logaddexp(torch.zeros_like(others), others - self.scale * own)
        return HeadTerms(losses, own.detach(), cosine.detach().amax(dim=1, keepdim=True) <= own.detach())


class QGFace(AdaFace):
    """Clear images classify, poor ones are contrasted with a queue. Song, Wang, "QGFace", arXiv 2312.17494.

    Two views u, v of every image; q = (1 + z) / 2 in [0, 1] with AdaFace's z (detached)::

        L = L_cls + w L_con
        L_cls = mean over views of CE(g s AdaFace logits),       g = sigmoid(2 s (q - tau))
        L_con = mean over (a, b) in {(u, v), (v, u)} of
                log(1 + sum_k exp(s c (cos(a, e*_k) - cos(a, b)))),   c = [min(q_u, q_v) < tau]
        L_con is scaled by log 129 / log(K + 1), so that the queue's size K does not weigh it.

    As in the authors' code the queue begins with the batch itself, so that its samples are negatives of each other, and
    entries of a sample's own image count with cosine 0. Written from that code: its values of tau, w and the queue's
    size stand in configurations that are not public. It starts mu and sigma at 0, this as AdaFace does; it masks the
    own image in one of its two places in the queue, this in both.

    Args:
        num_classes: C.
        embedding_dim: width of the embeddings.
        margin: m of AdaFace.
        scale: s.
        concentration: h of AdaFace.
        threshold: tau in (0, 1).
        norm_rate: rate of AdaFace's statistics.

    Attributes:
        snapshot: class rows of the last forward pass's samples ``(2 batch, dim)``, detached, to be kept with them.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int,
        margin: float = 0.4,
        scale: float = 64.0,
        concentration: float = 0.333,
        threshold: float = 0.5,
        norm_rate: float = 0.01,
    ) -> None:
        super().__init__(num_classes, embedding_dim, margin, scale, concentration, norm_rate)
        self.threshold = threshold
        self.snapshot: Tensor | None = None
        self._quality: Tensor | None = None

    def logit_scale(self, samples: Samples) -> Tensor:
        """Scales g s; remembers q for the contrast."""
        self._quality = (1 + self.standardized(samples)) / 2
        return self.scale * torch.sigmoid(2 * self.scale * (self._quality - self.threshold))

    def forward(  # type: ignore[override]
        self,
        view1: Tensor,
        view2: Tensor,
        labels: Tensor,
        *,
        metrics: dict[str, Tensor] | None = None,
        past: Past | None = None,
        weight: float = 1.0,
    ) -> Tensor:
        """The loss of this worker's pairs, ``(batch, dim)`` each; ``weight`` is w, 0 leaves the contrast out."""
        both, twice = torch.cat([view1, view2]), torch.cat([labels, labels])
        classify = super().forward(both, twice, metrics=metrics)
        self.snapshot = self.rows_of(twice)
        assert self._quality is not None
        if metrics is not None:
            metrics["quality"] = self._quality.mean()
        if weight == 0:
            return classify
        queue = global_batch_of(both)
        if past is not None and len(past):
            share, _ = past.share()
            kept = compensated(share.embeddings, share.rows, self.rows_of(share.labels))
            queue = torch.cat([queue, collectives.gather_no_grad(kept)[: len(past)].to(queue.dtype)])
        poor = torch.minimum(*self._quality.chunk(2)) < self.threshold
        contrast = queue_contrast(view1, view2, queue, self.scale * poor.to(queue.dtype)).mean()
        contrast = contrast * math.log(129) / math.log(len(queue) + 1)
        if metrics is not None:
            metrics.update(contrast=contrast.detach(), poor_share=poor.to(contrast.dtype).mean())
        return classify + weight * contrast


def global_batch_of(both: Tensor) -> Tensor:
    """Two views, one after the other, of all workers' samples, detached: ``(2 batch, dim)`` in order of the sample."""
    views = [collectives.gather_no_grad(view.detach().contiguous()) for view in both.chunk(2)]
    return torch.cat(views)


@float32_math
def queue_contrast(view1: Tensor, view2: Tensor, queue: Tensor, scale: Tensor, own: bool = True) -> Tensor:
    """InfoNCE of both views against a queue, ``(batch, 1)``: the mean of the two directions.

    Args:
        view1: ``(batch, dim)``.
        view2: ``(batch, dim)``.
        queue: ``(K, dim)``, of any length, without gradient.
        scale: ``(batch, 1)`` or a scalar; a scale of 0 gives log(K + 1) without gradient.
        own: the queue begins with both views of the global batch, whose entries of the own image count with cosine 0.
    """
    one, two, keys = normalize(view1), normalize(view2), normalize(queue)
    positive = (one * two).sum(dim=1, keepdim=True)
    batch, workers = len(one), collectives.world_size()
    places = torch.arange(batch, device=one.device)[:, None] + collectives.rank() * batch
    same = torch.cat([places, places + workers * batch], dim=1)
    losses = []
    for anchor in (one, two):
        cosine = anchor @ keys.T
        if own:
            cosine = cosine.scatter(1, same, 0.0)
        logits = scale * (cosine - positive)
        losses.append(nn.functional.softplus(logits.logsumexp(dim=1, keepdim=True)))
    return (losses[0] + losses[1]) / 2
