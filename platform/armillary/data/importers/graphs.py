"""Graphs in text files: many with a class each, in the TU Dortmund format, or one large one as an edge list."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from armillary.data.importers.contents import Contents
from armillary.data.importers.edges import read_pairs
from armillary.data.importers.graph_sets import Floats, Ints, joined, many_graphs, neighbourhoods, one_hot, stretched
from armillary.data.importers.options import EgoOptions, TUOptions
from armillary.data.importers.source import Source
from armillary.spec.errors import UserError, unknown_name

_LABELS, _ATTRIBUTES = "node_labels", "node_attributes"


def read_tu(source: Source, options: TUOptions) -> Contents:
    """A folder of ``NAME_A.txt``, ``NAME_graph_indicator.txt``, perhaps labels of graphs, labels and numbers of nodes.

    Nodes and graphs count from 1. Labels and numbers of edges are left out.

    Raises:
        UserError: a file is missing or longer or shorter than it should be, a line holds no numbers, an edge leaves
            its graph.
    """
    source.need("a folder in the TU format: NAME_A.txt, NAME_graph_indicator.txt, ...", folder=True)
    stem = source.matching("*_A.txt", "list of edges").removesuffix("_A.txt")
    there = {file.path: file for file in source.files()}
    used = [f"{stem}_A.txt", f"{stem}_graph_indicator.txt"]

    def table(kind: str, convert: Callable[[str], Any]) -> NDArray[Any] | None:
        path = f"{stem}_{kind}.txt"
        if path not in there:
            return None
        if path not in used:
            used.append(path)
        return _numbers(source, path, convert)

    owner = table("graph_indicator", int)
    if owner is None or not len(owner):
        raise UserError(f"{stem}_graph_indicator.txt is missing or empty: it says each node's graph")
    owner = owner[:, 0] - 1
    if owner.min() < 0:
        raise UserError("graphs count from 1", where=f"{stem}_graph_indicator.txt")
    edges = table("A", int)
    if edges is None or not len(edges) or edges.shape[1] != 2:
        raise UserError("edges are lines of two numbers", where=f"{stem}_A.txt", allowed="node, node")
    _check_ends(edges, len(owner), f"{stem}_A.txt")
    labels = table("graph_labels", int)
    if labels is not None and len(labels) <= owner.max():
        problem = f"{len(labels)} labels, and nodes of {owner.max() + 1} graphs"
        raise UserError(problem, where=f"{stem}_graph_labels.txt")
    parts: list[Floats] = []
    for kind, convert in ((_LABELS, int), (_ATTRIBUTES, float)):
        values = table(kind, convert)
        if values is not None:
            path = f"{stem}_{kind}.txt"
            if len(values) != len(owner):
                raise UserError(f"{len(values)} lines for {len(owner)} nodes", where=path)
            parts += [one_hot(column, path) for column in values.T] if kind == _LABELS else [stretched(values, path)]
    return many_graphs(
        joined(parts, len(owner), stem),
        owner,
        edges - 1,
        None if labels is None else labels[:, 0].tolist(),
        [there[path] for path in used],
        where=stem,
        max_nodes=options.max_nodes,
    )


def read_ego(source: Source, options: EgoOptions) -> Contents:
    """An edge list, and beside it perhaps a CSV of its nodes: name, class and features. One sample a node.

    Raises:
        UserError: no edges, a node that the CSV lacks or names twice, cells that are missing.
    """
    source.need("a text file of edges", folder=False)
    path, files = source.name, [source.stat(source.name)]
    pairs = list(read_pairs(source, options))
    if not pairs:
        raise UserError(f"{path} holds no edges", allowed="lines of: node, node")
    labels: list[int | str] | None = None
    parts: list[Floats] = []
    if options.nodes:
        files.append(source.stat(options.nodes))
        names, labels, parts = _nodes(source, options)
    else:
        names = _in_order({name for pair in pairs for name in pair})
    numbers = {name: number for number, name in enumerate(names)}
    lacking = next((name for pair in pairs for name in pair if name not in numbers), None)
    if lacking is not None:
        raise UserError(f"{path} joins node {lacking!r}, which {options.nodes} does not list")
    return neighbourhoods(
        joined(parts, len(names), path),
        np.array([[numbers[first], numbers[second]] for first, second in pairs], np.int64),
        labels,
        files,
        where=options.nodes or path,
        hops=options.hops,
        max_nodes=options.max_nodes,
    )


def _in_order(names: set[str]) -> list[str]:
    """Whole numbers in their order, or other names alphabetically."""
    whole = all(name.isascii() and name.isdigit() and str(int(name)) == name for name in names)
    return sorted(names, key=int) if whole else sorted(names)


def _nodes(source: Source, options: EgoOptions) -> tuple[list[str], list[int | str] | None, list[Floats]]:
    """Names, classes and features of the CSV's nodes."""
    path = options.nodes
    rows = csv.reader(source.lines(path))
    header = [cell.strip() for cell in next(rows, [])]
    if len(header) < 1 or len(set(header)) < len(header):
        raise UserError("the first line must name the columns, each once", where=path, allowed="node,label,...")
    cells: list[list[str]] = []
    for row in rows:
        if row and (len(row) != len(header) or not all(cell.strip() for cell in row)):
            raise UserError(f"{len(row)} cells or empty ones, {len(header)} columns", where=f"{path}:{rows.line_num}")
        if row:
            cells.append([cell.strip() for cell in row])
    columns = dict(zip(header, zip(*cells, strict=True), strict=True)) if cells else {}
    if not columns:
        raise UserError("there are no nodes", where=path)
    names = list(columns.pop(header[0]))
    if len(set(names)) < len(names):
        twice = next(name for place, name in enumerate(names) if name in names[:place])
        raise UserError(f"node {twice!r} is there twice", where=path)
    if options.label_column and options.label_column not in columns and options.label_column != "label":
        raise unknown_name("column", options.label_column, list(columns), where=path)
    given = columns.pop(options.label_column, None)
    labels = None if given is None else _as_whole(given)
    return names, labels, [_feature(values, f"{path}: {name}") for name, values in columns.items()]


def _as_whole(values: tuple[str, ...]) -> list[int | str]:
    try:
        return [int(value) for value in values]
    except ValueError:
        return list(values)


def _feature(values: tuple[str, ...], where: str) -> Floats:
    """One column of numbers, or a column for each different text."""
    try:
        numbers = np.array([float(value) for value in values])
    except ValueError:
        return one_hot(values, where)
    return stretched(numbers[:, None], where)


def _numbers(source: Source, path: str, convert: Callable[[str], Any]) -> NDArray[Any]:
    """Lines of as many numbers each, ``(lines, columns)``."""
    rows = [row for _, row in _lines(source, path, convert)]
    return np.array(rows, dtype=np.int64 if convert is int else np.float64)


def _lines(source: Source, path: str, convert: Callable[[str], Any]) -> Iterator[tuple[int, list[Any]]]:
    width = 0
    for number, line in enumerate(source.lines(path), start=1):
        if not line.strip():
            continue
        try:
            row = [convert(cell) for cell in line.split(",")]
            np.array(row, dtype=np.int64 if convert is int else np.float64)
        except (ValueError, OverflowError):
            problem = f"{line.strip()[:80]!r} is not {'whole ' if convert is int else ''}numbers with commas"
            raise UserError(problem, where=f"{path}:{number}") from None
        width = width or len(row)
        if len(row) != width:
            raise UserError(f"{len(row)} numbers, {width} in the lines before", where=f"{path}:{number}")
        yield number, row


def _check_ends(edges: Ints, nodes: int, where: str) -> None:
    wrong = np.flatnonzero((edges < 1).any(axis=1) | (edges > nodes).any(axis=1))
    if len(wrong):
        first, second = edges[wrong[0]]
        raise UserError(f"edge {wrong[0] + 1} joins {first} and {second}", where=where, allowed=f"nodes 1..{nodes}")
