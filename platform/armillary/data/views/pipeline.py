"""View recipes: random augmentation of whole batches, every parameter drawn per sample.

A view is a pure function of (seed, epoch, sample index, view number) through :mod:`armillary.components.counter`: the
same whatever else is in the batch, on any worker and after a resume.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from armillary.components.counter import key, mix
from armillary.data.views import blur, colour, geometry, occlusion, patches
from armillary.data.views.recipes import GROUPS, Recipe, read

_VIEW = 11
_NOISE_KEY = "noise_key"
# Values (of all channels) that are worked on at a time on a CPU: measured, the fewest that hide the cost of a call.
_CACHED = 1 << 19


@dataclass(frozen=True)
class View:
    """One view of every sample of a batch.

    Attributes:
        pixels: float32 ``(B, C, h, w)`` in [0, 1].
        parameters: what was drawn, first dimension B. Always ``box (B, 4)``, ``flip (B,)``, ``rotation (B,)`` (degrees;
            see :func:`geometry.draw`), ``jitter``, ``brightness``, ``contrast``, ``saturation``, ``hue``, ``order``,
            ``gray``, ``solarize`` (:func:`colour.draw`) and ``blur_sigma``. From recipes that use them, for all views:
            ``rotation_class (B,)`` int64 (quarter turns), ``permutation (B,)`` int64, ``low_res_factor (B,)``,
            ``mask_region (B, 1, h, w)`` bool, ``cutout (B, 4)``.
    """

    pixels: Tensor
    parameters: dict[str, Tensor]


def make_views(recipe: str, options: dict[str, Any]) -> Views:
    """The named recipe with some of its parameters changed; see :func:`armillary.data.views.recipes.read`.

    Raises:
        UserError: no such recipe or parameter (the nearest is shown), or a value out of its range.
    """
    recipes, count = read(recipe, options)
    return Views(recipes, recipe, count)


class Views:
    """A recipe ready to be applied.

    Args:
        recipes: one a view; the last serves all further views.
        name: of the recipe.
        count: how many views the recipe makes, where it fixes that.
    """

    def __init__(self, recipes: Recipe | tuple[Recipe, ...], name: str, count: int | None = None) -> None:
        self.recipes = (recipes,) if isinstance(recipes, Recipe) else recipes
        self.name, self.count = name, count

    def recipe(self, view: int) -> Recipe:
        """The recipe of a view."""
        return self.recipes[min(view, len(self.recipes) - 1)]

    def describe(self) -> dict[str, Any]:
        """The parameters as plain values, for the record of a run; a list holds one value a view."""
        listed = [asdict(recipe) for recipe in self.recipes]
        same = {name: value for name, value in listed[0].items() if all(item[name] == value for item in listed)}
        varied = {name: [item[name] for item in listed] for name in listed[0] if name not in same}
        return {"name": self.name, **same, **varied}

    def __call__(self, images: Tensor, index: Tensor, *, seed: int, epoch: int, view: int) -> View:
        """One view of every image.

        Args:
            images: uint8 ``(B, C, H, W)``, B at least 1, C 1 or 3; for ``frames``, frame ``view`` of every sequence.
            index: ``(B,)`` int64 positions in the dataset, on the same device.
            seed: the run's seed.
            epoch: counted from 0.
            view: which of the objective's views, from 0.

        Returns:
            The view on the images' device; the same size as the images where the recipe sets none.
        """
        recipe, (_, channels, height, width) = self.recipe(view), images.shape
        drawn = self.draw(index, seed=seed, epoch=epoch, view=view)
        if recipe.turns != "none":
            drawn["box"] = geometry.central_square(drawn["box"], height, width)
        # Sorted, samples whose hue is turned at the same time lie side by side and need not be gathered.
        stage = colour.stages(drawn, recipe, channels)
        order = stage.argsort(stable=True)
        ordered = {name: value[order] for name, value in drawn.items()}
        values = channels * max(height * width, math.prod(geometry.output_size(recipe, height, width)))
        step = max(1, _CACHED // values) if images.device.type == "cpu" else len(images)
        made: dict[str, Tensor] = {}
        # Views are no part of what is differentiated, nor of what an autocast around them may round.
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            for start in range(0, len(images), step):
                rows = order[start : start + step]
                part = {name: value[start : start + step] for name, value in ordered.items()}
                for name, value in self._part(images.index_select(0, rows), stage[rows], part, recipe).items():
                    whole = made.setdefault(name, value.new_empty(len(images), *value.shape[1:]))
                    whole.index_copy_(0, rows, value)
        return View(made.pop("pixels"), self._public(drawn) | made)

    def _part(self, images: Tensor, stage: Tensor, drawn: dict[str, Tensor], recipe: Recipe) -> dict[str, Tensor]:
        """``pixels`` of some images, sorted by the stage of their hue, and ``mask_region`` where there are masks."""
        pixels = geometry.sample(images, drawn, recipe)
        if recipe.turns != "none":
            pixels = geometry.turned(pixels, drawn["rotation_class"])
        counts = torch.bincount(stage, minlength=len(colour.linear_operations(recipe, images.shape[1])) + 2)
        pixels = _degrade(colour.jitter(pixels, drawn, recipe, counts.tolist()), drawn, recipe)
        made = {"pixels": pixels}
        if self._any("face_mask"):
            made["mask_region"] = _occlude(pixels, drawn, recipe, images.shape[2], images.shape[3])
        if recipe.tiles:
            made = {name: patches.puzzle(value, drawn, recipe) for name, value in made.items()}
        return made

    def draw(self, index: Tensor, *, seed: int, epoch: int, view: int) -> dict[str, Tensor]:
        """Everything that is random about a view, first dimension ``len(index)``; arguments as for a call."""
        recipe = self.recipe(view)
        bases = [
            key(_VIEW, seed, epoch, 0 if group in recipe.share else view, number) for number, group in enumerate(GROUPS)
        ]
        # All groups at once: sample_keys(base, index), column by column.
        columns = mix(mix(index)[:, None] ^ torch.tensor(bases, device=index.device)).unbind(1)
        keys = dict(zip(GROUPS, columns, strict=True))
        drawn = {
            **geometry.draw(recipe, keys["geometry"]),
            **colour.draw(recipe, keys["colour"]),
            **blur.draw_blur(recipe, keys["blur"]),
            _NOISE_KEY: keys["noise"],
        }
        if self._any("turns"):
            drawn |= geometry.draw_turn(recipe, keys["turn"], view)
        if self._any("low_res"):
            drawn |= blur.draw_resolution(recipe, keys["resolution"])
        if self._any("cutout") or self._any("face_mask"):
            drawn |= occlusion.draw(recipe, keys["occlusion"])
        if recipe.tiles:
            drawn |= patches.draw(recipe, keys["tiles"])
        return drawn

    def _any(self, parameter: str) -> bool:
        """Whether any view uses a parameter that is off by default: then all views report what they drew."""
        return any(getattr(recipe, parameter) != getattr(Recipe, parameter) for recipe in self.recipes)

    def _public(self, drawn: dict[str, Tensor]) -> dict[str, Tensor]:
        hidden = {_NOISE_KEY, "tile_offset", "mask_shape", "mask_colour", "face_mask"}
        hidden |= set() if self._any("cutout") else {"cutout"}
        return {name: value for name, value in drawn.items() if name not in hidden}


def _degrade(pixels: Tensor, drawn: dict[str, Tensor], recipe: Recipe) -> Tensor:
    """Gray, blur, solarization, low resolution, noise, a cut-out rectangle: each where it was drawn."""
    if recipe.gray_p:
        colour.gray(pixels, _chosen(drawn["gray"]))
    if recipe.blur:
        rows = _chosen(drawn["blur_sigma"])
        if len(rows) == len(pixels):
            pixels = blur.gaussian_blur(pixels, drawn["blur_sigma"])
        elif len(rows):
            blurred = blur.gaussian_blur(pixels.index_select(0, rows), drawn["blur_sigma"][rows])
            pixels.index_copy_(0, rows, blurred)
    if recipe.solarize:
        colour.solarize(pixels, _chosen(drawn["solarize"]), recipe.solarize_threshold)
    if recipe.low_res[1] > 1:
        pixels = blur.low_resolution(pixels, drawn["low_res_factor"], drawn[_NOISE_KEY], recipe.low_res_noise)
    if recipe.noise:
        added = colour.noise(drawn[_NOISE_KEY], pixels[0].numel()).view(pixels.shape)
        pixels = pixels.add_(added, alpha=recipe.noise)
    if recipe.cutout:
        occlusion.cut_out(pixels, drawn["cutout"])
    # Sums of weights may also round to a little above 1.
    return pixels.clamp_(0, 1)


def _occlude(pixels: Tensor, drawn: dict[str, Tensor], recipe: Recipe, height: int, width: int) -> Tensor:
    """Draws the face masks, last of all, so that their region says exactly what they hide; returns the region."""
    coordinates = geometry.grid(geometry.affine(drawn, height, width), *pixels.shape[2:])
    if recipe.turns != "none":
        coordinates = geometry.turned(coordinates.permute(0, 3, 1, 2), drawn["rotation_class"]).permute(0, 2, 3, 1)
    region = occlusion.mask_region(drawn["mask_shape"], coordinates) & (drawn["face_mask"] > 0)[:, None, None, None]
    occlusion.draw_mask(pixels, region, drawn["mask_colour"], coordinates)
    return region


def _chosen(switch: Tensor) -> Tensor:
    return switch.nonzero()[:, 0]
