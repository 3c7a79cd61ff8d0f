"""Volumes that scanners tile into one 2D image: Siemens mosaics and UIH VFRAME; where each tile lies in the patient.

The plain header of a Siemens mosaic states a position for the big picture, not for the slices, and not which way they
stack: both follow from the private CSA header. A mosaic without one is refused, because its slices could run either way.
"""

from __future__ import annotations

import math
import struct

import numpy as np

from medseg.io.dicom_header import Header
from medseg.volume import DicomError

__all__ = ["Tile", "read_csa", "siemens_tiles", "uih_tiles"]

Tile = tuple[int, int, tuple[float, float, float]]  # row and column of its first pixel; LPS position of that pixel (mm)
_CSA, _MAX_TAGS = "SIEMENS CSA HEADER", 1024


def read_csa(data: bytes) -> dict[str, list[str]]:
    """The text values of a Siemens CSA header (either version) by name.

    Raises
    ------
    DicomError
        If it is not one, or ends early.
    """
    second = data[:4] == b"SV10"
    position = 8 if second else 0
    try:
        count = struct.unpack_from("<I", data, position)[0]
        if not 0 < count <= _MAX_TAGS:
            raise DicomError(f"CSA header must hold 1 to {_MAX_TAGS} elements, got {count}")
        position += 8
        found: dict[str, list[str]] = {}
        first_length = 0
        for number in range(count):
            name, _, _, _, items, _ = struct.unpack_from("<64si4siii", data, position)
            position += 84
            if items < 0 or items > _MAX_TAGS:
                raise DicomError(f"CSA element must hold at most {_MAX_TAGS} values, got {items}")
            first_length = items if number == 1 else first_length
            values = []
            for _ in range(items):
                lengths = struct.unpack_from("<4i", data, position)
                position += 16
                # Version 1 states lengths with an offset that equals the number of items of its second element.
                length = lengths[1] if second else lengths[0] - first_length
                if length < 0 or position + length > len(data):
                    if second:
                        raise DicomError("CSA header must be whole, got a value that ends beyond it")
                    break
                value = data[position : position + length].split(b"\0")[0].strip().decode("latin-1")
                position += -(-length // 4) * 4
                if value:
                    values.append(value)
            found[name.split(b"\0")[0].decode("latin-1")] = values
    except struct.error:
        raise DicomError("CSA header must be whole, got one that ends early") from None
    return found


def siemens_tiles(header: Header, rows: int, columns: int) -> tuple[int, int, list[Tile]]:
    """Rows and columns of a tile of a Siemens mosaic, and the tiles in order of the slices.

    Raises
    ------
    DicomError
        If the CSA header or the position of the mosaic is missing.
    """
    element = header.find_private(0x0029, _CSA, 0x10)
    if element is None:
        raise DicomError(
            f"mosaic must have its CSA header to tell how the slices stack, got none in {header.file.name}"
        )
    csa = read_csa(header.private_bytes(element))
    try:
        normal = np.array([float(v) for v in csa.get("SliceNormalVector", ())][:3])
        count = int((csa.get("NumberOfImagesInMosaic") or ["0"])[0])
    except ValueError:
        raise DicomError(f"CSA header must hold numbers, got other text in {header.file.name}") from None
    if normal.shape != (3,) or not 0.99 < np.linalg.norm(normal) < 1.01 or not 0 < count <= rows * columns:
        raise DicomError(
            f"mosaic must state the number and normal of its slices, got {count} and {normal.tolist()} in "
            f"{header.file.name}"
        )
    item = header.item
    origin, axes = np.array(item.numbers("ImagePositionPatient")), np.array(item.numbers("ImageOrientationPatient"))
    spacing = np.array(item.numbers("PixelSpacing"))
    gap = item.number("SpacingBetweenSlices") or item.number("SliceThickness")
    if origin.shape != (3,) or axes.shape != (6,) or spacing.shape != (2,) or not gap:
        raise DicomError(f"mosaic must state position, orientation and spacing, got none in {header.file.name}")
    across = math.ceil(math.sqrt(count))
    if rows % across or columns % across:
        raise DicomError(
            f"mosaic of {count} tiles must split evenly, got {rows} x {columns} pixels in {header.file.name}"
        )
    high, wide = rows // across, columns // across
    # The stated position is that of a big picture around the centre of the slice: move to the slice's own corner.
    corner = origin + axes[:3] * spacing[1] * (columns - wide) / 2 + axes[3:] * spacing[0] * (rows - high) / 2
    tiles = []
    for k in range(count):
        x, y, z = (corner + k * gap * normal).tolist()
        tiles.append((k // across * high, k % across * wide, (x, y, z)))
    return high, wide, tiles


def uih_tiles(header: Header, rows: int, columns: int) -> tuple[int, int, list[Tile]]:
    """As :func:`siemens_tiles` for United Imaging's VFRAME, whose private sequence states each tile's position.

    Raises
    ------
    DicomError
        If that sequence is missing or does not fit the picture.
    """
    element = header.find_private(0x0065, "Image Private Header", 0x51)
    items = header.private_items(element) if element is not None else []
    positions = [item.numbers("ImagePositionPatient") for item in items]
    if not items or any(len(p) != 3 for p in positions):
        raise DicomError(f"VFRAME image must state the position of each tile, got none in {header.file.name}")
    across = math.ceil(math.sqrt(len(items)))
    down = math.ceil(len(items) / across)
    if rows % down or columns % across:
        raise DicomError(
            f"VFRAME image of {len(items)} tiles must split evenly, got {rows} x {columns} pixels in {header.file.name}"
        )
    high, wide = rows // down, columns // across
    return high, wide, [(k // across * high, k % across * wide, (p[0], p[1], p[2])) for k, p in enumerate(positions)]
