"""The patches that training draws from prepared cases."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from medseg.losses import IGNORE
from medseg.places import COUNTED
from medseg.plan import Plan
from medseg.prepared import PreparedCase

__all__ = ["FOREGROUND_SHARE", "choose_place", "draw_batch"]

FOREGROUND_SHARE = 0.5  # of the patches are placed on a structure
LOOKED_AT = 10  # cases that are searched for the structure of a patch


def draw_batch(
    cases: Sequence[PreparedCase], plan: Plan, batch: int, seed: int, step: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The patches of one training step: a function of seed and step alone, so that a resumed run draws the same.

    Half of the patches (in the long run) hold a voxel of a structure. The structure is drawn first, each as often as any
    other, then a case that holds it, if there is one among ten cases at random: a structure that few cases hold is
    raised by up to ten times its frequency, but one single case is not shown again and again. Of its connected
    components all sizes come as often, and the voxel lies anywhere in the patch: a patch centred on its structure would
    teach the network to look in the middle. The other patches lie anywhere in any case, or anywhere on voxels that
    count where some do not.

    Returns
    -------
    images : (B, C, *patch) float32 tensor
    labels : (B, *patch) int64 tensor of class indices, or (B, S, *patch) tensor of layers, int8 or (soft) float32
        ``IGNORE`` where the patch reaches beyond the image.
    known : (B, S) bool tensor
        Whether each structure was drawn in the case of the patch.

    Notes
    -----
    Time and what is read grow with the patch, not with the images.
    """
    generator = np.random.default_rng([seed, step])
    foreground = int(batch * FOREGROUND_SHARE + generator.random())
    chosen = generator.permutation(batch) < foreground
    drawn = [choose_place(cases, plan, bool(on_structure), generator) for on_structure in chosen]
    kind = torch.int64 if not plan.overlapping else torch.float32 if any(c.soft for c, _ in drawn) else torch.int8
    layers = (len(plan.structures),) if plan.overlapping else ()
    images = torch.empty(batch, len(plan.channels), *plan.patch)
    labels = torch.empty(batch, *layers, *plan.patch, dtype=kind)
    for image, label, (case, place) in zip(images, labels, drawn, strict=True):
        _fill(image, label, case, plan, place, generator)
    return images, labels, torch.tensor([case.known for case, _ in drawn])


def choose_place(
    cases: Sequence[PreparedCase], plan: Plan, on_structure: bool, generator: np.random.Generator
) -> tuple[PreparedCase, np.ndarray | None]:
    """A case, and the voxel (3,) that the patch must hold, if any: see :func:`draw_batch`."""
    case = cases[int(generator.integers(len(cases)))]
    if on_structure:
        wanted = int(generator.integers(len(plan.structures))) + 1
        others = (cases[int(generator.integers(len(cases)))] for _ in range(LOOKED_AT - 1))
        holder = next((c for c in (case, *others) if wanted in c.places), None)
        if holder is not None:
            return holder, holder.place(wanted, generator)
        present = [c for c in case.places if c != COUNTED]
        if present:
            return case, case.place(present[int(generator.integers(len(present)))], generator)
    return case, case.place(COUNTED, generator) if COUNTED in case.places else None


def _fill(
    image: Tensor,
    label: Tensor,
    case: PreparedCase,
    plan: Plan,
    place: np.ndarray | None,
    generator: np.random.Generator,
) -> None:
    """Fill image (C, *patch) and label ([S,] *patch) with a patch that holds ``place`` somewhere."""
    shape = np.asarray(case.geometry.shape)
    patch = np.asarray((*plan.patch, 1)[:3])
    low, high = np.minimum(0, shape - patch), np.maximum(0, shape - patch)  # a smaller image lies anywhere in the patch
    if place is not None:
        low, high = np.maximum(low, place - patch + 1), np.minimum(high, place)
    start = generator.integers(low, high + 1)
    inside, stop = np.maximum(start, 0), np.minimum(start + patch, shape)
    image, label = image.view(-1, *patch), label.view(-1, *patch)
    window = (slice(None), *(slice(int(a), int(b)) for a, b in zip(inside - start, stop - start, strict=True)))
    whole_patch = bool((stop - inside == patch).all())
    if not whole_patch:
        label.fill_(IGNORE)
    for target, values in zip((image, label), case.window(inside, stop), strict=True):
        target[window].copy_(torch.from_numpy(values.reshape(-1, *values.shape[-3:])))
    if not whole_patch:
        _extend(image, window)


def _extend(image: Tensor, window: tuple[slice, ...]) -> None:
    """Let the edge of what is inside the window (C, I, J, K) go on around it, axis by axis."""
    for axis, inside in enumerate(window[1:], start=1):
        for first, last, edge in ((0, inside.start, inside.start), (inside.stop, image.shape[axis], inside.stop - 1)):
            if last > first:
                image.narrow(axis, first, last - first).copy_(image.narrow(axis, edge, 1))
