"""Terms that act on raw features beside a classifier: distance to class centres, a common length, pairs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from armillary import collectives
from armillary.losses.global_batch import global_rows, same_label, self_mask
from armillary.losses.similarities import euclidean
from armillary.losses.tensors import check_choice, check_embeddings, check_labels, float32_math


class CenterLoss(nn.Module):
    """Squared distance to a moving centre of the own class. Wen et al., ECCV 2016, eqs. 2-4.

    ::

        L_C = 1/2 mean_i |x_i - c_{y_i}|^2          (the paper sums over the batch, as it does in its softmax term)
        c_j <- c_j - alpha sum_{i: y_i = j} (c_j - x_i) / (1 + n_j)

    Features are not normalised, centres have no gradient. Sums and counts run over the global batch. The centres of the
    batch's classes move in :meth:`update`, after the loss has been computed with the old ones.

    Args:
        num_classes: C.
        embedding_dim: width of x.
        alpha: rate of the centres, in (0, 1].

    Attributes:
        centers: ``(num_classes, embedding_dim)`` float32, from 0.
    """

    centers: Tensor

    def __init__(self, num_classes: int, embedding_dim: int, alpha: float = 0.5) -> None:
        super().__init__()
        self.alpha = alpha
        self.register_buffer("centers", torch.zeros(num_classes, embedding_dim))
        self._seen: tuple[Tensor, Tensor] | None = None

    @float32_math
    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The mean over this worker's samples; remembers them for :meth:`update`."""
        check_embeddings(embeddings, labels)
        check_labels(labels, len(self.centers))
        if self.training:
            self._seen = (embeddings.detach(), labels)
        return (embeddings - self.centers[labels].to(embeddings.dtype)).square().sum(dim=1).mean() / 2

    @torch.no_grad()
    def update(self) -> None:
        """Moves the centres of the classes in the last batch; call it on every worker, once a step."""
        if self._seen is None:
            return
        embeddings, labels = self._seen
        self._seen = None
        difference = self.centers[labels] - embeddings.to(self.centers.dtype)
        total = torch.zeros_like(self.centers).index_add_(0, labels, difference)
        count = self.centers.new_zeros(len(self.centers), 1).index_add_(0, labels, torch.ones_like(difference[:, :1]))
        total, count = collectives.all_reduce_sum(total), collectives.all_reduce_sum(count)
        self.centers -= self.alpha * total / (1 + count)


class RingLoss(nn.Module):
    """Features of one, learned length. Zheng, Pal, Savvides, "Ring loss", CVPR 2018, arXiv 1803.00130, eq. 2.

    ``L_R = 1/2 mean_i (|x_i| - R)^2``, on raw features, so that the classifier beside it must not normalise them. As in
    the authors' code R starts at the mean length of the first batch (over all workers) unless it is given.

    Args:
        radius: the start of R, > 0; ``None`` takes it from the first batch.
    """

    LEAST_RADIUS = 1e-3
    start: Tensor
    started: Tensor

    def __init__(self, radius: float | None = None) -> None:
        super().__init__()
        # R is start + drift: what is set once lies outside the parameter, which an engine may have sharded.
        self.drift = nn.Parameter(torch.zeros(1))
        self.register_buffer("start", torch.full((1,), 1.0 if radius is None else radius))
        self.register_buffer("started", torch.tensor(radius is not None))

    @property
    def radius(self) -> Tensor:
        """R, ``(1,)``."""
        return self.start + self.drift

    @float32_math
    def forward(self, embeddings: Tensor) -> Tensor:
        """The mean over this worker's samples ``(batch, dim)``."""
        check_embeddings(embeddings)
        norms = torch.linalg.vector_norm(embeddings, dim=1)
        if self.training and not self.started:
            total = collectives.all_reduce_sum(torch.stack([norms.detach().sum(), norms.new_tensor(float(len(norms)))]))
            self.start.copy_((total[0] / total[1]).detach().expand(1))
            self.started.fill_(True)
        radius = self.radius.to(norms.dtype).clamp_min(self.LEAST_RADIUS)
        loss: Tensor = (norms - radius).square().mean() / 2
        return loss


class PairVerification(nn.Module):
    """Pairs of the batch drawn together or apart. Sun et al., "DeepID2", NIPS 2014, eqs. 3-5.

    ::

        l2:  1/2 |f_i - f_j|^2                      same person
             1/2 max(0, m - |f_i - f_j|)^2          different people
        l1:  the same with the distance's l1 norm
        cosine:  1/2 (y_ij - sigmoid(w cos_ij + b))^2,  y in {0, 1},  w and b trained

    All pairs of the global batch are used; ``negative_fraction`` weighs both kinds as if that share were negative. The
    margin m has no gradient, which would take it to 0: every ``margin_pairs`` pairs it becomes the distance threshold
    with the fewest wrong decisions on the batch, counted with the same weights.

    Args:
        distance: ``l2``, ``l1`` or ``cosine``.
        margin: the start of m, > 0, in units of distance.
        margin_pairs: pairs between updates of m, over all workers; 0 keeps it.
        negative_fraction: weight of different people, in (0, 1).
    """

    margin: Tensor
    pairs_seen: Tensor

    def __init__(
        self,
        distance: str = "l2",
        margin: float = 1.0,
        margin_pairs: int = 200_000,
        negative_fraction: float = 0.5,
    ) -> None:
        super().__init__()
        check_choice("distance", distance, ("l2", "l1", "cosine"))
        self.distance, self.margin_pairs, self.negative_fraction = distance, margin_pairs, negative_fraction
        self.register_buffer("margin", torch.full((), float(margin)))
        self.register_buffer("pairs_seen", torch.zeros((), dtype=torch.int64))
        if distance == "cosine":
            self.slope, self.offset = nn.Parameter(torch.ones(1)), nn.Parameter(torch.zeros(1))

    @float32_math
    def forward(self, embeddings: Tensor, labels: Tensor, *, metrics: dict[str, Tensor] | None = None) -> Tensor:
        """This worker's share of the mean over pairs; ``(batch, dim)`` and ``(batch,)``.

        ``metrics`` receives ``pairs`` of the global batch, each counted once, how many are ``active`` (their loss is
        above 0), ``active_share`` and ``empty`` (1 for a batch without an active one).
        """
        check_embeddings(embeddings, labels)
        columns = global_rows(embeddings)
        same = same_label(labels)
        pairs = ~self_mask(same)
        distance = self._distances(embeddings, columns)
        weight = self._weights(same, pairs, distance.dtype)
        losses = self.pair_losses(distance, same)
        loss = (weight * losses).sum() * collectives.world_size()
        if metrics is not None:
            counts = torch.stack([pairs.sum(), (pairs & (losses > 0)).sum()])
            count, active = (collectives.all_reduce_sum(counts) // 2).to(losses.dtype)
            metrics.update(pairs=count, active=active, active_share=active / count.clamp_min(1))
            metrics["empty"] = (active == 0).to(losses.dtype)
        if self.training and self.distance != "cosine" and self.margin_pairs:
            self._move_margin(distance.detach(), same, weight, pairs)
        return loss

    def pair_losses(self, distance: Tensor, same: Tensor) -> Tensor:
        """Verif of each pair, from distances (cosines for ``cosine``)."""
        if self.distance == "cosine":
            agreement = torch.sigmoid(self.slope.to(distance.dtype) * distance + self.offset.to(distance.dtype))
            return (same.to(distance.dtype) - agreement).square() / 2
        apart = (self.margin.to(distance.dtype) - distance).clamp_min(0)
        return torch.where(same, distance, apart).square() / 2

    def _distances(self, anchors: Tensor, columns: Tensor) -> Tensor:
        if self.distance == "cosine":
            return nn.functional.normalize(anchors, dim=1) @ nn.functional.normalize(columns, dim=1).T
        if self.distance == "l1":
            return torch.cdist(anchors, columns, p=1)
        return euclidean(anchors, columns, squared=False)

    def _weights(self, same: Tensor, pairs: Tensor, dtype: torch.dtype) -> Tensor:
        """Of each pair, summing to 1 over the global batch, or to a kind's share where the other kind is missing."""
        positive, negative = same & pairs, ~same
        counts = collectives.all_reduce_sum(torch.stack([positive.sum(), negative.sum()])).to(dtype).clamp_min(1)
        return (1 - self.negative_fraction) * positive / counts[0] + self.negative_fraction * negative / counts[1]

    @torch.no_grad()
    def _move_margin(self, distance: Tensor, same: Tensor, weight: Tensor, pairs: Tensor) -> None:
        before = self.pairs_seen // self.margin_pairs
        self.pairs_seen += collectives.all_reduce_sum(pairs.sum()) // 2
        if self.pairs_seen // self.margin_pairs == before:
            return
        flat = [collectives.gather_no_grad(values.contiguous())[None].flatten() for values in (distance, same, weight)]
        order = flat[0].argsort()
        ascending, kind, share = flat[0][order], flat[1][order], flat[2][order]
        # A threshold behind the k-th pair is wrong about different people up to it, and about equal ones beyond it.
        wrong = (share * ~kind).cumsum(0) + (share * kind).sum() - (share * kind).cumsum(0)
        best = int(wrong.argmin())
        if bool(share.sum() > 0):
            following = ascending[min(best + 1, len(ascending) - 1)]
            self.margin.copy_((ascending[best] + following) / 2)
