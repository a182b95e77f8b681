"""Procedural faces: images a second of one core, whole records with their truth, beside the floor of the arithmetic.

The floor is what the core does when it only multiplies: a picture takes about this many float32 passes over its pixels
(an upper bound on its speed, not a goal). Process time is counted, so that a busy machine disturbs little.
"""

from __future__ import annotations

import sys
import time
from itertools import islice

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from _measure import Report, arguments
from armillary.data.identities import IdentitiesSpec, records

COUNT = 1536
GOAL = {64: 1500}
# Estimated from the code: three ellipsoids with light, the background, and what is painted over whole pictures.
PASSES = 330


def images_per_second(size: int, repeats: int = 3) -> float:
    """The best of some repeats, of generating ``COUNT`` records."""
    spec = IdentitiesSpec(identities=COUNT // 16, images_per_identity=16, size=size, sets=4)
    fastest = float("inf")
    for _ in range(repeats):
        start = time.process_time()
        made = sum(1 for _ in islice(records(spec), COUNT))
        fastest = min(fastest, (time.process_time() - start) / made)
    return 1 / fastest


def floor(size: int) -> float:
    """Pictures a second if each were ``PASSES`` multiplications of its pixels, in blocks as large as the renderer's."""
    block = np.ones(65_536, dtype=np.float32)
    other = np.ones_like(block)
    start, rounds = time.process_time(), 4000
    for _ in range(rounds):
        np.multiply(block, other, out=block)
    return rounds * len(block) / (time.process_time() - start) / (PASSES * size * size)


def main() -> int:
    """Prints the table."""
    report = Report("identities", arguments(__doc__).json)
    torch.set_num_threads(1)
    next(records(IdentitiesSpec()))
    table = Table("side", "images/s of a core", "goal", "floor", "of the floor", box=None)
    for size in (32, 64, 112):
        reached, bound = images_per_second(size), floor(size)
        goal = f"{GOAL[size]:,}" if size in GOAL else ""
        if size in GOAL:
            report.goal(f"images/s of a core at {size} px", reached, at_least=GOAL[size])
        report.figure(f"images/s at {size} px, of the floor", reached / bound)
        table.add_row(f"{size} px", f"{reached:,.0f}", goal, f"{bound:,.0f}", f"{reached / bound:.0%}")
    Console().print(table)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
