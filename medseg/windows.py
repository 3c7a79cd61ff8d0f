"""From intensities to the pictures that promptable models take: windows of CT, percentiles of MR, colours as they are.

MedSAM's checkpoints learnt from CT cut to a window and from other images cut at percentiles 0.5 and 99.5, each then
quantised to 8 bits, and every slice stretched to 0..1 by itself.

References
----------
Ma et al. (2024), Segment anything in medical images, doi:10.1038/s41467-024-44824-z (preprocessing in Methods).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.volume import Volume

__all__ = ["WINDOWS_HU", "Window", "choose_window", "slice_picture"]

Array = NDArray[Any]

# (low, high) in HU; the level is the middle, the width the difference.
WINDOWS_HU: dict[str, tuple[float, float]] = {
    "soft-tissue": (-160.0, 240.0),
    "lung": (-1350.0, 150.0),
    "mediastinum": (-150.0, 250.0),
    "bone": (-500.0, 1300.0),
    "brain": (0.0, 80.0),
    "liver": (-45.0, 105.0),
    "head-neck": (-110.0, 190.0),
    "stroke": (20.0, 60.0),
    "angiography": (-100.0, 900.0),
}
PERCENTILES = (0.5, 99.5)
CT_LOWEST_HU, CT_AIR_HU, CT_HIGHEST_HU = -3100.0, -500.0, 32768.0  # what the lowest and highest values of CT may be
SAMPLE = 1 << 20  # voxels that the percentiles are taken of


@dataclass(frozen=True)
class Window:
    """Which intensities become black and white, and why.

    Parameters
    ----------
    name : str
        A preset of ``WINDOWS_HU``, "percentile", "low,high", or "colour".
    low, high : float
        In the units of the image (HU of CT); a colour picture goes from 0 to 255, say.
    reason : str
        Why this one, for logs: "CT by its modality".
    """

    name: str
    low: float
    high: float
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.name} ({self.low:g} to {self.high:g}{f', {self.reason}' if self.reason else ''})"


def choose_window(image: Volume, window: str | tuple[float, float] | None = None) -> Window:
    """The window of an image: the one asked for, or what its modality or its values call for.

    Parameters
    ----------
    image : Volume
        Its ``modality`` decides; where the file names none, the values do: whole numbers, the lowest from
        -3100 to -500, are HU.
    window : str or (low, high), optional
        A preset of ``WINDOWS_HU``, "percentile" (0.5 to 99.5 of the values that are not 0), or two intensities, which
        may be written as "low,high".

    Returns
    -------
    Window
        With the reason of the choice.

    Raises
    ------
    ValueError
        If the window is unknown or empty, or the image has values that are not finite.
    """
    _require_finite(image)
    if isinstance(window, str) and "," in window:
        window = _numbers(window)
    if isinstance(window, tuple):
        low, high = (float(v) for v in window)
        if not (np.isfinite([low, high]).all() and low < high):
            raise ValueError(f"window must be two intensities, the lower first, got {low:g},{high:g}")
        return Window(f"{low:g},{high:g}", low, high, "as asked for")
    if window in WINDOWS_HU:
        return Window(window, *WINDOWS_HU[window], "as asked for")
    if window not in (None, "percentile"):
        raise ValueError(f"window must be one of {', '.join(WINDOWS_HU)}, percentile or low,high, got {window!r}")
    if window is None and is_colour(image):
        return Window("colour", 0.0, 255.0, "a colour picture")
    if window is None and image.modality == "CT":
        return Window("soft-tissue", *WINDOWS_HU["soft-tissue"], "CT by its modality")
    if window is None and not image.modality and looks_like_ct(image):
        return Window(
            "soft-tissue", *WINDOWS_HU["soft-tissue"], f"CT by its values: whole numbers from {image.array.min():g}"
        )
    low, high = _percentiles(image)
    reason = "as asked for" if window else f"{image.modality or 'no modality'}: percentiles {PERCENTILES[0]} and 99.5"
    return Window("percentile", low, high, reason)


def is_colour(image: Volume) -> bool:
    """Whether it is a picture of three channels of 8 bits."""
    return image.channels == 3 and image.array.dtype == np.uint8


def looks_like_ct(image: Volume) -> bool:
    """Whether the values are those of CT in HU: whole numbers, the lowest those of air, which MR does not have."""
    values = _sample(image.array[0])
    low, high = float(values.min()), float(values.max())
    return CT_LOWEST_HU <= low <= CT_AIR_HU and high < CT_HIGHEST_HU and np.array_equal(values, values.round())


def slice_picture(pixels: Array, window: Window) -> Array:
    """One slice as the checkpoints expect it: cut to the window, quantised to 8 bits, stretched to 0..255.

    Parameters
    ----------
    pixels : (C, H, W) array
        Of one slice; three channels stay as they are, of any other number the first is used.
    window : Window
        Of the whole image.

    Returns
    -------
    (3, H, W) uint8 array
        A slice of one single value is black.

    Raises
    ------
    ValueError
        If a value is not finite.

    Examples
    --------
    >>> slice_picture(np.array([[[-200.0, 40.0, 900.0]]]), Window("soft-tissue", -160, 240))[0].tolist()
    [[0, 127, 255]]
    """
    shown = np.asarray(pixels if len(pixels) == 3 else pixels[:1], np.float32)
    if not np.isfinite(shown).all():
        raise ValueError("image must be finite, got NaN or infinite voxels; replace them first")
    cut = (np.clip(shown, window.low, window.high) - window.low) * np.float32(255.0 / (window.high - window.low))
    grey = cut.astype(np.uint8)
    low, high = int(grey.min()), int(grey.max())
    if low < high and (low, high) != (0, 255):
        grey = ((grey - np.float32(low)) * np.float32(255.0 / (high - low))).round().astype(np.uint8)
    return grey if len(grey) == 3 else np.repeat(grey, 3, 0)


def _require_finite(image: Volume) -> None:
    """Raise unless all voxels are numbers; one slice at a time, so that memory stays small."""
    if not np.issubdtype(image.array.dtype, np.inexact):
        return
    bad = sum(int(np.count_nonzero(~np.isfinite(plane))) for channel in image.array for plane in channel)
    if bad:
        raise ValueError(f"image must be finite, got {bad} NaN or infinite voxels; replace them first")


def _numbers(text: str) -> tuple[float, float]:
    parts = text.split(",")
    try:
        low, high = (float(p) for p in parts)
    except ValueError as problem:
        raise ValueError(f"window must be two intensities low,high, got {text!r}") from problem
    return low, high


def _sample(array: Array) -> Array:
    """At most about ``SAMPLE`` values, spread evenly over all axes."""
    step = max(1, round((array.size / SAMPLE) ** (1 / 3)))
    return np.asarray(array[tuple(slice(None, None, min(step, n)) for n in array.shape)])


def _percentiles(image: Volume) -> tuple[float, float]:
    values = _sample(image.array[0]).astype(np.float32)
    inside = values[values != 0]  # the air around a head, which would decide alone
    low, high = np.percentile(inside if inside.size else values, PERCENTILES)
    if low == high:
        low, high = float(values.min()), float(values.max())
    return float(low), float(high) if high > low else float(low) + 1.0
