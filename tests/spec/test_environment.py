"""Values from the environment are used, and never shown."""

from __future__ import annotations

import json
import pickle
import traceback
from pathlib import Path

import pytest

from armillary.spec.errors import UserError
from armillary.spec.jobs import Kinds, TrainJob
from armillary.spec.loading import apply_overrides, digest, dump_job, load_job

SECRET = "hunter2-7f3a"
JOB = """\
objective: {name: arcface, margin: "${env:ARM_MARGIN}", note: "${env:ARM_SECRET}"}
tracking: {uri: "postgresql://me:${env:ARM_SECRET}@db/${env:ARM_DB:-runs}"}
train:
  epochs: ${env:ARM_EPOCHS}
  deepspeed: {deep: [{token: "${env:ARM_SECRET}"}, 1]}
evaluate: {protocols: ["${env:ARM_SECRET}"]}
"""


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"ARM_SECRET": SECRET, "ARM_MARGIN": "0.25", "ARM_EPOCHS": "7"}.items():
        monkeypatch.setenv(name, value)
    Path("job.yaml").write_text(JOB)


def load(*overrides: str) -> TrainJob:
    job = load_job("job.yaml", overrides)
    assert isinstance(job, TrainJob)
    return job


def shown(job: TrainJob) -> str:
    """Everything that a log, a tracker or a resolved file may take from a job."""
    dumps = [dump_job(job), job.model_dump_json(), json.dumps(job.model_dump()), repr(job), str(job)]
    parts = [job.tracking, job.train, job.objective, job.evaluate, job.tracking.uri, job.objective.options]
    return "\n".join([*dumps, *map(repr, parts), str(job.tracking), json.dumps(job.tracking.model_dump())])


def test_values_are_used() -> None:
    job = load()
    assert job.tracking.uri == f"postgresql://me:{SECRET}@db/runs"
    assert str(job.tracking.uri).endswith(f"{SECRET}@db/runs")
    assert job.train.epochs == 7
    assert job.train.deepspeed["deep"][0]["token"] == SECRET
    assert job.evaluate.protocols == (SECRET,)
    assert job.objective.options["note"] == SECRET


def test_nothing_shows_them() -> None:
    job = load()
    others = [
        pickle.loads(pickle.dumps(job)),
        TrainJob.model_validate(job.model_dump()),
        apply_overrides(job, {"seed": 3}),
        job.model_copy(update={"seed": 4}),
        job.model_copy(deep=True),
        load("tracking.experiment=${env:ARM_SECRET}", "name=${env:ARM_SECRET}"),
    ]
    for each in (job, *others):
        text = shown(each)
        assert SECRET not in text
        assert "${env:ARM_SECRET}@db/${env:ARM_DB:-runs}" in text
        assert "epochs: ${env:ARM_EPOCHS}" in text
        assert each.tracking.uri == job.tracking.uri


def test_resolved_file_loads_again_and_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("resolved.yaml").write_text(dump_job(load()))
    assert load_job("resolved.yaml") == load()
    monkeypatch.setenv("ARM_EPOCHS", "9")
    again = load_job("resolved.yaml")
    assert isinstance(again, TrainJob)
    assert again.train.epochs == 9


def test_replacing_a_value_replaces_its_reference() -> None:
    job = load("tracking.uri=sqlite:///here.db")
    assert "uri: sqlite:///here.db" in dump_job(job)
    train = job.train.model_copy(update={"epochs": 3})
    assert job.model_copy(update={"train": train}).model_dump()["train"]["epochs"] == 3
    assert "epochs: 5" in dump_job(apply_overrides(job, {"train.epochs": 5}))


def test_digest_is_that_of_the_values() -> None:
    Path("plain.yaml").write_text(
        JOB.replace("${env:ARM_SECRET}", SECRET)
        .replace("${env:ARM_EPOCHS}", "7")
        .replace("${env:ARM_DB:-runs}", "runs")
    )
    assert digest(load_job("plain.yaml")) == digest(load())


def test_default_is_for_unset_variables_and_an_empty_one_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load("name=${env:ARM_NAME:-fallback}").name == "fallback"
    monkeypatch.setenv("ARM_NAME", "given")
    assert load("name=${env:ARM_NAME:-fallback}").name == "given"
    monkeypatch.setenv("ARM_NAME", "")
    assert load("tracking.uri=x${env:ARM_NAME:-fallback}").tracking.uri == "x"


def test_value_is_not_read_again_as_a_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARM_NAME", "${env:ARM_SECRET}")
    assert load("tracking.uri=${env:ARM_NAME}").tracking.uri == "${env:ARM_SECRET}"


def every_text_key() -> list[str]:
    """Each key of a train job, to be given the secret: most refuse it, and must do so discreetly."""
    from armillary.spec.invalid import dotted_keys

    sections = ["data", "views", "backbone", "objective", "optimizer", "train", "evaluate", "tracking", "cluster"]
    return [*dotted_keys(Kinds.MODELS["train"]), *sections, "train.deepspeed", "unknown", "data.unknown"]


@pytest.mark.parametrize("key", every_text_key())
def test_errors_never_show_them(key: str) -> None:
    for value in ("${env:ARM_SECRET}", "['${env:ARM_SECRET}']", "{a: '${env:ARM_SECRET}'}"):
        try:
            text = shown(load(f"{key}={value}"))
        except UserError as error:
            text = f"{error}\n{error!r}\n" + "".join(traceback.format_exception(error))
        assert SECRET not in text


@pytest.mark.parametrize(
    "text", ["base: ${env:ARM_SECRET}\nspace: arcface", "base: quickstart\nspace: ${env:ARM_SECRET}"]
)
def test_missing_files_are_named_by_reference(text: str) -> None:
    Path("sweep.yaml").write_text(f"kind: sweep\n{text}\n")
    with pytest.raises(UserError, match=r"\$\{env:ARM_SECRET\}") as caught:
        load_job("sweep.yaml")
    assert SECRET not in str(caught.value)


def test_mistakes_in_a_file_named_by_a_variable_do_not_name_it(monkeypatch: pytest.MonkeyPatch) -> None:
    Path(f"{SECRET}.yaml").write_text("objective: {name: arcface}\nseed: x\n")
    Path("sweep.yaml").write_text("kind: sweep\nspace: arcface\nbase: ${env:ARM_SECRET}.yaml\n")
    with pytest.raises(UserError) as caught:
        load_job("sweep.yaml")
    assert caught.value.where == "${env:ARM_SECRET}.yaml:2"
