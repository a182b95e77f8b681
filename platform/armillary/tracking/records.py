"""What of a run goes into MLflow, and how a leaderboard row is read back from it: one place for both directions."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from armillary.spec.jobs import TrainJob
from armillary.spec.loading import config_digest
from armillary.tracking.leaderboard import Row
from armillary.training.rundir import RunRecord

PREFIX = "armillary."
RUN_ID = PREFIX + "run_id"

# What a leaderboard row is made of.
ROW_TAGS = tuple(
    PREFIX + name
    for name in (
        *("run_id", "objective", "backbone", "dataset", "fingerprint", "split", "holdout", "digest"),
        *("epochs", "fold", "seed", "created", "variant", "group", "changes"),
    )
)

# MLflow refuses longer values; see MAX_PARAM_VAL_LENGTH and MAX_TAG_VAL_LENGTH in mlflow.utils.validation.
MAX_PARAM, MAX_TAG, MAX_KEY = 6000, 5000, 250

# Settings that say where and which repetition, not what: two runs that differ only here are one configuration.
_NOT_CONFIGURATION = ("seed", "name", "data.fold", "tracking.", "cluster.")

_FORBIDDEN = re.compile(r"[^\w\-. :/]")


def clean_key(key: str) -> str:
    """A metric or parameter name as MLflow accepts it, e.g. ``train/acc@1`` becomes ``train/acc_1``."""
    return _FORBIDDEN.sub("_", key)[:MAX_KEY]


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys; lists stay values.

    Example:
        >>> flatten({"data": {"fold": 1}, "seed": 0})
        {'data.fold': 1, 'seed': 0}
    """
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def params_of(resolved: Mapping[str, Any]) -> dict[str, str]:
    """The resolved job as MLflow parameters.

    Args:
        resolved: ``job.yaml`` as parsed, with secrets still written as ``${env:NAME}``.
    """
    params = {}
    for key, value in flatten(resolved).items():
        text = value if isinstance(value, str) else json.dumps(value)
        params[clean_key(key)] = text[:MAX_PARAM]
    return params


def changes_of(job: TrainJob) -> dict[str, Any]:
    """Where a job's configuration departs from the defaults, by dotted key; seed, fold and places left out."""
    flat = flatten(job.model_dump(mode="json", exclude_defaults=True))
    return {key: value for key, value in sorted(flat.items()) if not key.startswith(_NOT_CONFIGURATION)}


def tags_of(record: RunRecord, job: TrainJob) -> dict[str, str]:
    """The tags by which runs are found, grouped and ranked, all under ``armillary.``.

    ``digest`` names the configuration without seed and fold, in 12 hexadecimal digits.
    """
    tags: dict[str, Any] = {
        "run_id": record.run_id,
        "objective": job.objective.name,
        "backbone": job.backbone.name,
        "dataset": job.data.name,
        "split": job.data.split,
        "holdout": job.data.holdout,
        "fold": job.data.fold,
        "seed": job.seed,
        "epochs": job.train.epochs,
        "fingerprint": record.fingerprint,
        "digest": config_digest(job)[:12],
        "status": record.status,
        "created": repr(record.created),
        "seconds": repr(record.seconds),
        "git_commit": record.git_commit,
        "group": record.group,
        "variant": record.variant,
        "trial": json.dumps(is_trial(record)),
        "error": record.error,
        "warnings": "\n".join(record.warnings) or None,
        "changes": json.dumps(changes_of(job), separators=(",", ":")),
        **{f"version.{package}": version for package, version in record.versions.items()},
    }
    if len(tags["changes"]) > MAX_TAG:
        # Cut JSON cannot be read back; without it the leaderboard still groups by the digest.
        tags["changes"] = "{}"
    return {clean_key(PREFIX + key): str(value)[:MAX_TAG] for key, value in tags.items() if value is not None}


def is_trial(record: RunRecord) -> bool:
    """Whether the run is one trial of a sweep, judged while hyperparameters were still being chosen."""
    return (record.group or "").startswith("sweep/")


def row_of(tags: Mapping[str, str], metrics: Mapping[str, float]) -> Row | None:
    """The leaderboard row of a stored run, or ``None`` when the run was not written by Armillary."""
    try:
        return Row(
            run_id=tags[RUN_ID],
            objective=tags[PREFIX + "objective"],
            backbone=tags[PREFIX + "backbone"],
            dataset=tags[PREFIX + "dataset"],
            fingerprint=tags[PREFIX + "fingerprint"],
            split=tags[PREFIX + "split"],
            holdout=tags[PREFIX + "holdout"],
            digest=tags[PREFIX + "digest"],
            epochs=int(tags[PREFIX + "epochs"]),
            fold=int(tags[PREFIX + "fold"]),
            seed=int(tags[PREFIX + "seed"]),
            created=float(tags[PREFIX + "created"]),
            metrics=metrics,
            variant=tags.get(PREFIX + "variant"),
            group=tags.get(PREFIX + "group"),
            changes=json.loads(tags.get(PREFIX + "changes", "{}")),
        )
    except (KeyError, ValueError):
        return None
