"""Cross-resolution objectives and super-identity: stages, branches, who learns from which term."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from armillary.losses import ArcFace
from armillary.objectives import Batch, Objective
from armillary.objectives.cross_resolution import CoupledManifoldAlignment, IdeaNet, TransferableCoupledNetwork
from armillary.objectives.super_identity import SuperIdentity, super_identity_loss
from armillary.testing import tiny


def made(cls: type[Objective], **options: object) -> tuple[Any, Batch]:
    objective = tiny.build(cls, options, dtype=torch.float64)
    return objective, tiny.batch(cls.needs_for(objective.hyperparameters), dtype=torch.float64)


def test_super_identity_worked_numbers() -> None:
    found = super_identity_loss(torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 0.0]]))
    assert float(found) == pytest.approx(0.8)
    assert 0.02 + 8 * float(found) == pytest.approx(6.42)
    torch.testing.assert_close(super_identity_loss(torch.tensor([[30.0, 40.0]]), torch.tensor([[0.1, 0.0]])), found)


def test_alignment_of_weight_zero_is_two_arcfaces() -> None:
    objective, batch = made(CoupledManifoldAlignment, lambda1=0.0, lambda2=0.0, scale=16.0)
    head = objective.loss
    assert isinstance(head, ArcFace)
    expected = sum(
        head(encoder(view), batch.label)
        for encoder, view in zip((objective.encoder, objective.low_encoder), batch.views, strict=True)
    )
    torch.testing.assert_close(objective(batch).loss, expected)


def test_one_encoder_for_equal_views_is_aligned() -> None:
    objective, batch = made(CoupledManifoldAlignment, branches="shared")
    same = Batch((batch.views[0], batch.views[0]), batch.index, batch.fields)
    metrics = objective(same).metrics
    for name in ("pair_distance", "mean_distance", "cov_distance"):
        assert float(metrics[name]) == pytest.approx(0, abs=1e-12)


def test_tcn_freezes_its_high_branch_when_the_first_stage_ends() -> None:
    objective, batch = made(TransferableCoupledNetwork, formulation="reconstruction", pretrain=0.5)
    assert isinstance(objective, TransferableCoupledNetwork)
    last = objective.switch - 1
    assert last == 2 * 5 - 1  # half of four epochs of five steps
    objective.step = last
    assert "active_share" not in objective(batch).metrics
    with torch.no_grad():
        for parameter in objective.encoder.parameters():
            parameter.add_(0.1)
    objective.after_step(last)
    frozen = {name: value.clone() for name, value in objective.high_branch.state_dict().items()}
    for name, value in objective.encoder.state_dict().items():
        torch.testing.assert_close(frozen[f"encoder.{name}"], value)
    objective.step = last + 1
    output = objective(batch)
    output.loss.backward()
    objective.after_step(last + 1)
    assert "active_share" in output.metrics
    assert all(parameter.grad is None for parameter in objective.high_branch.parameters())
    for name, value in objective.high_branch.state_dict().items():
        torch.testing.assert_close(value, frozen[name])  # its batch norm saw a batch, and kept its statistics


@pytest.mark.parametrize(("cls", "attribute"), [(TransferableCoupledNetwork, "switch"), (SuperIdentity, "joint_from")])
def test_stages_end_within_an_epoch(cls: type[Objective], attribute: str) -> None:
    """0.3 of four epochs of five steps are six steps, not a whole number of epochs: a run of one epoch has both."""
    options = {"formulation": "reconstruction"} if cls is TransferableCoupledNetwork else {}
    objective, _ = made(cls, pretrain=0.3, **options)
    assert getattr(objective, attribute) == 6


def gradients(objective: Objective, loss: Tensor, part: str) -> Tensor:
    objective.zero_grad()
    loss.backward(retain_graph=False)
    found = [p.grad for name, p in objective.named_parameters() if name.startswith(part)]
    return torch.cat([torch.zeros(1, dtype=torch.float64) if g is None else g.flatten() for g in found])


def test_super_identity_trains_each_network_by_its_own_terms() -> None:
    weak, batch = made(SuperIdentity, alpha=0.0)
    strong, _ = made(SuperIdentity, alpha=50.0)
    # The recogniser does not feel L_SI, the sharpener does.
    torch.testing.assert_close(*(gradients(o, o(batch).loss, "encoder") for o in (weak, strong)))
    of_weak, of_strong = (gradients(o, o(batch).loss, "sharpener") for o in (weak, strong))
    assert not torch.allclose(of_weak, of_strong)
    # The sharpener does not feel L_FR: with no L_SI its gradient is that of the pixels alone.
    pixels = 4 * (weak.sharpener(batch.views[1]) - batch.views[0]).square().mean()
    torch.testing.assert_close(gradients(weak, weak(batch).loss, "sharpener"), gradients(weak, pixels, "sharpener"))


def test_super_identity_begins_with_originals_alone() -> None:
    objective, batch = made(SuperIdentity, pretrain=0.5)
    objective.step = 0
    assert "identity_loss" not in objective(batch).metrics
    objective.step = 10
    assert "identity_loss" in objective(batch).metrics


def test_super_identity_shows_small_sharp_and_original() -> None:
    objective, batch = made(SuperIdentity)
    grid = objective.eval().pictures(batch.views[0][:3])["super_resolution"]
    assert grid.shape == (3, 3, 1, 6, 6)
    torch.testing.assert_close(grid[2], batch.views[0][:3])
    torch.testing.assert_close(grid[1], objective.sharpener(grid[0]))


def test_idea_net_without_calibrator_is_its_head() -> None:
    objective, batch = made(IdeaNet, formulation="reconstruction", lambda_c=0.0, base="cos")
    torch.testing.assert_close(objective(batch).loss, objective.loss(objective.encoder(batch.views[0]), batch.label))


def test_idea_net_plays_two_sides() -> None:
    objective, batch = made(IdeaNet, adversarial=1.0)
    assert isinstance(objective, IdeaNet)
    units = torch.nn.functional.normalize(objective.encoder(batch.views[0]), dim=1).detach()
    noise = torch.randn(units.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    judged, deceived = objective._adversarial(units, noise)
    assert not gradients(objective, deceived, "discriminator").any()
    assert gradients(objective, judged, "discriminator").any()
    judged, deceived = objective._adversarial(units, noise)
    assert not gradients(objective, judged, "generator").any()
    assert gradients(objective, deceived, "generator").any()


def test_generated_features_depend_on_seed_step_and_sample_alone() -> None:
    objective, batch = made(IdeaNet)
    objective.eval()
    first = objective(batch).loss
    torch.testing.assert_close(objective(batch).loss, first, rtol=0, atol=0)
    objective.step = 1
    assert not torch.equal(objective(batch).loss, first)
