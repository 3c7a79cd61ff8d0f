"""Follow organs through a scan with SAM 2 from boxes on single slices, and write them as one label map.

python workflows/propagate_sam2.py SCAN facebook/sam2.1-hiera-tiny --box liver:41:120,80,260,210 --window -160 240

The weights are yours to choose and to download (a folder in transformers' format, or an id on the Hugging Face hub). What
SAM 2 is worth on medical scans was not measured here: look at the result.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from tyro.conf import Positional

import medseg
from medseg.models.sam2 import SliceTracker, load_sam2


@dataclass(frozen=True)
class Recipe:
    """What is followed, with which weights, and where it goes."""

    scan: Positional[Path]
    """Image file or DICOM folder; followed along the last axis of its grid in the orientation LPI."""
    weights: Positional[str]
    """SAM 2 for videos: a folder that transformers wrote, or an id on the Hugging Face hub."""
    box: list[str]
    """Each NAME:SLICE:x0,y0,x1,y1 in pixels of that slice, x to the patient's left, y to the back."""
    window: tuple[float, float] = (-160.0, 240.0)
    """Lowest and highest intensity that is shown (HU of CT)."""
    out: Path = Path("sam2.nii.gz")
    """Label map on the scan's own grid."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:n."""


def main(recipe: Recipe) -> None:
    """Track the boxes both ways and write the masks."""
    scan = medseg.read(recipe.scan)
    turned = medseg.reorient(scan, "LPI")
    low, high = recipe.window
    shown = np.clip((turned.array[0].astype(np.float32) - low) / (high - low), 0, 1)
    model = load_sam2(recipe.weights, medseg.device.pick_device(recipe.device))
    tracker = SliceTracker(model, torch.from_numpy(shown.transpose(2, 1, 0).copy()))
    for text in recipe.box:
        name, number, corners = text.split(":")
        tracker.add_box(name, int(number), [float(v) for v in corners.split(",")])
    masks = tracker.track(lambda done, total: print(f"\r{done} of {total} slices", end="", flush=True))
    labels = np.zeros(turned.geometry.shape, np.uint8)
    for value, mask in enumerate(masks.values(), start=1):
        labels[mask.numpy().transpose(2, 1, 0)] = value
    structures = tuple(medseg.Structure(n, str(name)) for n, name in enumerate(masks, start=1))
    result = medseg.resample_to(medseg.LabelMap(labels, turned.geometry, structures), scan.geometry)
    medseg.write(result, recipe.out)
    print(f"\n{recipe.out}: " + ", ".join(f"{s.name} {int((labels == s.number).sum())} voxels" for s in structures))


if __name__ == "__main__":
    main(tyro.cli(Recipe))
