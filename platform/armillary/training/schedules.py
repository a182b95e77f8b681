"""The learning rate as a pure function of how far training has come, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math

from armillary.spec.jobs import OptimizerSpec


def learning_rate(spec: OptimizerSpec, epoch: float, epochs: int) -> float:
    """The learning rate at a point of training.

    Args:
        spec: peak rate, warm-up and shape.
        epoch: epochs completed, with a fraction, in [0, epochs].
        epochs: length of the training.
    """
    warmup = min(spec.warmup_epochs, float(epochs))
    if epoch < warmup:
        return spec.lr * epoch / warmup
    if spec.schedule == "constant":
        return spec.lr
    if spec.schedule == "step":
        return spec.lr * spec.step_factor ** sum(epoch >= boundary for boundary in spec.step_epochs)
    progress = (epoch - warmup) / max(epochs - warmup, 1e-12)
    floor = spec.final_lr_ratio
    return spec.lr * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))
