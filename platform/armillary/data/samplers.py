"""Which images make up each global batch: a pure function of (seed, epoch), the same on every worker."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from armillary.components.counter import key
from armillary.spec.errors import UserError

_SAMPLER = 21


def steps_per_epoch(images: int, batch_size: int) -> int:
    """Full batches in an epoch, but at least one."""
    return max(1, images // batch_size)


def global_batches(
    labels: Tensor,
    *,
    batch_size: int,
    sampler: Literal["random", "class_balanced", "image_sets"],
    samples_per_class: int,
    seed: int,
    epoch: int,
) -> Tensor:
    """Rows of the training set for every step of an epoch.

    ``random``: a permutation cut into batches, the rest dropped. A set smaller than a batch gives one batch, in which
    every image appears as equally often as possible.

    ``class_balanced``: batches of P = batch_size / samples_per_class different classes with samples_per_class images
    each, next to each other. All classes come equally often, up to one; so do the images of a class, up to the rest of
    a division. Images within a class do not repeat in a batch unless the class has fewer than samples_per_class.

    Args:
        labels: ``(N,)`` int64.
        batch_size: images a global batch.
        sampler: one of the two.
        samples_per_class: K of P x K; ignored by ``random``.
        seed: the run's seed.
        epoch: counted from 0.

    Returns:
        ``(steps, batch_size)`` int64.

    Raises:
        UserError: the batch cannot be made of whole classes, or there are fewer than P classes.
    """
    generator = torch.Generator().manual_seed(key(_SAMPLER, seed, epoch))
    steps = steps_per_epoch(len(labels), batch_size)
    if sampler == "random":
        rounds = -(-steps * batch_size // len(labels))
        order = torch.cat([torch.randperm(len(labels), generator=generator) for _ in range(rounds)])
        return order[: steps * batch_size].view(steps, batch_size)
    return _class_balanced(labels, steps, batch_size, samples_per_class, generator)


def _class_balanced(labels: Tensor, steps: int, batch_size: int, k: int, generator: torch.Generator) -> Tensor:
    classes, counts = torch.unique(labels, return_counts=True)
    check_class_balanced(len(classes), batch_size, k)
    members = torch.argsort(labels, stable=True).split(counts.tolist())
    p = batch_size // k
    chosen = _rounds(len(classes), p, steps, generator)
    batches = torch.empty(steps * p, k, dtype=torch.int64)
    flat = chosen.flatten()
    visits = torch.bincount(flat, minlength=len(classes)).tolist()
    by_class = torch.argsort(flat, stable=True).split(visits)
    for rows, places in zip(members, by_class, strict=True):
        if len(places):
            batches[places] = rows[_rounds(len(rows), k, len(places), generator)]
    return batches.view(steps, batch_size)


def _rounds(size: int, take: int, count: int, generator: torch.Generator) -> Tensor:
    """``count`` draws of ``take`` out of ``size``, each without repetition if it can be, ``(count, take)``.

    A permutation serves size // take draws before the next one is made; a size below ``take`` is repeated.
    """
    copies = -(-take // size)
    usable = max(take, size * copies // take * take)
    needed = -(-count * take // usable)
    orders = []
    for _ in range(needed):
        order = torch.cat([torch.randperm(size, generator=generator) for _ in range(copies)])
        orders.append(order[:usable])
    return torch.cat(orders)[: count * take].view(count, take)


def check_class_balanced(classes: int, batch_size: int, k: int) -> None:
    """Checks that P x K batches can be made.

    Raises:
        UserError: with the arithmetic.
    """
    if k < 1 or batch_size % k:
        raise UserError(
            f"batch_size {batch_size} is not a multiple of {k} images a class",
            key="train.batch_size",
            allowed=f"n x {k}",
        )
    if batch_size // k > classes:
        raise UserError(
            f"batch_size {batch_size} with {k} images a class needs {batch_size // k} classes; there are {classes}",
            key="train.batch_size",
            allowed=f"at most {classes * k}",
        )
