"""Whether the CRF helps, as held-out cases say, and with which settings: a JSON file that prediction looks for."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import model_validator

from medseg.choice import Choice
from medseg.config import Record
from medseg.crf import CRFParameters
from medseg.run import Run

__all__ = ["LEAST_PATIENTS", "CRFChoice", "Gain", "choose", "crf_of_run"]

log = logging.getLogger("medseg")
Array = NDArray[Any]
LEAST_GAIN = 0.001  # of mean Dice, below which no settings count as better than none
LARGEST_P = 0.025  # that the best of all settings looks so good by luck
RESAMPLES, SEED = 2000, 0
LEAST_PATIENTS = 6  # that n of them gain by chance has probability 2^-n: with fewer no 95 % interval can be above 0


class Gain(Record):
    """Dice of a structure without the CRF and with it, each case refined with what the other patients chose.

    ``low`` and ``high`` are the 95 % interval of the mean change (bootstrap over patients), None where there is none.
    """

    structure: str
    cases: int
    before: float
    after: float
    change: float
    low: float | None
    high: float | None

    @property
    def words(self) -> str:
        """The figures in a row."""
        interval = "" if self.low is None else f", 95 % interval {self.low:+.4f} to {self.high:+.4f}"
        return f"{self.structure}: Dice {self.before:.4f} to {self.after:.4f} ({self.change:+.4f}{interval})"


class CRFChoice(Choice):
    """What validation said about the CRF.

    Parameters
    ----------
    settings : mapping of str to float, or None
        Fields of :class:`medseg.CRFParameters`; None where the CRF is not used.
    best : mapping of str to float, or None
        The best settings on all cases, whether used or not; None where none of them is better than no CRF.
    patients : int
        Different patients among the cases.
    tried : int
        How many settings were compared.
    p : float
        Of the best of these: that it looks so good by luck among so many (White's reality check [1]_, one-sided).
    overall : Gain
        The mean of all structures.
    structures : tuple of Gain

    References
    ----------
    .. [1] White, Econometrica 2000, doi:10.1111/1468-0262.00152
    """

    file: ClassVar[str] = "crf.json"
    settings: dict[str, float] | None
    best: dict[str, float] | None
    patients: int
    tried: int
    p: float
    overall: Gain
    structures: tuple[Gain, ...]

    @model_validator(mode="after")
    def _valid_settings(self) -> Self:
        self.parameters  # noqa: B018  refuses unknown or impossible settings
        return self

    @property
    def parameters(self) -> CRFParameters | None:
        """Parameters for :func:`medseg.refine`, or None where the CRF is not used."""
        if self.settings is None:
            return None
        iterations = self.settings.get("iterations", CRFParameters.iterations)
        if not float(iterations).is_integer():
            raise ValueError(f"iterations must be a whole number, got {iterations}")
        try:
            return CRFParameters(**{**self.settings, "iterations": int(iterations)})  # type: ignore[arg-type]
        except TypeError as problem:
            raise ValueError(f"settings must be those of the CRF, got {sorted(self.settings)}") from problem

    @property
    def reason(self) -> str:
        """One sentence for people."""
        looked = f"{self.cases} validation cases of {self.patients} patients"
        if self.settings is None and self.patients < LEAST_PATIENTS:
            verdict = f"the CRF is not used: {looked} cannot show a gain, {LEAST_PATIENTS} patients are needed"
        elif self.settings is None:
            verdict = f"the CRF is not used: {looked} showed {self._obstacle}"
        else:
            verdict = f"the CRF is used: {looked} showed a gain"
        return f"{verdict}; {'; '.join(g.words for g in dict.fromkeys((self.overall, *self.structures)))}"

    @property
    def _obstacle(self) -> str:
        """What speaks against using it."""
        worse = [g.structure for g in self.structures if _is_below(g)]
        if worse:
            return f"a loss for {', '.join(worse)}"
        if self.p > LARGEST_P and _is_above(self.overall):
            return f"no more than luck among {self.tried} settings can bring (p = {self.p:.3f})"
        return "no gain"


def crf_of_run(run: Run | str | PathLike[str]) -> CRFParameters | None:
    """What prediction with CRF uses: the choice stored in the run (None where it does not help), else gentle defaults."""
    folder = run.path if isinstance(run, Run) else Path(run)
    choice = CRFChoice.of(folder)
    if choice is None:
        log.warning("the CRF is used with gentle defaults that nothing was fitted for; fit it: medseg refine --fit RUN")
        return CRFParameters()
    log.info("%s", choice.reason)
    return choice.parameters


# ---------------------------------------------------------------------------------------------------------------------
# Choosing


def choose(
    dice: Array, patients: Sequence[str], settings: Sequence[CRFParameters], structures: Sequence[str]
) -> CRFChoice:
    """Choose the settings of the highest mean Dice, and estimate what choosing so gains on other patients.

    Parameters
    ----------
    dice : (cases, 1 + settings, structures) array
        Without the CRF and with each of the settings; NaN where a structure was not drawn.
    patients : sequence of str
        Of each case.
    settings : sequence of CRFParameters
    structures : sequence of str
        Their names.

    Notes
    -----
    Each patient is held out in turn, the choice is made on the others (it may be not to use the CRF), and the patient's
    change is that of this choice. That is without bias, but its interval is too narrow where all patients choose alike.
    So the CRF is used if the 95 % interval of the mean change lies above 0, that of no structure below, and luck among
    so many settings has a probability of at most 2.5 %. Where no setting does anything, simulated tables of 6 to 24
    patients and 12 settings had it used in 1 to 5 of 100.
    """
    of = np.unique(np.asarray(patients), return_inverse=True)[1]
    change = dice - dice[:, :1]
    after = np.empty_like(dice[:, 0])
    for patient in range(of.max() + 1):
        own = of == patient
        after[own] = dice[own, _best(change[~own])]
    draws = _draws(after - dice[:, 0], of)
    defined: Array = np.asarray(np.isfinite(dice[:, 0]).any(0))
    every = [
        _gain(name, of, dice[:, 0, [s]], after[:, [s]], draws[:, s]) for s, name in enumerate(structures) if defined[s]
    ]
    overall = every[0]
    if len(every) > 1:
        overall = _gain("all structures", of, dice[:, 0], after, draws[:, defined].mean(1))
    best = _best(change)
    p = _by_luck(change[:, 1:], of)
    enough = of.max() + 1 >= LEAST_PATIENTS and p <= LARGEST_P
    used = best > 0 and enough and _is_above(overall) and not any(map(_is_below, every))
    chosen = asdict(settings[best - 1]) if best else {}
    found = {name: v for name, v in chosen.items() if v is not None and v is not False} or None
    return CRFChoice(
        cases=len(dice), settings=found if used else None, best=found, patients=int(of.max()) + 1, tried=len(settings), p=p,
        overall=overall, structures=tuple(every),
    )  # fmt: skip


def _is_above(gain: Gain) -> bool:
    return gain.low is not None and gain.low > 0 and gain.change >= LEAST_GAIN


def _is_below(gain: Gain) -> bool:
    return gain.high is not None and gain.high < 0


def _best(change: Array) -> int:
    """Number of the settings (0: none) of the highest mean change (cases, 1 + settings, structures)."""
    if not len(change):
        return 0
    means = np.array([_mean(change[:, n]) for n in range(change.shape[1])])
    best = int(means.argmax())
    return best if means[best] >= LEAST_GAIN else 0


def _mean(values: Array) -> float:
    """Mean over structures of the mean over cases (cases, structures) where it is defined."""
    known = np.isfinite(values)
    drawn = known.any(0)
    sums = np.where(known, values, 0).sum(0)[drawn] / known.sum(0)[drawn]
    return float(sums.mean()) if drawn.any() else 0.0


def _draws(change: Array, of: Array) -> Array:
    """(RESAMPLES, structures) means of the change (cases, structures) over drawn patients; 0 where none is."""
    known = np.isfinite(change)
    patients = np.eye(int(of.max()) + 1)[of].T
    sums, counts = patients @ np.where(known, change, 0), patients @ known
    drawn = np.random.default_rng(SEED).multinomial(len(patients), np.full(len(patients), 1 / len(patients)), RESAMPLES)
    return np.asarray((drawn @ sums) / np.maximum(drawn @ counts, 1e-9))


def _by_luck(change: Array, of: Array) -> float:
    """Probability that the best of settings (cases, settings, structures) without any effect looks as good as this one."""
    cases, count, structures = change.shape
    draws = _draws(change.reshape(cases, -1), of).reshape(RESAMPLES, count, structures)
    draws = draws[:, :, np.isfinite(change[:, 0]).any(0)].mean(2)
    means = np.array([_mean(change[:, n]) for n in range(count)])
    return float(np.mean((draws - means).max(1) >= means.max()))


def _gain(name: str, of: Array, before: Array, after: Array, draws: Array) -> Gain:
    low, high = (float(v) for v in np.percentile(draws, (2.5, 97.5)))
    known = np.isfinite(before).any(1)
    alone = len(set(of[known].tolist())) < 2  # of one patient there is no interval
    return Gain(
        structure=name, cases=int(known.sum()), before=_mean(before), after=_mean(after), change=_mean(after - before),
        low=None if alone else low, high=None if alone else high,
    )  # fmt: skip
