"""`run.py demo` without its student (the gate trains that): its table, its sheet, its record."""

import json

import pytest
from PIL import Image

from maskclip_jax import cli


@pytest.mark.slow
def test_demo(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["demo", "--no-student", "--out", str(tmp_path / "demo")])
    assert stop.value.code == 0, capsys.readouterr().err
    scores = json.loads((tmp_path / "demo" / "scores.json").read_text())
    naive, mask, denoised = (list(scores.values())[i]["mIoU"] for i in range(3))
    assert mask > 3 * naive  # the paper's point: the last values know where, the last attention forgets it
    assert denoised >= mask
    with Image.open(tmp_path / "demo" / "sheet.png") as sheet:
        assert sheet.width > 800
    assert json.loads((tmp_path / "demo" / "demo.json").read_text())["settings"]["model"] == "embedded"
