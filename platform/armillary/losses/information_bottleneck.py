"""How much an embedding may tell of its image: variational bottlenecks, and the term that asks for more."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from armillary.losses.global_batch import global_rows
from armillary.losses.tensors import check_choice, check_embeddings, check_labels, float32_math, not_a_number_guard

# Keeps the logarithm of a standard deviation finite.
LEAST_SIGMA = 1e-6


def kl_to_standard_normal(mean: Tensor, sigma: Tensor) -> Tensor:
    """``KL( N(mean, sigma^2) | N(0, 1) )`` summed over the last dimension, in nats."""
    return 0.5 * (mean.square() + sigma.square() - 1 - 2 * sigma.log()).sum(dim=-1)


def kl_of_normals(mean: Tensor, sigma: Tensor, other_mean: Tensor, other_sigma: Tensor) -> Tensor:
    """``KL( N(mean, sigma^2) | N(other_mean, other_sigma^2) )`` summed over the last dimension, in nats."""
    ratio = sigma / other_sigma
    return (0.5 * (ratio.square() + ((mean - other_mean) / other_sigma).square() - 1) - ratio.log()).sum(dim=-1)


class StochasticHead(nn.Module):
    """A Gaussian of width K for each embedding: ``mu = W x``, ``sigma = softplus(V x - shift)``.

    Args:
        embedding_dim: width of the embeddings.
        size: K.
        sigma_shift: subtracted before the softplus, 5 in the code of Alemi et al., so that sigma starts small.
    """

    def __init__(self, embedding_dim: int, size: int, sigma_shift: float = 5.0) -> None:
        super().__init__()
        self.linear, self.sigma_shift = nn.Linear(embedding_dim, 2 * size), sigma_shift

    def forward(self, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """Mu and sigma, ``(batch, K)`` each."""
        mean, raw = self.linear(embeddings).chunk(2, dim=1)
        return mean, F.softplus(raw - self.sigma_shift) + LEAST_SIGMA


class VariationalBottleneck(nn.Module):
    """A classifier behind a noisy channel whose capacity costs.

    VIB (Alemi et al., ICLR 2017, arXiv 1612.00410, eq. 17) with a standard normal as prior, z = mu + sigma eps::

        L = mean_n [ -log q(y_n | z_n)  +  beta KL( p(z | x_n) | N(0, 1) ) ]

    CEB (Fischer, Entropy 22(9), 2020, arXiv 2002.05379) with a learned normal b for every class as backward encoder::

        L = mean_n [ KL( e(z | x_n) | b(z | y_n) )  -  gamma log c(y_n | z_n) ]

    The CEB paper estimates its first term with the sample z; the closed form used here is that estimate's mean. With
    ``gamma = 1`` the bottleneck keeps what the classes need and no more.

    Args:
        embedding_dim: width of the embeddings.
        num_classes: C.
        kind: ``vib`` or ``ceb``.
        size: K, width of z.
        weight: beta of VIB, gamma of CEB; 0 or more.
        sigma_shift: see :class:`StochasticHead`.
        backward_variance: CEB: ``unit`` or ``learned``, one for each class and dimension.

    Raises:
        ValueError: an option out of range; in ``forward`` a label outside the classes.
    """

    def __init__(
        self,
        embedding_dim: int,
        num_classes: int,
        kind: str = "vib",
        size: int = 256,
        weight: float = 1e-3,
        sigma_shift: float = 5.0,
        backward_variance: str = "unit",
    ) -> None:
        super().__init__()
        check_choice("kind", kind, ("vib", "ceb"))
        check_choice("backward_variance", backward_variance, ("unit", "learned"))
        if not weight >= 0:
            raise ValueError(f"weight must be at least 0, found {weight}")
        self.kind, self.weight, self.num_classes = kind, weight, num_classes
        self.encode = StochasticHead(embedding_dim, size, sigma_shift)
        self.classify = nn.Linear(size, num_classes)
        if kind == "ceb":
            self.class_mean = nn.Parameter(torch.zeros(num_classes, size))
            learned = backward_variance == "learned"
            self.class_log_sigma = nn.Parameter(torch.zeros(num_classes, size)) if learned else None

    @float32_math
    def forward(
        self, embeddings: Tensor, labels: Tensor, noise: Tensor, *, metrics: dict[str, Tensor] | None = None
    ) -> Tensor:
        """The mean over this worker's samples.

        Args:
            embeddings: ``(batch, embedding_dim)``.
            labels: ``(batch,)``.
            noise: eps, standard normal ``(batch, K)``; one draw for each sample.
            metrics: receives ``rate``, the mean KL in nats, and ``bottleneck_accuracy``.
        """
        check_embeddings(embeddings, labels)
        check_labels(labels, self.num_classes)
        mean, sigma = self.encode(embeddings)
        logits = self.classify(mean + sigma * noise.to(mean.dtype))
        rate, entropy = self.rate(mean, sigma, labels).mean(), F.cross_entropy(logits, labels)
        if metrics is not None:
            metrics["rate"] = rate.detach()
            metrics["bottleneck_accuracy"] = (logits.detach().argmax(dim=1) == labels).to(mean.dtype).mean()
        loss: Tensor = entropy + self.weight * rate if self.kind == "vib" else rate + self.weight * entropy
        return loss

    def rate(self, mean: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        """The first or second KL above, ``(batch,)``."""
        if self.kind == "vib":
            return kl_to_standard_normal(mean, sigma)
        spread = torch.ones_like(mean) if self.class_log_sigma is None else self.class_log_sigma[labels].exp()
        return kl_of_normals(mean, sigma, self.class_mean[labels], spread)


class InformationLowerBound(nn.Module):
    """What a sample of an embedding's Gaussian tells of its image. H. Wang et al., CVPR 2022, arXiv 2203.07004, LBE.

    ``I = -mean_i log sum_j exp(-|z_i - mu_j|^2 / c)`` with z = mu + noise, over the global batch: the released
    estimate, which leaves out log N and the own pair's density, a function of the noise. It is to be *subtracted*.

    Args:
        score_scale: c > 0; 20 for small images, 80 for ImageNet.
        gather: see the other workers' samples.
    """

    def __init__(self, score_scale: float = 20.0, gather: bool = True) -> None:
        super().__init__()
        if not score_scale > 0:
            raise ValueError(f"score_scale must be above 0, found {score_scale}")
        self.score_scale, self.gather = score_scale, gather

    @float32_math
    def forward(self, means: Tensor, samples: Tensor) -> Tensor:
        """The mean over this worker's ``samples (batch, dim)`` of ``means (batch, dim)``, in nats."""
        check_embeddings(means)
        columns = global_rows(means, self.gather)
        squared = samples.square().sum(1, keepdim=True) - 2 * samples @ columns.T + columns.square().sum(1)
        return -(-squared.clamp_min(0) / self.score_scale).logsumexp(dim=1).mean() + not_a_number_guard(means)
