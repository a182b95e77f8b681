"""Networks from image to embedding, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from armillary.components.graphs import GIN
from armillary.components.recommendation import LightGCN
from armillary.components.tail import TailedEncoder
from armillary.components.text import TextTransformer, WordVectors
from armillary.components.transformers import from_timm, small_transformer
from armillary.spec.errors import UserError, nearest, unknown_name
from armillary.spec.jobs import BackboneSpec

NAMES = ("small_convnet", "small_vit", "pixels", "text_transformer", "word_vectors", "gin", "lightgcn")
# What networks take that take no images.
MODALITIES = {"text_transformer": "text", "word_vectors": "text", "gin": "graph", "lightgcn": "interactions"}
# Images come in [0, 1]; these bring most photographs near mean 0 and variance 1.
_MEAN, _STD = 0.5, 0.25
_MIN_SIDE = 8
# Layers in a block of the small network.
_BLOCK = 4


class SmallConvNet(nn.Module):
    """Three blocks of convolution, pooling, batch norm and ReLU, then a linear neck, for images of 8 to 112 px.

    A :class:`~armillary.components.encoders.MapEncoder`, one stage a block; of any image size with ``pool="mean"``.

    Batch norm comes after the pooling, where there is a quarter of the work left to do; with the channels innermost in
    memory that makes a step on a CPU about 2.5 times as fast as in the textbook order and layout.

    Args:
        in_channels: 1 or 3.
        image_size: height and width in pixels, at least 8 each.
        embedding_dim: width of the embedding.
        width: channels of the first block; the others have twice and four times as many.
        dropout: share of the features that is dropped before the neck.
        pool: ``flat`` keeps every place of the last feature map, as face networks do; ``mean`` averages over places.
    """

    def __init__(
        self,
        in_channels: int,
        image_size: tuple[int, int],
        embedding_dim: int,
        width: int = 32,
        dropout: float = 0.0,
        pool: str = "flat",
    ) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        channels = in_channels
        height, breadth = image_size
        for block in range(3):
            after = width * 2**block
            blocks += [nn.Conv2d(channels, after, 3, padding=1, bias=False), nn.MaxPool2d(2)]
            blocks += [nn.BatchNorm2d(after), nn.ReLU(inplace=True)]
            channels, height, breadth = after, height // 2, breadth // 2
        self.features = nn.Sequential(*blocks)
        self.stage_channels = (width, 2 * width, 4 * width)
        self.pool_option, self.any_size = pool, pool == "mean"
        self.pool: nn.Module = nn.Flatten() if pool == "flat" else nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.dropout = nn.Dropout(dropout)
        self.neck = nn.Linear(channels * (height * breadth if pool == "flat" else 1), embedding_dim, bias=False)
        # Batch norm on the embedding, as ArcFace's networks end.
        self.norm = nn.BatchNorm1d(embedding_dim)

    def forward(self, images: Tensor) -> Tensor:
        """Embeds images ``(batch, channels, height, width)`` in [0, 1] as ``(batch, embedding_dim)``."""
        return self.embed_map(self.stages(images)[-1])

    def stages(self, images: Tensor) -> tuple[Tensor, ...]:
        """The maps behind each block, of a half, a quarter and an eighth of the image's side."""
        # A copy, as ``contiguous`` leaves a single channel in the strides it has, from which convolutions choose.
        inputs = torch.empty_like(images, memory_format=torch.channels_last).copy_(images)
        hidden = inputs.sub_(_MEAN).div_(_STD)
        maps = []
        for position, layer in enumerate(self.features):
            hidden = layer(hidden)
            if position % _BLOCK == _BLOCK - 1:
                maps.append(hidden)
        return tuple(maps)

    def by_depth(self) -> list[list[nn.Parameter]]:
        """A layer a block; see :class:`~armillary.components.encoders.LayeredEncoder`."""
        blocks = range(0, len(self.features), _BLOCK)
        return [list(self.features[first : first + _BLOCK].parameters()) for first in blocks]

    def embed_map(self, last_map: Tensor) -> Tensor:
        """The last block's map to the embedding."""
        return self.norm(self.neck(self.dropout(self.pool(last_map))))  # type: ignore[no-any-return]


class Pixels(nn.Module):
    """The baseline without parameters: the pixels themselves, less the mean image of the training set."""

    mean: Tensor

    def __init__(self, in_channels: int, image_size: tuple[int, int]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(in_channels, *image_size))

    @torch.no_grad()
    def fit(self, images: Tensor) -> None:
        """Takes the mean of training images ``(N, C, H, W)``, uint8 or float in [0, 1]."""
        scale = 255 if images.dtype == torch.uint8 else 1
        self.mean.copy_(images.to(torch.float32).mean(dim=0) / scale)

    def forward(self, images: Tensor) -> Tensor:
        """Images ``(batch, C, H, W)`` in [0, 1] as ``(batch, C * H * W)``."""
        return (images - self.mean).flatten(1)


class TimmEncoder(nn.Module):
    """A network of timm without its classifier, and a linear neck."""

    def __init__(self, body: Any, features: int, embedding_dim: int) -> None:
        super().__init__()
        self.body = body
        self.neck = nn.Linear(features, embedding_dim)

    def forward(self, images: Tensor) -> Tensor:
        """Embeds images ``(batch, channels, height, width)`` in [0, 1] as ``(batch, embedding_dim)``."""
        return self.neck(self.body((images - _MEAN) / _STD))  # type: ignore[no-any-return]

    def by_depth(self) -> list[list[nn.Parameter]]:
        """A layer a stage, as timm groups them: the stem is the first, a norm behind the last stage one of its own."""
        from timm.models import group_parameters

        body: Any = self.body
        named = dict(body.named_parameters())
        groups = group_parameters(body, body.group_matcher(coarse=True))
        return [[named[name] for name in groups[number]] for number in sorted(groups)]


class TimmMapEncoder(TimmEncoder):
    """A convolutional network of timm; a :class:`~armillary.components.encoders.MapEncoder` for images of any size."""

    any_size = True

    def __init__(self, body: Any, features: int, embedding_dim: int) -> None:
        super().__init__(body, features, embedding_dim)
        # The last stage is what goes into the pooling, which some networks widen or normalise once more.
        self.stage_channels = (*(stage["num_chs"] for stage in body.feature_info[:-1]), int(body.num_features))

    def stages(self, images: Tensor) -> tuple[Tensor, ...]:
        """The maps of the network's stages."""
        last, maps = self.body.forward_intermediates((images - _MEAN) / _STD)
        return (*maps[:-1], last)

    def embed_map(self, last_map: Tensor) -> Tensor:
        """The last stage's map to the embedding."""
        return self.neck(self.body.forward_head(last_map))  # type: ignore[no-any-return]


def build_encoder(spec: BackboneSpec, *, in_channels: int, image_size: tuple[int, int]) -> nn.Module:
    """Makes the network a job names, with its tail.

    Args:
        spec: the job's ``backbone`` section; its options are arguments of :class:`SmallConvNet` (width, dropout, pool),
            of :func:`~armillary.components.transformers.small_transformer` (width, depth, heads, patch, pool,
            positions, layer_scale) or of ``timm.create_model``; ``pixels`` takes none.
        in_channels: channels of the images; for text the number of tokens in the vocabulary; for interactions users and
            items together.
        image_size: height and width in pixels; for text 1 and the longest sentence's tokens; for interactions users and
            edges.

    Returns:
        A module from images ``(batch, in_channels, height, width)`` in [0, 1] to ``(batch, embedding_dim)``. ``pixels``
        returns ``in_channels * height * width`` numbers whatever ``embedding_dim`` says, and has a method ``fit``.

    Raises:
        UserError: an unknown name or option, a value out of range, images too small.
    """
    if spec.tail:
        body = build_encoder(spec.model_copy(update={"tail": ()}), in_channels=in_channels, image_size=image_size)
        return TailedEncoder(body, spec.embedding_dim, spec.tail)
    if spec.name == "small_convnet":
        return _small_convnet(spec, in_channels, image_size)
    if spec.name == "small_vit":
        return _small_vit(spec, in_channels, image_size)
    if spec.name == "pixels":
        _known(spec, {})
        return Pixels(in_channels, image_size)
    if spec.name == "text_transformer":
        return _text_transformer(spec, in_channels, image_size[1])
    if spec.name == "word_vectors":
        _known(spec, {})
        return WordVectors(in_channels, spec.embedding_dim)
    if spec.name == "gin":
        return _gin(spec, image_size)
    if spec.name == "lightgcn":
        return _lightgcn(spec, in_channels, image_size)
    if spec.name.startswith("timm/"):
        return _timm(spec, in_channels, image_size)
    raise unknown_name("backbone", spec.name, [*NAMES, "timm/<model>"], key="backbone.name")


def check_modality(name: str, modality: str, objective: str) -> None:
    """Refuses a network that does not take what an objective is given.

    Raises:
        UserError: names the networks that fit.
    """
    takes, given = MODALITIES.get(name, "image"), "image" if modality == "image_text" else modality
    if takes != given:
        fitting = [other for other in NAMES if MODALITIES.get(other, "image") == given]
        raise UserError(
            f"{objective} is given {given} and {name} takes {takes}", key="backbone.name", allowed=", ".join(fitting)
        )


def _gin(spec: BackboneSpec, size: tuple[int, int]) -> nn.Module:
    _check_options(
        spec,
        {"width": "an integer in 4..1024", "depth": "an integer in 1..12"},
        {
            "width": lambda value: type(value) is int and 4 <= value <= 1024,
            "depth": lambda value: type(value) is int and 1 <= value <= 12,
        },
    )
    features = size[1] - size[0] - 1
    if features < 1:
        problem = f"{size[0]} x {size[1]} is no picture of graphs: N rows, and one column, features, N columns"
        raise UserError(problem, key="data.image_size", allowed="null", hint="data.name: motifs")
    return GIN(features, spec.embedding_dim, **spec.options)


def _lightgcn(spec: BackboneSpec, nodes: int, size: tuple[int, int]) -> nn.Module:
    _check_options(
        spec,
        {"layers": "an integer in 1..8", "ego": "true, false"},
        {
            "layers": lambda value: type(value) is int and 1 <= value <= 8,
            "ego": lambda value: type(value) is bool,
        },
    )
    return LightGCN(nodes, *size, spec.embedding_dim, **spec.options)


def _text_transformer(spec: BackboneSpec, vocabulary: int, length: int) -> nn.Module:
    _check_options(
        spec,
        {
            "width": "an integer in 4..1024",
            "depth": "an integer in 1..24",
            "heads": "an integer in 1..16 that divides width",
            "pool": "cls, mean",
        },
        {
            "width": lambda value: type(value) is int and 4 <= value <= 1024,
            "depth": lambda value: type(value) is int and 1 <= value <= 24,
            "heads": lambda value: type(value) is int and 1 <= value <= 16,
            "pool": lambda value: value in ("cls", "mean"),
        },
    )
    width, heads = spec.options.get("width", 64), spec.options.get("heads", 4)
    if width % heads:
        raise UserError(
            f"found {heads} heads for a width of {width}", key="backbone.heads", allowed="a divisor of the width"
        )
    return TextTransformer(vocabulary, length, spec.embedding_dim, **spec.options)


def _known(spec: BackboneSpec, allowed: dict[str, str]) -> None:
    for name in spec.options:
        if name not in allowed:
            close = nearest(name, allowed)
            raise UserError(
                f"the backbone {spec.name} has no option {name!r}",
                key=f"backbone.{name}",
                allowed=", ".join(allowed) or "none",
                hint=f"did you mean {close[0]!r}?" if close else None,
            )


def _check_options(spec: BackboneSpec, ranges: dict[str, str], legal: dict[str, Callable[[Any], bool]]) -> None:
    _known(spec, ranges)
    for name, value in spec.options.items():
        if not legal[name](value):
            raise UserError(f"found {value!r}", key=f"backbone.{name}", allowed=ranges[name])


def _small_convnet(spec: BackboneSpec, in_channels: int, image_size: tuple[int, int]) -> nn.Module:
    _check_options(
        spec,
        {"width": "an integer in 4..512", "dropout": "a number in 0..0.9", "pool": "flat, mean"},
        {
            "width": lambda value: type(value) is int and 4 <= value <= 512,
            "dropout": lambda value: type(value) in (int, float) and 0 <= value <= 0.9,
            "pool": lambda value: value in ("flat", "mean"),
        },
    )
    if min(image_size) < _MIN_SIDE:
        found = f"{image_size[0]} x {image_size[1]}"
        raise UserError(f"small_convnet halves the image three times; {found} px is too small", key="data.image_size")
    return SmallConvNet(in_channels, image_size, spec.embedding_dim, **spec.options)


def _small_vit(spec: BackboneSpec, in_channels: int, image_size: tuple[int, int]) -> nn.Module:
    _check_options(
        spec,
        {
            "width": "a multiple of 4 in 16..1024",
            "depth": "an integer in 1..24",
            "heads": "an integer in 1..16 that divides width",
            "patch": "an integer in 2..32",
            "pool": "cls, mean",
            "positions": "sincos, learned",
            "layer_scale": "a number in 0..1; 0 for none",
        },
        {
            "width": lambda value: type(value) is int and 16 <= value <= 1024 and value % 4 == 0,
            "depth": lambda value: type(value) is int and 1 <= value <= 24,
            "heads": lambda value: type(value) is int and 1 <= value <= 16,
            "patch": lambda value: type(value) is int and 2 <= value <= 32,
            "pool": lambda value: value in ("cls", "mean"),
            "positions": lambda value: value in ("sincos", "learned"),
            "layer_scale": lambda value: type(value) in (int, float) and 0 <= value <= 1,
        },
    )
    width, heads, patch = (
        spec.options.get(name, default) for name, default in (("width", 96), ("heads", 3), ("patch", 4))
    )
    if width % heads:
        raise UserError(
            f"found {heads} heads for a width of {width}", key="backbone.heads", allowed="a divisor of the width"
        )
    if min(image_size) < patch or any(side % patch for side in image_size):
        raise UserError(
            f"patches of {patch} px do not divide images of {image_size[0]} x {image_size[1]} px",
            key="backbone.patch",
            allowed="a divisor of height and width",
        )
    return small_transformer(in_channels, image_size, spec.embedding_dim, **spec.options)


def _timm(spec: BackboneSpec, in_channels: int, image_size: tuple[int, int]) -> nn.Module:
    import timm

    model = spec.name.removeprefix("timm/")
    if not timm.is_model(model):
        close = [f"timm/{name}" for name in nearest(model, timm.list_models())]
        raise UserError(
            f"timm has no model {model!r}",
            key="backbone.name",
            hint=f"did you mean {' or '.join(close)}?" if close else "timm.list_models() names them all",
        )
    options = {"pretrained": False, "in_chans": in_channels, "num_classes": 0, **spec.options}
    try:
        try:
            # Transformers are made for one size of image ...
            body = timm.create_model(model, **{"img_size": image_size, **options})
        except TypeError:
            # ... and convolutional networks know no such argument.
            body = timm.create_model(model, **options)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise UserError(f"timm cannot make {model} with {spec.options}: {error}", key="backbone") from error
    transformer = from_timm(body, spec.embedding_dim)
    if transformer is not None:
        return transformer
    # Some networks widen once more behind their last feature map.
    features: Any = getattr(body, "head_hidden_size", body.num_features)
    kind = TimmMapEncoder if _is_convolutional(body) else TimmEncoder
    return kind(body, features, spec.embedding_dim)


def _is_convolutional(body: Any) -> bool:
    """Whether its stages are maps of any image's size: it can give them, and no layer attends or knows positions."""
    attends = any("attention" in type(module).__name__.lower() for module in body.modules())
    return hasattr(body, "forward_intermediates") and not attends and not hasattr(body, "pos_embed")
