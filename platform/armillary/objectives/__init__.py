"""Objectives: trainable recipes, found by name."""

from armillary.objectives.base import (
    Batch,
    BuildContext,
    Citation,
    Convergence,
    Hyperparameters,
    Needs,
    Objective,
    Output,
    Samples,
)
from armillary.objectives.card import describe
from armillary.objectives.registry import get, hyperparameters, names, register

__all__ = [
    "Batch",
    "BuildContext",
    "Citation",
    "Convergence",
    "Hyperparameters",
    "Needs",
    "Objective",
    "Output",
    "Samples",
    "describe",
    "get",
    "hyperparameters",
    "names",
    "register",
]
