"""Objectives that compare samples inside pairs, triplets and larger tuples of a batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from armillary import losses
from armillary.objectives import base
from armillary.objectives.base import Batch, BuildContext, Citation, Convergence, Needs, Objective, Output
from armillary.objectives.bases import ClassHeadObjective
from armillary.objectives.registry import register

Mining = Literal["all", "semi_hard", "batch_hard", "hard_negative", "multi_similarity"]
Reduction = Literal["mean_active", "mean_all", "sum"]
ANY = "what vectors are compared by"
ON_SPHERE = "what unit vectors are compared by"
IMAGES_PER_CLASS = "images of each class in a batch"
CHOSEN = "which pairs of the batch count; all: without a miner"
REDUCED = "mean over what has a loss, over all that counts, or the sum"


class Parts(base.Hyperparameters):
    """What any loss over tuples combines freely with, beside its similarity."""

    mining: Mining = Field("all", description=CHOSEN)
    epsilon: float = Field(0.1, ge=0, le=2, description="slack of the miner multi_similarity, in distances")
    reduction: Reduction = Field("mean_all", description=REDUCED)


class TupleObjective(Objective):
    """One view, one label: tuples inside the batch, which holds several images of each class.

    A subclass states ``name``, ``citation``, ``make_loss`` and ``Hyperparameters``: arguments of the loss, and
    ``samples_per_class``, the K of its P x K batches.
    """

    family = "tuple"
    needs = Needs(recipe="faces", fields=("label",), sampler="class_balanced", samples_per_class=4, batch_coupled=True)
    convergence = Convergence(margin=0.12)
    make_loss: ClassVar[Callable[..., nn.Module]]

    @classmethod
    def needs_for(cls, hyperparameters: Any) -> Needs:
        """Class-balanced batches with the wanted number of images per class."""
        return replace(cls.needs, samples_per_class=hyperparameters.samples_per_class)

    def loss_options(self) -> dict[str, Any]:
        """The loss's arguments: all hyperparameters but the sampler's."""
        options: dict[str, Any] = self.hyperparameters.model_dump(exclude={"samples_per_class"})
        return options

    def build(self, context: BuildContext) -> None:
        """Makes the loss, which has no parameters."""
        self.loss = type(self).make_loss(**self.loss_options())

    def forward(self, batch: Batch) -> Output:
        """The loss of the first view's embeddings."""
        metrics: dict[str, Tensor] = {}
        return Output(self.loss(self.encoder(batch.views[0]), batch.label, metrics=metrics), metrics)


@register
class Triplet(TupleObjective):
    """Triplet loss: a sample lies nearer to its own class than to another, by a margin; five ways of mining.

    Formula, mining and reductions: :class:`armillary.losses.Triplet`. A survey prints the loss of squared cosine
    distances, (1 - cos)^2: ``formulation: survey``.
    """

    name = "triplet"
    catalog_id = "triplet"
    citation = Citation(
        "Florian Schroff, Dmitry Kalenichenko, James Philbin",
        "FaceNet: A Unified Embedding for Face Recognition and Clustering",
        2015,
        "CVPR",
        "https://arxiv.org/abs/1503.03832",
    )
    make_loss = losses.Triplet

    class Hyperparameters(Parts):
        """Arguments of :class:`armillary.losses.Triplet`, and the K of its P x K batches."""

        margin: float = Field(0.2, ge=0, le=4, description="distance between unit vectors (squared if squared)")
        mining: Mining = Field("semi_hard", description="which triplets of the batch count")
        similarity: Literal["euclidean", "cosine"] = Field("euclidean", description=ON_SPHERE)
        squared: bool = Field(True, description="squared distances")
        soft: bool = Field(False, description="softplus without a margin in place of the hinge")
        reduction: Reduction = Field(
            "mean_active", description="over triplets with a loss, over all chosen ones, or their sum"
        )
        formulation: Literal["paper", "survey"] = Field(
            "paper", description="survey: cosine distances, whatever similarity says"
        )
        samples_per_class: int = Field(4, ge=2, le=1024, description=IMAGES_PER_CLASS)

    def loss_options(self) -> dict[str, Any]:
        """The survey's distance is 1 - cos."""
        options = super().loss_options()
        return {**options, "similarity": "cosine"} if options.pop("formulation") == "survey" else options


@register
class Contrastive(TupleObjective):
    """Contrastive loss: equal labels attract, others repel inside a margin; over the pairs of the batch.

    Formula: :class:`armillary.losses.Contrastive`. Surveys print it with the labels of pairs reversed, as a mean, and
    without the halves: the same loss up to a factor.
    """

    name = "contrastive"
    family = "pairwise"
    catalog_id = "contrastive"
    citation = Citation(
        "Raia Hadsell, Sumit Chopra, Yann LeCun",
        "Dimensionality Reduction by Learning an Invariant Mapping",
        2006,
        "CVPR",
        "https://doi.org/10.1109/CVPR.2006.100",
    )
    make_loss = losses.Contrastive
    convergence = Convergence(margin=0.12, job={"objective.normalize": True, "objective.reduction": "mean_active"})

    class Hyperparameters(Parts):
        """Arguments of :class:`armillary.losses.Contrastive`, and the K of its P x K batches."""

        margin: float = Field(1.0, gt=0, le=100, description="distance beyond which a dissimilar pair costs nothing")
        similarity: Literal["euclidean", "cosine", "dot"] = Field("euclidean", description=ANY)
        normalize: bool = Field(False, description="compare unit vectors")
        reduction: Reduction = Field(
            "mean_all", description="over all pairs, over similar and near dissimilar ones apart, or the paper's sum"
        )
        samples_per_class: int = Field(4, ge=2, le=1024, description=IMAGES_PER_CLASS)


@register
class LiftedStructure(TupleObjective):
    """Lifted structure: every positive pair against the negatives of both its ends.

    Formula, and what the survey's lacks: :class:`armillary.losses.LiftedStructure`.
    """

    name = "lifted_structure"
    catalog_id = "lifted_structure"
    citation = Citation(
        "Hyun Oh Song, Yu Xiang, Stefanie Jegelka, Silvio Savarese",
        "Deep Metric Learning via Lifted Structured Feature Embedding",
        2016,
        "CVPR",
        "https://arxiv.org/abs/1511.06452",
    )
    make_loss = losses.LiftedStructure

    class Hyperparameters(Parts):
        """Arguments of :class:`armillary.losses.LiftedStructure`, and the K of its P x K batches."""

        alpha: float = Field(1.0, ge=0, le=10, description="margin, a distance")
        similarity: Literal["euclidean", "cosine", "dot"] = Field("euclidean", description=ANY)
        normalize: bool = Field(False, description="compare unit vectors; the paper compares raw ones")
        formulation: Literal["paper", "survey"] = Field(
            "paper", description="the paper's loss, or a survey's without attraction and hinge, a sum in any case"
        )
        samples_per_class: int = Field(4, ge=2, le=1024, description=IMAGES_PER_CLASS)

    def loss_options(self) -> dict[str, Any]:
        """The survey's formulation is a sum."""
        options = super().loss_options()
        return {**options, "reduction": "sum"} if options["formulation"] == "survey" else options


@register
class NPair(TupleObjective):
    """N-pair loss: an anchor picks its positive among the positives of all other classes.

    Formula: :class:`armillary.losses.NPair`.
    """

    name = "n_pair"
    catalog_id = "n_pair"
    citation = Citation(
        "Kihyuk Sohn",
        "Improved Deep Metric Learning with Multi-class N-pair Loss Objective",
        2016,
        "NeurIPS",
        "https://papers.nips.cc/paper/2016/hash/6b180037abbebea991d8b1232f8a8ca9-Abstract.html",
    )
    needs = replace(TupleObjective.needs, samples_per_class=2)
    make_loss = losses.NPair

    class Hyperparameters(Parts):
        """Arguments of :class:`armillary.losses.NPair`."""

        l2_reg: float = Field(0.002, ge=0, le=10, description="weight of the squared norms")
        similarity: Literal["euclidean", "cosine", "dot"] = Field("dot", description=ANY)
        symmetric: bool = Field(False, description="average with the direction from positive to anchor")

    @classmethod
    def needs_for(cls, hyperparameters: Any) -> Needs:  # noqa: ARG003
        """Two images of each class, whatever the hyperparameters."""
        return cls.needs

    def forward(self, batch: Batch) -> Output:
        """The loss of one pair of each class; the image that comes first in the dataset is the anchor."""
        metrics: dict[str, Tensor] = {}
        embeddings = self.encoder(batch.views[0])
        return Output(self.loss(embeddings, batch.label, order=batch.index, metrics=metrics), metrics)


@register
class MultiSimilarity(TupleObjective):
    """Multi-similarity loss: hard pairs, weighted by their own similarity and by how it compares with the others'.

    Formula and miner: :class:`armillary.losses.MultiSimilarity`.
    """

    name = "multi_similarity"
    catalog_id = "multi_similarity"
    citation = Citation(
        "Xun Wang, Xintong Han, Weilin Huang, Dengke Dong, Matthew R. Scott",
        "Multi-Similarity Loss with General Pair Weighting for Deep Metric Learning",
        2019,
        "CVPR",
        "https://arxiv.org/abs/1904.06627",
    )
    make_loss = losses.MultiSimilarity

    class Hyperparameters(Parts):
        """Arguments of :class:`armillary.losses.MultiSimilarity`, and the K of its P x K batches."""

        alpha: float = Field(2.0, gt=0, le=1000, description="sharpness over positives")
        beta: float = Field(50.0, gt=0, le=1000, description="sharpness over negatives; 40 in the authors' code")
        lam: float = Field(0.5, ge=-1, le=1, description="cosine that both are measured from")
        mining: Mining = Field("multi_similarity", description=CHOSEN)
        similarity: Literal["euclidean", "cosine"] = Field("cosine", description=ON_SPHERE)
        samples_per_class: int = Field(4, ge=2, le=1024, description=IMAGES_PER_CLASS)


_CIRCLE = Citation(
    "Yifan Sun, Changmao Cheng, Yuhan Zhang, Chi Zhang, Liang Zheng, Zhongdao Wang, Yichen Wei",
    "Circle Loss: A Unified Perspective of Pair Similarity Optimization",
    2020,
    "CVPR",
    "https://arxiv.org/abs/2002.10857",
)
_CIRCLE_WAIVERS = {"gradcheck": "the self-paced weights are held constant"}


@register
class Circle(TupleObjective):
    """Circle loss over pairs: a similarity is pulled the more, the farther it is from its optimum.

    Formula and forms: :class:`armillary.losses.Circle`.
    """

    name = "circle"
    catalog_id = "circle"
    citation = _CIRCLE
    waivers = _CIRCLE_WAIVERS
    make_loss = losses.Circle
    convergence = Convergence(margin=0.12, job={"objective.gamma": 64.0})

    class Hyperparameters(Parts):
        """Arguments of :class:`armillary.losses.Circle`, and the K of its P x K batches."""

        m: float = Field(0.25, gt=0, le=1, description="relaxation; 0.4 for fine-grained retrieval")
        gamma: float = Field(256.0, ge=0.1, le=4096, description="scale; 128 for people, 80 for fine-grained retrieval")
        form: Literal["per_anchor", "whole_batch"] = Field(
            "per_anchor", description="one term an anchor, or one over all pairs of the batch"
        )
        similarity: Literal["euclidean", "cosine"] = Field("cosine", description=ON_SPHERE)
        samples_per_class: int = Field(4, ge=2, le=1024, description=IMAGES_PER_CLASS)


@register
class CircleClass(ClassHeadObjective):
    """Circle loss over classes: the form of :class:`Circle` for a head with one weight row a class.

    Formula: :class:`armillary.losses.CircleHead`.
    """

    name = "circle_class"
    catalog_id = "circle"
    citation = _CIRCLE
    waivers = _CIRCLE_WAIVERS
    loss_class = losses.CircleHead
    convergence = Convergence(margin=0.1, job={"objective.scale": 64.0})

    class Hyperparameters(base.Hyperparameters):
        """Arguments of :class:`armillary.losses.CircleHead`."""

        margin: float = Field(0.25, gt=0, le=1, description="m, the relaxation")
        scale: float = Field(256.0, ge=0.1, le=4096, description="gamma")


@register
class RangeLoss(ClassHeadObjective):
    """Range loss beside softmax: harmonic mean of each class's widest distances, and a margin between nearest centres.

    ``L = L_softmax + lam (alpha L_intra + beta L_inter)``; the term: :class:`armillary.losses.RangeLoss`, which any
    other loss can be given too.
    """

    name = "range_loss"
    family = "tuple"
    catalog_id = "range_loss"
    citation = Citation(
        "Xiao Zhang, Zhiyuan Fang, Yandong Wen, Zhifeng Li, Yu Qiao",
        "Range Loss for Deep Face Recognition with Long-Tailed Training Data",
        2017,
        "ICCV",
        "https://arxiv.org/abs/1611.08976",
    )
    needs = replace(TupleObjective.needs, components=("class_head",))
    loss_class = losses.Softmax
    # Raw features of classes of four images: a smaller weight than beside features of length 1.
    convergence = Convergence(margin=0.08, job={"objective.lam": 0.01, "objective.margin": 4.0})

    class Hyperparameters(Parts):
        """Arguments of :class:`armillary.losses.RangeLoss`, its weight, and the K of P x K batches."""

        k: int = Field(2, ge=1, le=64, description="widest distances of each class")
        margin: float = Field(1.0, gt=0, le=1e6, description="of the nearest centres, in the unit of the distances")
        alpha: float = Field(0.5, ge=0, le=10, description="weight of the distances inside classes")
        beta: float = Field(0.5, ge=0, le=10, description="weight of the distance between classes")
        lam: float = Field(1.0, ge=0, le=100, description="weight of the term beside the softmax loss")
        similarity: Literal["euclidean", "cosine"] = Field("euclidean", description=ANY)
        squared: bool = Field(True, description="squared distances, the paper's, or plain ones")
        reduction: Reduction = Field("sum", description="of the distances inside classes, over classes")
        formulation: Literal["paper", "survey"] = Field(
            "paper", description="the paper's two terms, or a survey's one hinge of widest against narrowest distance"
        )
        samples_per_class: int = Field(4, ge=2, le=1024, description=IMAGES_PER_CLASS)

    @classmethod
    def needs_for(cls, hyperparameters: Any) -> Needs:
        """Class-balanced batches with the wanted number of images per class."""
        return replace(cls.needs, samples_per_class=hyperparameters.samples_per_class)

    def build(self, context: BuildContext) -> None:
        """Makes the softmax head and the term."""
        self.loss = losses.Softmax(context.num_classes, context.embedding_dim)
        self.term = losses.RangeLoss(**self.hyperparameters.model_dump(exclude={"lam", "samples_per_class"}))

    def forward(self, batch: Batch) -> Output:
        """The loss of the first view's embeddings."""
        metrics: dict[str, Tensor] = {}
        embeddings = self.encoder(batch.views[0])
        loss = self.loss(embeddings, batch.label, metrics=metrics)
        term = self.term(embeddings, batch.label, metrics=metrics)
        metrics.update(softmax=loss.detach(), range=term.detach())
        return Output(loss + self.hyperparameters.lam * term, metrics)
