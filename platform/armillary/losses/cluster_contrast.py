"""Losses that compare samples with clusters: codes of other views, centroids, hierarchies, experts.

Prototypes, codes, queues and temperatures are constants here; only queries, scores, gates and experts get a gradient.
Means run over this worker's samples.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from armillary.losses.key_contrast import check_temperature
from armillary.losses.tensors import float32_math, normalize


class SwappedPrediction(nn.Module):
    """Every view predicts the codes of the large ones. Caron et al., "SwAV", NeurIPS 2020, arXiv 2006.09882, eq. 2.

    ::

        p_v = softmax(S_v / tau),   l(v, g) = -sum_k q_g^k log p_v^k
        L = 1/G sum_g 1/(V - 1) sum_{v != g} mean_b l(v, g)

    as released; with two views that is half of the paper's sum of two terms, and what the survey prints.

    Args:
        temperature: tau > 0.
    """

    def __init__(self, temperature: float = 0.1) -> None:
        super().__init__()
        check_temperature(temperature)
        self.temperature = temperature

    @float32_math
    def forward(self, scores: Tensor, codes: Tensor) -> Tensor:
        """The loss.

        Args:
            scores: S, cosines of every view with the prototypes ``(V, batch, K)``, the large views first.
            codes: q of the large views, ``(G, batch, K)``, rows summing to 1.
        """
        logs = (scores / self.temperature).log_softmax(dim=2)
        terms = -torch.einsum("gbk,vbk->gv", codes.to(logs.dtype), logs) / scores.shape[1]
        others = terms.sum() - terms.diagonal().sum()
        return others / (len(codes) * (len(scores) - 1))


@float32_math
def prototype_contrast(
    queries: Tensor, prototypes: Tensor, widths: Tensor, own: Tensor, allowed: Tensor | None = None
) -> Tensor:
    """Each query against the centroid of its cluster. Li et al., "PCL", ICLR 2021, arXiv 2005.04966, eq. 11.

    ``-log( exp(v.c_s / phi_s) / sum_{j allowed or s} exp(v.c_j / phi_j) )``: every logit is divided by its own width.

    Args:
        queries: v ``(batch, dim)``, scaled to unit length here.
        prototypes: c ``(k, dim)`` of unit length; a row of zeros stands for no cluster and is left out.
        widths: phi ``(k,)`` > 0.
        own: s ``(batch,)`` int64.
        allowed: ``(batch, k)`` or ``(1, k)`` bool, prototypes in the denominator beside the own; all by default.

    Returns:
        The queries' losses ``(batch,)``.
    """
    logits = normalize(queries) @ prototypes.to(queries.dtype).T / widths.to(queries.dtype)
    kept = (prototypes.abs().sum(dim=1) > 0)[None, :].expand_as(logits)
    if allowed is not None:
        kept = kept & allowed
    kept = kept.scatter(1, own[:, None], True)
    positive = logits.gather(1, own[:, None]).squeeze(1)
    return logits.masked_fill(~kept, -torch.inf).logsumexp(dim=1) - positive


@float32_math
def selected_instance_contrast(
    queries: Tensor, keys: Tensor, negatives: Tensor, keep: Tensor, temperature: float
) -> Tensor:
    """InfoNCE over chosen negatives. Guo et al., "HCSC", CVPR 2022, arXiv 2202.00455, eq. 6.

    A query that would be left without a negative keeps all of them. The released code leaves dropped negatives in the
    denominator as ``exp(0)``; here they are gone.

    Args:
        queries: ``(batch, dim)``.
        keys: ``(batch, dim)``, row n that of query n.
        negatives: ``(K, dim)`` of unit length.
        keep: ``(batch, K)`` bool.
        temperature: tau > 0.

    Returns:
        The queries' losses ``(batch,)``.
    """
    q, k = normalize(queries), normalize(keys.detach())
    keep = keep | ~keep.any(dim=1, keepdim=True)
    positive = (q * k).sum(1) / temperature
    others = (q @ negatives.to(q.dtype).T / temperature).masked_fill(~keep, -torch.inf)
    return torch.cat([positive[:, None], others], dim=1).logsumexp(dim=1) - positive


@torch.no_grad()
def keep_probability(candidates: Tensor, prototypes: Tensor, widths: Tensor, cluster: Tensor) -> Tensor:
    """How likely each candidate is of another cluster than a query's. HCSC, eqs. 5 and 8.

    ``p(z_j; z) = 1 - exp(s(z_j, c(z))) / sum_c exp(s(z_j, c)),  s(z, c) = z.c / tau_c``

    Args:
        candidates: z_j ``(n, dim)`` of unit length.
        prototypes: c ``(k, dim)`` of unit length; rows of zeros are no clusters.
        widths: tau_c ``(k,)``.
        cluster: c(z) of each query, ``(batch,)`` int64.

    Returns:
        ``(batch, n)``.
    """
    logits = candidates @ prototypes.T / widths
    logits = logits.masked_fill((prototypes.abs().sum(dim=1) == 0)[None, :], -torch.inf)
    return (1 - logits.softmax(dim=1)[:, cluster].T).clamp(0, 1)


@float32_math
def expert_log_likelihoods(experts: Tensor, keys: Tensor, centres: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """``log p(y | x, k)`` of every expert. Tsai, Li, Zhu, "MiCE", ICLR 2021, arXiv 2105.01899, eq. 4.

    ``log exp(v_k.(f_k + mu_k) / tau) - log(exp(v_k.(f_k + mu_k) / tau) + sum_i exp(q_ik.(f_k + mu_k) / tau))``

    Args:
        experts: f ``(batch, K, dim)``.
        keys: v ``(batch, K, dim)``, the teacher's.
        centres: mu ``(K, dim)``.
        queue: q ``(n, K, dim)`` of unit length.
        temperature: tau > 0.

    Returns:
        ``(batch, K)``.
    """
    query = (normalize(experts) + normalize(centres)) / temperature
    positive = (query * normalize(keys.detach())).sum(dim=2)
    # One expert at a time: batch x queue x experts numbers need not be there at once.
    others = [(query[:, k] @ queue[:, k].to(query.dtype).T).logsumexp(dim=1) for k in range(query.shape[1])]
    return positive - torch.logaddexp(positive, torch.stack(others, dim=1))


@float32_math
def mixture_loss(gates: Tensor, likelihoods: Tensor) -> Tensor:
    """``-mean_n log sum_k pi_nk p(y_n | x_n, k)``: MiCE's bound at the exact posterior, value and gradient.

    Args:
        gates: log pi ``(batch, K)``.
        likelihoods: log p ``(batch, K)``.
    """
    return -(gates + likelihoods).logsumexp(dim=1).mean()
