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

from armillary.losses.class_chunks import ClassPass, Nearest, decay, finite
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
    """The keys of a chunk, made in one reused buffer, and the way back from their gradients to the rows'."""

    def __init__(self, classes: ClassPass, cosine: bool, like: Tensor, lengths: Tensor | None = None) -> None:
        self.weight, self.bias = classes.rows["weight"], classes.rows.get("bias")
        self.dtype = classes.product_type or like.dtype
        self._plain = not cosine and self.bias is None and self.dtype == self.weight.dtype
        self.inverse = lengths
        if cosine and lengths is None:
            self.inverse = torch.empty(len(self.weight), 1, dtype=like.dtype, device=like.device)
            for start, stop in classes.chunks():
                norms = torch.linalg.vector_norm(self.weight[start:stop], dim=1, keepdim=True)
                self.inverse[start:stop] = norms.masked_fill_(norms <= 1e-12, math.inf).reciprocal_()
        self._scratch = like.new_empty(0 if self._plain else min(classes.chunk, classes.count), like.shape[1])
        self._half = self._scratch.to(self.dtype) if self.dtype != like.dtype else self._scratch

    def chunk(self, start: int, stop: int) -> Tensor:
        """``(stop - start, width)`` in the products' type; valid until the next call."""
        weight = self.weight[start:stop]
        if self._plain:
            return weight
        keys = self._half[: stop - start]
        if self.inverse is not None:
            torch.mul(weight, self.inverse[start:stop], out=keys)
        else:
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


class _LogSumExp(Function):
    @staticmethod
    def forward(ctx: Any, classes: ClassPass, cosine: bool, queries: Tensor, *tokens: Tensor) -> Any:
        keys = _Keys(classes, cosine, queries)
        halved = queries.to(keys.dtype)
        largest = queries.new_full((len(queries), 1), -math.inf)
        total, nearest = torch.zeros_like(largest), Nearest(largest)
        space = halved.new_empty(len(queries) * min(classes.chunk, classes.count))
        for start, stop in classes.chunks():
            terms = _terms(halved, keys.chunk(start, stop), space)
            terms[classes.own.inside(start, stop)] = -math.inf
            highest = terms.amax(dim=1, keepdim=True)
            if classes.best is None:
                nearest.update(terms, highest, start)
            raised = torch.maximum(largest, highest.to(largest.dtype))
            terms.sub_(finite(raised).to(terms.dtype)).exp_()
            total = total * decay(largest, raised) + terms.sum(dim=1, keepdim=True, dtype=total.dtype)
            largest = raised
        if classes.best is None:
            classes.best, classes.nearest = nearest.best, nearest.column
        result = total.log() + finite(largest)
        ctx.classes, ctx.cosine, ctx.tokens, ctx.inverse = classes, cosine, len(tokens), keys.inverse
        ctx.save_for_backward(queries, result)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        classes: ClassPass = ctx.classes
        queries, result = ctx.saved_tensors
        keys = _Keys(classes, ctx.cosine, queries, ctx.inverse)
        halved = queries.to(keys.dtype)
        # In half precision the shift is rounded; what that does to the softmax is one factor per sample.
        shift = finite(result).to(keys.dtype)
        factor = gradients[0] * (shift.to(result.dtype) - finite(result)).exp()
        weighted = (factor * queries).to(keys.dtype)
        to_queries = torch.zeros_like(queries)
        space = halved.new_empty(len(queries) * min(classes.chunk, classes.count))
        rows = _RowBuffers(classes, queries)
        for start, stop in classes.chunks():
            key = keys.chunk(start, stop)
            softmax = _terms(halved, key, space).sub_(shift).exp_()
            softmax[classes.own.inside(start, stop)] = 0
            if key.dtype == to_queries.dtype:
                to_queries.addmm_(softmax, key)
            else:
                to_queries += softmax @ key
            rows.store(softmax, weighted, keys, start, stop)
        return (None, None, factor * to_queries, *[None] * ctx.tokens)


def _terms(queries: Tensor, keys: Tensor, space: Tensor) -> Tensor:
    """``queries keys^T`` in a buffer that is used again for every chunk."""
    shape = len(queries), len(keys)
    return torch.mm(queries, keys.T, out=space[: shape[0] * shape[1]].view(shape))


class _RowBuffers:
    """Writes the gradients of the rows, chunk by chunk, where :class:`RowGradients` collects them."""

    def __init__(self, classes: ClassPass, like: Tensor) -> None:
        wanted = classes.gradients.wanted
        self._buffers = {
            name: classes.gradients.buffer(name, row) for name, row in classes.rows.items() if wanted[name]
        }

    def store(self, softmax: Tensor, weighted: Tensor, keys: _Keys, start: int, stop: int) -> None:
        """The chunk's part: ``softmax^T weighted`` through the keys."""
        if not self._buffers:
            return
        direct = self._buffers.get("weight", (None, False))
        if direct[0] is not None and direct[1] and keys.bias is None and keys.dtype == direct[0].dtype:
            keys.project(torch.mm(softmax.T, weighted, out=direct[0][start:stop]), start, stop)
            return
        gradient = (softmax.T @ weighted).to(keys.weight.dtype)
        keys.project(gradient, start, stop)
        parts = {"weight": gradient[:, : keys.weight.shape[1]], "bias": gradient[:, -1]}
        for name, (buffer, new) in self._buffers.items():
            if new:
                buffer[start:stop] = parts[name]
            else:
                buffer[start:stop] += parts[name]
