"""DICOM Segmentation objects: read into a LabelMap and written from one."""

from __future__ import annotations

import os
from typing import Literal

from medseg.volume import DicomError, Geometry, LabelMap

__all__ = ["SegKind", "read_seg", "write_seg"]

SegKind = Literal["binary", "labelmap", "fractional"]


def read_seg(
    path: str | os.PathLike[str],
    like: Geometry | None = None,
    *,
    frame_of_reference: str | None = None,
    allow_mismatch: bool = False,
) -> LabelMap:
    """Read a DICOM Segmentation object."""
    raise DicomError(f"DICOM-SEG must be readable, got {path}; this version cannot read it yet")


def write_seg(
    labels: LabelMap,
    path: str | os.PathLike[str],
    source: str | os.PathLike[str],
    *,
    series: str | None = None,
    kind: SegKind = "binary",
    force: bool = False,
) -> None:
    """Write a DICOM Segmentation object on the grid of its source series."""
    raise DicomError(f"DICOM-SEG must be writable, got {path}; this version cannot write it yet")
