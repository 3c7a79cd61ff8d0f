"""What a scribble changes in a mask: its surroundings of the same tissue, by geodesic distance.

References
----------
Criminisi, Sharp & Blake (2008), GeoS, doi:10.1007/978-3-540-88682-2_9; Wang et al. (2019), DeepIGeoS,
doi:10.1109/TPAMI.2018.2840695.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from skimage.graph import MCP_Geometric

__all__ = ["corrected"]

Array = NDArray[Any]
UNLIKE = 40.0  # how much longer a step on white is than on black, if black was scribbled
REACH = 0.5  # of a scribble, in radii of the structure
LEAST_PX = 2.0
FIRM = 2.0  # how much more a scribble says than the model, at the scribble itself


def corrected(logits: Array, picture: Array, inside: Array, outside: Array) -> Array:
    """The mask of a slice after scribbles.

    Each scribble adds to the logits a term that falls off with the geodesic distance from it: steps are longer where the
    intensity is unlike that under the scribble. Its reach is half the radius of a circle with the mask's area, so that
    large structures are corrected with large strokes. The scribbled pixels themselves are as they were drawn.

    Parameters
    ----------
    logits : (H, W) float array
        Of the model; the mask is where they are above 0.
    picture : (H, W) uint8 array
        The slice.
    inside, outside : (H, W) bool arrays
        What was scribbled as the structure, and as no part of it; later strokes win before they come here.

    Returns
    -------
    (H, W) bool array

    Notes
    -----
    O(n log n) in the pixels of a slice.
    """
    area = max(float(np.count_nonzero(logits > 0)), float(np.count_nonzero(inside)))
    reach = max(LEAST_PX, REACH * float(np.sqrt(area / np.pi)))
    firm = FIRM * max(1.0, float(np.abs(logits).max()))
    changed = logits.astype(np.float64)
    for seeds, sign in ((inside, 1), (outside, -1)):
        if seeds.any():
            changed += sign * firm * np.exp(-0.5 * (_distance(picture, seeds) / reach) ** 2)
    return np.asarray((changed > 0) & ~outside | inside)


def _distance(picture: Array, seeds: Array) -> Array:
    """Geodesic distance (pixels; longer where the tissue is unlike that of the seeds) from the seeds."""
    grey = ndimage.median_filter(np.asarray(picture, np.float64) / 255, 3)
    unlike = np.abs(grey - np.median(grey[seeds]))
    found: Array = MCP_Geometric(1 + UNLIKE * unlike).find_costs(np.argwhere(seeds))[0]
    return found
