"""The contract between an objective and the platform: what it needs, what it is given, what it returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

FIELDS = ("label", "index", "quality", "pose", "low_res", "mask", "image_set", "caption", "graph")


@dataclass(frozen=True)
class Needs:
    """What the platform must provide; checked against the job, the data and the cluster before anything starts.

    Args:
        views: augmented versions of each image in a batch.
        recipe: the view recipe that ``views: auto`` selects.
        fields: batch fields, a subset of :data:`FIELDS`; ``index`` is always there.
        sampler: ``random``, or ``class_balanced`` batches of P classes with ``samples_per_class`` images each.
        samples_per_class: the K of P x K batches; 0 with the random sampler.
        components: modules or state it builds for itself, by name, for listings.
        batch_coupled: the loss of a sample depends on the others, so that accumulation would change it.
    """

    views: int = 1
    recipe: str = "faces"
    fields: tuple[str, ...] = ()
    sampler: Literal["random", "class_balanced"] = "random"
    samples_per_class: int = 0
    components: tuple[str, ...] = ()
    batch_coupled: bool = False

    def __post_init__(self) -> None:
        unknown = set(self.fields) - set(FIELDS)
        if unknown:
            raise ValueError(f"unknown batch fields {sorted(unknown)}; known: {', '.join(FIELDS)}")

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for ``--json``."""
        return asdict(self)


@dataclass(frozen=True)
class Citation:
    """Where an objective comes from."""

    authors: str
    title: str
    year: int | None = None
    venue: str | None = None
    url: str | None = None


@dataclass
class Batch:
    """One worker's part of a global batch, on the training device.

    ``views`` holds ``Needs.views`` tensors ``(batch, channels, height, width)`` in [0, 1]; ``index`` the samples'
    positions in the dataset, ``(batch,)`` int64; ``fields`` the declared extra columns, first dimension ``batch``.
    """

    views: tuple[Tensor, ...]
    index: Tensor
    fields: dict[str, Tensor] = field(default_factory=dict)

    @property
    def label(self) -> Tensor:
        """Class labels ``(batch,)`` int64, counted from 0 over the training classes."""
        return self.fields["label"]


@dataclass
class Output:
    """What one forward pass returns.

    ``loss`` is a scalar whose mean over workers is the loss of the global batch; ``metrics`` are detached scalars,
    logged as their mean over steps and workers.
    """

    loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


class Hyperparameters(BaseModel):
    """Base of every objective's hyperparameters: frozen, unknown keys refused, defaults from the paper."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


@dataclass(frozen=True)
class BuildContext:
    """What an objective is told when it makes its modules.

    ``encoder`` maps images ``(batch, channels, height, width)`` in [0, 1] to embeddings ``(batch, embedding_dim)``.
    """

    encoder: nn.Module
    embedding_dim: int
    num_classes: int
    num_samples: int
    epochs: int = 1
    steps_per_epoch: int = 1


class Objective(nn.Module):
    """A trainable recipe. Subclasses state the class attributes, ``build`` their modules, and define ``forward``.

    The module holds the whole training graph, encoder included, so that an engine wraps exactly one thing.
    ``waivers`` names checks of the conformance suite that cannot hold for the method, with the reason.
    """

    name: ClassVar[str]
    family: ClassVar[str]
    catalog_id: ClassVar[str | None] = None
    citation: ClassVar[Citation]
    needs: ClassVar[Needs] = Needs()
    waivers: ClassVar[Mapping[str, str]] = {}
    Hyperparameters: ClassVar[type[Hyperparameters]] = Hyperparameters

    def __init__(self, hyperparameters: BaseModel, context: BuildContext) -> None:
        super().__init__()
        self.hyperparameters: Any = hyperparameters
        self.encoder = context.encoder
        self.build(context)

    @classmethod
    def needs_for(cls, hyperparameters: Any) -> Needs:  # noqa: ARG003
        """The needs under these hyperparameters; override where they change them."""
        return cls.needs

    def build(self, context: BuildContext) -> None:
        """Makes the objective's own modules; the encoder is already ``self.encoder``."""

    def forward(self, batch: Batch) -> Output:
        """The loss of this worker's part of the batch."""
        raise NotImplementedError(f"{type(self).__name__} does not define forward")

    def embed(self, images: Tensor) -> Tensor:
        """The embedding that is evaluated and exported, ``(batch, embedding_dim)``."""
        return self.encoder(images)  # type: ignore[no-any-return]

    def before_epoch(self, epoch: int) -> None:
        """Hook: runs on every worker before an epoch (clustering, bank refresh)."""

    def after_step(self, step: int) -> None:
        """Hook: runs on every worker after an optimizer step (teacher, queue)."""
