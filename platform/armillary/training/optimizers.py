"""The job's optimizer over any tensors: the engine's parameters and the class rows that it does not hold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from armillary.components.encoders import learning_rate_shares
from armillary.spec.jobs import OptimizerSpec

# A group's share of the learning rate, beside torch's own keys.
_SHARE = "lr_share"


def parameter_groups(
    tensors: Iterable[Tensor], weight_decay: float, shares: Mapping[int, float] | None = None
) -> list[dict[str, Any]]:
    """Matrices and kernels decay; biases, norms and scalars do not: two groups for each share of the learning rate.

    Args:
        tensors: those without gradient are left out.
        weight_decay: of the first kind.
        shares: of the learning rate, by ``id`` of the tensor; 1 for others.
    """
    groups: dict[tuple[float, bool], list[Tensor]] = {}
    for tensor in tensors:
        if tensor.requires_grad:
            groups.setdefault(((shares or {}).get(id(tensor), 1.0), tensor.ndim > 1), []).append(tensor)
    return [
        {"params": params, "weight_decay": weight_decay if decays else 0.0, _SHARE: share}
        for (share, decays), params in sorted(groups.items(), key=lambda item: item[0], reverse=True)
    ]


def optimizer_over(
    tensors: Iterable[Tensor], spec: OptimizerSpec, shares: Mapping[int, float] | None = None
) -> torch.optim.Optimizer:
    """The job's optimizer over the trainable ones of the tensors, of which there must be some."""
    groups = parameter_groups(tensors, spec.weight_decay, shares)
    if spec.name == "sgd":
        return torch.optim.SGD(groups, lr=spec.lr, momentum=spec.momentum)
    cls = torch.optim.AdamW if spec.name == "adamw" else torch.optim.Adam
    return cls(groups, lr=spec.lr, betas=spec.betas)


def make_optimizer(module: nn.Module, spec: OptimizerSpec) -> torch.optim.Optimizer:
    """The job's optimizer over a module's trainable parameters, slower in deep layers if the job says so."""
    return optimizer_over(module.parameters(), spec, learning_rate_shares(module, spec.layer_decay))


def set_learning_rate(optimizer: Any, lr: float) -> None:
    """Gives every group its share of a learning rate; for optimizers made here, wrapped by an engine or not."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group[_SHARE]
