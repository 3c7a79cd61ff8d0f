"""The search for settings of the CRF on cases that the model never saw, and an honest estimate of what they gain.

Every setting of :func:`candidates`, and none at all, refines every case. The best is that of the highest mean Dice over
cases and structures. What it gains is estimated by cross-validation over patients: each patient's cases are refined with
the setting that the others would choose. The CRF is used only if the 95 % interval of that gain, by bootstrap over
patients, is above 0, that of no structure below, and the best of so many settings is not so good by luck
(:func:`medseg.crf_choice.choose`).
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.cases import Case
from medseg.crf import CRFParameters, refine
from medseg.crf_choice import LEAST_PATIENTS, CRFChoice, choose, crf_of_run
from medseg.data import load_dataset
from medseg.ensemble import Members, is_ensemble, member_runs
from medseg.inference import Predictor, load_image
from medseg.io import read
from medseg.postprocessing import Postprocessing
from medseg.probability_maps import labels_of, layers_of, overlap
from medseg.run import Run
from medseg.scoring import read_reference_of
from medseg.validation import HeldOut, held_out
from medseg.volume import LabelMap, Structure, Volume, present_labels

__all__ = [
    "CRFChoice", "Observed", "Searched", "candidates", "crf_of_run", "decided", "fit_crf", "is_run", "read_probabilities",
    "search",
]  # fmt: skip

log = logging.getLogger("medseg")
Array = NDArray[Any]
Progress = Callable[[int, int], None]
CASES = 24  # looked at
SOFT = "_probabilities"  # ends the names of files of probabilities, as predict writes them


def candidates(pixel_mm: float) -> tuple[CRFParameters, ...]:
    """The settings that are tried, gentle ones first; widths grow with the size of a pixel (mm) in the slices.

    Narrow to wide in space, strict to loose in intensity, weak to strong.
    """
    return tuple(
        CRFParameters(
            gaussian_sigma_mm=pixel_mm,
            gaussian_weight=smooth,
            bilateral_sigma_mm=wide * pixel_mm,
            bilateral_sigma_share=share,
            bilateral_weight=strength,
        )
        for (smooth, strength), wide, share in product(((1.0, 1.0), (1.0, 3.0), (3.0, 10.0)), (6.0, 20.0), (0.03, 0.08))
    )


# ---------------------------------------------------------------------------------------------------------------------
# Cases


@dataclass(frozen=True)
class Observed:
    """A case that a model predicted and that has a reference.

    Parameters
    ----------
    patient : str
        Cases of one patient are not independent.
    image : Volume (C, I, J, K)
    probabilities : Volume (K, I, J, K) or LabelMap of layers
        As :func:`medseg.refine` takes them.
    decide : callable
        From probabilities to the label map.
    references : mapping of int to (I, J, K) bool
        Mask by number of the structure, of the structures that were drawn in this case.
    """

    patient: str
    image: Volume
    probabilities: Volume | LabelMap
    decide: Callable[[Volume | LabelMap], LabelMap]
    references: Mapping[int, Array]

    def dice(self, probabilities: Volume | LabelMap, structures: Sequence[Structure]) -> list[float]:
        """Dice of each structure, NaN where it was not drawn; 1 where it is rightly not found."""
        labels = self.decide(probabilities)
        found = []
        for s in structures:
            reference = self.references.get(s.number)
            if reference is None:
                found.append(np.nan)
                continue
            mask = labels.mask(s.number)
            both = int(mask.sum()) + int(reference.sum())
            found.append(2 * int((mask & reference).sum()) / both if both else 1.0)
        return found

    def refined(self, parameters: CRFParameters, device: str) -> Volume | LabelMap:
        """The probabilities after the CRF."""
        if isinstance(self.probabilities, LabelMap):
            return refine(self.image, self.probabilities, parameters=parameters, device=device)
        return refine(self.image, self.probabilities, parameters=parameters, device=device)


@dataclass(frozen=True)
class Searched:
    """Dice (cases, 1 + settings, structures) without the CRF and with each setting; NaN where a structure was not drawn."""

    dice: Array
    patients: tuple[str, ...]
    settings: tuple[CRFParameters, ...]
    structures: tuple[str, ...]

    def choice(self) -> CRFChoice:
        """What to use, and what it gains."""
        return choose(self.dice, self.patients, self.settings, self.structures)


def _of_run(folder: Path, device: str, most: int) -> Iterator[Observed]:
    """Validation cases, predicted as :func:`medseg.predict` would, each by the network that never saw it."""
    chosen = Postprocessing.of(folder)
    for one in held_out(folder, device, most=most):
        predictor = _at_temperature(one.predictor, chosen)
        _, soft = replace(one, predictor=predictor).predict()

        def decide(soft: Volume | LabelMap, one: HeldOut = one) -> LabelMap:
            labels = one.predictor.decided(soft)
            labels = chosen.apply(labels) if chosen else labels
            if one.counted is None:
                return labels
            return replace(labels, array=np.where(one.counted, labels.array, np.zeros((), labels.array.dtype)))

        known = {s.number: one.truth(s) for s in one.plan.structures if one.known(s)}
        masks = {n: m if one.counted is None else m & one.counted for n, m in known.items()}
        yield Observed(one.case.group, one.image, soft, decide, masks)


def _at_temperature(predictor: Predictor, chosen: Postprocessing | None) -> Predictor:
    if chosen is None or not isinstance(predictor.network, Members):
        return predictor
    members = Members(list(predictor.network.networks), predictor.plan.overlapping, chosen.temperature)
    return replace(predictor, network=members.eval())


def _of_dataset(cases: Sequence[Case], files: Mapping[str, Path], known: Sequence[Structure]) -> Iterator[Observed]:
    for case in cases:
        image = load_image([p for p in case.images if p is not None])
        soft = read_probabilities(files[case.id])
        image.geometry.require_close(soft.geometry, f"image and probabilities of case {case.id}")
        own = labels_of(soft).structures
        if [(s.number, s.name) for s in own] != [(s.number, s.name) for s in known]:
            raise ValueError(
                f"probabilities must be of the same structures in every case ({_named(known)}), got {_named(own)} in case "
                f"{case.id}; take those of one model"
            )
        reference = read_reference_of(case)
        strange = set(present_labels(reference.array)) - {0, *(s.number for s in known)}
        if not reference.is_layered and strange:
            raise ValueError(
                f"labels must be among the structures of the probabilities ({_named(known)}), got {min(strange)} in case "
                f"{case.id}; renumber them"
            )
        masks = {
            s.number: reference.mask(s.number)
            if s.number in reference.names
            else np.zeros(reference.geometry.shape, bool)
            for s in known
            if s.number not in case.unknown
        }
        given = layers_of(soft) if overlap(soft) else soft
        yield Observed(case.group, image, given, decided, masks)


def _named(structures: Sequence[Structure]) -> str:
    return ", ".join(f"{s.number} {s.name}" for s in structures)


def decided(soft: Volume | LabelMap) -> LabelMap:
    """The label map of probabilities: the largest, or of layers each from one half."""
    return replace(soft, array=soft.array >= 0.5) if isinstance(soft, LabelMap) else labels_of(soft)


def read_probabilities(path: str | PathLike[str]) -> Volume:
    """Probabilities (K, I, J, K) of a file, as ``medseg predict --probabilities`` writes them.

    Raises
    ------
    ValueError
        If the file holds no floats, or values outside 0..1.
    """
    soft = read(path)
    kind, remedy = soft.array.dtype, "give what medseg predict --probabilities writes"
    if kind.kind != "f":
        raise ValueError(f"probabilities must be floats, got {kind} in {path}, which may be a label map; {remedy}")
    low, high = float(soft.array.min()), float(soft.array.max())
    if not (low >= -1e-3 and high <= 1 + 1e-3):
        raise ValueError(f"probabilities must be in 0..1, got {low:g} to {high:g} in {path}; {remedy}")
    return soft


def _files_of(folder: Path, cases: Sequence[Case]) -> dict[str, Path]:
    """The file of probabilities of each case that has one."""
    if not folder.is_dir():
        raise FileNotFoundError(f"probabilities must be in a folder, got {folder}; name it (--fit-probabilities DIR)")
    found = {
        c.id: path
        for c in cases
        for path in (folder / f"{c.id}.nii.gz", folder / f"{c.id}{SOFT}.nii.gz")  # the last: predict writes both
        if path.is_file()
    }
    if not found:
        raise FileNotFoundError(f"probabilities must be files <case>{SOFT}.nii.gz, got none in {folder}")
    if len(found) < len(cases):
        log.warning(
            "%d of %d labelled cases have no probabilities and are left out", len(cases) - len(found), len(cases)
        )
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Search


def fit_crf(
    source: Run | str | PathLike[str],
    *,
    probabilities: str | PathLike[str] | None = None,
    device: str = "auto",
    most: int = CASES,
    seconds: float = float("inf"),
    progress: Progress | None = None,
) -> CRFChoice:
    """Choose settings of the CRF, or none, on cases that the model never saw.

    Parameters
    ----------
    source : Run or path
        A finished run, or cross-validation, whose data set is still in place: its own validation cases are predicted,
        and the choice is stored in its folder. Or a data set with images, labels and probabilities.
    probabilities : path, optional
        Of a data set, the folder of ``<case>_probabilities.nii.gz``; ``probabilities`` in the data set by default. They
        must come from a model that was not trained on these cases.
    device : str
        "auto", "cpu", "cuda" or "cuda:n".
    most : int
        Cases looked at, evenly spread; 1 or more.
    seconds : float
        Time there is; fewer cases are looked at where it is short.
    progress : callable, optional
        Called with the number of refinements done and of all.

    Raises
    ------
    FileNotFoundError, ValueError
        If a file is missing or does not fit, the data set of the run has changed, or no structure was drawn in any case.

    Notes
    -----
    Time grows with cases times settings (12); memory is that of one case with two sets of probabilities. Fewer cases than
    6 cannot show a gain, and only the gentle defaults are tried on them.
    """
    if most < 1 or not seconds > 0:
        raise ValueError(f"cases and time must be more than 0, got {most} cases and {seconds:g} s")
    folder = source.path if isinstance(source, Run) else Path(source)
    if is_run(folder):
        if probabilities is not None:
            raise ValueError(
                f"probabilities must be given for a data set alone, got {probabilities} for the run {folder}"
            )
        members = member_runs(folder)
        count = min(most, sum(len(m.validation_ids()) for m in members))
        cases, structures = _of_run(folder, device, most), members[0].plan.as_structures()
        found = search(
            cases, structures, _enough(count), device=device, seconds=seconds, count=count, progress=progress
        )
        return found.choice().store(folder)
    dataset = load_dataset(folder)
    root = folder if folder.is_dir() else folder.parent
    labelled = [c for c in dataset.cases if c.label is not None]
    files = _files_of(Path(probabilities or root / "probabilities"), labelled)
    labelled = [c for c in labelled if c.id in files]
    chosen = [labelled[round(i)] for i in np.linspace(0, len(labelled) - 1, min(most, len(labelled)))]
    structures = labels_of(read_probabilities(files[chosen[0].id])).structures
    observed, count = _of_dataset(chosen, files, structures), len(chosen)
    found = search(observed, structures, _enough(count), device=device, seconds=seconds, count=count, progress=progress)
    return found.choice()


def _enough(count: int) -> tuple[CRFParameters, ...] | None:
    """All settings; the gentle defaults alone for so few cases that none could be chosen."""
    return None if count >= LEAST_PATIENTS else (CRFParameters(),)


def is_run(folder: Path) -> bool:
    """Whether a folder is a run, or the folder of a cross-validation."""
    return is_ensemble(folder) or (folder / "config.json").is_file()


def search(
    cases: Iterable[Observed],
    structures: Sequence[Structure],
    settings: Sequence[CRFParameters] | None = None,
    *,
    device: str = "auto",
    seconds: float = float("inf"),
    count: int = 0,
    progress: Progress | None = None,
) -> Searched:
    """Refine each case with each setting, and take the Dice of each structure.

    Parameters
    ----------
    cases : iterable of Observed
        Taken one by one, so that only one is in memory.
    structures : sequence of Structure
    settings : sequence of CRFParameters, optional
        Those of :func:`candidates` for the pixels of the first case by default.
    count : int
        How many cases there are, for the progress.

    Raises
    ------
    ValueError
        If there was no case, or no structure was drawn in any.
    """
    table: list[list[list[float]]] = []
    patients: list[str] = []
    for one in _within(seconds, cases):
        if settings is None:
            settings = candidates(round(float(np.sqrt(np.prod(one.image.geometry.spacing[:2]))), 3))
        rows = [one.dice(one.probabilities, structures)]
        for n, parameters in enumerate(settings):
            with warnings.catch_warnings():  # structures that the guard keeps have no gain, and no loss
                warnings.simplefilter("ignore", UserWarning)
                rows.append(one.dice(one.refined(parameters, device), structures))
            if progress:
                progress(len(table) * len(settings) + n + 1, count * len(settings))
        table.append(rows)
        patients.append(one.patient)
    if settings is None or not np.isfinite(table).any():
        raise ValueError(
            "cases must be at least one in which a structure was drawn, got none; give labelled cases that the model was "
            "not trained on"
        )
    return Searched(np.array(table), tuple(patients), tuple(settings), tuple(s.name for s in structures))


def _within(seconds: float, cases: Iterable[Observed]) -> Iterator[Observed]:
    """Cases, until the next would last beyond the time if it takes as long as the longest so far."""
    started = before = time.monotonic()
    longest = 0.0
    for one in cases:
        yield one
        now = time.monotonic()
        longest, before = max(longest, now - before), now
        if now - started + longest > seconds:
            return
