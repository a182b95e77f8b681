"""From an image set to the batches an objective gets on one worker."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from armillary.data import frames
from armillary.data.ids import IdRows
from armillary.data.interactions import NegativeItems
from armillary.data.samplers import Population, check_groups, global_batches, steps_per_epoch
from armillary.data.splits import Images, ImageSet
from armillary.data.streaming import StoredImages
from armillary.data.text import Partners
from armillary.data.views import Views
from armillary.data.windows import check_windows, windowed_batches
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
        _check_fields(train, needs, views)
        _check_share(batch_size, world_size)
        self.train, self.needs, self.views = train, needs, views
        self.batch_size, self.seed = batch_size, seed
        self.rank, self.world_size, self.device = rank, world_size, torch.device(device)
        self.count = views.count or needs.views
        # Where views are the frames of a sequence, batches are drawn from the frames that enough others follow.
        self._clips: Tensor | None = None
        if views.name == frames.RECIPE:
            self._clips = frames.clips(train.fields["sequence"], train.fields["frame"], self.count)
        drawn = train.label if self._clips is None else train.label[self._clips[:, 0]]
        sets = train.fields.get("image_set")
        self._population = Population(drawn, sets if sets is None or self._clips is None else sets[self._clips[:, 0]])
        check_groups(needs, batch_size, self._population)
        self._partners: Partners | None = None
        if isinstance(train.images, IdRows) and needs.modality == "text" and needs.views > 1:
            self._partners = Partners(train.images.ids, train.label, train.index)
        self._negatives: NegativeItems | None = None
        if isinstance(train.images, IdRows) and needs.modality == "interactions":
            self._negatives = NegativeItems(train.images, train.index)
        self._groups: Tensor | None = None
        if isinstance(train.images, StoredImages):
            groups = train.images.groups()
            self._groups = groups if self._clips is None else groups[self._clips[:, 0]]
            check_windows(needs, batch_size, self._population, self._groups, train.images.buffer)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps an epoch."""
        return steps_per_epoch(len(self._population), self.batch_size)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """This worker's batches of an epoch, from ``start_step`` on, which gives what an uninterrupted epoch gives.

        What comes before ``start_step`` is not read.
        """
        share = self.batch_size // self.world_size
        plan = self._plan(epoch)[start_step:, self.rank * share : (self.rank + 1) * share]
        if self._clips is not None:
            # (steps, share, frames)
            plan = self._clips[plan]
        read = list(plan.flatten(1))
        for rows, images in zip(plan, in_order(self.train.images, read), strict=True):
            yield self._batch(rows, images, epoch)

    def _plan(self, epoch: int) -> Tensor:
        """Places in the population, ``(steps, batch_size)``: the same on every worker."""
        if self._groups is None:
            return global_batches(self.needs, self.batch_size, self._population, seed=self.seed, epoch=epoch)
        assert isinstance(self.train.images, StoredImages)
        return windowed_batches(
            self.needs,
            self.batch_size,
            self._population,
            self._groups,
            self.train.images.buffer,
            seed=self.seed,
            epoch=epoch,
        )

    def samples(self) -> Iterator[Batch]:
        """One pass over this worker's part of the training set, in order of rows, one view without augmentation.

        The parts are contiguous and differ by at most one image.
        """
        bounds = [len(self.train) * part // self.world_size for part in (self.rank, self.rank + 1)]
        share = max(1, self.batch_size // self.world_size)
        plan = torch.arange(bounds[0], bounds[1]).split(share)
        for rows, images in zip(plan, in_order(self.train.images, plan), strict=True):
            pixels = images.to(self.device)
            if pixels.dtype == torch.uint8:
                pixels = pixels.float() / 255
            yield Batch((pixels,), self.train.index[rows].to(self.device), self._columns(rows))

    def _columns(self, rows: Tensor) -> dict[str, Tensor]:
        columns = {**self.train.fields, "label": self.train.label}
        wanted = [name for name in self.needs.fields if name != "index"]
        return {name: columns[name][rows].to(self.device, non_blocking=True) for name in wanted}

    def _batch(self, rows: Tensor, images: Tensor, epoch: int) -> Batch:
        """Everything of some samples: the one place where a batch is put together.

        Args:
            rows: ``(b,)``, or ``(b, frames)``; the fields and the index are those of the first frame.
            images: uint8, of all of these, in that order.
            epoch: counted from 0.
        """
        images = images.to(self.device, non_blocking=True)
        if isinstance(self.train.images, IdRows):
            index = self.train.index[rows].to(self.device, non_blocking=True)
            return Batch(self._ids(rows, images, epoch), index, self._columns(rows))
        each = [images] * self.count
        if rows.ndim == 2:
            each, rows = list(images.unflatten(0, tuple(rows.shape)).unbind(1)), rows[:, 0]
        index = self.train.index[rows].to(self.device, non_blocking=True)
        views = [self.views(part, index, seed=self.seed, epoch=epoch, view=view) for view, part in enumerate(each)]
        pixels, parameters = tuple(view.pixels for view in views), tuple(view.parameters for view in views)
        return Batch(pixels, index, self._columns(rows), parameters)

    def _ids(self, rows: Tensor, ids: Tensor, epoch: int) -> tuple[Tensor, ...]:
        """The samples; with further views also one of the same class, and a similar one of another class.

        Interactions get a third column: an item that the user did not choose.
        """
        if self._negatives is not None:
            return (torch.cat([ids, self._negatives(rows, self.seed, epoch)[:, None].to(self.device)], dim=1),)
        views = [ids]
        if self._partners is not None:
            partners = [self._partners.positives, self._partners.negatives][: self.needs.views - 1]
            views += [self.train.images[draw(rows, self.seed, epoch)].to(self.device) for draw in partners]
        return tuple(views)


def in_order(images: Images, plan: Sequence[Tensor]) -> Iterator[Tensor]:
    """The images of one batch of positions after another, uint8 ``(n, C, H, W)``; stored ones are read ahead."""
    if isinstance(images, StoredImages):
        yield from images.ahead(plan)
        return
    for rows in plan:
        yield images[rows]


# Datasets at hand that have a field which few have.
_SHIPPED = dict.fromkeys(("sequence", "frame"), "data.name: identities_video has them")


def _check_fields(train: ImageSet, needs: Needs, views: Views) -> None:
    has = ["index", "label", *sorted(train.fields)]
    wanted = list(needs.fields)
    if needs.sampler == "image_sets":
        wanted.append("image_set")
    if views.name == frames.RECIPE:
        wanted += ["sequence", "frame"]
    for name in wanted:
        if name not in has:
            raise UserError(
                f"the objective needs the batch fields {', '.join(dict.fromkeys(wanted))}; the dataset has no {name!r}",
                key="data.name",
                allowed=f"a dataset with {name}; this one has {', '.join(has)}",
                hint=_SHIPPED.get(name),
            )


def _check_share(batch_size: int, world_size: int) -> None:
    if batch_size % world_size:
        raise UserError(
            f"batch_size {batch_size} cannot be shared by {world_size} workers evenly",
            key="train.batch_size",
            allowed=f"a multiple of {world_size}",
        )
