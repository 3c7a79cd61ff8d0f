"""Augmentation of whole batches on the training device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from medseg.plan import Plan
from medseg.spatial import (
    Resampler,
    along_axes,
    blur_matrix,
    bspline_matrix,
    low_resolution_matrix,
    rotation_matrix,
)

__all__ = ["Augmentation"]

Range = tuple[float, float]


@dataclass(frozen=True)
class Augmentation:
    """Random changes of a batch, drawn image by image and made where they were drawn, on the device of the batch.

    Rotation, scaling and bending are one interpolation in millimetres, about the centre of the patch: linear for
    images and soft labels, nearest for others. What comes from outside the patch goes on from its edge in images and is
    ``IGNORE`` in labels. Then mirroring; then blur, low resolution, brightness, contrast, noise and gamma, on images
    alone and channel by channel; last, whole channels are left out. The chances are nnU-Net's (Isensee et al. 2021,
    doi:10.1038/s41592-020-01008-z, version 2.8), rotation and scaling gentler, which suits short trainings.

    Where the slices are more than three times as thick as the voxels are wide, patches are turned and scaled within
    the slices alone.

    Parameters
    ----------
    spacing : sequence of float
        Spacing (mm) of the patch axes.
    mirror : sequence of int
        Patch axes that may be flipped.
    swaps : sequence of (int, int)
        Indices of the structures that trade places when ``sided`` is flipped, in labels and in ``known``.
    sided : int, optional
        The patch axis that runs from left to right.
    rotation_chance, scaling_chance, elastic_chance, ... : float
        Share of the images (for intensities, of the channels) that is changed in each way.
    max_angle_deg, scale, sigma, zoom, noise, factor, gamma : float or pairs of float
        Largest angle about each axis (degrees); size on the new patch over that on the old; blur (voxels); share of
        the voxels kept per axis; spread of the noise, in units of the normalised image; factors of brightness and
        contrast; exponents.
    elastic_mm : (float, float)
        Distance of the knots of a bend, and the standard deviation of their shifts (mm).
    channel_dropout : float
        Chance that an image loses some of its channels: they are 0 then, as a missing channel is. One always stays.
    """

    spacing: tuple[float, ...]
    mirror: tuple[int, ...] = ()
    swaps: tuple[tuple[int, int], ...] = ()
    sided: int | None = None
    rotation_chance: float = 0.2
    max_angle_deg: float = 20.0
    scaling_chance: float = 0.2
    scale: Range = (0.8, 1.25)
    elastic_chance: float = 0.0
    elastic_mm: Range = (32.0, 4.0)
    blur_chance: float = 0.1
    sigma: Range = (0.5, 1.0)
    low_resolution_chance: float = 0.125
    zoom: Range = (0.5, 1.0)
    brightness_chance: float = 0.15
    contrast_chance: float = 0.15
    factor: Range = (0.75, 1.25)
    noise_chance: float = 0.1
    noise: Range = (0.0, 0.1)
    gamma_chance: float = 0.37
    gamma: Range = (0.7, 1.5)
    inverted_share: float = 0.25  # of the gamma curves: on the negative
    channel_dropout: float = 0.0

    @classmethod
    def of(cls, plan: Plan, channel_dropout: float = 0.0) -> Self:
        """What a plan allows: its spacing, its mirrored axes, and the swaps of its left and right structures."""
        numbers = [s.number for s in plan.structures]
        sided = next((a for a, letter in enumerate(plan.orientation or "") if letter in "LR"), None)
        return cls(
            tuple(s or 1.0 for s in plan.spacing[: plan.dims]),
            plan.mirror,
            tuple((numbers.index(a), numbers.index(b)) for a, b in plan.swaps),
            sided,
            channel_dropout=channel_dropout,
        )

    def __call__(
        self, images: Tensor, labels: Tensor, known: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Augment a batch; the result is a function of the generator alone, and the arguments stay as they are.

        Parameters
        ----------
        images : (B, C, *S) float tensor
        labels : (B, *S) tensor of class indices, or (B, S, *S) tensor of layers, hard (integers) or soft (float)
        known : (B, S) bool tensor
        generator : torch.Generator
            On the CPU; noise is drawn on the device of the images, seeded by it.
        """
        images, labels, known = images.float(), labels.clone(), known.clone()
        images = images.clone(memory_format=torch.contiguous_format)
        noise = torch.Generator(images.device).manual_seed(int(torch.randint(2**62, (), generator=generator)))
        for n in range(len(images)):
            self._move(images[n], labels[n], generator)
            self._flip(images[n], labels[n], known[n], generator)
            kept = self._kept(images[n], generator)
            chances = torch.rand(len(images[n]), 13, generator=generator).tolist()
            for channel, keep, drawn in zip(images[n], kept, chances, strict=True):
                if keep:
                    self._change(channel, drawn, noise)
                else:
                    channel.zero_()
        return images, labels, known

    # -- space ----------------------------------------------------------------------------------------------------

    @property
    def thick(self) -> int | None:
        """The axis across thick slices, if there are any."""
        thick = len(self.spacing) == 3 and max(self.spacing) > 3 * sorted(self.spacing)[1]
        return int(np.argmax(self.spacing)) if thick else None

    def _move(self, image: Tensor, label: Tensor, generator: torch.Generator) -> None:
        dims = image.ndim - 1
        turn, resize, bend, zoom, *angles = torch.rand(7, generator=generator).tolist()
        matrix = torch.eye(dims)
        if turn < self.rotation_chance:
            angles = [math.radians(self.max_angle_deg) * (2 * a - 1) for a in angles]
            matrix = rotation_matrix(angles, dims, self.thick)
        if resize < self.scaling_chance:
            low, high = (math.log(s) for s in self.scale)
            scales = torch.full((dims,), math.exp(low + (high - low) * zoom))
            if self.thick is not None:
                scales[self.thick] = 1.0
            matrix = matrix / scales
        shifts = self._bend(image.shape[1:], generator) if bend < self.elastic_chance else None
        if shifts is None and torch.equal(matrix, torch.eye(dims)):
            return
        spacing = torch.tensor(self.spacing)
        matrix = matrix * spacing / spacing[:, None]  # from millimetres to voxels
        shifts = None if shifts is None else shifts.to(image.device)
        resampler = Resampler(matrix, image.shape[1:], shifts, image.device)
        for channel in image:
            channel.copy_(resampler.linear(channel))
        label.copy_(resampler.labels(label))

    def _bend(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        """Smooth random shifts (D, *shape) in voxels; none across thick slices."""
        knots, std = self.elastic_mm
        matrices = [bspline_matrix(n, max(1.0, knots / s)) for n, s in zip(shape, self.spacing, strict=True)]
        shifts = torch.randn(len(shape), *[m.shape[1] for m in matrices], generator=generator)
        shifts *= torch.tensor([std / s for s in self.spacing]).view(-1, *[1] * len(shape))
        if self.thick is not None:
            shifts[self.thick] = 0
        return torch.stack([along_axes(s, matrices) for s in shifts])

    def _flip(self, image: Tensor, label: Tensor, known: Tensor, generator: torch.Generator) -> None:
        drawn = torch.rand(len(self.mirror), generator=generator).tolist()
        flipped = [axis for axis, chance in zip(self.mirror, drawn, strict=True) if chance < 0.5]
        if not flipped:
            return
        axes = [axis - (image.ndim - 1) for axis in flipped]
        image.copy_(image.flip(axes))
        mirrored = label.flip(axes)
        if self.sided in flipped and self.swaps:
            order = list(range(len(known)))
            for a, b in self.swaps:
                order[a], order[b] = b, a
            known.copy_(known[order])
            if label.ndim == image.ndim:
                mirrored = mirrored[order]
            else:  # classes are structures + 1; 0, the background, and IGNORE stay
                table = torch.tensor([-1, 0, *(o + 1 for o in order)], dtype=label.dtype, device=label.device)
                mirrored = table.index_select(0, mirrored.reshape(-1) + 1).view(label.shape)
        label.copy_(mirrored)

    # -- intensities ----------------------------------------------------------------------------------------------

    def _kept(self, image: Tensor, generator: torch.Generator) -> list[bool]:
        """Which channels stay: missing ones (all 0) never come back, dropped ones go, one of those present stays."""
        if len(image) == 1:
            return [True]
        drop, *chances = torch.rand(1 + len(image), generator=generator).tolist()
        present = [bool(channel.any()) for channel in image]
        if drop >= self.channel_dropout or sum(present) < 2:
            return present
        best = max((c for c, there in enumerate(present) if there), key=lambda c: chances[c])
        return [there and (c == best or chances[c] >= 0.5) for c, there in enumerate(present)]

    def _change(self, image: Tensor, drawn: Sequence[float], noise: torch.Generator) -> None:
        """Change the intensities of one channel (*S) in place; ``drawn`` are 13 numbers from 0 to 1."""
        blur, sigma, low, zoom, bright, brightness, contrasted, contrast, noisy, std, curved, gamma, inverted = drawn
        blur, low = blur < self.blur_chance, low < self.low_resolution_chance
        if blur or low:
            matrices: list[Tensor | None] = []
            for axis, n in enumerate(image.shape):
                matrix = torch.eye(n)
                if blur:
                    matrix = blur_matrix(n, _between(self.sigma, sigma))
                if low:
                    matrix = low_resolution_matrix(n, _between(self.zoom, zoom)) @ matrix
                matrices.append(None if axis == self.thick else matrix.to(image.device))
            image.copy_(along_axes(image, matrices))
        if bright < self.brightness_chance:
            image.mul_(_around_1(self.factor, brightness))
        if contrasted < self.contrast_chance:
            least, most = image.aminmax()
            factor, mean = _around_1(self.factor, contrast), image.mean()
            image.mul_(factor).add_(mean * (1 - factor)).clamp_(least, most)
        if noisy < self.noise_chance:
            values = torch.randn(image.shape, generator=noise, device=image.device)
            image.add_(values, alpha=_between(self.noise, std))
        if curved < self.gamma_chance:
            _curve(image, _around_1(self.gamma, gamma), inverted < self.inverted_share)


def _between(limits: Range, chance: float) -> float:
    return limits[0] + (limits[1] - limits[0]) * chance


def _around_1(limits: Range, chance: float) -> float:
    """A factor within limits around 1, below and above it equally often."""
    return _between((limits[0], 1.0), 2 * chance) if chance < 0.5 else _between((1.0, limits[1]), 2 * chance - 1)


def _curve(image: Tensor, gamma: float, inverted: bool) -> None:
    """A gamma curve over the range of one channel, in place; mean and spread are kept; on the negative if inverted."""
    low, high = image.aminmax()
    mean = image.mean()
    spread = torch.linalg.vector_norm(image.sub_(mean))
    span = (high - low).clamp(min=1e-7)
    if inverted:
        image.neg_().add_(high - mean)
    else:
        image.add_(mean - low)
    image.div_(span).clamp_(min=0).log_().mul_(gamma).exp_()  # two and a half times as fast as a power
    image.sub_(image.mean())
    spread = spread / torch.linalg.vector_norm(image).clamp(min=1e-7)
    image.mul_(-spread if inverted else spread).add_(mean)
