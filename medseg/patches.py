"""Preprocessed cases on disk, and the patches that training draws from them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from medseg.data import Case
from medseg.io.files import atomic_path
from medseg.losses import IGNORE
from medseg.plan import Plan
from medseg.transforms import preprocessing
from medseg.volume import Geometry

__all__ = ["PreparedCase", "draw_batch", "prepare"]

PLACES = 2000  # foreground voxels kept per structure, to centre patches on
FOREGROUND_SHARE = 0.5  # of the patches of a batch are placed on a structure


@dataclass(frozen=True)
class PreparedCase:
    """One case on the planned grid, on disk.

    ``places`` maps each class that is present to (n, 3) indices of some of its voxels; ``known`` says of each structure
    of the plan whether it was drawn here. Files are opened memory-mapped at each look, so that a set of any size needs
    neither memory nor open files, and a patch reads little more than itself.
    """

    id: str
    geometry: Geometry
    image_path: Path
    label_path: Path
    places: dict[int, np.ndarray]
    known: tuple[bool, ...]

    @property
    def image(self) -> np.ndarray:
        """(C, I, J, K) float32."""
        return _mapped(self.image_path)

    @property
    def label(self) -> np.ndarray:
        """(I, J, K) int16 class indices."""
        return _mapped(self.label_path)


def _mapped(path: Path) -> np.ndarray:
    array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    return array


def prepare(
    cases: Sequence[Case],
    plan: Plan,
    folder: Path,
    *,
    workers: int = 2,
    progress: Callable[[int], None] | None = None,
) -> list[PreparedCase]:
    """Preprocess cases into a folder, in parallel, and open them memory-mapped; what is there already is used again.

    Files are keyed by the plan and by path, size and time of the sources, and written atomically, so that an
    interrupted pass goes on where it stopped. Memory holds ``workers`` cases at a time.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pipeline = preprocessing(plan)
    recipe = plan.model_dump_json(include={"channels", "structures", "orientation", "spacing", "format"})

    def one(case: Case) -> PreparedCase:
        sources = [p for p in (*case.images, case.label) if p is not None]
        facts = [(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in sources]
        key = hashlib.sha256(f"{recipe}{facts}".encode()).hexdigest()[:16]
        paths = [folder / f"{case.id}.{key}.{kind}.npy" for kind in ("affine", "label", "image")]
        if not all(path.exists() for path in paths):
            data = pipeline({"case": case.id, "image": case.images, "label": case.label})
            arrays = (data["geometry"].affine, data["label"].numpy(), data["image"].numpy())
            for path, array in zip(paths, arrays, strict=True):
                with atomic_path(path, force=True) as temporary, temporary.open("wb") as file:
                    np.save(file, array, allow_pickle=False)
        label, affine = _mapped(paths[1]), np.load(paths[0], allow_pickle=False)
        return PreparedCase(
            case.id, Geometry(label.shape, affine), paths[2], paths[1], _places(label), _known(case, plan)
        )

    prepared = []
    with ThreadPoolExecutor(max(1, workers)) as pool:
        for done, case in enumerate(pool.map(one, cases), start=1):
            prepared.append(case)
            if progress:
                progress(done)
    return prepared


def _known(case: Case, plan: Plan) -> tuple[bool, ...]:
    return tuple(not set(s.values) & set(case.unknown) for s in plan.structures)


def _places(label: np.ndarray) -> dict[int, np.ndarray]:
    generator = np.random.default_rng(0)
    places = {}
    flat = np.flatnonzero(label)
    values = label.reshape(-1)[flat]
    for c in np.unique(values):
        at = flat[values == c]
        if len(at) > PLACES:
            at = generator.choice(at, PLACES, replace=False)
        places[int(c)] = np.stack(np.unravel_index(at, label.shape), 1)
    return places


def draw_batch(
    cases: Sequence[PreparedCase], plan: Plan, batch: int, seed: int, step: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The patches of one training step: a function of seed and step alone, so that a resumed run draws the same.

    Half of the patches hold a voxel of a structure, chosen evenly among the structures of the case, at a random place
    in the patch (a patch centred on its structure would teach the network to look in the middle); the rest lie anywhere.

    Returns
    -------
    images : (B, C, *patch) float32 tensor
    labels : (B, *patch) int64 tensor
        Class indices; ``IGNORE`` where the patch reaches beyond the image.
    known : (B, S) bool tensor
        Whether each structure was drawn in the case of the patch.
    """
    generator = np.random.default_rng([seed, step])
    foreground = round(batch * FOREGROUND_SHARE)
    chosen = [cases[int(generator.integers(len(cases)))] for _ in range(batch)]
    patches = [_draw_patch(case, plan, n < foreground, generator) for n, case in enumerate(chosen)]
    images, labels = (np.stack(arrays) for arrays in zip(*patches, strict=True))
    known = torch.tensor([case.known for case in chosen])
    return torch.from_numpy(images), torch.from_numpy(labels).long(), known


def _draw_patch(
    case: PreparedCase, plan: Plan, foreground: bool, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    whole_image, whole_label = case.image, case.label
    shape = np.asarray(whole_label.shape)
    patch = np.asarray((*plan.patch, 1) if plan.dims == 2 else plan.patch)
    low, high = np.minimum(0, shape - patch), np.maximum(0, shape - patch)  # a smaller image lies anywhere in the patch
    if foreground and case.places:
        chosen = list(case.places)[int(generator.integers(len(case.places)))]
        at = case.places[chosen][int(generator.integers(len(case.places[chosen])))]
        low, high = np.maximum(low, at - patch + 1), np.minimum(high, at)
    start = generator.integers(low, high + 1)
    inside_start, inside_stop = np.maximum(start, 0), np.minimum(start + patch, shape)
    window = tuple(slice(a, b) for a, b in zip(inside_start, inside_stop, strict=True))
    padding = [(int(a - s), int(s + p - b)) for s, a, b, p in zip(start, inside_start, inside_stop, patch, strict=True)]
    image, label = np.array(whole_image[(slice(None), *window)]), np.array(whole_label[window])
    if any(max(p) for p in padding):
        image = np.pad(image, [(0, 0), *padding], mode="edge")
        label = np.pad(label, padding, constant_values=IGNORE)
    if plan.dims == 2:
        image, label = image[..., 0], label[..., 0]
    return image, label
