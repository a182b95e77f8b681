"""Who is near whom: graphs between the classes or the samples of a dataset, as tables of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from armillary.data.copies import stored_records
from armillary.data.importers import ensure_dataset
from armillary.data.importers.edges import read_cells
from armillary.data.importers.graph_sets import graph_table
from armillary.data.importers.options import EdgesOptions
from armillary.data.importers.source import Source
from armillary.data.splits import PreparedData
from armillary.data.store import Dataset, dataset_exists, write_dataset
from armillary.spec.errors import UserError, nearest

if TYPE_CHECKING:
    import pyarrow as pa

# Tables of source, target (int64) and weight (float32, in (0, 1]), every edge in both directions: between class
# numbers, and between positions in the dataset.
CLASS_GRAPH, SAMPLE_GRAPH = "graph", "sample_graph"


def with_graph(data: PreparedData, location: str) -> PreparedData:
    """The data with its graph among the inputs.

    Args:
        data: a fold of a dataset.
        location: that dataset's name or place.

    Returns:
        ``inputs["class_graph"] (2, E)`` between training labels and ``inputs["class_graph_weight"] (E,)``; or, where
        the dataset has edges between samples, ``sample_graph`` between positions in the dataset. Edges from or to what
        is not trained on are left out.

    Raises:
        UserError: the dataset has no graph, or one between classes or samples that it does not have.
    """
    dataset = ensure_dataset(location)
    kind = next((name for name in (SAMPLE_GRAPH, CLASS_GRAPH) if name in dataset.manifest.tables), None)
    if kind is None:
        raise UserError(
            f"{data.name} does not say who is near whom",
            key="data.name",
            allowed=f"a dataset with the table {CLASS_GRAPH} or {SAMPLE_GRAPH}",
            hint=f"`armillary data relate {data.name} EDGES --name NEW`, `armillary data import ego`, or "
            "data.name: identities",
        )
    edges, weight = _checked(dataset, kind)
    rows = data.train.index
    nodes = rows if kind == SAMPLE_GRAPH else torch.from_numpy(dataset.column("label").copy())[rows]
    trained = torch.unique(nodes)
    there = torch.isin(edges, trained).all(dim=0)
    edges, weight = edges[:, there], weight[there]
    if kind == CLASS_GRAPH:
        edges = torch.searchsorted(trained, edges)
    found = "sample_graph" if kind == SAMPLE_GRAPH else "class_graph"
    return replace(data, inputs={**data.inputs, found: edges, f"{found}_weight": weight})


def relate(
    name: str, edges: str | Path, new: str, *, by: str = "class", options: EdgesOptions | None = None
) -> Dataset:
    """Writes a copy of a dataset that says who is near whom.

    Args:
        name: of the dataset.
        edges: a text file, local or on S3, with lines of ``first, second[, weight]``; weights are in (0, 1], 1 if not
            given. The order of the two does not matter; of an edge that is there twice the larger weight counts.
        new: the copy's name.
        by: ``class``: names of classes; ``sample``: positions in the dataset, from 0.
        options: of the text file.

    Raises:
        UserError: no such dataset, class or sample, weights that cannot be, no edges, or ``new`` exists.
    """
    if by not in ("class", "sample"):
        raise UserError(f"--by is {by!r}", allowed="class, sample")
    dataset = ensure_dataset(name)
    if dataset_exists(new):
        raise UserError(f"dataset {new!r} exists already", hint="delete it or use another --name")
    source = Source(edges, "edges")
    source.need("a text file of edges", folder=False)
    found: dict[tuple[int, int], float] = {}
    for first, second, weight in _edges(source, options or EdgesOptions(), _Nodes(dataset, by)):
        if first != second:
            for pair in ((first, second), (second, first)):
                found[pair] = max(weight, found.get(pair, 0.0))
    if not found:
        raise UserError(
            f"{source.name} holds no edges between two {'classes' if by == 'class' else 'samples'}",
            allowed="first, second[, weight]",
        )
    pairs = sorted(found)
    table = graph_table(np.array(pairs, np.int64), np.array([found[pair] for pair in pairs], np.float32))
    kept = {other: dataset.table(other) for other in dataset.manifest.tables}
    manifest = dataset.manifest
    return write_dataset(
        new,
        (record for _, record in stored_records(dataset)),
        class_names=manifest.class_names,
        columns=manifest.columns,
        tables={**kept, (CLASS_GRAPH if by == "class" else SAMPLE_GRAPH): table},
        form=manifest.form,
        credit=manifest.credits,
        licence=manifest.licence,
    )


class _Nodes:
    """The number of a class by its name, or of a sample."""

    def __init__(self, dataset: Dataset, by: str) -> None:
        self._name, self._by, self._count = dataset.name, by, len(dataset)
        self._classes = {name: number for number, name in enumerate(dataset.manifest.class_names)}

    def __call__(self, cell: str, where: str) -> int:
        if self._by == "class":
            if cell in self._classes:
                return self._classes[cell]
            close = nearest(cell, self._classes)
            hint = f"did you mean {close[0]!r}?" if close else None
            raise UserError(f"{self._name} has no class {cell[:80]!r}", where=where, hint=hint)
        if cell.isascii() and cell.isdigit() and len(cell) < 19 and int(cell) < self._count:
            return int(cell)
        raise UserError(f"{cell[:80]!r} is no sample of {self._name}", where=where, allowed=f"0..{self._count - 1}")


def _edges(source: Source, options: EdgesOptions, node: _Nodes) -> Iterator[tuple[int, int, float]]:
    for where, cells in read_cells(source, options):
        weight = 1.0
        if len(cells) > 2:
            try:
                weight = float(cells[2])
            except ValueError:
                weight = -1.0
            if not 0 < weight <= 1:
                raise UserError(f"weight {cells[2][:80]!r}", where=where, allowed="more than 0, at most 1")
        yield node(cells[0], where), node(cells[1], where), weight


def _checked(dataset: Dataset, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    table: pa.Table = dataset.table(kind)
    if not {"source", "target", "weight"} <= set(table.column_names):
        raise UserError(f"{dataset.name}: its table {kind} lacks columns", allowed="source, target, weight")
    ends: NDArray[np.int64] = np.stack([table[name].to_numpy() for name in ("source", "target")]).astype(np.int64)
    weight = table["weight"].to_numpy().astype(np.float32)
    count = len(dataset) if kind == SAMPLE_GRAPH else len(dataset.manifest.class_names)
    if ends.size and not (ends.min() >= 0 and ends.max() < count and (weight > 0).all() and (weight <= 1).all()):
        problem = f"{dataset.name}: its table {kind} joins what is not there, or has weights outside (0, 1]"
        raise UserError(problem, key="data.name")
    return torch.from_numpy(ends), torch.from_numpy(weight)
