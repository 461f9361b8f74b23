"""Compiled programs are kept for the next run, in a bounded folder, and never at the price of an error."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KEEP = """
import json, os, sys
from maskclip_jax.cli.process import keep_programs
folder = keep_programs()
assert "jax" not in sys.modules
print(json.dumps([folder and str(folder), os.environ.get("JAX_COMPILATION_CACHE_DIR")]))
"""


def environment(**changes: str) -> dict[str, str]:
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "MASKCLIP_"))}
    return ours | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)} | changes


def kept(**changes: str) -> list[str | None]:
    child = subprocess.run([sys.executable, "-c", KEEP], env=environment(**changes), capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout)


def test_where_programs_are_kept(tmp_path):
    folder, jax_takes = kept(MASKCLIP_JAX_CACHE=str(tmp_path / "cache"))
    assert folder == jax_takes
    assert Path(folder).parent == tmp_path / "cache"
    assert Path(folder).is_dir()
    assert kept(MASKCLIP_JAX_CACHE=str(tmp_path), JAX_COMPILATION_CACHE_DIR="mine") == [None, "mine"]


def test_no_folder_is_no_error(tmp_path):
    (tmp_path / "file").touch()
    assert kept(MASKCLIP_JAX_CACHE=str(tmp_path / "file")) == [None, None]
    assert kept(MASKCLIP_JAX_CACHE="/proc/no/such") == [None, None]


@pytest.mark.slow
def test_the_second_run_compiles_nothing(tmp_path):
    """No new program, the same files; with the switch, none is kept."""
    photo = sorted((ROOT / "maskclip_jax" / "assets" / "scenes" / "images").iterdir())[0]

    def run(out: str, cache: str, *options: str) -> set[str]:
        command = [sys.executable, str(ROOT / "run.py"), "segment", str(photo), "--classes", "dog, sky", *options]
        child = subprocess.run(
            [*command, "--out", str(tmp_path / out)],
            env=environment(MASKCLIP_JAX_CACHE=str(tmp_path / cache)),
            capture_output=True,
            text=True,
        )
        assert (child.returncode, child.stderr) == (0, "")
        return {path.name for path in tmp_path.glob(f"{cache}/programs-*/*-cache")}

    first = run("one", "cache")
    assert first
    assert run("two", "cache") == first
    assert not run("three", "other", "--no-compile-cache")
    labels = [(tmp_path / out / f"{photo.stem}_labels.png").read_bytes() for out in ("one", "two", "three")]
    assert labels[0] == labels[1] == labels[2]
