"""Labels as a folder of masks: one file per structure, ``<number>_<name>``, as ``medseg convert --split`` writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.io import read, supported_suffix
from medseg.volume import Geometry, LabelMap, Structure

__all__ = ["read_masks"]

Array = NDArray[Any]


def read_masks(folder: Path) -> LabelMap:
    """Read the masks of a folder as one label map.

    Returns
    -------
    LabelMap
        Exclusive labels where no voxel is shared, else one bool layer per structure; float32 layers where a file holds
        shares between 0 and 1 (probabilities).

    Raises
    ------
    ValueError
        If a file is neither a mask (0 and one other value) nor probabilities, or two share a number.
    GeometryError
        If they do not lie on one grid.

    Notes
    -----
    Memory is one byte (four for probabilities) per voxel and structure.
    """
    structures, layers = [], []
    grid: Geometry | None = None
    quirks: tuple[str, ...] = ()
    for path in sorted(folder.iterdir(), key=lambda p: int(p.name.partition("_")[0]) if p.name[0] != "." else 0):
        if path.name.startswith("."):
            continue
        volume = read(path)
        grid = grid or volume.geometry
        grid.require_close(volume.geometry, f"masks of {folder.name}, {path.name} among them,")
        number, _, name = path.name[: -len(supported_suffix(path))].partition("_")
        structures.append(Structure(int(number), name))
        layers.append(_layer(volume.array, path))
        quirks = tuple(dict.fromkeys((*quirks, *volume.meta.get("quirks", ()))))
    if grid is None:
        raise ValueError(f"folder must hold masks named <number>_<name>.nii.gz, got none in {folder}")
    if len({s.number for s in structures}) < len(structures):
        raise ValueError(f"masks must have distinct numbers, got one twice in {folder}; rename a file")
    meta = {"path": str(folder), "quirks": quirks}
    if any(layer.dtype != bool for layer in layers):
        return LabelMap(np.stack([layer.astype(np.float32) for layer in layers]), grid, tuple(structures), meta)
    labels = np.zeros(grid.shape, np.min_scalar_type(max(s.number for s in structures)))
    for s, layer in zip(structures, layers, strict=True):
        if labels[layer].any():
            return LabelMap(np.stack(layers), grid, tuple(structures), meta)
        labels[layer] = s.number
    return LabelMap(labels, grid, tuple(structures), meta)


def _layer(array: Array, path: Path) -> Array:
    """(I, J, K) bool mask, or float shares of 0..1."""
    channel = array[0]
    low, high = channel.min(), channel.max()
    if len(array) == 1 and low >= 0 and np.isfinite(high):
        mask = channel > 0
        if high == 0 or bool((channel[mask] == high).all()):
            if high >= 1:
                return np.asarray(mask)
            if high == 0:
                return np.zeros(channel.shape, bool)
        if high <= 1:
            return np.asarray(channel)
    raise ValueError(
        f"mask must hold 0 and one other value, or probabilities of 0 to 1, got {low:g} to {high:g} in {path}; "
        "write one structure per file"
    )
