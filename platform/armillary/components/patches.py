"""Images as patches, and where patches lie: cutting, fixed positions, coordinates of one crop in another's grid."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def patchify(images: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """Cuts images into patches.

    Args:
        images: ``(batch, channels, height, width)``; patches divide height and width.
        patch_size: height and width of a patch.

    Returns:
        ``(batch, T, rows * columns * channels)``: patches in rows from the upper left, each flattened with the channel
        as its last axis.
    """
    batch, channels, height, width = images.shape
    rows, columns = patch_size
    cut = images.reshape(batch, channels, height // rows, rows, width // columns, columns)
    return cut.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, rows * columns * channels)


def unpatchify(patches: Tensor, patch_size: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Puts patches back together: the inverse of :func:`patchify` for images of ``size`` pixels."""
    rows, columns = patch_size
    grid = (size[0] // rows, size[1] // columns)
    cut = patches.reshape(len(patches), *grid, rows, columns, -1)
    return cut.permute(0, 5, 1, 3, 2, 4).reshape(len(patches), -1, *size)


def grid_coordinates(grid: tuple[int, int], device: torch.device | None = None) -> Tensor:
    """Places ``(T, 2)`` float32, x (column) then y (row), of a grid's patches in rows from the upper left."""
    rows, columns = (torch.arange(count, device=device, dtype=torch.float32) for count in grid)
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack([x.flatten(), y.flatten()], dim=1)


def crop_coordinates(box: Tensor, grid: tuple[int, int], reference: Tensor, reference_grid: tuple[int, int]) -> Tensor:
    """Where the patches of one crop lie in the patch grid of another crop of the same image.

    Args:
        box: ``(batch, 4)``, x0, y0, x1, y1 of the crop as shares of the image.
        grid: rows and columns of its patches.
        reference: ``(batch, 4)``, the other crop's box.
        reference_grid: rows and columns of the other crop's patches.

    Returns:
        ``(batch, T, 2)`` float32, x then y, real numbers: 0 is the other crop's first patch, one unit a patch;
        negative or beyond the grid where the crops do not overlap. Upper left corners are compared, and views are
        taken as not flipped.
    """
    box, reference = box.float(), reference.float()
    size, reference_size = box[:, 2:] - box[:, :2], reference[:, 2:] - reference[:, :2]
    counts, reference_counts = (
        torch.tensor([columns, rows], dtype=torch.float32, device=box.device)
        for rows, columns in (grid, reference_grid)
    )
    unit = reference_size / reference_counts
    first = (box[:, :2] - reference[:, :2]) / unit
    step = size / counts / unit
    return first[:, None] + step[:, None] * grid_coordinates(grid, box.device)


def sincos_positions(coordinates: Tensor, dim: int) -> Tensor:
    """Fixed positions of real coordinates: half of the channels turn with x, half with y.

    ``[sin(x w), cos(x w), sin(y w), cos(y w)]`` with ``w_k = 10000^(-k / (dim / 4))`` (Vaswani et al. 2017, section
    3.5; in two dimensions as in MoCo v3 and MAE).

    Args:
        coordinates: ``(..., 2)``, x then y, in patches.
        dim: width, a multiple of 4.

    Returns:
        ``(..., dim)`` float32.

    Raises:
        ValueError: ``dim`` is no multiple of 4.
    """
    angles = _angles(coordinates, dim)
    x, y = angles.unbind(-2)
    return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=-1)


def rotate_by_position(vectors: Tensor, coordinates: Tensor, base: float = 10000.0) -> Tensor:
    """Rotary positions in two dimensions: the product of two rotated vectors depends on the difference of places alone.

    Pairs of channels are turned by ``x w_k`` in the first half, by ``y w_k`` in the second (Su et al., "RoFormer",
    2021, equation 34).

    Args:
        vectors: ``(..., dim)``, dim a multiple of 4.
        coordinates: ``(..., 2)``, x then y; its leading dimensions are broadcast.
        base: frequencies are ``w_k = base^(-k / (dim / 4))``.

    Returns:
        ``(..., dim)``.
    """
    angles = _angles(coordinates, vectors.shape[-1], base).flatten(-2)
    even, odd = vectors.unflatten(-1, (-1, 2)).unbind(-1)
    cosine, sine = angles.cos().to(vectors.dtype), angles.sin().to(vectors.dtype)
    return torch.stack([even * cosine - odd * sine, even * sine + odd * cosine], dim=-1).flatten(-2)


def _angles(coordinates: Tensor, dim: int, base: float = 10000.0) -> Tensor:
    """``(..., 2, dim / 4)``: coordinate times frequency."""
    if dim % 4:
        raise ValueError(f"the width of positions in two dimensions must be a multiple of 4, found {dim}")
    frequency = base ** -(torch.arange(dim // 4, device=coordinates.device, dtype=torch.float32) / (dim // 4))
    return coordinates.float()[..., None] * frequency


def resample_grid(positions: Tensor, grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """Position embeddings of one grid of patches, interpolated to another (bicubic), as DINO does for local crops.

    Args:
        positions: ``(1, T, dim)`` of ``grid``.
        grid: rows and columns they were made for.
        new_grid: rows and columns wanted.

    Returns:
        ``(1, T', dim)``; ``positions`` itself when the grids are equal.
    """
    if grid == new_grid:
        return positions
    wide = positions if positions.dtype == torch.float64 else positions.float()
    image = wide.reshape(1, *grid, -1).permute(0, 3, 1, 2)
    image = F.interpolate(image, size=new_grid, mode="bicubic", antialias=True, align_corners=False)
    return image.flatten(2).transpose(1, 2).to(positions.dtype)
