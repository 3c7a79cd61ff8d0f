"""DICOM RT Structure Sets: read into a LabelMap and written from one."""

from __future__ import annotations

import os
from typing import Literal

from medseg.volume import DicomError, Geometry, LabelMap

__all__ = ["ContourStyle", "HoleStyle", "read_rtstruct", "write_rtstruct"]

ContourStyle = Literal["edge", "smooth"]
HoleStyle = Literal["xor", "keyhole"]


def read_rtstruct(
    path: str | os.PathLike[str],
    like: Geometry | None = None,
    *,
    frame_of_reference: str | None = None,
    allow_mismatch: bool = False,
) -> LabelMap:
    """Read the contours of an RT Structure Set as masks on a grid."""
    raise DicomError(f"RTSTRUCT must be readable, got {path}; this version cannot read it yet")


def write_rtstruct(
    labels: LabelMap,
    path: str | os.PathLike[str],
    source: str | os.PathLike[str],
    *,
    series: str | None = None,
    style: ContourStyle = "edge",
    holes: HoleStyle = "xor",
    force: bool = False,
) -> None:
    """Write the contours of a label map as an RT Structure Set of its source series."""
    raise DicomError(f"RTSTRUCT must be writable, got {path}; this version cannot write it yet")
