"""Progress in a log: a line now and then, not one a report."""

from __future__ import annotations

import pytest

from armillary.cli import progress
from armillary.spec.jobs import TrainJob


def test_a_log_gets_a_line_every_half_minute(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 100.0
    monkeypatch.setattr("armillary.cli.progress.time.monotonic", lambda: now)
    jobs = [TrainJob.model_validate({"kind": "train", "objective": {"name": "arcface"}, "train": {"epochs": 4}})] * 2
    with progress.progress("label_noise", jobs) as bar:
        for epoch in range(1, 5):
            now += 10
            bar.report("a", epoch, {"train/loss": 0.5 / epoch})
        now += 21
        bar.report("b", 1, {})
    assert capsys.readouterr().err.splitlines() == [
        "label_noise: 3 of 8 epochs in 30 s  loss 0.167",
        "label_noise: 5 of 8 epochs in 61 s",
    ]
