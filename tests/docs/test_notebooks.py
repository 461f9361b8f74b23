"""Every cell of the notebooks runs, and prints what is committed."""

import contextlib
import io
import json
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[2] / "docs" / "notebooks").glob("*.ipynb"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*non-interactive:UserWarning")  # a figure that no screen shows
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_cells(path, monkeypatch):
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    cells = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
    assert all(c["execution_count"] for c in cells), "run it: jupyter execute --inplace docs/notebooks/*.ipynb"
    scope: dict = {}
    for cell in cells:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile("".join(cell["source"]), path.name, "exec"), scope)
        committed = "".join("".join(o["text"]) for o in cell["outputs"] if o.get("name") == "stdout")
        # what rounding may change (percentages, counts near a threshold) is not compared, that there is as much is
        assert len(out.getvalue().splitlines()) == len(committed.splitlines()), (out.getvalue(), committed)
    pyplot.close("all")
