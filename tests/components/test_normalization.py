"""Synchronised batch norm: one process's results on any number of workers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from armillary.components.normalization import SyncBatchNorm, SyncBatchNormAct, convert_batch_norm
from armillary.testing.gloo_pool import shared_pool

SHAPES = {"1d": (8, 3), "1d_sequence": (8, 3, 5), "2d": (8, 3, 4, 5)}


def norm(shape: tuple[int, ...], **options: Any) -> nn.Module:
    kind = nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm1d
    module = kind(shape[1], **options)
    if module.weight is not None:
        nn.init.uniform_(module.weight, 0.5, 2)
    if module.bias is not None:
        nn.init.uniform_(module.bias, -1, 1)
    return module


def two_steps(module: nn.Module, inputs: list[Tensor], targets: list[Tensor]) -> dict[str, Tensor]:
    """Outputs, input and parameter gradients of two steps, and the buffers afterwards."""
    found: dict[str, Tensor] = {}
    for step, (values, target) in enumerate(zip(inputs, targets, strict=True)):
        values = values.clone().requires_grad_()
        output = module(values)
        module.zero_grad()
        (output * target).square().mean().backward()
        assert values.grad is not None
        found |= {f"output{step}": output.detach(), f"gradient{step}": values.grad}
    found |= {f"gradient of {name}": p.grad for name, p in module.named_parameters() if p.grad is not None}
    return found | {name: buffer.clone() for name, buffer in module.named_buffers()}


def data(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    draw = torch.Generator().manual_seed(0)
    # Far from zero: a variance taken as E[x^2] - E[x]^2 would lose its digits.
    inputs = [(20 + 3 * torch.randn(shape, generator=draw)).to(dtype) for _ in range(2)]
    return inputs, [torch.randn(shape, generator=draw).to(dtype) for _ in range(2)]


def on_a_worker(shape: tuple[int, ...], dtype: torch.dtype, options: dict[str, Any]) -> dict[str, Tensor]:
    torch.manual_seed(0)
    module = convert_batch_norm(norm(shape, **options)).to(dtype)
    half = shape[0] // dist.get_world_size()
    rows = slice(dist.get_rank() * half, (dist.get_rank() + 1) * half)
    inputs, targets = ([tensor[rows] for tensor in tensors] for tensors in data(shape, dtype))
    found = two_steps(module, inputs, targets)
    for name, gradient in found.items():
        if name.startswith("gradient of"):
            dist.all_reduce(gradient)
            gradient /= dist.get_world_size()
    module.eval()
    return found | {"evaluated": module(inputs[0]).detach()}


@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"affine": False}, {"bias": False}], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["64", "32"])
def test_two_workers(shape: tuple[int, ...], dtype: torch.dtype, tolerance: float, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    plain = norm(shape, **options).to(dtype)
    inputs, targets = data(shape, dtype)
    whole = two_steps(plain, inputs, targets) | {"evaluated": plain.eval()(inputs[0]).detach()}
    parts = shared_pool().run(on_a_worker, shape, dtype, options)
    assert parts[0].keys() == whole.keys()
    for name, expected in whole.items():
        if expected.shape == shape:
            found = torch.cat([part[name] for part in parts])
            # Each worker's loss is a mean over half the batch: its input gradients are twice the whole's.
            found = found / 2 if name.startswith("gradient") else found
        else:
            found = parts[0][name]
            torch.testing.assert_close(parts[1][name], found, rtol=0, atol=0)
        assert (found - expected).abs().max() <= tolerance * max(1.0, float(expected.abs().max())), name


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_one_process_is_exactly_torch(shape: tuple[int, ...]) -> None:
    plain = norm(shape)
    converted = convert_batch_norm(copy.deepcopy(plain))
    assert isinstance(converted, SyncBatchNorm)
    inputs, targets = data(shape, torch.float32)
    expected, found = two_steps(plain, inputs, targets), two_steps(converted, inputs, targets)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_conversion_keeps_parameters_and_keys() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Sequential(nn.Flatten(), nn.BatchNorm1d(16)))
    before, parameters = model.state_dict(), list(model.parameters())
    model[1].eval()
    assert convert_batch_norm(model) is model
    assert isinstance(model[1], SyncBatchNorm)
    assert sum(isinstance(module, SyncBatchNorm) for module in model.modules()) == 2
    assert not model[1].training
    assert all(old is new for old, new in zip(parameters, model.parameters(), strict=True))
    assert list(model.state_dict()) == list(before)
    assert all(buffer.device.type == "cpu" for buffer in model.buffers())
    once = model[1]
    convert_batch_norm(model)
    assert model[1] is once


def test_timm_norm_with_activation() -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("test_efficientnet.r160_in1k", pretrained=False, num_classes=0)
    images = torch.randn(2, 3, 64, 64)
    torch.manual_seed(0)
    twin = convert_batch_norm(copy.deepcopy(model))
    assert any(isinstance(module, SyncBatchNormAct) for module in twin.modules())
    assert not any(isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)) for module in twin.modules())
    assert list(twin.state_dict()) == list(model.state_dict())
    torch.manual_seed(1)
    expected = model(images)
    torch.manual_seed(1)
    assert torch.equal(twin(images), expected)


def test_unknown_batch_norm() -> None:
    class Doubled(nn.BatchNorm1d):
        def forward(self, input: Tensor) -> Tensor:
            doubled: Tensor = 2 * super().forward(input)
            return doubled

    with pytest.raises(TypeError, match="Doubled"):
        convert_batch_norm(nn.Sequential(Doubled(3)))


def test_wrong_shape() -> None:
    with pytest.raises(ValueError, match="channels"):
        SyncBatchNorm(3)(torch.randn(3))
