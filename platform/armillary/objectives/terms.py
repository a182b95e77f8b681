"""Terms: regularizers that a job adds to any objective, ``objective.terms: [{name: koleo, weight: 0.1}]``.

A term sees the embeddings that the objective's own forward pass takes from its encoder; there is no second pass. What
terms there are stands in ``regularizers.py``; this is what they and jobs agree on.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any, ClassVar, TypeVar

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from armillary.components.counter import key, sample_keys
from armillary.objectives.base import Batch, BuildContext, Hyperparameters, Needs, Objective, Output
from armillary.spec.errors import UserError, nearest, unknown_name


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
    needs_graph: ClassVar[bool] = False
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


@cache
def _discover() -> None:
    import_module("armillary.objectives.regularizers")


def term_names() -> list[str]:
    """All terms, sorted."""
    _discover()
    return sorted(_TERMS)


def get_term(name: str, *, number: int = 0) -> type[Term]:
    """The term of that name.

    Raises:
        UserError: there is none; shows the nearest.
    """
    _discover()
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
        UserError: the objective takes maps or tokens from its encoder, or neither images nor graphs: no embeddings.
    """
    from dataclasses import replace

    if not terms:
        return needs
    if needs.encoder != "any" or needs.modality not in ("image", "image_text", "graph"):
        raise UserError(
            f"{objective} takes no embeddings of images or graphs from its encoder, which is what terms act on",
            key="objective.terms",
            allowed="objectives whose encoder gives embeddings",
        )
    labels = any(term.kind.needs_labels for term in terms)
    fields = needs.fields if "label" in needs.fields or not labels else (*needs.fields, "label")
    coupled = needs.batch_coupled or any(term.kind.batch_coupled for term in terms)
    graph = needs.graph or any(term.kind.needs_graph for term in terms)
    return replace(needs, fields=fields, batch_coupled=coupled, graph=graph)


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
