"""Verification: are these two images of one class? Over all pairs, or over balanced pairs in ten folds.

Pairs are unordered and never pair an image with itself. A class with a single image brings impostor pairs only.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from armillary.evaluation.result import EvaluationSet, Floats, Ints, ProtocolResult
from armillary.evaluation.roc import Roc, roc_curve
from armillary.evaluation.similarity import GRID, block_rows, grid_scores, normalize
from armillary.spec.errors import UserError

# LFW's view 2 has ten folds of 300 genuine and 300 impostor pairs.
FOLDS = 10
PAIRS = 3000
_GENUINE_ROWS = 256


class AllPairs:
    """All pairs of a labelled set, as two streams of scores that never hold more than a block.

    Samples are sorted by class, so that the partners of row ``i`` among later rows are two contiguous parts: genuine
    ones up to ``ends[i]``, impostors from there on.

    Args:
        embeddings: ``(n, d)``, any norm.
        labels: ``(n,)``.
        elements: scores in a block.
    """

    def __init__(self, embeddings: Floats, labels: Ints, *, elements: int | None = None) -> None:
        order = np.argsort(labels, kind="stable")
        self.points, ordered = normalize(embeddings, order), labels[order]
        self.ends: Ints = np.searchsorted(ordered, ordered, side="right")
        self.elements = elements
        size, rows = len(ordered), np.arange(len(ordered))
        self._genuine_per_row, self._impostor_per_row = self.ends - rows - 1, size - self.ends
        self.num_genuine, self.num_impostor = int(self._genuine_per_row.sum()), int(self._impostor_per_row.sum())

    def genuine(self) -> Iterator[Floats]:
        """Scores of same-class pairs in grid units."""
        start, size = 0, len(self.ends)
        while start < size:
            stop = self._genuine_stop(start)
            scores, column, row = self._block(start, stop, start, int(self.ends[stop - 1]))
            yield scores[(column > row) & (column < self.ends[start:stop, None])]
            start = stop

    def impostor(self) -> Iterator[Floats]:
        """Scores of different-class pairs in grid units."""
        start, size = 0, len(self.ends)
        while start < size and self.ends[start] < size:
            first = int(self.ends[start])
            stop = min(size, start + block_rows(size - first, self.elements))
            scores, column, _ = self._block(start, stop, first, size)
            one_class = self.ends[stop - 1] == first
            yield scores.reshape(-1) if one_class else scores[column >= self.ends[start:stop, None]]
            start = stop

    def _genuine_stop(self, start: int) -> int:
        """Where a block of rows ends; few rows, since of small classes a block is mostly pairs of different ones."""
        rows = min(_GENUINE_ROWS, len(self.ends) - start)
        while rows > 1 and rows > block_rows(int(self.ends[start + rows - 1]) - start, self.elements):
            rows //= 2
        return start + rows

    def _block(self, start: int, stop: int, first: int, last: int) -> tuple[Floats, Ints, Ints]:
        scores = grid_scores(self.points[start:stop], self.points[first:last])
        return scores, np.arange(first, last)[None, :], np.arange(start, stop)[:, None]

    def sample(self, count: int, seed: int) -> tuple[Floats, NDArray[np.bool_]]:
        """Cosines of ``count`` genuine, then ``count`` impostor pairs drawn without replacement, and their kind."""
        rng = np.random.default_rng(seed)
        parts = []
        for per_row, offset in (
            (self._genuine_per_row, np.arange(len(self.ends)) + 1),
            (self._impostor_per_row, self.ends),
        ):
            before = np.concatenate(([0], np.cumsum(per_row)))
            chosen = rng.choice(before[-1], size=count, replace=False)
            row = np.searchsorted(before, chosen, side="right") - 1
            column = offset[row] + chosen - before[row]
            scores = np.einsum("nd,nd->n", self.points[row], self.points[column])
            parts.append(np.rint(scores * GRID) / GRID)
        return np.concatenate(parts), np.repeat([True, False], count)


def best_threshold(scores: Floats, same: NDArray[np.bool_]) -> float:
    """The threshold that classifies most pairs correctly when scores at or above it are accepted.

    Candidates lie half-way between neighbouring distinct scores and beyond both ends; of several best ones the middle
    one is taken.
    """
    values, inverse = np.unique(scores, return_inverse=True)
    genuine = np.bincount(inverse[same], minlength=len(values))
    impostor = np.bincount(inverse[~same], minlength=len(values))
    # Correct when the lowest ``i`` distinct scores are rejected.
    correct = np.concatenate(([0], np.cumsum(impostor))) + np.concatenate((np.cumsum(genuine[::-1])[::-1], [0]))
    best = np.flatnonzero(correct == correct.max())
    edges = np.concatenate(([values[0] - 1.0], (values[1:] + values[:-1]) / 2, [values[-1] + 1.0]))
    return float(edges[best[(len(best) - 1) // 2]])


def fold_accuracies(scores: Floats, same: NDArray[np.bool_], fold: Ints) -> Floats:
    """Accuracy on each fold with the threshold that is best on the other folds (LFW's protocol).

    Args:
        scores: ``(n,)`` similarities.
        same: ``(n,)`` whether a pair is genuine.
        fold: ``(n,)`` the fold of each pair; every fold must be non-empty and there must be two or more.
    """
    accuracies = []
    for index in np.unique(fold):
        here = fold == index
        threshold = best_threshold(scores[~here], same[~here])
        accuracies.append(float(((scores[here] >= threshold) == same[here]).mean()))
    return np.array(accuracies)


def far_name(power: int) -> str:
    """``1e-3`` for 3."""
    return f"1e-{power}"


def metrics_of(roc: Roc, prefix: str = "verification") -> dict[str, float]:
    """AUC, EER and TAR at each FAR of 1e-1 ... 1e-6 that allows at least one false accept."""
    metrics = {f"{prefix}/auc": roc.auc, f"{prefix}/eer": roc.eer}
    for power in range(1, 7):
        allowed = roc.impostor // 10**power
        if allowed < 1:
            break
        # FAR values are multiples of 1/impostor: the largest not above 10**-power is `allowed` of them.
        at = int(np.searchsorted(roc.far, (allowed + 0.5) / roc.impostor)) - 1
        metrics[f"{prefix}/tar_at_far_{far_name(power)}"] = float(roc.tar[at])
    return metrics


def verification(data: EvaluationSet, *, elements: int | None = None, capacity: int | None = None) -> ProtocolResult:
    """All-pairs verification by cosine similarity.

    ``auc``
        Area under the ROC curve: the chance that a genuine pair scores above an impostor pair, ties one half.
    ``eer``
        Equal error rate: where the ROC curve, linear between neighbouring thresholds, meets FAR = 1 - TAR.
    ``tar_at_far_1e-k``
        True accept rate at the lowest threshold whose false accept rate does not exceed 10**-k. No interpolation: it is
        the best rate a system could really be set to. Left out where fewer than 10**k impostor pairs exist.
    ``accuracy``
        LFW-like: up to 3,000 genuine and as many impostor pairs, drawn without replacement by ``seed``, in ten
        balanced folds (fewer when there are fewer than ten of either); mean over folds of the accuracy at the threshold
        that is best on the others. Unlike LFW's own list, folds may share people. Left out with under two pairs of
        either kind.

    Equal to scikit-learn's ``roc_curve`` on the same scores. Curves: ``roc_far``, ``roc_tar``, ``roc_threshold``,
    ``fold_accuracy``.

    Sources: Huang et al., Labeled Faces in the Wild, UMass TR 07-49, 2007; NIST FRVT 1:1 for TAR at fixed FAR.

    Args:
        data: the evaluated set.
        elements: scores in a block; bounds memory.
        capacity: scores sorted at a time; bounds memory.

    Raises:
        UserError: no class has two images, or there is only one class.
    """
    pairs = AllPairs(data.embeddings, data.labels, elements=elements)
    if not pairs.num_genuine:
        raise UserError("verification needs a class with two images or more; every evaluated class has one")
    if not pairs.num_impostor:
        raise UserError("verification needs two classes or more; all evaluated images are of one class")
    roc = roc_curve(pairs.genuine, pairs.impostor, pairs.num_genuine, pairs.num_impostor, capacity=capacity)
    metrics = metrics_of(roc)
    curves = {"roc_far": roc.far, "roc_tar": roc.tar, "roc_threshold": roc.threshold}
    count = min(PAIRS, pairs.num_genuine, pairs.num_impostor)
    if count >= 2:
        scores, same = pairs.sample(count, data.seed)
        fold = np.tile(np.arange(count) % min(FOLDS, count), 2)
        curves["fold_accuracy"] = fold_accuracies(scores, same, fold)
        metrics["verification/accuracy"] = float(curves["fold_accuracy"].mean())
    return ProtocolResult(metrics, curves)
