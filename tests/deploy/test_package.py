"""The Dockerfile's steps without Docker: the wheel, of what is copied, installed and used without the repository."""

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
RECIPE = re.sub(r"^#.*\n|\\\n", "", (ROOT / "Dockerfile").read_text(), flags=re.M)
STEPS = [tuple(line.split(maxsplit=1)) for line in RECIPE.splitlines() if line]
SCENE = ROOT / "maskclip_jax" / "assets" / "scenes" / "images" / "0005.jpg"
USED = """
from pathlib import Path
import maskclip_jax
from maskclip_jax.cli import demo, run_command

images, labels, names = demo.load_scenes()
demo.load_scenes, demo.SHOWN = lambda: (images[:1], labels[:1], names), (0,)
words = ["--classes", "sheep, ball, sand", "--no-compile-cache", "--model", "embedded"]
print("codes", [run_command(["segment", "photo.jpg", *words, "--out", "masks"]),
    run_command(["export", "masks", "--to", "coco", "--out", "coco"]),
    run_command(["demo", "--out", "shown", "--no-compile-cache"])])
print(Path(maskclip_jax.__file__).parent, len(images))
"""


def values(step: str) -> list[str]:
    return [value for name, value in STEPS if name == step]


def sent_to_docker(path: str) -> bool:
    """By .dockerignore: the last rule decides that matches the path or a folder it is in."""
    sent, above = True, ["/".join(path.split("/")[: i + 1]) for i in range(path.count("/") + 1)]
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = re.escape(line.lstrip("!")).replace(r"\*\*/", "(.*/)?").replace(r"\*", "[^/]*")
        if any(re.fullmatch(pattern, folder) for folder in above):
            sent = line.startswith("!")
    return sent


def files_of(folder: Path) -> set[str]:
    paths = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return {path for path in paths if "__pycache__" not in path}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """What the build stage has in its folder: COPY of what Docker is sent."""
    place = tmp_path_factory.mktemp("src")
    for copy in values("COPY"):
        *names, target = copy.split()
        if copy.startswith("--from"):
            continue
        for name in names:
            found = [ROOT / name, *(ROOT / name).rglob("*")]
            kept = [path for path in found if path.is_file() and sent_to_docker(path.relative_to(ROOT).as_posix())]
            assert kept, f"COPY {name}: not there, or kept back by .dockerignore"
            for path in kept:
                to = place / target / (path.relative_to(ROOT / name) if (ROOT / name).is_dir() else name)
                to.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, to)
    return place


@pytest.fixture(scope="module")
def wheel(source) -> Path:
    pip("wheel", "--no-build-isolation", "--wheel-dir", source / "dist", source)
    (built,) = (source / "dist").iterdir()
    return built


def pip(*words: object) -> None:
    command = [sys.executable, "-m", "pip", words[0], "--quiet", "--no-deps", "--no-index", *map(str, words[1:])]
    subprocess.run(command, check=True)


def test_the_dockerfile_and_the_project_agree(source):
    assert {"pyproject.toml", "LICENSE", "maskclip_jax/py.typed"} <= files_of(source)
    assert not [path for path in files_of(source) if path.startswith(("tests", "experiments", ".git"))]
    for base in values("FROM"):
        assert f"Programming Language :: Python :: {re.search(r'python:([0-9.]+)', base)[1]}" in PROJECT["classifiers"]
    extras = re.findall(r"EXTRA=([\w,]+)", (ROOT / "Dockerfile").read_text())
    assert len(extras) == 2
    assert {name for text in extras for name in text.split(",")} <= PROJECT["optional-dependencies"].keys()
    (command,) = values("ENTRYPOINT")
    assert set(json.loads(command)) <= PROJECT["scripts"].keys()
    stages = [base.partition(" AS ")[2] for base in values("FROM")]
    ((stage, made),) = re.findall(r"--from=(\w+) (\S+)", " ".join(values("COPY")))
    assert stage in stages
    assert f"--outdir {made}" in " ".join(values("RUN"))
    assert f"--owner {values('USER')[0]} {values('WORKDIR')[-1]}" in values("RUN")[-1]  # else root owns the folder
    from maskclip_jax.cli import build_parser

    (commands,) = (a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    assert values("EXPOSE") == [str(commands.choices["serve"].get_default("port"))]


def test_extras_are_what_the_requirements_files_say():
    for extra, path in (("web", "requirements-web.txt"), ("docs", "docs/requirements.txt")):
        lines = (ROOT / path).read_text().split("\n")
        wanted = {line for line in lines if line and not line.startswith(("#", "-r"))}
        assert wanted == set(PROJECT["optional-dependencies"][extra])


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (about,) = {name.split("/")[0] for name in names} - {"maskclip_jax"}
        metadata = archive.read(f"{about}/METADATA").decode()
    kept = {name.removeprefix("maskclip_jax/") for name in names if name.startswith("maskclip_jax/")}
    assert kept == files_of(ROOT / "maskclip_jax")
    for ending in ("/bpe_simple_vocab_16e6.txt.gz", "/LICENSE", ".html", ".css", ".js", ".safetensors", "py.typed"):
        assert any(name.endswith(ending) for name in kept)
    assert f"{about}/licenses/LICENSE" in names
    wanted = {Requirement(line) for line in (ROOT / "requirements.txt").read_text().splitlines()}
    found = {Requirement(line) for line in re.findall(r"^Requires-Dist: (.*)", metadata, re.M)}
    assert {one for one in found if not one.marker} == wanted


@pytest.mark.slow
def test_the_wheel_works_where_the_repository_is_not(wheel, tmp_path):
    site, here = tmp_path / "site", tmp_path / "here"
    extra = re.search(r"EXTRA=(\S+)", " ".join(values("ARG")))[1]
    pip("install", "--no-compile", "--target", site, f"{wheel}[{extra}]")
    here.mkdir()
    shutil.copy(SCENE, here / "photo.jpg")

    def run(*command: object) -> str:
        environment = os.environ | {"PYTHONPATH": str(site)}
        done = subprocess.run(list(map(str, command)), cwd=here, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    (entry,), (words,) = (json.loads(*values(step)) for step in ("ENTRYPOINT", "CMD"))
    assert f"usage: {entry}" in run(site / "bin" / entry, words)
    output = run(sys.executable, "-c", USED).splitlines()
    assert "codes [0, 0, 0]" in output
    assert shlex.split(output[-1]) == [str(site / "maskclip_jax"), "64"]
    assert {path.relative_to(here).parts[0] for path in here.rglob("*")} == {"photo.jpg", "masks", "coco", "shown"}
    scores = json.loads((here / "shown" / "scores.json").read_text())
    assert scores.keys() == {"naive", "MaskCLIP", "+ denoising", "student"}
