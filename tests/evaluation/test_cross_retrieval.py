"""Images look for captions and captions for images."""

from __future__ import annotations

import numpy as np
import pytest

from armillary.evaluation import protocols
from armillary.spec.errors import UserError


def judge(images: np.ndarray, texts: np.ndarray, captions: np.ndarray) -> dict[str, float]:
    columns = {"caption_embedding": texts, "caption": captions}
    return protocols.evaluate("cross_retrieval", images, np.arange(len(images)), columns=columns).metrics


def test_every_one_finds_its_own() -> None:
    rows = np.eye(12)
    found = judge(rows, 3 * rows, np.arange(12)[:, None])
    assert found["cross_retrieval/mean_recall"] == 1
    assert found["cross_retrieval/image_to_text_median_rank"] == 1


def test_against_a_slow_count() -> None:
    draw = np.random.default_rng(0)
    images, texts, captions = draw.normal(size=(20, 4)), draw.normal(size=(20, 4)), np.arange(20)[:, None] // 2
    found = judge(images, texts, captions)
    unit = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (images, texts)]
    hits = 0
    for row in range(20):
        order = np.argsort(-(unit[0][row] @ unit[1].T))[:5]
        hits += any(captions[place] == captions[row] for place in order)
    assert found["cross_retrieval/image_to_text_recall_at_5"] == pytest.approx(hits / 20)


def test_without_captions() -> None:
    with pytest.raises(UserError, match="no embedded captions"):
        protocols.evaluate("cross_retrieval", np.eye(3), np.arange(3))
