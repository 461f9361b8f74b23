"""The README's commands and snippet are run (or, where they need a network, parsed); the files it names exist."""

import contextlib
import io
import re
import shlex
import shutil
from pathlib import Path

import pytest

from maskclip_jax import cli

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", README, re.S) for line in block.strip().splitlines()]
NOT_HERE = ("openai/",)  # needs a network
OFFLINE = [c for c in COMMANDS if c.startswith("python run.py") and not any(name in c for name in NOT_HERE)]
HUB = [c for c in COMMANDS if c.startswith("python run.py") and any(name in c for name in NOT_HERE)]


def test_every_command_is_known_here():
    installs = [c for c in COMMANDS if c.startswith("pip install")]
    assert len(installs) == 2
    assert sorted(COMMANDS) == sorted(OFFLINE + HUB + installs)


def test_the_gate_runs_what_the_readme_opens_with():
    gate = (ROOT / ".ci" / "run").read_text()
    assert "\ninstall -r tests/requirements.txt\n" in gate  # it includes requirements.txt
    assert re.search(r"^install\(\) .* pip install -q \"\$@\"; }$", gate, re.MULTILINE)
    assert (ROOT / "tests" / "requirements.txt").read_text().startswith("-r ../requirements.txt")
    assert "\npython -m pytest  " in gate
    assert "\npython run.py demo" in gate


@pytest.mark.parametrize("command", OFFLINE)
def test_commands(command, tmp_path, monkeypatch, capsys):
    shutil.copytree(ROOT / "maskclip_jax" / "assets", tmp_path / "maskclip_jax" / "assets")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        cli.main(shlex.split(command)[2:])
    assert stop.value.code == 0, capsys.readouterr().err
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "0046_overlay.png",
        "0046_labels.png",
        "0046.json",
        "segment.json",
    }


@pytest.mark.parametrize("command", HUB)
def test_commands_that_are_not_run_here_parse(command):
    args = cli.build_parser().parse_args(shlex.split(command)[2:])
    assert args.command in cli.COMMANDS


def test_snippet(monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    (expected,) = re.findall(r"```text\n(.*?)```", README, re.S)
    monkeypatch.chdir(ROOT)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(code, "README.md", "exec"), {})
    assert out.getvalue() == expected


def test_files_and_tests_it_names_exist():
    named = set(re.findall(r"\]\(((?!http)[^)]+)\)", README)) | set(re.findall(r"`(tests/[\w/]+\.py)`", README))
    assert len(named) >= 8
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing


def test_scores_are_those_of_the_committed_results():
    from experiments.toy_world import report

    assert report.with_table(README, report.load_results()) == README
