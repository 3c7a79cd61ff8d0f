"""Which definition of a surface is closest to the exact distances between the meshes of two masks?

The oracle is brute force: the masks' marching-cubes meshes, cut into pieces much smaller than a voxel; the distance from
the middle of each piece to the nearest triangle of the other mesh; each weighted by its area. For shapes given by a
formula a second oracle is the mesh of the formula itself, on a grid three times as fine.

python workflows/bench/surface_definitions.py [FOLDER_OF_DECATHLON_DATA]
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from scipy import ndimage
from scipy.spatial import cKDTree
from skimage import measure

from medseg.io import read_labels
from medseg.metrics import surface_scores

Array = np.ndarray
Spacing = tuple[float, float, float]
SPACINGS: tuple[Spacing, ...] = ((1.0, 1.0, 1.0), (0.8, 0.8, 3.0), (0.5, 0.7, 5.0))
DEFINITIONS = ("voxel", "pooled", "area")
METRICS = ("hd_mm", "hd95_mm", "assd_mm", "nsd")
TOLERANCES_MM = (1.0, 2.0)
CANDIDATES = 6  # nearest pieces whose triangles are looked at exactly


# ---------------------------------------------------------------------------------------------------------------------
# The oracle


def mesh(field: Array, spacing: Spacing, level: float) -> Array:
    """(T, 3, 3) corners of triangles (mm) of the level set; the outside of the grid is below the level."""
    padded = np.pad(field.astype(np.float32), 1, constant_values=float(min(field.min(), level - 1)))
    vertices, faces, _, _ = measure.marching_cubes(padded, level, spacing=spacing)
    return vertices[faces] - np.asarray(spacing)


def pieces(triangles: Array, longest_mm: float) -> tuple[Array, Array, Array]:
    """Middle (N, 3), area (N,) and triangle (N,) of pieces with no edge longer than this."""
    owner = np.arange(len(triangles))
    done: list[tuple[Array, Array]] = []
    while len(triangles):
        edges = np.linalg.norm(triangles - np.roll(triangles, 1, 1), axis=2)
        long = edges.max(1) > longest_mm
        done.append((triangles[~long], owner[~long]))
        triangles, owner, edges = triangles[long], owner[long], edges[long]
        if not len(triangles):
            break
        first = edges.argmax(1)  # the edge from corner first - 1 to corner first is halved
        rows = np.arange(len(triangles))
        a, b, c = (triangles[rows, (first + n) % 3] for n in (-1, 0, 1))
        middle = (a + b) / 2
        triangles = np.concatenate([np.stack([a, middle, c], 1), np.stack([middle, b, c], 1)])
        owner = np.concatenate([owner, owner])
    small, of = (np.concatenate([d[n] for d in done]) for n in range(2))
    area = np.linalg.norm(np.cross(small[:, 1] - small[:, 0], small[:, 2] - small[:, 0]), axis=1) / 2
    return small.mean(1), area, of


def to_triangle(points: Array, triangles: Array) -> Array:
    """Distance of each point (N, 3) to its own triangle (N, 3, 3): to the plane inside it, else to the nearest edge."""
    a, b, c = (triangles[:, n] for n in range(3))
    ends = ((a, b), (b, c), (c, a))
    nearest = np.full(len(points), np.inf)
    for start, stop in ends:
        along = stop - start
        share = ((points - start) * along).sum(1) / np.maximum((along**2).sum(1), 1e-30)
        foot = start + np.clip(share, 0, 1)[:, None] * along
        nearest = np.minimum(nearest, np.linalg.norm(points - foot, axis=1))
    normal = np.cross(b - a, c - a)
    length = np.linalg.norm(normal, axis=1)
    unit = normal / np.maximum(length, 1e-30)[:, None]
    inside = np.all([(np.cross(q - p, points - p) * unit).sum(1) >= 0 for p, q in ends], axis=0) & (length > 1e-12)
    return np.where(inside, np.abs(((points - a) * unit).sum(1)), nearest)


def directed(source: Array, target: Array, step_mm: float) -> tuple[Array, Array]:
    """Distance to the other mesh and area of each piece of a mesh."""
    points, area, _ = pieces(source, step_mm)
    middles, _, of = pieces(target, step_mm)
    _, near = cKDTree(middles).query(points, k=min(CANDIDATES, len(middles)))
    near = near.reshape(len(points), -1)
    distance = np.min([to_triangle(points, target[of[column]]) for column in near.T], axis=0)
    return distance, area


def weighted_percentile(distance: Array, area: Array, percent: float) -> float:
    order = np.argsort(distance)
    reached = np.cumsum(area[order])
    return float(distance[order][np.searchsorted(reached, percent / 100 * reached[-1])])


def exact(p: Array, r: Array, step_mm: float, tolerance_mm: float) -> dict[str, float]:
    """The four metrics between two meshes (T, 3, 3), by area."""
    (a, wa), (b, wb) = directed(p, r, step_mm), directed(r, p, step_mm)
    size = wa.sum() + wb.sum()
    return {
        "hd_mm": float(max(a.max(), b.max())),
        "hd95_mm": max(weighted_percentile(a, wa, 95), weighted_percentile(b, wb, 95)),
        "assd_mm": float((a @ wa + b @ wb) / size),
        "nsd": float((wa[a <= tolerance_mm].sum() + wb[b <= tolerance_mm].sum()) / size),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Shapes: the field is above 0 inside


Field = Callable[[Array], Array]


def ellipsoid(centre: tuple[float, ...], radii: tuple[float, ...]) -> Field:
    return lambda x: (1 - np.sqrt((((x - np.array(centre)) / radii) ** 2).sum(-1))) * min(radii)


def rod(start: tuple[float, ...], stop: tuple[float, ...], radius: float) -> Field:
    a, b = np.array(start), np.array(stop)

    def field(x: Array) -> Array:
        share = np.clip(((x - a) @ (b - a)) / ((b - a) @ (b - a)), 0, 1)
        return radius - np.linalg.norm(x - a - share[..., None] * (b - a), axis=-1)

    return field


def box(centre: tuple[float, ...], half: tuple[float, ...], angle: float = 0.0) -> Field:
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    turn = turn @ np.array([[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]])
    return lambda x: -(np.abs((x - np.array(centre)) @ turn) - half).max(-1)


def wavy(of: Field, height: float, length: float, phase: float) -> Field:
    return lambda x: of(x) + height * np.sin(x / length + phase).prod(-1)


def shapes() -> Iterator[tuple[str, Field, Field]]:
    """Kind, prediction and reference, in mm, within 40 x 40 x 40."""
    yield "ball, moved", ellipsoid((20, 20, 20), (11, 11, 11)), ellipsoid((21.3, 19.2, 22.1), (11, 11, 11))
    yield "ball, larger", ellipsoid((20, 20, 20), (12.2, 12.2, 12.2)), ellipsoid((20, 20, 20), (11, 11, 11))
    yield "ellipsoid, flatter", ellipsoid((20, 20, 20), (15, 9, 7)), ellipsoid((20.5, 20, 20), (14, 10, 9))
    yield "box, turned", box((20, 20, 20), (9, 7, 8), 0.3), box((20, 20, 20), (9, 7, 8), 0.45)
    yield "plate, moved", box((20, 20, 20), (14, 14, 2.6), 0.25), box((20.5, 20, 21.5), (14, 14, 2.6), 0.25)
    yield "vessel, bent off", rod((6, 8, 8), (33, 30, 32), 3.2), rod((6, 8, 8), (34, 33, 30), 3.2)
    yield "vessel, cut short", rod((6, 8, 8), (28, 27, 26), 3.4), rod((6, 8, 8), (34, 32, 31), 3.0)
    blob = ellipsoid((20, 20, 20), (13, 11, 12))
    yield "wavy organ", wavy(blob, 1.6, 2.2, 0.0), wavy(blob, 1.6, 2.2, 0.9)
    yield "organ, false part", (
        lambda x: np.maximum(blob(x), ellipsoid((31, 31, 31), (4, 4, 4))(x))
    ), wavy(blob, 0.8, 2.5, 0.4)  # fmt: skip


def sampled(field: Field, spacing: Spacing, finer: int = 1) -> Array:
    """The field at the centres of the voxels of a grid over 40 x 40 x 40 mm."""
    axes = [np.arange(0, 40, s / finer) for s in spacing]
    return field(np.stack(np.meshgrid(*axes, indexing="ij"), -1))


def real_pairs(folder: Path, count: int) -> Iterator[tuple[str, Array, Array, Spacing]]:
    """Real label maps beside copies of which half the border was moved by a voxel at random."""
    rng = np.random.default_rng(0)
    files = sorted(p for p in (folder / "labelsTr").glob("*.nii.gz") if not p.name.startswith("."))
    for path in files[:count]:
        labels = read_labels(path)
        noise = ndimage.gaussian_filter(rng.standard_normal(labels.array.shape), 2)
        moved = np.where(noise > 0.02, np.roll(labels.array, 1, 0), labels.array)
        for n in (1, 2):
            yield f"real structure {n}", moved == n, labels.array == n, labels.geometry.spacing


# ---------------------------------------------------------------------------------------------------------------------


def errors(p: Array, r: Array, spacing: Spacing, truth: Callable[[float], dict[str, float]]) -> dict[str, list[float]]:
    """Absolute errors of each metric, one per definition, mean over tolerances."""
    found: dict[str, list[float]] = {m: [] for m in METRICS}
    for definition in DEFINITIONS:
        gaps = []
        for tolerance in TOLERANCES_MM:
            want = truth(tolerance)
            got = surface_scores(p, r, spacing, tolerance_mm=tolerance, definition=definition)._asdict()
            gaps.append([abs(got[m] - want[m]) for m in METRICS])
        for metric, gap in zip(METRICS, np.mean(gaps, axis=0), strict=True):
            found[metric].append(float(gap))
    return found


def cached(p: Array, r: Array, step_mm: float) -> Callable[[float], dict[str, float]]:
    known = {t: exact(p, r, step_mm, t) for t in TOLERANCES_MM}
    return lambda tolerance: known[tolerance]


def show(title: str, rows: list[tuple[str, dict[str, list[float]]]]) -> None:
    print(f"\n### {title}\n")
    print("| shapes | " + " | ".join(f"{m}: " + " / ".join(DEFINITIONS) for m in METRICS) + " |")
    print("| --- |" + " --- |" * len(METRICS))
    for kind in [*dict.fromkeys(k for k, _ in rows), "all"]:
        own = [e for k, e in rows if kind in (k, "all")]
        means = [np.mean([e[m] for e in own], axis=0) for m in METRICS]
        print(f"| {kind} ({len(own)}) | " + " | ".join(" / ".join(f"{v:.3f}" for v in row) for row in means) + " |")
    table = np.array([[e[m] for m in METRICS] for _, e in rows])  # pairs, metrics, definitions
    relative = table.mean(0) / table.mean(0).min(1, keepdims=True)
    print("\nerror relative to the best definition, geometric mean over the four metrics: ", end="")
    print(
        ", ".join(f"{d} {v:.2f}" for d, v in zip(DEFINITIONS, np.exp(np.log(relative).mean(0)), strict=True)),
        flush=True,
    )


def main() -> None:
    of_masks, of_formula = [], []
    if len(sys.argv) > 1:
        for kind, p, r, spacing in real_pairs(Path(sys.argv[1]), 6):
            meshes = mesh(p, spacing, 0.5), mesh(r, spacing, 0.5)
            of_masks.append((kind, errors(p, r, spacing, cached(*meshes, min(spacing) * 0.7))))
    for spacing in SPACINGS:
        step = min(spacing) * 0.7
        for kind, *fields in shapes():
            p, r = (sampled(f, spacing) > 0 for f in fields)
            of_masks.append((kind, errors(p, r, spacing, cached(mesh(p, spacing, 0.5), mesh(r, spacing, 0.5), step))))
            fine = [mesh(sampled(f, spacing, 3), tuple(s / 3 for s in spacing), 0.0) for f in fields]  # type: ignore[arg-type]
            of_formula.append((kind, errors(p, r, spacing, cached(*fine, step))))
    show("Mean absolute error against the meshes of the masks", of_masks)
    show("Mean absolute error against the mesh of the formula", of_formula)


if __name__ == "__main__":
    main()
