"""A tiny encoder and tiny batches for any objective's needs; seconds of CPU for a whole suite."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from armillary.objectives import Batch, BuildContext, Needs, Objective

CHANNELS, HEIGHT, WIDTH = 1, 6, 6
NUM_CLASSES = 4
EMBEDDING_DIM = 8
# Hyperparameters that only cost time, made small wherever an objective has them.
SMALL = {"projection_hidden": 16, "projection_dim": 8}


class TinyEncoder(nn.Module):
    """Images ``(batch, 1, 6, 6)`` to embeddings ``(batch, 8)``: convolution, batch norm, smooth activation, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(CHANNELS, 6, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(6), nn.SiLU(), nn.Flatten()
        )
        self.neck = nn.Linear(6 * 3 * 3, EMBEDDING_DIM)

    def forward(self, images: Tensor) -> Tensor:
        """The embeddings."""
        embeddings: Tensor = self.neck(self.features(images))
        return embeddings


def build(
    cls: type[Objective],
    options: dict[str, Any] | None = None,
    *,
    encoder: nn.Module | None = None,
    embedding_dim: int = EMBEDDING_DIM,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Objective:
    """An objective on a tiny encoder, its parameters a function of ``seed``.

    Args:
        cls: the objective.
        options: hyperparameters that differ from the defaults.
        encoder: takes the place of :class:`TinyEncoder`.
        embedding_dim: that encoder's width.
        dtype: type of all parameters.
        seed: of the parameters.
    """
    torch.manual_seed(seed)
    context = BuildContext(
        encoder=TinyEncoder() if encoder is None else encoder,
        embedding_dim=embedding_dim,
        num_classes=NUM_CLASSES,
        num_samples=64,
        dataset_size=64,
        batch_size=12,
        epochs=4,
        steps_per_epoch=5,
        in_channels=CHANNELS,
        image_size=(HEIGHT, WIDTH),
        class_counts=torch.full((NUM_CLASSES,), 16),
    )
    return cls(hyperparameters(cls, options or {}), context).to(dtype)


def hyperparameters(cls: type[Objective], options: dict[str, Any]) -> Any:
    """The objective's hyperparameters: defaults, made small where they only cost time, with ``options``."""
    small = {key: value for key, value in SMALL.items() if key in cls.Hyperparameters.model_fields}
    return cls.Hyperparameters(**{**small, **options})


def _share(images: Tensor, draw: torch.Generator) -> Tensor:
    return torch.rand(len(images), generator=draw, dtype=images.dtype)


# Fields beside label and index, from the first view and a source of chance. What a new field looks like is added here
# with the first objective that needs it.
FIELD_MAKERS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "quality": _share,
    "pose": lambda images, draw: torch.stack([180 * _share(images, draw) - 90, 60 * _share(images, draw) - 30], dim=1),
    "mask": lambda images, draw: _share(images, draw) > 0.5,
    "resolution": lambda images, draw: (8 + 24 * _share(images, draw)).long(),
    # Two sets in turn for every class, which come in turn too.
    "image_set": lambda images, _: torch.arange(len(images)) % (2 * NUM_CLASSES),
    "sequence": lambda images, _: torch.arange(len(images)) % NUM_CLASSES,
    "frame": lambda images, _: torch.arange(len(images)) // NUM_CLASSES,
}


def batch(
    needs: Needs,
    size: int = 12,
    *,
    labels: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Batch:
    """A batch that fulfils the needs: noisy class patterns, views that differ by noise, classes balanced and in turn.

    Args:
        needs: of the objective.
        size: number of samples.
        labels: ``(size,)``; by default 0, 1, 2, 3, 0, 1, ...
        dtype: type of images and floating-point fields.
        seed: of patterns and noise.

    Raises:
        ValueError: a needed field has no maker here yet.
    """
    draw = torch.Generator().manual_seed(seed)
    labels = torch.arange(size) % NUM_CLASSES if labels is None else labels
    patterns = torch.rand(NUM_CLASSES, CHANNELS, HEIGHT, WIDTH, generator=draw, dtype=torch.float64)

    def noise() -> Tensor:
        return torch.rand(size, CHANNELS, HEIGHT, WIDTH, generator=draw, dtype=torch.float64)

    images = 0.5 * patterns[labels % NUM_CLASSES] + 0.3 * noise()
    views = tuple((images + 0.2 * noise()).to(dtype) for _ in range(needs.views))
    fields = {}
    for name in needs.fields:
        if name == "label":
            fields[name] = labels
        elif name in FIELD_MAKERS:
            fields[name] = FIELD_MAKERS[name](views[0], draw)
        elif name != "index":
            raise ValueError(f"no tiny batch can carry the field {name!r} yet: add it to FIELD_MAKERS")
    return Batch(views=views, index=torch.arange(size), fields=fields)


def take(whole: Batch, rows: Tensor | slice) -> Batch:
    """Some samples of a batch, in the order of ``rows``."""
    return whole.rows(rows)


def part(whole: Batch, rank: int, world_size: int) -> Batch:
    """The ``rank``-th contiguous part of a batch, as the sampler deals it."""
    size = len(whole.index) // world_size
    return take(whole, slice(rank * size, (rank + 1) * size))
