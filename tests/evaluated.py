"""Predictions and references as files, and the command that compares them, run in this process."""

from __future__ import annotations

import io
import json
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import rotation
from scipy import ndimage

import medseg
from medseg import cli
from medseg.volume import Geometry, LabelMap, Structure

GRID = Geometry.from_parts((24, 19, 9), (0.9, 1.3, 3.0), (-20, 30, 5), rotation((0.2, -0.3, 0.1)))
STRUCTURES = (Structure(1, "liver"), Structure(4, "spleen"))


def truth(seed: int) -> LabelMap:
    field = ndimage.gaussian_filter(np.random.default_rng(seed).standard_normal(GRID.shape), 2)
    return LabelMap(np.select([field > 0.06, field < -0.07], [1, 4], 0).astype(np.uint8), GRID, STRUCTURES)


def moved(labels: LabelMap, by: int) -> LabelMap:
    return replace(labels, array=np.roll(labels.array, by, 0))


def medseg_command(*arguments: object, code: int = 0) -> tuple[str, str]:
    """stdout and stderr of a command run in this process."""
    out, err = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err),
        pytest.raises(SystemExit) as stop,
    ):  # fmt: skip
        patch.setattr(sys, "argv", ["medseg", *map(str, arguments)])
        cli.main()
    assert int(stop.value.code or 0) == code, err.getvalue() + out.getvalue()
    return out.getvalue(), err.getvalue()


def evaluate_json(*arguments: object, code: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(medseg_command("evaluate", *arguments, "--json", code=code)[0])
    return found


def write_folders(root: Path) -> Path:
    """References r, and predictions p and q of which p are nearer."""
    for n in range(5):
        medseg.write(truth(n), root / "r" / f"case_{n}.nii.gz")
        medseg.write(moved(truth(n), n % 3), root / "p" / f"case_{n}.nii.gz")
        medseg.write(moved(truth(n), n % 3 + 2), root / "q" / f"case_{n}.nii.gz")
    return root
