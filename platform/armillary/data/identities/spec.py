"""What is asked of the generator."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

MIN_SIZE, MAX_SIZE = 32, 112


class NoiseSpec(BaseModel):
    """Wrong labels, as shares of all images; the rest is clean.

    ``flip``: the image carries the label of another person of the set. ``outlier``: the image shows a person outside
    the set. ``split``: the image carries a second label of its own person, so that one person makes two classes.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    flip: float = Field(0.0, ge=0, le=0.9, description="share of images with another person's label")
    outlier: float = Field(0.0, ge=0, le=0.9, description="share of images of people outside the label set")
    split: float = Field(0.0, ge=0, le=0.4, description="share of images under a second label of their person")

    @model_validator(mode="after")
    def _some_clean(self) -> NoiseSpec:
        if self.flip + self.outlier + self.split > 0.9:
            raise ValueError("flip, outlier and split together may not exceed 0.9")
        return self


class IdentitiesSpec(BaseModel):
    """A data set of procedural faces. Two equal specifications make the same bytes.

    ``difficulty`` moves people closer together and pushes pose, light, expression and degradations further: 0 is a
    studio, 1 a surveillance camera. ``long_tail`` g gives class c ``images_per_identity * (c + 1)^-g`` images, rounded,
    two at least. ``sequence_length`` frames in a row, of one person, make a video; ``sets`` images in a row an image
    set; 0 for neither.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    seed: int = Field(0, ge=0, lt=2**62)
    identities: int = Field(200, ge=2, le=1_000_000)
    images_per_identity: int = Field(20, ge=1, le=10_000)
    size: int = Field(64, ge=MIN_SIZE, le=MAX_SIZE, description="pixels a side")
    channels: Literal[1, 3] = 3
    difficulty: float = Field(0.5, ge=0, le=1)
    mask_share: float = Field(0.08, ge=0, le=1, description="share of images (of sequences) with a face mask")
    glasses: float = Field(0.25, ge=0, le=1, description="share of people who usually wear glasses")
    low_res_share: float = Field(0.2, ge=0, le=1, description="share of images (of sequences) of low resolution")
    sequence_length: int = Field(0, ge=0, le=10_000)
    sets: int = Field(0, ge=0, le=10_000, description="images a set")
    noise: NoiseSpec = NoiseSpec()
    long_tail: float = Field(0.0, ge=0, le=3)
    graph: bool = Field(False, description="write the table `graph`: who looks like whom")
    neighbours: int = Field(5, ge=1, le=100, description="edges the graph draws from each person to the most similar")
