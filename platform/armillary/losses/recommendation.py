"""Bayesian personalised ranking: what a user chose is scored above what the user did not choose."""

from __future__ import annotations

from torch import Tensor, nn

from armillary.losses.tensors import check_choice, float32_math


class BPR(nn.Module):
    """``L = mean over triples of -log sigmoid(u . i - u . j)``. Rendle et al., UAI 2009, arXiv 1205.2618.

    Products are not normalised: how long an item's vector is says how popular it is. Each triple stands alone, so
    that workers need not see each other's.

    Args:
        reduction: ``mean``, or ``none`` for the triples' losses ``(batch,)``.
    """

    def __init__(self, reduction: str = "mean") -> None:
        super().__init__()
        check_choice("reduction", reduction, ("mean", "none"))
        self.reduction = reduction

    @float32_math
    def forward(
        self, users: Tensor, items: Tensor, negatives: Tensor, *, metrics: dict[str, Tensor] | None = None
    ) -> Tensor:
        """The loss.

        Args:
            users: ``(batch, dim)``.
            items: ``(batch, dim)``, what each chose.
            negatives: ``(batch, dim)``, what each did not choose.
            metrics: receives ``order_accuracy``, the share of triples in the right order.

        Raises:
            ValueError: the shapes differ.
        """
        if not users.shape == items.shape == negatives.shape:
            shapes = ", ".join(str(tuple(part.shape)) for part in (users, items, negatives))
            raise ValueError(f"users, items and negatives differ in shape: {shapes}")
        ahead = (users * (items - negatives)).sum(dim=1)
        if metrics is not None:
            metrics["order_accuracy"] = (ahead.detach() > 0).to(ahead.dtype).mean()
        losses: Tensor = nn.functional.softplus(-ahead)
        return losses.mean() if self.reduction == "mean" else losses
