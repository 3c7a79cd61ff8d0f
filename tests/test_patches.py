"""Prepared cases and patches: true windows, balanced by structure, lesion and set, and little read."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage, stats

from medseg import prepared
from medseg.blocks import BlockFile
from medseg.data import Case, load_dataset
from medseg.losses import IGNORE
from medseg.patches import draw_batch
from medseg.places import COUNTED, find_places
from medseg.plan import Plan, StructurePlan
from medseg.prepared import PreparedCase, prepare
from medseg.transforms import preprocessing

SHAPES = st.tuples(st.integers(3, 37), st.integers(2, 21), st.integers(1, 70))
COUNTER = itertools.count()


def plan(dims: int = 3, structures: int = 1, **changes: Any) -> Plan:
    named = tuple(StructurePlan(number=n, name=f"s{n}", color=(1, 2, 3)) for n in range(1, structures + 1))
    patch = {"patch": (8, 6, 4)[:dims], "structures": named}
    return Plan.model_validate({**tiny.plan(dims).model_dump(), **patch, **changes})


def written(
    folder: Path, image: np.ndarray, label: np.ndarray, dims: int = 3, known: tuple[bool, ...] = (True,)
) -> Any:
    """A prepared case of image (C, I, J, K) and label, on disk."""
    rows, places = find_places(label)
    facts = {"affine": np.eye(4).tolist(), "known": known, "places": places, "layered": label.ndim == 4}
    path = folder / f"{next(COUNTER)}.safetensors"
    arrays = {"image": image, "label": label[None] if label.ndim == 3 else label}
    BlockFile.write(path, dims, arrays, {"places": rows}, facts)
    return PreparedCase.open(path.stem, path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("prepared")


def chi_square(counts: list[int]) -> float:
    """p that counts come from equal chances."""
    return float(stats.chisquare(counts).pvalue)


class TestBlocks:
    @settings(max_examples=50)
    @given(shape=SHAPES, channels=st.integers(1, 3), dims=st.sampled_from([2, 3]), data=st.data())
    def test_windows_are_numpys(
        self, folder: Path, shape: tuple[int, int, int], channels: int, dims: int, data: st.DataObject
    ) -> None:
        array = np.random.default_rng(0).normal(size=(channels, *shape)).astype(np.float32)
        path = folder / "block.safetensors"
        BlockFile.write(path, dims, {"x": array}, {"y": np.arange(5, dtype=np.int32)}, {"fact": [1, "a"]})
        file = BlockFile.open(path)
        start = [data.draw(st.integers(0, n - 1)) for n in shape]
        stop = [data.draw(st.integers(a + 1, n)) for a, n in zip(start, shape, strict=True)]
        window = (slice(None), *(slice(a, b) for a, b in zip(start, stop, strict=True)))
        assert np.array_equal(file.window("x", start, stop), array[window])
        assert np.array_equal(file.whole("x"), array)
        assert file.small("y").tolist() == [0, 1, 2, 3, 4]
        assert file.facts == {"fact": [1, "a"]}
        assert path.stat().st_size < array.nbytes * 2.5 + 2000

    def test_damaged_files_are_told(self, folder: Path) -> None:
        path = folder / "whole.safetensors"
        BlockFile.write(path, 3, {"x": np.ones((1, 20, 30, 40))}, {}, {})
        whole = path.read_bytes()
        for length in (0, 5, 60, len(whole) - 1):
            path.write_bytes(whole[:length])
            with pytest.raises(ValueError, match=r"prepared case must be whole, got .* in .*whole"):
                BlockFile.open(path)

    @pytest.mark.parametrize(("dims", "patch", "most"), [(3, (40, 56, 40), 5.0), (2, (128, 128, 1), 5.0)])
    def test_a_patch_touches_few_blocks(self, folder: Path, dims: int, patch: tuple[int, ...], most: float) -> None:
        """Of a thorax CT's size; blocks that hold a voxel of the patch, over the patch."""
        shape = (512, 512, 400)
        path = folder / "large.safetensors"
        BlockFile.write(path, dims, {"x": np.zeros((1, *(n // 8 for n in shape)), np.float16)}, {}, {})
        block = BlockFile.open(path).entries["x"].shape[4:]
        assert max(block) <= 64
        start = np.array([101, 77, 203])
        touched = np.prod([-(-(s + p) // b) - s // b for s, p, b in zip(start, patch, block, strict=True)])
        assert touched * np.prod(block) / np.prod(patch) < most


class TestPlaces:
    @settings(max_examples=25)
    @given(shape=st.tuples(st.integers(3, 20), st.integers(3, 15), st.integers(1, 9)), seed=st.integers(0, 99))
    def test_places_lie_on_their_class(self, shape: tuple[int, int, int], seed: int) -> None:
        generator = np.random.default_rng(seed)
        label = ndimage.grey_dilation(generator.choice([-1, 0, 0, 0, 0, 1, 3], shape), 2).astype(np.int16)
        rows, places = find_places(label)
        assert set(places) - {COUNTED} == set(np.unique(label[label > 0]))
        for c, groups in places.items():
            for low, high in groups:
                assert 0 < high - low <= 512
                values = label[tuple(rows[low:high].T)]
                assert (values >= 0).all() if c == COUNTED else (values == c).all()
        assert (COUNTED in places) == (bool((label < 0).any()) and bool((label >= 0).any()))

    def test_every_component_of_a_size_comes_alike_and_sizes_alike(self, folder: Path) -> None:
        label = np.zeros((60, 50, 40), np.int16)
        label[:30, :40, :30] = 1  # 36000 voxels
        for n in range(6):
            label[40 + 3 * n, 10:12, 35] = 1  # 2 voxels each
        label[45:49, 30:34, 5:9] = 1  # 64 voxels
        case = written(folder, label[None].astype(np.float16), label)
        components, count = ndimage.label(label, np.ones((3, 3, 3)))
        assert count == 8
        generator = np.random.default_rng(0)
        drawn = [tuple(case.place(1, generator)) for _ in range(1200)]
        seen = Counter(int(components[at]) for at in drawn)
        sizes = ndimage.sum_labels(label, components, range(1, count + 1))
        by_size = {s: [seen[i + 1] for i in np.flatnonzero(sizes == s)] for s in np.unique(sizes)}
        assert chi_square([sum(v) for v in by_size.values()]) > 0.01
        assert chi_square(by_size[2.0]) > 0.01
        large = np.array([at for at in drawn if components[at] == components[0, 0, 0]])
        assert stats.kstest(large[:, 0] / 29, "uniform").pvalue > 1e-4  # anywhere in the large one
        assert np.unique(large, axis=0).shape[0] > 200

    def test_layers_may_overlap_and_be_soft(self) -> None:
        layers = np.zeros((3, 9, 8, 7), np.float16)
        layers[0, 2:6, 2:5, 1:4] = 1
        layers[1, 3:5, 3:4, 2:3] = 0.7
        layers[1, 0, 0, 0] = 0.2
        layers[:, 8] = IGNORE
        rows, places = find_places(layers)
        assert set(places) == {1, 2, COUNTED}
        ((low, high),) = places[2]
        assert sorted(map(tuple, rows[low:high])) == [(3, 3, 2), (4, 3, 2)]


class TestPatches:
    @settings(max_examples=30)
    @given(
        shape=st.tuples(st.integers(3, 34), st.integers(3, 9), st.integers(2, 19)),
        seed=st.integers(0, 99),
        layered=st.booleans(),
    )
    def test_patches_are_true_windows_and_padding_is_ignored(
        self, folder: Path, shape: tuple[int, int, int], seed: int, layered: bool
    ) -> None:
        voxels = np.arange(np.prod(shape), dtype=np.float32).reshape(1, *shape) + 1
        label = (voxels[0] % 5 == 0).astype(np.int16)
        stored = np.stack([label, 1 - label]).astype(np.int8) if layered else label
        case = written(folder, voxels, stored)
        images, labels, _ = draw_batch([case], plan(structures=1 + layered, overlapping=layered), 4, seed, step=1)
        assert images.shape == (4, 1, 8, 6, 4)
        assert images.dtype == torch.float32
        assert labels.dtype == (torch.int8 if layered else torch.int64)
        for image, target in zip(images[:, 0].numpy(), (labels[:, 0] if layered else labels).numpy(), strict=True):
            known = target != IGNORE
            assert known.sum() == np.prod(np.minimum(shape, (8, 6, 4)))  # as much of the image as fits
            at = np.argwhere(known)
            index = np.stack(np.unravel_index((image[known] - 1).astype(int), shape), 1)
            assert len(np.unique(index - at, axis=0)) == 1  # one shift: no voxel is out of place
            assert np.array_equal(target[known], label[tuple(index.T)])

    def test_forced_patches_hold_the_structure_anywhere_inside(self, folder: Path) -> None:
        label = np.zeros((40, 30, 20), np.int16)
        label[20, 14, 10] = 1
        case = written(folder, label[None].astype(np.float32), label)
        seen = [
            tuple(np.argwhere(one.numpy() == 1)[0])
            for step in range(500)
            for one in draw_batch([case], plan(), 2, 0, step)[1]
            if (one == 1).any()
        ]
        for axis, n in enumerate((8, 6, 4)):  # evenly along every axis, and not in the middle alone
            assert chi_square(np.bincount([s[axis] for s in seen], minlength=n).tolist()) > 0.01
        assert 490 < len(seen) < 560  # half of them forced, few by chance

    def test_structures_at_the_edge_are_reached(self, folder: Path) -> None:
        label = np.zeros((20, 15, 9), np.int16)
        label[19, 0, 8] = 1
        case = written(folder, label[None].astype(np.float32), label)
        for step in range(20):
            images, labels, _ = draw_batch([case], plan(), 2, 0, step)
            assert any((one == 1).sum() == 1 for one in labels)
            assert (labels != IGNORE).all()  # never beyond the image where the image is large enough
            assert torch.equal(images[:, 0], labels.float())

    def test_rare_structures_are_balanced_over_the_set_and_no_case_is_forgotten(self, folder: Path) -> None:
        """Structure 2 is in one of six cases; structure 3 in none; one case has nothing."""
        cases = []
        for n in range(6):
            label = np.zeros((16, 12, 8), np.int16)
            if n < 5:
                label[:6, :6, :4] = 1
            if n == 2:
                label[10:12, 8:10, 5] = 2
            cases.append(written(folder, np.full((1, *label.shape), n, np.float16), label, known=(n != 5, True, True)))
        shown: Counter[int] = Counter()
        holding: Counter[int] = Counter()
        for step in range(300):
            images, labels, known = draw_batch(cases, plan(structures=3), 4, 1, step)
            shown.update(int(image[0, 0, 0, 0]) for image in images)
            holding.update(c for c in (1, 2) for one in labels if (one == c).any())
            assert all(bool(k[0]) == (int(image[0, 0, 0, 0]) != 5) for image, k in zip(images, known, strict=True))
        assert min(shown.values()) > 80
        assert len(shown) == 6
        # By cases first it would be 1 of 6 x 1 of 2 of the 600 forced patches: 50.
        assert 140 < holding[2] < 320
        assert holding[1] > 200

    def test_a_step_draws_the_same_patches_whenever_it_is_drawn(self, folder: Path) -> None:
        generator = np.random.default_rng(0)
        case = written(folder, generator.normal(size=(1, 20, 18, 16)), np.zeros((20, 18, 16), np.int16))
        first, again = (draw_batch([case], plan(), 3, 7, 5)[0] for _ in range(2))
        assert torch.equal(first, again)
        assert not torch.equal(first, draw_batch([case], plan(), 3, 7, 6)[0])
        assert not torch.equal(first, draw_batch([case], plan(), 3, 8, 5)[0])

    @pytest.mark.parametrize("share", [1, 3])
    def test_small_batches_see_structures_in_half_of_their_patches(self, folder: Path, share: int) -> None:
        label = np.zeros((40, 30, 20), np.int16)
        label[33, 4, 15] = 1
        case = written(folder, label[None].astype(np.float32), label)
        holds = sum(int((draw_batch([case], plan(), share, 0, s)[1] == 1).sum()) for s in range(300))
        assert 0.42 < holds / (300 * share) < 0.6

    def test_sparse_annotation_is_looked_for(self, folder: Path) -> None:
        label = np.full((40, 30, 20), IGNORE, np.int16)
        label[5, 20:25, 3] = 0
        case = written(folder, np.zeros((1, 40, 30, 20)), label)
        for step in range(20):
            assert (draw_batch([case], plan(), 2, 0, step)[1] == 0).flatten(1).any(1).all()

    def test_slices_for_2d_networks(self, folder: Path) -> None:
        array = np.arange(70 * 9 * 5, dtype=np.float32).reshape(1, 70, 9, 5)
        case = written(folder, array, np.zeros((70, 9, 5), np.int16), dims=2)
        images, labels, _ = draw_batch([case], plan(dims=2), 3, 0, 0)
        assert images.shape == (3, 1, 8, 6)
        assert labels.shape == (3, 8, 6)
        assert all(len(np.unique(image.numpy() % 5)) == 1 for image in images)  # one slice each


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_dataset(tmp_path_factory.mktemp("tiny"), 4)


class TestPrepare:
    def test_what_is_stored_is_what_preprocessing_makes(self, dataset: Path, tmp_path: Path) -> None:
        cases = load_dataset(dataset).cases
        for case, got in zip(cases, prepare(cases, tiny.plan(), tmp_path), strict=True):
            data = preprocessing(tiny.plan())({"case": case.id, "image": case.images, "label": case.label})
            assert got.id == case.id
            assert got.geometry.is_close(data["geometry"])
            image = np.asarray(data["image"])
            assert np.abs(got.image - image).max() <= np.abs(image).max() / 2048
            assert got.label.dtype == np.int16
            assert np.array_equal(got.label, np.asarray(data["label"]))
            assert set(got.places) == {1, 2}
            assert got.known == (True, True)

    def test_a_second_look_makes_nothing_and_changes_are_seen(self, dataset: Path, tmp_path: Path) -> None:
        cases = load_dataset(dataset).cases
        done: list[int] = []
        prepare(cases, tiny.plan(), tmp_path, progress=done.append)
        assert done == [1, 2, 3, 4]
        before = {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
        assert len(before) == 4
        one = next(tmp_path.glob("case1.*"))
        one.write_bytes(one.read_bytes()[:-7])  # a full disk
        another = tiny.plan().model_copy(update={"batch": 7, "patch": (8, 8, 8), "features": (4, 6)})
        prepare(cases, another, tmp_path)
        after = {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
        assert set(after) == set(before)
        assert {n for n in after if after[n] != before[n]} == {one.name}
        prepare(cases[:1], tiny.plan().model_copy(update={"spacing": (1.0, 1.2, 2.1)}), tmp_path)
        assert len(list(tmp_path.iterdir())) == 5

    def test_another_content_of_the_same_size_and_time_is_seen(self, tmp_path: Path) -> None:
        cases = load_dataset(tiny.write_dataset(tmp_path / "data", 2)).cases
        (before,) = prepare(cases[:1], tiny.plan(), tmp_path / "cache")
        label = cases[0].label
        assert label is not None
        stat, plain = label.stat(), bytearray(gzip.decompress(label.read_bytes()))
        plain[-3] ^= 2  # a voxel of the last slice
        label.write_bytes(gzip.compress(plain).ljust(stat.st_size, b"\0"))
        os.utime(label, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        (after,) = prepare(cases[:1], tiny.plan(), tmp_path / "cache")
        assert before.file.path != after.file.path

    @pytest.mark.parametrize("kind", [ValueError, MemoryError, RuntimeError])
    def test_a_dead_worker_shows_its_error_and_stops_the_rest(
        self, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
    ) -> None:
        cases = load_dataset(dataset).cases
        many = [Case(f"{c.id}-{n}", c.images, c.label, c.group) for n in range(20) for c in cases]
        real, begun = prepared.preprocessing(tiny.plan()), []

        def broken(data: dict[str, Any]) -> Any:
            begun.append(data["case"])
            if data["case"] == "case2-0":
                raise kind("the pump is dry")
            return real(data)

        monkeypatch.setattr(prepared, "preprocessing", lambda _: broken)
        expected = MemoryError if kind is MemoryError else ValueError
        with pytest.raises(expected, match="case2-0") as caught:
            prepare(many, tiny.plan(), tmp_path, workers=2)
        assert "the pump is dry" in f"{caught.value} {caught.value.__cause__}"
        assert len(begun) < 20  # those that waited were not begun
        assert threading.active_count() < 20
        assert not list(tmp_path.glob(".medseg-*"))
        monkeypatch.undo()
        assert len(prepare(many[:5], tiny.plan(), tmp_path)) == 5  # and it goes on

    def test_unknown_structures_and_ranges_beyond_float16(self, dataset: Path, tmp_path: Path) -> None:
        first = load_dataset(dataset).cases[0]
        case = Case("x", first.images, first.label, "x", unknown=(5, 9))
        more = (*tiny.plan().structures, StructurePlan(number=9, name="nine", color=(1, 2, 3)))
        (got,) = prepare([case], tiny.plan().model_copy(update={"structures": more}), tmp_path)
        assert got.known == (True, True, False)  # 5 is in the label file: somebody drew it
        wide = tiny.plan().channels[0].model_copy(update={"scheme": "color", "mean": 0.0, "std": 1e-3})
        (got,) = prepare([case], tiny.plan().model_copy(update={"channels": (wide,)}), tmp_path)
        assert np.isfinite(got.image).all()
        assert got.image.max() > 65504

    def test_files_are_safetensors_with_readable_facts(self, dataset: Path, tmp_path: Path) -> None:
        prepare(load_dataset(dataset).cases[:1], tiny.plan(), tmp_path)
        (path,) = tmp_path.iterdir()
        with path.open("rb") as file:
            head = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        assert set(head) == {"__metadata__", "image", "label", "places"}
        assert head["image"]["dtype"] == "F16"
