"""Regressions with a real, cheap trainer: verdicts, what is stored, and what can never pass."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from armillary.regression.baseline import Baseline
from armillary.regression.gate import exit_code, overall
from armillary.regression.results import latest_result, load_results
from armillary.regression.runner import OnResult, Runner, bless, check, expand, judge, run_regression
from armillary.spec.errors import UserError
from armillary.spec.jobs import GateMetric, RegressionJob
from armillary.training.api import Submission
from armillary.training.rundir import RunRecord


def verdicts(name: str = "nightly") -> set[str]:
    return {decision.verdict for decision in check(name)}


def test_the_first_run_has_no_baseline_then_repeats_pass(regression: RegressionJob, runner: Runner) -> None:
    result = run_regression(regression, runner)
    assert verdicts() == {"no baseline"}
    assert "nothing is blessed for 'sharp'" in check("nightly")[0].reason.lower()
    assert exit_code(check("nightly")) == 0
    bless("nightly", "first light")
    assert verdicts() == {"pass"}

    again = run_regression(regression, runner)
    assert [run.metrics for run in again.runs] == [run.metrics for run in result.runs], "same seeds, same numbers"
    decisions = check("nightly")
    assert [(item.job, item.metric, item.verdict) for item in decisions] == [
        (job, f"identification/{metric}", "pass") for job in ("sharp", "soft") for metric in ("rank1", "error")
    ]
    assert all(item.candidate_mean and item.candidate_mean > 0.9 for item in decisions if "rank1" in item.metric)
    assert len(load_results("nightly")) == 2


def test_a_planted_drop_regresses(blessed: RegressionJob, runner: Runner) -> None:
    result = run_regression(blessed, runner, overrides={"objective.scale": 1})
    assert verdicts() == {"regressed"}
    assert exit_code(check("nightly")) == 1
    assert result.overrides == {"objective.scale": 1}
    assert all(item.change is not None and item.change < -0.1 for item in check("nightly"))
    with pytest.raises(UserError, match=r"overrides \(objective\.scale=1\)"):
        bless("nightly", "sneak it in")
    run_regression(blessed, runner)
    assert verdicts() == {"pass"}


def test_other_seeds_use_welch(blessed: RegressionJob, runner: Runner) -> None:
    run_regression(apply(blessed, seeds=(7, 8, 9)), runner)
    methods = {decision.method for decision in check("nightly")}
    assert methods == {"welch"}
    assert exit_code(check("nightly")) == 0


def apply(job: RegressionJob, **changes: object) -> RegressionJob:
    return job.model_copy(update=changes)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"status": "failed", "error": "Traceback\nMemoryError: no room"}, "seed 1 is failed: MemoryError: no room"),
        ({"status": "stopped"}, "seed 1 is stopped"),
        ({"metrics": {"identification/error": 0.1}}, "finished without reporting identification/rank1"),
        ({"metrics": {"identification/rank1": float("nan"), "identification/error": 0.1}}, "rank1 as nan"),
    ],
)
def test_a_missing_run_is_not_a_pass(
    blessed: RegressionJob, runner: Runner, change: dict[str, object], words: str
) -> None:
    def one_is_missing(submissions: Sequence[Submission], on_result: OnResult) -> list[RunRecord]:
        records = runner(submissions, lambda *_: None)
        records[1] = records[1].model_copy(update=change)
        return records

    run_regression(blessed, one_is_missing)
    first = check("nightly")[0]
    assert (first.job, first.verdict) == ("sharp", "missing")
    assert words in first.reason
    assert exit_code(check("nightly")) == 1
    with pytest.raises(UserError, match="cannot be blessed"):
        bless("nightly", "good enough")


def test_a_killed_regression_is_missing_not_the_older_pass(blessed: RegressionJob, runner: Runner) -> None:
    class Killed(BaseException):
        pass

    def dies(submissions: Sequence[Submission], on_result: OnResult) -> list[RunRecord]:
        runner(submissions[:2], on_result)
        raise Killed

    with pytest.raises(Killed):
        run_regression(blessed, dies)
    stored = latest_result("nightly")
    assert [run.status for run in stored.runs] == ["finished"] * 2 + ["created"] * 4
    assert (stored.finished, stored.error) == (None, "Killed: ")
    assert overall(check("nightly")) == "missing"
    assert "1 of 3 runs missing: seed 2 never ran" in check("nightly")[0].reason


def test_a_runner_that_loses_a_record_is_an_error(blessed: RegressionJob, runner: Runner) -> None:
    with pytest.raises(RuntimeError, match="5 records for 6 runs"):
        run_regression(blessed, lambda submissions, _: runner(submissions[:5], lambda *_: None))
    assert overall(check("nightly")) == "missing"


def test_a_users_mistake_leaves_no_result(regression: RegressionJob, armillary_home: Path) -> None:
    def refuses(submissions: Sequence[Submission], on_result: OnResult) -> list[RunRecord]:
        raise UserError("unknown objective 'normfaec'")

    with pytest.raises(UserError, match="normfaec"):
        run_regression(regression, refuses)
    assert not list(armillary_home.rglob("*.json"))


def test_other_data_is_never_compared(blessed: RegressionJob, runner: Runner) -> None:
    def on_other_data(submissions: Sequence[Submission], on_result: OnResult) -> list[RunRecord]:
        records = runner(submissions, lambda *_: None)
        return [record.model_copy(update={"fingerprint": "feedfacefeedface"}) for record in records]

    run_regression(blessed, on_other_data, overrides={"objective.scale": 0.01})
    decisions = check("nightly")
    assert {item.verdict for item in decisions} == {"no baseline"}
    assert "fingerprint is 'feedfacefeed'" in decisions[0].reason
    assert all(item.interval is None and item.baseline_mean is None for item in decisions)

    run_regression(blessed, on_other_data)
    bless("nightly", "the store was imported again")
    assert verdicts() == {"pass"}
    # The older data still has the baseline that was blessed for it.
    run_regression(blessed, runner)
    assert verdicts() == {"pass"}


def test_an_edited_configuration_is_never_compared(blessed: RegressionJob, runner: Runner) -> None:
    edited = tuple(
        entry.model_copy(update={"set": {**entry.set, "objective.scale": 0.01}}) if entry.job.name == "soft" else entry
        for entry in blessed.jobs
    )
    run_regression(apply(blessed, jobs=edited), runner)
    by_job = {item.job: item for item in check("nightly")}
    assert by_job["sharp"].verdict == "pass"
    assert by_job["soft"].verdict == "no baseline"
    assert "configuration of 'soft' in the job file changed" in by_job["soft"].reason


def test_a_metric_gated_later_already_has_its_baseline(regression: RegressionJob, runner: Runner) -> None:
    run_regression(apply(regression, metrics=regression.metrics[:1]), runner)
    bless("nightly", "one metric")
    run_regression(regression, runner)
    assert verdicts() == {"pass"}
    absent = GateMetric(name="verification/auc")
    assert {item.verdict for item in judge(latest_result("nightly"), metrics=[absent])} == {"missing"}


def test_check_takes_tolerances_from_the_file(blessed: RegressionJob, runner: Runner) -> None:
    run_regression(blessed, runner, overrides={"objective.scale": 0.01})
    lenient = tuple(metric.model_copy(update={"tolerance": 1.0}) for metric in blessed.metrics)
    assert {item.verdict for item in check("nightly", apply(blessed, metrics=lenient))} == {"pass"}


def test_history_of_blessings(blessed: RegressionJob, runner: Runner, armillary_home: Path) -> None:
    run_regression(blessed, runner)
    bless("nightly", "  again, on purpose  ")
    first, second = Baseline.load("nightly").blessings
    assert (first.why, second.why) == ("first light", "again, on purpose")
    assert first.when < second.when
    assert (second.commit, bool(second.who)) == ("c0ffee", True)
    assert [result.result_id for result in load_results("nightly")] == [first.result_id, second.result_id]
    stored = json.loads((armillary_home / "regressions" / "nightly" / "baseline.json").read_text())
    assert [entry["job"] for entry in stored["blessings"][1]["entries"]] == ["sharp", "soft"]
    with pytest.raises(UserError, match="needs a reason"):
        bless("nightly", " ")
    assert len(Baseline.load("nightly").blessings) == 2


def test_state_that_cannot_be_read_is_named(blessed: RegressionJob, armillary_home: Path) -> None:
    path = armillary_home / "regressions" / "nightly" / "baseline.json"
    path.write_text(path.read_text()[:50])
    with pytest.raises(UserError) as caught:
        check("nightly")
    assert str(path) in str(caught.value)


def test_unknown_regression_shows_the_nearest(blessed: RegressionJob) -> None:
    with pytest.raises(UserError, match="unknown regression 'nigthly'") as caught:
        check("nigthly")
    assert "'nightly'" in str(caught.value.hint)


def test_never_run(armillary_home: Path) -> None:
    with pytest.raises(UserError, match="has no result yet"):
        check("nightly")


def test_expand(regression: RegressionJob) -> None:
    planned = expand(regression, {"objective.scale": 2})
    assert [(run.job, run.seed, job.seed) for run, job in planned] == [
        (name, seed, seed) for name in ("sharp", "soft") for seed in (0, 1, 2)
    ]
    assert {job.objective.options["scale"] for _, job in planned} == {2}
    assert {job.train.epochs for _, job in planned} == {40}
    unchanged = expand(regression)
    assert [run.config for run, _ in planned] == [run.config for run, _ in unchanged], "overrides keep the baseline"
    assert len({run.config for run, _ in unchanged}) == 2


def test_expand_refuses_ambiguity(regression: RegressionJob) -> None:
    twice = tuple(entry.model_copy(update={"name": "same"}) for entry in regression.jobs)
    with pytest.raises(UserError, match="two jobs of regression 'nightly' are called 'same'"):
        expand(apply(regression, jobs=twice))
    with pytest.raises(UserError, match="a seed is listed twice"):
        expand(apply(regression, seeds=(1, 1)))


def test_another_fold_is_another_question(blessed: RegressionJob, runner: Runner) -> None:
    run_regression(blessed, runner, overrides={"data.fold": 1})
    assert verdicts() == {"no baseline"}
    assert check("nightly")[0].reason == "Fold 1 was run, fold 0 is blessed."


def test_the_cluster_and_the_tracker_do_not_separate_baselines(blessed: RegressionJob, runner: Runner) -> None:
    moved = tuple(
        entry.model_copy(update={"set": {**entry.set, "tracking.experiment": "x", "cluster.address": "auto"}})
        for entry in blessed.jobs
    )
    run_regression(apply(blessed, jobs=moved), runner)
    assert verdicts() == {"pass"}
