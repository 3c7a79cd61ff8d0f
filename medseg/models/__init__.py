"""The table of models and the one function that builds them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

from medseg.models.encoders import DEFAULT_ENCODER, DeepLabV3Plus, EncoderUNet
from medseg.models.network import SegmentationNetwork
from medseg.models.sam_med import SamMed
from medseg.models.unet import UNet

__all__ = ["MODELS", "ModelInfo", "build_model"]


@dataclass(frozen=True)
class ModelInfo:
    """One row of the table of models: what it is for and how it is built.

    ``options`` are what the architecture takes beyond the channels, with their defaults: a plan gives ``features``,
    ``strides`` and ``kernels`` to models that have ``features``, and the name of an ``encoder`` to those that have that.
    ``needs`` is the package beyond medseg's own, of the extra ``extra``. Networks for ``whole_slices`` bring each to a
    size of their own; others see patches.
    """

    build: Callable[..., SegmentationNetwork]
    task: str
    dims: int
    when: str
    licence: str = "Apache-2.0"
    options: Mapping[str, Any] = field(default_factory=dict)
    needs: str | None = None
    extra: str | None = None
    whole_slices: bool = False

    @property
    def encoder(self) -> str | None:
        """Name of the encoder by default, or None for networks that are planned stage by stage."""
        name: str | None = self.options.get("encoder")
        return name

    @property
    def installed(self) -> bool:
        """Whether what it needs is installed."""
        return self.needs is None or find_spec(self.needs) is not None


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
    "unet2d-encoder": ModelInfo(
        EncoderUNet,
        task="semantic",
        dims=2,
        when="few labelled 2D images: the encoder can start from ImageNet",
        licence="Apache-2.0; library MIT, encoders as timm says",
        options={"encoder": DEFAULT_ENCODER},
        needs="segmentation_models_pytorch",
        extra="encoders",
    ),
    "deeplabv3plus": ModelInfo(
        DeepLabV3Plus,
        task="semantic",
        dims=2,
        when="2D images with large structures in context; the encoder can start from ImageNet",
        licence="Apache-2.0; library MIT, encoders as timm says",
        options={"encoder": DEFAULT_ENCODER},
        needs="segmentation_models_pytorch",
        extra="encoders",
    ),
    "sam-med": ModelInfo(
        SamMed,
        task="semantic",
        dims=2,
        when="few labelled slices: the encoder of LiteMedSAM or SAM stays frozen and sees each slice once",
        licence="Apache-2.0; weights as their authors say",
        options={"encoder": "lite-medsam"},
        needs="segment_anything",
        extra="sam",
        whole_slices=True,
    ),
}


def build_model(name: str, *, in_channels: int, out_channels: int, **options: Any) -> SegmentationNetwork:
    """Build a model of the table, with fresh weights.

    Parameters
    ----------
    name : str
        A key of :data:`MODELS`.
    in_channels, out_channels : int
        Channels of the image and of the logits.
    **options
        What the architecture takes beyond that (``features``, ``strides``, ``kernels``; or ``encoder``).

    Raises
    ------
    ValueError
        If the name is not in the table, or an extra that it needs is not installed.
    """
    if name not in MODELS:
        raise ValueError(f"model must be one of {', '.join(MODELS)}, got {name!r}")
    info = MODELS[name]
    if not info.installed:
        raise ValueError(f"model {name} must have {info.needs}, got none; pip install 'medseg[{info.extra}]'")
    return info.build(in_channels, out_channels, **{**info.options, **options})
