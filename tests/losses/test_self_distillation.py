"""Losses of self-distillation: worked numbers, slow references, public implementations, what must not change them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from armillary.components.patches import crop_coordinates, rotate_by_position, sincos_positions
from armillary.components.schedules import Schedule
from armillary.components.sinkhorn import sinkhorn
from armillary.losses.center_residual import center_and_residual, de_centering, info_nce_gradient
from armillary.losses.patch_contrast import ConceptContrast, PatchContrast
from armillary.losses.self_distillation import (
    BYOL,
    CrossViewEntropy,
    Distillation,
    GramAnchor,
    KoLeo,
    MaskedPatchEntropy,
    SimSiam,
    centered_targets,
)
from armillary.losses.soft_targets import soft_cross_entropy, soft_targets
from armillary.testing.gloo_pool import shared_pool


def matrix(rows: list[list[float]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


A = matrix([[0.5, -1.2, 0.3], [1.0, 0.4, -0.7], [-0.8, 0.9, 0.1], [0.2, -0.5, 1.1]])
B = matrix([[0.6, -1.0, 0.1], [0.8, 0.6, -0.9], [-0.7, 1.1, -0.2], [0.0, -0.4, 1.3]])
C = matrix([[0.1, -0.9, 0.5], [1.1, 0.2, -0.4], [-0.6, 0.7, 0.3], [0.3, -0.6, 0.9]])
D = matrix([[0.4, -1.1, 0.4], [0.9, 0.5, -0.6], [-0.9, 0.8, 0.0], [0.1, -0.3, 1.2]])
TEACHER = torch.stack([matrix([[1.0, 0.2, -0.5], [0.1, 0.9, 0.3]]), matrix([[0.8, 0.4, -0.2], [0.0, 1.1, 0.2]])])
STUDENT = torch.stack(
    [
        matrix([[0.7, 0.1, -0.3], [0.2, 0.8, 0.1]]),
        matrix([[0.9, 0.0, -0.4], [-0.1, 1.0, 0.4]]),
        matrix([[0.5, 0.3, 0.0], [0.3, 0.6, 0.2]]),
    ]
)
CENTER = torch.tensor([0.1, 0.2, -0.1], dtype=torch.float64)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def exactly(expected: float | list[float]) -> object:
    return pytest.approx(expected, abs=2e-8)


def first_gradient(loss: Tensor, inputs: Tensor) -> list[float]:
    (gradient,) = torch.autograd.grad(loss, inputs)
    return gradient[0].tolist()


# BYOL and SimSiam.


def test_byol_worked_numbers() -> None:
    p1 = A.clone().requires_grad_()
    loss = BYOL()(p1, B, C, D)
    assert float(loss.detach()) == exactly(0.17296779)
    assert first_gradient(loss, p1) == exactly([-0.05450324, -0.01007321, 0.05054591])
    one_way = BYOL()(A, B, A, B)
    assert float(one_way) == exactly(2 * 0.05773194)
    assert float(BYOL("survey")(A, B, C, D)) == exactly(0.145)
    assert [Schedule(0.996, 1.0, 100)(k) for k in (0, 25, 50, 100)] == exactly([0.996, 0.99658579, 0.998, 1.0])


def test_simsiam_worked_numbers() -> None:
    p1, z2 = A.clone().requires_grad_(), B.clone().requires_grad_()
    loss = SimSiam()(p1, z2, C, D)
    assert float(loss.detach()) == exactly(-0.95675805)
    assert first_gradient(loss, p1) == exactly([-0.01362581, -0.0025183, 0.01263648])
    assert float(BYOL()(A, B, C, D)) == pytest.approx(4 + 4 * float(loss.detach()))


def test_switches_of_simsiam_change_gradients_alone() -> None:
    def gradients(target: float, prediction: float) -> tuple[float, ...]:
        p1, z2 = A.clone().requires_grad_(), B.clone().requires_grad_()
        loss = SimSiam(target, prediction)(p1, z2, C, D.clone().requires_grad_())
        found = torch.autograd.grad(loss, (p1, z2), allow_unused=True)
        return float(loss.detach()), *(0.0 if g is None else float(g.norm()) for g in found)

    value, left, right = gradients(1.0, 1.0)
    assert gradients(0.0, 1.0) == pytest.approx((value, left, 0.0))
    assert gradients(1.0, 0.0) == pytest.approx((value, 0.0, right))
    assert gradients(0.5, 1.0) == pytest.approx((value, left, right / 2))
    assert min(left, right) > 0.01


def test_what_changes_nothing_for_predictions() -> None:
    scale = torch.tensor([[2.0], [0.3], [5.0], [1.0]], dtype=torch.float64)
    for loss in (BYOL(), SimSiam()):
        torch.testing.assert_close(loss(A * scale, B / scale, C, D), loss(A, B, C, D))
        torch.testing.assert_close(loss(C, D, A, B), loss(A, B, C, D))
    assert float(SimSiam()(A, 3 * A, C, C)) == pytest.approx(-1)
    assert float(BYOL()(A, -A, C, -C)) == pytest.approx(8)
    assert float(BYOL("survey")(A, 3 * A, C, C)) > 0.1


# DINO.


def dino_slow(student: Tensor, targets: Tensor, temperature: float) -> float:
    """The mean over all pairs of different views, each a mean over images, by loops."""
    total, pairs = 0.0, 0
    for g in range(len(targets)):
        for v in range(len(student)):
            if g == v:
                continue
            pairs += 1
            for b in range(student.shape[1]):
                row = [float(x) / temperature for x in student[v, b]]
                mass = math.log(sum(math.exp(x) for x in row))
                terms = [float(q) * (x - mass) for q, x in zip(targets[g, b], row, strict=True)]
                total -= sum(terms) / student.shape[1]
    return total / pairs


def test_dino_worked_numbers() -> None:
    targets = centered_targets(TEACHER, CENTER, 0.04)
    student = STUDENT.clone().requires_grad_()
    loss = CrossViewEntropy(0.1)(student, targets)
    assert float(loss.detach()) == exactly(0.05144294)
    (gradient,) = torch.autograd.grad(loss, student)
    assert gradient[2, 0].tolist() == exactly([-0.31099385, 0.29624448, 0.01474937])
    warm = Schedule(0.04, 0.07, 29, "linear")
    assert [warm(epoch) for epoch in (0, 15, 29, 30)] == exactly([0.04, 0.05551724, 0.07, 0.07])


def test_dinov2_worked_numbers() -> None:
    rows = sinkhorn(TEACHER.flatten(0, 1), epsilon=0.07, iterations=3).view_as(TEACHER)
    assert rows[0, 0].tolist() == exactly([0.99995769, 1.221e-05, 3.01e-05])
    assert rows[1, 1].tolist() == exactly([1.2e-07, 0.87592946, 0.12407043])
    image = CrossViewEntropy(0.1)(STUDENT, rows)
    assert float(image) == exactly(1.43282112)
    total = image + 1.5 + 0.1 * (KoLeo()(A) + KoLeo()(B))
    assert float(total) == exactly(2.89793424)


@pytest.mark.parametrize(("large", "small"), [(2, 0), (2, 3), (3, 1)])
def test_dino_is_its_equation(large: int, small: int) -> None:
    student, teacher = noise(large + small, 5, 7), noise(large, 5, 7, seed=1)
    targets = centered_targets(teacher, noise(7, seed=2), 0.3)
    found = CrossViewEntropy(0.2)(student, targets)
    assert float(found) == pytest.approx(dino_slow(student, targets, 0.2), rel=1e-12)


def test_what_changes_nothing_for_dino() -> None:
    loss, targets = CrossViewEntropy(), centered_targets(TEACHER, CENTER, 0.04)
    value = loss(STUDENT, targets)
    torch.testing.assert_close(loss(STUDENT + 3, targets), value)
    torch.testing.assert_close(centered_targets(TEACHER + 2, CENTER + 2, 0.04), targets)
    # The least value is the targets' entropy, where the student says the same.
    same = centered_targets(TEACHER[:1].expand(2, -1, -1), CENTER, 0.1)
    entropy = torch.special.entr(same).sum(-1).mean()
    torch.testing.assert_close(loss(same.log() * 0.1, same), entropy)
    assert loss(STUDENT[:2], same) > entropy


def test_dino_under_autocast_is_float32() -> None:
    student, targets = 0.1 * noise(4, 8, 32).float(), centered_targets(0.1 * noise(2, 8, 32), torch.zeros(32), 0.04)
    with torch.autocast("cpu", torch.bfloat16):
        loss = CrossViewEntropy()(student, targets.float())
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, CrossViewEntropy()(student, targets.float()))


# iBOT.

PATCH_TEACHER = torch.stack(
    [
        matrix([[1.0, 0.0, -0.5], [0.2, 0.7, 0.1], [0.0, 0.3, 0.9]]),
        matrix([[0.5, 0.5, 0.0], [1.2, -0.1, 0.3], [0.1, 0.2, 0.3]]),
    ]
)
PATCH_STUDENT = torch.stack(
    [
        matrix([[0.8, 0.1, -0.2], [0.1, 0.6, 0.2], [0.2, 0.2, 0.5]]),
        matrix([[0.4, 0.6, 0.1], [0.9, 0.0, 0.2], [0.0, 0.3, 0.4]]),
    ]
)


def patch_loss(mask: list[list[int]], teacher: Tensor = PATCH_TEACHER) -> Tensor:
    masked = torch.tensor(mask, dtype=torch.bool)
    center = torch.tensor([0.05, 0.1, 0.0], dtype=torch.float64)
    targets = centered_targets(teacher[masked], center, 0.07)
    loss: Tensor = MaskedPatchEntropy(0.1)(PATCH_STUDENT[masked], targets, masked)
    return loss


def test_ibot_worked_numbers() -> None:
    assert float(patch_loss([[1, 0, 1], [0, 1, 0]])) == exactly(0.02454153)
    assert float(patch_loss([[1, 0, 1], [0, 0, 0]])) == exactly(0.02400549)
    assert float(patch_loss([[0, 0, 0], [0, 0, 0]])) == 0
    changed = PATCH_TEACHER.clone()
    changed[0, 1] += 5  # not masked
    torch.testing.assert_close(patch_loss([[1, 0, 1], [0, 1, 0]], changed), patch_loss([[1, 0, 1], [0, 1, 0]]))


# Gram anchoring and KoLeo.


def test_gram_worked_numbers() -> None:
    student = matrix([[0.5, -1.2], [1.0, 0.4], [-0.8, 0.9]])[None]
    anchor = matrix([[0.4, -1.0], [0.9, 0.6], [-0.7, 1.1]])[None]
    assert float(GramAnchor()(student, anchor)) == exactly(0.03997909)
    assert float(GramAnchor()(student, anchor)) * 9 == exactly(0.35981185)
    assert float(GramAnchor(formulation="survey")(student, anchor)) == exactly(0.3787)


def test_what_changes_nothing_for_gram() -> None:
    student, anchor = noise(3, 5, 4), noise(3, 5, 4, seed=1)
    value, order = GramAnchor()(student, anchor), torch.tensor([3, 1, 4, 0, 2])
    turn = torch.linalg.qr(noise(4, 4, seed=2)).Q
    lengths = noise(3, 5, 1, seed=3).abs() + 0.1
    torch.testing.assert_close(GramAnchor()(student @ turn * lengths, anchor), value)
    torch.testing.assert_close(GramAnchor()(student[:, order], anchor[:, order]), value)
    assert float(GramAnchor()(student @ turn * lengths, student)) == pytest.approx(0, abs=1e-25)
    assert 0 < float(value) < 4
    opposite = torch.tensor([[[1.0, 0.0], [-1.0, 0.0]]])
    assert float(GramAnchor(remove_negative=True)(opposite, torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]))) == 0
    # All pairs of the batch: the pairs within images are some of them.
    both = GramAnchor(image_level=False)(student, anchor)
    flat = [nn.functional.normalize(x.flatten(0, 1), dim=1) for x in (student, anchor)]
    torch.testing.assert_close(both, (flat[0] @ flat[0].T - flat[1] @ flat[1].T).square().mean())


def koleo_slow(rows: list[list[float]]) -> float:
    unit = [[x / math.sqrt(sum(y * y for y in row)) for x in row] for row in rows]
    nearest = [min(math.dist(a, b) for j, b in enumerate(unit) if j != i) for i, a in enumerate(unit)]
    return -sum(math.log(d) for d in nearest) / len(rows)


def test_koleo_worked_numbers() -> None:
    rows = A.clone().requires_grad_()
    loss = KoLeo(eps=0)(rows)
    assert float(loss.detach()) == exactly(-0.14643126)
    assert float(KoLeo()(A)) == exactly(-0.14643127)
    assert first_gradient(loss, rows) == exactly([0.03219176, 0.09830776, 0.33957811])


def test_koleo_of_more_rows_than_a_block() -> None:
    rows = torch.nn.functional.normalize(noise(700, 3))
    away = torch.cdist(rows, rows).fill_diagonal_(math.inf).amin(dim=1)
    assert float(KoLeo(eps=0)(rows)) == pytest.approx(-float(away.log().mean()), rel=1e-9)


def test_koleo_is_its_equation() -> None:
    rows = noise(9, 4)
    assert float(KoLeo(eps=0)(rows)) == pytest.approx(koleo_slow(rows.tolist()), rel=1e-12)
    lengths = noise(9, 1, seed=1).abs() + 0.1
    assert float(KoLeo(eps=0)((rows * lengths).flip(0))) == pytest.approx(koleo_slow(rows.tolist()), rel=1e-12)
    assert float(KoLeo(eps=0)(torch.eye(2))) == pytest.approx(-math.log(math.sqrt(2)))


def test_koleo_of_few_and_of_equal_samples() -> None:
    alone = noise(1, 4).requires_grad_()
    assert first_gradient(KoLeo()(alone), alone) == [0, 0, 0, 0]
    twins = noise(1, 4).float().repeat(3, 1).requires_grad_()
    loss = KoLeo(neighbours=2)(twins)
    assert 15 < float(loss.detach()) < 19
    assert all(map(math.isfinite, first_gradient(loss, twins)))


# Distillation.


def test_distillation_worked_numbers() -> None:
    teacher, student = matrix([[2.0, 0.5, -1.0], [0.1, 0.3, 0.2]]), matrix([[1.5, 0.2, -0.5], [0.0, 0.6, 0.1]])
    labels = torch.tensor([0, 1])
    assert float(Distillation()(student, teacher)) == exactly(0.88130316)
    assert float(Distillation(0.1)(student, teacher)) == exactly(0.88650326)
    assert float(Distillation(0.1, tau_squared=True)(student, teacher)) == exactly(0.88650326 * 0.01)
    assert float(Distillation(alpha=0.7)(student, teacher, labels)) == exactly(0.78341602)
    assert float(Distillation(alpha=0.0)(student, teacher, labels)) == exactly(0.5550127)
    torch.testing.assert_close(Distillation(0.5)(student + 1, teacher - 2), Distillation(0.5)(student, teacher))
    same = teacher.clone().requires_grad_()
    assert first_gradient(Distillation(0.3)(same, teacher), same) == pytest.approx([0, 0, 0], abs=1e-12)
    with pytest.raises(ValueError, match="found none"):
        Distillation(alpha=0.5)(student, teacher)


# Positional queries.


def test_pq_worked_numbers() -> None:
    # (top, left, height, width) in pixels of a square of 160.
    large = torch.tensor([[20, 10, 20 + 112, 10 + 112]]) / 160
    small = torch.tensor([[50, 30, 50 + 48, 30 + 48]]) / 160
    places = crop_coordinates(small, (6, 6), large, (14, 14))[0].view(6, 6, 2)
    assert places[0, :, 0].tolist() == pytest.approx([3.75, 4.75, 5.75, 6.75, 7.75, 8.75], abs=1e-5)
    assert places[:, 0, 1].tolist() == pytest.approx([2.5, 3.5, 4.5, 5.5, 6.5, 7.5], abs=1e-5)
    expected = [-0.99929279, 0.04748214, 0.03760215, 0.99887209, -0.97753012, 0.04498481, -0.2107958, 0.99898767]
    assert sincos_positions(torch.tensor([4.75, 4.5]), 8).tolist() == pytest.approx(expected, abs=1e-6)


def test_pq_query_loss_worked_numbers() -> None:
    teacher = matrix([[1.0, 0.2, -0.3], [0.4, 0.4, 0.1]])
    answers = torch.stack([matrix([[0.8, 0.1, -0.1], [0.2, 0.5, 0.0]]), matrix([[0.9, 0.3, -0.2], [0.1, 0.6, 0.2]])])
    targets = centered_targets(teacher, torch.tensor([0.1, 0.0, 0.05], dtype=torch.float64), 0.04)
    losses = soft_cross_entropy(answers / 0.1, targets).mean(dim=1)
    assert losses.tolist() == exactly([0.14214674, 0.20352921])
    assert float(losses.mean()) == exactly(0.17283798)


def test_rotary_worked_numbers() -> None:
    q = torch.tensor([0.5, -0.2, 0.1, 0.7, 0.3, 0.3, -0.4, 0.2], dtype=torch.float64)
    k = torch.tensor([0.1, 0.4, -0.3, 0.2, 0.6, -0.1, 0.2, 0.5], dtype=torch.float64)

    def turned(vector: Tensor, x: float, y: float) -> Tensor:
        return rotate_by_position(vector, torch.tensor([x, y]), base=100.0)

    expected = [0.2348676, 0.48460005, -0.00572958, 0.70708357, -0.42187405, 0.04496987, -0.43453892, 0.10571628]
    assert turned(q, 1.5, 2.25).tolist() == pytest.approx(expected, abs=1e-6)
    assert float(turned(q, 1.5, 2.25) @ turned(k, 0.5, 0.25)) == pytest.approx(0.0198729, abs=1e-6)
    assert float(turned(q, 3.5, 5.0) @ turned(k, 2.5, 3.0)) == pytest.approx(0.0198729, abs=1e-6)
    assert float(turned(q, 9.0, -4.5).norm()) == pytest.approx(float(q.norm()))


def patch_contrast_slow(loss: PatchContrast, features: Tensor, places: Tensor, grid: tuple[int, int]) -> float:
    """InfoNCE of each patch that the other crop shows, by loops over crops and patches."""
    crops, count, query = len(features), features.shape[1], loss.query.detach()
    total = 0.0
    for crop in range(crops):
        other, terms = (crop + crops // 2) % crops, []
        for p in range(count):
            x, y = (round(float(value)) for value in places[crop, p])
            if not (0 <= x < grid[1] and 0 <= y < grid[0]):
                continue
            anchor = query * features[other, p]
            cosine = [
                float(torch.cosine_similarity(anchor, query * features[crop, j], dim=0)) / loss.temperature
                for j in range(count)
            ]
            terms.append(math.log(sum(math.exp(c) for c in cosine)) - cosine[y * grid[1] + x])
        total += sum(terms) / max(len(terms), 1) / crops
    return total


def test_patch_contrast_is_its_equation() -> None:
    loss, features = PatchContrast(5).double(), noise(4, 6, 5)
    places = 3 * noise(4, 6, 2, seed=1) + 1
    places[3] = -2  # a crop that shares no place with the other
    found = loss(features, places, (2, 3))
    assert float(found.detach()) == pytest.approx(patch_contrast_slow(loss, features, places, (2, 3)), rel=1e-9)


def test_concepts_are_told_apart() -> None:
    loss = ConceptContrast(4, 3).double()
    with torch.no_grad():
        loss.queries.copy_(20 * torch.eye(4)[:3])
    patches = torch.eye(4, dtype=torch.float64)[None, :3] * 10
    # Every concept looks at a patch of its own, in both crops: K (log(e + (K - 1)) - 1).
    assert float(loss(patches, patches).detach()) == pytest.approx(3 * (math.log(math.e + 2) - 1), rel=1e-9)
    swapped = loss(patches, patches[:, [1, 2, 0]])
    assert float(swapped.detach()) == pytest.approx(3 * math.log(math.e + 2), rel=1e-9)


# Centre and residual.


def test_center_and_residual_worked_numbers() -> None:
    parts = center_and_residual(A)
    assert parts.center.tolist() == exactly([0.16361985, -0.06286036, 0.16520427])
    assert float(parts.center_share) == exactly(0.24086372)
    assert float(parts.residual_share) == exactly(0.96107276)
    assert float(parts.residual_square) == exactly(0.94198467)
    assert float(parts.center_share**2 + parts.residual_square) == pytest.approx(1)
    assert float(center_and_residual(torch.cat([A, -A])).center_share) == pytest.approx(0, abs=1e-12)
    assert float(center_and_residual(A[:1].repeat(5, 1)).center_share) == pytest.approx(1)


def test_info_nce_gradient_worked_numbers() -> None:
    parts = info_nce_gradient(A[0], B, 0, 0.5)
    assert parts.weights.tolist() == exactly([0.68474835, 0.05000487, 0.01351079, 0.25173599])
    assert parts.extra.tolist() == exactly([-0.3735769, 0.62548424, -0.26360598])
    assert (parts.basic + parts.extra).tolist() == exactly([0.13903769, -0.22887342, -0.17817022])
    # It is the gradient: differentiate the loss by the anchor.
    anchor = nn.functional.normalize(A[0], dim=0).requires_grad_()
    loss = nn.functional.cross_entropy((nn.functional.normalize(B) @ anchor / 0.5)[None], torch.tensor([0]))
    (gradient,) = torch.autograd.grad(loss, anchor)
    torch.testing.assert_close(-0.5 * gradient, parts.basic + parts.extra)


def test_an_added_bias_de_centers() -> None:
    bias = torch.tensor([3.0, 0.0, 0.0], dtype=torch.float64)
    assert float(de_centering(A, A + bias)) < -0.9
    assert float(de_centering(A, A)) == 0


# Beside lightly.


@pytest.mark.parity
def test_like_lightly() -> None:
    theirs = pytest.importorskip("lightly.loss")
    student, teacher = noise(5, 6, 16), noise(2, 6, 16, seed=1)
    same_loss(
        lambda s: CrossViewEntropy(0.1)(s, centered_targets(teacher, torch.zeros(16), 0.04)),
        lambda s: theirs.DINOLoss(16)(list(teacher.float()), list(s.float())),
        student,
    )
    masked = torch.rand(6, 3, 3, generator=torch.Generator().manual_seed(0)) > 0.6
    count = int(masked.sum())
    flat, patches = noise(count, 16, seed=2), noise(count, 16, seed=3)
    same_loss(
        lambda s: MaskedPatchEntropy()(s, centered_targets(patches, torch.zeros(16), 0.04), masked.flatten(1)),
        lambda s: theirs.IBOTPatchLoss(16)(patches, s, masked),
        flat,
    )
    same_loss(KoLeo(), theirs.KoLeoLoss(), noise(12, 6))
    cosine = theirs.NegativeCosineSimilarity()
    same_loss(lambda p: SimSiam()(p, B, C, D), lambda p: (cosine(p, B) + cosine(C, D)) / 2, A)
    same_loss(lambda p: BYOL()(p, B, C, D), lambda p: 4 + 2 * (cosine(p, B) + cosine(C, D)), A)


def same_loss(ours: object, theirs: object, inputs: Tensor) -> None:
    """Equal values and gradients, to 1e-5."""
    found = []
    for loss in (ours, theirs):
        assert callable(loss)
        free = inputs.clone().requires_grad_()
        value = loss(free)
        (gradient,) = torch.autograd.grad(value, free)
        found.append((value.detach().double(), gradient))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)


# Over workers.


def part(kind: str, count: int) -> list[float]:
    """One rank's loss on its rows, and their gradient over the number of ranks."""
    from armillary import collectives

    mine = slice(collectives.rank() * count, (collectives.rank() + 1) * count)
    loss, inputs, anchor = coupled(kind)
    own = inputs[mine].clone().requires_grad_()
    value = loss(own) if anchor is None else loss(own, anchor[mine])
    value.backward()
    assert own.grad is not None
    return [float(value.detach()), *(own.grad / collectives.world_size()).flatten().tolist()]


def coupled(kind: str) -> tuple[nn.Module, Tensor, Tensor | None]:
    """A loss that compares samples of all workers, its input and what it is anchored to."""
    if kind == "koleo":
        return KoLeo(neighbours=2), noise(8, 5), None
    return GramAnchor(image_level=False), noise(4, 3, 5), noise(4, 3, 5, seed=1)


@pytest.mark.xdist_group("gloo")
@pytest.mark.parametrize("kind", ["koleo", "gram"])
def test_two_workers_equal_one(kind: str) -> None:
    loss, inputs, anchor = coupled(kind)
    inputs.requires_grad_()
    value = loss(inputs) if anchor is None else loss(inputs, anchor)
    value.backward()
    assert inputs.grad is not None
    both = shared_pool().run(part, kind, len(inputs) // 2)
    assert sum(rank[0] for rank in both) / 2 == pytest.approx(float(value.detach()), rel=1e-10)
    assert both[0][1:] + both[1][1:] == pytest.approx(inputs.grad.flatten().tolist(), rel=1e-8, abs=1e-12)


def test_soft_cross_entropy_is_the_composition_of_torch_across_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("armillary.losses.soft_targets._BLOCK", 64)
    draw = torch.Generator().manual_seed(0)
    logits = (30 * torch.randn(2, 11, 9, generator=draw, dtype=torch.float64)).requires_grad_()
    targets = soft_targets(torch.randn(2, 11, 9, generator=draw, dtype=torch.float64), torch.zeros(9), 0.04)
    weight = torch.rand(2, 11, generator=draw, dtype=torch.float64)
    expected = -(targets * (logits / 0.1).log_softmax(dim=-1)).sum(dim=-1)
    found = soft_cross_entropy(logits, targets, 0.1)
    torch.testing.assert_close(found, expected)
    wanted = torch.autograd.grad((weight * expected).sum(), logits)[0]
    torch.testing.assert_close(torch.autograd.grad((weight * found).sum(), logits)[0], wanted)
    assert soft_cross_entropy(logits[:, :0], targets[:, :0], 0.1).shape == (2, 0)
