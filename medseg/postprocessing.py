"""Small things to leave out of a prediction: filters of connected components, chosen where validation gains by them.

The rule is nnU-Net's (Isensee et al. 2021, doi:10.1038/s41592-020-01008-z): a filter is used only if the mean Dice over
cases rises. A filter touches one structure alone, so no other can lose by it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from medseg.choice import Choice
from medseg.config import Record
from medseg.lesions import components
from medseg.volume import LabelMap

__all__ = ["ComponentFilter", "Components", "Postprocessing", "choose_filter", "find_components"]

Array = NDArray[Any]
SIZES_MM3 = tuple(factor * 10.0**power for power in range(-1, 6) for factor in (1, 2, 5))
LARGEST_SHARE = 0.1  # of the median volume of a structure: no filter takes away more than this at once
LEAST_GAIN = 0.001  # of mean Dice, below which no filter is used
LEAST_CASES = 3


class ComponentFilter(Record):
    """What is left out of one structure: all but its ``largest`` component, or those below ``min_mm3`` (mm3)."""

    number: int
    name: str
    largest: bool = False
    min_mm3: float = 0.0
    dice_before: float
    dice_after: float

    @property
    def words(self) -> str:
        """What it does and what it gained."""
        rule = "only the largest component" if self.largest else f"no component below {self.min_mm3:g} mm3"
        return f"{self.name}: {rule} (Dice {self.dice_before:.4f} to {self.dice_after:.4f})"

    def kept(self, sizes: Array, voxel_mm3: float) -> Array:
        """Which of the components (N,) of these sizes (voxels) stay: bool (N,); the first of equally large ones."""
        if self.largest:
            return np.asarray(np.arange(len(sizes)) == (sizes.argmax() if len(sizes) else 0))
        return np.asarray(sizes * voxel_mm3 >= self.min_mm3)


class Postprocessing(Choice):
    """What validation said about filters and about the temperature of the probabilities.

    The temperature divides the logits: above 1 it makes probabilities less certain. ``nll`` (nats a voxel) and ``ece``
    (expected calibration error, mean over structures) are of the voxels around the structures, before and after.
    """

    file: ClassVar[str] = "postprocessing.json"
    filters: tuple[ComponentFilter, ...] = ()
    temperature: float = 1.0
    nll: tuple[float, float] | None = None
    ece: tuple[float, float] | None = None

    @property
    def reason(self) -> str:
        """One sentence for people."""
        if not self.cases:
            return "off: there was no time to look at validation cases"
        words = [f.words for f in self.filters] or ["no component filter helps"]
        if self.temperature == 1 or self.ece is None:
            words.append("probabilities as they are")
        else:
            words.append(f"temperature {self.temperature:.3g} (ECE {self.ece[0]:.4f} to {self.ece[1]:.4f})")
        return f"chosen on {self.cases} validation cases: {'; '.join(words)}"

    def apply(self, labels: LabelMap) -> LabelMap:
        """The label map without what the filters leave out, which becomes background; O(voxels) in boxes of structures.

        Layers may be bool alone.
        """
        if not self.filters:
            return labels
        array = np.array(labels.array)
        boxes = [] if labels.is_layered else ndimage.find_objects(array)
        for one in self.filters:
            if labels.is_layered:
                layer = array[[s.number for s in labels.structures].index(one.number)]
                box, number = next(iter(ndimage.find_objects(layer.view(np.uint8))), None), 1
            else:
                layer, number = array, one.number
                box = boxes[number - 1] if number <= len(boxes) else None
            if box is None:
                continue
            part = layer[box]
            numbered = components(part == number)
            sizes = np.bincount(numbered.ravel())[1:]
            dropped = np.concatenate([[False], ~one.kept(sizes, labels.geometry.voxel_mm3)])
            part[dropped[numbered]] = 0
        return replace(labels, array=array)


# ---------------------------------------------------------------------------------------------------------------------
# Choosing


@dataclass(frozen=True)
class Components:
    """The components of one structure in one predicted case, as far as the Dice of any choice among them needs.

    Attributes
    ----------
    sizes, shared : (N,) arrays
        Voxels of each component, and how many of these belong to the reference.
    reference : int
        Voxels of the reference.
    voxel_mm3 : float (mm3)
    """

    sizes: Array
    shared: Array
    reference: int
    voxel_mm3: float

    def dice(self, kept: Array) -> float:
        """Dice when these components stay; 1 where the structure is rightly not found."""
        size = int(self.sizes[kept].sum()) + self.reference
        return 2 * int(self.shared[kept].sum()) / size if size else 1.0


def find_components(prediction: Array, reference: Array, voxel_mm3: float) -> Components:
    """Label the components (corner neighbours count) of a mask and count the voxels that they share with another.

    Parameters
    ----------
    prediction, reference : (I, J, K) bool
    voxel_mm3 : float (mm3)
        Volume of a voxel.
    """
    box = next(iter(ndimage.find_objects(prediction.view(np.uint8))), None) or (slice(0, 0),)
    numbered = components(prediction[box])
    sizes = np.bincount(numbered.ravel(), minlength=1)
    shared = np.bincount(numbered[reference[box]], minlength=len(sizes))
    return Components(sizes[1:], shared[1:], int(np.count_nonzero(reference)), voxel_mm3)


def choose_filter(number: int, name: str, cases: Sequence[Components]) -> ComponentFilter | None:
    """The filter of a structure that raises its mean Dice over cases most, or None where none does by 0.001.

    Tried are the largest component alone, and least sizes of 1, 2, 5, 10 ... mm3 up to a tenth of the median volume of
    the references. Of equally good filters the gentlest is taken.
    """
    if len(cases) < LEAST_CASES:
        return None
    volumes = [c.reference * c.voxel_mm3 for c in cases if c.reference]
    most = LARGEST_SHARE * float(np.median(volumes)) if volumes else 0.0
    options = [{"min_mm3": size} for size in (0.0, *(s for s in SIZES_MM3 if s <= most))]
    tried = [
        ComponentFilter(number=number, name=name, dice_before=0, dice_after=0, **option)  # type: ignore[arg-type]
        for option in (*options, {"largest": True})
    ]
    means = [float(np.mean([c.dice(f.kept(c.sizes, c.voxel_mm3)) for c in cases])) for f in tried]
    best = int(np.argmax(np.round(means, 6)))
    if means[best] < means[0] + LEAST_GAIN:
        return None
    return tried[best].model_copy(update={"dice_before": means[0], "dice_after": means[best]})
