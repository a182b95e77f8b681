"""Losses over pairs and tuples beside pytorch-metric-learning and lightly: time and memory, forward and backward.

``OMP_NUM_THREADS=2 python bench/tuples.py [repetitions]``: 2,048 embeddings of 128 dimensions, classes of 32; NT-Xent
on 4,096 views; all triplets on 1,024 embeddings, since of 2,048 the peer makes a mask of 8.6 GB. float32. Ours and the
peer take turns; each one's best time counts. Memory is by how much a fresh process grows at most during one step, after
the same step on a small batch has loaded what the first one loads.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from _measure import MEGABYTE, Report, arguments, best_times, growth_during, in_fresh_process
from armillary import losses

DIM, CLASSES, EACH = 128, 64, 32
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
    **dict.fromkeys(["SupCon", "multi-similarity", "circle", "batch-hard"], CLASSES * EACH),
    "all triplets": 1024,
    "NT-Xent": 4096,
}


def step(loss: Step, vectors: Tensor, labels: Tensor) -> None:
    """One forward and backward pass."""
    loss(vectors.clone().requires_grad_(), labels).backward()


def memory_of(name: str, which: int, samples: int) -> None:
    """Prints by how much this process grows at most during one step."""
    loss = ways(name)[which]
    step(loss, *embeddings(128))
    whole = embeddings(samples)
    print(growth_during(lambda: step(loss, *whole)) / MEGABYTE)


def memory(name: str, which: int, samples: int) -> float:
    """The same in a fresh process, in MB."""
    return float(in_fresh_process(__file__, "memory", name, which, samples).split()[-1])


def compare(name: str, repetitions: int, report: Report) -> str:
    """One row: both times, both memories, their ratios; NT-Xent must not be slower, the others be twice as fast."""
    turns = (partial(step, loss, *embeddings(SAMPLES[name])) for loss in ways(name))
    own, peers = best_times(dict(zip(("ours", "peer"), turns, strict=True)), repetitions).values()
    ours, other = (memory(name, which, SAMPLES[name]) for which in (0, 1))
    report.goal(f"{name}, times the peer's speed", peers / own, at_least=1 if name == "NT-Xent" else 2, unit="x")
    if name == "NT-Xent":
        report.figure(f"{name}, share of the peer's memory", ours / other)
    else:
        report.goal(f"{name}, share of the peer's memory", ours / other, at_most=0.5)
    times = f"{1e3 * own:9.1f} {1e3 * peers:9.1f} {peers / own:7.1f}x"
    return f"{name:18}{times} {ours:9.1f} {other:9.1f} {ours / other:8.2f}"


def main() -> int:
    """Prints the table, and how memory grows with the batch."""
    if sys.argv[1:2] == ["memory"]:
        memory_of(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
        return 0
    given = arguments(__doc__, repetitions=7)
    report = Report("tuples", given.json)
    columns = "".join(f"{title:>10}" for title in ("ours ms", "peer ms", "faster", "ours MB", "peer MB", "share"))
    print(f"{'':17}{columns}")
    for name in SAMPLES:
        print(compare(name, given.repetitions, report), flush=True)
    triplets = partial(step, ways("all triplets")[0], *embeddings(CLASSES * EACH))
    seconds = best_times({"ours": triplets}, given.repetitions)["ours"]
    print(f"all triplets of 2,048: {1e3 * seconds:.1f} ms, {memory('all triplets', 0, CLASSES * EACH):.1f} MB")
    grown = ", ".join(f"{memory('NT-Xent', 0, views):.1f}" for views in (2048, 4096, 8192, 16384))
    print(f"NT-Xent of 2,048, 4,096, 8,192 and 16,384 views: {grown} MB")
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
