"""Networks from token ids to embeddings. Token 0 pads and counts for nothing."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from armillary.components.dropout import CounterDropout, counter_dropout
from armillary.components.transformers import make_blocks
from armillary.spec.errors import UserError


class TextTransformer(nn.Module):
    """A transformer over tokens with a class token before them, and a linear neck.

    Dropout acts on the tokens that enter and behind every attention and perceptron, as in BERT; not on the attention's
    weights. It is on only where an objective gives it keys (:func:`armillary.components.dropout.dropout_keys`).

    Args:
        vocabulary: ids run from 0 to ``vocabulary - 1``; 0 pads.
        length: the longest sentence, in tokens.
        embedding_dim: width of the embedding.
        width: of the tokens, a multiple of ``heads``.
        depth: layers.
        heads: attention heads.
        pool: what is embedded: the class token, or the mean of the words.
    """

    def __init__(
        self,
        vocabulary: int,
        length: int,
        embedding_dim: int,
        width: int = 64,
        depth: int = 2,
        heads: int = 4,
        pool: Literal["cls", "mean"] = "cls",
    ) -> None:
        super().__init__()
        self.pool = pool
        # What to make another one with.
        self.options: dict[str, Any] = {"vocabulary": vocabulary, "length": length, "embedding_dim": embedding_dim}
        self.options |= {"width": width, "depth": depth, "heads": heads, "pool": pool}
        self.words = nn.Embedding(vocabulary, width)
        nn.init.trunc_normal_(self.words.weight, std=0.02)
        self.start = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, length, width))
        self.drop = CounterDropout(0.0)
        self.blocks = counter_dropout(make_blocks(width, depth, heads))
        blocks: Any = self.blocks
        for block in blocks:
            # Fused attention would draw from torch's generator at this layer's rate.
            block.attn.attn_drop = nn.Identity()
            block.attn.attn_drop.p = 0.0
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.neck = nn.Linear(width, embedding_dim)

    def forward(self, ids: Tensor) -> Tensor:
        """Embeds sentences ``(batch, L)`` int64, L at most ``length``, as ``(batch, embedding_dim)``."""
        hidden = self._hidden(ids)
        embedding: Tensor = self.neck(hidden[:, 0] if self.pool == "cls" else masked_mean(hidden[:, 1:], ids > 0))
        return embedding

    def embed_words(self, ids: Tensor) -> Tensor:
        """Each word's own embedding ``(batch, L, embedding_dim)``, those of padding included."""
        words: Tensor = self.neck(self._hidden(ids)[:, 1:])
        return words

    def by_depth(self) -> list[list[nn.Parameter]]:
        """Words and positions, then layer by layer; see :class:`~armillary.components.encoders.LayeredEncoder`."""
        blocks: Any = self.blocks
        return [[*self.words.parameters(), self.start, self.positions], *(list(block.parameters()) for block in blocks)]

    def _hidden(self, ids: Tensor) -> Tensor:
        words = self.words(ids) + self.positions[:, : ids.shape[1]]
        hidden = self.drop(torch.cat([self.start.to(words.dtype).expand(len(ids), -1, -1), words], dim=1))
        seen = torch.nn.functional.pad(ids > 0, (1, 0), value=True)[:, None, None, :]
        blocks: Any = self.blocks
        for block in blocks:
            hidden = block(hidden, attn_mask=seen)
        normed: Tensor = self.norm(hidden)
        return normed


class WordVectors(nn.Module):
    """A vector for each word; a sentence is the mean of its words' vectors. The input table of word2vec.

    Args:
        vocabulary: ids run from 0 to ``vocabulary - 1``; 0 pads.
        embedding_dim: width of the vectors.
    """

    def __init__(self, vocabulary: int, embedding_dim: int) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, embedding_dim)
        # As in word2vec.c.
        nn.init.uniform_(self.words.weight, -0.5 / embedding_dim, 0.5 / embedding_dim)
        self.drop = CounterDropout(0.0)

    def forward(self, ids: Tensor) -> Tensor:
        """Embeds sentences ``(batch, L)`` int64 as ``(batch, embedding_dim)``; an empty one as zero."""
        return masked_mean(self.drop(self.words(ids)), ids > 0)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """The mean of ``values (batch, L, dim)`` where ``mask (batch, L)`` is true; 0 where it nowhere is."""
    kept = mask[..., None].to(values.dtype)
    return (values * kept).sum(dim=1) / kept.sum(dim=1).clamp_min(1)


def set_dropout(encoder: nn.Module, p: float) -> None:
    """Sets the rate of all dropout layers that draw from keys.

    Raises:
        UserError: the encoder has none, so that nothing would be dropped.
    """
    layers = [layer for layer in encoder.modules() if isinstance(layer, CounterDropout)]
    if not layers:
        raise UserError(
            "this encoder drops nothing, so that two passes would be the same",
            key="backbone.name",
            allowed="text_transformer or word_vectors",
        )
    for layer in layers:
        layer.p = p
