"""The JSON Schema (draft 2020-12) of job files, for editors that complete and check while one types."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from pydantic import TypeAdapter

from armillary.spec.jobs import Job, Kinds

_DRAFT = "https://json-schema.org/draft/2020-12/schema"
# What may be the path of a job file: (definition, property).
_PATHS = (("SweepJob", "base"), ("StudyJob", "base"), ("RegressionEntry", "job"))


def job_schema(objectives: Mapping[str, dict[str, Any]] | None = None) -> dict[str, Any]:
    """The schema of a job of any kind.

    Args:
        objectives: the JSON Schema of each objective's hyperparameters, by name. Given, ``objective.name`` must be one
            of them and the other keys of ``objective`` its hyperparameters; otherwise any name and keys pass.

    Returns:
        A schema whose ``kind`` selects the rest, a missing one meaning ``train``.
    """
    definitions: dict[str, Any] = TypeAdapter(Job).json_schema()["$defs"]
    for owner, name in _PATHS:
        job = definitions[owner]["properties"][name]
        description = job.pop("description", "")
        definitions[owner]["properties"][name] = {
            "description": description,
            "anyOf": [{"type": "string", "description": "the path of a train job"}, job],
        }
    if objectives is not None:
        _add_objectives(definitions, objectives)
    others = [kind for kind in Kinds.MODELS if kind != "train"]
    return {
        "$schema": _DRAFT,
        "title": "Armillary job",
        "type": "object",
        "properties": {"kind": {"enum": list(Kinds.MODELS), "default": "train", "description": "what kind of job"}},
        "allOf": [
            {
                "if": {"properties": {"kind": {"const": kind}}, "required": ["kind"]},
                "then": {"$ref": f"#/$defs/{Kinds.MODELS[kind].__name__}"},
            }
            for kind in others
        ]
        + [
            {
                "if": {"not": {"properties": {"kind": {"enum": others}}, "required": ["kind"]}},
                "then": {"$ref": f"#/$defs/{Kinds.MODELS['train'].__name__}"},
            }
        ],
        "$defs": definitions,
    }


def _add_objectives(definitions: dict[str, Any], objectives: Mapping[str, dict[str, Any]]) -> None:
    spec = definitions["ObjectiveSpec"]
    spec["properties"]["name"]["enum"] = sorted(objectives)
    spec["allOf"] = []
    for name, schema in sorted(objectives.items()):
        own = deepcopy(schema)
        # Definitions of one objective must not meet those of another under the same name.
        for inner, definition in own.pop("$defs", {}).items():
            definitions[f"{name}.{inner}"] = _renamed(definition, name)
        properties = {"name": {"const": name}, "terms": True, **_renamed(own.get("properties", {}), name)}
        then = {"properties": properties, "required": own.get("required", []), "additionalProperties": False}
        spec["allOf"].append({"if": {"properties": {"name": {"const": name}}, "required": ["name"]}, "then": then})


def _renamed(schema: Any, name: str) -> Any:
    if isinstance(schema, dict):
        return {
            key: value.replace("#/$defs/", f"#/$defs/{name}.")
            if key == "$ref" and isinstance(value, str)
            else _renamed(value, name)
            for key, value in schema.items()
        }
    return [_renamed(item, name) for item in schema] if isinstance(schema, list) else schema
