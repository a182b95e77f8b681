"""What a user writes: the six kinds of job, typed, with every default visible.

Models are frozen and refuse unknown keys. Names that other layers own (objectives, backbones, datasets, protocols,
view recipes) are plain strings here; ``armillary.training.preflight`` checks them before anything starts.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from armillary.spec.section import OpenSection, Section

__all__ = [
    "BackboneSpec",
    "ChainJob",
    "ChainStep",
    "ClusterSpec",
    "DataSpec",
    "EvaluateJob",
    "EvaluateSpec",
    "GateMetric",
    "Job",
    "Kinds",
    "ObjectiveSpec",
    "OpenSection",
    "OptimizerSpec",
    "RegressionEntry",
    "RegressionJob",
    "Scalar",
    "Section",
    "StudyJob",
    "StudyVariant",
    "SweepJob",
    "TermSpec",
    "TrackingSpec",
    "TrainJob",
    "TrainSpec",
    "ViewsSpec",
]

Scalar = bool | int | float | str | None


class DataSpec(Section):
    """Which images, how they are split, and how large they enter the network."""

    name: str = Field("orl", description="a dataset in the store, or the path or s3:// URL of one")
    split: Literal["identity", "sample"] = Field(
        "identity",
        description="identity: evaluated classes are never trained on (open set); sample: classes are shared",
    )
    fold: int = Field(0, ge=0, description="which of the dataset's folds is held out")
    holdout: Literal["test", "validation"] = Field(
        "test",
        description="evaluated on: the fold's test part, or a part of its training classes (for tuning)",
    )
    image_size: tuple[int, int] | None = Field(
        None, description="height and width in pixels; null keeps the stored size"
    )
    text: str = Field("caption", min_length=1, description="the column that objectives on text read")
    label_noise: float = Field(0.0, ge=0, le=1, description="share of training labels replaced by random ones")
    labeled_share: float = Field(
        1.0,
        gt=0,
        le=1,
        description="share of each training class whose labels are known, at least one image; others are not used",
    )
    load: Literal["auto", "memory", "stream"] = Field(
        "auto",
        description="memory: decoded once, shared by the workers of a node; stream: read from the store in training; "
        "auto: memory up to 4 GiB decoded",
    )
    buffer: int = Field(
        16384, ge=1, description="stream: images of a window that is shuffled; memory holds their bytes"
    )


class ViewsSpec(OpenSection):
    """A view recipe by name; other keys override the recipe's parameters."""

    name: str = Field("auto", description="a recipe; auto takes what the objective asks for")


class BackboneSpec(OpenSection):
    """The network from image to embedding; keys beside these are options of the named backbone."""

    name: str = Field(
        "small_convnet",
        description="small_convnet, small_vit, pixels, timm/<model>; text_transformer, word_vectors, gin; auto: a "
        "small one that fits the objective",
    )
    embedding_dim: int = Field(128, ge=2, le=65536, description="width of the embedding")
    tail: tuple[Annotated[int, Field(ge=2, le=65536)], ...] = Field(
        (),
        max_length=8,
        description="widths of layers (linear, batch norm, ReLU) behind the embedding, which is then the last one's; "
        "with train.init_from they start as the first layers of that run's projector",
    )

    @property
    def output_dim(self) -> int:
        """Width of what is compared: that of the tail, where there is one."""
        return self.tail[-1] if self.tail else self.embedding_dim


class TermSpec(OpenSection):
    """A regularizer on the objective's embeddings, by its name; other keys are its hyperparameters."""

    weight: float = Field(gt=0, le=1e6, description="its weight beside the objective's loss")


class ObjectiveSpec(OpenSection):
    """An objective by its registered name; other keys are its hyperparameters."""

    terms: tuple[TermSpec, ...] = Field(
        (), description="regularizers added to the loss; armillary objectives list --terms"
    )


class OptimizerSpec(Section):
    """The optimizer and the shape of its learning rate."""

    name: Literal["adamw", "adam", "sgd"] = "adamw"
    lr: float = Field(2e-3, gt=0, le=100, description="peak learning rate")
    weight_decay: float = Field(0.05, ge=0, le=10, description="not applied to biases, norms and scalars")
    momentum: float = Field(0.9, ge=0, lt=1, description="sgd only")
    betas: tuple[float, float] = Field((0.9, 0.999), description="adam and adamw only")
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    layer_decay: float = Field(
        1.0,
        gt=0,
        le=1,
        description="each layer of the backbone learns this much slower than the one above; fine-tuning: 0.65 to 0.9",
    )
    warmup_epochs: float = Field(2.0, ge=0, description="linear warm-up from zero")
    final_lr_ratio: float = Field(0.01, ge=0, le=1, description="cosine ends at this share of lr")
    step_epochs: tuple[int, ...] = Field((), description="step: epochs after which lr is multiplied by step_factor")
    step_factor: float = Field(0.1, gt=0, le=1)


class TrainSpec(Section):
    """How long, how wide, how precise."""

    epochs: int = Field(40, ge=0, le=100_000, description="0 evaluates the untrained network")
    batch_size: int = Field(64, ge=1, description="images per optimizer step, over all workers")
    workers: int = Field(1, ge=1, le=4096, description="Ray Train workers")
    threads: int | None = Field(None, ge=1, description="torch threads a worker; null shares the node's cores")
    gpus_per_worker: float = Field(0, ge=0)
    zero: Literal[0, 1, 2, 3] = Field(0, description="DeepSpeed ZeRO stage")
    precision: Literal["float32", "bf16"] = Field("float32", description="bf16: autocast, master weights stay float32")
    accumulate: int = Field(1, ge=1, description="micro-batches per optimizer step; must divide batch_size / workers")
    clip_norm: float = Field(0.0, ge=0, description="global gradient norm; 0 switches clipping off")
    sample_rate: float = Field(
        1.0, gt=0, le=1, description="share of a class head's rows that a step touches, all of the batch's among them"
    )
    checkpoint_every: int = Field(5, ge=0, description="epochs between checkpoints; 0 keeps only the last")
    keep_checkpoints: int = Field(2, ge=1)
    init_from: str | None = Field(None, description="a finished run whose encoder training starts from")
    deepspeed: dict[str, Any] = Field(default_factory=dict, description="raw DeepSpeed settings, merged last")


class EvaluateSpec(Section):
    """How the embeddings are judged."""

    protocols: tuple[str, ...] = Field(("verification", "identification"), description="evaluation protocols")
    every: int = Field(0, ge=0, description="epochs between evaluations; 0 evaluates at the end only")
    batch_size: int = Field(256, ge=1)
    flip: bool = Field(False, description="average the embedding with that of the mirrored image")


class TrackingSpec(Section):
    """Where runs are recorded."""

    uri: str | None = Field(None, description="MLflow tracking URI; null uses SQLite in the Armillary home")
    experiment: str = Field("armillary", min_length=1)


class ClusterSpec(Section):
    """Which Ray cluster does the work."""

    address: str | None = Field(None, description="Ray address (ray://host:port or auto); null starts a local one")


class TrainJob(Section):
    """One training of one configuration with one seed."""

    kind: Literal["train"] = "train"
    name: str = Field("train", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=80)
    data: DataSpec = DataSpec()
    views: ViewsSpec = ViewsSpec()
    backbone: BackboneSpec = BackboneSpec()
    objective: ObjectiveSpec
    optimizer: OptimizerSpec = OptimizerSpec()
    train: TrainSpec = TrainSpec()
    evaluate: EvaluateSpec = EvaluateSpec()
    tracking: TrackingSpec = TrackingSpec()
    cluster: ClusterSpec = ClusterSpec()
    seed: int = Field(0, ge=0, lt=2**31)


class SweepJob(Section):
    """A base job, a search space and a budget."""

    kind: Literal["sweep"]
    name: str = Field("sweep", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=80)
    base: TrainJob = Field(description="a train job, or the path of one relative to this file")
    set: dict[str, Any] = Field(
        default_factory=dict, description="dotted overrides of the base job; loading applies them and empties this"
    )
    space: str | dict[str, Any] = Field(
        description="a name in search_spaces/, a path, or ranges written here; loading reads the ranges in"
    )
    metric: str = Field("verification/auc")
    direction: Literal["max", "min"] = "max"
    trials: int = Field(16, ge=1)
    concurrent: int = Field(2, ge=1, description="trials at a time, each on its own crew")
    sampler: Literal["tpe", "random", "nsga2"] = "tpe"
    population: int = Field(8, ge=2, le=1000, description="nsga2: trials of a generation")
    startup_trials: int = Field(4, ge=0, description="random trials before the sampler models anything")
    scheduler: Literal["asha", "none"] = "asha"
    grace_epochs: int = Field(10, ge=1, description="asha: epochs before a trial may be stopped")
    reduction: int = Field(2, ge=2, description="asha: one trial in this many survives a rung")
    storage: str | None = Field(None, description="Optuna storage URL; null is SQLite in the Armillary home")
    seed: int = Field(0, ge=0, lt=2**31)


class StudyVariant(Section):
    """One row of a study: a name and what it changes in the base job."""

    name: str = Field(min_length=1)
    set: dict[str, Any] = Field(default_factory=dict, description="dotted overrides of the base job")


class StudyJob(Section):
    """A fixed matrix of runs, variants x folds x seeds, that answers a question with a report."""

    kind: Literal["study"]
    name: str = Field("study", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=80)
    question: str = ""
    base: TrainJob = Field(description="a train job, or the path of one relative to this file")
    set: dict[str, Any] = Field(
        default_factory=dict, description="dotted overrides of the base job; loading applies them and empties this"
    )
    variants: tuple[StudyVariant, ...] = Field(min_length=1)
    folds: tuple[int, ...] = Field((0,), min_length=1)
    seeds: tuple[int, ...] = Field((0, 1), min_length=1)
    concurrent: int = Field(2, ge=1)
    compare: tuple[str, str] | None = Field(None, description="two variants whose paired difference the report states")
    metrics: tuple[str, ...] = Field(
        ("verification/auc", "verification/tar_at_far_1e-2"),
        min_length=1,
        description="what the report ranks by (the first) and compares",
    )
    against: tuple[str, str] | None = Field(None, description="two metrics to plot, a point for each variant")
    axis: str | None = Field(
        None, description="a dotted key with a number, e.g. data.label_noise, over which the report plots the variants"
    )


class ChainStep(Section):
    """One run of a chain: a name and what it changes in the base job.

    The value ``step:NAME`` stands for the run of an earlier step, e.g. ``train.init_from: step:pretrain``.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=80)
    set: dict[str, Any] = Field(default_factory=dict, description="dotted overrides of the base job")


class ChainJob(Section):
    """Runs one after the other, each of which may begin with what an earlier one has left."""

    kind: Literal["chain"]
    name: str = Field("chain", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=80)
    base: TrainJob = Field(description="a train job, or the path of one relative to this file")
    set: dict[str, Any] = Field(
        default_factory=dict, description="dotted overrides of the base job; loading applies them and empties this"
    )
    steps: tuple[ChainStep, ...] = Field(min_length=1)


class EvaluateJob(Section):
    """Judge a finished run again, or embeddings made elsewhere."""

    kind: Literal["evaluate"]
    name: str = Field("evaluate", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=80)
    run: str | None = Field(None, description="a run id")
    embeddings: str | None = Field(None, description="an .npz or .parquet file with embeddings and labels")
    protocols: tuple[str, ...] = ("verification", "identification")

    @model_validator(mode="after")
    def _one_subject(self) -> EvaluateJob:
        if (self.run is None) == (self.embeddings is None):
            raise ValueError("give exactly one of run and embeddings")
        return self


class GateMetric(Section):
    """A metric that must not get worse."""

    name: str
    direction: Literal["higher", "lower"] = Field("higher", description="which way is better")
    tolerance: float = Field(0.0, ge=0, description="a worsening up to this much is no alarm")


class RegressionEntry(Section):
    """One job of a regression list."""

    job: TrainJob = Field(description="a train job, or the path of one relative to this file")
    set: dict[str, Any] = Field(default_factory=dict, description="dotted overrides of that job")
    name: str | None = None


class RegressionJob(Section):
    """Jobs that are run again on a schedule and compared with their blessed baseline."""

    kind: Literal["regression"]
    name: str = Field("regression", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=80)
    jobs: tuple[RegressionEntry, ...] = Field(min_length=1)
    seeds: tuple[int, ...] = Field((0, 1, 2), min_length=1)
    metrics: tuple[GateMetric, ...] = Field(min_length=1)
    confidence: float = Field(0.95, gt=0.5, lt=1)
    schedule: str | None = Field(None, description="cron line, five fields, local time")
    concurrent: int = Field(2, ge=1)
    owner: str = ""


Job = Annotated[TrainJob | SweepJob | StudyJob | ChainJob | EvaluateJob | RegressionJob, Field(discriminator="kind")]


class Kinds:
    """The job model of each kind."""

    MODELS: ClassVar[dict[str, type[Section]]] = {
        "train": TrainJob,
        "sweep": SweepJob,
        "study": StudyJob,
        "chain": ChainJob,
        "evaluate": EvaluateJob,
        "regression": RegressionJob,
    }
