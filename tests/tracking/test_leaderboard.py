from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console
from scipy import stats

from armillary.spec.errors import UserError
from armillary.tracking import format as formats
from armillary.tracking.leaderboard import Row, build_board, build_boards, lower_is_better

AUC = "verification/auc"


def rows(objective: str, *values: float, **changes: Any) -> list[Row]:
    """One run a value, seeds 0, 1, 2 and on."""
    found = []
    for seed, value in enumerate(values):
        row = Row(
            run_id=f"{objective}-{changes.get('digest', '')}-{changes.get('fold', 0)}-{seed}",
            objective=objective,
            backbone="small_convnet",
            dataset="orl",
            fingerprint="f1",
            split="identity",
            holdout="test",
            digest=objective,
            epochs=40,
            fold=0,
            seed=seed,
            created=float(seed),
            metrics={AUC: value, "verification/eer": 1 - value},
        )
        found.append(replace(row, **changes))
    return found


def many() -> list[Row]:
    """A clear best, one that cannot be told from it, one clearly worse, baselines, and one with a single seed."""
    return [
        *rows("triplet", 0.90, 0.91, 0.905, 0.902),
        *rows("arcface", 0.970, 0.981, 0.975, 0.978),
        *rows("cosface", 0.972, 0.975, 0.980, 0.974),
        *rows("softmax", 0.93),
        *rows("arcface", 0.85, 0.86, 0.84, 0.85, epochs=0, digest="u"),
        *rows("arcface", 0.94, 0.94, 0.94, 0.94, epochs=0, digest="p", backbone="pixels"),
    ]


def test_a_study_over_several_datasets_is_one_board() -> None:
    """Label noise is part of what a board is judged on; a study that varies it compares across it all the same."""
    size, noise = {"data.image_size": [32, 32]}, {"data.label_noise": 0.5}
    clean = rows("arcface", 0.97, 0.98, variant="clean", changes=size)
    noisy = rows("arcface", 0.90, 0.91, variant="noisy", changes=size | noise, fingerprint="f2")
    assert len(build_boards([*clean, *noisy], AUC)) == 2
    board = build_board([*noisy, *clean], AUC)
    assert [group.variant for group in board.groups] == ["clean", "noisy"]
    assert board.title == "orl, split by identity, test, image_size=[32, 32]"
    with pytest.raises(UserError, match="verification/auk"):
        build_board(clean, "verification/auk")


def test_order_and_verdicts() -> None:
    (board,) = build_boards(many(), AUC)
    labels = [(group.label, group.verdict) for group in board.groups]
    assert labels == [
        ("arcface", "best"),
        ("cosface", "tied"),
        ("pixels", "worse"),
        ("softmax", "untested"),
        ("triplet", "worse"),
        ("untrained", "worse"),
    ]
    assert [group.baseline for group in board.groups] == [False, False, True, False, False, True]


def test_p_values_are_paired_and_corrected() -> None:
    (board,) = build_boards(many(), AUC)
    best = list(board.groups[0].values.values())
    tested = {group.label: group for group in board.groups if group.p is not None}
    raw = {name: stats.ttest_rel(list(group.values.values()), best).pvalue for name, group in tested.items()}
    assert {group.difference.test for group in tested.values() if group.difference} == {"paired"}
    smallest = min(raw, key=lambda name: float(raw[name]))
    assert tested[smallest].p == pytest.approx(len(raw) * raw[smallest], rel=1e-6)
    largest = max(raw, key=lambda name: float(raw[name]))
    assert tested[largest].p == pytest.approx(raw[largest], rel=1e-6)


def test_other_seeds_are_compared_by_welch() -> None:
    a, b = rows("a", 0.9, 0.91, 0.92), rows("b", 0.8, 0.81, 0.82, 0.805)
    (board,) = build_boards(a + b, AUC)
    worse = board.groups[1]
    assert worse.difference is not None
    assert worse.difference.test == "welch"
    expected = stats.ttest_ind([row.metrics[AUC] for row in b], [row.metrics[AUC] for row in a], equal_var=False)
    assert worse.p == pytest.approx(expected.pvalue, rel=1e-9)
    assert "Welch" in " ".join(formats.legend(board))


def test_low_metrics_rank_upwards() -> None:
    (board,) = build_boards(many(), "verification/eer")
    assert board.groups[0].label == "arcface"
    assert board.groups[-1].label == "untrained"
    assert lower_is_better("train/loss")
    assert not lower_is_better("verification/tar_at_far_1e-2")


def test_groups_join_seeds_and_folds_only() -> None:
    found = [
        *rows("a", 0.9, 0.8, fold=0),
        *rows("a", 0.7, fold=1),
        *rows("a", 0.6, digest="other"),
        *rows("a", 0.5, variant="ablation"),
        *rows("a", 0.4, backbone="timm/resnet18"),
    ]
    (board,) = build_boards(found, AUC)
    first = board.groups[0]
    assert len(board.groups) == 4
    assert (first.folds, first.seeds, len(first.run_ids)) == ((0, 1), (0, 1), 3)
    assert first.metrics[AUC].mean == pytest.approx(0.8)


def test_a_repeated_seed_is_no_new_evidence() -> None:
    again = replace(rows("a", 0.7)[0], run_id="newer", created=99.0)
    (board,) = build_boards([again, *rows("a", 0.9)], AUC)
    group = board.groups[0]
    assert group.run_ids == ("newer",)
    assert group.metrics[AUC].half_width is None
    assert group.metrics[AUC].mean == 0.7


def test_other_data_is_another_board() -> None:
    noisy = rows("a", 0.99, 0.98, fingerprint="f2", changes={"data.label_noise": 0.2})
    boards = build_boards([*many(), *noisy, *rows("a", 0.999, holdout="validation")], AUC)
    assert [board.title for board in boards] == [
        "orl, split by identity, test",
        "orl, split by identity, test, label_noise=0.2",
        "orl, split by identity, validation",
    ]
    assert boards[0].groups[0].label == "arcface"


def test_missing_and_infinite_values_are_counted_out() -> None:
    broken = replace(rows("a", 0.5)[0], seed=7, metrics={AUC: float("nan")})
    (board,) = build_boards([*rows("a", 0.9, 0.8), broken, replace(broken, seed=8, metrics={})], AUC)
    assert board.skipped == 2
    assert board.groups[0].seeds == (0, 1)
    assert "2 runs have no finite verification/auc" in " ".join(formats.legend(board))


def test_unknown_metric_names_the_nearest() -> None:
    with pytest.raises(UserError, match="verification/acu") as caught:
        build_boards(many(), "verification/acu")
    assert "did you mean 'verification/auc'" in str(caught.value)
    assert build_boards([], AUC) == []


def test_configurations_show_where_they_differ() -> None:
    found = [
        *rows("arcface", 0.9, digest="1", changes={"objective.margin": 0.3, "train.epochs": 5}),
        *rows("arcface", 0.8, digest="2", changes={"objective.margin": 0.5, "train.epochs": 5}),
        *rows("arcface", 0.7, digest="3", changes={"train.epochs": 5}),
        *rows("supcon", 0.6, changes={"train.epochs": 9}),
    ]
    (board,) = build_boards(found, AUC)
    assert [group.config for group in board.groups] == ["margin=0.3", "margin=0.5", "margin=default", ""]


def test_limit_keeps_the_tests_of_the_whole_board() -> None:
    (whole,), (short,) = build_boards(many(), AUC), build_boards(many(), AUC, limit=2)
    assert short.groups == whole.groups[:2]


@pytest.mark.parametrize(
    ("value", "half", "text"),
    [
        (0.97812, 0.0063, "0.978 ± 0.006"),
        (0.97812, None, "0.978"),
        (0.978123, 0.000214, "0.97812 ± 0.00021"),
        (0.5, 0.0, "0.500 ± 0.000"),
        (12.3456, 0.5, "12.35 ± 0.50"),
        (123.456, 2.5, "123.5 ± 2.5"),
        (-3.21987, None, "-3.220"),
        (0.0, None, "0.000"),
        (0.00001234, None, "0.00001234"),
        (float("inf"), None, "inf"),
    ],
)
def test_numbers_have_sensible_digits(value: float, half: float | None, text: str) -> None:
    assert formats.number(value, half) == text


def test_csv_reads_back() -> None:
    boards = build_boards(many(), AUC)
    lines = list(csv.DictReader(io.StringIO(formats.as_csv(boards))))
    assert [line["label"] for line in lines] == [group.label for group in boards[0].groups]
    for line, group in zip(lines, boards[0].groups, strict=True):
        summary = group.metrics[AUC]
        assert float(line[AUC]) == summary.mean
        assert line[f"{AUC} ±"] == ("" if summary.half_width is None else repr(summary.half_width))
        assert int(line["runs"]) == summary.n
        assert float(line["verification/eer"]) == group.metrics["verification/eer"].mean


def test_json_reads_back() -> None:
    boards = build_boards(many(), AUC)
    (board,) = json.loads(formats.as_json(boards))
    assert board["metric"] == AUC
    for rank, (plain, group) in enumerate(zip(board["groups"], boards[0].groups, strict=True), start=1):
        assert plain["rank"] == rank
        assert plain["metrics"][AUC]["mean"] == group.metrics[AUC].mean
        assert plain["runs"] == list(group.run_ids)
        assert {(item["fold"], item["seed"]): item["value"] for item in plain["values"]} == dict(group.values)


def test_markdown_is_one_pipe_table_a_board() -> None:
    boards = build_boards([*many(), *rows("a|b", 0.5, fingerprint="f2")], AUC)
    text = formats.as_markdown(boards)
    tables = [line for line in text.splitlines() if line.startswith("|")]
    cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in tables]
    assert {len(row) for row in cells} == {len(cells[0])}
    assert len(tables) == 6 + 1 + 2 * 2
    assert "a\\|b" in text
    assert "0.976 ± 0.007" in text


def test_latex_rows_have_as_many_cells_as_columns() -> None:
    text = formats.as_latex(build_boards(rows("a_b", 0.9, 0.8), AUC))
    columns = re.search(r"begin\{tabular\}\{(\w+)\}", text)
    assert columns
    body = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert {len(line.split(" & ")) for line in body} == {len(columns.group(1))}
    assert r"a\_b" in text


@pytest.mark.parametrize("width", [60, 80, 140])
def test_tables_fit_their_terminal(width: int) -> None:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    with console.capture() as captured:
        console.print(formats.as_table(build_boards(many(), AUC), width))
    text = captured.get()
    assert max(len(line.rstrip()) for line in text.splitlines()) <= width
    for label in ("arcface", "cosface", "pixels", "untrained", "0.976 ± 0.007"):
        assert label in text
    # Other metrics and the backbone are for those who have the room.
    assert ("EER" in text) == (width >= 110)
