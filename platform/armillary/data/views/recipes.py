"""View recipes by name, the parameters they consist of, and how a job changes them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from armillary.spec.errors import UserError, nearest, unknown_name

# What the parameters of one view may be drawn together with: see Recipe.share.
GROUPS = ("geometry", "turn", "colour", "blur", "resolution", "noise", "occlusion", "tiles")


@dataclass(frozen=True)
class Recipe:
    """The parameters of one view, in the order in which they act. A parameter at its default does nothing.

    Probabilities are marked p; ranges ``(low, high)`` and strengths are drawn uniformly for every sample.

    Attributes:
        flip: p of a horizontal mirror image.
        rotation: +-degrees; what lies beyond the edge continues the border pixels.
        zoom: +-share of the scale.
        shift: +-share of the side.
        crop_scale: share of the image's area that a random resized crop keeps.
        crop_ratio: the crop's width over height, relative to the image's own (log-uniform).
        size: height of the view in pixels, or up to 1 as a share of the image's; its width is in proportion.
        interpolation: ``bilinear`` or ``bicubic``; images that are rotated are sampled bilinearly.
        turns: ``random`` turns the central square by 0 to 3 quarters of a circle, ``by_view`` by the view's number.
        jitter_p: p of the colour jitter that the next four describe.
        brightness: factor in ``[1 - x, 1 + x]``.
        contrast: factor in ``[1 - x, 1 + x]``.
        saturation: factor in ``[1 - x, 1 + x]``.
        hue: +-share of the colour circle.
        gray_p: p of gray.
        blur: p of a Gaussian blur.
        blur_sigma: its standard deviation in pixels.
        solarize: p of inverting what is as bright as ``solarize_threshold``.
        solarize_threshold: a brightness in [0, 1].
        low_res: the factor by which the image is made smaller, then brought back to its size (log-uniform).
        low_res_noise: standard deviation of the noise of the small image; images are in [0, 1].
        noise: standard deviation of uniform noise on every value.
        cutout: p of a gray rectangle.
        cutout_scale: its share of the area.
        face_mask: p of a face mask over the lower half of the face, which is taken to fill the image.
        tiles: tiles a side of a jigsaw puzzle; 0 makes none.
        tile_ratio: side of a tile over that of its cell; tiles are cut at random places of their cells.
        permutations: how many orders of tiles there are.
        share: groups of parameters that all views of a sample have in common, those of view 0 (:data:`GROUPS`).
    """

    flip: float = 0.0
    rotation: float = 0.0
    zoom: float = 0.0
    shift: float = 0.0
    crop_scale: tuple[float, float] = (1.0, 1.0)
    crop_ratio: tuple[float, float] = (1.0, 1.0)
    size: float = 1.0
    interpolation: str = "bilinear"
    turns: str = "none"
    jitter_p: float = 1.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    gray_p: float = 0.0
    blur: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarize: float = 0.0
    solarize_threshold: float = 0.5
    low_res: tuple[float, float] = (1.0, 1.0)
    low_res_noise: float = 0.0
    noise: float = 0.0
    cutout: float = 0.0
    cutout_scale: tuple[float, float] = (0.02, 0.33)
    face_mask: float = 0.0
    tiles: int = 0
    tile_ratio: float = 0.85
    permutations: int = 1000
    share: tuple[str, ...] = ()


# Legal bounds, inclusive; (low, high) of a pair bounds both. Words are chosen from a tuple.
_NUMBERS: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("flip", "jitter_p", "gray_p", "blur", "solarize", "cutout", "face_mask"), (0, 1)),
    **dict.fromkeys(("brightness", "contrast", "saturation", "solarize_threshold", "noise", "low_res_noise"), (0, 1)),
    "rotation": (0, 180),
    "zoom": (0, 0.9),
    "shift": (0, 1),
    "hue": (0, 0.5),
    "tile_ratio": (0.3, 1),
}
_INTEGERS = {"tiles": (0, 4), "permutations": (2, 10_000)}
_PAIRS: dict[str, tuple[float, float]] = {
    "crop_scale": (0.01, 1),
    "crop_ratio": (0.1, 10),
    "blur_sigma": (0.01, 20),
    "low_res": (1, 64),
    "cutout_scale": (0.001, 1),
}
_WORDS = {"interpolation": ("bilinear", "bicubic"), "turns": ("none", "random", "by_view")}

_RESIZED_CROP = Recipe(flip=0.5, crop_ratio=(3 / 4, 4 / 3))
_SIMCLR = replace(
    _RESIZED_CROP,
    crop_scale=(0.2, 1.0),
    jitter_p=0.8,
    brightness=0.4,
    contrast=0.4,
    saturation=0.4,
    hue=0.1,
    gray_p=0.2,
)
_MOCO_V1 = replace(_SIMCLR, jitter_p=1.0, hue=0.4)
# BYOL's jitter, which MoCo v3, DINO and most since have taken over.
_BYOL = replace(_SIMCLR, crop_scale=(0.08, 1.0), saturation=0.2, interpolation="bicubic")
_GLOBAL = replace(_BYOL, crop_scale=(0.4, 1.0))
_FACES = Recipe(flip=0.5, rotation=8, zoom=0.08, shift=0.05, brightness=0.2, contrast=0.2, noise=0.02)
_JIGSAW = replace(_RESIZED_CROP, crop_scale=(0.6, 1.0), gray_p=0.3, tiles=3)
_ALL_BUT_OCCLUSION = tuple(group for group in GROUPS if group != "occlusion")
_LOOC = replace(_SIMCLR, turns="random", blur=0.5)

# One recipe a view; the last serves all further views.
RECIPES: dict[str, tuple[Recipe, ...]] = {
    "none": (Recipe(),),
    "faces": (_FACES,),
    "digits": (Recipe(rotation=10, zoom=0.1, shift=0.1, brightness=0.1, contrast=0.1),),
    # SimCLR (Chen et al. 2020): its small-image settings (strength 0.5, no blur), and those for ImageNet.
    "simclr": (_SIMCLR,),
    "simclr_imagenet": (
        replace(_SIMCLR, crop_scale=(0.08, 1.0), brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2, blur=0.5),
    ),
    # Mirrored characters mean something else, and small crops lose the character.
    "simclr_digits": (
        Recipe(crop_scale=(0.4, 1.0), crop_ratio=(3 / 4, 4 / 3), jitter_p=0.8, brightness=0.4, contrast=0.4),
    ),
    # MoCo v1 is InstDisc's recipe (He et al. 2020); v2 adds the blur (Chen et al. 2020).
    "moco_v1": (_MOCO_V1,),
    "moco_v2": (replace(_SIMCLR, blur=0.5),),
    # Grill et al. 2020, table 6: the first view is always blurred, the second solarized now and then.
    "byol": (replace(_BYOL, blur=1.0), replace(_BYOL, blur=0.1, solarize=0.2)),
    # Catalog: multi_crop. DINO (Caron et al. 2021): two large crops, treated as by BYOL, and small ones (96 px to 224).
    "multicrop": (
        replace(_GLOBAL, blur=1.0),
        replace(_GLOBAL, blur=0.1, solarize=0.2),
        replace(_GLOBAL, crop_scale=(0.05, 0.4), size=3 / 7, blur=0.5),
    ),
    # The same for images of 28 to 64 pixels: nothing to blur, and small crops are not that small.
    "multicrop_small": (
        replace(_GLOBAL, crop_scale=(0.3, 1.0)),
        replace(_GLOBAL, crop_scale=(0.3, 1.0), solarize=0.2),
        replace(_GLOBAL, crop_scale=(0.1, 0.4), size=0.5),
    ),
    # Masked autoencoders (He et al. 2022) need no colours.
    "mae": (replace(_RESIZED_CROP, crop_scale=(0.2, 1.0), interpolation="bicubic"),),
    # Gidaris et al. 2018: one turn drawn for each image, or view v turned v times, all of the same picture.
    "rotation": (Recipe(flip=0.5, turns="random"),),
    "rotation_all": (Recipe(flip=0.5, turns="by_view", share=("geometry", "colour")),),
    # Noroozi and Favaro 2016; PIRL (Misra and van der Maaten 2020) sets an image against its puzzle.
    "jigsaw": (_JIGSAW,),
    "pirl": (_MOCO_V1, replace(_JIGSAW, jitter_p=1.0, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.4)),
    # Leave-one-out contrastive learning (Xiao et al. 2021): the query, a key that shares nothing with it, one that is
    # turned as it is, one that has its colours.
    "looc": (_LOOC, _LOOC, replace(_LOOC, share=("turn",)), replace(_LOOC, share=("colour",))),
    "low_res_pair": (
        replace(_FACES, noise=0.0, share=("geometry", "turn", "colour")),
        replace(_FACES, noise=0.0, low_res=(2.0, 8.0), low_res_noise=0.01, share=("geometry", "turn", "colour")),
    ),
    "masked_face": (
        replace(_FACES, share=_ALL_BUT_OCCLUSION),
        replace(_FACES, face_mask=1.0, share=_ALL_BUT_OCCLUSION),
    ),
    # View v is frame v of a sequence: a camera moves over all frames alike, but its noise is new in each.
    "frames": (replace(_FACES, share=("geometry", "colour", "occlusion")),),
}

# Names that only multi-crop recipes have: parameter, and the views that it belongs to.
_GLOBAL_VIEWS, _LOCAL_VIEWS = slice(0, 2), slice(2, None)
_MULTICROP: dict[str, tuple[str, slice]] = {
    "global_size": ("size", _GLOBAL_VIEWS),
    "local_size": ("size", _LOCAL_VIEWS),
    "global_scale": ("crop_scale", _GLOBAL_VIEWS),
    "local_scale": ("crop_scale", _LOCAL_VIEWS),
}
_LOCAL_CROPS = {"multicrop": 8, "multicrop_small": 4}


def read(name: str, options: Mapping[str, Any]) -> tuple[tuple[Recipe, ...], int | None]:
    """A recipe with some of its parameters changed: one recipe a view (the last for all further), and how many views.

    A parameter is changed in all views by one value, or view by view by a list of values, the last for all further.
    Multi-crop recipes also have ``local_crops``, ``global_size``, ``local_size``, ``global_scale`` and ``local_scale``.

    Raises:
        UserError: no such recipe or parameter (the nearest is shown), or a value out of its range.
    """
    if name not in RECIPES:
        raise unknown_name("view recipe", name, list(RECIPES), key="views.name")
    own = {*_MULTICROP, "local_crops"} if name in _LOCAL_CROPS else set()
    known = {item.name for item in fields(Recipe)} | own
    values: dict[str, list[Any]] = {}
    for option, value in options.items():
        if option not in known:
            close = nearest(option, known)
            raise UserError(
                f"the view recipe {name} has no parameter {option!r}",
                key=f"views.{option}",
                allowed=", ".join(sorted(known)),
                hint=f"did you mean {close[0]!r}?" if close else None,
            )
        parameter = _MULTICROP[option][0] if option in own and option in _MULTICROP else option
        values[option] = (
            [_integer(option, value, (0, 64))] if option == "local_crops" else _by_view(parameter, option, value)
        )
    count = 2 + values.pop("local_crops", [_LOCAL_CROPS[name]])[0] if own else None
    recipes = RECIPES[name]
    recipes = recipes + recipes[-1:] * (max([len(recipes), *map(len, values.values())]) - len(recipes))
    for option, changes in values.items():
        parameter, views = _MULTICROP[option] if option in own else (option, slice(0, None))
        chosen = range(len(recipes))[views]
        recipes = tuple(
            replace(recipe, **{parameter: changes[min(view, len(changes) - 1)]}) if view in chosen else recipe
            for view, recipe in enumerate(recipes)
        )
    return tuple(_with_orders(recipe, "permutations" in values) for recipe in recipes), count


def _with_orders(recipe: Recipe, chosen: bool) -> Recipe:
    """Checks that there are as many orders of the tiles; a number that was not chosen is cut to what there is."""
    orders = math.factorial(recipe.tiles**2)
    if recipe.tiles == 1:
        raise UserError("one tile is no puzzle", key="views.tiles", allowed="0, 2, 3 or 4")
    if recipe.tiles and not chosen:
        return replace(recipe, permutations=min(recipe.permutations, orders))
    if recipe.tiles and recipe.permutations > orders:
        allowed = f"2..{orders}, the orders of {recipe.tiles**2} tiles"
        raise UserError(f"found {recipe.permutations}", key="views.permutations", allowed=allowed)
    return recipe


def _by_view(parameter: str, option: str, value: Any) -> list[Any]:
    """The legal values of a parameter, one for all views or one a view."""
    if parameter == "share":
        return [_names(value)]
    listed = isinstance(value, (list, tuple)) and bool(value)
    if parameter in _PAIRS:
        several = listed and all(isinstance(item, (list, tuple)) for item in value)
        return [_pair(option, item, _PAIRS[parameter]) for item in (value if several else [value])]
    items = value if listed else [value]
    if parameter in _WORDS:
        return [_word(option, item, _WORDS[parameter]) for item in items]
    if parameter in _INTEGERS:
        return [_integer(option, item, _INTEGERS[parameter]) for item in items]
    if parameter == "size":
        return [_size(option, item) for item in items]
    return [_number(option, item, _NUMBERS[parameter]) for item in items]


def _size(option: str, value: Any) -> float:
    if not (_is_number(value, (0.05, 1)) or (_is_number(value, (2, 4096)) and value == int(value))):
        allowed = "2..4096 pixels, or a share of the image's height in 0.05..1"
        raise UserError(f"found {value!r}", key=f"views.{option}", allowed=allowed)
    return float(value)


def _is_number(value: Any, bounds: tuple[float, float]) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and bounds[0] <= value <= bounds[1]


def _number(option: str, value: Any, bounds: tuple[float, float]) -> float:
    if not _is_number(value, bounds):
        raise UserError(f"found {value!r}", key=f"views.{option}", allowed=f"a number in {bounds[0]:g}..{bounds[1]:g}")
    return float(value)


def _integer(option: str, value: Any, bounds: tuple[int, int]) -> int:
    if not _is_number(value, bounds) or int(value) != value:
        raise UserError(
            f"found {value!r}", key=f"views.{option}", allowed=f"a whole number in {bounds[0]}..{bounds[1]}"
        )
    return int(value)


def _pair(option: str, value: Any, bounds: tuple[float, float]) -> tuple[float, float]:
    legal = isinstance(value, (list, tuple)) and len(value) == 2 and all(_is_number(item, bounds) for item in value)
    if not legal or value[0] > value[1]:
        allowed = f"[low, high] within {bounds[0]:g}..{bounds[1]:g}"
        raise UserError(f"found {value!r}", key=f"views.{option}", allowed=allowed)
    return float(value[0]), float(value[1])


def _word(option: str, value: Any, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise unknown_name("value", str(value), allowed, key=f"views.{option}")
    return str(value)


def _names(value: Any) -> tuple[str, ...]:
    names = value if isinstance(value, (list, tuple)) else [value]
    return tuple(_word("share", name, GROUPS) for name in names)
