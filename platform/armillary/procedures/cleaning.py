"""Cleaning a dataset's labels with the sub-centers of a trained run (catalog: subcenter_cleaning).

Deng, Guo, Liu, Gong, Zafeiriou, "Sub-center ArcFace: Boosting Face Recognition by Large-scale Noisy Web Faces", ECCV
2020, section 3.3. Wrongly labelled images gather around other sub-centers of their class than the right ones: the one
with most images is kept, and of the images those within 75 degrees of it. As in the authors' ``drop.py`` vectors have
unit length, images are not mirrored, and cosines are compared, strictly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from armillary.data.copies import stored_records
from armillary.data.layout import dataset_location
from armillary.data.relations import SAMPLE_GRAPH
from armillary.data.splits import EVALUATION_TABLES, FOLD_CLASSES, TRUE_LABEL
from armillary.data.store import Dataset, dataset_exists, write_dataset
from armillary.evaluation.extract import extract
from armillary.losses.tensors import check_embeddings, check_labels, normalize
from armillary.procedures.trained import TrainedRun, load_trained
from armillary.spec.errors import UserError
from armillary.spec.jobs import TrainJob
from armillary.spec.loading import apply_overrides

ORIGINAL_INDEX = "original_index"
_BLOCK, _LEAST_CLASSES = 8192, 2


@dataclass(frozen=True)
class Assignment:
    """Where samples stand among the sub-centers of their class.

    ``nearest (n,)``: the nearest sub-center of the sample's class; ``dominant (C,)``: each class's sub-center with most
    samples, the first of several; ``cosine (n,)``: to the dominant one of the own class; ``kept (n,)`` bool.
    """

    nearest: Tensor
    dominant: Tensor
    cosine: Tensor
    kept: Tensor

    def in_dominant(self, labels: Tensor) -> Tensor:
        """Which samples are nearest to the dominant sub-center of their class, ``(n,)`` bool."""
        return self.nearest == self.dominant[labels]


@torch.no_grad()
def assign(embeddings: Tensor, labels: Tensor, subcenters: Tensor, angle: float = 75.0) -> Assignment:
    """Assigns samples to sub-centers and says which to keep.

    Args:
        embeddings: ``(n, dim)``, of any length.
        labels: ``(n,)`` from 0.
        subcenters: ``(C, K, dim)``, of any length.
        angle: degrees, in (0, 180]; samples nearer than this to the dominant sub-center of their class are kept.

    Raises:
        ValueError: a wrong shape, a label outside the classes, an angle out of range.
    """
    check_embeddings(embeddings, labels)
    classes, count, dim = subcenters.shape
    check_labels(labels, classes)
    if embeddings.shape[1] != dim:
        raise ValueError(f"embeddings have {embeddings.shape[1]} numbers, sub-centers {dim}")
    if not 0 < angle <= 180:
        raise ValueError(f"angle must be in (0, 180] degrees, found {angle}")
    samples, rows = normalize(embeddings.float()), normalize(subcenters.float())
    own = torch.cat(
        [
            torch.einsum("nd,nkd->nk", part, rows[names])
            for part, names in zip(samples.split(_BLOCK), labels.split(_BLOCK), strict=True)
        ]
    )
    nearest = own.argmax(dim=1)
    members = torch.bincount(labels * count + nearest, minlength=classes * count).view(classes, count)
    dominant = members.argmax(dim=1)
    cosine = own.gather(1, dominant[labels][:, None]).squeeze(1)
    return Assignment(nearest, dominant, cosine, cosine > math.cos(math.radians(angle)))


@dataclass(frozen=True)
class Noise:
    """Shares of wrong labels among images, and of the rightly labelled images that were kept."""

    before: float
    in_dominant: float
    kept: float
    right_kept: float


@dataclass(frozen=True)
class CleaningReport:
    """What a cleaning did to the training part; ``noise`` is ``None`` where the dataset does not know the truth."""

    dataset: str
    images: int
    kept: int
    in_dominant: int
    classes: int
    classes_kept: int
    angle: float
    noise: Noise | None


def clean_run(run_id: str, *, name: str | None = None, angle: float = 75.0) -> CleaningReport:
    """Writes a dataset without the images that a run's sub-centers tell to be wrongly labelled.

    Only the part the run was trained on is filtered; the other images stay, and so do class numbers and folds, so that
    a run on the new dataset is judged by the same people. ``original_index`` says which row of the first dataset an
    image was. Tables that name rows (pairs, templates, a graph of samples) are left out.

    Args:
        run_id: a finished run of an objective with a class head; with one center a class it is a plain filter by angle.
        name: of the new dataset; by default that of the old one and the end of the run's id.
        angle: degrees, in (0, 180]; see :func:`assign`.

    Raises:
        UserError: no such run, no class head, labels that only the job made noisy, hardly an image kept, or the dataset
            exists already.
    """
    trained = load_trained(run_id)
    if trained.job.data.label_noise:
        problem = "this run's wrong labels were made while training; the dataset has none of them"
        raise UserError(problem, key="data.label_noise", hint="armillary data make identities --noise-flip 0.2")
    name = name or f"{trained.dataset.name}-clean-{trained.run.run_id[-6:]}"
    if dataset_exists(name):
        where = dataset_location(name)
        raise UserError(f"dataset {name!r} exists already", where=where, hint="delete it or use another --name")
    train = trained.data.train
    embeddings = extract(trained.encoder, train.images, batch_size=trained.job.evaluate.batch_size)
    found = assign(embeddings, train.label, trained.class_centers(), angle)
    left = len(train.label[found.kept].unique())
    if left < _LEAST_CLASSES:
        raise UserError(
            f"too few images are kept to train on: {int(found.kept.sum())} of {len(train)}, in {left} classes",
            where=f"--angle {angle:g}",
            hint="a wider --angle, or a run that has been trained for longer",
        )
    kept = np.ones(len(trained.dataset), dtype=bool)
    kept[train.index.numpy()] = found.kept.numpy()
    _write(trained.dataset, name, kept, f"cleaned by run {trained.run.run_id} at {angle:g} degrees")
    dominant = found.in_dominant(train.label)
    return CleaningReport(
        dataset=name,
        images=len(train),
        kept=int(found.kept.sum()),
        in_dominant=int(dominant.sum()),
        classes=trained.data.num_classes,
        classes_kept=left,
        angle=angle,
        noise=_noise(trained, found.kept, dominant),
    )


def retrain_job(job: TrainJob, dataset: str) -> TrainJob:
    """The same training on the cleaned dataset, with one center a class."""
    changes: dict[str, object] = {"data.name": dataset}
    if job.objective.name == "subcenter_arcface":
        shared = {key: value for key, value in job.objective.options.items() if key != "subcenters"}
        changes |= {"objective.name": "arcface", **{f"objective.{key}": value for key, value in shared.items()}}
    return apply_overrides(job, changes)


def _noise(trained: TrainedRun, kept: Tensor, dominant: Tensor) -> Noise | None:
    truth = trained.data.train.fields.get(TRUE_LABEL)
    if truth is None:
        return None
    wrong = truth != trained.stored_labels()
    return Noise(
        before=_share(wrong),
        in_dominant=_share(wrong[dominant]),
        kept=_share(wrong[kept]),
        right_kept=_share(kept[~wrong]),
    )


def _share(chosen: Tensor) -> float:
    return float(chosen.float().mean()) if len(chosen) else 0.0


def _write(dataset: Dataset, name: str, kept: NDArray[np.bool_], note: str) -> Dataset:
    import pyarrow as pa

    manifest = dataset.manifest
    tables = {
        table: dataset.table(table) for table in manifest.tables if table not in (*EVALUATION_TABLES, SAMPLE_GRAPH)
    }
    if FOLD_CLASSES not in tables:
        tables[FOLD_CLASSES] = pa.table({"class": np.flatnonzero(manifest.histogram).astype(np.int64)})
    records = (
        replace(record, fields={ORIGINAL_INDEX: index, **record.fields})
        for index, record in stored_records(dataset)
        if kept[index]
    )
    return write_dataset(
        name,
        records,
        class_names=manifest.class_names,
        columns={**manifest.columns, ORIGINAL_INDEX: "int64"},
        tables=tables,
        form=manifest.form,
        credit=f"{manifest.credits}; {dataset.name} ({dataset.fingerprint[:12]}) {note}",
        licence=manifest.licence,
    )
