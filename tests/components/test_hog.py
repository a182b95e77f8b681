"""Histograms of gradients: a worked cell, loops, scikit-image, what must not change them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from armillary.components.hog import hog, hog_of_patches


def image(height: int = 24, width: int = 16, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.rand(2, 1, height, width, generator=draw, dtype=torch.float64)


def worked_cell() -> Tensor:
    return torch.tensor([[(r * r + 3 * c + (r * c) % 5) / 50 for c in range(8)] for r in range(8)], dtype=torch.float64)


def test_a_worked_cell() -> None:
    cell = worked_cell()[None, None]
    expected = [0.86320806, 0.46668903, 0.12344777, 0.0, 0.1477628, 0.0, 0.0, 0.0, 0.0]
    assert hog(cell)[0, 0, :, 0, 0].tolist() == pytest.approx(expected, abs=1e-8)
    counted = [35.51844688, 19.20286699, 5.07950909, 0.0, 6.08, 0.0, 0.0, 0.0, 0.0]
    scaled = hog(cell, kind="scaled")[0, 0, :, 0, 0]
    assert (scaled / scaled.sum()).tolist() == pytest.approx([value / sum(counted) for value in counted], abs=1e-8)


def hog_slow(pixels: Tensor, bins: int, cell: int, window: int) -> Tensor:
    """MaskFeat's layer by loops over pixels, ``(bins, rows, columns)`` of one channel."""
    height, width = pixels.shape
    found = torch.zeros(bins, height // cell, width // cell, dtype=torch.float64)

    def at(row: int, column: int) -> float:
        row, column = abs(row), abs(column)
        row = 2 * (height - 1) - row if row >= height else row
        return float(pixels[row, 2 * (width - 1) - column if column >= width else column])

    for r in range(height // cell * cell):
        for c in range(width // cell * cell):
            gx = sum((2 - abs(d)) * (at(r + d, c - 1) - at(r + d, c + 1)) for d in (-1, 0, 1))
            gy = sum((2 - abs(d)) * (at(r - 1, c + d) - at(r + 1, c + d)) for d in (-1, 0, 1))
            weight = math.hypot(gx, gy)
            if window:
                x, y = r % window - (window - 1) / 2, c % window - (window - 1) / 2
                weight *= math.exp(-(x * x + y * y) / (2 * (window / 2) ** 2))
            found[math.floor(bins * math.atan2(gx, gy) / math.pi) % bins, r // cell, c // cell] += weight
    return found / found.square().sum(0, keepdim=True).sqrt()


@pytest.mark.parametrize(("bins", "cell", "window"), [(9, 8, 0), (9, 8, 16), (6, 4, 10), (12, 5, 0)])
def test_it_is_the_loops(bins: int, cell: int, window: int) -> None:
    pixels = image()
    found = hog(pixels, bins=bins, cell=cell, window=window)
    assert found.shape == (2, 1, bins, 24 // cell, 16 // cell)
    torch.testing.assert_close(found[1, 0], hog_slow(pixels[1, 0], bins, cell, window), rtol=1e-9, atol=1e-9)


@pytest.mark.parity
@pytest.mark.parametrize(("bins", "cell"), [(9, 8), (6, 4), (12, 2)])
def test_like_scikit_image(bins: int, cell: int) -> None:
    feature = pytest.importorskip("skimage.feature")
    pixels = image()
    theirs = feature.hog(
        pixels[0, 0].numpy(),
        orientations=bins,
        pixels_per_cell=(cell, cell),
        cells_per_block=(1, 1),
        block_norm="L2",
        feature_vector=False,
    )
    ours = hog(pixels, bins=bins, cell=cell, kind="central")[0, 0].permute(1, 2, 0)
    # scikit-image sums the votes of a cell in single precision.
    torch.testing.assert_close(ours, torch.from_numpy(theirs[:, :, 0, 0]), rtol=1e-6, atol=1e-6)


def test_brightness_and_contrast_change_nothing() -> None:
    found = hog(image())
    torch.testing.assert_close(hog(image() + 0.3), found, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(hog(3 * image()), found)
    torch.testing.assert_close(found.square().sum(2), torch.ones(2, 1, 3, 2, dtype=torch.float64))
    torch.testing.assert_close(hog(5 * image() + 1, kind="scaled"), hog(image(), kind="scaled"), rtol=1e-7, atol=1e-7)


def test_a_flat_image_is_zero() -> None:
    for kind in ("sobel", "central", "scaled"):
        assert hog(torch.full((1, 3, 16, 16), 0.5), kind=kind).abs().max() == 0


def test_cells_by_patch() -> None:
    """Patch (1, 0) of 8 px has the four cells below the first patch's."""
    cells = hog(image(16, 16), cell=4)
    patches = hog_of_patches(cells, (2, 2))
    assert patches.shape == (2, 4, 36)
    assert torch.equal(patches[0, 2], cells[0, :, :, 2:, :2].flatten())


def test_half_precision_is_widened() -> None:
    assert hog(image().bfloat16()).dtype == torch.float32
