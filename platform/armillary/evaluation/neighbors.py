"""k nearest neighbours: training images vote on the class of an evaluated image."""

from __future__ import annotations

import numpy as np

from armillary.evaluation.result import EvaluationSet, Floats, Ints, ProtocolResult
from armillary.evaluation.similarity import GRID, block_rows, grid_scores, normalize
from armillary.spec.errors import UserError

NEIGHBORS = 20
TEMPERATURE = 0.07


def training_part(data: EvaluationSet, protocol: str) -> tuple[Floats, Ints]:
    """The training embeddings and labels.

    Raises:
        UserError: there are none, or no evaluated class is among them.
    """
    if data.train_embeddings is None or data.train_labels is None or not len(data.train_labels):
        raise UserError(
            f"{protocol} needs training embeddings with labels",
            hint="give --train FILE, or evaluate a run, whose training part is used",
        )
    if not np.isin(data.labels, data.train_labels).any():
        raise UserError(
            f"{protocol} needs evaluated classes that were trained on; here the classes are disjoint (open set)",
            hint="use verification, identification or retrieval, or data.split: sample",
        )
    return data.train_embeddings, data.train_labels


def knn(data: EvaluationSet, *, elements: int | None = None) -> ProtocolResult:
    """k-NN classification with the training set as the gallery, k = 20 (or the gallery's size), by cosine similarity.

    ``top1``
        The share classified rightly when a neighbour of similarity s votes with weight exp(s / 0.07).
    ``top1_plain``
        The same with one vote for each; ties between classes are settled by the weighted votes.

    Equally similar neighbours at the k-th place are taken in the order of their labels, and equal votes go to the
    smaller label. A query of a class that the gallery lacks counts as wrong.

    Sources: Wu et al., Unsupervised Feature Learning via Non-Parametric Instance Discrimination, CVPR 2018, section
    3.4; Caron et al., Emerging Properties in Self-Supervised Vision Transformers (DINO), ICCV 2021, for k = 20.

    Raises:
        UserError: no training part, or no class of it is evaluated.
    """
    import torch

    gallery, gallery_labels = training_part(data, "knn")
    gallery, queries = normalize(gallery), normalize(data.embeddings)
    k, classes = min(NEIGHBORS, len(gallery)), int(max(gallery_labels.max(), data.labels.max())) + 1
    # Less than half a grid unit: decides between equal scores only.
    tie_break = 0.5 * gallery_labels / classes
    weighted_hits, plain_hits = 0, 0
    step = block_rows(max(len(gallery), classes), elements)
    for start in range(0, len(queries), step):
        truth = data.labels[start : start + step]
        scores = grid_scores(queries[start : start + step], gallery) - tie_break
        best = torch.topk(torch.from_numpy(scores), k, dim=1)
        similarity = np.rint(best.values.numpy()) / GRID
        voters = gallery_labels[best.indices.numpy()]
        weights = np.exp((similarity - 1.0) / TEMPERATURE)
        weighted, counts = _votes(voters, weights, classes), _votes(voters, np.ones_like(weights), classes)
        weighted_hits += int((weighted.argmax(axis=1) == truth).sum())
        # Weights are at most 1 each, so that their sum over k + 1 is below one vote.
        plain_hits += int(((counts + weighted / (k + 1)).argmax(axis=1) == truth).sum())
    total = len(queries)
    return ProtocolResult({"knn/top1": weighted_hits / total, "knn/top1_plain": plain_hits / total})


def _votes(voters: Ints, weights: Floats, classes: int) -> Floats:
    """Sums weights by query and class, ``(q, classes)``."""
    rows = np.arange(len(voters))[:, None]
    flat = np.bincount((rows * classes + voters).reshape(-1), weights.reshape(-1), minlength=len(voters) * classes)
    return np.asarray(flat.reshape(len(voters), classes), dtype=np.float64)
