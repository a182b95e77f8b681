"""Losses over views with queues, banks and drawn negatives: worked numbers, slow references, parity, invariants."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from armillary import losses
from armillary.losses.conditional_contrast import ConditionalContrastive
from armillary.losses.decoupled import DecoupledContrastive
from armillary.losses.future_contrast import FutureContrast
from armillary.losses.instances import (
    InvariantSpread,
    NoiseContrastive,
    NonParametricSoftmax,
    SampledInstances,
    cosines_at,
)
from armillary.losses.key_contrast import BatchKeyContrast, KeyContrast, QueuedNTXent
from armillary.losses.support_set import SupportSet
from armillary.losses.tensors import normalize

A = [[0.5, -1.2, 0.3], [1.0, 0.4, -0.7], [-0.8, 0.9, 0.1], [0.2, -0.5, 1.1]]
B = [[0.6, -1.0, 0.1], [0.8, 0.6, -0.9], [-0.7, 1.1, -0.2], [0.0, -0.4, 1.3]]
C = [[0.1, -0.9, 0.5], [1.1, 0.2, -0.4], [-0.6, 0.7, 0.3], [0.3, -0.6, 0.9]]
D = [[0.4, -1.1, 0.4], [0.9, 0.5, -0.6], [-0.9, 0.8, 0.0], [0.1, -0.3, 1.2]]
QUEUE = [[1.0, 1.0, 0.0], [0.0, 1.0, 1.0], [1.0, 0.0, 1.0], [-1.0, 1.0, 0.0], [0.0, -1.0, 1.0]]


def rows(values: list[list[float]], grad: bool = False) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=grad)


def unit(values: list[list[float]]) -> Tensor:
    return normalize(rows(values))


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Worked numbers.


@pytest.mark.parametrize(("temperature", "expected"), [(0.07, 0.37666976), (0.2, 0.58187971)])
def test_key_contrast_worked_numbers(temperature: float, expected: float) -> None:
    assert float(KeyContrast(temperature)(rows(A), rows(B), unit(QUEUE))) == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize(
    ("temperature", "expected"), [(0.2, (0.01989847, 0.07198004, 0.09187851)), (1.0, (None, None, 2.8125622))]
)
def test_batch_key_contrast_worked_numbers(temperature: float, expected: tuple[float | None, ...]) -> None:
    loss = BatchKeyContrast(temperature)
    first, second = loss(rows(A), rows(B)), loss(rows(C), rows(D))
    for found, number in zip((first, second, first + second), expected, strict=True):
        assert number is None or float(found) == pytest.approx(number, abs=1e-7)


def test_decoupled_worked_numbers() -> None:
    z1 = rows(A, grad=True)
    loss = DecoupledContrastive(0.1)(z1, rows(B))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(-6.28312225, abs=1e-8)
    assert z1.grad is not None
    assert z1.grad[0].tolist() == pytest.approx([-0.46493015, 0.33457089, 2.11316715], abs=1e-8)
    weighted = DecoupledContrastive(0.1, 0.5, weighted=True)
    weights = weighted.weights((unit(A) * unit(B)).sum(1))
    assert weights.tolist() == pytest.approx([0.98273246, 1.00965605, 1.02229057, 0.98532093], abs=1e-8)
    assert float(weights.mean()) == pytest.approx(1, abs=1e-12)
    assert float(weighted(rows(A), rows(B))) == pytest.approx(-6.2817401, abs=1e-7)


def test_softmax_over_a_bank_worked_number() -> None:
    loss = NonParametricSoftmax(0.07)
    assert float(loss(rows(A[:1]), unit(QUEUE), torch.tensor([3]))) == pytest.approx(24.23350227, abs=1e-8)
    total = sum(math.exp(-float(loss(rows(A[:1]), unit(QUEUE), torch.tensor([row])))) for row in range(5))
    assert total == pytest.approx(1)


def test_noise_contrast_worked_numbers() -> None:
    loss = NoiseContrastive(0.5, images=5)
    v = unit(A[:1])
    found = loss(v @ unit(QUEUE)[3], cosines_at(v, unit(QUEUE), torch.tensor([[0, 1, 4]])))
    assert float(found) == pytest.approx(4.25870161, abs=1e-7)
    loss.double().freeze()
    assert float(loss.log_normaliser.exp()) == pytest.approx(7.41257723, abs=1e-8)
    log_p = float(v @ unit(QUEUE)[3]) / 0.5 - float(loss.log_normaliser)
    assert math.exp(log_p) / (math.exp(log_p) + 3 / 5) == pytest.approx(0.03576556, abs=1e-8)


def test_the_normaliser_of_the_first_batch_stays() -> None:
    loss = NoiseContrastive(0.5, images=50).double()
    first, second = noise(4, 6, seed=1).tanh(), noise(4, 6, seed=2).tanh()
    loss(first[:, 0], first[:, 1:])
    loss.freeze()
    kept = loss.log_normaliser.clone()
    loss(second[:, 0], second[:, 1:])
    loss.freeze()
    assert torch.equal(loss.log_normaliser, kept)
    assert float(kept) == pytest.approx(math.log(50 * float((first / 0.5).exp().mean())))


def test_sampled_instances_worked_numbers() -> None:
    loss, drawn = SampledInstances(0.5), torch.tensor([[0, 1, 2]])
    own = unit([[0.5, -1.0, 0.2]])
    found = []
    for projection in ([[0.6, -1.0, 0.1]], [[0.5, -1.2, 0.3]]):
        v = unit(projection)
        found.append(float(loss((v * own).sum(1), cosines_at(v, unit(QUEUE), drawn))))
    assert found == pytest.approx([0.71361802, 0.69571235], abs=1e-8)
    assert sum(found) / 2 == pytest.approx(0.70466519, abs=1e-8)


def test_invariant_spread_worked_numbers() -> None:
    metrics: dict[str, Tensor] = {}
    assert float(4 * InvariantSpread(0.5)(rows(A), rows(B), metrics=metrics)) == pytest.approx(2.45908428, abs=1e-8)
    assert float(4 * metrics["invariant"]) == pytest.approx(1.25527074, abs=1e-8)
    assert float(4 * metrics["spreading"]) == pytest.approx(1.20381354, abs=1e-8)
    assert float(InvariantSpread(0.5, variant="code")(rows(A), rows(B))) == pytest.approx(1.0071902, abs=1e-8)


def test_conditional_contrast_worked_numbers() -> None:
    loss = ConditionalContrastive(2, 3, 1.0, reduction="none").double()
    with torch.no_grad():
        loss.weight.copy_(rows([[0.2, -1.0, 0.5], [0.9, 0.3, -0.2]]))
    found = loss(rows(A), torch.tensor([0, 1, 0, 1]))
    assert found.tolist() == pytest.approx([0.65297779, 0.4137748, 0.96238577, 1.01843415], abs=1e-8)
    assert float(found.detach().mean()) == pytest.approx(0.76189313, abs=1e-8)


def test_support_set_worked_numbers() -> None:
    loss = SupportSet(0.1)
    weights = loss.weights(unit(A), unit(B))
    assert weights[0].tolist() == pytest.approx([0, 0.00030917, 4.5e-07, 0.99969038], abs=1e-8)
    assert loss.mixture(rows(A), rows(B))[0].tolist() == pytest.approx([0.00018361, -0.29385654, 0.95527619], abs=1e-8)
    torch.testing.assert_close(weights.sum(1), torch.ones(4, dtype=torch.float64))


def test_future_contrast_worked_number() -> None:
    """The candidates are the parts of the batch; here three sequences of two parts whose first is far from all."""
    matrix = rows([[0.5, 0.1, 0.0], [-0.2, 0.4, 0.3], [0.1, 0.0, 0.6]])
    z, context = rows(A[:3]), rows(C[:3])
    far = torch.zeros(3, 1, 4, dtype=torch.float64)
    far[..., 3] = -1e4
    parts = torch.cat([far, torch.cat([z, torch.zeros(3, 1, dtype=torch.float64)], 1)[:, None]], 1)
    predicted = torch.cat([context @ matrix.T, torch.ones(3, 1, dtype=torch.float64)], 1)[:, None]
    found = float(FutureContrast()(parts, [predicted]))
    assert found == pytest.approx(0.70895032, abs=1e-8)
    assert math.log(3) - found == pytest.approx(0.38966197, abs=1e-8)


# The equations by loops.


def log_share(chosen: float, everything: list[float]) -> float:
    return -math.log(math.exp(chosen) / sum(math.exp(value) for value in everything))


def key_contrast_slow(q: Tensor, k: Tensor) -> float:
    queue = normalize(noise(7, 5, seed=9))
    total = 0.0
    for n in range(len(q)):
        positive = float(q[n] @ k[n] / (q[n].norm() * k[n].norm())) / 0.3
        total += log_share(positive, [positive, *(float(q[n] @ row / q[n].norm()) / 0.3 for row in queue)])
    return total / len(q)


def cosine(left: Tensor, right: Tensor) -> float:
    return float(left @ right / (left.norm() * right.norm()))


def batch_keys_slow(q: Tensor, k: Tensor) -> float:
    n = len(q)
    return (
        sum(
            2 * 0.3 * log_share(cosine(q[i], k[i]) / 0.3, [cosine(q[i], k[j]) / 0.3 for j in range(n)])
            for i in range(n)
        )
        / n
    )


def decoupled_slow(z1: Tensor, z2: Tensor) -> float:
    z, n = torch.cat([z1, z2]), len(z1)
    total = 0.0
    for i in range(2 * n):
        others = [math.exp(cosine(z[i], z[j]) / 0.3) for j in range(2 * n) if j % n != i % n]
        total += math.log(sum(others)) - cosine(z[i], z[(i + n) % (2 * n)]) / 0.3
    return total / (2 * n)


def spread_slow(f: Tensor, g: Tensor) -> float:
    n, total = len(f), 0.0
    for i in range(n):
        total += log_share(cosine(f[i], g[i]) / 0.3, [cosine(f[k], g[i]) / 0.3 for k in range(n)])
        for j in range(n):
            if j != i:
                share = math.exp(-log_share(cosine(f[i], f[j]) / 0.3, [cosine(f[k], f[j]) / 0.3 for k in range(n)]))
                total -= math.log(1 - share)
    return total / n


def spread_code_slow(f: Tensor, g: Tensor) -> float:
    x, m = torch.cat([f, g]), len(f)
    total = 0.0
    for a in range(2 * m):
        partner = (a + m) % (2 * m)
        e = {k: math.exp(cosine(x[a], x[k]) / 0.3) for k in range(2 * m) if k != a}
        all_of = sum(e.values())
        total -= math.log(e[partner] / all_of)
        total -= sum(math.log(1 - e[k] / all_of) for k in e if k != partner)
    return total / (2 * m)


def queued_slow(z1: Tensor, z2: Tensor) -> float:
    z, n, queue = torch.cat([z1, z2]), len(z1), noise(7, 5, seed=9)
    total = 0.0
    for i in range(2 * n):
        positive = cosine(z[i], z[(i + n) % (2 * n)]) / 0.3
        everything = [cosine(z[i], z[k]) / 0.3 for k in range(2 * n) if k != i]
        total += log_share(positive, everything + [cosine(z[i], row) / 0.3 for row in queue])
    return total / (2 * n)


def with_queue(loss: torch.nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda left, right: loss(left, right, normalize(noise(7, 5, seed=9)))


TWO_VIEWS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor, Tensor], float]]] = {
    "key_contrast": (with_queue(KeyContrast(0.3)), key_contrast_slow),
    "batch_keys": (BatchKeyContrast(0.3), batch_keys_slow),
    "decoupled": (DecoupledContrastive(0.3), decoupled_slow),
    "spread_paper": (InvariantSpread(0.3), spread_slow),
    "spread_code": (InvariantSpread(0.3, variant="code"), spread_code_slow),
    "queued_nt_xent": (with_queue(QueuedNTXent(0.3)), queued_slow),
}


@pytest.mark.parametrize("name", TWO_VIEWS)
def test_is_its_equation(name: str) -> None:
    loss, slow = TWO_VIEWS[name]
    one, other = noise(6, 5), noise(6, 5, seed=1)
    assert float(loss(one, other)) == pytest.approx(slow(one, other), rel=1e-10)


@pytest.mark.parametrize("name", TWO_VIEWS)
def test_order_and_length_do_not_matter(name: str) -> None:
    loss, _ = TWO_VIEWS[name]
    one, other = noise(6, 5), noise(6, 5, seed=1)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    torch.testing.assert_close(loss(one[order], other[order]), loss(one, other))
    torch.testing.assert_close(loss(3 * one, other * noise(6, 1, seed=2).exp()), loss(one, other))


# Invariants.


def test_nothing_flows_to_keys_and_queue() -> None:
    q, k, own = noise(4, 5).requires_grad_(), noise(4, 5, seed=1).requires_grad_(), noise(4, 2, 5, seed=2)
    queue = normalize(noise(7, 5, seed=3)).requires_grad_()
    loss = KeyContrast()(q, k, queue, own_negatives=own.requires_grad_()) + BatchKeyContrast()(q, k)
    loss.backward()
    assert q.grad is not None
    assert k.grad is queue.grad is own.grad is None


def test_what_a_queue_row_does() -> None:
    q, k, queue = noise(4, 5), noise(4, 5, seed=1), normalize(noise(7, 5, seed=2))
    loss = KeyContrast(0.2)
    value = loss(q, k, queue)
    torch.testing.assert_close(loss(q, k, queue[[6, 2, 0, 1, 5, 4, 3]]), value)
    assert float(loss(q, k, queue[:0])) == 0
    assert loss(q, k, torch.cat([queue, queue[:1]])) > value
    assert loss(q, k, torch.cat([queue, normalize(k[:1])])) > value


def test_own_negatives_are_of_one_query() -> None:
    """Space 1 of leave-one-out contrast with one augmentation: the image's other key is a negative."""
    loss = KeyContrast(0.2)
    first = loss(rows(A[:1]), rows(B[:1]), unit(QUEUE[:3]))
    second = loss(rows(C[:1]), rows(B[:1]), unit(QUEUE[2:5]), own_negatives=rows(D[:1])[:, None])
    assert float(first) == pytest.approx(0.06200223, abs=1e-8)
    assert float(second) == pytest.approx(1.58035617, abs=1e-8)
    assert float(first + second) / 2 == pytest.approx(0.8211792, abs=1e-8)


def test_an_image_cannot_be_told_from_its_twin() -> None:
    k = noise(4, 5)
    twin = KeyContrast(0.2, reduction="none")(noise(4, 5, seed=1), k, k[:0], own_negatives=k[:, None])
    torch.testing.assert_close(twin, torch.full((4,), math.log(2), dtype=torch.float64))


def test_equal_embeddings() -> None:
    same = torch.ones(6, 5, dtype=torch.float64)
    assert float(BatchKeyContrast(0.3)(same, same)) == pytest.approx(2 * 0.3 * math.log(6))
    spread = math.log(6) - 5 * math.log(1 - 1 / 6)
    assert float(InvariantSpread(0.3)(same, same)) == pytest.approx(spread)
    assert float(DecoupledContrastive(0.3)(same, same)) == pytest.approx(math.log(10))


def test_an_empty_queue_is_nt_xent() -> None:
    one, other = noise(6, 5), noise(6, 5, seed=1)
    expected = losses.NTXent(0.3)(one, other)
    torch.testing.assert_close(QueuedNTXent(0.3)(one, other, one[:0]), expected)
    assert QueuedNTXent(0.3)(one, other, normalize(noise(3, 5, seed=2))) > expected


def test_decoupled_is_below_nt_xent_and_forgets_its_order() -> None:
    one, other = noise(6, 5), noise(6, 5, seed=1)
    loss = DecoupledContrastive(0.3)
    assert loss(one, other) < losses.NTXent(0.3)(one, other)
    torch.testing.assert_close(loss(other, one), loss(one, other))
    assert float(loss(one[:1], other[:1])) == 0


def test_all_but_the_anchor_is_a_constant_in_the_code() -> None:
    f, g = noise(6, 5).requires_grad_(), noise(6, 5, seed=1)
    loss = InvariantSpread(0.3, variant="code")
    (slope,) = torch.autograd.grad(loss(f, g), f)
    moved = torch.zeros_like(g)
    moved[0, 0] = 1e-6
    whole = float(loss(f.detach() + moved, g) - loss(f.detach() - moved, g)) / 2e-6
    assert abs(float(slope[0, 0]) - whole) > 0.01


def test_a_pair_that_moves_together_lowers_the_loss() -> None:
    f, g = noise(6, 5), noise(6, 5, seed=1)
    nearer = g.clone()
    nearer[2] = g[2] / g[2].norm() + f[2] / f[2].norm()
    assert InvariantSpread(0.3)(f, nearer) < InvariantSpread(0.3)(f, g)


def test_products_either_way() -> None:
    v, bank = noise(3, 4), noise(40, 4, seed=1)
    few, many = torch.randint(40, (3, 2)), torch.randint(40, (3, 30))
    for places in (few, many):
        torch.testing.assert_close(cosines_at(v, bank, places), torch.einsum("bd,bmd->bm", v, bank[places]))


def test_rows_that_do_not_count() -> None:
    v, bank, index = noise(3, 4), normalize(noise(10, 4, seed=1)), torch.tensor([1, 2, 9])
    counted = torch.arange(10) < 5
    loss = NonParametricSoftmax(0.3)
    # The last image's own row counts although it is not among them.
    cut = loss(v[:2], bank[:5], index[:2]) * 2 + loss(v[2:], torch.cat([bank[:5], bank[9:]]), torch.tensor([5]))
    torch.testing.assert_close(loss(v, bank, index, counted), cut / 3)


def test_conditional_contrast_by_loops_and_at_its_ends() -> None:
    loss = ConditionalContrastive(3, 5, 0.4).double()
    x, labels = noise(6, 5), torch.tensor([0, 1, 2, 0, 1, 0])
    total = 0.0
    for i in range(6):
        proxy = math.exp(cosine(x[i], loss.weight[labels[i]].detach()) / 0.4)
        others = {k: math.exp(cosine(x[i], x[k]) / 0.4) for k in range(6) if k != i}
        same = sum(value for k, value in others.items() if labels[k] == labels[i])
        total -= math.log((proxy + same) / (proxy + sum(others.values())))
    assert float(loss(x, labels)) == pytest.approx(total / 6, rel=1e-10)
    assert float(loss(x, torch.ones_like(labels))) == pytest.approx(0, abs=1e-12)
    with pytest.raises(ValueError, match="label 7"):
        loss(x, labels + 7)


def test_support_set_at_its_ends() -> None:
    t, v = noise(6, 5), noise(6, 5, seed=1)
    torch.testing.assert_close(SupportSet()(t[:2], v[:2], t[:2]), SupportSet(weight=0)(t[:2], v[:2], t[:2]))
    torch.testing.assert_close(SupportSet().mixture(t[:2], v[:2]), normalize(v[:2]).flip(0))
    cosines = (normalize(t) @ normalize(v).T).fill_diagonal_(-2)
    torch.testing.assert_close(SupportSet(1e-4).mixture(t, v), normalize(v)[cosines.argmax(1)])
    assert SupportSet(exclude_self=False).weights(normalize(t), normalize(v)).diagonal().min() > 0


def test_future_contrast_by_loops() -> None:
    parts = noise(3, 4, 5)
    predicted = [noise(3, 3, 5, seed=1), noise(3, 2, 5, seed=2)]
    expected = 0.0
    for k, of_step in enumerate(predicted, start=1):
        for i in range(3):
            for t in range(4 - k):
                scores = [float(of_step[i, t] @ parts[j, s]) for j in range(3) for s in range(4)]
                expected += log_share(scores[4 * i + t + k], scores) / (3 * (4 - k))
    assert float(FutureContrast()(parts, predicted)) == pytest.approx(expected, rel=1e-10)


# Public packages.


def gradients(loss: Callable[[Tensor, Tensor], Tensor], keys_learn: bool = True) -> tuple[Tensor, Tensor]:
    one, other = noise(8, 5).requires_grad_(), noise(8, 5, seed=1).requires_grad_(keys_learn)
    value = loss(one, other)
    value.backward()
    assert one.grad is not None
    return value.detach(), one.grad


@pytest.mark.parity
@pytest.mark.parametrize("weighted", [False, True])
def test_decoupled_like_lightly(weighted: bool) -> None:
    lightly = pytest.importorskip("lightly.loss")
    theirs = lightly.DCLWLoss(0.2) if weighted else lightly.DCLLoss(0.2)
    torch.testing.assert_close(
        gradients(DecoupledContrastive(0.2, weighted=weighted)), gradients(theirs), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parity
def test_key_contrast_like_lightly() -> None:
    """Theirs writes the keys into the bank inside the loss; ours leaves that to the end of the step."""
    lightly = pytest.importorskip("lightly.loss")
    theirs = lightly.NTXentLoss(0.2, memory_bank_size=(16, 5)).double()
    queue = theirs.memory_bank.bank.clone()
    ours = KeyContrast(0.2)
    expected = gradients(theirs, keys_learn=False)
    torch.testing.assert_close(gradients(lambda q, k: ours(q, k, queue)), expected, rtol=1e-5, atol=1e-5)
    assert not torch.equal(theirs.memory_bank.bank, queue)


def test_copies_of_losses_with_state() -> None:
    loss = NoiseContrastive(0.5, 10)
    loss(torch.rand(3), torch.rand(3, 4))
    assert copy.deepcopy(loss).frozen == loss.frozen
