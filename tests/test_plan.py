"""Planning on small sets whose right answer can be worked out by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import tiny
import torch
from test_cli import medseg_command

import medseg
from medseg.config import TrainConfig
from medseg.device import pick_device
from medseg.plan import Plan, smaller_plan
from medseg.transforms import normalise
from medseg.volume import Geometry, LabelMap, Structure, Volume


def write_case(
    root: Path,
    name: str,
    geometry: Geometry,
    low: float = 0.0,
    names: tuple[str, ...] = ("organ",),
    dtype: str = "int16",
) -> None:
    """A bright box per structure on a noisy background."""
    generator = np.random.default_rng(abs(hash(name)) % 1000)
    array = generator.normal(low, 10, geometry.shape)
    labels = np.zeros(geometry.shape, np.uint8)
    for n in range(1, len(names) + 1):
        at = tuple(slice(s // 4 + n, s // 2 + n) for s in geometry.shape[:2])
        array[at] += 100 * n
        labels[at] = n
    structures = tuple(Structure(n, name) for n, name in enumerate(names, start=1))
    medseg.write(Volume(array.astype(dtype), geometry), root / "images" / f"{name}.nii.gz")
    medseg.write(LabelMap(labels, geometry, structures), root / "labels" / f"{name}.nii.gz")


def grid(shape: tuple[int, int, int], spacing: tuple[float, float, float], orientation: str = "RAS") -> Geometry:
    direction = np.zeros((3, 3))
    for axis, letter in enumerate(orientation):
        direction["RLAPSI".index(letter) // 2, axis] = 1 if letter in "RAS" else -1
    return Geometry.from_parts(shape, spacing, (5, -7, 11), direction)


def test_plan_of_thick_slices(tmp_path: Path) -> None:
    """Slices 6 mm thick along the third axis: no pooling across them at first, kernels of 1, slices last."""
    for n in range(3):
        write_case(tmp_path, f"case{n}", grid((40, 44, 10), (1.0, 1.0, 6.0)))
    plan = medseg.make_plan(medseg.load_dataset(tmp_path))
    assert plan.model == "unet3d"
    assert plan.orientation == "RAS"
    assert plan.spacing == (1.0, 1.0, 6.0)
    assert plan.kernels[0] == (3, 3, 1)
    assert plan.strides[0] == (2, 2, 1)
    assert all(p % d == 0 for p, d in zip(plan.patch, np.prod(plan.strides, axis=0), strict=True))
    assert all(p >= s for p, s in zip(plan.patch, (40, 44, 10), strict=True))
    assert set(plan.reasons) >= {"model", "spacing", "patch", "batch", "features", "channels", "structures", "mirror"}


def test_plan_turns_sagittal_slices_last(tmp_path: Path) -> None:
    """The same anatomy stored sagittally: slices are along R, so R comes last whatever the file's axis order."""
    for n, orientation in enumerate(("PSR", "ASL", "RPI")):
        shape = {"R": 12, "L": 12, "A": 30, "P": 30, "S": 28, "I": 28}
        spacing = {"R": 5.0, "L": 5.0, "A": 1.0, "P": 1.0, "S": 1.2, "I": 1.2}
        geometry = grid(tuple(shape[o] for o in orientation), tuple(spacing[o] for o in orientation), orientation)
        write_case(tmp_path, f"case{n}", geometry)
    plan = medseg.make_plan(medseg.load_dataset(tmp_path))
    assert plan.orientation == "ASR"
    assert plan.spacing == pytest.approx((1.0, 1.2, 5.0))


def test_ct_is_recognised_and_clipped_to_the_foreground(tmp_path: Path) -> None:
    for n in range(2):
        write_case(tmp_path, f"case{n}", grid((20, 24, 16), (1.0, 1.0, 2.0)), low=-1000)
    (channel,) = medseg.make_plan(medseg.load_dataset(tmp_path)).channels
    assert channel.scheme == "ct"
    assert channel.low < channel.mean < channel.high
    assert channel.mean == pytest.approx(-900, abs=3)  # the foreground is 100 above -1000


def test_left_and_right_change_places_or_forbid_mirroring(tmp_path: Path) -> None:
    for n in range(2):
        write_case(tmp_path, f"case{n}", grid((20, 24, 16), (1.0, 1.0, 2.0)), names=("LeftKidney", "RightKidney"))
    header = tmp_path / "dataset.json"
    header.write_text('{"labels": {"background": 0, "LeftKidney": 1, "RightKidney": 2}}')
    plan = medseg.make_plan(medseg.load_dataset(tmp_path))
    assert (plan.mirror, plan.swaps) == ((0,), ((1, 2),))
    assert [s.name for s in plan.structures] == ["LeftKidney", "RightKidney"]
    header.write_text('{"labels": {"background": 0, "LeftKidney": 1, "Spleen": 2}}')
    plan = medseg.make_plan(medseg.load_dataset(tmp_path))
    assert (plan.mirror, plan.swaps) == ((), ())
    assert "left and right differ (LeftKidney has no counterpart)" in plan.reasons["mirror"]


def test_patch_keeps_to_the_budget_on_big_images(tmp_path: Path) -> None:
    write_case(tmp_path, "big", grid((200, 160, 90), (0.7, 0.7, 1.5)))
    plan = medseg.make_plan(medseg.load_dataset(tmp_path))
    assert np.prod(plan.patch) * plan.batch < 600_000
    sizes = np.array(plan.patch) * (0.7, 0.7, 1.5)
    assert sizes.max() / sizes.min() < 1.6  # even in millimetres


class TestBadInput:
    def test_undeclared_label(self, tmp_path: Path) -> None:
        write_case(tmp_path, "one", grid((20, 24, 16), (1.0, 1.0, 2.0)), names=("a", "b"))
        (tmp_path / "dataset.json").write_text('{"labels": {"background": 0, "a": 1}}')
        with pytest.raises(ValueError, match=r"labels must be declared \(1\), got 2 in case one"):
            medseg.make_plan(medseg.load_dataset(tmp_path))

    def test_structure_that_never_occurs(self, tmp_path: Path) -> None:
        write_case(tmp_path, "one", grid((20, 24, 16), (1.0, 1.0, 2.0)))
        (tmp_path / "dataset.json").write_text('{"labels": {"background": 0, "a": 1, "ghost": 9}}')
        with pytest.raises(ValueError, match=r"must occur in the training cases, got none of ghost \(9\)"):
            medseg.make_plan(medseg.load_dataset(tmp_path))

    def test_label_on_another_grid_tells_the_distance(self, tmp_path: Path) -> None:
        geometry = grid((20, 24, 16), (1.0, 1.0, 2.0))
        write_case(tmp_path, "one", geometry)
        moved = Geometry(geometry.shape, geometry.affine + np.array([[0, 0, 0, 3], [0, 0, 0, 4], [0] * 4, [0] * 4]))
        medseg.write(LabelMap(np.ones(geometry.shape, np.uint8), moved), tmp_path / "labels" / "one.nii.gz", force=True)
        with pytest.raises(
            medseg.GeometryError, match=r"case one must lie on the same grid, got corners up to 5\.000 mm"
        ):
            medseg.make_plan(medseg.load_dataset(tmp_path))

    def test_nan_voxels(self, tmp_path: Path) -> None:
        geometry = grid((20, 24, 16), (1.0, 1.0, 2.0))
        write_case(tmp_path, "one", geometry)
        array = np.ones(geometry.shape, np.float32)
        array[:] = np.nan
        medseg.write(Volume(array, geometry), tmp_path / "images" / "one.nii.gz", force=True)
        with pytest.raises(ValueError, match="must be finite, got NaN or Inf in case one; run medseg check"):
            medseg.make_plan(medseg.load_dataset(tmp_path))

    def test_only_background(self, tmp_path: Path) -> None:
        geometry = grid((20, 24, 16), (1.0, 1.0, 2.0))
        write_case(tmp_path, "one", geometry, names=())
        with pytest.raises(ValueError, match="must mark at least one structure"):
            medseg.make_plan(medseg.load_dataset(tmp_path))

    def test_volume_network_for_pictures(self, tmp_path: Path) -> None:
        write_case(tmp_path, "one", grid((32, 24, 1), (1.0, 1.0, 1.0)))
        with pytest.raises(ValueError, match="use --model unet2d"):
            medseg.make_plan(medseg.load_dataset(tmp_path), model="unet3d")
        assert medseg.make_plan(medseg.load_dataset(tmp_path)).model == "unet2d"


class TestRecords:
    def test_plan_survives_json(self, tmp_path: Path) -> None:
        write_case(tmp_path / "set", "one", grid((20, 24, 16), (1.0, 1.0, 2.0)))
        plan = medseg.make_plan(medseg.load_dataset(tmp_path / "set"))
        plan.save(tmp_path / "plan.json")
        assert Plan.load(tmp_path / "plan.json") == plan
        assert set(plan.summary()) >= {"model", "patch", "batch"}
        with pytest.raises(FileExistsError):
            plan.save(tmp_path / "plan.json")

    def test_unknown_keys_are_refused_by_name(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text('{"dataset": "a", "out": "b", "learning": 1}')
        with pytest.raises(ValueError, match=r"learning must be valid: .* in .*config\.json"):
            TrainConfig.load(tmp_path / "config.json")

    def test_broken_json_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "plan.json").write_text("{")
        with pytest.raises(ValueError, match=r"plan\.json must hold JSON"):
            Plan.load(tmp_path / "plan.json")

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"epochs": 3, "minutes": 2}, "epochs and minutes must not both be given"),
            ({"fold": 7, "folds": 5}, "fold must be below the number of folds 5, got 7"),
            ({"epochs": 0}, "epochs must be valid: Input should be greater than or equal to 1, got 0"),
            ({"seed": -1}, "seed must be valid"),
        ],
    )
    def test_impossible_configurations_are_one_line(self, values: dict, message: str) -> None:
        with pytest.raises(ValueError, match=message) as caught:
            TrainConfig.make(dataset="a", out="b", **values)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"format": 99}, "format of a plan must be 1, got 99"),
            ({"batch": 0}, "batch, features and spacing must be positive"),
            ({"patch": (8, 8)}, "patch must be 3 positive numbers"),
            ({"mirror": (5,)}, r"mirror must name axes below 3, got \(5,\)"),
            ({"dims": 2}, "model must be one of .* and fit dims"),
            ({"features": (8,)}, "features must be one more than strides"),
        ],
    )
    def test_plans_that_cannot_be_are_refused(self, changes: dict, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            Plan.make(**{**tiny.plan().model_dump(), **changes})


def test_devices() -> None:
    assert pick_device("cpu").type == "cpu"
    with pytest.raises(ValueError, match="device must be auto, cpu, cuda or cuda:n, got 'gpu'"):
        pick_device("gpu")
    with pytest.raises(ValueError, match="got 'cuda:x'"):
        pick_device("cuda:x")
    with pytest.raises(ValueError, match="device must be present, got cuda:99"):
        pick_device("cuda:99")


class TestTimeAndMemory:
    """A machine whose speed is known: seconds per million voxels of a batch, at 16 features."""

    @pytest.fixture
    def machine(self, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
        def set_speed(seconds: float, precision: str = "bf16-mixed") -> None:
            def step_seconds(plan: Plan, device: str) -> float:
                return seconds * plan.batch * float(np.prod(plan.patch)) / 1e6 * (plan.features[0] / 16) ** 1.5

            monkeypatch.setattr(
                medseg.plan, "fastest_precision", lambda plan, device: (precision, "tried", step_seconds(plan, device))
            )
            monkeypatch.setattr(medseg.plan, "step_seconds", step_seconds)

        return set_speed

    @pytest.fixture
    def brain(self, tmp_path: Path) -> medseg.data.Dataset:
        """Images of 40 x 56 x 40: a batch of 4 whole ones has 358400 voxels."""
        for n in range(2):
            write_case(tmp_path, f"case{n}", grid((36, 54, 37), (1.0, 1.0, 1.0)))
        return medseg.load_dataset(tmp_path)

    @pytest.mark.parametrize(
        ("minutes", "batch", "features"),
        [
            (2, 2, 16),  # 204 steps of 0.5 s in 85 % of the time: half the batch
            (5, 4, 16),  # 510 steps
            (20, 4, 16),  # 2040
            (30, 4, 16),  # 3060 at 16 features, 2040 or fewer at 24
            (60, 4, 24),  # 24 takes 1.84 times as long: 3331; 32 would be left with 2498 or fewer
            (90, 4, 32),  # 32 takes 2.83 times as long: 3245
        ],
    )
    def test_minutes_decide_batch_and_width(
        self, machine: Callable[..., None], brain: medseg.data.Dataset, minutes: float, batch: int, features: int
    ) -> None:
        machine(0.5 / 0.3584)
        plan = medseg.make_plan(brain, minutes=minutes)
        assert (plan.patch, plan.batch, plan.features[0]) == ((40, 56, 40), batch, features)
        assert plan.precision == "bf16-mixed"
        if minutes == 2:
            assert "half the usual, as 0.5 s a step leave but 204 steps" in plan.reasons["batch"]
        if minutes == 20:
            assert "0.5 s a step, about 2040 steps in 20 min; 24 would leave 1360 or fewer" in plan.reasons["features"]

    def test_without_minutes_the_usual(self, machine: Callable[..., None], brain: medseg.data.Dataset) -> None:
        machine(100.0, "32-true")
        plan = medseg.make_plan(brain)
        assert (plan.batch, plan.features, plan.precision) == (4, (16, 32, 64, 128), "32-true")
        assert plan.reasons["precision"] == "tried"

    def test_memory_shrinks_and_says_so(self, machine: Callable[..., None], brain: medseg.data.Dataset) -> None:
        machine(1.0, "32-true")
        large = medseg.make_plan(brain, memory="4GB")
        assert large.batch == 4
        assert "of 4GB, of which the program itself takes 0.7 GB" in large.reasons["batch"]
        small = medseg.make_plan(brain, memory="1.15GB")
        assert small.batch < 4
        assert f"made smaller to fit: batch from 4 to {small.batch}" in small.reasons["batch"]
        tiny_plan = medseg.make_plan(brain, memory="1.06GB")
        assert max(tiny_plan.patch) < 56 and "patch from 40 x 56 x 40 to" in tiny_plan.reasons["batch"]
        with pytest.raises(ValueError, match=r"must be more than the 700 MB that the program itself takes, got 500MB"):
            medseg.make_plan(brain, memory="500MB")
        with pytest.raises(ValueError, match="memory must be an amount like 4GB"):
            medseg.make_plan(brain, memory="lots")

    def test_a_wider_network_must_fit_too(self, machine: Callable[..., None], brain: medseg.data.Dataset) -> None:
        machine(0.01)
        assert medseg.make_plan(brain, minutes=60, memory="4GB").features[0] == 32
        plan = medseg.make_plan(brain, minutes=60, memory="1.4GB")
        assert plan.features[0] == 16
        assert plan.batch == 4
        assert "24 would not fit the memory" in plan.reasons["features"]

    def test_smaller_plan_for_a_full_memory(self) -> None:
        """Two thirds of the patches take about two thirds of the activations; nothing else changes."""
        plan = tiny.plan()
        small, words = smaller_plan(plan)
        assert (small.batch, small.patch, words) == (2, plan.patch, "batch from 4 to 2")
        for _ in range(40):
            try:
                small, words = smaller_plan(small)
            except ValueError as problem:
                assert "the least for these images" in str(problem)
                break
            assert words
            small.build()
        assert small.batch == 1

    def test_gpu(self, machine: Callable[..., None], brain: medseg.data.Dataset) -> None:
        machine(0.05)
        plan = medseg.make_plan(brain, device="cuda", minutes=6, memory="40GB")
        assert (plan.patch, plan.batch, plan.features[0]) == ((40, 56, 40), 16, 32)
        small = medseg.make_plan(brain, device="cuda", memory="3GB")
        assert small.batch < 16 and small.patch == (40, 56, 40)


class TestTwoOrThreeDimensions:
    @pytest.mark.parametrize(
        ("shape", "spacing", "model", "why"),
        [
            ((40, 44, 25), (0.8, 0.8, 6.5), "unet3d", "volumes"),
            ((40, 44, 9), (0.5, 0.5, 7.5), "unet2d", "slices are 15 times as thick"),
            ((40, 44, 5), (1.0, 1.0, 3.0), "unet2d", "5 slices are too few"),
            ((40, 44, 6), (1.0, 1.0, 1.0), "unet2d", "6 slices are too few"),
            ((40, 1, 44), (1.0, 4.0, 1.0), "unet2d", "too few"),
        ],
    )
    def test_slices_few_or_thick(
        self, tmp_path: Path, shape: tuple[int, int, int], spacing: tuple[float, float, float], model: str, why: str
    ) -> None:
        geometry = grid(shape, spacing)
        labels = np.zeros(shape, np.uint8)
        labels[8:20] = 1
        medseg.write(Volume(labels.astype(np.int16) * 9, geometry), tmp_path / "images" / "a.nii.gz")
        medseg.write(LabelMap(labels, geometry), tmp_path / "labels" / "a.nii.gz")
        plan = medseg.make_plan(medseg.load_dataset(tmp_path))
        assert plan.model == model
        assert why in plan.reasons["model"]
        assert medseg.make_plan(medseg.load_dataset(tmp_path), model="unet3d").dims == 3


def test_grey_pictures_among_coloured_ones_are_colours(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for name, channels in (("a", 3), ("b", 1), ("c", 1)):
        pixels = random.integers(0, 255, (channels, 40, 56, 1)).astype(np.uint8)
        mask = np.zeros((40, 56, 1), np.uint8)
        mask[5:20, 9:30] = 1
        geometry = grid((40, 56, 1), (1, 1, 1))
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / "labels").mkdir(exist_ok=True)
        medseg.write(Volume(pixels, geometry), tmp_path / "images" / f"{name}.png")
        medseg.write(LabelMap(mask, geometry), tmp_path / "labels" / f"{name}.png")
    dataset = medseg.load_dataset(tmp_path)
    plan = medseg.make_plan(dataset)
    assert [c.scheme for c in plan.channels] == ["color"] * 3
    assert "2 of 3 images are grey" in plan.reasons["channels"]
    grey = medseg.read(tmp_path / "images" / "b.png")
    assert grey.channels == 1
    ours = normalise(grey.array, plan.channels)
    for values, channel in zip(ours, plan.channels, strict=True):
        assert values == pytest.approx((grey.array[0].astype(float) - channel.mean) / channel.std, abs=1e-5)
    assert len(medseg.make_plan(dataset, dataset.cases[1:]).channels) == 1


class TestSettings:
    def test_patch_and_poolings_follow_a_spacing_set_by_hand(self, tmp_path: Path) -> None:
        for name in ("a", "b"):
            write_case(tmp_path, name, grid((60, 72, 20), (0.8, 0.8, 4.0)))
        command = ("plan", tmp_path, "--device", "cpu", "--json")
        first = json.loads(medseg_command(*command).stdout)
        second = json.loads(medseg_command(*command, "--set", "spacing=4,4,4", "batch=3").stdout)
        assert (first["spacing"], second["spacing"], second["batch"]) == ([0.8, 0.8, 4.0], [4, 4, 4], 3)
        assert first["patch"][0] >= 48 > 24 >= second["patch"][0]
        assert first["kernels"][0] == [3, 3, 1]
        assert second["kernels"][0] == [3, 3, 3]

    def test_entries_by_hand(self) -> None:
        plan = tiny.plan()
        changed = plan.with_settings(
            ["batch=7", "spacing=1,1,3", "features = 8,16", "mirror=[0, 1]", "precision=bf16-mixed", "ignore=9"]
        )
        assert (changed.batch, changed.spacing, changed.features) == (7, (1.0, 1.0, 3.0), (8, 16))
        assert (changed.mirror, changed.precision, changed.ignore) == ((0, 1), "bf16-mixed", 9)
        assert changed.reasons["batch"] == "set by hand"
        assert changed.patch == plan.patch

    @pytest.mark.parametrize(
        ("setting", "message"),
        [
            ("batch", "setting must be entry=value, got 'batch'"),
            ("colour=3", "setting must be of an entry of the plan .*, got 'colour'"),
            ("format=1", "setting must be of an entry of the plan .*, got 'format'"),
            ("batch=many", "batch must be valid: .*, got 'many'"),
            ("batch=0", "batch, features and spacing must be positive"),
            ("features=8", "features must be valid"),
            ("features=8,9,10", "features must be one more than strides"),
            ("precision=fp8", "precision must be valid"),
            ("ignore=5", "ignore must be a label of no structure, got 5"),
            ("swaps=[[2,2]]", "swaps must pair numbers of structures, each at most once"),
        ],
    )
    def test_what_does_not_fit_is_refused(self, setting: str, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            tiny.plan().with_settings([setting])

    def test_exclusive_structures_share_no_label(self) -> None:
        structures = [
            {"number": n, "name": str(n), "color": (0, 0, 0), "labels": labels}
            for n, labels in ((1, (1, 2)), (2, (2,)))
        ]
        values = {**tiny.plan().model_dump(), "structures": structures}
        with pytest.raises(ValueError, match="must not share labels unless the plan is overlapping"):
            Plan.make(**values)
        assert Plan.make(**{**values, "overlapping": True}).outputs == 2

    def test_built_network_is_the_planned_one(self) -> None:
        network = tiny.plan().build()
        assert network(torch.zeros(1, 1, 16, 16, 12)).shape == (1, 3, 16, 16, 12)


class TestCommand:
    def test_settings_memory_and_reasons(self, tmp_path: Path) -> None:
        for n in range(2):
            write_case(tmp_path / "set", f"case{n}", grid((20, 24, 16), (1.0, 1.0, 2.0)))
        command = ("plan", tmp_path / "set", "--device", "cpu", "--memory", "4GB")
        out = tmp_path / "plan.json"
        printed = json.loads(medseg_command(*command, "--json", "--out", out, "--set", "batch=3", "mirror=[]").stdout)
        assert (printed["batch"], printed["mirror"]) == (3, [])
        assert printed["reasons"]["batch"] == "set by hand"
        assert Plan.load(out).batch == 3
        assert "1 foreground (any label)" in medseg_command(*command, "--foreground").stdout
        assert "must be positive" in medseg_command(*command, "--set", "batch=0", code=1).stderr

    def test_spacing_of_zero(self, tmp_path: Path) -> None:
        """A header of another program's making; the error says what is wrong with the file."""
        write_case(tmp_path, "one", grid((20, 24, 16), (1.0, 1.0, 2.0)))
        path = tmp_path / "images" / "one.nii.gz"
        image = nib.load(path)
        flat = image.affine.copy()
        flat[:3, 2] = 0
        broken = nib.Nifti1Image(np.asanyarray(image.dataobj), None)
        broken.header.set_sform(flat, code=1)
        broken.header["pixdim"][3] = 0
        nib.save(broken, path)
        with pytest.raises(ValueError, match=r"one\.nii\.gz"):
            medseg.make_plan(medseg.load_dataset(tmp_path))
