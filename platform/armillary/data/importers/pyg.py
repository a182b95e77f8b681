"""Graphs of PyTorch Geometric: ``Data`` objects, in memory or in a file that ``torch.save`` wrote."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from armillary.data.importers.contents import Contents, Progress
from armillary.data.importers.graph_sets import Ints, joined, many_graphs, neighbourhoods, stretched
from armillary.data.importers.options import PygOptions
from armillary.data.importers.source import Source, SourceFile
from armillary.data.layout import Record, Unreadable
from armillary.data.store import Dataset, write_dataset
from armillary.spec.errors import UserError

if TYPE_CHECKING:
    import torch

_SAVE = "torch.save([graph for graph in dataset], 'graphs.pt')"


def read_pyg(source: Source, options: PygOptions) -> Contents:
    """A ``.pt`` file with one ``Data`` or a list of them; see :func:`from_pyg`. Nothing else in it is unpickled.

    Raises:
        UserError: torch-geometric is missing, the file holds something else, or graphs that cannot be.
    """
    source.need("a .pt file", folder=False)
    return _contents(_load(source), options, source.name, [source.stat(source.name)])


def from_pyg(
    graphs: Any, name: str, *, hops: int = 1, max_nodes: int = 128, progress: Progress | None = None
) -> Dataset:
    """Writes PyTorch Geometric's graphs into the store.

    Several ``Data`` are a sample each, of class ``y``. A single one is a large graph: each node is a sample, its
    neighbourhood within ``hops`` edges, of class ``y[node]``. Used are ``edge_index (2, E)``, ``x (nodes, F)``, whose
    columns are stretched to [0, 1] and kept in 256 steps, and ``y``; x and y may be missing. Edges count in both
    directions.

    Args:
        graphs: one ``Data`` or any sequence of them, such as a ``TUDataset``.
        name: in the store, a path or an ``s3://`` URL.
        hops: see above.
        max_nodes: larger graphs are left out, neighbourhoods cut to the nearest nodes.
        progress: called with how many are done, and how many there are.

    Raises:
        UserError: a graph without edges' ends, ends outside its nodes, features that are not finite, labels that are
            not whole numbers, an existing dataset of that name.
    """
    contents = _contents(graphs, PygOptions(hops=hops, max_nodes=max_nodes), "graphs", [])

    def items() -> Iterator[Record | Unreadable]:
        for done, item in enumerate(contents.items(0), start=1):
            yield item
            if progress is not None:
                progress(done, contents.total)

    return write_dataset(name, items(), class_names=contents.class_names, tables=contents.tables, form="pixels")


def _load(source: Source) -> Any:
    import torch

    try:
        with warnings.catch_warnings():
            # Its imports speak of torch's own plans.
            warnings.simplefilter("ignore", FutureWarning)
            from torch_geometric.data.data import DataEdgeAttr, DataTensorAttr
            from torch_geometric.data.storage import GlobalStorage
    except ImportError:
        raise UserError(
            "a .pt file holds objects of torch-geometric, which is not installed",
            hint="pip install 'armillary[graph]', or `armillary data import tu` for text files",
        ) from None
    with source.open(source.name) as file:
        try:
            # Tensors, plain values, and the classes that torch-geometric declares safe.
            with torch.serialization.safe_globals([DataEdgeAttr, DataTensorAttr, GlobalStorage]):
                return torch.load(file, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, TypeError, LookupError) as error:
            why = (str(error).splitlines() or [type(error).__name__])[0][:160]
            problem = f"{source.name} is damaged, or holds more than graphs: {why}"
            raise UserError(problem, allowed="a Data or a list of them", hint=_SAVE) from error


def _contents(graphs: Any, options: PygOptions, where: str, files: Sequence[SourceFile]) -> Contents:
    if isinstance(graphs, Sequence) or (hasattr(graphs, "__getitem__") and not hasattr(graphs, "edge_index")):
        parts = [_arrays(graph, f"{where}, graph {number}") for number, graph in enumerate(graphs, start=1)]
        if not parts:
            raise UserError(f"{where} holds no graphs", hint=_SAVE)
        labels = [_label(graph, f"{where}, graph {number}") for number, graph in enumerate(graphs, start=1)]
        return _many(parts, labels, options, where, files)
    features, edges = _arrays(graphs, where)
    given = getattr(graphs, "y", None)
    if given is not None and tuple(given.shape) not in ((len(features),), (len(features), 1)):
        raise UserError(f"y has the shape {tuple(given.shape)}", where=where, allowed=f"({len(features)},): one a node")
    return neighbourhoods(
        joined([stretched(features, where)], len(features), where),
        edges,
        None if given is None else _whole(given, where),
        files,
        where=where,
        hops=options.hops,
        max_nodes=options.max_nodes,
    )


def _many(
    parts: Sequence[tuple[NDArray[np.float64], Ints]],
    labels: Sequence[int | None],
    options: PygOptions,
    where: str,
    files: Sequence[SourceFile],
) -> Contents:
    widths = {features.shape[1] for features, _ in parts}
    if len(widths) > 1:
        raise UserError(f"graphs differ in features a node: {sorted(widths)}", where=where)
    labelled = [label for label in labels if label is not None]
    if labelled and len(labelled) < len(labels):
        raise UserError(f"{len(labelled)} of {len(labels)} graphs have a y", where=where, allowed="all or none")
    sizes = [len(features) for features, _ in parts]
    begins = np.concatenate([[0], np.cumsum(sizes)])
    values = np.concatenate([features for features, _ in parts])
    return many_graphs(
        joined([stretched(values, where)], len(values), where),
        np.repeat(np.arange(len(parts)), sizes),
        np.concatenate([edges + begin for (_, edges), begin in zip(parts, begins, strict=False)]),
        labelled or None,
        files,
        where=where,
        max_nodes=options.max_nodes,
    )


def _arrays(graph: Any, where: str) -> tuple[NDArray[np.float64], Ints]:
    """Features ``(n, F)`` and edges ``(E, 2)``."""
    import torch

    index, x = getattr(graph, "edge_index", None), getattr(graph, "x", None)
    if not isinstance(index, torch.Tensor) or index.ndim != 2 or index.shape[0] != 2 or index.is_floating_point():
        raise UserError("there is no edge_index of shape (2, E)", where=where, allowed="torch_geometric.data.Data")
    nodes = graph.num_nodes or 0
    if x is not None and (not isinstance(x, torch.Tensor) or x.ndim > 2 or len(x) != nodes):
        raise UserError(f"x is not (nodes, F) of {nodes} nodes", where=where)
    if nodes < 1:
        raise UserError("the graph has no nodes", where=where)
    if index.numel() and not (int(index.min()) >= 0 and int(index.max()) < nodes):
        raise UserError("edge_index names a node that is not there", where=where, allowed=f"0..{nodes - 1}")
    features = np.zeros((nodes, 0)) if x is None else x.detach().to(torch.float64).reshape(nodes, -1).numpy()
    return features, index.long().T.numpy()


def _label(graph: Any, where: str) -> int | None:
    import torch

    given = getattr(graph, "y", None)
    if given is None:
        return None
    if not isinstance(given, torch.Tensor) or given.numel() != 1:
        raise UserError("y is not one number", where=where, allowed="the graph's class")
    return _whole(given, where)[0]


def _whole(given: torch.Tensor, where: str) -> list[int]:
    numbers = given.reshape(-1).tolist()
    if any(number != int(number) for number in numbers if number == number) or any(n != n for n in numbers):
        raise UserError("y holds other than whole numbers", where=where, allowed="numbers of classes")
    return [int(number) for number in numbers]
