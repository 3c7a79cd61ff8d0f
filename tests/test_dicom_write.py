"""Writing a DICOM series: read back equal by medseg and by SimpleITK, valid by dciodvfy where that is installed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from conftest import geometries
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from medseg.io.dicom import read_series
from medseg.io.dicom_write import write_series
from medseg.volume import DicomError, Geometry, Volume

SHEARED = np.array([[0.7, 0, 0, -3], [0, 0.9, 0.4, 5], [0, 0.0, 2.0, 7], [0, 0, 0, 1.0]])


def held(volume: Volume, other: Volume) -> bool:
    """Whether ``other`` holds the voxels of ``volume`` at the same places in the patient."""
    index = np.stack(np.meshgrid(*map(np.arange, volume.geometry.shape), indexing="ij"), -1).reshape(-1, 3)
    at = other.geometry.to_index(volume.geometry.to_world(index))
    near = np.rint(at).astype(int)
    return bool(
        np.abs(at - near).max() < 1e-3 and np.array_equal(other.array[0][tuple(near.T)], volume.array[0].ravel())
    )


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    geometry=geometries(),
    seed=st.integers(0, 99),
    kind=st.sampled_from(["int16", "uint8", "uint16", "shifted", "float"]),
)
def test_reads_back_equal(tmp_path_factory: pytest.TempPathFactory, geometry: Geometry, seed: int, kind: str) -> None:
    rng, folder = np.random.default_rng(seed), tmp_path_factory.mktemp("w") / "out"
    low, high = {"uint8": (0, 255), "uint16": (0, 65535), "shifted": (-40000, 20000)}.get(kind, (-1024, 3000))
    array = rng.integers(low, high, geometry.shape)
    array = array.astype({"shifted": np.int32, "float": np.float32}.get(kind, kind))
    volume = Volume(array, geometry)
    write_series(volume, folder)
    back = read_series(folder)
    assert held(volume, back)
    # SimpleITK on its own: order the files by their number, ask for values at world positions.
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    image = reader.Execute()
    for index in ((0, 0, 0), tuple(n - 1 for n in geometry.shape), tuple(n // 2 for n in geometry.shape)):
        lps = geometry.to_world(index) * (-1, -1, 1)
        there = image.TransformPhysicalPointToIndex(lps.tolist())
        assert image.GetPixel(*there) == pytest.approx(float(array[index]))


def test_sheared_grid_is_kept(tmp_path: Path) -> None:
    volume = Volume(np.arange(60, dtype=np.int16).reshape(5, 4, 3), Geometry((5, 4, 3), SHEARED))
    write_series(volume, tmp_path / "out", modality="CT")
    with pytest.warns(UserWarning, match="gantry tilt"):
        back = read_series(tmp_path / "out")
    assert back.geometry.is_skewed and back.geometry.is_close(volume.geometry, 1e-4)
    assert np.array_equal(back.array, volume.array)


def test_floats_are_rounded_to_sixteen_bits_and_said(tmp_path: Path) -> None:
    array = np.random.default_rng(0).normal(0, 1, (5, 4, 3))
    with pytest.warns(UserWarning, match="rounded to steps of"):
        write_series(Volume(array, Geometry.from_parts((5, 4, 3), (1, 2, 3))), tmp_path / "out")
    assert np.abs(read_series(tmp_path / "out").array[0][::-1, ::-1] - array[::-1, ::-1]).max() < np.ptp(array) / 65000


def test_nothing_of_a_patient_and_fresh_uids(tmp_path: Path) -> None:
    volume = Volume(np.zeros((5, 4, 3), np.int16), Geometry.from_parts((5, 4, 3), (1, 2, 3)), {"modality": "CT"})
    write_series(volume, tmp_path / "a", description="a scan")
    write_series(volume, tmp_path / "b")
    a, b = (pydicom.dcmread(tmp_path / n / "0001.dcm") for n in "ab")
    assert a.PatientName == "Anonymous^" and a.Modality == "CT" and a.SeriesDescription == "a scan"
    assert a.SeriesInstanceUID != b.SeriesInstanceUID and a.FrameOfReferenceUID != b.FrameOfReferenceUID
    uids = {pydicom.dcmread(p).SOPInstanceUID for p in (tmp_path / "a").iterdir()}
    assert len(uids) == 3


@pytest.mark.parametrize(
    ("array", "affine", "match"),
    [
        (np.zeros((2, 5, 4, 3)), np.eye(4), "one channel"),
        (np.full((5, 4, 3), np.nan), np.eye(4), "finite values"),
        (np.zeros((5, 4, 3)), [[1, 0.5, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], "right angles"),
    ],
)
def test_what_dicom_cannot_hold_is_refused(tmp_path: Path, array: np.ndarray, affine: object, match: str) -> None:
    with pytest.raises(DicomError, match=match):
        write_series(Volume(array, Geometry((5, 4, 3), affine)), tmp_path / "out")  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten_without_force(tmp_path: Path) -> None:
    volume = Volume(np.zeros((5, 4, 3), np.int16), Geometry.from_parts((5, 4, 3), (1, 2, 3)))
    write_series(volume, tmp_path / "out")
    with pytest.raises(FileExistsError):
        write_series(volume, tmp_path / "out")
    write_series(volume, tmp_path / "out", force=True)


@pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="dciodvfy (Debian dicom3tools) is not installed")
@pytest.mark.parametrize("modality", ["CT", "MR"])
def test_dciodvfy_finds_no_error(tmp_path: Path, modality: str) -> None:
    volume = Volume(np.zeros((5, 4, 3), np.int16), Geometry.from_parts((5, 4, 3), (1, 2, 3)))
    write_series(volume, tmp_path / "out", modality=modality)
    done = subprocess.run(["dciodvfy", str(tmp_path / "out" / "0002.dcm")], capture_output=True, text=True, check=False)
    assert "Error" not in done.stderr + done.stdout, done.stderr
