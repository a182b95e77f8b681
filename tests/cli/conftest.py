"""Running the command line as a user does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from typer.testing import CliRunner

from armillary.cli.main import app

Run = Callable[..., Any]


@pytest.fixture
def run() -> Run:
    """Runs ``armillary ARGS`` in this process; the result has ``exit_code``, ``stdout`` and ``stderr``."""

    def call(*arguments: str) -> Any:
        return CliRunner().invoke(app, list(arguments), prog_name="armillary")

    return call
