"""Reading jobs, overriding them, writing them back, and naming them by content."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from armillary.spec import document
from armillary.spec.errors import UserError
from armillary.spec.home import resources
from armillary.spec.jobs import ChainJob, EvaluateJob, RegressionJob, StudyJob, SweepJob, TrainJob
from armillary.spec.loading import apply_overrides, config_digest, digest, dump_job, load_job, located
from armillary.spec.spaces import Range, load_space


def train(*overrides: str) -> TrainJob:
    job = load_job("quickstart", overrides, kind="train")
    assert isinstance(job, TrainJob)
    return job


def test_quickstart_is_what_its_file_says() -> None:
    job = train()
    assert (job.data.name, job.data.image_size, job.objective.name) == ("orl", (56, 48), "arcface")
    assert job.objective.options == {"margin": 0.5, "scale": 16}
    assert (job.train.epochs, job.train.batch_size, job.train.workers) == (40, 64, 1)


@pytest.mark.parametrize("name", ["quickstart", "quickstart.yaml", "jobs/quickstart.yaml", "./jobs/quickstart.yaml"])
def test_shipped_job_by_any_of_its_names(name: str) -> None:
    assert load_job(name) == train()


def test_file_on_disk_comes_before_the_shipped_one() -> None:
    Path("jobs").mkdir()
    Path("jobs/quickstart.yaml").write_text("objective: {name: softmax}\n")
    assert train().objective.name == "softmax"


def test_missing_kind_means_train() -> None:
    Path("job.yaml").write_text("objective: {name: softmax}\n")
    assert isinstance(load_job("job.yaml"), TrainJob)


@pytest.mark.parametrize("name", resources("jobs"))
def test_shipped_jobs_survive_a_round_trip(name: str) -> None:
    job = load_job(name)
    Path("resolved.yaml").write_text(dump_job(job))
    again = load_job("resolved.yaml")
    assert again == job
    assert digest(again) == digest(job)


def test_every_kind_ships_and_loads() -> None:
    kinds = {type(load_job(name)) for name in resources("jobs")}
    assert kinds == {TrainJob, SweepJob, StudyJob, ChainJob, RegressionJob}
    Path("job.yaml").write_text("kind: evaluate\nrun: abc\n")
    assert isinstance(load_job("job.yaml"), EvaluateJob)


def test_sweep_reads_its_base_and_space_in_and_tunes_on_validation() -> None:
    job = load_job("sweep_arcface", ["base.train.epochs=3", "space=arcface", "space.objective.margin.high=0.6"])
    assert isinstance(job, SweepJob)
    assert isinstance(job.space, dict)
    assert job.base.data.holdout == "validation"
    assert job.base.train.epochs == 3
    assert job.set == {}
    assert load_space(job.space)["objective.margin"] == Range(low=0.1, high=0.6)


def test_override_can_exchange_base_and_space() -> None:
    Path("other.yaml").write_text("objective: {name: cosface}\nseed: 5\n")
    job = load_job("sweep_arcface", ["base.train.epochs=3", "base=other.yaml", "space=cosface"])
    assert isinstance(job, SweepJob)
    assert (job.base.objective.name, job.base.seed, job.base.train.epochs) == ("cosface", 5, 3)
    assert job.base.data.holdout == "validation", "the sweep's own `set` holds for the new base too"
    assert job.space == load_job("sweep_arcface", ["space=cosface"]).model_dump()["space"]


def test_paths_are_relative_to_the_file_that_names_them() -> None:
    Path("a/b").mkdir(parents=True)
    Path("a/train.yaml").write_text("objective: {name: softmax}\n")
    Path("a/b/nightly.yaml").write_text("kind: regression\nmetrics: [{name: m}]\njobs: [{job: ../train.yaml}]\n")
    job = load_job("a/b/nightly.yaml", ["jobs.0.job.seed=7"])
    assert isinstance(job, RegressionJob)
    assert (job.jobs[0].job.objective.name, job.jobs[0].job.seed) == ("softmax", 7)


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("optimizer.lr=1e-3", 1e-3),
        ("data.name=no", "no"),
        ("data.name=a=b", "a=b"),
        ("data.image_size=[8, 8]", (8, 8)),
        ("train.threads=", None),
        ("evaluate.flip=true", True),
        ("objective.mode='1'", "1"),
    ],
)
def test_override_values_are_yaml(override: str, value: object) -> None:
    node: Any = train(override)
    for part in override.split("=")[0].split("."):
        node = getattr(node, part)
    assert node == value
    assert type(node) is type(value)


def test_new_objective_drops_the_options_of_the_old_whatever_the_order() -> None:
    for order in (["objective.temperature=0.2", "objective.name=supcon"], ["objective.name=supcon"]):
        options = train(*order).objective.options
        assert options == ({"temperature": 0.2} if len(order) == 2 else {})
    assert train("objective.name=arcface").objective.options == {"margin": 0.5, "scale": 16}
    job = train("backbone.embedding_dim=32", "backbone.name=pixels")
    assert job.backbone.embedding_dim == 32, "a key of the section itself stays"


def test_apply_overrides_checks_and_leaves_the_original_alone() -> None:
    job = train()
    changed = apply_overrides(job, {"objective.margin": 0.1, "train.epochs": 2, "data.image_size": (8, 8)})
    assert (changed.objective.options["margin"], changed.train.epochs, changed.data.image_size) == (0.1, 2, (8, 8))
    assert job == train()
    with pytest.raises(UserError) as caught:
        apply_overrides(job, {"train.epochs": -1}, where="trial 3")
    assert (caught.value.where, caught.value.key) == ("trial 3", "train.epochs")


def test_other_layers_mistakes_are_located_in_the_users_files() -> None:
    from armillary.objectives import registry

    def check(job: TrainJob) -> UserError:
        with pytest.raises(UserError) as caught, located(job):
            registry.hyperparameters(job.objective.name, job.objective.options)
        return caught.value

    Path("train.yaml").write_text("seed: 1\nobjective:\n  name: arcface\n  margin: 9\n")
    Path("sweep.yaml").write_text("kind: sweep\nspace: arcface\nbase: train.yaml\n")
    job, sweep = load_job("train.yaml"), load_job("sweep.yaml")
    assert isinstance(job, TrainJob)
    assert isinstance(sweep, SweepJob)
    assert (check(job).where, check(job).key) == ("train.yaml:4", "objective.margin")
    assert check(sweep.base).where == "train.yaml:4"
    assert check(apply_overrides(sweep.base, {"seed": 3})).where == "train.yaml:4"
    assert check(apply_overrides(job, {"objective.margin": 7}, where="trial 3")).where == "trial 3"
    overridden = load_job("train.yaml", ["objective.margin=8"])
    assert isinstance(overridden, TrainJob)
    assert check(overridden).where == "command line"
    Path("other.yaml").write_text("\n\n" + Path("train.yaml").read_text())
    assert load_job("other.yaml") == job, "where a job comes from is no part of what it says"
    with pytest.raises(UserError, match=r"^train\.yaml:1: train\.batch_size: too many$"), located(job):
        raise UserError("too many", key="train.batch_size")


def test_first_light_study_sets_hyperparameters_of_the_objective_it_names() -> None:
    study = load_job("studies/first_light")
    assert isinstance(study, StudyJob)
    jobs = {variant.name: apply_overrides(study.base, variant.set) for variant in study.variants}
    assert list(jobs) == ["arcface", "normface", "supcon", "simclr", "pixels", "untrained"]
    assert jobs["normface"].objective.options == {"scale": 16, "learn_scale": False}
    assert jobs["simclr"].objective.options == {"temperature": 0.5, "projection_hidden": 256}
    assert (jobs["pixels"].backbone.name, jobs["pixels"].train.epochs) == ("pixels", 0)


def test_config_digest_ignores_what_does_not_make_a_configuration() -> None:
    same = ["seed=3", "data.fold=2", "name=other", "tracking.experiment=x", "cluster.address=auto"]
    for override in same:
        assert config_digest(train(override)) == config_digest(train())
        assert digest(train(override)) != digest(train())
    for override in ("objective.margin=0.4", "data.label_noise=0.1", "train.epochs=39", "optimizer.lr=0.1"):
        assert config_digest(train(override)) != config_digest(train())


def test_digest_does_not_see_how_a_number_is_written() -> None:
    assert digest(train("objective.scale=16.0")) == digest(train("objective.scale=16"))
    assert digest(train("objective.scale=16.5")) != digest(train("objective.scale=16"))


def test_spaces_ship_for_the_first_seven_objectives_and_fit_them() -> None:
    from armillary.objectives import registry

    for name in ("softmax", "normface", "arcface", "cosface", "supcon", "triplet", "simclr"):
        for key, span in load_space(name).items():
            if key.startswith("objective."):
                for end in span.ends():
                    registry.hyperparameters(name, {key.removeprefix("objective."): end})


scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.text(max_size=8), scalars | st.lists(scalars, max_size=4), max_size=4))
def test_yaml_round_trip(values: dict[str, Any]) -> None:
    assert document.parse(document.dump(values), "x.yaml").values == values


@settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.binary(max_size=60) | st.text(alphabet="a:-[]{}&*!|>'\"#%@`,? \n\t0.~", max_size=40).map(str.encode))
def test_any_file_is_a_job_or_one_user_error(content: bytes) -> None:
    Path("job.yaml").write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_job("job.yaml")
    assert caught.value.where is not None
    assert caught.value.where.startswith("job.yaml")
