"""Runs every benchmark, one after another, and ends with all their verdicts.

``python bench/_all.py [NAME ...] [--json FILE]``: all scripts of this folder, or the named ones. A script that fails
is named at the end and does not keep the others from running. The exit code is 1 if one failed or missed a goal.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _measure import parser, verdicts

HERE = Path(__file__).resolve().parent


def run(name: str, folder: Path) -> dict[str, Any]:
    """What one script found, how long it took, and its exit code."""
    found = folder / f"{name}.json"
    print(f"== {name}", flush=True)
    start = time.perf_counter()
    code = subprocess.run([sys.executable, HERE / f"{name}.py", "--json", found], check=False).returncode
    seconds = time.perf_counter() - start
    print(f"   ({seconds:.0f} s)\n", flush=True)
    content = json.loads(found.read_text()) if found.exists() else {"bench": name, "goals": [], "figures": {}}
    # 1 with a file is a goal that was missed; anything else is a script that broke.
    return {**content, "seconds": seconds, "failed": code != 0 and not (code == 1 and found.exists())}


def main() -> int:
    """Runs them; 1 if a goal was missed or a script failed."""
    options = parser(__doc__)
    known = sorted(path.stem for path in HERE.glob("[a-z]*.py"))
    options.add_argument("names", nargs="*", metavar="NAME", help=", ".join(known))
    given = options.parse_args()
    wrong = [name for name in given.names if name not in known]
    if wrong:
        options.error(f"no benchmark is called {wrong[0]}; there are {', '.join(known)}")
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    with tempfile.TemporaryDirectory() as folder:
        results = [run(name, Path(folder)) for name in given.names or known]
    goals = [{**goal, "goal": f"{each['bench']}: {goal['goal']}"} for each in results for goal in each["goals"]]
    print("== verdicts")
    for line in verdicts(goals):
        print(line)
    broken = [each["bench"] for each in results if each["failed"]]
    met = sum(goal["met"] for goal in goals)
    print(f"{met} of {len(goals)} goals met in {sum(each['seconds'] for each in results):.0f} s", end="")
    print(f"; failed: {', '.join(broken)}" if broken else "")
    if given.json is not None:
        given.json.write_text(json.dumps(results, indent=2) + "\n")
    return 0 if met == len(goals) and not broken else 1


if __name__ == "__main__":
    sys.exit(main())
