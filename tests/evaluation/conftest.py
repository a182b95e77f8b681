"""Labelled points on which protocols have something to say."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

Blobs = Callable[..., tuple[np.ndarray, np.ndarray]]


@pytest.fixture
def blobs() -> Blobs:
    """Makes ``per_class`` noisy points around each of ``classes`` directions."""

    def make(classes: int = 8, per_class: int = 6, width: int = 16, noise: float = 0.8, seed: int = 0) -> Any:
        rng = np.random.default_rng(seed)
        labels = np.repeat(np.arange(classes), per_class)
        centers = rng.standard_normal((classes, width))
        return centers[labels] + noise * rng.standard_normal((len(labels), width)), labels

    return make
