"""Terms: regularizers that a job adds to any objective, ``objective.terms: [{name: koleo, weight: 0.1}]``.

A term sees the embeddings that the objective's own forward pass takes from its encoder; there is no second pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

import torch
from pydantic import Field, ValidationError
from torch import Tensor, nn

from armillary.components.counter import key, normals, sample_keys, uniforms
from armillary.losses.class_centers import CenterLoss, RingLoss
from armillary.losses.embedding_dropout import SampleGuidedContrast
from armillary.losses.information_bottleneck import InformationLowerBound, VariationalBottleneck
from armillary.losses.range_loss import RangeLoss
from armillary.losses.self_distillation import KoLeo
from armillary.losses.tensors import float32_math
from armillary.losses.uniformity import Uniformity
from armillary.objectives.base import Batch, BuildContext, Hyperparameters, Needs, Objective, Output
from armillary.spec.errors import UserError, nearest, unknown_name

_NOISE, _DROP = 81, 82


@dataclass(frozen=True)
class Embedded:
    """What an objective's encoder made of a batch, view by view.

    ``views``: embeddings ``(batch, embedding_dim)`` of each; ``images`` ``(batch, channels, height, width)`` they were
    made of; ``label (batch,)`` where the objective or a term asks for labels; ``index (batch,)``; ``seed`` and ``step``
    for what is drawn.
    """

    views: tuple[Tensor, ...]
    images: tuple[Tensor, ...]
    label: Tensor | None
    index: Tensor
    seed: int
    step: int

    @property
    def embeddings(self) -> Tensor:
        """All views' embeddings, view by view, ``(views * batch, embedding_dim)``."""
        return torch.cat(self.views)

    @property
    def labels(self) -> Tensor:
        """The labels of :attr:`embeddings`."""
        assert self.label is not None
        return self.label.repeat(len(self.views))

    def keys(self, purpose: int) -> Tensor:
        """A key for each row of :attr:`embeddings`, to draw from."""
        views = range(len(self.views))
        return torch.cat([sample_keys(key(purpose, self.seed, self.step, view), self.index) for view in views])


class Term(nn.Module):
    """A regularizer. Subclasses state the class attributes, ``build`` their modules, and define ``forward``.

    ``forward`` returns a scalar whose mean over workers is the global batch's value; ``after_step`` moves state.
    """

    name: ClassVar[str]
    needs_labels: ClassVar[bool] = False
    batch_coupled: ClassVar[bool] = False
    Hyperparameters: ClassVar[type[Hyperparameters]] = Hyperparameters

    def __init__(self, hyperparameters: Any, context: BuildContext) -> None:
        super().__init__()
        self.hyperparameters: Any = hyperparameters
        self.build(context)

    def build(self, context: BuildContext) -> None:
        """Makes the term's modules."""

    def forward(self, seen: Embedded) -> Tensor:
        """The term's value."""
        raise NotImplementedError(f"{type(self).__name__} does not define forward")

    def after_step(self) -> None:
        """Hook: runs on every worker after an optimizer step."""


_TERMS: dict[str, type[Term]] = {}
T = TypeVar("T", bound=type[Term])


def register_term(cls: T) -> T:
    """Class decorator: makes a term known under its ``name``."""
    _TERMS[cls.name] = cls
    return cls


def term_names() -> list[str]:
    """All terms, sorted."""
    return sorted(_TERMS)


def get_term(name: str, *, number: int = 0) -> type[Term]:
    """The term of that name.

    Raises:
        UserError: there is none; shows the nearest.
    """
    if name not in _TERMS:
        raise unknown_name("term", name, term_names(), key=f"objective.terms.{number}.name")
    return _TERMS[name]


def describe_term(name: str) -> dict[str, Any]:
    """What a listing shows of a term, as plain values."""
    cls = get_term(name)
    return {
        "name": name,
        "summary": (cls.__doc__ or "").strip().split("\n")[0],
        "labels": cls.needs_labels,
        "batch_coupled": cls.batch_coupled,
        "hyperparameters": {
            option: {"default": field.default, "description": field.description}
            for option, field in cls.Hyperparameters.model_fields.items()
        },
    }


@dataclass(frozen=True)
class ChosenTerm:
    """A term that a job asks for: its class, its weight > 0, its checked hyperparameters."""

    kind: type[Term]
    weight: float
    hyperparameters: Any


def choose_terms(specs: Iterable[Any]) -> tuple[ChosenTerm, ...]:
    """The terms of ``objective.terms``: entries with ``name``, ``weight`` and ``options``.

    Raises:
        UserError: an unknown name or option, a value out of range, a term that is named twice.
    """
    chosen: list[ChosenTerm] = []
    for number, spec in enumerate(specs):
        cls = get_term(spec.name, number=number)
        if any(cls is other.kind for other in chosen):
            raise UserError(f"{spec.name!r} is there twice", key=f"objective.terms.{number}.name")
        chosen.append(ChosenTerm(cls, spec.weight, _checked(cls, spec.options, f"objective.terms.{number}")))
    return tuple(chosen)


def _checked(cls: type[Term], options: dict[str, Any], place: str) -> Any:
    try:
        return cls.Hyperparameters(**options)
    except ValidationError as error:
        first = error.errors()[0]
        option, fields = str(first["loc"][0]), cls.Hyperparameters.model_fields
        close = nearest(option, fields)
        unknown = first["type"] == "extra_forbidden"
        raise UserError(
            f"the term {cls.name} has no hyperparameter {option!r}"
            if unknown
            else f"{first['msg']}, found {first['input']!r}",
            key=f"{place}.{option}",
            allowed=(", ".join(fields) or "none") if unknown else None,
            hint=f"did you mean {close[0]!r}?" if unknown and close else None,
        ) from None


def needs_with_terms(needs: Needs, terms: Sequence[ChosenTerm], objective: str = "the objective") -> Needs:
    """The needs of an objective with terms: labels and a coupled batch where a term asks for them.

    Raises:
        UserError: the objective takes maps or tokens from its encoder, or no images, so that there are no embeddings.
    """
    from dataclasses import replace

    if not terms:
        return needs
    if needs.encoder != "any" or needs.modality not in ("image", "image_text"):
        raise UserError(
            f"{objective} takes no embeddings of images from its encoder, which is what terms act on",
            key="objective.terms",
            allowed="objectives whose encoder gives embeddings",
        )
    labels = any(term.kind.needs_labels for term in terms)
    fields = needs.fields if "label" in needs.fields or not labels else (*needs.fields, "label")
    coupled = needs.batch_coupled or any(term.kind.batch_coupled for term in terms)
    return replace(needs, fields=fields, batch_coupled=coupled)


class WithTerms(Objective):
    """An objective plus weighted terms on the embeddings of its own forward pass.

    Built by :func:`with_terms`; it stands in for the objective in everything an engine asks.
    """

    def __init__(self, objective: Objective, terms: Sequence[ChosenTerm], context: BuildContext) -> None:
        nn.Module.__init__(self)
        self.objective = objective
        self.terms = nn.ModuleDict({term.kind.name: term.kind(term.hyperparameters, context) for term in terms})
        self.weights = {term.kind.name: term.weight for term in terms}
        self.hyperparameters = objective.hyperparameters
        self.seed, self.epoch, self.step = context.seed, 0, 0

    def forward(self, batch: Batch) -> Output:
        """The objective's loss plus ``weight * term`` for each; metrics ``term_<name>``."""
        objective = self.objective
        objective.epoch, objective.step = self.epoch, self.step
        calls: list[tuple[Tensor, Tensor]] = []

        def keep(_: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            # What an objective computes without gradient (a key, a target) is not regularized.
            if output.requires_grad or not torch.is_grad_enabled():
                calls.append((arguments[0], output))

        handle = objective.encoder.register_forward_hook(keep)
        try:
            output = objective(batch)
        finally:
            handle.remove()
        seen = self._seen(batch, calls)
        loss, metrics = output.loss, dict(output.metrics)
        for name, term in self.terms.items():
            value = term(seen)
            loss = loss + self.weights[name] * value
            metrics[f"term_{name}"] = value.detach()
        return Output(loss, metrics)

    def _seen(self, batch: Batch, calls: list[tuple[Tensor, Tensor]]) -> Embedded:
        size = len(batch.index)
        if not calls or any(len(output) % size for _, output in calls):
            shapes = [tuple(output.shape) for _, output in calls]
            raise ValueError(f"terms need whole views through the encoder: {size} images, embeddings {shapes}")
        views = [part for _, output in calls for part in output.split(size)]
        images = [part for image, _ in calls for part in image.split(size)]
        label = batch.fields.get("label")
        return Embedded(tuple(views), tuple(images), label, batch.index, self.seed, self.step)

    def embed(self, images: Tensor) -> Tensor:
        """As the objective."""
        return self.objective.embed(images)

    def exported(self) -> nn.Module:
        """As the objective."""
        return self.objective.exported()

    def before_epoch(self, epoch: int, samples: Any) -> None:
        """As the objective."""
        self.objective.epoch = epoch
        self.objective.before_epoch(epoch, samples)

    def after_step(self, step: int) -> None:
        """The objective's hook, then the terms'."""
        self.objective.after_step(step)
        for term in self.terms.values():
            assert isinstance(term, Term)
            term.after_step()

    def epoch_metrics(self) -> dict[str, Tensor]:
        """As the objective."""
        return self.objective.epoch_metrics()


def with_terms(objective: Objective, terms: Sequence[ChosenTerm], context: BuildContext) -> Objective:
    """The objective itself without terms; otherwise one that adds them."""
    return WithTerms(objective, terms, context) if terms else objective


def _mean_over_views(loss: nn.Module, seen: Embedded) -> Tensor:
    total: Tensor = torch.stack([loss(view) for view in seen.views]).mean()
    return total


@register_term
class KoLeoTerm(Term):
    """Every sample keeps away from its nearest neighbour (Sablayrolles et al. 2019); mean over views."""

    name = "koleo"
    batch_coupled = True

    class Hyperparameters(Hyperparameters):
        """Arguments of :class:`armillary.losses.self_distillation.KoLeo`."""

        neighbours: int = Field(1, ge=1, le=16, description="nearest samples that count")
        eps: float = Field(1e-8, ge=1e-12, le=1e-2, description="floor of the distance")

    def build(self, context: BuildContext) -> None:
        """Makes the loss."""
        self.loss = KoLeo(self.hyperparameters.eps, self.hyperparameters.neighbours)

    def forward(self, seen: Embedded) -> Tensor:
        """Of each view by itself, as DINOv2 does (which sums where this averages)."""
        return _mean_over_views(self.loss, seen)


@register_term
class UniformityTerm(Term):
    """Directions cover the sphere evenly (Wang and Isola 2020); mean over views."""

    name = "uniformity"
    batch_coupled = True

    class Hyperparameters(Hyperparameters):
        """Argument of :class:`armillary.losses.uniformity.Uniformity`."""

        t: float = Field(2.0, ge=0.1, le=20, description="sharpness of the Gaussian kernel")

    def build(self, context: BuildContext) -> None:
        """Makes the loss."""
        self.loss = Uniformity(self.hyperparameters.t)

    def forward(self, seen: Embedded) -> Tensor:
        """Of each view by itself."""
        return _mean_over_views(self.loss, seen)


@register_term
class CenterTerm(Term):
    """Embeddings gather around moving class centres (Wen et al. 2016)."""

    name = "center_loss"
    needs_labels = True

    class Hyperparameters(Hyperparameters):
        """Argument of :class:`armillary.losses.CenterLoss`."""

        alpha: float = Field(0.5, gt=0, le=1, description="rate at which centres move")

    def build(self, context: BuildContext) -> None:
        """Makes the centres."""
        self.loss = CenterLoss(context.num_classes, context.embedding_dim, self.hyperparameters.alpha)

    def forward(self, seen: Embedded) -> Tensor:
        """Over all views."""
        value: Tensor = self.loss(seen.embeddings, seen.labels)
        return value

    def after_step(self) -> None:
        """Moves the centres."""
        self.loss.update()


@register_term
class RingTerm(Term):
    """Embeddings take one, learned length (Zheng et al. 2018)."""

    name = "ring_loss"

    def build(self, context: BuildContext) -> None:
        """Makes the radius."""
        self.loss = RingLoss()

    def forward(self, seen: Embedded) -> Tensor:
        """Over all views."""
        value: Tensor = self.loss(seen.embeddings)
        return value


@register_term
class RangeTerm(Term):
    """The widest distances inside classes shrink, the nearest class centres part (X. Zhang et al. 2017)."""

    name = "range_loss"
    needs_labels = True
    batch_coupled = True

    class Hyperparameters(Hyperparameters):
        """Arguments of :class:`armillary.losses.RangeLoss`."""

        k: int = Field(2, ge=1, le=64, description="ranges of each class")
        margin: float = Field(1.0, gt=0, le=1e6, description="least squared distance of two class centres")
        alpha: float = Field(0.5, ge=0, le=10, description="weight of the ranges")
        beta: float = Field(0.5, ge=0, le=10, description="weight of the centres' hinge")

    def build(self, context: BuildContext) -> None:
        """Makes the loss."""
        self.loss = RangeLoss(**self.hyperparameters.model_dump())

    def forward(self, seen: Embedded) -> Tensor:
        """Over all views as one batch."""
        value: Tensor = self.loss(seen.embeddings, seen.labels)
        return value


@register_term
class CoReFaceTerm(Term):
    """Two dropout draws of an embedding agree against other identities (Song and Wang 2023).

    The paper drops values of the feature map in front of the embedding, as the objective ``coreface`` does; a term has
    the embedding alone.
    """

    name = "coreface"
    needs_labels = True
    batch_coupled = True

    class Hyperparameters(Hyperparameters):
        """Dropout, and arguments of :class:`armillary.losses.embedding_dropout.SampleGuidedContrast`."""

        dropout: float = Field(0.6, ge=0, le=0.9, description="share of an embedding's values that a draw drops")
        scale: float = Field(64.0, ge=0.1, le=1000, description="s, of the cosines")
        ema: float = Field(0.99, gt=0, le=1, description="weight of the current batch in the margin")

    def build(self, context: BuildContext) -> None:
        """Makes the loss with its margin."""
        self.loss = SampleGuidedContrast(self.hyperparameters.scale, self.hyperparameters.ema)

    def forward(self, seen: Embedded) -> Tensor:
        """Of the first view."""
        assert seen.label is not None
        first, share = seen.views[0], self.hyperparameters.dropout
        keys = [sample_keys(key(_DROP, seen.seed, seen.step, draw), seen.index) for draw in range(2)]
        draws = [first * (uniforms(drawn, first.shape[1]) >= share) / (1 - share) for drawn in keys]
        value: Tensor = self.loss(draws[0], draws[1], seen.label)
        return value

    def after_step(self) -> None:
        """Keeps the margin."""
        self.loss.update()


class _Bottleneck(Term):
    kind: ClassVar[str]
    needs_labels = True

    def build(self, context: BuildContext) -> None:
        """Makes stochastic head and classifier."""
        options = self.hyperparameters.model_dump()
        options["weight"] = options.pop("beta" if self.kind == "vib" else "gamma")
        self.loss = VariationalBottleneck(context.embedding_dim, context.num_classes, self.kind, **options)

    def forward(self, seen: Embedded) -> Tensor:
        """Over all views, one latent sample each."""
        noise = normals(seen.keys(_NOISE), self.hyperparameters.size)
        value: Tensor = self.loss(seen.embeddings, seen.labels, noise)
        return value


@register_term
class VIBTerm(_Bottleneck):
    """A classifier behind a noisy channel with a standard normal prior (Alemi et al. 2017)."""

    name = "vib"
    kind = "vib"

    class Hyperparameters(Hyperparameters):
        """Arguments of :class:`armillary.losses.information_bottleneck.VariationalBottleneck`."""

        beta: float = Field(1e-3, ge=0, le=10, description="price of a nat through the channel")
        size: int = Field(256, ge=2, le=4096, description="K, width of the bottleneck")
        sigma_shift: float = Field(5.0, ge=0, le=20, description="subtracted before the softplus of sigma")


@register_term
class CEBTerm(_Bottleneck):
    """A classifier behind a noisy channel with a learned normal for each class (Fischer 2020)."""

    name = "ceb"
    kind = "ceb"

    class Hyperparameters(Hyperparameters):
        """Arguments of :class:`armillary.losses.information_bottleneck.VariationalBottleneck`."""

        gamma: float = Field(1.0, ge=0, le=1e4, description="weight of the classification")
        size: int = Field(64, ge=2, le=4096, description="K, width of the bottleneck")
        backward_variance: Literal["unit", "learned"] = Field("unit", description="variance of the class normals")


@register_term
class SufficientContrastiveTerm(Term):
    """Embeddings keep what a view does not share with others (H. Wang et al. 2022): rebuilt, or by a lower bound.

    ``RC``: a decoder rebuilds the view's pixels from the embedding; the mean squared error over elements, summed over
    views. ``LBE``: minus the released estimate of the information in ``z = f(v) + noise``, over all views, on the
    embedding alone (the paper also takes earlier layers).
    """

    name = "sufficient_contrastive"
    batch_coupled = True

    class Hyperparameters(Hyperparameters):
        """Variant and its options."""

        variant: Literal["RC", "LBE"] = Field("RC", description="reconstruction, or lower bound estimate")
        score_scale: float = Field(20.0, ge=0.1, le=1000, description="c of LBE; 80 on ImageNet")
        noise_variance: float = Field(0.1, ge=1e-4, le=10, description="of z in LBE")
        decoder_hidden: int = Field(512, ge=2, le=65536, description="width of RC's decoder")

    def build(self, context: BuildContext) -> None:
        """Makes the decoder or the bound."""
        options = self.hyperparameters
        if options.variant == "LBE":
            self.bound = InformationLowerBound(options.score_scale)
            return
        height, width = context.image_size
        self.decoder = nn.Sequential(
            nn.Linear(context.embedding_dim, options.decoder_hidden),
            nn.GELU(),
            nn.Linear(options.decoder_hidden, context.in_channels * height * width),
        )

    def forward(self, seen: Embedded) -> Tensor:
        """The reconstruction error, or minus the bound."""
        if self.hyperparameters.variant == "RC":
            errors = [self._error(view, image) for view, image in zip(seen.views, seen.images, strict=True)]
            return torch.stack(errors).sum()
        means = seen.embeddings
        noise = normals(seen.keys(_NOISE), means.shape[1]) * self.hyperparameters.noise_variance**0.5
        value: Tensor = -self.bound(means, means + noise.to(means.dtype))
        return value

    def _error(self, embeddings: Tensor, images: Tensor) -> Tensor:
        rebuilt = self.decoder(embeddings)
        if rebuilt.shape[1] != images[0].numel():
            raise UserError(
                f"the views are {images.shape[2]} x {images.shape[3]} px, not of the images' size",
                key="objective.terms",
                hint="sufficient_contrastive with variant: LBE takes views of any size",
            )
        return _squared_error(rebuilt, images.flatten(1))


@float32_math
def _squared_error(rebuilt: Tensor, images: Tensor) -> Tensor:
    return (rebuilt - images).square().mean()
