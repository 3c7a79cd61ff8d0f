"""Augmentation of whole batches on the training device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Augmentation"]


@dataclass(frozen=True)
class Augmentation:
    """Random changes of a batch, drawn per image and applied to the whole batch on its device.

    Rotation and scaling are one interpolation (linear for images, nearest for labels) in millimetres; then mirroring;
    then noise, blur, low resolution, brightness, contrast and gamma on images alone. The values are nnU-Net's (Isensee
    et al. 2021, doi:10.1038/s41592-020-01008-z) with gentler rotation and scaling.

    Parameters
    ----------
    spacing : sequence of float
        Spacing (mm) of the patch axes.
    mirror : sequence of int
        Patch axes that may be flipped.
    swaps : sequence of (int, int)
        Pairs of classes (1 is the first structure) that trade places when ``sided`` is flipped: left and right.
    sided : int, optional
        The patch axis that runs from left to right.
    """

    spacing: tuple[float, ...]
    mirror: tuple[int, ...] = ()
    swaps: tuple[tuple[int, int], ...] = ()
    sided: int | None = None
    spatial_chance: float = 0.3
    max_angle_deg: float = 20.0
    scale: tuple[float, float] = (0.8, 1.25)

    def __call__(
        self, images: Tensor, labels: Tensor, known: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Augment images (B, C, *S), labels (B, *S) or (B, S, *S) and known (B, S); random numbers from a CPU generator."""
        images, labels = self._move(images, labels, generator)
        for axis in self.mirror:
            flip = _draw(len(images), generator) < 0.5
            if flip.any():
                images = _replaced(images, flip, images[flip].flip(axis + 2))
                labels = _replaced(labels, flip, labels[flip].flip(axis + 1))
        return self._intensity(images, generator), labels, known

    def _move(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        dims = images.ndim - 2
        chosen = _draw(len(images), generator) < self.spatial_chance
        angles = (_draw(len(images), generator, 3) * 2 - 1) * math.radians(self.max_angle_deg)
        low, high = (math.log(s) for s in self.scale)
        zoom = torch.exp(low + (high - low) * _draw(len(images), generator))
        if not chosen.any():
            return images, labels
        thick = max(self.spacing) > 3 * min(self.spacing)
        matrices = []
        for angle, factor in zip(angles[chosen].tolist(), zoom[chosen].tolist(), strict=True):
            matrices.append(_rotation(angle, dims, int(np.argmax(self.spacing)) if thick else None) / factor)
        half = torch.tensor([n * s / 2 for n, s in zip(images.shape[2:], self.spacing, strict=True)])
        theta = torch.stack(matrices) * half[None, None, :] / half[None, :, None]
        theta = torch.cat([theta.flip(1, 2), torch.zeros(len(theta), dims, 1)], 2)  # grids list the last axis first
        theta = theta.to(images.device, torch.float32)
        at = chosen.to(images.device)
        grid = F.affine_grid(theta, [len(theta), 1, *images.shape[2:]], align_corners=False)
        moved = F.grid_sample(images[at].float(), grid, "bilinear", "border", align_corners=False)
        moved_labels = F.grid_sample(labels[at][:, None].float(), grid, "nearest", "border", align_corners=False)
        return _replaced(images, at, moved), _replaced(labels, at, moved_labels[:, 0].round())

    def _intensity(self, images: Tensor, generator: torch.Generator) -> Tensor:
        count, device = len(images), images.device
        shape = (count, *[1] * (images.ndim - 1))

        def uniform(low: float, high: float, chance: float, neutral: float) -> Tensor:
            values = low + (high - low) * _draw(count, generator)
            values = torch.where(_draw(count, generator) < chance, values, torch.full_like(values, neutral))
            return values.to(device).view(shape)

        blur, low_res = uniform(0.5, 1.0, 0.2, 0.0), uniform(0.5, 1.0, 0.2, 1.0)
        images = torch.stack(
            [_blurred(x, float(s)) if s > 0 else x for x, s in zip(images, blur.flatten(), strict=True)]
        )
        images = torch.stack(
            [_low_resolution(x, float(z)) if z < 1 else x for x, z in zip(images, low_res.flatten(), strict=True)]
        )
        noise_std = uniform(0.0, 0.15, 0.15, 0.0)
        if bool((noise_std > 0).any()):
            images = images + noise_std * torch.randn(images.shape, generator=generator).to(device)
        images = images * uniform(0.75, 1.25, 0.15, 1.0)
        axes = tuple(range(2, images.ndim))
        mean = images.mean(axes, keepdim=True)
        images = (images - mean) * uniform(0.75, 1.25, 0.15, 1.0) + mean
        return _gamma(images, uniform(0.7, 1.5, 0.3, 1.0), _draw(count, generator).to(device).view(shape) < 0.25)


def _draw(count: int, generator: torch.Generator, columns: int | None = None) -> Tensor:
    return torch.rand((count,) if columns is None else (count, columns), generator=generator)


def _replaced(batch: Tensor, at: Tensor, values: Tensor) -> Tensor:
    batch = batch.clone()
    batch[at.to(batch.device)] = values.to(batch.dtype)
    return batch


def _rotation(angles: Sequence[float], dims: int, only_about: int | None) -> Tensor:
    """Rotation matrix: in the plane (2D), about all three axes, or only about the axis across thick slices."""
    matrix = torch.eye(dims)
    for about in [None] if dims == 2 else range(3):
        if about is not None and only_about is not None and about != only_about:
            continue
        a, b = (0, 1) if about is None else (x for x in range(3) if x != about)
        cos, sin = math.cos(angles[about or 0]), math.sin(angles[about or 0])
        turn = torch.eye(dims)
        turn[a, a] = turn[b, b] = cos
        turn[a, b], turn[b, a] = -sin, sin
        matrix = matrix @ turn
    return matrix


def _blurred(image: Tensor, sigma: float) -> Tensor:
    """One image (C, *S) convolved with a Gaussian of ``sigma`` voxels along every axis; borders repeat."""
    offsets = torch.arange(-3, 4, dtype=torch.float32, device=image.device)
    weights = torch.exp(-(offsets**2) / (2 * sigma**2))
    kernel = (weights / weights.sum()).tolist()
    for axis in range(1, image.ndim):
        n = image.shape[axis]
        index = torch.arange(n, device=image.device)
        image = sum(
            (
                image.index_select(axis, (index + o).clamp(0, n - 1)) * w
                for o, w in zip(range(-3, 4), kernel, strict=True)
            ),
            torch.zeros_like(image),
        )
    return image


def _low_resolution(image: Tensor, zoom: float) -> Tensor:
    """One image (C, *S) sampled on a grid ``zoom`` times as dense and brought back linearly."""
    small = [max(1, round(n * zoom)) for n in image.shape[1:]]
    coarse = F.interpolate(image[None], size=small, mode="nearest-exact")
    return F.interpolate(coarse, size=image.shape[1:], mode="bilinear" if image.ndim == 3 else "trilinear")[0]


def _gamma(images: Tensor, gamma: Tensor, inverted: Tensor) -> Tensor:
    """Gamma curves per image over its own range, mean and spread kept; on the negative where ``inverted``."""
    if bool((gamma == 1).all()):
        return images
    axes = tuple(range(2, images.ndim))
    mean, std = images.mean(axes, keepdim=True), images.std(axes, keepdim=True)
    sign = torch.where(inverted, -1.0, 1.0)
    x = images * sign
    low, high = x.amin(axes, keepdim=True), x.amax(axes, keepdim=True)
    span = (high - low).clamp(min=1e-7)
    curved = ((x - low) / span).clamp(min=0) ** gamma * span + low
    curved = curved * sign
    restored = (curved - curved.mean(axes, keepdim=True)) / curved.std(axes, keepdim=True).clamp(min=1e-7) * std + mean
    return torch.where(gamma == 1, images, restored)
