"""Objectives across poses and resolutions: what the conformance suite's first epoch does not show."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from armillary.objectives.cross_view_pairs import CrossResolution, SiamesePose, squared_difference, turned_head
from armillary.testing import tiny


def student(**options: Any) -> CrossResolution:
    """One whose teacher has been trained for a step that changed the encoder."""
    objective = tiny.build(CrossResolution, options, dtype=torch.float64)
    assert isinstance(objective, CrossResolution)
    with torch.no_grad():
        for parameter in objective.encoder.parameters():
            parameter.mul_(1.1)
    objective.after_step(objective.teacher_steps - 1)
    objective.step = objective.teacher_steps
    return objective


def batch_of(size: int = 12) -> Any:
    return tiny.batch(CrossResolution.needs, size, dtype=torch.float64)


def test_the_student_starts_as_its_teacher_ends() -> None:
    objective, batch = student(downsampling_prob=0.0), batch_of()
    for mine, kept in zip(objective.encoder.parameters(), objective.teacher["encoder"].parameters(), strict=True):
        assert torch.equal(mine, kept)
    objective.encoder.eval()
    output = objective(batch)
    # With p = 0 the student sees what the teacher sees: only cross-entropy is left.
    assert float(output.metrics["agreement"]) == 0
    torch.testing.assert_close(output.loss.detach(), output.metrics["identity"])


def test_the_student_is_drawn_to_the_teacher_alone() -> None:
    objective, batch = student(downsampling_prob=1.0, lam=3.0), batch_of()
    objective.encoder.eval()
    output = objective(batch)
    features, kept = objective.encoder(batch.views[1]), objective.teacher(batch.views[0])
    agreement = (features - kept).square().mean()
    assert float(agreement.detach()) > 0
    torch.testing.assert_close(output.metrics["agreement"], agreement.detach())
    torch.testing.assert_close(output.loss.detach(), output.metrics["identity"] + 3 * agreement.detach())
    output.loss.backward()
    assert all(parameter.grad is None for parameter in objective.teacher.parameters())
    before = [parameter.clone() for parameter in objective.teacher.parameters()]
    objective.after_step(objective.step)
    assert all(torch.equal(old, new) for old, new in zip(before, objective.teacher.parameters(), strict=True))


def test_the_catalog_value() -> None:
    """Cross-entropy 0.39743747, features 0.22; the survey's squared length is three times the mean over dimensions."""
    student_features = torch.tensor([[0.9, 0.1, -0.2], [-0.3, 0.8, 0.4]], dtype=torch.float64)
    teacher_features = torch.tensor([[0.5, 0.6, -0.3], [0.2, 0.7, -0.4]], dtype=torch.float64)
    logits = torch.tensor([[2.0, 0.5, -1.0], [0.1, 1.2, 0.3]], dtype=torch.float64)
    entropy = torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1]))
    agreement = squared_difference(student_features, teacher_features)
    assert float(entropy + 0.1 * agreement) == pytest.approx(0.41943747, abs=1e-8)
    assert float(entropy + 0.1 * agreement * 3) == pytest.approx(0.46343747, abs=1e-8)


def test_the_curriculum_lowers_ever_more() -> None:
    objective, index = student(curriculum=True, curriculum_step_images=120), torch.arange(4000)
    shares = []
    for step in (0, 10, 45, 1000):
        objective.step = objective.teacher_steps + step
        shares.append(float(objective.lowered(index).double().mean()))
    assert shares == pytest.approx([0.1, 0.2, 0.5, 1.0], abs=0.03)


def test_without_a_turn_nothing_changes() -> None:
    images = torch.rand(3, 1, 9, 9, dtype=torch.float64)
    torch.testing.assert_close(turned_head(images, torch.zeros(3)), images)


def test_a_turn_moves_the_middle_and_mirrors() -> None:
    ramp = torch.linspace(0, 1, 33, dtype=torch.float64).expand(2, 1, 5, 33).contiguous()
    right, left = turned_head(ramp, torch.tensor([30.0, -30.0]))
    # In the middle stands what stood at sin(-30 degrees), a quarter from the left.
    assert float(right[0, 2, 16]) == pytest.approx(0.25, abs=0.02)
    torch.testing.assert_close(left.flip(-1), 1 - right)


def test_profiles_are_counted_by_their_yaw() -> None:
    objective = tiny.build(SiamesePose, {"mode": "consistence", "profile_yaw_deg": 40.0})
    batch = tiny.batch(SiamesePose.needs, 12)
    yaw: Tensor = batch.fields["pose"][:, 0]
    assert float(objective(batch).metrics["profile_share"]) == pytest.approx(float((yaw.abs() > 40).double().mean()))
