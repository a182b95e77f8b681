"""Hard negatives and queues beside NT-Xent: forward and backward of the losses alone.

``OMP_NUM_THREADS=2 python bench/contrastive.py [repetitions]``: batch 2,048 x 128, float32. NT-Xent and hard negatives
compare 4,096 views; the queue losses 2,048 queries with 4,096 keys. Ways take turns; each one's best time counts.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from _measure import Report, arguments, best_times
from armillary.losses import NTXent
from armillary.losses.hard_negatives import HardNegativeNCE, MixedNegatives, Mixtures
from armillary.losses.k_positives import KPositives
from armillary.losses.key_contrast import KeyContrast
from armillary.losses.tensors import normalize
from armillary.objectives.labelled_queue import draw_of_class

BATCH, DIM, QUEUE, CLASSES = 2048, 128, 4096, 64
HARDEST, PAIRS, QUERY_PAIRS = 1024, 256, 128


def ways() -> dict[str, Callable[[Tensor], Tensor]]:
    """The losses as functions of the first view."""
    draw = torch.Generator().manual_seed(0)
    other = torch.randn(BATCH, DIM, generator=draw)
    queue = normalize(torch.randn(QUEUE, DIM, generator=draw))
    label = torch.randint(0, CLASSES, (BATCH,), generator=draw)
    of_queue, order = torch.randint(0, CLASSES, (QUEUE,), generator=draw), torch.randperm(QUEUE, generator=draw)
    drawn = draw_of_class(label, of_queue, order, torch.rand(BATCH, generator=draw), 6)

    def places(count: int) -> Tensor:
        return torch.randint(0, HARDEST, (BATCH, count), generator=draw)

    mixtures = Mixtures(
        places(PAIRS),
        places(PAIRS),
        torch.rand(BATCH, PAIRS, generator=draw),
        places(QUERY_PAIRS),
        torch.rand(BATCH, QUERY_PAIRS, generator=draw) / 2,
    )
    nt_xent, key, mixed = NTXent(0.5), KeyContrast(0.2), MixedNegatives(HARDEST, 0.2)
    hard, half, kcl = HardNegativeNCE(), HardNegativeNCE(beta=0.5), KPositives(0.2)
    return {
        "NT-Xent": lambda view: nt_xent(view, other),
        "hard negatives, beta 1": lambda view: hard(view, other),
        "hard negatives, beta 0.5": lambda view: half(view, other),
        "queue (MoCo)": lambda view: key(view, other, queue),
        "k positives of a queue (KCL)": lambda view: kcl(view, other, queue, drawn),
        "queue with mixtures (MoCHi)": lambda view: mixed(view, other, queue, mixtures),
    }


def step(loss: Callable[[Tensor], Tensor], view: Tensor) -> None:
    """One forward and backward pass."""
    loss(view.clone().requires_grad_()).backward()


def main() -> int:
    """Prints each way's best time, and its ratio to NT-Xent's and to that of the plain loss over the same columns."""
    given = arguments(__doc__, repetitions=7)
    report = Report("contrastive", given.json)
    view = torch.randn(BATCH, DIM, generator=torch.Generator().manual_seed(1))
    best = best_times({name: partial(step, loss, view) for name, loss in ways().items()}, given.repetitions)
    for name, value in best.items():
        plain = "queue (MoCo)" if "queue" in name else "NT-Xent"
        print(
            f"{name:32s} {1000 * value:8.1f} ms   {value / best['NT-Xent']:.2f} of NT-Xent   "
            f"{value / best[plain]:.2f} of {plain}"
        )
        report.figure(f"{name}, of {plain}", value / best[plain])
        if name != "NT-Xent":
            report.goal(f"{name}, of NT-Xent's time", value / best["NT-Xent"], at_most=1.15, unit="x")
    print("Judged against NT-Xent on 4,096 views. A queue of 4,096 keys is half its work: MoCo is the floor there.")
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
