"""Class heads at scale: time, memory and growth beside pytorch-metric-learning and the bare matrix products.

``OMP_NUM_THREADS=2 python bench/class_head.py [repetitions]``: batch 256, float32 unless said otherwise. One step is
forward, backward and the gradients of embeddings and rows. Ways take turns; each one's best time counts.

Under bfloat16 autocast the head runs its products in the type that is quicker on this machine; "bf16 products" are
forced to it, for how exact they are and what they take. A way that keeps no matrix of terms makes four products, not
three: the terms once forward and once backward. Four of the quicker kind are what no such way can go below.
"""

from __future__ import annotations

import math
import sys
from functools import partial
from unittest.mock import patch

import torch
from torch import Tensor

from _measure import MEGABYTE, Report, arguments, best_times, growth_during, in_fresh_process, resident
from armillary.losses import ArcFace, ClassHeadLoss, class_head
from armillary.losses.tensors import half_products_pay

BATCH, MARGIN, SCALE = 256, 0.5, 64.0


def inputs(classes: int, dim: int) -> tuple[Tensor, Tensor]:
    """Random embeddings and labels."""
    draw = torch.Generator().manual_seed(0)
    return torch.randn(BATCH, dim, generator=draw), torch.randint(0, classes, (BATCH,), generator=draw)


def head(kind: type[ClassHeadLoss], classes: int, dim: int) -> ClassHeadLoss:
    """A head with the same random rows for every kind."""
    torch.manual_seed(1)
    return kind(classes, dim, margin=MARGIN, scale=SCALE)


def peer(weight: Tensor) -> torch.nn.Module:
    """The ArcFace of pytorch-metric-learning on these rows."""
    from pytorch_metric_learning.losses import ArcFaceLoss

    loss: torch.nn.Module = ArcFaceLoss(len(weight), weight.shape[1], margin=math.degrees(MARGIN), scale=SCALE)
    with torch.no_grad():
        loss.get_parameter("W").copy_(weight.T)
    return loss


def step(loss: torch.nn.Module, embeddings: Tensor, labels: Tensor, bf16: bool = False) -> tuple[float, Tensor]:
    """The loss and the embeddings' gradient."""
    loss.zero_grad(set_to_none=True)
    leaf = embeddings.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        value = loss(leaf, labels)
    value.backward()
    assert leaf.grad is not None
    return float(value.detach()), leaf.grad


def forced(loss: torch.nn.Module, embeddings: Tensor, labels: Tensor) -> tuple[float, Tensor]:
    """As ``step``, with the large products in bfloat16 whether or not that is quicker here."""
    with patch.object(class_head, "half_products_pay", lambda *_: True):
        return step(loss, embeddings, labels, bf16=True)


def products(weight: Tensor, embeddings: Tensor) -> None:
    """The three that any way of computing both gradients needs."""
    logits = embeddings @ weight.T
    _ = logits @ weight
    _ = logits.T @ embeddings


def matrix_units() -> str:
    """What the processor has for bfloat16, and what the head makes of it."""
    known = torch.cpu.get_capabilities()
    units = [name for name in ("amx_bf16", "avx512_bf16") if known.get(name)] or ["no bfloat16 units"]
    chosen = "bfloat16" if half_products_pay("cpu", torch.bfloat16) else "float32"
    amx = "" if known.get("amx_bf16") else ", no AMX"
    return f"{' and '.join(units)}{amx}: products under autocast run in {chosen}"


def speed(repetitions: int, report: Report) -> None:
    """Seconds a step, and how far results are apart."""
    classes, dim = 100_000, 256
    embeddings, labels = inputs(classes, dim)
    arcface, plain = head(ArcFace, classes, dim), head(ClassHeadLoss, classes, dim)
    weight = arcface.weight.detach()
    reference = peer(weight)
    half = weight.bfloat16()
    times = best_times(
        {
            "arcface": lambda: step(arcface, embeddings, labels),
            "arcface, bf16 autocast": lambda: step(arcface, embeddings, labels, bf16=True),
            "arcface, bf16 products": lambda: forced(arcface, embeddings, labels),
            "plain softmax": lambda: step(plain, embeddings, labels),
            "three products": lambda: products(weight, embeddings),
            "three bf16 products": lambda: products(half, embeddings.bfloat16()),
            "pytorch-metric-learning": lambda: step(reference, embeddings, labels),
        },
        repetitions,
    )
    print(f"\n{classes:,} classes, dim {dim}, {torch.get_num_threads()} threads; {matrix_units()}")
    for name, seconds in times.items():
        print(f"  {name:26s} {seconds:7.3f} s")
    ours, theirs, bf16 = times["arcface"], times["pytorch-metric-learning"], times["arcface, bf16 autocast"]
    single, halved = times["three products"], times["three bf16 products"]
    least = min(single, halved) * 4 / 3
    for name, seconds in (("float32", single), ("bf16", halved)):
        print(f"  four {name} products alone: {theirs / seconds * 3 / 4:.2f}x the peer's speed")
    for name in ("arcface, bf16 products", "three bf16 products"):
        report.figure(f"{name}, times the peer's speed", theirs / times[name])
    report.goal("times the peer's speed", theirs / ours, at_least=3, unit="x", limit=theirs / (single * 4 / 3))
    report.goal("times the peer's speed, bf16 autocast", theirs / bf16, at_least=6, unit="x", limit=theirs / least)
    report.goal("times the three products", ours / single, at_most=1.6, unit="x", limit=4 / 3)
    report.goal(
        "what the margin costs over plain softmax", 100 * (ours / times["plain softmax"] - 1), at_most=10, unit="%"
    )
    compare(arcface, reference, embeddings, labels, "random embeddings", report)
    near = torch.nn.functional.normalize(weight[labels]) + 0.06 * embeddings
    compare(arcface, reference, near, labels, "embeddings near their rows", report)


def compare(
    ours: ClassHeadLoss, theirs: torch.nn.Module, embeddings: Tensor, labels: Tensor, name: str, report: Report
) -> None:
    """How far bf16 products are from float32 ones, and those from the peer."""
    exact, gradient = step(ours, embeddings, labels)
    rows = ours.weight.grad
    found, found_gradient = forced(ours, embeddings, labels)
    assert rows is not None
    assert ours.weight.grad is not None
    other, other_gradient = step(theirs, embeddings, labels)
    pairs = ((gradient, found_gradient), (rows, ours.weight.grad))
    cosines = [float(torch.cosine_similarity(a.double().flatten(), b.double().flatten(), 0)) for a, b in pairs]
    print(f"  {name} (loss {exact:.3f})")
    print(f"    bf16: loss off by {abs(found / exact - 1):.1e}, cosine of gradients {cosines[0]:.5f}, {cosines[1]:.5f}")
    report.goal(f"bf16 loss off, {name}", abs(found / exact - 1), at_most=0.01)
    report.goal(f"bf16 cosine of gradients, {name}", min(cosines), at_least=0.999)
    off = float((gradient - other_gradient).abs().max() / other_gradient.abs().max())
    print(f"    against the peer: loss off by {abs(exact / other - 1):.1e}, gradient by {off:.1e}")


def measure_memory(way: str, classes: int, dim: int) -> None:
    """In a process of its own: prints (extra, whole) peak bytes of a step, weights and their gradient not in extra."""
    small = head(ArcFace, 4096, dim)
    step(small if way == "ours" else peer(small.weight.detach()), *inputs(4096, dim))
    loss: torch.nn.Module = head(ArcFace, classes, dim)
    if way != "ours":
        assert isinstance(loss, ArcFace)
        loss = peer(loss.weight.detach())
    embeddings, labels = inputs(classes, dim)
    grown = growth_during(lambda: step(loss, embeddings, labels))
    print(grown - 4 * classes * dim, resident("VmHWM"))


def memory(report: Report) -> None:
    """Peaks, each in a process of its own."""
    print("\npeak memory of a step, above weights, their gradient and inputs")
    for way, classes, dim in (
        ("ours", 100_000, 256),
        ("pytorch-metric-learning", 100_000, 256),
        ("ours", 1_000_000, 128),
    ):
        output = in_fresh_process(__file__, "--memory", way, classes, dim)
        extra, peak = (int(word) for word in output.split()[-2:])
        print(f"  {way:26s} {classes:9,} x {dim}: {extra / MEGABYTE:6.0f} MB; process {peak / MEGABYTE:6.0f} MB")
        if (way, classes) == ("ours", 100_000):
            report.goal("extra memory at 100,000 classes", extra / MEGABYTE, at_most=64, unit=" MB")
        else:
            report.figure(f"extra MB, {way}, {classes} classes", extra / MEGABYTE)
        if classes == 1_000_000:
            report.goal("whole process at 1,000,000 classes", peak / 1e9, at_most=6, unit=" GB")


def growth(repetitions: int, report: Report) -> None:
    """Seconds against the number of classes."""
    counts, dim = (10_000, 100_000, 1_000_000), 128
    seconds = []
    for classes in counts:
        loss, given = head(ArcFace, classes, dim), inputs(classes, dim)
        seconds.append(best_times({"step": partial(step, loss, *given)}, repetitions)["step"])
    x, y = (torch.tensor(values).log() for values in ([float(count) for count in counts], seconds))
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())
    table = ", ".join(f"{count:,}: {value:.3f} s" for count, value in zip(counts, seconds, strict=True))
    print(f"\ngrowth at dim {dim}: {table}; slope in log-log {slope:.2f}")
    report.goal("growth with classes, slope in log-log", slope, at_most=1.1)


def main() -> int:
    """Prints every figure."""
    if sys.argv[1:2] == ["--memory"]:
        measure_memory(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
        return 0
    given = arguments(__doc__, repetitions=7)
    report = Report("class_head", given.json)
    speed(given.repetitions, report)
    memory(report)
    growth(max(2, given.repetitions // 2), report)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
