"""Queries against keys that carry no gradient: queues of past keys, and the keys of the batch.

Symbols: q queries, k their own keys, both scaled to unit length here; negatives are rows of unit length, as a queue
holds them. Whatever is not a query is a constant.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from armillary import collectives
from armillary.losses.blocks import Block, against_constants
from armillary.losses.contrastive import NTXent
from armillary.losses.global_batch import first_column
from armillary.losses.slopes import exponentials_with_, with_slope
from armillary.losses.tensors import check_choice, check_embeddings, float32_math, normalize


def check_temperature(temperature: float) -> None:
    """Refuses a temperature that is not above 0."""
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, found {temperature}")


def _check_pair(queries: Tensor, keys: Tensor) -> None:
    check_embeddings(queries)
    if queries.shape != keys.shape:
        raise ValueError(f"queries and keys differ in shape: {tuple(queries.shape)} and {tuple(keys.shape)}")


class KeyContrast(nn.Module):
    """InfoNCE over a dictionary of keys. He et al., "Momentum Contrast", CVPR 2020, arXiv 1911.05722, eq. 1.

    ::

        L = mean_n -log exp(q_n.k_n / tau) / (exp(q_n.k_n / tau) + sum_i exp(q_n.n_i / tau))

    One direction, no negatives from the batch. Without negatives the loss is 0.

    Args:
        temperature: tau > 0.
        reduction: ``mean``, or ``none`` for the queries' losses ``(batch,)``.
    """

    def __init__(self, temperature: float = 0.07, reduction: str = "mean") -> None:
        super().__init__()
        check_temperature(temperature)
        check_choice("reduction", reduction, ("mean", "none"))
        self.temperature, self.reduction = temperature, reduction

    @float32_math
    def forward(
        self,
        queries: Tensor,
        keys: Tensor,
        negatives: Tensor,
        *,
        own_negatives: Tensor | None = None,
        metrics: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """The loss.

        Args:
            queries: ``(batch, dim)``.
            keys: ``(batch, dim)``, row n that of query n.
            negatives: ``(K, dim)``, unit length, of all queries.
            own_negatives: ``(batch, E, dim)``, further negatives of each query alone.
            metrics: receives ``positive_cosine`` and ``negative_cosine``.
        """
        _check_pair(queries, keys)
        q, k = normalize(queries), normalize(keys.detach()).to(queries.dtype)
        own = None if own_negatives is None else normalize(own_negatives.detach()).to(q.dtype)

        def of_block(block: Block) -> tuple[Tensor, ...]:
            return self._of_block(block, k[block.rows], None if own is None else own[block.rows])

        losses, positive, negative = against_constants(of_block, q, negatives, eager=self.reduction == "mean")
        if metrics is not None:
            total = q.detach().sum(0) @ negatives.detach().to(q.dtype).sum(0)
            count = len(q) * (len(negatives) + (0 if own is None else own.shape[1]))
            metrics["positive_cosine"] = positive.mean()
            metrics["negative_cosine"] = (total + negative.sum()) / max(1, count)
        return losses if self.reduction == "none" else losses.mean()

    def _of_block(self, block: Block, keys: Tensor, own: Tensor | None) -> tuple[Tensor, ...]:
        """Losses, cosines with the own key, and sums of those with own negatives.

        Two products in all, since keys are constants.
        """
        parts = [(block.anchors * keys).sum(dim=1, keepdim=True)]
        if own is not None:
            parts.append(torch.einsum("bd,bed->be", block.anchors, own))
        cosines = torch.cat(parts, dim=1)
        few = cosines / self.temperature
        logits = (block.anchors / self.temperature) @ block.columns.T
        with torch.no_grad():
            matrix, beside = logits.detach(), few.detach()
            largest, total, share = exponentials_with_(matrix, beside)
            losses = total.log() + largest - beside[:, 0]
            # By the positive's logit: minus the share of all others, so that nothing cancels near convergence.
            share = share / total[:, None]
            share[:, 0] = -(matrix.sum(dim=1) / total + share[:, 1:].sum(dim=1))
            detached = cosines.detach()
        losses = with_slope(logits, losses, matrix, total.reciprocal()) + (share * (few - beside)).sum(dim=1)
        return losses, detached[:, 0], detached[:, 1:].sum(dim=1)


class BatchKeyContrast(nn.Module):
    """Queries against the keys of the whole batch. Chen, Xie, He, MoCo v3, ICCV 2021, arXiv 2104.02057, algorithm 1.

    ``ctr(q, k) = 2 tau * mean_n -log( exp(q_n.k_n / tau) / sum_m exp(q_n.k_m / tau) )``, m over the global batch. The
    factor keeps gradients of different temperatures comparable.

    Args:
        temperature: tau > 0.
        gather: see the other workers' keys.
    """

    def __init__(self, temperature: float = 1.0, gather: bool = True) -> None:
        super().__init__()
        check_temperature(temperature)
        self.temperature, self.gather = temperature, gather

    @float32_math
    def forward(self, queries: Tensor, keys: Tensor) -> Tensor:
        """The loss of ``queries (batch, dim)`` and their ``keys (batch, dim)``."""
        _check_pair(queries, keys)
        q, k = normalize(queries), normalize(keys.detach())
        columns = collectives.gather_no_grad(k) if self.gather else k
        own = torch.arange(len(q), device=q.device) + first_column(len(q), self.gather)
        return 2 * self.temperature * F.cross_entropy(q @ columns.T / self.temperature, own)


class QueuedNTXent(nn.Module):
    """NT-Xent with further negatives from a queue. Chen et al., SimCLR v2, NeurIPS 2020, arXiv 2006.10029, section 2.

    The denominator of every anchor gains ``sum_{n in queue} exp(z_i.n / tau)``; with an empty queue it is
    :class:`armillary.losses.NTXent`.

    Args:
        temperature: tau > 0.
        gather: see the other workers' samples.
    """

    def __init__(self, temperature: float = 0.1, gather: bool = True) -> None:
        super().__init__()
        self.temperature, self.in_batch = temperature, NTXent(temperature, "none", gather)

    @float32_math
    def forward(
        self, view1: Tensor, view2: Tensor, negatives: Tensor, *, metrics: dict[str, Tensor] | None = None
    ) -> Tensor:
        """The loss of two views ``(batch, dim)`` and ``negatives (K, dim)`` of unit length; metrics as NTXent's."""
        losses: Tensor = self.in_batch(view1, view2, metrics=metrics)
        if not len(negatives):
            return losses.mean()
        z1, z2 = normalize(view1), normalize(view2)
        positive = ((z1 * z2).sum(1) / self.temperature).repeat(2)
        queued = (torch.cat([z1, z2]) @ negatives.detach().T / self.temperature).logsumexp(dim=1)
        # NT-Xent is the logarithm of the batch's denominator less the positive.
        return (torch.logaddexp(losses + positive, queued) - positive).mean()
