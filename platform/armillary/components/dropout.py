"""Dropout whose mask depends on the sample and not on where it is computed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from armillary.components.counter import key, sample_keys, uniforms


class CounterDropout(nn.Module):
    """Dropout with a mask drawn from each row's key, so that any number of workers drops the same.

    Without keys (see :func:`dropout_keys`) and in evaluation it does nothing.

    Args:
        p: share of the values that is dropped, in [0, 1).
        layer: tells the masks of an objective's layers apart.

    Raises:
        ValueError: ``p`` is out of range.
    """

    def __init__(self, p: float, layer: int = 0) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"the share that is dropped must be in [0, 1), found {p}")
        self.p, self.layer = p, layer
        self.keys: Tensor | None = None

    def forward(self, inputs: Tensor) -> Tensor:
        """Drops values of ``(rows, ...)`` and scales the others by ``1 / (1 - p)``."""
        if not self.training or self.p == 0 or self.keys is None:
            return inputs
        drawn = uniforms(sample_keys(key(self.layer), self.keys), inputs[0].numel()).view(inputs.shape)
        return inputs * (drawn >= self.p).to(inputs.dtype) / (1 - self.p)


@contextmanager
def dropout_keys(module: nn.Module, keys: Tensor) -> Iterator[None]:
    """Within it every :class:`CounterDropout` inside ``module`` draws from ``keys (rows,)``, one for each row.

    E.g. ``sample_keys(key(seed, step, view), batch.index)``; rows of several views have keys of their own.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, CounterDropout)]
    for layer in layers:
        layer.keys = keys
    try:
        yield
    finally:
        for layer in layers:
            layer.keys = None


def counter_dropout(module: nn.Module) -> nn.Module:
    """Replaces every ``nn.Dropout`` inside ``module``, in place, numbering the layers in order; returns ``module``."""
    number = 0
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Dropout):
                number += 1
                setattr(parent, name, CounterDropout(child.p, number))
    return module
