"""Class-head losses beyond plain margins: worked numbers, slow references, limits, the public implementations."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from armillary import losses
from armillary.losses.adaptive_scale import AdaCos, L2Softmax, P2SGrad, SigmoidWeightedArcFace, lowest_radius
from armillary.losses.class_centers import CenterLoss, PairVerification, RingLoss
from armillary.losses.hard_classes import CurricularFace, DirectedArcFace, MVSoftmax, SubcenterArcFace
from armillary.losses.margin_softmax import ArcFace, CombinedMargin, CosFace, NormFace, Softmax, lowest_scale
from armillary.losses.multiplied_angles import LSoftmax, SphereFace, psi

FEATURES = torch.tensor([[3.0, 4.0], [-1.0, 2.0]], dtype=torch.float64)
ROWS = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-1.0, 1.0]], dtype=torch.float64)
BIAS = torch.tensor([0.1, -0.2, 0.0], dtype=torch.float64)
LABELS = torch.tensor([0, 1])
COSINES = [[0.8, 0.3, -0.2], [0.45, 0.4, 0.05]]
NEVER: dict[str, Any] = {"annealing_start": 0.0, "annealing_floor": 0.0}


def on_rows(cls: Any, **options: Any) -> Any:
    """A loss on the rows of the worked examples."""
    loss = cls(3, 2, **options).double()
    loss.weight.data.copy_(ROWS)
    if getattr(loss, "bias", None) is not None:
        loss.bias.data.copy_(BIAS)
    return loss


def on_cosines(cls: Any, cosines: list[list[float]], **options: Any) -> tuple[Any, Tensor]:
    """A loss, and features with these cosines to its rows: rows are unit vectors, one further axis takes the rest."""
    wanted = torch.tensor(cosines, dtype=torch.float64)
    classes = wanted.shape[1]
    loss = cls(classes, classes + 1, **options).double()
    loss.weight.data.copy_(torch.eye(classes, classes + 1))
    rest = (1 - wanted.square().sum(1, keepdim=True)).sqrt()
    return loss, torch.cat([wanted, rest], dim=1)


@pytest.mark.parametrize(
    ("cls", "options", "expected"),
    [
        (LSoftmax, {"margin": 2, **NEVER}, [9.40099411, 0.87453345]),
        (LSoftmax, {"margin": 4, **NEVER}, [13.7849125, 4.28422814]),
        (SphereFace, NEVER, [9.82052725, 2.85014919]),
        (L2Softmax, {"radius": 16.0}, [15.70000015, 0.00095300151]),
    ],
)
def test_worked_losses_on_features(cls: Any, options: dict[str, Any], expected: list[float]) -> None:
    assert on_rows(cls, reduction="none", **options)(FEATURES, LABELS).tolist() == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize(
    ("cls", "options", "expected"),
    [
        (LSoftmax, {"annealing_start": 5.0, "annealing_speed": 0.0}, 3.55389469),
        (SphereFace, {"annealing_start": 5.0, "annealing_speed": 0.0}, 1.80910422),
        (SphereFace, {"margin": 1}, 1.05940886),
    ],
)
def test_worked_means_on_features(cls: Any, options: dict[str, Any], expected: float) -> None:
    assert float(on_rows(cls, **options)(FEATURES, LABELS)) == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize(
    ("cls", "options", "expected"),
    [
        (SphereFace, {"normalized": True, "margin": 1.7, **NEVER}, 12.59521028),
        (MVSoftmax, {"easy_margin": False}, 11.04409803),
        (MVSoftmax, {"easy_margin": False, "mode": "fixed"}, 9.60409804),
        (MVSoftmax, {"easy_margin": False, "base": "arc", "margin": 0.5}, 13.26657311),
        (MVSoftmax, {"easy_margin": False, "base": "arc", "margin": 0.5, "mode": "fixed"}, 11.82657438),
        (MVSoftmax, {"easy_margin": False, "scale": 8.0}, 2.89774645),
        (MVSoftmax, {"easy_margin": False, "scale": 8.0, "mode": "fixed"}, 2.54191931),
        (MVSoftmax, {"easy_margin": False, "scale": 8.0, "base": "arc", "margin": 0.5}, 3.49574294),
        (MVSoftmax, {"easy_margin": False, "scale": 8.0, "base": "arc", "margin": 0.5, "mode": "fixed"}, 3.14574419),
        (CurricularFace, {}, 9.39449906),
        (CurricularFace, {"scale": 8.0}, 1.4739634),
        (CurricularFace, {"scale": 8.0, "momentum": 1.0}, 1.46544829),
        (CurricularFace, {"scale": 8.0, "momentum": 0.5}, 1.92684363),
        # The momentum as it is printed.
        (CurricularFace, {"momentum": 0.01}, 17.86169788),
        (CurricularFace, {"scale": 8.0, "momentum": 0.01}, 2.42407677),
        (P2SGrad, {}, 0.18375),
        (CombinedMargin, {}, 17.24076338),
    ],
)
def test_worked_means_on_cosines(cls: Any, options: dict[str, Any], expected: float) -> None:
    loss, features = on_cosines(cls, COSINES, **options)
    assert float(loss(features, LABELS)) == pytest.approx(expected, abs=1e-7)


def test_psi() -> None:
    cosines = torch.tensor([1.0, 0.9, 0.5, 0.0, -0.5, -1.0], dtype=torch.float64)
    assert psi(cosines, 4).tolist() == pytest.approx([1.0, -0.2312, -1.5, -3.0, -4.5, -7.0])
    line = torch.linspace(1, -1, 2001, dtype=torch.float64)
    for m in (1, 2, 3, 4, 1.7):
        values = psi(line, m)
        angle = line.acos()
        k = (angle * m / math.pi).floor().clamp_max(math.ceil(m) - 1)
        torch.testing.assert_close(values, (-1) ** k * torch.cos(m * angle) - 2 * k, rtol=0, atol=3e-3)
        assert (values.diff() < 1e-9).all(), "it falls throughout"
        assert (values <= line + 1e-9).all()
    assert psi(torch.tensor([-1.0]), 3).item() == 1 - 2 * 3


@pytest.mark.parametrize(
    ("cls", "iterations", "expected"),
    [
        (LSoftmax, [1, 1000, 10000], [999.12539363, 421.37106638, 0.40564819]),
        (SphereFace, [1, 100, 1000, 1658, 1659, 10000], [892.85714286, 76.92307692, 8.26446281, 5.0010002, 5, 5]),
    ],
)
def test_annealing(cls: Any, iterations: list[int], expected: list[float]) -> None:
    loss = cls(3, 2, **({"annealing_floor": 0.0} if cls is LSoftmax else {}))
    found = []
    for iteration in iterations:
        loss.iteration.fill_(iteration)
        found.append(float(loss.plain_weight(FEATURES)))
    assert found == pytest.approx(expected, rel=1e-6)


def test_training_counts_its_steps_and_evaluation_does_not() -> None:
    loss = on_rows(SphereFace)
    loss(FEATURES, LABELS)
    loss(FEATURES, LABELS)
    assert int(loss.iteration) == 2
    loss.eval()(FEATURES, LABELS)
    assert int(loss.iteration) == 2


def test_limits_are_the_plainer_losses() -> None:
    plain = on_rows(Softmax, bias=False)(FEATURES, LABELS)
    torch.testing.assert_close(on_rows(LSoftmax, margin=1)(FEATURES, LABELS), plain)
    eased = on_rows(LSoftmax, annealing_start=1e12, annealing_speed=0.0)(FEATURES, LABELS)
    torch.testing.assert_close(eased, plain, rtol=1e-9, atol=1e-9)
    for cls, options, other, others in (
        (MVSoftmax, {"emphasis": 0.0, "easy_margin": False, "scale": 64.0}, CosFace, {}),
        (MVSoftmax, {"emphasis": 0.0, "easy_margin": False, "base": "arc", "margin": 0.5, "scale": 64.0},
         ArcFace, {"extension": False}),
        (CombinedMargin, {"offset": 0.0, "margin": 0.5}, ArcFace, {"extension": False}),
        (CombinedMargin, {"offset": 0.35, "margin": 0.0}, CosFace, {}),
        (CombinedMargin, {"multiplier": 1 + 1e-12}, CombinedMargin, {}),
        (AdaCos, {"mode": "fixed"}, NormFace, {"scale": math.sqrt(2) * math.log(2), "learn_scale": False}),
    ):  # fmt: skip
        loss, features = on_cosines(cls, COSINES, **options)
        reference, _ = on_cosines(other, COSINES, **others)
        torch.testing.assert_close(loss(features, LABELS), reference(features, LABELS), rtol=1e-6, atol=1e-6)


def test_softmax_gradient_of_the_logits() -> None:
    """Rows that are unit vectors make the features the logits."""
    logits = (FEATURES @ ROWS.T + BIAS).requires_grad_()
    loss = Softmax(3, 3, bias=False).double()
    loss.weight.data.copy_(torch.eye(3))
    loss(logits, LABELS).backward()
    assert logits.grad is not None
    expected = [-0.49549832, 0.49494706, 0.00055125973, 0.00311819, -0.15716423, 0.15404604]
    assert logits.grad.flatten().tolist() == pytest.approx(expected, abs=1e-8)
    assert logits.grad.sum(1).abs().max() < 1e-12
    assert float(loss(torch.full((2, 3), 7.0).double(), LABELS)) == pytest.approx(math.log(3))


def test_l2_softmax_on_unit_rows_is_normface() -> None:
    loss, other = on_rows(L2Softmax, radius=16.0), on_rows(NormFace, scale=16.0, learn_scale=False)
    loss.bias.data.zero_()
    loss.weight.data.copy_(torch.nn.functional.normalize(ROWS))
    torch.testing.assert_close(loss(FEATURES, LABELS), other(FEATURES, LABELS))


def test_sphereface_knows_lengths_of_features_but_not_of_rows() -> None:
    loss = on_rows(SphereFace, **NEVER)
    value = loss(FEATURES, LABELS)
    loss.weight.data *= torch.tensor([[0.5], [2.0], [7.0]])
    torch.testing.assert_close(loss(FEATURES, LABELS), value)
    assert abs(float(loss(2 * FEATURES, LABELS) - value)) > 0.1


def test_emphasis_raises_the_loss() -> None:
    for mode in ("adaptive", "fixed"):
        values = []
        for emphasis in (0.0, 0.1, 0.3, 1.0):
            loss, features = on_cosines(MVSoftmax, COSINES, emphasis=emphasis, mode=mode, scale=8.0)
            values.append(float(loss(features, LABELS)))
        assert values == sorted(set(values))


def test_hard_classes_leave_easy_batches_alone() -> None:
    easy = [[0.95, -0.1, -0.2], [-0.1, 0.95, 0.05]]
    for cls, other in ((MVSoftmax, CosFace), (CurricularFace, ArcFace)):
        loss, features = on_cosines(cls, easy, scale=8.0)
        reference, _ = on_cosines(other, easy, scale=8.0)
        torch.testing.assert_close(loss(features, LABELS), reference(features, LABELS))


def test_adaptive_emphasis_grows_with_the_cosine() -> None:
    loss, _ = on_cosines(MVSoftmax, COSINES)
    cosine = torch.tensor([[-1.0, 0.0, 0.5]])
    hard = loss.non_target(cosine, cosine, {"margined": torch.tensor([[-2.0]])})
    assert hard[0].tolist() == pytest.approx([-1.0, 0.2, 0.8])


def test_curriculum_moves_with_the_mean_cosine() -> None:
    loss, features = on_cosines(CurricularFace, COSINES)
    loss(features, LABELS)
    assert float(loss.t) == pytest.approx(0.006)
    hard = loss.non_target(torch.tensor([[1 - 0.006]]).double(), None, {"margined": torch.zeros(1, 1)})
    assert float(hard) == pytest.approx(1 - 0.006)


def test_adacos_scales() -> None:
    assert [AdaCos(c, 4).scale for c in (3, 10, 10575, 85742)] == pytest.approx(
        [0.98025814, 3.1073448, 13.10431986, 16.06417405]
    )
    three = [*COSINES, [0.1, 0.2, 0.6]]
    loss, features = on_cosines(AdaCos, three)
    value = loss(features, torch.tensor([0, 1, 2]))
    assert float(loss.current_scale) == pytest.approx(1.21595068, abs=1e-7)
    assert float(value) == pytest.approx(0.79307162, abs=1e-7)
    fixed, _ = on_cosines(AdaCos, three, mode="fixed")
    assert float(fixed(features, torch.tensor([0, 1, 2]))) == pytest.approx(0.84330925, abs=1e-7)


def test_the_scale_that_a_probability_takes() -> None:
    assert [lowest_scale(classes, 0.9) for classes in (10575, 85742)] == pytest.approx([11.46229401, 13.55615287])
    # At that scale a sample on its row, all rows as far apart as they can be, has it.
    simplex = torch.nn.functional.normalize(torch.eye(10, dtype=torch.float64) - 0.1)
    loss = NormFace(10, 10, scale=lowest_scale(10, 0.9), learn_scale=False).double()
    loss.weight.data.copy_(simplex)
    assert math.exp(-float(loss(simplex, torch.arange(10)))) == pytest.approx(0.9)


def test_l2_softmax_bounds_and_radius() -> None:
    found = [lowest_radius(classes, 0.9) for classes in (13403, 10575, 85742)]
    assert found == pytest.approx([11.70030919, 11.46328344, 13.55629932])
    alpha = lowest_radius(100, 0.9)
    assert math.exp(alpha) / (math.exp(alpha) + 98) == pytest.approx(0.9)
    loss = on_rows(L2Softmax)
    features = FEATURES.clone().requires_grad_()
    value = loss(features, LABELS)
    torch.testing.assert_close(loss(3 * FEATURES, LABELS), value)
    value.backward()
    assert features.grad is not None
    assert (features.grad * FEATURES).sum(1).abs().max() < 1e-12, "the gradient stands at right angles"


def test_p2sgrad_gradient_is_the_cosine_error() -> None:
    loss, features = on_cosines(P2SGrad, COSINES)
    features.requires_grad_()
    loss(features, LABELS).backward()
    error = torch.tensor(COSINES, dtype=torch.float64) - torch.nn.functional.one_hot(LABELS, 3)
    # d cos_ij / d x_i = W_j - cos_ij x_i, both of length 1
    unit = features.detach()
    slope = loss.weight.detach()[None] - torch.tensor(COSINES)[:, :, None] * unit[:, None, :]
    torch.testing.assert_close(features.grad, (error[:, :, None] * slope).sum(1) / 2)


def test_subcenters_pool_the_nearest() -> None:
    cosines = torch.tensor([[[0.8, 0.2], [0.3, 0.1], [-0.2, -0.3]], [[0.45, 0.1], [0.0, 0.4], [0.05, -0.3]]]).double()
    loss = SubcenterArcFace(3, 7, subcenters=2).double()
    loss.weight.data.copy_(torch.eye(6, 7).view(3, 2, 7))
    flat = cosines.flatten(1)
    features = torch.cat([flat, (1 - flat.square().sum(1, keepdim=True)).sqrt()], dim=1)
    value = loss(features, LABELS)
    assert float(value) == pytest.approx(17.22809788, rel=1e-7)
    value.backward()
    assert loss.weight.grad is not None
    gradient = loss.weight.grad.abs().sum(2)
    assert (gradient[1] > 0).all(), "each is the nearest of one sample"
    assert gradient[0, 1] == 0, "never the nearest"
    loss.weight.data.copy_(loss.weight.data.flip(1))
    torch.testing.assert_close(loss(features, LABELS), value.detach())
    more = SubcenterArcFace(3, 7, subcenters=3).double()
    more.weight.data.copy_(torch.cat([loss.weight.data, -features.mean(0).expand(3, 1, 7)], dim=1))
    assert (more.subcenter_cosines(features)[..., 2] < more.similarity(features)).all()
    torch.testing.assert_close(more(features, LABELS), value.detach())
    one = SubcenterArcFace(3, 7, subcenters=1).double()
    plain = ArcFace(3, 7).double()
    one.weight.data.copy_(plain.weight.data[:, None])
    torch.testing.assert_close(one(features, LABELS), plain(features, LABELS))


def test_the_survey_of_p2sgrad_weighs_samples() -> None:
    weighted, features = on_cosines(SigmoidWeightedArcFace, COSINES, kappa=2.0, reduction="none")
    plain, _ = on_cosines(ArcFace, COSINES, reduction="none")
    weight = torch.sigmoid(-2 * torch.tensor([0.8, 0.4], dtype=torch.float64))
    torch.testing.assert_close(weighted(features, LABELS), weight * plain(features, LABELS))


def test_the_survey_of_mv_softmax_corrects_directions() -> None:
    corrected, features = on_cosines(DirectedArcFace, COSINES, correction=1.0, reduction="none")
    plain, _ = on_cosines(ArcFace, COSINES, scale=32.0, reduction="none")
    expected = []
    for x, own, predicted in zip(features, (0, 1), (0, 0), strict=True):
        towards = corrected.weight[predicted] - x
        expected.append(abs(float(towards @ (corrected.weight[own] - x) / towards.norm())))
    found = corrected(features, LABELS) - plain(features, LABELS)
    assert found.tolist() == pytest.approx(expected)


class TestTerms:
    def test_centers(self) -> None:
        term = CenterLoss(3, 2).double()
        term.centers.copy_(torch.tensor([[2.0, 3.0], [0.0, 1.0], [0.0, 0.0]]))
        features = FEATURES.clone().requires_grad_()
        value = term(features, LABELS)
        assert float(value) == pytest.approx(1.0)
        value.backward()
        torch.testing.assert_close(features.grad, (FEATURES - term.centers[:2]) / 2)
        term.update()
        assert term.centers.tolist() == [[2.25, 3.25], [-0.25, 1.25], [0.0, 0.0]]
        softmax = on_rows(Softmax)(FEATURES, LABELS)
        assert float(softmax + 0.003 * value) == pytest.approx(2.54675693, abs=1e-8)

    def test_two_samples_of_a_class_add(self) -> None:
        term = CenterLoss(1, 2).double()
        term.centers.copy_(torch.tensor([[2.0, 3.0]]))
        term(FEATURES, torch.tensor([0, 0]))
        term.update()
        assert term.centers[0].tolist() == pytest.approx([1.66666667, 3.0])
        before = term.centers.clone()
        term.update()
        assert torch.equal(term.centers, before), "a batch counts once"

    def test_ring(self) -> None:
        term = RingLoss(3.0).double()
        features = FEATURES.clone().requires_grad_()
        value = term(features)
        assert float(value) == pytest.approx(1.14589803)
        value.backward()
        assert features.grad is not None
        assert term.drift.grad is not None
        assert float(term.drift.grad) == pytest.approx(-0.61803399)
        assert features.grad.flatten().tolist() == pytest.approx([0.6, 0.8, 0.17082039, -0.34164079])
        softmax = on_rows(Softmax)(FEATURES, LABELS)
        assert float(softmax + 0.01 * value) == pytest.approx(2.55521591, abs=1e-8)

    def test_ring_starts_at_the_mean_length(self) -> None:
        term = RingLoss().double()
        term(FEATURES)
        assert float(term.radius) == pytest.approx((5 + math.sqrt(5)) / 2)
        term(10 * FEATURES)
        assert float(term.radius) == pytest.approx((5 + math.sqrt(5)) / 2), "only once"

    def test_the_best_radius_is_the_mean_length(self) -> None:
        at = {radius: float(RingLoss(radius).double()(FEATURES)) for radius in (3.5, (5 + 5**0.5) / 2, 3.7)}
        assert min(at, key=at.__getitem__) == (5 + 5**0.5) / 2
        features = FEATURES[:1].clone().requires_grad_()
        RingLoss(5.0).double()(features).backward()  # (3, 4) has this length
        assert features.grad is not None
        assert features.grad.abs().max() == 0

    def test_verification_of_pairs(self) -> None:
        together = torch.tensor([[1.0, 2.0], [2.0, 0.0]], dtype=torch.float64, requires_grad=True)
        value = PairVerification(negative_fraction=0.5)(together, torch.tensor([0, 0]))
        # Only pairs of one person: they keep their half of the weight.
        assert float(value) == pytest.approx(2.5 / 2)
        value.backward()
        assert together.grad is not None
        torch.testing.assert_close(together.grad[0], (together[0] - together[1]).detach() / 2)
        apart = torch.tensor([[1.0, 2.0], [4.0, 4.0]], dtype=torch.float64)
        assert float(PairVerification(margin=6.0)(apart, LABELS)) == pytest.approx(2.86669235 / 2)
        assert float(PairVerification(margin=3.0)(apart, LABELS)) == 0.0
        cosine = PairVerification("cosine").double()
        cosine.slope.data.fill_(2.0)
        cosine.offset.data.fill_(0.5)
        assert float(cosine(together, torch.tensor([0, 0]))) == pytest.approx(0.01974123 / 2)

    def test_the_margin_becomes_the_best_threshold(self) -> None:
        line = torch.tensor([[0.0], [1.0], [10.0], [11.0]], dtype=torch.float64)
        term = PairVerification(margin=100.0, margin_pairs=6)
        term(line, torch.tensor([0, 0, 1, 1]))
        assert 1 < float(term.margin) < 9
        assert not any(name == "margin" for name, _ in term.named_parameters())


def test_the_package_offers_them() -> None:
    for name in ("LSoftmax", "SphereFace", "AdaCos", "CurricularFace", "CenterLoss"):
        assert name in losses.__all__
