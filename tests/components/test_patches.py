"""Patches and their places."""

from __future__ import annotations

import math

import pytest
import torch

from armillary.components.patches import (
    crop_coordinates,
    grid_coordinates,
    patchify,
    resample_grid,
    rotate_by_position,
    sincos_positions,
    unpatchify,
)


def test_patches_and_back() -> None:
    images = torch.arange(2 * 3 * 4 * 6, dtype=torch.float32).reshape(2, 3, 4, 6)
    patches = patchify(images, (2, 3))
    assert patches.shape == (2, 4, 18)
    second = images[1, :, :2, 3:].permute(1, 2, 0).flatten()
    assert torch.equal(patches[1, 1], second)
    assert torch.equal(unpatchify(patches, (2, 3), (4, 6)), images)


def test_positions_by_hand() -> None:
    positions = sincos_positions(torch.tensor([2.0, 5.0]), 8)
    expected = [f(c * w) for c in (2.0, 5.0) for f in (math.sin, math.cos) for w in (1.0, 0.01)]
    torch.testing.assert_close(positions, torch.tensor(expected))
    with pytest.raises(ValueError, match="multiple of 4, found 6"):
        sincos_positions(torch.zeros(2), 6)


def test_rotation_knows_differences_only() -> None:
    torch.manual_seed(0)
    query, key = torch.randn(2, 8)
    places = torch.tensor([[1.0, 2.0], [4.5, -1.0]])

    def product(shift: float) -> torch.Tensor:
        return rotate_by_position(query, places[0] + shift) @ rotate_by_position(key, places[1] + shift)

    torch.testing.assert_close(product(0.0), product(3.7))
    assert not torch.allclose(product(0.0), query @ key)
    torch.testing.assert_close(rotate_by_position(query, places[0]).norm(), query.norm())


def test_a_crop_in_another_crops_grid() -> None:
    reference = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.5, 0.0, 1.0, 0.5]])
    box = torch.tensor([[0.5, 0.25, 1.0, 0.5], [0.0, 0.0, 0.5, 1.0]])
    found = crop_coordinates(box, (2, 2), reference, (4, 4))
    # First: patches a quarter of the image wide and an eighth high, from x = 2, y = 1 of a 4 x 4 grid.
    torch.testing.assert_close(found[0], torch.tensor([[2.0, 1.0], [3.0, 1.0], [2.0, 1.5], [3.0, 1.5]]))
    torch.testing.assert_close(found[1], torch.tensor([[-4.0, 0.0], [-2.0, 0.0], [-4.0, 4.0], [-2.0, 4.0]]))
    same = crop_coordinates(box, (3, 2), box, (3, 2))
    torch.testing.assert_close(same, grid_coordinates((3, 2)).expand(2, 6, 2))


def test_positions_resampled() -> None:
    constant = torch.ones(1, 12, 5)
    assert resample_grid(constant, (3, 4), (3, 4)) is constant
    torch.testing.assert_close(resample_grid(constant, (3, 4), (2, 2)), torch.ones(1, 4, 5))
    # A ramp keeps its direction and its middle.
    ramp = grid_coordinates((4, 4))[None]
    small = resample_grid(ramp, (4, 4), (2, 2)).reshape(2, 2, 2)
    assert (small[:, 1, 0] > small[:, 0, 0]).all()
    torch.testing.assert_close(small.mean(dim=(0, 1)), torch.tensor([1.5, 1.5]))
