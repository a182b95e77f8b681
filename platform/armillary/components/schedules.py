"""Values that change in the course of training, as pure functions of the step, so that they resume by themselves."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Shape = Literal["constant", "linear", "cosine", "step"]


def ramp(shape: Shape, start: float, end: float, progress: float) -> float:
    """A value on the way from ``start`` to ``end``.

    Args:
        shape: ``constant`` stays at ``start``; ``linear``; ``cosine`` is half a period, level at both ends; ``step``
            jumps to ``end`` when progress reaches 1.
        start: value at progress 0 and before.
        end: value at progress 1 and after.
        progress: 0 at the beginning of the ramp, 1 at its end.
    """
    progress = min(max(progress, 0.0), 1.0)
    if shape == "constant":
        return start
    if shape == "step":
        return end if progress >= 1 else start
    share = progress if shape == "linear" else 0.5 * (1 - math.cos(math.pi * progress))
    return end + (start - end) * (1 - share)


@dataclass(frozen=True)
class Schedule:
    """A ramp over steps (or epochs, in whatever unit ``length`` is given): call it with the step.

    Args:
        start: value until ``begin``.
        end: value from ``begin + length`` on.
        length: duration of the ramp; with 0 it jumps at ``begin``.
        shape: see :func:`ramp`.
        begin: where the ramp begins.
    """

    start: float
    end: float
    length: float
    shape: Shape = "cosine"
    begin: float = 0

    def __call__(self, step: float) -> float:
        """The value at a step."""
        passed = step - self.begin
        progress = passed / self.length if self.length > 0 else float(passed >= 0)
        return ramp(self.shape, self.start, self.end, progress)
