"""Skip-gram with negative sampling: which words count, which are noise, and the loss of their vectors.

Mikolov et al., "Distributed Representations of Words and Phrases and their Compositionality", NeurIPS 2013, arXiv
1310.4546.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from armillary.losses.global_batch import global_mean
from armillary.losses.tensors import check_choice, float32_math, not_a_number_guard


def noise_distribution(counts: Tensor, power: float = 0.75) -> Tensor:
    """P_n(w) ~ U(w)^power, section 2.2, ``(vocabulary,)`` float64 from counts; words that never occur get none."""
    weights = torch.where(counts > 0, counts.double().clamp_min(1e-300).pow(power), 0)
    return weights / weights.sum().clamp_min(1e-300)


def keep_probability(frequency: Tensor, threshold: float = 1e-5, rule: str = "paper") -> Tensor:
    """The chance that a word of that share of the corpus survives sub-sampling, same shape, at most 1.

    ``paper`` (eq. 5): ``sqrt(t/f)``. ``code``: ``(sqrt(f/t) + 1) t/f``, as word2vec.c has it.

    Args:
        frequency: f, >= 0.
        threshold: t > 0.
        rule: which of the two.
    """
    check_choice("rule", rule, ("paper", "code"))
    ratio = threshold / frequency.clamp_min(1e-30)
    return (ratio.sqrt() + (ratio if rule == "code" else 0)).clamp_max(1)


class NegativeSampling(nn.Module):
    """A word and its neighbour against words drawn from noise (eq. 4).

    ``L = mean over pairs of -log sigma(v'_O . v_I) - sum_i log sigma(-v'_{w_i} . v_I)``

    The paper maximises the sum over pairs. A drawn negative that is the neighbour itself is left out, as in word2vec.c.

    Args:
        negatives: whether the second term counts; without it vectors grow without bound (a survey's form).
        reduction: ``mean``, or ``none`` for the pairs' losses ``(pairs,)``.
        gather: the mean over all workers' pairs.
    """

    def __init__(self, negatives: bool = True, reduction: str = "mean", gather: bool = True) -> None:
        super().__init__()
        check_choice("reduction", reduction, ("mean", "none"))
        self.negatives, self.reduction, self.gather = negatives, reduction, gather

    @float32_math
    def forward(
        self,
        words: Tensor,
        neighbours: Tensor,
        noise: Tensor,
        counted: Tensor | None = None,
        *,
        metrics: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """The loss; 0 where there is no pair at all.

        Args:
            words: v_I, ``(pairs, dim)``.
            neighbours: v'_O, ``(pairs, dim)``.
            noise: v'_{w_i}, ``(pairs, k, dim)``.
            counted: ``(pairs, k)`` bool, which of the noise counts; all by default.
            metrics: receives ``positive_score`` and ``noise_score``, mean products.
        """
        positive = (words * neighbours).sum(dim=1)
        negative = torch.einsum("pd,pkd->pk", words, noise)
        kept = torch.ones_like(negative) if counted is None else counted.to(negative.dtype)
        losses = F.softplus(-positive)
        if self.negatives:
            losses = losses + (F.softplus(negative) * kept).sum(dim=1)
        pairs = positive.new_tensor(len(positive))
        if metrics is not None:
            metrics["positive_score"] = global_mean(positive.detach().sum(), pairs, self.gather)
            metrics["noise_score"] = global_mean((negative.detach() * kept).sum(), kept.sum(), self.gather)
        if self.reduction == "none":
            return losses
        return global_mean(losses.sum(), pairs, self.gather) + not_a_number_guard(words)
