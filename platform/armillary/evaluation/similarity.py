"""Cosine similarity, the one score all protocols compare, and the grid on which two scores count as equal."""

from __future__ import annotations

import sys

import numpy as np

from armillary.evaluation.result import Floats, Ints

# Scores are kept as whole numbers of 2**-40, in float64. Copies of one image, or a collapsed encoder, give scores that
# are equal in mathematics and differ in the last bits of a matrix product, by how it was blocked; on the grid they tie.
GRID = 2.0**40

# Elements of a score block: 16 MB in float64, so that a handful of temporaries in each thread stays small.
BLOCK_ELEMENTS = 1 << 21


def normalize(embeddings: Floats, order: Ints | None = None) -> Floats:
    """Rows divided by their L2 norm, ``(n, d)``; a zero row stays zero, and so has similarity 0 with everything.

    Args:
        embeddings: ``(n, d)``, left as they are.
        order: the rows to take, in order; all of them when ``None``.
    """
    # One copy and no temporary of its size: large sets are the reason to be here.
    points = embeddings.copy() if order is None else embeddings[order]
    # Dividing by the largest magnitude first keeps the squares from overflowing or vanishing.
    largest = np.maximum(points.max(axis=1), -points.min(axis=1))
    points /= np.where(largest > 0, largest, 1.0)[:, None]
    norms = np.sqrt(np.einsum("nd,nd->n", points, points))
    points /= np.where(norms > 0, norms, 1.0)[:, None]
    return points


def grid_scores(rows: Floats, columns: Floats, *, out: Floats | None = None) -> Floats:
    """Cosine similarities of normalised ``rows (r, d)`` and ``columns (c, d)`` in units of ``1 / GRID``, ``(r, c)``.

    Args:
        rows: ``(r, d)``.
        columns: ``(c, d)``.
        out: ``(r, c)``, where to put them; fresh pages of a large array cost as much as rounding does.
    """
    scores = np.matmul(rows * GRID, columns.T, out=out)
    return np.rint(scores, out=scores)


def threads() -> int:
    """How many threads to work in: as many as torch uses, or, where it is not loaded, as products of NumPy do.

    Loading torch for the answer would take half a gigabyte.
    """
    if "torch" in sys.modules:
        return int(sys.modules["torch"].get_num_threads())
    from threadpoolctl import threadpool_info

    return max((int(library["num_threads"]) for library in threadpool_info()), default=1)


def block_rows(columns: int, elements: int | None = None) -> int:
    """How many rows of ``columns`` scores fit a block; at least one."""
    return max(1, (elements or BLOCK_ELEMENTS) // max(1, columns))
