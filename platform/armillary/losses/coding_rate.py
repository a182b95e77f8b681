"""The information a noisy linear-Gaussian channel passes on about its input (catalog: infomax_linsker)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from armillary import collectives
from armillary.losses.tensors import check_embeddings, float32_math


class CodingRate(nn.Module):
    """Minus the mutual information of an embedding and its noisy copy. Linsker, IEEE Computer 21(3), 1988.

    ``L = -1/2 log det(I + Cov(z) / sigma^2)``, in nats, with the covariance over the global batch (n - 1).

    It grows without bound with the length of z: combine it with a term that holds embeddings together, or give it unit
    vectors. Constant embeddings give 0, a rotation changes nothing.

    Args:
        noise_variance: sigma^2 > 0.
        gather: the covariance over all workers.
    """

    def __init__(self, noise_variance: float = 0.5, gather: bool = True) -> None:
        super().__init__()
        if not noise_variance > 0:
            raise ValueError(f"noise_variance must be above 0, found {noise_variance}")
        self.noise_variance, self.gather = noise_variance, gather

    @float32_math
    def forward(self, embeddings: Tensor) -> Tensor:
        """The loss of ``(batch, dim)``; every worker returns that of the global batch."""
        check_embeddings(embeddings)
        workers = collectives.world_size() if self.gather else 1
        total = collectives.all_reduce_sum if self.gather else (lambda local: local)
        count = len(embeddings) * workers
        centred = embeddings - total(embeddings.sum(0)) / count
        covariance = total(centred.T @ centred) / max(count - 1, 1)
        identity = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
        information: Tensor = torch.linalg.slogdet(identity + covariance / self.noise_variance).logabsdet / 2
        return -information
