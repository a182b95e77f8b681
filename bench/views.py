"""Views a second beside lightly's SimCLRTransform and kornia, and whether the views are distributed alike.

All run SimCLR's recipe for ImageNet (random resized crop, mirror, jitter with hue in random order, gray, blur), in
this process and on one thread, in turns; times are the process's own CPU time, so that neighbours on the machine count
little. lightly works on single Pillow images, as it is meant to; kornia and ours on uint8 batches, conversion to float
included. kornia's blur has the kernel of SimCLR's code, a tenth of the side; lightly's and ours reach as far as sigma
asks. On one core of an EPYC with two, kornia made 3,400, 520 and 110 views/s at 32, 96 and 224 pixels: 2.8, 0.7 and 0.5
times lightly's, too few at every size, which is why the views are our own.

    python bench/views.py [--sizes 32 96 224] [--rounds 5] [--draws 20000] [--views 3000] [--picture FILE]
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy import stats
from sklearn.datasets import load_sample_images
from torch import Tensor

from _measure import Report, parser, times_in_turns
from armillary.data.views import make_views

RECIPE = "simclr_imagenet"
# What this has to reach, as a multiple of lightly's views a second.
FLOORS = {32: 4.0, 96: 1.5, 224: 1.0}
BATCH = {32: 256, 96: 64, 224: 16}


def photographs(count: int, size: int) -> Tensor:
    """Random windows of scikit-learn's two sample photographs, uint8 ``(count, 3, size, size)``."""
    sources = [Image.fromarray(image) for image in load_sample_images().images]
    generator = np.random.default_rng(0)
    windows = []
    for number in range(count):
        source = sources[number % len(sources)]
        side = int(generator.integers(120, min(source.size)))
        left, top = (int(generator.integers(0, extent - side)) for extent in source.size)
        window = source.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
        windows.append(torch.from_numpy(np.array(window)).permute(2, 0, 1))
    return torch.stack(windows)


def lightly_transform(size: int) -> Any:
    """The transform of one image to a list of two views; without the normalisation, which ours has not."""
    from lightly.transforms.simclr_transform import SimCLRTransform

    return SimCLRTransform(input_size=size, normalize=None)


def kornia_transform(size: int) -> Callable[[Tensor], Tensor]:
    """The recipe from kornia's parts, uint8 batch to float batch."""
    import kornia.augmentation as parts

    kernel = max(3, size // 10 | 1)
    steps = parts.AugmentationSequential(
        parts.RandomResizedCrop((size, size), scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), cropping_mode="resample"),
        parts.RandomHorizontalFlip(p=0.5),
        parts.ColorJitter(0.8, 0.8, 0.8, 0.2, p=0.8),
        parts.RandomGrayscale(p=0.2),
        parts.RandomGaussianBlur((kernel, kernel), (0.1, 2.0), p=0.5),
    )

    def transform(images: Tensor) -> Tensor:
        with torch.no_grad():
            result: Tensor = steps(images.to(torch.float32) / 255)
        return result

    return transform


def ours(images: Tensor) -> Iterator[Tensor]:
    """Views of the images, without end."""
    views, index, view = make_views(RECIPE, {}), torch.arange(len(images)), 0
    while True:
        yield views(images, index, seed=0, epoch=0, view=view).pixels
        view += 1


def speed(size: int, rounds: int, report: Report) -> None:
    """Prints views a second of all three, in turns, and the median ratio of ours to lightly's."""
    images = photographs(BATCH[size], size)
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    theirs, kornia, stream = lightly_transform(size), kornia_transform(size), ours(images)
    turns: dict[str, Callable[[], Any]] = {
        "lightly": lambda: [theirs(picture) for picture in pictures],
        "kornia": lambda: [kornia(images) for _ in range(2)],
        "armillary": lambda: [next(stream) for _ in range(2)],
    }
    taken = times_in_turns(turns, rounds, clock=time.process_time)
    rate = {name: 2 * len(images) / statistics.median(times) for name, times in taken.items()}
    ratios = [other / own for other, own in zip(taken["lightly"], taken["armillary"], strict=True)]
    ratio, floor = statistics.median(ratios), FLOORS.get(size, 1.0)
    print(
        f"{size:>4} px  lightly {rate['lightly']:>6.0f}/s  kornia {rate['kornia']:>6.0f}/s  armillary "
        f"{rate['armillary']:>6.0f}/s  ratio {ratio:.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
        flush=True,
    )
    report.goal(f"{size} px, times lightly's views/s", ratio, at_least=floor, unit="x")


def our_draws(count: int) -> dict[str, np.ndarray[Any, Any]]:
    """What our recipe draws for ``count`` samples; jitter factors of the jittered only."""
    drawn = make_views(RECIPE, {}).draw(torch.arange(count), seed=0, epoch=0, view=0)
    x0, y0, x1, y1 = drawn["box"].unbind(1)
    result = {
        "crop area": (x1 - x0) * (y1 - y0),
        "crop log ratio": ((x1 - x0) / (y1 - y0)).log(),
        "crop centre x": (x0 + x1) / 2,
        "crop centre y": (y0 + y1) / 2,
        "blur sigma": drawn["blur_sigma"][drawn["blur_sigma"] > 0],
    }
    jittered = drawn["jitter"] > 0
    result |= {name: drawn[name][jittered] for name in ("brightness", "contrast", "saturation", "hue")}
    for name, number in (("brightness", 0), ("contrast", 1), ("saturation", 2), ("hue", 3)):
        result[f"place of {name}"] = (drawn["order"] == number).to(torch.float32).argmax(dim=1)
    return {name: values.numpy().astype(np.float64) for name, values in result.items()}


def their_draws(count: int, side: int = 4096) -> dict[str, np.ndarray[Any, Any]]:
    """What lightly's transform draws, through its parts' own methods (a large image: their crops are whole pixels)."""
    parts = lightly_transform(side).transforms[0].transform.transforms
    crop, jitter = parts[0], parts[4].transforms[0]
    image = Image.new("RGB", (side, side))
    columns: dict[str, list[float]] = {}

    def add(name: str, value: float) -> None:
        columns.setdefault(name, []).append(value)

    for _ in range(count):
        box = crop.make_params([image]) if hasattr(crop, "make_params") else None
        top, left, height, width = (
            (box["top"], box["left"], box["height"], box["width"])
            if box
            else crop.get_params(image, crop.scale, crop.ratio)
        )
        add("crop area", height * width / side**2)
        add("crop log ratio", math.log(width / height))
        add("crop centre x", (left + width / 2) / side)
        add("crop centre y", (top + height / 2) / side)
        order, *factors = _their_jitter(jitter)
        for name, factor in zip(("brightness", "contrast", "saturation", "hue"), factors, strict=True):
            add(name, float(factor))
        for name, number in (("brightness", 0), ("contrast", 1), ("saturation", 2), ("hue", 3)):
            add(f"place of {name}", order.index(number))
        # As its GaussianBlur draws it.
        add("blur sigma", np.random.uniform(*parts[6].sigmas))
    return {name: np.array(values) for name, values in columns.items()}


def _their_jitter(jitter: Any) -> tuple[Any, ...]:
    if hasattr(jitter, "make_params"):
        drawn = jitter.make_params([])
        factors = [drawn[f"{name}_factor"] for name in ("brightness", "contrast", "saturation", "hue")]
        return ([int(number) for number in drawn["fn_idx"]], *factors)
    order, *factors = jitter.get_params(jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
    return (order.tolist(), *factors)


def compare_draws(count: int) -> None:
    """Prints mean and variance of every parameter, and the Kolmogorov-Smirnov test that both have one distribution."""
    own, other = our_draws(count), their_draws(count)
    print(f"\nparameters of {count} views      ours: mean, variance      lightly: mean, variance    KS p")
    for name, values in own.items():
        p = stats.ks_2samp(values, other[name]).pvalue
        print(
            f"  {name:<22} {values.mean():>12.4f} {values.var():>10.4f} "
            f"{other[name].mean():>14.4f} {other[name].var():>10.4f} {p:>12.3f}"
        )


def describe(views: Tensor) -> dict[str, Tensor]:
    """Numbers of every view: mean and deviation of each channel, saturation, gray or not, sharpness."""
    result = {}
    for channel, name in enumerate(("red", "green", "blue")):
        result[f"{name} mean"] = views[:, channel].mean(dim=(1, 2))
        result[f"{name} deviation"] = views[:, channel].std(dim=(1, 2))
    most, least = views.amax(dim=1), views.amin(dim=1)
    result["saturation"] = ((most - least) / most.clamp_min(1e-3)).mean(dim=(1, 2))
    # Pillow's gray has equal channels; ours, up to rounding.
    result["gray"] = ((most - least).amax(dim=(1, 2)) < 1e-3).to(torch.float32)
    result["neighbour difference"] = (views[..., 1:] - views[..., :-1]).abs().mean(dim=(1, 2, 3))
    result["left minus right"] = views[..., : views.shape[-1] // 2].mean(dim=(1, 2, 3)) - views[
        ..., views.shape[-1] // 2 :
    ].mean(dim=(1, 2, 3))
    return result


def compare_pixels(count: int, size: int = 64) -> None:
    """Prints mean and variance over views of pixel statistics; the difference of means in standard errors."""
    images = photographs(count, size)
    transform = lightly_transform(size).transforms[0]
    theirs = torch.stack([transform(Image.fromarray(image.permute(1, 2, 0).numpy())) for image in images])
    own, other = describe(next(ours(images))), describe(theirs)
    print(
        f"\npixels of {count} views, {size} px   ours: mean, variance      lightly: mean, variance    difference / s.e."
    )
    for name, values in own.items():
        error = ((values.var() + other[name].var()) / count).sqrt()
        print(
            f"  {name:<22} {values.mean():>12.4f} {values.var():>10.5f} {other[name].mean():>14.4f} "
            f"{other[name].var():>10.5f} {(values.mean() - other[name].mean()) / error:>12.2f}"
        )


def picture(path: Path, columns: int = 8, size: int = 64, rows: int = 3) -> None:
    """Writes originals (top), our views of them, and lightly's (bottom)."""
    images = photographs(columns, size)
    stream, transform = ours(images), lightly_transform(size).transforms[0]
    lines = [images / 255, *(next(stream) for _ in range(rows))]
    pillow = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    lines += [torch.stack([transform(image) for image in pillow]) for _ in range(rows)]
    sheet = Image.new("RGB", (columns * (size + 4) + 4, len(lines) * (size + 4) + 20), "white")
    top = 4
    for number, line in enumerate(lines):
        for column, view in enumerate(line):
            tile = Image.fromarray((view * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())
            sheet.paste(tile, (4 + column * (size + 4), top))
        top += size + (12 if number in (0, rows) else 4)
    sheet.save(path, optimize=True)
    print(f"\nwrote {path}: originals, {rows} rows of ours, {rows} rows of lightly's")


def main() -> int:
    """Prints everything."""
    options = parser(__doc__)
    options.add_argument("--sizes", type=int, nargs="*", default=list(FLOORS), choices=list(FLOORS))
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--draws", type=int, default=20_000)
    options.add_argument("--views", type=int, default=3000)
    options.add_argument("--picture", type=Path)
    arguments = options.parse_args()
    report = Report("views", arguments.json)
    torch.set_num_threads(1)
    np.random.seed(0)  # lightly draws from it
    torch.manual_seed(0)
    for size in arguments.sizes:
        speed(size, arguments.rounds, report)
    if arguments.draws:
        compare_draws(arguments.draws)
    if arguments.views:
        compare_pixels(arguments.views)
    if arguments.picture:
        picture(arguments.picture)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
