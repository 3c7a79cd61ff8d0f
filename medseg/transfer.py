"""Transfer: a network that starts from the weights of another run, or an encoder that starts from ImageNet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medseg.models.network import SegmentationNetwork
from medseg.models.pretrained import IMAGENET, Match, file_hash, match_encoder, read_tensors, some, weights_file
from medseg.plan import Plan
from medseg.run import WEIGHTS, Run

__all__ = ["Transfer", "initialise", "plan_of", "with_architecture_of"]

LEAST = 0.5  # share of the parameters that must fit; with less the rest would have to be learnt against them
SPACING_RATIO = 1.25  # from which a structure looks another size to the features


@dataclass(frozen=True)
class Transfer:
    """What a network took from a source.

    ``taken``: tensors as they were. ``adapted``: tensors changed to other channels or structures, and how. ``new``:
    tensors of the network that start afresh. ``unused``: tensors of the source without a place. ``share``: of the
    parameters of the network, taken or adapted. ``notes``: how the plans differ where that matters to the features.
    """

    source: str
    sha256: str
    share: float
    taken: tuple[str, ...]
    adapted: Mapping[str, str]
    new: tuple[str, ...]
    unused: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def summary(self) -> str:
        """One line for a log."""
        parts = [f"{100 * self.share:.0f} % of the parameters from {self.source}: {len(self.taken)} tensors taken"]
        if self.adapted:
            parts.append(f"{len(self.adapted)} adapted ({'; '.join(dict.fromkeys(self.adapted.values()))})")
        for names, word in ((self.new, "new"), (self.unused, "of the source unused")):
            if names:
                parts.append(f"{len(names)} {word} ({some(list(dict.fromkeys(n.split('.')[0] for n in names)))})")
        return ", ".join([*parts, *self.notes])

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def initialise(
    network: SegmentationNetwork,
    plan: Plan,
    source: str | Path,
    *,
    whole_encoder: bool = False,
    sha256: str | None = None,
) -> Transfer:
    """Give a fresh network the weights of another run, or its encoder those of a file or of ImageNet.

    Of a run, every tensor is taken whose name and shape fit. The first convolution is matched channel by channel: by
    name, in order among as many, else the mean over the channels of the source; where their number changes the weights
    are scaled by the ratio of the numbers, so that the responses keep their size. The heads keep the rows of structures
    of the same name (and the background's) and are new for others; where one plan is exclusive and the other
    overlapping, a structure's sigmoid has its logit less that of the background, which is exact for one structure.

    Of a file, all tensors of the encoder are taken: see :func:`medseg.models.pretrained.match_encoder`.

    Parameters
    ----------
    network : SegmentationNetwork
        Changed in place, and only if everything fits.
    plan : Plan
        The plan of the network.
    source : str or Path
        A run folder; a weights file of the encoder (.safetensors, .pth), read without running code from it; or
        "imagenet" for the weights that an installed package brings. Nothing is downloaded.
    whole_encoder : bool
        Refuse an encoder of which any part stays new, as one that will be frozen must.
    sha256 : str, optional
        What the weights file must hash to.

    Returns
    -------
    Transfer
        What was taken, adapted, new and unused.

    Raises
    ------
    FileNotFoundError
        If the source is missing.
    ValueError
        If less than half of the parameters fit, a file is of another encoder or hash, or it cannot be read.
    """
    match, old = Match(network), plan_of(source)
    notes: tuple[str, ...] = ()
    if old is None:
        path, known = weights_file(network, source)
        digest, tensors = file_hash(path, sha256 or known), read_tensors(path)
        used = match_encoder(match, tensors, path, in_order=source == IMAGENET)
    else:
        path = _folder(source) / WEIGHTS
        if not path.is_file():
            raise FileNotFoundError(f"run to start from must hold {WEIGHTS}, got none in {path.parent}; train it first")
        digest, tensors = file_hash(path, sha256), read_tensors(path)
        used, notes = _match_run(match, tensors, plan, old), _differences(plan, old)
        if match.share < LEAST:
            raise ValueError(
                f"weights to start from must fit at least half of the network, got {100 * match.share:.0f} % of its "
                f"parameters from {source}: {some(match.differences, '; ')}; plan with the features, strides and "
                "kernels of that run, or start from another"
            )
    missing = [name for name in match.new if name.startswith("encoder.")]
    if whole_encoder and missing:
        raise ValueError(
            f"frozen encoder must be taken whole, got {len(missing)} tensors that {source} does not fit: {some(missing)}; "
            "do not freeze it"
        )
    match.copy()
    return Transfer(
        source=str(source),
        sha256=digest,
        share=round(match.share, 4),
        taken=tuple(match.taken),
        adapted=match.adapted,
        new=match.new,
        unused=tuple(name for name in tensors if name not in used),
        notes=notes,
    )


def plan_of(source: str | Path) -> Plan | None:
    """The plan of the run to start from; None where the source is a weights file or "imagenet"."""
    path = Path(source)
    if source == IMAGENET or (path.is_file() and not (path.parent / "plan.json").is_file()):
        return None
    return Run.open(_folder(source)).plan


def with_architecture_of(plan: Plan, source: Plan) -> Plan:
    """A plan whose network is that of another run, so that its weights fit: model, encoder, features, strides and kernels.

    The edges of the patch are rounded up to what the poolings divide.

    Raises
    ------
    ValueError
        If one plan is 2D and the other 3D.
    """
    if plan.dims != source.dims:
        raise ValueError(
            f"run to start from must be {plan.dims}D as the new one, got {source.dims}D; use another --init"
        )
    entries = {name: getattr(source, name) for name in ("model", "encoder", "features", "strides", "kernels")}
    patch = tuple(-(-p // d) * d for p, d in zip(plan.patch, source.build().divisor, strict=True))
    reasons = {
        **plan.reasons,
        **dict.fromkeys([n for n in entries if entries[n]], "of the run whose weights it starts from"),
    }
    if patch != plan.patch:
        reasons["patch"] = f"{reasons.get('patch', 'as planned')}; rounded up to what the poolings of that run divide"
    return Plan.make(**{**dict(plan), **entries, "patch": patch, "reasons": reasons})


def _folder(source: str | Path) -> Path:
    return Path(source).parent if Path(source).is_file() else Path(source)


def _match_run(match: Match, tensors: Mapping[str, Tensor], plan: Plan, source: Plan) -> set[str]:
    """Match the tensors of another run; returns the names of those with a place."""
    network = match.network
    channels = _channel_sources([c.name for c in plan.channels], [c.name for c in source.channels])
    own = network.state_dict()
    for name, here in own.items():
        there = tensors.get(name)
        if there is not None and name in network.output_tensors and there.shape[1:] == here.shape[1:]:
            _match_head(match, name, here, there, plan, source)
        elif there is not None and name in network.input_tensors and _rest(there) == _rest(here):
            mixed = _mix(there, channels)
            words = f"first convolution from {len(source.channels)} to {len(channels)} channels"
            match.take(name, mixed, None if torch.equal(mixed, there) else words)
        elif there is not None and there.shape == here.shape:
            match.take(name, there)
        else:
            match.differ(name, here, there)
    for name, there in tensors.items():
        if name not in own:
            match.differ(name, None, there)
    return set(match.values)


def _channel_sources(names: Sequence[str], source: Sequence[str]) -> list[int | None]:
    """Which channel of the source each channel is like; None for the mean of all."""
    known = {_plain(n): i for i, n in reversed(list(enumerate(source)))}
    found = [known.get(_plain(n)) for n in names]
    left = [i for i in range(len(source)) if i not in found]
    if len(names) == len(source):
        found = [left.pop(0) if i is None else i for i in found]
    return found


def _mix(weight: Tensor, channels: Sequence[int | None]) -> Tensor:
    """Weights (O, C, ...) for other channels; scaled, so that as many like channels give the same response."""
    mean = weight.mean(1)
    mixed = torch.stack([mean if i is None else weight[:, i] for i in channels], 1)
    return mixed * (weight.shape[1] / len(channels))


def _rest(weight: Tensor) -> tuple[int, ...]:
    """Shape without the channels of the image."""
    return (weight.shape[0], *weight.shape[2:])


def _match_head(match: Match, name: str, here: Tensor, there: Tensor, plan: Plan, source: Plan) -> None:
    """Rows of structures of the same name from the source, the others as they are."""
    known = {_plain(s.name): i for i, s in enumerate(source.structures, start=int(not source.overlapping))}
    rows = {
        i: known[_plain(s.name)]
        for i, s in enumerate(plan.structures, start=int(not plan.overlapping))
        if _plain(s.name) in known
    }
    if not rows:
        match.differences.append(f"{name} is of other structures")
        return
    value, alike = here.clone(), plan.overlapping == source.overlapping
    names = [s.name for s in plan.structures]
    kept = [n for n in names if _plain(n) in known]
    if alike and not plan.overlapping:
        rows[0] = 0  # the background
    elif not alike and plan.overlapping:
        there = there - there[:1]
    elif not alike:
        value[0] = 0
    for row, theirs in rows.items():
        value[row] = there[theirs]
    new = [n for n in names if n not in kept]
    words = f"heads of {', '.join(kept)} kept" + (f", of {', '.join(new)} new" if new else "")
    match.take(name, value, None if alike and torch.equal(value, there) else words)


def _differences(plan: Plan, source: Plan) -> tuple[str, ...]:
    """What else the features were learnt on."""
    notes = []
    pairs = [(a, b) for a, b in zip(plan.spacing, source.spacing, strict=True) if a is not None and b is not None]
    if any(max(a / b, b / a) > SPACING_RATIO for a, b in pairs):
        words = " x ".join("native" if s is None else f"{s:g}" for s in source.spacing)
        notes.append(f"learnt at another spacing ({words} mm)")
    schemes = [sorted({c.scheme for c in p.channels}) for p in (plan, source)]
    if schemes[0] != schemes[1]:
        notes.append(f"learnt on images normalised otherwise ({', '.join(schemes[1])})")
    return tuple(notes)


def _plain(name: str) -> str:
    return " ".join(name.replace("_", " ").replace("-", " ").casefold().split())
