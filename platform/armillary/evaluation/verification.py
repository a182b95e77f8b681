"""Verification: are these two images of one class? Over all pairs, or over a given list, with its folds.

All pairs are unordered and never pair an image with itself. A class with a single image brings impostor pairs only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from armillary.evaluation.result import EvaluationSet, Flags, Floats, Ints, Pairs, ProtocolResult
from armillary.evaluation.roc import Roc, roc_curve
from armillary.evaluation.similarity import GRID, block_rows, grid_scores, normalize
from armillary.spec.errors import UserError

# LFW's view 2 has ten folds of 300 genuine and 300 impostor pairs.
FOLDS = 10
PAIRS = 3000
_GENUINE_ROWS = 256

# Turns cosines of some rows and some columns, in grid units, into other scores in grid units, in place or not.
Comparison = Callable[[Floats, Ints, Ints], Floats]


class AllPairs:
    """All pairs of a labelled set, as two streams of scores that never hold more than a block.

    Samples are sorted by class, so that the partners of row ``i`` among later rows are two contiguous parts: genuine
    ones up to ``ends[i]``, impostors from there on.

    Args:
        embeddings: ``(n, d)``, any norm.
        labels: ``(n,)``.
        elements: scores in a block.
        comparison: makes another score of the cosine; gets the scores ``(r, c)`` and the samples' positions ``(r, 1)``
            and ``(1, c)``.
    """

    def __init__(
        self, embeddings: Floats, labels: Ints, *, elements: int | None = None, comparison: Comparison | None = None
    ) -> None:
        self.order: Ints = np.argsort(labels, kind="stable").astype(np.int64)
        self.comparison = comparison
        self.points, ordered = normalize(embeddings, self.order), labels[self.order]
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
        if self.comparison is not None:
            scores = self.comparison(scores, self.order[start:stop, None], self.order[None, first:last])
        return scores, np.arange(first, last)[None, :], np.arange(start, stop)[:, None]

    def sample(self, genuine: int, impostor: int, seed: int) -> Pairs:
        """That many genuine, then impostor pairs of sample positions, drawn without replacement by ``seed``."""
        rng = np.random.default_rng(seed)
        rows, columns = [], []
        for count, per_row, offset in (
            (genuine, self._genuine_per_row, np.arange(len(self.ends)) + 1),
            (impostor, self._impostor_per_row, self.ends),
        ):
            before = np.concatenate(([0], np.cumsum(per_row)))
            chosen = rng.choice(before[-1], size=count, replace=False)
            row = np.searchsorted(before, chosen, side="right") - 1
            rows.append(self.order[row])
            columns.append(self.order[offset[row] + chosen - before[row]])
        same = np.repeat([True, False], [genuine, impostor])
        return Pairs(np.concatenate(rows), np.concatenate(columns), same)


def best_threshold(scores: Floats, same: Flags) -> float:
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


def fold_accuracies(scores: Floats, same: Flags, fold: Ints) -> Floats:
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


def metrics_of(roc: Roc, prefix: str = "verification", rate: str = "tar_at_far") -> dict[str, float]:
    """AUC, EER and TAR at each FAR of 1e-1 ... 1e-6 that allows at least one false accept."""
    metrics = {f"{prefix}/auc": roc.auc, f"{prefix}/eer": roc.eer}
    for power in range(1, 7):
        allowed = roc.impostor // 10**power
        if allowed < 1:
            break
        # FAR values are multiples of 1/impostor: the largest not above 10**-power is `allowed` of them.
        at = int(np.searchsorted(roc.far, (allowed + 0.5) / roc.impostor)) - 1
        metrics[f"{prefix}/{rate}_{far_name(power)}"] = float(roc.tar[at])
    return metrics


def curves_of(roc: Roc) -> dict[str, Floats]:
    """The arrays of a ROC curve, by the names figures look for."""
    return {"roc_far": roc.far, "roc_tar": roc.tar, "roc_threshold": roc.threshold}


def pair_scores(embeddings: Floats, pairs: Pairs, *, comparison: Comparison | None = None) -> Floats:
    """The scores of given pairs of rows in grid units, ``(p,)``.

    Args:
        embeddings: ``(n, d)``, any norm.
        pairs: positions of rows.
        comparison: makes another score of the cosine; gets scores and positions ``(p,)``.
    """
    points = normalize(embeddings)
    scores = np.empty(len(pairs.same))
    step = block_rows(points.shape[1])
    for start in range(0, len(scores), step):
        part = slice(start, start + step)
        first, second = pairs.first[part], pairs.second[part]
        cosine = np.rint(np.einsum("nd,nd->n", points[first], points[second]) * GRID)
        scores[part] = cosine if comparison is None else comparison(cosine, first, second)
    return scores


def roc_of(scores: Floats, same: Flags) -> Roc:
    """The exact ROC curve of scores in grid units that fit memory, with at least one of either kind."""
    genuine, impostor = scores[same], scores[~same]
    return roc_curve(lambda: [genuine], lambda: [impostor], len(genuine), len(impostor))


def check_kinds(pairs: Pairs, what: str) -> None:
    """Checks that there are genuine and impostor pairs.

    Raises:
        UserError: one of them is missing.
    """
    genuine = int(pairs.same.sum())
    if not 0 < genuine < len(pairs.same):
        raise UserError(
            f"{what} needs genuine and impostor pairs; of the {len(pairs.same)} given ones {genuine} are genuine",
            key="pairs",
        )


def list_folds(same: Flags) -> Ints | None:
    """Ten folds of a list that names none: each tenth of the genuine and of the impostor pairs, in the list's order.

    For LFW's list, and those made like it, these are the folds it was written in. Fewer folds when there are fewer than
    ten of either kind, ``None`` when there are fewer than two.
    """
    genuine, impostor = int(same.sum()), int((~same).sum())
    folds = min(FOLDS, genuine, impostor)
    if folds < 2:
        return None
    place = np.where(same, np.cumsum(same), np.cumsum(~same)) - 1
    return (place * folds // np.where(same, genuine, impostor)).astype(np.int64)


def verification(data: EvaluationSet, *, elements: int | None = None, capacity: int | None = None) -> ProtocolResult:
    """Verification by cosine similarity: over all pairs, or over the given ones where the set brings a list.

    ``auc``
        Area under the ROC curve: the chance that a genuine pair scores above an impostor pair, ties one half.
    ``eer``
        Equal error rate: where the ROC curve, linear between neighbouring thresholds, meets FAR = 1 - TAR.
    ``tar_at_far_1e-k``
        True accept rate at the lowest threshold whose false accept rate does not exceed 10**-k. No interpolation: it is
        the best rate a system could really be set to. Left out where fewer than 10**k impostor pairs exist.
    ``accuracy``
        Mean over folds of the accuracy at the threshold that is best on the other folds. Given pairs: LFW's protocol,
        on the list's folds or those of :func:`list_folds`. All pairs: up to 3,000 genuine and as many impostor pairs,
        drawn without replacement by ``seed``, in ten balanced folds (fewer when there are fewer than ten of either);
        unlike in LFW's own list, folds may share people. Left out with under two pairs of either kind, or one fold.

    Equal to scikit-learn's ``roc_curve`` on the same scores. Curves: ``roc_far``, ``roc_tar``, ``roc_threshold``,
    ``fold_accuracy``.

    Sources: Huang et al., Labeled Faces in the Wild, UMass TR 07-49, 2007; NIST FRVT 1:1 for TAR at fixed FAR.

    Args:
        data: the evaluated set.
        elements: scores in a block; bounds memory.
        capacity: scores sorted at a time; bounds memory.

    Raises:
        UserError: all pairs: no class has two images, or there is only one class; given pairs: all of one kind.
    """
    return verify(data, "verification", elements=elements, capacity=capacity)


def verify(
    data: EvaluationSet,
    prefix: str,
    *,
    comparison: Comparison | None = None,
    elements: int | None = None,
    capacity: int | None = None,
) -> ProtocolResult:
    """:func:`verification` under another name and with another score made of the cosine."""
    if data.pairs is not None:
        check_kinds(data.pairs, prefix)
        pairs, fold = data.pairs, data.pairs.fold
        scores = pair_scores(data.embeddings, pairs, comparison=comparison)
        roc = roc_of(scores, pairs.same)
        fold = list_folds(pairs.same) if fold is None else fold
    else:
        everything = AllPairs(data.embeddings, data.labels, elements=elements, comparison=comparison)
        if not everything.num_genuine:
            raise UserError(f"{prefix} needs a class with two images or more; every evaluated class has one")
        if not everything.num_impostor:
            raise UserError(f"{prefix} needs two classes or more; all evaluated images are of one class")
        sizes = (everything.num_genuine, everything.num_impostor)
        roc = roc_curve(everything.genuine, everything.impostor, *sizes, capacity=capacity)
        count = min(PAIRS, *sizes)
        pairs = everything.sample(count, count, data.seed)
        scores = pair_scores(data.embeddings, pairs, comparison=comparison)
        fold = np.tile(np.arange(count) % min(FOLDS, count), 2)
    metrics, curves = metrics_of(roc, prefix), curves_of(roc)
    if fold is not None and len(np.unique(fold)) > 1:
        curves["fold_accuracy"] = fold_accuracies(scores / GRID, pairs.same, fold)
        metrics[f"{prefix}/accuracy"] = float(curves["fold_accuracy"].mean())
    return ProtocolResult(metrics, curves)
