"""Negatives that count more: weighed by their hardness, or mixed from the hardest of a queue."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from armillary.losses.blocks import Block, against_batch, against_constants
from armillary.losses.global_batch import first_column, global_mean
from armillary.losses.slopes import empty_logit, exponentials_with_, with_slope
from armillary.losses.tensors import check_embeddings, float32_math, normalize, not_a_number_guard

# Elements of sums that are made at a time: 1 MB in float32.
_SUMS = 2**18
# Up to so many threads torch's own selection is the slower one.
_FEW_THREADS = 4


class HardNegativeNCE(nn.Module):
    """Contrastive loss with hard, debiased negatives. Robinson et al., ICLR 2021, arXiv 2010.04592, eq. 4.

    With ``p_i = exp(s_ii+ / tau)`` of the other view and ``n_ij = exp(s_ij / tau)`` of the N = 2 B - 2 views of other
    images::

        R_i = sum_j w_ij n_ij,    w_ij = n_ij^beta / mean_k n_ik^beta
        G_i = max( (R_i - N tau+ p_i) / (1 - tau+),  N exp(-1 / tau) )
        L   = mean_i -log( p_i / (p_i + G_i) )          over all 2 B views i

    beta = 0 is the debiased loss of Chuang et al. (NeurIPS 2020), with tau+ = 0 too it is NT-Xent. As in the authors'
    code the gradient passes through the weights w, and not through the floor.

    Args:
        beta: concentration on hard negatives, 0 or more.
        tau_plus: share of negatives that are thought to be of the anchor's class, in [0, 1).
        temperature: tau > 0.
        detach_weights: no gradient through w.
        gather: see the other workers' samples.

    Raises:
        ValueError: an option out of range; in ``forward`` views of different shapes.
    """

    def __init__(
        self,
        beta: float = 1.0,
        tau_plus: float = 0.1,
        temperature: float = 0.5,
        detach_weights: bool = False,
        gather: bool = True,
    ) -> None:
        super().__init__()
        if not (beta >= 0 and 0 <= tau_plus < 1 and temperature > 0):
            raise ValueError(
                "beta must be at least 0, tau_plus in [0, 1) and temperature above 0, found "
                f"{beta}, {tau_plus}, {temperature}"
            )
        self.beta, self.tau_plus, self.temperature = beta, tau_plus, temperature
        self.detach_weights, self.gather = detach_weights, gather

    @float32_math
    def forward(self, view1: Tensor, view2: Tensor, *, metrics: dict[str, Tensor] | None = None) -> Tensor:
        """The loss of two views ``(batch, dim)``, row i of both from image i.

        ``metrics`` receives ``positive_cosine`` and ``at_floor``, the share of anchors whose negatives are at the
        floor, where they give no gradient.
        """
        check_embeddings(view1)
        if view1.shape != view2.shape:
            raise ValueError(f"the views differ in shape: {tuple(view1.shape)} and {tuple(view2.shape)}")
        image = torch.arange(len(view1), device=view1.device) + first_column(len(view1), self.gather)
        anchors, guard = normalize(torch.cat([view1, view2])), not_a_number_guard(view1) + not_a_number_guard(view2)
        losses, cosines, floored = against_batch(self._of_block, anchors, image.repeat(2), self.gather)
        if metrics is not None:
            metrics.update(positive_cosine=cosines.mean(), at_floor=floored.mean())
        count = losses.new_tensor(len(losses))
        return global_mean(losses.sum(), count, self.gather) + guard

    def _of_block(self, block: Block) -> tuple[Tensor, ...]:
        """Losses, cosines of the positives, and whose negatives are at the floor.

        The derivative by the logits is written down as a whole, so that its parts cancel before they are multiplied.
        """
        logits, two = (block.anchors / self.temperature) @ block.columns.T, block.partners
        with torch.no_grad():
            matrix, number = logits.detach(), len(block.columns) - 2
            log_p = two.of(matrix, 0.0).sum(dim=1)
            if number < 1:
                with torch.enable_grad():
                    nothing = with_slope(logits, 0 * log_p, torch.zeros_like(matrix))
                return nothing, log_p * self.temperature, torch.ones_like(log_p)
            matrix.scatter_(1, two.columns, empty_logit(matrix.dtype))
            high, low, log_r = self._powers(matrix)
            losses, by_r, by_p, floored = self._debiased(log_p, log_r + math.log(number), number)
            # By a logit, log R is (1 + beta) softmax((1 + beta) l) - beta softmax(beta l); high and low are these.
            slope, scale = self._combined(high, low, by_r[:, None])
            slope.scatter_(1, two.columns, torch.where(two.taken, by_p[:, None] / scale, 0))
        losses = with_slope(logits, losses, slope, scale.squeeze(1))
        return losses, log_p * self.temperature, floored.to(losses.dtype)

    def _powers(self, logits: Tensor) -> tuple[_Power, _Power, Tensor]:
        """``exp((1 + beta) l)``, ``exp(beta l)`` and ``log( sum_j of the first / sum_j of the second )``, by rows."""
        largest, beta = logits.amax(dim=1, keepdim=True), self.beta
        if beta == 1:
            values = logits.sub_(largest).exp_()
            low = _Power(values, values.sum(dim=1, keepdim=True))
            high = _Power(None, torch.linalg.vector_norm(values, dim=1, keepdim=True).square())
        else:
            # An empty logit counts in neither, whatever the power.
            if beta:
                values = torch.add(-beta * largest, logits, alpha=beta).exp_()
            else:
                values = (logits > empty_logit(logits.dtype) / 2).to(logits)
            low = _Power(values, values.sum(dim=1, keepdim=True))
            values = torch.add(-(1 + beta) * largest, logits, alpha=1 + beta, out=logits).exp_()
            high = _Power(values, values.sum(dim=1, keepdim=True))
        return high, low, (high.total.log() - low.total.log() + largest).squeeze(1)

    def _combined(self, high: _Power, low: _Power, factor: Tensor) -> tuple[Tensor, Tensor]:
        """The slope ``(rows, columns)`` up to its second part, a factor above 0 of each row ``(rows, 1)``."""
        up, down = (1.0, 0.0) if self.detach_weights else (1 + self.beta, self.beta)
        scale, ratio = factor * up / high.total, down * high.total / (up * low.total)
        if high.values is None:
            assert low.values is not None
            slope = (low.values - ratio).mul_(low.values)
        elif down and low.values is not None:
            slope = high.values.addcmul_(low.values, ratio, value=-1)
        else:
            slope = high.values
        # Rows at the floor, or converged beyond what the precision can tell, move nothing.
        still = scale == 0
        if bool(still.any()):
            slope.masked_fill_(still, 0)
        return slope, scale.masked_fill(still, 1)

    def _debiased(self, log_p: Tensor, log_r: Tensor, number: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """-log(p / (p + G)), its derivatives by log R and log p, and where G is at its floor."""
        log_g, share = log_r, torch.zeros_like(log_r)
        if self.tau_plus > 0:
            # The share of R that the expected positives take; at 1 and beyond nothing is left of it.
            share = (math.log(number * self.tau_plus) + log_p - log_r).exp()
            log_g = log_r + torch.log1p(-share.clamp_max(1)) - math.log(1 - self.tau_plus)
        floor = math.log(number) - 1 / self.temperature
        floored = log_g <= floor
        log_g, share = torch.where(floored, floor, log_g), torch.where(floored, 0, share)
        losses = torch.logaddexp(torch.zeros_like(log_p), log_g - log_p)
        of_negatives = torch.sigmoid(log_g - log_p)
        by_r = torch.where(floored, 0, of_negatives / (1 - share))
        return losses, by_r, -of_negatives - by_r * share, floored


class _Power(NamedTuple):
    """Exponentials ``(rows, columns)``, ``None`` for the other power's square, and their sums ``(rows, 1)``."""

    values: Tensor | None
    total: Tensor


@dataclass(frozen=True)
class Mixtures:
    """Which of a query's N hardest keys are mixed, and how; places among these count in the order of the queue.

    ``first``, ``second (batch, s)`` int64 places and ``weight (batch, s)`` of the first; ``key (batch, s')`` int64
    places and ``query_weight (batch, s')`` of the query, below 1/2, so that the key dominates.
    """

    first: Tensor
    second: Tensor
    weight: Tensor
    key: Tensor
    query_weight: Tensor

    def of(self, rows: slice) -> Mixtures:
        """Those of some queries."""
        return Mixtures(*(getattr(self, part.name)[rows] for part in fields(self)))


class _Mixed(NamedTuple):
    """A block's mixtures: logits ``(rows, s + s')``; as sums of columns' logits, with what weight of which column.

    ``columns``, ``weights (rows, 2 s + s')``: first and second keys of pairs, keys mixed with the query; ``of_query
    (rows, s')``: the query's own weight in the latter.
    """

    logits: Tensor
    columns: Tensor
    weights: Tensor
    of_query: Tensor

    def slopes(self, share: Tensor) -> tuple[Tensor, Tensor]:
        """What the columns' logits, and the product of the query with itself, take from mixtures' ``share``."""
        pairs = share.shape[1] - self.of_query.shape[1]
        of_pairs, of_queries = share[:, :pairs], share[:, pairs:]
        given = torch.cat([of_pairs, of_pairs, of_queries], dim=1).mul_(self.weights)
        return given, (of_queries * self.of_query).sum(dim=1)


class MixedNegatives(nn.Module):
    """InfoNCE over a queue and negatives made of its hardest keys. Kalantidis et al., MoCHi, NeurIPS 2020, 2010.01028.

    Of the N keys n that are nearest to a query q, two are mixed, or one and the query itself::

        h  = (a n_i + (1 - a) n_j) / |.|,    h' = (b q + (1 - b) n_j) / |.|,    a in (0, 1),  b in (0, 1/2)
        L  = -log( exp(q.k / tau) / (exp(q.k / tau) + sum_{n in queue} exp(q.n / tau) + sum_h exp(q.h / tau)) )

    The mixtures are constants: the gradient passes through the outer q alone, also where q is part of h' (the paper
    does not say). A product with a mixture is a sum of two products that are there already, over the mixture's length:
    no mixture is kept, and its gradient is added to that of its keys.

    Args:
        hardest: N, 1 or more; at most the queue's length counts.
        temperature: tau > 0.

    Raises:
        ValueError: an option out of range.
    """

    def __init__(self, hardest: int = 1024, temperature: float = 0.2) -> None:
        super().__init__()
        if hardest < 1 or not temperature > 0:
            raise ValueError(f"hardest must be at least 1 and temperature above 0, found {hardest}, {temperature}")
        self.hardest, self.temperature = hardest, temperature

    @float32_math
    def forward(
        self,
        queries: Tensor,
        keys: Tensor,
        queue: Tensor,
        mixtures: Mixtures | None = None,
        *,
        metrics: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """The mean over this worker's queries; without ``mixtures`` the loss of MoCo.

        Args:
            queries: ``(batch, dim)``.
            keys: ``(batch, dim)``, no gradient.
            queue: ``(K, dim)``, no gradient.
            mixtures: places below ``min(hardest, K)``.
            metrics: receives ``positive_cosine`` and ``hardest_cosine``, of the hardest negative, mixtures included.
        """
        check_embeddings(queries)
        guard = not_a_number_guard(queries)
        q, k = normalize(queries), normalize(keys.detach()).to(queries.dtype)

        def of_block(block: Block) -> tuple[Tensor, ...]:
            given = None if mixtures is None else mixtures.of(block.rows)
            return self._of_block(block, k[block.rows], given, metrics is not None)

        losses, positive, hardest = against_constants(of_block, q, normalize(queue.detach()))
        if metrics is not None:
            metrics["positive_cosine"] = positive.mean()
            metrics["hardest_cosine"] = hardest.mean()
        loss: Tensor = losses.mean() + guard
        return loss

    def _of_block(self, block: Block, keys: Tensor, mixtures: Mixtures | None, largest: bool) -> tuple[Tensor, ...]:
        """Losses, cosines with the own key and, if the ``largest`` is wanted, with the hardest negative."""
        cosines = (block.anchors * keys).sum(dim=1)
        own, itself = cosines / self.temperature, block.anchors.square().sum(dim=1) / (2 * self.temperature)
        logits = (block.anchors / self.temperature) @ block.columns.T
        with torch.no_grad():
            matrix, fixed = logits.detach(), own.detach()
            mixed = None if mixtures is None else self._mixed(matrix, block.columns, itself[:, None], mixtures)
            further = fixed[:, None] if mixed is None else torch.cat([fixed[:, None], mixed.logits], dim=1)
            hardest = torch.cat([matrix, further[:, 1:]], dim=1).amax(dim=1) if largest else fixed
            top, total, beside = exponentials_with_(matrix, further)
            losses, by_itself = total.log() + top - fixed, torch.zeros_like(total)
            # By the positive's logit: minus the share of all others, so that nothing cancels near convergence.
            by_own = -(matrix.sum(dim=1) + beside[:, 1:].sum(dim=1)) / total
            if mixed is not None:
                given, by_itself = mixed.slopes(beside[:, 1:])
                matrix.scatter_add_(1, mixed.columns, given)
                by_itself = by_itself / total
        losses = with_slope(logits, losses, matrix, total.reciprocal()) + by_own * (own - fixed)
        # Half the square has the derivative q, as a product of q with itself as a constant has.
        losses = losses + by_itself * (itself - itself.detach())
        return losses, cosines.detach(), hardest * self.temperature

    def _mixed(self, logits: Tensor, rows: Tensor, half: Tensor, mixtures: Mixtures) -> _Mixed:
        nearest = largest_columns(logits, min(self.hardest, len(rows)))
        i, j, other = (nearest.gather(1, place) for place in (mixtures.first, mixtures.second, mixtures.key))
        a, b = mixtures.weight.to(logits.dtype), mixtures.query_weight.to(logits.dtype)
        columns = torch.cat([i, j, other], dim=1)
        of_i, of_j, of_other = logits.gather(1, columns).split([i.shape[1], j.shape[1], other.shape[1]], dim=1)
        length = _mixture_lengths(rows, i, j, a)
        # |b q + (1 - b) n|^2 of unit vectors; b is below 1/2.
        squared = b.square() + (1 - b).square() + 2 * b * (1 - b) * of_other * self.temperature
        length_of_query = squared.clamp_min(1e-12).sqrt()
        weights = torch.cat([a / length, (1 - a) / length, (1 - b) / length_of_query], dim=1)
        of_query = b / length_of_query
        parts = [a * of_i + (1 - a) * of_j, b * 2 * half + (1 - b) * of_other]
        return _Mixed(torch.cat([parts[0] / length, parts[1] / length_of_query], dim=1), columns, weights, of_query)


def largest_columns(scores: Tensor, count: int) -> Tensor:
    """The columns of the ``count`` largest scores of each row, ``(rows, count)`` int64, ascending by column.

    Args:
        scores: ``(rows, columns)``, detached.
        count: 1 or more, at most the number of columns; with all of them there is nothing to select.
    """
    rows, columns = scores.shape
    if count == columns:
        return torch.arange(columns, device=scores.device).expand(rows, columns)
    if scores.device.type == "cpu" and torch.get_num_threads() <= _FEW_THREADS:
        # One thread that partitions values alone is faster than two that partition values with their places.
        values = scores.numpy()
        threshold = numpy.partition(values, columns - count, axis=1)[:, columns - count, None]
        place = numpy.flatnonzero(values >= threshold)
        if len(place) == rows * count:
            first = numpy.arange(0, rows * columns, columns)[:, None]
            return torch.from_numpy(place.reshape(rows, count) - first)
        # Equal scores stand on both sides of the threshold.
    return scores.topk(count, dim=1, sorted=False).indices.sort(dim=1).values


def _mixture_lengths(rows: Tensor, one: Tensor, other: Tensor, weight: Tensor) -> Tensor:
    """Lengths of ``w x + (1 - w) y``, ``(batch, s)``, of rows x, y; opposite ones cancel at 1/2 and count as 1e-6.

    The sums are made in a piece of memory that stays in cache; the products of all rows with each other would not.
    """
    lengths, step = torch.empty_like(weight).view(-1), max(1, _SUMS // rows.shape[1])
    pairs, weights = torch.stack([one, other], dim=2).view(-1, 2), torch.stack([weight, 1 - weight], dim=2).view(-1, 2)
    for start in range(0, len(pairs), step):
        part = slice(start, start + step)
        sums = F.embedding_bag(pairs[part], rows, mode="sum", per_sample_weights=weights[part])
        lengths[part] = torch.linalg.vector_norm(sums, dim=1)
    return lengths.view_as(weight).clamp_min_(1e-6)
