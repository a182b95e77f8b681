"""InfoNCE in its forms, CLIP, transport plans, skip-gram, Con2R: worked numbers, loops, POT, what changes nothing."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from armillary.losses.graph_constraint import GraphConstraint, agreement
from armillary.losses.info_nce import InfoNCE, SymmetricInfoNCE
from armillary.losses.skip_gram import NegativeSampling, keep_probability, noise_distribution
from armillary.losses.tensors import normalize
from armillary.losses.transport import (
    InverseTransport,
    TransportCLIP,
    both_masses,
    bounded_columns,
    fused_gromov,
    matching_loss,
    row_masses,
    soft_masses,
    token_transport,
    uniformity_penalty,
)


def tensor(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


A = [[0.9, 0.1, -0.2], [-0.3, 0.8, 0.4], [0.2, -0.6, 0.7], [-0.7, -0.2, -0.5]]
B = [[0.5, 0.6, -0.3], [0.2, 0.7, -0.4], [-0.3, -0.5, 0.6], [-0.6, 0.3, -0.2]]
HARD = [[0.1, 1.0, 0.0], [0.6, 0.6, -0.5], [-1.0, 0.2, 0.1], [0.0, -0.3, 0.9]]
COSINES = normalize(tensor(A)) @ normalize(tensor(B)).T


def noise(n: int = 9, d: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    one = torch.randn(n, d, generator=draw, dtype=torch.float64)
    return one, one + torch.randn(n, d, generator=draw, dtype=torch.float64)


# InfoNCE, SimCSE, GraphCL, CLIP


def test_simcse_worked_numbers() -> None:
    loss = InfoNCE(0.05)
    assert float(loss(tensor(A), tensor(B))) == pytest.approx(0.45206908, abs=1e-8)
    assert float(loss(tensor(A), tensor(B), negatives=tensor(HARD))) == pytest.approx(2.61380224, abs=1e-8)
    heavier = InfoNCE(0.05, negative_weight=2.0)(tensor(A), tensor(B), negatives=tensor(HARD))
    assert float(heavier) == pytest.approx(2.61380455, abs=1e-8)


def test_graphcl_worked_numbers() -> None:
    each = InfoNCE(0.2, positive_in_denominator=False, reduction="none")(tensor(A), tensor(B))
    assert each.tolist() == pytest.approx([-1.52127665, 0.69546776, -6.46857625, -3.15251508], abs=1e-8)
    assert float(InfoNCE(0.2)(tensor(A), tensor(B))) == pytest.approx(0.33528295, abs=1e-8)
    with_positive = InfoNCE(0.2, reduction="none")(tensor(A), tensor(B))
    torch.testing.assert_close(with_positive, torch.log1p(each.exp()))


def test_equal_similarities() -> None:
    same = torch.ones(7, 3, dtype=torch.float64)
    assert float(InfoNCE(0.2)(same, same)) == pytest.approx(math.log(7))
    assert float(InfoNCE(0.2, positive_in_denominator=False)(same, same)) == pytest.approx(math.log(6))
    for constraint in ("U_a", "U_ab"):
        assert float(InverseTransport(constraint=constraint)(same, same)) == pytest.approx(math.log(7))


def simcse_slow(h: Tensor, positive: Tensor, hard: Tensor, tau: float, alpha: float) -> float:
    def cosine(a: Tensor, b: Tensor) -> float:
        return float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))

    total = 0.0
    for i in range(len(h)):
        below = 0.0
        for j in range(len(h)):
            below += math.exp(cosine(h[i], positive[j]) / tau)
            below += (alpha if i == j else 1.0) * math.exp(cosine(h[i], hard[j]) / tau)
        total -= math.log(math.exp(cosine(h[i], positive[i]) / tau) / below)
    return total / len(h)


def test_simcse_is_its_equation() -> None:
    h, positive = noise()
    hard, _ = noise(seed=1)
    found = InfoNCE(0.1, negative_weight=3.0)(h, positive, negatives=hard)
    assert float(found) == pytest.approx(simcse_slow(h, positive, hard, 0.1, 3.0), rel=1e-12)


def test_a_survey_puts_the_queries_below() -> None:
    h, positive = noise()
    found = InfoNCE(0.1)(h, positive, candidates=h)
    cosines, own = normalize(h) @ normalize(h).T / 0.1, (normalize(h) * normalize(positive)).sum(1) / 0.1
    torch.testing.assert_close(found, (cosines.logsumexp(1) - own).mean())


def test_clip_worked_numbers() -> None:
    image, metrics = tensor(A).requires_grad_(), dict[str, Tensor]()
    t = torch.tensor(math.log(5.0), dtype=torch.float64, requires_grad=True)
    loss = SymmetricInfoNCE()(image, tensor(B), t.exp(), metrics=metrics)
    loss.backward()
    assert image.grad is not None
    assert t.grad is not None
    assert float(loss.detach()) == pytest.approx(0.30674312, abs=1e-8)
    assert float(metrics["image_to_text"]) == pytest.approx(0.33528295, abs=1e-8)
    assert float(metrics["text_to_image"]) == pytest.approx(0.27820328, abs=1e-8)
    assert image.grad[0].tolist() == pytest.approx([-0.05596954, 0.23454877, -0.13458854], abs=1e-8)
    assert float(t.grad) == pytest.approx(-0.14701499, abs=1e-8)


def test_clip_is_two_info_nces() -> None:
    one, two = noise()
    found = SymmetricInfoNCE()(one, two, torch.tensor(4.0, dtype=torch.float64))
    torch.testing.assert_close(found, (InfoNCE(0.25)(one, two) + InfoNCE(0.25)(two, one)) / 2)
    torch.testing.assert_close(found, SymmetricInfoNCE()(two, one, torch.tensor(4.0, dtype=torch.float64)))


# Inverse transport


@pytest.mark.parametrize(
    ("constraint", "sweeps", "expected"),
    [
        ("U_1", 5, 0.38640625),
        ("U_a", 5, 0.33528295),
        ("U_ab", 1, 0.27197934),
        ("U_ab", 5, 0.21708932),
        ("U_ab", 2000, 0.20402858),
    ],
)
def test_inverse_transport_worked_numbers(constraint: str, sweeps: int, expected: float) -> None:
    assert float(InverseTransport(0.2, constraint, sweeps)(tensor(A), tensor(B))) == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize(
    ("sweeps", "gradient", "expected"),
    [
        (5, "unroll", [-0.01900114, 0.05042238, -0.06029393]),
        (2000, "envelope", [-0.01850826, 0.04915219, -0.0587111]),
        (2000, "unroll", [-0.01850826, 0.04915219, -0.0587111]),
    ],
)
def test_inverse_transport_gradients(sweeps: int, gradient: str, expected: list[float]) -> None:
    view = tensor(A).requires_grad_()
    InverseTransport(0.2, sweeps=sweeps, gradient=gradient)(view, tensor(B)).backward()
    assert view.grad is not None
    assert view.grad[0].tolist() == pytest.approx(expected, abs=1e-8)


def test_uniformity_worked_number() -> None:
    assert float(uniformity_penalty(row_masses(COSINES / 0.2))) == pytest.approx(0.21744764, abs=1e-8)


def test_rows_alone_are_info_nce() -> None:
    one, two = noise()
    torch.testing.assert_close(InverseTransport(0.3, "U_a")(one, two), InfoNCE(0.3)(one, two))


def test_a_converged_plan() -> None:
    kernel = COSINES / 0.2
    plan = both_masses(kernel, 2000).exp()
    torch.testing.assert_close(plan.sum(0), torch.full((4,), 0.25, dtype=torch.float64))
    torch.testing.assert_close(plan.sum(1), torch.full((4,), 0.25, dtype=torch.float64))
    moved = kernel + torch.randn(4, 1, dtype=torch.float64) + torch.randn(1, 4, dtype=torch.float64)
    torch.testing.assert_close(both_masses(moved, 2000).exp(), plan)


@pytest.mark.parity
def test_plans_like_pots() -> None:
    ot = pytest.importorskip("ot")
    uniform = [0.25] * 4
    cost = (1 - COSINES).numpy()
    theirs = torch.from_numpy(ot.sinkhorn(uniform, uniform, cost, reg=0.2, stopThr=1e-14, numItermax=10000))
    torch.testing.assert_close(both_masses(COSINES / 0.2, 2000).exp(), theirs, rtol=1e-9, atol=1e-12)
    # POT's entropy term is sum P (log P - 1), as ours.
    soft = ot.unbalanced.sinkhorn_unbalanced(
        uniform, uniform, cost, reg=0.2, reg_m=1.0, reg_type="entropy", stopThr=1e-15, numItermax=10000
    )
    ours = soft_masses(-(1 - COSINES) / 0.2, 1 / 1.2, 5000).exp()
    torch.testing.assert_close(ours, torch.from_numpy(soft), rtol=1e-6, atol=1e-9)


@pytest.mark.parity
def test_token_costs_like_pots() -> None:
    ot = pytest.importorskip("ot")
    draw = torch.Generator().manual_seed(0)
    patches = torch.randn(2, 5, 3, generator=draw, dtype=torch.float64)
    words = torch.randn(3, 4, 3, generator=draw, dtype=torch.float64)
    present = tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]]) > 0
    found = token_transport(patches, words, present, 0.1, 3000)
    for image in range(2):
        for text in range(3):
            kept = words[text][present[text]]
            cost = (1 - normalize(patches[image]) @ normalize(kept).T).numpy()
            plan = ot.sinkhorn([0.2] * 5, [1 / len(kept)] * len(kept), cost, reg=0.1, stopThr=1e-14, numItermax=10000)
            assert float(found[image, text]) == pytest.approx(float((plan * cost).sum()), rel=1e-7)


def test_exact_token_cost() -> None:
    everything = torch.ones(1, 4, dtype=torch.bool)
    found = token_transport(tensor([A]), tensor([B]), everything, 0.002, 2000)
    assert float(found) == pytest.approx(0.31280969, abs=5e-5)


# OT-CLIP


def test_ot_clip_worked_numbers() -> None:
    image, text = tensor(A), tensor(B)
    assert float(TransportCLIP("clip", 0.2)(image, text)) == pytest.approx(0.30674312, abs=1e-8)
    assert float(TransportCLIP("sinkhorn", 0.2)(image, text)) == pytest.approx(0.21708932, abs=1e-8)
    log_plan = bounded_columns(-(1 - COSINES), 0.248, 0.253, 5)
    assert float(matching_loss(log_plan)) == pytest.approx(0.83753173, abs=1e-8)
    sums = [0.24831413, 0.24830844, 0.253, 0.25019559]
    assert log_plan.exp().sum(0).tolist() == pytest.approx(sums, abs=1e-8)
    structure = [1 - normalize(tensor(side)) @ normalize(tensor(side)).T for side in (A, B)]
    fused = fused_gromov(1 - COSINES, (structure[0], structure[1]), 0.5, 0.2, row_masses, 3)
    assert float(matching_loss(fused)) == pytest.approx(0.29193766, abs=1e-8)
    assert fused.exp().diagonal().tolist() == pytest.approx([0.22092932, 0.09315681, 0.24995588, 0.23620064], abs=1e-8)
    assert float(TransportCLIP("fused_gromov", 0.2, 3, 0.5)(image, text)) == pytest.approx(0.29193766, abs=1e-8)


def test_ot_clip_limits() -> None:
    one, two = noise()
    torch.testing.assert_close(
        TransportCLIP("double_bounded", 0.2, 500, bounds=(1.0, 1.0))(one, two),
        TransportCLIP("sinkhorn", 0.2, 500)(one, two),
    )
    torch.testing.assert_close(TransportCLIP("fused_gromov", 0.2, alpha=0.0)(one, two), InfoNCE(0.2)(one, two))
    torch.testing.assert_close(
        TransportCLIP("unbalanced", 0.2, 500, alpha=0.0, marginal_weight=1e9)(one, two),
        TransportCLIP("sinkhorn", 0.2, 500)(one, two),
        rtol=1e-6,
        atol=1e-6,
    )


# Skip-gram


def test_skip_gram_worked_numbers() -> None:
    word = tensor([[0.5, -0.2, 0.3]]).requires_grad_()
    neighbour, others = tensor([[0.4, 0.1, 0.2]]), tensor([[[-0.3, 0.6, 0.1], [0.7, 0.2, -0.5]]])
    loss = NegativeSampling()(word, neighbour, others)
    loss.backward()
    assert word.grad is not None
    assert float(loss) == pytest.approx(1.93700371, abs=1e-8)
    assert word.grad[0].tolist() == pytest.approx([0.06973997, 0.32812615, -0.31398608], abs=1e-8)
    survey = NegativeSampling(negatives=False)(word, neighbour, others)
    assert float(survey) == pytest.approx(0.58032997, abs=1e-8)
    torch.testing.assert_close(NegativeSampling()(3 * word, neighbour / 3, others / 3), loss)
    zero = torch.zeros(1, 3, dtype=torch.float64)
    assert float(NegativeSampling()(zero, zero, others * 0)) == pytest.approx(3 * math.log(2))
    skipped = NegativeSampling()(word, neighbour, others, torch.zeros(1, 2, dtype=torch.bool))
    torch.testing.assert_close(skipped, survey)


def test_skip_gram_distributions() -> None:
    found = noise_distribution(torch.tensor([100, 10, 1]))
    assert found.tolist() == pytest.approx([0.82682162, 0.14703199, 0.0261464], abs=1e-8)
    assert noise_distribution(torch.tensor([0, 10, 0]), 0.0).tolist() == [0, 1, 0]
    frequency = tensor([0.01])
    assert 1 - float(keep_probability(frequency)) == pytest.approx(0.96837722, abs=1e-8)
    assert float(keep_probability(frequency, rule="code")) == pytest.approx(0.03262278, abs=1e-8)
    assert float(keep_probability(tensor([1e-9]))) == 1


def test_no_pair_at_all() -> None:
    empty = torch.zeros(0, 3, requires_grad=True)
    loss = NegativeSampling()(empty, empty, torch.zeros(0, 2, 3))
    loss.backward()
    assert float(loss) == 0


# Con2R

PLACES = ([[[0, 0, 0], [1, 2, 1]]], [[[0, 1, 0], [2, 3, 2]]])
POSTERIORS = ([[[0.7, 0.2, 0.1], [0.1, 0.6, 0.3]]], [[[0.6, 0.3, 0.1], [0.2, 0.2, 0.6]]])


def test_con2r_worked_numbers() -> None:
    queries, neighbours = tensor([A[:2]]).requires_grad_(), tensor([B[:2]]).requires_grad_()
    loss = GraphConstraint(0.5, (2, 4, 4))
    near = loss.overlap(tensor(PLACES[0]), tensor(PLACES[1]))
    torch.testing.assert_close(near, tensor([[[0.75, 1e-7], [0.28125, 0.28125]]]))
    alike = agreement(tensor(POSTERIORS[0]), tensor(POSTERIORS[1]))
    assert alike.flatten().tolist() == pytest.approx([0.97240705, 0.46713798, 0.51593568, 0.69882712], abs=1e-8)
    value = loss(queries, neighbours, *map(tensor, (*PLACES, *POSTERIORS)))
    value.backward()
    assert float(value) == pytest.approx(0.66013675, abs=1e-8)
    assert queries.grad is not None
    assert neighbours.grad is not None
    assert queries.grad[0, 0].tolist() == pytest.approx([-0.02085257, 0.00695086, -0.00695086], abs=1e-8)
    assert neighbours.grad[0, 0].tolist() == pytest.approx([-0.03038111, 0.01772231, 0.01519056], abs=1e-8)


def test_con2r_changes_sides() -> None:
    sides = [tensor([A[:2]]), tensor([B[:2]]), *map(tensor, (*PLACES, *POSTERIORS))]
    turned = [sides[place] for place in (1, 0, 3, 2, 5, 4)]
    loss = GraphConstraint(0.3, (2, 4, 4))
    torch.testing.assert_close(loss(*sides), loss(*turned))
