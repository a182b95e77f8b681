"""The margin family beside pytorch-metric-learning: same rows, same features; values and both gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from armillary.losses import LSoftmax, P2SGrad, SphereFace, SubcenterArcFace

NEVER: dict[str, Any] = {"annealing_start": 0.0, "annealing_floor": 0.0}


@pytest.mark.parity
class TestPytorchMetricLearning:
    """Same rows, same features. Its margins and angles are documented in degrees."""

    @staticmethod
    def compare(ours: Any, theirs: Any, factor: float = 1.0, subcenters: int = 1, unit_rows: bool = False) -> None:
        draw = torch.Generator().manual_seed(0)
        features = torch.randn(8, 6, generator=draw)
        labels = torch.arange(8) % 4
        rows = torch.randn(4 * subcenters, 6, generator=draw)
        ours.weight.data.copy_(rows.view_as(ours.weight))
        theirs.W.data.copy_(rows.T)
        found = []
        for loss in (ours, theirs):
            own = features.clone().requires_grad_()
            value = loss(own, labels)
            value.backward()
            assert own.grad is not None
            found.append([value.detach(), own.grad])
        found[0].append(ours.weight.grad.view(-1, 6))
        gradient = theirs.W.grad.T
        if unit_rows:
            # They scale the rows to unit length outside the graph: what is missing is that scaling's own gradient.
            unit = torch.nn.functional.normalize(rows)
            gradient = (gradient - (gradient * unit).sum(1, keepdim=True) * unit) / rows.norm(dim=1, keepdim=True)
        found[1].append(gradient)
        for mine, other in zip(*found, strict=True):
            torch.testing.assert_close(mine * factor, other, rtol=1e-5, atol=1e-5)

    def test_large_margin_softmax(self) -> None:
        from pytorch_metric_learning import losses as theirs

        # It does not anneal.
        self.compare(LSoftmax(4, 6, margin=4, **NEVER), theirs.LargeMarginSoftmaxLoss(4, 6, margin=4, scale=1))

    def test_sphereface(self) -> None:
        from pytorch_metric_learning import losses as theirs

        self.compare(SphereFace(4, 6, **NEVER), theirs.SphereFaceLoss(4, 6, margin=4, scale=1))

    def test_p2sgrad(self) -> None:
        from pytorch_metric_learning import losses as theirs

        # A plain mean over all entries: 2 / C times the potential.
        peer = theirs.P2SGradLoss(6, 4)
        peer.W = peer.weight  # named otherwise there
        self.compare(P2SGrad(4, 6), peer, factor=2 / 4, unit_rows=True)

    def test_subcenters(self) -> None:
        from pytorch_metric_learning import losses as theirs

        ours = SubcenterArcFace(4, 6, margin=math.radians(28.6), subcenters=3)
        peer = theirs.SubCenterArcFaceLoss(num_classes=4, embedding_size=6, margin=28.6, scale=64, sub_centers=3)
        self.compare(ours, peer, subcenters=3)
