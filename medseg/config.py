"""Configurations: frozen, validated, JSON in and out, unknown keys refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from medseg.io.files import atomic_path

__all__ = ["Record", "TrainConfig", "TrainOptions", "explained"]


class Record(BaseModel):
    """A frozen, validated value that is written as JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @classmethod
    def make(cls, **values: Any) -> Self:
        """Build from values of the outside world.

        Raises
        ------
        ValueError
            If an entry is missing, unknown or not valid; one line that names it.
        """
        try:
            return cls(**values)
        except ValidationError as problem:
            raise ValueError(explained(problem)) from problem

    def save(self, path: str | Path, *, force: bool = False) -> None:
        """Write as JSON, atomically; over what was there only with ``force``."""
        with atomic_path(path, force=force) as temporary:
            temporary.write_text(self.model_dump_json(indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read from JSON.

        Raises
        ------
        FileNotFoundError
            If there is no such file.
        ValueError
            If the file is not JSON, or an entry is missing, unknown or not valid; the message names it.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{cls.__name__.lower()} must be a JSON file, got {path}, which does not exist")
        try:
            values = json.loads(path.read_text())
        except json.JSONDecodeError as problem:
            raise ValueError(f"{path} must hold JSON, got {problem}") from problem
        if not isinstance(values, dict):
            raise ValueError(f"{path} must hold a JSON object, got {type(values).__name__}")
        try:
            return cls.make(**values)
        except ValueError as problem:
            raise ValueError(f"{problem} in {path}") from problem


def explained(problem: ValidationError) -> str:
    """The first thing that is wrong, in one line that names the entry."""
    first = problem.errors()[0]
    where = ".".join(str(p) for p in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    return f"{where} must be valid: {message}, got {first['input']!r}"[:400] if where else message


class TrainOptions(Record):
    """How a training is done; the options of ``medseg train``.

    At most one of ``epochs`` and ``minutes`` limits the training; with neither it runs 100 epochs.
    """

    out: Path = Field(description="run folder")
    model: str | None = Field(
        None,
        description="unet2d, unet3d, unet2d-encoder, deeplabv3plus, sam-med (its frozen encoder sees each slice once), "
        "sam-med-box (for medseg contour); as the images are when not given",
    )
    fold: Annotated[int, Field(ge=0)] | Literal["all", "none"] = Field(
        0,
        description="the fold held out for validation; all: each in turn, minutes are of one; none: no case is held out",
    )
    folds: int | None = Field(None, ge=2, description="number of folds; 5, or as many as there are patients if fewer")
    split_seed: int = Field(12345, ge=0, description="of the shuffle that makes the folds; nnU-Net's by default")
    epochs: int | None = Field(
        None, ge=1, description="epochs; an epoch draws as many patches as there are cases, and at least 20 batches"
    )
    minutes: float | None = Field(None, gt=0, description="time for everything: reading, training, validation")
    batch: int | None = Field(None, ge=1, description="patches per step; the plan's when not given")
    accumulate: int = Field(
        1, ge=1, description="parts a batch is computed in, to save memory; Dice is then of each part"
    )
    channel_dropout: float = Field(
        0.0, ge=0, lt=1, description="chance that a channel of several is left out, for predictions without it"
    )
    optimizer: Literal["adamw", "sgd"] = Field("adamw", description="AdamW, or SGD with Nesterov momentum 0.99")
    learning_rate: float = Field(2e-3, gt=0, description="at its highest")
    weight_decay: float = Field(1e-2, ge=0, description="decoupled in AdamW")
    group: str | None = Field(None, description="regular expression whose group 1 on the case id is the patient")
    absent: Literal["background", "unknown"] = Field(
        "background", description="what a label is in a case that does not hold it: absent, or not drawn"
    )
    overlapping: bool = Field(False, description="a sigmoid for each structure, even if the labels exclude each other")
    foreground: bool = Field(False, description="learn all labels as one structure, like instances of one kind")
    plan: Path | None = Field(None, description="a plan.json to use instead of planning")
    memory: str | None = Field(
        None, description="what the training may take, like 4GB; half of what is free by default"
    )
    init: str | None = Field(
        None,
        description="start from the weights of this run, of this file for the encoder, or of imagenet; for sam-med and "
        "sam-med-box from lite-medsam, or NAME:FILE (sam-vit-b, sam-vit-l, sam-vit-h, medsam, mobile-sam)",
    )
    freeze: bool = Field(False, description="keep the encoder as it starts")
    prompt_encoder: bool = Field(False, description="of sam-med-box: learn how prompts are read, too")
    cache_size: str = Field("20GB", description="what cached embeddings of a frozen encoder may take")
    cache: Path | None = Field(None, description="folder of preprocessed cases to use and keep, shared by trainings")
    device: str = Field("auto", description="where to compute: auto, cpu, cuda or cuda:n")
    precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed"] = Field(
        "auto", description="that of the plan by default"
    )
    workers: int = Field(2, ge=0, description="threads that read and preprocess cases")
    deterministic: bool = Field(False, description="the same result on the same machine every time, slower on a GPU")
    seed: int = Field(0, ge=0, description="of weights, patches and augmentation")
    resume: bool = Field(False, description="go on from the last checkpoint")
    force: bool = Field(False, description="replace an existing run folder")

    @model_validator(mode="after")
    def _one_limit(self) -> Self:
        if self.epochs is not None and self.minutes is not None:
            raise ValueError("epochs and minutes must not both be given")
        if isinstance(self.fold, int) and self.fold >= (self.folds or math.inf):
            raise ValueError(f"fold must be below the number of folds {self.folds}, got {self.fold}")
        if self.model == "sam-med-box" and self.fold == "all":
            raise ValueError("fold must be a number or none for sam-med-box, got all")
        if self.freeze and self.init is None:
            raise ValueError("freeze must go with init, got no weights to start from")
        return self


class TrainConfig(TrainOptions):
    """What is trained, on what, for how long."""

    dataset: Path
