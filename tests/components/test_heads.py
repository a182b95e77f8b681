"""The projector."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from armillary.components.heads import Projector


def test_simclr_shape() -> None:
    """Linear without bias, batch norm, ReLU; linear without bias, batch norm without shift."""
    projector = Projector(6, 10, 4, layers=2, norm=True, last_norm=True)
    kinds = [type(layer) for layer in projector]
    assert kinds == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear, nn.BatchNorm1d]
    names = [name for name, _ in projector.named_parameters()]
    assert names == ["linear1.weight", "norm1.weight", "norm1.bias", "linear2.weight", "norm2.weight"]
    projected = projector(torch.randn(32, 6))
    assert projected.shape == (32, 4)
    torch.testing.assert_close(projected.mean(0), torch.zeros(4), rtol=0, atol=1e-5)


@pytest.mark.parametrize("layers", [1, 2, 4])
def test_without_norm(layers: int) -> None:
    projector = Projector(6, 10, 4, layers=layers, norm=False)
    linears = [layer for layer in projector if isinstance(layer, nn.Linear)]
    assert len(linears) == layers
    assert all(linear.bias is not None for linear in linears)
    assert not any(isinstance(layer, nn.BatchNorm1d) for layer in projector)
    assert isinstance(projector[-1], nn.Linear)
    assert projector(torch.randn(1, 6)).shape == (1, 4)


def test_no_layer() -> None:
    with pytest.raises(ValueError, match="at least 1, found 0"):
        Projector(6, 10, 4, layers=0)
