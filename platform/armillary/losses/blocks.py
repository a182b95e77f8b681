"""Anchors against columns, one block of anchors at a time: memory linear in the batch, matrices that stay in cache.

A batch-coupled loss is a function of an ``(anchors, columns)`` matrix that nobody needs as a whole. Here the function
sees some anchors against all columns, and its gradient is taken before the next block starts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from armillary.losses.global_batch import first_column, global_rows
from armillary.losses.slopes import empty_logit, log_sum_exp_

# Elements of one block's matrix: 4 MB in float32. Smaller ones fit a core's cache, but waste time between operations.
BLOCK_ELEMENTS = 2**20


@dataclass(frozen=True)
class Partners:
    """The positives of each anchor: their ``columns (rows, most)``, and which of these places are ``taken``."""

    columns: Tensor
    taken: Tensor

    def of(self, matrix: Tensor, absent: float) -> Tensor:
        """The values of a ``(rows, columns)`` matrix at the positives, ``(rows, most)``; ``absent`` where none is."""
        return matrix.gather(1, self.columns).masked_fill(~self.taken, absent)


@dataclass(frozen=True)
class Block:
    """Some anchors against all columns.

    Args:
        anchors: ``(rows, dim)``, this worker's.
        columns: ``(columns, dim)``, all workers' in rank order, further ones (a queue) after them.
        keys: ``(rows,)`` integers; anchors and columns of equal key belong together.
        column_keys: ``(columns,)``.
        labels: ``(rows,)``; only columns of another label are negatives. Mostly the keys themselves.
        column_labels: ``(columns,)``.
        rows: which of this worker's anchors they are.
        first: the column in which the block's first anchor stands.
    """

    anchors: Tensor
    columns: Tensor
    keys: Tensor
    column_keys: Tensor
    labels: Tensor
    column_labels: Tensor
    rows: slice
    first: int

    @cached_property
    def same(self) -> Tensor:
        """``(rows, columns)`` bool: equal keys, the anchor itself included."""
        return self.keys[:, None] == self.column_keys[None, :]

    @cached_property
    def positive(self) -> Tensor:
        """``(rows, columns)`` bool: equal keys, without the anchor itself."""
        return self.without_self(self.same)

    @cached_property
    def negative(self) -> Tensor:
        """``(rows, columns)`` bool: another key and another label."""
        other = self.labels[:, None] != self.column_labels[None, :]
        return other if self.labels is self.keys else other & ~self.same

    @cached_property
    def others(self) -> Tensor:
        """``(rows, columns)`` bool: everything but the anchor itself."""
        return self.without_self(torch.ones_like(self.same))

    @cached_property
    def partners(self) -> Partners:
        """The positives by column instead of by mask; they are few."""
        ascending, order = self.column_keys.sort(stable=True)
        start, end = (torch.searchsorted(ascending, self.keys, right=right) for right in (False, True))
        place = start[:, None] + torch.arange(int((end - start).max()), device=start.device)
        column = order[place.clamp_max(len(order) - 1)]
        itself = torch.arange(self.first, self.first + len(start), device=start.device)
        return Partners(column, (place < end[:, None]) & (column != itself[:, None]))

    def choose(self, partners: Partners, negative: Tensor) -> Block:
        """The same block with some of its positives and some of its negatives."""
        chosen = replace(self)
        vars(chosen).update(partners=partners, negative=negative)
        return chosen

    def without_self(self, mask: Tensor) -> Tensor:
        """A copy of a ``(rows, columns)`` mask that is False where an anchor meets itself."""
        mask = mask.clone()
        mask.diagonal(self.first).fill_(False)
        return mask


# Per-anchor tensors of a block: first what is differentiated, (rows,) or (rows, parts), then detached statistics.
BlockFunction = Callable[[Block], tuple[Tensor, ...]]


class _ByBlocks(torch.autograd.Function):
    """See :func:`by_blocks`."""

    @staticmethod
    def forward(
        ctx: Any, function: BlockFunction, blocks: list[Block], eager: bool, anchors: Tensor, columns: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.function, ctx.blocks, ctx.gradients = function, blocks, None
        if eager and any(ctx.needs_input_grad):
            results, ctx.gradients = _with_gradients(function, blocks, anchors, columns, None, ctx.needs_input_grad[4])
        else:
            results = _Joined(len(anchors))
            for block in blocks:
                results.put(block.rows, function(replace(block)))
        ctx.save_for_backward(anchors, columns)
        ctx.mark_non_differentiable(*results.parts[1:])
        return tuple(results.parts)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is not None and bool((grad == grad.flatten()[0]).all()):
            of_anchors, of_columns = ctx.gradients
            of_anchors = of_anchors * grad.flatten()[0]
            of_columns = None if of_columns is None else of_columns * grad.flatten()[0]
        else:
            anchors, columns = ctx.saved_tensors
            moving = ctx.needs_input_grad[4]
            with torch.autocast(grad.device.type, enabled=False):
                of_anchors, of_columns = _with_gradients(ctx.function, ctx.blocks, anchors, columns, grad, moving)[1]
        return None, None, None, of_anchors, of_columns


class _Joined:
    """Per-anchor tensors put together from those of blocks.

    Room for all anchors is taken at once: small tensors left behind by every block, between matrices that are freed,
    would keep the allocator from using the matrices' room again.
    """

    def __init__(self, anchors: int) -> None:
        self.anchors, self.parts = anchors, list[Tensor]()

    def put(self, rows: slice, results: tuple[Tensor, ...]) -> None:
        """Stores what a block gave."""
        if not self.parts:
            self.parts = [part.new_empty(self.anchors, *part.shape[1:]) for part in results]
        for whole, part in zip(self.parts, results, strict=True):
            whole[rows] = part.detach()


def _with_gradients(
    function: BlockFunction,
    blocks: list[Block],
    anchors: Tensor,
    columns: Tensor,
    weights: Tensor | None,
    moving: bool,
) -> tuple[_Joined, tuple[Tensor, Tensor | None]]:
    """The results of all blocks, and the gradients of the (weighted) sum of their first parts.

    Columns that do not move, keys of a queue, have none: that saves one of three products.
    """
    results, of_anchors = _Joined(len(anchors)), torch.empty_like(anchors)
    of_columns = torch.zeros_like(columns) if moving else None
    fixed = columns.detach().requires_grad_(moving)
    for block in blocks:
        some = block.anchors.detach().requires_grad_()
        with torch.enable_grad():
            given = function(replace(block, anchors=some, columns=fixed))
            weight = torch.ones_like(given[0]) if weights is None else weights[block.rows]
            leaves = (some, fixed) if moving else (some,)
            gradients = torch.autograd.grad(given[0], leaves, weight, materialize_grads=True)
        results.put(block.rows, given)
        of_anchors[block.rows] = gradients[0]
        if of_columns is not None:
            of_columns += gradients[1]
        del given, gradients
    return results, (of_anchors, of_columns)


def by_blocks(
    function: BlockFunction,
    anchors: Tensor,
    columns: Tensor,
    keys: Tensor,
    column_keys: Tensor,
    first: int = 0,
    eager: bool = True,
    labels: Tensor | None = None,
    column_labels: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Evaluates a function of anchors against columns block by block.

    Args:
        function: from a :class:`Block` to per-anchor tensors: the first ``(rows,)`` or ``(rows, parts)`` and connected
            to ``block.anchors`` and, where these move, ``block.columns``, the others detached. It may depend on nothing
            else that needs a gradient; quantities of samples that do are appended to the vectors.
        anchors: ``(anchors, dim)``.
        columns: ``(columns, dim)``; without ``requires_grad`` they are constants, whose gradient is not computed.
        keys: ``(anchors,)``.
        column_keys: ``(columns,)``.
        first: the column in which the first anchor stands.
        eager: take the gradient of the plain sum already in the forward pass, where the block is at hand. A sum or mean
            of the result then costs nothing in the backward pass; any other use computes the blocks once more, and
            should say ``eager=False``.
        labels: ``(anchors,)``, and ``column_labels (columns,)``: what makes negatives, where that is not the keys.
        column_labels: see ``labels``.

    Returns:
        The function's tensors, ``(anchors, ...)``; differentiable once, through the first.
    """
    size = max(16, BLOCK_ELEMENTS // max(1, len(columns)))
    if labels is None or column_labels is None:
        labels, column_labels = keys, column_keys
    fixed, blocks = columns.detach(), []
    for start in range(0, len(anchors), size):
        rows = slice(start, start + size)
        own = keys[rows]
        own_labels = own if labels is keys else labels[rows]
        blocks.append(
            Block(anchors[rows].detach(), fixed, own, column_keys, own_labels, column_labels, rows, first + start)
        )
    return _ByBlocks.apply(function, blocks, eager, anchors, columns)  # type: ignore[no-any-return]


def against_batch(
    function: BlockFunction,
    anchors: Tensor,
    keys: Tensor,
    gather: bool = True,
    eager: bool = True,
    labels: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """:func:`by_blocks` of this worker's anchors against the samples of all workers, or its own without gather."""
    columns, column_keys = global_rows(anchors, gather), global_rows(keys, gather)
    column_labels = None if labels is None else global_rows(labels, gather)
    first = first_column(len(anchors), gather)
    return by_blocks(function, anchors, columns, keys, column_keys, first, eager, labels, column_labels)


def log_sum_exp_of_others(block: Block, scale: float) -> Tensor:
    """``log sum_{j != i} exp(scale * a_i . c_j)`` of each anchor, ``(rows,)``: the denominator of contrastive losses.

    Far below any logit where there is no other column. Five passes over the block's matrix beside its three products.
    """
    logits = (block.anchors * scale) @ block.columns.T
    with torch.no_grad():
        logits.detach().diagonal(block.first).fill_(empty_logit(logits.dtype))
    return log_sum_exp_(logits)


def against_constants(
    function: BlockFunction, anchors: Tensor, columns: Tensor, eager: bool = True
) -> tuple[Tensor, ...]:
    """:func:`by_blocks` of anchors against columns that belong to nobody, without gradient: a queue, targets.

    What a block's function needs beside them, it takes from tensors of all anchors at ``block.rows``.
    """
    nobody = torch.zeros(1, dtype=torch.int64, device=anchors.device)
    keys, column_keys = nobody.expand(len(anchors)), nobody.expand(len(columns))
    return by_blocks(function, anchors, columns.detach().to(anchors.dtype), keys, column_keys, eager=eager)
