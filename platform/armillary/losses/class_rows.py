"""The rows of a class head as one batch sees them: all on this worker, or split over the workers.

Split, each worker owns ``ceil(C / N)`` rows. Embeddings and labels are gathered, never the rows: every worker reduces
over its own rows for the samples of all workers, the results are combined over workers, and each worker keeps those of
its own samples. Gradients to embeddings are summed back to their owner; those of a row are complete where the row is,
and divided by the number of workers, so that they belong to the mean of the workers' losses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from armillary import collectives
from armillary.losses.class_chunks import ClassPass, EnterRows, OwnEntries, Reduction, RowGradients, Rows, Similarity
from armillary.losses.cosine_chunks import scaled_log_sum_exp

# Samples at a time that are compared with each other's own rows to find those with their own.
PAIRS = 128

# Positions of the rows that a step uses, sorted, given the positions that it must use: class sampling.
RowSampler = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class RowSplit:
    """Which rows this worker holds: ``[first, first + count)`` of ``total``."""

    first: int
    count: int
    total: int

    @classmethod
    def of_worker(cls, total: int, rank: int, workers: int) -> RowSplit:
        """The ``rank``-th part: ``ceil(total / workers)`` rows, fewer or none at the end."""
        each = math.ceil(total / workers)
        first = min(rank * each, total)
        return cls(first, min(each, total - first), total)


class Classes:
    """All classes, for the samples of one forward pass.

    Args:
        rows: this worker's row tensors by name, each ``(rows, ...)``.
        split: which rows they are, or ``None`` where every worker holds all.
        embeddings: ``(batch, dim)`` of this worker's samples.
        labels: ``(batch, 1)``.
        similarity: the head's own.
        plain: ``cosine`` or ``linear`` where the similarity is just that, for the quick way.
        sampler: chooses the rows that take part; ``None`` takes all.
        product_type: half-precision type of large matrix products, or ``None``.
    """

    def __init__(
        self,
        rows: Rows,
        split: RowSplit | None,
        embeddings: Tensor,
        labels: Tensor,
        *,
        similarity: Similarity,
        plain: str | None = None,
        sampler: RowSampler | None = None,
        product_type: torch.dtype | None = None,
    ) -> None:
        self.split, self.similarity, self.plain = split, similarity, plain
        self.batch = len(embeddings)
        self.embeddings = collectives.all_gather(embeddings) if split else embeddings
        everyone = (collectives.gather_no_grad(labels) if split else labels).squeeze(1)
        first = split.first if split else 0
        count = len(next(iter(rows.values())))
        owned = (everyone >= first) & (everyone < first + count)
        positions = torch.where(owned, everyone - first, -1)
        self.sampled: tuple[Tensor, dict[str, Tensor]] | None = None
        self._ids: Tensor | None = None
        if sampler is not None:
            self._ids = sampler(positions[owned].unique())
            rows = {name: row[self._ids] for name, row in rows.items()}
            if split:
                rows = {name: row.detach().requires_grad_(row.requires_grad) for name, row in rows.items()}
                self.sampled = (self._ids, rows)
            positions = torch.where(owned, torch.searchsorted(self._ids, positions.clamp_min(0)), -1)
        self._first, self._owned = first, owned.nonzero().squeeze(1)
        gradients = RowGradients(rows, 1 / collectives.world_size() if split else 1.0)
        self._pass = ClassPass(
            {name: row.detach() for name, row in rows.items()}, OwnEntries(positions), gradients, product_type
        )
        index = positions[self._owned]
        entered = EnterRows.apply(gradients, tuple(rows), index, *rows.values())
        self._own_rows = dict(zip(rows, entered, strict=True))

    def own(self, columns: Callable[[Tensor, Rows], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Columns ``(batch, k)`` that only the holder of a sample's own row can compute.

        Args:
            columns: gives them from embeddings ``(n, dim)`` and their own rows ``(n, ...)``.
        """
        found = columns(self.embeddings[self._owned], self._own_rows)
        return {name: self._mine(self._from_owners(values)) for name, values in found.items()}

    def _from_owners(self, values: Tensor) -> Tensor:
        if not self.split:
            return values
        places = values.new_zeros(len(self.embeddings), *values.shape[1:])
        return collectives.all_reduce_sum(places.index_put((self._owned,), values))

    def _mine(self, values: Tensor) -> Tensor:
        """This worker's samples out of everyone's."""
        if not self.split:
            return values
        start = collectives.rank() * self.batch
        return values[start : start + self.batch]

    def paired_similarity(self, embeddings: Tensor, rows: Rows) -> Tensor:
        """Similarity of each embedding to the row beside it, ``(n, 1)``."""
        parts = []
        # Once even for no sample: every worker must have the same graph, or their backward passes would not meet.
        for start in range(0, max(1, len(embeddings)), PAIRS):
            these = slice(start, start + PAIRS)
            square = self.similarity(embeddings[these], {name: row[these] for name, row in rows.items()})
            parts.append(square.diagonal()[:, None])
        return torch.cat(parts)

    def log_sum_exp(
        self, terms: Callable[[Tensor, Mapping[str, Tensor]], Tensor], columns: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """``log sum_{j != y_i} exp(terms_ij)`` over all classes, ``(batch, 1)``; -inf where there is no other class.

        Args:
            terms: gives ``(n, classes)`` from the similarities of some classes ``(n, classes)`` and the columns.
            columns: per-sample columns ``(batch, k)``, with gradient.
        """
        return self._combined(self._reduce("logsumexp", terms, columns or {}))

    def sum(
        self, terms: Callable[[Tensor, Mapping[str, Tensor]], Tensor], columns: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """``sum_{j != y_i} terms_ij`` over all classes, ``(batch, 1)``; arguments as for :meth:`log_sum_exp`."""
        local = self._reduce("sum", terms, columns or {})
        return self._mine(collectives.all_reduce_sum(local)) if self.split else local

    def scaled_log_sum_exp(self, scale: Tensor) -> Tensor:
        """``log sum_{j != y_i} exp(s_i sim_ij)``: the quick way for plain similarities; scale is ``(batch, 1)``."""
        if self.plain is None:
            return self.log_sum_exp(lambda similarity, columns: columns["scale"] * similarity, {"scale": scale})
        everyone = collectives.all_gather(scale.contiguous()) if self.split else scale
        return self._combined(
            scaled_log_sum_exp(self._pass, self.plain, self.embeddings, everyone, tuple(self._own_rows.values()))
        )

    def _reduce(self, how: str, terms: Callable[..., Tensor], columns: Mapping[str, Tensor]) -> Tensor:
        values = list(columns.values())
        if self.split and values:
            widths = [value.shape[1] for value in values]
            values = list(collectives.all_gather(torch.cat(values, dim=1)).split(widths, dim=1))
        result: Tensor = Reduction.apply(
            self._pass, how, self.similarity, terms, tuple(columns), self.embeddings, *values, *self._own_rows.values()
        )
        return result

    def _combined(self, local: Tensor) -> Tensor:
        """Log-sum-exps over each worker's rows to those over all rows, for this worker's samples."""
        if not self.split:
            return local
        largest = collectives.all_reduce_max(local)
        largest = largest.masked_fill(largest == -math.inf, 0.0)
        total = self._mine(collectives.all_reduce_sum((local - largest).exp()))
        empty = total == 0
        logarithm = total.masked_fill(empty, 1.0).log() + self._mine(largest)
        return logarithm.masked_fill(empty, -math.inf)

    def best_other(self) -> Tensor:
        """The largest similarity to a class but the own, ``(batch, 1)``; known after the first reduction."""
        best = self._pass.best
        if best is None:
            raise RuntimeError("no reduction over the classes has run yet")
        return self._mine(collectives.all_reduce_max(best)) if self.split else best

    @torch.no_grad()
    def nearest_other(self) -> tuple[Tensor, Tensor]:
        """(similarity, class) of the most similar class but the own, each ``(batch, 1)``: a pass of its own."""
        best = self.embeddings.new_full((len(self.embeddings),), -math.inf)
        row = torch.zeros(len(best), dtype=torch.int64, device=best.device)
        for start, stop in self._pass.chunks():
            values = self.similarity(
                self.embeddings, {name: part[start:stop] for name, part in self._pass.rows.items()}
            )
            values[self._pass.own.inside(start, stop)] = -math.inf
            highest, column = values.max(dim=1)
            row = torch.where(highest > best, start + column, row)
            best = torch.maximum(best, highest)
        number = self._first + (row if self._ids is None else self._ids[row] if len(self._ids) else row)
        if not self.split:
            return best[:, None], number[:, None]
        top = collectives.all_reduce_max(best)
        number = torch.where(best == top, number, self.split.total)
        return self._mine(top)[:, None], self._mine(-collectives.all_reduce_max(-number))[:, None]
