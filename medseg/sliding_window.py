"""Sliding-window inference: a network that sees patches, applied to a whole image within bounded memory.

Windows overlap and are averaged with Gaussian weights. Only a ring of planes about one patch thick is accumulated at a
time: once no later window touches a plane it is handed out as part of a :class:`Slab` and its memory is used again, so
the logits of a whole scan (1.6 GB for 6 classes on 512 x 512 x 256 voxels) never exist at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import NamedTuple

import torch
import torch.nn.functional as F

__all__ = [
    "Slab",
    "gaussian_weights",
    "labels_of",
    "predict_labels",
    "predict_probabilities",
    "probabilities_of",
    "sliding_logits_slabs",
    "window_starts",
]

Network = Callable[[torch.Tensor], torch.Tensor]
Progress = Callable[[int, int], None]
CACHE_VOXELS = 1 << 15  # of one class: float32 logits of some classes at once in 1 to 2 MB


class Slab(NamedTuple):
    """A finished part of the logits: planes ``start <= index < stop`` along one axis of the image.

    ``logits`` has shape (K, ...) with ``stop - start`` entries along spatial axis ``axis``, the whole image along the
    others. It is a view of memory that is used again: copy what must outlive the next step of the iterator.
    """

    axis: int
    start: int
    stop: int
    logits: torch.Tensor


def window_starts(size: int, patch: int, overlap: float) -> list[int]:
    """First indices of the windows along one axis: as few as needed, evenly spread, the last one ends at ``size``.

    Parameters
    ----------
    size, patch : int
        Voxels of the image and of a window; one window suffices where ``size <= patch``.
    overlap : float
        Least part of a window that its neighbour covers too, 0 <= overlap < 1.

    Examples
    --------
    >>> window_starts(10, 4, 0.5)
    [0, 2, 4, 6]
    """
    if min(size, patch) < 1:
        raise ValueError(f"size and patch must be positive, got {size} and {patch}")
    if not 0 <= overlap < 1:
        raise ValueError(f"overlap must be at least 0 and less than 1, got {overlap}")
    if size <= patch:
        return [0]
    step = max(1, math.floor(patch * (1 - overlap) + 1e-9))
    gaps = math.ceil((size - patch) / step)
    return [round(n * (size - patch) / gaps) for n in range(gaps + 1)]


def _gaussian(size: int, sigma_scale: float = 0.125, device: torch.device | str = "cpu") -> torch.Tensor:
    """(size,) float64 weights, 1 at the centre, bounded away from zero."""
    x = torch.arange(size, dtype=torch.float64, device=device) - (size - 1) / 2
    return torch.exp(-0.5 * (x / (sigma_scale * size)) ** 2).clamp_min(1e-6)


def gaussian_weights(
    patch: Sequence[int], sigma_scale: float = 0.125, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Weights of a window's voxels: a product of one Gaussian per axis, strictly positive.

    Parameters
    ----------
    patch : sequence of int
        Voxels of the window along each axis.
    sigma_scale : float
        Standard deviation in parts of the window's size; 0.125 is common (nnU-Net, MONAI).
    device : torch.device or str
        Where to put the result.

    Returns
    -------
    (*patch) tensor of float64

    References
    ----------
    Isensee et al., nnU-Net, Nature Methods 18 (2021), https://doi.org/10.1038/s41592-020-01008-z
    """
    weights = torch.ones((), dtype=torch.float64, device=device)
    for size in patch:
        weights = weights[..., None] * _gaussian(size, sigma_scale, device)
    return weights


def _weight_sums(starts: Sequence[int], weight: torch.Tensor) -> torch.Tensor:
    """Sum of the windows' weights at each voxel of one axis."""
    total = torch.zeros(max(starts) + len(weight), dtype=weight.dtype, device=weight.device)
    for start in starts:
        total[start : start + len(weight)] += weight
    return total


class _Ring:
    """Accumulates weighted windows in ``depth`` planes, (K, depth, H, W): plane i of the image is plane i % depth."""

    def __init__(self, classes: int, depth: int, plane: Sequence[int], weight: torch.Tensor) -> None:
        self.sums = torch.zeros((classes, depth, *plane), device=weight.device)
        self.depth = depth
        self.weight = weight.float()

    def pieces(self, start: int, stop: int) -> Iterator[tuple[int, int, torch.Tensor]]:
        """The planes start..stop of the image as at most two runs (start, stop, view)."""
        while start < stop:
            first = start % self.depth
            end = min(stop, start + self.depth - first)
            yield start, end, self.sums[:, first : first + end - start]
            start = end

    def add(self, logits: torch.Tensor, start: tuple[int, int, int]) -> None:
        """Add the weighted logits (K, *patch) of the window at ``start``."""
        depth, height, width = logits.shape[1:]
        for a, b, planes in self.pieces(start[0], start[0] + depth):
            here = slice(a - start[0], b - start[0])
            target = planes[:, :, start[1] : start[1] + height, start[2] : start[2] + width]
            target.addcmul_(logits[:, here].to(target.dtype), self.weight[here])


def _check(image: torch.Tensor, patch: Sequence[int], batch: int) -> None:
    if image.ndim != 4:
        raise ValueError(f"image must have shape (C, I, J, K), got {tuple(image.shape)}")
    if len(patch) not in (2, 3) or min(patch) < 1:
        raise ValueError(f"patch must be two or three positive integers, got {tuple(patch)}")
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")


def sliding_logits_slabs(
    network: Network,
    image: torch.Tensor,
    patch: Sequence[int],
    *,
    overlap: float = 0.5,
    batch: int = 1,
    device: torch.device | str | None = None,
    autocast: torch.dtype | None = None,
    progress: Progress | None = None,
    normalised: bool = True,
) -> Iterator[Slab]:
    """Logits of a whole image from overlapping windows, part by part.

    Parameters
    ----------
    network : callable
        Maps (B, C, *patch) to logits (B, K, *patch); an ``nn.Module`` in eval mode, on ``device``.
    image : (C, I, J, K) tensor
        The preprocessed image, on any device; smaller than the patch its border is repeated on both sides.
    patch : (P0, P1, P2) or (P0, P1)
        Size of a window. Two numbers mean a 2D network, which sees the slices along the third axis.
    overlap : float
        Least part of a window that its neighbour covers too.
    batch : int
        Windows per call of the network.
    device : torch.device or str, optional
        Where the network runs and the logits are accumulated; by default where the image is.
    autocast : torch.dtype, optional
        Run the network under autocast to this type; sums are float32 in any case.
    progress : callable, optional
        Called as ``progress(windows_done, windows)``.
    normalised : bool
        Divide by the sum of the weights. Without it each voxel's logits carry one positive factor, which neither their
        order nor their sign depends on.

    Yields
    ------
    Slab
        In order, without gap or overlap, along axis 0 for 3D and along axis 2 for 2D patches: float32 logits, averaged
        with Gaussian weights (:func:`gaussian_weights`).

    Raises
    ------
    ValueError
        If the image is not (C, I, J, K), or the network returns another size than it was given.

    Notes
    -----
    Time grows with the number of windows, about ``(1 - overlap) ** -len(patch)`` times the voxels; memory beyond the
    image is ``4 K P0`` bytes per voxel of a plane (2D: ``4 K batch``), and one batch of windows.
    """
    _check(image, patch, batch)
    device = torch.device(device if device is not None else image.device)
    flat = len(patch) == 2
    axis = 2 if flat else 0
    if flat:
        image, patch = image.movedim(3, 1), (1, *patch)
    shape = image.shape[1:]
    before = [max(0, p - n) // 2 for p, n in zip(patch, shape, strict=True)]
    if any(p > n for p, n in zip(patch, shape, strict=True)):
        after = [max(0, p - n) - b for p, n, b in zip(patch, shape, before, strict=True)]
        image = F.pad(
            image, [v for pair in zip(before[::-1], after[::-1], strict=True) for v in pair], mode="replicate"
        )
    inner = [slice(b, b + n) for b, n in zip(before, shape, strict=True)]
    sizes = image.shape[1:]
    starts = [window_starts(n, p, overlap) for n, p in zip(sizes, patch, strict=True)]
    weight = gaussian_weights(patch, device=device)
    # windows lie on a grid and the weights are a product over the axes, so the sum of the weights is a product as well
    sums = [_weight_sums(s, _gaussian(p, device=device)) for s, p in zip(starts, patch, strict=True)]
    windows = [(i, j, k) for i, j, k in product(*starts)]
    batches = [windows[n : n + batch] for n in range(0, len(windows), batch)]
    depth = min(sizes[0], patch[0] + max(group[-1][0] - group[0][0] for group in batches))
    buffer = torch.empty((min(batch, len(windows)), image.shape[0], *patch), dtype=image.dtype, device=device)
    ring: _Ring | None = None
    finished = 0

    def hand_out(ring: _Ring, stop: int) -> Iterator[Slab]:
        for a, b, planes in ring.pieces(finished, stop):
            first, last = max(a, inner[0].start), min(b, inner[0].stop)
            if first < last:
                part = planes[:, first - a : last - a, inner[1], inner[2]]
                if normalised:
                    factors = [1 / total[s] for total, s in zip(sums, (slice(first, last), *inner[1:]), strict=True)]
                    part.mul_((factors[0][:, None, None] * (factors[1][:, None] * factors[2])).float())
                yield Slab(axis, first - before[0], last - before[0], part.movedim(1, 3) if flat else part)
            planes.zero_()

    for number, group in enumerate(batches):
        logits = _run(network, image, group, buffer, autocast, flat)
        if ring is None:
            ring = _Ring(logits.shape[1], depth, sizes[1:], weight)
        yield from hand_out(ring, group[0][0])
        finished = group[0][0]
        for n, start in enumerate(group):
            ring.add(logits[n], start)
        del logits  # before the next call allocates as much again: memory is reused, not returned and fetched anew
        if progress is not None:
            progress(min(len(windows), (number + 1) * batch), len(windows))
    if ring is not None:
        yield from hand_out(ring, sizes[0])


def _run(
    network: Network,
    image: torch.Tensor,
    starts: Sequence[tuple[int, int, int]],
    buffer: torch.Tensor,
    autocast: torch.dtype | None,
    flat: bool,
) -> torch.Tensor:
    """Logits (B, K, *patch) of the windows at ``starts``; ``buffer`` (B or more, C, *patch) holds their voxels."""
    patch = buffer.shape[2:]
    for window, start in zip(buffer, starts, strict=False):
        window.copy_(image[(slice(None), *(slice(s, s + p) for s, p in zip(start, patch, strict=True)))])
    batch = buffer[: len(starts)]
    with torch.inference_mode(), torch.autocast(buffer.device.type, dtype=autocast, enabled=autocast is not None):
        logits = network(batch[:, :, 0] if flat else batch)
    if flat:
        logits = logits.unsqueeze(2)
    if logits.ndim != 5 or logits.shape[0] != len(starts) or logits.shape[2:] != patch:
        given, got = ((t[:, :, 0] if flat else t) for t in (batch, logits))
        raise ValueError(f"network must return logits of the size it is given, got {got.shape} for {given.shape}")
    return logits


def labels_of(logits: torch.Tensor, overlapping: bool = False) -> torch.Tensor:
    """The class of the largest of the logits (K, ...) at each voxel, the first of equals.

    Returns
    -------
    (...) tensor of uint8 (int16 for more than 255 classes); where the classes are ``overlapping``, a (K, ...) tensor of
    bool: the logit is at least 0, so the probability at least 0.5

    Raises
    ------
    ValueError
        If a logit is NaN.
    """
    if overlapping:
        _require_numbers(logits)
        return logits >= 0
    labels = torch.empty(
        logits.shape[1:], dtype=torch.uint8 if len(logits) < 256 else torch.int16, device=logits.device
    )
    _write_argmax(logits, labels)
    return labels


def _write_argmax(logits: torch.Tensor, labels: torch.Tensor) -> None:
    """Running maximum over the classes, in pieces that stay in a processor's cache.

    A class that wins so far has a greater number than all before, so the label is a running maximum too.
    """
    if labels.is_cpu and labels.numel() > CACHE_VOXELS:
        axis = next(a for a, n in enumerate(labels.shape) if n > 1)
        step = max(1, labels.shape[axis] * CACHE_VOXELS // labels.numel())
        for some, part in zip(logits.split(step, axis + 1), labels.split(step, axis), strict=True):
            _write_argmax(some, part)
        return
    best, wins = logits[0].clone(), torch.zeros_like(labels)
    labels.zero_()
    for number, one in enumerate(logits[1:], start=1):
        torch.gt(one, best, out=wins)
        torch.maximum(labels, wins.mul_(number), out=labels)
        torch.maximum(best, one, out=best)
    _require_numbers(best)


def _require_numbers(values: torch.Tensor) -> None:
    if bool(torch.isnan(values.sum())) and bool(torch.isnan(values).any()):
        raise ValueError("logits must be numbers, got NaN; look for NaN in the image, or run without half precision")


def probabilities_of(logits: torch.Tensor, overlapping: bool = False) -> torch.Tensor:
    """Probabilities (K, ...) of logits (K, ...): softmax over the classes, or a sigmoid each where they overlap."""
    return torch.sigmoid(logits) if overlapping else torch.softmax(logits, 0)


def predict_labels(
    network: Network,
    image: torch.Tensor,
    patch: Sequence[int],
    *,
    overlapping: bool = False,
    overlap: float = 0.5,
    batch: int = 1,
    device: torch.device | str | None = None,
    autocast: torch.dtype | None = None,
    progress: Progress | None = None,
) -> torch.Tensor:
    """Labels of a whole image on its own grid, decided slab by slab.

    Parameters
    ----------
    network, image, patch, overlap, batch, device, autocast, progress
        As in :func:`sliding_logits_slabs`.
    overlapping : bool
        The classes may overlap: one mask per class where its logit is at least 0 (probability 0.5).

    Returns
    -------
    (I, J, K) tensor of uint8 (int16 above 255 classes), or (K, I, J, K) of bool where ``overlapping``; on the CPU
    """
    slabs = sliding_logits_slabs(
        network,
        image,
        patch,
        overlap=overlap,
        batch=batch,
        device=device,
        autocast=autocast,
        progress=progress,
        normalised=False,
    )
    return _assemble(slabs, image.shape[1:], lambda logits: labels_of(logits, overlapping))


def predict_probabilities(
    network: Network,
    image: torch.Tensor,
    patch: Sequence[int],
    *,
    overlapping: bool = False,
    dtype: torch.dtype = torch.float32,
    overlap: float = 0.5,
    batch: int = 1,
    device: torch.device | str | None = None,
    autocast: torch.dtype | None = None,
    progress: Progress | None = None,
) -> torch.Tensor:
    """Probabilities (K, I, J, K) of ``dtype`` (float32 or float16) on the image's own grid, on the CPU.

    Parameters are those of :func:`predict_labels`; where ``overlapping``, each class has a sigmoid of its own.
    """
    slabs = sliding_logits_slabs(
        network, image, patch, overlap=overlap, batch=batch, device=device, autocast=autocast, progress=progress
    )
    return _assemble(slabs, image.shape[1:], lambda logits: probabilities_of(logits, overlapping).to(dtype))


def _assemble(
    slabs: Iterator[Slab], shape: Sequence[int], function: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """What ``function`` makes of each slab's logits, put together on the CPU."""
    whole = torch.empty(0)
    for slab in slabs:
        part = function(slab.logits)
        if slab.start == 0:
            whole = torch.empty((*part.shape[:-3], *shape), dtype=part.dtype)
        whole.narrow(slab.axis - 3, slab.start, slab.stop - slab.start).copy_(part)
    return whole
