"""What every protocol takes and returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class ProtocolResult:
    """The outcome of one protocol.

    ``metrics`` maps ``<protocol>/<metric>`` to a finite number; ``curves`` maps short names (``roc_far``) to the arrays
    a figure is drawn from.
    """

    metrics: dict[str, float]
    curves: dict[str, NDArray[Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class EvaluationSet:
    """Checked input of a protocol.

    Args:
        embeddings: ``(n, d)`` float64 as the encoder gave them, finite, not normalised.
        labels: ``(n,)`` int64; classes are counted from 0 over the evaluated and the training samples together.
        train_embeddings: ``(m, d)`` float64, for protocols that need training samples.
        train_labels: ``(m,)`` int64.
        seed: fixes whatever a protocol draws.
    """

    embeddings: Floats
    labels: Ints
    train_embeddings: Floats | None = None
    train_labels: Ints | None = None
    seed: int = 0
