"""The site is built without a warning, and every command and snippet of its pages is run, page by page, in order."""

import re
import subprocess
import sys
import tomllib

import pytest
from doc_pages import ROOT, copy_photos, parts, run_page

PAGES = sorted(p.relative_to(ROOT / "docs").as_posix() for p in (ROOT / "docs").rglob("*.md"))
ELSEWHERE = ("architecture.md", "export.md", "deploy.md")  # templates; tests/export and tests/deploy run these two
RUN = [p for p in PAGES if any(kind in ("bash", "python") for kind, _ in parts(p)) and p not in ELSEWHERE]


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN)
def test_commands_and_snippets(page, tmp_path, monkeypatch, capsys):
    for name in ("maskclip_jax", "experiments"):
        (tmp_path / name).symlink_to(ROOT / name)
    copy_photos(tmp_path, slice(2, 8))
    monkeypatch.chdir(tmp_path)
    run_page(page, capsys)


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
