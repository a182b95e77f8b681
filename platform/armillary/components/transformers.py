"""Vision transformers whose tokens can be had: masked, in part, at several image sizes, with queries beside them."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from armillary.components.encoders import Tokens
from armillary.components.patches import grid_coordinates, resample_grid, sincos_positions

# Images come in [0, 1]; these bring most photographs near mean 0 and variance 1.
_MEAN, _STD = 0.5, 0.25


class TokenBody(nn.Module):
    """A transformer from images to tokens, out of timm's parts.

    Every parameter is used in this module's ``forward`` or in a submodule's, so that an engine that shards parameters
    finds it whenever it is needed.

    Args:
        patch_embed: maps images to ``(batch, T, dim)``; its ``proj`` is a convolution whose kernel is a patch.
        blocks: layers, which take ``attn_mask``.
        norm: after the last layer.
        grid: rows and columns of patches that the positions are made for.
        dim: width of the tokens.
        positions: learned or fixed ``(1, T, dim)``, or with the prefix tokens' before them; ``None`` makes fixed
            sin-cos ones.
        registers: extra prefix tokens ``(1, R, dim)``.
        norm_pre: before the first layer.
    """

    pos_embed: Tensor

    def __init__(
        self,
        patch_embed: nn.Module,
        blocks: nn.Module,
        norm: nn.Module,
        *,
        grid: tuple[int, int],
        dim: int,
        positions: nn.Parameter | None = None,
        cls_token: nn.Parameter | None = None,
        registers: nn.Parameter | None = None,
        norm_pre: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.patch_embed, self.blocks, self.norm = patch_embed, blocks, norm
        self.norm_pre = nn.Identity() if norm_pre is None else norm_pre
        self.grid = grid
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, dim)) if cls_token is None else cls_token
        self.reg_token = registers
        self.prefix = 1 + (0 if registers is None else registers.shape[1])
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, dim))
        if positions is None:
            self.register_buffer("pos_embed", sincos_positions(grid_coordinates(grid), dim)[None])
        else:
            self.pos_embed = positions

    def forward(
        self,
        images: Tensor,
        masked: Tensor | None = None,
        keep: Tensor | None = None,
        queries: Tensor | None = None,
    ) -> Tensor:
        """Normalised images to ``(batch, prefix + T or K + Q, dim)``; see :class:`TokenEncoder` for the arguments."""
        embed: Any = self.patch_embed
        planes = embed.proj(images)
        grid = (planes.shape[2], planes.shape[3])
        tokens = embed.norm(planes.flatten(2).transpose(1, 2))
        if masked is not None:
            tokens = torch.where(masked[..., None], self.mask_token.to(tokens.dtype), tokens)
        before, places = self._positions(grid)
        tokens = tokens + places.to(tokens.dtype)
        if keep is not None:
            tokens = tokens.gather(1, keep[..., None].expand(-1, -1, tokens.shape[-1]))
        prefix = self.cls_token if self.reg_token is None else torch.cat([self.cls_token, self.reg_token], dim=1)
        if before is not None:
            prefix = prefix + before
        tokens = torch.cat([prefix.to(tokens.dtype).expand(len(tokens), -1, -1), tokens], dim=1)
        if queries is None:
            hidden = self.blocks(self.norm_pre(tokens))
        else:
            hidden = self._with_queries(tokens, queries.to(tokens.dtype))
        normed: Tensor = self.norm(hidden)
        return normed

    def by_depth(self) -> list[list[nn.Parameter]]:
        """What makes the tokens, then layer by layer; see :class:`~armillary.components.encoders.LayeredEncoder`."""
        blocks: Any = self.blocks
        layers = [list(block.parameters()) for block in blocks]
        behind = {id(parameter) for part in (self.norm, self.blocks) for parameter in part.parameters()}
        return [[parameter for parameter in self.parameters() if id(parameter) not in behind], *layers]

    def _positions(self, grid: tuple[int, int]) -> tuple[Tensor | None, Tensor]:
        """The prefix tokens' positions, if they have any, and the patches'."""
        count = self.pos_embed.shape[1] - self.grid[0] * self.grid[1]
        before, places = self.pos_embed[:, :count], self.pos_embed[:, count:]
        return before if count else None, resample_grid(places, self.grid, grid)

    def _with_queries(self, tokens: Tensor, queries: Tensor) -> Tensor:
        whole = torch.cat([tokens, queries], dim=1)
        allowed = torch.ones(whole.shape[1], whole.shape[1], dtype=torch.bool, device=whole.device)
        allowed[: tokens.shape[1], tokens.shape[1] :] = False
        hidden: Tensor = self.norm_pre(whole)
        blocks: Any = self.blocks
        for block in blocks:
            hidden = block(hidden, attn_mask=allowed)
        return hidden


class TransformerEncoder(nn.Module):
    """A transformer and a linear neck; a :class:`TokenEncoder`.

    Args:
        body: from images to tokens.
        token_dim: width of the tokens.
        patch_size: a patch's height and width in pixels.
        embedding_dim: width of the embedding.
        pool: ``cls`` embeds the class token, ``mean`` the mean of the patches.
        pool_norm: after pooling.
    """

    any_size = True

    def __init__(
        self,
        body: TokenBody,
        token_dim: int,
        patch_size: tuple[int, int],
        embedding_dim: int,
        pool: Literal["cls", "mean"] = "cls",
        pool_norm: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.body = body
        self.token_dim, self.patch_size, self.grid = token_dim, patch_size, body.grid
        self.pool = pool
        self.pool_norm = nn.Identity() if pool_norm is None else pool_norm
        self.neck = nn.Linear(token_dim, embedding_dim)

    def forward(self, images: Tensor) -> Tensor:
        """Embeds images ``(batch, channels, height, width)`` in [0, 1] as ``(batch, embedding_dim)``."""
        return self.embed_tokens(self.tokens(images))

    def tokens(
        self,
        images: Tensor,
        *,
        masked: Tensor | None = None,
        keep: Tensor | None = None,
        queries: Tensor | None = None,
    ) -> Tokens:
        """See :class:`TokenEncoder`."""
        hidden: Tensor = self.body((images - _MEAN) / _STD, masked, keep, queries)
        count = 0 if queries is None else queries.shape[1]
        end = hidden.shape[1] - count
        return Tokens(hidden[:, 0], hidden[:, self.body.prefix : end], None if queries is None else hidden[:, end:])

    def embed_tokens(self, tokens: Tokens) -> Tensor:
        """See :class:`TokenEncoder`."""
        pooled = tokens.cls if self.pool == "cls" else tokens.patches.mean(dim=1)
        embedding: Tensor = self.neck(self.pool_norm(pooled))
        return embedding


def make_blocks(
    dim: int,
    depth: int,
    heads: int,
    *,
    layer_scale: float | None = None,
) -> nn.Sequential:
    """Transformer layers of timm: attention and a perceptron four times as wide, each behind a layer norm.

    Args:
        dim: width of the tokens, a multiple of ``heads``.
        depth: layers.
        heads: attention heads.
        layer_scale: initial value of a learned factor on each branch; ``None`` for no such factor.
    """
    from timm.models.vision_transformer import Block

    norm: Any = partial(nn.LayerNorm, eps=1e-6)
    layers = [Block(dim, heads, qkv_bias=True, init_values=layer_scale, norm_layer=norm) for _ in range(depth)]
    for module in (module for layer in layers for module in layer.modules()):
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return nn.Sequential(*layers)


def small_transformer(
    in_channels: int,
    image_size: tuple[int, int],
    embedding_dim: int,
    *,
    width: int = 96,
    depth: int = 4,
    heads: int = 3,
    patch: int = 4,
    pool: Literal["cls", "mean"] = "cls",
    positions: Literal["sincos", "learned"] = "sincos",
    layer_scale: float = 0.0,
) -> TransformerEncoder:
    """A vision transformer that trains in seconds on images of 16 to 64 px.

    Args:
        in_channels: 1 or 3.
        image_size: height and width in pixels, multiples of ``patch``.
        embedding_dim: width of the embedding.
        width: of the tokens, a multiple of 4 and of ``heads``.
        depth: layers.
        heads: attention heads.
        patch: side of a patch in pixels.
        pool: what is embedded: the class token, or the mean of the patches.
        positions: fixed sine and cosine, or learned.
        layer_scale: initial factor on each branch; 0 for none.
    """
    from timm.layers.patch_embed import PatchEmbed

    grid = (image_size[0] // patch, image_size[1] // patch)
    embed: Any = PatchEmbed(img_size=None, patch_size=patch, in_chans=in_channels, embed_dim=width)
    # As a linear map of the flattened patch, as in the published code of MoCo v3 and MAE.
    nn.init.xavier_uniform_(embed.proj.weight.view(width, -1))
    nn.init.zeros_(embed.proj.bias)
    learned = nn.Parameter(0.02 * torch.randn(1, grid[0] * grid[1], width)) if positions == "learned" else None
    body = TokenBody(
        embed,
        make_blocks(width, depth, heads, layer_scale=layer_scale or None),
        nn.LayerNorm(width, eps=1e-6),
        grid=grid,
        dim=width,
        positions=learned,
    )
    return TransformerEncoder(body, width, (patch, patch), embedding_dim, pool)


def from_timm(model: Any, embedding_dim: int) -> TransformerEncoder | None:
    """An encoder out of the parts of timm's plain ``VisionTransformer``; ``None`` for anything else.

    Args:
        model: made by ``timm.create_model`` without classifier; its parts are taken over.
        embedding_dim: width of the embedding.
    """
    from timm.models.vision_transformer import VisionTransformer

    plain = type(model) is VisionTransformer and model.has_class_token and model.pos_embed is not None
    if not plain or model.global_pool not in ("token", "avg"):
        return None
    body = TokenBody(
        model.patch_embed,
        model.blocks,
        model.norm,
        grid=tuple(model.patch_embed.grid_size),
        dim=model.embed_dim,
        positions=model.pos_embed,
        cls_token=model.cls_token,
        registers=model.reg_token,
        norm_pre=model.norm_pre,
    )
    pool: Literal["cls", "mean"] = "cls" if model.global_pool == "token" else "mean"
    return TransformerEncoder(
        body, model.embed_dim, tuple(model.patch_embed.patch_size), embedding_dim, pool, model.fc_norm
    )
