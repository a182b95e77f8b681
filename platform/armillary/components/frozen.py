"""Classifiers that are not trained any more, as teachers: a finished run's, or class means over frozen embeddings."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from armillary.collectives import all_reduce_sum
from armillary.components.backbones import build_encoder
from armillary.components.normalization import convert_batch_norm
from armillary.losses.tensors import normalize, widen
from armillary.spec.errors import UserError, unknown_name
from armillary.spec.home import DESCRIPTION, HEAD, WEIGHTS, runs_dir
from armillary.spec.jobs import BackboneSpec


class FrozenClassifier(nn.Module):
    """An encoder in evaluation mode, whatever mode the rest is in, and class logits; no gradient.

    Args:
        encoder: from images to embeddings; taken over, not copied.
    """

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> FrozenClassifier:
        """Stays in evaluation mode: statistics of batch norms are frozen too."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Images to logits ``(batch, classes)``."""
        with torch.autocast(images.device.type, enabled=False):
            return self.logits(widen(self.encoder(images)))

    def logits(self, embeddings: Tensor) -> Tensor:
        """Embeddings ``(batch, dim)`` to logits."""
        raise NotImplementedError(f"{type(self).__name__} does not define logits")


class LinearClassifier(FrozenClassifier):
    """A finished run's encoder and linear class head.

    Args:
        encoder: the run's.
        weight: ``(classes, dim)``.
        bias: ``(classes,)``.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, encoder: nn.Module, weight: Tensor, bias: Tensor) -> None:
        super().__init__(encoder)
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def logits(self, embeddings: Tensor) -> Tensor:
        """``W f + b``."""
        return embeddings @ self.weight.T + self.bias


class ClassMeans(FrozenClassifier):
    """A copy of an encoder that assigns an image to the class whose mean is nearest by angle.

    ``scale * cos(f - m, m_c - m)`` with m the mean of all embeddings and m_c that of a class; random directions before
    :meth:`fit`.

    Args:
        encoder: copied as it is.
        dim: width of its embeddings.
        classes: number of classes.
        scale: of the logits, > 0.
    """

    center: Tensor
    means: Tensor

    def __init__(self, encoder: nn.Module, dim: int, classes: int, scale: float = 16.0) -> None:
        super().__init__(copy.deepcopy(encoder))
        self.scale = scale
        self.register_buffer("center", torch.zeros(dim))
        self.register_buffer("means", normalize(torch.randn(classes, dim)))

    def logits(self, embeddings: Tensor) -> Tensor:
        """Cosines with the classes' directions, scaled."""
        return self.scale * (normalize(embeddings - self.center) @ self.means.T)

    @torch.no_grad()
    def fit(self, labelled: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Takes the means of images and labels ``(batch,)``, parts that together with other workers' are the whole."""
        sums, counts = torch.zeros_like(self.means), torch.zeros_like(self.means[:, 0])
        for images, labels in labelled:
            sums.index_add_(0, labels, self.encoder(images).to(sums.dtype))
            counts.index_add_(0, labels, torch.ones_like(labels, dtype=counts.dtype))
        sums, counts = all_reduce_sum(sums), all_reduce_sum(counts)
        self.center.copy_(sums.sum(dim=0) / counts.sum().clamp_min(1))
        # A class without images keeps no direction: nothing is nearest to it.
        means = sums / counts.clamp_min(1)[:, None]
        self.means.copy_(normalize(means - self.center) * (counts > 0)[:, None])


def check_teacher(run: str, key: str) -> dict[str, Any]:
    """How the encoder of a finished run with a linear class head is built.

    Args:
        run: its id.
        key: of the job, for messages.

    Raises:
        UserError: there is no such run, it left no model, or its head is not linear.
    """
    folder = _model_folder(run)
    if not folder.parent.is_dir():
        known = sorted(path.name for path in runs_dir().glob("*"))[-20:]
        raise unknown_name("run", run, known, key=key)
    if not all((folder / name).is_file() for name in (DESCRIPTION, WEIGHTS, HEAD)):
        raise UserError(f"run {run} left no classifier", key=key, allowed="a finished run of the objective softmax")
    description: dict[str, Any] = json.loads((folder / DESCRIPTION).read_text())
    if description["objective"] != "softmax":
        raise UserError(
            f"run {run} was trained with {description['objective']}, whose rows are no linear classifier",
            key=key,
            allowed="a finished run of the objective softmax",
        )
    return description


def load_teacher(run: str, classes: int, key: str) -> LinearClassifier:
    """The classifier that a finished run left behind.

    Args:
        run: its id.
        classes: how many it must know.
        key: of the job, for messages.

    Raises:
        UserError: see :func:`check_teacher`; or it knows another number of classes.
    """
    from safetensors.torch import load_file

    description, folder = check_teacher(run, key), _model_folder(run)
    height, width = description["image_size"]
    encoder = convert_batch_norm(
        build_encoder(
            BackboneSpec(**description["backbone"]), in_channels=description["in_channels"], image_size=(height, width)
        )
    )
    encoder.load_state_dict(load_file(folder / WEIGHTS))
    rows = {name.rpartition(".")[2]: value for name, value in load_file(folder / HEAD).items()}
    weight = rows["weight"]
    if len(weight) != classes:
        raise UserError(f"run {run} knows {len(weight)} classes, the data has {classes}", key=key)
    return LinearClassifier(encoder, weight, rows.get("bias", torch.zeros(len(weight))))


def _model_folder(run: str) -> Path:
    return runs_dir() / run / "model"
