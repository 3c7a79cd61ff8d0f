"""Structures, regions, instances, and what a mirror does to them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medseg.cases import Dataset
from medseg.fingerprint import CaseFingerprint
from medseg.plan import ANY, StructurePlan, united
from medseg.plan_structures import choose_mirror, choose_structures, side_pairs


def look(id: str, counts: dict[int, int], **changes: Any) -> CaseFingerprint:
    values: dict[str, Any] = {
        "picture": False, "shape": (30, 40, 20), "spacing": (1.0, 1.0, 3.0), "modality": "", "integers": True,
        "present": (True,), "samples": np.zeros((1, 5), np.float32), "lowest": 0.0, "blank": 0.0, "blank_inside": 0.0,
        "names": {}, "components": {},
    }  # fmt: skip
    return CaseFingerprint(id=id, counts=counts, **{**values, **changes})


def dataset(**declared: Any) -> Dataset:
    return Dataset(name="set", root=Path("set"), cases=(), **declared)


def chosen(looks: list[CaseFingerprint], **declared: Any) -> tuple[tuple[StructurePlan, ...], bool, dict[str, str]]:
    reasons: dict[str, str] = {}
    structures, overlapping = choose_structures(looks, dataset(**declared), False, reasons)
    return structures, overlapping, reasons


class TestSides:
    @pytest.mark.parametrize(
        ("left", "right"),
        [
            ("left kidney", "right kidney"),
            ("LeftParotid", "RightParotid"),
            ("L_Parotid", "R_Parotid"),
            ("lung_left", "lung_right"),
            ("LKidney", "RKidney"),
            ("Optic nerve (L)", "Optic nerve (R)"),
            ("eye_lt", "Eye rt"),
            ("kidney_l", "right kidney"),
            ("lh-hippocampus", "rh-hippocampus"),
            ("left lateral ventricle", "right lateral ventricle"),
        ],
    )
    def test_pairs(self, left: str, right: str) -> None:
        assert side_pairs({4: right, 7: left, 9: "liver"}) == (((7, 4),), [])

    @pytest.mark.parametrize(
        "name", ["LeftParotid", "kidney_R", "lung upper lobe left", "left ventricle", "RV", "l-eye"]
    )
    def test_no_counterpart(self, name: str) -> None:
        assert side_pairs({1: name, 2: "Brainstem"}) == ((), [name])

    def test_heart_and_lobes_are_no_mirror_images(self) -> None:
        for pair in (("left ventricle", "right ventricle"), ("LV", "RV"), ("upper lobe left", "upper lobe right")):
            assert side_pairs(dict(enumerate(pair, start=1)))[0] == ()

    @pytest.mark.parametrize(
        "name", ["GTV MRI", "liver", "PTV70", "Larynx", "label 3", "cleft", "upright", "BRAINSTEM"]
    )
    def test_words_that_only_look_like_sides(self, name: str) -> None:
        assert side_pairs({1: name}) == ((), [])

    def test_two_of_one_side_are_not_guessed(self) -> None:
        pairs, unpaired = side_pairs({1: "left kidney", 2: "kidney left", 3: "right kidney"})
        assert pairs == ((1, 3),)
        assert unpaired == ["kidney left"]

    def test_axis_and_reasons(self) -> None:
        both = [StructurePlan(number=n, name=name, color=(0, 0, 0)) for n, name in ((1, "kidney L"), (2, "kidney R"))]
        for orientation, dims, expected in (
            ("RAS", 3, ((0,), ((1, 2),))),
            ("ASR", 3, ((2,), ((1, 2),))),
            ("ASR", 2, ((), ())),
            (None, 2, ((), ())),
        ):
            reasons: dict[str, str] = {}
            assert choose_mirror(both, dims, orientation, reasons) == expected
            assert reasons["mirror"]
        assert choose_mirror(both[:1], 3, "RAS", reasons) == ((), ())
        assert reasons["mirror"] == "off: left and right differ (kidney L has no counterpart)"


class TestStructures:
    def test_numbers_named_as_in_the_files(self) -> None:
        looks = [look("a", {2: 10, 5: 9}, names={2: "liver"}), look("b", {2: 4}, names={2: "Liver"})]
        structures, overlapping, reasons = chosen(looks)
        assert [(s.number, s.name) for s in structures] == [(2, "liver"), (5, "label 5")]
        assert not overlapping
        assert "label 5 absent in 1 of 2" in reasons["structures"]

    def test_partial_labels(self) -> None:
        looks = [look("a", {1: 10, 2: 5}), look("b", {1: 4}, unknown=(2,)), look("c", {2: 4}, unknown=(1,))]
        _, _, reasons = chosen(looks, labels={1: "cord", 2: "larynx"})
        assert "cord unknown in 1 of 3 cases, larynx unknown in 1 of 3 cases" in reasons["structures"]
        with pytest.raises(ValueError, match=r"must occur in the training cases, got none of larynx \(2\)"):
            chosen([look("b", {1: 4}, unknown=(2,))], labels={1: "cord", 2: "larynx"})

    def test_regions_that_share_labels_overlap(self) -> None:
        looks = [look("a", {1: 10, 2: 5, 4: 6})]
        structures, overlapping, reasons = chosen(
            looks, labels={1: "a", 2: "b", 4: "c"}, regions={"all": (1, 2, 4), "core": (2, 4)}
        )
        assert [(s.number, s.name, s.values) for s in structures] == [(1, "all", (1, 2, 4)), (2, "core", (2, 4))]
        assert overlapping
        assert reasons["overlapping"] == "regions share labels"

    def test_regions_that_do_not_stay_exclusive(self) -> None:
        structures, overlapping, _ = chosen([look("a", {1: 10, 2: 5, 4: 6})], regions={"low": (1, 2), "high": (4,)})
        assert not overlapping
        assert [s.values for s in structures] == [(1, 2), (4,)]
        with pytest.raises(ValueError, match="regions must occur in the training cases, got none of high"):
            chosen([look("a", {1: 10})], regions={"low": (1, 2), "high": (4,)})

    def test_layers_that_overlap(self) -> None:
        assert chosen([look("a", {1: 10, 2: 5}, overlapping=True)])[1]

    def test_ignored_label_is_no_structure(self) -> None:
        structures, _, reasons = chosen([look("a", {1: 10, 255: 99})], labels={1: "cord"}, ignore=255)
        assert [s.number for s in structures] == [1]
        assert "do not count" in reasons["ignore"]

    def test_instances_are_recognised(self) -> None:
        cases = [look(f"case{n}", dict.fromkeys(range(1, n), 9)) for n in (6, 30, 18)]
        with pytest.raises(ValueError, match=r"looks like instances \(5 to 29 numbers a case\); use --foreground"):
            chosen(cases)
        chosen(cases, labels={n: f"vertebra {n}" for n in range(1, 30)})  # declared: they are what they are
        chosen([look("a", dict.fromkeys(range(1, 25), 9)), look("b", dict.fromkeys(range(8, 25), 9))])  # cut off above

    def test_all_labels_as_one(self) -> None:
        structures, overlapping = choose_structures(
            [look("a", {1: 9})], united(dataset(labels=None, ignore=7)), False, {}
        )
        assert not overlapping
        assert [(s.name, s.labels) for s in structures] == [("foreground", (ANY,))]

    def test_one_number_for_two_names(self) -> None:
        looks = [look("a", {1: 10}, names={1: "heart"}), look("b", {1: 10}, names={1: "liver"})]
        with pytest.raises(ValueError, match=r"got 1 for 'heart' in case a and for 'liver' in case b; .* dataset.json"):
            chosen(looks)
        chosen(looks, labels={1: "organ"})

    def test_lesions_are_told(self) -> None:
        looks = [look("a", {1: 100}, components={1: (9, 2, 40)}), look("b", {1: 100}, components={1: (7, 1, 60)})]
        assert "label 1 in about 8 pieces of 1 to 60 voxels" in chosen(looks)[2]["structures"]
