"""What promptable models are shown of an image."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medseg.volume import Geometry, Volume
from medseg.windows import WINDOWS_HU, Window, choose_window, slice_picture

GRID = Geometry.from_parts((5, 7, 4), (0.7, 0.9, 3.0))


def volume(array: np.ndarray, modality: str = "") -> Volume:
    return Volume(array, GRID, {"modality": modality})


def test_modality_decides_then_values() -> None:
    generator = np.random.default_rng(0)
    soft = generator.integers(-90, 200, GRID.shape).astype(np.int16)
    assert choose_window(volume(soft, "CT")).name == "soft-tissue"
    assert choose_window(volume(soft)).name == "percentile"
    air = soft.copy()
    air[:2] = -1000
    assert choose_window(volume(air)).name == "soft-tissue" and "values" in choose_window(volume(air)).reason
    assert choose_window(volume(air, "MR")).name == "percentile"
    colour = Volume(np.zeros((3, *GRID.shape), np.uint8), GRID)
    assert choose_window(colour) == Window("colour", 0, 255, "a colour picture")


def test_percentiles_leave_out_zeros() -> None:
    values = np.zeros(GRID.shape, np.float32)
    values[1:4] = np.linspace(100, 1100, values[1:4].size).reshape(values[1:4].shape)
    window = choose_window(volume(values, "MR"))
    low, high = np.percentile(values[values != 0], (0.5, 99.5))
    assert (window.low, window.high) == pytest.approx((low, high))


@pytest.mark.parametrize("name", sorted(WINDOWS_HU))
def test_presets(name: str) -> None:
    low, high = WINDOWS_HU[name]
    assert low < high
    assert (choose_window(volume(np.zeros(GRID.shape)), name).low, WINDOWS_HU["soft-tissue"]) == (low, (-160, 240))


@pytest.mark.parametrize("asked", ["-100,300", (-100.0, 300.0)])
def test_numbers(asked: str | tuple[float, float]) -> None:
    window = choose_window(volume(np.zeros(GRID.shape)), asked)
    assert (window.name, window.low, window.high) == ("-100,300", -100, 300)


@pytest.mark.parametrize("asked", ["kidney", "5,5", "9,1", "a,b", "1,2,3", (3.0, 1.0), "nan,3"])
def test_bad_windows(asked: str | tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="window must be"):
        choose_window(volume(np.zeros(GRID.shape)), asked)


def test_nan_is_refused() -> None:
    values = np.zeros(GRID.shape, np.float32)
    values[2, 3, 1] = np.nan
    with pytest.raises(ValueError, match="finite, got 1 NaN"):
        choose_window(volume(values, "CT"))


@given(st.integers(0, 10_000), st.floats(-500, 0), st.floats(1, 900))
def test_slices_follow_the_recipe_of_medsam(seed: int, low: float, width: float) -> None:
    """Clip, quantise to 8 bits, min-max of the slice, 8 bits: against the published recipe in float64."""
    pixels = np.random.default_rng(seed).normal(0, 400, (1, 6, 9))
    mine = slice_picture(pixels, Window("w", low, low + width))
    cut = np.floor((np.clip(pixels[0], low, low + width) - low) / width * 255)
    if cut.max() > cut.min():
        cut = (cut - cut.min()) / (cut.max() - cut.min()) * 255
    assert mine.shape == (3, 6, 9) and mine.dtype == np.uint8
    level = 255 / max(1.0, np.ptp(np.floor((np.clip(pixels[0], low, low + width) - low) / width * 255)))
    assert np.abs(mine[0] - cut).max() <= 0.5 + level * 1.01  # one of the 8-bit levels, where float32 rounds it up
    assert np.array_equal(mine[0], mine[1]) and np.array_equal(mine[0], mine[2])


def test_colours_stay() -> None:
    picture = np.random.default_rng(1).integers(0, 256, (3, 8, 5)).astype(np.uint8)
    picture[:, 0, :2] = [[0, 255]] * 3
    assert np.array_equal(slice_picture(picture, Window("colour", 0, 255)), picture)


def test_a_slice_of_one_value_is_black() -> None:
    assert not slice_picture(np.full((1, 3, 4), -1000.0), Window("w", -160, 240)).any()
