"""The JSON Schema accepts what the loader accepts, and refuses what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from armillary.objectives import registry
from armillary.spec import document
from armillary.spec.errors import UserError
from armillary.spec.home import resource, resources
from armillary.spec.loading import dump_job, load_job
from armillary.spec.schema import job_schema


@pytest.fixture(scope="module")
def validator() -> Any:
    schema = job_schema({name: registry.get(name).Hyperparameters.model_json_schema() for name in registry.names()})
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


@pytest.mark.parametrize("name", resources("jobs"))
def test_shipped_jobs_pass_as_written_and_as_resolved(validator: Any, name: str) -> None:
    path = resource("jobs", name)
    assert path is not None
    validator.validate(document.read(path).values)
    validator.validate(document.parse(dump_job(load_job(name)), "resolved").values)


TRAIN = {"objective": {"name": "arcface"}}
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"objective": {"name": "arcfce"}}, "'arcfce' is not one of"),
    ({"objective": {"name": "arcface", "margin": 9}}, "maximum"),
    ({"objective": {"name": "arcface", "margin": "wide"}}, "'wide' is not of type 'number'"),
    ({"objective": {"name": "arcface", "temperature": 1}}, "'temperature' was unexpected"),
    ({"objective": {"margin": 0.5}}, "'name' is a required property"),
    ({"seed": 1}, "'objective' is a required property"),
    (TRAIN | {"seeed": 1}, "'seeed' was unexpected"),
    (TRAIN | {"kind": "trian"}, "'trian' is not one of"),
    (TRAIN | {"train": {"epochs": -1}}, "minimum"),
    (TRAIN | {"base": TRAIN}, "'base' was unexpected"),
    ({"kind": "sweep", "space": "arcface"}, "'base' is a required property"),
    ({"kind": "sweep", "space": "arcface", "base": 3}, "3 is not valid"),
    ({"kind": "study", "base": "a.yaml", "variants": []}, "non-empty"),
    ({"kind": "regression", "jobs": [{"job": 1}], "metrics": [{"name": "a"}]}, "1 is not valid"),
]


@pytest.mark.parametrize(("job", "says"), WRONG)
def test_wrong_jobs_fail_for_the_right_reason(validator: Any, job: dict[str, Any], says: str) -> None:
    errors = [error.message for error in validator.iter_errors(job)]
    assert any(says in message for message in errors), errors


def test_hyperparameters_of_each_objective_pass_at_their_defaults(validator: Any) -> None:
    for name in registry.names():
        defaults = registry.get(name).Hyperparameters().model_dump(mode="json")
        validator.validate({"objective": {"name": name, **defaults}})


def test_definitions_of_two_objectives_do_not_meet() -> None:
    def hyperparameters(kind: str) -> dict[str, Any]:
        return {"$defs": {"Term": {"type": kind}}, "properties": {"term": {"$ref": "#/$defs/Term"}}}

    check = Draft202012Validator(job_schema({"a": hyperparameters("string"), "b": hyperparameters("integer")}))
    check.validate({"objective": {"name": "a", "term": "x"}})
    check.validate({"objective": {"name": "b", "term": 1}})
    assert not check.is_valid({"objective": {"name": "a", "term": 1}})
    assert not check.is_valid({"objective": {"name": "b", "term": "x"}})


def test_without_objectives_names_and_hyperparameters_are_open() -> None:
    check = Draft202012Validator(job_schema())
    check.validate({"objective": {"name": "anything", "term": [1]}})
    assert not check.is_valid({"objective": {"term": 1}})


def test_schema_and_loader_agree_on_the_keys_of_every_section(validator: Any) -> None:
    for section in ("data", "optimizer", "train", "evaluate", "tracking", "cluster"):
        job = TRAIN | {section: {"no_such_key": 1}}
        assert not validator.is_valid(job)
        Path("job.yaml").write_text(document.dump(job))
        with pytest.raises(UserError):
            load_job("job.yaml")
