"""The command line itself: help without JAX, one line for what cannot be read, exit codes."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from maskclip_jax import cli
from maskclip_jax.errors import UserError

ROOT = Path(__file__).parents[2]
HEAVY = {"jax", "jaxlib", "flax", "numpy", "PIL", "transformers", "rich"}
OPTIONS = {
    "segment": "--classes --out --model --fidelity --tokenizer --dense-stride --dtype --templates --short-side --naive "
    "--prompt-denoising --key-smoothing --window --stride --background --background-threshold --batch-size "
    "--max-pixels IMAGE",
    "label": "DATA --classes --out --format --confidence --top-k --features --shard --shard-size --scratch --on-error "
    "--cluster --model --fidelity --dtype --templates --short-side --key-smoothing --window --batch-size --max-pixels",
    "prepare": "DATASET source --data-dir --config --splits --classes --max-pixels --on-error",
    "demo": "--out --model --fidelity --tokenizer --dense-stride --dtype",
    "serve": "--model --fidelity --dtype --more-models --host --port --max-upload --max-pixels --memory",
    "convert": "source out --tokenizer",
}


def call(capsys, *argv):
    with pytest.raises(SystemExit) as stopped:
        cli.main(list(argv))
    out, err = capsys.readouterr()
    return stopped.value.code, out, err


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_lists_every_option(capsys, command):
    code, out, err = call(capsys, command, "--help")
    assert (code, err) == (0, "")
    if command in OPTIONS:
        for name in OPTIONS[command].split():
            assert re.search(rf"(?m)^  {name}\b", out), name
    assert f"run.py {command}" in out  # an example
    parser = cli.build_parser(command)
    for action in parser._subparsers._group_actions[0].choices[command]._actions:
        assert action.help, f"{action.dest} is not explained"
        assert all(name in out for name in action.option_strings)
    assert "None" not in out


def test_help_names_every_command(capsys):
    code, out, err = call(capsys, "--help")
    assert (code, err) == (0, "")
    assert all(re.search(rf"(?m)^    {name}( |$)", out) for name in cli.COMMANDS)


def test_help_needs_no_jax():
    """It answers in a moment, and on a machine where JAX does not start."""
    script = "\n".join(
        [
            "import contextlib, sys",
            "from maskclip_jax.cli import COMMANDS, main",
            "for argv in (['--help'], *([name, '--help'] for name in COMMANDS)):",
            "    with contextlib.suppress(SystemExit):",
            "        main(argv)",
            "print(*sorted({name.split('.')[0] for name in sys.modules}), file=sys.stderr)",
        ]
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0
    loaded = set(result.stderr.split())
    assert "maskclip_jax" in loaded
    assert loaded & HEAVY == set()


@pytest.mark.parametrize("argv", [[], ["paint"], ["segment"], ["segment", "a.jpg", "--out", "o"], ["convert", "a"]])
def test_what_cannot_be_read_is_one_line(capsys, argv):
    code, out, err = call(capsys, *argv)
    assert (code, out) == (2, "")
    assert re.fullmatch(r"error: .* \(see: .*--help\)\n", err)


def make_command(monkeypatch, run):
    monkeypatch.setattr("maskclip_jax.cli.convert.run", run)
    return "convert", "a", "b"


FILES = "files must be readable, and writable in --out"
NO_DEVICE = "JAX needs a device, but has none of that kind"


@pytest.mark.parametrize(
    ("raised", "code", "line"),
    [
        (KeyboardInterrupt(), 130, f"stopped: {cli.STARTS_AGAIN}\n"),
        (UserError("a rule, what came,\nthe remedy"), 2, "error: a rule, what came, the remedy\n"),
        (
            PermissionError(13, "Permission denied", "/x"),
            2,
            f"error: {FILES}, but /x is not (Permission denied): choose another\n",
        ),
        (
            OSError(28, "No space left on device"),
            2,
            f"error: {FILES}, but one is not (No space left on device): choose another\n",
        ),
        (
            RuntimeError("Unable to initialize backend 'tpu': none"),
            2,
            f"error: {NO_DEVICE}: Unable to initialize backend 'tpu': none\n",
        ),
    ],
)
def test_exit_codes(capsys, monkeypatch, raised, code, line):
    def run(args):
        raise raised

    assert call(capsys, *make_command(monkeypatch, run)) == (code, "", line)


def test_a_working_folder_that_was_removed(capsys, monkeypatch, tmp_path):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    found = call(capsys, *make_command(monkeypatch, lambda args: os.getcwd()))
    assert found == (
        2,
        "",
        f"error: {FILES}, but the working folder is not (No such file or directory): choose another\n",
    )


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_closed_stream_is_no_hindrance(monkeypatch, stream):
    """What Python makes of `>&-`."""
    monkeypatch.setattr(sys, stream, None)
    with pytest.raises(SystemExit) as stopped:
        cli.main(list(make_command(monkeypatch, lambda args: print("words"))))
    getattr(sys, stream).close()
    assert stopped.value.code == 0


def test_a_bug_is_not_hidden(monkeypatch):
    """Only what a person can mend becomes a line: the rest keeps its traceback."""

    def run(args):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        cli.main(list(make_command(monkeypatch, run)))


@pytest.mark.parametrize("status", [None, 0, 2])
def test_a_commands_status_is_the_exit_code(capsys, monkeypatch, status):
    assert call(capsys, *make_command(monkeypatch, lambda args: status)) == (status or 0, "", "")


@pytest.mark.parametrize("lines", [1, 100_000], ids=["at the end", "while printing"])
def test_a_reader_who_goes_away(lines):
    """`maskclip … | head`: neither a traceback nor "Exception ignored", wherever the pipe breaks."""
    script = "\n".join(
        [
            "import sys",
            "from maskclip_jax import cli",
            "from maskclip_jax.cli import convert",
            f"convert.run = lambda args: print('a line\\n' * {lines})",
            "sys.stdin.read()",  # until the reader is gone
            "cli.main(['convert', 'a', 'b'])",
        ]
    )
    read, write = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdin=subprocess.PIPE, stdout=write, stderr=subprocess.PIPE
    )
    os.close(write)
    os.close(read)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (141, b"")


def test_the_public_names_are_there_without_being_imported():
    """`import maskclip_jax` is free; its names and its modules come when they are asked for."""
    script = "\n".join(
        [
            "import sys, maskclip_jax",
            "assert 'jax' not in sys.modules",
            "assert {'load_clip', 'segment_images'} <= set(dir(maskclip_jax))",
            "maskclip_jax.segment.refine.key_smoothing, maskclip_jax.evaluate.metrics.mean_iou",
            "from maskclip_jax import Fidelity, Options, Pretrained, Segmentation, UserError",
            "from maskclip_jax import load_clip, segment_images",
            "assert maskclip_jax.load_clip is load_clip and load_clip.__module__ == 'maskclip_jax.checkpoints.load'",
            "assert not hasattr(maskclip_jax, 'nonsense')",
        ]
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


def test_words_are_utf_8_where_python_takes_them_for_ascii(tmp_path):
    """The name of a file stays as the system knows it; what is not UTF-8, as it is. Both can be told."""
    (tmp_path / "größe").touch()
    script = "import sys; from maskclip_jax.cli import words; from maskclip_jax.data.whole_files import as_text\n"
    script += "found = words(sys.argv[1:]); print(ascii([found, [as_text(word) for word in found]]))"
    given = ["Hündin, 猫", str(tmp_path / "größe"), b"caf\xe9"]
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONPATH": str(ROOT)}
    output = subprocess.run([sys.executable, "-c", script, *given], env=environment, capture_output=True, check=True)
    found, told = ast.literal_eval(output.stdout.decode())
    assert found == [given[0], os.fsencode(given[1]).decode("ascii", "surrogateescape"), "caf\udce9"]
    assert told == [*given[:2], "caf\\xe9"]
