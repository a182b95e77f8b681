"""What must hold for any input: the catalog's invariants."""

from __future__ import annotations

from math import log, pi

import pytest
import torch
from torch import Tensor

from armillary import losses
from armillary.losses.class_head import ClassHeadLoss
from armillary.losses.contrastive import masked_cross_entropy
from armillary.losses.similarities import euclidean

CLASSES, DIM, SIZE = 5, 6, 12


@pytest.fixture
def embeddings() -> Tensor:
    draw = torch.Generator().manual_seed(0)
    return torch.randn(SIZE, DIM, generator=draw, dtype=torch.float64, requires_grad=True)


@pytest.fixture
def labels() -> Tensor:
    return torch.arange(SIZE) % CLASSES


def make(kind: type[ClassHeadLoss], **options: float | bool | str) -> ClassHeadLoss:
    torch.manual_seed(1)
    return kind(CLASSES, DIM, **options).double()  # type: ignore[arg-type]


COSINE_HEADS = [losses.NormFace, losses.CosFace, losses.ArcFace]


@pytest.mark.parametrize("kind", COSINE_HEADS)
def test_lengths_do_not_matter(kind: type[ClassHeadLoss], embeddings: Tensor, labels: Tensor) -> None:
    loss = make(kind, scale=8.0)
    before = loss(embeddings, labels)
    with torch.no_grad():
        loss.weight[2] *= 7
    torch.testing.assert_close(loss(embeddings * torch.arange(1, SIZE + 1)[:, None], labels), before)


@pytest.mark.parametrize("kind", COSINE_HEADS)
def test_gradients_are_tangential(kind: type[ClassHeadLoss], embeddings: Tensor, labels: Tensor) -> None:
    loss = make(kind, scale=8.0)
    loss(embeddings, labels).backward()
    for vectors in (embeddings, loss.weight):
        assert vectors.grad is not None
        assert vectors.grad.abs().max() > 1e-3
        torch.testing.assert_close((vectors * vectors.grad).sum(1), torch.zeros(len(vectors), dtype=torch.float64))


@pytest.mark.parametrize("kind", [losses.CosFace, losses.ArcFace])
def test_no_margin_is_normface(kind: type[ClassHeadLoss], embeddings: Tensor, labels: Tensor) -> None:
    plain = make(losses.NormFace, scale=8.0)(embeddings, labels)
    torch.testing.assert_close(make(kind, scale=8.0, margin=0.0)(embeddings, labels), plain, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", [losses.CosFace, losses.ArcFace])
def test_margin_raises_every_loss(kind: type[ClassHeadLoss], embeddings: Tensor, labels: Tensor) -> None:
    values = [make(kind, scale=8.0, margin=margin, reduction="none")(embeddings, labels) for margin in (0.1, 0.2, 0.3)]
    assert (values[0] < values[1]).all()
    assert (values[1] < values[2]).all()


def test_arcface_target_falls_with_the_angle() -> None:
    angles = torch.linspace(0, pi, 2001, dtype=torch.float64)
    margin = torch.tensor(0.5, dtype=torch.float64)
    extended, raw = (make(losses.ArcFace, extension=on).target(angles.cos(), margin) for on in (True, False))
    assert (extended.diff() <= 1e-12).all()
    assert (raw.diff() > 0)[angles[:-1] > pi - 0.5].all()
    torch.testing.assert_close(raw, (angles + 0.5).cos(), rtol=0, atol=2e-6)


def test_arcface_gradient_factor() -> None:
    """dL/dcos_y = s (p_y - 1) sin(theta + m) / sin(theta) / N."""
    cosines = torch.tensor([[0.3, 0.1, -0.2], [0.5, -0.6, 0.4]], dtype=torch.float64, requires_grad=True)
    labels, theta = torch.tensor([0, 2]), torch.tensor([0.3, 0.4], dtype=torch.float64).acos()
    loss = losses.ArcFace(3, 3, margin=0.5, scale=8.0).double()
    with torch.no_grad():
        loss.weight.copy_(torch.eye(3))
    loss.similarity = lambda given, rows: given @ rows["weight"].T  # type: ignore[method-assign,assignment,misc]
    loss(cosines, labels).backward()
    logits = 8 * cosines.detach().scatter(1, labels[:, None], (theta + 0.5).cos()[:, None])
    share = logits.softmax(1).gather(1, labels[:, None]).squeeze(1)
    assert cosines.grad is not None
    found = cosines.grad.gather(1, labels[:, None]).squeeze(1)
    torch.testing.assert_close(found, 8 * (share - 1) * (theta + 0.5).sin() / theta.sin() / 2)


def test_softmax_ignores_a_common_bias(embeddings: Tensor, labels: Tensor) -> None:
    loss = make(losses.Softmax)
    assert isinstance(loss.bias, Tensor)
    before = loss(embeddings, labels)
    with torch.no_grad():
        loss.bias.add_(11.0)
    torch.testing.assert_close(loss(embeddings, labels), before)
    assert float(loss(torch.zeros_like(embeddings), labels).detach()) == pytest.approx(log(CLASSES))


def test_equal_embeddings_contrast() -> None:
    """All z equal: log(2N - 1) an anchor."""
    same, keys = torch.ones(8, 3, dtype=torch.float64), torch.arange(4).repeat(2)
    for loss in (losses.SupCon(0.1, "out")(same, keys), losses.SupCon(0.1, "in")(same, keys)):
        assert float(loss) == pytest.approx(log(7))
    assert float(losses.NTXent(0.3)(same[:4], same[4:])) == pytest.approx(log(7))


def test_supcon_of_pairs_is_nt_xent(embeddings: Tensor) -> None:
    view1, view2 = embeddings.chunk(2)
    expected = losses.NTXent(0.2)(view1, view2)
    torch.testing.assert_close(losses.NTXent(0.2)(view2, view1), expected)
    for mode in ("out", "in"):
        torch.testing.assert_close(losses.SupCon(0.2, mode)(embeddings, torch.arange(6).repeat(2)), expected)


def test_in_is_at_most_out(embeddings: Tensor, labels: Tensor) -> None:
    inside, outside = (losses.SupCon(0.2, mode, reduction="none")(embeddings, labels) for mode in ("in", "out"))
    assert (inside <= outside + 1e-12).all()
    assert (inside < outside - 1e-3).any()


def test_soft_targets_are_the_mean_over_positives(embeddings: Tensor) -> None:
    """Weights 2 : 1 equal a positive column that stands there twice, in numerator and mean alike."""
    logits = embeddings[:3]
    weights = torch.tensor([[2.0, 1, 0, 0, 0, 0]], dtype=torch.float64).expand(3, -1)
    everything = torch.ones_like(logits, dtype=torch.bool)
    losses_out, valid = masked_cross_entropy(logits, weights, everything)
    expected = logits.logsumexp(1) - (2 * logits[:, 0] + logits[:, 1]) / 3
    assert valid.all()
    torch.testing.assert_close(losses_out, expected)
    losses_in, _ = masked_cross_entropy(logits, weights, everything, "in")
    shares = logits.softmax(1)
    torch.testing.assert_close(losses_in, -((2 * shares[:, 0] + shares[:, 1]) / 3).log())


def test_equal_embeddings_triplet() -> None:
    same, labels = torch.ones(6, 3, dtype=torch.float64, requires_grad=True), torch.tensor([0, 0, 1, 1, 2, 2])
    for mining in ("all", "semi_hard", "batch_hard", "hard_negative"):
        for squared in (True, False):
            value = losses.Triplet(0.3, mining, squared)(same, labels)
            value.backward()
            assert float(value.detach()) == pytest.approx(0.3)
            assert same.grad is not None
            assert torch.isfinite(same.grad).all()
            soft = losses.Triplet(0.3, mining, squared, soft=True)(same, labels)
            assert float(soft.detach()) == pytest.approx(log(2))


def test_squared_distance_on_the_sphere_is_two_minus_two_cosines(embeddings: Tensor) -> None:
    units = torch.nn.functional.normalize(embeddings)
    torch.testing.assert_close(euclidean(units, units, squared=True), 2 - 2 * units @ units.T)
    torch.testing.assert_close(euclidean(units, units, squared=False), torch.cdist(units, units), rtol=1e-6, atol=1e-6)


def test_separated_triplets_cost_nothing() -> None:
    apart = torch.eye(3, dtype=torch.float64).repeat_interleave(2, 0).requires_grad_()
    metrics: dict[str, Tensor] = {}
    value = losses.Triplet(1.9, "all")(apart, torch.arange(3).repeat_interleave(2), metrics=metrics)
    value.backward()
    assert float(value.detach()) == 0
    assert float(metrics["active_share"]) == 0
    assert float(metrics["triplets"]) == 6 * 4
