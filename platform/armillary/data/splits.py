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
- ``labeled_share`` trains on that share of each training class, rounded to the nearest count and at least one image:
  the first in a fixed order, so that a smaller share is part of a larger one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from armillary.components.counter import key, shuffled
from armillary.data.fields import batch_fields, read_columns
from armillary.data.ids import IdRows
from armillary.data.importers import ensure_dataset
from armillary.data.pixels import ArrayImages, PixelSource, decode_all
from armillary.data.store import Dataset
from armillary.data.streaming import StoredImages
from armillary.spec.errors import UserError
from armillary.spec.jobs import DataSpec

if TYPE_CHECKING:
    import pyarrow as pa

HELD_OUT_CLASSES = 0.3
SAMPLE_FOLDS = 5
MAX_SIDE = 4096
# Decoded bytes up to which ``load: auto`` keeps a dataset in memory.
MEMORY_LIMIT = 4 * 2**30
# What protocols compare by, where a dataset brings it: see armillary.evaluation.tables.
EVALUATION_TABLES = ("pairs", "templates", "matches")
# A dataset's column with the class that an image should have; -1 for nobody of the dataset.
TRUE_LABEL = "clean_label"
# A table with the class numbers (``class``) of a dataset before a part of it was left out: it keeps the folds it had.
FOLD_CLASSES = "fold_classes"
# Part of the fingerprint: change it with any rule above.
_RULE = "folds-1"
_CLASS_ORDER, _SAMPLE_ORDER, _NOISE, _LABELED_ORDER = 1, 2, 3, 4


# uint8 (N, C, H, W), wherever the pixels are: indexing by position gives tensors. Token ids in their place are int64.
Images = Tensor | ArrayImages | StoredImages | IdRows


@dataclass(frozen=True)
class ImageSet:
    """Images with what is known of them.

    ``images`` uint8 ``(N, C, H, W)``; ``label`` ``(N,)`` int64; ``index`` ``(N,)`` int64, the position in the dataset;
    ``fields`` numbers, first dimension N, and ``texts`` strings, ``(N,)``: see
    :func:`armillary.data.fields.batch_fields`. Everything but the pixels is always in memory.
    """

    images: Images
    label: Tensor
    index: Tensor
    fields: dict[str, Tensor] = field(default_factory=dict)
    texts: dict[str, NDArray[Any]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.label)

    def select(self, rows: Tensor) -> ImageSet:
        """The rows of that position, in that order."""
        images = self.images[rows] if isinstance(self.images, Tensor) else self.images.select(rows)
        columns = {name: values[rows] for name, values in self.fields.items()}
        texts = {name: values[rows.numpy()] for name, values in self.texts.items()}
        return ImageSet(images, self.label[rows], self.index[rows], columns, texts)


@dataclass(frozen=True)
class PreparedData:
    """A fold of a dataset.

    Training labels count from 0 to ``num_classes - 1``. Evaluation labels do too when classes are shared (``sample``);
    in the open set (``identity``) they are the dataset's own class numbers. Where a dataset has the column
    ``clean_label``, wrong labels are trained on but not judged by. ``fingerprint`` covers the content, the kind of
    split, ``holdout``, image size, label noise and labelled share; not the fold and not the seed, over which results
    are averaged. ``tables`` are those of :data:`EVALUATION_TABLES` that the dataset has, whole: rows are positions in
    the dataset, as in ``index``. ``inputs`` are the tensors of ``BuildContext.tables``, ``tokenizer`` that of the texts
    as JSON; :mod:`armillary.data.inputs` makes both.
    """

    train: ImageSet
    evaluation: ImageSet
    num_classes: int
    fingerprint: str
    name: str
    fold: int
    tables: Mapping[str, pa.Table] = field(default_factory=dict)
    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    tokenizer: str = ""


def prepare(
    spec: DataSpec, *, seed: int, pixels: Callable[[PixelSource], NDArray[np.uint8]] = decode_all
) -> PreparedData:
    """Splits a dataset, and decodes it unless it is to be streamed.

    Args:
        spec: the job's ``data`` section.
        seed: the run's seed; decides only which labels ``label_noise`` changes.
        pixels: gives the whole decoded dataset; training passes one that shares it among workers.

    Raises:
        UserError: no such dataset or fold, too few classes, images of several sizes without ``image_size``, or more
            images than fit into memory.
    """
    dataset = ensure_dataset(spec.name)
    check_fold(dataset, spec)
    source, columns = _open(dataset, spec.image_size)
    everything = _stored(source, columns, spec)
    if spec.split == "identity":
        classes = _fold_classes(dataset)
        train_rows, held_out = _by_identity(everything.label, spec.fold, spec.holdout == "validation", classes)
    else:
        train_rows, held_out = _by_sample(everything, spec.fold, spec.holdout == "validation")
    if not streams(spec, source):
        check_memory(source)
        everything = replace(everything, images=ArrayImages(pixels(source), everything.index, source.key))
    if spec.labeled_share < 1:
        train_rows = train_rows[_labeled(everything.select(train_rows), spec.labeled_share)]
    train, evaluation = everything.select(train_rows), _truly_labelled(everything.select(held_out))
    classes = torch.unique(train.label)
    train = replace(train, label=torch.searchsorted(classes, train.label))
    if spec.split == "sample":
        evaluation = replace(evaluation, label=torch.searchsorted(classes, evaluation.label))
    if spec.label_noise > 0:
        train = replace(train, label=_noisy(train.label, len(classes), spec.label_noise, seed))
    digest = {
        "content": dataset.fingerprint,
        "rule": _RULE,
        "split": spec.split,
        "holdout": spec.holdout,
        "image_size": [source.height, source.width],
        "label_noise": spec.label_noise,
    }
    if spec.labeled_share < 1:  # the whole share leaves fingerprints as they were
        digest["labeled_share"] = spec.labeled_share
    fingerprint = hashlib.sha256(json.dumps(digest, sort_keys=True).encode()).hexdigest()
    return PreparedData(
        train, evaluation, len(classes), fingerprint, dataset.name, spec.fold, evaluation_tables(dataset)
    )


def whole(spec: DataSpec) -> tuple[ImageSet, dict[str, pa.Table]]:
    """All of a dataset, undivided, for judging an encoder that never saw it; and its evaluation tables.

    Pixels stay in the store and are decoded as they are asked for. Labels are the dataset's own class numbers.

    Raises:
        UserError: no such dataset, or images of several sizes without ``image_size``.
    """
    dataset = ensure_dataset(spec.name)
    source, columns = _open(dataset, spec.image_size)
    return _stored(source, columns, spec), evaluation_tables(dataset)


def labels_by_name(spec: DataSpec, dataset: str, label: Tensor) -> Tensor | None:
    """The labels of another dataset's images as numbers of a run's training classes, where classes have the same names.

    Args:
        spec: the run's data, split by sample: all its classes were trained on.
        dataset: the other dataset, such as the test part of a benchmark.
        label: ``(N,)`` class numbers of that dataset.

    Returns:
        ``(N,)`` int64; classes that the run lacks are numbered behind its own. ``None`` if it lacks them all.
    """
    own, other = (ensure_dataset(name).manifest for name in (spec.name, dataset))
    trained = [name for name, count in zip(own.class_names, own.histogram, strict=True) if count]
    numbers = {name: number for number, name in enumerate(trained)}
    table = [numbers.get(name, len(trained) + number) for number, name in enumerate(other.class_names)]
    if min(table, default=0) >= len(trained):
        return None
    return torch.tensor(table)[label]


def evaluation_tables(dataset: Dataset) -> dict[str, pa.Table]:
    """The tables that protocols compare by, of those the dataset has."""
    return {name: dataset.table(name) for name in EVALUATION_TABLES if name in dataset.manifest.tables}


def streams(spec: DataSpec, source: PixelSource) -> bool:
    """Whether pixels stay in the store.

    ``load: auto`` decides by the dataset alone, not by the machine: the order of the batches depends on it, and a job
    must give the same everywhere.
    """
    return spec.load == "stream" or (spec.load == "auto" and source.nbytes > MEMORY_LIMIT)


def check_memory(source: PixelSource) -> None:
    """Checks that the decoded dataset leaves half of this machine's memory.

    Raises:
        UserError: it does not.
    """
    import psutil

    there = psutil.virtual_memory().total
    if source.nbytes > there / 2:
        raise UserError(
            f"{source.dataset.name} takes {source.nbytes / 2**30:.1f} GiB decoded, more than half of this machine's "
            f"{there / 2**30:.1f} GiB",
            key="data.load",
            allowed="stream",
            hint="or a smaller data.image_size",
        )


def fold_count(dataset: Dataset, split: str) -> int:
    """How many folds a dataset has."""
    if split == "sample":
        return SAMPLE_FOLDS
    classes = len(_fold_classes(dataset))
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


def _truly_labelled(held_out: ImageSet) -> ImageSet:
    """Judged by the truth where a dataset knows it: true labels, without strangers and people who are trained on."""
    truth = held_out.fields.get(TRUE_LABEL)
    if truth is None:
        return held_out
    rows = torch.isin(truth, torch.unique(held_out.label)).nonzero().flatten()
    return replace(held_out.select(rows), label=truth[rows])


def _fold_classes(dataset: Dataset) -> Tensor:
    """The classes that folds are made of: those with images, and those that had some before a cleaning."""
    there = torch.tensor(dataset.manifest.histogram).nonzero().flatten()
    if FOLD_CLASSES not in dataset.manifest.tables:
        return there
    listed = torch.from_numpy(dataset.table(FOLD_CLASSES)["class"].to_numpy().copy())
    classes: Tensor = torch.cat([there, listed]).unique()
    return classes


def _by_identity(label: Tensor, fold: int, validation: bool, classes: Tensor | None = None) -> tuple[Tensor, Tensor]:
    order = shuffled(torch.unique(label) if classes is None else classes, key(_CLASS_ORDER))
    held = _held_out(len(order))
    test = order[fold * held : (fold + 1) * held]
    train = torch.cat([order[: fold * held], order[(fold + 1) * held :]])
    if validation:
        # From the end: classes there are in as few other folds' test parts as can be.
        size = _held_out(len(train))
        train, test = train[:-size], train[-size:]
    return torch.isin(label, train).nonzero().flatten(), torch.isin(label, test).nonzero().flatten()


def _by_sample(data: ImageSet, fold: int, validation: bool) -> tuple[Tensor, Tensor]:
    rank, inverse, counts = _rank_in_class(data, _SAMPLE_ORDER)
    # The class shifts the deal, so that small classes do not all miss the same fold.
    part = (rank + inverse) % SAMPLE_FOLDS
    part[counts[inverse] == 1] = -1
    test = part == fold
    if not validation:
        return (~test).nonzero().flatten(), test.nonzero().flatten()
    tuned = part == (fold + 1) % SAMPLE_FOLDS
    # A class of two may have one row in each: what is judged must have been trained on.
    trained = torch.zeros(len(counts), dtype=torch.bool)
    trained[inverse[~test & ~tuned]] = True
    tuned &= trained[inverse]
    return (~test & ~tuned).nonzero().flatten(), tuned.nonzero().flatten()


def _labeled(train: ImageSet, share: float) -> Tensor:
    """The rows of a training part whose labels are taken as known."""
    rank, inverse, counts = _rank_in_class(train, _LABELED_ORDER)
    return (rank < (share * counts).round().clamp_min(1)[inverse]).nonzero().flatten()


def _rank_in_class(data: ImageSet, base: int) -> tuple[Tensor, Tensor, Tensor]:
    """Each image's place in a fixed order of its class's images; the number of its class, and the classes' sizes."""
    order = shuffled(data.index, key(base))
    position = torch.empty_like(order)
    position[torch.searchsorted(data.index, order)] = torch.arange(len(order))
    # Rank within the class: sort by class, then by position, and count from each class's first row.
    by_class = torch.argsort(data.label * len(order) + position)
    _, inverse, counts = torch.unique(data.label, return_inverse=True, return_counts=True)
    starts = counts.cumsum(0) - counts
    rank = torch.empty_like(position)
    rank[by_class] = torch.arange(len(order)) - starts[inverse[by_class]]
    return rank, inverse, counts


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


def _open(dataset: Dataset, image_size: tuple[int, int] | None) -> tuple[PixelSource, dict[str, NDArray[Any]]]:
    """Where the pixels are, and all other columns."""
    shape = dataset.manifest.image_shape
    if image_size is None and shape is None:
        problem = f"the images of {dataset.name} differ in size"
        raise UserError(problem, key="data.image_size", allowed="[height, width]", hint="e.g. image_size: [112, 112]")
    height, width = image_size if image_size is not None else shape[:2]  # type: ignore[index]
    if not (1 <= height <= MAX_SIDE and 1 <= width <= MAX_SIDE):
        raise UserError(f"image_size [{height}, {width}]", key="data.image_size", allowed=f"1..{MAX_SIDE} pixels")
    columns = read_columns(dataset, [*sorted(dataset.manifest.columns), *(() if shape else ("channels",))])
    channels = shape[2] if shape else int(columns.pop("channels").max())
    return PixelSource(dataset, channels, height, width), columns


def _stored(source: PixelSource, columns: dict[str, NDArray[Any]], spec: DataSpec) -> ImageSet:
    index, label = (torch.from_numpy(columns.pop(name).copy()) for name in ("index", "label"))
    fields, texts = batch_fields(columns)
    return ImageSet(StoredImages(source, index, spec.buffer), label, index, fields, texts)
