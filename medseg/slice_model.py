"""A promptable model on the slices of one volume: each slice is encoded once, when a prompt first needs it."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from medseg.embeddings import EmbeddingCache, embedding_key
from medseg.planes import Planes
from medseg.volume import Volume
from medseg.windows import Window, slice_picture

__all__ = ["Promptable", "SliceModel"]

Array = NDArray[Any]
ZOOM = 4.0  # how much wider than a structure the crop is that shows it large
LEAST_CROP_PX = 24
BEYOND = -20.0  # logits outside of a crop


class Promptable(Protocol):
    """What is needed of a model; :class:`medseg.models.sam.PromptableModel` has it."""

    name: str
    size: int
    prompts: frozenset[str]
    fingerprint: str

    def encode(self, images: Tensor) -> Tensor: ...

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
    ) -> tuple[Tensor, Tensor]: ...


class SliceModel:
    """Prompts on slices of an image, answered by a promptable model.

    Parameters
    ----------
    image : Volume
        The image.
    planes : Planes
        The slices of its grid that are shown to the model.
    model : Promptable
        The model, in eval mode.
    window : Window
        Which intensities the model sees.
    cache : EmbeddingCache
        Where embeddings are kept; on disk they also serve the next session.
    device : torch.device
        Where the model computes.
    crop : (x0, y0, x1, y1), optional
        Pixels x0 <= x < x1, y0 <= y < y1 that the model is shown; by default the whole slice.

    Notes
    -----
    The first prompt on a slice costs an embedding (seconds on a CPU), all further ones a decoding (a tenth of a second).
    Memory is that of one slice and of what the cache holds. Pixels that are not square are made square for the model.
    """

    def __init__(
        self,
        image: Volume,
        planes: Planes,
        model: Promptable,
        window: Window,
        cache: EmbeddingCache,
        device: torch.device,
        crop: tuple[int, int, int, int] | None = None,
    ) -> None:
        self.image, self.planes, self.model = image, planes, model
        self.window, self.cache, self.device = window, cache, device
        height, width = planes.size
        self.crop = crop or (0, 0, width, height)
        size = self.crop[3] - self.crop[1], self.crop[2] - self.crop[0]
        self.shown = planes.square_of(size)
        self._keys: dict[int, str] = {}

    def zoomed(self, rectangle: Array) -> SliceModel:
        """The same slices, of which the model is shown a square around x0, y0, x1, y1, four times as wide (>= 24 px)."""
        height, width = self.planes.size
        side = np.max((rectangle[2:] - rectangle[:2] + 1) * self.planes.pixel_mm[::-1])
        sides = np.maximum(LEAST_CROP_PX, np.ceil(ZOOM * side / np.asarray(self.planes.pixel_mm[::-1]))).astype(int)
        low = np.round((rectangle[:2] + rectangle[2:] + 1 - sides) / 2).astype(int)
        low = np.clip(low, 0, np.maximum(0, np.array([width, height]) - sides))
        high = np.minimum(low + sides, [width, height])
        crop = (int(low[0]), int(low[1]), int(high[0]), int(high[1]))
        return SliceModel(self.image, self.planes, self.model, self.window, self.cache, self.device, crop)

    def picture(self, number: int) -> Array:
        """(3, H, W) uint8: the slice, or the crop of it, as the model sees it before its pixels are made square."""
        x0, y0, x1, y1 = self.crop
        return slice_picture(self.planes.take(self.image.array, number)[..., y0:y1, x0:x1], self.window)

    def whole(self, number: int) -> Array:
        """(H, W) uint8: all of a slice in grey, in the window."""
        picture = slice_picture(self.planes.take(self.image.array, number), self.window)
        return np.asarray(picture.mean(0).astype(np.uint8))

    def embedding(self, number: int) -> Tensor:
        """Embedding (1, 256, h, h) of a slice, float16 on the CPU."""
        made: list[Array] = []
        if number not in self._keys:
            made.append(self.picture(number))
            square = "x".join(map(str, self.shown))
            self._keys[number] = embedding_key(made[0], self.model.fingerprint, square, self.model.size)

        def make() -> Tensor:
            picture = torch.from_numpy(np.ascontiguousarray(made[0] if made else self.picture(number)))
            pixels = picture[None].to(self.device, torch.float32) / 255
            if self.shown != tuple(pixels.shape[2:]):
                pixels = F.interpolate(pixels, self.shown, mode="bilinear", align_corners=False, antialias=True)
            return self.model.encode(pixels.clamp(0, 1))

        return self.cache.get(self._keys[number], make)

    @torch.no_grad()
    def logits(
        self, number: int, boxes: Array | None = None, points: Array | None = None, inside: Array | None = None
    ) -> tuple[Array, Array]:
        """Answers to prompts on one slice.

        Parameters
        ----------
        number : int
            The slice.
        boxes : (N, 4) array, optional
            x0, y0, x1, y1 in pixels; corners are centres of pixels.
        points : (N, P, 2) array, optional
            x, y in pixels.
        inside : (N, P) array of int, optional
            1 for points in the structure, 0 outside, -1 for fillers.

        Returns
        -------
        logits : (N, H, W) float32 array
            The mask is where they are above 0.
        predicted_iou : (N,) array
        """
        given = boxes if boxes is not None else points
        if given is None:
            raise ValueError(f"prompt must be a box or points, got none on slice {number}")
        x0, y0, x1, y1 = self.crop
        size = (y1 - y0, x1 - x0)
        found, scores = self.model.decode(
            self.embedding(number).to(self.device, torch.float32),
            torch.zeros(len(given), dtype=torch.long, device=self.device),
            self.shown,
            boxes=None if boxes is None else self._shown_boxes(boxes),
            points=None if points is None else self._shown_points(points),
            point_labels=None if inside is None else torch.as_tensor(inside, device=self.device),
        )
        if self.shown != size:
            found = F.interpolate(found, size, mode="bilinear", align_corners=False)
        out = np.full((len(given), *self.planes.size), BEYOND, np.float32)
        out[:, y0:y1, x0:x1] = found[:, 0].float().cpu().numpy()
        return out, scores.float().cpu().numpy()

    def _shown_boxes(self, boxes: Array) -> Tensor:
        """Boxes whose corners are centres of pixels as the model takes them: from outer edge to outer edge."""
        x0, y0, _, _ = self.crop
        edges = torch.from_numpy(np.array(boxes, np.float32, order="C")) + torch.tensor([0, 0, 1, 1])
        return ((edges - torch.tensor([x0, y0, x0, y0])) * self._scale.repeat(2)).to(self.device)

    def _shown_points(self, points: Array) -> Tensor:
        """Centres of pixels as centres of pixels of what is shown; (centre + 1/2) scales, as pixels are areas."""
        x0, y0, _, _ = self.crop
        pixels = torch.from_numpy(np.array(points, np.float32, order="C")) - torch.tensor([x0, y0])
        return ((pixels + 0.5) * self._scale - 0.5).to(self.device)

    @property
    def _scale(self) -> Tensor:
        """Pixels of what is shown to a pixel of the slice, along x and y."""
        x0, y0, x1, y1 = self.crop
        return torch.tensor([self.shown[1] / (x1 - x0), self.shown[0] / (y1 - y0)])
