"""Logistic loss over pairs: equal labels should have a high similarity, others a low one."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from armillary.losses.global_batch import global_mean, global_rows, same_label, self_mask
from armillary.losses.tensors import check_embeddings, float32_math, normalize, not_a_number_guard


class LogisticPairs(nn.Module):
    """Each pair of the batch as a yes-or-no question.

    ``L = -mean_{positive pairs} log sigma(s) - mean_{negative pairs} log sigma(-s),  s = cos / tau``

    A tutorial on clustering faces prints ``-log sigma(z+ + z-) + log sigma(-z+ - z-)`` for this term, which is
    ``-(z+ + z-)``: linear, without a lower bound. This is the logistic loss it describes in words.

    Args:
        temperature: tau > 0.
    """

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature must be above 0, found {temperature}")
        self.temperature = temperature

    @float32_math
    def forward(self, embeddings: Tensor, labels: Tensor, *, metrics: dict[str, Tensor] | None = None) -> Tensor:
        """This worker's share of the mean over all pairs; ``(batch, dim)`` and ``(batch,)``."""
        check_embeddings(embeddings, labels)
        unit = normalize(embeddings)
        similarity = unit @ global_rows(unit).T / self.temperature
        same = same_label(labels)
        positive, negative = same & ~self_mask(same), ~same
        together = global_mean(F.softplus(-similarity)[positive].sum(), positive.sum())
        apart = global_mean(F.softplus(similarity)[negative].sum(), negative.sum())
        if metrics is not None:
            metrics.update(together=together.detach(), apart=apart.detach())
        return together + apart + not_a_number_guard(embeddings)
