"""From images to their captions and back."""

from __future__ import annotations

import numpy as np

from armillary.evaluation.result import EvaluationSet, Flags, Floats, ProtocolResult
from armillary.spec.errors import UserError

_DEPTHS = (1, 5, 10)
# Cosines closer than this are equal.
_TIE = 1e-12


def cross_retrieval(data: EvaluationSet) -> ProtocolResult:
    """Every image looks for its caption among all captions, every caption for its image.

    The usual recall of image-text retrieval (Flickr30K, COCO): ``recall_at_k`` is the share of queries that have a
    right answer among the k most similar. A caption that several images share word for word is right for each of them.
    A wrong answer as similar as the best right one ranks before it. ``mean_recall`` is the mean of all six.

    Reads the columns ``caption_embedding (n, d)`` and, to tell equal captions, ``caption (n, length)``.
    """
    if "caption_embedding" not in data.columns:
        raise UserError(
            "cross_retrieval compares images with captions, and there are no embedded captions",
            key="evaluate.protocols",
            hint="it judges objectives on images and texts, such as clip",
        )
    images, texts = _directions(data.embeddings), _directions(np.asarray(data.columns["caption_embedding"], np.float64))
    ids = np.asarray(data.columns.get("caption", np.arange(len(texts))[:, None]))
    _, same = np.unique(ids, axis=0, return_inverse=True)
    right = same.reshape(-1)[:, None] == same.reshape(-1)[None, :]
    similarity = images @ texts.T
    ranks = {"image_to_text": _ranks(similarity, right), "text_to_image": _ranks(similarity.T, right.T)}
    metrics = {
        f"cross_retrieval/{name}_recall_at_{k}": float(np.mean(rank <= k))
        for name, rank in ranks.items()
        for k in _DEPTHS
    }
    metrics["cross_retrieval/mean_recall"] = float(np.mean(list(metrics.values())))
    for name, rank in ranks.items():
        metrics[f"cross_retrieval/{name}_median_rank"] = float(np.median(rank))
    return ProtocolResult(metrics)


def _ranks(similarity: Floats, right: Flags) -> Floats:
    """The place of each row's best right column, from 1."""
    best = np.where(right, similarity, -np.inf).max(axis=1, keepdims=True)
    before: Floats = 1.0 + ((similarity >= best - _TIE) & ~right).sum(axis=1)
    return before


def _directions(rows: Floats) -> Floats:
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    directions: Floats = rows / np.where(norms > 0, norms, 1)
    return directions
