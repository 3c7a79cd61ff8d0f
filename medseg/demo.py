"""The main job end to end on a brain MR that comes with an installed package.

The MNI152 template (T1 with maps of grey and white matter, 1 mm, shipped by nilearn) is written as a DICOM series and read
back; a small 3D U-Net is trained on blocks of the left hemisphere and predicts the right one from DICOM. The template is
symmetric, so the unseen hemisphere is nearly the mirror image of the one trained on: the demo shows that every part works
together, not how accurate a model is on another patient.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import pairwise
from os import PathLike
from pathlib import Path

import numpy as np

from medseg.config import TrainConfig
from medseg.crf_fit import CRFChoice, fit_crf
from medseg.data import load_dataset
from medseg.device import pick_device
from medseg.evaluation import Evaluation, evaluate
from medseg.inference import Predictor
from medseg.io import read, read_labels, write
from medseg.io.dicom_write import write_series
from medseg.io.files import atomic_folder, require_free
from medseg.plan import make_plan
from medseg.report import report_of_prediction
from medseg.resample import Value, crop, reorient
from medseg.run import Run
from medseg.training import train
from medseg.volume import LabelMap, Structure, Volume

__all__ = ["Demo", "run_demo"]

log = logging.getLogger("medseg")
MINUTES = 1.6  # of training, of under four in all on two cores
SPACING = (1.5, 1.5, 1.5)  # mm of the network's grid: a third of the voxels; labels come out at the scan's 1 mm
BLOCKS = 5  # of the hemisphere that is trained on, front to back; one of them is for validation
STRUCTURES = (Structure(1, "grey matter"), Structure(2, "white matter"))
MADE = ("metrics.json", "report.html", "scan", "run")  # by these a former demo is known
FILES = "mni_icbm152_{}_tal_nlin_sym_09a_converted.nii.gz"


@dataclass(frozen=True)
class Demo:
    """Where the demo's results are, and how good they are on the unseen hemisphere."""

    folder: Path
    evaluation: Evaluation
    crf: CRFChoice

    def __str__(self) -> str:
        lines = [
            f"{row['structure']}: IoU {row['iou']:.3f}, Dice {row['dice']:.3f}, HD95 {row['hd95_mm']:.2f} mm"
            for row in self.evaluation.rows
        ]
        lines += [f"mean IoU on the unseen hemisphere: {self.evaluation.mean('iou'):.3f}", self.crf.reason]
        names = {
            "report.html": "open this first",
            "segmentation.nii.gz": "label map on the scanner's grid",
            "segmentation.seg.dcm": "DICOM-SEG",
            "segmentation.rtstruct.dcm": "RTSTRUCT contours",
            "metrics.json": "the numbers above",
            "scan": "the DICOM series that was predicted",
            "run": "the trained model",
        }
        return "\n".join([*lines, *(f"{self.folder / name}  {what}" for name, what in names.items())])


def run_demo(out: str | PathLike[str], *, device: str = "auto", seed: int = 0, force: bool = False) -> Demo:
    """Do the main job and leave everything in a folder.

    Parameters
    ----------
    out : path
        Folder for the results; must not exist unless ``force``.
    device : str
        "auto", "cpu", "cuda" or "cuda:n".
    seed : int
        Of weights, patches and augmentation.
    force : bool
        Replace the folder of a former demo.

    Raises
    ------
    FileExistsError
        If the folder exists and ``force`` is not set, or holds anything but a former demo.
    FileNotFoundError
        If nilearn, which ships the images, is not installed.
    """
    out = require_replaceable(Path(out), force)
    image, labels = template()
    with atomic_folder(out, force=force) as work:
        log.info("1/5  writing the scan as DICOM and reading it back")
        middle = image.geometry.shape[0] // 2
        left, right = (0, middle), (middle + 1, image.geometry.shape[0])
        unseen, truth = half(image, right), half(labels, right)
        write_series(unseen, work / "scan", description="T1 right hemisphere", modality="MR")
        scan = read(work / "scan")
        distance = compare(unseen, scan)
        log.info("     same voxels on the same grid, corners within %.1e mm", distance)
        write_blocks(half(image, left), half(labels, left), work / "dataset")
        log.info("2/5  training a small 3D U-Net on the left hemisphere")
        config = TrainConfig(
            dataset=work / "dataset", out=work / "run", minutes=MINUTES, folds=BLOCKS, fold=2, seed=seed, device=device
        )
        plan = make_plan(
            load_dataset(config.dataset), device=str(pick_device(device)), minutes=MINUTES, spacing=SPACING
        )
        run = train(config, plan)
        log.info("3/5  trying the CRF on the validation block")
        choice = fit_crf(run, device=device)
        log.info("     %s", choice.reason)
        log.info("4/5  predicting the right hemisphere from DICOM and writing NIfTI, DICOM-SEG and RTSTRUCT")
        predicted = predict_and_write(run, scan, choice, work, device)
        log.info("5/5  evaluating and reporting")
        reference = replace(reorient(truth, scan.geometry.orientation), geometry=scan.geometry)
        write(reference, work / "reference.nii.gz")
        evaluation = evaluate({"right hemisphere": predicted}, {"right hemisphere": reference})
        evaluation.write(work)
        report_of_prediction(
            work / "report.html", title="medseg demo: grey and white matter of an unseen hemisphere", image=scan,
            prediction=predicted, reference=reference, evaluation=evaluation, run=run, notes=(DISCLAIMER, choice.reason),
        )  # fmt: skip
    return Demo(out, evaluation, choice)


DISCLAIMER = (
    "The MNI152 template is symmetric, so the unseen right hemisphere is nearly the mirror image of the left one that was "
    "trained on. These figures show that the parts work together; they say nothing about accuracy on other patients."
)


def require_replaceable(out: Path, force: bool) -> Path:
    """The folder, if it is new or, with ``force``, empty or a former demo: nothing else is ever deleted.

    Raises
    ------
    FileExistsError
        Otherwise.
    """
    require_free(out, force)
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"output must be a folder, got the file {out}; use another --out")
    if out.exists() and any(out.iterdir()) and not all((out / name).exists() for name in MADE):
        raise FileExistsError(f"output must be new or a former demo, got {out} with other files; use another --out")
    return out


def template() -> tuple[Volume, LabelMap]:
    """MNI152 T1 (1 mm) and its most probable tissue: 1 grey matter, 2 white matter."""
    spec = find_spec("nilearn")
    if spec is None or spec.origin is None:
        raise FileNotFoundError(
            'the demo needs the images that nilearn ships, got no nilearn; pip install "medseg[demo]"'
        )
    folder = Path(spec.origin).parent / "datasets" / "data"
    image, grey, white = (read(folder / FILES.format(kind)) for kind in ("t1", "gm", "wm"))
    g, w = (np.asarray(v.array[0], np.float32) / 255 for v in (grey, white))
    labels = np.where((g >= w) & (g > 1 - g - w), 1, np.where(w > 1 - g - w, 2, 0)).astype(np.uint8)
    return Volume(image.array, image.geometry, {"modality": "MR"}), LabelMap(labels, image.geometry, STRUCTURES)


def half(value: Value, along_i: tuple[int, int]) -> Value:
    """The part of a volume or label map between two indices of the first axis."""
    _, j, k = value.geometry.shape
    return crop(value, (along_i[0], 0, 0), (along_i[1], j, k))


def write_blocks(image: Volume, labels: LabelMap, folder: Path) -> None:
    """A data set of blocks of one hemisphere, cut from back to front."""
    i, j, k = image.geometry.shape
    edges = np.linspace(0, j, BLOCKS + 1).astype(int)
    for n, (start, stop) in enumerate(pairwise(edges.tolist())):
        window = (0, start, 0), (i, stop, k)
        write(crop(image, *window), folder / "images" / f"block{n}.nii.gz")
        write(crop(labels, *window), folder / "labels" / f"block{n}.nii.gz")


def compare(written: Volume, found: Volume) -> float:
    """Largest distance (mm) between corners of both grids, after checking that the voxels are the same.

    Raises
    ------
    GeometryError
        If corners lie more than 0.01 mm apart.
    ValueError
        If a voxel differs.
    """
    again = reorient(found, written.geometry.orientation)
    written.geometry.require_close(again.geometry, "the scan written and the one read back")
    if not np.array_equal(again.array, written.array):
        raise ValueError("voxels read back from DICOM must equal those written, got others")
    return written.geometry.corner_distance(again.geometry)


def predict_and_write(run: Run, scan: Volume, choice: CRFChoice, folder: Path, device: str) -> LabelMap:
    """Predict the scan, write it in three formats, and check that the DICOM objects hold the same voxels."""
    predictor = Predictor.load(run, device)
    predicted, _ = predictor.predict(scan, crf=choice.parameters)
    for name in ("segmentation.nii.gz", "segmentation.seg.dcm", "segmentation.rtstruct.dcm"):
        write(predicted, folder / name, source=folder / "scan")
        again = read_labels(folder / name, like=scan)
        if not all(np.array_equal(again.mask(s.name), predicted.mask(s.number)) for s in predicted.structures):
            raise ValueError(f"{name} must read back equal to what was written, got other voxels")
    return predicted
