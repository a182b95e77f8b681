"""Which images make up each global batch: a pure function of (seed, epoch), the same on every worker."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from armillary.components.counter import key
from armillary.objectives.base import Needs
from armillary.spec.errors import UserError

_SAMPLER = 21


@dataclass(frozen=True)
class Population:
    """What batches are drawn from: ``labels (N,)`` and, for batches of sets, ``sets (N,)``, both int64.

    Images of equal label and set number are one set; numbers need not be unique across classes.
    """

    labels: Tensor
    sets: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, rows: Tensor) -> Population:
        """A part of it."""
        return Population(self.labels[rows], None if self.sets is None else self.sets[rows])


def steps_per_epoch(images: int, batch_size: int) -> int:
    """Full batches in an epoch, but at least one."""
    return max(1, images // batch_size)


def global_batches(needs: Needs, batch_size: int, population: Population, *, seed: int, epoch: int) -> Tensor:
    """Rows of the population for every step of an epoch.

    ``random``: a permutation cut into batches, the rest dropped. A set smaller than a batch gives one batch, in which
    every image appears as equally often as possible.

    ``class_balanced``: batches of P = batch_size / samples_per_class different classes with samples_per_class images
    each, next to each other. All classes come equally often, up to one; so do the images of a class, up to the rest of
    a division. Images within a class do not repeat in a batch unless the class has fewer than samples_per_class.

    ``image_sets``: batches of P = batch_size / (S * K) different classes, each with S = sets_per_class sets of
    K = samples_per_set images, all next to each other. All classes come equally often, up to one. Within a class, sets
    come round by round. In a round a set of n images has max(1, n // K) turns with K images each, and none of its
    images comes twice before all have come, up to the rest of the division: long sets come more often, and short ones
    are not repeated to keep up. A set of n < K images gives each of them floor(K / n) or ceil(K / n) times. The S sets
    of a class in a batch are different ones if it has that many, and neighbours by length: a short set meets short
    ones.

    Args:
        needs: the sampler and its numbers.
        batch_size: images a global batch.
        population: what to draw from.
        seed: the run's seed.
        epoch: counted from 0.

    Returns:
        ``(steps, batch_size)`` int64.

    Raises:
        UserError: the batch cannot be made of whole classes, or there are fewer than P classes.
    """
    generator = torch.Generator().manual_seed(key(_SAMPLER, seed, epoch))
    return draw(needs, batch_size, population, steps_per_epoch(len(population), batch_size), generator)


def draw(needs: Needs, batch_size: int, population: Population, steps: int, generator: torch.Generator) -> Tensor:
    """``steps`` batches of a population, ``(steps, batch_size)``; see :func:`global_batches`."""
    if needs.sampler == "random":
        rounds = -(-steps * batch_size // len(population))
        order = torch.cat([torch.randperm(len(population), generator=generator) for _ in range(rounds)])
        return order[: steps * batch_size].view(steps, batch_size)
    check_groups(needs, batch_size, population)
    if needs.sampler == "class_balanced":
        return _class_balanced(population.labels, steps, batch_size, needs.samples_per_class, generator)
    return _image_sets(needs, batch_size, population, steps, generator)


def images_a_class(needs: Needs) -> int:
    """Images of each class in a batch; 0 for random batches."""
    return needs.sets_per_class * needs.samples_per_set if needs.sampler == "image_sets" else needs.samples_per_class


def check_groups(needs: Needs, batch_size: int, population: Population) -> None:
    """Checks that batches of classes, or of classes and sets, can be made.

    Raises:
        UserError: with the arithmetic.
    """
    if needs.sampler == "random":
        return
    k, classes = images_a_class(needs), len(torch.unique(population.labels))
    if needs.sampler == "image_sets" and population.sets is None:
        raise UserError("batches of sets need a dataset with the column image_set", key="data.name")
    of_sets = f" ({needs.sets_per_class} sets of {needs.samples_per_set})" if needs.sampler == "image_sets" else ""
    if k < 1 or batch_size % k:
        raise UserError(
            f"batch_size {batch_size} is not a multiple of {k} images a class{of_sets}",
            key="train.batch_size",
            allowed=f"n x {k}",
        )
    if batch_size // k > classes:
        raise UserError(
            f"batch_size {batch_size} with {k} images a class{of_sets} needs {batch_size // k} classes; "
            f"there are {classes}",
            key="train.batch_size",
            allowed=f"at most {classes * k}",
        )


def _class_balanced(labels: Tensor, steps: int, batch_size: int, k: int, generator: torch.Generator) -> Tensor:
    members, places = _visits(labels, steps, batch_size // k, generator)
    batches = torch.empty(steps * (batch_size // k), k, dtype=torch.int64)
    for rows, places_of_class in zip(members, places, strict=True):
        if len(places_of_class):
            batches[places_of_class] = rows[_rounds(len(rows), k, len(places_of_class), generator)]
    return batches.view(steps, batch_size)


def _image_sets(
    needs: Needs, batch_size: int, population: Population, steps: int, generator: torch.Generator
) -> Tensor:
    assert population.sets is not None
    s, k = needs.sets_per_class, needs.samples_per_set
    p = batch_size // (s * k)
    members, places = _visits(population.labels, steps, p, generator)
    batches = torch.empty(steps * p, s * k, dtype=torch.int64)
    for rows, places_of_class in zip(members, places, strict=True):
        if len(places_of_class):
            batches[places_of_class] = _sets_of_class(
                rows, population.sets[rows], s, k, len(places_of_class), generator
            )
    return batches.view(steps, batch_size)


def _visits(labels: Tensor, steps: int, p: int, generator: torch.Generator) -> tuple[list[Tensor], list[Tensor]]:
    """The rows of every class, and the places (of ``steps * p``) at which it comes."""
    classes, counts = torch.unique(labels, return_counts=True)
    members = torch.argsort(labels, stable=True).split(counts.tolist())
    chosen = _rounds(len(classes), p, steps, generator).flatten()
    visits = torch.bincount(chosen, minlength=len(classes)).tolist()
    return list(members), list(torch.argsort(chosen, stable=True).split(visits))


def _sets_of_class(rows: Tensor, sets: Tensor, s: int, k: int, visits: int, generator: torch.Generator) -> Tensor:
    """``visits`` draws of S sets with K images each from the rows of one class, ``(visits, S * K)``."""
    _, lengths = torch.unique(sets, return_counts=True)
    members = rows[torch.argsort(sets, stable=True)].split(lengths.tolist())
    turns = (lengths // k).clamp_min(1)
    drawn: list[Tensor] = []
    while len(drawn) < visits:
        images = [part[_rounds(len(part), k, int(turn), generator)] for part, turn in zip(members, turns, strict=True)]
        drawn += _round_of_sets(images, lengths, turns, s, generator)
    # Neighbours by length were drawn one after another; the order of the visits is random.
    order = torch.randperm(len(drawn), generator=generator)[:visits]
    return torch.stack([drawn[at] for at in order.tolist()])


def _round_of_sets(
    images: list[Tensor], lengths: Tensor, turns: Tensor, s: int, generator: torch.Generator
) -> list[Tensor]:
    """One round of a class: every turn of every set, in groups of S different sets of similar length.

    The t-th turns of all sets that have one are grouped together, so that no set meets itself. Where a group is not
    full, sets that are not in it yet fill it with their first turn, or, when there are too few, any.
    """
    groups = []
    for turn in range(int(turns.max())):
        there = (turns > turn).nonzero().flatten()
        shuffled = there[torch.randperm(len(there), generator=generator)]
        # By powers of two: lengths count roughly, and within a power chance decides who meets whom.
        by_length = shuffled[torch.argsort(lengths[shuffled].to(torch.float64).log2().floor(), stable=True)]
        for group in by_length.split(s):
            chosen = [images[at][turn] for at in group.tolist()]
            missing = s - len(chosen)
            if missing:
                order = torch.randperm(len(images), generator=generator)
                others = order[~torch.isin(order, group)].tolist() or list(range(len(images)))
                chosen += [images[others[at % len(others)]][0] for at in range(missing)]
            groups.append(torch.cat(chosen))
    return groups


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
