"""A tiny DICOM series on any grid, written with pydicom alone, and shapes to draw on it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from conftest import rotation
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from medseg.volume import Geometry

LPS = np.diag([-1.0, -1.0, 1.0])


def tilted(shape=(14, 19, 6), degrees=17.0) -> Geometry:
    """A gantry-tilted grid: slices shifted along their rows' axis."""
    affine = np.diag([-0.7, -0.9, 2.5, 1.0])
    affine[1, 2] = -2.5 * np.tan(np.radians(degrees))
    affine[:3, 3] = (40, 33, -120.25)
    return Geometry(shape, affine)


GRIDS = {
    "square": Geometry.from_parts((16, 16, 6), (1, 1, 1), (0, 0, 0), LPS),
    "non-square": Geometry.from_parts((21, 13, 6), (0.976562, 0.976562, 3.27), (-1.952996, -59.570154, -629.04), LPS),
    "anisotropic": Geometry.from_parts((17, 14, 7), (0.35, 1.4, 5.0), (101.125, 37.3, 1234.5), LPS),
    "oblique": Geometry.from_parts((15, 18, 6), (0.8, 1.1, 2.3), (-80, 12, 55), rotation((0.4, -0.3, 0.5)) @ LPS),
    "sagittal": Geometry.from_parts((13, 18, 6), (1.2, 0.9, 4.0), (30, -40, 90), LPS[:, [1, 2, 0]] * (1, -1, -1)),
    "gantry-tilted": tilted(),
}


def shapes(size: tuple[int, int, int]) -> dict[str, np.ndarray]:
    """(I, J, K) masks that break readers: thin, tiny, nested, at the border."""
    i, j = np.mgrid[: size[0], : size[1]]
    ci, cj, r = size[0] / 2 - 0.3, size[1] / 2 + 0.2, min(size[:2]) / 2 - 1.3
    distance = np.hypot(i - ci, j - cj)
    planes = {
        "disc": distance < r,
        "ring": (distance < r) & (distance > r / 2),
        "nested rings": (distance < r) & ~((distance < r * 0.75) & (distance > r * 0.35)),
        "islands": ((i - 3) ** 2 + (j - 3) ** 2 < 5) | ((i - size[0] + 4) ** 2 + (j - size[1] + 4) ** 2 < 6),
        "vessel of 2 pixels": (np.abs(i - j * 0.7 - 2) < 1.2) & (i > 1),
        "line of 1 pixel": (i == size[0] // 2) & (j > 1) & (j < size[1] - 3),
        "diagonal line": i == j,
        "single voxel": (i == 4) & (j == 7),
        "full slice": np.ones(size[:2], bool),
        "touching the border": (i < 3) | (j > size[1] - 3),
        "noise": np.random.default_rng(7).random(size[:2]) < 0.45,
    }
    masks = {}
    for name, plane in planes.items():
        masks[name] = np.zeros(size, bool)
        masks[name][:, :, [0, 2, 3, size[2] - 1]] = plane[:, :, None]
    return masks


def write_source(folder: Path, grid: Geometry, *, order: int = 1, frame: str | None = None, drop=()) -> Path:
    """One file a slice; ``order=-1`` numbers them from the far end; names say nothing of the order."""
    folder.mkdir(parents=True)
    affine = np.diag([-1, -1, 1, 1]) @ grid.affine
    right, down = affine[:3, 0] / grid.spacing[0], affine[:3, 1] / grid.spacing[1]
    study, series, frame = generate_uid(), generate_uid(), frame or generate_uid()
    pixels = np.random.default_rng(1).integers(0, 900, grid.shape[::-1], dtype=np.int16)
    for k in range(grid.shape[2]):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CTImageStorage, generate_uid()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds = FileDataset("", Dataset(), file_meta=meta, preamble=b"\0" * 128)
        ds.SOPClassUID, ds.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
        ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.FrameOfReferenceUID = study, series, frame
        ds.PatientName, ds.PatientID, ds.PatientBirthDate, ds.PatientSex = "Test^Case", "T1", "19500101", "O"
        ds.StudyDate, ds.StudyTime, ds.StudyID, ds.AccessionNumber = "20240102", "101112", "S1", "A1"
        ds.ReferringPhysicianName, ds.Manufacturer, ds.Modality = "", "None", "CT"
        ds.SeriesNumber, ds.InstanceNumber = 3, (k if order > 0 else grid.shape[2] - k)
        ds.ImagePositionPatient = [f"{v:.10g}" for v in affine[:3, 3] + k * affine[:3, 2]]
        ds.ImageOrientationPatient = [f"{v:.12g}" for v in (*right, *down)]
        ds.PixelSpacing, ds.SliceThickness = [f"{grid.spacing[1]:.10g}", f"{grid.spacing[0]:.10g}"], "2"
        ds.Columns, ds.Rows = grid.shape[:2]
        ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
        ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 1
        ds.RescaleIntercept, ds.RescaleSlope = 0, 1
        ds.PixelData = pixels[k].tobytes()
        for keyword in drop:
            delattr(ds, keyword)
        ds.save_as(folder / f"{(k * 7) % 23:02d}.dcm", enforce_file_format=True)
    return folder
