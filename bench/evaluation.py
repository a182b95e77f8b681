"""Figures of the evaluation: time and memory of the largest sets it is meant for, and the same figures by peers.

``python bench/evaluation.py`` prints seconds and peak memory of

- all-pairs verification of 20,000 x 512 embeddings (2e8 pairs), with TAR at a FAR of 1e-6;
- Recall@k and MAP@R of 60,000 x 512 embeddings,

each in a process of its own, for many small and for few large classes, and compares with scikit-learn and
pytorch-metric-learning on sets that those can hold.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

import numpy as np

from _measure import Report, in_fresh_process, parser, resident

WIDTH = 512
# Limits: seconds on two cores, and peak bytes of the whole process.
CASES = (
    ("verification", 20_000, 1_000, 60, 1.5e9),
    ("verification", 20_000, 10, 60, 1.5e9),
    ("retrieval", 60_000, 3_000, 150, 1.5e9),
    ("retrieval", 60_000, 10, 150, 1.5e9),
)
SHOWN = {
    "verification": ("auc", "tar_at_far_1e-6", "accuracy"),
    "retrieval": ("recall_at_1", "recall_at_10", "map_at_r", "map"),
}


def embeddings(size: int, classes: int, spread: float, seed: int = 0) -> tuple[Any, Any]:
    """Noisy points around class centers, float32 ``(size, 512)``, and their labels; spread 0 is noise alone."""
    rng = np.random.default_rng(seed)
    labels = np.arange(size) % classes
    points = rng.standard_normal((size, WIDTH), dtype=np.float32)
    points += np.float32(spread) * rng.standard_normal((classes, WIDTH), dtype=np.float32)[labels]
    return points, labels


def measure(protocol: str, size: int, classes: int, spread: float) -> dict[str, Any]:
    """One protocol on one set, in this process."""
    from armillary.evaluation.protocols import evaluate

    points, labels = embeddings(size, classes, spread)
    wall, cpu = time.perf_counter(), time.process_time()
    metrics = evaluate(protocol, points, labels).metrics
    return {
        "wall": time.perf_counter() - wall,
        "cpu": time.process_time() - cpu,
        "peak": resident("VmHWM"),
        "metrics": {name: metrics[f"{protocol}/{name}"] for name in SHOWN[protocol]},
    }


def large(scale: float, spread: float, report: Report) -> None:
    """Runs the large cases, each in a process of its own."""
    for protocol, size, classes, seconds, peak in CASES:
        size = int(size * scale)
        found = json.loads(in_fresh_process(__file__, "--case", protocol, size, classes, spread))
        shown = ", ".join(f"{name} {value:.4f}" for name, value in found["metrics"].items())
        print(
            f"{protocol:12} {size} x {WIDTH}, {classes} classes: {found['wall']:.1f} s "
            f"({found['cpu']:.1f} s of cores), {found['peak'] / 1e9:.2f} GB\n             {shown}",
            flush=True,
        )
        name = f"{protocol}, {size:,} x {WIDTH}, {classes:,} classes"
        report.goal(f"{name}, time", found["wall"], at_most=seconds, unit=" s")
        report.goal(f"{name}, memory", found["peak"] / 1e9, at_most=peak / 1e9, unit=" GB")


def against_scikit_learn(size: int, report: Report) -> None:
    """All pairs of a small set: ``roc_curve`` on the listed scores."""
    from sklearn.metrics import roc_auc_score, roc_curve

    from armillary.evaluation.protocols import evaluate

    points, labels = embeddings(size, size // 20, 0.4)
    start = time.perf_counter()
    metrics = evaluate("verification", points, labels).metrics
    ours = time.perf_counter() - start
    start = time.perf_counter()
    unit = points.astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    first, second = np.triu_indices(size, 1)
    scores, same = (unit @ unit.T)[first, second], labels[first] == labels[second]
    far, tar, _ = roc_curve(same, scores, drop_intermediate=False)
    expected = {"auc": roc_auc_score(same, scores), "tar_at_far_1e-3": tar[far <= 1e-3].max()}
    theirs = time.perf_counter() - start
    worst = max(abs(metrics[f"verification/{name}"] - value) for name, value in expected.items())
    print(
        f"verification {size} x {WIDTH}: scikit-learn's roc_curve {theirs:.2f} s, ours {ours:.2f} s with accuracy too "
        f"({theirs / ours:.1f} times as fast); largest difference {worst:.1e}",
        flush=True,
    )
    report.figure("verification, times scikit-learn's speed", theirs / ours)
    report.goal("verification, difference from scikit-learn", worst, at_most=1e-9)


def against_metric_learning(size: int, report: Report) -> None:
    """Recall@1 and MAP@R of a small set by pytorch-metric-learning's calculator."""
    import torch
    from pytorch_metric_learning.distances import CosineSimilarity
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
    from pytorch_metric_learning.utils.inference import CustomKNN

    from armillary.evaluation.protocols import evaluate

    points, labels = embeddings(size, size // 20, 0.4)
    start = time.perf_counter()
    metrics = evaluate("retrieval", points, labels).metrics
    ours = time.perf_counter() - start
    wanted = {"precision_at_1": "recall_at_1", "r_precision": "r_precision", "mean_average_precision_at_r": "map_at_r"}
    calculator = AccuracyCalculator(
        include=tuple(wanted), k="max_bin_count", knn_func=CustomKNN(CosineSimilarity(), batch_size=256)
    )
    start = time.perf_counter()
    found = calculator.get_accuracy(torch.from_numpy(points), torch.from_numpy(labels))
    theirs = time.perf_counter() - start
    worst = max(abs(metrics[f"retrieval/{name}"] - found[theirs_name]) for theirs_name, name in wanted.items())
    print(
        f"retrieval    {size} x {WIDTH}: pytorch-metric-learning (float32, no MAP) {theirs:.2f} s, ours {ours:.2f} s "
        f"({theirs / ours:.1f} times as fast); largest difference {worst:.1e}",
        flush=True,
    )
    report.figure("retrieval, times pytorch-metric-learning's speed", theirs / ours)
    report.goal("retrieval, difference from pytorch-metric-learning", worst, at_most=1e-9)


def main() -> int:
    """Prints the figures; 1 when a large case went over its limit."""
    options = parser(__doc__)
    options.add_argument("--scale", type=float, default=1.0, help="of the large sets; limits are for 1")
    options.add_argument("--spread", type=float, default=0.4, help="of class centers; 0 is noise, the worst case")
    options.add_argument("--case", nargs=4, metavar=("PROTOCOL", "SIZE", "CLASSES", "SPREAD"), help=argparse.SUPPRESS)
    arguments = options.parse_args()
    if arguments.case:
        protocol, size, classes, spread = arguments.case
        print(json.dumps(measure(protocol, int(size), int(classes), float(spread))))
        return 0
    report = Report("evaluation", arguments.json)
    against_scikit_learn(3000, report)
    against_metric_learning(6000, report)
    large(arguments.scale, arguments.spread, report)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
