"""Contours from prompts: boxes, points, scribbles and masks on an image, undone, redone, saved and replayed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from medseg.device import pick_device
from medseg.embeddings import EmbeddingCache
from medseg.models.sam import load_promptable
from medseg.planes import Planes
from medseg.prompt_log import Prompt, PromptLog, checksum, packed, unpacked
from medseg.prompt_places import Units, voxel_box, voxel_points
from medseg.prompt_slices import contour_object
from medseg.propagation import Propagation
from medseg.slice_model import Promptable, SliceModel
from medseg.volume import LabelMap, Structure, Volume
from medseg.windows import choose_window

__all__ = ["PromptSession"]

Array = NDArray[Any]
Progress = Callable[[int, int], None]
CACHE_BYTES = 2 << 30  # a thousand slices
POINTS_HELP = "draw a box, or use a model that takes points (sam-vit-b with a checkpoint)"


class PromptSession:
    """Objects on one image, each contoured from its own prompts.

    Parameters
    ----------
    image : Volume
        CT, MR or a picture, of any orientation and spacing; of one slice (K = 1) or many.
    model : str or Promptable
        A name or run that :func:`medseg.models.sam.load_promptable` takes, or a model that is loaded.
    checkpoint : path, optional
        Weights of the model, where it needs some.
    window : str or (low, high), optional
        What the model sees; see :func:`medseg.windows.choose_window`. By default the soft-tissue window for CT,
        percentiles for the rest.
    axis : int or str, optional
        Index axis that slices are across, or "axial", "coronal", "sagittal"; by default as the volume was scanned. A box
        that is flat along another axis puts its object on the slices of that one.
    cache : path or EmbeddingCache, optional
        Where embeddings of slices are kept; by default in memory.
    device : str
        "auto", "cpu" or "cuda".
    propagation : Propagation, optional
        How an object goes on from slice to slice.

    Raises
    ------
    ValueError
        If the image has voxels that are not finite, or window, axis, model or cache are not as above.

    Notes
    -----
    Objects do not influence each other, so they may be edited in any order; each is a function of its own prompts, which
    are all in the log. A slice is encoded when a prompt first needs it (2.4 s on one core with LiteMedSAM), and a prompt
    costs 0.1 s then. Memory: the image, a few slices, and the cache.

    A box on one slice, a scribble or a mask spreads through the volume from there (``spread=False``: it stays on its
    slice); a box with an extent along all three axes bounds its object. Further prompts of an object on other slices are
    keys between which it is followed from both sides.

    Scribbles work with every model: within reach they add or take away pixels of the same tissue
    (:func:`medseg.scribbles.corrected`). On a slice where the object has no box and no mask yet, the box around the
    scribbles inside is the prompt, so draw the first one across the whole width and height of the structure.

    Examples
    --------
    >>> session = PromptSession(medseg.read("ct.nii.gz"))  # doctest: +SKIP
    >>> session.box("liver", (20, 30, 80, 90, 75, 80))  # doctest: +SKIP
    >>> session.scribble("liver", [(60, 50, 80), (61, 51, 80)], inside=False)  # doctest: +SKIP
    >>> medseg.write(session.labels(), "liver.nii.gz")  # doctest: +SKIP
    """

    def __init__(
        self,
        image: Volume,
        model: str | Promptable = "lite-medsam",
        *,
        checkpoint: str | Path | None = None,
        window: str | tuple[float, float] | None = None,
        axis: int | str | None = None,
        cache: str | Path | EmbeddingCache | None = None,
        device: str = "auto",
        propagation: Propagation | None = None,
    ) -> None:
        self.image, self.window = image, choose_window(image, window)
        self.planes = Planes.of(image.geometry, axis)
        self.cache = cache if isinstance(cache, EmbeddingCache) else EmbeddingCache(cache, CACHE_BYTES)
        self.device = pick_device(device)
        loaded: Any = load_promptable(model, checkpoint) if isinstance(model, str) else model
        self.model: Promptable = loaded
        if isinstance(loaded, torch.nn.Module):
            loaded.to(self.device)
        self.propagation = propagation or Propagation()
        self._done: list[Prompt] = []
        self._undone: list[Prompt] = []
        self._slices: dict[int, SliceModel] = {}
        self._masks: dict[tuple[Prompt, ...], Array] = {}

    # -- prompts ------------------------------------------------------------------------------------------------------

    def box(self, name: str, box: ArrayLike, *, units: Units = "voxel", spread: bool = True) -> None:
        """Draw a box around an object.

        Parameters
        ----------
        name : str
            The object; made if there is none of that name.
        box : (6,) i0, j0, k0, i1, j1, k1
            Two opposite corners: centres of voxels, both inside, or RAS+ mm with ``units="mm"``. Flat along one axis, it
            is on a slice, and replaces an earlier one there. On an image of one slice four numbers do.
        units : "voxel" or "mm"
            Of the box.
        spread : bool
            Whether the object goes on into the neighbouring slices of a flat box.

        Raises
        ------
        ValueError
            If the box is inverted, empty, outside of the image or, for an object on slices, flat along another axis.
        """
        corners = voxel_box(self.image.geometry, box, units)
        self._require("box", "box")
        places = (tuple(corners[:3].tolist()), tuple(corners[3:].tolist()))
        self._add(Prompt("box", _name(name), places, spread=spread))

    def point(
        self, name: str, point: ArrayLike, *, inside: bool = True, units: Units = "voxel", spread: bool = True
    ) -> None:
        """Set a point (i, j, k; or RAS+ mm) inside an object, or outside of it.

        Raises
        ------
        ValueError
            If the model was trained with boxes only, or the point lies outside of the image.
        """
        at = voxel_points(self.image.geometry, np.asarray(point, np.float64)[None], units)
        self._require("point", "point")
        self._add(Prompt("point", _name(name), (tuple(at[0].tolist()),), inside, spread))

    def scribble(
        self, name: str, points: ArrayLike, *, inside: bool = True, units: Units = "voxel", spread: bool = True
    ) -> None:
        """Draw a line through points (N, 3) of one slice, in an object or in what is no part of it.

        Raises
        ------
        ValueError
            If the points lie outside of the image or on several slices.
        """
        at = voxel_points(self.image.geometry, points, units, "scribble")
        axis = self._axis(name)
        if np.ptp(np.round(at[:, axis])) > 0:
            raise ValueError(
                f"scribble must be on one slice across axis {axis}, got {sorted(set(np.round(at[:, axis])))}"
            )
        self._add(Prompt("scribble", _name(name), tuple(tuple(p) for p in at.tolist()), inside, spread))

    def mask(self, name: str, mask: ArrayLike, *, spread: bool = False) -> None:
        """Give a rough mask (I, J, K) of an object: on each slice the model draws what it shows.

        Raises
        ------
        ValueError
            If it is empty or not on the grid of the image.
        """
        voxels = np.asarray(mask)
        if voxels.shape != self.image.geometry.shape or voxels.dtype != bool:
            raise ValueError(
                f"mask must be bool with the shape {self.image.geometry.shape} of the image, got {voxels.dtype} "
                f"{voxels.shape}"
            )
        self._add(Prompt("mask", _name(name), spread=spread, packed=packed(voxels)))

    def remove(self, name: str) -> None:
        """Remove an object and its prompts; :meth:`undo` brings them back."""
        self._known(name)
        self._add(Prompt("remove", name))

    def undo(self) -> bool:
        """Take back the last prompt of any object; False if there is none."""
        if self._done:
            self._undone.append(self._done.pop())
            return True
        return False

    def redo(self) -> bool:
        """Do again what was undone last; False if there is nothing, or a prompt was given since."""
        if self._undone:
            self._done.append(self._undone.pop())
            return True
        return False

    # -- results ------------------------------------------------------------------------------------------------------

    @property
    def objects(self) -> tuple[str, ...]:
        """Names of the objects, in the order in which they were begun."""
        return tuple(name for name in dict.fromkeys(p.object for p in self._done) if self._prompts(name))

    def contour(self, name: str, progress: Progress | None = None) -> Array:
        """(I, J, K) bool mask of one object.

        Parameters
        ----------
        name : str
            The object.
        progress : callable, optional
            Called with the number of slices done so far, and how many there may be.
        """
        prompts = self._known(name)
        if prompts not in self._masks:
            shape = self.image.geometry.shape
            masks = {n: unpacked(p.packed, shape) for n, p in enumerate(prompts) if p.kind == "mask"}
            found = contour_object(self._model(self._axis(name)), prompts, masks, self.propagation, progress)
            self._masks[prompts] = np.packbits(found)
        bits = np.unpackbits(self._masks[prompts], count=int(np.prod(self.image.geometry.shape)))
        return bits.view(bool).reshape(self.image.geometry.shape)

    def labels(self, progress: Progress | None = None) -> LabelMap:
        """All objects on the grid of the image, as labels 1, 2, ...; as layers where two share a voxel."""
        masks = [self.contour(name, progress) for name in self.objects]
        structures = tuple(Structure(n, name) for n, name in enumerate(self.objects, start=1))
        geometry, meta = self.image.geometry, {k: v for k, v in self.image.meta.items() if k != "quirks"}
        labels, overlap = np.zeros(geometry.shape, np.uint16 if len(masks) > 255 else np.uint8), False
        for number, mask in enumerate(masks, start=1):
            overlap |= bool(labels[mask].any())
            labels[mask] = number
        return LabelMap(np.stack(masks) if overlap else labels, geometry, structures, meta)

    @property
    def log(self) -> PromptLog:
        """Every prompt that holds, with what else decides the masks."""
        g = self.image.geometry
        affine = tuple(tuple(float(v) for v in row) for row in g.affine)
        return PromptLog(
            tuple(self._done), self.model.name, self.model.fingerprint, self.window.name, self.planes.axis, g.shape, affine,
            checksum(self.image),
        )  # fmt: skip

    def replay(self, log: PromptLog | str | Path) -> None:
        """Give all prompts of a log again, in its order.

        Raises
        ------
        GeometryError
            If the image has another grid than that of the log.
        ValueError
            If the file is not a log, or the session has another model, weights, window or axis.
        """
        read = log if isinstance(log, PromptLog) else PromptLog.load(log)
        read.require_image(self.image)
        mine = self.log
        for what in ("model", "fingerprint", "window", "axis"):
            if getattr(read, what) != getattr(mine, what):
                theirs, ours = getattr(read, what), getattr(mine, what)
                raise ValueError(f"{what} must be that of the log, {theirs!r}, got {ours!r}; masks would differ")
        for prompt in read.prompts:
            self._add(prompt)

    # -- parts --------------------------------------------------------------------------------------------------------

    def _add(self, prompt: Prompt) -> None:
        self._axis(prompt.object, (*self._prompts(prompt.object), prompt))
        self._done.append(prompt)
        self._undone.clear()

    def _require(self, kind: Literal["box", "point"], what: str) -> None:
        if kind not in self.model.prompts:
            takes = ", ".join(sorted(self.model.prompts))
            help = f"; {POINTS_HELP}" if kind == "point" else ""
            raise ValueError(
                f"prompt must be one that {self.model.name} was trained with ({takes}), got a {what}{help}"
            )

    def _prompts(self, name: str) -> tuple[Prompt, ...]:
        """What holds for an object: its prompts since it was last removed."""
        own = [p for p in self._done if p.object == name]
        last = max((n for n, p in enumerate(own) if p.kind == "remove"), default=-1)
        return tuple(own[last + 1 :])

    def _known(self, name: str) -> tuple[Prompt, ...]:
        prompts = self._prompts(name)
        if not prompts:
            raise ValueError(f"object must be one of {', '.join(self.objects) or 'none yet'}, got {name!r}")
        return prompts

    def _axis(self, name: str, prompts: Sequence[Prompt] | None = None) -> int:
        """Index axis that the slices of an object are across: where its first flat box lies, else the session's."""
        flat = []
        for p in self._prompts(name) if prompts is None else prompts:
            if p.kind == "box":
                low, high = np.asarray(p.places)
                flat += [int(np.argmin(high - low))] if (high - low).min() == 0 else []
        if len(set(flat)) > 1:
            raise ValueError(f"boxes of one object must be on slices across one axis, got axes {sorted(set(flat))}")
        return flat[0] if flat else self.planes.axis

    def _model(self, axis: int) -> SliceModel:
        if axis not in self._slices:
            planes = Planes(self.image.geometry, axis)
            self._slices[axis] = SliceModel(self.image, planes, self.model, self.window, self.cache, self.device)
        return self._slices[axis]


def _name(name: str) -> str:
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"name of an object must be a text that is not empty, got {name!r}")
    return name
