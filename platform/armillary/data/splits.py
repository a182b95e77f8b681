"""What is trained on and what is judged: folds by identity or by sample, decided once and for everybody.

The folds depend on the dataset alone, never on a run's seed, so that runs of one fold can be compared and no seed sees
another's test people.

- ``identity`` (open set): the classes are put into a fixed order, by hash of the class number. With K classes,
  ``h = max(2, 0.3 K)``, rounded half up, are held out a fold: fold k holds out the k-th group of h, and K // h folds
  exist. They are disjoint. ORL: 40 people, 3 folds of 12 held out and 28 trained on.
- ``sample`` (closed set): the samples of each class are put into a fixed order and dealt into 5 parts; fold k holds out
  part k, 20% of every class. A class with one image is always trained on.
- ``holdout: validation`` is for tuning. It takes ``max(2, 0.3 T)`` of the fold's T training classes (8 of ORL's
  28), or the next fold's 20% of the samples, to evaluate on, and trains on what remains. What the fold tests on is not
  touched at all.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from armillary.components.counter import key, shuffled
from armillary.data.importers import ensure_dataset
from armillary.data.store import Dataset, Rows
from armillary.spec.errors import UserError
from armillary.spec.jobs import DataSpec

HELD_OUT_CLASSES = 0.3
SAMPLE_FOLDS = 5
MAX_SIDE = 4096
# Part of the fingerprint: change it with any rule above.
_RULE = "folds-1"
_CLASS_ORDER, _SAMPLE_ORDER, _NOISE = 1, 2, 3


@dataclass(frozen=True)
class ImageSet:
    """Images in memory.

    ``images`` uint8 ``(N, C, H, W)``; ``label`` ``(N,)`` int64; ``index`` ``(N,)`` int64, the position in the dataset;
    ``fields`` the dataset's other numeric columns, first dimension N. Columns of text are left in the store.
    """

    images: Tensor
    label: Tensor
    index: Tensor
    fields: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.label)

    def select(self, rows: Tensor) -> ImageSet:
        """The rows of that position, in that order."""
        columns = {name: values[rows] for name, values in self.fields.items()}
        return ImageSet(self.images[rows], self.label[rows], self.index[rows], columns)


@dataclass(frozen=True)
class PreparedData:
    """A fold of a dataset.

    Training labels count from 0 to ``num_classes - 1``. Evaluation labels do too when classes are shared (``sample``);
    in the open set (``identity``) they are the dataset's own class numbers. ``fingerprint`` covers the content, the
    kind of split, ``holdout``, the image size and the label noise; not the fold and not the seed, over which results
    are averaged.
    """

    train: ImageSet
    evaluation: ImageSet
    num_classes: int
    fingerprint: str
    name: str
    fold: int


def prepare(spec: DataSpec, *, seed: int) -> PreparedData:
    """Loads, resizes and splits a dataset.

    Args:
        spec: the job's ``data`` section.
        seed: the run's seed; decides only which labels ``label_noise`` changes.

    Raises:
        UserError: no such dataset or fold, too few classes, or images of several sizes without ``image_size``.
    """
    dataset = ensure_dataset(spec.name)
    check_fold(dataset, spec)
    everything = _load(dataset, spec.image_size)
    if spec.split == "identity":
        train_rows, held_out = _by_identity(everything.label, spec.fold, spec.holdout == "validation")
    else:
        train_rows, held_out = _by_sample(everything, spec.fold, spec.holdout == "validation")
    train, evaluation = everything.select(train_rows), everything.select(held_out)
    classes = torch.unique(train.label)
    train = _replace_label(train, torch.searchsorted(classes, train.label))
    if spec.split == "sample":
        evaluation = _replace_label(evaluation, torch.searchsorted(classes, evaluation.label))
    if spec.label_noise > 0:
        train = _replace_label(train, _noisy(train.label, len(classes), spec.label_noise, seed))
    height, width = everything.images.shape[-2:]
    digest = {
        "content": dataset.fingerprint,
        "rule": _RULE,
        "split": spec.split,
        "holdout": spec.holdout,
        "image_size": [height, width],
        "label_noise": spec.label_noise,
    }
    fingerprint = hashlib.sha256(json.dumps(digest, sort_keys=True).encode()).hexdigest()
    return PreparedData(train, evaluation, len(classes), fingerprint, dataset.name, spec.fold)


def fold_count(dataset: Dataset, split: str) -> int:
    """How many folds a dataset has."""
    if split == "sample":
        return SAMPLE_FOLDS
    classes = sum(count > 0 for count in dataset.manifest.histogram)
    return classes // _held_out(classes) if classes >= 4 else 0


def check_fold(dataset: Dataset, spec: DataSpec) -> None:
    """Checks that the split can be made, from the manifest alone.

    Raises:
        UserError: the fold does not exist, or there are too few classes or images.
    """
    histogram = [count for count in dataset.manifest.histogram if count]
    # Both sides need two classes, and validation takes two more from the training side.
    enough = 4 if spec.holdout == "test" else 6
    if spec.split == "identity" and len(histogram) < enough:
        raise UserError(
            f"{dataset.name} has {len(histogram)} classes; split identity with holdout {spec.holdout} needs {enough}",
            key="data.split",
            hint="split: sample shares the classes",
        )
    if spec.split == "sample" and max(histogram) < SAMPLE_FOLDS:
        raise UserError(
            f"{dataset.name} has at most {max(histogram)} images a class; a split by sample needs {SAMPLE_FOLDS}",
            key="data.split",
        )
    folds = fold_count(dataset, spec.split)
    if spec.fold >= folds:
        raise UserError(
            f"fold {spec.fold} does not exist: {dataset.name} has {folds} folds by {spec.split}",
            key="data.fold",
            allowed=f"0..{folds - 1}",
        )


def _held_out(classes: int) -> int:
    return max(2, int(HELD_OUT_CLASSES * classes + 0.5))


def _by_identity(label: Tensor, fold: int, validation: bool) -> tuple[Tensor, Tensor]:
    order = shuffled(torch.unique(label), key(_CLASS_ORDER))
    held = _held_out(len(order))
    test = order[fold * held : (fold + 1) * held]
    train = torch.cat([order[: fold * held], order[(fold + 1) * held :]])
    if validation:
        # From the end: classes there are in as few other folds' test parts as can be.
        size = _held_out(len(train))
        train, test = train[:-size], train[-size:]
    return torch.isin(label, train).nonzero().flatten(), torch.isin(label, test).nonzero().flatten()


def _by_sample(data: ImageSet, fold: int, validation: bool) -> tuple[Tensor, Tensor]:
    order = shuffled(data.index, key(_SAMPLE_ORDER))
    position = torch.empty_like(order)
    position[torch.searchsorted(data.index, order)] = torch.arange(len(order))
    # Rank within the class: sort by class, then by position, and count from each class's first row.
    by_class = torch.argsort(data.label * len(order) + position)
    _, inverse, counts = torch.unique(data.label, return_inverse=True, return_counts=True)
    starts = counts.cumsum(0) - counts
    rank = torch.empty_like(position)
    rank[by_class] = torch.arange(len(order)) - starts[inverse[by_class]]
    # The class shifts the deal, so that small classes do not all miss the same fold.
    part = (rank + inverse) % SAMPLE_FOLDS
    part[counts[inverse] == 1] = -1
    test = part == fold
    if not validation:
        return (~test).nonzero().flatten(), test.nonzero().flatten()
    tuned = part == (fold + 1) % SAMPLE_FOLDS
    return (~test & ~tuned).nonzero().flatten(), tuned.nonzero().flatten()


def _noisy(label: Tensor, classes: int, share: float, seed: int) -> Tensor:
    """``share * N`` labels, rounded half up, replaced, each by one of the other classes with equal chance."""
    if classes < 2:
        raise UserError("label noise needs two training classes", key="data.label_noise")
    generator = torch.Generator().manual_seed(key(_NOISE, seed))
    chosen = torch.randperm(len(label), generator=generator)[: int(share * len(label) + 0.5)]
    shift = torch.randint(1, classes, (len(chosen),), generator=generator)
    changed = label.clone()
    changed[chosen] = (label[chosen] + shift) % classes
    return changed


def _replace_label(data: ImageSet, label: Tensor) -> ImageSet:
    return ImageSet(data.images, label, data.index, data.fields)


def _load(dataset: Dataset, image_size: tuple[int, int] | None) -> ImageSet:
    """The whole dataset, every image resized once."""
    shape = dataset.manifest.image_shape
    if image_size is None and shape is None:
        problem = f"the images of {dataset.name} differ in size"
        raise UserError(problem, key="data.image_size", allowed="[height, width]", hint="e.g. image_size: [112, 112]")
    height, width = image_size if image_size is not None else shape[:2]  # type: ignore[index]
    if not (1 <= height <= MAX_SIDE and 1 <= width <= MAX_SIDE):
        raise UserError(f"image_size [{height}, {width}]", key="data.image_size", allowed=f"1..{MAX_SIDE} pixels")
    images, label, index = [], [], []
    fields: dict[str, list[Tensor]] = {name: [] for name, kind in dataset.manifest.columns.items() if kind != "string"}
    for rows in dataset.rows():
        images.append(_resized(rows, height, width, uniform=shape is not None))
        label.append(torch.tensor(rows.label))
        index.append(torch.tensor(rows.index))
        for name, parts in fields.items():
            parts.append(torch.tensor(rows.fields[name]))
    if len({part.shape[1] for part in images}) > 1:
        images = [part if part.shape[1] == 3 else part.expand(-1, 3, -1, -1) for part in images]
    columns = {name: torch.cat(parts) for name, parts in fields.items()}
    return ImageSet(torch.cat(images), torch.cat(label), torch.cat(index), columns)


def _resized(rows: Rows, height: int, width: int, *, uniform: bool) -> Tensor:
    if uniform:
        return _resize(torch.from_numpy(np.stack(rows.images)).permute(0, 3, 1, 2), height, width)
    channels = max(image.shape[2] for image in rows.images)
    parts = []
    for image in rows.images:
        part = _resize(torch.from_numpy(image.copy()).permute(2, 0, 1)[None], height, width)
        # Grey among colour: repeated, so that one tensor holds both.
        parts.append(part.expand(-1, channels, -1, -1) if part.shape[1] != channels else part)
    return torch.cat(parts)


def _resize(images: Tensor, height: int, width: int) -> Tensor:
    """uint8 ``(N, C, H, W)``, bilinear with antialiasing (a triangle as wide as the step, as Pillow does)."""
    if images.shape[-2:] == (height, width):
        return images.contiguous()
    resized = F.interpolate(images.float(), size=(height, width), mode="bilinear", antialias=True, align_corners=False)
    return resized.round_().clamp_(0, 255).to(torch.uint8)
