"""The table of models and the one function that builds them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from medseg.models.unet import UNet

__all__ = ["MODELS", "ModelInfo", "build_model"]


@dataclass(frozen=True)
class ModelInfo:
    """One row of the table of models: what it is for and how it is built."""

    build: Callable[..., nn.Module]
    task: str
    dims: int
    when: str
    licence: str = "Apache-2.0"
    options: Mapping[str, Any] = field(default_factory=dict)


MODELS: dict[str, ModelInfo] = {
    "unet2d": ModelInfo(
        UNet,
        task="semantic",
        dims=2,
        when="2D images, or volumes with few or very thick slices",
        options={"dims": 2, "features": (32, 64, 128, 256, 256)},
    ),
    "unet3d": ModelInfo(
        UNet,
        task="semantic",
        dims=3,
        when="volumes: the default",
        options={"dims": 3, "features": (32, 64, 128, 256)},
    ),
}


def build_model(name: str, *, in_channels: int, out_channels: int, **options: Any) -> nn.Module:
    """Build a model of the table.

    Parameters
    ----------
    name : str
        A key of :data:`MODELS`.
    in_channels, out_channels : int
        Channels of the image and of the logits.
    **options
        What the architecture takes beyond that (``features``, ``strides``, ``kernels`` ...).

    Raises
    ------
    ValueError
        If the name is not in the table.
    """
    if name not in MODELS:
        raise ValueError(f"model must be one of {', '.join(MODELS)}, got {name!r}")
    info = MODELS[name]
    return info.build(in_channels, out_channels, **{**info.options, **options})
