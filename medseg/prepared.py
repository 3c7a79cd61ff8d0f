"""Preprocessed cases on disk: made once, in parallel, and shared by all folds."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medseg.blocks import BlockFile, Index
from medseg.data import Case
from medseg.io.files import atomic_path
from medseg.places import Places, find_places
from medseg.plan import Plan
from medseg.transforms import preprocessing
from medseg.volume import Geometry

__all__ = ["PreparedCase", "prepare"]

FORMAT = 3  # of the files and of what preprocessing does; older ones are made anew
RECIPE = {"channels", "structures", "orientation", "spacing", "format", "dims", "overlapping", "ignore"}
DETACHED = (".mhd", ".nhdr", ".hdr", ".img")  # headers whose voxels lie in another file of the same name
ENDS = 1 << 16  # bytes of both ends of a file that are looked at
LARGEST = 6e4  # of float16


@dataclass(frozen=True)
class PreparedCase:
    """One case on the planned grid, on disk.

    ``known`` says of each structure of the plan whether it was drawn here. ``places`` maps each class that is present
    (1 is the first structure) to the rows of the file's list of voxels that belong to it, see :func:`find_places`.

    Images are stored as float16, where their range allows it. That rounds a normalised voxel by at most 1/2048 of its
    value, a fifth of one HU at the far end of a CT window and less than the networks' own bf16, which rounds by 1/256;
    it halves what is read and kept.
    """

    id: str
    geometry: Geometry
    known: tuple[bool, ...]
    places: Places
    file: BlockFile

    @classmethod
    def open(cls, case: str, path: Path) -> PreparedCase:
        """Read the head of a file that :func:`prepare` wrote."""
        file = BlockFile.open(path)
        places = {int(c): tuple((a, b) for a, b in groups) for c, groups in file.facts["places"].items()}
        geometry = Geometry(file.shape, np.array(file.facts["affine"]))
        return cls(case, geometry, tuple(file.facts["known"]), places, file)

    @property
    def image(self) -> np.ndarray:
        """(C, I, J, K) float32, read whole."""
        return self.file.whole("image").astype(np.float32)

    @property
    def label(self) -> np.ndarray:
        """Read whole: (I, J, K) int16 class indices, or (S, I, J, K) layers, int8 or (soft) float16; -1 is ``IGNORE``."""
        label = self.file.whole("label")
        return label if self.file.facts["layered"] else label[0]

    def window(self, start: Index, stop: Index) -> tuple[np.ndarray, np.ndarray]:
        """Image and label, as they are stored, of voxels start to stop; reads little more than these."""
        label = self.file.window("label", start, stop)
        return self.file.window("image", start, stop), label if self.file.facts["layered"] else label[0]

    @property
    def soft(self) -> bool:
        """Whether the label is shares of voxels, not classes."""
        return bool(self.file.entries["label"].dtype.kind == "f")

    def place(self, number: int, generator: np.random.Generator) -> np.ndarray:
        """Index (3,) of a voxel of a class: first a size of component is drawn, then a component, then a voxel of it."""
        groups = self.places[number]
        low, high = groups[int(generator.integers(len(groups)))]
        return np.array(self.file.small("places")[int(generator.integers(low, high))])


def prepare(
    cases: Sequence[Case],
    plan: Plan,
    folder: Path,
    *,
    workers: int = 2,
    progress: Callable[[int], None] | None = None,
) -> list[PreparedCase]:
    """Preprocess cases into a folder, in parallel; what is there already is used again, whoever made it.

    Files are written atomically, one a case, and named by case and by a hash of what decides their content: the plan's
    grid, structures and normalisation, and name, size, time and both ends of the sources (the end of a gzip file holds
    the checksum of all of it; reading everything would take minutes for a thousand cases, this takes a second). So an
    interrupted pass goes on where it stopped, and folds, whose plans differ in nothing or in the normalisation of CT
    alone, share one folder. Memory holds ``workers`` cases at a time.

    Raises
    ------
    ValueError, OSError, MemoryError
        As soon as one case fails, the error says which; cases that wait are not begun.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pipeline = preprocessing(plan)
    recipe = f"{FORMAT} {plan.model_dump_json(include=RECIPE)}"

    def one(case: Case) -> PreparedCase:
        path = folder / f"{case.id}.{_key(case, recipe)}.safetensors"
        if path.exists():
            try:
                return PreparedCase.open(case.id, path)
            except ValueError:  # cut short by a full or failing disk
                path.unlink(missing_ok=True)
        try:
            data = {"case": case.id, "image": case.images, "label": case.label, "unknown": case.unknown}
            _write(path, pipeline(data), plan.dims)
        except MemoryError as problem:
            raise MemoryError(f"case {case.id} must fit memory while it is prepared; use fewer --workers") from problem
        except (ValueError, TypeError, RuntimeError) as problem:
            if case.id in str(problem):
                raise
            raise ValueError(f"case {case.id} must be fit for training: {problem}") from problem
        return PreparedCase.open(case.id, path)

    prepared = []
    with ThreadPoolExecutor(max(1, workers)) as pool:
        tasks = [pool.submit(one, case) for case in cases]
        try:
            for done, task in enumerate(tasks, start=1):
                prepared.append(task.result())
                if progress:
                    progress(done)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return prepared


def _write(path: Path, data: Mapping[str, Any], dims: int) -> None:
    image, label = (np.asarray(data[name]) for name in ("image", "label"))
    rows, places = find_places(label)
    facts = {
        "affine": data["geometry"].affine.tolist(),
        "known": data["known"],
        "places": places,
        "layered": label.ndim == 4,
    }
    fits = float(np.abs(image).max(initial=0)) < LARGEST
    layered = {
        "image": image.astype(np.float16 if fits else np.float32),
        "label": label[None] if label.ndim == 3 else label,
    }
    with atomic_path(path, force=True) as temporary:
        BlockFile.write(temporary, dims, layered, {"places": rows}, facts)


def _key(case: Case, recipe: str) -> str:
    sources = [p for p in (*case.images, case.label) if p is not None]
    digest = hashlib.sha256(f"{recipe} {case.unknown} {[p is None for p in case.images]}".encode())
    for source in sources:
        files = [source]
        if source.is_dir():
            files = sorted(p for p in source.rglob("*") if p.is_file())
        elif source.suffix.lower() in DETACHED:
            files = sorted(source.parent.glob(f"{source.stem}.*"))
        for file in files:
            stat = file.stat()
            digest.update(f" {file.name} {stat.st_size} {stat.st_mtime_ns}".encode())
            if source.is_dir():  # many small files: their times say enough
                continue
            with file.open("rb") as stream:
                digest.update(stream.read(ENDS))
                stream.seek(max(0, stat.st_size - ENDS))
                digest.update(stream.read(ENDS))
    return digest.hexdigest()[:16]
