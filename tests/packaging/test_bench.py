"""What the benchmarks share: verdicts, files and turns; and that each script can be asked for its options."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture(scope="module")
def measure() -> Any:
    spec = importlib.util.spec_from_file_location("_measure", BENCH / "_measure.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_report_judges_prints_and_writes(measure: Any, tmp_path: Path, capsys: Any) -> None:
    report = measure.Report("pretend", tmp_path / "found.json")
    assert report.goal("speed", 3.5, at_least=3, unit="x")
    report.figure("size", 7)
    assert report.finish() == 0
    assert not report.goal("memory", 2.0, at_most=1.5, unit=" GB")
    assert report.finish() == 1
    lines = capsys.readouterr().out.splitlines()
    assert " ".join(lines[-2].split()) == "goal: speed 3.5x (at least 3x) met"
    assert " ".join(lines[-1].split()) == "goal: memory 2 GB (at most 1.5 GB) NOT MET"
    written = json.loads((tmp_path / "found.json").read_text())
    assert [goal["met"] for goal in written["goals"]] == [True, False]
    assert written["figures"] == {"size": 7.0}


def test_a_goal_beyond_the_machine_is_missed_and_explained(measure: Any, capsys: Any) -> None:
    report = measure.Report("pretend")
    assert not report.goal("fast", 2.0, at_least=6, unit="x", limit=3.44)
    assert not report.goal("slow", 2.0, at_least=6, unit="x", limit=7.0)
    assert report.finish() == 1
    beyond, within = (" ".join(line.split()) for line in capsys.readouterr().out.splitlines()[-2:])
    assert beyond.endswith("NOT MET, out of this machine's reach: 3.44x at best")
    assert within.endswith("NOT MET")


def test_not_a_number_meets_no_goal(measure: Any) -> None:
    assert not measure.Report("pretend").goal("speed", float("nan"), at_least=0)
    with pytest.raises(ValueError, match="one of"):
        measure.Report("pretend").goal("speed", 1.0, at_least=0, at_most=2)


def test_ways_take_turns_and_the_first_round_does_not_count(measure: Any) -> None:
    called: list[str] = []
    ways = {name: lambda name=name: called.append(name) for name in ("a", "b")}
    times = measure.times_in_turns(ways, 2)
    assert called == ["a", "b"] * 3
    assert [len(values) for values in times.values()] == [2, 2]


def test_growth_sees_what_a_step_held_for_a_while(measure: Any) -> None:
    grown = measure.growth_during(lambda: bytes(bytearray(b"x" * 50_000_000)))
    assert grown >= 45_000_000


def test_an_unknown_benchmark_is_named() -> None:
    done = subprocess.run([sys.executable, BENCH / "_all.py", "nonsense"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no benchmark is called nonsense" in done.stderr
