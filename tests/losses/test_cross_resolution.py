"""Losses across resolutions: worked numbers, slow references, what must not change them, two workers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from armillary import collectives
from armillary.losses.cross_resolution import (
    CenterCalibrator,
    ManifoldAlignment,
    ThresholdPairs,
    TransferableTriplet,
    moment_distances,
    pair_distance,
)
from armillary.losses.frozen import through_frozen
from armillary.losses.tensors import normalize
from armillary.testing.gloo_pool import shared_pool

LABELS = torch.tensor([0, 1, 0, 2, 1, 3, 0, 3])


def rows(seed: int = 0, n: int = 8, dim: int = 5) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(n, dim, generator=draw, dtype=torch.float64)


def test_alignment_worked_numbers() -> None:
    high = torch.tensor([[1.0, 0.0], [0.6, 0.8]], dtype=torch.float64)
    low = torch.tensor([[0.8, 0.6], [0.6, 0.8]], dtype=torch.float64)
    mean, covariance = moment_distances(high, low)
    assert float(pair_distance(high, low)) == pytest.approx(0.2, abs=1e-12)
    assert float(mean) == pytest.approx(0.1, abs=1e-12)
    assert float(covariance) == pytest.approx(0.0332, abs=1e-12)
    assert float(ManifoldAlignment(2.0, 10.0)(high, low)) == pytest.approx(2 * 0.2 + 10 * 0.1332, abs=1e-12)


def test_moments_are_their_definition() -> None:
    high, low = rows(0), rows(1)
    mean, covariance = moment_distances(high, low)
    expected_mean, expected_covariance = 0.0, 0.0
    for i in range(5):
        of = [float(sum(part[b, i] for b in range(8)) / 8) for part in (high, low)]
        expected_mean += (of[0] - of[1]) ** 2
        for j in range(5):
            moments = []
            for part in (high, low):
                mi, mj = part[:, i].mean(), part[:, j].mean()
                moments.append(float(sum((part[b, i] - mi) * (part[b, j] - mj) for b in range(8)) / 8))
            expected_covariance += (moments[0] - moments[1]) ** 2
    assert float(mean) == pytest.approx(expected_mean, rel=1e-12)
    assert float(covariance) == pytest.approx(expected_covariance, rel=1e-12)


def test_alignment_of_equals_and_of_swapped_branches() -> None:
    high, low, loss = rows(0), rows(1), ManifoldAlignment(0.7, 0.3)
    assert float(loss(high, high)) == 0
    torch.testing.assert_close(loss(high, low), loss(low, high))


@pytest.mark.parametrize(("margin", "expected"), [(0.3, 0.0), (0.5, 0.1)])
def test_transferable_triplet_worked_numbers(margin: float, expected: float) -> None:
    # The anchor (1, 0) with the positive (0.8, 0.6) against the negatives (0, 1) and (0.6, 0.8), one at a time.
    low, labels = torch.tensor([[1.0, 0.0]], dtype=torch.float64), torch.tensor([0, 1])
    found = []
    for negative in ([0.0, 1.0], [0.6, 0.8]):
        high = torch.tensor([[0.8, 0.6], negative], dtype=torch.float64)
        # The second row is there for its reference alone: as an anchor it is opposite to both.
        anchors = torch.cat([low, -high[:1] - high[1:]])
        whole = TransferableTriplet(margin)(anchors, high, labels)
        second = triplet_slow(anchors, high, labels, margin, "hard") * 2 - max(
            0.0, 0.4 - float(((low[0] - high[1]) ** 2).sum()) + margin
        )
        found.append(float(whole) * 2 - second)
    assert found == pytest.approx([0.0, expected], abs=1e-12)


def triplet_slow(low: Tensor, high: Tensor, labels: Tensor, margin: float, mining: str) -> float:
    low, high = normalize(low), normalize(high)
    total, count = 0.0, 0
    for a in range(len(low)):
        distance = [float(((low[a] - high[j]) ** 2).sum()) for j in range(len(high))]
        negatives = [distance[j] for j in range(len(high)) if labels[j] != labels[a]]
        for p in range(len(high)):
            if labels[p] != labels[a]:
                continue
            farther = [d for d in negatives if d > distance[p]]
            chosen = min(negatives) if mining == "hard" else (min(farther) if farther else max(negatives))
            total += max(0.0, distance[p] - chosen + margin)
            count += 1
    return total / count


@pytest.mark.parametrize("mining", ["hard", "semi_hard"])
def test_transferable_triplet_is_its_definition(mining: str) -> None:
    low, high = rows(0), rows(1)
    found = TransferableTriplet(0.3, mining)(low, high, LABELS)
    assert float(found) == pytest.approx(triplet_slow(low, high, LABELS, 0.3, mining), rel=1e-12)


def test_references_get_no_gradient_and_good_anchors_no_loss() -> None:
    low, high = rows(0).requires_grad_(), rows(1).requires_grad_()
    TransferableTriplet()(low, high, LABELS).backward()
    assert high.grad is None or not high.grad.any()
    assert low.grad is not None
    assert low.grad.abs().sum() > 0
    corners = torch.eye(4, dtype=torch.float64)
    assert float(TransferableTriplet(0.3)(corners, corners, torch.arange(4))) == 0
    assert float(TransferableTriplet()(corners, corners, torch.zeros(4, dtype=torch.long))) == 0  # nobody else


def test_threshold_pairs_are_their_definition() -> None:
    low, high = rows(0), rows(1)
    u, v = normalize(low), normalize(high)
    same, different = [], []
    for i in range(8):
        for j in range(8):
            square = float(((u[i] - v[j]) ** 2).sum())
            if LABELS[i] == LABELS[j]:
                same.append(max(0.0, square - 0.5))
            else:
                different.append(max(0.0, 0.8 - square))
    expected = sum(same) / len(same) + sum(different) / len(different)
    assert float(ThresholdPairs(0.5, 0.3)(low, high, LABELS)) == pytest.approx(expected, rel=1e-12)


def test_calibrator_is_its_definition_and_moves_its_centers() -> None:
    calibrator = CenterCalibrator(4, 5, separation=0.5, overlap=-0.1, momentum=0.9).double()
    first, second = rows(0), rows(1)
    calibrator(first, LABELS)
    calibrator.update()
    old = calibrator.centers.clone()
    torch.testing.assert_close(old.norm(dim=1), torch.ones(4, dtype=torch.float64))
    value = calibrator(second, LABELS)
    units = normalize(second)
    centers = [normalize(0.9 * old[c] + 0.1 * units[c == LABELS].mean(0)) for c in range(4)]
    compact = sum(1 - float(units[i] @ centers[int(LABELS[i])]) for i in range(8)) / 8
    pairs = [max(0.0, float(centers[u] @ centers[v]) + 0.1) for u in range(4) for v in range(4) if u != v]
    assert float(value) == pytest.approx(compact + 0.5 * sum(pairs) / 12, rel=1e-10)
    torch.testing.assert_close(calibrator.centers, old)
    calibrator.update()
    torch.testing.assert_close(calibrator.centers, torch.stack(centers))


def test_calibrator_is_content() -> None:
    corners = torch.eye(4, dtype=torch.float64)
    assert float(CenterCalibrator(4, 4).double()(corners, torch.arange(4))) == pytest.approx(0, abs=1e-12)


def test_through_frozen_gives_the_inputs_gradient_alone() -> None:
    network = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    plain, judged = rows().requires_grad_(), rows().requires_grad_()
    network(plain).square().mean().backward()
    network.zero_grad(set_to_none=True)
    value = through_frozen(lambda inputs: network(inputs).square().mean(), 2 * judged / 2)
    (3 * value).backward()
    assert plain.grad is not None
    assert judged.grad is not None
    torch.testing.assert_close(judged.grad, 3 * plain.grad)
    assert all(parameter.grad is None for parameter in network.parameters())
    with torch.no_grad():
        torch.testing.assert_close(through_frozen(lambda inputs: network(inputs).square().mean(), judged), value)


LOSSES = {
    "alignment": lambda low, high, _: ManifoldAlignment()(high, low),
    "triplet": lambda low, high, labels: TransferableTriplet(0.3, "semi_hard")(low, high, labels),
    "threshold": lambda low, high, labels: ThresholdPairs()(low, high, labels),
    "calibrator": lambda low, _, labels: CenterCalibrator(4, 5).double()(low, labels),
}


def part(kind: str) -> list[float]:
    """One rank's loss on its half of the batch, and its half of the gradient, divided by the number of ranks."""
    mine = slice(4 * collectives.rank(), 4 * collectives.rank() + 4)
    low = rows(0)[mine].clone().requires_grad_()
    value = LOSSES[kind](low, rows(1)[mine], LABELS[mine])
    value.backward()
    assert low.grad is not None
    return [float(value.detach()), *(low.grad / collectives.world_size()).flatten().tolist()]


@pytest.mark.xdist_group("gloo")
@pytest.mark.parametrize("kind", LOSSES)
def test_two_workers_equal_one(kind: str) -> None:
    low = rows(0).requires_grad_()
    value = LOSSES[kind](low, rows(1), LABELS)
    value.backward()
    assert low.grad is not None
    both = shared_pool().run(part, kind)
    assert sum(rank[0] for rank in both) / 2 == pytest.approx(float(value.detach()), rel=1e-10)
    assert both[0][1:] + both[1][1:] == pytest.approx(low.grad.flatten().tolist(), rel=1e-8, abs=1e-12)
