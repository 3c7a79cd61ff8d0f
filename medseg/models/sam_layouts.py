"""The shapes that checkpoints of promptable models come in, and how their networks are built from installed packages.

References
----------
Kirillov et al. (2023), Segment Anything, arXiv:2304.02643; Ma et al. (2024), MedSAM, doi:10.1038/s41467-024-44824-z;
Zhang et al. (2023), MobileSAM, arXiv:2306.14289; Wu et al. (2022), TinyViT, arXiv:2207.10666.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

__all__ = ["LAYOUTS", "Layout", "decoders", "plain_names"]

SAM_MEAN = (123.675 / 255, 116.28 / 255, 103.53 / 255)  # of SAM's red, green and blue as shares of full intensity
SAM_STD = (58.395 / 255, 57.12 / 255, 57.375 / 255)
CLASSIFIER = ("image_encoder.norm_head.", "image_encoder.head.")  # which MobileSAM's file keeps, and nothing uses
RENAMED = (  # TinyViT as its authors name the parts -> as timm does; in this order
    (".patch_embed.seq.0.", ".patch_embed.conv1."),
    (".patch_embed.seq.2.", ".patch_embed.conv2."),
    *((f".layers.{n}.downsample.", f".stages.{n + 1}.downsample.") for n in range(3)),
    (".layers.", ".stages."),
    (".c.weight", ".conv.weight"),
)


def _sam_parts() -> Any:
    """segment-anything's building blocks."""
    try:
        import segment_anything.modeling as parts
    except ModuleNotFoundError as problem:
        raise ValueError(
            "promptable models must have segment_anything, got none; pip install 'medseg[sam]'"
        ) from problem
    return parts


def vit(
    size: int, channels: int, *, width: int, depth: int, heads: int, global_at: tuple[int, ...], window: int = 14
) -> nn.Module:
    """SAM's image encoder: a ViT on patches of 16 pixels, attention in windows except in the blocks ``global_at``."""
    encoder: nn.Module = _sam_parts().ImageEncoderViT(
        img_size=size,
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        out_chans=channels,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=window,
        global_attn_indexes=global_at,
    )
    return encoder


class TinyEncoder(nn.Module):
    """TinyViT without its classifier, and SAM's neck: image (B, 3, s, s) -> embedding (B, channels, s / n, s / n).

    ``n`` is 16 with the usual stem; a stem that does not reduce (``reduce=False``, LiteMedSAM) makes it 4. The last
    stage keeps the resolution, which a classifier's would halve.
    """

    def __init__(
        self,
        channels: int,
        *,
        reduce: bool,
        widths: tuple[int, ...] = (64, 128, 160, 320),
        depths: tuple[int, ...] = (2, 2, 6, 2),
        heads: tuple[int, ...] = (2, 4, 5, 10),
        windows: tuple[int, ...] = (7, 7, 14, 7),
    ) -> None:
        super().__init__()
        try:
            from timm.models.tiny_vit import ConvNorm, TinyVit
        except ModuleNotFoundError as problem:
            raise ValueError("TinyViT encoders must have timm, got none; pip install 'medseg[sam]'") from problem
        body: Any = TinyVit(
            num_classes=0, embed_dims=widths, depths=depths, num_heads=heads, window_sizes=windows, drop_path_rate=0
        )
        self.patch_embed, self.stages = body.patch_embed, body.stages
        if not reduce:
            self.patch_embed.conv1 = ConvNorm(3, widths[0] // 2, 1, 1, 0)
            self.patch_embed.conv2 = ConvNorm(widths[0] // 2, widths[0], 1, 1, 0)
        body.stages[-1].downsample.conv2.conv.stride = (1, 1)
        norm = _sam_parts().image_encoder.LayerNorm2d
        self.neck = nn.Sequential(
            nn.Conv2d(widths[-1], channels, 1, bias=False),
            norm(channels),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            norm(channels),
        )

    def forward(self, image: Tensor) -> Tensor:
        """Embedding (B, channels, h, h) of normalised square images (B, 3, s, s)."""
        embedding: Tensor = self.neck(self.stages(self.patch_embed(image)))
        return embedding


def tiny_vit(size: int, channels: int, **options: Any) -> nn.Module:
    """TinyViT (5 M parameters) as MobileSAM and LiteMedSAM use it; it takes any size."""
    return TinyEncoder(channels, **options)


@dataclass(frozen=True)
class Layout:
    """What a family of checkpoints looks like.

    Parameters
    ----------
    encoder : callable
        ``encoder(size, channels)`` builds the image encoder with fresh weights.
    size : int
        Side (pixels) of the square that the encoder takes.
    stride : int
        Side of that square over the side of the embedding.
    prompts : frozenset of str
        Of "box", "point" and "mask": what the checkpoints of this family were trained with.
    mean, std : (3,) tuples of float
        Normalisation of images in 0..1.
    stretch : bool
        Whether images are brought to the square by stretching each axis; otherwise the longest side is brought to
        ``size`` and the rest is filled with zeros at the right and at the bottom.
    channels : int
        Of the embedding and of the decoder's tokens.
    """

    encoder: Callable[[int, int], nn.Module]
    size: int = 1024
    stride: int = 16
    prompts: frozenset[str] = frozenset({"box", "point", "mask"})
    mean: tuple[float, float, float] = SAM_MEAN
    std: tuple[float, float, float] = SAM_STD
    stretch: bool = False
    channels: int = 256

    def inner_size(self, image_size: Sequence[int]) -> tuple[int, int]:
        """Height and width (pixels) that an image has on the square."""
        if self.stretch:
            return self.size, self.size
        height, width = (max(1, int(n * self.size / max(image_size) + 0.5)) for n in image_size)
        return height, width


_BOX = frozenset({"box"})
_PLAIN: dict[str, Any] = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}  # MedSAM's family takes 0..1 as it is
_VIT_B = partial(vit, width=768, depth=12, heads=12, global_at=(2, 5, 8, 11))

LAYOUTS: dict[str, Layout] = {
    "lite-medsam": Layout(partial(tiny_vit, reduce=False), size=256, stride=4, prompts=_BOX, **_PLAIN),
    "medsam": Layout(_VIT_B, prompts=_BOX, stretch=True, **_PLAIN),
    "sam-vit-b": Layout(_VIT_B),
    "sam-vit-l": Layout(partial(vit, width=1024, depth=24, heads=16, global_at=(5, 11, 17, 23))),
    "sam-vit-h": Layout(partial(vit, width=1280, depth=32, heads=16, global_at=(7, 15, 23, 31))),
    "mobile-sam": Layout(partial(tiny_vit, reduce=True)),
}


def decoders(layout: Layout) -> tuple[Any, Any]:
    """SAM's prompt encoder and mask decoder, with fresh weights."""
    parts = _sam_parts()
    side = layout.size // layout.stride
    prompts = parts.PromptEncoder(
        embed_dim=layout.channels,
        image_embedding_size=(side, side),
        input_image_size=(layout.size, layout.size),
        mask_in_chans=16,
    )
    transformer = parts.TwoWayTransformer(depth=2, embedding_dim=layout.channels, mlp_dim=2048, num_heads=8)
    return prompts, parts.MaskDecoder(transformer_dim=layout.channels, transformer=transformer)


def plain_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a checkpoint under the names that they have here; a classifier's are left out."""
    named = {}
    for name, tensor in tensors.items():
        if name.startswith(CLASSIFIER):
            continue
        if name.startswith("image_encoder."):
            for old, new in RENAMED:
                name = name.replace(old, new)
        named[name] = tensor
    return named
