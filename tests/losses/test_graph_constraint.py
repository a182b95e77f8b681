"""Con2R's graph terms: catalog values of both forms, their bounds, a slow reference, and the term on a dataset."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from armillary.data.importers import import_dataset
from armillary.data.relations import relate
from armillary.data.store import open_dataset
from armillary.losses.graph_constraint import FLOOR, GraphConstraint, SampleGraphConstraint, agreement, smoothness
from armillary.objectives.terms import WithTerms
from armillary.spec.errors import UserError
from armillary.spec.jobs import TrainJob
from armillary.training.preflight import Plan, plan

QUERIES = [[0.9, 0.1, -0.2], [-0.3, 0.8, 0.4]]
NEIGHBOURS = [[0.5, 0.6, -0.3], [0.2, 0.7, -0.4]]
PLACES = ([[[0, 0, 0], [1, 2, 1]]], [[[0, 1, 0], [2, 3, 2]]])
POSTERIORS = ([[[0.7, 0.2, 0.1], [0.1, 0.6, 0.3]]], [[[0.6, 0.3, 0.1], [0.2, 0.2, 0.6]]])


def double(rows: object) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def targets(near: Tensor, alike: Tensor, alpha: float, axis: int) -> Tensor:
    return alpha * near / near.sum(axis, keepdim=True) + (1 - alpha) * alike / alike.sum(axis, keepdim=True)


def test_the_authors_code_differs_by_one_transposed_divergence() -> None:
    p, q = double(POSTERIORS[0])[0], double(POSTERIORS[1])[0]
    forward = (p[:, None] * (p[:, None].log() - q[None].log())).sum(2)
    back = (q[:, None] * (q[:, None].log() - p[None].log())).sum(2)
    alike = (-(forward + back) / 2).exp()
    assert alike.flatten().tolist() == pytest.approx([0.97240725, 0.48311346, 0.49887533, 0.69882734], abs=1e-6)
    torch.testing.assert_close((-(forward + back.T) / 2).exp(), agreement(p[None], q[None])[0])
    near = GraphConstraint(0.5, (2, 4, 4)).overlap(double(PLACES[0]), double(PLACES[1]))[0]
    scores = double(QUERIES) @ double(NEIGHBOURS).T
    halves = [-(targets(near, alike, 0.5, axis) * scores.log_softmax(axis)).sum(axis).mean() for axis in (1, 0)]
    assert float(sum(halves)) / 2 == pytest.approx(0.659895, abs=1e-6)


def test_a_survey_s_form() -> None:
    weights = double([[0.5, 0.1], [0.2, 0.4]])
    assert float(smoothness(double(QUERIES), double(NEIGHBOURS), weights)) == pytest.approx(0.893, abs=1e-12)


def test_never_below_the_entropy_of_the_graph_and_equal_where_it_is_followed() -> None:
    loss = GraphConstraint(0.5, (2, 4, 4))
    near = loss.overlap(double(PLACES[0]), double(PLACES[1]))
    alike = agreement(double(POSTERIORS[0]), double(POSTERIORS[1]))
    bound = sum(float(torch.special.entr(targets(near, alike, 0.5, axis)).sum(axis).mean()) for axis in (1, 2)) / 2
    sides = [*map(double, (*PLACES, *POSTERIORS))]
    draw = torch.Generator().manual_seed(0)
    for _ in range(20):
        places = 3 * torch.randn(2, 1, 2, 3, generator=draw, dtype=torch.float64)
        assert float(loss(*places, *sides)) >= bound
    # One query and one neighbour: the graph is 1, and followed whatever the embeddings.
    single = [part[:, :1] for part in (double([QUERIES]), double([NEIGHBOURS]), *sides)]
    assert float(loss(*single)) == pytest.approx(0, abs=1e-12)
    # Symmetric places: products log T^r are products log T^c up to what softmax does not see.
    same, both = double([[[0, 0, 0], [1, 2, 1]]]), double(POSTERIORS[0])
    aim = targets(loss.overlap(same, same), agreement(both, both), 0.5, 2)[0].log()
    assert float(aim[0, 1] - aim[0, 0]) == pytest.approx(float(aim[1, 0] - aim[1, 1]), abs=1e-6)
    queries, neighbours = aim[None], torch.eye(2, dtype=torch.float64)[None]
    floor = float(torch.special.entr(aim.exp()).sum(1).mean())
    assert float(loss(queries, neighbours, same, same, both, both)) == pytest.approx(floor, abs=1e-6)


def test_each_half_reaches_one_side() -> None:
    """By loops with the other side constant: the sum of the halves' gradients is the whole gradient."""
    queries, neighbours = double([QUERIES]).requires_grad_(), double([NEIGHBOURS]).requires_grad_()
    sides = [*map(double, (*PLACES, *POSTERIORS))]
    loss = GraphConstraint(0.3, (2, 4, 4))
    found = torch.autograd.grad(loss(queries, neighbours, *sides), [queries, neighbours])
    near, alike = loss.overlap(sides[0], sides[1])[0], agreement(sides[2], sides[3])[0]
    for axis, side in ((1, 0), (0, 1)):
        free = [queries[0], neighbours[0]]
        free[1 - side] = free[1 - side].detach()
        half = -(targets(near, alike, 0.3, axis) * (free[0] @ free[1].T).log_softmax(axis)).sum(axis).mean() / 2
        torch.testing.assert_close(found[side], torch.autograd.grad(half, [queries, neighbours][side])[0])


def some_samples(count: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    embeddings = torch.randn(count, 3, generator=draw, dtype=torch.float64)
    near = torch.rand(count, count, generator=draw, dtype=torch.float64)
    near = ((near + near.T) / 2 * (near + near.T > 0.9)).fill_diagonal_(1)
    near[3] = near[:, 3] = 0
    return embeddings, near, torch.randn(count, 4, generator=draw, dtype=torch.float64).softmax(1)


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_samples_by_loops(alpha: float) -> None:
    embeddings, near, posteriors = some_samples()
    total = 0.0
    for i, row in enumerate(embeddings.tolist()):
        others = [j for j in range(len(near)) if j != i]
        a = [max(float(near[i, j]), FLOOR) for j in others]
        p = posteriors.tolist()
        b = [
            math.exp(-sum((x - y) * (math.log(x) - math.log(y)) for x, y in zip(p[i], p[j], strict=True)) / 2)
            for j in others
        ]
        products = [sum(x * y for x, y in zip(row, embeddings[j].tolist(), strict=True)) for j in others]
        whole = math.log(sum(map(math.exp, products)))
        for x, y, product in zip(a, b, products, strict=True):
            total -= (alpha * x / sum(a) + (1 - alpha) * y / sum(b)) * (product - whole)
    found = SampleGraphConstraint(alpha)(embeddings, near, posteriors)
    assert float(found) == pytest.approx(total / len(near), rel=1e-9)


def test_samples_are_con2r_s_own_term_where_queries_and_neighbours_are_one_set() -> None:
    """The diagonal aside, both halves of the paper's are one number, and their gradients add up to one half's."""
    embeddings, near, posteriors = some_samples()
    near, alike = near.clamp_min(FLOOR), agreement(posteriors[None], posteriors[None])[0]
    own = torch.eye(len(near), dtype=torch.bool)
    near, alike = near.masked_fill(own, 0), alike.masked_fill(own, 0)
    one, other = embeddings.clone().requires_grad_(), embeddings.clone().requires_grad_()
    halves = []
    for axis, scores in ((1, other @ other.detach().T), (0, other.detach() @ other.T)):
        graph = scores.masked_fill(own, -torch.inf).log_softmax(axis).masked_fill(own, 0)
        halves.append(-(targets(near, alike, 0.4, axis) * graph).sum(axis).mean() / 2)
    torch.testing.assert_close(halves[0], halves[1])
    found = SampleGraphConstraint(0.4)(one, near, posteriors)
    torch.testing.assert_close(found, halves[0] + halves[1])
    torch.testing.assert_close(torch.autograd.grad(found, one), torch.autograd.grad(halves[0] + halves[1], other))


def test_samples_survey_and_degenerate_batches() -> None:
    embeddings, near, _ = some_samples()
    expected = sum(
        float(near[i, j] * (embeddings[i] - embeddings[j]).square().sum()) for i in range(7) for j in range(7)
    )
    found = SampleGraphConstraint(formulation="survey")(embeddings, near)
    assert float(found) == pytest.approx(expected / 7, rel=1e-9)
    single = embeddings[:1].clone().requires_grad_()
    loss = SampleGraphConstraint(1.0)(single, near[:1, :1])
    loss.backward()
    assert float(loss.detach()) == 0
    with pytest.raises(ValueError, match="posteriors"):
        SampleGraphConstraint(0.5)(embeddings, near)


def test_free_embeddings_follow_the_graph() -> None:
    """Every sample's nearest others by product are those it is joined to, which none of the start's were by chance."""
    ring = torch.zeros(12, 12, dtype=torch.float64)
    node = torch.arange(12)
    ring[node, (node + 1) % 12] = ring[(node + 1) % 12, node] = 1
    torch.manual_seed(0)
    embeddings = torch.nn.Parameter(torch.randn(12, 6, dtype=torch.float64))

    def found() -> float:
        scores = (embeddings @ embeddings.T).detach().fill_diagonal_(-torch.inf)
        return float(ring.gather(1, scores.topk(2, dim=1).indices).mean())

    before, optimizer = found(), torch.optim.Adam([embeddings], 0.05)
    for _ in range(300):
        optimizer.zero_grad()
        SampleGraphConstraint(1.0)(embeddings, ring).backward()
        optimizer.step()
    assert before < 0.5
    assert found() == 1.0


def planned(name: str, objective: str = "arcface", backbone: str = "small_convnet", **data: object) -> Plan:
    terms = [{"name": "graph_constraint", "weight": 1.0}]
    return plan(
        TrainJob.model_validate(
            {
                "data": {"name": name, **data},
                "backbone": {"name": backbone, "embedding_dim": 8},
                "objective": {"name": objective, "terms": terms},
                "train": {"batch_size": 32},
                "evaluate": {"protocols": ["geometry"]},
            }
        )
    )


def step(ready: Plan) -> Tensor:
    objective = ready.build()
    assert isinstance(objective, WithTerms)
    output = objective(next(iter(ready.batches().epoch(0))))
    output.loss.backward()
    value: Tensor = output.metrics["term_graph_constraint"]
    return value


def test_the_generators_graph_is_taken(tmp_path: Path) -> None:
    ready = planned("identities_small")
    edges, weights = (ready.data.inputs[name] for name in ("class_graph", "class_graph_weight"))
    assert edges.max() < ready.data.num_classes
    # The graph between training labels is the dataset's between their people.
    stored = open_dataset("identities_small")
    people = torch.from_numpy(stored.column("label").copy())[ready.data.train.index].unique()
    table = stored.table("graph").to_pydict()
    known = {
        (source, target): weight
        for source, target, weight in zip(table["source"], table["target"], table["weight"], strict=True)
        if source in people and target in people
    }
    found = zip(people[edges[0]].tolist(), people[edges[1]].tolist(), strict=True)
    assert dict(zip(found, weights.tolist(), strict=True)) == pytest.approx(known)
    assert torch.isfinite(step(ready))


@pytest.mark.parametrize("by", ["class", "sample"])
def test_an_edge_list_relates_classes_or_samples(by: str, tmp_path: Path) -> None:
    import_dataset("digits")
    (tmp_path / "edges.csv").write_text(
        "first,second,weight\n3,8,0.5\n8,3,0.75\n1,7\n7,7\n" if by == "class" else "0 1\n"
    )
    made = relate("digits", tmp_path / "edges.csv", "related", by=by)
    assert made.fingerprint != open_dataset("digits").fingerprint
    table = made.table("graph" if by == "class" else "sample_graph").to_pydict()
    edges = list(zip(table["source"], table["target"], table["weight"], strict=True))
    if by == "sample":
        assert edges == [(0, 1, 1), (1, 0, 1)]
    else:
        assert edges == [(1, 7, 1), (3, 8, 0.75), (7, 1, 1), (8, 3, 0.75)]
    assert torch.isfinite(step(planned("related", split="sample")))


def test_graphcl_takes_the_graph_of_its_neighbourhoods(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    pairs = torch.randint(40, (90, 2), generator=draw).tolist()
    (tmp_path / "edges.txt").write_text("".join(f"{first} {second}\n" for first, second in pairs))
    import_dataset("ego", "mine", tmp_path / "edges.txt", options={"max_nodes": 8})
    assert torch.isfinite(step(planned("mine", "graphcl", "gin", split="sample")))


@pytest.mark.parametrize(
    ("text", "by", "complaint"),
    [
        ("3,8,2\n", "class", r"edges.csv:1: weight '2'"),
        ("3,8,no\n", "class", "weight 'no'"),
        ("3,eight\n", "class", "no class 'eight'"),
        ("3,9999\n", "sample", "'9999' is no sample of digits"),
        ("3,3\n", "class", "no edges between two classes"),
        ("3,8\n", "person", "--by is 'person'"),
    ],
)
def test_edge_lists_that_do_not_fit(text: str, by: str, complaint: str, tmp_path: Path) -> None:
    (tmp_path / "edges.csv").write_text(text)
    with pytest.raises(UserError, match=complaint):
        relate("digits", tmp_path / "edges.csv", "related", by=by)


def test_a_dataset_without_a_graph_is_refused_before_anything_starts() -> None:
    with pytest.raises(UserError, match="does not say who is near whom"):
        planned("digits", split="sample")
