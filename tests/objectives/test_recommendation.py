"""SimGCL: catalog values, a slow reference, noise, negatives, and whether the contrast helps on held-out items."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from armillary.components.recommendation import LightGCN, same_orthant_noise
from armillary.data.ids import IdRows
from armillary.data.interactions import NegativeItems
from armillary.losses.info_nce import InfoNCE
from armillary.losses.recommendation import BPR
from armillary.objectives import registry
from armillary.testing import tiny

EGO = [[0.4, -0.2, 0.1], [0.3, 0.5, -0.6], [-0.7, 0.2, 0.3], [0.2, -0.4, -0.5]]
EDGES = torch.tensor([[0, 0, 1], [2, 3, 3]])
DRAWS = [
    [
        [[0.2, 0.5, 0.1], [0.9, 0.3, 0.4], [0.6, 0.7, 0.2], [0.1, 0.8, 0.3]],
        [[0.7, 0.1, 0.6], [0.2, 0.2, 0.9], [0.5, 0.4, 0.3], [0.8, 0.6, 0.1]],
    ],
    [
        [[0.3, 0.3, 0.8], [0.1, 0.6, 0.2], [0.9, 0.2, 0.5], [0.4, 0.4, 0.7]],
        [[0.5, 0.9, 0.2], [0.6, 0.1, 0.1], [0.3, 0.8, 0.7], [0.2, 0.5, 0.5]],
    ],
]


def encoder(ego: bool = False) -> LightGCN:
    made = LightGCN(4, 2, 3, 3, layers=2, ego=ego).double()
    made.connect(EDGES)
    with torch.no_grad():
        made.table.weight.copy_(torch.tensor(EGO))
    return made


def noisy(graph: LightGCN, view: int) -> Tensor:
    draws = torch.tensor(DRAWS[view], dtype=torch.float64)
    return graph.nodes(lambda values, layer: same_orthant_noise(values, draws[layer], 0.1))


def test_catalog_values() -> None:
    graph = encoder()
    with torch.no_grad():
        clean, first, second = graph.nodes(), noisy(graph, 0), noisy(graph, 1)
    # The catalog's numbers are means over nodes.
    contrast = InfoNCE(0.2, reduction="none")
    users, items = (contrast(first[part], second[part]) for part in (slice(0, 2), slice(2, 4)))
    ranking = BPR()(clean[[1]], clean[[3]], clean[[2]])
    torch.testing.assert_close(clean[0], torch.tensor([0.00554564, -0.01590097, -0.0875]).double(), atol=1e-7, rtol=0)
    torch.testing.assert_close(
        first[0], torch.tensor([0.05042183, -0.05913696, -0.1302018]).double(), atol=1e-7, rtol=0
    )
    assert float(ranking) == pytest.approx(0.62815785, abs=1e-7)
    assert float(users.mean()) == pytest.approx(0.71847006, abs=1e-7)
    assert float(items.mean()) == pytest.approx(0.0124283, abs=1e-7)
    assert float(ranking + 0.5 * (users.mean() + items.mean())) == pytest.approx(0.99360703, abs=1e-7)


def slow_nodes(table: Tensor, edges: list[tuple[int, int]], layers: int) -> list[list[float]]:
    """LightGCN by its definition, one neighbour after another, layer 0 left out."""
    around: dict[int, list[int]] = {node: [] for node in range(len(table))}
    for user, item in edges:
        around[user].append(item)
        around[item].append(user)
    hidden, total = table.tolist(), [[0.0] * table.shape[1] for _ in table]
    for _ in range(layers):
        hidden = [
            [
                sum(hidden[other][at] / math.sqrt(len(around[node]) * len(around[other])) for other in around[node])
                for at in range(table.shape[1])
            ]
            for node in range(len(table))
        ]
        total = [[a + b / layers for a, b in zip(*rows, strict=True)] for rows in zip(total, hidden, strict=True)]
    return total


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_slow_reference(reduction: str) -> None:
    """The whole loss without noise, by loops; a row of the batch may come twice."""
    cls = registry.get("simgcl")
    options = {"epsilon": 0.0, "lam": 0.7, "tau": 0.3, "l2": 0.01, "reduction": reduction}
    objective: Any = tiny.build(cls, options, dtype=torch.float64)
    batch = tiny.batch(cls.needs, 9)
    table, triples = objective.encoder.table.weight.detach(), batch.views[0].tolist()
    nodes = slow_nodes(table, [(int(user), int(item)) for user, item in tiny.EDGES.T], 2)

    def product(a: list[float], b: list[float]) -> float:
        return sum(x * y for x, y in zip(a, b, strict=True))

    def cosine(a: list[float], b: list[float]) -> float:
        return product(a, b) / math.sqrt(product(a, a) * product(b, b))

    share = 1 / len(triples) if reduction == "mean" else 1
    expected = 0.0
    for user, item, other in triples:
        ahead = product(nodes[user], nodes[item]) - product(nodes[user], nodes[other])
        expected += share * math.log(1 + math.exp(-ahead))
        expected += 0.01 * share * sum(product(row, row) for row in table[[user, item, other]].tolist())
    for column in (0, 1):
        distinct = sorted({triple[column] for triple in triples})
        for node in distinct:
            terms = [math.exp(cosine(nodes[node], nodes[other]) / 0.3) for other in distinct]
            weight = 1 / len(distinct) if reduction == "mean" else 1
            expected += 0.7 * weight * (math.log(sum(terms)) - 1 / 0.3)
    assert float(objective(batch).loss) == pytest.approx(expected, rel=1e-9)


def test_noise_has_its_length_and_never_leaves_the_orthant() -> None:
    draw = torch.Generator().manual_seed(0)
    values, uniform = torch.randn(50, 8, generator=draw), torch.rand(50, 8, generator=draw)
    moved = same_orthant_noise(values, uniform, 0.3)
    torch.testing.assert_close((moved - values).norm(dim=1), torch.full((50,), 0.3))
    assert torch.equal(moved.sign(), values.sign())


def test_without_noise_both_views_are_the_clean_branch() -> None:
    graph = encoder()
    draws = torch.rand(4, 3, dtype=torch.float64)
    torch.testing.assert_close(graph.nodes(lambda values, _: same_orthant_noise(values, draws, 0.0)), graph.nodes())


def test_layer_zero_on_request_and_nodes_without_edges() -> None:
    graph = encoder(ego=True)
    without = encoder().nodes()
    torch.testing.assert_close(graph.nodes(), (2 * without + torch.tensor(EGO).double()) / 3)
    alone = LightGCN(5, 2, 3, 3)
    alone.connect(EDGES)
    assert torch.equal(alone.nodes()[4], torch.zeros(3))


def test_agrees_with_torch_geometric() -> None:
    lightgcn = pytest.importorskip("torch_geometric.nn").LightGCN
    theirs = lightgcn(4, 3, 2, alpha=torch.tensor([0.0, 0.5, 0.5])).double()
    ours = encoder()
    with torch.no_grad():
        theirs.embedding.weight.copy_(ours.table.weight)
    found = theirs.get_embedding(torch.cat([EDGES, EDGES.flip(0)], dim=1))
    torch.testing.assert_close(ours.nodes(), found)


def test_negatives_were_not_chosen_and_do_not_depend_on_the_batch() -> None:
    rows = IdRows(tiny.EDGES.T.contiguous(), tiny.USERS + tiny.ITEMS, (tiny.USERS, tiny.EDGES.shape[1]))
    negatives = NegativeItems(rows, torch.arange(len(rows)))
    chosen = set(map(tuple, rows.ids.tolist()))
    found = torch.stack([negatives(torch.arange(len(rows)), 0, epoch) for epoch in range(40)])
    for user, items in zip(rows.ids[:, 0].tolist(), found.T.tolist(), strict=True):
        assert not {(user, item) for item in items} & chosen
        assert len(set(items)) == tiny.ITEMS - 3
    assert torch.equal(negatives(torch.tensor([4, 2]), 0, 7), found[7, [4, 2]])


def test_bpr_refuses_other_shapes() -> None:
    with pytest.raises(ValueError, match="differ in shape"):
        BPR()(torch.ones(2, 3), torch.ones(2, 3), torch.ones(1, 3))
