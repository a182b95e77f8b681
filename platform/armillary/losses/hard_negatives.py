"""Negatives that count more: weighed by their hardness, or mixed from the hardest of a queue."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from armillary.losses.blocks import Block, against_batch
from armillary.losses.global_batch import first_column, global_mean
from armillary.losses.slopes import empty_logit, with_slope
from armillary.losses.tensors import check_embeddings, float32_math, normalize, not_a_number_guard


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
            slope = self._combined(high, low, by_r[:, None])
            slope.scatter_(1, two.columns, torch.where(two.taken, by_p[:, None], 0))
        return with_slope(logits, losses, slope), log_p * self.temperature, floored.to(losses.dtype)

    def _powers(self, logits: Tensor) -> tuple[_Power, _Power, Tensor]:
        """``exp((1 + beta) l)``, ``exp(beta l)`` and ``log( sum_j of the first / sum_j of the second )``, by rows."""
        largest = logits.amax(dim=1, keepdim=True)
        shifted = logits.sub_(largest)
        if self.beta == 1:
            values = shifted.exp_()
            low = _Power(values, values.sum(dim=1, keepdim=True))
            high = _Power(None, torch.linalg.vector_norm(values, dim=1, keepdim=True).square())
        else:
            # An empty logit counts in neither, whatever the power.
            values = (self.beta * shifted).exp_() if self.beta else (shifted > empty_logit(logits.dtype) / 2).to(logits)
            low = _Power(values, values.sum(dim=1, keepdim=True))
            values = shifted.mul_(1 + self.beta).exp_()
            high = _Power(values, values.sum(dim=1, keepdim=True))
        return high, low, (high.total.log() - low.total.log() + largest).squeeze(1)

    def _combined(self, high: _Power, low: _Power, factor: Tensor) -> Tensor:
        up, down = (1.0, 0.0) if self.detach_weights else (1 + self.beta, self.beta)
        if high.values is None:
            assert low.values is not None
            slope = low.values * (factor * up / high.total)
            return slope.sub_(factor * down / low.total).mul_(low.values)
        slope = high.values.mul_(factor * up / high.total)
        return slope if down == 0 or low.values is None else slope.sub_(low.values.mul_(factor * down / low.total))

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
    """Which of a query's hardest keys are mixed, and how; ranks count from 0, the hardest.

    ``first``, ``second (batch, s)`` int64 ranks and ``weight (batch, s)`` of the first; ``key (batch, s')`` int64 ranks
    and ``query_weight (batch, s')`` of the query, below 1/2, so that the key dominates.
    """

    first: Tensor
    second: Tensor
    weight: Tensor
    key: Tensor
    query_weight: Tensor


class MixedNegatives(nn.Module):
    """InfoNCE over a queue and negatives made of its hardest keys. Kalantidis et al., MoCHi, NeurIPS 2020, 2010.01028.

    Of the N keys n that are nearest to a query q, two are mixed, or one and the query itself::

        h  = (a n_i + (1 - a) n_j) / |.|,    h' = (b q + (1 - b) n_j) / |.|,    a in (0, 1),  b in (0, 1/2)
        L  = -log( exp(q.k / tau) / (exp(q.k / tau) + sum_{n in queue} exp(q.n / tau) + sum_h exp(q.h / tau)) )

    The mixtures are constants: the gradient passes through the outer q alone, also where q is part of h' (the paper
    does not say). A product with a mixture follows from products that are there already, so that only those among mixed
    keys are computed anew.

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
            mixtures: ranks below ``min(hardest, K)``.
            metrics: receives ``positive_cosine`` and ``hardest_cosine``, of the hardest negative, mixtures included.
        """
        check_embeddings(queries)
        guard = not_a_number_guard(queries)
        q, k, rows = normalize(queries), normalize(keys.detach()), normalize(queue.detach()).to(queries.dtype)
        own, cosines = (q * k).sum(dim=1, keepdim=True), q @ rows.T
        parts = [own, cosines] if mixtures is None else [own, cosines, *self.mixed(q, rows, cosines, mixtures)]
        logits = torch.cat(parts, dim=1)
        if metrics is not None:
            metrics["positive_cosine"] = own.detach().mean()
            metrics["hardest_cosine"] = logits.detach()[:, 1:].amax(dim=1).mean()
        return ((logits / self.temperature).logsumexp(dim=1) - own[:, 0] / self.temperature).mean() + guard

    def mixed(self, q: Tensor, rows: Tensor, cosines: Tensor, mixtures: Mixtures) -> tuple[Tensor, Tensor]:
        """Products of queries with their mixtures, ``(batch, s)`` and ``(batch, s')``; all vectors of length 1."""
        nearest = cosines.detach().topk(min(self.hardest, len(rows)), dim=1).indices
        i, j, other = (nearest.gather(1, rank) for rank in (mixtures.first, mixtures.second, mixtures.key))
        a, b = mixtures.weight.to(q.dtype), mixtures.query_weight.to(q.dtype)
        near = cosines.gather(1, torch.cat([i, j, other], dim=1))
        of_i, of_j, of_other = near.split([i.shape[1], j.shape[1], other.shape[1]], dim=1)
        with torch.no_grad():
            # |a n_i + (1 - a) n_j|^2 of unit vectors.
            pair = torch.stack([(rows[one] * rows[two]).sum(dim=1) for one, two in zip(i, j, strict=True)])
            length = _mixture_length(a, pair)
            length_of_query = _mixture_length(b, of_other)
        itself = (q * q.detach()).sum(dim=1, keepdim=True)
        return (a * of_i + (1 - a) * of_j) / length, (b * itself + (1 - b) * of_other) / length_of_query


def _mixture_length(weight: Tensor, product: Tensor) -> Tensor:
    """Length of ``w x + (1 - w) y`` from the product of the unit vectors x and y; opposite ones cancel at 1/2."""
    squared = weight.square() + (1 - weight).square() + 2 * weight * (1 - weight) * product
    return squared.clamp_min(1e-12).sqrt()
