"""The encoder a run leaves behind: safetensors for the weights, JSON for how to build it. Nothing is pickled.

Beside it lie the rows of its class heads, where it has one: row c is that of the c-th training class. A projector is
kept too: fine-tuning may start from one of its layers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from armillary.components.backbones import build_encoder
from armillary.components.heads import Projector
from armillary.components.normalization import convert_batch_norm
from armillary.components.teacher import teachers
from armillary.components.text import TextTransformer
from armillary.components.towers import TwoTowers
from armillary.objectives import Objective
from armillary.objectives.terms import WithTerms
from armillary.spec.errors import UserError
from armillary.spec.home import DESCRIPTION, HEAD, WEIGHTS
from armillary.spec.jobs import BackboneSpec, TrainJob
from armillary.training.rundir import RunDirectory, write_atomically

PROJECTOR = "projector.safetensors"
TOKENIZER = "tokenizer.json"


def save_encoder(folder: Path, encoder: nn.Module, job: TrainJob, channels: int, image_size: tuple[int, int]) -> None:
    """Writes an encoder into a run's ``model`` folder."""
    save_file(
        {name: value.detach().cpu().contiguous() for name, value in encoder.state_dict().items()}, folder / WEIGHTS
    )
    description = {
        "backbone": job.backbone.model_dump(mode="json"),
        "in_channels": channels,
        "image_size": list(image_size),
        "objective": job.objective.name,
    }
    if isinstance(encoder, TwoTowers):
        description["text"] = encoder.text_options
    write_atomically(folder / DESCRIPTION, json.dumps(description, indent=2))


def save_head(folder: Path, rows: Mapping[str, Tensor]) -> None:
    """Writes the whole row tensors of class heads, by the name they have in the objective, e.g. ``loss.weight``."""
    if rows:
        save_file({name: value.detach().cpu().contiguous() for name, value in rows.items()}, folder / HEAD)


def save_projector(folder: Path, objective: Objective) -> None:
    """Writes the projector that belongs to the exported encoder, where there is one."""
    objective = objective.objective if isinstance(objective, WithTerms) else objective
    holders = {id(teacher["encoder"]): teacher for teacher in teachers(objective) if "encoder" in teacher.parts}
    holder = holders.get(id(objective.exported()), objective)
    projector = getattr(holder, "projector", None)
    if isinstance(projector, Projector):
        state = {name: value.detach().cpu().contiguous() for name, value in projector.state_dict().items()}
        save_file(state, folder / PROJECTOR)


def load_projector(run: RunDirectory) -> dict[str, Tensor]:
    """The state of a finished run's projector, by the names of :class:`Projector`; empty where it has none."""
    path = run.path / "model" / PROJECTOR
    return load_file(path) if path.is_file() else {}


def load_head(run: RunDirectory) -> dict[str, Tensor]:
    """The row tensors of a finished run's class heads, ``(classes, ...)``, by name.

    Raises:
        UserError: the run left none: its objective has no class head, or it has not finished.
    """
    path = run.path / "model" / HEAD
    if not path.is_file():
        raise UserError(
            f"run {run.run_id}, of {describe(run)['objective']}, has no class head",
            hint="`armillary objectives list` names those that need one; it is kept when such a run ends",
        )
    return load_file(path)


def describe(run: RunDirectory) -> dict[str, Any]:
    """How a finished run's encoder is built: ``backbone``, ``in_channels``, ``image_size``, ``objective``.

    Raises:
        UserError: the run has no model yet.
    """
    folder = run.path / "model"
    if not (folder / DESCRIPTION).is_file() or not (folder / WEIGHTS).is_file():
        raise UserError(
            f"run {run.run_id} has no model: it is {run.record().status}",
            hint=f"armillary run --resume {run.run_id}",
        )
    description: dict[str, Any] = json.loads((folder / DESCRIPTION).read_text())
    return description


def load_encoder(run: RunDirectory) -> nn.Module:
    """The encoder of a finished run, in evaluation mode.

    Raises:
        UserError: the run has no model yet, or the files do not fit together.
    """
    folder, description = run.path / "model", describe(run)
    height, width = description["image_size"]
    encoder = build_encoder(
        BackboneSpec(**description["backbone"]), in_channels=description["in_channels"], image_size=(height, width)
    )
    if "text" in description:
        encoder = TwoTowers(encoder, TextTransformer(**description["text"]))
    encoder = convert_batch_norm(encoder)
    stored = load_file(folder / WEIGHTS)
    here = encoder.state_dict()
    wrong = sorted(name for name in stored.keys() | here.keys() if shape(stored, name) != shape(here, name))
    if wrong:
        raise UserError(
            f"{folder / WEIGHTS} is of another model: {wrong[0]} does not fit", where=str(folder / DESCRIPTION)
        )
    encoder.load_state_dict(stored)
    return encoder.eval()


def load_tokenizer(run: RunDirectory) -> str:
    """The tokenizer of a run that has started, as JSON of the ``tokenizers`` library; empty where it reads no text."""
    path = run.path / "model" / TOKENIZER
    return path.read_text() if path.is_file() else ""


def shape(state: dict[str, Any], name: str) -> tuple[int, ...] | None:
    """The shape stored under a name, ``None`` when it is absent."""
    return tuple(state[name].shape) if name in state else None
