"""Sessions of prompts: objects, undo and redo, logs, orientations, errors; with a tiny model and a phantom."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import rotation
from hypothesis import given, settings
from hypothesis import strategies as st
from promptable import Bright, ball, phantom

from medseg.prompt import PromptSession
from medseg.prompt_log import PromptLog, packed, unpacked
from medseg.resample import reorient
from medseg.volume import Geometry, GeometryError, LabelMap, Volume

OBLIQUE = Geometry.from_parts((36, 30, 14), (1.5, 1.8, 4.0), (-20, 15, 300), rotation((0.15, -0.1, 0.2)))
BOTH = frozenset({"box", "point"})


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return 2 * float((a & b).sum()) / float(a.sum() + b.sum())


def widest(mask: np.ndarray, axis: int) -> tuple[int, list[float]]:
    """The slice across an axis where a mask is largest, and the flat box around it there (i0, j0, k0, i1, j1, k1)."""
    n = int(mask.sum(axis=tuple(a for a in range(3) if a != axis)).argmax())
    index = np.argwhere(np.moveaxis(np.moveaxis(mask, axis, 0)[n : n + 1], 0, axis))
    index[:, axis] = n
    return n, [*index.min(0).tolist(), *index.max(0).tolist()]


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_box_on_a_slice_across_each_axis_gives_the_volume(axis: int) -> None:
    image, one, two = phantom(OBLIQUE)
    session = PromptSession(image, Bright())
    session.box("one", widest(one, axis)[1])
    session.box("two", widest(two, axis)[1])
    labels = session.labels()
    assert labels.geometry == image.geometry and labels.names == {1: "one", 2: "two"}
    assert dice(labels.mask("one"), one) > 0.9 and dice(labels.mask("two"), two) > 0.9


def test_a_box_in_space_bounds_its_object() -> None:
    image, one, _ = phantom(OBLIQUE)
    index = np.argwhere(one)
    low, high = index.min(0), index.max(0)
    session = PromptSession(image, Bright())
    session.box("one", [*low, *high])
    assert dice(session.contour("one"), one) > 0.93
    session.box("one", [*low, *(high - [0, 0, 2])])
    found = np.argwhere(session.contour("one"))
    assert (found.min(0) >= low).all() and found[:, 2].max() == high[2] - 2


def test_boxes_in_mm_on_the_same_voxels() -> None:
    straight = Geometry.from_parts((36, 30, 14), (1.5, 1.8, 4.0), (-20, 15, 300), np.diag([-1, -1, 1]))
    image, one, _ = phantom(straight)
    corners = straight.to_world(np.reshape(widest(one, 2)[1], (2, 3)))
    session, other = PromptSession(image, Bright()), PromptSession(image, Bright())
    session.box("one", widest(one, 2)[1])
    other.box("one", np.sort(corners, axis=0).ravel(), units="mm")
    assert np.array_equal(session.contour("one"), other.contour("one"))


@settings(max_examples=8)
@given(st.permutations("RAS"), st.tuples(*[st.booleans()] * 3))
def test_the_order_of_axes_does_not_matter(order: list[str], flips: tuple[bool, ...]) -> None:
    """The same scan stored another way gives the same voxels in space."""
    image, one, _ = phantom(OBLIQUE)
    letters = "".join({"R": "RL", "A": "AP", "S": "SI"}[c][f] for c, f in zip(order, flips, strict=True))
    turned = reorient(image, letters)
    world = OBLIQUE.to_world(np.reshape(widest(one, 2)[1], (2, 3)))
    ends = np.sort(np.round(turned.geometry.to_index(world)), axis=0)
    first, second = PromptSession(image, Bright()), PromptSession(turned, Bright())
    first.box("one", widest(one, 2)[1])
    second.box("one", ends.ravel())
    back = reorient(second.labels(), OBLIQUE.orientation)
    assert np.array_equal(back.mask("one"), first.contour("one"))


def commands() -> st.SearchStrategy[list[tuple[str, int]]]:
    names = st.sampled_from(["box", "slice", "in", "out", "mask", "remove", "undo", "redo"])
    return st.lists(st.tuples(names, st.integers(0, 1)), max_size=9)


def give(session: PromptSession, what: str, number: int, masks: tuple[np.ndarray, np.ndarray]) -> None:
    name, mask = ("one", "two")[number], masks[number]
    box = widest(mask, 2)[1]
    middle = np.round(np.mean(np.reshape(box, (2, 3)), axis=0))
    if what == "box":
        session.box(name, box)
    elif what == "slice":
        session.box(name, [*(np.add(box, [0, 0, 1, 0, 0, 1]))], spread=False)
    elif what in ("in", "out"):
        session.scribble(name, [middle, np.add(middle, (1, 2, 0))], inside=what == "in")
    elif what == "mask":
        session.mask(name, mask)
    elif what == "remove" and name in session.objects:
        session.remove(name)
    elif what == "undo":
        session.undo()
    elif what == "redo":
        session.redo()


@settings(max_examples=25)
@given(commands())
def test_undo_redo_and_replay(given_commands: list[tuple[str, int]]) -> None:
    image, one, two = phantom(OBLIQUE)
    session = PromptSession(image, Bright())
    for what, number in given_commands:
        give(session, what, number, (one, two))
    before, prompts = session.labels(), session.log.prompts
    again = PromptSession(image, Bright())
    again.replay(session.log)
    assert same(again.labels(), before) and again.log == session.log
    steps = 0
    while session.undo():
        steps += 1
    assert steps == len(prompts) and session.objects == () and not session.labels().array.any()
    for _ in range(steps):
        assert session.redo()
    assert session.log.prompts == prompts and same(session.labels(), before)


def same(a: LabelMap, b: LabelMap) -> bool:
    return a.names == b.names and all(np.array_equal(a.mask(n), b.mask(n)) for n in a.names)


def test_objects_do_not_influence_each_other() -> None:
    image, one, two = phantom(OBLIQUE)
    session, other = PromptSession(image, Bright()), PromptSession(image, Bright())
    give(session, "box", 0, (one, two))
    give(session, "box", 1, (one, two))
    give(session, "out", 0, (one, two))
    give(other, "box", 1, (one, two))
    assert np.array_equal(session.contour("two"), other.contour("two"))
    give(other, "box", 0, (one, two))
    give(other, "out", 0, (one, two))
    assert np.array_equal(session.contour("one"), other.contour("one"))


def test_a_prompt_after_an_undo_forgets_what_was_undone() -> None:
    image, one, two = phantom(OBLIQUE)
    session = PromptSession(image, Bright())
    give(session, "box", 0, (one, two))
    assert session.undo() and not session.undo()
    give(session, "box", 1, (one, two))
    assert not session.redo() and session.objects == ("two",)


def test_slices_are_encoded_once_and_only_where_needed() -> None:
    image, one, _ = phantom(OBLIQUE)
    model = Bright()
    session = PromptSession(image, model)
    assert model.encoded == 0
    session.box("one", widest(one, 2)[1], spread=False)
    assert model.encoded == 0
    session.contour("one")
    assert model.encoded == 1
    session.contour("one")
    assert (model.encoded, model.decoded) == (1, 2)  # a look at whether it is large enough, and the mask
    session.scribble("one", [widest(one, 2)[1][:3], widest(one, 2)[1][3:]])
    session.contour("one")
    assert model.encoded == 1


def test_scribbles_take_tissue_away_and_add_it() -> None:
    geometry = Geometry.from_parts((60, 50, 3), (1, 1, 3))
    voxels = np.full(geometry.shape, -150, np.int16)
    voxels[10:30, 15:35], voxels[30:42, 20:30] = 100, 110  # an organ, and another that touches it
    session = PromptSession(Volume(voxels, geometry, {"modality": "CT"}), Bright())
    session.box("organ", (10, 15, 1, 41, 34, 1), spread=False)
    before = session.contour("organ").copy()
    assert before[10:42, 20:30, 1].all()
    session.scribble("organ", [(37, 22, 1), (37, 28, 1)], inside=False)
    after = session.contour("organ")
    assert not after[35:42, 22:28, 1].any() and after[12:26, 16:34, 1].all()
    session.scribble("organ", [(5, 5, 1), (7, 5, 1)])
    more = session.contour("organ")
    assert more[5:8, 5, 1].all() and not more[:, :, [0, 2]].any()
    session.undo()
    assert np.array_equal(session.contour("organ"), after)


def test_a_scribble_alone_is_a_box_for_a_model_of_boxes() -> None:
    image, one, _ = phantom(OBLIQUE)
    n, box = widest(one, 2)
    session = PromptSession(image, Bright())
    index = np.argwhere(one[:, :, n])
    ends = [index[index[:, a].argsort()[m]] for a in (0, 1) for m in (0, -1)]  # across the whole width and height
    session.scribble("one", [(*end, n) for end in (ends[0], ends[1], index.mean(0), ends[2], ends[3])], spread=False)
    other = PromptSession(image, Bright())
    other.box("one", box, spread=False)
    found, expected = session.contour("one")[:, :, n], other.contour("one")[:, :, n]
    assert (found | expected)[expected].all() and dice(found, expected) > 0.9


def test_an_outside_scribble_ends_an_object_and_a_second_box_leads_it() -> None:
    image, one, _ = phantom(OBLIQUE)
    n, box = widest(one, 2)
    session = PromptSession(image, Bright())
    session.box("one", box)
    full = session.contour("one").copy()
    assert full[:, :, n + 2].any()
    i, j = np.argwhere(full[:, :, n + 1]).mean(0).round()
    session.scribble("one", [(0, 0, n + 1), (1, 1, n + 1)], inside=False)
    assert dice(session.contour("one")[:, :, n + 1], full[:, :, n + 1]) > 0.9  # far from it, little changes
    session.box("one", [*np.add(box, [0, 0, 2, 0, 0, 2])])
    assert dice(session.contour("one"), one) > 0.9 and session.contour("one")[int(i), int(j), n + 1]


def test_points_need_a_model_that_takes_them() -> None:
    image, one, _ = phantom(OBLIQUE)
    session = PromptSession(image, Bright())
    with pytest.raises(ValueError, match=r"trained with \(box\), got a point; draw a box"):
        session.point("one", (3, 3, 3))
    assert session.objects == ()
    n, box = widest(one, 2)
    middle = np.round(np.mean(np.reshape(box, (2, 3)), axis=0))
    other = PromptSession(image, Bright(BOTH))
    other.point("one", middle, spread=False)
    before = other.contour("one").copy()
    assert before[tuple(middle.astype(int))] and dice(before[:, :, n], one[:, :, n]) > 0.9
    beside = np.add(middle, (3, 0, 0)).astype(int)
    other.point("one", beside, inside=False, spread=False)
    assert not other.contour("one")[tuple(beside)]
    other.box("one", box)
    assert other.contour("one")[:, :, n].any() and not other.contour("one")[tuple(beside)]


def test_masks_as_prompts() -> None:
    image, one, _ = phantom(OBLIQUE)
    session = PromptSession(image, Bright())
    session.mask("one", one)
    assert dice(session.contour("one"), one) > 0.93
    single = np.zeros_like(one)
    n = widest(one, 2)[0]
    single[:, :, n] = one[:, :, n]
    session.mask("alone", single, spread=True)
    assert dice(session.contour("alone"), one) > 0.93
    with pytest.raises(ValueError, match="mask must have voxels"):
        session.mask("none", np.zeros_like(one))
    with pytest.raises(ValueError, match="mask must be bool"):
        session.mask("other", np.zeros((3, 4, 5), bool))


def test_colour_pictures_and_overlapping_objects() -> None:
    geometry = Geometry.from_parts((40, 30, 1), (1, 1, 1), (0, 0, 0), np.diag([-1, -1, 1]))
    picture = np.zeros((3, 40, 30, 1), np.uint8)
    picture[:, 8:20, 6:18] = 200
    session = PromptSession(Volume(picture, geometry), Bright())
    assert session.window.name == "colour"
    session.box("polyp", (8, 6, 19, 17))
    session.box("half", (8, 6, 13, 17))
    labels = session.labels()
    assert labels.is_layered and np.array_equal(labels.mask("polyp")[..., 0], picture[0, ..., 0] > 0)


def test_logs_are_files(tmp_path: Path) -> None:
    image, one, two = phantom(OBLIQUE)
    session = PromptSession(image, Bright(), window=(-150.0, 250.0))
    give(session, "box", 0, (one, two))
    give(session, "mask", 1, (one, two))
    session.log.save(tmp_path / "log.json")
    again = PromptSession(image, Bright(), window="-150,250")
    again.replay(tmp_path / "log.json")
    assert same(again.labels(), session.labels())
    with pytest.raises(ValueError, match="window must be that of the log"):
        PromptSession(image, Bright()).replay(tmp_path / "log.json")
    with pytest.raises(ValueError, match="fingerprint must be that of the log"):
        PromptSession(image, Bright(fingerprint="1"), window="-150,250").replay(tmp_path / "log.json")
    shifted = replace(image, geometry=image.geometry.cropped((1, 0, 0), (37, 30, 14)))
    with pytest.raises(GeometryError, match="same grid"):
        PromptSession(shifted, Bright(), window="-150,250").replay(tmp_path / "log.json")
    other = Volume(image.array + np.int16(1), image.geometry, image.meta)
    with pytest.warns(UserWarning, match="not those that the log"):
        PromptSession(other, Bright(), window="-150,250").replay(tmp_path / "log.json")
    content = json.loads((tmp_path / "log.json").read_text())
    for broken in ({**content, "version": 9}, {"a": 1}, {**content, "prompts": [{"kind": "wish"}]}, [1]):
        (tmp_path / "broken.json").write_text(json.dumps(broken))
        with pytest.raises(ValueError, match="log must be"):
            PromptLog.load(tmp_path / "broken.json")
    with pytest.raises(FileNotFoundError):
        PromptLog.load(tmp_path / "none.json")


@given(st.integers(0, 1000))
def test_masks_survive_packing(seed: int) -> None:
    generator = np.random.default_rng(seed)
    mask = generator.random((7, 5, 9)) > 0.9
    mask[2, 3, 4] = True
    assert np.array_equal(unpacked(packed(mask), (7, 5, 9)), mask)


def test_bad_input(tmp_path: Path) -> None:
    image, one, _ = phantom(OBLIQUE)
    spoilt = np.array(image.array, np.float32)
    spoilt[0, 3, 4, 5] = np.nan
    with pytest.raises(ValueError, match="finite, got 1 NaN"):
        PromptSession(Volume(spoilt, image.geometry, image.meta), Bright())
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cache must be a folder"):
        PromptSession(image, Bright(), cache=tmp_path / "file")
    with pytest.raises(FileNotFoundError, match="checkpoint"):
        PromptSession(image, "sam-vit-b", checkpoint=tmp_path / "none.pth")
    session = PromptSession(image, Bright())
    with pytest.raises(ValueError, match="name of an object"):
        session.box(" ", widest(one, 2)[1])
    with pytest.raises(ValueError, match="object must be one of none yet"):
        session.contour("liver")
    with pytest.raises(ValueError, match="scribble must be on one slice"):
        session.scribble("one", [(3, 3, 3), (3, 4, 5)])
    session.box("one", widest(one, 2)[1])
    with pytest.raises(ValueError, match="across one axis"):
        session.box("one", widest(one, 0)[1])
    assert len(session.log.prompts) == 1


def test_a_ball_is_where_it_should_be() -> None:
    grid = Geometry.from_parts((9, 8, 7), (1, 2, 3))
    assert ball(grid, np.array([4.0, 6.0, 9.0]), (1.5, 1.5, 1.5)).sum() == 7 - 4


class Doubtful(Bright):
    """Sure of itself only where a structure fills a good part of what it sees."""

    def decode(self, embeddings, image_of, image_size, **prompts):  # type: ignore[no-untyped-def]
        logits, iou = super().decode(embeddings, image_of, image_size, **prompts)
        large = prompts["boxes"][:, 2] - prompts["boxes"][:, 0] > image_size[1] / 10
        return logits, iou * large + 0.3 * ~large


def test_small_structures_are_shown_near() -> None:
    geometry = Geometry.from_parts((400, 300, 5), (0.5, 0.7, 3.0))
    voxels = np.full(geometry.shape, -150, np.int16)
    voxels[300:306, 40:44, 1:4] = 100
    image, box = Volume(voxels, geometry, {"modality": "CT"}), (300, 40, 2, 305, 43, 2)
    far, near = PromptSession(image, Bright()), PromptSession(image, Doubtful())
    far.box("lesion", box)
    near.box("lesion", box)
    assert dice(near.contour("lesion"), voxels > 0) > 0.7
    assert dice(near.contour("lesion"), voxels > 0) > dice(far.contour("lesion"), voxels > 0) + 0.2
