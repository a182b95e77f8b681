"""What a vision transformer attends to, against the truth: the study dino_attention.

Caron et al., "Emerging Properties in Self-Supervised Vision Transformers", ICCV 2021, section 4.2.2: of each head of
the last layer, the fewest patches that hold 60% of the class token's attention are a mask; the best head's overlap with
the object is averaged over images,

    J = |M and G| / |M or G|.

The paper takes PASCAL VOC's objects; here the images are procedural people whom no training has seen, and G is where
the person is. Two numbers say what J means: that of the same network before training, and that of a mask of all
patches, which is the share of an image that the person fills.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from armillary.components.attention import attention_pictures, class_attention, heaviest_patches, jaccard
from armillary.components.backbones import build_encoder
from armillary.components.transformers import TransformerEncoder
from armillary.data.identities import IdentitiesSpec, render_with_outlines
from armillary.data.identities.spec import MAX_SIZE, MIN_SIZE
from armillary.evaluation.grids import save_grid
from armillary.spec.errors import UserError
from armillary.spec.jobs import BackboneSpec
from armillary.training.model import describe, load_encoder
from armillary.training.rundir import RunDirectory

_SHOWN = 8
# Seeds of people that no dataset has unless somebody asks for just these.
_UNSEEN = 2**40


class AttentionOptions(BaseModel):
    """Which people are looked at, and how much of the attention makes a mask."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    images: int = Field(200, ge=2, le=100_000, description="people, one image each")
    mass: float = Field(0.6, gt=0, le=1, description="share of the attention that the kept patches hold")
    difficulty: float = Field(0.5, ge=0, le=1, description="of the generated images")
    seed: int = Field(0, ge=0, lt=2**31, description="of people and scenes, and of the untrained network")


@dataclass(frozen=True)
class AttentionReport:
    """The best head's overlap with the person, one value an image ``(images,)``, and the picture that was kept."""

    run_id: str
    trained: Tensor
    untrained: Tensor
    whole_image: Tensor
    file: Path

    def summary(self) -> dict[str, Any]:
        """Means over the images, as plain values."""
        means = {name: float(getattr(self, name).mean()) for name in ("trained", "untrained", "whole_image")}
        return {"run": self.run_id, **means, "files": [str(self.file)]}


def judge_attention(run_id: str, options: AttentionOptions | None = None) -> AttentionReport:
    """Compares where a finished run's transformer looks with where the person is.

    Writes ``evaluation/attention.png`` into the run's folder: an image a row, each head's attention over it, what the
    mean of the heads keeps.

    Raises:
        UserError: no such run, a network without patch tokens, or images that the generator does not make.
    """
    options = options or AttentionOptions()
    run = RunDirectory.find(run_id)
    description, encoder = describe(run), load_encoder(run)
    if not isinstance(encoder, TransformerEncoder):
        raise UserError(
            f"the backbone {description['backbone']['name']} has no class token that attends to patches",
            where=f"run {run.run_id}",
            allowed="a run with backbone.name=small_vit, or a vision transformer of timm",
        )
    height, width = description["image_size"]
    if height != width or not MIN_SIZE <= height <= MAX_SIZE or description["in_channels"] not in (1, 3):
        raise UserError(
            f"images of {height} x {width} pixels and {description['in_channels']} channels",
            where=f"run {run.run_id}",
            allowed=f"squares of {MIN_SIZE} to {MAX_SIZE} pixels, 1 or 3 channels: those that people are painted in",
        )
    images, people = _people(options, height, description["in_channels"])
    with torch.random.fork_rng():
        torch.manual_seed(options.seed)
        start = build_encoder(
            BackboneSpec(**description["backbone"]), in_channels=images.shape[1], image_size=(height, width)
        ).eval()
    assert isinstance(start, TransformerEncoder)
    path = run.path / "evaluation" / "attention.png"
    save_grid(attention_pictures(encoder, images[:_SHOWN], options.mass), path)
    return AttentionReport(
        run.run_id,
        trained=overlap(encoder, images, people, options.mass),
        untrained=overlap(start, images, people, options.mass),
        whole_image=people.float().mean(dim=(1, 2)),
        file=path,
    )


def overlap(encoder: TransformerEncoder, images: Tensor, truth: Tensor, mass: float, batch_size: int = 256) -> Tensor:
    """The best head's Jaccard index with the object, one value an image ``(n,)``.

    Args:
        encoder: a transformer, in evaluation mode.
        images: ``(n, channels, height, width)`` in [0, 1].
        truth: bool ``(n, height, width)``, where the object is.
        mass: see :func:`heaviest_patches`.
        batch_size: images at a time.
    """
    values = []
    for some, objects in zip(images.split(batch_size), truth.split(batch_size), strict=True):
        kept = heaviest_patches(class_attention(encoder, some), mass)
        rows, columns = objects.shape[1] // kept.shape[2], objects.shape[2] // kept.shape[3]
        values.append(jaccard(kept.repeat_interleave(rows, 2).repeat_interleave(columns, 3), objects))
    return torch.cat(values)


def _people(options: AttentionOptions, size: int, channels: int) -> tuple[Tensor, Tensor]:
    spec = IdentitiesSpec(
        seed=_UNSEEN + options.seed,
        size=size,
        channels=channels,
        difficulty=options.difficulty,
    )
    images, outlines = render_with_outlines(spec, options.images)
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255.0, torch.from_numpy(outlines)
