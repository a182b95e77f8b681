"""VICReg, Barlow Twins, ARB: worked numbers, slow references, the public implementations, what must not change them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from armillary import collectives
from armillary.losses.decorrelation import AlignWithBase, BarlowTwins, VICReg
from armillary.testing.gloo_pool import shared_pool

VIEW1 = [[0.5, -1.2, 0.3], [1.0, 0.4, -0.7], [-0.8, 0.9, 0.1], [0.2, -0.5, 1.1]]
VIEW2 = [[0.6, -1.0, 0.1], [0.8, 0.6, -0.9], [-0.7, 1.1, -0.2], [0.0, -0.4, 1.3]]


def views(grad: bool = False) -> tuple[Tensor, Tensor]:
    return torch.tensor(VIEW1, dtype=torch.float64, requires_grad=grad), torch.tensor(VIEW2, dtype=torch.float64)


def noise(n: int = 16, d: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    one = torch.randn(n, d, generator=draw, dtype=torch.float64)
    return one, one + 0.5 * torch.randn(n, d, generator=draw, dtype=torch.float64)


@pytest.mark.parametrize(
    ("variant", "invariance", "variance", "loss"),
    [
        ("paper", 0.11, 0.34129019, 11.68495607),
        ("pseudo", 0.03666667, 0.34129019, 9.85162274),
        ("code", 0.03666667, 0.17064509, 5.5854954),
    ],
)
def test_vicreg_worked_numbers(variant: str, invariance: float, variance: float, loss: float) -> None:
    metrics: dict[str, Tensor] = {}
    found = VICReg(variant=variant)(*views(), metrics=metrics)
    assert float(found) == pytest.approx(loss, abs=1e-8)
    assert float(metrics["invariance"]) == pytest.approx(invariance, abs=1e-8)
    assert float(metrics["variance"]) == pytest.approx(variance, abs=1e-8)
    assert float(metrics["covariance"]) == pytest.approx(0.40270139, abs=1e-8)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (VICReg(), [-0.77713697, 0.74839394, 0.78768786]),
        (BarlowTwins(eps=0), [-0.0037065, 0.00089169, 0.00252704]),
        (AlignWithBase(shrink=0), [0.04670153, 0.06133423, 0.14477593]),
    ],
    ids=["vicreg", "barlow", "arb"],
)
def test_worked_gradients(loss: torch.nn.Module, expected: list[float]) -> None:
    view1, view2 = views(grad=True)
    loss(view1, view2).backward()
    assert view1.grad is not None
    assert view1.grad[0].tolist() == pytest.approx(expected, abs=1e-8)


def test_barlow_worked_numbers() -> None:
    assert float(BarlowTwins(eps=0)(*views())) == pytest.approx(0.00655756, abs=1e-8)
    assert barlow_slow(0.005) == pytest.approx(0.00655756, abs=1e-8)
    assert float(BarlowTwins(redundancy=0.0051, eps=1e-5)(*views())) == pytest.approx(0.00667681, abs=1e-8)


def barlow_slow(redundancy: float) -> float:
    """The loss by loops over channels and samples."""
    left, right = (torch.tensor(view, dtype=torch.float64) for view in (VIEW1, VIEW2))
    left, right = left - left.mean(0), right - right.mean(0)
    total = 0.0
    for i in range(3):
        for j in range(3):
            dot = sum(float(left[b, i] * right[b, j]) for b in range(4))
            correlation = dot / math.sqrt(float((left[:, i] ** 2).sum()) * float((right[:, j] ** 2).sum()))
            total += (1 - correlation) ** 2 if i == j else redundancy * correlation**2
    return total


def test_arb_worked_numbers() -> None:
    loss = AlignWithBase(shrink=0)
    view1, view2 = views()
    base = loss.base(loss.standardised(view1))
    torch.testing.assert_close(base.T @ base / 3, torch.eye(3, dtype=torch.float64))
    assert base[0].tolist() == pytest.approx([-0.13027191, -1.44979054, -0.36212791], abs=1e-8)
    assert float(loss(view1, view2)) == pytest.approx(0.63139965, abs=1e-8)
    assert float(AlignWithBase()(view1, view2)) == pytest.approx(0.63152909, abs=1e-8)


def vicreg_slow(view1: Tensor, view2: Tensor) -> float:
    """The paper's equation by loops."""
    n, d = view1.shape
    s = sum(float(((view1[i] - view2[i]) ** 2).sum()) for i in range(n)) / n
    v = c = 0.0
    for view in (view1, view2):
        mean = view.mean(0)
        for i in range(d):
            for j in range(d):
                covariance = sum(float((view[b, i] - mean[i]) * (view[b, j] - mean[j])) for b in range(n)) / (n - 1)
                if i == j:
                    v += max(0.0, 1 - math.sqrt(covariance + 1e-4)) / d
                else:
                    c += covariance**2 / d
    return 25 * s + 25 * v + c


def test_vicreg_is_its_equation() -> None:
    view1, view2 = noise()
    assert float(VICReg(variant="paper")(view1, view2)) == pytest.approx(vicreg_slow(view1, view2), rel=1e-12)


@pytest.mark.parametrize("loss", [VICReg(), BarlowTwins(), AlignWithBase()], ids=["vicreg", "barlow", "arb"])
def test_what_changes_nothing(loss: torch.nn.Module) -> None:
    view1, view2 = noise()
    value = loss(view1, view2)
    torch.testing.assert_close(loss(view2, view1), value)
    torch.testing.assert_close(loss(view1 + 3, view2 + 3), value)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(loss(view1[:, order], view2[:, order]), value)


def test_more_channels_than_samples() -> None:
    """Sums over channels are then taken over samples; the equations by loops say the same."""
    view1, view2 = noise(4, 9)
    assert float(VICReg(variant="paper")(view1, view2)) == pytest.approx(vicreg_slow(view1, view2), rel=1e-12)
    left, right = ((view - view.mean(0)) / view.std(0, correction=0) for view in (view1, view2))
    correlation = left.T @ right / 4
    target = torch.eye(9, dtype=torch.float64)
    weights = target + 0.005 * (1 - target)
    expected = float((weights * (correlation - target).square()).sum())
    assert float(BarlowTwins(eps=0)(view1, view2)) == pytest.approx(expected, rel=1e-12)


def test_a_base_of_more_channels_than_samples() -> None:
    """By its definition, with the covariance as wide as the channels; eight samples, thirty-three channels."""
    for shrink in (1e-4, 0.3):
        loss = AlignWithBase(shrink=shrink)
        standardised = loss.standardised(noise(8, 33)[0])
        sigma = (1 - shrink) * standardised.T @ standardised / 7 + (shrink + 1e-5) * torch.eye(33, dtype=torch.float64)
        values, vectors = torch.linalg.eigh(sigma)
        expected = standardised @ (vectors / values.sqrt()) @ vectors.T
        torch.testing.assert_close(loss.base(standardised), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("loss", [VICReg(), BarlowTwins()], ids=["vicreg", "barlow"])
def test_wide_gradients(loss: torch.nn.Module) -> None:
    def apart(view1: Tensor, view2: Tensor) -> Tensor:
        value: Tensor = loss(view1, view2)
        return value

    view1, view2 = noise(4, 9)
    assert torch.autograd.gradcheck(apart, (view1.requires_grad_(), view2.requires_grad_()))


def step_of_part(name: str) -> tuple[float, Tensor]:
    """The loss and the gradient of this worker's part of 8 samples with 33 channels."""
    loss = {"vicreg": VICReg, "barlow": BarlowTwins, "arb": AlignWithBase}[name]()
    share = 8 // collectives.world_size()
    mine = slice(collectives.rank() * share, (collectives.rank() + 1) * share)
    view1, view2 = (view[mine].clone().requires_grad_() for view in noise(8, 33))
    value = loss(view1, view2)
    value.backward()
    assert view1.grad is not None
    # Averaged over workers, as an engine does.
    return float(value.detach()), view1.grad / collectives.world_size()


@pytest.mark.xdist_group("gloo")
@pytest.mark.parametrize("name", ["vicreg", "barlow", "arb"])
def test_wide_views_over_two_workers(name: str) -> None:
    (first, upper), (second, lower) = shared_pool().run(step_of_part, name)
    value, gradient = step_of_part(name)
    assert first == pytest.approx(value, rel=1e-12)
    assert second == pytest.approx(value, rel=1e-12)
    torch.testing.assert_close(torch.cat([upper, lower]), gradient)


def test_barlow_forgets_the_scale_of_channels() -> None:
    view1, view2 = noise()
    factor = torch.tensor([0.5, 2, 3, 1, 4, 0.1], dtype=torch.float64)
    torch.testing.assert_close(BarlowTwins(eps=0)(view1 * factor, view2 + 1), BarlowTwins(eps=0)(view1, view2))


def test_a_collapsed_batch() -> None:
    still = torch.ones(5, 3, dtype=torch.float64, requires_grad=True)
    metrics: dict[str, Tensor] = {}
    for loss in (VICReg(), BarlowTwins(), AlignWithBase()):
        loss(still, still.detach(), metrics=metrics).backward()
    assert still.grad is not None
    assert torch.isfinite(still.grad).all()
    assert float(metrics["variance"]) == pytest.approx(1 - math.sqrt(1e-4))


def test_groups_have_a_base_each() -> None:
    view1, view2 = noise(d=8)
    halves = [AlignWithBase()(one, two) for one, two in zip(view1.split(4, 1), view2.split(4, 1), strict=True)]
    torch.testing.assert_close(AlignWithBase(groups=2)(view1, view2), halves[0] + halves[1])
    order = torch.tensor([4, 5, 6, 7, 0, 1, 2, 3])
    torch.testing.assert_close(AlignWithBase(groups=2)(view1, view2, order=order), halves[0] + halves[1])
    with pytest.raises(ValueError, match=r"8 channels .* 3 groups"):
        AlignWithBase(groups=3)(view1, view2)


@pytest.mark.parity
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(VICReg(), "VICRegLoss"), (BarlowTwins(), "BarlowTwinsLoss")],
    ids=["vicreg", "barlow"],
)
def test_like_lightly(ours: torch.nn.Module, theirs: str) -> None:
    lightly = pytest.importorskip("lightly.loss")
    gradients = []
    for loss in (ours, getattr(lightly, theirs)()):
        view1, view2 = noise()
        view1.requires_grad_()
        value = loss(view1, view2)
        value.backward()
        gradients.append((value.detach(), view1.grad))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-5)


def part(kind: str, rank_of: int) -> list[float]:
    """One rank's loss on its half of the batch, and the gradient of its half times the number of ranks."""
    from armillary import collectives

    loss = {"vicreg": VICReg(), "barlow": BarlowTwins(), "arb": AlignWithBase(groups=2)}[kind]
    view1, view2 = noise()
    mine = slice(collectives.rank() * rank_of, (collectives.rank() + 1) * rank_of)
    own = view1[mine].clone().requires_grad_()
    value = loss(own, view2[mine])
    value.backward()
    assert own.grad is not None
    return [float(value.detach()), *(own.grad / collectives.world_size()).flatten().tolist()]


@pytest.mark.xdist_group("gloo")
@pytest.mark.parametrize("kind", ["vicreg", "barlow", "arb"])
def test_two_workers_equal_one(kind: str) -> None:
    view1, view2 = noise()
    view1.requires_grad_()
    loss = {"vicreg": VICReg(), "barlow": BarlowTwins(), "arb": AlignWithBase(groups=2)}[kind]
    value = loss(view1, view2)
    value.backward()
    assert view1.grad is not None
    both = shared_pool().run(part, kind, 8)
    assert [rank[0] for rank in both] == pytest.approx([float(value.detach())] * 2, rel=1e-10)
    assert both[0][1:] + both[1][1:] == pytest.approx(view1.grad.flatten().tolist(), rel=1e-8, abs=1e-12)
