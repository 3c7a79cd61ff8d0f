"""Reading and writing a .nii.gz of 128 MB int16, ours and others, one thread.

Run ``python workflows/bench/read_nifti.py``; peers that are not installed are left out. The volume is made here:
smooth tissue with scanner noise in a body, constant air around it, about 64 MB when compressed.
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

import nibabel as nib
import numpy as np
import SimpleITK as sitk
from _measure import measure, show
from isal import igzip
from scipy import ndimage

import medseg

SHAPE = (512, 512, 256)


def scan() -> np.ndarray:
    """An int16 volume like a CT."""
    rng = np.random.default_rng(0)
    tissue = ndimage.zoom(
        rng.normal(size=(17, 17, 9)), [n / m for n, m in zip(SHAPE, (17, 17, 9), strict=True)], order=1
    )
    array = (300 * tissue + 6 * rng.standard_normal(SHAPE, np.float32)).astype(np.int16)
    i, j = np.ogrid[-1:1:512j, -1:1:512j]
    array[(i / 0.99) ** 2 + (j / 0.95) ** 2 > 1] = -1024
    return array


def with_nibabel(path: Path) -> Any:
    return np.asanyarray(nib.load(path).dataobj)


def with_simpleitk(path: Path) -> Any:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


def with_igzip(path: Path) -> Any:
    """The floor of a decompression at once, without a header."""
    with igzip.open(path) as file:
        return np.frombuffer(file.read(), np.int16)


def with_monai(path: Path) -> Any:
    from monai.transforms import LoadImage

    return LoadImage(image_only=True)(path)


def main() -> None:
    """Make the file, read and write it each way."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    with tempfile.TemporaryDirectory() as folder:
        path, plain = Path(folder) / "scan.nii.gz", Path(folder) / "plain.nii"
        volume = medseg.Volume(scan(), medseg.Geometry.from_parts(SHAPE, (0.8, 0.8, 1.5)))
        nib.save(nib.Nifti1Image(volume.array[0], volume.geometry.affine), path)
        medseg.write(volume, plain)
        size = path.stat().st_size / 2**20
        readers: dict[str, Callable[[Path], Any]] = {
            "medseg.read": medseg.read,
            "SimpleITK": with_simpleitk,
            "nibabel": with_nibabel,
            "isal igzip.open().read()": with_igzip,
        }
        if importlib.util.find_spec("monai"):
            readers["MONAI LoadImage"] = with_monai
        for reader in readers.values():  # imports and the page cache are not measured
            reader(path)
        rows = {name: measure(lambda r=reader: r(path), repeats=repeats) for name, reader in readers.items()}
        show(f"Reading a .nii.gz of {size:.0f} MB, 128 MB int16, 1 thread", rows, "medseg.read")
        # nibabel only maps an uncompressed file; reading it all is what numpy does.
        readers = {"medseg.read": medseg.read, "SimpleITK": with_simpleitk, "numpy.fromfile": np.fromfile}
        rows = {name: measure(lambda r=reader: r(plain), repeats=repeats) for name, reader in readers.items()}
        show("Reading a .nii, 128 MB int16, 1 thread", rows, "medseg.read")

        target = Path(folder) / "out.nii.gz"
        image = sitk.GetImageFromArray(volume.array[0].T)
        writers: dict[str, Callable[[], Any]] = {
            "medseg.write": lambda: medseg.write(volume, target, force=True),
            "SimpleITK": lambda: sitk.WriteImage(image, str(target), True),
            "nibabel": lambda: nib.save(nib.Nifti1Image(volume.array[0], volume.geometry.affine), target),
        }

        def noted(write: Callable[[], Any]) -> str:
            write()
            return f"{target.stat().st_size / 2**20:.0f} MB"

        rows = {name: measure(lambda w=write: noted(w), repeats=min(3, repeats)) for name, write in writers.items()}
        show("Writing a .nii.gz, 128 MB int16, 1 thread", rows, "medseg.write")


if __name__ == "__main__":
    main()
