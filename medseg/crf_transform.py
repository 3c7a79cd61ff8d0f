"""The dense CRF as a MONAI dictionary transform, usable without the rest of medseg."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform
from torch import Tensor

from medseg.crf import CRFParameters, refine
from medseg.volume import Geometry, LabelMap, Volume

__all__ = ["CRFd"]


class CRFd(MapTransform):
    """Refine predicted probabilities with the dense CRF, after ``Activationsd`` and before ``AsDiscreted``.

    Parameters
    ----------
    keys : str or sequence of str
        Entries that hold probabilities (K, H, W) or (K, H, W, D), as tensors or MetaTensors, on the grid of the image.
        K >= 2 exclusive labels, background first; or one channel, the probability of the foreground.
    image_key : str
        Entry that holds the image (C, H, W[, D]).
    parameters : CRFParameters, optional
        The gentle defaults if not given. Lengths are in mm: the spacing is that of the affine of the image, or of the
        probabilities where only these have one, or else 1 mm.
    exclusive : bool
        Whether the channels exclude each other (softmax). Otherwise each is refined by itself (sigmoid).
    axis : int
        Slices of a volume are perpendicular to this spatial axis.
    allow_missing_keys : bool
        Whether entries may be missing.

    Raises
    ------
    ValueError, TypeError
        If shapes do not fit, or the entries are no probabilities.

    Notes
    -----
    Probabilities stay on their device and keep their meta data; the result is float32. It cannot be inverted. Time and
    memory are those of :func:`medseg.refine`: linear in the voxels and channels.

    Examples
    --------
    >>> import torch
    >>> from monai.transforms import Activationsd, AsDiscreted, Compose
    >>> after = Compose([Activationsd("pred", softmax=True), CRFd("pred"), AsDiscreted("pred", argmax=True)])
    >>> found = after({"image": torch.rand(1, 24, 20, 3), "pred": torch.rand(2, 24, 20, 3)})
    >>> tuple(found["pred"].shape)
    (1, 24, 20, 3)
    """

    def __init__(
        self,
        keys: KeysCollection,
        image_key: str = "image",
        parameters: CRFParameters | None = None,
        *,
        exclusive: bool = True,
        axis: int = 2,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.image_key, self.parameters, self.exclusive, self.axis = image_key, parameters, exclusive, axis

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """The entries with refined probabilities in place of the former."""
        done = dict(data)
        if self.image_key not in done:
            raise KeyError(f"data must hold the image {self.image_key!r}, got {list(done)}; set image_key")
        for key in self.key_iterator(done):
            done[key] = self._refined(done[self.image_key], done[key], str(key))
        return done

    def _refined(self, image: Any, soft: Any, key: str) -> Tensor:
        shape = tuple(soft.shape[1:])
        if len(shape) not in (2, 3) or tuple(image.shape[1:]) != shape:
            raise ValueError(
                f"image and {key} must be (channels, H, W[, D]) of one grid, got {tuple(image.shape)} and "
                f"{tuple(soft.shape)}; take CRFd before the inverse of a resampling, or resample the image, too"
            )
        flat = len(shape) == 2
        if flat and self.axis != 2:
            raise ValueError(f"axis must be 2 for 2D images, got {self.axis}")
        geometry = Geometry((*shape, 1)[:3], _affine(image, soft, flat))
        arrays = [np.asarray(torch.as_tensor(x).detach().cpu().float()) for x in (image, soft)]
        scan, given = (a[..., None] if flat else a for a in arrays)
        device = soft.device if isinstance(soft, Tensor) else torch.device("cpu")
        volume = Volume(scan, geometry)
        if self.exclusive:
            refined = refine(volume, Volume(given, geometry), parameters=self.parameters, axis=self.axis, device=device)
            array = refined.array
        else:
            layers = LabelMap(given, geometry)
            array = refine(volume, layers, parameters=self.parameters, axis=self.axis, device=device).array
        result = torch.as_tensor(np.array(array[..., 0] if flat else array), device=device)
        return MetaTensor(result).copy_meta_from(soft) if isinstance(soft, MetaTensor) else result


def _affine(image: Any, soft: Any, flat: bool) -> np.ndarray:
    """The 4 x 4 affine of the grid; in 2D the third axis is perpendicular and has 1 mm."""
    source = next((x for x in (image, soft) if isinstance(x, MetaTensor)), None)
    found = np.eye(4) if source is None else np.asarray(source.affine, np.float64)
    if not flat:
        return found
    affine = np.eye(4)
    affine[:2, :2] = np.diag(np.linalg.norm(found[:-1, :2], axis=0))
    return affine
