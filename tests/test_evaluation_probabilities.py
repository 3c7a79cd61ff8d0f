"""Evaluation of probabilities: where they are found, what their channels mean, what is said when they cannot be used."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from evaluated import GRID, STRUCTURES, evaluate_json, medseg_command, moved, truth, write_folders
from sklearn.metrics import brier_score_loss

import medseg
from medseg import case_reading, report_cases
from medseg.evaluation import evaluate
from medseg.io.dicom_write import write_series
from medseg.report_evaluation import report_of_evaluation
from medseg.volume import Geometry, LabelMap, Structure, Volume


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    return write_folders(tmp_path)


def soft(labels: LabelMap, named: bool = True) -> Volume:
    """Probabilities of the background and of both structures, right more often than not."""
    rng = np.random.default_rng(0)
    shape = labels.geometry.shape
    logits = np.stack([labels.array == k for k in (0, 1, 4)]) * 3 + rng.normal(0, 1, (3, *shape))
    shares = (np.exp(logits) / np.exp(logits).sum(0)).astype(np.float32)
    return Volume(shares, labels.geometry, {"structures": STRUCTURES} if named else {})


def brier(probabilities: Volume, reference: LabelMap) -> list[float]:
    """scikit-learn's Brier score of both structures."""
    return [
        brier_score_loss((reference.array == n).ravel(), np.asarray(probabilities.array[c], float).ravel())
        for c, n in enumerate((1, 4), 1)
    ]


def test_probabilities_from_files(folders):
    """Beside the label map or in its place, as predict writes them; against scikit-learn's Brier score."""
    rng, soft = np.random.default_rng(0), folders / "soft"
    for n in range(5):
        logits = np.stack([moved(truth(n), 1).array == k for k in (0, 1, 4)]) * 3 + rng.normal(0, 1, (3, *GRID.shape))
        shares = np.exp(logits) / np.exp(logits).sum(0)
        volume = Volume(shares.astype(np.float32), GRID, {"structures": STRUCTURES})
        for folder in (folders / "p", soft):
            medseg.write(volume, folder / f"case_{n}_probabilities.nii.gz")
    beside = evaluate_json(folders / "p", folders / "r")
    alone = evaluate_json(soft, folders / "r")
    assert {row["case"] for row in alone["cases"]} == {f"case_{n}" for n in range(5)}
    for a, b in zip(beside["cases"], alone["cases"], strict=True):
        assert [a[k] for k in ("soft_dice", "brier", "ece")] == [b[k] for k in ("soft_dice", "brier", "ece")]
    hard = np.array([0, 1, 4])[shares.argmax(0)]
    for row, channel in zip(alone["cases"][-2:], (1, 2), strict=True):
        true = (truth(4).array == row["label"]).ravel()
        p = shares[channel].astype(np.float32).ravel().astype(float)
        assert row["brier"] == pytest.approx(brier_score_loss(true, p), abs=1e-6)
        assert row["soft_dice"] == pytest.approx(2 * (p * true).sum() / ((p**2).sum() + true.sum()), abs=1e-5)
        a, b = hard == row["label"], truth(4).array == row["label"]
        assert row["dice"] == pytest.approx(2 * (a & b).sum() / (a.sum() + b.sum()))
    assert "soft_dice" not in evaluate(folders / "q", folders / "r").metrics
    one = evaluate_json(soft / "case_4_probabilities.nii.gz", folders / "r" / "case_4.nii.gz")
    assert one["cases"][0]["brier"] == alone["cases"][-2]["brier"]


@pytest.mark.parametrize("by", ["dataset.json", "structures", "option", "reference"])
@pytest.mark.parametrize("beside", [False, True])
def test_channels_without_names(folders, by, beside):
    """They are the structures that something else names, 1 and 4, not 1 and 2."""
    bare = by != "reference"
    arguments: list[str] = []
    for n in range(5):
        reference = LabelMap(truth(n).array, GRID, () if bare else STRUCTURES)
        medseg.write(reference, folders / "r" / f"case_{n}.nii.gz", force=True)
        medseg.write(soft(moved(truth(n), 1), False), folders / "s" / f"case_{n}_probabilities.nii.gz")
        if beside:
            medseg.write(LabelMap(moved(truth(n), 1).array, GRID), folders / "s" / f"case_{n}.nii.gz")
    declared = '{"labels": {"0": "air", "1": "liver", "4": "spleen"}}'
    if by == "dataset.json":
        (folders / "r" / "dataset.json").write_text(declared)
    elif by == "structures":
        arguments = ["--structures", "4=spleen,1=liver"]
    elif by == "option":
        (folders / "x").mkdir()
        (folders / "x" / "dataset.json").write_text(declared)
        arguments = ["--structures", str(folders / "x" / "dataset.json")]
    rows = evaluate_json(folders / "s", folders / "r", *arguments)["cases"]
    assert [(row["structure"], row["label"]) for row in rows] == [("liver", 1), ("spleen", 4)] * 5
    for n in range(5):
        want = brier(soft(moved(truth(n), 1)), truth(n))
        assert [row["brier"] for row in rows[2 * n : 2 * n + 2]] == pytest.approx(want, abs=1e-6)
        assert all(row["dice"] > 0.5 for row in rows[2 * n : 2 * n + 2])


def blocks(numbers: tuple[int, int, int], names: dict[int, str]) -> LabelMap:
    """Three blocks of these numbers (0: none)."""
    array = np.zeros(GRID.shape, np.uint8)
    for start, number in zip((2, 9, 16), numbers, strict=True):
        array[start : start + 5, 2:9, 2:6] = number
    return LabelMap(array, GRID, tuple(Structure(n, name) for n, name in names.items()))


def test_probabilities_belong_to_the_structure_they_are_of(tmp_path):
    """Whatever numbers these have, and whether or not the label map lists those that it has no voxel of."""
    prediction = blocks((1, 0, 3), {1: "spleen", 3: "cyst"})
    reference = blocks((2, 1, 0), {1: "liver", 2: "spleen", 3: "kidney"})
    shares = np.stack([prediction.array == n for n in (0, 1, 2, 3)]) * np.float32(0.6) + np.float32(0.1)
    structures = (Structure(1, "spleen"), Structure(2, "tumour"), Structure(3, "cyst"))
    medseg.write(prediction, tmp_path / "p.nii.gz")
    medseg.write(reference, tmp_path / "r.nii.gz")
    medseg.write(Volume(shares, GRID, {"structures": structures}), tmp_path / "p_probabilities.nii.gz")
    rows = {row["structure"]: row for row in evaluate(tmp_path / "p.nii.gz", tmp_path / "r.nii.gz").rows}
    assert (rows["spleen"]["dice"], rows["cyst"]["dice"]) == (1, 0)
    for name, channel, number in (("spleen", 1, 2), ("cyst", 3, 99)):
        want = brier_score_loss(
            (reference.array == number).ravel(), shares[channel].ravel().astype(float), labels=[0, 1]
        )
        assert rows[name]["brier"] == pytest.approx(want, abs=1e-6), name
    assert not {"tumour", "kidney"} & {name for name, row in rows.items() if np.isfinite(row.get("brier", np.nan))}


def test_channels_are_named_by_the_label_map_beside_them(tmp_path):
    """Before the reference, which numbers the same structures in another order."""
    prediction = blocks((1, 2, 0), {1: "spleen", 2: "liver"})
    reference = blocks((2, 1, 0), {1: "liver", 2: "spleen"})
    shares = np.stack([prediction.array == n for n in (0, 1, 2)]) * np.float32(0.6) + np.float32(0.2)
    medseg.write(prediction, tmp_path / "p.nii.gz")
    medseg.write(reference, tmp_path / "r.nii.gz")
    medseg.write(Volume(shares, GRID), tmp_path / "p_probabilities.nii.gz")
    for row in evaluate(tmp_path / "p.nii.gz", tmp_path / "r.nii.gz").rows:
        assert (row["dice"], row["brier"]) == pytest.approx((1, 0.04), abs=1e-6)


@pytest.mark.parametrize("by", ["dataset.json", "structures"])
def test_pictures_show_the_channels_as_they_were_scored(tmp_path, monkeypatch, by):
    shown: list[LabelMap] = []
    drawn = report_cases.planes_picture
    monkeypatch.setattr(
        report_cases, "planes_picture", lambda scan, p, r, **k: (shown.append(p), drawn(scan, p, r, **k))[1]
    )
    reference = LabelMap(truth(0).array, GRID)
    p, r = tmp_path / "p" / "a_probabilities.nii.gz", tmp_path / "r" / "a.nii.gz"
    medseg.write(soft(truth(0), False), p)
    medseg.write(reference, r)
    names = {1: "liver", 4: "spleen"}
    if by == "dataset.json":
        (tmp_path / "r" / "dataset.json").write_text('{"labels": {"0": "air", "1": "liver", "4": "spleen"}}')
    found = evaluate(p, r, structures=names if by == "structures" else None, surface=False)
    report_of_evaluation(tmp_path / "report.html", found, p, r)
    (labels,) = shown
    assert labels.names == names
    assert [row["dice"] for row in found.rows] == pytest.approx([
        2 * (labels.mask(n) & (reference.array == n)).sum() / (labels.mask(n).sum() + (reference.array == n).sum())
        for n in names
    ])  # fmt: skip


def test_channels_that_nothing_names_are_numbered(folders):
    """Names that are not as many as the channels do not fit."""
    medseg.write(soft(truth(0), False), folders / "a_probabilities.nii.gz")
    bare = LabelMap(truth(0).array, GRID)
    for more in ({}, {"structures": {1: "x", 4: "y", 5: "z"}}):
        rows = evaluate(folders / "a_probabilities.nii.gz", bare, surface=False, **more).rows
        scored = {row["label"]: row["dice"] for row in rows if np.isfinite(row["dice"])}
        assert scored[1] > 0.5 and scored[4] == 0


def test_probabilities_beside_masks_and_dicom(tmp_path):
    grid = Geometry.from_parts((24, 19, 9), (0.9, 1.3, 3.0), (-20, 30, 5), np.diag([-1.0, -1.0, 1.0]))
    write_series(Volume(np.zeros((1, *grid.shape), np.int16), grid), tmp_path / "series", modality="CT")
    series = medseg.read(tmp_path / "series")
    reference = replace(truth(1), geometry=series.geometry)
    prediction = moved(reference, 1)
    medseg.write(reference, tmp_path / "r" / "a.nii.gz")
    medseg.write(soft(prediction), tmp_path / "p" / "a_probabilities.nii.gz")
    want = brier(soft(prediction), reference)
    for name in ("a.rtstruct.dcm", "a.seg.dcm", "a.nrrd"):  # each comes before the last
        medseg.write(prediction, tmp_path / "p" / name, source=tmp_path / "series")
        rows = evaluate(tmp_path / "p", tmp_path / "r", surface=False).rows
        assert [row["brier"] for row in rows] == pytest.approx(want, abs=1e-6), name
    medseg.convert(tmp_path / "p" / "a.nrrd", f"{tmp_path}/m/a/", labels=True, split=True)
    medseg.write(soft(prediction), tmp_path / "m" / "a_probabilities.nii.gz")
    for pair in ((tmp_path / "m", tmp_path / "r"), (tmp_path / "m" / "a", tmp_path / "r" / "a.nii.gz")):
        assert [row["brier"] for row in evaluate(*pair, surface=False).rows] == pytest.approx(want, abs=1e-6)


def test_probabilities_that_cannot_be_used_leave_the_case(folders):
    """On another grid, damaged or no probabilities: a reason beside the scores of the label map."""
    shifted = Geometry.from_parts(GRID.shape, GRID.spacing, (-20, 30, 6.5), GRID.direction)
    names = [folders / "p" / f"case_{n}_probabilities.nii.gz" for n in range(4)]
    medseg.write(replace(soft(truth(0)), geometry=shifted), names[0])
    names[1].write_bytes(b"no image")
    medseg.write(Volume(np.full((3, *GRID.shape), 7, np.float32), GRID), names[2])
    medseg.write(soft(truth(3)), names[3])
    found = evaluate(folders / "p", folders / "r")
    assert not found.failed
    assert all(np.isfinite(row["dice"]) for row in found.rows)
    assert sorted(found.notes) == ["case_0", "case_1", "case_2"]
    assert "1.500 mm apart" in found.notes["case_0"]
    assert "probabilities must be floats of 0 to 1" in found.notes["case_2"]
    assert [row["case"] for row in found.rows if np.isfinite(row.get("brier", np.nan))] == ["case_3"] * 2
    assert "note" in found.to_pandas()
    _, error = medseg_command("evaluate", folders / "p", folders / "r", "--out", folders / "out")
    assert "case_0: scored without probabilities: prediction and reference" in error
    assert "Scored in part" in (folders / "out" / "report.html").read_text()
    again = evaluate(folders / "p", folders / "r", resample=True)
    assert sorted(again.notes) == ["case_1", "case_2"]
    assert again.rows[0]["soft_dice"] < found.rows[-4]["soft_dice"]
    assert again.rows[0]["brier"] < 0.25


def test_each_file_is_decoded_once(folders, monkeypatch):
    """Of probabilities, too; the report reads the label maps of four cases again, whatever their number."""
    decoded: list[str] = []
    for name in ("read", "read_labels"):
        original = getattr(case_reading, name)

        def counted(path, *more, original=original, **options):
            decoded.append(str(path))
            return original(path, *more, **options)

        monkeypatch.setattr(case_reading, name, counted)
    for n in range(8):
        medseg.write(truth(n), folders / "t" / f"case_{n}.nii.gz")
        medseg.write(soft(moved(truth(n), n)), folders / "s" / f"case_{n}_probabilities.nii.gz")
    found = evaluate(folders / "s", folders / "t", surface=False)
    assert len(decoded) == len(set(decoded)) == 16
    decoded.clear()
    medseg.report_evaluation.report_of_evaluation(folders / "x.html", found, folders / "s", folders / "t")
    assert len(decoded) == 2 * 4
    decoded.clear()
    for n in range(8):
        medseg.write(moved(truth(n), n), folders / "s" / f"case_{n}.nii.gz")
    evaluate(folders / "s", folders / "t", surface=False)
    assert len(decoded) == len(set(decoded)) == 24


def test_the_report_tells_of_probabilities(folders):
    for n in range(5):
        medseg.write(soft(moved(truth(n), 1)), folders / "p" / f"case_{n}_probabilities.nii.gz")
    medseg_command("evaluate", folders / "p", folders / "r", "--out", folders / "out")
    page = (folders / "out" / "report.html").read_text()
    for column in ("soft Dice", "Brier score", "expected calibration error", "precision", "recall"):
        assert f">{column}</th>" in page
    assert "volume difference (ml)" in page


def test_single_channel_and_overlapping_probabilities(folders):
    """One channel is that of a structure; as many channels as structures are layers, without a background."""
    liver = truth(0).array == 1
    one = Volume(np.where(liver, 0.8, 0.1).astype(np.float32)[None], GRID)
    medseg.write(one, folders / "one.nii.gz")
    reference = LabelMap(liver.astype(np.uint8), GRID, STRUCTURES[:1])
    (row,) = evaluate(folders / "one.nii.gz", reference, surface=False).rows
    assert (row["structure"], row["dice"]) == ("liver", 1)
    assert row["brier"] == pytest.approx((0.04 * liver.mean() + 0.01 * (1 - liver.mean())), rel=1e-4)
    layers = np.stack([liver, np.roll(liver, 2, 0)])
    structures = (Structure(1, "liver"), Structure(2, "half"))
    both = LabelMap(np.where(layers, 0.7, 0.2).astype(np.float32), GRID, structures)
    medseg.write(both, folders / "b_probabilities.nii.gz")
    rows = evaluate(folders / "b_probabilities.nii.gz", LabelMap(layers, GRID, structures), surface=False).rows
    assert [row["dice"] for row in rows] == [1, 1]
    assert rows[1]["soft_dice"] == pytest.approx(
        2 * 0.7 * layers[1].sum() / (0.49 * layers[1].sum() + 0.04 * (~layers[1]).sum() + layers[1].sum()), rel=1e-4
    )
