"""Prompts as records: what was drawn on which object, in a log that is saved as JSON and replayed."""

from __future__ import annotations

import base64
import hashlib
import json
import warnings
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from medseg.contours import bounding_box
from medseg.io.files import atomic_path
from medseg.volume import Geometry, Volume

__all__ = ["Prompt", "PromptLog", "packed", "unpacked"]

Array = NDArray[Any]
Kind = Literal["box", "point", "scribble", "mask", "remove"]
KINDS: tuple[Kind, ...] = ("box", "point", "scribble", "mask", "remove")
VERSION = 1


@dataclass(frozen=True)
class Prompt:
    """One prompt, or the removal of an object.

    Parameters
    ----------
    kind : "box", "point", "scribble", "mask" or "remove"
        What it is.
    object : str
        Name of the object that it is on.
    places : tuple of tuples of float
        Index coordinates (i, j, k): two opposite corners of a box, a point, or all voxels of a scribble.
    inside : bool
        Whether a point or scribble lies in the object, or shows what is no part of it.
    spread : bool
        Whether the object goes on into the neighbouring slices.
    packed : str
        Voxels of a mask; see :func:`packed`.
    """

    kind: Kind
    object: str
    places: tuple[tuple[float, ...], ...] = ()
    inside: bool = True
    spread: bool = True
    packed: str = ""


def packed(mask: Array) -> str:
    """A bool mask (I, J, K) as text: its box and the bits in it, compressed."""
    box = bounding_box(mask)
    if box is None:
        raise ValueError("mask must have voxels, got an empty one")
    corner = [s.start for s in box]
    inner = np.ascontiguousarray(mask[box])
    bits = base64.b64encode(zlib.compress(np.packbits(inner).tobytes(), 9)).decode()
    return json.dumps([corner, inner.shape, bits])


def unpacked(text: str, shape: tuple[int, int, int]) -> Array:
    """The bool mask (I, J, K) that was packed."""
    try:
        corner, size, bits = json.loads(text)
        raw = np.frombuffer(zlib.decompress(base64.b64decode(bits)), np.uint8)
        inner = np.unpackbits(raw, count=int(np.prod(size))).astype(bool).reshape(size)
        out = np.zeros(shape, bool)
        box = tuple(slice(c, c + s) for c, s in zip(corner, size, strict=True))
        out[box] |= inner
    except (ValueError, TypeError, zlib.error) as problem:
        raise ValueError(f"mask in a log must be as it was saved, got a damaged one ({problem})") from problem
    return out


@dataclass(frozen=True)
class PromptLog:
    """All that a session was told: replayed on the same image with the same model, it gives the same masks.

    Parameters
    ----------
    prompts : tuple of Prompt
        In the order in which they came; what was undone is not among them.
    model, fingerprint : str
        Name of the model, and the SHA-256 of its weights.
    window : str
        A preset of :mod:`medseg.windows`, "low,high", "percentile" or "colour".
    axis : int
        Index axis that slices are across unless a flat box says otherwise.
    shape, affine : tuples
        The grid of the image (index -> RAS+ mm).
    image : str
        Checksum of its voxels.
    """

    prompts: tuple[Prompt, ...]
    model: str
    fingerprint: str
    window: str
    axis: int
    shape: tuple[int, ...]
    affine: tuple[tuple[float, ...], ...]
    image: str

    def save(self, path: str | Path, *, force: bool = False) -> None:
        """Write it as JSON."""
        text = json.dumps({"version": VERSION, **asdict(self)}, indent=1)
        with atomic_path(Path(path), force=force) as temporary:
            Path(temporary).write_text(text)

    @classmethod
    def load(cls, path: str | Path) -> PromptLog:
        """Read it.

        Raises
        ------
        FileNotFoundError
            If there is no such file.
        ValueError
            If the file is not a log of prompts.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"log must exist, got {path}; check the name")
        try:
            read = json.loads(Path(path).read_text())
            version = read.pop("version")
            prompts = tuple(_prompt(**p) for p in read.pop("prompts"))
            affine = tuple(tuple(float(v) for v in row) for row in read.pop("affine"))
            log = cls(prompts=prompts, affine=affine, shape=tuple(read.pop("shape")), **read)
            known = version == VERSION
        except (ValueError, TypeError, KeyError, AttributeError) as problem:
            raise ValueError(f"log must be one that a session saved, got {problem} in {path}") from problem
        if not known:
            raise ValueError(f"log must be of version {VERSION}, got {version} in {path}; update medseg")
        return log

    def require_image(self, image: Volume) -> None:
        """Raise unless the image has the grid of the log; warn where its voxels are others."""
        geometry = Geometry(self.shape, np.array(self.affine))  # type: ignore[arg-type]
        image.geometry.require_close(geometry, "image and the one of the log")
        if checksum(image) != self.image:
            warnings.warn("voxels are not those that the log was made on: masks may differ", stacklevel=3)


def _prompt(kind: str, object: str, places: Any, inside: bool, spread: bool, packed: str) -> Prompt:
    if kind not in KINDS:
        raise ValueError(f"kind of a prompt must be one of {', '.join(KINDS)}, got {kind!r}")
    where = tuple(tuple(float(v) for v in place) for place in places)
    return Prompt(kind, str(object), where, bool(inside), bool(spread), str(packed))


def checksum(image: Volume) -> str:
    """Of the voxels, whatever their order in memory; slice by slice, so that no copy of a volume is made."""
    digest = hashlib.sha256(f"{image.array.dtype.str}{image.array.shape}".encode())
    for channel in image.array:
        for plane in channel:
            digest.update(np.ascontiguousarray(plane).data)
    return digest.hexdigest()[:32]
