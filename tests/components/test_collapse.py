"""The collapse monitor: published numbers, degenerate embeddings, two workers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from armillary import collectives
from armillary.components.collapse import CollapseMonitor, channel_std, effective_rank, verdict
from armillary.testing.gloo_pool import shared_pool

A = torch.tensor([[0.5, -1.2, 0.3], [1.0, 0.4, -0.7], [-0.8, 0.9, 0.1], [0.2, -0.5, 1.1]], dtype=torch.float64)


def test_published_numbers() -> None:
    assert float(effective_rank(A.T @ A)) == pytest.approx(2.76706465, abs=1e-6)
    rows = torch.nn.functional.normalize(A, dim=1)
    spread = channel_std(rows.sum(dim=0), rows.square().sum(dim=0), torch.tensor(4.0))
    assert float(spread) == pytest.approx(rows.std(dim=0).mean().item(), rel=1e-9)
    assert float(spread) == pytest.approx(0.64394401, abs=1e-8)


def measured(rows: Tensor) -> dict[str, float]:
    monitor = CollapseMonitor()
    share = len(rows) // collectives.world_size()
    mine = rows[collectives.rank() * share : (collectives.rank() + 1) * share]
    for part in mine.split(8):
        monitor.update(part, part[:, :4] - 1)
        monitor.update_assignments(part.softmax(dim=1))
    return {name: float(value) for name, value in monitor.metrics().items()}


def prefixed(metrics: dict[str, float]) -> dict[str, float]:
    return {f"train/{name}": value for name, value in metrics.items()}


def test_a_healthy_embedding() -> None:
    torch.manual_seed(0)
    rows = torch.randn(256, 16) * torch.rand(256, 1)
    found = measured(rows)
    unit = torch.nn.functional.normalize(rows, dim=1)
    assert found["embedding_std"] == pytest.approx(4 * unit.std(dim=0).mean().item(), rel=1e-5)
    singular = torch.linalg.svdvals(unit)
    share = singular / singular.sum()
    assert found["effective_rank"] == pytest.approx(math.exp(-(share * share.log()).sum()), rel=1e-4)
    shares = rows.softmax(dim=1)
    mean = shares.mean(dim=0)
    assert found["prototype_perplexity"] == pytest.approx(math.exp(-(mean * mean.log()).sum()), rel=1e-5)
    entropy = -(shares * shares.log()).sum(dim=1).mean().item() / math.log(16)
    assert found["assignment_entropy"] == pytest.approx(entropy, rel=1e-5)
    monitor = CollapseMonitor()
    monitor.update(rows)
    assert verdict(prefixed({name: float(value) for name, value in monitor.metrics().items()})) is None
    assert monitor.metrics() == {}


def degenerate(kind: str) -> Tensor:
    torch.manual_seed(0)
    noise, direction = torch.randn(128, 64), torch.randn(64)
    if kind == "point":
        return direction + 1e-3 * noise
    return torch.randn(128, 1) * direction + 1e-4 * noise


@pytest.mark.parametrize(("kind", "says"), [("point", "nearly one embedding"), ("line", "lie on a line")])
def test_a_collapsed_embedding_says_why(kind: str, says: str) -> None:
    monitor = CollapseMonitor()
    monitor.update(degenerate(kind))
    reason = verdict(prefixed({name: float(value) for name, value in monitor.metrics().items()}))
    assert reason is not None
    assert says in reason


@pytest.mark.parametrize(("kind", "says"), [("point", "nearly one projection"), ("line", "projections lie on a line")])
def test_projections_collapse_while_embeddings_spread(kind: str, says: str) -> None:
    monitor = CollapseMonitor()
    monitor.update(torch.randn(128, 64), degenerate(kind))
    found = {name: float(value) for name, value in monitor.metrics().items()}
    assert found["embedding_std"] > 0.9
    reason = verdict(prefixed(found))
    assert reason is not None
    assert says in reason


@pytest.mark.parametrize(
    ("centre", "centred", "marked"),
    [(0.0, True, False), (1.0, True, False), (2.0, True, True), (2.0, False, False), (7.0, False, True)],
)
def test_projections_that_draw_together(centre: float, centred: bool, marked: bool) -> None:
    """Behind a batch norm a common part is a warning; without one, only when little else is left."""
    torch.manual_seed(0)
    monitor = CollapseMonitor(centred)
    embeddings = torch.randn(256, 64)
    projections = embeddings + centre * torch.randn(64)
    monitor.update(embeddings, projections)
    found = {name: float(value) for name, value in monitor.metrics().items()}
    unit = torch.nn.functional.normalize(projections, dim=1)
    cosine = float(unit.mean(dim=0).square().sum())
    assert (cosine > (0.64 if centred else 0.96)) is marked
    assert 1 - found["projection_std"] ** 2 == pytest.approx(cosine, abs=0.02)
    reason = verdict(prefixed(found))
    assert (reason is not None and "draw together" in reason) is marked


def test_wide_projections_are_watched_in_part() -> None:
    torch.manual_seed(0)
    monitor = CollapseMonitor()
    rows = torch.randn(64, 1500)
    monitor.update(rows[:, :8], rows)
    found = {name: float(value) for name, value in monitor.metrics().items()}
    assert found["projection_dim"] == 512
    assert 1 < found["projection_rank"] <= 64
    unit = torch.nn.functional.normalize(rows, dim=1)
    assert found["projection_std"] == pytest.approx(1500**0.5 * unit.std(dim=0).mean().item(), rel=1e-4)


@pytest.mark.parametrize(
    ("shares", "says"),
    [
        (torch.eye(5)[[2] * 10], "one prototype"),
        (torch.full((10, 5), 0.2), "uniform"),
        (torch.eye(5).repeat(2, 1), None),
    ],
)
def test_collapsed_assignments(shares: Tensor, says: str | None) -> None:
    monitor = CollapseMonitor()
    monitor.update_assignments(shares)
    reason = verdict(prefixed({name: float(value) for name, value in monitor.metrics().items()}))
    assert (reason is None) if says is None else (reason is not None and says in reason)


def test_nothing_measured_is_no_collapse() -> None:
    assert verdict({"train/loss": 0.0}) is None
    monitor = CollapseMonitor().eval()
    monitor.update(torch.ones(3, 3))
    assert monitor.metrics() == {}


@pytest.mark.xdist_group("gloo")
def test_two_workers_measure_what_one_does() -> None:
    rows = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
    single = measured(rows)
    for found in shared_pool().run(measured, rows):
        assert found == pytest.approx(single, rel=1e-5)
