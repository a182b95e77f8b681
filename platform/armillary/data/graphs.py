"""A synthetic dataset of small graphs whose class is a shape hidden in a random tree."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from armillary.data.importers.graph_sets import picture
from armillary.data.store import Dataset, Record, write_dataset

Edges = list[tuple[int, int]]
NODES, COLOURS, GRAPHS = 32, 3, 600


def _cycle(n: int) -> Edges:
    return [(node, (node + 1) % n) for node in range(n)]


def _star(n: int) -> Edges:
    return [(0, node) for node in range(1, n)]


def _ladder(n: int) -> Edges:
    half = n // 2
    rails = [(node, node + 1) for node in range(half - 1)]
    return rails + [(half + a, half + b) for a, b in rails] + [(node, half + node) for node in range(half)]


def _clique(n: int) -> Edges:
    return [(a, b) for a in range(n) for b in range(a)]


MOTIFS: dict[str, Callable[[int], Edges]] = {
    "cycle": _cycle,
    "star": _star,
    "wheel": lambda n: _star(n) + [(1 + a, 1 + b) for a, b in _cycle(n - 1)],
    "ladder": _ladder,
    "clique": _clique,
    "bipartite": lambda n: [(a, b) for a in range(n // 2) for b in range(n // 2, n)],
}


def motifs(name: str, _source: Path | None, progress: Callable[[int, int | None], None]) -> Dataset:
    """600 graphs of up to 32 nodes: a random tree with one of six shapes of 6 to 10 nodes on it.

    Nodes have four features: 1, and one of three colours at random. Stored as the pictures of
    :mod:`armillary.components.graphs`.
    """

    def records() -> Iterator[Record]:
        for number in range(GRAPHS):
            label = number % len(MOTIFS)
            yield Record(_picture(np.random.default_rng((7, number)), list(MOTIFS.values())[label]), label)
            progress(number + 1, GRAPHS)

    return write_dataset(name, records(), class_names=list(MOTIFS), credit="made by Armillary", licence="CC0")


def _picture(draw: np.random.Generator, motif: Callable[[int], Edges]) -> NDArray[np.uint8]:
    shape, tree = 2 * int(draw.integers(3, 6)), int(draw.integers(8, NODES - 10))
    edges = motif(shape) + [(shape + node, shape + int(draw.integers(node))) for node in range(1, tree)]
    edges.append((int(draw.integers(shape)), shape + int(draw.integers(tree))))
    count, order = shape + tree, draw.permutation(shape + tree)
    features = np.zeros((count, 1 + COLOURS), np.float32)
    features[:, 0] = 1
    features[np.arange(count), 1 + draw.integers(COLOURS, size=count)] = 1
    return picture(features, order[np.array(edges)], NODES)
