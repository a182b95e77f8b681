"""``armillary data make identities``."""

from __future__ import annotations

import inspect
import json
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import pytest
from typer.testing import CliRunner

from armillary.cli.make import app, make_identities
from armillary.data.identities import IdentitiesSpec
from armillary.data.store import open_dataset
from armillary.spec.errors import UserError

ARGUMENTS = ["identities", "--name", "tiny", "--identities", "6", "--images", "4", "--size", "32"]


def run(*extra: str) -> Any:
    return CliRunner().invoke(app, [*ARGUMENTS, *extra])


def test_options_reach_the_generator() -> None:
    result = run("--graph", "--sets", "2", "--noise-flip", "0.25", "--seed", "3", "--json")
    assert result.exit_code == 0, result.output
    shown = json.loads(result.stdout)
    assert (shown["images"], shown["classes"], shown["tables"]) == (24, 6, ["graph"])
    assert shown["spec"]["noise"]["flip"] == 0.25
    dataset = open_dataset("tiny")
    assert dataset.fingerprint == shown["fingerprint"]
    (rows,) = dataset.rows()
    assert sum(kind == "flip" for kind in rows.fields["noise"]) == 6


def test_mistakes_name_the_option() -> None:
    error = run("--noise-flip", "2").exception
    assert isinstance(error, UserError)
    assert "--noise-flip" in str(error)
    assert isinstance(run("--size", "8").exception, UserError)


def test_an_existing_dataset_is_not_overwritten() -> None:
    assert run().exit_code == 0
    error = run().exception
    assert isinstance(error, UserError)
    assert "exists already" in str(error)


def test_the_help_shows_the_real_defaults() -> None:
    flat = IdentitiesSpec().model_dump()
    flat |= {f"noise_{name}": value for name, value in flat["noise"].items()} | {"images": flat["images_per_identity"]}
    hints = get_type_hints(make_identities, include_extras=True)
    checked = 0
    for name in inspect.signature(make_identities).parameters:
        assert get_origin(hints[name]) is Annotated
        shown = get_args(hints[name])[1].show_default
        if isinstance(shown, str):
            assert shown == str(flat[name]), name
            checked += 1
    assert checked == 16


@pytest.mark.parametrize("name", ["identities"])
def test_the_command_is_listed(name: str) -> None:
    assert name in CliRunner().invoke(app, ["--help"]).output
