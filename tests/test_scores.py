"""The table of an evaluation: summary, intervals, files."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
from test_evaluation import label_map

from medseg.evaluation import Evaluation, evaluate


def rows_of(values: dict[str, list[float]]) -> Evaluation:
    return Evaluation(
        tuple(
            {"case": str(n), "structure": name, "label": s, "iou": v, "dice": v}
            for s, (name, column) in enumerate(values.items(), 1)
            for n, v in enumerate(column)
        )
    )


def test_summary_means_and_intervals():
    rng = np.random.default_rng(0)
    a, b = rng.normal(0.8, 0.1, 60), rng.normal(0.5, 0.1, 60)
    b[40:] = np.nan
    summary = rows_of({"a": a.tolist(), "b": b.tolist()}).summary
    assert [e["structure"] for e in summary] == ["a", "b", "mean"]
    assert [e["n_defined"] for e in summary] == [60, 40, 60]
    assert summary[0]["iou"]["mean"] == pytest.approx(a.mean())
    assert summary[1]["iou"]["mean"] == pytest.approx(np.nanmean(b))
    assert summary[2]["iou"]["mean"] == pytest.approx((a.mean() + np.nanmean(b)) / 2)
    for e, values in zip(summary, (a, b[:40]), strict=False):  # the bootstrap tends to the normal interval
        half = 1.96 * values.std() / np.sqrt(len(values))
        assert e["iou"]["ci95"] == pytest.approx([values.mean() - half, values.mean() + half], abs=0.004)
    assert rows_of({"a": a.tolist()}).summary[0]["iou"]["ci95"] == pytest.approx(
        summary[0]["iou"]["ci95"]
    )  # fixed seed


def test_one_case_has_no_interval():
    entry = rows_of({"a": [0.7]}).summary[0]
    assert entry["iou"]["mean"] == 0.7
    assert np.isnan(entry["iou"]["ci95"]).all()


def test_json_csv_and_tables(tmp_path):
    p, r = ({f"case_{n}": label_map(n + seed) for n in range(5)} for seed in (0, 10))
    del p["case_4"]
    result = evaluate(p, r)
    result.write(tmp_path / "out")
    data = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert sorted(data) == ["cases", "settings", "summary"]
    assert data["settings"] == {
        "surface": "voxel", "missing": "diagonal", "tolerance_mm": 1.0, "labels_present": False, "resample": False,
        "common_only": False,
    }  # fmt: skip
    again = Evaluation.from_json(result.to_json())
    assert (again.to_json(), repr(again)) == (result.to_json(), repr(result))
    assert {"case", "structure", "iou", "dice", "hd95_mm", "nsd", "volume_mm3", "reference_volume_mm3"} <= set(
        data["cases"][0]
    )
    assert data["cases"][-1]["iou"] is None
    assert data["cases"][-1]["error"].startswith("prediction must exist")
    entry = data["summary"][-1]
    assert (entry["structure"], entry["n_defined"]) == ("mean", 4)
    assert entry["iou"]["mean"] == pytest.approx(result.mean("iou"))
    assert len(entry["dice"]["ci95"]) == 2
    with (tmp_path / "out" / "metrics.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert float(table[0]["dice"]) == pytest.approx(result.rows[0]["dice"])
    assert table[-1]["dice"] == ""
    with pytest.raises(FileExistsError):
        result.write(tmp_path / "out")
    result.write(tmp_path / "out", force=True)
    frame = result.to_pandas()
    assert frame["iou"].mean() == pytest.approx(np.nanmean([row["iou"] for row in result.rows]))
    html = result._repr_html_()
    assert "Anterior" in html
    assert "case_4" in html
    assert repr(result).startswith("Evaluation(4 cases, 1 failed, mean iou 0.")
    with pytest.raises(ValueError, match="metric must be one of"):
        result.mean("accuracy")


def test_nothing_scored_is_still_a_table():
    result = Evaluation(({"case": "a", "structure": "", "error": "no"},))
    assert result.summary[0]["n"] == 0
    assert json.loads(result.to_json())["summary"][0]["iou"]["mean"] is None
