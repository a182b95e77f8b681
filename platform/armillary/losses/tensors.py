"""What every loss does to its inputs: precision, direction, checks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec

import torch
from torch import Tensor

P = ParamSpec("P")


def widen(value: Any) -> Any:
    """Half-precision tensors as float32; everything else as it is."""
    if isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16):
        return value.float()
    return value


def float32_math(forward: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Decorator of a loss's ``forward``: autocast is off inside, and half-precision inputs are widened to float32.

    A unit in the last place of a bfloat16 cosine near 1 is 4e-3; at scale 64 that is 0.25 in the logit.
    """

    @functools.wraps(forward)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        device = next(value.device.type for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        with torch.autocast(device, enabled=False):
            return forward(*map(widen, args), **{key: widen(value) for key, value in kwargs.items()})

    return wrapped


@functools.cache
def half_products_pay(device: str, dtype: torch.dtype) -> bool:
    """Whether matrix products in this half-precision type are quicker than float32 ones on this machine.

    An x86 processor without matrix units for the type (AMX) is taken to be no quicker, even where it knows bfloat16
    instructions: on one such (AVX-512 BF16) these products took twice as long.

    Args:
        device: a device's type, ``cpu`` or ``cuda``.
        dtype: ``bfloat16`` or ``float16``.
    """
    known = torch.cpu.get_capabilities() if device == "cpu" else {}
    if known.get("architecture") != "x86_64":
        return True
    return bool(known.get("amx_bf16" if dtype == torch.bfloat16 else "amx_fp16", False))


def normalize(vectors: Tensor, eps: float = 1e-12) -> Tensor:
    """Rows ``(..., dim)`` scaled to unit length; a zero row has no direction and stays zero, with zero gradient.

    Dividing by ``max(norm, eps)`` instead would give such a row a gradient of 1/eps.
    """
    norm: Tensor = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    return vectors / norm.masked_fill(norm <= eps, torch.inf)


def not_a_number_guard(inputs: Tensor) -> Tensor:
    """Zero, attached to the graph; NaN when any input is NaN or infinite.

    Masks and miners compare, and every comparison with NaN is false: added to their result, this keeps a broken input
    from being masked away. It also gives a batch with nothing to learn from a gradient (of zero).
    """
    return (inputs * 0).sum()


def check_embeddings(embeddings: Tensor, labels: Tensor | None = None) -> None:
    """Refuses embeddings that are not ``(batch, dim)`` or labels that are not ``(batch,)`` integers.

    Raises:
        ValueError: with the shapes found.
    """
    if embeddings.ndim != 2:
        raise ValueError(f"embeddings must be (batch, dim), found shape {tuple(embeddings.shape)}")
    if labels is None:
        return
    if labels.shape != embeddings.shape[:1]:
        raise ValueError(f"labels must be ({embeddings.shape[0]},) as embeddings, found shape {tuple(labels.shape)}")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"labels must be integers, found {labels.dtype}")


def check_labels(labels: Tensor, num_classes: int) -> None:
    """Refuses labels outside ``0 .. num_classes - 1``.

    Raises:
        ValueError: names the first such label and the number of classes.
    """
    outside = (labels < 0) | (labels >= num_classes)
    if bool(outside.any()):
        raise ValueError(
            f"label {int(labels[outside][0])} is out of range: there are {num_classes} classes, 0 to {num_classes - 1}"
        )


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuses an option that is not one of its choices.

    Raises:
        ValueError: names the option, the value and the choices.
    """
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, found {value!r}")
