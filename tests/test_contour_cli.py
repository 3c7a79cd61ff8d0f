"""medseg contour: files in and out on the command line, with a tiny model in place of a checkpoint."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import rotation
from promptable import Bright, phantom

import medseg
import medseg.prompt
from medseg.cli import main
from medseg.volume import Geometry, Volume

GRID = Geometry.from_parts((36, 30, 14), (1.5, 1.8, 4.0), (-20, 15, 300), rotation((0.1, 0.05, -0.1)))


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):  # type: ignore[no-untyped-def]
    """Run a command; gives exit code, stdout and stderr."""
    monkeypatch.setattr(medseg.prompt, "load_promptable", lambda name, checkpoint: Bright())

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["medseg", "contour", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        out, err = capsys.readouterr()
        return int(stopped.value.code or 0), out, err

    return call


@pytest.fixture
def scan(tmp_path: Path) -> tuple[Path, np.ndarray, np.ndarray]:
    image, one, two = phantom(GRID)
    medseg.write(image, tmp_path / "ct.nii.gz")
    return tmp_path / "ct.nii.gz", one, two


def flat(mask: np.ndarray) -> str:
    n = int(mask.sum((0, 1)).argmax())
    i, j = np.nonzero(mask[:, :, n])
    return f"{i.min()},{j.min()},{n},{i.max()},{j.max()},{n}"


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return 2 * float((a & b).sum()) / float(a.sum() + b.sum())


def test_boxes_to_nifti_and_again_from_the_log(run, scan, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    path, one, two = scan
    out = tmp_path / "out.nii.gz"
    code, said, err = run(
        path, "--out", out, "--box", f"liver={flat(one)}", "--box", flat(two), "--window", "soft-tissue", "--json"
    )
    assert code == 0, err
    told = json.loads(said)
    assert [s["structure"] for s in told["structures"]] == ["liver", "structure 2"] and "soft-tissue" in err
    labels = medseg.read_labels(out, path)
    assert dice(labels.mask(1), one) > 0.9 and dice(labels.mask(2), two) > 0.9
    again = tmp_path / "again.nii.gz"
    log = tmp_path / "out.prompts.json"
    code, said, err = run(path, "--out", again, "--replay", log, "--window", "soft-tissue")
    assert code == 0 and said.split() == [str(again), str(tmp_path / "again.prompts.json")], err
    assert np.array_equal(medseg.read_labels(again).array, labels.array)
    code, _, err = run(path, "--out", out, "--replay", log)
    assert code == 1 and "must not exist" in err


@pytest.mark.parametrize("suffix", [".seg.dcm", ".rtstruct.dcm"])
def test_dicom_in_and_out(run, tmp_path: Path, suffix: str) -> None:  # type: ignore[no-untyped-def]
    image, one, _ = phantom(GRID)
    medseg.write(image, tmp_path / "series/")
    series = medseg.read(tmp_path / "series")
    assert series.modality == "CT"
    world = GRID.to_world(np.argwhere(one))
    at = np.round(series.geometry.to_index(world)).astype(int)
    mask = np.zeros(series.geometry.shape, bool)
    mask[tuple(at.T)] = True
    out = tmp_path / f"organ{suffix}"
    code, _, err = run(tmp_path / "series", "--out", out, "--box", f"organ={flat(mask)}")
    assert code == 0, err
    found = medseg.read_labels(out, like=tmp_path / "series")
    assert found.names[1] == "organ" and dice(found.mask("organ"), mask) > 0.9
    assert (tmp_path / "organ.prompts.json").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--box", "1,2,3,99,9,9"], 1, "must lie in the image"),
        (["--box", "9,2,3,1,9,9"], 1, "x0 <= x1"),
        (["--box", "1,2,3,1,2,9"], 1, "empty"),
        (["--box=-15,25,310,5,40,340"], 1, "lie there in mm"),
        (["--box", "1,2,3,4,five,6"], 1, "numbers separated by commas"),
        (["--point", "3,3,3"], 1, "draw a box"),
        (["--box", "5,5,5,9,9,5", "--window", "kidney"], 1, "window must be one of"),
        (["--box", "5,5,5,9,9,5", "--axis", "oblique"], 1, "axis must be"),
        (["--box", "5,5,5,9,9,5", "--cache-size", "much"], 1, "cache size must be"),
        ([], 2, "is needed"),
    ],
)
def test_bad_usage(run, scan, tmp_path: Path, arguments: list[str], code: int, message: str) -> None:  # type: ignore[no-untyped-def]
    found, _, err = run(scan[0], "--out", tmp_path / "out.nii.gz", *arguments)
    assert found == code and message in " ".join(err.split()) and "Traceback" not in err
    assert not (tmp_path / "out.nii.gz").exists() and not (tmp_path / "out.prompts.json").exists()


def test_bad_images_and_places(run, scan, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    path, one, _ = scan
    voxels = np.array(medseg.read(path).array, np.float32)
    voxels[0, 1, 1, 1] = np.nan
    medseg.write(Volume(voxels, GRID), tmp_path / "nan.nii.gz")
    code, _, err = run(tmp_path / "nan.nii.gz", "--out", tmp_path / "out.nii.gz", "--box", flat(one))
    assert code == 1 and "finite" in err
    (tmp_path / "taken").write_text("")
    code, _, err = run(path, "--out", tmp_path / "out.nii.gz", "--box", flat(one), "--cache", tmp_path / "taken")
    assert code == 1 and "cache must be a folder" in err
    code, _, err = run(path, "--out", tmp_path / "out.seg.dcm", "--box", flat(one))
    assert code == 1 and "must be a DICOM series" in err
    code, _, err = run(path, "--out", tmp_path / "out.nii.gz", "--replay", tmp_path / "none.json")
    assert code == 1 and "log must exist" in err
