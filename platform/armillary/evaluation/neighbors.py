"""k nearest neighbours: training images vote on the class of an evaluated image."""

from __future__ import annotations

import numpy as np

from armillary.evaluation.result import EvaluationSet, Floats, Ints, ProtocolResult
from armillary.evaluation.similarity import GRID, block_rows, grid_scores, normalize
from armillary.spec.errors import UserError

NEIGHBORS = {"": 20, "_k200": 200}
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
    """k-NN classification with the training set as the gallery, by cosine similarity.

    ``knn_probe`` of the catalog, at its two sizes of neighbourhood and T = 0.07.

    ``top1``, ``top1_k200``
        The share classified rightly by 20 and by 200 neighbours (or the whole gallery, if smaller), when a neighbour of
        similarity s votes with weight exp(s / 0.07).
    ``top1_plain``, ``top1_plain_k200``
        The same with one vote for each; ties between classes are settled by the weighted votes.

    Equally similar neighbours at the k-th place are taken in the order of their labels, and equal votes go to the
    smaller label. A query of a class that the gallery lacks counts as wrong.

    Sources: Wu et al., Unsupervised Feature Learning via Non-Parametric Instance Discrimination, CVPR 2018, section
    3.4 (k = 200); Caron et al., Emerging Properties in Self-Supervised Vision Transformers (DINO), ICCV 2021, who find
    k = 20 best.

    Raises:
        UserError: no training part, or no class of it is evaluated.
    """
    import torch

    gallery, gallery_labels = training_part(data, "knn")
    gallery, queries = normalize(gallery), normalize(data.embeddings)
    classes = int(max(gallery_labels.max(), data.labels.max())) + 1
    most = min(max(NEIGHBORS.values()), len(gallery))
    # Less than half a grid unit: decides between equal scores only.
    tie_break = 0.5 * gallery_labels / classes
    hits = dict.fromkeys(("top1", "top1_plain", "top1_k200", "top1_plain_k200"), 0)
    step = block_rows(max(len(gallery), classes), elements)
    for start in range(0, len(queries), step):
        truth = data.labels[start : start + step]
        scores = grid_scores(queries[start : start + step], gallery) - tie_break
        best = torch.topk(torch.from_numpy(scores), most, dim=1)
        similarity = np.rint(best.values.numpy()) / GRID
        voters = gallery_labels[best.indices.numpy()]
        weights = np.exp((similarity - 1.0) / TEMPERATURE)
        for suffix, neighbors in NEIGHBORS.items():
            k = min(neighbors, most)
            weighted = _votes(voters[:, :k], weights[:, :k], classes)
            counts = _votes(voters[:, :k], np.ones_like(weights[:, :k]), classes)
            hits[f"top1{suffix}"] += int((weighted.argmax(axis=1) == truth).sum())
            # Weights are at most 1 each, so that their sum over k + 1 is below one vote.
            hits[f"top1_plain{suffix}"] += int(((counts + weighted / (k + 1)).argmax(axis=1) == truth).sum())
    return ProtocolResult({f"knn/{name}": count / len(queries) for name, count in hits.items()})


def _votes(voters: Ints, weights: Floats, classes: int) -> Floats:
    """Sums weights by query and class, ``(q, classes)``."""
    rows = np.arange(len(voters))[:, None]
    flat = np.bincount((rows * classes + voters).reshape(-1), weights.reshape(-1), minlength=len(voters) * classes)
    return np.asarray(flat.reshape(len(voters), classes), dtype=np.float64)
