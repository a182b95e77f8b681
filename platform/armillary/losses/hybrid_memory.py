"""A memory of class centres, clusters and single images at once, as SpCL contrasts with."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from armillary.losses.tensors import check_embeddings, float32_math, normalize, not_a_number_guard


class HybridMemoryLoss(nn.Module):
    """The unified contrastive loss of SpCL. Y. Ge et al., NeurIPS 2020, arXiv 2006.02713, eq. 1.

    ::

        L = mean_f -log( exp(f.z+ / tau) / (sum_k exp(f.w_k / tau) + sum_k exp(f.c_k / tau) + sum_k exp(f.v_k / tau)) )

    w are the centres of labelled classes, c the plain means of clusters of unlabelled images, v the images outside all
    clusters; z+ is the one of them that f belongs to. The memory is constant. The product with a cluster's mean is the
    mean of the products with its members, so that no centre is built. The released code adds 1e-6 twice around the
    softmax; here it is a log-sum-exp.

    Args:
        temperature: tau > 0.
    """

    def __init__(self, temperature: float = 0.05) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature must be above 0, found {temperature}")
        self.temperature = temperature

    @float32_math
    def forward(
        self,
        embeddings: Tensor,
        positive: Tensor,
        centres: Tensor,
        instances: Tensor,
        group: Tensor,
        *,
        metrics: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """The mean over this worker's samples.

        Args:
            embeddings: ``(batch, dim)``.
            positive: ``(batch,)`` int64: a class k < C, or C + the group of an unlabelled image.
            centres: w, ``(C, dim)`` of length 1.
            instances: ``(n, dim)`` of length 1.
            group: ``(n,)`` int64 from 0: images of one cluster share a number, others have one of their own; -1 for
                those that are no candidates.
            metrics: receives ``positive_cosine`` and ``candidates``.
        """
        check_embeddings(embeddings)
        f = normalize(embeddings)
        members = group >= 0
        rows = instances[members].to(f.dtype)
        # Numbers without a member are no candidates; the others move together.
        numbers, place = group[members].unique(return_inverse=True)
        size = torch.bincount(place, minlength=len(numbers)).to(f.dtype)
        of_groups = f.new_zeros(len(f), len(numbers)).index_add(1, place, f @ rows.T) / size
        cosines = torch.cat([f @ centres.to(f.dtype).T, of_groups], dim=1)
        classes = len(centres)
        grouped = classes + torch.searchsorted(numbers, positive - classes).clamp_max(max(len(numbers) - 1, 0))
        target = torch.where(positive < classes, positive, grouped)[:, None]
        own = cosines.gather(1, target)[:, 0]
        if metrics is not None:
            metrics["positive_cosine"] = own.detach().mean()
            metrics["candidates"] = f.new_tensor(float(cosines.shape[1]))
        logits = cosines / self.temperature
        return (logits.logsumexp(dim=1) - own / self.temperature).mean() + not_a_number_guard(embeddings)
