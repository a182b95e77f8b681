"""Images a second of the streaming loader beside torchvision's ImageFolder and DataLoader, from the same JPEGs.

Both shuffle, decode, resize to 64 x 64 and give batches of 256 as float32 in [0, 1], without augmentation; both may use
two cores: the DataLoader has two worker processes, the stream two decoding threads. The peer reads one file an image,
as it is meant to; ours reads a dataset in the store with the same bytes. Whole epochs in turns, in one process, after
an epoch of warm-up; the DataLoader's workers stay up between epochs. The ratio that counts is that of the median images
a second by the wall clock, which a busy machine blurs; processor time an image, of all processes, is shown beside it.

    python bench/loader.py [--images 8192] [--rounds 5]
"""

from __future__ import annotations

import io
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor

from _measure import Report, parser
from armillary.data.loader import in_order
from armillary.data.samplers import Population
from armillary.data.splits import prepare
from armillary.data.store import Encoded, Record, write_dataset
from armillary.data.streaming import StoredImages
from armillary.data.windows import windowed_batches
from armillary.objectives.base import Needs
from armillary.spec.jobs import DataSpec

SIDE, BATCH, CLASSES, QUALITY = 64, 256, 64, 90
# What the stream has to reach, as a multiple of the peer's images a second.
FLOOR = 3.0


def photographs(count: int, size: int) -> Iterator[bytes]:
    """JPEGs of random windows of scikit-learn's two sample photographs."""
    sources = [Image.fromarray(image) for image in load_sample_images().images]
    generator = np.random.default_rng(0)
    for number in range(count):
        source = sources[number % len(sources)]
        side = int(generator.integers(120, min(source.size)))
        left, top = (int(generator.integers(0, extent - side)) for extent in source.size)
        file = io.BytesIO()
        window = source.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
        window.save(file, "JPEG", quality=QUALITY)
        yield file.getvalue()


def peer(folder: Path) -> Any:
    """ImageFolder and DataLoader, as their documentation shows them."""
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import Compose, Resize, ToTensor

    images = ImageFolder(str(folder), Compose([Resize((SIDE, SIDE)), ToTensor()]))
    return DataLoader(images, BATCH, shuffle=True, num_workers=2, persistent_workers=True, drop_last=True)


class Stream:
    """The stream of a dataset in the store: every iteration is an epoch."""

    def __init__(self, name: str) -> None:
        data = prepare(DataSpec(name=name, split="sample", load="stream", image_size=(SIDE, SIDE)), seed=0)
        assert isinstance(data.train.images, StoredImages)
        self.images, self.population, self.epoch = data.train.images, Population(data.train.label), 0
        self.images.threads = 2

    def __iter__(self) -> Iterator[Tensor]:
        groups, buffer = self.images.groups(), self.images.buffer
        plan = windowed_batches(Needs(), BATCH, self.population, groups, buffer, seed=0, epoch=self.epoch)
        self.epoch += 1
        for batch in in_order(self.images, list(plan)):
            yield batch.to(torch.float32).div_(255)


def store(name: str, files: list[tuple[int, bytes]], size: int) -> None:
    """Writes the JPEGs into the store as they are."""
    records = (Record(Encoded(data, (size, size, 3)), label) for label, data in files)
    write_dataset(name, records, class_names=[str(label) for label in range(CLASSES)], form="encoded")


def rate(loader: Any) -> tuple[float, float]:
    """Images a second of one epoch, and microseconds of processor time an image, child processes included."""
    start, before, images = time.perf_counter(), processor_time(), 0
    for batch in loader:
        views = batch[0] if isinstance(batch, list) else batch
        assert views.shape[1:] == (3, SIDE, SIDE)
        assert views.dtype == torch.float32
        images += len(views)
    return images / (time.perf_counter() - start), (processor_time() - before) / images * 1e6


def processor_time() -> float:
    """Seconds of this process and of those it started that are still there."""
    import psutil

    this = psutil.Process()
    times = [process.cpu_times() for process in (this, *this.children(recursive=True))]
    return float(sum(each.user + each.system for each in times))


def floor(files: list[bytes]) -> tuple[float, float]:
    """Microseconds a JPEG on one core: libjpeg-turbo alone, and Pillow."""
    import simplejpeg

    def cost(decode: Callable[[bytes], object]) -> float:
        start = time.process_time()
        for data in files:
            decode(data)
        return (time.process_time() - start) / len(files) * 1e6

    pillow = cost(lambda data: np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    return min(cost(simplejpeg.decode_jpeg) for _ in range(3)), pillow


def compare(size: int, images: int, rounds: int, report: Report) -> None:
    """Prints a row; whether the floor was reached."""
    files = [(at * CLASSES // images, data) for at, data in enumerate(photographs(images, size))]
    with tempfile.TemporaryDirectory() as folder:
        for at, (label, data) in enumerate(files):
            path = Path(folder) / f"{label:03d}" / f"{at:06d}.jpg"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(data)
        store(f"jpeg{size}", files, size)
        sides = {"peer": peer(Path(folder)), "ours": Stream(f"jpeg{size}")}
        rounds_of: dict[str, list[tuple[float, float]]] = {"peer": [], "ours": []}
        for number in range(rounds + 1):
            for name, loader in sides.items():
                measured = rate(loader)
                if number:
                    rounds_of[name].append(measured)
    turbo, pillow = floor([data for _, data in files[:1000]])
    medians = {
        name: [statistics.median(column) for column in zip(*values, strict=True)] for name, values in rounds_of.items()
    }
    each = [own[0] / other[0] for own, other in zip(rounds_of["ours"], rounds_of["peer"], strict=True)]
    kilobytes = statistics.mean(len(data) for _, data in files) / 1024
    ratio = medians["ours"][0] / medians["peer"][0]
    print(f"{size} px JPEGs of {kilobytes:.1f} KiB to {SIDE} px")
    for name, title in (("peer", "ImageFolder + DataLoader"), ("ours", "stream")):
        print(f"  {title:25} {medians[name][0]:8,.0f} images/s  {medians[name][1]:6.0f} us of processor time an image")
    print(f"  ratio {ratio:.2f} (rounds {min(each):.2f} to {max(each):.2f}); at least {FLOOR:g} wanted")
    report.goal(f"{size} px JPEGs, times ImageFolder + DataLoader's images/s", ratio, at_least=FLOOR, unit="x")
    print(f"  decoding alone: {turbo:.0f} us with libjpeg-turbo, {pillow:.0f} us with Pillow")


def main() -> int:
    """Prints a row for JPEGs of 64 and of 112 pixels; 1 if one of them is below the floor."""
    options = parser(__doc__)
    options.add_argument("--images", type=int, default=8192)
    options.add_argument("--rounds", type=int, default=5)
    arguments = options.parse_args()
    report = Report("loader", arguments.json)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as home:
        os.environ["ARMILLARY_HOME"] = home
        for size in (64, 112):
            compare(size, arguments.images, arguments.rounds, report)
    return report.finish()


if __name__ == "__main__":
    raise SystemExit(main())
