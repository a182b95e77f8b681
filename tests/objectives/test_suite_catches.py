"""The conformance suite finds the faults it is there for: each planted fault fails exactly its check."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from pydantic import Field
from torch import Tensor

from armillary import losses
from armillary.objectives import Batch, BuildContext, Citation, Needs, Objective, Output, base
from armillary.testing import steps
from armillary.testing.gloo_pool import GlooPool, shared_pool
from armillary.testing.objective_suite import ObjectiveSuite, cases
from armillary.testing.steps import Case


class Sound(Objective):
    """Supervised contrastive loss on plain embeddings."""

    name = "sound"
    family = "test"
    citation = Citation("somebody", "something")
    needs = Needs(fields=("label",))

    class Hyperparameters(base.Hyperparameters):
        temperature: float = Field(0.2, ge=0.01, le=1, description="divides the cosines")
        doubled: bool = Field(False, description="twice the loss")

    def build(self, context: BuildContext) -> None:
        self.loss = losses.SupCon(self.hyperparameters.temperature)

    def forward(self, batch: Batch) -> Output:
        metrics: dict[str, Tensor] = {}
        loss = self.loss(self.encoder(batch.views[0]), batch.label, metrics=metrics)
        return Output(loss * (1 + self.hyperparameters.doubled), metrics)


class WritesToItsInput(Sound):
    def forward(self, batch: Batch) -> Output:
        batch.views[0].mul_(0.5)
        return super().forward(batch)


class HalfPrecision(Sound):
    def forward(self, batch: Batch) -> Output:
        output = super().forward(batch)
        return Output(output.loss.half(), output.metrics)


class HasADeadParameter(Sound):
    def build(self, context: BuildContext) -> None:
        super().build(context)
        self.unused = torch.nn.Parameter(torch.ones(1))


class DependsOnOrder(Sound):
    def forward(self, batch: Batch) -> Output:
        output = super().forward(batch)
        return Output(output.loss + self.encoder(batch.views[0])[0].sum(), output.metrics)


class DividesByPositives(Sound):
    def forward(self, batch: Batch) -> Output:
        output = super().forward(batch)
        return Output(output.loss / output.metrics["positives_per_anchor"], output.metrics)


class HidesItsState(Sound):
    """Keeps a number that the next step uses outside the state dict."""

    steps: int = 0

    def forward(self, batch: Batch) -> Output:
        output = super().forward(batch)
        return Output(output.loss * (1 + self.steps), output.metrics)

    def after_step(self, step: int) -> None:
        self.steps += 1


class SeesItsOwnWorkerOnly(Sound):
    def build(self, context: BuildContext) -> None:
        self.loss = losses.SupCon(self.hyperparameters.temperature, gather=False)


class DetachesItsTarget(Sound):
    waivers: ClassVar[dict[str, str]] = {"gradcheck": "half of the gradient is stopped"}

    def forward(self, batch: Batch) -> Output:
        output = super().forward(batch)
        return Output(output.loss + output.loss.detach(), output.metrics)


class Pool(GlooPool):
    """Sends work by a function of this file, so that the workers know its classes."""

    def run(self, function: Callable[..., Any], *arguments: Any, timeout: float = 120.0) -> list[Any]:
        assert function is steps.train_part
        return shared_pool().run(train_part, *arguments, timeout=timeout)


def train_part(case: Case, count: int, dtype: torch.dtype) -> steps.Trace:
    return steps.train_part(case, count, dtype)


SUITE = ObjectiveSuite()
FAULTS: list[tuple[type[Objective], Callable[[Case], None]]] = [
    (WritesToItsInput, SUITE.test_inputs_unchanged),
    (HalfPrecision, lambda case: SUITE.test_finite_scalar(case, torch.float32)),
    (HasADeadParameter, SUITE.test_every_parameter_learns),
    (DependsOnOrder, SUITE.test_batch_order),
    (DividesByPositives, lambda case: SUITE.test_degenerate_batch(case, [0, 1, 2, 3])),
    (HidesItsState, SUITE.test_state_dict),
    (DetachesItsTarget, SUITE.test_gradcheck),
    (SeesItsOwnWorkerOnly, lambda case: SUITE.test_two_workers_equal_one(case, Pool())),
]


@pytest.mark.parametrize(("faulty", "check"), FAULTS, ids=[fault.__name__ for fault, _ in FAULTS])
def test_fault_is_found(faulty: type[Objective], check: Callable[[Case], None]) -> None:
    check(Case(Sound))
    with pytest.raises((AssertionError, RuntimeError)):
        check(Case(faulty))


def test_options_become_cases() -> None:
    assert [str(case) for case in cases(Sound)] == ["sound", "sound-doubled=True"]


PLUGIN = """
from armillary.objectives import register
from armillary.objectives.supervised_contrastive import SupCon
from armillary.testing import steps
from armillary.testing.gloo_pool import GlooPool, shared_pool
from armillary.testing.objective_suite import ObjectiveSuite

@register
class Waived(SupCon):
    '''Supervised contrastive learning with a waiver.'''

    name = "waived"
    waivers = {"batch_order": "says it depends on the order, and does not"}

class TestPlugin(ObjectiveSuite):
    objectives = ("waived",)
"""


@pytest.mark.slow
def test_waived_check_must_fail(tmp_path: Path) -> None:
    """A plug-in subclasses the suite; a waiver turns its check into a strict expected failure."""
    (tmp_path / "test_plugin.py").write_text(PLUGIN)
    command = [sys.executable, "-m", "pytest", "-k", "batch_order or inputs_unchanged or documented", "-rA", "-q"]
    answer = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "[XPASS(strict)] says it depends on the order" in answer.stdout
    assert "2 failed, 3 passed" in answer.stdout
