"""Graphs on their way into the store: sets of many, and the neighbourhoods of a large one's nodes, as pictures.

What an importer of graphs has read are plain arrays; here they become the pictures of
:mod:`armillary.components.graphs`, one byte a cell. A feature is stretched to [0, 1] over the whole source and kept in
256 steps, text is one column of 0 and 1 for each value; the first feature of every node is 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from armillary.data.importers.contents import UNLABELLED, Classes, Contents
from armillary.data.importers.source import SourceFile
from armillary.data.layout import Record, Unreadable
from armillary.spec.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

MAX_FEATURES = 4096
_ORDER = 61


def picture(features: NDArray[np.float32], edges: Ints, nodes: int) -> NDArray[np.uint8]:
    """One graph as ``(nodes, 1 + F + nodes, 1)`` uint8.

    Args:
        features: ``(n, F)`` in [0, 1], n at most ``nodes``.
        edges: ``(E, 2)`` positions of nodes; both directions are drawn.
        nodes: rows of the picture.
    """
    count, width = features.shape
    drawn = np.zeros((nodes, 1 + width + nodes), np.uint8)
    drawn[:count, 0] = 255
    drawn[:count, 1 : 1 + width] = np.rint(255 * features)
    first, second = edges.T
    drawn[first, 1 + width + second] = drawn[second, 1 + width + first] = 255
    return drawn[:, :, None]


def stretched(values: NDArray[np.float64], where: str) -> Floats:
    """Columns ``(n, k)`` stretched to [0, 1] each; what is the same everywhere becomes 0.

    Raises:
        UserError: a value is not finite.
    """
    if not np.isfinite(values).all():
        row = int(np.flatnonzero(~np.isfinite(values).all(axis=1))[0])
        raise UserError(f"the features of node {row + 1} are not all finite numbers", where=where)
    if not len(values):
        return values.astype(np.float32)
    low, high = values.min(axis=0), values.max(axis=0)
    result: Floats = ((values - low) / np.where(high > low, high - low, 1)).astype(np.float32)
    return result


def one_hot(values: Sequence[int | str] | NDArray[np.int64], where: str) -> Floats:
    """A column of 0 and 1 for each distinct value, in their order."""
    distinct, number = np.unique(np.asarray(values), return_inverse=True)
    if len(distinct) > MAX_FEATURES:
        raise UserError(f"{len(distinct):,} different values of a feature", where=where, allowed=f"{MAX_FEATURES:,}")
    result: Floats = np.eye(len(distinct), dtype=np.float32)[number.reshape(-1)]
    return result


def joined(parts: Sequence[Floats], nodes: int, where: str) -> Floats:
    """The constant 1, and the features after it, ``(nodes, F)``."""
    features = np.concatenate([np.ones((nodes, 1), np.float32), *parts], axis=1)
    if features.shape[1] > MAX_FEATURES:
        raise UserError(f"{features.shape[1]:,} features a node", where=where, allowed=f"up to {MAX_FEATURES:,}")
    return features


def many_graphs(
    features: Floats,
    owner: Ints,
    edges: Ints,
    labels: Sequence[int | str] | None,
    files: Sequence[SourceFile],
    *,
    where: str,
    max_nodes: int,
) -> Contents:
    """One sample a graph. Graphs of more than ``max_nodes`` nodes are left out, and listed.

    Args:
        features: ``(nodes, F)`` in [0, 1], of all graphs.
        owner: ``(nodes,)`` the graph of each, from 0.
        edges: ``(E, 2)`` positions of nodes.
        labels: one a graph; ``None``: all are of one class.
        files: that the result depends on.
        where: the source, for messages.
        max_nodes: of a graph.

    Raises:
        UserError: no graph is small enough, an edge leaves its graph, or a graph has no nodes.
    """
    outside = np.flatnonzero(owner[edges[:, 0]] != owner[edges[:, 1]])
    if len(outside):
        first, second = edges[outside[0]] + 1
        raise UserError(f"an edge joins nodes {first} and {second}, which are in different graphs", where=where)
    count = len(labels) if labels is not None else int(owner.max(initial=-1)) + 1
    sizes = np.bincount(owner, minlength=count)
    if len(sizes) > count or not sizes.all():
        raise UserError(
            f"{count} labels, and nodes of graphs {np.flatnonzero(sizes)[-1] + 1}"
            if len(sizes) > count
            else f"graph {int(np.flatnonzero(sizes == 0)[0]) + 1} has no nodes",
            where=where,
        )
    fitting = sizes[sizes <= max_nodes]
    if not len(fitting):
        problem = f"every graph has more than {max_nodes} nodes, the smallest {sizes.min()}"
        raise UserError(problem, where=where, hint="a larger --max-nodes")
    side, order = int(fitting.max()), np.argsort(owner, kind="stable")
    begins = np.concatenate([[0], sizes.cumsum()])
    place = np.empty(len(owner), np.int64)
    place[order] = np.arange(len(owner)) - np.repeat(begins[:-1], sizes)
    of_edges = np.argsort(owner[edges[:, 0]], kind="stable")
    bounds = np.searchsorted(owner[edges[of_edges, 0]], np.arange(count + 1))
    classes = Classes(labels, where) if labels is not None else None

    def items(start: int) -> Iterator[Record | Unreadable]:
        for number in range(start, count):
            if sizes[number] > max_nodes:
                yield Unreadable(f"{where}, graph {number + 1}", f"{sizes[number]:,} nodes, more than {max_nodes}")
                continue
            mine = place[edges[of_edges[bounds[number] : bounds[number + 1]]]]
            rows = features[order[begins[number] : begins[number + 1]]]
            yield Record(picture(rows, mine, side), classes[labels[number]] if classes and labels else 0)

    return Contents(items, classes.names if classes else UNLABELLED, files, total=count, form="pixels")


def neighbourhoods(
    features: Floats,
    edges: Ints,
    labels: Sequence[int | str] | None,
    files: Sequence[SourceFile],
    *,
    where: str,
    hops: int,
    max_nodes: int,
) -> Contents:
    """One sample a node: what lies within ``hops`` edges of it, and the edges between.

    Of a neighbourhood of more than ``max_nodes`` nodes the nearest are taken; within a distance, in an order that
    depends on the two nodes alone. The second feature marks the middle. The table ``sample_graph`` has the edges.

    Args:
        features: ``(nodes, F)`` in [0, 1].
        edges: ``(E, 2)`` positions of nodes.
        labels: one a node; ``None``: all are of one class.
        files: that the result depends on.
        where: the source, for messages.
        hops: at least 1.
        max_nodes: of a neighbourhood.
    """
    count, side = len(features), min(max_nodes, len(features))
    pairs = both_ways(edges)
    start, target = np.searchsorted(pairs[:, 0], np.arange(count + 1)), pairs[:, 1]
    classes = Classes(labels, where) if labels is not None else None

    def items(begin: int) -> Iterator[Record]:
        for node in range(begin, count):
            found = _around(node, start, target, hops, side)
            inside = np.sort(found)
            ends = np.concatenate([target[start[one] : start[one + 1]] for one in found])
            begins = np.repeat(np.arange(len(found)), start[found + 1] - start[found])
            at = np.searchsorted(inside, ends).clip(max=len(inside) - 1)
            there = inside[at] == ends
            local = np.stack([begins[there], np.argsort(found)[at[there]]], axis=1)
            middle = np.zeros((len(found), 1), np.float32)
            middle[0] = 1
            rows = np.concatenate([features[found, :1], middle, features[found, 1:]], axis=1)
            yield Record(picture(rows, local, side), classes[labels[node]] if classes and labels else 0)

    names = classes.names if classes else UNLABELLED
    tables = {"sample_graph": graph_table(pairs)}
    return Contents(items, names, files, total=count, form="pixels", tables=tables)


def both_ways(edges: Ints) -> Ints:
    """Distinct edges in both directions, sorted, without those from a node to itself: ``(E, 2)``."""
    once = edges[edges[:, 0] != edges[:, 1]]
    distinct: Ints = np.unique(np.concatenate([once, once[:, ::-1]]), axis=0)
    return distinct


def graph_table(pairs: Ints, weight: NDArray[np.float32] | None = None) -> pa.Table:
    """A table of edges as datasets have them: ``source``, ``target`` and ``weight``, 1 by default."""
    import pyarrow as pa

    weights = np.ones(len(pairs), np.float32) if weight is None else weight
    table: pa.Table = pa.table({"source": pairs[:, 0], "target": pairs[:, 1], "weight": weights})
    return table


def _around(middle: int, start: Ints, target: Ints, hops: int, most: int) -> Ints:
    """The nodes of a neighbourhood: the middle first, then hop by hop."""
    import torch

    from armillary.components.counter import key, shuffled

    found, edge = np.array([middle]), np.array([middle])
    for _ in range(hops):
        near = np.unique(np.concatenate([target[start[one] : start[one + 1]] for one in edge]))
        near = np.setdiff1d(near, found)
        if len(found) + len(near) > most:
            near = shuffled(torch.from_numpy(near), key(_ORDER, middle)).numpy()[: most - len(found)]
        found, edge = np.concatenate([found, near]), near
        if len(found) == most or not len(near):
            break
    return found
