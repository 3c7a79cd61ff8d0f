"""Contours from boxes with LiteMedSAM, beside the ellipse inscribed in the same boxes.

``python workflows/bench/contour.py --data DIR [--cases demo spleen pt_115 ...] [--cache FOLDER] [--exact] [--memory]``

For each structure: one box on its largest slice followed through the volume; with ``--exact`` also a box of its own on
every slice with at least 10 pixels. DIR holds ``demo_totalseg_ct``, ``spleen_crop`` and ``openkbp``. The rules of
following were made on ``demo`` and ``pt_100``, without ``spleen``, ``pt_112`` and ``pt_115``. Embeddings take 2.5 CPU
seconds a slice once (``--cache`` keeps them). ``--memory`` contours 40 slices of a 512 x 512 x 300 volume.
"""

from __future__ import annotations

import argparse
import resource
import time
from pathlib import Path

import numpy as np

import medseg
from medseg.boxes import ellipse
from medseg.embeddings import EmbeddingCache
from medseg.models.sam import load_promptable
from medseg.planes import Planes
from medseg.propagation import rectangle_of
from medseg.slice_model import SliceModel
from medseg.volume import Geometry, LabelMap, Volume

ABDOMEN = {5: "liver", 1: "spleen", 2: "kidney right", 3: "kidney left", 6: "stomach", 52: "aorta"}
NECK = {1: "brainstem", 3: "parotid right", 4: "parotid left", 7: "mandible"}
LEAST_PX = 10


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--cases", nargs="*", default=["demo", "pt_100", "spleen", "pt_112", "pt_115"])
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--exact", action="store_true")
    parser.add_argument("--memory", action="store_true")
    options = parser.parse_args()
    cache = EmbeddingCache(options.cache, 8 << 30)
    model = load_promptable()
    rows = []
    for case in options.cases:
        image, labels, names = load(options.data, case)
        session = medseg.PromptSession(image, model, axis="axial", cache=cache)
        for number, name in names.items():
            if number not in labels.names or not labels.mask(number).any():
                continue
            rows.append((case, name, *one_box(session, name, labels.mask(number))))
            print("| " + " | ".join(map(str, rows[-1])) + " |", flush=True)
            if options.exact:
                print(f"exact boxes: {case} {name}: {exact_boxes(session, labels.mask(number))}", flush=True)
    if options.memory:
        print(memory(model))


def load(data: Path, case: str) -> tuple[Volume, LabelMap, dict[int, str]]:
    """Image, labels and the structures of interest of a case."""
    if case == "demo":
        folder = data / "demo_totalseg_ct"
        labels = medseg.read_labels(folder / "example_seg_fast_force_split.nii.gz")
        return medseg.read(folder / "example_ct.nii.gz"), labels, ABDOMEN
    if case == "spleen":
        folder = data / "spleen_crop"
        return medseg.read(folder / "image.nii.gz"), medseg.read_labels(folder / "label.nii.gz"), {1: "spleen"}
    folder = data / "openkbp"
    file = f"{case}.nii.gz"
    return medseg.read(folder / "images" / file), medseg.read_labels(folder / "labels" / file), NECK


def one_box(session: medseg.PromptSession, name: str, truth: np.ndarray) -> tuple[str, ...]:
    """Dice of a volume from one box, of the ellipses in the boxes of its slices, overrun in slices, and CPU seconds."""
    planes = session.planes
    areas = truth.sum(axis=tuple(a for a in range(3) if a != planes.axis))
    largest, there = int(areas.argmax()), np.flatnonzero(areas)
    rectangle = rectangle_of(planes.take(truth, largest))
    corners = planes.index(rectangle.reshape(2, 2), largest)
    session.box(name, np.concatenate([corners.min(0), corners.max(0)]))
    began = time.process_time()
    found = session.contour(name)
    seconds = time.process_time() - began
    session.undo()
    if not found.any():
        return "0.000", "", f"0 of {len(there)}", "", "", f"{seconds:.0f} s"
    ellipses = np.zeros_like(found)
    reached = np.flatnonzero(found.any(axis=tuple(a for a in range(3) if a != planes.axis)))
    for n in reached:
        planes.put(ellipses, int(n), ellipse(rectangle_of(planes.take(found, int(n))), planes.size))
    over = (max(0, there[0] - reached[0]), max(0, reached[-1] - there[-1]))
    short = (max(0, reached[0] - there[0]), max(0, there[-1] - reached[-1]))
    return (
        f"{dice(found, truth):.3f}", f"{dice(ellipses, truth):.3f}", f"{len(reached)} of {len(there)}",
        f"+{over[0]} +{over[1]}", f"-{short[0]} -{short[1]}", f"{seconds:.0f} s",
    )  # fmt: skip


def exact_boxes(session: medseg.PromptSession, truth: np.ndarray) -> str:
    """Dice over the slices with at least 10 pixels, each with the box of its label, and that of the ellipses."""
    planes = session.planes
    slices = SliceModel(session.image, planes, session.model, session.window, session.cache, session.device)
    sums = np.zeros(4)
    for n in range(planes.count):
        mask = planes.take(truth, n)
        if mask.sum() < LEAST_PX:
            continue
        rectangle = rectangle_of(mask)
        found = slices.logits(n, rectangle[None])[0][0] > 0
        drawn = ellipse(rectangle, planes.size)
        sums += (2 * (found & mask).sum(), found.sum() + mask.sum(), 2 * (drawn & mask).sum(), drawn.sum() + mask.sum())
    return f"model {sums[0] / sums[1]:.3f}, ellipse {sums[2] / sums[3]:.3f}"


def dice(a: np.ndarray, b: np.ndarray) -> float:
    """Of two masks."""
    return 2 * float((a & b).sum()) / float(a.sum() + b.sum())


def memory(model: object) -> str:
    """Peak memory of a process that contours 40 slices of a 512 x 512 x 300 volume."""
    grid = Geometry.from_parts((512, 512, 300), (0.8, 0.8, 1.0))
    voxels = np.full(grid.shape, -100, np.int16)
    i, j = np.ogrid[:512, :512]
    for k in range(130, 170):
        voxels[..., k][(i - 250) ** 2 + (j - 260) ** 2 < (60 - abs(k - 150)) ** 2] = 90
    session = medseg.PromptSession(Volume(voxels, grid, {"modality": "CT"}), model, cache=None)  # type: ignore[arg-type]
    session.box("ball", (190, 200, 150, 310, 320, 150))
    began = time.process_time()
    labels = session.labels()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    used = Planes.of(grid).count
    return (
        f"512 x 512 x {used}: {int(labels.array.any((0, 1)).sum())} slices, {time.process_time() - began:.0f} CPU s, "
        f"peak {peak:.2f} GiB"
    )


if __name__ == "__main__":
    main()
