"""Objectives: trainable recipes, found by name."""

from armillary.objectives.base import Batch, BuildContext, Citation, Hyperparameters, Needs, Objective, Output
from armillary.objectives.registry import describe, get, hyperparameters, names, register

__all__ = [
    "Batch",
    "BuildContext",
    "Citation",
    "Hyperparameters",
    "Needs",
    "Objective",
    "Output",
    "describe",
    "get",
    "hyperparameters",
    "names",
    "register",
]
