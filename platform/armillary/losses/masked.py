"""What was hidden is predicted: squared errors of hidden patches."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from armillary.losses.global_batch import global_mean
from armillary.losses.tensors import check_choice, float32_math


class MaskedPatches(nn.Module):
    """Mean squared error of hidden patches. He et al., "Masked Autoencoders", CVPR 2022, arXiv 2111.06377, section 3.

    With x_{n,i} the D numbers of patch i of image n, m = 1 where it was hidden::

        x~ = (x - mean(x)) / sqrt(var(x) + 1e-6)       norm_pix, over a patch's D numbers, variance with D - 1
        L  = sum_{n,i} m_{n,i} 1/D |x^_{n,i} - x~_{n,i}|^2 / sum_{n,i} m_{n,i}

    ``patches="all"`` is the survey's print: the mean over all patches, seen or hidden, of the summed squares,
    ``1/N sum_i |x^_i - x_i|^2``. ``patches="summed"`` is its MaskFeat: hidden patches only, squares summed.

    Args:
        norm_pix: standardise each patch of the target.
        patches: ``hidden``, ``all`` or ``summed``.
        gather: numerator and count over all workers.
    """

    EPS = 1e-6

    def __init__(self, norm_pix: bool = False, patches: str = "hidden", gather: bool = True) -> None:
        super().__init__()
        check_choice("patches", patches, ("hidden", "all", "summed"))
        self.norm_pix, self.patches, self.gather = norm_pix, patches, gather

    @float32_math
    def forward(
        self, predicted: Tensor, target: Tensor, hidden: Tensor, *, metrics: dict[str, Tensor] | None = None
    ) -> Tensor:
        """The loss of ``predicted`` and ``target (batch, T, D)``, ``hidden (batch, T)`` bool; 0 if nothing is hidden.

        ``metrics`` receives ``hidden_error``, the mean square of the hidden patches' errors, and ``hidden_square``,
        that of their targets, which is the error of predicting nothing.

        Raises:
            ValueError: the shapes differ.
        """
        if predicted.shape != target.shape or hidden.shape != target.shape[:2]:
            shapes = ", ".join(str(tuple(item.shape)) for item in (predicted, target, hidden))
            raise ValueError(f"predictions, targets and mask do not belong together: {shapes}")
        if self.norm_pix:
            target = self.standardised(target)
        errors = (predicted - target).square()
        errors = errors.mean(dim=2) if self.patches == "hidden" else errors.sum(dim=2)
        counted = torch.ones_like(hidden) if self.patches == "all" else hidden
        if metrics is not None:
            for name, values in (("hidden_error", predicted - target), ("hidden_square", target)):
                total = (values.detach().square().mean(dim=2) * hidden).sum()
                metrics[name] = global_mean(total, hidden.sum(), self.gather)
        # Not a product with the mask: what is not counted may be anything.
        return global_mean(torch.where(counted, errors, 0).sum(), counted.sum(), self.gather)

    def standardised(self, target: Tensor) -> Tensor:
        """Each patch with mean 0 and variance 1; a patch of one colour becomes 0."""
        mean, variance = target.mean(dim=2, keepdim=True), target.var(dim=2, keepdim=True)
        return (target - mean) / (variance + self.EPS).sqrt()
