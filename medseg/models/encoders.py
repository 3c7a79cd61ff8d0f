"""2D networks around an image classifier as encoder, whose weights may come from ImageNet or elsewhere.

The architectures are those of segmentation-models-pytorch, the encoders its own and timm's (names that begin with
``tu-``); this is a thin adapter. Nothing is downloaded: weights come through :func:`medseg.transfer.initialise`.

References
----------
Ronneberger, Fischer, Brox (2015), doi:10.1007/978-3-319-24574-4_28; Chen et al. (2018), doi:10.1007/978-3-030-01234-2_49;
Tan, Le (2019), arXiv:1905.11946.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from medseg.models.network import SegmentationNetwork

__all__ = ["DeepLabV3Plus", "EncoderUNet"]

DEFAULT_ENCODER = "tu-tf_efficientnet_lite0"  # 3.4 M parameters, fast on a CPU, its weights install with pip
DEPTH = 5  # poolings by 2 of the encoders


class _EncoderNetwork(SegmentationNetwork):
    """Encoder, decoder and head of a model of segmentation-models-pytorch."""

    def __init__(self, kind: str, in_channels: int, out_channels: int, encoder: str, **options: Any) -> None:
        super().__init__()
        import segmentation_models_pytorch as smp

        try:
            built = getattr(smp, kind)(
                encoder, encoder_weights=None, in_channels=in_channels, classes=out_channels, **options
            )
        except (KeyError, RuntimeError, TypeError, ValueError, NotImplementedError) as problem:
            known = f"one of segmentation-models-pytorch's ({', '.join(smp.encoders.get_encoder_names()[:4])} ...)"
            raise ValueError(
                f"encoder must be {known} or tu- and a model of timm that fits {kind}, got {encoder!r}: "
                f"{str(problem)[:160]}"
            ) from problem
        self.encoder, self.encoder_name = built.encoder, encoder
        self.decoder = built.decoder
        self.head = built.segmentation_head[0]
        self.in_channels = in_channels

    def _require_batch(self, image: Tensor, values: int) -> None:
        """Batch normalisation learns from at least two values a channel."""
        if self.training and values < 2:
            raise ValueError(
                f"batch must be at least 2 images of {tuple(image.shape[2:])} in training, got {len(image)}"
            )

    @property
    def divisor(self) -> tuple[int, ...]:
        return (2**DEPTH, 2**DEPTH)

    @property
    def input_tensors(self) -> tuple[str, ...]:
        for name, module in self.encoder.named_modules():
            if isinstance(module, nn.Conv2d) and module.in_channels == self.in_channels:
                return (f"encoder.{name}.weight",)
        return ()

    @property
    def output_tensors(self) -> tuple[str, ...]:
        return ("head.weight", "head.bias")


class EncoderUNet(_EncoderNetwork):
    """U-Net whose encoder is an image classifier.

    Parameters
    ----------
    in_channels, out_channels : int
        Channels of the image; channels of the logits.
    encoder : str
        A name of segmentation-models-pytorch ("resnet34", "efficientnet-b0", ...), or "tu-" and a name of timm.

    Notes
    -----
    Features lose half the resolution five times: 32 divides the patches that waste nothing. Memory and time grow linearly
    with the pixels.
    """

    def __init__(self, in_channels: int, out_channels: int, *, encoder: str = DEFAULT_ENCODER) -> None:
        super().__init__("Unet", in_channels, out_channels, encoder, encoder_depth=DEPTH)

    def decode(self, image: Tensor) -> list[Tensor]:
        self._require_batch(image, image[:, 0].numel() // 4**DEPTH)
        return [self.head(self.decoder(self.encoder(image)))]


class DeepLabV3Plus(_EncoderNetwork):
    """DeepLabV3+: dilated last features, pooled at several rates, fused with those of a quarter of the resolution.

    Parameters
    ----------
    in_channels, out_channels : int
        Channels of the image; channels of the logits.
    encoder : str
        As in :class:`EncoderUNet`; it must be able to dilate its last stage.

    Notes
    -----
    Upsampling is by pixel centres, where the library aligns corners: features then lie where their pixels are whatever
    the size of the patch, which overlapping windows need. Training takes batches of at least 2 images, since one branch
    pools the whole image into a single value before batch normalisation.
    """

    def __init__(self, in_channels: int, out_channels: int, *, encoder: str = DEFAULT_ENCODER) -> None:
        super().__init__("DeepLabV3Plus", in_channels, out_channels, encoder, encoder_depth=DEPTH)
        self.decoder.up = nn.Upsample(scale_factor=self.decoder.up.scale_factor, mode="bilinear", align_corners=False)

    def decode(self, image: Tensor) -> list[Tensor]:
        self._require_batch(image, len(image))
        logits = self.head(self.decoder(self.encoder(image)))
        return [F.interpolate(logits, size=image.shape[2:], mode="bilinear", align_corners=False)]
