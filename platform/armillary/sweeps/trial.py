"""What runs inside one Ray Tune trial: a messenger between Tune and the crews' desk. Imports no torch."""

from __future__ import annotations

import json
import os
import time
from typing import Any

from ray import tune

from armillary.spec.loading import apply_overrides
from armillary.training.api import OnReport
from armillary.training.desk import TrialHandle
from armillary.training.preflight import with_backbone
from armillary.training.records import create_run
from armillary.training.rundir import write_atomically

_POLL_SECONDS = 0.1


class CrewTrial(tune.Trainable):
    """One trial at a time: submits a run, returns its next evaluated epoch at every ``step``, stops it when Tune does.

    The actor is reused from trial to trial; the run it stands for lives with a crew.
    """

    handle: TrialHandle

    def setup(self, config: dict[str, Any], fixed: dict[str, Any] | None = None) -> None:
        """Starts the first trial; ``fixed`` holds what all trials share."""
        assert fixed is not None
        self.fixed = fixed
        os.environ["ARMILLARY_HOME"] = fixed["home"]
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Starts the next trial on this actor."""
        self._end()
        self._begin(new_config)
        return True

    def step(self) -> dict[str, Any]:
        """Waits for the next epoch that was evaluated, or for the end."""
        metric = self.fixed["metric"]
        while True:
            for epoch, metrics in self.handle.new_reports():
                self.epoch = epoch
                if metric in metrics and not self.handle.done:
                    return self._result(metrics[metric], done=False)
            if self.handle.done:
                record = self.handle.settle()
                if metric not in record.metrics:
                    raise RuntimeError(record.error or f"run {record.run_id} ended without {metric}")
                return self._result(record.metrics[metric], done=True)
            time.sleep(_POLL_SECONDS)

    def cleanup(self) -> None:
        """Tune is done with this actor."""
        self._end()

    def _begin(self, config: dict[str, Any]) -> None:
        # Tune writes nested keys with slashes; the space's own keys have dots and stay whole.
        job = with_backbone(apply_overrides(self.fixed["base"], config))
        run = create_run(job, self.fixed["fingerprint"], group=self.fixed["group"])
        write_atomically(run.path / "trial.json", json.dumps(config))
        self.epoch = 0
        self.handle = TrialHandle(self.fixed["desk"], run, job)

    def _end(self) -> None:
        if not self.handle.done:
            self.handle.stop()

    def _result(self, value: float, *, done: bool) -> dict[str, Any]:
        return {"value": value, "epoch": self.epoch, "run_id": self.handle.run.run_id, "done": done}


class Progress(tune.Callback):
    """Passes every result on to the caller's ``on_report``."""

    def __init__(self, on_report: OnReport | None) -> None:
        self.on_report = on_report

    def __getstate__(self) -> dict[str, Any]:
        # Tune writes its callbacks to disk; one read back has nobody to report to.
        return {"on_report": None}

    def on_trial_result(  # noqa: D102 - Tune's own name and signature
        self, iteration: int, trials: list[Any], trial: Any, result: dict[Any, Any], **info: Any
    ) -> None:
        if self.on_report:
            self.on_report(result["run_id"], result["epoch"], {"value": result["value"]})
