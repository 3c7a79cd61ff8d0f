"""SAM's encoder and decoder without prompts: an image in, a mask of every structure out.

The encoder of a promptable model stays as it is; its decoder is given one token per class in place of the tokens of
boxes and points, and learns them (as in SAMed and SAM-Med2D's automatic use). With the encoder frozen, what it makes of
an image can be kept: see :func:`embeddings_kept`.

References
----------
Kirillov et al. (2023), Segment Anything, arXiv:2304.02643; Zhang, Liu (2023), SAMed, arXiv:2304.13785.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medseg.models.network import SegmentationNetwork
from medseg.models.sam import PromptableModel
from medseg.models.sam_layouts import LAYOUTS, decoders

__all__ = ["SamMed", "embeddings_kept"]

Keep = Callable[[str, Callable[[], Tensor]], Tensor]  # key and what makes the embedding -> the embedding
_kept: list[Keep] = []


@contextmanager
def embeddings_kept(keep: Keep) -> Iterator[None]:
    """Networks with a frozen encoder take embeddings from ``keep(key, make)`` while the block runs."""
    _kept.append(keep)
    try:
        yield
    finally:
        _kept.pop()


class ClassDecoder(nn.Module):
    """SAM's mask decoder with a token per class: embedding (B, C, h, h) -> logits (B, K, 4h, 4h).

    Parameters
    ----------
    name : str
        The layout that it belongs to.
    classes : int
        K.
    """

    def __init__(self, name: str, classes: int) -> None:
        super().__init__()
        width = LAYOUTS[name].channels
        prompts, masks = decoders(LAYOUTS[name])
        self.transformer, self.upscaling = masks.transformer, masks.output_upscaling
        self.tokens = nn.Parameter(torch.randn(classes, width))
        sizes = (width, width, width, width // 8)
        self.weights = nn.ParameterList(torch.randn(classes, n, m) * (2 / m) ** 0.5 for m, n in pairwise(sizes))
        self.biases = nn.ParameterList(torch.zeros(classes, n) for n in sizes[1:])
        self.no_mask = nn.Parameter(prompts.no_mask_embed.weight[0].detach().clone())
        self.register_buffer("positions", prompts.get_dense_pe().detach().clone())
        self.positions: Tensor

    def forward(self, embedding: Tensor) -> Tensor:
        """Logits (B, K, 4h, 4h) of embeddings (B, C, h, h)."""
        count = len(embedding)
        source = embedding + self.no_mask[:, None, None]
        query = self.tokens.expand(count, -1, -1)
        found, image = self.transformer(source, self.positions.expand(count, -1, -1, -1), query)
        upscaled = self.upscaling(image.transpose(1, 2).reshape(source.shape))
        for n, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            found = torch.einsum("bkm,knm->bkn", found.relu() if n else found, weight) + bias
        return torch.einsum("bkc,bchw->bkhw", found, upscaled)

    def start_from(self, model: PromptableModel) -> None:
        """Take a promptable model's decoder; each class starts as what the decoder makes of an image without prompts."""
        masks, prompts = model.mask_decoder, model.prompt_encoder
        with torch.no_grad():
            self.transformer.load_state_dict(masks.transformer.state_dict())
            self.upscaling.load_state_dict(masks.output_upscaling.state_dict())
            self.no_mask.copy_(prompts.no_mask_embed.weight[0])
            self.positions.copy_(prompts.get_dense_pe())
            token = masks.mask_tokens.weight[0]
            self.tokens.copy_(token + 0.1 * token.std() * torch.randn_like(self.tokens))  # or they would stay alike
            for weight, bias, layer in zip(
                self.weights, self.biases, masks.output_hypernetworks_mlps[0].layers, strict=True
            ):
                weight.copy_(layer.weight.expand_as(weight))
                bias.copy_(layer.bias.expand_as(bias))


class SamMed(SegmentationNetwork):
    """Frozen image encoder of a promptable model and a decoder with a token per class.

    Parameters
    ----------
    in_channels, out_channels : int
        Channels of the image; channels of the logits.
    encoder : str
        A name of :data:`medseg.models.sam_layouts.LAYOUTS`.

    Notes
    -----
    Each channel of each image is stretched to 0..1, as MedSAM's family learnt it, and one channel shows as grey, two or
    more are shared out over red, green and blue. The image, of any size, is brought to the square of the layout, so time
    and memory do not grow with it.
    """

    def __init__(self, in_channels: int, out_channels: int, *, encoder: str = "lite-medsam") -> None:
        super().__init__()
        if encoder not in LAYOUTS:
            raise ValueError(f"encoder must be one of {', '.join(LAYOUTS)}, got {encoder!r}")
        self.encoder_name, self.layout = encoder, LAYOUTS[encoder]
        self.encoder = self.layout.encoder(self.layout.size, self.layout.channels)
        self.decoder = ClassDecoder(encoder, out_channels)
        self.register_buffer("colors", _colors(in_channels))
        self.register_buffer("mean", torch.tensor(self.layout.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(self.layout.std).view(3, 1, 1), persistent=False)
        self.colors: Tensor
        self.mean: Tensor
        self.std: Tensor
        self._fingerprint: str | None = None

    @property
    def divisor(self) -> tuple[int, ...]:
        return (1, 1)

    @property
    def input_tensors(self) -> tuple[str, ...]:
        return ("colors",)

    @property
    def output_tensors(self) -> tuple[str, ...]:
        lists = (f"decoder.{name}.{n}" for name in ("weights", "biases") for n in range(3))
        return ("decoder.tokens", *lists)

    def start_from(self, model: PromptableModel) -> None:
        """Take the encoder and the decoder of a promptable model of the same layout."""
        self.encoder.load_state_dict(model.image_encoder.state_dict())
        self.decoder.start_from(model)
        self._fingerprint = None

    def decode(self, image: Tensor) -> list[Tensor]:
        height, width = self.layout.inner_size(image.shape[2:])
        low = self.decoder(self.embed(image))
        square = (self.layout.size, self.layout.size)
        inner = F.interpolate(low, square, mode="bilinear", align_corners=False)[..., :height, :width]
        return [F.interpolate(inner, image.shape[2:], mode="bilinear", align_corners=False)]

    @torch.compiler.disable  # looks things up by their content
    def embed(self, image: Tensor) -> Tensor:
        """Embeddings (B, 256, h, h) of images (B, C, H, W); from what is kept where the encoder is frozen."""
        if not self.encoder_frozen or not _kept:
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self.encoder_frozen):
                return self._encoded(image)
        found = [_kept[-1](self._key(one), partial(self._alone, one)) for one in image]
        return torch.stack(found).to(image.device, torch.float32)

    def _encoded(self, image: Tensor) -> Tensor:
        size = self.layout.inner_size(image.shape[2:])
        low, high = image.amin((2, 3), keepdim=True), image.amax((2, 3), keepdim=True)
        color = torch.einsum("rc,bchw->brhw", self.colors, (image - low) / (high - low).clamp(min=1e-6))
        inner = F.interpolate(color.float(), size, mode="bilinear", align_corners=False, antialias=True)
        inner = (inner - self.mean) / self.std
        inner = F.pad(inner, (0, self.layout.size - size[1], 0, self.layout.size - size[0]))
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.encoder_frozen):
            embedding: Tensor = self.encoder(inner)
        return embedding

    def _alone(self, image: Tensor) -> Tensor:
        return self._encoded(image[None])[0]

    def _key(self, image: Tensor) -> str:
        if self._fingerprint is None:
            digest = hashlib.sha256(str(self.layout.size).encode())
            for tensor in (self.colors, *self.encoder.state_dict().values()):
                digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
            self._fingerprint = digest.hexdigest()
        digest = hashlib.sha256(f"{self._fingerprint} {tuple(image.shape)}".encode())
        digest.update(image.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()


def _colors(channels: int) -> Tensor:
    """(3, channels) weights that make red, green and blue of the channels of an image."""
    if channels == 1:
        return torch.ones(3, 1)
    weights = torch.zeros(3, channels)
    for n in range(max(3, channels)):
        weights[n % 3, n % channels] = 1
    return weights / weights.sum(1, keepdim=True)
