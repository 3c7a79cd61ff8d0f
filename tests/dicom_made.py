"""Small DICOM series made with pydicom, for the tests of the reader: independent of medseg's own writer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from pydicom import dcmwrite
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.sequence import Sequence as Items
from pydicom.uid import (
    CTImageStorage,
    EnhancedMRImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    MRImageStorage,
    RTDoseStorage,
    generate_uid,
)

AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
CORONAL = (1.0, 0.0, 0.0, 0.0, 0.0, -1.0)
SAGITTAL = (0.0, 1.0, 0.0, 0.0, 0.0, -1.0)
SHAPE = (7, 5)  # columns, rows
SPACING = (1.5, 0.8)  # PixelSpacing: between rows, between columns


def oblique(angle: float = 0.4) -> tuple[float, ...]:
    """Orientation of a slice that is turned about two axes."""
    c, s = np.cos(angle), np.sin(angle)
    return tuple(float(v) for v in (c, s, 0, -s * c, c * c, s))


def pixels(k: int, shape: tuple[int, int] = SHAPE, seed: int = 0) -> np.ndarray:
    """Stored values (rows, columns) of slice k, different in each."""
    return np.random.default_rng((seed, k + 1000)).integers(0, 2000, shape[::-1]).astype(np.uint16)


def image(
    array: np.ndarray, position: Sequence[float] | None, axes: Sequence[float] | None = AXIAL, **tags: Any
) -> Dataset:
    """A classic single-frame image with the stored values given; ``tags`` overwrite or (None) remove elements."""
    ds = FileDataset("", {}, file_meta=FileMetaDataset(), preamble=b"\0" * 128)
    ds.SOPClassUID, ds.SOPInstanceUID = CTImageStorage, generate_uid()
    ds.Modality, ds.ImageType = "CT", ["ORIGINAL", "PRIMARY", "AXIAL"]
    ds.PatientName, ds.PatientID = "Secret^Name", "SECRET-ID"
    ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.FrameOfReferenceUID = "1.2.3.4", "1.2.3.4.5", "1.2.3.4.6"
    ds.SeriesNumber, ds.SeriesDescription = 3, "made up"
    ds.PixelSpacing, ds.SliceThickness = list(SPACING), 2.5
    if position is not None:
        ds.ImagePositionPatient = [float(f"{v:.8f}") for v in position]
    if axes is not None:
        ds.ImageOrientationPatient = [float(f"{v:.10f}") for v in axes]
    ds.RescaleSlope, ds.RescaleIntercept = 1, 0
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.Rows, ds.Columns = array.shape[:2]
    bits = 8 * array.dtype.itemsize
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = bits, bits, bits - 1
    ds.PixelRepresentation = int(array.dtype.kind == "i")
    ds.PixelData = array.tobytes()
    ds["PixelData"].VR = "OW" if bits > 8 else "OB"
    for keyword, value in tags.items():
        if value is None and keyword in ds:
            del ds[keyword]
        elif value is not None:
            setattr(ds, keyword, value)
    return ds


def save(ds: Dataset, path: Path, syntax: str = ExplicitVRLittleEndian) -> Path:
    """Write a data set, its 16-bit pixels swapped where the transfer syntax is big endian."""
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
    ds.file_meta.TransferSyntaxUID = syntax
    path.parent.mkdir(parents=True, exist_ok=True)
    if syntax == ExplicitVRBigEndian:
        ds.PixelData = np.frombuffer(ds.PixelData, "<u2").astype(">u2").tobytes()
        buffer = BytesIO(b"")
        dcmwrite(buffer, ds, force_encoding=True, little_endian=False, implicit_vr=False)
        path.write_bytes(buffer.getvalue())
    else:
        ds.save_as(path, enforce_file_format=True)
    return path


def series(
    folder: Path,
    positions: Sequence[Sequence[float]],
    axes: Sequence[float] = AXIAL,
    *,
    each: Callable[[int], dict[str, Any]] = lambda k: {},
    prefix: str = "",
    seed: int = 0,
    **tags: Any,
) -> list[np.ndarray]:
    """Write one image per position, under names that do not sort like the positions; gives their stored values."""
    arrays = []
    for k, position in enumerate(positions):
        array = pixels(k, seed=seed)
        ds = image(array, position, axes, **{"InstanceNumber": (k * 7) % 5 + 1, **tags, **each(k)})
        save(ds, folder / f"{prefix}{(k * 37) % 101:03d}_{k}.dcm")
        arrays.append(array)
    return arrays


def stack_positions(
    count: int, gap: float = 2.5, start: Sequence[float] = (-20.0, 30.0, 5.0), axes: Sequence[float] = AXIAL
) -> list[np.ndarray]:
    """Positions (LPS) of slices evenly spaced along their normal."""
    normal = np.cross(axes[:3], axes[3:])
    return [np.asarray(start) + k * gap * normal for k in range(count)]


def affine_of(
    position: Sequence[float], axes: Sequence[float], step: Sequence[float], spacing: Sequence[float] = SPACING
) -> np.ndarray:
    """The RAS+ affine by the formula of PS3.3 C.7.6.2.1.1, written out here on its own."""
    m = np.eye(4)
    m[:3, 0] = np.asarray(axes[:3]) * spacing[1]
    m[:3, 1] = np.asarray(axes[3:]) * spacing[0]
    m[:3, 2], m[:3, 3] = step, position
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ m


def enhanced(arrays: Sequence[np.ndarray], frames: Sequence[dict[str, Any]], **tags: Any) -> Dataset:
    """An enhanced MR image; each frame a dict of position, axes, slope, time, echo, component, b."""
    ds = image(np.stack(arrays), None, None, SOPClassUID=EnhancedMRImageStorage, Modality="MR", PixelSpacing=None)
    ds.Rows, ds.Columns = arrays[0].shape
    ds.NumberOfFrames, ds.ImageType = len(arrays), ["ORIGINAL", "PRIMARY", "T1", "NONE"]
    del ds.RescaleSlope, ds.RescaleIntercept, ds.SliceThickness
    shared = Dataset()
    shared.PixelMeasuresSequence = Items([Dataset()])
    shared.PixelMeasuresSequence[0].PixelSpacing = list(SPACING)
    shared.PixelMeasuresSequence[0].SliceThickness = 2.5
    ds.SharedFunctionalGroupsSequence = Items([shared])
    groups = []
    for f in frames:
        g = Dataset()
        g.PlanePositionSequence, g.PlaneOrientationSequence = Items([Dataset()]), Items([Dataset()])
        g.PlanePositionSequence[0].ImagePositionPatient = [float(v) for v in f["position"]]
        g.PlaneOrientationSequence[0].ImageOrientationPatient = list(f.get("axes", AXIAL))
        g.PixelValueTransformationSequence = Items([Dataset()])
        g.PixelValueTransformationSequence[0].RescaleSlope = f.get("slope", 1)
        g.PixelValueTransformationSequence[0].RescaleIntercept = 0
        g.FrameContentSequence = Items([Dataset()])
        g.FrameContentSequence[0].StackID = "1"
        if "time" in f:
            g.FrameContentSequence[0].TemporalPositionIndex = f["time"]
        if "echo" in f:
            g.MREchoSequence = Items([Dataset()])
            g.MREchoSequence[0].EffectiveEchoTime = float(f["echo"])
        if "component" in f:
            g.MRImageFrameTypeSequence = Items([Dataset()])
            g.MRImageFrameTypeSequence[0].ComplexImageComponent = f["component"]
            g.MRImageFrameTypeSequence[0].FrameType = ["ORIGINAL", "PRIMARY", "T1", "NONE"]
        groups.append(g)
    ds.PerFrameFunctionalGroupsSequence = Items(groups)
    for keyword, value in tags.items():
        setattr(ds, keyword, value)
    return ds


def dose(arrays: Sequence[np.ndarray], position: Sequence[float], offsets: Sequence[float], scaling: float) -> Dataset:
    """An RTDOSE grid."""
    ds = image(np.stack(arrays), position, AXIAL, SOPClassUID=RTDoseStorage, Modality="RTDOSE")
    del ds.RescaleSlope, ds.RescaleIntercept
    ds.Rows, ds.Columns = arrays[0].shape
    ds.NumberOfFrames, ds.GridFrameOffsetVector = len(arrays), [float(v) for v in offsets]
    ds.DoseGridScaling, ds.DoseUnits = scaling, "GY"
    return ds


def csa(values: dict[str, Sequence[str]], version: int = 2) -> bytes:
    """A Siemens CSA header with these values."""
    out = b"SV10\x04\x03\x02\x01" if version == 2 else b""
    out += len(values).to_bytes(4, "little") + (77).to_bytes(4, "little")
    first = 0
    for number, (name, texts) in enumerate(values.items()):
        count = max(6, len(texts)) if texts else 0
        first = count if number == 1 else first
        out += name.encode().ljust(64, b"\0") + len(texts).to_bytes(4, "little") + _vr(texts)
        out += (4).to_bytes(4, "little") + count.to_bytes(4, "little") + (77).to_bytes(4, "little")
        for k in range(count):
            data = texts[k].encode() + b"\0" if k < len(texts) else b""
            length = len(data)
            stated = length if version == 2 else length + first
            out += b"".join(v.to_bytes(4, "little") for v in (stated, length, 77, length))
            out += data.ljust(-(-length // 4) * 4, b"\0")
    return out


def _vr(texts: Sequence[str]) -> bytes:
    text = "".join(texts)
    return b"SH\0\0" if "*" in text else b"FD\0\0" if "." in text else b"IS\0\0"


def mosaic(
    arrays: Sequence[np.ndarray], position: Sequence[float], axes: Sequence[float], normal: Sequence[float], gap: float,
    **tags: Any,
) -> Dataset:  # fmt: skip
    """A Siemens mosaic of the slices given; ``position`` is that of the first slice's first pixel."""
    across = int(np.ceil(np.sqrt(len(arrays))))
    rows, columns = arrays[0].shape
    big = np.zeros((rows * across, columns * across), np.uint16)
    for k, a in enumerate(arrays):
        r, c = divmod(k, across)
        big[r * rows : (r + 1) * rows, c * columns : (c + 1) * columns] = a
    shift = np.asarray(axes[:3]) * SPACING[1] * (big.shape[1] - columns) / 2
    shift = shift + np.asarray(axes[3:]) * SPACING[0] * (big.shape[0] - rows) / 2
    ds = image(
        big, np.asarray(position) - shift, axes, SOPClassUID=MRImageStorage, Modality="MR", Manufacturer="SIEMENS",
        ImageType=["ORIGINAL", "PRIMARY", "M", "ND", "MOSAIC"], SpacingBetweenSlices=gap,
    )  # fmt: skip
    block = ds.private_block(0x29, "SIEMENS CSA HEADER", create=True)
    header = {
        "ImaCoilString": [],
        "EchoLinePosition": ["1"],
        "AcquisitionMatrixText": [f"{rows}*{columns}"],
        "NumberOfImagesInMosaic": [str(len(arrays))],
        "SliceNormalVector": [f"{v:.8f}" for v in normal],
    }
    block.add_new(0x10, "OB", csa(header, tags.pop("csa_version", 2)))
    for keyword, value in tags.items():
        setattr(ds, keyword, value)
    return ds
