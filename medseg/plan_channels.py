"""From the intensities of the cases to how each channel is normalised."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from medseg.cases import Dataset
from medseg.fingerprint import CaseFingerprint
from medseg.plan_record import ChannelPlan

__all__ = ["choose_channels"]

BLANK = 0.25  # share of an image at its lowest value from which that counts as outside the body
BLANK_INSIDE = 0.005  # unless so many of the structures' own voxels hold it


def choose_channels(
    looks: Sequence[CaseFingerprint], dataset: Dataset, reasons: dict[str, str]
) -> tuple[ChannelPlan, ...]:
    """Normalisation of each channel; adds to the reasons.

    CT is clipped to percentiles of the foreground and scaled by its mean and spread in the whole set, colours by those
    of the set, everything else image by image. Grey pictures among coloured ones count as coloured.

    Raises
    ------
    ValueError
        If images differ in their number of channels, or no training case has one of the channels.
    """
    grey = sum(len(look.samples) == 1 for look in looks)
    looks = _grey_as_color(looks)
    count = len(looks[0].samples)
    for look in looks:
        if len(look.samples) != count:
            raise ValueError(
                f"images must have {count} channels as {looks[0].id} has, got {len(look.samples)} in {look.id}; list "
                "those of one kind in a CSV"
            )
    names = dataset.channels if len(dataset.channels) == count else tuple(f"channel {c}" for c in range(count))
    plans, why = [], []
    for c, name in enumerate(names):
        having = [look for look in looks if look.present[c]]
        if not having:
            raise ValueError(f"channels must be there in at least one training case, got none of {name}; leave it out")
        values = np.concatenate([look.samples[c] for look in having])
        mean, std = float(values.mean()), float(values.std()) or 1.0
        declared = name.strip().lower()
        looks_ct = all(look.modality == "CT" or (look.integers and look.lowest <= -900) for look in looks)
        if declared in ("ct", "cbct") or (declared in ("image", f"channel {c}") and looks_ct):
            low, high = (float(v) for v in np.percentile(values, (0.5, 99.5)))
            inside = np.clip(values, low, high)
            mean, std = float(inside.mean()), float(inside.std()) or 1.0
            plans.append(ChannelPlan(name=name, scheme="ct", low=low, high=high, mean=mean, std=std))
            why.append(
                f"{name}: CT, clipped to the 0.5 to 99.5 percentiles of the foreground ({low:.0f} to {high:.0f} HU)"
            )
        elif count == 3 and all(look.picture and look.integers for look in looks):
            plans.append(ChannelPlan(name=name, scheme="color", mean=mean, std=std))
            why.append(f"{name}: colour, by mean and spread of the training set")
        else:
            blank = float(np.median([look.blank for look in having]))
            masked = blank > BLANK and float(np.median([look.blank_inside for look in having])) < BLANK_INSIDE
            plans.append(ChannelPlan(name=name, scheme="zscore", masked=masked))
            why.append(f"{name}: no fixed unit, by each image's own mean and spread within 0.5 to 99.5 percentiles")
            if masked:
                why[-1] += f", of the voxels above the lowest value ({100 * blank:.0f} % of an image are blank)"
        if len(having) < len(looks):
            why[-1] += f", missing in {len(looks) - len(having)} of {len(looks)} cases"
    names_of: dict[str, list[str]] = {}
    for sentence in why:
        name, _, reason = sentence.partition(": ")
        names_of.setdefault(reason, []).append(name)
    reasons["channels"] = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in names_of.items())
    if count == 3 and grey:
        reasons["channels"] += f"; {grey} of {len(looks)} images are grey: their values count as all three colours"
    return tuple(plans)


def _grey_as_color(looks: Sequence[CaseFingerprint]) -> Sequence[CaseFingerprint]:
    """Where some pictures are in colour and the others grey, the grey ones as red, green and blue alike."""
    if not all(look.picture and look.integers for look in looks) or {len(look.samples) for look in looks} != {1, 3}:
        return looks
    return [
        look if len(look.samples) == 3 else replace(look, samples=look.samples.repeat(3, 0), present=look.present * 3)
        for look in looks
    ]
