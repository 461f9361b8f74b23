"""docs/export.md: its commands from ten photos on, and its snippets on what they wrote."""

import re
import shlex
import shutil
from pathlib import Path

import pytest

from maskclip_jax import cli

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "export.md").read_text()
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", TEXT, re.S) for line in block.strip().splitlines()]
SNIPPETS = re.findall(r"```python\n(.*?)```", TEXT, re.S)


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:OpenCV", "ignore::ResourceWarning", "ignore:__array__", "ignore::pytest.PytestUnraisableExceptionWarning"
)
def test_the_walk(tmp_path, monkeypatch, capsys):
    assert len(COMMANDS) == 9
    assert len(SNIPPETS) == 4
    (tmp_path / "photos").mkdir()
    scenes = sorted((ROOT / "maskclip_jax" / "assets" / "scenes" / "images").iterdir())[:10]
    for scene in scenes:
        shutil.copy(scene, tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    for command in COMMANDS:
        with pytest.raises(SystemExit) as stop:
            cli.main(shlex.split(command)[2:])
        assert stop.value.code == 0, capsys.readouterr().err
    names: dict = {}
    for snippet in SNIPPETS:
        exec(compile(snippet, "export.md", "exec"), names)
    assert len(names["boxes"]) == len(names["masks"]) > 10
    assert names["labels"].ndim == 2
    assert list(names["targets"]) == [1, 2, 3, 4, 5, 6]
