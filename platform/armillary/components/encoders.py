"""What an encoder can give beside its embedding: feature maps of its stages, or tokens of its patches.

An objective says which of the two it uses (``Needs.encoder``), the check before a run refuses networks without it, and
:func:`map_encoder` or :func:`token_encoder` gives the encoder with the type that has it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from torch import Tensor, nn

from armillary.spec.errors import UserError

Ability = Literal["any", "maps", "tokens"]
FITTING: dict[str, str] = {
    "maps": "small_convnet, and timm's convolutional networks, e.g. timm/resnet18",
    "tokens": "small_vit, and timm's plain vision transformers, e.g. timm/vit_tiny_patch16_224",
}


@runtime_checkable
class MapEncoder(Protocol):
    """An encoder whose feature maps can be had.

    ``stage_channels`` are the channels C_s of its stages, shallow first.
    """

    stage_channels: tuple[int, ...]

    def stages(self, images: Tensor) -> tuple[Tensor, ...]:
        """Images ``(batch, channels, height, width)`` in [0, 1] to one map ``(batch, C_s, h_s, w_s)`` a stage."""
        ...

    def embed_map(self, last_map: Tensor) -> Tensor:
        """The last stage's map to the embedding ``(batch, embedding_dim)``; after ``stages`` it is ``forward``."""
        ...


@dataclass(frozen=True)
class Tokens:
    """A transformer's last layer, normalised.

    ``cls (batch, token_dim)``; ``patches (batch, T, token_dim)`` in rows from the upper left, or those that ``keep``
    named in its order; ``queries (batch, Q, token_dim)``, what became of the extra tokens, else ``None``.
    """

    cls: Tensor
    patches: Tensor
    queries: Tensor | None = None


@runtime_checkable
class TokenEncoder(Protocol):
    """A transformer whose tokens can be had, for images of any size that patches divide.

    ``token_dim`` is the width of its tokens, ``patch_size`` a patch's height and width in pixels, ``grid`` the rows and
    columns of patches of an image of the size it was made for.
    """

    token_dim: int
    patch_size: tuple[int, int]
    grid: tuple[int, int]

    def tokens(
        self,
        images: Tensor,
        *,
        masked: Tensor | None = None,
        keep: Tensor | None = None,
        queries: Tensor | None = None,
    ) -> Tokens:
        """The tokens of images ``(batch, channels, height, width)`` in [0, 1].

        Args:
            images: of any size that patches divide; T patches each.
            masked: ``(batch, T)`` bool; those patches are replaced by a learned token before positions are added.
            keep: ``(batch, K)`` int64; only those patches, with their positions, enter the first layer.
            queries: ``(batch, Q, token_dim)``; tokens that attend to all others while none attends to them.
        """
        ...

    def embed_tokens(self, tokens: Tokens) -> Tensor:
        """Tokens to the embedding ``(batch, embedding_dim)``; after ``tokens(images)`` it is ``forward``."""
        ...


@runtime_checkable
class LayeredEncoder(Protocol):
    """An encoder that says which parameters lie how deep, for learning rates that fall with depth."""

    def by_depth(self) -> list[list[nn.Parameter]]:
        """The parameters of each layer, input first; those of the head behind the layers are left out."""
        ...


def learning_rate_shares(module: nn.Module, decay: float) -> dict[int, float]:
    """The share of the learning rate that each parameter of a module's encoders takes, where it is not 1.

    ``decay ** (L - l)`` for layer l = 0 .. L - 1 of an encoder with L layers; what lies behind the layers, and all that
    is not an encoder's, has the whole rate. As He et al., "Masked Autoencoders", CVPR 2022, appendix A.2 after Clark et
    al., ELECTRA, ICLR 2020; as in the released code patch embedding, positions and class token form layer 0.

    Args:
        module: an objective; its :class:`LayeredEncoder` are found wherever they are.
        decay: in (0, 1].

    Returns:
        By ``id`` of the parameter.
    """
    shares: dict[int, float] = {}
    for encoder in module.modules() if decay < 1 else ():
        if isinstance(encoder, LayeredEncoder):
            layers = encoder.by_depth()
            for depth, parameters in enumerate(layers):
                shares.update((id(parameter), decay ** (len(layers) - depth)) for parameter in parameters)
    return shares


def map_encoder(encoder: nn.Module) -> MapEncoder:
    """The encoder as one with feature maps.

    Raises:
        UserError: it has none.
    """
    check_ability(encoder, "maps", "the objective", "this encoder")
    assert isinstance(encoder, MapEncoder)
    return encoder


def token_encoder(encoder: nn.Module) -> TokenEncoder:
    """The encoder as one with patch tokens.

    Raises:
        UserError: it has none.
    """
    check_ability(encoder, "tokens", "the objective", "this encoder")
    assert isinstance(encoder, TokenEncoder)
    return encoder


def check_ability(encoder: nn.Module, ability: Ability, objective: str, backbone: str) -> None:
    """Refuses an encoder that lacks what an objective uses.

    Args:
        encoder: built as the job says; its weights do not matter.
        ability: the objective's ``Needs.encoder``.
        objective: its name, for the message.
        backbone: the encoder's name, for the message.

    Raises:
        UserError: names the networks that fit.
    """
    kind: type = {"any": nn.Module, "maps": MapEncoder, "tokens": TokenEncoder}[ability]
    if not isinstance(encoder, kind):
        what = "feature maps" if ability == "maps" else "patch tokens"
        raise UserError(
            f"{objective} uses the encoder's {what}; {backbone} has none", key="backbone.name", allowed=FITTING[ability]
        )


def check_sizes(encoder: nn.Module, sizes: Iterable[tuple[int, int]], backbone: str) -> None:
    """Refuses image sizes that an encoder cannot take, e.g. local crops beside whole images.

    Args:
        encoder: built for one of the sizes.
        sizes: heights and widths in pixels: of the images, then of views.
        backbone: the encoder's name, for the message.

    Raises:
        UserError: several sizes and an encoder made for one, or a size that patches do not divide.
    """
    sizes = list(dict.fromkeys(sizes))
    if len(sizes) > 1 and not getattr(encoder, "any_size", False):
        named = " and ".join(f"{height} x {width}" for height, width in sizes)
        pool = getattr(encoder, "pool_option", None)
        raise UserError(
            f"the views are {named} px, and {backbone} takes one size only",
            key="backbone.pool" if pool else "backbone.name",
            allowed="mean" if pool else "a network that averages over places, e.g. small_convnet with pool: mean",
        )
    if isinstance(encoder, TokenEncoder):
        rows, columns = encoder.patch_size
        for number, (height, width) in enumerate(sizes):
            if height % rows or width % columns:
                raise UserError(
                    f"patches of {rows} x {columns} px do not divide images of {height} x {width} px",
                    key="views.local_size" if number else "data.image_size",
                    allowed=f"multiples of {rows} and {columns}",
                )
