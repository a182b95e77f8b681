"""Losses over pairs and tuples beside pytorch-metric-learning and lightly: time and memory of a forward and backward pass.

``OMP_NUM_THREADS=2 python bench/tuples.py [repetitions]``: 2,048 embeddings of 128 dimensions, 64 classes of 32; NT-Xent
on 4,096 views. float32. Ours and the peer take turns; each one's best time counts. Memory is what the peak of a fresh
process rises by during one step, after the same step on a small batch has loaded what the first one loads.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from armillary import losses

DIM, CLASSES, EACH = 128, 64, 32
MEGABYTE = 2**20
Step = Callable[[Tensor, Tensor], Tensor]


def embeddings(samples: int) -> tuple[Tensor, Tensor]:
    """Clusters that overlap, so that miners find hard and easy ones, and their labels."""
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(samples) // EACH
    centres = 0.5 * torch.randn(CLASSES, DIM, generator=draw)
    return torch.randn(samples, DIM, generator=draw) + centres[labels % CLASSES], labels


def ways(name: str) -> tuple[Step, Step]:
    """Ours and the peer's of the same loss."""
    from lightly.loss import NTXentLoss
    from pytorch_metric_learning import losses as peers
    from pytorch_metric_learning import miners

    def mined(loss: Step, miner: Callable[[Tensor, Tensor], object]) -> Step:
        return lambda vectors, labels: loss(vectors, labels, miner(vectors, labels))  # type: ignore[call-arg]

    def views(loss: Step) -> Step:
        return lambda vectors, _: loss(*vectors.chunk(2))

    table: dict[str, Callable[[], tuple[Step, Step]]] = {
        "SupCon": lambda: (losses.SupCon(0.1), peers.SupConLoss(0.1)),
        "multi-similarity": lambda: (
            losses.MultiSimilarity(),
            mined(peers.MultiSimilarityLoss(), miners.MultiSimilarityMiner(0.1)),
        ),
        "circle": lambda: (losses.Circle(0.25, 80.0), peers.CircleLoss(0.25, 80)),
        "batch-hard": lambda: (
            losses.Triplet(0.2, "batch_hard", squared=False),
            mined(peers.TripletMarginLoss(0.2), miners.BatchHardMiner()),
        ),
        "all triplets": lambda: (losses.Triplet(0.2, "all", squared=False), peers.TripletMarginLoss(0.2)),
        "NT-Xent": lambda: (views(losses.NTXent(0.5)), views(NTXentLoss(0.5))),
    }
    return table[name]()


SAMPLES = {
    **dict.fromkeys(["SupCon", "multi-similarity", "circle", "batch-hard", "all triplets"], CLASSES * EACH),
    "NT-Xent": 4096,
}


def step(loss: Step, vectors: Tensor, labels: Tensor) -> float:
    """Seconds of one forward and backward pass."""
    leaf = vectors.clone().requires_grad_()
    start = time.perf_counter()
    loss(leaf, labels).backward()
    return time.perf_counter() - start


def peak() -> float:
    """The largest this process has been, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MEGABYTE


def memory_of(name: str, which: int, samples: int) -> None:
    """Prints by how much one step raises this process's peak, and how long it takes."""
    loss = ways(name)[which]
    step(loss, *embeddings(128))
    whole = embeddings(samples)
    before = peak()
    seconds = step(loss, *whole)
    print(peak() - before, seconds)


def memory(name: str, which: int, samples: int) -> tuple[float, float] | None:
    """The same in a fresh process; None where the machine's memory does not suffice."""
    command = [sys.executable, str(Path(__file__).resolve()), "memory", name, str(which), str(samples)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return None
    megabytes, seconds = map(float, done.stdout.split()[-2:])
    return megabytes, seconds


def compare(name: str, repetitions: int) -> str:
    """One row: both times, both memories, their ratios."""
    vectors, labels = embeddings(SAMPLES[name])
    spaces = [memory(name, which, SAMPLES[name]) for which in (0, 1)]
    alone = name == "all triplets"
    # The peer's 4 billion numbers are built once, in the process that is measured for memory.
    turns = [partial(step, loss, vectors, labels) for loss in ways(name)[: 1 if alone else 2]]
    best = [float("inf"), float("inf")]
    for _ in range(repetitions):
        for number, turn in enumerate(turns):
            best[number] = min(best[number], turn())
    if alone and spaces[1] is not None:
        best[1] = spaces[1][1]
    times = f"{1e3 * best[0]:9.1f} {1e3 * best[1]:9.1f} {best[1] / best[0]:7.1f}x"
    if spaces[0] is None or spaces[1] is None:
        return f"{name:18}{times}  memory not measured"
    ours, other = spaces[0][0], spaces[1][0]
    return f"{name:18}{times} {ours:9.1f} {other:9.1f} {ours / other:8.2f}"


def main() -> None:
    """Prints the table, and how memory grows with the batch."""
    if sys.argv[1:2] == ["memory"]:
        memory_of(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
        return
    repetitions = int(sys.argv[1]) if len(sys.argv) > 1 else 7
    print(
        f"{'forward + backward':18}{'ours ms':>9} {'peer ms':>9} {'faster':>8} {'ours MB':>9} {'peer MB':>9} {'share':>8}"
    )
    for name in SAMPLES:
        print(compare(name, repetitions), flush=True)
    grown = [memory("NT-Xent", 0, views) for views in (2048, 4096, 8192, 16384)]
    shown = ", ".join("failed" if item is None else f"{item[0]:.1f}" for item in grown)
    print(f"NT-Xent, MB beyond the inputs at 2,048, 4,096, 8,192 and 16,384 views: {shown}")


if __name__ == "__main__":
    main()
