"""Whether an embedding still says anything: spread, effective rank, use of prototypes, over an epoch.

    self.collapse = CollapseMonitor()                    # in build
    self.collapse.update(embeddings, projections)        # in forward
    return self.collapse.metrics()                       # in epoch_metrics

A loss compares projections, not embeddings, and they collapse first: for some time the encoder's embeddings still
spread while nothing teaches them any more. Both are watched. The training loop reads the metrics by their names and
marks a run whose last epoch has collapsed (:func:`verdict`). (Catalog: collapse_monitors.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from armillary.collectives import all_reduce_sum
from armillary.losses.tensors import normalize

STD, RANK, DIM = "embedding_std", "effective_rank", "embedding_dim"
PROJECTION_STD, PROJECTION_RANK, PROJECTION_DIM = "projection_std", "projection_rank", "projection_dim"
CENTRED = "projection_centred"
USED, SHARPNESS, COUNT = "prototype_perplexity", "assignment_entropy", "prototype_count"
# A spread below this share of an isotropic embedding's: the mean cosine of two samples is above 0.99.
_LEAST_SPREAD = 0.1
# The same of projections behind a batch norm, at a mean cosine of 0.64. It centres them, so that healthy ones spread by
# 0.9 and more; SimSiam without stop-gradient falls below 0.6 in a few epochs.
_LEAST_CENTRED = 0.6
# Of others, at a mean cosine of 0.96. Nothing takes from the projections of BYOL and SwAV what they have in common, and
# short trainings that tell people apart better than before leave a spread of 0.35 to 0.8.
_LEAST_PROJECTED = 0.2
# Directions beyond the first, as a share of all.
_LEAST_RANK = 0.01
_LEAST_USED = 1.5
_MOST_ENTROPY = 0.999
# The rank is taken of so many channels at most; a projector may have eight thousand.
_CHANNELS = 512


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


def channel_std(total: Tensor, squares: Tensor, count: Tensor) -> Tensor:
    """Mean over channels of the standard deviation over rows (with ``count - 1``), from their sums ``(dim,)``."""
    mean = total / count
    variance = (squares / count - mean.square()).clamp_min(0) * count / (count - 1).clamp_min(1)
    return variance.sqrt().mean()


_KINDS = {"embedding": (STD, RANK, DIM), "projection": (PROJECTION_STD, PROJECTION_RANK, PROJECTION_DIM)}


class CollapseMonitor(nn.Module):
    """Sums of one epoch, on this worker; metrics are of all workers.

    It keeps no state beyond an epoch. A step costs a ``(dim, batch) x (batch, dim)`` product for embeddings and one for
    projections, of 512 channels at most.

    Args:
        centred: whether projections come from a batch norm and so count as collapsed early.
    """

    def __init__(self, centred: bool = False) -> None:
        super().__init__()
        self.centred = centred
        self._sums: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self, embeddings: Tensor, projections: Tensor | None = None) -> None:
        """Counts embeddings ``(rows, dim)`` and what the loss compares of them ``(rows, projection_dim)``.

        Lengths do not matter. Evaluation passes are not counted.
        """
        if not self.training:
            return
        self._count("embedding", embeddings)
        if projections is not None:
            self._count("projection", projections)

    def _count(self, kind: str, vectors: Tensor) -> None:
        with torch.autocast(vectors.device.type, enabled=False):
            rows = normalize(vectors.detach().float())
            part = rows[:, :_CHANNELS]
            self._add(f"{kind}_moment", part.T @ part)
            self._add(f"{kind}_squares", rows.square().sum(dim=0))
            self._add(f"{kind}_total", rows.sum(dim=0))
            self._add(f"{kind}_rows", rows.new_full((), len(rows)))

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
        embeddings. ``projection_std`` and ``projection_rank``: the same of projections, where there are any; ranks are
        those of the first 512 channels. ``projection_centred``: 1 for those behind a batch norm.
        ``assignment_entropy``: of one sample's shares, over ``log(prototypes)``. ``prototype_perplexity``: the
        exponential of the mean shares' entropy, how many prototypes are used.
        """
        sums = {name: all_reduce_sum(self._sums[name]) for name in sorted(self._sums)}
        self._sums = {}
        found: dict[str, Tensor] = {}
        for kind, names in _KINDS.items():
            if f"{kind}_rows" in sums:
                total, moment = sums[f"{kind}_total"], sums[f"{kind}_moment"]
                spread = channel_std(total, sums[f"{kind}_squares"], sums[f"{kind}_rows"]) * math.sqrt(len(total))
                values = (spread, effective_rank(moment), spread.new_full((), len(moment)))
                found.update(zip(names, values, strict=True))
                if kind == "projection":
                    found[CENTRED] = spread.new_full((), self.centred)
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
    projected = _LEAST_CENTRED if metrics.get(prefix + CENTRED) else _LEAST_PROJECTED
    for kind, names in _KINDS.items():
        least = _LEAST_SPREAD if kind == "embedding" else projected
        reason = _collapsed(kind, least, *(metrics.get(prefix + name) for name in names))
        if reason is not None:
            return reason
    used, entropy = (metrics.get(prefix + name) for name in (USED, SHARPNESS))
    if used is not None and used < _LEAST_USED:
        return f"nearly all samples belong to one prototype: {used:.3g} are in use"
    if entropy is not None and entropy > _MOST_ENTROPY:
        return f"assignments are uniform: the entropy of a sample's is {entropy:.4g} of the largest"
    return None


def _collapsed(kind: str, least: float, spread: float | None, rank: float | None, dim: float | None) -> str | None:
    """Whether embeddings or projections are one point or one line."""
    if spread is not None and spread < _LEAST_SPREAD:
        return f"all samples have nearly one {kind}: its spread is {spread:.3g} of an even one's"
    if spread is not None and spread < least:
        cosine = max(1 - spread**2, 0.0)
        return f"{kind}s draw together: their spread is {spread:.3g} of an even one's, their mean cosine {cosine:.3g}"
    if rank is not None and dim is not None and rank < 1 + _LEAST_RANK * (dim - 1):
        return f"{kind}s lie on a line: their effective rank is {rank:.3g} of {dim:.0f}"
    return None
