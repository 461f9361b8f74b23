"""A page of docs/: its blocks, and a reader who runs them in order."""

import contextlib
import io
import re
import shlex
import shutil
from pathlib import Path

from maskclip_jax import cli

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.S | re.M)
NOT_HERE = ("openai/", "photo.jpg")  # what needs a network or a file of the reader's: read as a command, not run


def parts(page: str) -> list[tuple[str, str]]:
    """(language, text) of a page's blocks."""
    return FENCE.findall((ROOT / "docs" / page).read_text())


def commands(page: str) -> list[str]:
    """The lines of its `bash` blocks."""
    blocks = [text.replace("\\\n", " ").strip() for kind, text in parts(page) if kind == "bash"]
    return [line for block in blocks for line in block.splitlines()]


def copy_photos(folder: Path, chosen: slice) -> None:
    """`photos` in a reader's folder: some of the shipped scenes."""
    (folder / "photos").mkdir()
    for scene in sorted((ROOT / "maskclip_jax" / "assets" / "scenes" / "images").iterdir())[chosen]:
        shutil.copy(scene, folder / "photos")


def run_page(page: str, capsys) -> dict:
    """Runs commands and snippets in the working folder, compares what they print with the `text` block behind them.

    Returns what the snippets have defined. A snippet that begins with "# NAME.py" is that file.
    """
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
                    assert cli.run_command([*words[2:], "--no-compile-cache"]) == 0, (line, capsys.readouterr().err)
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
    return scope
