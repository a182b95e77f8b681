"""A finished run with everything it was trained on: what procedures begin with."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from armillary.data.importers import ensure_dataset
from armillary.data.splits import PreparedData, prepare
from armillary.data.store import Dataset
from armillary.spec.errors import UserError, unknown_name
from armillary.spec.jobs import TrainJob
from armillary.spec.loading import load_job
from armillary.training.model import load_encoder, load_head
from armillary.training.rundir import RunDirectory


@dataclass(frozen=True)
class TrainedRun:
    """A run, its job, its encoder in evaluation mode, its head's row tensors by name, and its data."""

    run: RunDirectory
    job: TrainJob
    encoder: nn.Module
    head: dict[str, Tensor]
    data: PreparedData
    dataset: Dataset

    def class_centers(self) -> Tensor:
        """The centers of the training classes, ``(C, K, dim)``; K = 1 where a class has one row.

        Raises:
            UserError: the objective has several heads, or one of another kind.
        """
        weights = [rows for name, rows in self.head.items() if name.rpartition(".")[2] == "weight"]
        if len(weights) != 1 or weights[0].ndim not in (2, 3) or len(weights[0]) != self.data.num_classes:
            raise UserError(
                f"the head of {self.job.objective.name} does not have centers of the training classes",
                where=f"run {self.run.run_id}",
                allowed="a run of subcenter_arcface, or of another objective with one class head",
            )
        return weights[0] if weights[0].ndim == 3 else weights[0][:, None]

    def stored_labels(self) -> Tensor:
        """The dataset's own class number of every training image, ``(n,)`` int64."""
        return self._labels[self.data.train.index]

    def class_number(self, training_class: int) -> int:
        """The dataset's own number of a training class."""
        return int(self.stored_labels().unique()[training_class])

    def training_class(self, identity: str) -> int:
        """The training class of an identity: the dataset's number of its class, or its name.

        Raises:
            UserError: no such class, or one that was held out.
        """
        names = self.dataset.manifest.class_names
        if identity in names:
            number = names.index(identity)
        elif identity.isdigit() and int(identity) < len(names):
            number = int(identity)
        elif identity.lstrip("-").isdigit():
            raise UserError(f"found {identity}", where="--identity", allowed=f"0..{len(names) - 1}, or a name")
        else:
            raise unknown_name("identity", identity, list(names), where="--identity")
        trained = self.stored_labels().unique().tolist()
        if number not in trained:
            raise UserError(
                f"class {number} ({names[number]}) was held out: the network never saw it",
                where="--identity",
                allowed=f"one of {len(trained)} training classes, e.g. {', '.join(map(str, trained[:5]))}",
            )
        return int(trained.index(number))

    @cached_property
    def _labels(self) -> Tensor:
        return torch.from_numpy(self.dataset.column("label").copy())


def load_trained(run_id: str) -> TrainedRun:
    """Loads a finished run by id, or by an unambiguous beginning of one.

    Raises:
        UserError: no such run, it has no model or no class head, or its data is gone.
    """
    run = RunDirectory.find(run_id)
    job = load_job(run.path / "job.yaml", kind="train")
    assert isinstance(job, TrainJob)
    encoder, head = load_encoder(run), load_head(run)
    return TrainedRun(run, job, encoder, head, prepare(job.data, seed=job.seed), ensure_dataset(job.data.name))
