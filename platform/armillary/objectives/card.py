"""The card of an objective: all that a listing, a page of documentation or a program wants to know of it."""

from __future__ import annotations

import importlib
import inspect
import re
from typing import Any

from armillary.objectives.base import Needs, Objective
from armillary.objectives.registry import get, legal_range
from armillary.spec.errors import UserError
from armillary.spec.spaces import load_space

# The recipe in jobs/recipes/ that trains a family by a change of objective.name; other families have none.
_FACES = "margin_softmax softmax adaptive_margin queue_augmented curriculum probabilistic set_based generative"
_LABEL_FREE = (
    "contrastive_views mutual_information decorrelation self_distillation dense pretext clustering masked_modelling "
    "density_ratio cross_modal augmentation"
)
RECIPES: dict[str, str] = {
    **dict.fromkeys(_FACES.split(), "faces"),
    **dict.fromkeys(["tuple", "pairwise", "contrastive_supervised"], "retrieval"),
    "cross_resolution": "cross_resolution",
    "text": "sentences",
    "image_text": "image_text",
    "graph": "graphs",
    **dict.fromkeys(_LABEL_FREE.split(), "pretrain"),
}
# What a method needs of its family's recipe beside its name.
_OPTIONS: dict[str, tuple[str, ...]] = {
    # Its comparison that trusts poor images less.
    "qmagface": ("evaluate.protocols=[verification,quality_verification]",),
    "siamese_pose": ("data.name=identities_small", "data.split=identity", "evaluate.protocols=[verification]"),
}
# A graph's term on images, and a graph of users and items.
_RECIPE_OF = {"con2r": "retrieval", "simgcl": "recommendation"}

_ROLE = re.compile(r":[a-z]+:`~?(?P<target>[^`]+)`")
_LOSS = re.compile(r":class:`(armillary\.losses\.[\w.]+)`")
# A sentence that only says where the equations stand: they follow.
_POINTER = re.compile(r"^[A-Z][a-z ,]*: :class:`armillary\.losses\.[\w.]+`\.\s*")


def describe(name: str) -> dict[str, Any]:
    """Everything there is to show of an objective, as plain values.

    ``definition`` holds its equations and what is to be said of them: paragraphs of its own docstring, then those of
    the losses it is built from. ``search_space`` maps dotted keys to ranges.
    """
    cls = get(name)
    schema = cls.Hyperparameters.model_json_schema().get("properties", {})
    return {
        "name": cls.name,
        "family": cls.family,
        "catalog_id": cls.catalog_id,
        "summary": summary(cls),
        "definition": definition(cls),
        "needs": cls.needs.as_dict(),
        "hyperparameters": [
            {
                "name": key,
                "default": field.get_default(call_default_factory=False),
                "allowed": legal_range(cls, key),
                "description": schema.get(key, {}).get("description"),
            }
            for key, field in cls.Hyperparameters.model_fields.items()
        ],
        "search_space": _space(name),
        "recipe": recipe(cls),
        "overrides": list(overrides(cls)),
        "citation": vars(cls.citation),
    }


def summary(cls: type[Any]) -> str:
    """The first line of a docstring, as plain text."""
    return _plain((inspect.getdoc(cls) or "").split("\n")[0])


def definition(cls: type[Objective]) -> list[str]:
    """The objective's docstring after its first line, and those of its losses up to their arguments, as plain text."""
    own = _POINTER.sub("", _body(cls))
    losses = [getattr(cls, "loss_class", None), *(_named(path) for path in _LOSS.findall(inspect.getdoc(cls) or ""))]
    found = dict.fromkeys(loss for loss in losses if loss is not None)
    texts = [own, *(f"{loss.__name__}: {_summary_and_body(loss)}" for loss in found)]
    return [text for text in map(_plain, texts) if text]


def recipe(cls: type[Objective]) -> str | None:
    """The name of the job in ``jobs/recipes/`` that trains it; ``None`` where no recipe fits (videos)."""
    if cls.needs_for(cls.Hyperparameters()).recipe == "frames":
        return None
    return _RECIPE_OF.get(cls.name, RECIPES.get(cls.family))


def overrides(cls: type[Objective]) -> tuple[str, ...]:
    """What its recipe must be told beside ``objective.name``, as dotted overrides."""
    return _OPTIONS.get(cls.name, ())


def needs_in_words(needs: Needs) -> str:
    """What the platform must provide, in a line: ``2 views, label, teacher``."""
    views = [f"{needs.views} views"] if needs.views > 1 else []
    kind = [needs.modality.replace("_", " + ")] if needs.modality != "image" else []
    sampler = [f"{needs.samples_per_class} images a class"] if needs.samples_per_class else []
    encoder = {"any": [], "maps": ["feature maps"], "tokens": ["patch tokens"]}[needs.encoder]
    components = [word.replace("_", " ") for word in needs.components]
    return ", ".join([*kind, *views, *needs.fields, *sampler, *encoder, *components]) or "images"


def short_citation(cls: type[Objective]) -> str:
    """First author, venue and year, as a table has room for: ``Deng et al., CVPR 2019``."""
    citation = cls.citation
    authors = citation.authors.split(",")
    first = authors[0].strip().split(" ")[-1] if len(authors) > 1 else citation.authors
    who = f"{first} et al." if len(authors) > 1 else first
    when = " ".join(str(part) for part in (citation.venue, citation.year) if part)
    return f"{who}, {when}" if when else who


def _space(name: str) -> dict[str, Any] | None:
    try:
        space = load_space(name)
    except UserError:
        return None  # a plug-in may come without one
    return {key: searched.model_dump(exclude_defaults=True, by_alias=True) for key, searched in space.items()}


def _named(path: str) -> type[Any]:
    module, _, attribute = path.rpartition(".")
    return getattr(importlib.import_module(module), attribute)  # type: ignore[no-any-return]


def _body(cls: type[Any]) -> str:
    return (inspect.getdoc(cls) or "").partition("\n")[2].partition("\nArgs:")[0].strip()


def _summary_and_body(cls: type[Any]) -> str:
    return f"{summary(cls)}\n\n{_body(cls)}".strip()


def _plain(text: str) -> str:
    """Without the marks of reStructuredText that only its tools read."""
    text = _ROLE.sub(lambda match: match["target"].rpartition(".")[2], text)
    return re.sub(r"(?m)^::\n\n", "", text).replace("::\n", ":\n").replace("``", "`")
