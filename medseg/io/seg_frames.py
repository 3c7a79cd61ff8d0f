"""Frames of a segmentation object: pixel data of 1, 8 or 16 bits in whatever transfer syntax, one frame at a time."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.encaps import generate_frames
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    RLELossless,
)

from medseg.io.dicom_decode import decode_frame
from medseg.volume import DicomError

__all__ = ["FrameLayout", "frames"]

Array = NDArray[Any]
NATIVE = ("", ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian)
LARGEST = 1 << 27  # pixels a frame: beyond any scanner, and a bound on what compressed data can unpack to
DEFLATED_FRAMES = "1.2.840.10008.1.2.8.1"  # Deflated Image Frame Compression


@dataclass(frozen=True)
class FrameLayout:
    """Size of the frames: number, rows, columns and bits a pixel."""

    count: int
    rows: int
    columns: int
    bits: int

    @classmethod
    def of(cls, dataset: Dataset) -> FrameLayout:
        """From the header.

        Raises
        ------
        DicomError
            If the header states something that no segmentation has.
        """
        layout = cls(
            int(dataset.get("NumberOfFrames") or 1), int(dataset.Rows), int(dataset.Columns), int(dataset.BitsAllocated)
        )
        if min(layout.count, layout.rows, layout.columns) < 1 or layout.bits not in (1, 8, 16):
            raise DicomError(f"frames of a segmentation must have pixels of 1, 8 or 16 bits, got {layout}")
        if layout.rows * layout.columns > LARGEST:
            raise DicomError(f"frames of a segmentation must have at most {LARGEST} pixels, got {layout}")
        if int(dataset.get("SamplesPerPixel") or 1) != 1:
            raise DicomError("frames of a segmentation must have one sample a pixel, got colour")
        return layout

    @property
    def frame_bytes(self) -> int:
        """Bytes of one frame by itself, bits packed."""
        return (self.rows * self.columns * self.bits + 7) // 8


def frames(dataset: Dataset) -> Iterator[Array]:
    """Each frame in turn, (rows, columns): bool where a pixel has one bit, else unsigned integers.

    The size stated is checked against the pixel data before anything is allocated, and only one frame is held.

    Raises
    ------
    DicomError
        If the pixel data are missing, too short, or of a kind that cannot be decoded.
    """
    layout = FrameLayout.of(dataset)
    data = dataset.get("PixelData")
    if data is None:
        raise DicomError("segmentation must have pixel data, got none")
    meta: Dataset = getattr(dataset, "file_meta", Dataset())
    syntax = str(meta.get("TransferSyntaxUID", ""))
    if syntax in NATIVE:
        yield from _native(dataset, data, layout, syntax == ExplicitVRBigEndian)
        return
    found = 0
    for found, value in enumerate(generate_frames(data, number_of_frames=layout.count), 1):
        if found > layout.count:
            break
        yield _decode(value, dataset, layout, syntax)
    if found < layout.count:
        raise DicomError(f"pixel data must hold the {layout.count} frames of the header, got {found}")


def _native(dataset: Dataset, data: bytes, layout: FrameLayout, big: bool) -> Iterator[Array]:
    size = layout.rows * layout.columns
    needed = (layout.count * size * layout.bits + 7) // 8  # bits run on across frames, without padding between them
    if len(data) < needed:
        raise DicomError(f"pixel data must have the {needed} bytes of the header, got {len(data)}")
    raw = np.frombuffer(data, np.uint8)
    if big and layout.bits < 16 and dataset["PixelData"].VR == "OW" and not len(raw) % 2:
        raw = raw.view(">u2").astype("<u2").view(np.uint8)  # words were swapped as a whole
    if layout.bits > 1:
        values = raw if layout.bits == 8 else raw[: needed // 2 * 2].view(">u2" if big else "<u2")
        for n in range(layout.count):
            yield values[n * size : (n + 1) * size].reshape(layout.rows, layout.columns)
        return
    for n in range(layout.count):
        start, stop = n * size, (n + 1) * size
        bits = np.unpackbits(raw[start // 8 : (stop + 7) // 8], bitorder="little")[start % 8 :][:size]
        yield bits.view(bool).reshape(layout.rows, layout.columns)


def _decode(value: bytes, dataset: Dataset, layout: FrameLayout, syntax: str) -> Array:
    if syntax == DEFLATED_FRAMES:
        decoder = zlib.decompressobj(wbits=-15)
        return _packed(decoder.decompress(value, layout.rows * layout.columns * 2), layout)
    if syntax == RLELossless:
        return _packed(_unpack_rle(value, layout), layout)
    options = {
        "rows": layout.rows,
        "columns": layout.columns,
        "samples_per_pixel": 1,
        "bits_allocated": layout.bits,
        "bits_stored": int(dataset.get("BitsStored") or layout.bits),
        "pixel_representation": 0,
        "photometric_interpretation": "MONOCHROME2",
        "pixel_keyword": "PixelData",
    }
    frame = decode_frame(value, syntax, options, "the segmentation")
    return frame != 0 if layout.bits == 1 else frame


def _packed(data: bytes, layout: FrameLayout) -> Array:
    """A frame from its own bytes: bits packed, or (some writers) a byte a pixel."""
    size = layout.rows * layout.columns
    raw = np.frombuffer(data, np.uint8)
    if layout.bits == 1 and len(raw) < size:
        raw = np.unpackbits(raw, bitorder="little")
    elif layout.bits == 16:
        raw = raw[: len(raw) // 2 * 2].view("<u2")
    if len(raw) < size:
        raise DicomError(f"decoded frame must have {size} pixels, got {len(raw)}")
    frame = raw[:size].reshape(layout.rows, layout.columns)
    return frame != 0 if layout.bits == 1 else frame


def _unpack_rle(value: bytes, layout: FrameLayout) -> bytes:
    """The pixels of an RLE frame (PS3.5 annex G), little endian; one-bit pixels have one segment of packed bits."""
    count = max(1, layout.bits // 8)
    header = np.frombuffer(value[:64], "<u4")
    if len(header) < 16 or header[0] != count or header[1] < 64:
        raise DicomError(f"RLE frame of {layout.bits}-bit pixels must have {count} segments")
    size = layout.rows * layout.columns
    starts = [*header[1 : 1 + count].tolist(), len(value)]
    parts = [_unpack_bits(value[a:b], size) for a, b in pairwise(starts)]
    if count == 1:
        return parts[0]
    if any(len(p) < size for p in parts):
        raise DicomError(f"RLE frame must have {size} pixels, got {min(map(len, parts))}")
    return np.stack([np.frombuffer(p, np.uint8)[:size] for p in reversed(parts)], axis=1).tobytes()  # high bytes first


def _unpack_bits(source: bytes, limit: int) -> bytes:
    """Expand PackBits runs until ``limit`` bytes are there."""
    out, at = bytearray(), 0
    while at < len(source) - 1 and len(out) < limit:
        count = source[at]
        if count < 128:
            out += source[at + 1 : at + 2 + count]
            at += count + 2
        else:
            if count > 128:  # 128 itself is a filler
                out += source[at + 1 : at + 2] * (257 - count)
                at += 1
            at += 1
    return bytes(out)
