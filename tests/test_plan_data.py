"""Real data sets of many kinds, each planned from its folder or from the CSV that a user would write."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

import medseg
from medseg.plan import make_plan, united


@pytest.fixture(autouse=True)
def no_trial_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(medseg.plan, "fastest_precision", lambda plan, device: ("32-true", "", math.nan))


def listed(folder: Path, header: str, *rows: tuple[str | Path, ...]) -> medseg.data.Dataset:
    path = folder / "cases.csv"
    path.write_text("\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\n")
    return medseg.load_dataset(path)


def test_hippocampus(data_dir: Path) -> None:
    """nnU-Net's own patch for it, and normalisation that maxima of 10^6 do not spoil."""
    dataset = medseg.load_dataset(data_dir / "hippocampus")
    plan = make_plan(dataset, dataset.cases[::10])
    assert (plan.model, plan.patch, plan.spacing) == ("unet3d", (40, 56, 40), (1.0, 1.0, 1.0))
    assert plan.channels[0].scheme == "zscore"
    assert [s.name for s in plan.structures] == ["Anterior", "Posterior"]


def test_openkbp(data_dir: Path) -> None:
    """CT by its values, partial labels, parotids in a pair, slices of 2 to 3 mm between wider voxels."""
    dataset = medseg.load_dataset(data_dir / "openkbp")
    plan = make_plan(dataset, dataset.cases[:12])
    assert plan.channels[0].scheme == "ct"
    assert -1000 <= plan.channels[0].low < 0 < 1000 < plan.channels[0].high
    assert plan.swaps == ((4, 3),)
    assert plan.orientation is not None and plan.orientation[plan.mirror[0]] == "R"
    assert "unknown in" in plan.reasons["structures"]
    assert len(plan.structures) == 7


def test_four_channels_of_one_patient(data_dir: Path, tmp_path: Path) -> None:
    images = [data_dir / "ms_lesions" / f"patient07_{name}.nii.gz" for name in ("FLAIR", "T1", "T2", "T1POST")]
    dataset = listed(
        tmp_path, "case,image,image_2,image_3,image_4,label",
        ("p7", *images, data_dir / "ms_lesions" / "patient07_lesions.nii.gz"),
    )  # fmt: skip
    plan = make_plan(dataset, memory="4GB")
    assert (len(plan.channels), plan.dims) == (4, 3)
    assert "in about 37 pieces" in plan.reasons["structures"]


def test_thick_slices(data_dir: Path, tmp_path: Path) -> None:
    rows = [
        (c, data_dir / f"tumours_mr/{c}_image.nrrd", data_dir / f"tumours_mr/{c}_label.nrrd")
        for c in ("brain1", "brain2")
    ]
    plan = make_plan(listed(tmp_path, "case,image,label", *rows))
    assert plan.spacing == pytest.approx((0.7812, 0.7812, 6.5), abs=1e-3)
    assert plan.dims == 3
    assert plan.kernels[0] == (3, 3, 1)
    assert plan.strides[:2] == ((2, 2, 1), (2, 2, 1))


def test_spleen_and_cord(data_dir: Path, tmp_path: Path) -> None:
    """Slices 6 times as thick as wide are a volume, 15 times are slices; a CT stored as float is one."""
    plan = make_plan(
        listed(
            tmp_path,
            "case,image,label",
            ("s", data_dir / "spleen_crop/image.nii.gz", data_dir / "spleen_crop/label.nii.gz"),
        )
    )
    assert (plan.model, plan.channels[0].scheme) == ("unet3d", "ct")
    t2s = data_dir / "sct_cord" / "t2s"
    plan = make_plan(listed(tmp_path, "case,image,label", ("c", t2s / "t2s.nii.gz", t2s / "t2s_seg.nii.gz")))
    assert (plan.model, plan.spacing[2]) == ("unet2d", None)


def test_sunnybrook(data_dir: Path) -> None:
    dataset = medseg.load_dataset(data_dir / "sunnybrook", group="(.+?)-IM-")
    plan = make_plan(dataset, dataset.cases[::40])
    assert (plan.model, plan.patch, plan.mirror) == ("unet2d", (256, 256), ())
    assert [s.number for s in plan.structures] == [255]


def test_nuclei(data_dir: Path) -> None:
    """Grey and stained images lie in one folder there: all are trained as colours."""
    dataset = medseg.load_dataset(data_dir / "dsb2018")
    cases = dataset.cases[:30]
    grey = [c for c in cases if medseg.read(str(c.images[0])).channels == 1]
    assert 15 < len(grey) < 30
    with pytest.raises(ValueError, match=r"what looks like instances .* use --foreground"):
        make_plan(dataset, cases)
    plan = make_plan(united(dataset), cases)
    assert [c.scheme for c in plan.channels] == ["color"] * 3
    assert f"{len(grey)} of 30 images are grey" in plan.reasons["channels"]
    assert [s.name for s in plan.structures] == ["foreground"]
    assert plan.outputs == 2
    assert len(make_plan(united(dataset), grey).channels) == 1


def test_polyps(data_dir: Path) -> None:
    """JPEG masks are read as masks; the images are planned as colour pictures."""
    dataset = medseg.load_dataset(data_dir / "kvasir")
    plan = make_plan(dataset, dataset.cases[:3])
    assert plan.model == "unet2d"
    assert [c.scheme for c in plan.channels] == ["color"] * 3
    assert [s.number for s in plan.structures] == [1]
