"""Pictures show the right side in the right place; the report is one safe, complete HTML file."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from conftest import rotation
from PIL import Image

from medseg.report import (
    Facts,
    Interval,
    Named,
    Picture,
    Section,
    Table,
    Text,
    curve_picture,
    metrics_blocks,
    overview_picture,
    picture_blocks,
    plan_table,
    planes_picture,
    report_of_prediction,
    report_of_run,
    run_sections,
    volume_table,
    write_report,
)
from medseg.report_html import Block
from medseg.volume import Geometry, GeometryError, LabelMap, Structure, Volume

RED, BLUE = (255, 0, 0), (0, 0, 255)
NAMES = (Structure(1, "one", RED), Structure(2, "two", BLUE))


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def panels(picture: np.ndarray) -> list[np.ndarray]:
    """The planes of a picture: columns and rows that are not the dark background (13, 17, 23)."""
    is_dark = (np.abs(picture - (13, 17, 23)).max(axis=2) <= 3).all(axis=0)
    edges = np.flatnonzero(np.diff(np.concatenate([[True], is_dark, [True]]).astype(int)))
    return [picture[:, a:b] for a, b in zip(edges[::2], edges[1::2], strict=True) if b - a > 20]


def colored(picture: np.ndarray, color: tuple[int, int, int]) -> np.ndarray:
    """(n, 2) rows and columns of pixels that are purely of a colour, the legend at the bottom left out."""
    found = np.argwhere(np.abs(picture - color).max(axis=2) < 40)
    return found[found[:, 0] < len(picture) - 60]


def scene(axes: str, affine_turn: np.ndarray | None = None) -> tuple[Volume, LabelMap]:
    """A grey scan of 60 x 84 x 40 mm (along R, A, S) stored along other axes, with a cube at the patient's right,
    anterior, superior corner (structure 1) and one at the opposite corner (structure 2)."""
    spacing = {"R": 1.5, "A": 3.0, "S": 2.0}
    shape = {"R": 40, "A": 28, "S": 20}
    world = [next(w for w, pair in enumerate(("RL", "AP", "SI")) if letter in pair) for letter in axes]
    direction = np.zeros((3, 3))
    for axis, (letter, w) in enumerate(zip(axes, world, strict=True)):
        direction[w, axis] = 1 if letter in "RAS" else -1
    order = ["RAS"[w] for w in world]
    size = tuple(shape[o] for o in order)
    turn = np.eye(3) if affine_turn is None else affine_turn
    grid = Geometry.from_parts(size, [spacing[o] for o in order], (5, -7, 11), turn @ direction)
    labels = np.zeros(size, np.uint8)
    for number, corner in ((1, True), (2, False)):
        box = []
        for letter, n in zip(axes, size, strict=True):
            towards_end = corner == (letter in "RAS")
            box.append(slice(n - n // 3 - 1, n - 1) if towards_end else slice(1, 1 + n // 3))
        labels[tuple(box)] = number
    image = np.where(labels > 0, 900, 400).astype(np.int16)
    image[tuple(slice(0, 1) for _ in range(3))] = 1000
    return Volume(image, grid, {"modality": "MR"}), LabelMap(labels, grid, NAMES)


# --- pictures


@pytest.mark.parametrize("axes", ["RAS", "LPS", "SAR", "PIR", "ALI"])
def test_planes_are_radiological_whatever_the_storage(axes: str) -> None:
    image, labels = scene(axes, rotation((0.15, -0.2, 0.1)))
    for structure, is_first in ((1, True), (2, False)):
        one = LabelMap(np.where(labels.array == structure, labels.array, 0), labels.geometry, labels.structures)
        color = RED if is_first else BLUE
        # Axial: right on the left, anterior on top. Coronal: right on the left, superior on top. Sagittal: anterior on
        # the left, superior on top. So the first cube is always upper left, the second always lower right.
        for panel in panels(pixels(planes_picture(image, one))):
            rows, columns = colored(panel, color).mean(axis=0)
            height, width = panel.shape[0] - 60, panel.shape[1]
            assert (rows < height / 2) == is_first
            assert (columns < width / 2) == is_first


def test_storage_does_not_change_the_picture() -> None:
    assert planes_picture(*scene("RAS")) == planes_picture(*scene("PIR"))


def test_pixels_have_their_proportions_in_mm() -> None:
    image, labels = scene("LPS")
    axial, coronal, sagittal = panels(pixels(planes_picture(image, labels)))
    for panel, (across, down) in ((axial, (60, 84)), (coronal, (60, 40)), (sagittal, (84, 40))):
        where = np.flatnonzero((np.abs(panel - (13, 17, 23)).max(axis=2) > 3).any(axis=1))
        height = np.flatnonzero(np.diff(where) > 3)
        height = (where[height[0]] if len(height) else where[-1]) - where[0] + 1
        assert panel.shape[1] / height == pytest.approx(across / down, rel=0.02)


def test_contours_lie_on_the_edge_of_the_mask() -> None:
    image, labels = scene("RAS")
    one = LabelMap((labels.array == 1).astype(np.uint8), labels.geometry, NAMES[:1])
    axial = panels(pixels(planes_picture(image, one)))[0]
    found = colored(axial, RED)
    (top, left), (bottom, right) = found.min(axis=0), found.max(axis=0)
    scale = axial.shape[1] / 60  # pixels per mm; the cube is 13 x 1.5 mm wide and starts 1 voxel from the right side
    assert right - left == pytest.approx(13 * 1.5 * scale, abs=5)
    assert bottom - top == pytest.approx(9 * 3.0 * scale, abs=5)
    assert left == pytest.approx(1.5 * scale, abs=4)


@pytest.mark.parametrize(("window", "ink"), [((0, 1e9), (255, 255, 255)), ((-1e9, 0), (0, 0, 0))])
def test_reference_is_seen_on_black_and_on_white(window: tuple[float, float], ink: tuple[int, int, int]) -> None:
    """White dashes, with a black rim where the scan is white, too."""
    image, labels = scene("RAS")
    moved = LabelMap(np.roll(labels.array, 4, axis=0), labels.geometry, NAMES)
    alone, both = (pixels(planes_picture(image, labels, r, window=window)) for r in (None, moved))
    assert len(colored(both, ink)) > len(colored(alone, ink)) + 1000


def test_the_inside_is_tinted_on_demand() -> None:
    image, labels = scene("RAS")
    alone = pixels(planes_picture(image, labels))
    tinted = pixels(overview_picture(image, labels))
    bluish = (alone[..., 2] - alone[..., 0] > 30).sum()  # the planes go through the blue cube
    assert (tinted[..., 2] - tinted[..., 0] > 30).sum() > 3 * bluish > 0


def test_planes_of_disagreement() -> None:
    image, labels = scene("RAS")
    array = np.array(labels.array)
    array[30:38, 3, 8:12] = 2  # only the prediction has this
    wrong = LabelMap(array, labels.geometry, NAMES)
    area = planes_picture(image, wrong, labels)
    differing = planes_picture(image, wrong, labels, focus="disagreement")
    assert area != differing
    # Prediction and reference that agree: the planes of the largest area.
    assert planes_picture(image, labels, labels, focus="disagreement") == planes_picture(image, labels, labels)


def test_overlapping_layers_are_shown_as_they_are() -> None:
    image, labels = scene("RAS")
    layers = np.stack([labels.array == 1, labels.array > 0])
    layered = LabelMap(layers, labels.geometry, NAMES)
    found = pixels(planes_picture(image, layered))
    assert len(colored(found, BLUE)) > 100
    probabilities = LabelMap(layers * np.float32(0.8), labels.geometry, NAMES)
    assert np.array_equal(pixels(planes_picture(image, probabilities)), found)


def test_a_single_slice_and_a_color_picture_give_one_plane(tmp_path: Path) -> None:
    grid = Geometry.from_parts((50, 30, 1), (1, 1, 1), direction=np.diag([-1.0, -1, 1]))
    array = np.zeros((3, 50, 30, 1), np.uint8)
    array[1] = 200
    labels = np.zeros((50, 30, 1), np.uint8)
    labels[5:15, 3:9] = 1  # first columns, first rows: upper left, as the picture is stored
    found = panels(pixels(planes_picture(Volume(array, grid, {"path": "x.png"}), LabelMap(labels, grid, NAMES[:1]))))
    assert len(found) == 1
    rows, columns = colored(found[0], RED).mean(axis=0)
    assert rows < (len(found[0]) - 60) / 2
    assert columns < found[0].shape[1] / 2
    assert (np.abs(found[0] - (0, 200, 0)).max(axis=2) < 5).mean() > 0.5


def test_nothing_found_still_gives_a_picture() -> None:
    image, labels = scene("RAS")
    empty = LabelMap(np.zeros_like(labels.array), labels.geometry, NAMES)
    assert len(panels(pixels(planes_picture(image, empty, empty, focus="disagreement", zoom=True)))) == 3


def test_grids_must_agree() -> None:
    image, labels = scene("RAS")
    with pytest.raises(GeometryError, match="prediction and image must lie on the same grid"):
        planes_picture(image, scene("LPS")[1])
    with pytest.raises(GeometryError, match="reference and image"):
        planes_picture(image, labels, scene("LPS")[1])
    with pytest.raises(ValueError, match="channel must be below"):
        planes_picture(image, labels, channel=1)


def test_curve() -> None:
    history = [{"step": n, "minutes": n / 2, "loss": 1 / n, "iou": 1 - 1 / n} for n in range(1, 9)]
    picture = Image.open(io.BytesIO(curve_picture(history)))
    assert picture.mode == "RGBA"
    assert picture.getpixel((2, 2))[3] == 0  # transparent: readable on light and dark pages
    assert curve_picture(history) != curve_picture([{k: v for k, v in row.items() if k != "iou"} for row in history])
    with pytest.raises(ValueError, match="rows with a loss"):
        curve_picture([])


# --- the page


class Page(HTMLParser):
    """Collects tags and text, and checks that every tag is closed in order."""

    VOID = {"meta", "img", "br", "rect", "link"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data.strip())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def page_of(path: Path, *blocks: Block, title: str = "t") -> Page:
    write_report(path / "report.html", [Section("Part", blocks)], title=title)
    return Page((path / "report.html").read_text(encoding="utf-8"))


EVIL = '<script>alert("x")</script><img src=https://example.org/x.png>'


def test_everything_from_data_is_escaped_and_nothing_is_loaded(tmp_path: Path) -> None:
    image = Picture(curve_picture([{"loss": 1.0}]), EVIL, EVIL)
    table = Table(EVIL, [EVIL], [[EVIL], [Named(EVIL, RED)]])
    write_report(
        tmp_path / "r.html",
        [Section(EVIL, [Text(EVIL), Facts({EVIL: EVIL}), image, table]), Section("b")],
        title=EVIL,
        subtitle=EVIL,
    )
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.all("script") == []
    assert "".join(page.words).count("alert") >= 9
    assert [i["src"] for i in page.all("img")] == [f"data:image/png;base64,{base64.b64encode(image.png).decode()}"]
    assert all((a["href"] or "").startswith("#") for a in page.all("a"))
    assert {a["href"][1:] for a in page.all("a") if a["href"]} == {s["id"] for s in page.all("section")}
    policy = next(m["content"] for m in page.all("meta") if m.get("http-equiv"))
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert not re.search(r"url\(|@import|https?:", re.sub(r"&lt;.*?&gt;", "", text.replace(EVIL, "")))
    assert page.all("html")[0] == {"lang": "en"}


def test_tables_are_readable_by_machines_and_screen_readers(tmp_path: Path) -> None:
    rows = [["a", 0.8123, None, Interval(0.5, 0.4, 0.6, True)], ["b", 1234.5, float("nan"), Interval(None)]]
    page = page_of(tmp_path, Table("Scores", ["case", "dice", "hd95", "iou"], rows))
    assert [h.get("scope") for h in page.all("th")] == ["col"] * 4 + ["row"] * 2
    assert len(page.all("caption")) == 1
    assert [h.get("class") for h in page.all("th")[:4]] == [None, "number", "number", "number"]
    assert page.words.count("undefined") == 3
    for shown in ("0.812", "1,234", "0.500", "0.400 – 0.600"):
        assert shown in page.words
    bar = page.all("svg")
    assert len(bar) == 1
    assert bar[0]["aria-hidden"] == "true"
    fill, span = page.all("rect")[1], page.all("rect")[2]
    assert (fill["width"], span["x"], span["width"]) == ("50.0", "40.0", "20.0")


def test_long_tables_are_folded(tmp_path: Path) -> None:
    rows = [[str(n), n] for n in range(40)]
    page = page_of(tmp_path, Table("Long", ["case", "n"], rows), Table("Open", ["case", "n"], rows, is_open=True))
    assert len(page.all("details")) == 1
    assert len(page.all("tr")) == 82


def test_pages_are_not_overwritten_unless_asked(tmp_path: Path) -> None:
    page_of(tmp_path)
    with pytest.raises(FileExistsError, match="output must not exist yet"):
        page_of(tmp_path)
    write_report(tmp_path / "report.html", [], title="ä — 2", force=True)
    assert "ä — 2" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


METRICS = {
    "cases": [
        {
            "case": "c1",
            "structure": "one",
            "iou": 0.5,
            "dice": 2 / 3,
            "volume_mm3": 2500.0,
            "reference_volume_mm3": 2000.0,
        },
        {"case": "c2", "structure": "one", "iou": None, "dice": None, "volume_mm3": 0.0, "reference_volume_mm3": 0.0},
        {"case": "c3", "structure": "", "error": "grids <differ>"},
    ],
    "summary": [
        {
            "structure": "one",
            "n": 2,
            "n_defined": 1,
            "iou": {"mean": 0.5, "ci95": [None, None]},
            "dice": {"mean": 2 / 3, "ci95": [0.6, 0.7]},
            "hd95_mm": {"mean": None, "ci95": [None, None]},
        }
    ],
}


class Scores:
    """As an Evaluation: JSON text."""

    def to_json(self) -> str:
        return json.dumps(METRICS)


@pytest.mark.parametrize("evaluation", [METRICS, Scores()])
def test_metrics(evaluation: object) -> None:
    summary, rows, failed = metrics_blocks(evaluation, {"one": RED})
    assert isinstance(summary, Table)
    assert isinstance(rows, Table)
    assert isinstance(failed, Table)
    assert summary.columns == ["structure", "defined / cases", "IoU", "Dice"]
    assert summary.rows == [
        [Named("one", RED), "1 / 2", Interval(0.5, None, None, True), Interval(2 / 3, 0.6, 0.7, True)]
    ]
    assert rows.columns == ["case", "structure", "IoU", "Dice", "volume (ml)", "reference (ml)"]
    assert rows.rows[0] == ["c1", Named("one", RED), 0.5, 2 / 3, 2.5, 2.0]
    assert rows.rows[1][2] is None
    assert failed.rows == [["c3", "grids <differ>"]]


PLAN = {
    "format": 1,
    "model": "unet3d",
    "channels": [{"name": "CT", "scheme": "ct", "low": -100.0}, {"name": "T1", "scheme": "zscore", "low": 0.0}],
    "structures": [{"number": 1, "name": "one", "color": [255, 0, 0]}],
    "spacing": [1.0, 0.75, None],
    "features": [16, 32],
    "mirror": [],
    "reasons": {"model": "the images are volumes", "crf": "did not help"},
}


def test_plan() -> None:
    table = plan_table(PLAN)
    assert [[row[0], row[1]] for row in table.rows] == [
        ["model", "unet3d"],
        ["channels", "CT (scheme ct, low -100); T1 (z-score of each image)"],
        ["structures", "one (number 1)"],
        ["spacing (mm)", "1 × 0.75 × as it is"],
        ["features", "16, 32"],
        ["mirror", "none"],
        ["crf", ""],
    ]
    assert table.rows[0][2] == "the images are volumes"


def test_run_and_prediction(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    assert run_sections(tmp_path / "run") == []
    history = [{"minutes": 1.0, "loss": 0.4, "iou": 0.7}, {"minutes": 2.0, "loss": 0.3, "iou": 0.65}]
    files = {"plan": PLAN, "history": history, "metrics": METRICS, "environment": {"torch": "2.8.0"}}
    for name, content in files.items():
        (tmp_path / f"run/{name}.json").write_text(json.dumps(content))
    assert [s.title for s in run_sections(tmp_path / "run")] == ["Validation", "Training", "Plan", "Versions"]
    written = report_of_run(tmp_path / "run")
    page = Page(written.read_text(encoding="utf-8"))
    assert "0.700 at best" in " ".join(page.words)
    assert report_of_run(tmp_path / "run", notes=["again"]) == written

    image, labels = scene("LPS")
    report_of_prediction(
        tmp_path / "p.html", title="P", image=image, prediction=labels, reference=labels, evaluation=METRICS,
        run=tmp_path / "run", notes=["The CRF is not applied."],
    )  # fmt: skip
    page = Page((tmp_path / "p.html").read_text(encoding="utf-8"))
    assert len(page.all("img")) == 3
    assert all(i["alt"] for i in page.all("img"))
    assert "The CRF is not applied." in page.words
    report_of_prediction(tmp_path / "q.html", title="Q", image=image, prediction=labels)
    assert len(Page((tmp_path / "q.html").read_text(encoding="utf-8")).all("img")) == 1
    assert len(picture_blocks("c", image, labels)) == 1


def test_volumes() -> None:
    _, labels = scene("PIR")
    table = volume_table(labels)
    voxels = int((labels.array == 1).sum())
    assert table.rows[0] == [Named("one", RED), voxels, pytest.approx(voxels * 1.5 * 3.0 * 2.0 / 1000)]
