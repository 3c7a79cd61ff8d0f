"""Embeddings of images kept on disk, so that a frozen encoder sees each image once."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
import zlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from medseg.io.files import atomic_path

__all__ = ["EmbeddingCache", "embedding_key"]

SUFFIX = ".embedding.safetensors"
KEY = re.compile(r"[0-9a-f]{16,64}")
NAME = "embedding"
CHECK = "crc32"
ABANDONED_S = 3600.0  # age from which a temporary file is of a process that died


def embedding_key(
    image: np.ndarray, fingerprint: str, window: Sequence[float] | str | None = None, size: int | None = None
) -> str:
    """Key of the embedding of an image: the same for the same pixels, encoder, window and input size.

    Parameters
    ----------
    image : array of any shape and type
        The pixels, before or after the window.
    fingerprint : str
        Of the encoder's weights (``PromptableModel.fingerprint``).
    window : sequence of float, str or None
        How the pixels become what the encoder sees, where that is not done yet.
    size : int, optional
        Side (pixels) of the encoder's square.

    Returns
    -------
    str
        64 hexadecimal digits.

    Examples
    --------
    >>> image = np.zeros((4, 5), np.uint8)
    >>> embedding_key(image, "a") == embedding_key(image, "a"), embedding_key(image, "a") == embedding_key(image, "b")
    (True, False)
    """
    how = window if window is None or isinstance(window, str) else [float(v) for v in window]
    head = json.dumps([image.shape, image.dtype.str, fingerprint, how, size])
    digest = hashlib.sha256(head.encode())
    digest.update(np.ascontiguousarray(image).data)
    return digest.hexdigest()


class EmbeddingCache:
    """Embeddings in a folder, or in memory, up to a number of bytes; those used longest ago go first.

    Parameters
    ----------
    folder : path or None
        Made if it is not there; None keeps embeddings in memory, for this process alone.
    limit_bytes : int
        What all embeddings may take. An embedding of SAM's family takes 2 MiB.

    Raises
    ------
    ValueError
        If the folder cannot be made or written to, or the limit is not positive.

    Notes
    -----
    Each embedding is a file of float16, written under a temporary name and renamed, with a checksum that is verified
    whenever it is read (a millisecond); a file that is cut short or changed is made anew. Any number of processes may
    share the folder: two that miss the same entry at once both make it, and one file stays. Nothing but its own files
    is ever removed. What a process holds of a removed file stays valid, since it is mapped into memory.
    """

    def __init__(self, folder: str | Path | None, limit_bytes: int) -> None:
        if limit_bytes < 1:
            raise ValueError(f"cache size must be positive, got {limit_bytes} bytes")
        self.folder, self.limit_bytes = None if folder is None else Path(folder), limit_bytes
        self.memory: OrderedDict[str, Tensor] = OrderedDict()
        if self.folder is not None:
            probe = self.folder / f".medseg-{os.getpid()}-{id(self)}"
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                probe.touch()
                probe.unlink()
            except OSError as problem:
                raise ValueError(
                    f"cache must be a folder that can be written to, got {self.folder} ({problem.strerror}); use another"
                ) from problem

    def get(self, key: str, make: Callable[[], Tensor]) -> Tensor:
        """The embedding of a key, made if it is not there.

        Parameters
        ----------
        key : str
            Of :func:`embedding_key`.
        make : callable
            Gives the embedding, of any shape and floating type.

        Returns
        -------
        float16 tensor on the CPU
            Mapped from the file: read what you need of it, and do not write into it.

        Raises
        ------
        ValueError
            If the key is not hexadecimal, or the embedding is beyond the range of float16.
        """
        if not KEY.fullmatch(key):
            raise ValueError(f"key must be 16 to 64 hexadecimal digits, got {key!r}")
        if self.folder is None:
            return self._from_memory(key, make)
        path = self.folder / f"{key}{SUFFIX}"
        found = _read(path)
        if found is None:
            fresh = _half(make())
            if fresh.nbytes > self.limit_bytes:
                return fresh
            _write(path, fresh)
            self._remove_oldest(path)
            found = fresh
        return found

    def _from_memory(self, key: str, make: Callable[[], Tensor]) -> Tensor:
        if key not in self.memory:
            self.memory[key] = _half(make())
        self.memory.move_to_end(key)
        found = self.memory[key]
        while sum(t.nbytes for t in self.memory.values()) > self.limit_bytes:
            self.memory.popitem(last=False)
        return found

    def _remove_oldest(self, fresh: Path) -> None:
        """Remove what was used longest ago until the rest is within the limit; the fresh file stays."""
        found = []
        for entry in os.scandir(fresh.parent):
            if not entry.name.endswith(SUFFIX):
                continue
            try:
                stat = entry.stat()
            except FileNotFoundError:  # another process removed it
                continue
            if not entry.name.startswith("."):
                found.append((entry.name != fresh.name, -stat.st_mtime_ns, stat.st_size, entry.path))
            elif time.time() - stat.st_mtime > ABANDONED_S:
                Path(entry.path).unlink(missing_ok=True)
        total = 0
        for _, _, size, path in sorted(found):
            total += size
            if total > self.limit_bytes and path != str(fresh):
                Path(path).unlink(missing_ok=True)


def _half(embedding: Tensor) -> Tensor:
    half = embedding.detach().to("cpu", torch.float16).contiguous()
    if not bool(torch.isfinite(half).all()):
        raise ValueError(f"embedding must be finite in float16, got up to {float(embedding.abs().max()):.3g}")
    return half


def _write(path: Path, embedding: Tensor) -> None:
    with atomic_path(path, force=True) as temporary:
        save_file({NAME: embedding}, temporary, metadata={CHECK: str(_checksum(embedding))})


def _read(path: Path) -> Tensor | None:
    """The embedding in a file, marked as used now; None where the file is missing or not as it was written."""
    try:
        with safe_open(path, "pt") as file:
            expected = (file.metadata() or {}).get(CHECK)
            embedding: Tensor = file.get_tensor(NAME)
        os.utime(path)
    except (FileNotFoundError, SafetensorError):
        return None
    return embedding if str(_checksum(embedding)) == expected else None


def _checksum(embedding: Tensor) -> int:
    return zlib.crc32(embedding.numpy().data)
