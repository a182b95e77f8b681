"""From an image set to the batches an objective gets on one worker."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from armillary.data.samplers import check_class_balanced, global_batches, steps_per_epoch
from armillary.data.splits import ImageSet
from armillary.data.views import Views
from armillary.objectives.base import Batch, Needs
from armillary.spec.errors import UserError


class Batches:
    """The training batches of one worker.

    Every worker computes the same global batches and takes the ``rank``-th contiguous part of each, so that a gather in
    rank order rebuilds the batch. Nothing but the slice depends on ``rank`` and ``world_size``.

    Args:
        train: the images to train on.
        needs: how many views, which fields and which sampler the objective wants.
        views: the recipe.
        batch_size: images a global batch, over all workers.
        seed: the run's seed.
        rank: this worker, from 0.
        world_size: how many workers.
        device: where the batches go; views are made there.

    Raises:
        UserError: the data lacks a field, the batch cannot be shared out evenly, or P x K batches cannot be made.
    """

    def __init__(
        self,
        train: ImageSet,
        needs: Needs,
        views: Views,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        check_batches(train, needs, batch_size, world_size)
        self.train, self.needs, self.views = train, needs, views
        self.batch_size, self.seed = batch_size, seed
        self.rank, self.world_size, self.device = rank, world_size, torch.device(device)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps an epoch."""
        return steps_per_epoch(len(self.train), self.batch_size)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """This worker's batches of an epoch, from ``start_step`` on, which gives what an uninterrupted epoch gives."""
        plan = global_batches(
            self.train.label,
            batch_size=self.batch_size,
            sampler=self.needs.sampler,
            samples_per_class=self.needs.samples_per_class,
            seed=self.seed,
            epoch=epoch,
        )
        share = self.batch_size // self.world_size
        for rows in plan[start_step:, self.rank * share : (self.rank + 1) * share]:
            yield self._batch(rows, epoch)

    def samples(self) -> Iterator[Batch]:
        """One pass over this worker's part of the training set, in order of rows, one view without augmentation.

        The parts are contiguous and differ by at most one image.
        """
        bounds = [len(self.train) * part // self.world_size for part in (self.rank, self.rank + 1)]
        share = max(1, self.batch_size // self.world_size)
        for start in range(bounds[0], bounds[1], share):
            rows = torch.arange(start, min(start + share, bounds[1]))
            images = self.train.images[rows].to(self.device)
            batch = self._columns(rows)
            yield Batch((images.to(torch.float32) / 255,), self.train.index[rows].to(self.device), batch)

    def _columns(self, rows: Tensor) -> dict[str, Tensor]:
        columns = {**self.train.fields, "label": self.train.label}
        wanted = [name for name in self.needs.fields if name != "index"]
        return {name: columns[name][rows].to(self.device, non_blocking=True) for name in wanted}

    def _batch(self, rows: Tensor, epoch: int) -> Batch:
        images = self.train.images[rows].to(self.device, non_blocking=True)
        index = self.train.index[rows].to(self.device, non_blocking=True)
        views = [
            self.views(images, index, seed=self.seed, epoch=epoch, view=view)
            for view in range(self.views.count or self.needs.views)
        ]
        pixels, parameters = tuple(view.pixels for view in views), tuple(view.parameters for view in views)
        return Batch(pixels, index, self._columns(rows), parameters)


def check_batches(train: ImageSet, needs: Needs, batch_size: int, world_size: int) -> None:
    """Checks that batches can be made as the objective needs them.

    Raises:
        UserError: what is missing, and what the data has.
    """
    has = ["index", "label", *sorted(train.fields)]
    for name in needs.fields:
        if name not in has:
            raise UserError(
                f"the objective needs the batch fields {', '.join(needs.fields)}; the dataset has no {name!r}",
                key="data.name",
                allowed=f"a dataset with {name}; this one has {', '.join(has)}",
            )
    if batch_size % world_size:
        raise UserError(
            f"batch_size {batch_size} cannot be shared by {world_size} workers evenly",
            key="train.batch_size",
            allowed=f"a multiple of {world_size}",
        )
    if needs.sampler == "class_balanced":
        check_class_balanced(len(torch.unique(train.label)), batch_size, needs.samples_per_class)
