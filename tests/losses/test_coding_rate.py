"""The coding rate: the worked number, what changes nothing, two workers."""

from __future__ import annotations

import pytest
import torch

from armillary import collectives
from armillary.losses.coding_rate import CodingRate
from armillary.testing.gloo_pool import shared_pool

Z = torch.tensor([[0.5, -1.2, 0.3], [1.0, 0.4, -0.7], [-0.8, 0.9, 0.1], [0.2, -0.5, 1.1]], dtype=torch.float64)


def test_worked_number_and_limits() -> None:
    value = CodingRate()(Z)
    assert float(value) == pytest.approx(-1.14196648, abs=1e-8)
    rotation = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0)).double()).Q
    torch.testing.assert_close(CodingRate()(Z @ rotation + 2), value)
    assert float(CodingRate()(torch.ones_like(Z))) == pytest.approx(0)
    samples = torch.eye(4).double() + (Z - Z.mean(0)) @ (Z - Z.mean(0)).T / 3 / 0.5
    assert float(-torch.logdet(samples) / 2) == pytest.approx(float(value))
    with pytest.raises(ValueError, match="noise_variance must be above 0"):
        CodingRate(0)


def half() -> float:
    return float(CodingRate()(Z.chunk(2)[collectives.rank()]))


@pytest.mark.xdist_group("gloo")
def test_two_workers_see_the_whole_batch() -> None:
    assert shared_pool().run(half) == pytest.approx([-1.14196648] * 2, abs=1e-8)
