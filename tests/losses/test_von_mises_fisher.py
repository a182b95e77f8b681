"""The von Mises-Fisher likelihood: Bessel functions against SciPy and mpmath, worked numbers, gradients."""

from __future__ import annotations

import math

import pytest
import torch

from armillary.losses.von_mises_fisher import (
    SphericalConfidence,
    log_bessel,
    mean_resultant,
    mutual_likelihood,
    pool_confident,
)

ORDERS = (0.0, 0.5, 1.0, 3.0, 15.0, 31.0, 63.5, 127.0, 255.0)
KAPPAS = (1e-6, 1e-3, 0.1, 1.0, 7.0, 50.0, 300.0, 700.0, 4000.0, 1e6)


@pytest.mark.parametrize("order", ORDERS)
def test_like_mpmath(order: float) -> None:
    mpmath = pytest.importorskip("mpmath")
    kappa = torch.tensor(KAPPAS, dtype=torch.float64)
    with mpmath.workdps(50):
        exact = [mpmath.besseli(order, mpmath.mpf(k)) for k in kappa.tolist()]
        above = [mpmath.besseli(order + 1, mpmath.mpf(k)) for k in kappa.tolist()]
        logarithms = [float(mpmath.log(value)) for value in exact]
        ratios = [float(b / a) for a, b in zip(exact, above, strict=True)]
    assert log_bessel(order, kappa).tolist() == pytest.approx(logarithms, rel=1e-12, abs=2e-10)
    assert mean_resultant(int(2 * order + 2), kappa).tolist() == pytest.approx(ratios, rel=1e-9)


@pytest.mark.parametrize("order", ORDERS)
def test_like_scipy(order: float) -> None:
    """Where the scaled Bessel function is inside float64."""
    special = pytest.importorskip("scipy.special")
    kappa = torch.logspace(-1, 4, 40, dtype=torch.float64)
    scaled = torch.from_numpy(special.ive(order, kappa.numpy()))
    inside = scaled > 1e-280
    assert inside.any()
    torch.testing.assert_close((log_bessel(order, kappa) - kappa)[inside], scaled.log()[inside], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_dimension_in_single_precision(dtype: torch.dtype) -> None:
    """Widths at which I_nu underflows float64: finite, with finite gradients."""
    kappa = torch.tensor([1e-6, 1.0, 300.0, 1e6], dtype=dtype, requires_grad=True)
    loss = SphericalConfidence(2048)(kappa, torch.full_like(kappa, 0.5))
    loss.backward()
    assert loss.dtype == dtype
    assert torch.isfinite(loss)
    assert kappa.grad is not None
    assert torch.isfinite(kappa.grad).all()


@pytest.mark.parametrize(
    ("dim", "kappa", "cosine", "radius", "expected"),
    [
        (4, 10.0, 0.8, 64.0, 17.89890521),
        (4, 10.0, 0.8, 1.0, 1.26337287),
        (512, 700.0, 0.7, 64.0, 1089.14157596),
    ],
)
def test_worked_numbers(dim: int, kappa: float, cosine: float, radius: float, expected: float) -> None:
    given = torch.tensor([kappa], dtype=torch.float64, requires_grad=True)
    loss = SphericalConfidence(dim, radius)(given, torch.tensor([cosine], dtype=torch.float64))
    assert float(loss.detach()) == pytest.approx(expected, abs=1e-8)
    loss.backward()
    resultant = float(mean_resultant(dim, given))
    assert given.grad is not None
    assert float(given.grad) == pytest.approx(resultant - cosine, abs=1e-9)
    if dim == 4:
        assert float(given.grad) == pytest.approx(0.05418531, abs=1e-8)
    else:
        assert resultant == pytest.approx(0.69936931, abs=1e-8)
        assert float(log_bessel(255, given.detach())) == pytest.approx(649.82239372, abs=1e-8)
        at_best = mean_resultant(512, torch.tensor(701.84262576, dtype=torch.float64))
        assert float(at_best) == pytest.approx(0.7, abs=1e-10)


def test_gradient() -> None:
    kappa = torch.tensor([0.3, 4.0, 90.0], dtype=torch.float64, requires_grad=True)
    cosine = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64, requires_grad=True)
    for dim in (3, 8, 64, 512):
        assert torch.autograd.gradcheck(SphericalConfidence(dim, reduction="none"), (kappa, cosine))


def test_radius_shifts() -> None:
    kappa, cosine = torch.tensor([3.0, 40.0]).double(), torch.tensor([0.2, 0.9]).double()
    shift = SphericalConfidence(16, 8.0)(kappa, cosine) - SphericalConfidence(16, 2.0)(kappa, cosine)
    assert float(shift) == pytest.approx(16 * math.log(4))


def test_best_confidence_rises_with_the_cosine() -> None:
    kappa = torch.logspace(-1, 4, 4000, dtype=torch.float64)
    best = [
        float(kappa[SphericalConfidence(64, reduction="none")(kappa, torch.full_like(kappa, c)).argmin()])
        for c in (0.1, 0.3, 0.5, 0.7, 0.9)
    ]
    assert best == sorted(set(best))
    assert best[2] == pytest.approx(0.5 * (64 - 0.25) / 0.75, rel=0.02)


def test_pairs_and_templates() -> None:
    one = torch.tensor([[1.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    two = torch.tensor([[0.5, math.sqrt(0.75), 0.0, 0.0]], dtype=torch.float64)
    kappas = torch.tensor([10.0], dtype=torch.float64), torch.tensor([20.0], dtype=torch.float64)
    score = mutual_likelihood(one, kappas[0], two, kappas[1], radius=1.0)
    assert float(score) == pytest.approx(-3.22078174, abs=1e-8)
    assert float(mutual_likelihood(two, kappas[1], one, kappas[0], radius=1.0)) == pytest.approx(float(score))
    pooled = pool_confident(torch.cat([one, two]), torch.cat(kappas))
    torch.testing.assert_close(pooled, (10 * one[0] + 20 * two[0]) / 30)
    with pytest.raises(ValueError, match="dim"):
        SphericalConfidence(1)
