"""The contract between an objective and the platform: what it needs, what it is given, what it returns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

# label, index: int64 (B,). quality: float32 (B,) in [0, 1]. pose: float32 (B, 2), yaw and pitch in degrees. mask: bool
# (B,), whether the face is masked. resolution: int64 (B,), pixels a side before upsampling. image_set, sequence, frame:
# int64 (B,). caption: int64 (B, length) token ids, 0 pads.
FIELDS = ("label", "index", "quality", "pose", "mask", "resolution", "image_set", "sequence", "frame", "caption")


@dataclass(frozen=True)
class Needs:
    """What the platform must provide; checked against the job, the data and the cluster before anything starts.

    Args:
        views: augmented versions of each image in a batch.
        recipe: the view recipe that ``views: auto`` selects.
        recipe_options: parameters of that recipe that the method fixes, e.g. ``{"local_crops": 6}``.
        fields: batch fields, a subset of :data:`FIELDS`; ``index`` is always there.
        sampler: ``random``; ``class_balanced`` batches of P classes with ``samples_per_class`` images each;
            ``image_sets``, batches of P classes with ``sets_per_class`` sets of ``samples_per_set`` images each.
        samples_per_class: the K of P x K batches; 0 with the other samplers.
        sets_per_class: sets of each class in a batch of sets.
        samples_per_set: images of each set.
        modality: what ``views`` are: images; ``image_text`` adds the field ``caption``; ``text`` token ids; ``graph``
            packed graphs; ``interactions`` triples of user, item and negative item.
        encoder: what of the encoder is used beside the embedding: ``maps`` (feature maps of its stages) or ``tokens``
            (patch tokens of a transformer); see :mod:`armillary.components.backbones`.
        components: modules or state it builds for itself, by name, for listings.
        batch_coupled: the loss of a sample depends on the others, so that accumulation would change it.
        graph: whether the dataset must say who is near whom; see :func:`armillary.data.relations.with_graph`.
    """

    views: int = 1
    recipe: str = "faces"
    recipe_options: Mapping[str, Any] = field(default_factory=dict)
    fields: tuple[str, ...] = ()
    sampler: Literal["random", "class_balanced", "image_sets"] = "random"
    samples_per_class: int = 0
    sets_per_class: int = 0
    samples_per_set: int = 0
    modality: Literal["image", "image_text", "text", "graph", "interactions"] = "image"
    encoder: Literal["any", "maps", "tokens"] = "any"
    components: tuple[str, ...] = ()
    batch_coupled: bool = False
    graph: bool = False

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

    ``views`` holds ``Needs.views`` tensors ``(batch, channels, height, width)`` in [0, 1], the large ones first where
    sizes differ; ``index`` the samples' positions in the training set's dataset, ``(batch,)`` int64; ``fields`` the
    declared extra columns, first dimension ``batch``. ``parameters`` holds what each view's recipe drew, one mapping a
    view: ``box (batch, 4)`` (x0, y0, x1, y1 of the crop as shares of the image), ``flip (batch,)`` and others by name.
    """

    views: tuple[Tensor, ...]
    index: Tensor
    fields: dict[str, Tensor] = field(default_factory=dict)
    parameters: tuple[dict[str, Tensor], ...] = ()

    def rows(self, rows: Tensor | slice) -> Batch:
        """Some samples of the batch, in the order of ``rows``."""
        return Batch(
            tuple(view[rows] for view in self.views),
            self.index[rows],
            {name: column[rows] for name, column in self.fields.items()},
            tuple({name: drawn[rows] for name, drawn in view.items()} for view in self.parameters),
        )

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


# A pass over this worker's part of the training set in order of ``index``, one unaugmented view, with the declared
# fields; the parts of all workers make up the whole set. Every call starts a new pass.
Samples = Callable[[], Iterator[Batch]]


class Hyperparameters(BaseModel):
    """Base of every objective's hyperparameters: frozen, unknown keys refused, defaults from the paper."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


@dataclass(frozen=True)
class BuildContext:
    """What an objective is told when it makes its modules.

    ``encoder`` maps images ``(batch, channels, height, width)`` in [0, 1] to embeddings ``(batch, embedding_dim)``.
    ``num_samples`` counts the training set; ``dataset_size`` is one more than the largest ``Batch.index``, the rows of
    a bank that is kept by index. ``class_counts (num_classes,)`` counts the training samples of each class. ``tables``
    are further tensors of the dataset by name (edges of a graph, token frequencies). ``seed`` is the run's.
    """

    encoder: nn.Module
    embedding_dim: int
    num_classes: int
    num_samples: int
    epochs: int = 1
    steps_per_epoch: int = 1
    batch_size: int = 64
    seed: int = 0
    dataset_size: int = 0
    in_channels: int = 1
    image_size: tuple[int, int] = (64, 64)
    class_counts: Tensor | None = None
    tables: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Convergence:
    """How the conformance suite shows that an objective learns: a short training on small data, on one core.

    The trained encoder must beat the untrained one, on people or images it has not seen, by ``margin`` in ``metric``;
    where ``falls`` is given, and for every method on images without labels, that must be lower in the last epoch than
    in the first that has it, and embeddings must not have collapsed.

    Args:
        dataset: an embedded dataset.
        metric: ``<protocol>/<metric>``.
        margin: how much better the trained encoder must be; a method that needs more than seconds of training states a
            smaller one and why in ``reason``.
        job: dotted overrides of the small preset, e.g. ``{"train.epochs": 12, "objective.temperature": 0.5}``.
        reason: why the margin is small, or the metric or what falls another.
        falls: ``loss``, or a metric of the objective where its loss need not fall, as one whose targets move. Empty:
            the loss of a method on images without labels; nothing is asked of others.
    """

    dataset: str = "identities_small"
    metric: str = "verification/auc"
    margin: float = 0.03
    job: Mapping[str, Any] = field(default_factory=dict)
    reason: str = ""
    falls: str = ""


class Objective(nn.Module):
    """A trainable recipe. Subclasses state the class attributes, ``build`` their modules, and define ``forward``.

    The module holds the whole training graph, encoder included, so that an engine wraps exactly one thing.
    ``waivers`` names checks of the conformance suite that cannot hold for the method, with the reason (``gradcheck``,
    or ``gradcheck[name-option=value]`` where only that case breaks it, ``gradcheck[option=value]`` for all cases in
    which the option has that value); ``convergence`` says how the suite shows that it learns. ``epoch`` and ``step``
    (over the whole run) count from 0 and are set by the platform before each forward pass, so that schedules are
    functions of them and resume by themselves.

    What a worker draws at random must depend on ``batch.index``, ``step`` and the seed alone
    (:mod:`armillary.components.counter`), and state that lasts (queues, centres, banks) is kept in buffers that are the
    same on every worker: then any number of workers computes the same.
    """

    name: ClassVar[str]
    family: ClassVar[str]
    catalog_id: ClassVar[str | None] = None
    citation: ClassVar[Citation]
    needs: ClassVar[Needs] = Needs()
    waivers: ClassVar[Mapping[str, str]] = {}
    convergence: ClassVar[Convergence] = Convergence()
    Hyperparameters: ClassVar[type[Hyperparameters]] = Hyperparameters

    def __init__(self, hyperparameters: BaseModel, context: BuildContext) -> None:
        super().__init__()
        self.epoch, self.step = 0, 0
        self.hyperparameters: Any = hyperparameters
        self.encoder = context.encoder
        self.build(context)

    @classmethod
    def needs_for(cls, hyperparameters: Any) -> Needs:  # noqa: ARG003
        """The needs under these hyperparameters; override where they change them."""
        return cls.needs

    def build(self, context: BuildContext) -> None:
        """Makes the objective's own modules; the encoder is already ``self.encoder``.

        It also runs on the device ``meta`` before a run starts, so that what it refuses is said then.

        Raises:
            UserError: a hyperparameter that does not fit the encoder or the data, and what they allow.
        """

    def forward(self, batch: Batch) -> Output:
        """The loss of this worker's part of the batch."""
        raise NotImplementedError(f"{type(self).__name__} does not define forward")

    def embed(self, images: Tensor) -> Tensor:
        """The embedding that is evaluated and exported, ``(batch, embedding_dim)``."""
        return self.encoder(images)  # type: ignore[no-any-return]

    def exported(self) -> nn.Module:
        """The module that is evaluated and kept after training: an encoder built as the job's backbone is.

        Methods with a teacher may return the teacher's encoder.
        """
        return self.encoder

    def before_epoch(self, epoch: int, samples: Samples) -> None:
        """Hook: runs on every worker before an epoch (clustering, bank refresh); ``samples`` passes over the data."""

    def after_step(self, step: int) -> None:
        """Hook: runs on every worker after an optimizer step (teacher, queue, centre)."""

    def pictures(self, images: Tensor) -> dict[str, Tensor]:
        """Pictures that show what the method has learned, kept with the run; called when training has ended.

        Args:
            images: some that were not trained on, ``(n, channels, height, width)`` in [0, 1].

        Returns:
            By a name fit for a file, ``(rows, columns, channels, height, width)`` in [0, 1].
        """
        return {}

    def epoch_metrics(self) -> dict[str, Tensor]:
        """Detached scalars that describe the epoch that ended, equal on all workers (collapse, entropy)."""
        return {}
