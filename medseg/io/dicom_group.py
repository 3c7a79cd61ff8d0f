"""Which frames make up a volume: one series, one orientation, one echo, one image type, one time point.

Slices are told apart by what the headers say, never by file name or InstanceNumber, and ordered by position along their
normal. Where several images lie at one position, the first attribute that parts them into equal stacks decides (see
:data:`TIMES`); where none does, the k-th image at every position belongs to time point k. What cannot be told apart, is
unevenly spaced or is no volume at all becomes a stack with a ``problem`` instead of a grid.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from medseg.io.dicom_frames import Frame
from medseg.io.dicom_grid import NotRegular, grid_of, normal_of, picture_grid, positions_along
from medseg.volume import Geometry

__all__ = ["Stack", "group"]

SamePixels = Callable[[Frame, Frame], bool]
ORIENTATION = 1e-3  # largest difference of direction cosines within a volume
SPACING = 1e-3  # largest relative difference of pixel spacings within a volume
LEVEL_MM = 0.01  # images closer than this along the normal lie at one position
TIMES = (
    "image type", "file", "temporal position", "diffusion", "trigger time", "inversion time", "flip angle",
    "repetition time", "kernel", "acquisition number", "acquisition time", "content time",
)  # fmt: skip
RANKS = ("temporal position", "acquisition number", "acquisition time", "trigger time", "content time")


@dataclass(eq=False)
class Stack:
    """Frames that belong together, in the order of the k axis, with their grid or the problem that denies them one."""

    frames: list[Frame]
    geometry: Geometry | None = None
    problem: str = ""
    quirks: list[str] = field(default_factory=list)
    facts: list[str] = field(default_factory=list)  # what is so, without anything odd: which time point it is
    uneven: bool = False  # the problem is the spacing of the slices: they could be resampled
    parts: dict[str, str] = field(default_factory=dict)  # echo, type, plane, time: what its name must tell
    time: int = 0  # number of the time point, from 1; 0 where there is only one
    family: int = 0  # stacks of one family are the time points of one 4D image
    name: str = ""


def group(frames: Iterable[Frame], same_pixels: SamePixels) -> list[Stack]:
    """Volumes of a set of frames, sorted by series number.

    Parameters
    ----------
    frames : iterable of Frame
        Of any number of files and series.
    same_pixels : function
        Tells whether two frames hold equal values; asked only where headers cannot tell a duplicate from a time point.

    Returns
    -------
    list of Stack
        Each frame is in exactly one, unless it is a duplicate (then a quirk says so).
    """
    series: dict[tuple[str, ...], list[Frame]] = defaultdict(list)
    for f in frames:
        item = f.header.item
        uid = item.text("SeriesInstanceUID")
        series[(uid,) if uid else ("", item.text("StudyInstanceUID"), item.text("SeriesNumber"))].append(f)
    stacks: list[Stack] = []
    for members in sorted(series.values(), key=lambda m: m[0].header.item.number("SeriesNumber") or 0):
        stacks += _series(members, same_pixels)
    for number, stack in enumerate(stacks):
        stack.family = stack.family or -number - 1
    return stacks


def _series(frames: list[Frame], same_pixels: SamePixels) -> list[Stack]:
    frames, dropped = _without_copies(frames)
    placed = [f for f in frames if f.position is not None and f.axes is not None and f.spacing is not None]
    stacks = _pictures([f for f in frames if f.position is None or f.axes is None or f.spacing is None])
    planes = _clusters(placed)
    if len(planes) > 3 and all(_single_level(p) for p in planes):
        angles = f"{len(planes)} orientations of one position each"
        stacks.append(Stack(placed, None, f"series must be a volume, got slices that rotate about an axis ({angles})"))
    else:
        for plane in planes:
            volumes = [v for part in _split(plane) for v in _volumes(part, same_pixels)]
            if len(planes) > 1:
                for v in volumes:
                    v.parts["plane"] = _plane_name(plane[0])
            stacks += volumes
    _label(stacks)
    if dropped:
        for s in stacks:
            s.quirks.append(f"{dropped} duplicate images dropped (same SOPInstanceUID)")
    for s in stacks:
        references = {f.header.item.text("FrameOfReferenceUID") for f in s.frames}
        if len(references) > 1:
            s.quirks.append(f"slices name {len(references)} different frames of reference")
    return stacks


def _without_copies(frames: list[Frame]) -> tuple[list[Frame], int]:
    """Frames without those of files that are copies: same SOPInstanceUID and nothing else different."""
    seen: set[Hashable] = set()
    kept = []
    for f in frames:
        uid = f.header.item.raw("SOPInstanceUID")
        order = tuple((k, v) for k, v in f.order.items() if k != "file")
        key = (uid, f.index, f.tile, f.position, f.axes, f.shape, tuple(f.split.items()), order, f.instance)
        if uid and key in seen:
            continue
        seen.add(key)
        kept.append(f)
    return kept, len(frames) - len(kept)


def _pictures(frames: list[Frame]) -> list[Stack]:
    """Images without a place in the patient: 2D pictures each, or nothing where a volume is to be expected."""
    by_file: dict[int, list[Frame]] = defaultdict(list)
    for f in frames:
        by_file[id(f.header)].append(f)
    singles = [f[0] for f in by_file.values() if len(f) == 1]
    stacks = [
        Stack(f, None, f"image must state the position of its frames, got {len(f)} frames without (cine or capture)")
        for f in by_file.values()
        if len(f) > 1
    ]
    modality = singles[0].header.item.text("Modality") if singles else ""
    if (
        len(singles) > 1
        and modality in ("CT", "MR", "PT")
        and "SECONDARY" not in singles[0].header.item.texts("ImageType")
    ):
        stacks.append(Stack(singles, None, f"slices must state position and orientation, got {len(singles)} without"))
    else:
        said = "no position in the patient: read as a 2D picture"
        stacks += [Stack([f], picture_grid(f), "", [said]) for f in singles]
    return stacks


def _clusters(frames: list[Frame]) -> list[list[Frame]]:
    """Frames of one matrix, kind, pixel spacing and orientation each, the tolerances being those of the module."""
    kinds: dict[Hashable, list[Frame]] = defaultdict(list)
    for f in frames:
        item = f.header.item
        kinds[f.shape, item.raw("SamplesPerPixel"), item.raw("SOPClassUID")].append(f)
    found = []
    for members in kinds.values():
        chosen: dict[Hashable, int] = {}
        anchors = np.empty((0, 8))
        parts: list[list[Frame]] = []
        for f in members:
            key = (f.axes, f.spacing)
            if key not in chosen:
                value = np.array([*f.axes, *f.spacing])  # type: ignore[misc]
                near = (np.abs(anchors[:, :6] - value[:6]) < ORIENTATION).all(1)
                near &= (np.abs(anchors[:, 6:] / value[6:] - 1) < SPACING).all(1)
                if near.any():
                    chosen[key] = int(np.argmax(near))
                else:
                    chosen[key] = len(parts)
                    anchors, parts = np.vstack([anchors, value]), [*parts, []]
            parts[chosen[key]].append(f)
        found += parts
    return found


def _levels(frames: Sequence[Frame]) -> tuple[np.ndarray, np.ndarray]:
    """Number of the position of each frame along the common normal (from 0), and the positions (mm)."""
    along = positions_along(frames, normal_of(frames[0]))
    order = np.argsort(along, kind="stable")
    new = np.diff(along[order], prepend=along[order[0]]) > LEVEL_MM
    level = np.empty(len(frames), int)
    level[order] = np.cumsum(new)
    return level, along


def _single_level(frames: Sequence[Frame]) -> bool:
    return bool(_levels(frames)[0].max() == 0)


def _partition(frames: Sequence[Frame], key: Callable[[Frame], Hashable]) -> list[list[Frame]]:
    parts: dict[Hashable, list[Frame]] = defaultdict(list)
    for f in frames:
        parts[key(f)].append(f)
    return list(parts.values())


def _split(frames: list[Frame]) -> list[list[Frame]]:
    """Frames by stack, component and echo; a key of which each frame has its own value is no such key."""
    parts = [frames]
    for name in ("stack", "component", "echo"):
        finer = []
        for part in parts:
            split = _partition(part, lambda f, name=name: f.split[name])  # type: ignore[misc]
            alone = len(split) > 2 and all(len(s) == 1 for s in split) and not _single_level(part)
            finer += [part] if alone else split
        parts = finer
    return parts


def _volumes(frames: list[Frame], same_pixels: SamePixels) -> list[Stack]:
    """The time points of frames that agree in everything else, each with its grid or its problem."""
    frames, dropped = _without_doubles(frames, same_pixels, strict=True)
    parts, by = _time_points(frames)
    if by == "" and parts:  # several images at some positions, and nothing tells them apart
        frames, more = _without_doubles(frames, same_pixels, strict=False)
        dropped += more
        parts, by = _time_points(frames)
    quirks = [f"{dropped} duplicate images dropped (same position and equal pixels)"] if dropped else []
    if _is_capture(frames[0]) and len(frames) > 1 and _single_level(frames):
        return [_stack([f], [*quirks, "secondary capture: read as a 2D picture"]) for f in frames]
    if by == "":
        level, along = _levels(frames)
        counts = Counter(level.tolist())
        crowded = [k for k, n in counts.items() if n > 1]
        where = ", ".join(f"{along[level == k][0]:.2f}" for k in sorted(crowded)[:10])
        problem = f"positions must hold one image each, got several that nothing tells apart at {where} mm"
        return [Stack(_sorted(frames), None, problem, quirks)]
    if len(parts) > 1 and _single_level(frames):
        problem = f"series must be a volume, got {len(frames)} images at one position (a time series of one slice)"
        return [Stack([f for p in parts for f in p], None, problem, quirks)]
    full = max(len(p) for p in parts)
    stacks = []
    for number, part in enumerate(parts, 1):
        stack = _stack(part, quirks)
        if by == "image type":
            stack.parts["type"] = _own_types(part, parts)
        elif len(parts) > 1:
            stack.time = number
            stack.facts.append(f"time point {number} of {len(parts)}, told apart by {by}")
            if len(part) < full:
                stack.quirks.append(f"holds {len(part)} of {full} positions")
        stacks.append(stack)
    if stacks[-1].time:
        for s in stacks:
            s.family = id(stacks[0])
    return stacks


def _own_types(part: list[Frame], parts: list[list[Frame]]) -> str:
    """The values of ImageType that these frames have and not all others."""
    types: list[tuple[str, ...]] = [tuple(p[0].order["image type"]) for p in parts]  # type: ignore[arg-type]
    common = set(types[0]).intersection(*types)
    own = types[parts.index(part)]
    return "_".join(str(t) for t in own if t not in common).lower()


def _is_capture(frame: Frame) -> bool:
    return frame.header.item.text("SOPClassUID").startswith("1.2.840.10008.5.1.4.1.1.7")


def _stack(frames: list[Frame], quirks: list[str]) -> Stack:
    frames = _sorted(frames)
    try:
        geometry, notes = grid_of(frames)
    except NotRegular as problem:
        return Stack(frames, None, str(problem), list(quirks), uneven=problem.on_a_line)
    drift = np.abs(np.array([f.axes for f in frames]) - np.array(frames[0].axes)).max()
    if drift > 1e-4:
        notes.append(f"orientation drifts by {drift:.1g} between slices: that of the first is taken")
    return Stack(frames, geometry, "", [*quirks, *notes])


def _sorted(frames: Sequence[Frame]) -> list[Frame]:
    along = positions_along(frames, normal_of(frames[0]))
    return [frames[k] for k in np.argsort(along, kind="stable")]


def _sortable(f: Frame, first: str = "") -> tuple[tuple[str, float], ...]:
    """A key that sorts frames in time, by the attribute named ``first`` before all others."""
    known = [f.order.get(name) for name in ((first, *RANKS) if first else RANKS)]
    return tuple(
        (v if isinstance(v, str) else "", float(v) if isinstance(v, int | float) else -1e300)
        for v in (*known, f.instance)
    )


def _in_time(parts: list[list[Frame]], by: str) -> list[list[Frame]]:
    return sorted(parts, key=lambda part: min(_sortable(f, by) for f in part))


def _time_points(frames: list[Frame]) -> tuple[list[list[Frame]], str]:
    """Frames by time point, in order of time, and what told them apart; "" where nothing did."""
    level, _ = _levels(frames)
    counts = Counter(level.tolist())
    if max(counts.values()) == 1:
        return [frames], "nothing needed"
    of = dict(zip(map(id, frames), level.tolist(), strict=True))
    repeats = set(counts.values())
    for name in TIMES:
        parts = _partition(frames, lambda f, name=name: f.order.get(name))  # type: ignore[misc]
        seen = [Counter(of[id(f)] for f in part) for part in parts]
        if len(parts) > 1 and all(s.keys() == seen[0].keys() and len(set(s.values())) == 1 for s in seen):
            finer = [_time_points(part) for part in _in_time(parts, name)]
            if all(by for _, by in finer):
                inner = next((by for _, by in finer if by != "nothing needed"), "")
                return [p for points, _ in finer for p in points], f"{name} and {inner}" if inner else name
    if len(repeats) == 1:
        at: dict[int, list[Frame]] = defaultdict(list)
        for f in frames:
            at[of[id(f)]].append(f)
        columns = [sorted(fs, key=_sortable) for fs in at.values()]
        if all(len({_sortable(f) for f in fs}) == len(fs) for fs in columns):
            return [list(fs) for fs in zip(*columns, strict=True)], "their order at each position"
        return [frames], ""
    for name in TIMES:
        parts = _partition(frames, lambda f, name=name: f.order.get(name))  # type: ignore[misc]
        single = all(max(Counter(of[id(f)] for f in p).values()) == 1 for p in parts)
        if len(parts) == max(repeats) and single and min(map(len, parts)) > 1:
            return _in_time(parts, name), name
    return [frames], ""


def _without_doubles(frames: list[Frame], same_pixels: SamePixels, *, strict: bool) -> tuple[list[Frame], int]:
    """Frames without those that repeat another at the same position with equal pixels.

    Strict: only where the headers do not tell them apart either (but for SOPInstanceUID), or where every position that
    is taken more than once holds equal images only (a whole series stored twice); two time points may well share an
    empty slice. Not strict: wherever pixels are equal.
    """
    level, _ = _levels(frames)
    at: dict[int, list[Frame]] = defaultdict(list)
    for f, k in zip(frames, level.tolist(), strict=True):
        at[k].append(f)
    crowded = [fs for fs in at.values() if len(fs) > 1]
    extra: set[int] = set()

    def twin(f: Frame, others: Sequence[Frame], instance: bool) -> bool:
        return any(
            f.position == o.position
            and (not strict or (f.order_key == o.order_key and (not instance or f.instance == o.instance)))
            and same_pixels(f, o)
            for o in others
        )

    for fs in crowded:
        for k, f in enumerate(fs):
            if twin(f, [o for o in fs[:k] if id(o) not in extra], True):
                extra.add(id(f))
    if strict and crowded and not extra:
        whole: set[int] = set()
        for fs in crowded:
            if not all(twin(f, fs[:1], False) for f in fs[1:]):
                break
            whole |= {id(f) for f in fs[1:]}
        else:
            extra = whole
    return [f for f in frames if id(f) not in extra], len(extra)


def _plane_name(frame: Frame) -> str:
    return ("sagittal", "coronal", "axial")[int(np.argmax(np.abs(normal_of(frame))))]


def _label(stacks: list[Stack]) -> None:
    """What the name of each stack must tell: echo and type where the series has several, time where it has several."""
    echoes = sorted({e for s in stacks if (e := s.frames[0].split["echo"]) is not None}, key=float)  # type: ignore[arg-type]
    components = {s.frames[0].split["component"] for s in stacks}
    for s in stacks:
        echo, component = s.frames[0].split["echo"], str(s.frames[0].split["component"])
        if len(echoes) > 1 and echo is not None:
            s.parts["echo"] = f"e{echoes.index(echo) + 1}"
        if component and "type" not in s.parts and (len(components) > 1 or component != "magnitude"):
            s.parts["type"] = component
        if s.time:
            s.parts["time"] = f"t{s.time}"
