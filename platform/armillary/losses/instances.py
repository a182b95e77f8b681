"""Every image a class of its own: against a memory bank's rows, or against the features of the batch.

Symbols: v a feature of unit length, n the number of images, m the number of noise samples, tau the temperature. Rows of
a bank are constants of unit length.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from armillary.losses.global_batch import first_column, global_rows, global_sum
from armillary.losses.key_contrast import check_temperature
from armillary.losses.tensors import check_choice, check_embeddings, float32_math, normalize

# 1 - P may be no smaller than this under a logarithm.
_SMALLEST = 1e-7


def log_complement(log_probability: Tensor) -> Tensor:
    """``log(1 - P)`` from ``log P``, same shape; at least the logarithm of 1e-7."""
    return torch.log1p(-log_probability.exp().clamp_max(1 - _SMALLEST))


def cosines_at(vectors: Tensor, rows: Tensor, places: Tensor) -> Tensor:
    """Products of ``vectors (batch, dim)`` with the ``rows (n, dim)`` at ``places (batch, m)``: ``(batch, m)``.

    Through all products or through copies of the rows, whichever takes less memory. The rows may lie on another device
    than the vectors; what is used of them is copied.
    """
    if len(rows) <= places.shape[1] * vectors.shape[1]:
        return (vectors @ rows.to(vectors.device).T).gather(1, places)
    return torch.einsum("bd,bmd->bm", vectors, rows[places.to(rows.device)].to(vectors.device))


class NonParametricSoftmax(nn.Module):
    """Softmax over all rows of a bank. Wu et al., instance discrimination, CVPR 2018, arXiv 1805.01978, eq. 2.

    ``-log P(i|v)`` with ``P(i|v) = exp(v_i.v / tau) / sum_j exp(v_j.v / tau)``, averaged over the batch.

    Args:
        temperature: tau > 0.
    """

    def __init__(self, temperature: float = 0.07) -> None:
        super().__init__()
        check_temperature(temperature)
        self.temperature = temperature

    @float32_math
    def forward(self, vectors: Tensor, rows: Tensor, index: Tensor, counted: Tensor | None = None) -> Tensor:
        """The loss.

        Args:
            vectors: ``(batch, dim)``, of any length.
            rows: ``(n, dim)``, unit length.
            index: ``(batch,)`` int64, the vectors' own rows.
            counted: ``(n,)`` bool, rows in the denominator; a vector's own always is.
        """
        logits = normalize(vectors) @ rows.detach().T / self.temperature
        if counted is not None:
            own = torch.arange(len(rows), device=index.device) == index[:, None]
            logits = logits.masked_fill(~(counted | own), -torch.inf)
        return F.cross_entropy(logits, index)


class NoiseContrastive(nn.Module):
    """Noise-contrastive estimation with a constant normaliser. Wu et al. 2018, arXiv 1805.01978, eqs. 5 to 8.

    ::

        P(i|v) = exp(v_i.v / tau) / Z,    h(i, v) = P(i|v) / (P(i|v) + m / n)
        J = -log h(i, v) - sum_{i' in noise} log(1 - h(i', v)),    mean over the batch

    Z is n times the mean of the first batch's exponentials, then stays what it is: :meth:`freeze`.

    Args:
        temperature: tau > 0; cosines are divided by it.
        images: n.
        gather: Z from the first batch of all workers.
    """

    log_normaliser: Tensor
    frozen: Tensor

    def __init__(self, temperature: float, images: int, gather: bool = True) -> None:
        super().__init__()
        check_temperature(temperature)
        self.temperature, self.images, self.gather = temperature, images, gather
        self.register_buffer("log_normaliser", torch.zeros(()))
        self.register_buffer("frozen", torch.zeros((), dtype=torch.bool))
        self._estimate: Tensor | None = None

    def estimate(self, scores: Tensor) -> Tensor:
        """``log(n mean exp(score))`` over the scores ``(...)`` of all workers, without gradient."""
        largest = 1 / self.temperature  # of a cosine over tau, so that no exponential overflows
        total = global_sum((scores.detach() - largest).exp().sum(), self.gather)
        count = global_sum(scores.new_tensor(scores.numel()), self.gather)
        return math.log(self.images) + largest + (total / count).log()

    @torch.no_grad()
    def freeze(self) -> None:
        """Keeps the last estimate for good, unless one was kept before; after the first step."""
        if self._estimate is not None and not bool(self.frozen):
            self.log_normaliser.copy_(self._estimate)
            self.frozen.fill_(True)
        self._estimate = None

    @float32_math
    def forward(self, positive: Tensor, noise: Tensor) -> Tensor:
        """The loss of cosines with the own row ``(batch,)`` and with noise rows ``(batch, m)``."""
        scores = torch.cat([positive[:, None], noise], dim=1) / self.temperature
        if bool(self.frozen):
            log_z = self.log_normaliser
        else:
            log_z = self._estimate = self.estimate(scores)
        # log h = -softplus(-ratio) and log(1 - h) = -softplus(ratio) with ratio = log P - log(m / n).
        ratio = scores - log_z - math.log(noise.shape[1] / self.images)
        return (F.softplus(-ratio[:, 0]) + F.softplus(ratio[:, 1:]).sum(dim=1)).mean()


class SampledInstances(nn.Module):
    """The loss of PIRL. Misra and van der Maaten, CVPR 2020, arXiv 1912.01991, eqs. 3 and 4.

    With h the softmax over the own row and the drawn ones, ``-log h(own) - sum_{drawn} log(1 - h(drawn))``, mean over
    the batch. The paper prints h with the denominator of a positive pair only; that drawn rows share it is our reading.

    Args:
        temperature: tau > 0; cosines are divided by it.
    """

    def __init__(self, temperature: float = 0.07) -> None:
        super().__init__()
        check_temperature(temperature)
        self.temperature = temperature

    @float32_math
    def forward(self, positive: Tensor, drawn: Tensor) -> Tensor:
        """The loss of cosines with the own row ``(batch,)`` and with drawn rows ``(batch, m)``."""
        log_h = (torch.cat([positive[:, None], drawn], dim=1) / self.temperature).log_softmax(dim=1)
        return -(log_h[:, 0] + log_complement(log_h[:, 1:]).sum(dim=1)).mean()


class InvariantSpread(nn.Module):
    """Invariant and spreading features. Ye et al., CVPR 2019, arXiv 1904.03436, eqs. 3 to 6.

    f_i features of m images, g_i of their augmented copies; the mean over images of::

        J_i = -log P(i|g_i) - w sum_{j != i} log(1 - P(i|f_j))
        P(i|g) = exp(f_i.g / tau) / sum_k exp(f_k.g / tau)

    The authors' code, read, is another loss: both halves are anchors; of an anchor a the positive a+ is its other half;
    P runs over everything but a itself, and everything but a is a constant::

        J_a = -log P_a(a+) - w sum_{k != a, a+} log(1 - P_a(k)),    mean over the 2m anchors

    There w also scales the negatives in P's denominator; here it does not, which is the same at w = 1.

    Args:
        temperature: tau > 0.
        negative_weight: w >= 0; 1 in the paper.
        variant: ``paper`` or ``code``.
        gather: see the other workers' samples.
    """

    def __init__(
        self, temperature: float = 0.1, negative_weight: float = 1.0, variant: str = "paper", gather: bool = True
    ) -> None:
        super().__init__()
        check_temperature(temperature)
        check_choice("variant", variant, ("paper", "code"))
        self.temperature, self.negative_weight, self.variant, self.gather = (
            temperature,
            negative_weight,
            variant,
            gather,
        )

    @float32_math
    def forward(self, view1: Tensor, view2: Tensor, *, metrics: dict[str, Tensor] | None = None) -> Tensor:
        """The loss of ``view1`` (f) and ``view2`` (g), ``(batch, dim)``; ``metrics`` receives the two parts' means."""
        check_embeddings(view1)
        if view1.shape != view2.shape:
            raise ValueError(f"the views differ in shape: {tuple(view1.shape)} and {tuple(view2.shape)}")
        f, g = normalize(view1), normalize(view2)
        own = torch.arange(len(f), device=f.device) + first_column(len(f), self.gather)
        positive, negative = (self._paper if self.variant == "paper" else self._code)(f, g, own)
        if metrics is not None:
            metrics.update(invariant=positive.detach().mean(), spreading=negative.detach().mean())
        return (positive + self.negative_weight * negative).mean()

    def _paper(self, f: Tensor, g: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
        columns = global_rows(f, self.gather)
        positive = F.cross_entropy(g @ columns.T / self.temperature, own, reduction="none")
        log_p = (f @ columns.T / self.temperature).log_softmax(dim=1)
        itself = torch.arange(len(columns), device=f.device) == own[:, None]
        return positive, -log_complement(log_p).masked_fill(itself, 0).sum(dim=1)

    def _code(self, f: Tensor, g: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
        columns = torch.cat([global_rows(half.detach(), self.gather) for half in (f, g)])
        itself, partner = torch.cat([own, own + len(columns) // 2]), torch.cat([own + len(columns) // 2, own])
        place = torch.arange(len(columns), device=f.device)
        logits = torch.cat([f, g]) @ columns.T / self.temperature
        log_p = logits.masked_fill(place == itself[:, None], -torch.inf).log_softmax(dim=1)
        skipped = (place == itself[:, None]) | (place == partner[:, None])
        return -log_p.gather(1, partner[:, None])[:, 0], -log_complement(log_p).masked_fill(skipped, 0).sum(dim=1)
