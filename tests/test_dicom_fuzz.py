"""Hostile DICOM: whatever the bytes, reading ends in a value or a DicomError, within a bound on memory.

A few hundred tries by default; MEDSEG_FUZZ=20000 for more.
"""

from __future__ import annotations

import os
import tempfile
import tracemalloc
from functools import lru_cache
from pathlib import Path

import numpy as np
import pydicom
import pytest
from dicom_made import AXIAL, dose, enhanced, image, mosaic, pixels, save
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
)

from medseg.io.dicom import list_series, read_all
from medseg.volume import DicomError, Volume

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
TRIES = int(os.environ.get("MEDSEG_FUZZ", "400"))
BOUND = 160 << 20  # bytes: the files are a few KiB, one frame may claim 64 MiB
KINDS = ("explicit", "implicit", "big", "deflated", "enhanced", "mosaic", "dose", "rle", "j2k", "jpegls")


@lru_cache
def sound(kind: str) -> bytes:
    """A sound file of each kind."""
    with tempfile.TemporaryDirectory() as folder:
        path, syntax = Path(folder) / "x.dcm", ExplicitVRLittleEndian
        if kind == "enhanced":
            frames = [{"position": (0, 0, 2.5 * k), "time": t} for t in (1, 2) for k in range(3)]
            ds = enhanced([pixels(k) for k in range(6)], frames)
        elif kind == "mosaic":
            ds = mosaic([pixels(k) for k in range(7)], (1, 2, 3), AXIAL, (0, 0, 1), 3.0)
        elif kind == "dose":
            ds = dose([pixels(k).astype(np.uint32) for k in range(4)], (0, 0, 0), [0, 2, 4, 6], 1e-3)
        else:
            ds = image(pixels(0, (64, 48)), (0, 0, 0))
            syntax = {"implicit": ImplicitVRLittleEndian, "big": ExplicitVRBigEndian,
                      "deflated": DeflatedExplicitVRLittleEndian}.get(kind, ExplicitVRLittleEndian)  # fmt: skip
            packed = {"rle": RLELossless, "j2k": JPEG2000Lossless, "jpegls": JPEGLSLossless}.get(kind)
            if packed:
                ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
                ds.compress(packed)
                syntax = packed
        return save(ds, path, syntax).read_bytes()


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A file with a few bytes overwritten, removed or inserted, or its end cut off; mostly in the header."""
    data = bytearray(sound(draw(st.sampled_from(KINDS))))
    for _ in range(draw(st.integers(1, 5))):
        end = len(data) - 1
        if end < 16:
            break
        at = draw(st.integers(0, min(end, 1200)) | st.integers(0, end))
        how = draw(st.sampled_from(("set", "set", "fill", "cut", "drop", "add")))
        if how == "set":
            data[at] = draw(st.integers(0, 255))
        elif how == "fill":
            size = draw(st.sampled_from((2, 4, 8)))
            data[at : at + size] = bytes([draw(st.sampled_from((0, 1, 127, 128, 255)))] * size)
        elif how == "cut":
            del data[at:]
        elif how == "drop":
            del data[at : at + draw(st.integers(1, 40))]
        else:
            data[at:at] = draw(st.binary(min_size=1, max_size=40))
    return bytes(data)


def outcome(folder: Path) -> str:
    try:
        list_series(folder)
        results = [v for _, v in read_all(folder)]
    except DicomError:
        return "refused"
    assert all(isinstance(v, Volume | DicomError) for v in results)
    assert all(np.isfinite(v.geometry.affine).all() for v in results if isinstance(v, Volume))
    return "read"


@settings(max_examples=TRIES, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=damaged())
def test_damaged_files_end_in_a_value_or_a_dicom_error(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    folder = tmp_path_factory.getbasetemp() / "fuzz"
    folder.mkdir(exist_ok=True)
    (folder / "x.dcm").write_bytes(data)
    tracemalloc.start()
    try:
        outcome(folder)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < BOUND


@pytest.mark.parametrize("kind", KINDS)
def test_a_sound_file_is_read_and_every_cut_of_it_ends_well(tmp_path: Path, kind: str) -> None:
    data = sound(kind)
    (tmp_path / "x.dcm").write_bytes(data)
    assert outcome(tmp_path) == "read"
    for cut in range(0, len(data), max(1, len(data) // 40)):
        (tmp_path / "x.dcm").write_bytes(data[:cut])
        outcome(tmp_path)


LIES: list[tuple[str, object]] = [
    ("Rows", 65535), ("Columns", 0), ("NumberOfFrames", 10**6), ("NumberOfFrames", -1), ("BitsAllocated", 64),
    ("BitsAllocated", 12), ("BitsStored", 0), ("BitsStored", 99), ("HighBit", 40), ("SamplesPerPixel", 3),
    ("SamplesPerPixel", 60000), ("PixelRepresentation", 7), ("RescaleSlope", "1e308"), ("RescaleIntercept", "-1e308"),
    ("PixelSpacing", [0.0, 1.0]), ("PixelSpacing", [-1.0, 1.0]), ("PixelSpacing", ["1e-40", "1e-40"]),
    ("ImageOrientationPatient", [1, 0, 0, 1, 0, 0]), ("ImageOrientationPatient", [0] * 6),
    ("ImagePositionPatient", ["1e300", "0", "0"]), ("ImagePositionPatient", [1, 2]), ("SliceThickness", "1e300"),
    ("SliceThickness", "0"), ("SeriesNumber", 2**31 - 1), ("InstanceNumber", -(2**31)),
]  # fmt: skip


@pytest.mark.parametrize("kind", ["explicit", "rle", "j2k"])
@pytest.mark.parametrize(("keyword", "value"), LIES)
def test_a_header_that_lies(tmp_path: Path, kind: str, keyword: str, value: object) -> None:
    (tmp_path / "x.dcm").write_bytes(sound(kind))
    ds = pydicom.dcmread(tmp_path / "x.dcm")
    with np.errstate(all="ignore"):
        setattr(ds, keyword, value)
        ds.save_as(tmp_path / "x.dcm")
        tracemalloc.start()
        try:
            outcome(tmp_path)
            assert tracemalloc.get_traced_memory()[1] < BOUND
        finally:
            tracemalloc.stop()
