"""Cron lines mean what cron(5) says, and a wrong one says where it is wrong."""

from __future__ import annotations

from datetime import datetime, timedelta
from zoneinfo import ZoneInfo

import pytest

from armillary.regression.cron import parse, trigger
from armillary.spec.errors import UserError

UTC = ZoneInfo("UTC")


def days_of_november(line: str, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Days of November 2026 (the 1st is a Sunday) on which a line fires."""
    monkeypatch.setattr("apscheduler.triggers.cron.get_localzone", lambda: UTC)
    now = datetime(2026, 11, 1, tzinfo=UTC) - timedelta(seconds=1)
    found: list[int] = []
    rule, last = trigger(line), None
    while True:
        last = rule.get_next_fire_time(last, now)
        if last is None or (last.year, last.month) != (2026, 11):
            return found
        found.append(last.day)
        now = last + timedelta(seconds=1)


@pytest.mark.parametrize(
    ("line", "days"),
    [
        ("0 3 * * 0", [1, 8, 15, 22, 29]),
        ("0 3 * * 7", [1, 8, 15, 22, 29]),
        ("0 3 * * Sun", [1, 8, 15, 22, 29]),
        ("0 3 * * 1", [2, 9, 16, 23, 30]),
        ("0 3 * * fri-7", [1, 6, 7, 8, 13, 14, 15, 20, 21, 22, 27, 28, 29]),
        ("0 3 * * */3", [1, 4, 7, 8, 11, 14, 15, 18, 21, 22, 25, 28, 29]),
        ("0 3 10-12,20 nov *", [10, 11, 12, 20]),
        # Both days restricted: either of them, as cron does it.
        ("0 3 3 * 0", [1, 3, 8, 15, 22, 29]),
        ("30 4 */15 11 *", [1, 16]),
    ],
)
def test_days(line: str, days: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    assert days_of_november(line, monkeypatch) == days


def test_fields() -> None:
    fields = parse("*/20 9-17/4 1 jan,Jul 5-7")
    assert [sorted(field) for field in fields] == [[0, 20, 40], [9, 13, 17], [1], [1, 7], [0, 5, 6]]
    assert sorted(parse("50/5 * * * *")[0]) == [50, 55]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("0 3 * *", ["4 fields", "5"]),
        ("@daily", ["1 field,", "5"]),
        ("60 3 * * *", ["the minute of", "60 is out of range", "0..59"]),
        ("0 24 * * *", ["the hour of", "24 is out of range"]),
        ("0 3 0 * *", ["the day of month of", "0 is out of range"]),
        ("0 3 * 13 *", ["the month of", "13 is out of range", "jan..dec"]),
        ("0 3 * * 8", ["the day of week of", "8 is out of range"]),
        ("0 3 * * funday", ["the day of week of", "'funday' is not a number"]),
        ("0 5-3 * * *", ["the hour of", "'5-3' runs backwards"]),
        ("*/0 3 * * *", ["the minute of", "step in '*/0' is 0"]),
        ("1,,2 3 * * *", ["the minute of", "'' is not a value"]),
        ("-5 3 * * *", ["the minute of", "'-5' is not a value"]),
        ("0 3 31 2,4 *", ["never comes", "day 31"]),
        ("0 3 L * *", ["the day of month of", "'L' is not a number"]),
    ],
)
def test_a_wrong_line_names_its_fault(line: str, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        parse(line, where="nightly.yaml")
    message = str(caught.value)
    assert message.startswith("nightly.yaml: schedule: ")
    for word in words:
        assert word in message
