"""The plan of a training as a frozen value: what is trained and how, written as JSON beside the weights."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

from pydantic import model_validator

from medseg.config import Record
from medseg.models import MODELS, build_model
from medseg.models.network import SegmentationNetwork
from medseg.volume import Structure

__all__ = ["ANY", "FORMAT", "ChannelPlan", "Plan", "StructurePlan", "chosen_setting", "parse_setting"]

FORMAT = 1  # of plan and run folder; a run of another format is refused
ANY = -1  # in the labels of a region: every value but the background and the one to be ignored


class ChannelPlan(Record):
    """How one image channel is normalised.

    "ct": clip to [low, high] HU, then (x - mean) / std of the training set's foreground. "zscore": clip to the image's
    own 0.5 and 99.5 percentiles, then its own mean and standard deviation; where ``masked`` these are of the voxels
    above its lowest value alone, and voxels that are blank all around are background. "color": (x - mean) / std of the
    training set.
    """

    name: str
    scheme: Literal["ct", "zscore", "color"]
    masked: bool = False
    low: float = 0.0
    high: float = 0.0
    mean: float = 0.0
    std: float = 1.0


class StructurePlan(Record):
    """One structure that is learnt: voxels whose value in the label file is one of ``values``.

    A region unites several labels: its ``labels`` name them, and (:data:`ANY`,) stands for all there are, so that
    instances of one kind, each with a number of its own, are learnt as one structure. A plain structure is its own
    number.
    """

    number: int
    name: str
    color: tuple[int, int, int]
    labels: tuple[int, ...] = ()

    @property
    def values(self) -> tuple[int, ...]:
        """Values of label files that belong to the structure."""
        return self.labels or (self.number,)


class Plan(Record):
    """What is trained and how; every entry can be set by hand, ``reasons`` says where each comes from.

    Spacing (mm), patch, strides and kernels are along the axes of ``orientation``; a spacing of None keeps the slices
    as they are (2D networks see one slice at a time along the last axis).

    Structures are exclusive (softmax, channel 0 the background) or, where ``overlapping``, each has a sigmoid of its own
    and there is no channel for the background. Voxels of the value ``ignore`` in label files do not count. ``swaps``
    pairs the numbers of left and right structures, which change places when an image is mirrored. ``precision`` is that
    of the training, in the words of Lightning Fabric.
    """

    format: int = FORMAT
    model: str
    dims: Literal[2, 3]
    channels: tuple[ChannelPlan, ...]
    structures: tuple[StructurePlan, ...]
    orientation: str | None
    spacing: tuple[float, float, float | None]
    patch: tuple[int, ...]
    batch: int
    encoder: str | None = None
    features: tuple[int, ...] = ()
    strides: tuple[tuple[int, ...], ...] = ()
    kernels: tuple[tuple[int, ...], ...] = ()
    mirror: tuple[int, ...]
    overlapping: bool = False
    ignore: int | None = None
    swaps: tuple[tuple[int, int], ...] = ()
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    reasons: Mapping[str, str] = {}

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.format != FORMAT:
            raise ValueError(f"format of a plan must be {FORMAT}, got {self.format}; plan anew")
        if self.model not in MODELS or MODELS[self.model].dims != self.dims:
            raise ValueError(f"model must be one of {', '.join(MODELS)} and fit dims, got {self.model} and {self.dims}")
        for name in ("patch", "strides", "kernels"):
            rows = getattr(self, name) if name != "patch" else (self.patch,)
            if any(len(row) != self.dims or min(row) < 1 for row in rows):
                raise ValueError(f"{name} must be {self.dims} positive numbers each, got {getattr(self, name)}")
        if self.encoder is None:
            if len(self.features) != len(self.strides) + 1 or len(self.kernels) != len(self.features):
                raise ValueError("features must be one more than strides and as many as kernels, got other numbers")
        elif self.features or self.strides or self.kernels:
            raise ValueError(f"features, strides and kernels must be empty with the encoder {self.encoder}")
        if (MODELS[self.model].encoder is None) != (self.encoder is None):
            raise ValueError(f"encoder must be {MODELS[self.model].encoder and 'named'} for {self.model}")
        if min((self.batch, *self.features)) < 1 or any(s is not None and not s > 0 for s in self.spacing):
            raise ValueError("batch, features and spacing must be positive, got a value that is not")
        if any(not 0 <= a < self.dims for a in self.mirror):
            raise ValueError(f"mirror must name axes below {self.dims}, got {self.mirror}")
        self._require_consistent_structures()
        return self

    def _require_consistent_structures(self) -> None:
        numbers = [s.number for s in self.structures]
        if not numbers or len(set(numbers)) < len(numbers) or min(numbers) < 1:
            raise ValueError(f"structures must have distinct numbers of at least 1, got {numbers}")
        swapped = [n for pair in self.swaps for n in pair]
        if not set(swapped) <= set(numbers) or len(set(swapped)) < len(swapped):
            raise ValueError(f"swaps must pair numbers of structures, each at most once, got {self.swaps}")
        values = [v for s in self.structures for v in s.values]
        if self.ignore in values:
            raise ValueError(f"ignore must be a label of no structure, got {self.ignore}")
        if not self.overlapping and (len(set(values)) < len(values) or (ANY in values and len(values) > 1)):
            raise ValueError("structures must not share labels unless the plan is overlapping, got regions that do")

    @property
    def outputs(self) -> int:
        """Channels of the logits: the structures, and the background where they are exclusive."""
        return len(self.structures) + (not self.overlapping)

    def window(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Voxels that the network predicts at a time of an image of this shape: a patch, or the whole of a slice."""
        return tuple(shape[: self.dims]) if MODELS[self.model].whole_slices else self.patch

    def build(self) -> SegmentationNetwork:
        """The planned network with fresh weights."""
        options: dict[str, Any] = {"features": self.features, "strides": self.strides, "kernels": self.kernels}
        if self.encoder is not None:
            options = {"encoder": self.encoder}
        return build_model(self.model, in_channels=len(self.channels), out_channels=self.outputs, **options)

    def with_settings(self, settings: Sequence[str]) -> Self:
        """The plan with entries set by hand.

        Parameters
        ----------
        settings : sequence of str
            Each "entry=value": JSON, or numbers or words separated by commas ("batch=4", "patch=64,64,32",
            "precision=bf16-mixed", "strides=[[2,2,1],[2,2,2]]", "mirror=[]").

        Raises
        ------
        ValueError
            If an entry is not one of a plan, or its value does not fit the others.
        """
        values = self.model_dump()
        reasons = dict(self.reasons)
        for setting in settings:
            name, equals, text = (part.strip() for part in setting.partition("="))
            if not equals:
                raise ValueError(f"setting must be entry=value, got {setting!r}")
            known = [n for n in type(self).model_fields if n not in ("format", "reasons")]
            if name not in known:
                raise ValueError(f"setting must be of an entry of the plan ({', '.join(known)}), got {name!r}")
            values[name] = parse_setting(text)
            reasons[name] = "set by hand"
        return type(self).make(**{**values, "reasons": reasons})

    def summary(self) -> dict[str, str]:
        """Each entry in words, in the order of the plan."""
        by = " x "
        spacing = by.join("native" if s is None else f"{s:g}" for s in self.spacing)
        names = {s.number: s.name for s in self.structures}
        rows = {
            "model": self.model,
            "channels": "; ".join(f"{c.name}: {c.scheme}" for c in self.channels),
            "structures": ", ".join(_in_words(s) for s in self.structures),
            "overlapping": "yes: a sigmoid each" if self.overlapping else "no: softmax",
            "ignore": "" if self.ignore is None else f"label {self.ignore}",
            "orientation": self.orientation or "as stored",
            "spacing": f"{spacing} mm",
            "patch": by.join(map(str, self.patch)),
            "batch": str(self.batch),
            "encoder": self.encoder or "",
            "features": ", ".join(map(str, self.features)),
            "strides": ", ".join(by.join(map(str, s)) for s in self.strides),
            "kernels": ", ".join(by.join(map(str, k)) for k in self.kernels),
            "precision": self.precision,
            "mirror": ", ".join(f"axis {a}" for a in self.mirror) or "off",
            "swaps": ", ".join(f"{names[a]} - {names[b]}" for a, b in self.swaps),
        }
        return {name: value for name, value in rows.items() if value}

    def as_structures(self) -> tuple[Structure, ...]:
        """The structures of predicted label maps."""
        return tuple(Structure(s.number, s.name, s.color) for s in self.structures)


def _in_words(structure: StructurePlan) -> str:
    values = "any label" if ANY in structure.labels else ", ".join(map(str, structure.labels))
    return f"{structure.number} {structure.name}" + (f" ({values})" if values else "")


def parse_setting(text: str) -> Any:
    """A value as JSON, or where it is none as a word, or as a list where there are commas."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return [parse_setting(part.strip()) for part in text.split(",")] if "," in text else text


def chosen_setting(settings: Sequence[str], name: str) -> Any:
    """The value of the last "name=value" among settings, None where there is none."""
    values = [text for entry, _, text in (setting.partition("=") for setting in settings) if entry.strip() == name]
    return parse_setting(values[-1].strip()) if values else None
