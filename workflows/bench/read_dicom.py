"""Reading a CT series of 256 slices of 512x512 and listing a folder of 10,000 files, ours and others.

Run ``python workflows/bench/read_dicom.py``; peers that are not installed are left out. The series is made here.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy and ITK read it

import argparse
import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import SimpleITK as sitk
from _measure import measure, show
from pydicom.uid import JPEG2000Lossless, generate_uid

import medseg

SHAPE = (512, 512, 256)
TAGS = [
    "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "Rows", "Columns", "RescaleSlope",
    "RescaleIntercept", "SeriesInstanceUID", "BitsAllocated", "PixelRepresentation",
]  # fmt: skip


def scan() -> np.ndarray:
    """Smooth tissue with noise, int16."""
    rng = np.random.default_rng(0)
    ramp = sum(np.meshgrid(*(np.linspace(0, 3, n) for n in SHAPE), indexing="ij", sparse=True))
    return (300 * np.sin(ramp) + 6 * rng.standard_normal(SHAPE, np.float32)).astype(np.int16)


def floor(folder: Path) -> Any:
    """Ten header elements a file by pydicom, then the bytes of the pixels: what a careful script does at least."""
    files = sorted(folder.iterdir())
    out = np.empty((len(files), 512, 512), np.int16)
    for k, path in enumerate(files):
        with path.open("rb") as file:
            header = pydicom.dcmread(file, specific_tags=TAGS, stop_before_pixels=True)
            for tag in TAGS:
                header.get(tag)
            file.seek(-out[k].nbytes, os.SEEK_END)
            out[k] = np.frombuffer(file.read(), "<i2").reshape(512, 512)
    return out


def with_pydicom(folder: Path) -> Any:
    files = sorted(map(pydicom.dcmread, folder.iterdir()), key=lambda d: float(d.ImagePositionPatient[2]))
    return np.stack([d.pixel_array * float(d.RescaleSlope) + float(d.RescaleIntercept) for d in files])


def with_simpleitk(folder: Path) -> Any:
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    return sitk.GetArrayFromImage(reader.Execute())


def with_monai(folder: Path) -> Any:
    from monai.transforms import LoadImage

    return LoadImage(image_only=True, reader="PydicomReader")(folder)


def many_files(folder: Path, source: Path, count: int) -> None:
    """``count`` small slices in series of 250."""
    dataset = pydicom.dcmread(source)
    dataset.Rows, dataset.Columns, dataset.PixelData = 16, 16, bytes(512)
    for k in range(count):
        dataset.SOPInstanceUID = generate_uid()
        dataset.SeriesInstanceUID, dataset.SeriesNumber = f"1.2.3.{k // 250}", k // 250
        dataset.ImagePositionPatient = [0, 0, k % 250]
        dataset.save_as(folder / f"{k:05d}.dcm")


def main() -> None:
    """Make the series, read it each way."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--files", type=int, default=10_000, help="of the folder that is listed")
    arguments = parser.parse_args()
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "ct"
        volume = medseg.Volume(scan(), medseg.Geometry.from_parts(SHAPE, (0.8, 0.8, 1.5)), {"modality": "CT"})
        medseg.write(volume, f"{folder}/")
        readers: dict[str, Callable[[Path], Any]] = {
            "medseg.read": medseg.read,
            "pydicom, 10 tags + frombuffer": floor,
            "pydicom loop": with_pydicom,
            "SimpleITK": with_simpleitk,
        }
        if importlib.util.find_spec("monai"):
            readers["MONAI PydicomReader"] = with_monai
        medseg.read(folder)  # imports and the page cache are not measured
        rows = {n: measure(lambda r=r: r(folder), repeats=arguments.repeats) for n, r in readers.items()}
        show("Reading 256 DICOM slices of 512x512 (128 MB)", rows, "medseg.read")

        packed = Path(place) / "j2k"
        packed.mkdir()
        for path in sorted(folder.iterdir())[:64]:
            dataset = pydicom.dcmread(path)
            dataset.compress(JPEG2000Lossless)
            dataset.save_as(packed / path.name)
        medseg.read(packed)
        del readers["pydicom, 10 tags + frombuffer"]
        rows = {n: measure(lambda r=r: r(packed), repeats=min(3, arguments.repeats)) for n, r in readers.items()}
        show("Reading 64 JPEG 2000 slices of 512x512 (one worker a core in medseg)", rows, "medseg.read")

        many = Path(place) / "many"
        many.mkdir()
        many_files(many, folder / "0001.dcm", arguments.files)
        rows = {"medseg.list_series": measure(lambda: medseg.list_series(many), repeats=3)}
        show(f"Listing {arguments.files} files in {arguments.files // 250} series", rows, "medseg.list_series")


if __name__ == "__main__":
    main()
