"""DICOM-SEG and RTSTRUCT of 60 structures on 150 x 512 x 512: written with proof and read, against highdicom alone.

Run: python workflows/bench/write_dicom_labels.py   (one thread; about two minutes, 2 GB)
"""

from __future__ import annotations

import tempfile
import warnings
from functools import cache
from pathlib import Path

import highdicom as hd
import numpy as np
import pydicom
from _measure import measure, show
from pydicom.sr.codedict import codes
from pydicom.uid import generate_uid

from medseg.io.dicom import source_series
from medseg.io.dicom_seg import read_seg
from medseg.io.dicom_seg_write import write_seg
from medseg.io.dicom_write import write_series
from medseg.io.rtstruct import read_rtstruct
from medseg.io.rtstruct_write import write_rtstruct
from medseg.volume import Geometry, LabelMap, Volume

SHAPE, COUNT = (512, 512, 150), 60
FOLDER = Path(tempfile.mkdtemp())
SOURCE = FOLDER / "series"


@cache
def label_map() -> LabelMap:
    """60 ellipsoids of organ size, side by side on an axial CT grid."""
    grid = Geometry.from_parts(SHAPE, (0.8, 0.8, 2.5), (200, 200, -300), np.diag([-1, -1, 1]))
    array = np.zeros(SHAPE[::-1], np.uint8).T
    rng = np.random.default_rng(0)
    for n in range(COUNT):
        centre = np.array([40 + 61 * (n % 8), 40 + 61 * (n // 8), rng.integers(40, 110)])
        radius = rng.uniform((18, 18, 15), (30, 30, 38))
        low, high = (centre - radius).astype(int), (centre + radius + 1).astype(int)
        index = np.mgrid[tuple(slice(a, b) for a, b in zip(low, high, strict=True))]
        inside = sum(((index[a] - centre[a]) / radius[a]) ** 2 for a in range(3)) < 1
        array[tuple(slice(a, b) for a, b in zip(low, high, strict=True))][inside] = n + 1
    return LabelMap(array, grid)


def by_highdicom(kind: str) -> str:
    """What highdicom's documentation shows: source headers, one description a segment, save."""
    headers = sorted((pydicom.dcmread(p, stop_before_pixels=True) for p in SOURCE.iterdir()),
                     key=lambda d: float(d.ImagePositionPatient[2]))  # fmt: skip
    algorithm = hd.AlgorithmIdentificationSequence("x", codes.DCM.ArtificialIntelligence, "1")
    described = [
        hd.seg.SegmentDescription(
            n, f"label {n}", codes.SCT.AnatomicalStructure, codes.SCT.Liver, "AUTOMATIC", algorithm
        )
        for n in range(1, COUNT + 1)
    ]
    made = hd.seg.Segmentation(
        headers, label_map().array.T, kind.upper(), described, generate_uid(), 1, generate_uid(), 1, "x", "x", "1", "1"
    )
    made.save_as(FOLDER / f"highdicom_{kind}.dcm")
    return f"{made.NumberOfFrames} frames"


def highdicom_reads(kind: str) -> str:
    """To a volume of labels."""
    volume = hd.seg.segread(FOLDER / f"highdicom_{kind}.dcm").get_volume(combine_segments=True)
    return f"{volume.spatial_shape}"


def main() -> None:
    """Write the source series, then measure."""
    warnings.simplefilter("ignore")
    labels = label_map()
    image = np.broadcast_to(np.int16(0), SHAPE)
    write_series(Volume(image, labels.geometry), SOURCE, modality="CT")
    grid = source_series(SOURCE)[0]

    def ours(write, read, name, **options):  # type: ignore[no-untyped-def]
        path = FOLDER / name
        written = measure(lambda: write(labels, path, SOURCE, force=True, **options))
        found = measure(lambda: f"equal: {np.array_equal(read(path, grid).array, labels.array)}")
        return written, found

    for kind in ("binary", "labelmap"):
        theirs, back = measure(lambda kind=kind: by_highdicom(kind)), measure(lambda kind=kind: highdicom_reads(kind))
        written, found = ours(write_seg, read_seg, f"{kind}.dcm", kind=kind)
        rows = {"medseg: write, read back, compare": written, "highdicom: write": theirs}
        show(f"DICOM-SEG {kind}, writing", rows, next(iter(rows)))
        rows = {"medseg: onto the source grid": found, "highdicom: get_volume": back}
        show(f"DICOM-SEG {kind}, reading", rows, next(iter(rows)))
    rows = {}
    for style in ("edge", "smooth"):
        rows[f"write {style} contours, read back, compare"], rows[f"read {style} contours"] = ours(
            write_rtstruct, read_rtstruct, f"{style}.dcm", style=style
        )
    show("RTSTRUCT", rows, next(iter(rows)))


if __name__ == "__main__":
    main()
