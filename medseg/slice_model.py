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
    ) -> None:
        self.image, self.planes, self.model = image, planes, model
        self.window, self.cache, self.device = window, cache, device
        self._keys: dict[int, str] = {}

    def picture(self, number: int) -> Array:
        """(3, H, W) uint8: the slice as the model sees it, before its pixels are made square."""
        return slice_picture(self.planes.take(self.image.array, number), self.window)

    def embedding(self, number: int) -> Tensor:
        """Embedding (1, 256, h, h) of a slice, float16 on the CPU."""
        made: list[Array] = []
        if number not in self._keys:
            made.append(self.picture(number))
            square = "x".join(map(str, self.planes.square_size))
            self._keys[number] = embedding_key(made[0], self.model.fingerprint, square, self.model.size)

        def make() -> Tensor:
            picture = torch.from_numpy(np.ascontiguousarray(made[0] if made else self.picture(number)))
            pixels = picture[None].to(self.device, torch.float32) / 255
            if self.planes.square_size != self.planes.size:
                pixels = F.interpolate(
                    pixels, self.planes.square_size, mode="bilinear", align_corners=False, antialias=True
                )
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
        square = self.planes.square_size
        scale = torch.tensor([s / n for s, n in zip(square[::-1], self.planes.size[::-1], strict=True)])
        found, scores = self.model.decode(
            self.embedding(number).to(self.device, torch.float32),
            torch.zeros(len(given), dtype=torch.long, device=self.device),
            square,
            boxes=None if boxes is None else self._tensor(boxes, scale.repeat(2)),
            points=None if points is None else self._tensor(points, scale),
            point_labels=None if inside is None else torch.as_tensor(inside, device=self.device),
        )
        if square != self.planes.size:
            found = F.interpolate(found, self.planes.size, mode="bilinear", align_corners=False)
        return found[:, 0].float().cpu().numpy(), scores.float().cpu().numpy()

    def _tensor(self, places: Array, scale: Tensor) -> Tensor:
        """Pixels of the slice as pixels of the square picture; (centre + 1/2) scales, as pixels are areas."""
        return ((torch.from_numpy(np.array(places, np.float32, order="C")) + 0.5) * scale - 0.5).to(self.device)
