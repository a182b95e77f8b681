"""The conditional contrastive loss of ContraGAN: images against their class's vector and against each other."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from armillary.losses.global_batch import global_rows, same_label, self_mask
from armillary.losses.key_contrast import check_temperature
from armillary.losses.tensors import check_choice, check_embeddings, check_labels, float32_math, normalize


class ConditionalContrastive(nn.Module):
    """2C loss. Kang and Park, "ContraGAN", NeurIPS 2020, arXiv 2006.12681, eq. 8.

    With l(x) embeddings and e(y) a learned vector of each class, all of unit length, and t the temperature::

                      exp(l_i.e(y_i) / t) + sum_{k != i, y_k = y_i} exp(l_i.l_k / t)
        L_i = -log  ------------------------------------------------------------------
                      exp(l_i.e(y_i) / t) + sum_{k != i} exp(l_i.l_k / t)

    Never below 0; 0 for a batch of one class.

    Args:
        num_classes: vectors.
        embedding_dim: their width.
        temperature: t > 0.
        reduction: ``mean``, or ``none`` for the losses ``(batch,)``.
        gather: see the other workers' samples.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int,
        temperature: float = 1.0,
        reduction: str = "mean",
        gather: bool = True,
    ) -> None:
        super().__init__()
        check_temperature(temperature)
        check_choice("reduction", reduction, ("mean", "none"))
        self.temperature, self.reduction, self.gather = temperature, reduction, gather
        self.weight = nn.Parameter(torch.randn(num_classes, embedding_dim))

    @float32_math
    def forward(self, embeddings: Tensor, labels: Tensor, *, metrics: dict[str, Tensor] | None = None) -> Tensor:
        """The loss of ``embeddings (batch, dim)`` with ``labels (batch,)``; ``metrics`` receives ``class_cosine``.

        Raises:
            ValueError: a label has no vector.
        """
        check_embeddings(embeddings, labels)
        check_labels(labels, len(self.weight))
        samples = normalize(embeddings)
        of_class = (samples * normalize(self.weight)[labels]).sum(1, keepdim=True)
        logits = samples @ global_rows(samples, self.gather).T / self.temperature
        itself, same = self_mask(logits, self.gather), same_label(labels, self.gather)
        proxy = of_class / self.temperature
        numerator = torch.cat([proxy, logits.masked_fill(itself | ~same, -torch.inf)], dim=1).logsumexp(dim=1)
        denominator = torch.cat([proxy, logits.masked_fill(itself, -torch.inf)], dim=1).logsumexp(dim=1)
        if metrics is not None:
            metrics["class_cosine"] = of_class.detach().mean()
        losses = denominator - numerator
        return losses if self.reduction == "none" else losses.mean()
