"""A tiny promptable model and a phantom for it: in a box it draws what is as bright as the middle of the box."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from medseg.volume import Geometry, Volume

SIDE = 96


class Bright:
    """Same interface as :class:`medseg.models.sam.PromptableModel`; its embedding is the picture, made small."""

    name = "bright"
    size = SIDE

    def __init__(self, prompts: frozenset[str] = frozenset({"box"}), fingerprint: str = "0") -> None:
        self.prompts, self.fingerprint = prompts, fingerprint
        self.encoded, self.decoded = 0, 0

    def encode(self, images: Tensor) -> Tensor:
        assert images.shape[1] == 3 and float(images.min()) >= 0 and float(images.max()) <= 1
        self.encoded += len(images)
        return F.interpolate(images[:, :1], (SIDE, SIDE), mode="bilinear", align_corners=False)

    def decode(
        self,
        embeddings: Tensor,
        image_of: Tensor,
        image_size: tuple[int, int],
        *,
        boxes: Tensor | None = None,
        points: Tensor | None = None,
        point_labels: Tensor | None = None,
        masks: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        self.decoded += len(image_of)
        pictures = F.interpolate(embeddings, image_size, mode="bilinear", align_corners=False)[image_of, 0]
        rows, columns = torch.meshgrid(*(torch.arange(n) for n in image_size), indexing="ij")
        out = []
        for n, picture in enumerate(pictures):
            level, where = None, torch.ones_like(picture, dtype=torch.bool)
            if boxes is not None:
                x0, y0, x1, y1 = boxes[n].tolist()
                where = (columns >= x0 - 0.5) & (columns < x1 - 0.4) & (rows >= y0 - 0.5) & (rows < y1 - 0.4)  # edges
                level = picture[int((y0 + y1 - 1) / 2), int((x0 + x1 - 1) / 2)]
            if points is not None and point_labels is not None:
                for (x, y), inside in zip(points[n].tolist(), point_labels[n].tolist(), strict=True):
                    if inside == 1 and level is None:
                        level = picture[round(y), round(x)]
                    elif inside == 0:
                        where = where & ((columns - x) ** 2 + (rows - y) ** 2 > 4)
            out.append(torch.where(where & ((picture - level).abs() < 0.2), 8.0, -8.0))
        return torch.stack(out)[:, None], torch.full((len(out),), 0.9)


def ball(geometry: Geometry, centre: np.ndarray, radii_mm: tuple[float, float, float]) -> np.ndarray:
    """(I, J, K) bool: an ellipsoid along the world axes around a place (RAS+ mm)."""
    world = geometry.to_world(np.stack(np.meshgrid(*map(np.arange, geometry.shape), indexing="ij"), -1))
    return np.asarray((((world - centre) / np.array(radii_mm)) ** 2).sum(-1) <= 1)


def phantom(geometry: Geometry) -> tuple[Volume, np.ndarray, np.ndarray]:
    """A CT with two bright organs, and their masks."""
    middle = geometry.corners.mean(0)
    extent = min(n * s for n, s in zip(geometry.shape, geometry.spacing, strict=True))
    one = ball(geometry, np.add(middle, (extent * 0.2, 0, 0)), (extent * 0.16, extent * 0.2, extent * 0.22))
    two = ball(geometry, np.subtract(middle, (extent * 0.25, 0, 0)), (extent * 0.14, extent * 0.14, extent * 0.25))
    voxels = np.full(geometry.shape, -150, np.int16)
    voxels[one], voxels[two] = 100, 220
    return Volume(voxels, geometry, {"modality": "CT"}), one, two
