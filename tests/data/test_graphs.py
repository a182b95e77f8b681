"""Graphs that come from files: pictures by hand, neighbourhoods against a slow search, and what is refused."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from armillary import data
from armillary.components.graphs import unpack
from armillary.data.importers import import_dataset
from armillary.data.store import Dataset
from armillary.spec.errors import UserError
from armillary.spec.jobs import TrainJob
from armillary.training.preflight import plan

# A triangle and a path; the nodes of both are mixed.
TU = {
    "A": "1, 3\n3, 5\n5, 1\n2, 4\n",
    "graph_indicator": "1\n2\n1\n2\n1\n2\n",
    "graph_labels": "7\n-1\n",
    "node_labels": "0\n2\n0\n5\n2\n5\n",
    "node_attributes": "0.0, 3\n1.0, 3\n0.5, 3\n1.0, 3\n0.0, 3\n0.25, 3\n",
}


def tu_folder(path: Path, **changed: str | None) -> Path:
    path.mkdir()
    for kind, text in {**TU, **changed}.items():
        if text is not None:
            (path / f"SET_{kind}.txt").write_text(text)
    return path


def pictures(dataset: Dataset) -> torch.Tensor:
    rows = [image for part in dataset.rows() for image in part.images]
    return torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2).float() / 255


def test_tu_by_hand(tmp_path: Path) -> None:
    found = import_dataset("tu", "tu", tu_folder(tmp_path / "tu"))
    assert found.manifest.class_names == ("-1", "7")
    assert found.column("label").tolist() == [1, 0]
    graphs = unpack(pictures(found))
    assert graphs.mask.tolist() == [[True] * 3, [True] * 3]
    assert graphs.adjacency[0].tolist() == [[0, 1, 1], [1, 0, 1], [1, 1, 0]]
    assert graphs.adjacency[1].tolist() == [[0, 1, 0], [1, 0, 0], [0, 0, 0]]
    # 1; labels 0, 2, 5; the two numbers, of which the second is the same everywhere.
    assert graphs.features[0].tolist()[0] == [1, 1, 0, 0, 0, 0]
    assert graphs.features[0].tolist()[1] == pytest.approx([1, 1, 0, 0, 128 / 255, 0])
    assert graphs.features[1].tolist()[2] == pytest.approx([1, 0, 0, 1, 64 / 255, 0])


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"A": None}, "0 files"),
        ({"graph_indicator": None}, "each node's graph"),
        ({"A": "1, 2\n"}, "nodes 1 and 2, which are in different graphs"),
        ({"A": "1, 9\n"}, "edge 1 joins 1 and 9"),
        ({"A": "1\n"}, "lines of two numbers"),
        ({"A": "1, x\n"}, r"SET_A.txt:1.*not whole numbers"),
        ({"A": f"1, {10**30}\n"}, r"SET_A.txt:1.*not whole numbers"),
        ({"graph_labels": "7\n"}, "1 labels, and nodes of 2 graphs"),
        ({"graph_labels": "7\n8\n9\n"}, "graph 3 has no nodes"),
        ({"node_labels": "0\n"}, "1 lines for 6 nodes"),
        ({"node_attributes": "nan\n1\n1\n1\n1\n1\n"}, "node 1 are not all finite"),
        ({"node_attributes": "1\n1, 2\n1\n1\n1\n1\n"}, r"attributes.txt:2.*2 numbers, 1 in"),
        ({"graph_indicator": "0\n1\n1\n1\n1\n1\n"}, "graphs count from 1"),
    ],
)
def test_tu_refuses(changed: dict[str, str | None], complaint: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=complaint):
        import_dataset("tu", "tu", tu_folder(tmp_path / "tu", **changed))


def test_large_graphs_are_left_out_and_listed(tmp_path: Path) -> None:
    folder = tu_folder(
        tmp_path / "tu", graph_indicator="1\n1\n1\n1\n1\n2\n", A="1, 2\n", node_labels=None, node_attributes=None
    )
    found = import_dataset("tu", "tu", folder, options={"max_nodes": 3})
    assert [item.reason for item in found.quarantine()] == ["5 nodes, more than 3"]
    assert (len(found), pictures(found).shape) == (1, (1, 1, 1, 3))
    with pytest.raises(UserError, match="the smallest 3"):
        import_dataset("tu", "none", tu_folder(tmp_path / "b"), options={"max_nodes": 2})


def write_graph(path: Path, draw: np.random.Generator, nodes: int = 40, edges: int = 90) -> np.ndarray[Any, Any]:
    pairs = draw.integers(nodes, size=(edges, 2))
    path.write_text("".join(f"n{first:02},n{second:02}\n" for first, second in pairs))
    rows = [f"n{node:02},{node % 2},{node / 10},{'red' if node % 3 else 'blue'}\n" for node in range(nodes)]
    path.with_name("nodes.csv").write_text("node,label,size,colour\n" + "".join(rows))
    return pairs


@pytest.mark.parametrize(("hops", "most"), [(1, 40), (2, 40), (2, 6), (3, 9)])
def test_neighbourhoods_against_a_slow_search(hops: int, most: int, tmp_path: Path) -> None:
    pairs = write_graph(tmp_path / "edges.csv", np.random.default_rng(0))
    options = {"nodes": "nodes.csv", "hops": hops, "max_nodes": most}
    found = import_dataset("ego", "mine", tmp_path / "edges.csv", options=options)
    graphs, linked = unpack(pictures(found)), {tuple(sorted(map(int, pair))) for pair in pairs if pair[0] != pair[1]}
    assert found.column("label").tolist() == [node % 2 for node in range(40)]
    for node in range(40):
        distance, edge = {node: 0}, {node}
        for hop in range(1, hops + 1):
            edge = {b for pair in linked for a, b in (pair, pair[::-1]) if a in edge} - set(distance)
            distance |= dict.fromkeys(edge, hop)
        count = int(graphs.mask[node].sum())
        assert count == min(len(distance), most)
        # Who is who is told by the size, which no two nodes share.
        sizes = (graphs.features[node, :count, 2] * 39).round().long().tolist()
        assert sizes[0] == node
        assert graphs.features[node, :count, 1].tolist() == [1] + [0] * (count - 1)
        hops_found = [distance[one] for one in sizes]
        assert hops_found == sorted(distance.values())[:count]
        expected = {(a, b) for a in sizes for b in sizes if tuple(sorted((a, b))) in linked}
        rows, columns = graphs.adjacency[node].nonzero().T.tolist()
        assert {(sizes[a], sizes[b]) for a, b in zip(rows, columns, strict=True)} == expected
    table = found.table("sample_graph").to_pydict()
    assert set(zip(table["source"], table["target"], strict=True)) == linked | {(b, a) for a, b in linked}


def test_an_edge_list_alone_is_enough(tmp_path: Path) -> None:
    (tmp_path / "edges.txt").write_text("# from a web page\n10 9\n9 1\n9 9\n10 9\n")
    found = import_dataset("ego", "mine", tmp_path / "edges.txt")
    graphs = unpack(pictures(found))
    assert graphs.mask.sum(dim=1).tolist() == [2, 3, 2]  # nodes 1, 9, 10
    assert found.manifest.class_names == ("unlabelled",)
    assert graphs.features.shape[2] == 2


@pytest.mark.parametrize(
    ("nodes", "options", "complaint"),
    [
        ("", {}, "must name the columns"),
        ("node,label\n", {}, "there are no nodes"),
        ("node,label\na,1\n", {}, "joins node 'b', which nodes.csv does not list"),
        ("node,label\na,1\nb,1\na,1\n", {}, "'a' is there twice"),
        ("node,label\na,1\nb\n", {}, r"nodes.csv:3.*1 cells"),
        ("node,label,size\na,1,1\nb,1,inf\n", {}, "not all finite"),
        ("node,label\na,1\nb,x\n", {"label_column": "team"}, "'team'"),
        ("node,label\na,1\nb,1\n", {"nodes": "../nodes.csv"}, "leaves the source"),
        ("node,label\na,1\nb,1\n", {"hops": 9}, "--hops is 9"),
    ],
)
def test_ego_refuses(nodes: str, options: dict[str, Any], complaint: str, tmp_path: Path) -> None:
    (tmp_path / "edges.csv").write_text("a,b\n")
    (tmp_path / "nodes.csv").write_text(nodes)
    with pytest.raises(UserError, match=complaint):
        import_dataset("ego", "out", tmp_path / "edges.csv", options={"nodes": "nodes.csv", **options})


def test_graphcl_trains_on_an_edge_list(tmp_path: Path) -> None:
    write_graph(tmp_path / "edges.csv", np.random.default_rng(1))
    import_dataset("ego", "mine", tmp_path / "edges.csv", options={"nodes": "nodes.csv", "max_nodes": 8})
    ready = plan(
        TrainJob.model_validate(
            {
                "data": {"name": "mine", "split": "sample"},
                "backbone": {"name": "gin", "embedding_dim": 8},
                "objective": {"name": "graphcl"},
                "train": {"batch_size": 16},
                "evaluate": {"protocols": ["knn"]},
            }
        )
    )
    objective = ready.build()
    losses = []
    optimizer = torch.optim.Adam(objective.parameters(), 0.01)
    for epoch in range(6):
        for batch in ready.batches().epoch(epoch):
            optimizer.zero_grad()
            loss = objective(batch).loss
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    assert np.mean(losses[-2:]) < np.mean(losses[:2]) - 0.2


def some_data() -> list[Any]:
    geometric = pytest.importorskip("torch_geometric.data")
    triangle = torch.tensor([[0, 1, 2], [1, 2, 0]])
    return [
        geometric.Data(x=torch.tensor([[0.0], [1.0], [4.0]]), edge_index=triangle, y=torch.tensor([3])),
        geometric.Data(x=torch.tensor([[2.0], [0.0]]), edge_index=torch.zeros(2, 0).long(), y=torch.tensor([1])),
    ]


@pytest.mark.parametrize("by", ["file", "function"])
def test_pyg_many_graphs(by: str, tmp_path: Path) -> None:
    torch.save(some_data(), tmp_path / "graphs.pt")
    found = import_dataset("pyg", "set", tmp_path / "graphs.pt") if by == "file" else data.from_pyg(some_data(), "set")
    assert found.manifest.class_names == ("1", "3")
    assert found.column("label").tolist() == [1, 0]
    graphs = unpack(pictures(found))
    assert graphs.mask.sum(dim=1).tolist() == [3, 2]
    assert graphs.adjacency.sum(dim=(1, 2)).tolist() == [6, 0]
    assert graphs.features[0, :, 1].tolist() == pytest.approx([0, 64 / 255, 1])


def test_pyg_one_graph_becomes_its_neighbourhoods(tmp_path: Path) -> None:
    geometric = pytest.importorskip("torch_geometric.data")
    path = geometric.Data(edge_index=torch.tensor([[0, 1, 2], [1, 2, 3]]), y=torch.tensor([0, 0, 5, 5]), num_nodes=4)
    torch.save(path, tmp_path / "graph.pt")
    found = import_dataset("pyg", "path", tmp_path / "graph.pt")
    assert unpack(pictures(found)).mask.sum(dim=1).tolist() == [2, 3, 3, 2]
    assert found.manifest.class_names == ("0", "5")
    assert found.fingerprint == data.from_pyg(path, "again").fingerprint


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda graphs: graphs[0].update({"y": None}), "1 of 2 graphs have a y"),
        (lambda graphs: graphs[0].update({"y": torch.tensor([0.5])}), "whole numbers"),
        (lambda graphs: graphs[0].update({"y": torch.tensor([float("nan")])}), "whole numbers"),
        (lambda graphs: graphs[0].update({"y": torch.tensor([1, 2])}), "graph 1.*not one number"),
        (lambda graphs: graphs[0].update({"x": torch.rand(3, 2)}), "differ in features"),
        (lambda graphs: graphs[0].update({"x": torch.tensor([[0.0], [1.0], [torch.inf]])}), "not all finite"),
        (lambda graphs: graphs[0].update({"edge_index": torch.tensor([[0], [7]])}), "0..2"),
        (lambda graphs: graphs[0].update({"edge_index": torch.rand(2, 3)}), "no edge_index"),
        (lambda _: [{"a": 1}], "no edge_index"),
    ],
)
def test_pyg_refuses(change: Callable[[list[Any]], Any], complaint: str) -> None:
    graphs = some_data()
    answer = change(graphs)
    with pytest.raises(UserError, match=complaint):
        data.from_pyg(answer if isinstance(answer, list) else graphs, "broken")


class Harm:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("harmed"),))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_pyg_runs_no_code_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch_geometric.data")
    monkeypatch.chdir(tmp_path)
    torch.save([*some_data(), Harm()], "harm.pt")
    Path("plain.pt").write_bytes(pickle.dumps(Harm()))
    Path("text.pt").write_text("graphs")
    Path("empty.pt").write_text("")
    for name in ("harm.pt", "plain.pt", "text.pt", "empty.pt"):
        with pytest.raises(UserError, match=r"damaged, or holds more than graphs"):
            import_dataset("pyg", "harm", name)
    assert not Path("harmed").exists()
