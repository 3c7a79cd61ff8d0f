"""Compressed frames to arrays of stored values, checked before a codec sees them.

The codecs (GDCM, OpenJPEG, CharLS through pydicom) believe the picture size that the compressed stream states; it is held
against the header first, so that a hostile stream cannot make them allocate what it likes.
"""

from __future__ import annotations

import struct
import warnings
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.encaps import encapsulate, generate_frames
from pydicom.pixels import get_decoder
from pydicom.uid import UID

from medseg.volume import DicomError

__all__ = ["DECODE_ERRORS", "decode_frame", "split_frames"]

Array = NDArray[Any]
DEFLATED_FRAME = "1.2.840.10008.1.2.8.1"
RLE = "1.2.840.10008.1.2.5"
# The other JPEG-LS codec, pyjpegls, runs on for half a minute on streams that end early.
PLUGINS = {"1.2.840.10008.1.2.4.80": "gdcm", "1.2.840.10008.1.2.4.81": "gdcm"}
# What pydicom and the codecs raise on streams that are not what they claim to be.
DECODE_ERRORS = (
    ValueError, RuntimeError, AttributeError, TypeError, KeyError, IndexError, OSError, MemoryError,
    NotImplementedError, ZeroDivisionError, OverflowError, EOFError, struct.error, zlib.error,
)  # fmt: skip
_SOF = {0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF, 0xF7}


def split_frames(value: bytes, count: int, name: str) -> list[bytes]:
    """The compressed frames of an encapsulated value, fragments joined.

    Raises
    ------
    DicomError
        If the value does not hold ``count`` frames.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = []
            for frame in generate_frames(value, number_of_frames=count):
                found.append(frame)
                if len(found) == count:
                    break
    except DECODE_ERRORS as error:
        raise DicomError(f"encapsulated pixel data must be whole, got {type(error).__name__} in {name}") from error
    if len(found) != count:
        raise DicomError(f"encapsulated pixel data must hold {count} frames, got {len(found)} in {name}")
    return found


def decode_frame(frame: bytes, syntax: str, options: Mapping[str, Any], name: str) -> Array:
    """One compressed frame as (rows, columns) or (rows, columns, samples) stored values; colour as RGB.

    ``options`` are pydicom's: rows, columns, samples_per_pixel, bits_allocated and so on.

    Raises
    ------
    DicomError
        If there is no decoder, or the frame is damaged or states another size than the header.
    """
    rows, columns, samples = (int(options[k]) for k in ("rows", "columns", "samples_per_pixel"))
    size = rows * columns * samples * max(1, int(options["bits_allocated"]) // 8)
    if size > (64 << 20) + 4096 * len(frame):
        raise DicomError(f"frame must be of a size that {len(frame)} bytes can hold, got {size} bytes in {name}")
    if syntax == DEFLATED_FRAME:
        return _inflate(frame, size, options, name)
    if syntax != RLE:
        _check_stream(frame, rows, columns, samples, name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            decoder = get_decoder(UID(syntax))
            asked: dict[str, Any] = {**options, "number_of_frames": 1, "decoding_plugin": PLUGINS.get(syntax, "")}
            array, _ = decoder.as_array(encapsulate([frame]), index=0, **asked)
    except DECODE_ERRORS as error:
        reason = (
            "no decoder that can" if isinstance(error, NotImplementedError | RuntimeError) else type(error).__name__
        )
        title = UID(syntax).name if UID(syntax).is_transfer_syntax else "an unknown transfer syntax"
        raise DicomError(f"frame must be readable as {title}, got {reason} in {name}") from error
    if array.shape[:2] != (rows, columns):
        raise DicomError(f"frame must be {rows} x {columns} as its header says, got {array.shape} in {name}")
    return array


def _inflate(frame: bytes, size: int, options: Mapping[str, Any], name: str) -> Array:
    try:
        data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(frame, size + 1)
    except zlib.error as error:
        raise DicomError(f"deflated frame must be whole, got {error} in {name}") from None
    if not size <= len(data):
        raise DicomError(f"deflated frame must hold {size} bytes, got {len(data)} in {name}")
    shape = [int(options["rows"]), int(options["columns"])] + [int(options["samples_per_pixel"])] * (
        int(options["samples_per_pixel"]) > 1
    )
    return np.frombuffer(data[:size], f"<u{max(1, int(options['bits_allocated']) // 8)}").reshape(shape)


def _check_stream(frame: bytes, rows: int, columns: int, samples: int, name: str) -> None:
    """Raise unless a JPEG, JPEG-LS or JPEG 2000 stream states the size that the header does."""
    stated = _jpeg_size(frame) if frame[:2] == b"\xff\xd8" else _j2k_size(frame)
    if stated != (rows, columns, samples):
        raise DicomError(
            f"compressed frame must be {rows} x {columns} x {samples} as its header, got {stated} in {name}"
        )


def _jpeg_size(frame: bytes) -> tuple[int, int, int] | None:
    position = 2
    while position + 10 <= len(frame):
        if frame[position] != 0xFF:
            return None
        marker = frame[position + 1]
        if marker == 0xFF:
            position += 1
            continue
        if marker in _SOF:
            rows, columns, samples = struct.unpack_from(">HHB", frame, position + 5)
            return rows, columns, samples
        if marker == 0x01 or 0xD0 <= marker <= 0xD8:
            position += 2
            continue
        position += 2 + struct.unpack_from(">H", frame, position + 2)[0]
    return None


def _j2k_size(frame: bytes) -> tuple[int, int, int] | None:
    start = frame.find(b"\xff\x4f\xff\x51", 0, 4096)  # the codestream may sit in a JP2 box
    if start < 0 or start + 42 > len(frame):
        return None
    width, height, left, top = struct.unpack_from(">4I", frame, start + 8)
    samples = struct.unpack_from(">H", frame, start + 40)[0]
    return height - top, width - left, samples
