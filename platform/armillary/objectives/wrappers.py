"""mixup and i-Mix around another objective: ``objective: {name: mixup, of: {name: arcface, margin: 0.3}}``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from pydantic import Field, field_validator
from torch import Tensor, nn

from armillary.components.mixing import beta_share, mixed, of_partners, partners
from armillary.objectives import registry
from armillary.objectives.base import Batch, BuildContext, Citation, Convergence, Needs, Objective, Output, Samples
from armillary.objectives.base import Hyperparameters as Base
from armillary.objectives.registry import register
from armillary.spec.errors import UserError

_SEED = 97
# State that a second pass within a step would write twice.
_STATEFUL = {"queue", "bank", "memory", "memory_bank"}


class _Remembering(nn.Module):
    """An encoder that answers the same images twice without a second pass."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self._last: tuple[Tensor, Tensor] | None = None

    def forward(self, images: Tensor) -> Tensor:
        """The embeddings; the stored ones while it is asked for the tensor it was asked for last."""
        if self._last is None or not _same_memory(self._last[0], images):
            self._last = (images, self.encoder(images))
        return self._last[1]

    def forget(self) -> None:
        """Drops what it stored; once a step."""
        self._last = None


def _same_memory(one: Tensor, other: Tensor) -> bool:
    """Whether both are one tensor: at ZeRO 3 every call of a module gets an alias of its argument."""
    place = [(tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) for tensor in (one, other)]
    return place[0] == place[1]


def inner_hyperparameters(of: dict[str, Any]) -> tuple[type[Objective], Any]:
    """The class and the checked hyperparameters of a wrapped objective.

    Raises:
        UserError: no name, an unknown one, a wrapper, or a hyperparameter out of range, with its key below ``of``.
    """
    name = of.get("name")
    if not isinstance(name, str):
        raise UserError("names no objective", key="objective.of.name", allowed=", ".join(registry.names()))
    cls = registry.get(name, key="objective.of.name")
    if issubclass(cls, Mixing):
        raise UserError(f"{name} is a wrapper itself", key="objective.of.name")
    try:
        return cls, registry.hyperparameters(name, {key: value for key, value in of.items() if key != "name"})
    except UserError as error:
        place = (error.key or "objective").replace("objective", "objective.of", 1)
        raise UserError(error.problem, key=place, allowed=error.allowed, hint=error.hint) from None


class Mixing(Objective):
    """Base: mixed inputs, and the wrapped objective's loss for both of what was mixed.

    ::

        x~ = l x_i + (1 - l) x_j,    L = l L_of(x~, targets of i) + (1 - l) L_of(x~, targets of j),    l ~ Beta(a, a)

    One share l a step. Everyone's partner j comes from a ring through the global batch, drawn by step
    (:func:`armillary.components.mixing.partners`), so that the number of workers changes nothing.
    """

    family = "augmentation"

    @classmethod
    def check(cls, name: str, needs: Needs) -> None:
        """Refuses an objective that cannot be wrapped."""
        if needs.modality != "image" or needs.recipe_options.get("local_crops") or needs.encoder != "any":
            raise UserError(
                f"{cls.name} mixes images that an encoder embeds; {name} works otherwise", key="objective.of.name"
            )
        stateful = _STATEFUL & set(needs.components)
        if stateful:
            raise UserError(
                f"{name} writes its {', '.join(sorted(stateful))} in every pass, and {cls.name} takes two a step",
                key="objective.of.name",
            )

    @classmethod
    def needs_for(cls, hyperparameters: Any) -> Needs:
        """Those of the wrapped objective, with a coupled batch."""
        inner, options = inner_hyperparameters(hyperparameters.of)
        needs = inner.needs_for(options)
        cls.check(inner.name, needs)
        return replace(needs, batch_coupled=True)

    def build(self, context: BuildContext) -> None:
        """Makes the wrapped objective."""
        inner, options = inner_hyperparameters(self.hyperparameters.of)
        self.check(inner.name, inner.needs_for(options))
        self.seed = context.seed
        self.remembering = _Remembering(context.encoder)
        self.of = inner(options, replace(context, encoder=self.remembering))

    def targets_of_partners(self, batch: Batch, partner: Tensor) -> Batch:
        """The batch with the targets of everyone's partner in place of one's own."""
        raise NotImplementedError(f"{type(self).__name__} does not define targets_of_partners")

    def mixed_views(self, batch: Batch, partner: Tensor, share: float) -> tuple[Tensor, ...]:
        """The views with what is to be mixed mixed."""
        raise NotImplementedError(f"{type(self).__name__} does not define mixed_views")

    def share(self) -> float:
        """The step's l."""
        return beta_share(self.hyperparameters.alpha, _SEED, self.seed, self.step)

    def forward(self, batch: Batch) -> Output:
        """The wrapped objective's loss of the mixtures; its metrics likewise, and ``mix``, l."""
        self.of.epoch, self.of.step = self.epoch, self.step
        share = self.share()
        if share == 1:
            return self._finished(self.of(batch), None, share)
        partner = partners(batch.index, _SEED, self.seed, self.step)
        changed = replace(batch, views=self.mixed_views(batch, partner, share))
        own = self.of(changed)
        return self._finished(own, self.of(self.targets_of_partners(changed, partner)), share)

    def _finished(self, own: Output, other: Output | None, share: float) -> Output:
        self.remembering.forget()
        loss, metrics = own.loss, dict(own.metrics)
        if other is not None:
            loss = share * loss + (1 - share) * other.loss
            metrics = {name: share * value + (1 - share) * other.metrics[name] for name, value in metrics.items()}
        return Output(loss, {**metrics, "mix": loss.detach().new_tensor(share)})

    def exported(self) -> nn.Module:
        """What the wrapped objective exports."""
        inner = self.of.exported()
        return inner.encoder if isinstance(inner, _Remembering) else inner

    def before_epoch(self, epoch: int, samples: Samples) -> None:
        """As the wrapped objective."""
        self.of.epoch = epoch
        self.of.before_epoch(epoch, samples)

    def after_step(self, step: int) -> None:
        """As the wrapped objective."""
        self.of.after_step(step)

    def epoch_metrics(self) -> dict[str, Tensor]:
        """As the wrapped objective."""
        return self.of.epoch_metrics()


@register
class Mixup(Mixing):
    """mixup: convex combinations of images and of their labels, around any objective that has labels.

    ``x~ = l x_i + (1 - l) x_j``, and the loss is ``l L(x~, y_i) + (1 - l) L(x~, y_j)``, for cross-entropy the same as a
    soft label. One l a batch, as in the authors' code; ``alpha: 0`` is plain training. The images are embedded once.
    """

    name = "mixup"
    catalog_id = "mixup"
    citation = Citation(
        "Hongyi Zhang, Moustapha Cissé, Yann N. Dauphin, David Lopez-Paz",
        "mixup: Beyond Empirical Risk Minimization",
        2018,
        "ICLR",
        "https://arxiv.org/abs/1710.09412",
    )
    needs = Needs(recipe="faces", fields=("label",), components=("class_head",), batch_coupled=True)
    waivers: ClassVar[Mapping[str, str]] = {"label_out_of_range": "the wrapped head names such a label"}
    convergence = Convergence(job={"objective.of": {"name": "cosface", "scale": 16, "margin": 0.2}})

    class Hyperparameters(Base):
        """Whose loss, and how much is mixed."""

        of: dict[str, Any] = Field({"name": "softmax"}, description="the wrapped objective: name and hyperparameters")
        alpha: float = Field(0.2, ge=0, le=8, description="of Beta(alpha, alpha); 0 mixes nothing")

        @field_validator("of")
        @classmethod
        def _check_inner(cls, of: dict[str, Any]) -> dict[str, Any]:
            inner_hyperparameters(of)
            return of

    @classmethod
    def check(cls, name: str, needs: Needs) -> None:
        """Refuses objectives without labels, too."""
        super().check(name, needs)
        if "label" not in needs.fields:
            raise UserError(f"{name} has no labels to mix", key="objective.of.name", hint="i_mix mixes views instead")

    def mixed_views(self, batch: Batch, partner: Tensor, share: float) -> tuple[Tensor, ...]:
        """All views, each with the partner's same view."""
        return tuple(mixed(view, partner, share) for view in batch.views)

    def targets_of_partners(self, batch: Batch, partner: Tensor) -> Batch:
        """The partner's label, and its other fields."""
        return replace(batch, fields={name: of_partners(column, partner) for name, column in batch.fields.items()})


@register
class IMix(Mixing):
    """i-Mix: first views are mixed, both images' second views are targets in shares, around a two-view objective.

    ``L = l L_of(x~, x'_i) + (1 - l) L_of(x~, x'_j)`` with x' the second view, not mixed: around ``info_nce`` the
    paper's N-pair form with virtual labels, around ``byol`` its regression form. The authors' code draws l for each
    sample, which a wrapper that sees one loss a batch cannot weigh: here it is one a step. ``fold`` takes
    max(l, 1 - l), as that code does, so that the own view keeps the larger share. Mixing by cut-out rectangles is not
    offered.
    """

    name = "i_mix"
    catalog_id = "i_mix"
    citation = Citation(
        "Kibok Lee, Yian Zhu, Kihyuk Sohn, Chun-Liang Li, Jinwoo Shin, Honglak Lee",
        "i-Mix: A Domain-Agnostic Strategy for Contrastive Representation Learning",
        2021,
        "ICLR",
        "https://arxiv.org/abs/2010.08887",
    )
    needs = Needs(views=2, recipe="simclr", components=("projector",), batch_coupled=True)
    SMALL_OF: ClassVar[dict[str, Any]] = {
        "name": "info_nce",
        "temperature": 0.2,
        "projection_dim": 64,
        "projection_hidden": 256,
    }
    convergence = Convergence(job={"objective.of": SMALL_OF})

    class Hyperparameters(Base):
        """Whose loss, and how much is mixed."""

        of: dict[str, Any] = Field(
            {"name": "info_nce", "temperature": 0.2}, description="the wrapped objective: name and hyperparameters"
        )
        alpha: float = Field(1.0, ge=0, le=8, description="of Beta(alpha, alpha); 0 mixes nothing")
        fold: bool = Field(True, description="the own view keeps the larger share")

        @field_validator("of")
        @classmethod
        def _check_inner(cls, of: dict[str, Any]) -> dict[str, Any]:
            inner_hyperparameters(of)
            return of

    @classmethod
    def check(cls, name: str, needs: Needs) -> None:
        """Refuses objectives that do not compare two views, too."""
        super().check(name, needs)
        if needs.views != 2 or "label" in needs.fields:
            raise UserError(f"{name} does not compare two views without labels", key="objective.of.name")

    def share(self) -> float:
        """The step's l, folded."""
        share = super().share()
        return max(share, 1 - share) if self.hyperparameters.fold else share

    def mixed_views(self, batch: Batch, partner: Tensor, share: float) -> tuple[Tensor, ...]:
        """The first view."""
        return (mixed(batch.views[0], partner, share), batch.views[1])

    def targets_of_partners(self, batch: Batch, partner: Tensor) -> Batch:
        """The partner's second view."""
        return replace(batch, views=(batch.views[0], of_partners(batch.views[1], partner)))
