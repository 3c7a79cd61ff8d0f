"""The report of an evaluation and the command that writes it."""

from __future__ import annotations

import io
import re
import sys
from dataclasses import replace

import numpy as np
import pytest
from conftest import rotation
from dicom_source import GRIDS, write_source
from PIL import Image

from medseg import cli
from medseg.distribution import distribution_picture
from medseg.evaluation import Lesions, evaluate
from medseg.io import write
from medseg.report_evaluation import report_of_evaluation
from medseg.scores import FILES
from medseg.statistics import compare_runs
from medseg.volume import Geometry, LabelMap, Structure, Volume

GRID = Geometry.from_parts((16, 12, 9), (0.8, 1.1, 3.0), (-20, 30, 5), rotation((0.2, -0.3, 0.1)))


@pytest.fixture
def folders(tmp_path):
    """Four cases, shifted by their number of voxels; the third prediction is broken, the fifth reference has none."""
    array = np.zeros(GRID.shape, np.uint8)
    array[2:8, 2:9, 1:5], array[2:8, 2:9, 6:8] = 1, 2
    labels = LabelMap(array, GRID, (Structure(1, "liver"), Structure(2, "<b>[red]spleen</b>")))
    for n in range(5):
        write(labels, tmp_path / "r" / f"case_{n}.nii.gz")
        write(Volume(array[None].astype(np.int16) * 100, GRID), tmp_path / "i" / f"case_{n}.nii.gz")
        if n < 4:
            write(replace(labels, array=np.roll(array, n, 0)), tmp_path / "p" / f"case_{n}.nii.gz")
    (tmp_path / "p" / "case_2.nii.gz").write_bytes(b"no image")
    return tmp_path


def test_report(folders):
    p, r = folders / "p", folders / "r"
    found = evaluate(p, r, lesions=True)
    report_of_evaluation(folders / "report.html", found, p, r, image=folders / "i",
                         comparison=compare_runs(found, {"the same": found}))  # fmt: skip
    page = (folders / "report.html").read_text()
    assert "<b>[red]spleen" not in page and "&lt;b&gt;[red]spleen" in page
    assert not re.search(r"(src|href)=\"(?!data:|#)", page)
    for part in ("Summary", "Failed cases", "Distribution", "Comparison", "Worst and median cases", "All cases"):
        assert f">{part}</h2>" in page
    assert "case_4" in page and "prediction must exist for every case" in page
    captions = re.findall(r"<figcaption>(case_\d), (.*?):", page)
    assert captions == [("case_3", "number 1 from the worst"), ("case_1", "number 2 from the worst"),
                        ("case_0", "number 3 from the worst")]  # fmt: skip
    with pytest.raises(FileExistsError):
        report_of_evaluation(folders / "report.html", found, p, r)


def test_lesions_in_rows(folders):
    found = evaluate(folders / "p", folders / "r", lesions=Lesions("overlap"))
    row = found.rows[0]
    assert (row["lesion_f1"], row["reference_lesions"], row["false_positives"]) == (1, 1, 0)
    assert found.mean("lesion_f1") == 1
    assert "lesion_f1" in found.to_pandas()
    assert "lesion_f1" not in evaluate(folders / "p", folders / "r").to_pandas()


def test_volume_difference():
    array = np.zeros(GRID.shape, np.uint8)
    array[2:6] = 1
    reference = LabelMap(array, GRID, (Structure(1, "a"),))
    (row,) = evaluate(replace(reference, array=np.where(np.arange(16)[:, None, None] < 5, array, 0)), reference).rows
    assert row["volume_difference_mm3"] == pytest.approx(-12 * 9 * 0.8 * 1.1 * 3.0)
    assert row["volume_difference"] == pytest.approx(-0.25)


def test_command_writes_everything_and_says_what_failed(folders, monkeypatch, capsys):
    def run(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["medseg", "evaluate", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return int(stop.value.code or 0)

    p, r, out = folders / "p", folders / "r", folders / "out"
    assert run(p, r, "--out", out, "--image", folders / "i", "--compare", r, "--lesions") == 1
    assert {f.name for f in out.iterdir()} == {*FILES, "report.html"}
    text = capsys.readouterr()
    assert "[red]spleen" in text.out
    assert "case_2: " in text.err and "case_4: prediction must exist" in text.err
    assert run(p / "case_1.nii.gz", r / "case_1.nii.gz") == 0
    assert run(p, r, "--out", out) == 1  # exists
    assert run(p / "case_1.nii.gz", r / "case_1.nii.gz", "--out", out, "--force") == 0


def test_scans_of_a_report(folders, caplog):
    """An image that cannot be had leaves the report; the series of a case alone is a folder of another name."""
    p, r = folders / "p" / "case_1.nii.gz", folders / "r" / "case_1.nii.gz"
    found = evaluate(p, r)

    def broken(case: str) -> Volume:
        raise ValueError(f"no scan of {case}")

    sizes = []
    series = write_source(folders / "scan", GRID)
    for image in (None, broken, series):
        report_of_evaluation(folders / "report.html", found, p, r, image=image, force=True)
        sizes.append(len((folders / "report.html").read_text()))
    assert "scan of case case_1 is left out of the report: no scan of case_1" in caplog.text
    assert sizes[0] == sizes[1] != sizes[2]
    assert "series" not in caplog.text


def test_the_report_says_what_it_does_not_draw(tmp_path):
    array = np.zeros(GRID.shape, np.uint8)
    array[:, :3, 0] = 1 + np.arange(48).reshape(16, 3)
    labels = LabelMap(array, GRID)
    found = evaluate(labels, labels, structures=range(1, 42), surface=False)
    report_of_evaluation(tmp_path / "report.html", found, labels, labels)
    assert "The first 40 of 41 structures." in (tmp_path / "report.html").read_text()


def test_points_lie_at_their_values():
    rows = [{"case": str(n), "structure": "a", "dice": v} for n, v in enumerate((0.0, 1.0))]
    picture = np.asarray(Image.open(io.BytesIO(distribution_picture(rows, {"dice": "Dice"}, {"a": (255, 0, 0)}))))
    red = np.flatnonzero(((picture[..., 0] > 200) & (picture[..., 1] < 120) & (picture[..., 3] > 60)).any(axis=0))
    assert red[-1] - red[0] > 0.6 * picture.shape[1]
    assert picture[2, 2, 3] == 0


def test_dicom_objects_against_nifti(tmp_path):
    grid = GRIDS["oblique"]
    source = write_source(tmp_path / "scan", grid)
    array = np.zeros(grid.shape, np.uint8)
    array[3:10, 4:15, 1:5] = 1
    labels = LabelMap(array, grid, (Structure(1, "liver"),))
    write(labels, tmp_path / "r" / "one.nii.gz")
    write(labels, tmp_path / "r" / "two.nii.gz")
    write(labels, tmp_path / "p" / "one.seg.dcm", source=source)
    write(labels, tmp_path / "p" / "two.rtstruct.dcm", source=source)
    found = evaluate(tmp_path / "p", tmp_path / "r")
    assert [row["error"] for row in found.failed] == []
    assert [(row["case"], row["structure"], row["dice"]) for row in found.rows] == [
        ("one", "liver", 1), ("two", "liver", 1)
    ]  # fmt: skip
    assert evaluate(tmp_path / "p" / "one.seg.dcm", tmp_path / "r" / "one.nii.gz").mean("dice") == 1
    seg, contours = tmp_path / "p" / "one.seg.dcm", tmp_path / "p" / "two.rtstruct.dcm"
    for pair in ((seg, contours), (contours, seg)):  # both on the grid of the one that has a grid
        assert [(row["structure"], row["dice"]) for row in evaluate(*pair).rows] == [("liver", 1)]
    with pytest.raises(ValueError, match="grid of an RTSTRUCT must be given"):
        evaluate(contours, contours)
