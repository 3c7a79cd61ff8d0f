"""medseg: medical image segmentation, from a scan to contours.

Public names load on first use, so ``import medseg`` takes milliseconds and pulls in no torch.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "Geometry": "volume",
    "GeometryError": "volume",
    "DicomError": "volume",
    "Volume": "volume",
    "LabelMap": "volume",
    "Structure": "volume",
    "read": "io",
    "read_labels": "io",
    "write": "io",
    "list_series": "io",
    "convert": "io.convert",
    "resample_to": "resample",
    "reorient": "resample",
    "crop": "resample",
    "straighten": "resample",
    "load_dataset": "data",
    "check": "doctor",
    "Plan": "plan",
    "make_plan": "plan",
    "TrainConfig": "config",
    "train": "training",
    "Run": "run",
    "Predictor": "inference",
    "predict": "inference",
    "evaluate": "evaluation",
    "refine": "crf",
    "CRFParameters": "crf",
    "PromptSession": "prompt",
    "MODELS": "models",
    "build_model": "models",
}
_MODULES = (
    "batch",
    "boxes",
    "contours",
    "crf",
    "crf_fit",
    "crf_transform",
    "cross_validation",
    "data",
    "demo",
    "device",
    "embeddings",
    "evaluation",
    "finetuning",
    "io",
    "lesions",
    "losses",
    "metrics",
    "models.sam2",
    "plan",
    "probability_maps",
    "prompt",
    "propagation",
    "report",
    "report_evaluation",
    "scores",
    "statistics",
    "windows",
)

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        value = getattr(import_module(f"medseg.{_PUBLIC[name]}"), name)
        globals()[name] = value
        return value
    if name in _MODULES:
        return import_module(f"medseg.{name}")
    raise AttributeError(f"module 'medseg' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC, *_MODULES})
