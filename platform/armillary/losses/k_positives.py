"""Queries against a labelled queue: k drawn positives (KCL), and fixed targets on the sphere (TSC)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from armillary.losses.blocks import Block, Partners, against_constants
from armillary.losses.slopes import empty_logit, exponentials_with_, with_slope
from armillary.losses.tensors import check_choice, check_embeddings, float32_math, normalize, not_a_number_guard


class KPositives(nn.Module):
    """k-positive contrastive loss, and with targets the targeted one.

    Kang et al., "Exploring Balanced Feature Spaces", ICLR 2021; T. Li et al., "Targeted Supervised Contrastive Learning
    for Long-Tailed Recognition", CVPR 2022, arXiv 2111.13998, eq. 4. For a query v with its key v', drawn positives V+
    of its class among the queue V, and targets T of which t belongs to its class::

        d   = exp(v.v' / tau) + sum_{u in V and T} exp(v.u / tau)
        KCL = -1/(|V+| + 1) sum_{u in V+ and v'} log( exp(v.u / tau) / d )        T empty
        TSC = KCL's sum with T in d  -  lambda log( exp(v.t / tau) / d )

    The authors' code of TSC divides both parts by ``|V+| + 2`` (``form="released_code"``), which makes lambda's share
    smaller. That code of KCL draws at random; another public one takes the first k matches of the queue. Undrawn
    positives stay in d (``unused="keep"``, the paper) or leave it. A public option that means to drop them sets their
    logits to 0, which leaves exp(0) in d; here they are gone.

    Args:
        temperature: tau > 0.
        unused: ``keep`` or ``drop``.
        target_weight: lambda >= 0.
        form: ``paper`` or ``released_code``, of the targeted loss.

    Raises:
        ValueError: an option out of range; in ``forward`` without ``same`` where that is needed.
    """

    def __init__(
        self, temperature: float = 0.07, unused: str = "keep", target_weight: float = 1.0, form: str = "paper"
    ) -> None:
        super().__init__()
        check_choice("unused", unused, ("keep", "drop"))
        check_choice("form", form, ("paper", "released_code"))
        if not (temperature > 0 and target_weight >= 0):
            raise ValueError(
                f"temperature must be above 0 and target_weight at least 0, found {temperature}, {target_weight}"
            )
        self.temperature, self.unused, self.target_weight, self.form = temperature, unused, target_weight, form

    @float32_math
    def forward(
        self,
        queries: Tensor,
        keys: Tensor,
        queue: Tensor,
        drawn: Tensor,
        *,
        same: Tensor | None = None,
        targets: Tensor | None = None,
        target: Tensor | None = None,
        metrics: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """The mean over this worker's queries.

        Args:
            queries: ``(batch, dim)``; only they receive a gradient.
            keys: ``(batch, dim)``.
            queue: ``(K, dim)``.
            drawn: ``(batch, k)`` int64, columns of the queue that are the query's positives, each once; -1 for none.
            same: ``(batch, K)`` bool, keys of the query's class; only ``unused="drop"`` looks at it, and needs it.
            targets: ``(C, dim)``.
            target: ``(batch,)`` int64, the row of ``targets`` of each query's class; -1 for none.
            metrics: receives ``positive_cosine``, of query and key, and ``positives``, drawn ones of a query.
        """
        check_embeddings(queries)
        if self.unused == "drop" and same is None:
            raise ValueError('unused="drop" needs to be told the keys of the class, same')
        guard, taken = not_a_number_guard(queries), drawn >= 0
        v, key = normalize(queries), normalize(keys.detach()).to(queries.dtype)
        columns, count = normalize(queue.detach()).to(v.dtype), taken.sum(dim=1).to(v.dtype)
        place = None
        if targets is not None and target is not None:
            columns = torch.cat([columns, normalize(targets.detach()).to(v.dtype)])
            place = len(queue) + target.clamp_min(0)[:, None]
        weights = self._weights(count, None if place is None else target)

        def of_block(block: Block) -> tuple[Tensor, ...]:
            rows = block.rows
            positives = Partners(drawn[rows].clamp_min(0), taken[rows])
            dropped = None if same is None or self.unused == "keep" else _without(same[rows], positives)
            where = None if place is None else place[rows]
            few = weights[0][rows], weights[1][rows]
            return self._of_block(block, key[rows], positives, dropped, where, few)

        losses, positive = against_constants(of_block, v, columns)
        if metrics is not None:
            metrics["positive_cosine"] = positive.mean()
            metrics["positives"] = count.mean()
        loss: Tensor = losses.mean() + guard
        return loss

    def _weights(self, count: Tensor, target: Tensor | None) -> tuple[Tensor, Tensor]:
        """Weights of each positive, and of the target, ``(batch,)``."""
        released = target is not None and self.form == "released_code"
        each = 1 / (count + (2 if released else 1))
        if target is None:
            return each, torch.zeros_like(each)
        of_target = self.target_weight * (each if released else torch.ones_like(each))
        return each, torch.where(target >= 0, of_target, 0)

    def _of_block(
        self,
        block: Block,
        keys: Tensor,
        positives: Partners,
        dropped: Tensor | None,
        place: Tensor | None,
        weights: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, ...]:
        """Losses, and cosines with the own key. Positives are read out of the one product with all columns."""
        cosines = (block.anchors * keys).sum(dim=1)
        own, (each, of_target) = cosines / self.temperature, weights
        logits = (block.anchors / self.temperature) @ block.columns.T
        with torch.no_grad():
            matrix, fixed = logits.detach(), own.detach()
            chosen = each * (fixed + positives.of(matrix, 0.0).sum(dim=1))
            all_weights = each * (1 + positives.taken.sum(dim=1)) + of_target
            if place is not None:
                chosen += of_target * matrix.gather(1, place)[:, 0]
            if dropped is not None:
                matrix[:, : dropped.shape[1]].masked_fill_(dropped, empty_logit(matrix.dtype))
            largest, total, share = exponentials_with_(matrix, fixed[:, None])
            losses = all_weights * (total.log() + largest) - chosen
            # Softmax minus weights, before anything is multiplied with it.
            scale = all_weights / total
            matrix.scatter_add_(1, positives.columns, positives.taken * -(each / scale)[:, None])
            if place is not None:
                matrix.scatter_add_(1, place, -(of_target / scale)[:, None])
            by_own = scale * share[:, 0] - each
        return with_slope(logits, losses, matrix, scale) + by_own * (own - fixed), cosines.detach()


def _without(mask: Tensor, positives: Partners) -> Tensor:
    """A copy of a ``(rows, columns)`` mask that is False at the positives."""
    columns = mask.shape[1]
    # Places that are not taken write into a column that is cut off again.
    place = positives.columns.masked_fill(~positives.taken, columns)
    return torch.nn.functional.pad(mask, (0, 1)).scatter_(1, place, False)[:, :columns]


def uniform_targets(count: int, dim: int, temperature: float, seed: int, steps: int = 1000) -> Tensor:
    """Directions that keep away from each other as far as they can, ``(count, dim)``; T. Li et al. 2022, eq. 3.

    They minimise ``mean_i log sum_j exp(t_i.t_j / tau)``. With ``count <= dim + 1`` that is the regular simplex, whose
    products are -1 / (count - 1), and is written down; otherwise Adam finds it (the authors' code takes 10,000 steps at
    1e-3, here they are fewer and shrink).

    Args:
        count: C, 1 or more.
        dim: of the sphere's space.
        temperature: tau > 0.
        seed: of the rotation, or the start.
        steps: of Adam.
    """
    draw = torch.Generator().manual_seed(seed)
    if count <= dim + 1:
        rotation = torch.linalg.qr(torch.randn(dim, dim, generator=draw, dtype=torch.float64)).Q
        centred = torch.eye(count, dtype=torch.float64) - 1 / count
        # The centred unit vectors lie in count - 1 dimensions; these are their coordinates there.
        basis = torch.linalg.svd(centred).Vh[: max(1, count - 1)]
        corners = normalize(centred @ basis.T) if count > 1 else torch.ones(1, 1, dtype=torch.float64)
        targets: Tensor = (corners @ rotation[: corners.shape[1]]).float()
        return targets
    points = torch.randn(count, dim, generator=draw).requires_grad_()
    optimizer = torch.optim.Adam([points], lr=0.1)
    with torch.enable_grad():
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / steps)
            directions = normalize(points)
            loss = (directions @ directions.T / temperature).logsumexp(dim=1).mean()
            (points.grad,) = torch.autograd.grad(loss, points)
            optimizer.step()
    found: Tensor = normalize(points.detach())
    return found


def assign_targets(targets: Tensor, means: Tensor) -> Tensor:
    """The target of each class, ``(C,)`` int64: the one-to-one assignment with the least total distance to class means.

    Args:
        targets: ``(C, dim)`` of length 1.
        means: ``(C, dim)``, of each class.
    """
    from scipy.optimize import linear_sum_assignment

    distance = torch.cdist(normalize(means).double(), targets.double())
    _, column = linear_sum_assignment(distance.cpu().numpy())
    return torch.as_tensor(column, dtype=torch.int64, device=targets.device)
