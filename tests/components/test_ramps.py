"""Schedules."""

from __future__ import annotations

import pytest

from armillary.components.schedules import Schedule


def test_the_cosine_of_moving_averages() -> None:
    # m_k = 1 - (1 - m_0) (1 + cos(pi k / K)) / 2
    schedule = Schedule(0.99, 1.0, 10)
    assert [schedule(step) for step in (0, 3, 5, 10, 11)] == pytest.approx([0.99, 0.99206107, 0.995, 1, 1], abs=1e-8)


def test_other_shapes() -> None:
    assert [Schedule(0.04, 0.07, 3, "linear")(epoch) for epoch in (0, 1, 3, 9)] == pytest.approx(
        [0.04, 0.05, 0.07, 0.07]
    )
    assert [Schedule(0, 1, 2, "step", begin=3)(step) for step in (0, 4, 5)] == [0, 0, 1]
    assert [Schedule(2, 5, 4, "constant")(step) for step in (0, 8)] == [2, 2]
    assert [Schedule(1, 3, 2, "linear", begin=4)(step) for step in (0, 4, 5, 6)] == [1, 1, 2, 3]
    assert [Schedule(1, 0, 0, begin=2)(step) for step in (0, 1, 2, 3)] == [1, 1, 0, 0]
