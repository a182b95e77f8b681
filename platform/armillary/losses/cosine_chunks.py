"""The quick way for similarities that are a matrix product: ``log sum_{j != y_i} exp(s_i sim_ij)`` and its gradients.

With queries ``q_i = s_i x_i / |x_i|`` and keys ``k_j = W_j / |W_j|`` (cosine), or ``q_i = s_i (x_i, 1)`` and
``k_j = (W_j, b_j)`` (linear), the terms are ``q k^T``, so that the forward pass is one product a chunk and the backward
pass three: the terms again, ``E k`` for the queries and ``E^T q`` for the keys, E the softmax without the own class. A
row's length needs no product: ``dW_j = (dk_j - (dk_j . k_j) k_j) / |W_j|``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function

from armillary.losses.class_chunks import ClassPass, decay, finite
from armillary.losses.tensors import normalize


def scaled_log_sum_exp(
    classes: ClassPass, plain: str, embeddings: Tensor, scale: Tensor, own_rows: tuple[Tensor, ...]
) -> Tensor:
    """``log sum_{j != y_i} exp(s_i sim_ij)`` over this worker's rows, ``(batch, 1)``.

    Args:
        classes: the pass; its ``rows`` are ``weight (rows, dim)`` and, where linear, perhaps ``bias (rows,)``.
        plain: ``cosine`` or ``linear``.
        embeddings: ``(batch, dim)``.
        scale: ``(batch, 1)``, at least 0.
        own_rows: the outputs of :class:`armillary.losses.class_chunks.EnterRows`.
    """
    queries = scale * (normalize(embeddings) if plain == "cosine" else embeddings)
    if "bias" in classes.rows:
        queries = torch.cat([queries, scale.expand(-1, 1)], dim=1)
    first = classes.best is None
    result: Tensor = _LogSumExp.apply(classes, plain == "cosine", queries, *own_rows)
    if first and classes.best is not None:
        classes.best = classes.best / scale.detach().clamp_min(torch.finfo(scale.dtype).tiny)
    return result


class _Keys:
    """The keys of a chunk, made in one reused buffer, and the way back from their gradients to the rows'.

    Args:
        classes: the pass.
        cosine: whether keys are rows of length 1.
        like: the queries.
        inverse: 1 / |W_j|, ``(rows, 1)``, 0 for rows of no length; without it :meth:`chunk` finds it on its way.
    """

    def __init__(self, classes: ClassPass, cosine: bool, like: Tensor, inverse: Tensor | None = None) -> None:
        self.weight, self.bias = classes.rows["weight"], classes.rows.get("bias")
        self.dtype = classes.product_type or like.dtype
        self._plain = not cosine and self.bias is None and self.dtype == self.weight.dtype
        self._measure = cosine and inverse is None
        self.inverse = like.new_empty(len(self.weight), 1) if self._measure else inverse
        self._scratch = like.new_empty(0 if self._plain else min(classes.chunk, classes.count), like.shape[1])
        self._half = self._scratch.to(self.dtype) if self.dtype != like.dtype else self._scratch

    def chunk(self, start: int, stop: int) -> Tensor:
        """``(stop - start, width)`` in the products' type; valid until the next call."""
        weight = self.weight[start:stop]
        if self._plain:
            return weight
        keys = self._half[: stop - start]
        if self.inverse is not None:
            inverse = self.inverse[start:stop]
            if self._measure:
                torch.linalg.vector_norm(weight, dim=1, keepdim=True, out=inverse)
                inverse.masked_fill_(inverse <= 1e-12, math.inf).reciprocal_()
            wide = torch.mul(weight, inverse, out=self._scratch[: stop - start])
            # Two steps: one operation that multiplies and rounds takes longer.
            return wide if self.dtype == wide.dtype else keys.copy_(wide)
        keys[:, : weight.shape[1]] = weight
        if self.bias is not None:
            keys[:, -1] = self.bias[start:stop]
        return keys

    def project(self, gradient: Tensor, start: int, stop: int) -> None:
        """Turns the gradient of cosine keys into that of the rows, in place."""
        if self.inverse is None:
            return
        weight, inverse = self.weight[start:stop], self.inverse[start:stop]
        along = torch.mul(gradient, weight, out=self._scratch[: stop - start]).sum(dim=1, keepdim=True)
        gradient.mul_(inverse).addcmul_(weight, along.mul_(inverse.pow(3)), value=-1)


class _Terms:
    """``keys queries^T`` of a chunk, ``(classes, batch)``, in one reused buffer.

    Classes come first: both products that take the terms' gradients on are quicker so. Products in half precision are
    widened at once: exponentials and sums are quicker in float32, and exact.
    """

    def __init__(self, classes: ClassPass, queries: Tensor, dtype: torch.dtype) -> None:
        self._own, self._queries = classes.own, queries.to(dtype)
        size = len(queries) * min(classes.chunk, classes.count)
        self._space = queries.new_empty(size)
        self._half = self._space if dtype == queries.dtype else queries.new_empty(size, dtype=dtype)

    def of(self, keys: Tensor) -> Tensor:
        """In the queries' own type, valid until the next call."""
        shape = len(keys), len(self._queries)
        space, half = (buffer[: shape[0] * shape[1]].view(shape) for buffer in (self._space, self._half))
        torch.mm(keys, self._queries.T, out=half)
        return space if half.dtype == space.dtype else space.copy_(half)

    def factor(self, terms: Tensor) -> Tensor:
        """What :meth:`of` gave, in the products' type, as a factor of the next ones."""
        half = self._half[: terms.numel()].view(terms.shape)
        return terms if half.dtype == terms.dtype else half.copy_(terms)

    def fill_own(self, terms: Tensor, start: int, value: float) -> None:
        """Writes ``value`` where a sample meets its own class."""
        samples, columns = self._own.inside(start, start + len(terms))
        terms[columns, samples] = value


class _LogSumExp(Function):
    @staticmethod
    def forward(ctx: Any, classes: ClassPass, cosine: bool, queries: Tensor, *tokens: Tensor) -> Any:
        keys = _Keys(classes, cosine, queries)
        chunk_terms = _Terms(classes, queries, keys.dtype)
        largest = queries.new_full((len(queries),), -math.inf)
        total = torch.zeros_like(largest)
        for start, stop in classes.chunks():
            terms = chunk_terms.of(keys.chunk(start, stop))
            chunk_terms.fill_own(terms, start, -math.inf)
            raised = torch.maximum(largest, terms.amax(dim=0))
            terms.sub_(finite(raised)).exp_()
            total = total * decay(largest, raised) + terms.sum(dim=0)
            largest = raised
        if classes.best is None:
            classes.best = largest[:, None]
        result = (total.log() + finite(largest))[:, None]
        ctx.classes, ctx.cosine, ctx.tokens, ctx.inverse = classes, cosine, len(tokens), keys.inverse
        ctx.save_for_backward(queries, result)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        classes: ClassPass = ctx.classes
        queries, result = ctx.saved_tensors
        keys = _Keys(classes, ctx.cosine, queries, ctx.inverse)
        chunk_terms = _Terms(classes, queries, keys.dtype)
        shift = finite(result).T
        weighted = (gradients[0] * queries).to(keys.dtype)
        to_queries = torch.zeros_like(queries)
        wanted = {name: row for name, row in classes.rows.items() if classes.gradients.wanted[name]}
        buffers = {name: classes.gradients.buffer(name, row) for name, row in wanted.items()}
        for start, stop in classes.chunks():
            key = keys.chunk(start, stop)
            terms = chunk_terms.of(key).sub_(shift).exp_()
            chunk_terms.fill_own(terms, start, 0)
            softmax = chunk_terms.factor(terms)
            if key.dtype == to_queries.dtype:
                to_queries.addmm_(softmax.T, key)
            else:
                to_queries += softmax.T @ key
            if buffers:
                _store(buffers, softmax, weighted, keys, start, stop)
        return (None, None, gradients[0] * to_queries, *[None] * ctx.tokens)


def _store(
    buffers: dict[str, tuple[Tensor, bool]], softmax: Tensor, weighted: Tensor, keys: _Keys, start: int, stop: int
) -> None:
    """Writes the rows' gradients of a chunk, ``softmax weighted`` through the keys, or adds them to what is there."""
    direct = keys.bias is None and "weight" in buffers and buffers["weight"][1]
    gradient = buffers["weight"][0][start:stop] if direct else keys.weight.new_empty(len(softmax), weighted.shape[1])
    if softmax.dtype == gradient.dtype:
        torch.mm(softmax, weighted, out=gradient)
    else:
        gradient.copy_(softmax @ weighted)
    keys.project(gradient, start, stop)
    if direct:
        return
    parts = {"weight": gradient[:, : keys.weight.shape[1]], "bias": gradient[:, -1]}
    for name, (buffer, new) in buffers.items():
        if new:
            buffer[start:stop] = parts[name]
        else:
            buffer[start:stop] += parts[name]
