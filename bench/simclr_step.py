"""A whole SimCLR step beside lightly's: two views of each image from uint8, ResNet-18, projector, loss, gradient, SGD.

``OMP_NUM_THREADS=2 python bench/simclr_step.py [repetitions]``: 256 images of 32 x 32 px, two threads, in float32 (the
goal) and under bfloat16 autocast (``train.precision: bf16``). Both train timm's ResNet-18 with SimCLR's augmentation
for ImageNet and NT-Xent at 0.5; lightly's views, projection head and loss are its own, on Pillow images in this
process, as its data sets yield them without workers: worker processes would take the cores that the network is timed
on. The network alone, the same on both sides, is nine tenths of our step in float32, which bounds the ratio. Ways take
turns; each one's best time counts.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import lightly.loss as peer
import timm
import torch
from lightly.models.modules import SimCLRProjectionHead
from lightly.transforms.simclr_transform import SimCLRTransform
from PIL import Image
from torch import Tensor, nn

from _measure import Report, arguments, best_times
from armillary.components.backbones import build_encoder
from armillary.components.normalization import convert_batch_norm
from armillary.data.views import make_views
from armillary.objectives import Batch, BuildContext, registry
from armillary.spec.jobs import BackboneSpec, OptimizerSpec
from armillary.training.optimizers import make_optimizer

BATCH, SIDE, WIDTH, HIDDEN, PROJECTION = 256, 32, 512, 512, 128
RECIPE = "simclr_imagenet"


def images() -> Tensor:
    """Smooth random pictures, uint8 ``(BATCH, 3, SIDE, SIDE)``."""
    coarse = torch.rand(BATCH, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return (255 * nn.functional.interpolate(coarse, size=(SIDE, SIDE), mode="bilinear")).to(torch.uint8)


def ours(pixels: Tensor, half: bool = False) -> Callable[[], object]:
    """The objective ``simclr`` on ``timm/resnet18``."""
    spec = BackboneSpec(name="timm/resnet18", embedding_dim=WIDTH)
    cls = registry.get("simclr")
    encoder = build_encoder(spec, in_channels=3, image_size=(SIDE, SIDE))
    options = {"projection_hidden": HIDDEN, "projection_dim": PROJECTION, "temperature": 0.5}
    context = BuildContext(encoder, WIDTH, 1, BATCH, in_channels=3, image_size=(SIDE, SIDE))
    objective = convert_batch_norm(cls(registry.hyperparameters("simclr", options), context)).train()
    optimizer = make_optimizer(objective, OptimizerSpec(name="sgd", lr=0.06))
    make, index = make_views(RECIPE, {}), torch.arange(BATCH)
    count = 0

    def step() -> None:
        nonlocal count
        count += 1
        views = tuple(make(pixels, index, seed=0, epoch=count, view=view).pixels for view in range(2))
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = objective(Batch(views, index)).loss
        loss.backward()
        optimizer.step()

    return step


def lightly(pixels: Tensor, half: bool = False) -> Callable[[], object]:
    """Lightly's SimCLR, as its example trains it, on the same network."""
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in pixels]
    transform = SimCLRTransform(input_size=SIDE)
    body = timm.create_model("resnet18", num_classes=0)
    head, loss = SimCLRProjectionHead(WIDTH, HIDDEN, PROJECTION), peer.NTXentLoss(0.5)
    optimizer = torch.optim.SGD([*body.parameters(), *head.parameters()], lr=0.06, momentum=0.9, weight_decay=5e-4)

    def step() -> None:
        pairs = [transform(picture) for picture in pictures]
        views = [torch.stack(view) for view in zip(*pairs, strict=True)]
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            value = loss(*(head(body(view)) for view in views))
        value.backward()
        optimizer.step()

    return step


def main() -> int:
    """Prints both times and the ratio."""
    given = arguments(__doc__, repetitions=7)
    report = Report("simclr_step", given.json)
    torch.manual_seed(0)
    pixels = images()
    ways = {"ours": ours(pixels), "ours, bf16": ours(pixels, True)}
    ways |= {"lightly": lightly(pixels), "lightly, bf16": lightly(pixels, True)}
    times = best_times(ways, given.repetitions)
    for name, seconds in times.items():
        print(f"{name:<13} {1000 * seconds:8.1f} ms a step, {BATCH / seconds:7.0f} images/s")
        report.figure(f"{name}, images a second", BATCH / seconds)
    half = times["lightly, bf16"] / times["ours, bf16"]
    print(f"both under bf16 autocast: {half:.2f}x lightly's throughput")
    report.figure("both under bf16 autocast, times lightly's throughput", half)
    report.goal("a SimCLR step, times lightly's throughput", times["lightly"] / times["ours"], at_least=1.5, unit="x")
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
