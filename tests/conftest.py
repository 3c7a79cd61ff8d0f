"""Shared fixtures: oblique anisotropic grids, and the development data where it is at hand."""

from __future__ import annotations

import os
from pathlib import Path

# Two workers with two threads each on two cores wait for one another: a test of seconds takes minutes. Networks here are
# tiny; one thread is the fastest in any case. Processes that tests start inherit it.
os.environ["OMP_NUM_THREADS"] = "1"  # before anything imports torch

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st

from medseg.volume import Geometry

# The same examples every time: a test that passed yesterday fails today only if the code changed.
settings.register_profile("medseg", derandomize=True, deadline=None)
settings.load_profile("medseg")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder of the development data: MEDSEG_DATA, else ../shared/data; skips where neither exists."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("MEDSEG_DATA", default))
    if not folder.is_dir():
        pytest.skip("development data not found (set MEDSEG_DATA)")
    return folder


def rotation(angles: tuple[float, float, float]) -> np.ndarray:
    """Rotation matrix from three Euler angles (radians)."""
    (a, b, c), e = angles, np.eye(3)
    for axis, angle in ((0, a), (1, b), (2, c)):
        i, j = (k for k in range(3) if k != axis)
        m = np.eye(3)
        m[i, i] = m[j, j] = np.cos(angle)
        m[i, j], m[j, i] = -np.sin(angle), np.sin(angle)
        e = e @ m
    return e


@st.composite
def geometries(draw: st.DrawFn, low: int = 3, high: int = 9) -> Geometry:
    """Oblique, anisotropic, non-cubic grids of either handedness with axes in any order."""
    shape = draw(st.lists(st.integers(low, high), min_size=3, max_size=3, unique=True))
    spacing = draw(st.lists(st.floats(0.4, 6.0), min_size=3, max_size=3, unique_by=lambda s: round(s, 1)))
    # Up to 20 degrees about each axis: beyond 45 in all, which world axis is nearest is a matter of taste.
    angles = draw(st.tuples(*[st.integers(-350, 350).map(lambda n: n / 1000)] * 3))
    order = draw(st.permutations(range(3)))
    signs = draw(st.tuples(*[st.sampled_from([-1.0, 1.0])] * 3))
    direction = rotation(angles)[:, order] * np.asarray(signs)
    origin = draw(st.tuples(*[st.floats(-300, 300)] * 3))
    return Geometry.from_parts(shape, spacing, origin, direction)
