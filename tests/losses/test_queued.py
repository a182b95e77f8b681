"""BroadFace and QGFace: worked numbers, which term reaches what, split rows and queues shared out over workers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from armillary import collectives
from armillary.losses import ArcFace
from armillary.losses.queued import BroadFace, Past, QGFace, QueuedCenters, compensated, queue_contrast
from armillary.losses.sample_margins import AdaFace
from armillary.testing.gloo_pool import shared_pool


def table(rows: list[list[float]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


FEATURES, LABELS = table([[3, 4], [-1, 2]]), torch.tensor([0, 1])
WEIGHT = table([[1, 0], [0, 1], [-1, 0]])
PAST = Past(table([[2, 1], [-1, 2]]), torch.tensor([0, 1]), table([[0.8, 0.6], [0, 1]]))


def broadface(compensate: bool = True) -> BroadFace:
    loss = BroadFace(3, 2, margin=0.5, scale=8.0, compensate=compensate).double()
    with torch.no_grad():
        loss.weight.copy_(WEIGHT)
    return loss


def test_broadface_worked_numbers() -> None:
    found = compensated(PAST.embeddings, PAST.rows, WEIGHT[PAST.labels])
    torch.testing.assert_close(found, table([[2.4472136, -0.34164079], [-1.0, 2.0]]), rtol=0, atol=1e-8)
    metrics: dict[str, Tensor] = {}
    total = broadface()(FEATURES, LABELS, past=PAST, metrics=metrics)
    assert float(metrics["batch_loss"]) == pytest.approx(2.78913086, abs=1e-8)
    assert float(metrics["broad_loss"]) == pytest.approx(1.47397936, abs=1e-8)
    assert float(total.detach()) == pytest.approx(4.26311022, abs=1e-8)
    broadface(compensate=False)(FEATURES, LABELS, past=PAST, metrics=metrics)
    assert float(metrics["broad_loss"]) == pytest.approx(1.55307292, abs=1e-8)


def test_broadface_terms_reach_apart() -> None:
    """The encoder's gradient is ArcFace's whatever the queue; without one the head's is too, and the value twice."""
    arcface = ArcFace(3, 2, margin=0.5, scale=8.0).double()
    with torch.no_grad():
        arcface.weight.copy_(WEIGHT)
    plain = FEATURES.clone().requires_grad_()
    expected = arcface(plain, LABELS)
    expected.backward()
    for past in (None, PAST):
        loss, own = broadface(), FEATURES.clone().requires_grad_()
        value = loss(own, LABELS, past=past)
        value.backward()
        torch.testing.assert_close(own.grad, plain.grad)
        if past is None:
            torch.testing.assert_close(value, 2 * expected)
            torch.testing.assert_close(loss.weight.grad, arcface.weight.grad)
        else:
            assert loss.weight.grad is not None
            assert arcface.weight.grad is not None
            assert not torch.allclose(loss.weight.grad, arcface.weight.grad)
        torch.testing.assert_close(loss.snapshot, WEIGHT[LABELS])


def test_rows_that_stood_still() -> None:
    torch.testing.assert_close(compensated(PAST.embeddings, PAST.rows, PAST.rows), PAST.embeddings)
    zero = torch.zeros_like(PAST.rows)
    torch.testing.assert_close(compensated(PAST.embeddings, zero, PAST.rows), PAST.embeddings)


def broad_part(split: bool) -> list[float]:
    """This rank's loss and gradients: one sample, five past samples (shared out unevenly), rows whole or split."""
    loss = broadface()
    if split:
        loss.split_rows(collectives.rank(), collectives.world_size())
    rank = collectives.rank()
    own = FEATURES[rank : rank + 1].clone().requires_grad_()
    value = loss(own, LABELS[rank : rank + 1], past=five())
    value.backward()
    assert own.grad is not None
    gradient = loss.rows()["weight"].grad
    assert gradient is not None
    return [float(value.detach()), *own.grad.flatten().tolist(), *gradient.flatten().tolist()]


def five() -> Past:
    return Past(
        torch.cat([PAST.embeddings, 2 * PAST.embeddings, FEATURES[:1]]),
        torch.tensor([0, 1, 2, 1, 2]),
        torch.cat([PAST.rows, WEIGHT]),
    )


@pytest.mark.xdist_group("gloo")
@pytest.mark.parametrize("split", [False, True])
def test_broadface_on_two_workers(split: bool) -> None:
    loss, own = broadface(), FEATURES.clone().requires_grad_()
    value = loss(own, LABELS, past=five())
    value.backward()
    assert own.grad is not None
    assert loss.weight.grad is not None
    ranks = shared_pool().run(broad_part, split)
    assert sum(rank[0] for rank in ranks) / 2 == pytest.approx(float(value.detach()), rel=1e-10)
    features = [number / 2 for rank in ranks for number in rank[1:3]]
    assert features == pytest.approx(own.grad.flatten().tolist(), rel=1e-8, abs=1e-12)
    if split:
        rows = ranks[0][3:] + ranks[1][3:]
    else:
        rows = [(a + b) / 2 for a, b in zip(ranks[0][3:], ranks[1][3:], strict=True)]
    assert rows == pytest.approx(loss.weight.grad.flatten().tolist(), rel=1e-8, abs=1e-12)


def test_queued_centers_is_its_equation() -> None:
    """Queued rows of the own class do not count."""
    loss = QueuedCenters(3, 2, scale=8.0).double()
    with torch.no_grad():
        loss.weight.copy_(WEIGHT)
    centers, kinds = table([[1, 1], [0, 1], [2, -1]]), torch.tensor([0, 1, -1])
    metrics: dict[str, Tensor] = {}
    found = float(loss(FEATURES, LABELS, centers=centers, center_labels=kinds, metrics=metrics).detach())
    # (3, 4) is nearer to the queued (0, 1) than to its row (1, 0); (-1, 2) is nearest to its own row.
    assert float(metrics["accuracy"]) == 0.5
    total = 0.0
    for x, label in zip(FEATURES.tolist(), LABELS.tolist(), strict=True):
        own = cosine(x, WEIGHT[label].tolist())
        negatives = [c for c, kind in zip(centers.tolist(), kinds.tolist(), strict=True) if kind != label]
        total += math.log(1 + sum(math.exp(8 * (cosine(x, c) - own)) for c in negatives)) / 2
    assert found == pytest.approx(total, rel=1e-10)


def cosine(a: list[float], b: list[float]) -> float:
    return sum(p * q for p, q in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)


def test_contrast_worked_numbers() -> None:
    view1, view2 = table([[1, 0], [0, 1]]), table([[0.8, 0.6], [0.6, 0.8]])
    queue = table([[-1, 0], [0, -1]])
    for gate, expected in (([1.0, 1.0], 0.00166073), ([1.0, 0.0], 0.55013651)):
        scale = 8 * torch.tensor(gate, dtype=torch.float64)[:, None]
        # One direction: twice the mean of both less the other one.
        both = queue_contrast(view1, view2, queue, scale, own=False)
        other = [
            math.log(1 + sum(math.exp(s * (cosine(b, k) - cosine(a, b))) for k in queue.tolist()))
            for a, b, s in zip(view1.tolist(), view2.tolist(), scale.flatten().tolist(), strict=True)
        ]
        assert float(2 * both.mean()) - sum(other) / 2 == pytest.approx(expected, abs=1e-8)


def qgface(**options: float) -> tuple[QGFace, Tensor, Tensor]:
    torch.manual_seed(0)
    loss = QGFace(3, 4, scale=8.0, **options).double()
    views = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    return loss, views, torch.tensor([0, 1, 2, 0, 1])


def test_gate_worked_numbers() -> None:
    """Gates of qualities (1 + z) / 2 around the threshold."""
    for z, expected in ((-0.1, 0.0016588), (0.0, 0.5), (0.1, 0.9983412)):
        assert float(torch.sigmoid(torch.tensor(2 * 64.0 * ((1 + z) / 2 - 0.5)))) == pytest.approx(expected, abs=1e-6)
        loss = QGFace(3, 4, scale=64.0, concentration=1.0, threshold=0.5).double().eval()
        loss.mean_norm.fill_(2.0 - z * 1.001)
        loss.norm_deviation.fill_(1.0)
        metrics: dict[str, Tensor] = {}
        ones = torch.ones(2, 4, dtype=torch.float64)  # of length 2
        loss(ones[:1], ones[1:], torch.tensor([0]), metrics=metrics, weight=0.0)
        assert float(metrics["scale"]) == pytest.approx(64 * expected, abs=1e-4)


def test_clear_images_are_adaface() -> None:
    loss, views, labels = qgface(threshold=1e-6, concentration=0.0)
    adaface = AdaFace(3, 4, scale=8.0, concentration=0.0).double()
    adaface.load_state_dict(loss.state_dict())
    gate = 1 / (1 + math.exp(-2 * 8 * (0.5 - 1e-6)))
    adaface.scale *= gate
    value = loss(views[0], views[1], labels, weight=0.0)
    torch.testing.assert_close(value, adaface(views.flatten(0, 1), torch.cat([labels, labels])))


def test_poor_images_do_not_classify() -> None:
    loss, views, labels = qgface()
    loss.mean_norm.fill_(1e9)
    loss.norm_deviation.fill_(1.0)
    value = loss(views[0], views[1], labels, weight=0.0)
    value.backward()
    assert float(value.detach()) == pytest.approx(math.log(3), abs=1e-2)
    assert views.grad is not None
    assert float(views.grad.abs().max()) < 1e-2


def test_clear_pairs_are_not_contrasted() -> None:
    """A contrast that is switched off is log(K + 1), before it is made independent of K, and has no gradient."""
    loss, views, labels = qgface(threshold=1e-6)
    metrics: dict[str, Tensor] = {}
    with_contrast = loss.eval()(views[0], views[1], labels, metrics=metrics)
    assert float(metrics["poor_share"]) == 0
    assert float(metrics["contrast"]) == pytest.approx(math.log(129))
    without = loss(views[0], views[1], labels, weight=0.0)
    gradients = [torch.autograd.grad(value, views)[0] for value in (with_contrast, without)]
    torch.testing.assert_close(gradients[0], gradients[1])


def quality_part(pairs: int) -> list[float]:
    """This rank's loss and gradient on its part of the pairs, against a queue of three."""
    torch.manual_seed(0)
    loss = QGFace(3, 4, scale=8.0).double()
    views = torch.randn(2, 4, 4, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 0])
    start = collectives.rank() * pairs
    own = views[:, start : start + pairs].clone().requires_grad_()
    past = Past(views[0, :3].flip(0), labels[:3], torch.ones(3, 4, dtype=torch.float64))
    value = loss(own[0], own[1], labels[start : start + pairs], past=past)
    value.backward()
    assert own.grad is not None
    share = own.grad / collectives.world_size()
    return [float(value.detach()), float(loss.mean_norm), *share.transpose(0, 1).flatten().tolist()]


@pytest.mark.xdist_group("gloo")
def test_qgface_on_two_workers() -> None:
    whole, ranks = quality_part(4), shared_pool().run(quality_part, 2)
    assert sum(rank[0] for rank in ranks) / 2 == pytest.approx(whole[0], rel=1e-10)
    assert ranks[0][1] == ranks[1][1] == pytest.approx(whole[1], rel=1e-10)
    assert ranks[0][2:] + ranks[1][2:] == pytest.approx(whole[2:], rel=1e-8, abs=1e-12)
