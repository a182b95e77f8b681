"""Margins by length, quality, class, pose, probability: worked numbers, slow references, what must not change them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from armillary.losses import ArcFace, CosFace
from armillary.losses.class_head import ClassHeadLoss
from armillary.losses.hard_classes import CurricularFace
from armillary.losses.pose_margins import PoseCurriculum, PoseWeightedArcFace
from armillary.losses.sample_margins import AdaFace, ClassMargins, MagFace, ProbabilityArcFace, QualityArcFace

COSINES = [[0.8, 0.3, -0.2], [0.45, 0.4, 0.05]]
LABELS = torch.tensor([0, 1])


def given(loss: ClassHeadLoss, norms: list[float] | None = None) -> tuple[ClassHeadLoss, Tensor]:
    """The loss on rows that are unit vectors, and embeddings of these lengths that have the cosines of the examples."""
    loss = loss.double()
    with torch.no_grad():
        loss.weight.copy_(torch.eye(3, 5))
    cosines = torch.tensor(COSINES, dtype=torch.float64)
    rest = (1 - cosines.square().sum(1)).sqrt()
    vectors = torch.zeros(2, 5, dtype=torch.float64)
    vectors[:, :3] = cosines
    vectors[0, 3], vectors[1, 4] = rest
    lengths = torch.tensor(norms or [1.0, 1.0], dtype=torch.float64)
    return loss, (vectors * lengths[:, None]).requires_grad_()


def close(found: Tensor, expected: Any, tolerance: float = 1e-7) -> None:
    numbers = torch.tensor(expected, dtype=torch.float64).flatten().tolist()
    assert found.detach().flatten().tolist() == pytest.approx(numbers, abs=tolerance)


@pytest.mark.parametrize(
    ("scale", "rate", "per_sample", "mean"),
    [
        (64.0, 0.01, [0.0013984, 28.87395496], 14.43767668),
        (8.0, 0.01, [0.37007383, 3.67487714], 2.02247548),
        (64.0, 1.0, None, 14.71249408),
    ],
)
def test_adaface_worked_numbers(scale: float, rate: float, per_sample: list[float] | None, mean: float) -> None:
    loss, embeddings = given(AdaFace(3, 5, scale=scale, norm_rate=rate, reduction="none"), [15.0, 30.0])
    assert isinstance(loss, AdaFace)
    values = loss(embeddings, LABELS)
    assert float(values.mean().detach()) == pytest.approx(mean, abs=2e-7)
    if per_sample:
        close(values, per_sample, 1e-6)
        assert float(loss.mean_norm) == pytest.approx(20.025, abs=1e-6)
        assert float(loss.norm_deviation) == pytest.approx(99.10606602, abs=1e-6)
    z = [-0.01688401, 0.03351603] if rate < 1 else [-0.23544436, 0.23544436]
    mu, sigma = float(loss.mean_norm), float(loss.norm_deviation)
    assert [0.333 * (n - mu) / (sigma + 1e-3) for n in (15, 30)] == pytest.approx(z, abs=1e-7)


@pytest.mark.parametrize(("z", "expected"), [(-1, 1.87942872), (0, 2.02131556), (1, 2.80238721)])
def test_adaface_forced(z: int, expected: float) -> None:
    """Far below, at and far above the mean length; with no margin movement it is CosFace, at -1 ArcFace."""
    loss, embeddings = given(AdaFace(3, 5, scale=8.0).eval(), [50 + 40.0 * z] * 2)
    assert isinstance(loss, AdaFace)
    loss.mean_norm.fill_(50.0)
    loss.norm_deviation.fill_(1.0)
    value = loss(embeddings, LABELS)
    assert float(value.detach()) == pytest.approx(expected, abs=1e-8)
    if z == 0:
        cosface, _ = given(CosFace(3, 5, margin=0.4, scale=8.0))
        torch.testing.assert_close(value, cosface(embeddings, LABELS))
    if z == -1:
        arcface, _ = given(ArcFace(3, 5, margin=0.4, scale=8.0, extension=False))
        torch.testing.assert_close(value, arcface(embeddings, LABELS))


def test_adaface_is_its_equation() -> None:
    """Every sample by plain floats."""
    draw = torch.Generator().manual_seed(0)
    loss = AdaFace(7, 6, scale=16.0, norm_rate=0.3).double()
    embeddings = 4 * torch.randn(9, 6, generator=draw, dtype=torch.float64)
    labels = torch.randint(7, (9,), generator=draw)
    norms = [math.sqrt(sum(float(v) ** 2 for v in row)) for row in embeddings]
    mean = sum(norms) / 9
    deviation = math.sqrt(sum((n - mean) ** 2 for n in norms) / 8)
    mu, sigma = 0.3 * mean + 0.7 * 20, 0.3 * deviation + 0.7 * 100
    total = 0.0
    for row, label, norm in zip(embeddings.tolist(), labels.tolist(), norms, strict=True):
        cosine = [sum(a * b for a, b in zip(row, w, strict=True)) / norm / math.hypot(*w) for w in loss.weight.tolist()]
        z = max(-1.0, min(1.0, 0.333 * (norm - mu) / (sigma + 1e-3)))
        logits = [16 * c for c in cosine]
        logits[label] = 16 * (math.cos(math.acos(cosine[label]) - 0.4 * z) - 0.4 * z - 0.4)
        total += math.log(sum(math.exp(v) for v in logits)) - logits[label]
    assert float(loss(embeddings, labels).detach()) == pytest.approx(total / 9, rel=1e-8)


def test_adaface_gradient_is_tangential() -> None:
    """The length has no gradient; h = 0 is CosFace."""
    loss, embeddings = given(AdaFace(3, 5, scale=8.0), [15.0, 30.0])
    loss(embeddings, LABELS).backward()
    assert embeddings.grad is not None
    close((embeddings.grad * embeddings).sum(1), [0.0, 0.0], 1e-12)
    flat, _ = given(AdaFace(3, 5, scale=8.0, concentration=0.0))
    cosface, _ = given(CosFace(3, 5, margin=0.4, scale=8.0))
    torch.testing.assert_close(flat(embeddings, LABELS), cosface(embeddings, LABELS))


def test_adaface_statistics() -> None:
    """One sample keeps the deviation; evaluation keeps both; the survey's margin is linear in the length."""
    loss, embeddings = given(AdaFace(3, 5, scale=8.0), [15.0, 30.0])
    assert isinstance(loss, AdaFace)
    loss.eval()(embeddings, LABELS)
    assert float(loss.mean_norm) == 20
    loss.train()(embeddings[:1], LABELS[:1])
    assert float(loss.mean_norm) == pytest.approx(19.95)
    assert float(loss.norm_deviation) == 100
    survey, _ = given(AdaFace(3, 5, margin=0.3, scale=8.0, slope=0.02, formulation="survey").eval())
    expected = [ArcFace(3, 5, margin=0.3 + 0.02 * (n - 20), scale=8.0, reduction="none") for n in (15, 30)]
    values = [float(given(loss)[0](embeddings, LABELS)[i].detach()) for i, loss in enumerate(expected)]
    assert float(survey(embeddings, LABELS).detach()) == pytest.approx(sum(values) / 2, rel=1e-9)


@pytest.mark.parametrize(
    ("scale", "identity", "total"), [(64.0, 23.35151034, 24.31268459), (8.0, 3.13347767, 4.09465191)]
)
def test_magface_worked_numbers(scale: float, identity: float, total: float) -> None:
    loss, embeddings = given(MagFace(3, 5, scale=scale), [30.0, 80.0])
    value = loss(embeddings, LABELS)
    assert float(value.detach()) == pytest.approx(total, abs=1e-7)
    assert float(given(MagFace(3, 5, scale=scale, regularizer=0))[0](embeddings, LABELS).detach()) == pytest.approx(
        identity, abs=1e-7
    )
    if scale == 64:
        value.backward()
        assert embeddings.grad is not None
        radial = (embeddings.grad * embeddings).sum(1) / embeddings.detach().norm(dim=1)
        close(radial, [-0.0177797, 0.10624165])


def test_magface_bound_and_range() -> None:
    assert MagFace(3, 5).least_regularizer() == pytest.approx(22.58666667)
    assert MagFace(3, 5, margin_low=0.4).least_regularizer() == pytest.approx(25.81333333)
    loss, embeddings = given(MagFace(3, 5), [5.0, 200.0])
    loss(embeddings, LABELS).backward()
    assert embeddings.grad is not None
    close((embeddings.grad * embeddings).sum(1), [0.0, 0.0], 1e-12)
    wrong: tuple[dict[str, Any], ...] = ({"norm_low": 0.0}, {"norm_low": 200.0}, {"margin_low": 0.9})
    for options in wrong:
        with pytest.raises(ValueError, match="must"):
            MagFace(3, 5, **options)


@pytest.mark.parametrize("easy", [True, False])
def test_magface_without_its_own(easy: bool) -> None:
    """Equal margins and no regularizer: ArcFace of the same branch."""
    mine, embeddings = given(MagFace(3, 5, 8.0, margin_low=0.5, margin_high=0.5, regularizer=0, easy_margin=easy))
    arcface, _ = given(ArcFace(3, 5, 0.5, 8.0, easy_margin=easy))
    torch.testing.assert_close(mine(embeddings, LABELS), arcface(embeddings, LABELS))
    torch.testing.assert_close(mine(-embeddings, LABELS), arcface(-embeddings, LABELS))


def test_quality_moves_the_margin() -> None:
    loss, embeddings = given(QualityArcFace(3, 5, 0.5, 8.0, 0.2, reduction="none"))
    found = loss(embeddings, LABELS, quality=torch.tensor([0.9, 0.3]))
    for row, margin in ((0, 0.5 + 0.2 * 0.3), (1, 0.5 - 0.2 * 0.3)):
        arcface, _ = given(ArcFace(3, 5, margin, 8.0, reduction="none"))
        torch.testing.assert_close(found[row], arcface(embeddings, LABELS)[row], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("form", "scale", "expected"), [("cos", 8.0, 1.70374022), ("arc", 8.0, 1.63106605), ("cos", 64.0, 12.80000006)]
)
def test_class_margins_worked_numbers(form: str, scale: float, expected: float) -> None:
    loss, embeddings = given(ClassMargins(3, 5, scale=scale, form=form))
    assert isinstance(loss, ClassMargins)
    loss.set_margins(torch.tensor([0.25, 0.35, 0.45], dtype=torch.float64))
    assert float(loss(embeddings, LABELS).detach()) == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize(("form", "plain"), [("cos", CosFace), ("arc", ArcFace)])
def test_equal_class_margins(form: str, plain: type[ClassHeadLoss]) -> None:
    mine, embeddings = given(ClassMargins(3, 5, 0.25, 8.0, form))
    theirs, _ = given(plain(3, 5, 0.25, 8.0))
    torch.testing.assert_close(mine(embeddings, LABELS), theirs(embeddings, LABELS))


def test_class_margins_of_split_rows() -> None:
    """A worker takes its part of the new margins."""
    loss = ClassMargins(7, 5)
    loss.split_rows(1, 2)
    loss.set_margins(torch.arange(7) / 10)
    assert loss.class_margins.tolist() == pytest.approx([0.4, 0.5, 0.6])


def test_probability_margin() -> None:
    loss, embeddings = given(ProbabilityArcFace(3, 5, 0.5, 8.0, 2.0, reduction="none"))
    assert isinstance(loss, ProbabilityArcFace)
    found = loss(embeddings, LABELS)
    chance = nn.functional.softmax(8 * torch.tensor(COSINES, dtype=torch.float64), dim=1)[torch.arange(2), LABELS]
    assert loss.probability is not None
    close(loss.probability, chance.tolist(), 1e-12)
    for row in range(2):
        arcface, _ = given(ArcFace(3, 5, 0.5 * math.exp(-2 * float(chance[row])), 8.0, reduction="none"))
        torch.testing.assert_close(found[row], arcface(embeddings, LABELS)[row])
    fixed, _ = given(ArcFace(3, 5, 0.2, 8.0, reduction="none"))
    torch.testing.assert_close(
        loss(embeddings, LABELS, margin=torch.full((2,), 0.2, dtype=torch.float64)), fixed(embeddings, LABELS)
    )


@pytest.mark.parametrize(("phi", "expected"), [([0.0, 45.0], 2.17695735), ([0.0, 0.0], 1.92684363)])
def test_pose_curriculum_worked_numbers(phi: list[float], expected: float) -> None:
    loss, embeddings = given(PoseCurriculum(3, 5, scale=8.0).eval())
    assert isinstance(loss, PoseCurriculum)
    loss.t.fill_(0.3)
    pose = torch.tensor([[0.0, phi[0]], [-phi[1], 1.0]])
    tolerance = 1e-7 if phi[1] else 2e-2  # the pitch of a degree counts where there is no yaw
    assert float(loss(embeddings, LABELS, pose=pose).detach()) == pytest.approx(expected, abs=tolerance)


def test_frontal_curriculum() -> None:
    """Frontal heads: CurricularFace, its running t included."""
    mine, embeddings = given(PoseCurriculum(3, 5, scale=8.0))
    theirs, _ = given(CurricularFace(3, 5, scale=8.0))
    for _ in range(3):
        value = mine(embeddings, LABELS, pose=torch.zeros(2, 2))
        torch.testing.assert_close(value, theirs(embeddings, LABELS))
    assert float(mine.get_buffer("t")) == float(theirs.get_buffer("t")) != 0


def test_pose_weights() -> None:
    loss, embeddings = given(PoseWeightedArcFace(3, 5, scale=8.0))
    value = loss(embeddings, LABELS, pose=torch.tensor([[0.0, 0.0], [-45.0, 10.0]], dtype=torch.float64))
    assert float(value.detach()) == pytest.approx(2.14114183, abs=1e-7)
    per_sample, _ = given(PoseWeightedArcFace(3, 5, scale=8.0, reduction="none"))
    arcface, _ = given(ArcFace(3, 5, scale=8.0, reduction="none"))
    plain = arcface(embeddings, LABELS)
    for degrees, weight in ((0.0, 0.98901306), (45.0, 0.90465054), (90.0, 0.5)):
        pose = torch.full((2, 2), degrees, dtype=torch.float64)
        torch.testing.assert_close(per_sample(embeddings, LABELS, pose=pose), weight * plain, rtol=1e-7, atol=1e-7)
    half, _ = given(PoseWeightedArcFace(3, 5, scale=8.0, pose_slope=0.0, reduction="none"))
    torch.testing.assert_close(half(embeddings, LABELS, pose=torch.rand(2, 2)), 0.5 * plain)
