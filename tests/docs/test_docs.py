"""The site is built without a warning, and every command and snippet of its pages is run, page by page, in order."""

import contextlib
import io
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from maskclip_jax import cli

ROOT = Path(__file__).parents[2]
PAGES = sorted(p.relative_to(ROOT / "docs").as_posix() for p in (ROOT / "docs").rglob("*.md"))
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.S | re.M)
NOT_HERE = ("openai/", "photo.jpg")  # what needs a network or a file of the reader's: read as a command, not run


def parts(page: str) -> list[tuple[str, str]]:
    """(language, text) of a page's blocks that are to be run, or that follow one: the output it prints."""
    return [(kind, text) for kind, text in FENCE.findall((ROOT / "docs" / page).read_text()) if kind != "eval"]


ELSEWHERE = ("architecture.md", "export.md", "deploy.md")  # templates; tests/export and tests/deploy run these two
RUN = [p for p in PAGES if any(kind in ("bash", "python") for kind, _ in parts(p)) and p not in ELSEWHERE]


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN)
def test_commands_and_snippets(page, tmp_path, monkeypatch, capsys):
    for name in ("maskclip_jax", "experiments"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "photos").mkdir()
    for scene in sorted((ROOT / "maskclip_jax" / "assets" / "scenes" / "images").iterdir())[2:8]:
        shutil.copy(scene, tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    printed = None
    for kind, text in parts(page):
        if kind == "bash":
            for line in text.replace("\\\n", " ").strip().splitlines():
                words = shlex.split(line)
                assert words[:2] == ["python", "run.py"], f"{line!r}: only commands of ours are shown as ones to run"
                if any(name in line for name in NOT_HERE):
                    cli.build_parser().parse_args(words[2:])
                else:
                    assert cli.run_command(words[2:]) == 0, (line, capsys.readouterr().err)
        elif kind == "python" and (name := re.match(r"# (\w+\.py)\n", text)):
            Path(name[1]).write_text(text)
        elif kind == "python":
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(compile(text, page, "exec"), scope)
            printed = out.getvalue()
        elif kind == "text" and printed:
            assert text == printed
            printed = None


def test_the_extra_is_the_requirements_file():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (ROOT / "docs" / "requirements.txt").read_text().split() == project["optional-dependencies"]["docs"]


def test_every_page_and_notebook_is_reached():
    index = (ROOT / "docs" / "index.md").read_text()
    linked = {line for block in re.findall(r"```{toctree}\n(.*?)```", index, re.S) for line in block.splitlines()}
    pages = {p.removesuffix(".md") for p in PAGES} - {"index"}
    pages |= {f"notebooks/{p.stem}" for p in (ROOT / "docs" / "notebooks").glob("*.ipynb")}
    assert pages <= linked


@pytest.mark.slow
def test_the_site_has_no_warning(tmp_path):
    pytest.importorskip("myst_nb", reason="docs/requirements.txt is not installed")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", ROOT / "docs", tmp_path]
    found = subprocess.run(command, capture_output=True, text=True)
    assert (found.returncode, found.stderr) == (0, "")
    assert "segment_images" in (tmp_path / "reference.html").read_text()
