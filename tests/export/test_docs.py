"""docs/export.md: its commands from ten photos on, and its snippets on what they wrote."""

import pytest
from doc_pages import commands, copy_photos, parts, run_page

PAGE = "export.md"


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:OpenCV", "ignore::ResourceWarning", "ignore:__array__", "ignore::pytest.PytestUnraisableExceptionWarning"
)
def test_the_walk(tmp_path, monkeypatch, capsys):
    assert len(commands(PAGE)) == 9
    assert sum(kind == "python" for kind, _ in parts(PAGE)) == 4
    copy_photos(tmp_path, slice(10))
    monkeypatch.chdir(tmp_path)
    names = run_page(PAGE, capsys)
    assert len(names["boxes"]) == len(names["masks"]) > 10
    assert names["labels"].ndim == 2
    assert list(names["targets"]) == [1, 2, 3, 4, 5, 6]
