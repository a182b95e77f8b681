"""AdaFace, MagFace, QMagFace, Fair Loss: margins that follow the sample or its class."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil, pi
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from armillary import collectives
from armillary.components.bank import encode_all
from armillary.components.counter import integers, key, sample_keys
from armillary.components.margin_policy import STEPS, Choice, ClippedPolicy, MarginTable, thirds
from armillary.losses.sample_margins import AdaFace, ClassMargins, MagFace, ProbabilityArcFace, QualityArcFace
from armillary.losses.tensors import normalize
from armillary.objectives import base
from armillary.objectives.base import Batch, BuildContext, Citation, Convergence, Needs, Output, Samples
from armillary.objectives.bases import ClassHeadObjective
from armillary.objectives.margin_softmax import MAX_SCALE
from armillary.objectives.registry import register

_EXPLORATION, _POLICY = 71, 72
_CHUNK = 1024


@register
class AdaFaceObjective(ClassHeadObjective):
    """AdaFace: the margin of a sample follows its feature's length among those of its time.

    Formula and forms: :class:`armillary.losses.sample_margins.AdaFace`.
    """

    name = "adaface"
    family = "adaptive_margin"
    catalog_id = "adaface"
    citation = Citation(
        "Minchul Kim, Anil K. Jain, Xiaoming Liu",
        "AdaFace: Quality Adaptive Margin for Face Recognition",
        2022,
        "CVPR",
        "https://arxiv.org/abs/2204.00964",
    )
    needs = Needs(recipe="faces", fields=("label",), components=("class_head", "norm_statistics"), batch_coupled=True)
    waivers: ClassVar[Mapping[str, str]] = {
        "gradcheck[adaface-formulation=survey]": "lengths have no gradient",
    }
    loss_class = AdaFace
    convergence = Convergence(margin=0.14, job={"objective.scale": 16, "objective.margin": 0.2})

    class Hyperparameters(base.Hyperparameters):
        """Arguments of :class:`armillary.losses.sample_margins.AdaFace`."""

        margin: float = Field(0.4, ge=0, le=1, description="m, radians and a difference of cosines at once")
        scale: float = Field(64.0, ge=0.01, le=MAX_SCALE, description="logit scale")
        concentration: float = Field(0.333, ge=0, le=10, description="h, how far lengths move the margin")
        norm_rate: float = Field(0.01, gt=0, le=1, description="share of the batch in mean and deviation of lengths")
        norm_max: float = Field(100.0, ge=1, le=1e6, description="longer features count as of this length")
        slope: float = Field(0.01, ge=0, le=1, description="survey: radians a unit of length")
        formulation: Literal["paper", "survey"] = Field("paper", description="survey: margin linear in the length")


class MagFaceHyperparameters(base.Hyperparameters):
    """Arguments of :class:`armillary.losses.sample_margins.MagFace`."""

    scale: float = Field(64.0, ge=0.01, le=MAX_SCALE, description="logit scale")
    norm_low: float = Field(10.0, gt=0, le=1e4, description="l_a, smallest length that counts")
    norm_high: float = Field(110.0, gt=0, le=1e5, description="u_a, largest length that counts")
    margin_low: float = Field(0.45, ge=0, le=pi / 2, description="l_m, radians at the smallest length")
    margin_high: float = Field(0.8, ge=0, le=pi / 2, description="u_m, radians at the largest length")
    regularizer: float = Field(35.0, ge=0, le=1e4, description="lambda, weight of the term that lengthens features")
    easy_margin: bool = Field(True, description="margin only where the cosine is above 0")
    extension: bool = Field(True, description="ArcFace's falling branch, where the margin is not easy")


# Lengths of a small network's features are of the order of its width's root, 1 to 20.
_SMALL_LENGTHS = {
    "objective.scale": 16,
    "objective.norm_low": 1,
    "objective.norm_high": 30,
    "objective.margin_low": 0.1,
    "objective.margin_high": 0.4,
    "objective.regularizer": 1,
}


@register
class MagFaceObjective(ClassHeadObjective):
    """MagFace: longer features get wider margins, and every feature finds the length that suits it.

    Formula: :class:`armillary.losses.sample_margins.MagFace`. The lengths are raw ones: a backbone whose embeddings are
    far from [norm_low, norm_high] gets no gradient on them.
    """

    name = "magface"
    family = "adaptive_margin"
    catalog_id = "magface"
    citation = Citation(
        "Qiang Meng, Shichao Zhao, Zhida Huang, Feng Zhou",
        "MagFace: A Universal Representation for Face Recognition and Quality Assessment",
        2021,
        "CVPR",
        "https://arxiv.org/abs/2103.06627",
    )
    loss_class = MagFace
    Hyperparameters = MagFaceHyperparameters
    convergence = Convergence(margin=0.14, job=_SMALL_LENGTHS)


@register
class QMagFaceObjective(ClassHeadObjective):
    """QMagFace: trained as MagFace, compared with a score that trusts poor images less.

    The paper changes no training loss. Its score, ``s + min(0, beta s - alpha) min(q_1, q_2)`` with the features'
    lengths as q, is the evaluation protocol ``quality_verification``, which fits alpha and beta on training images.
    ``formulation: survey`` is a training loss of its own, an ArcFace margin moved by a given quality:
    :class:`armillary.losses.sample_margins.QualityArcFace`.
    """

    name = "qmagface"
    family = "adaptive_margin"
    catalog_id = "qmagface"
    citation = Citation(
        "Philipp Terhörst, Malte Ihlefeld, Marco Huber, Naser Damer, Florian Kirchbuchner, Kiran Raja, Arjan Kuijper",
        "QMagFace: Simple and Accurate Quality-Aware Face Recognition",
        2023,
        "WACV",
        "https://arxiv.org/abs/2111.13475",
    )
    convergence = Convergence(margin=0.14, metric="quality_verification/auc", job=_SMALL_LENGTHS)

    class Hyperparameters(MagFaceHyperparameters):
        """MagFace's, and the survey's."""

        formulation: Literal["paper", "survey"] = Field("paper", description="survey: margin moved by given quality")
        margin: float = Field(0.5, ge=0, le=pi / 2, description="survey: radians at mean quality")
        quality_slope: float = Field(0.2, ge=0, le=pi / 2, description="survey: radians between qualities 0 and 1")

    @classmethod
    def needs_for(cls, hyperparameters: Any) -> Needs:
        """The survey's reads the images' quality, and its mean over the batch."""
        if hyperparameters.formulation == "paper":
            return cls.needs
        return Needs(recipe="faces", fields=("label", "quality"), components=cls.needs.components, batch_coupled=True)

    def build(self, context: BuildContext) -> None:
        """Makes the loss with its head."""
        options, size = self.hyperparameters, (context.num_classes, context.embedding_dim)
        if options.formulation == "survey":
            self.loss = QualityArcFace(*size, options.margin, options.scale, options.quality_slope)
        else:
            self.loss = MagFace(*size, **options.model_dump(include=set(MagFaceHyperparameters.model_fields)))


@register
class FairLoss(ClassHeadObjective):
    """Fair Loss: a policy learns which margin each class needs, from its size, its spread and its present margin.

    Certain are the loss with a margin per class, the 36 states (three bins of the image count, three of the spread
    within the class, four margins) and the three actions (lower, keep, raise); the reward is known to be the change of
    distances between and within classes. Reconstructed are its form, ``r = (D_inter' - D_inter) - (D_intra' -
    D_intra)``, and these distances: D_intra the mean cosine distance to the class's mean direction, D_inter that from
    there to the nearest other class's. The paper collects its transitions by many short trainings from one model and
    learns the policy before the final training. Here one run does all: during the ``explore`` share of the epochs, the
    first at least, the classes take random actions, whose transitions teach a Q-table
    (:class:`armillary.components.margin_policy.MarginTable`); after it they take the best ones, and the table stays.
    Rewards of those late moves would say how far training has come, since distances change most at its start: the best
    action of a state would seem worse the longer it was taken. Distances are measured on the whole training set
    between epochs. No public code exists.

    ``formulation: survey`` draws margins from a policy network instead, a linear one on the class's mean direction in
    the batch, trained on the fall of the class's loss by clipped steps
    (:class:`armillary.components.margin_policy.ClippedPolicy`), with a reward for entropy. The printed product of
    reward, log-probability and loss would raise the loss of rewarded classes; the policy's gradient is kept apart here.
    """

    name = "fair_loss"
    family = "adaptive_margin"
    catalog_id = "fair_loss"
    citation = Citation(
        "Bingyu Liu, Weihong Deng, Yaoyao Zhong, Mei Wang, Jiani Hu, Xunqiang Tao, Yaohai Huang",
        "Fair Loss: Margin-Aware Reinforcement Learning for Deep Face Recognition",
        2019,
        "ICCV",
        "https://doi.org/10.1109/ICCV.2019.01015",
    )
    needs = Needs(recipe="faces", fields=("label",), components=("class_head", "margin_policy"))
    convergence = Convergence(margin=0.14, job={"objective.scale": 16, "objective.lowest": 0.05})

    count_bin: Tensor
    level: Tensor
    action: Tensor
    state: Tensor
    separation: Tensor

    class Hyperparameters(base.Hyperparameters):
        """Margins, and how the policy learns."""

        scale: float = Field(64.0, ge=0.01, le=MAX_SCALE, description="logit scale")
        form: Literal["cos", "arc"] = Field("cos", description="margin on the cosine or, in radians, on the angle")
        lowest: float = Field(0.15, ge=0, le=1, description="lowest of the four margins, 0.1 apart")
        start_level: int = Field(2, ge=0, le=3, description="margin that every class starts with, counted from 0")
        discount: float = Field(0.9, ge=0, le=0.99, description="gamma, worth of the next state")
        interval: int = Field(1, ge=1, le=100, description="epochs between moves of the margins")
        explore: float = Field(
            0.5, ge=0, le=1, description="share of the epochs with random moves, which teach; 0: none"
        )
        count_bins: Literal["quantiles", "edges"] = Field("quantiles", description="how image counts are binned")
        few_images: int = Field(10, ge=1, le=10**6, description="edges: up to this many images are few")
        many_images: int = Field(50, ge=1, le=10**6, description="edges: more than this many images are many")
        formulation: Literal["paper", "survey"] = Field("paper", description="survey: policy network, clipped steps")
        clip: float = Field(0.2, gt=0, le=1, description="survey: largest rewarded change of a probability ratio")
        entropy: float = Field(0.01, ge=0, le=10, description="survey: weight of the policy's entropy")

    @classmethod
    def needs_for(cls, hyperparameters: Any) -> Needs:
        """The survey's policy sees classes of the whole batch."""
        if hyperparameters.formulation == "paper":
            return cls.needs
        return Needs(recipe="faces", fields=("label",), components=cls.needs.components, batch_coupled=True)

    def build(self, context: BuildContext) -> None:
        """Makes the head and the policy."""
        options, size = self.hyperparameters, (context.num_classes, context.embedding_dim)
        margins = [options.lowest + 0.1 * level for level in range(4)]
        self.seed, self.num_classes, self.dataset_size = context.seed, context.num_classes, context.dataset_size
        self.explored = ceil(options.explore * context.epochs)
        if options.formulation == "survey":
            self.loss: Any = ProbabilityArcFace(*size, options.lowest, options.scale)
            self.policy: Any = ClippedPolicy(*size, margins, options.clip)
            self._chosen: tuple[Tensor, Tensor, Choice, Tensor] | None = None
            return
        self.loss = ClassMargins(*size, margins[options.start_level], options.scale, options.form)
        self.policy = MarginTable(margins, options.discount)
        counts = torch.zeros(context.num_classes) if context.class_counts is None else context.class_counts
        edges = torch.tensor([options.few_images, options.many_images])
        bins = thirds(counts) if options.count_bins == "quantiles" else (counts[:, None] > edges).sum(dim=1)
        self.register_buffer("count_bin", bins)
        self.register_buffer("level", torch.full((context.num_classes,), options.start_level))
        self.register_buffer("action", torch.full((context.num_classes,), -1))
        self.register_buffer("state", torch.zeros(context.num_classes, dtype=torch.int64))
        self.register_buffer("separation", torch.zeros(context.num_classes))

    # The paper's policy: between epochs.

    def before_epoch(self, epoch: int, samples: Samples) -> None:
        """Measures the classes, learns from what the last moves did if they were random, and makes the next ones."""
        options = self.hyperparameters
        if options.formulation == "survey" or epoch % options.interval:
            return
        intra, inter = self._distances(samples)
        state = self.policy.state(self.count_bin, thirds(intra), self.level)
        separation = (inter - intra).to(self.separation.dtype)
        if epoch - options.interval < self.explored and bool((self.action >= 0).all()):
            self.policy.learn(self.state, self.action, separation - self.separation, state)
        if epoch < self.explored:
            classes = torch.arange(self.num_classes, device=state.device)
            action = integers(sample_keys(key(_EXPLORATION, self.seed, epoch), classes), 1, len(STEPS)).squeeze(1)
        else:
            action = self.policy.best(state)
        self.level.copy_(self.policy.moved(self.level, action))
        self.loss.set_margins(self.policy.grid[self.level])
        for buffer, value in ((self.action, action), (self.state, state), (self.separation, separation)):
            buffer.copy_(value)

    def _distances(self, samples: Samples) -> tuple[Tensor, Tensor]:
        """D_intra and D_inter of every class, ``(C,)`` each, equal on all workers."""

        def encode(batch: Batch) -> Tensor:
            directions = normalize(self.encoder(batch.views[0]))
            return torch.cat([directions, batch.label[:, None].to(directions.dtype)], dim=1)

        rows, known = encode_all(samples(), encode, self.dataset_size, self.encoder)
        directions, labels = rows[known, :-1].double(), rows[known, -1].round().long()
        count = torch.bincount(labels, minlength=self.num_classes).clamp_min(1)[:, None]
        means = directions.new_zeros(self.num_classes, directions.shape[1]).index_add_(0, labels, directions) / count
        # Of unit vectors with the mean M, the mean cosine to M / |M| is |M|.
        intra = 1 - torch.linalg.vector_norm(means, dim=1)
        axes, nearest = normalize(means), torch.empty_like(intra)
        for start in range(0, self.num_classes, _CHUNK):
            cosine = axes[start : start + _CHUNK] @ axes.T
            own = torch.arange(len(cosine), device=cosine.device)
            cosine[own, own + start] = -1
            nearest[start : start + _CHUNK] = cosine.amax(dim=1)
        return intra, 1 - nearest

    # The survey's: every step.

    def forward(self, batch: Batch) -> Output:
        """The loss under the classes' present margins."""
        return super().forward(batch) if self.hyperparameters.formulation == "paper" else self._drawn_margins(batch)

    def _drawn_margins(self, batch: Batch) -> Output:
        metrics: dict[str, Tensor] = {}
        embeddings, policy = self.encoder(batch.views[0]), self.policy
        totals, counts = self._class_sums(normalize(embeddings.to(policy.last_state.dtype)), batch.label)
        classes = (counts.squeeze(1) > 0).nonzero().squeeze(1)
        states = totals[classes] / counts[classes]
        choice: Choice = policy(states, classes, key(_POLICY, self.seed, self.step))
        margins = policy.grid[choice.level][torch.searchsorted(classes, batch.label.clamp(0, self.num_classes - 1))]
        loss = self.loss(embeddings, batch.label, metrics=metrics, margin=margins)
        surprise = -self.loss.probability.clamp_min(1e-30).log()
        fallen = (self._class_sums(surprise, batch.label)[0][classes] / counts[classes]).squeeze(1)
        surrogate = policy.surrogate(classes, choice.again, fallen)
        self._chosen = (classes, states.detach(), choice, fallen)
        metrics.update(margin=margins.mean(), policy_entropy=choice.entropy.detach(), surrogate=surrogate.detach())
        return Output(loss + surrogate - self.hyperparameters.entropy * choice.entropy, metrics)

    def _class_sums(self, values: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Sums of ``values (batch, k)`` and counts by class over all workers, ``(C, k)`` and ``(C, 1)``."""
        inside = labels.clamp(0, self.num_classes - 1)  # the head names those that are not
        wide = torch.cat([values, torch.ones_like(values[:, :1])], dim=1)
        sums = collectives.all_reduce_sum(wide.new_zeros(self.num_classes, wide.shape[1]).index_add(0, inside, wide))
        return sums[:, :-1], sums[:, -1:].detach()

    def after_step(self, step: int) -> None:
        """Remembers what the policy chose."""
        if self.hyperparameters.formulation == "survey" and self._chosen is not None:
            self.policy.remember(*self._chosen)
            self._chosen = None

    def epoch_metrics(self) -> dict[str, Tensor]:
        """Mean and deviation of the margin over classes."""
        if self.hyperparameters.formulation == "survey":
            return {}
        margins = self.policy.grid[self.level]
        return {"class_margin": margins.mean(), "class_margin_deviation": margins.std(correction=0)}
