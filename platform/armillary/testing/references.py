"""Reference values: published or independently computed numbers that a loss must give.

A YAML file maps a loss to its cases; each has ``case`` (its name), ``inputs``, ``params`` and ``result``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor


@dataclass(frozen=True)
class ReferenceCase:
    """One case: what goes in, under which parameters, and what must come out."""

    case: str
    inputs: dict[str, Any]
    result: dict[str, Any]
    params: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.case.replace(" ", "_")

    def tensor(self, name: str) -> Tensor:
        """An input as float64 with gradient, or as int64 where it holds whole numbers."""
        if torch.tensor(self.inputs[name]).is_floating_point():
            return torch.tensor(self.inputs[name], dtype=torch.float64, requires_grad=True)
        return torch.tensor(self.inputs[name])


def reference_cases(path: Path, loss: str) -> list[ReferenceCase]:
    """The cases of one loss.

    Raises:
        KeyError: the file has none for it.
    """
    return [ReferenceCase(**entry) for entry in yaml.safe_load(path.read_text())[loss]]


def assert_value(found: Tensor, expected: Any, tolerance: float = 2e-8) -> None:
    """Equal to a reference printed with eight digits, absolutely and relatively to ``tolerance``."""
    torch.testing.assert_close(
        found.detach().double(), torch.tensor(expected, dtype=torch.float64), rtol=tolerance, atol=tolerance
    )
