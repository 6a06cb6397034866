"""The notebook runs from its first cell to its last, and is kept without outputs."""

import json
import os
import pathlib
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_the_tour(tmp_path):
    tour = json.loads((pathlib.Path(__file__).parents[1] / "notebooks" / "tour.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in tour["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in cells)
    (tmp_path / "cells.py").write_text("\n\n".join("".join(cell["source"]) for cell in cells), encoding="utf-8")
    done = subprocess.run([sys.executable, "cells.py"], cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"MPLBACKEND": "Agg"})
    assert done.returncode == 0, done.stderr
    assert "24,930 entries" in done.stdout and done.stdout.count("in the organ") == 2, "what the story says, from all entries and from an eighth"
    assert done.stdout.rstrip().endswith("The boat was the Silver Heron."), "from the restored session"
