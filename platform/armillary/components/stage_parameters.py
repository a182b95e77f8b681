"""Which of an encoder's parameters belong to which of its stages, and forward passes in which only some can learn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from armillary.components.encoders import map_encoder


def stage_parameters(encoder: nn.Module, in_channels: int, image_size: tuple[int, int]) -> list[list[str]]:
    """Names of the parameters of each stage, found by asking what each feature map is differentiable by.

    A parameter belongs to the first stage whose map depends on it. Those that no map depends on, of what turns the last
    map into an embedding, make up one further list.

    Args:
        encoder: a ``MapEncoder``; neither its weights nor its statistics change.
        in_channels: of its images.
        image_size: of its images.

    Returns:
        One list a stage, and the further one.
    """
    learning = {name: parameter for name, parameter in encoder.named_parameters() if parameter.requires_grad}
    if not learning:
        return [[] for _ in range(len(map_encoder(encoder).stage_channels) + 1)]
    like = next(iter(learning.values()))
    images = torch.zeros(2, in_channels, *image_size, device=like.device, dtype=like.dtype)
    modes = [(module, module.training) for module in encoder.modules()]
    encoder.eval()
    try:
        with torch.enable_grad():
            maps = map_encoder(encoder).stages(images)
        owned: list[list[str]] = []
        for feature_map in maps:
            free = [name for name in learning if not any(name in names for names in owned)]
            found = torch.autograd.grad(
                feature_map.sum(), [learning[name] for name in free], allow_unused=True, retain_graph=True
            )
            owned.append([name for name, gradient in zip(free, found, strict=True) if gradient is not None])
    finally:
        for module, mode in modes:
            module.training = mode
    return [*owned, [name for name in learning if not any(name in names for names in owned)]]


@contextmanager
def only_learning(module: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Within it forward passes record no gradient for the module's parameters other than ``names``."""
    parameters = dict(module.named_parameters())
    still = [parameter for name, parameter in parameters.items() if parameter.requires_grad and name not in set(names)]
    try:
        for parameter in still:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in still:
            parameter.requires_grad_(True)
