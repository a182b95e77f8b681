"""Self-distillation without prototypes and with them: BYOL, SimSiam, DINO, and what the methods on patches build on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from armillary.components.attention import attention_pictures
from armillary.components.center import Center
from armillary.components.collapse import CollapseMonitor
from armillary.components.heads import DINOHead, Projector
from armillary.components.schedules import Schedule
from armillary.components.teacher import Teacher
from armillary.components.transformers import TransformerEncoder
from armillary.losses import self_distillation as losses
from armillary.losses.center_residual import center_and_residual, de_centering
from armillary.objectives import base
from armillary.objectives.base import Batch, BuildContext, Citation, Convergence, Needs, Output
from armillary.objectives.bases import Export, Exports, ProjectedViewsObjective
from armillary.objectives.registry import register

DETACHED = {"gradcheck": "the teacher sees the same images and passes no gradient"}
# What suits small images and hundreds of steps.
SMALL_JOB: Mapping[str, Any] = {
    "views.name": "multicrop_small",
    "views.local_crops": 2,
    "objective.local_crops": 2,
    "objective.momentum": 0.9,
    "objective.prototypes": 256,
    "objective.head_hidden": 128,
    "objective.bottleneck": 64,
    "objective.teacher_warmup_epochs": 0,
    "objective.teacher_temperature": 0.05,
}
# And what lets a transformer learn from digits in seconds: whole strokes in every crop, centre and teacher that do not
# chase each other (a centre as slow as the teacher makes both swing).
SMALL_TOKENS_JOB: Mapping[str, Any] = {
    **SMALL_JOB,
    "data.split": "sample",
    "data.image_size": [16, 16],
    "views.flip": 0,
    "views.saturation": 0,
    "views.hue": 0,
    "views.gray_p": 0,
    "views.solarize": 0,
    "views.global_scale": [0.5, 1.0],
    "views.local_scale": [0.3, 0.6],
    "backbone.patch": 4,
    "backbone.pool": "mean",
    "backbone.width": 64,
    "backbone.heads": 2,
    "backbone.depth": 2,
    "objective.prototypes": 64,
    "objective.momentum": 0.96,
    "objective.center_momentum": 0.5,
    "objective.teacher_temperature": 0.02,
    "optimizer.lr": 4e-3,
    "train.epochs": 6,
}


# Why the loss need not fall where a centre keeps the teacher from collapsing.
MOVING_TARGETS = (
    "in so few steps the teacher's answers grow softer, nearly even over the prototypes, and a cross-entropy cannot be "
    "below the entropy of its targets, so that another part of the loss must fall; three seeds gained "
)


def small_tokens(margin: float, falls: str, reason: str = "", **changes: Any) -> Convergence:
    """That preset, judged by nearest neighbours, with changes, e.g. ``train__epochs=5``."""
    job = {**SMALL_TOKENS_JOB, **{name.replace("__", "."): value for name, value in changes.items()}}
    return Convergence("digits", "knn/top1", margin, job, reason, falls)


def momentum_schedule(start: float, context: BuildContext) -> Schedule:
    """BYOL's: half a cosine from ``start`` to 1 over the run's steps."""
    return Schedule(start, 1.0, context.epochs * context.steps_per_epoch)


@register
class BYOL(Exports, ProjectedViewsObjective):
    """BYOL: a predictor on one view's projection meets the other view's, as a moving average of the network has it.

    Grill et al. 2020, equations 1 and 2 and section 3.3; projector and predictor are two layers with batch norm between
    and no bias behind, as in the released code. All views pass the network in one batch, whose statistics batch norm
    takes; the released code passes them one after the other. The teacher's batch norm keeps statistics of its own.
    """

    name = "byol"
    family = "self_distillation"
    catalog_id = "byol"
    citation = Citation(
        "Jean-Bastien Grill, Florian Strub, Florent Altché, Corentin Tallec, Pierre H. Richemond, et al.",
        "Bootstrap Your Own Latent: A New Approach to Self-Supervised Learning",
        2020,
        "NeurIPS",
        "https://arxiv.org/abs/2006.07733",
    )
    needs = Needs(views=2, recipe="byol", components=("projector", "predictor", "teacher"), batch_coupled=True)
    waivers: ClassVar[Mapping[str, str]] = DETACHED
    projector_last_norm = False
    convergence = Convergence(
        margin=0.02,
        reason="a few hundred steps; three seeds gained 0.050, 0.085 and -0.020, the last from the best start",
        job={
            "objective.momentum": 0.9,
            "objective.projection_hidden": 256,
            "objective.projection_dim": 64,
            "optimizer.lr": 5e-3,
            "train.epochs": 18,
            "views.blur": 0.0,
            "views.crop_scale": [0.2, 1.0],
        },
    )

    class Hyperparameters(base.Hyperparameters):
        """The teacher's momentum and the shapes of projector and predictor."""

        momentum: float = Field(
            0.996, ge=0, le=1, description="of the teacher at the start; 0.99 for 300 epochs, 0.9 for hundreds of steps"
        )
        projection_hidden: int = Field(4096, ge=2, le=65536, description="width inside projector and predictor")
        projection_dim: int = Field(256, ge=2, le=8192, description="width of projection and prediction")
        projection_layers: int = Field(2, ge=1, le=8, description="linear layers of the projector")
        predictor_layers: int = Field(2, ge=1, le=8, description="linear layers of the predictor")
        export: Export = Field("student", description="whose encoder is evaluated and kept")
        formulation: Literal["paper", "survey"] = Field("paper", description="survey: raw vectors, not unit ones")

    def build(self, context: BuildContext) -> None:
        """Makes projector, predictor, teacher and loss."""
        super().build(context)
        options = self.hyperparameters
        width = options.projection_dim
        self.predictor = Projector(width, options.projection_hidden, width, options.predictor_layers)
        self.teacher = Teacher(self, ("encoder", "projector"), momentum_schedule(options.momentum, context))
        self.loss = losses.BYOL(options.formulation)
        self.collapse = CollapseMonitor()

    def forward(self, batch: Batch) -> Output:
        """Both views as question and as answer."""
        target1, target2 = self.teacher(torch.cat(batch.views)).chunk(2)
        embeddings = self.encoder(torch.cat(batch.views))
        projections = self.projector(embeddings)
        self.collapse.update(embeddings, projections)
        prediction1, prediction2 = self.predictor(projections).chunk(2)
        loss = self.loss(prediction1, target2, prediction2, target1)
        cosine = 1 - losses.cosine_distance(prediction1, target2).mean()
        return Output(loss, {"prediction_cosine": cosine.detach()})

    def after_step(self, step: int) -> None:
        """Moves the teacher."""
        self.teacher.update(self, step)

    def epoch_metrics(self) -> dict[str, Tensor]:
        """Whether the embedding has collapsed."""
        return self.collapse.metrics()


@register
class SimSiam(ProjectedViewsObjective):
    """SimSiam: BYOL without the teacher; predictor and stop-gradient alone keep it from collapsing.

    Chen and He 2021, section 3. Views pass the network in one batch, see BYOL. The paper keeps the predictor's learning
    rate constant while the rest decays; here all parameters share the job's schedule.

    Predictor and gradients are switches of the study of why it does not collapse (Zhang et al., "How Does SimSiam
    Avoid Collapse Without Negative Samples?", ICLR 2022), which also says what the logged shares mean: a projection of
    unit length is ``z = o + r`` with o the batch's mean; ``center_share`` is ``|o|``, 1 after a collapse,
    ``residual_share`` the mean ``|r|``. ``de_centering`` is the cosine between the centre of the predictor's extra
    gradient ``z - p`` and that of the predictions p: where it is negative, the predictor pushes embeddings away from
    their common centre. (That split is re-derived from the paper's summary, not read off its equations.)
    """

    name = "simsiam"
    family = "self_distillation"
    catalog_id = "simsiam"
    citation = Citation(
        "Xinlei Chen, Kaiming He",
        "Exploring Simple Siamese Representation Learning",
        2021,
        "CVPR",
        "https://arxiv.org/abs/2011.10566",
    )
    needs = Needs(views=2, recipe="moco_v2", components=("projector", "predictor"), batch_coupled=True)
    waivers: ClassVar[Mapping[str, str]] = {"gradcheck": "the other view's projection is a constant"}
    convergence = Convergence(
        job={
            "objective.projection_dim": 128,
            "objective.projection_hidden": 128,
            "objective.predictor_hidden": 32,
            "views.blur": 0.0,
        }
    )

    class Hyperparameters(base.Hyperparameters):
        """Shapes of projector and predictor, and the switches of the collapse study."""

        projection_dim: int = Field(2048, ge=2, le=8192, description="width of the projection")
        projection_hidden: int = Field(2048, ge=2, le=65536, description="width inside the projector")
        projection_layers: int = Field(3, ge=1, le=8, description="linear layers of the projector; 2 on small images")
        predictor_hidden: int = Field(512, ge=2, le=65536, description="the predictor's bottleneck, a quarter of dim")
        # No Literal: the suite would ask of each kind what rounding before batch norms spoils for some in float32.
        predictor: str = Field(
            "mlp",
            pattern="^(mlp|linear|bias|none)$",
            description="mlp: the paper's; linear: one layer; bias: adds a learned vector; none: collapses",
        )
        target_gradient: float = Field(0.0, ge=0, le=1, description="1 takes the stop-gradient away: collapses")
        prediction_gradient: float = Field(1.0, ge=0, le=1, description="0 stops the gradient on the wrong side")

    def build(self, context: BuildContext) -> None:
        """Makes projector, predictor and loss; the projector's last batch norm has neither scale nor shift."""
        options = self.hyperparameters
        width = options.projection_dim
        self.projector = Projector(
            context.embedding_dim,
            options.projection_hidden,
            width,
            options.projection_layers,
            last_norm=True,
            last_scale=False,
        )
        self.predictor = make_predictor(options.predictor, width, options.predictor_hidden)
        self.loss = losses.SimSiam(options.target_gradient, options.prediction_gradient)
        self.collapse = CollapseMonitor(centred=True)

    def forward(self, batch: Batch) -> Output:
        """Both views as question and as answer."""
        embeddings = self.encoder(torch.cat(batch.views))
        projections = self.projector(embeddings)
        self.collapse.update(embeddings, projections)
        predictions = self.predictor(projections)
        (projection1, projection2), (prediction1, prediction2) = projections.chunk(2), predictions.chunk(2)
        loss = self.loss(prediction1, projection2, prediction2, projection1)
        parts = center_and_residual(projections)
        metrics = {
            "center_share": parts.center_share,
            "residual_share": parts.residual_share,
            "de_centering": de_centering(projections, predictions),
        }
        return Output(loss, metrics)

    def epoch_metrics(self) -> dict[str, Tensor]:
        """Whether the embedding has collapsed."""
        return self.collapse.metrics()


class AddedBias(nn.Module):
    """``x + b`` with a learned ``b (dim,)``."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(0.02 * torch.randn(dim))

    def forward(self, vectors: Tensor) -> Tensor:
        """Shifts vectors ``(batch, dim)``."""
        return vectors + self.bias


def make_predictor(kind: str, width: int, hidden: int) -> nn.Module:
    """A predictor of the collapse study: ``mlp``, ``linear``, ``bias`` or ``none``."""
    if kind == "mlp":
        return Projector(width, hidden, width, layers=2, last_bias=True)
    if kind == "linear":
        return nn.Linear(width, width)
    return AddedBias(width) if kind == "bias" else nn.Identity()


class PrototypeHyperparameters(base.Hyperparameters):
    """What DINO and the methods built on it share."""

    momentum: float = Field(0.996, ge=0, le=1, description="of the teacher at the start; 0.9 for hundreds of steps")
    prototypes: int = Field(65536, ge=2, le=262144, description="K, outputs of the head; 256 to 1024 on small data")
    head_hidden: int = Field(2048, ge=2, le=8192, description="width inside the head")
    head_layers: int = Field(3, ge=1, le=8, description="linear layers of the head before its prototypes")
    bottleneck: int = Field(256, ge=2, le=4096, description="width in front of the prototypes")
    student_temperature: float = Field(0.1, ge=0.01, le=1, description="tau_s")
    teacher_temperature: float = Field(0.07, ge=0.005, le=1, description="tau_t in the end; above 0.07 unstable")
    teacher_temperature_start: float = Field(0.04, ge=0.005, le=1, description="tau_t in the first epoch")
    teacher_warmup_epochs: int = Field(30, ge=0, le=1000, description="epochs of the teacher temperature's linear way")
    center_momentum: float = Field(0.9, ge=0, le=1, description="m_c, share of the old centre that a step keeps")
    frozen_epochs: int = Field(1, ge=0, le=100, description="epochs in which the prototypes stay as they are")
    local_crops: int = Field(8, ge=0, le=20, description="M, small crops beside the two large ones")
    export: Export = Field("teacher", description="whose encoder is evaluated and kept")


class PrototypeDistillation(Exports):
    """DINO's frame: head and teacher, two temperatures, a centre, and the loss between views.

    Subclasses add modules in :meth:`add_parts` and name those that the teacher copies in :meth:`parts`.
    """

    family = "self_distillation"
    waivers: ClassVar[Mapping[str, str]] = {
        **DETACHED,
        "every_parameter_learns": "prototypes stand still in the first epoch; without masks a mask token is idle",
    }

    @classmethod
    def needs_for(cls, hyperparameters: PrototypeHyperparameters) -> Needs:
        """Two large crops and ``local_crops`` small ones."""
        return with_local_crops(cls.needs, hyperparameters.local_crops)

    def build(self, context: BuildContext) -> None:
        """Makes head, teacher, centre, loss and collapse monitor."""
        options = self.hyperparameters
        self.seed = context.seed
        self.head = self.make_head(context)
        self.add_parts(context)
        self.teacher = Teacher(self, self.parts(), momentum_schedule(options.momentum, context))
        self.center = Center(options.prototypes, options.center_momentum)
        self.image_loss = losses.CrossViewEntropy(options.student_temperature)
        self.collapse = CollapseMonitor()

    def make_head(self, context: BuildContext) -> DINOHead:
        """A head on embeddings."""
        options = self.hyperparameters
        return DINOHead(
            context.embedding_dim, options.prototypes, options.head_hidden, options.bottleneck, options.head_layers
        )

    def add_parts(self, context: BuildContext) -> None:
        """Makes what is there beside the head, before the teacher is; by default nothing."""

    def parts(self) -> tuple[str, ...]:
        """Names of the modules that the teacher copies."""
        return ("encoder", "head")

    def after_step(self, step: int) -> None:
        """Moves centre and teacher."""
        self.center.update()
        self.teacher.update(self, step)

    def epoch_metrics(self) -> dict[str, Tensor]:
        """Whether embedding or prototypes have collapsed."""
        return self.collapse.metrics()

    def pictures(self, images: Tensor) -> dict[str, Tensor]:
        """``attention``: what the exported transformer looks at (DINO's figure 1); a row an image, a column a head.

        Convolutional networks have none.
        """
        encoder = self.exported()
        return {"attention": attention_pictures(encoder, images)} if isinstance(encoder, TransformerEncoder) else {}

    @property
    def teacher_temperature(self) -> float:
        """tau_t in this epoch: even steps from the first to the last epoch of the warm-up, both included."""
        options = self.hyperparameters
        start, end = options.teacher_temperature_start, options.teacher_temperature
        return Schedule(start, end, options.teacher_warmup_epochs - 1, "linear")(self.epoch)

    @property
    def frozen(self) -> bool:
        """Whether the prototypes stand still in this epoch."""
        return bool(self.epoch < self.hyperparameters.frozen_epochs)

    def image_targets(self, logits: Tensor) -> Tensor:
        """Targets of the teacher's logits ``(G, B, K)`` against the centre of earlier steps."""
        self.center.hold(self.step, logits)
        return self.watched(losses.centered_targets(logits, self.center.value, self.teacher_temperature))

    def watched(self, targets: Tensor) -> Tensor:
        """The targets, counted for the collapse metrics."""
        self.collapse.update_assignments(targets.flatten(0, -2))
        return targets

    def local_logits(self, views: tuple[Tensor, ...]) -> Tensor:
        """What the student says of the small crops, ``(M * B, K)``."""
        logits: Tensor = self.head(self.encoder(torch.cat(views)), self.frozen)
        return logits


def with_local_crops(needs: Needs, local_crops: int) -> Needs:
    """The needs of a multi-crop method with that many small crops."""
    return replace(needs, views=2 + local_crops, recipe_options={"local_crops": local_crops})


def target_entropy(targets: Tensor) -> Tensor:
    """Mean entropy of targets ``(..., K)``: the least value that a cross-entropy with them can take."""
    entropy: Tensor = torch.special.entr(targets).sum(dim=-1).mean()
    return entropy


@register
class DINO(PrototypeDistillation):
    """DINO: the student says of every crop what its moving average says of the other large crops.

    Caron et al. 2021, equations 1 to 4. The centre is that of the steps before; the prototypes have unit length
    (the paper's ``norm_last_layer``) and stand still in the first epoch. The head sees the embedding that is evaluated.
    The survey prints the cross-entropy of two views alone; without centre, sharper teacher and stop-gradient, which it
    leaves out, the method collapses, so that there is nothing to select.
    """

    name = "dino"
    catalog_id = "dino"
    citation = Citation(
        "Mathilde Caron, Hugo Touvron, Ishan Misra, Hervé Jégou, Julien Mairal, Piotr Bojanowski, Armand Joulin",
        "Emerging Properties in Self-Supervised Vision Transformers",
        2021,
        "ICCV",
        "https://arxiv.org/abs/2104.14294",
    )
    needs = Needs(
        views=10, recipe="multicrop", recipe_options={"local_crops": 8}, components=("projector", "teacher", "center")
    )
    # A centre that lags behind the teacher makes its answers swing between few prototypes and all alike.
    convergence = Convergence(
        job={
            **SMALL_JOB,
            "backbone.pool": "mean",
            "objective.center_momentum": 0.5,
            "objective.teacher_temperature": 0.03,
        }
    )

    class Hyperparameters(PrototypeHyperparameters):
        """DINO's are those of its frame."""

    def forward(self, batch: Batch) -> Output:
        """The loss of all pairs of a large crop and another crop."""
        large, small = torch.cat(batch.views[:2]), batch.views[2:]
        targets = self.image_targets(self.teacher(large).unflatten(0, (2, -1)))
        embeddings = self.encoder(large)
        self.collapse.update(embeddings)
        logits = self.head(embeddings, self.frozen)
        if small:
            logits = torch.cat([logits, self.local_logits(small)])
        loss = self.image_loss(logits.unflatten(0, (len(batch.views), -1)), targets)
        return Output(loss, {"divergence": loss.detach() - target_entropy(targets)})
