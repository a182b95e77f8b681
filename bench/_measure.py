"""What the benchmarks share: ways that take turns, memory of a process, and a verdict for every goal.

Every script imports this as ``_measure`` (its own folder is on the path). Ways of doing one thing take turns, so that
what else the machine does falls on all of them alike, and ratios come from one run.

    from _measure import Report, arguments, best_times

    def main() -> int:
        given = arguments(__doc__, repetitions=7)
        report = Report("class_head", given.json)
        times = best_times({"ours": ours, "peer": theirs}, given.repetitions)
        report.goal("faster than the peer", times["peer"] / times["ours"], at_least=3, unit="x")
        return report.finish()
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

MEGABYTE = 2**20


def parser(description: str | None, repetitions: int | None = None) -> argparse.ArgumentParser:
    """A parser that knows ``--json FILE`` and, when a number is given, how often a way is repeated.

    Args:
        description: the script's docstring, printed as it is.
        repetitions: the default of the only positional argument; there is none without it.
    """
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--json", type=Path, metavar="FILE", help="write figures and verdicts there as well")
    if repetitions is not None:
        result.add_argument("repetitions", type=int, nargs="?", default=repetitions, help="of each way")
    return result


def arguments(description: str | None, repetitions: int | None = None) -> argparse.Namespace:
    """What the command line says, for scripts that need no options of their own."""
    return parser(description, repetitions).parse_args()


def times_in_turns(
    ways: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    clock: Callable[[], float] = time.perf_counter,
    warm_up: int = 1,
) -> dict[str, list[float]]:
    """Seconds of every way in every round; in a round each is run once, after some rounds that do not count."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + warm_up):
        for name, way in ways.items():
            start = clock()
            way()
            if number >= warm_up:
                taken[name].append(clock() - start)
    return taken


def best_times(
    ways: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    clock: Callable[[], float] = time.perf_counter,
    warm_up: int = 1,
) -> dict[str, float]:
    """Seconds of every way's fastest round."""
    return {name: min(times) for name, times in times_in_turns(ways, rounds, clock=clock, warm_up=warm_up).items()}


def resident(field: str = "VmRSS") -> int:
    """Bytes that this process holds (``VmRSS``) or held at most (``VmHWM``), by the kernel's own record.

    The kernel's rusage would count what the parent held before this process was its own.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {field} in /proc/self/status")


def growth_during(step: Callable[[], object]) -> int:
    """By how many bytes this process grows at most during ``step``; what it loads should have been loaded before."""
    before = resident()
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    step()
    return resident("VmHWM") - before


def in_fresh_process(script: str, *given: object) -> str:
    """What a script prints when it is run with these arguments in a process of its own."""
    command = [sys.executable, script, *(str(value) for value in given)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


class Report:
    """Collects a script's figures and goals; prints one line of verdict for every goal at the end.

    Args:
        name: of the script, without its ending.
        path: where :meth:`finish` writes them as JSON; ``None``: nowhere.
    """

    def __init__(self, name: str, path: Path | None = None) -> None:
        self.name, self.path = name, path
        self.figures: dict[str, float] = {}
        self.goals: list[dict[str, Any]] = []

    def figure(self, name: str, value: float) -> None:
        """Keeps a number that has no goal, for the JSON file; the script prints it in its own way."""
        self.figures[name] = float(value)

    def goal(
        self,
        name: str,
        measured: float,
        *,
        at_least: float = -math.inf,
        at_most: float = math.inf,
        unit: str = "",
        limit: float | None = None,
    ) -> bool:
        """Judges one number against its bound; says whether it is met. Exactly one bound must be given.

        Args:
            name: of the goal.
            measured: the number.
            at_least: its lower bound.
            at_most: its upper bound.
            unit: what the numbers are.
            limit: the best that this machine could do, measured too. A goal beyond it is missed all the same; the
                verdict says that the machine is why.
        """
        if (at_least == -math.inf) == (at_most == math.inf):
            raise ValueError("one of at_least and at_most must be given")
        met = bool(at_least <= measured <= at_most)
        bound = f"at least {at_least:g}{unit}" if at_most == math.inf else f"at most {at_most:g}{unit}"
        found = {"goal": name, "measured": float(measured), "bound": bound, "unit": unit, "met": met}
        if limit is not None and not at_least <= limit <= at_most:
            found["limit"] = float(limit)
        self.goals.append(found)
        return met

    def finish(self) -> int:
        """Prints the verdicts and writes the JSON file; 0 when every goal is met, else 1."""
        if self.goals:
            print()
        for line in verdicts(self.goals):
            print(line, flush=True)
        if self.path is not None:
            content = {"bench": self.name, "goals": self.goals, "figures": self.figures}
            self.path.write_text(json.dumps(content, indent=2) + "\n")
        return 0 if all(goal["met"] for goal in self.goals) else 1


def verdicts(goals: list[dict[str, Any]]) -> list[str]:
    """A line a goal: what it is, what was measured, what was wanted, met or not."""
    wide = max((len(goal["goal"]) for goal in goals), default=0)
    lines = []
    for goal in goals:
        measured = f"{goal['measured']:.4g}{goal['unit']}"
        verdict = "met" if goal["met"] else "NOT MET"
        if "limit" in goal and not goal["met"]:
            verdict += f", out of this machine's reach: {goal['limit']:.3g}{goal['unit']} at best"
        lines.append(f"goal: {goal['goal']:{wide}}  {measured:>10}  ({goal['bound']})  {verdict}")
    return lines
