"""Networks from image to embedding, by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from armillary.spec.errors import UserError, nearest, unknown_name
from armillary.spec.jobs import BackboneSpec

NAMES = ("small_convnet", "pixels")
# Images come in [0, 1]; these bring most photographs near mean 0 and variance 1.
_MEAN, _STD = 0.5, 0.25
_MIN_SIDE = 8


class SmallConvNet(nn.Module):
    """Three blocks of convolution, pooling, batch norm and ReLU, then a linear neck, for images of 8 to 112 px.

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
        self.pool: nn.Module = nn.Flatten() if pool == "flat" else nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.dropout = nn.Dropout(dropout)
        self.neck = nn.Linear(channels * (height * breadth if pool == "flat" else 1), embedding_dim, bias=False)
        # Batch norm on the embedding, as ArcFace's networks end.
        self.norm = nn.BatchNorm1d(embedding_dim)

    def forward(self, images: Tensor) -> Tensor:
        """Embeds images ``(batch, channels, height, width)`` in [0, 1] as ``(batch, embedding_dim)``."""
        # A copy, as ``contiguous`` leaves a single channel in the strides it has, from which convolutions choose.
        inputs = torch.empty_like(images, memory_format=torch.channels_last).copy_(images)
        features = self.features(inputs.sub_(_MEAN).div_(_STD))
        return self.norm(self.neck(self.dropout(self.pool(features))))  # type: ignore[no-any-return]


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

    def __init__(self, body: nn.Module, features: int, embedding_dim: int) -> None:
        super().__init__()
        self.body = body
        self.neck = nn.Linear(features, embedding_dim)

    def forward(self, images: Tensor) -> Tensor:
        """Embeds images ``(batch, channels, height, width)`` in [0, 1] as ``(batch, embedding_dim)``."""
        return self.neck(self.body((images - _MEAN) / _STD))  # type: ignore[no-any-return]


def build_encoder(spec: BackboneSpec, *, in_channels: int, image_size: tuple[int, int]) -> nn.Module:
    """Makes the network a job names.

    Args:
        spec: the job's ``backbone`` section; its options are arguments of :class:`SmallConvNet` (width, dropout, pool)
            or of ``timm.create_model``; ``pixels`` takes none.
        in_channels: channels of the images.
        image_size: height and width in pixels.

    Returns:
        A module from images ``(batch, in_channels, height, width)`` in [0, 1] to ``(batch, embedding_dim)``. ``pixels``
        returns ``in_channels * height * width`` numbers whatever ``embedding_dim`` says, and has a method ``fit``.

    Raises:
        UserError: an unknown name or option, a value out of range, images too small.
    """
    if spec.name == "small_convnet":
        return _small_convnet(spec, in_channels, image_size)
    if spec.name == "pixels":
        _known(spec, {})
        return Pixels(in_channels, image_size)
    if spec.name.startswith("timm/"):
        return _timm(spec, in_channels, image_size)
    raise unknown_name("backbone", spec.name, [*NAMES, "timm/<model>"], key="backbone.name")


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


def _small_convnet(spec: BackboneSpec, in_channels: int, image_size: tuple[int, int]) -> nn.Module:
    ranges = {"width": "an integer in 4..512", "dropout": "a number in 0..0.9", "pool": "flat, mean"}
    _known(spec, ranges)
    options: dict[str, Any] = {"width": 32, "dropout": 0.0, "pool": "flat", **spec.options}
    width, dropout = options["width"], options["dropout"]
    legal = {
        "width": type(width) is int and 4 <= width <= 512,
        "dropout": type(dropout) in (int, float) and 0 <= dropout <= 0.9,
        "pool": options["pool"] in ("flat", "mean"),
    }
    for name, fine in legal.items():
        if not fine:
            raise UserError(f"found {options[name]!r}", key=f"backbone.{name}", allowed=ranges[name])
    if min(image_size) < _MIN_SIDE:
        found = f"{image_size[0]} x {image_size[1]}"
        raise UserError(f"small_convnet halves the image three times; {found} px is too small", key="data.image_size")
    return SmallConvNet(in_channels, image_size, spec.embedding_dim, **options)


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
    # Some networks widen once more behind their last feature map.
    features: Any = getattr(body, "head_hidden_size", body.num_features)
    return TimmEncoder(body, features, spec.embedding_dim)
