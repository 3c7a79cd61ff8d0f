"""A run: the folder that holds a trained model and all that is needed to use it."""

from __future__ import annotations

import json
import logging
import os
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from medseg.config import TrainConfig
from medseg.io.files import atomic_path
from medseg.models.network import SegmentationNetwork
from medseg.plan import FORMAT, Plan
from medseg.scores import Evaluation

__all__ = ["Run", "environment", "is_run_file"]

WEIGHTS = "weights.safetensors"
CHECKPOINTS = ("checkpoint.safetensors", "checkpoint.previous.safetensors")  # the last and the one before it

FILES = re.compile(  # and folders that medseg writes into a run, or into the folder of a cross-validation
    r"(config|plan|validation|environment|history|training|transfer|metrics|postprocessing|crf|ensemble)\.json"
    r"|weights\.safetensors|checkpoint\.(previous\.|next\.)?safetensors|(metrics|lesions)\.csv|report\.html"
    r"|cache|tensorboard|predictions|fold\d+(\.log)?|\.medseg.*"
)

log = logging.getLogger("medseg")


@dataclass(frozen=True)
class Run:
    """A run folder.

    ``config.json`` and ``plan.json`` say what was trained and how, ``weights.safetensors`` holds the best weights,
    ``checkpoint.safetensors`` all that ``--resume`` needs (``checkpoint.previous.safetensors`` is the one before, should
    that be damaged), ``history.json`` the curve, ``training.json`` time and memory, ``metrics.json`` the validation,
    ``environment.json`` versions and machine.
    """

    path: Path
    config: TrainConfig
    plan: Plan

    @property
    def precision(self) -> str:
        """What was or is trained in: "32-true", "bf16-mixed" or "16-mixed"."""
        return self.plan.precision if self.config.precision == "auto" else self.config.precision

    @classmethod
    def create(cls, path: Path, config: TrainConfig, plan: Plan, validation: Sequence[str]) -> Run:
        """Make the folder, note which cases are for validation, and return the run."""
        path.mkdir(parents=True, exist_ok=True)
        config.save(path / "config.json", force=True)
        plan.save(path / "plan.json", force=True)
        write_json(path / "validation.json", list(validation))
        write_json(path / "environment.json", environment())
        return cls(path, config, plan)

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """Open an existing run.

        Raises
        ------
        FileNotFoundError
            If the folder or its plan is missing.
        ValueError
            If the run is of another format than this version of medseg reads.
        """
        path = Path(path)
        if not (path / "plan.json").is_file():
            raise FileNotFoundError(f"run must be a folder that medseg train made, got {path}, which has no plan.json")
        try:
            found = json.loads((path / "plan.json").read_text()).get("format")
        except (json.JSONDecodeError, AttributeError) as problem:
            raise ValueError(f"plan must be a JSON object, got something else in {path / 'plan.json'}") from problem
        if found != FORMAT:
            raise ValueError(
                f"run must be of format {FORMAT}, got {found} in {path}; use the medseg version in its environment.json"
            )
        return cls(path, TrainConfig.load(path / "config.json"), Plan.load(path / "plan.json"))

    def build(self) -> SegmentationNetwork:
        """The planned network with fresh weights."""
        return self.plan.build()

    def network(self, device: torch.device | str = "cpu") -> nn.Module:
        """The network with the best weights, in eval mode.

        Raises
        ------
        FileNotFoundError, ValueError
            If the weights are missing, damaged, or of another network.
        """
        path = self.path / WEIGHTS
        if not path.is_file():
            raise FileNotFoundError(f"run must hold {WEIGHTS}, got none in {self.path}; train it first")
        if self.config.model == "sam-med-box":
            raise ValueError(
                f"run must be of a network without prompts, got {self.config.model} in {self.path}; draw boxes with medseg "
                f"contour --model {self.path}"
            )
        network = self.build()
        try:
            network.load_state_dict(load_file(path))
        except (SafetensorError, RuntimeError) as problem:
            raise ValueError(f"weights must fit the plan, got in {path}: {str(problem)[:300]}") from problem
        return network.to(device).eval()

    def validation_ids(self) -> list[str]:
        """Ids of the validation cases."""
        ids: list[str] = json.loads((self.path / "validation.json").read_text())
        return ids

    def has_checkpoint(self) -> bool:
        """Whether there is something to resume from."""
        return any((self.path / name).is_file() for name in CHECKPOINTS)

    def evaluation(self) -> Evaluation:
        """The metrics of the validation cases.

        Raises
        ------
        FileNotFoundError
            If the training has not finished.
        """
        path = self.path / "metrics.json"
        if not path.is_file():
            raise FileNotFoundError(f"run must have finished, got no metrics.json in {self.path}; go on with --resume")
        return Evaluation.from_json(path.read_text())

    def save_weights(self, tensors: Mapping[str, Tensor]) -> None:
        """Write the best weights, atomically."""
        save_tensors(self.path / WEIGHTS, tensors, {})

    def save_checkpoint(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Write tensors and state for a later ``--resume``, atomically in one file; the last one is kept beside it."""
        last, previous = (self.path / name for name in CHECKPOINTS)
        fresh = last.with_name("checkpoint.next.safetensors")
        save_tensors(fresh, tensors, state)
        if last.is_file():
            os.replace(last, previous)
        os.replace(fresh, last)

    def load_checkpoint(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and state of the last checkpoint, or of the one before it where that is missing or damaged.

        Raises
        ------
        FileNotFoundError, ValueError
            If there is none, or all are damaged.
        """
        problems = []
        for path in (self.path / name for name in CHECKPOINTS):
            if not path.is_file():
                continue
            try:
                with safe_open(path, "pt") as file:
                    state = json.loads((file.metadata() or {}).get("state", "{}"))
                tensors = load_file(path)
            except SafetensorError as problem:
                problems.append(f"{path}: {problem}")
                continue
            if problems:
                log.warning("checkpoint is damaged, going on from the one before it: %s", problems[0])
            return tensors, state
        if problems:
            raise ValueError(f"checkpoint must be whole, got a damaged {'; '.join(problems)}; train anew with --force")
        raise FileNotFoundError(f"run must hold {CHECKPOINTS[0]} to be resumed, got none in {self.path}")


def is_run_file(name: str) -> bool:
    """Whether a name in a folder is one that medseg gives to what it writes into a run."""
    return FILES.fullmatch(name) is not None


def save_tensors(path: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Write tensors and a JSON state into one safetensors file, atomically, over what was there."""
    flat = {name: t.detach().to("cpu").contiguous().clone() for name, t in tensors.items()}
    with atomic_path(path, force=True) as temporary:
        save_file(flat, temporary, metadata={"state": json.dumps(state)})


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON, atomically, over what was there."""
    with atomic_path(path, force=True) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n")


def environment() -> dict[str, str]:
    """Versions and kind of machine; nothing that names a person or a place."""
    names = ("medseg", "torch", "monai", "numpy", "nibabel", "pydicom", "highdicom", "SimpleITK")
    return {
        "python": platform.python_version(),
        "platform": f"{sys.platform} {platform.machine()}",
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "threads": str(torch.get_num_threads()),
        **{name: metadata.version(name) for name in names},
    }
