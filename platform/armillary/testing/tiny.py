"""A tiny encoder and tiny batches for any objective's needs; seconds of CPU for a whole suite."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from armillary.components.dropout import CounterDropout
from armillary.components.encoders import Tokens
from armillary.components.graphs import GIN, Graphs, pack
from armillary.components.patches import patchify, unpatchify
from armillary.components.recommendation import Disturb, LightGCN
from armillary.components.text import TextTransformer, masked_mean
from armillary.components.transformers import TransformerEncoder, small_transformer
from armillary.data.views import make_views
from armillary.objectives import Batch, BuildContext, Needs, Objective

CHANNELS, HEIGHT, WIDTH = 1, 6, 6
PATCH = 2
NUM_CLASSES = 4
EMBEDDING_DIM = 8
VOCABULARY, LENGTH = 12, 5
NODES, FEATURES = 6, 2
USERS, ITEMS = 5, 7
# Every user chose three items; nobody chose the last.
EDGES = torch.tensor([[user, USERS + (user + step) % (ITEMS - 1)] for user in range(USERS) for step in range(3)]).T
# Hyperparameters that only cost time, made small wherever an objective has them.
SMALL = {
    "subsampling_threshold": 1.0,
    "sampling_number": 8,
    "projection_hidden": 16,
    "projection_dim": 8,
    "hidden": 16,
    "downscale": 2.0,
    "upscale": 2.0,
    "pretrain": 0.0,
    "queue_size": 16,
    "bank_samples": 8,
    "clip_length": 2,
    "prototypes": 16,
    "head_hidden": 16,
    "bottleneck": 8,
    "local_crops": 2,
    "predictor_hidden": 8,
    "start_step": 0,
    "start_share": 0.0,
    "pairs": 8,
    "query_pairs": 4,
    "warmup_epochs": 0,
    "decoder_dim": 16,
    "decoder_heads": 2,
    "decoder_depth": 1,
    "cell": 2,
    "permutations": 8,
    "score_dim": 8,
    "critic_dim": 32,
    "context_dim": 8,
    "patches": 5,
    "horizon": 2,
    "frozen_steps": 0,
    "clusters": (4, 2),
    "norm_samples": 6,
}


class TinyEncoder(nn.Module):
    """Images ``(batch, 1, 6, 6)`` or smaller to embeddings ``(batch, 8)``; a ``MapEncoder`` of two stages.

    Two convolutions with smooth activations, batch norm behind the first, the mean over places, a linear neck.
    """

    any_size = True
    stage_channels: tuple[int, ...] = (6, 12)

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(
            nn.Conv2d(CHANNELS, 6, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(6), nn.SiLU()
        )
        self.second = nn.Sequential(nn.Conv2d(6, 12, 3, padding=1), nn.SiLU())
        self.neck = nn.Linear(12, EMBEDDING_DIM)

    def forward(self, images: Tensor) -> Tensor:
        """The embeddings."""
        return self.embed_map(self.stages(images)[-1])

    def stages(self, images: Tensor) -> tuple[Tensor, ...]:
        """``(batch, 6, 3, 3)`` and ``(batch, 12, 3, 3)``."""
        shallow = self.first(images)
        return shallow, self.second(shallow)

    def embed_map(self, last_map: Tensor) -> Tensor:
        """The embedding of the second stage."""
        embeddings: Tensor = self.neck(last_map.mean(dim=(2, 3)))
        return embeddings


class FlatText(nn.Module):
    """Sentences to the mean of fixed vectors, as :class:`FlatEncoder` for images."""

    embedding_dim = EMBEDDING_DIM
    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(1)
        self.register_buffer("table", torch.randn(VOCABULARY, EMBEDDING_DIM, generator=draw))
        self.drop = CounterDropout(0.0)

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids ``(batch, L)`` as ``(batch, 8)``."""
        return masked_mean(self.drop(self.table[ids]), ids > 0)


class FlatGraph(nn.Module):
    """Graphs to the entries of their pictures."""

    embedding_dim = NODES * (1 + FEATURES + NODES)

    def forward(self, pictures: Tensor) -> Tensor:
        """Pictures ``(batch, 1, 6, 9)`` as ``(batch, 54)``."""
        return pictures.flatten(1)


class FlatNodes(nn.Module):
    """Fixed vectors of users and items in the place of a graph; noise moves them once."""

    embedding_dim = EMBEDDING_DIM

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.table = nn.Embedding(USERS + ITEMS, EMBEDDING_DIM)

    def nodes(self, disturb: Disturb | None = None) -> Tensor:
        """The vectors ``(nodes, 8)``."""
        return self.table.weight if disturb is None else disturb(self.table.weight, 0)


class TinyTokenEncoder(TransformerEncoder):
    """A transformer of two layers on patches of 2 pixels; images of 6 x 6 or less to embeddings ``(batch, 8)``."""

    def __init__(self) -> None:
        made = small_transformer(
            CHANNELS, (HEIGHT, WIDTH), EMBEDDING_DIM, width=16, depth=2, heads=2, patch=PATCH, pool="mean"
        )
        super().__init__(made.body, made.token_dim, made.patch_size, EMBEDDING_DIM, "mean")


class FlatEncoder(nn.Module):
    """Computes nothing: the embedding is the pixels. What differs under autocast is then the objective's own work.

    Its map is the image, its tokens the pixels of patches and their mean; smaller images are filled up with zeros.
    """

    any_size = True
    embedding_dim = CHANNELS * HEIGHT * WIDTH
    stage_channels = (CHANNELS,)
    token_dim = CHANNELS * PATCH**2
    patch_size = (PATCH, PATCH)
    grid = (HEIGHT // PATCH, WIDTH // PATCH)

    def forward(self, images: Tensor) -> Tensor:
        """Images ``(batch, 1, 6, 6)`` as ``(batch, 36)``."""
        return nn.functional.pad(images, (0, WIDTH - images.shape[3], 0, HEIGHT - images.shape[2])).flatten(1)

    def stages(self, images: Tensor) -> tuple[Tensor, ...]:
        """The images."""
        return (images,)

    def embed_map(self, last_map: Tensor) -> Tensor:
        """The pixels."""
        return self(last_map)  # type: ignore[no-any-return]

    def tokens(
        self,
        images: Tensor,
        *,
        masked: Tensor | None = None,
        keep: Tensor | None = None,
        queries: Tensor | None = None,
    ) -> Tokens:
        """Patches of 2 x 2 pixels; masked ones are black."""
        patches = patchify(images, self.patch_size)
        if masked is not None:
            patches = patches.masked_fill(masked[..., None], 0)
        if keep is not None:
            patches = patches.gather(1, keep[..., None].expand(-1, -1, self.token_dim))
        return Tokens(patches.mean(dim=1), patches, queries)

    def embed_tokens(self, tokens: Tokens) -> Tensor:
        """The patches side by side, with zeros for those that are not there."""
        missing = self.grid[0] * self.grid[1] - tokens.patches.shape[1]
        whole = nn.functional.pad(tokens.patches, (0, 0, 0, missing))
        return self(unpatchify(whole, self.patch_size, (HEIGHT, WIDTH)))  # type: ignore[no-any-return]


def encoder_for(needs: Needs) -> nn.Module:
    """A tiny encoder with the abilities that an objective needs, for what it is given."""
    if needs.modality == "graph":
        return GIN(FEATURES, EMBEDDING_DIM, width=8, depth=2)
    if needs.modality == "interactions":
        graph = LightGCN(USERS + ITEMS, USERS, EDGES.shape[1], EMBEDDING_DIM, layers=2)
        graph.connect(EDGES)
        return graph
    if needs.modality == "text":
        return TextTransformer(VOCABULARY, LENGTH, EMBEDDING_DIM, width=8, depth=1, heads=2)
    return TinyTokenEncoder() if needs.encoder == "tokens" else TinyEncoder()


def flat_encoder_for(needs: Needs) -> nn.Module:
    """An encoder that computes nothing; it says its ``embedding_dim``."""
    makers: dict[str, type[nn.Module]] = {"text": FlatText, "graph": FlatGraph, "interactions": FlatNodes}
    return makers.get(needs.modality, FlatEncoder)()


def build(
    cls: type[Objective],
    options: dict[str, Any] | None = None,
    *,
    encoder: nn.Module | None = None,
    embedding_dim: int = EMBEDDING_DIM,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Objective:
    """An objective on a tiny encoder, its parameters a function of ``seed``.

    Args:
        cls: the objective.
        options: hyperparameters that differ from the defaults.
        encoder: takes the place of :func:`encoder_for`.
        embedding_dim: that encoder's width.
        dtype: type of all parameters.
        seed: of the parameters.
    """
    torch.manual_seed(seed)
    values = hyperparameters(cls, options or {})
    needs = cls.needs_for(values)
    context = BuildContext(
        encoder=encoder_for(needs) if encoder is None else encoder,
        embedding_dim=embedding_dim,
        num_classes=NUM_CLASSES,
        num_samples=64,
        dataset_size=64,
        batch_size=12,
        epochs=4,
        steps_per_epoch=5,
        in_channels=CHANNELS,
        image_size=(HEIGHT, WIDTH),
        class_counts=torch.full((NUM_CLASSES,), 16),
        tables=_tables(needs),
    )
    return cls(values, context).to(dtype)


def hyperparameters(cls: type[Objective], options: dict[str, Any]) -> Any:
    """The objective's hyperparameters: defaults, made small where they only cost time, with ``options``."""
    small = {key: value for key, value in SMALL.items() if key in cls.Hyperparameters.model_fields}
    return cls.Hyperparameters(**{**small, **options})


def _tables(needs: Needs) -> dict[str, Tensor]:
    """What the dataset tells an objective of this modality."""
    if needs.modality in ("text", "image_text"):
        counts = torch.arange(VOCABULARY, 0, -1)
        counts[0] = 0
        return {"token_counts": counts, "caption_length": torch.tensor(LENGTH)}
    if needs.modality == "interactions":
        return {"edges": EDGES}
    return {}


def _share(images: Tensor, draw: torch.Generator) -> Tensor:
    return torch.rand(len(images), generator=draw, dtype=images.dtype)


# Recipes whose draws an objective learns from, so that made-up views would not do.
DRAWING_RECIPES = ("rotation", "jigsaw", "pirl", "looc", "multicrop", "masked_face", "low_res_pair")

# Fields beside label and index, from the first view and a source of chance. What a new field looks like is added here
# with the first objective that needs it.
FIELD_MAKERS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "quality": _share,
    "pose": lambda images, draw: torch.stack([180 * _share(images, draw) - 90, 60 * _share(images, draw) - 30], dim=1),
    "mask": lambda images, draw: _share(images, draw) > 0.5,
    "resolution": lambda images, draw: (8 + 24 * _share(images, draw)).long(),
    # Two sets in turn for every class, which come in turn too.
    "image_set": lambda images, _: torch.arange(len(images)) % (2 * NUM_CLASSES),
    "sequence": lambda images, _: torch.arange(len(images)) % NUM_CLASSES,
    "frame": lambda images, _: torch.arange(len(images)) // NUM_CLASSES,
    "caption": lambda images, draw: sentences(torch.arange(len(images)) % NUM_CLASSES, draw),
}


def batch(
    needs: Needs,
    size: int = 12,
    *,
    labels: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Batch:
    """A batch that fulfils the needs: noisy class patterns, views that differ by noise, classes balanced and in turn.

    Args:
        needs: of the objective.
        size: number of samples.
        labels: ``(size,)``; by default 0, 1, 2, 3, 0, 1, ...
        dtype: type of images and floating-point fields.
        seed: of patterns and noise.

    Raises:
        ValueError: a needed field has no maker here yet.
    """
    draw = torch.Generator().manual_seed(seed)
    labels = torch.arange(size) % NUM_CLASSES if labels is None else labels
    patterns = torch.rand(NUM_CLASSES, CHANNELS, HEIGHT, WIDTH, generator=draw, dtype=torch.float64)

    def noise() -> Tensor:
        return torch.rand(size, CHANNELS, HEIGHT, WIDTH, generator=draw, dtype=torch.float64)

    index = torch.arange(size)
    if needs.modality == "text":
        return Batch(tuple(sentences(labels, draw) for _ in range(needs.views)), index)
    if needs.modality == "graph":
        return Batch((graphs(labels, draw, dtype),), index, {"label": labels} if "label" in needs.fields else {})
    if needs.modality == "interactions":
        chosen = EDGES.T[torch.randint(EDGES.shape[1], (size,), generator=draw)]
        return Batch((torch.cat([chosen, torch.full((size, 1), USERS + ITEMS - 1)], dim=1),), index)
    images = 0.5 * patterns[labels % NUM_CLASSES] + 0.3 * noise()
    if needs.recipe.startswith(DRAWING_RECIPES):
        views, parameters = _recipe_views(needs, images, index, seed)
        views = tuple(view.to(dtype) for view in views)
    else:
        views = tuple((images + 0.2 * noise()).to(dtype) for _ in range(needs.views))
        whole = {"box": torch.tensor([0.0, 0.0, 1.0, 1.0]).repeat(size, 1), "flip": torch.zeros(size)}
        parameters = tuple(dict(whole) for _ in range(needs.views))
    fields = {}
    for name in needs.fields:
        if name == "label":
            fields[name] = labels
        elif name in FIELD_MAKERS:
            fields[name] = FIELD_MAKERS[name](views[0], draw)
        elif name != "index":
            raise ValueError(f"no tiny batch can carry the field {name!r} yet: add it to FIELD_MAKERS")
    return Batch(views, index, fields, parameters)


def graphs(labels: Tensor, draw: torch.Generator, dtype: torch.dtype) -> Tensor:
    """Pictures ``(n, 1, NODES, 1 + FEATURES + NODES)``: rings with chords by class, random features, a node missing."""
    adjacency = torch.zeros(len(labels), NODES, NODES, dtype=dtype)
    node = torch.arange(NODES)
    adjacency[:, node, (node + 1) % NODES] = 1
    adjacency[torch.arange(len(labels)), labels % NUM_CLASSES, (labels % NUM_CLASSES + 2) % NODES] = 1
    features = torch.rand(len(labels), NODES, FEATURES, generator=draw, dtype=dtype)
    whole = Graphs(torch.ones(len(labels), NODES, dtype=torch.bool), features, adjacency)
    made = whole._replace(adjacency=(adjacency + adjacency.transpose(1, 2)).clamp_max(1))
    return pack(made.keep((node < NODES - 1) | (torch.rand(len(labels), 1, generator=draw) > 0.5)))


def sentences(labels: Tensor, draw: torch.Generator) -> Tensor:
    """Token ids ``(n, LENGTH)``: two words of the class, random ones, the last of some missing."""
    ids = torch.randint(1, VOCABULARY, (len(labels), LENGTH), generator=draw)
    ids[:, 0], ids[:, 1] = 1 + labels % NUM_CLASSES, 1 + NUM_CLASSES + labels % NUM_CLASSES
    ids[:, -1] *= torch.randint(0, 2, (len(labels),), generator=draw)
    return ids


def _recipe_views(
    needs: Needs, images: Tensor, index: Tensor, seed: int
) -> tuple[tuple[Tensor, ...], tuple[dict[str, Tensor], ...]]:
    """Views by the recipe itself, whose draws the objective uses; local crops are 4 x 4, puzzles have 3 x 3 tiles."""
    options = dict(needs.recipe_options)
    if needs.recipe.startswith("multicrop"):
        options |= {"global_size": 1.0, "local_size": 4 / HEIGHT, "blur": 0.0}
    make = make_views(needs.recipe, options)
    pixels = (255 * images).to(torch.uint8)
    made = [make(pixels, index, seed=seed, epoch=0, view=view) for view in range(needs.views)]
    return tuple(view.pixels for view in made), tuple(view.parameters for view in made)


def take(whole: Batch, rows: Tensor | slice) -> Batch:
    """Some samples of a batch, in the order of ``rows``."""
    return whole.rows(rows)


def part(whole: Batch, rank: int, world_size: int) -> Batch:
    """The ``rank``-th contiguous part of a batch, as the sampler deals it."""
    size = len(whole.index) // world_size
    return take(whole, slice(rank * size, (rank + 1) * size))
