"""Reductions over all classes, a chunk of classes at a time: no ``batch x classes`` matrix is ever stored.

The forward pass keeps a running maximum and a running sum per sample (online softmax; Milakov and Gimelshein, "Online
normalizer calculation for softmax", arXiv 1805.02867). The backward pass computes each chunk's terms again. Gradients
of the class rows are written chunk by chunk into one buffer that :class:`RowGradients` hands to autograd.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import Function

# Classes at a time. With 256 samples and dimensions a chunk's rows, keys, terms and gradients are 2 MB each, which stay
# in cache; smaller chunks only mean more operations, at each of which the threads wait for each other.
CHUNK = 2048

Rows = Mapping[str, Tensor]
Similarity = Callable[[Tensor, Rows], Tensor]
Terms = Callable[[Tensor, Mapping[str, Tensor]], Tensor]


class RowGradients:
    """Where one pass over the classes leaves the gradients of its rows, until the rows' own backward takes them.

    Autograd would add the gradients of the chunks, and that of the own classes, as one tensor of the size of all rows
    each. Here every reduction writes into one buffer.

    Args:
        rows: the row tensors.
        share: a factor on the gradients in the end.
    """

    def __init__(self, rows: Rows, share: float = 1.0) -> None:
        self.share = share
        self.wanted = {name: row.requires_grad for name, row in rows.items()}
        self._sums: dict[str, Tensor] = {}

    def buffer(self, name: str, like: Tensor) -> tuple[Tensor, bool]:
        """The buffer of a row tensor, and whether it is new: a new one must be written, an old one added to."""
        new = name not in self._sums
        if new:
            self._sums[name] = torch.empty_like(like)
        return self._sums[name], new

    def take(self, name: str, like: Tensor) -> Tensor:
        """The sum so far, given away."""
        return self._sums.pop(name) if name in self._sums else torch.zeros_like(like)


class EnterRows(Function):
    """Gives the rows of the samples' own classes, and later the gradient of all rows to autograd.

    Every reduction takes this node's outputs as inputs, though it does not read them, so that autograd calls its
    backward after theirs.
    """

    @staticmethod
    def forward(ctx: Any, gradients: RowGradients, names: tuple[str, ...], index: Tensor, *rows: Tensor) -> Any:
        """``index (owned,)`` picks rows; returns one ``(owned, ...)`` tensor per row tensor."""
        ctx.gradients, ctx.names = gradients, names
        ctx.save_for_backward(index, *rows)
        return tuple(row.detach()[index] for row in rows)

    @staticmethod
    def backward(ctx: Any, *own: Tensor) -> Any:
        """Adds the gradients of the own rows to the collected ones."""
        index, *rows = ctx.saved_tensors
        totals: list[Tensor | None] = []
        for name, row, gradient in zip(ctx.names, rows, own, strict=True):
            if not ctx.gradients.wanted[name]:
                totals.append(None)
                continue
            total = ctx.gradients.take(name, row).index_add_(0, index, gradient.to(row.dtype))
            totals.append(total if ctx.gradients.share == 1 else total.mul_(ctx.gradients.share))
        return (None, None, None, *totals)


class OwnEntries:
    """Where the samples' own classes stand among the rows, chunk by chunk.

    Args:
        positions: ``(batch,)`` int64, each sample's row; -1 where another worker holds it.
    """

    def __init__(self, positions: Tensor) -> None:
        rows, samples = positions.sort(stable=True)
        self._rows, self._samples = rows, samples
        self._sorted: list[int] = rows.tolist()

    def inside(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """(samples, columns) of the own entries in the chunk ``[start, stop)``."""
        from bisect import bisect_left

        low, high = bisect_left(self._sorted, start), bisect_left(self._sorted, stop)
        return self._samples[low:high], self._rows[low:high] - start


@dataclass
class ClassPass:
    """What the reductions of one forward pass share.

    ``rows`` are detached. ``best (batch, 1)`` is filled by the first reduction: the largest similarity to a class other
    than the own.
    """

    rows: dict[str, Tensor]
    own: OwnEntries
    gradients: RowGradients
    product_type: torch.dtype | None = None
    best: Tensor | None = None
    chunk: int = field(default_factory=lambda: CHUNK)
    names: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.names = tuple(self.rows)

    @property
    def count(self) -> int:
        """Rows on this worker that take part."""
        return len(next(iter(self.rows.values())))

    def chunks(self) -> Iterator[tuple[int, int]]:
        """(start, stop) of each chunk."""
        for start in range(0, self.count, self.chunk):
            yield start, min(start + self.chunk, self.count)


class Reduction(Function):
    """Reduces ``terms(similarity)`` over the classes other than the own, for any rules written in plain torch."""

    @staticmethod
    def forward(
        ctx: Any,
        classes: ClassPass,
        how: Literal["logsumexp", "sum"],
        similarity: Similarity,
        terms: Terms,
        names: tuple[str, ...],
        embeddings: Tensor,
        *inputs: Tensor,
    ) -> Any:
        """``inputs`` are the columns called ``names``, then the outputs of :class:`EnterRows`."""
        columns = dict(zip(names, inputs, strict=False))
        largest = embeddings.new_full((len(embeddings), 1), -math.inf)
        total, best = torch.zeros_like(largest), largest
        blank = -math.inf if how == "logsumexp" else 0.0
        for start, stop in classes.chunks():
            own = classes.own.inside(start, stop)
            values = similarity(embeddings, {name: row[start:stop] for name, row in classes.rows.items()})
            term = terms(values, columns).clone()
            term[own] = blank
            if classes.best is None:
                others = values.index_put(own, values.new_tensor(-math.inf))
                best = torch.maximum(best, others.amax(dim=1, keepdim=True))
            if how == "sum":
                total += term.sum(dim=1, keepdim=True)
                continue
            raised = torch.maximum(largest, term.amax(dim=1, keepdim=True))
            total = total * decay(largest, raised) + term.sub_(finite(raised)).exp_().sum(dim=1, keepdim=True)
            largest = raised
        if classes.best is None:
            classes.best = best
        result = total if how == "sum" else total.log() + finite(largest)
        ctx.classes, ctx.how, ctx.similarity, ctx.terms, ctx.names = classes, how, similarity, terms, names
        ctx.save_for_backward(embeddings, result, *inputs[: len(names)])
        ctx.tokens = len(inputs) - len(names)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """Each chunk's terms once more, with autograd inside the chunk only."""
        classes: ClassPass = ctx.classes
        embeddings, result, *columns = ctx.saved_tensors
        leaves = [value.detach().requires_grad_(value.is_floating_point()) for value in (embeddings, *columns)]
        sums: list[Tensor | None] = [torch.zeros_like(leaf) if leaf.requires_grad else None for leaf in leaves]
        wanted = [name for name in classes.names if classes.gradients.wanted[name]]
        buffers = {name: classes.gradients.buffer(name, classes.rows[name]) for name in wanted}
        for start, stop in classes.chunks():
            rows = {name: row[start:stop].detach().requires_grad_(name in wanted) for name, row in classes.rows.items()}
            with torch.enable_grad():
                term = ctx.terms(ctx.similarity(leaves[0], rows), dict(zip(ctx.names, leaves[1:], strict=True)))
            weight = gradients[0].expand_as(term).clone()
            if ctx.how == "logsumexp":
                weight *= (term.detach() - finite(result)).exp_()
            weight[classes.own.inside(start, stop)] = 0
            asked = [leaf for leaf in leaves if leaf.requires_grad] + [rows[name] for name in wanted]
            found = iter(torch.autograd.grad(term, asked, weight, allow_unused=True))
            for leaf, total in zip(leaves, sums, strict=True):
                gradient = next(found) if leaf.requires_grad else None
                if gradient is not None and total is not None:
                    total += gradient
            for (buffer, new), gradient in zip(buffers.values(), found, strict=True):
                _store(buffer[start:stop], gradient, new)
        return (None, None, None, None, None, *sums, *[None] * ctx.tokens)


def _store(target: Tensor, gradient: Tensor | None, new: bool) -> None:
    if new:
        target.zero_() if gradient is None else target.copy_(gradient)
    elif gradient is not None:
        target += gradient


def finite(values: Tensor) -> Tensor:
    """Zero for the -inf of an empty maximum, so that differences with it are no NaN; NaN stays."""
    return values.masked_fill(values == -math.inf, 0.0)


def decay(before: Tensor, after: Tensor) -> Tensor:
    """What a running sum is multiplied by when its maximum rises."""
    return (before - finite(after)).exp_()
