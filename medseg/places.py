"""Where the structures of a case are: a few of their voxels, to place patches on."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from scipy import ndimage

__all__ = ["COUNTED", "Places", "find_places"]

Places = dict[int, tuple[tuple[int, int], ...]]

COUNTED = 0  # the class under which voxels that count are kept, where some do not
MOST = 512  # voxels kept per class and size of component


def find_places(label: np.ndarray) -> tuple[np.ndarray, Places]:
    """Voxels of each structure, its components of every size alike.

    Components are grouped by size, a factor of 8 in voxels (2 in diameter) to a group. In a group all components have
    the same number of voxels kept, so that neither one large lesion nor many small ones drown the others.

    Parameters
    ----------
    label : (I, J, K) class indices, or (S, I, J, K) layers
        Below 0 where voxels do not count; soft layers belong to a structure from 0.5 on.

    Returns
    -------
    rows : (N, 3) int32 array
        Indices (i, j, k); at most ``MOST`` per class and group.
    places : dict
        For each class that is present the rows (first, last + 1) of each group. Where some voxels do not count, the
        class ``COUNTED`` lists ones that do.

    Notes
    -----
    Time grows with the boxes around the structures, memory with the largest of them.
    """
    generator = np.random.default_rng(0)
    rows: list[np.ndarray] = []
    places: Places = {}
    filled = 0
    for number, mask, corner in _structures(label):
        groups = []
        for group in _groups(mask, generator):
            at = np.stack(np.unravel_index(group, mask.shape), 1) + corner
            rows.append(at.astype(np.int32))
            groups.append((filled, filled + len(at)))
            filled += len(at)
        places[number] = tuple(groups)
    counted = np.zeros(label.shape[-3:], bool)
    for layer in label[None] if label.ndim == 3 else label:
        counted |= layer >= 0
    if not counted.all() and counted.any():
        flat = np.flatnonzero(counted)
        at = np.stack(np.unravel_index(generator.choice(flat, min(len(flat), MOST), replace=False), counted.shape), 1)
        rows.append(at.astype(np.int32))
        places[COUNTED] = ((filled, filled + len(at)),)
    return np.concatenate(rows) if rows else np.zeros((0, 3), np.int32), places


def _structures(label: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Class, mask within its box, first corner of the box."""
    layers = [label] if label.ndim == 3 else list(label)
    for n, layer in enumerate(layers, start=1):
        if label.ndim == 4:
            mask = layer >= 0.5
            layer = (mask if mask.any() else layer > 0).astype(np.int16)
        for c, box in enumerate(ndimage.find_objects(np.maximum(layer, 0)), start=1):
            if box is not None:
                number = c if label.ndim == 3 else n
                yield number, layer[box] == c, np.array([s.start for s in box])


def _groups(mask: np.ndarray, generator: np.random.Generator) -> Iterator[np.ndarray]:
    """Flat indices of voxels of components of one order of size each, the smallest first."""
    components, count = ndimage.label(mask, np.ones((3,) * mask.ndim))
    flat = np.flatnonzero(mask)
    if count == 1:
        yield generator.choice(flat, min(len(flat), MOST), replace=False)
        return
    of = components.reshape(-1)[flat]
    flat = flat[np.argsort(of, kind="stable")]
    sizes = np.bincount(of)[1:]
    starts = np.cumsum(sizes) - sizes
    order = np.log2(sizes).astype(int) // 3
    for o in np.unique(order):
        members = generator.permutation(np.flatnonzero(order == o))
        members = np.resize(members, min(MOST, int(sizes[members].sum())))  # all in turn, over and over
        yield flat[starts[members] + (generator.random(len(members)) * sizes[members]).astype(int)]
