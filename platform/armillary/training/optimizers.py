"""The job's optimizer over any tensors: the engine's parameters and the class rows that it does not hold."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from armillary.spec.jobs import OptimizerSpec


def parameter_groups(tensors: Iterable[Tensor], weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: matrices and kernels decay; biases, norms and scalars do not."""
    trainable = [tensor for tensor in tensors if tensor.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def optimizer_over(tensors: Iterable[Tensor], spec: OptimizerSpec) -> torch.optim.Optimizer:
    """The job's optimizer over the trainable ones of the tensors, of which there must be some."""
    groups = parameter_groups(tensors, spec.weight_decay)
    if spec.name == "sgd":
        return torch.optim.SGD(groups, lr=spec.lr, momentum=spec.momentum)
    cls = torch.optim.AdamW if spec.name == "adamw" else torch.optim.Adam
    return cls(groups, lr=spec.lr, betas=spec.betas)
