"""The command line as a user calls it, in fresh processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny

import medseg
from medseg.io.dicom_write import write_series


def medseg_command(*arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "medseg.cli", *map(str, arguments)], capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stderr + done.stdout
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set, a trained run, and a DICOM series, made through the commands where there is one."""
    root = tmp_path_factory.mktemp("cli")
    tiny.write_dataset(root / "set")
    tiny.plan().save(root / "plan.json")
    medseg_command(
        "train", root / "set", "--out", root / "run", "--epochs", 12, "--folds", 3, "--learning-rate", 0.01, "--plan", root / "plan.json",
        "--precision", "32-true", "--device", "cpu",
    )  # fmt: skip
    write_series(tiny.case(50)[0], root / "series", description="a b/c", modality="MR")
    return root


def test_help_of_every_command() -> None:
    text = medseg_command("--help").stdout
    for name in ("demo", "info", "convert", "check", "plan", "train", "predict", "refine", "evaluate"):
        assert name in text
        assert "--help" in medseg_command(name, "--help").stdout


def test_bad_usage_is_2_and_bad_input_1_with_one_line(tmp_path: Path) -> None:
    assert "medseg" in medseg_command("fly", code=2).stderr
    done = medseg_command("info", tmp_path / "missing.nii.gz", code=1)
    assert done.stderr.strip().count("\n") == 0
    assert "missing.nii.gz" in done.stderr
    assert done.stdout == ""
    debug = subprocess.run(
        [sys.executable, "-m", "medseg.cli", "--debug", "info", "missing.nii"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Traceback" in debug.stderr
    assert debug.returncode == 1


def test_info_json_is_the_contract(world: Path) -> None:
    found = json.loads(medseg_command("info", world / "series", "--json").stdout)
    (volume,) = found["volumes"]
    assert set(volume) == {"path", "series", "description", "modality", "shape", "spacing_mm", "affine", "quirks"}
    assert volume["shape"] == [20, 18, 14]
    assert volume["spacing_mm"] == pytest.approx([1.0, 1.2, 2.0])


def test_train_left_a_run_and_predict_uses_it(world: Path) -> None:
    out = world / "predicted"
    lines = medseg_command(
        "predict", world / "run", world / "series", "--out", out, "--to", "nifti,seg,rtstruct", "--device", "cpu"
    ).stdout.split()
    assert [Path(line).name for line in lines] == ["series.nii.gz", "series.seg.dcm", "series.rtstruct.dcm"]
    image = medseg.read(world / "series")
    nifti, seg, rt = (medseg.read_labels(line, like=image) for line in lines)
    for other in (seg, rt):
        for number, name in nifti.names.items():
            assert np.array_equal(nifti.mask(number), other.mask(name)), name
    assert (
        "must not exist"
        in medseg_command("predict", world / "run", world / "series", "--out", out, "--device", "cpu", code=1).stderr
    )


def test_predict_a_folder_of_files_and_evaluate_it(world: Path) -> None:
    out = world / "folder"
    medseg_command(
        "predict", world / "run", world / "set" / "images", "--out", out, "--probabilities", "--device", "cpu"
    )
    assert sorted(p.name for p in out.iterdir())[:2] == ["case0.nii.gz", "case0_probabilities.nii.gz"]
    for path in out.glob("*_probabilities.nii.gz"):
        path.rename(world / path.name)
    found = json.loads(medseg_command("evaluate", out, world / "set" / "labels", "--json").stdout)
    assert {r["structure"] for r in found["cases"]} == {"bright", "dark"}
    summary = {r["structure"]: r for r in found["summary"]}
    assert summary["bright"]["n_defined"] == 6
    low, high = summary["bright"]["dice"]["ci95"]
    assert 0.6 < low <= summary["bright"]["dice"]["mean"] <= high <= 1
    table = medseg_command("evaluate", out / "case0.nii.gz", world / "set" / "labels" / "case0.nii.gz").stdout
    assert "bright" in table


def test_seg_needs_a_dicom_series(world: Path) -> None:
    done = medseg_command(
        "predict", world / "run", world / "set" / "images" / "case0.nii.gz", "--out", world / "x", "--to", "seg", code=1
    )
    assert "input must be a DICOM series for --to seg" in done.stderr


def test_refine_writes_labels_on_the_grid_of_the_image(world: Path) -> None:
    image = world / "set" / "images" / "case1.nii.gz"
    medseg_command("predict", world / "run", image, "--out", world / "soft", "--probabilities", "--device", "cpu")
    out = world / "refined.nii.gz"
    medseg_command("refine", image, world / "soft" / "case1_probabilities.nii.gz", "--out", out, "--device", "cpu")
    assert medseg.read_labels(out).geometry.is_close(medseg.read(image).geometry)


def test_plan_and_check(world: Path) -> None:
    out = world / "made.json"
    text = medseg_command("plan", world / "set", "--out", out, "--device", "cpu").stdout
    assert "patch" in text
    assert json.loads(out.read_text())["format"] == 1
    assert json.loads(medseg_command("plan", world / "set", "--json", "--device", "cpu").stdout)["dims"] == 3
    checked = json.loads(medseg_command("check", world / "set", "--json").stdout)
    assert isinstance(checked, dict)


def test_import_is_light() -> None:
    code = "import sys, medseg; sys.exit('torch' in sys.modules or 'monai' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
