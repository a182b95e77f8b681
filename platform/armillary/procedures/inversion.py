"""Pictures out of a recognition network: inversion by batch-norm statistics (catalog: arcface_model_inversion).

Deng, Guo, Yang, Xue, Kotsia, Zafeiriou, "ArcFace", IEEE TPAMI 2022, section 3.3, with the terms of DeepInversion (Yin
et al., "Dreaming to Distill", CVPR 2020)::

    min_I  L_id(I, y) + w_bn R_bn(I) + w_tv TV(I) + w_2 |I|_2
    R_bn = sum_l  |mu_l(I) - mu_l|_2 + |var_l(I) - var_l|_2

over a batch of pictures I, with the mean and the biased variance of the input of every batch norm l and what it stored
while training. As in DeepInversion's code norms are not squared, and the first layer weighs more. No image of the
training set is looked at.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from armillary.components.modes import evaluating
from armillary.evaluation.extract import extract
from armillary.evaluation.grids import save_grid
from armillary.losses.tensors import normalize
from armillary.procedures.trained import TrainedRun, load_trained
from armillary.spec.errors import UserError

# Pictures are optimised around mean 0 and variance about 1, as the networks see them.
_MEAN, _STD = 0.5, 0.25
_SHOWN = 8
_MAP_DIMS = 4


class InversionOptions(BaseModel):
    """How pictures are drawn. Small pictures need more smoothing than DeepInversion's of 224 pixels."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    steps: int = Field(500, ge=1, le=100_000, description="Adam steps; the paper's magnitude is 2,000")
    lr: float = Field(0.25, gt=0, le=10, description="Adam step size; falls to 0 along a cosine")
    bn: float = Field(0.1, ge=0, le=100, description="w_bn, weight of the statistics; DeepInversion 0.01")
    first_bn: float = Field(10.0, ge=0, le=100, description="further factor on the first batch norm")
    tv: float = Field(0.01, ge=0, le=10, description="w_tv, weight of the total variation; DeepInversion 1e-4")
    l2: float = Field(1e-5, ge=0, le=10, description="w_2, weight of the pictures' length")
    batch: int = Field(16, ge=2, le=1024, description="pictures drawn together, whose statistics are matched")
    jitter: int = Field(3, ge=0, le=64, description="largest shift in pixels")
    scale: float = Field(16.0, gt=0, le=1000, description="of the cosines in the identity loss")
    seed: int = Field(0, ge=0, lt=2**31, description="of the noise it starts from, shifts and mirrorings")


@dataclass(frozen=True)
class Inversion:
    """What came out.

    ``pictures (batch, C, H, W)`` in [0, 1]; ``cosine``: their mean cosine to the class's center; ``recognised``: the
    share that is nearest to it; ``statistics``: R_bn at the end; ``likeness``: the share of other training people whose
    mean picture is less like the mean of the drawn ones (by correlation) than this person's: 0.5 is chance, 1 best.
    """

    identity: int
    name: str
    pictures: Tensor
    cosine: float
    recognised: float
    statistics: float
    likeness: float
    files: tuple[Path, ...] = ()

    def summary(self) -> dict[str, Any]:
        """Everything but the pictures, as plain values."""
        plain = {key: value for key, value in vars(self).items() if key not in ("pictures", "files")}
        return {**plain, "files": [str(path) for path in self.files]}


def statistics_distance(inputs: Tensor, mean: Tensor, variance: Tensor, *, squared: bool = False) -> Tensor:
    """``|mu(I) - mean| + |var(I) - variance|``, or the sum of their squares.

    Args:
        inputs: of a batch norm, ``(batch, channels, ...)``.
        mean: stored, ``(channels,)``.
        variance: stored, ``(channels,)``.
        squared: the squares in place of the norms.
    """
    channels = inputs.transpose(0, 1).flatten(1)
    gaps = channels.mean(dim=1) - mean, channels.var(dim=1, unbiased=False) - variance
    return torch.stack([gap.square().sum() if squared else torch.linalg.vector_norm(gap) for gap in gaps]).sum()


def total_variation(images: Tensor) -> Tensor:
    """The 2-norms of the differences of ``(batch, C, H, W)`` to the right, down and along both diagonals, added up."""
    differences = (
        images[..., :, 1:] - images[..., :, :-1],
        images[..., 1:, :] - images[..., :-1, :],
        images[..., 1:, 1:] - images[..., :-1, :-1],
        images[..., 1:, :-1] - images[..., :-1, 1:],
    )
    return torch.stack([torch.linalg.vector_norm(difference) for difference in differences]).sum()


@contextmanager
def watched_statistics(encoder: nn.Module, first_weight: float) -> Iterator[list[Tensor]]:
    """A list that holds, after each forward pass, the weighted terms of R_bn, one for every batch norm on maps."""
    terms: list[Tensor] = []

    def watch(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        if arguments[0].ndim == _MAP_DIMS and isinstance(module, _BatchNorm) and module.running_mean is not None:
            assert module.running_var is not None
            weight = 1.0 if terms else first_weight
            terms.append(weight * statistics_distance(arguments[0], module.running_mean, module.running_var))

    handles = [
        module.register_forward_pre_hook(watch) for module in encoder.modules() if isinstance(module, _BatchNorm)
    ]
    try:
        yield terms
    finally:
        for handle in handles:
            handle.remove()


def invert(
    encoder: nn.Module,
    identity_loss: Callable[[Tensor], Tensor],
    shape: tuple[int, int, int],
    options: InversionOptions,
    on_step: Callable[[int], None] | None = None,
) -> tuple[Tensor, float]:
    """Draws pictures that the network takes for an identity; its parameters and buffers stay as they are.

    Args:
        encoder: maps ``(batch, C, H, W)`` in [0, 1] to embeddings.
        identity_loss: L_id, from embeddings ``(batch, dim)`` to a scalar.
        shape: channels, height and width.
        options: weights and steps.
        on_step: called with the number of every finished step.

    Returns:
        Pictures ``(options.batch, C, H, W)`` in [0, 1], and the last R_bn.
    """
    draw = torch.Generator().manual_seed(options.seed)
    values = torch.randn(options.batch, *shape, generator=draw).requires_grad_()
    optimizer = torch.optim.Adam([values], lr=options.lr, betas=(0.5, 0.9))
    low, high = -_MEAN / _STD, (1 - _MEAN) / _STD
    statistics = 0.0
    frozen = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
    with evaluating(encoder), watched_statistics(encoder, options.first_bn) as terms, _without_gradient(frozen):
        for step in range(options.steps):
            optimizer.param_groups[0]["lr"] = options.lr * (1 + math.cos(math.pi * step / options.steps)) / 2
            terms.clear()
            shift = torch.randint(-options.jitter, options.jitter + 1, (2,), generator=draw).tolist()
            seen = values.roll(shift, dims=(2, 3))
            if bool(torch.rand((), generator=draw) < 0.5):
                seen = seen.flip(3)
            embeddings = encoder(seen * _STD + _MEAN)
            matched = torch.stack(terms).sum() if terms else embeddings.new_zeros(())
            loss = identity_loss(embeddings) + options.bn * matched
            loss = loss + options.tv * total_variation(seen) + options.l2 * torch.linalg.vector_norm(seen)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                values.clamp_(low, high)
            statistics = float(matched.detach())
            if on_step is not None:
                on_step(step + 1)
    return (values.detach() * _STD + _MEAN).clamp(0, 1), statistics


@contextmanager
def _without_gradient(parameters: list[nn.Parameter]) -> Iterator[None]:
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def invert_run(
    run_id: str,
    identity: str,
    options: InversionOptions | None = None,
    on_step: Callable[[int], None] | None = None,
) -> Inversion:
    """Inverts a finished run's network for one of the people it was trained on.

    Writes ``evaluation/inversion-<class>.png`` into the run's folder: some of the person's training images above, drawn
    pictures below.

    Args:
        run_id: a run of an objective with a class head, whose encoder has batch norm.
        identity: the dataset's number of the class, or its name.
        options: how to draw.
        on_step: called with the number of every finished step.

    Raises:
        UserError: no such run, head or identity, or a network without batch norm.
    """
    options = options or InversionOptions()
    trained = load_trained(run_id)
    target = trained.training_class(identity)
    if not any(isinstance(module, _BatchNorm) for module in trained.encoder.modules()):
        raise UserError(
            f"the backbone {trained.job.backbone.name} has no batch norm, whose statistics the pictures must match",
            where=f"run {trained.run.run_id}",
            allowed="a run of small_convnet, or of a convolutional network of timm",
        )
    centers = normalize(trained.class_centers())

    def identity_loss(embeddings: Tensor) -> Tensor:
        labels = torch.full((len(embeddings),), target)
        return F.cross_entropy(options.scale * _cosines(embeddings, centers), labels)

    _, channels, height, width = trained.data.train.images.shape
    pictures, statistics = invert(trained.encoder, identity_loss, (channels, height, width), options, on_step)
    cosines = _cosines(extract(trained.encoder, (255 * pictures).round().to(torch.uint8)), centers)
    number = trained.class_number(target)
    path = trained.run.path / "evaluation" / f"inversion-{number}.png"
    own = (trained.data.train.label == target).nonzero().flatten()[:_SHOWN]
    real = trained.data.train.images[own].float() / 255.0
    columns = min(len(real), len(pictures), _SHOWN)
    save_grid(torch.stack([real[:columns], pictures[:columns]]), path)
    return Inversion(
        identity=number,
        name=trained.dataset.manifest.class_names[number],
        pictures=pictures,
        cosine=float(cosines[:, target].mean()),
        recognised=float((cosines.argmax(dim=1) == target).float().mean()),
        statistics=statistics,
        likeness=_likeness(trained, pictures, target),
        files=(path,),
    )


def _cosines(embeddings: Tensor, centers: Tensor) -> Tensor:
    """To the nearest center of every class, ``(batch, C)``; ``centers (C, K, dim)`` of unit length."""
    return torch.einsum("nd,ckd->nck", normalize(embeddings), centers).amax(dim=2)


def _likeness(trained: TrainedRun, pictures: Tensor, target: int) -> float:
    train = trained.data.train
    sums = torch.zeros(trained.data.num_classes, pictures[0].numel())
    for rows in torch.arange(len(train)).split(1024):
        sums.index_add_(0, train.label[rows], train.images[rows].flatten(1).float())
    means = sums / torch.bincount(train.label, minlength=len(sums))[:, None]
    # What all people have in common says nothing about one of them.
    common = means.mean(dim=0)
    correlation = normalize(means - common) @ normalize(255 * pictures.mean(dim=0).flatten() - common)
    others = torch.cat([correlation[:target], correlation[target + 1 :]])
    return float((others < correlation[target]).float().mean())
