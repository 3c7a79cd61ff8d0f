"""The box of a mask, and what a box is worth without any model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["box_of", "ellipse"]

Array = NDArray[Any]


def box_of(mask: Array) -> Array:
    """x0, y0, x1, y1 of a mask (H, W) that is not empty: centres of its outermost pixels, x along W."""
    rows, columns = (np.flatnonzero(mask.any(axis=a)) for a in (1, 0))
    return np.array([columns[0], rows[0], columns[-1], rows[-1]], np.float64)


def ellipse(box: Array, size: Sequence[int]) -> Array:
    """(H, W) bool: the ellipse inscribed in a box x0, y0, x1, y1, which reaches to the outer edges of its pixels.

    The baseline of box prompts: a model that does worse is of no use there.
    """
    x0, y0, x1, y1 = box
    rows, columns = np.mgrid[: size[0], : size[1]]
    across = (columns - (x0 + x1) / 2) / ((x1 - x0 + 1) / 2)
    down = (rows - (y0 + y1) / 2) / ((y1 - y0 + 1) / 2)
    return np.asarray(across**2 + down**2 <= 1)
