"""Loss-only steps of self-supervised methods beside lightly's: forward, backward, and what the loss keeps (a centre).

``OMP_NUM_THREADS=2 python bench/ssl_losses.py [repetitions]``. Inputs are what heads put out, float32, so that nothing
but the loss is timed. Ways take turns; each one's best time counts. A method is a row of ``TABLE``: its name and a
function that makes (step of ours, step of theirs) on the same inputs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import lightly.loss as peer
import torch
from torch import Tensor

from _measure import Report, arguments, best_times
from armillary.components.center import Center
from armillary.components.sinkhorn import sinkhorn
from armillary.losses.cluster_contrast import SwappedPrediction
from armillary.losses.decorrelation import BarlowTwins, VICReg
from armillary.losses.self_distillation import CrossViewEntropy, KoLeo, MaskedPatchEntropy, centered_targets

Step = Callable[[], object]
VIEWS, GLOBAL, BATCH, PROTOTYPES = 10, 2, 64, 8192


def draw(*shape: int, scale: float = 1.0) -> Tensor:
    """The same random numbers in every run."""
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(0))


def dino() -> tuple[Step, Step]:
    """10 crops of 64 images, 8192 prototypes: targets, loss, gradient, centre."""
    teacher, student = draw(GLOBAL * BATCH, PROTOTYPES, scale=0.1), draw(VIEWS * BATCH, PROTOTYPES, scale=0.1)
    student.requires_grad_()
    loss, center = CrossViewEntropy(0.1), Center(PROTOTYPES)
    theirs = peer.DINOLoss(PROTOTYPES)

    def ours() -> None:
        targets = centered_targets(teacher.unflatten(0, (GLOBAL, BATCH)), center.value, 0.04)
        backward(loss(student.unflatten(0, (VIEWS, BATCH)), targets), student)
        center.hold(0, teacher)
        center.update()

    # Both are given what a head returns for all crops of a kind at once.
    def lightly() -> None:
        backward(theirs(list(teacher.chunk(GLOBAL)), list(student.chunk(VIEWS))), student)

    return ours, lightly


def ibot() -> tuple[Step, Step]:
    """128 crops of 64 patches of which 30 % are masked, 2048 prototypes."""
    masked = torch.rand(128, 8, 8, generator=torch.Generator().manual_seed(0)) < 0.3
    count = int(masked.sum())
    teacher, student = draw(count, 2048, scale=0.1), draw(count, 2048, scale=0.1).requires_grad_()
    loss, center, theirs = MaskedPatchEntropy(0.1), Center(2048), peer.IBOTPatchLoss(2048)

    def ours() -> None:
        backward(loss(student, centered_targets(teacher, center.value, 0.04), masked.flatten(1)), student)
        center.hold(0, teacher)
        center.update()

    return ours, lambda: backward(theirs(teacher, student, masked), student)


def koleo() -> tuple[Step, Step]:
    """1024 embeddings of 256 numbers."""
    rows = draw(1024, 256).requires_grad_()
    loss, theirs = KoLeo(), peer.KoLeoLoss()
    return lambda: backward(loss(rows), rows), lambda: backward(theirs(rows), rows)


def swav() -> tuple[Step, Step]:
    """8 crops of 256 images, 3000 prototypes: codes of the large ones by Sinkhorn, loss, gradient."""
    scores = (draw(8, 256, 3000).tanh()).requires_grad_()
    loss, theirs = SwappedPrediction(0.1), peer.SwaVLoss()

    def ours() -> None:
        codes = torch.stack([sinkhorn(scores[view].detach()) for view in range(2)])
        backward(loss(scores, codes), scores)

    def lightly() -> None:
        views = list(scores.unbind())
        backward(theirs(views[:2], views[2:]), scores)

    return ours, lightly


def decorrelation(loss: Callable[..., Tensor], theirs: Callable[..., Tensor]) -> tuple[Step, Step]:
    """Two views of 256 images, 2048 channels."""
    views = torch.randn(2, 256, 2048, generator=torch.Generator().manual_seed(0)).requires_grad_()
    return lambda: backward(loss(*views.unbind()), views), lambda: backward(theirs(*views.unbind()), views)


def barlow() -> tuple[Step, Step]:
    """See :func:`decorrelation`."""
    return decorrelation(BarlowTwins(), peer.BarlowTwinsLoss())


def vicreg() -> tuple[Step, Step]:
    """See :func:`decorrelation`."""
    return decorrelation(VICReg(), peer.VICRegLoss())


TABLE: dict[str, Callable[[], tuple[Step, Step]]] = {
    "DINO": dino,
    "iBOT": ibot,
    "KoLeo": koleo,
    "SwAV": swav,
    "Barlow Twins": barlow,
    "VICReg": vicreg,
}


def backward(loss: Tensor, inputs: Tensor) -> None:
    """The gradient, which is dropped."""
    inputs.grad = None
    loss.backward()


def main() -> int:
    """Prints a line a method."""
    given = arguments(__doc__, repetitions=15)
    report = Report("ssl_losses", given.json)
    print(f"{'loss':<14} {'ours ms':>9} {'lightly ms':>11} {'ratio':>7}   (above 1: ours is faster)")
    for name, make in TABLE.items():
        ours, theirs = best_times(dict(zip(("ours", "lightly"), make(), strict=True)), given.repetitions).values()
        print(f"{name:<14} {1000 * ours:9.2f} {1000 * theirs:11.2f} {theirs / ours:7.2f}", flush=True)
        report.goal(f"{name}, times lightly's speed", theirs / ours, at_least=1, unit="x")
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
