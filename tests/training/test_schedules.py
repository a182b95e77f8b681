"""The learning rate over training."""

import pytest

from armillary.spec.jobs import OptimizerSpec
from armillary.training.schedules import learning_rate


def test_warm_up_is_linear() -> None:
    spec = OptimizerSpec(lr=0.4, warmup_epochs=4)
    assert [learning_rate(spec, epoch, 10) for epoch in (0, 1, 2)] == pytest.approx([0.0, 0.1, 0.2])


def test_cosine_starts_at_the_peak_and_ends_at_the_floor() -> None:
    spec = OptimizerSpec(lr=0.4, warmup_epochs=2, final_lr_ratio=0.1)
    assert learning_rate(spec, 2, 10) == pytest.approx(0.4)
    assert learning_rate(spec, 6, 10) == pytest.approx(0.4 * 0.55)
    assert learning_rate(spec, 10, 10) == pytest.approx(0.04)


def test_step_multiplies_at_each_boundary() -> None:
    spec = OptimizerSpec(lr=1.0, schedule="step", warmup_epochs=0, step_epochs=(3, 6), step_factor=0.1)
    assert [learning_rate(spec, epoch, 9) for epoch in (0, 2.9, 3, 6)] == pytest.approx([1, 1, 0.1, 0.01])


def test_constant_stays() -> None:
    spec = OptimizerSpec(lr=0.3, schedule="constant", warmup_epochs=0)
    assert {learning_rate(spec, epoch, 5) for epoch in (0, 2.5, 5)} == {0.3}


def test_a_warm_up_longer_than_training_never_divides_by_zero() -> None:
    spec = OptimizerSpec(lr=0.4, warmup_epochs=10)
    assert learning_rate(spec, 5, 5) == pytest.approx(0.4)
