"""The order of an epoch that is read from row groups: random, but only a window of the data at a time.

A permutation of all images would read a row group for every image. Instead the row groups are shuffled, and images only
within windows of ``data.buffer`` images. Like the order in memory it is a pure function of (seed, epoch) and of the
batch size, so that a position is (epoch, step) and nothing is lost when the number of workers changes.

Random batches are dealt from :func:`lanes`: the sequence of shuffled groups is cut into equal parts, and every batch
takes the same number of images from each part, in the order of the parts. Worker r's contiguous part of a batch then
comes from its own lanes, and W workers read one W-th of the data each.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from armillary.components.counter import key
from armillary.data.samplers import Population, draw, global_batches, steps_per_epoch
from armillary.objectives.base import Needs
from armillary.spec.errors import UserError

_LANES = 32
_GROUP_ORDER, _WINDOW_ORDER = 22, 23
# Of the images, this share must find K - 1 companions in its own row group, or classes cannot be drawn from windows.
_COMPANIONS = 0.5


def lanes(batch_size: int) -> int:
    """How many places of the epoch a batch is taken from; depends on nothing but the batch size."""
    return math.gcd(batch_size, _LANES)


def windowed_batches(
    needs: Needs, batch_size: int, population: Population, groups: Tensor, buffer: int, *, seed: int, epoch: int
) -> Tensor:
    """Rows of the population for every step of an epoch, close together in the store.

    A population that fits into the buffer is drawn as it is in memory. Otherwise:

    ``random``: every image at most once; the rest of a division is dropped, another one each epoch. An image moves
    within a window of buffer / lanes images of its lane.

    ``class_balanced`` and ``image_sets``: row groups are gathered into windows of at least ``buffer`` images that hold
    at least the P classes of a batch, and each window is drawn from as a whole epoch in memory would be; its share of
    the steps is its share of the images.

    Args:
        needs: the sampler and its numbers.
        batch_size: images a global batch; at most ``buffer``.
        population: what to draw from, in the order of the store.
        groups: ``(N,)`` int64, the row group of every row, not falling.
        buffer: images a window.
        seed: the run's seed.
        epoch: counted from 0.

    Returns:
        ``(steps, batch_size)`` int64.

    Raises:
        UserError: as :func:`armillary.data.samplers.global_batches`, and see :func:`check_windows`.
    """
    if len(population) <= buffer:
        return global_batches(needs, batch_size, population, seed=seed, epoch=epoch)
    generator = torch.Generator().manual_seed(key(_GROUP_ORDER, seed, epoch))
    numbers, inverse, counts = torch.unique_consecutive(groups, return_inverse=True, return_counts=True)
    place = torch.randperm(len(numbers), generator=generator)
    sequence = torch.argsort(place[inverse], stable=True)
    if needs.sampler == "random":
        return _dealt(sequence, batch_size, buffer, torch.Generator().manual_seed(key(_WINDOW_ORDER, seed, epoch)))
    sizes = torch.empty_like(counts)
    sizes[place] = counts
    return _window_by_window(needs, batch_size, population, sequence, sizes.tolist(), buffer, generator)


def _dealt(sequence: Tensor, batch_size: int, buffer: int, generator: torch.Generator) -> Tensor:
    steps, count = steps_per_epoch(len(sequence), batch_size), lanes(batch_size)
    dealt = sequence[: steps * batch_size].view(count, -1)
    length = dealt.shape[1]
    window = max(1, buffer // count)
    # The first window of each lane is shorter than that of the next, so that they do not all end in one step.
    offset = torch.arange(1, count + 1) * window // count
    number = (torch.arange(length) + window - offset[:, None]) // window
    order = torch.rand(count, length, generator=generator, dtype=torch.float64)
    # By window, then by chance: numbers in [0, 1) never reach the next window's.
    shuffled = dealt.gather(1, torch.argsort(number + order, dim=1, stable=True))
    return shuffled.view(count, steps, -1).transpose(0, 1).reshape(steps, batch_size)


def _window_by_window(
    needs: Needs,
    batch_size: int,
    population: Population,
    sequence: Tensor,
    sizes: list[int],
    buffer: int,
    generator: torch.Generator,
) -> Tensor:
    per_class = needs.samples_per_class or needs.sets_per_class * needs.samples_per_set
    classes = batch_size // max(1, per_class)
    ends = _window_ends(population.labels[sequence], sizes, buffer, classes)
    total = steps_per_epoch(len(sequence), batch_size)
    parts, start, done = [], 0, 0
    for end in ends:
        # Rounding the running sum makes the steps add up.
        steps = total * end // len(sequence) - done
        if steps:
            rows = sequence[start:end].sort().values
            parts.append(rows[draw(needs, batch_size, population.select(rows), steps, generator)])
        start, done = end, done + steps
    return torch.cat(parts)


def _window_ends(labels: Tensor, sizes: list[int], buffer: int, classes: int) -> list[int]:
    """Where windows end: at ends of groups, once there are ``buffer`` images and enough classes."""
    ends, start, at = [], 0, 0
    for size in sizes:
        at += size
        if at - start >= buffer and len(torch.unique(labels[start:at])) >= classes:
            ends.append(at)
            start = at
    if not ends:
        return [at]
    # What is left is too small for a window of its own, and joins the last one.
    ends[-1] = at
    return ends


def check_windows(needs: Needs, batch_size: int, population: Population, groups: Tensor, buffer: int) -> None:
    """Checks that batches can be drawn from windows of the data.

    Raises:
        UserError: the buffer is smaller than a batch; or batches are made of classes or sets, which are so scattered
            over the store that a window holds too few images of each.
    """
    if len(population) <= buffer:
        return
    if batch_size > buffer:
        raise UserError(
            f"a buffer of {buffer:,} images holds no batch of {batch_size:,}",
            key="data.buffer",
            allowed=f">= {batch_size}",
        )
    if needs.sampler == "random":
        return
    together, k = population.labels, needs.samples_per_class
    if needs.sampler == "image_sets" and population.sets is not None:
        pairs = torch.stack([population.labels, population.sets], dim=1)
        together, k = torch.unique(pairs, dim=0, return_inverse=True)[1], needs.samples_per_set
    _, in_all, counts = torch.unique(together, return_inverse=True, return_counts=True)
    _, within, here = torch.unique(groups * len(counts) + in_all, return_inverse=True, return_counts=True)
    share = float((here[within] >= counts[in_all].clamp(max=k)).float().mean())
    if share < _COMPANIONS:
        what = "set" if needs.sampler == "image_sets" else "class"
        raise UserError(
            f"the {k} images of a {what} are drawn from windows of {buffer:,} images, but only {share:.0%} of the "
            f"images have {k - 1} others of their {what} in the same row group",
            key="data.buffer",
            allowed=f">= {len(population)}, or data.load: memory",
            hint=f"or import the dataset sorted by {what}",
        )
