"""Prediction: a run and an image in, a label map on the image's own grid out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medseg.crf import CRFParameters, refine
from medseg.crf_choice import crf_of_run
from medseg.decision import decide, probabilities_on
from medseg.device import has_bf16, pick_device
from medseg.ensemble import Members, Mirrored, member_runs
from medseg.io import read, read_channels
from medseg.plan import Plan
from medseg.postprocessing import Postprocessing
from medseg.run import Run
from medseg.sliding_window import Slab, sliding_logits_slabs
from medseg.transforms import grey_as_color, preprocessing
from medseg.volume import Geometry, LabelMap, Volume

__all__ = ["Predictor", "predict"]

log = logging.getLogger("medseg")
Image = str | PathLike[str] | Volume | Sequence[str | PathLike[str]]
Progress = Callable[[int, int], None]
Result = TypeVar("Result")
SURE = 10.0  # logit of the background, and minus that of the structures, where there is nothing to see
CONTRAST = 0.05  # standard deviations above the lowest value from which there is something to see
AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16, "32-true": None}
MEMORY_WORDS = ("out of memory", "can't allocate memory", "ALLOC_FAILED", "not enough memory")
SHARED = {"dims", "channels", "structures", "orientation", "spacing", "patch", "overlapping"}  # by averaged networks


@dataclass(frozen=True)
class Predictor:
    """A loaded model, or ensemble of models, that predicts image after image.

    Parameters
    ----------
    plan : Plan
        How images are preprocessed and what the channels of the logits mean.
    network : nn.Module
        In eval mode, on ``device``.
    device : torch.device
    precision : str
        "32-true", "bf16-mixed" or "16-mixed".
    postprocessing : Postprocessing, optional
        Filters of components that :meth:`predict` applies.
    others : tuple of Predictor
        Members of an ensemble that preprocess images in another way; probabilities are averaged on the image's grid.
    """

    plan: Plan
    network: nn.Module
    device: torch.device
    precision: str = "32-true"
    postprocessing: Postprocessing | None = None
    others: tuple[Predictor, ...] = ()

    @classmethod
    def load(
        cls, run: Run | str | PathLike[str], device: str = "auto", *, raw: bool = False, mirror: bool = False
    ) -> Predictor:
        """Load the best weights of a run, or of all folds of a cross-validation.

        Parameters
        ----------
        run : Run or path
            A run folder, or a folder of runs ``fold0``, ``fold1`` ..., whose probabilities are averaged
            (:class:`medseg.ensemble.Members`).
        device : str
            "auto", "cpu", "cuda" or "cuda:n".
        raw : bool
            Leave out what validation chose: component filters and temperature.
        mirror : bool
            Average with the prediction on the image mirrored as in training: twice the time.

        Raises
        ------
        FileNotFoundError, ValueError
            If the folder is not a finished run of this version, the device is not there, or training mirrored nothing.
        """
        folder = run.path if isinstance(run, Run) else Path(run)
        where = pick_device(device)
        chosen = None if raw else Postprocessing.of(folder)
        if chosen is not None:
            log.info("postprocessing %s", chosen.reason)
        groups: dict[str, list[Run]] = {}
        for member in member_runs(folder):
            groups.setdefault(member.plan.model_dump_json(include=SHARED), []).append(member)
        precision = _precision([run for group in groups.values() for run in group], where)
        parts = [cls._of(group, where, precision, chosen, mirror) for group in groups.values()]
        for part in parts[1:]:
            if (part.plan.structures, part.plan.overlapping) != (parts[0].plan.structures, parts[0].plan.overlapping):
                raise ValueError(f"folds must learn the same structures to be averaged, got others in {folder}")
        return replace(parts[0], others=tuple(parts[1:]))

    @classmethod
    def _of(
        cls, runs: Sequence[Run], device: torch.device, precision: str, chosen: Postprocessing | None, mirror: bool
    ) -> Predictor:
        """The mean of runs whose plans agree in all that an image goes through."""
        plan = runs[0].plan
        memory = _memory_format(plan)
        networks = [run.network(device).to(memory_format=memory) for run in runs]  # type: ignore[call-overload]
        if mirror:
            networks += [_mirrored(network, plan) for network in networks]
        members = Members(networks, plan.overlapping, chosen.temperature if chosen else 1.0)
        return cls(plan, members.eval(), device, precision, chosen)

    def predict(
        self,
        image: Volume,
        *,
        channels: Sequence[str] | None = None,
        probabilities: bool = False,
        crf: CRFParameters | None = None,
        progress: Progress | None = None,
    ) -> tuple[LabelMap, Volume | LabelMap | None]:
        """Label map of an image on its own grid and, where asked for, the probabilities that it comes from.

        Parameters
        ----------
        image : Volume (C, I, J, K)
        channels : sequence of C str, optional
            Names of the plan's channels that the image holds, in its order; the others are missing and count as the
            mean. All, in the plan's order, by default.
        probabilities : bool
            Whether to return them.
        crf : CRFParameters, optional
            Refine the probabilities before the decision.
        progress : callable, optional
            Called with the number of windows done and of all windows.

        Returns
        -------
        LabelMap
            Exclusive labels, or bool layers where the plan's structures overlap; without what the filters chosen on
            validation leave out.
        Volume (K, I, J, K), LabelMap (S, I, J, K) or None
            Probabilities: channel 0 is the background; where structures overlap, layers of a label map.

        Raises
        ------
        ValueError
            If the channels are not those of the plan.
        MemoryError
            If the memory of the device does not suffice, even for one window at a time.

        Notes
        -----
        Without probabilities, CRF and ``others``, memory is that of the preprocessed image, a few patches of logits and
        the result; with them, K times the image in float32. Time grows with the voxels and the number of networks.
        """
        grid = image.geometry
        if not (probabilities or crf or self.others):
            array, planned = self._prepared(image, channels)
            labels, soft = self.from_prepared(array, planned, grid, progress), None
        else:
            soft = self._probabilities(image, channels, progress)
            if crf:
                soft = self.refined(image, soft, crf)
            labels = self.decided(soft)
        if self.postprocessing is not None:
            labels = self.postprocessing.apply(labels)
        return replace(labels, meta=image.meta), soft if probabilities else None

    def from_prepared(
        self, array: np.ndarray, planned: Geometry, native: Geometry, progress: Progress | None = None
    ) -> LabelMap:
        """Label map on the native grid of an image (C, I, J, K) that is already preprocessed on the planned grid.

        Filters of components are not applied.
        """

        def attempt(batch: int, sums: torch.device) -> Tensor:
            slabs = self._slabs(array, batch, sums, progress)
            return decide(slabs, planned, native, overlapping=self.plan.overlapping)

        return self.label_map(self._within_memory(attempt, array).numpy(), native)

    def label_map(self, classes: np.ndarray, geometry: Geometry) -> LabelMap:
        """Label map of class indices (I, J, K) with the numbers of the structures, or of bool layers (S, I, J, K)."""
        structures = self.plan.as_structures()
        if self.plan.overlapping:
            return LabelMap(classes, geometry, structures)
        numbers = np.array([0, *(s.number for s in structures)])
        return LabelMap(numbers.astype(np.min_scalar_type(int(numbers.max())))[classes], geometry, structures)

    def decided(self, soft: Volume | LabelMap) -> LabelMap:
        """Label map of probabilities: the largest, or where structures overlap each from one half."""
        array = np.asarray(soft.array)
        return self.label_map(array >= 0.5 if self.plan.overlapping else array.argmax(0), soft.geometry)

    def refined(self, image: Volume, soft: Volume | LabelMap, parameters: CRFParameters) -> Volume | LabelMap:
        """Probabilities refined by the CRF, slice by slice."""
        if isinstance(soft, LabelMap):
            return refine(image, soft, parameters=parameters, device=str(self.device))
        return refine(image, soft, parameters=parameters, device=str(self.device))

    # -- parts --------------------------------------------------------------------------------------------------------

    def _prepared(self, image: Volume, channels: Sequence[str] | None) -> tuple[np.ndarray, Geometry]:
        """The image (C, I, J, K) on the planned grid; channels that are missing are zero, as in training."""
        planned = self.plan.channels
        names = [c.name for c in planned]
        if channels is None:
            image = replace(image, array=grey_as_color(image.array, planned))
        if channels is None and image.channels != len(names):
            raise ValueError(
                f"image must have {len(names)} channels as planned, got {image.channels}; name those that are given "
                f"(--channels, of {', '.join(names)})"
            )
        given = names if channels is None else list(channels)
        if not given or len(set(given)) < len(given) or not set(given) <= set(names):
            raise ValueError(f"channels must be among {', '.join(names)}, each once, got {', '.join(given) or 'none'}")
        if len(given) != image.channels:
            raise ValueError(f"image must have the channels {', '.join(given)}, got {image.channels} channels")
        places = [names.index(name) for name in given] if channels is not None else list(range(len(names)))
        some = self.plan.model_copy(update={"channels": tuple(planned[n] for n in places)})
        data: dict[Any, Any] = preprocessing(some)({"image": image})
        array = data["image"].numpy()
        if places == list(range(len(names))):
            return array, data["geometry"]
        whole = np.zeros((len(names), *array.shape[1:]), np.float32)
        whole[places] = array
        return whole, data["geometry"]

    def _probabilities(
        self, image: Volume, channels: Sequence[str] | None, progress: Progress | None
    ) -> Volume | LabelMap:
        """Mean over all members, on the grid of the image."""
        parts = (self, *self.others)
        total: Tensor | None = None
        for part in parts:
            array, planned = part._prepared(image, channels)

            def attempt(
                batch: int, sums: torch.device, part: Predictor = part, array: Any = array, planned: Any = planned
            ) -> Tensor:
                slabs = part._slabs(array, batch, sums, progress)
                return probabilities_on(slabs, planned, image.geometry, overlapping=part.plan.overlapping)

            soft = part._within_memory(attempt, array)
            soft *= part.count / sum(p.count for p in parts)
            total = soft if total is None else total.add_(soft)
        array = total.numpy() if total is not None else np.empty(0)
        structures = self.plan.as_structures()
        if self.plan.overlapping:
            return LabelMap(array, image.geometry, structures)
        return Volume(array, image.geometry, {"structures": structures})

    @property
    def count(self) -> int:
        """Number of networks, those of ``others`` not counted."""
        return len(self.network.networks) if isinstance(self.network, Members) else 1

    def _slabs(self, array: np.ndarray, batch: int, sums: torch.device, progress: Progress | None) -> Iterator[Slab]:
        tensor = torch.from_numpy(np.array(array, dtype=np.float32))
        floor = tensor.amin((1, 2, 3)).to(self.device)
        return sliding_logits_slabs(
            partial(self._forward, floor=floor),
            tensor,
            self.plan.window(tensor.shape[1:]),
            batch=batch,
            device=sums,
            progress=progress,
        )

    def _forward(self, windows: Tensor, floor: Tensor) -> Tensor:
        """Logits of windows (B, C, *patch), on the device of the windows.

        Where images are blank around the body (the plan knows) a voxel whose surroundings are all blank is background,
        and a window of such voxels is not put to the network, which would make structures out of nothing.
        """
        back, windows = windows.device, windows.to(self.device)
        kind = AUTOCAST[self.precision]
        with torch.autocast(self.device.type, dtype=kind, enabled=kind is not None):
            if not all(c.masked for c in self.plan.channels):
                whole: Tensor = self.network(windows.to(memory_format=_memory_format(self.plan)))
                return whole.to(back)
            blank = _blank(windows, floor)
            seen = ~blank.flatten(1).all(1)
            logits = windows.new_zeros((len(windows), self.plan.outputs, *windows.shape[2:]))
            if bool(seen.any()):
                some = windows[seen].to(memory_format=_memory_format(self.plan))
                logits[seen] = self.network(some).to(logits.dtype)
        logits.masked_fill_(blank[:, None], -SURE)
        if not self.plan.overlapping:
            logits[:, 0].masked_fill_(blank, SURE)
        return logits.to(back)

    def _within_memory(
        self,
        attempt: Callable[[int, torch.device], Result],
        array: np.ndarray,
        settings: Sequence[tuple[int, torch.device]] | None = None,
    ) -> Result:
        """What ``attempt`` gives of windows per call and the device of the sums; with less where memory runs out.

        Neither changes the result beyond rounding.

        Raises
        ------
        MemoryError
            If the least setting does not fit either.
        """
        if settings is None:
            batch = 1 if self.plan.dims == 3 else min(8, array.shape[3])
            settings = [(n, self.device) for n in dict.fromkeys((batch, 1))]
            settings += [(1, torch.device("cpu"))] * (self.device.type != "cpu")
        (windows, sums), *rest = settings
        try:
            return attempt(windows, sums)
        except (RuntimeError, MemoryError) as problem:
            if not isinstance(problem, MemoryError) and not any(w in str(problem) for w in MEMORY_WORDS):
                raise
            if not rest:
                raise MemoryError(self._memory_message(array)) from problem
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        how = "" if rest[0][1] == self.device else ", logits added up on the CPU"
        log.warning(
            "out of memory on %s with %d windows at a time; again with %d%s", self.device, windows, rest[0][0], how
        )
        return self._within_memory(attempt, array, rest)

    def _memory_message(self, array: np.ndarray) -> str:
        by = " x "
        window, shape = by.join(map(str, self.plan.patch)), by.join(map(str, array.shape[1:]))
        remedy = "crop the image, leave out probabilities and CRF, or use a machine with more memory"
        if self.device.type != "cpu":
            remedy = f"use --device cpu, free the memory of {self.device}, or train with a smaller patch"
        return (
            f"prediction must fit into the memory of {self.device}, got an image of {shape} voxels on the planned grid, "
            f"{self.plan.outputs} classes and one window of {window} at a time, which does not; {remedy}"
        )


def _precision(runs: Sequence[Run], device: torch.device) -> str:
    """On a GPU its half precision; on a CPU bf16 where it has that and all runs were trained with mixed precision."""
    if device.type == "cuda":
        return "bf16-mixed" if has_bf16(device) else "16-mixed"
    mixed = all(run.precision != "32-true" for run in runs)
    return "bf16-mixed" if mixed and has_bf16(device) else "32-true"


def _mirrored(network: nn.Module, plan: Plan) -> Mirrored:
    if not plan.mirror:
        raise ValueError(
            f"plan must mirror an axis in training to average mirror images, got none ({plan.reasons.get('mirror', '')}); "
            "leave out mirror"
        )
    numbers = [s.number for s in plan.structures]
    other = {a: b for pair in plan.swaps for a, b in (pair, pair[::-1])}
    order = [numbers.index(other.get(n, n)) for n in numbers]
    return Mirrored(network, plan.mirror, order if plan.overlapping else [0, *(o + 1 for o in order)])


def _memory_format(plan: Plan) -> torch.memory_format:
    return torch.channels_last if plan.dims == 2 else torch.channels_last_3d


def _blank(windows: Tensor, floor: Tensor) -> Tensor:
    """(B, *S) mask of the voxels of (B, C, *S) images that hold the lowest values (C,) of the whole image all around.

    All around is 5 voxels a side. A bright or grey area without contrast is not blank.
    """
    high = windows
    for axis in range(2, windows.ndim):
        size = [1] * (windows.ndim - 2)
        size[axis - 2] = 5
        pool = F.max_pool2d if windows.ndim == 4 else F.max_pool3d
        high = pool(high, size, 1, [n // 2 for n in size])
    return (high - floor.view(1, -1, *[1] * (windows.ndim - 2))).amax(1) < CONTRAST


def predict(
    run: Run | Predictor | str | PathLike[str],
    image: Image,
    *,
    channels: Sequence[str] | None = None,
    crf: bool | CRFParameters = False,
    device: str = "auto",
    progress: Progress | None = None,
) -> LabelMap:
    """Predict the structures of one image.

    Parameters
    ----------
    run : Run, Predictor or path
        A run folder, or that of a cross-validation, whose folds are averaged; a :class:`Predictor` saves loading it
        again for many images.
    image : path, Volume, or sequence of paths
        A file or DICOM series; several paths are the channels of one image, in the order of training.
    channels : sequence of str, optional
        Names of the channels that the image holds, in its order, where some of the plan's are missing.
    crf : bool or CRFParameters
        Refine the probabilities slice by slice before the decision: with what :func:`medseg.crf_fit.fit_crf` stored in the
        run (which may be not to), with gentle defaults where there is nothing or a Predictor is given, or with these.
    device : str
        "auto", "cpu", "cuda" or "cuda:n".
    progress : callable, optional
        Called with the number of windows done and of all windows.

    Returns
    -------
    LabelMap
        Exactly on the grid of the image; one layer per structure where they overlap.

    Raises
    ------
    FileNotFoundError, ValueError
        If the run or the image cannot be read, or the image has other channels than the plan.
    MemoryError
        If the memory of the device does not suffice.
    """
    predictor = run if isinstance(run, Predictor) else Predictor.load(run, device)
    volume = load_image(image)
    parameters = crf if isinstance(crf, CRFParameters) else None
    if crf is True:
        parameters = CRFParameters() if isinstance(run, Predictor) else crf_of_run(run)
    return predictor.predict(volume, channels=channels, crf=parameters, progress=progress)[0]


def load_image(image: Image) -> Volume:
    """A Volume of a path, a sequence of channel paths, or a Volume."""
    if isinstance(image, Volume):
        return image
    if isinstance(image, str | PathLike):
        return read(image)
    return read_channels(list(image))
