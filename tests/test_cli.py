"""The command line as a user calls it."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import tiny
from rich.console import Console

import medseg
from medseg import cli
from medseg.io.dicom_write import write_series


def medseg_command(*arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run a command in this process (a new one takes seconds to import all) and check its exit code."""
    out, err = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(), redirect_stdout(out), redirect_stderr(err),
        pytest.raises(SystemExit) as leaving,
    ):  # fmt: skip
        patch.setattr(sys, "argv", ["medseg", *map(str, arguments)])
        cli.main()
    done = subprocess.CompletedProcess(arguments, int(leaving.value.code or 0), out.getvalue(), err.getvalue())
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
        "train", root / "set", "--out", root / "run", "--epochs", 12, "--folds", 3, "--learning-rate", 0.01,
        "--plan", root / "plan.json", "--precision", "32-true", "--device", "cpu",
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


def test_refine_writes_numbers_and_names_on_the_grid_of_the_image(world: Path) -> None:
    image = world / "set" / "images" / "case1.nii.gz"
    medseg_command("predict", world / "run", image, "--out", world / "soft", "--probabilities", "--device", "cpu")
    out = world / "refined.nii.gz"
    medseg_command("refine", image, world / "soft" / "case1_probabilities.nii.gz", "--out", out, "--device", "cpu")
    refined, predicted = medseg.read_labels(out), medseg.read_labels(world / "soft" / "case1.nii.gz")
    assert refined.geometry.is_close(medseg.read(image).geometry)
    assert set(np.unique(refined.array)) == {0, 2, 5}
    assert refined.structures == predicted.structures
    assert refined.names == {2: "bright", 5: "dark"}
    assert (refined.array == predicted.array).mean() > 0.95


def test_refine_fit_stores_a_choice_that_predict_follows_and_says(
    world: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "medseg")
    image = world / "set" / "images" / "case2.nii.gz"
    common = ("predict", world / "run", image, "--device", "cpu")
    medseg_command(*common, "--crf", "--out", world / "unfitted")
    assert "gentle defaults that nothing was fitted for" in caplog.text
    done = medseg_command("refine", "--fit", world / "run", "--device", "cpu", "--cases", 2)
    assert "the CRF is not used: 2 validation cases of 2 patients cannot show a gain" in done.stdout
    assert done.stdout.split()[-1] == str(world / "run" / "crf.json")
    medseg_command(*common, "--crf", "--out", world / "chosen")
    assert "the CRF is not used: 2 validation cases" in caplog.text
    medseg_command(*common, "--out", world / "plain")
    chosen, plain = (medseg.read_labels(world / name / "case2.nii.gz") for name in ("chosen", "plain"))
    assert np.array_equal(chosen.array, plain.array)
    record = json.loads((world / "run" / "crf.json").read_text())
    record["settings"] = {"gaussian_weight": 2.0, "bilateral_weight": 0.0}  # as a fit on more cases might have found
    (world / "run" / "crf.json").write_text(json.dumps(record))
    medseg_command(*common, "--crf", "--out", world / "used")
    assert "the CRF is used: 2 validation cases" in caplog.text
    (world / "run" / "crf.json").unlink()


def test_predict_goes_on_after_a_damaged_file_and_says_which(world: Path, tmp_path: Path) -> None:
    good, bad = tmp_path / "in" / "good_0000.nii.gz", tmp_path / "in" / "bad_0000.nii.gz"
    good.parent.mkdir()
    shutil.copy(world / "set" / "images" / "case0.nii.gz", good)
    bad.write_bytes(good.read_bytes()[:3000])
    done = medseg_command("predict", world / "run", bad.parent, "--out", tmp_path / "out", "--device", "cpu", code=1)
    assert done.stdout.split() == [str(tmp_path / "out" / "good.nii.gz")]
    assert done.stderr.strip().startswith("medseg: error: file must be whole")
    assert str(bad) in done.stderr
    assert done.stderr.strip().count("\n") == 0
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["good.nii.gz"]


def test_predict_refuses_with_one_line(world: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    image = world / "set" / "images" / "case0.nii.gz"
    for arguments, message in (
        ((tmp_path / "empty", "--out", tmp_path / "o"), "input folder must hold images, got no file"),
        ((image, "--out", tmp_path / "file"), "output must go into a folder, got the file"),
        ((image, "--out", tmp_path / "o", "--series", "1.2"), "series must be given for DICOM only"),
    ):
        done = medseg_command("predict", world / "run", *arguments, "--device", "cpu", code=1)
        assert message in done.stderr
        assert done.stderr.strip().count("\n") == 0
    assert not (tmp_path / "o").exists()


def test_predict_takes_one_series_of_a_folder(world: Path, tmp_path: Path) -> None:
    two = tmp_path / "study"
    for seed in (50, 51):
        write_series(tiny.case(seed)[0], two / str(seed), description=f"scan {seed}", modality="MR")
    wanted = medseg.read(two / "51").meta["series_uid"]
    common = ("predict", world / "run", two, "--device", "cpu", "--to", "nifti,seg")
    done = medseg_command(*common, "--out", tmp_path / "none", code=1)
    assert str(two) in done.stderr
    medseg_command(*common, "--out", tmp_path / "one", "--series", wanted)
    found = medseg.read_labels(tmp_path / "one" / "study.nii.gz")
    assert found.geometry.is_close(medseg.read(two / "51").geometry)
    seg = medseg.read_labels(tmp_path / "one" / "study.seg.dcm", like=found.geometry)
    assert np.array_equal(seg.mask("bright"), found.mask("bright"))


def test_plan_and_check(world: Path) -> None:
    out = world / "made.json"
    text = medseg_command("plan", world / "set", "--out", out, "--device", "cpu").stdout
    assert "patch" in text
    assert json.loads(out.read_text())["format"] == 1
    assert json.loads(medseg_command("plan", world / "set", "--json", "--device", "cpu").stdout)["dims"] == 3
    for fold in (7, -1):
        done = medseg_command("plan", world / "set", "--fold", fold, "--device", "cpu", code=1)
        assert f"fold must be 0 to 4, got {fold}" in done.stderr
    medseg_command("plan", world / "set", "--fold", 1, "--folds", 2, "--device", "cpu")
    checked = json.loads(medseg_command("check", world / "set", "--json").stdout)
    assert isinstance(checked, dict)


def test_import_is_light() -> None:
    code = "import sys, medseg; sys.exit('torch' in sys.modules or 'monai' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_comparison_is_in_the_json(world: Path, tmp_path: Path) -> None:
    for n in range(4):
        _, labels = tiny.case(n)
        medseg.write(labels, tmp_path / "reference" / f"c{n}.nii.gz")
        medseg.write(labels, tmp_path / "right" / f"c{n}.nii.gz")
        worse = medseg.LabelMap(np.roll(labels.array, n + 1, 1), labels.geometry, labels.structures)
        medseg.write(worse, tmp_path / "wrong" / f"c{n}.nii.gz")
    common = ("evaluate", tmp_path / "right", tmp_path / "reference", "--json")
    alone = json.loads(medseg_command(*common).stdout)
    both = json.loads(medseg_command(*common, "--compare", tmp_path / "wrong").stdout)
    assert {key: both[key] for key in ("cases", "settings", "summary")} == alone
    wrong = json.loads(medseg_command("evaluate", tmp_path / "wrong", tmp_path / "reference", "--json").stdout)
    assert {row["metric"] for row in both["comparison"]} == {"dice", "nsd", "hd95_mm"}
    for row in both["comparison"]:
        values = [r[row["metric"]] for r in wrong["cases"] if r["structure"] == row["structure"]]
        assert row["first"] == pytest.approx(np.mean(values))
        assert row["second"] == (0 if row["metric"] == "hd95_mm" else 1)
        assert row["better"] == row["n"] == 4


def test_a_closed_pipe_is_quiet(world: Path) -> None:
    for arguments in (("check", world / "set", "--json"), ("info", world / "series"), ("--help",)):
        command = subprocess.Popen(
            [sys.executable, "-m", "medseg.cli", *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        assert command.stdout is not None
        assert command.stderr is not None
        command.stdout.close()  # before the first word: no reader at all
        assert command.stderr.read() in (b"", b"\n")  # a bar that was drawn and wiped
        assert command.wait() == 1
        command.stderr.close()


def test_ctrl_c_is_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def stopped() -> None:
        """Stop."""
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, "info", stopped)
    monkeypatch.setattr(sys, "argv", ["medseg", "info"])
    monkeypatch.setattr(cli.show, "ERR", Console(stderr=True))
    with pytest.raises(SystemExit) as leaving:
        cli.main()
    assert leaving.value.code == 130
    assert "stopped" in capsys.readouterr().err
