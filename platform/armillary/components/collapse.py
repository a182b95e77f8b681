"""Whether an embedding still says anything: spread, effective rank, use of prototypes, over an epoch.

    self.collapse = CollapseMonitor()                    # in build
    self.collapse.update(embeddings)                     # in forward
    return self.collapse.metrics()                       # in epoch_metrics

The training loop reads the metrics by their names and marks a run whose last epoch has collapsed (:func:`verdict`).
(Catalog: collapse_monitors.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from armillary.collectives import all_reduce_sum
from armillary.losses.tensors import normalize

STD, RANK, DIM = "embedding_std", "effective_rank", "embedding_dim"
USED, SHARPNESS, COUNT = "prototype_perplexity", "assignment_entropy", "prototype_count"
# A spread below this share of an isotropic embedding's: the mean cosine of two samples is above 0.99.
_LEAST_SPREAD = 0.1
# Directions beyond the first, as a share of all.
_LEAST_RANK = 0.01
_LEAST_USED = 1.5
_MOST_ENTROPY = 0.999


def effective_rank(second_moment: Tensor) -> Tensor:
    """How many directions rows span: the exponential of the entropy of their singular values (Roy and Vetterli 2007).

    Args:
        second_moment: ``Z^T Z`` of the rows Z, ``(dim, dim)``, in any scale.

    Returns:
        A float64 scalar in [1, dim].
    """
    values = torch.linalg.eigvalsh(second_moment.double()).clamp_min(0).sqrt()
    share = values / values.sum().clamp_min(1e-300)
    rank: Tensor = torch.special.entr(share).sum().exp().clamp_min(1.0)
    return rank


def channel_std(total: Tensor, second_moment: Tensor, count: Tensor) -> Tensor:
    """Mean over channels of the standard deviation over rows (with ``count - 1``), from their sums."""
    mean = total / count
    variance = (second_moment.diagonal() / count - mean.square()).clamp_min(0) * count / (count - 1).clamp_min(1)
    return variance.sqrt().mean()


class CollapseMonitor(nn.Module):
    """Sums of one epoch, on this worker; metrics are of all workers.

    It keeps no state beyond an epoch, and costs one ``(dim, batch) x (batch, dim)`` product a step.
    """

    def __init__(self) -> None:
        super().__init__()
        self._sums: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self, embeddings: Tensor) -> None:
        """Counts embeddings ``(rows, dim)``; their length does not matter.

        Evaluation passes are not counted.
        """
        if not self.training:
            return
        with torch.autocast(embeddings.device.type, enabled=False):
            rows = normalize(embeddings.detach().float())
            self._add("second_moment", rows.T @ rows)
            self._add("total", rows.sum(dim=0))
            self._add("rows", rows.new_full((), len(rows)))

    @torch.no_grad()
    def update_assignments(self, shares: Tensor) -> None:
        """Counts assignments ``(rows, prototypes)``, each row non-negative with sum 1."""
        if not self.training:
            return
        shares = shares.detach().float()
        self._add("usage", shares.sum(dim=0))
        self._add("entropy", torch.special.entr(shares).sum())
        self._add("assigned", shares.new_full((), len(shares)))

    def metrics(self) -> dict[str, Tensor]:
        """What the epoch's rows say, equal on all workers; the next epoch starts from nothing.

        ``embedding_std``: the standard deviation of normalised embeddings times ``sqrt(dim)``, 1 where they spread
        evenly, 0 where they are one point (Chen and He, SimSiam, 2021). ``effective_rank`` of the uncentred
        embeddings. ``assignment_entropy``: of one sample's shares, over ``log(prototypes)``. ``prototype_perplexity``:
        the exponential of the mean shares' entropy, how many prototypes are used.
        """
        sums = {name: all_reduce_sum(self._sums[name]) for name in sorted(self._sums)}
        self._sums = {}
        found: dict[str, Tensor] = {}
        if "rows" in sums:
            dim = len(sums["total"])
            spread = channel_std(sums["total"], sums["second_moment"], sums["rows"])
            found[STD] = spread * math.sqrt(dim)
            found[RANK] = effective_rank(sums["second_moment"])
            found[DIM] = spread.new_full((), dim)
        if "assigned" in sums:
            count = len(sums["usage"])
            found[USED] = torch.special.entr(sums["usage"] / sums["assigned"]).sum().exp()
            found[SHARPNESS] = sums["entropy"] / sums["assigned"] / math.log(max(count, 2))
            found[COUNT] = found[USED].new_full((), count)
        return {name: value.float() for name, value in found.items()}

    def _add(self, name: str, value: Tensor) -> None:
        self._sums[name] = self._sums[name] + value.double() if name in self._sums else value.double()


def verdict(metrics: Mapping[str, float], prefix: str = "train/") -> str | None:
    """Why an epoch's embedding counts as collapsed, in words; ``None`` when it does not, or nothing was measured.

    Args:
        metrics: an epoch's metrics by name.
        prefix: in front of this module's names.
    """
    spread, rank, dim, used, entropy = (metrics.get(prefix + name) for name in (STD, RANK, DIM, USED, SHARPNESS))
    if spread is not None and spread < _LEAST_SPREAD:
        return f"all samples have nearly one embedding: its spread is {spread:.3g} of an even one's"
    if rank is not None and dim is not None and rank < 1 + _LEAST_RANK * (dim - 1):
        return f"embeddings lie on a line: their effective rank is {rank:.3g} of {dim:.0f}"
    if used is not None and used < _LEAST_USED:
        return f"nearly all samples belong to one prototype: {used:.3g} are in use"
    if entropy is not None and entropy > _MOST_ENTROPY:
        return f"assignments are uniform: the entropy of a sample's is {entropy:.4g} of the largest"
    return None
