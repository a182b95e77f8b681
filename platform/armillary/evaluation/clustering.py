"""Clustering: do the embeddings fall into their classes without being told?"""

from __future__ import annotations

from typing import Any

import numpy as np

from armillary.evaluation.result import EvaluationSet, Floats, Ints, ProtocolResult
from armillary.evaluation.similarity import normalize
from armillary.spec.errors import UserError

PCA_DIM = 256
RESTARTS = 4


def cluster(embeddings: Floats, clusters: int, seed: int) -> Ints:
    """Clusters of the embeddings: L2 norm, PCA to at most 256 dimensions, L2 norm, k-means++ (best of 4 starts).

    Returns:
        ``(n,)`` cluster numbers; some may stay empty when embeddings coincide.
    """
    from sklearn.cluster import KMeans
    from sklearn.decomposition import PCA

    points = normalize(embeddings)
    dim = min(PCA_DIM, *points.shape)
    if dim < points.shape[1]:
        points = PCA(dim, random_state=seed).fit_transform(points)
        points = normalize(points)
    distinct = len(np.unique(points, axis=0))
    means = KMeans(min(clusters, distinct), init="k-means++", n_init=RESTARTS, random_state=seed)
    return np.asarray(means.fit_predict(points), dtype=np.int64)


def agreement(labels: Ints, clusters: Ints) -> dict[str, float]:
    """How well clusters agree with classes; every number is 1 for a perfect clustering.

    ``nmi`` (arithmetic mean), ``ami``, ``ari``: scikit-learn's. ``purity``: share of samples in the commonest class of
    their cluster. ``pairwise_precision/recall/f1``: over pairs of samples, of being in one cluster and in one class;
    with no pair to judge the rate is 1. ``bcubed_precision/recall/f1``: per sample, the share of its cluster that is of
    its class, and the share of its class that is in its cluster, both counting itself; means over samples.

    Sources: Vinh, Epps, Bailey, JMLR 2010 (NMI, AMI); Hubert, Arabie 1985 (ARI); Amigo et al., A comparison of
    extrinsic clustering evaluation metrics, Information Retrieval 2009 (purity, pairwise, BCubed).
    """
    from sklearn import metrics

    # Stored sparse: with many classes and clusters almost all cells are empty.
    table: Any = metrics.cluster.contingency_matrix(labels, clusters, sparse=True).tocoo()
    cells = table.data.astype(np.float64)
    classes: Floats = np.bincount(table.row, cells).astype(np.float64)
    groups: Floats = np.bincount(table.col, cells).astype(np.float64)
    total = cells.sum()
    largest = np.zeros(len(groups))
    np.maximum.at(largest, table.col, cells)
    together = _pairs(cells)
    pairwise = _harmonic(_share(together, _pairs(groups)), _share(together, _pairs(classes)))
    bcubed = _harmonic(
        float((cells**2 / groups[table.col]).sum() / total), float((cells**2 / classes[table.row]).sum() / total)
    )
    return {
        "nmi": float(metrics.normalized_mutual_info_score(labels, clusters)),
        "ami": float(metrics.adjusted_mutual_info_score(labels, clusters)),
        "ari": float(metrics.adjusted_rand_score(labels, clusters)),
        "purity": float(largest.sum() / total),
        **{f"pairwise_{name}": value for name, value in pairwise.items()},
        **{f"bcubed_{name}": value for name, value in bcubed.items()},
    }


def _pairs(sizes: Floats) -> float:
    return float((sizes * (sizes - 1) / 2).sum())


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 1.0


def _harmonic(precision: float, recall: float) -> dict[str, float]:
    total = precision + recall
    return {"precision": precision, "recall": recall, "f1": 2 * precision * recall / total if total else 0.0}


def clustering(data: EvaluationSet) -> ProtocolResult:
    """k-means with as many clusters as there are evaluated classes, judged by :func:`agreement`; see :func:`cluster`.

    For classes never trained on: on trained classes it would repeat what the labels taught.

    Source: k-means with NMI on unseen classes is Oh Song et al., Deep Metric Learning via Lifted Structured Feature
    Embedding, CVPR 2016; PCA, L2 and k-means is Caron et al., Deep Clustering, ECCV 2018, section 4.

    Raises:
        UserError: fewer than two classes.
    """
    classes = len(np.unique(data.labels))
    if classes < 2:
        raise UserError("clustering needs two classes or more; all evaluated images are of one class")
    clusters = cluster(data.embeddings, classes, data.seed)
    return ProtocolResult({f"clustering/{name}": value for name, value in agreement(data.labels, clusters).items()})
