"""The small picture of a volume that notebooks show."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

__all__ = ["planes_png"]


def planes_png(array: NDArray[Any], spacing: tuple[float, float, float], orientation: str) -> bytes:
    """PNG of the three middle planes, pixels square in mm; grey (I, J, K) or colour (I, J, K, 3) voxels.

    As radiologists look at them: the patient's Left, or Posterior, at the right; Anterior, or Superior, at the top.
    """
    array = np.flip(array, tuple(axis for axis, letter in enumerate(orientation) if letter in "RAS"))
    if array.ndim == 3:
        low, high = np.nanpercentile(array[tuple(slice(None, None, max(1, n // 64)) for n in array.shape)], (0.5, 99.5))
        array = (255 * np.clip((np.nan_to_num(array) - low) / max(high - low, 1e-9), 0, 1)).astype(np.uint8)
    shape = array.shape[:3]
    middle, tiles = [n // 2 for n in shape], []
    for axis in (2, 1, 0):
        if shape[axis] > 1 and min(np.delete(shape, axis)) == 1:
            continue  # an edge-on view of a single slice shows nothing
        across, down = (a for a in range(3) if a != axis)
        plane = np.moveaxis(np.take(array, middle[axis], axis), 0, 1)
        size = np.array([shape[across] * spacing[across], shape[down] * spacing[down]])
        tile = Image.fromarray(np.ascontiguousarray(plane)).convert("RGB")
        tiles.append(tile.resize([max(1, int(s)) for s in size * 256 / size.max()]))
    canvas = Image.new("RGB", (sum(t.width for t in tiles), max(t.height for t in tiles)))
    for t, left in zip(tiles, np.cumsum([0, *(t.width for t in tiles)]), strict=False):
        canvas.paste(t, (int(left), 0))
    out = io.BytesIO()
    canvas.save(out, "PNG")
    return out.getvalue()
