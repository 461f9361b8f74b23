"""The command line: finds the command, runs it, and turns every error a person can mend into one line."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import os
import sys
import warnings
from types import ModuleType
from typing import Any

from maskclip_jax.cli.common import MOST_MESSAGE, complain
from maskclip_jax.cli.process import collect_less_often, keep_memory, keep_programs
from maskclip_jax.data.whole_files import cut
from maskclip_jax.errors import UserError

COMMANDS = {
    "segment": "masks for your images from a list of words",
    "label": "masks for a whole corpus, over all hosts and devices, resumable",
    "export": "those masks in the files of other tools: COCO, CVAT, Label Studio, YOLO …",
    "prepare": "a data set you downloaded as TFDS records",
    "demo": "the shipped scenes, segmented by the shipped model, with a table of scores",
    "evaluate": "mIoU of a model on images with masks",
    "distill": "train a student on the masks (MaskCLIP+)",
    "export-model": "a model for other runtimes: StableHLO, ONNX",
    "push": "a student to the Hugging Face hub, with a model card",
    "convert": "any supported checkpoint into one that loads fast",
    "serve": "a page to try your own photo and words in the browser",
}
RESUMED = ("label", "distill", "demo")  # what was done before Ctrl-C is kept
WORDS = ("classes", "unseen", "background", "templates", "set")  # arguments that are text, if they are no file
STARTS_AGAIN = "nothing is kept to go on from, the same command starts from the beginning"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"error: {cut(message, MOST_MESSAGE)} (see: {self.prog} --help)\n")


def build_parser(command: str | None = None) -> argparse.ArgumentParser:
    """The parser with the arguments of one command (all of them when None: for tests and documentation)."""
    parser = _Parser(prog=os.path.basename(sys.argv[0]) if sys.argv[0].endswith("run.py") else "maskclip")
    parser.description = "Name what you want to see and get a mask for it: MaskCLIP and MaskCLIP+ in JAX."
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, help_line in COMMANDS.items():
        module = _module(name)
        sub = commands.add_parser(name, help=help_line, description=module.__doc__, formatter_class=_Help)
        if command in (None, name):
            module.add_arguments(sub)
            sub.add_argument("--no-compile-cache", action="store_true", help="do not keep compiled programs on disk")
    return parser


def _module(command: str) -> ModuleType:
    return importlib.import_module(f"maskclip_jax.cli.{command.replace('-', '_')}")


class _Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The module's docstring as it is written, and every default there is."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def main(argv: list[str] | None = None) -> None:
    """Runs one command; exits 2 with one line on bad input, 130 on Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by who started this
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    keep_memory()
    collect_less_often()
    try:
        try:
            status = run_command(argv)
        finally:
            sys.stdout.flush()  # here, where a closed pipe is caught
    except BrokenPipeError:  # `| head` has read enough: no error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 141
    sys.exit(status)


def words(value: Any) -> Any:
    """Text as it was typed: where Python took the arguments for ASCII (LC_ALL=C without its UTF-8 mode) they are UTF-8.

    But the name of a file stays as the system knows it, and what is not UTF-8 as it is, for the message about it.
    """
    if isinstance(value, list):
        return [words(entry) for entry in value]
    with contextlib.suppress(UnicodeError):
        if isinstance(value, str) and not value.isascii() and not os.path.exists(value):
            return os.fsencode(value).decode()
    return value


def _has_working_folder() -> bool:
    try:
        os.getcwd()
    except FileNotFoundError:  # removed by somebody
        return False
    return True


def run_command(argv: list[str]) -> int:
    """The exit code of one command. Raises SystemExit for `--help` and arguments that cannot be read."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # file names may hold what the terminal cannot show
    try:
        args = build_parser(argv[0] if argv and argv[0] in COMMANDS else None).parse_args(argv)
        vars(args).update({name: words(value) for name, value in vars(args).items() if name in WORDS})
        if not vars(args).pop("no_compile_cache"):
            keep_programs()
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: complain(message, "warning")
            module = _module(args.command)
            if getattr(args, "max_pixels", None) is None:
                return module.run(args) or 0
            from maskclip_jax.data.decode import pixel_limit  # only here: --help needs no NumPy

            with pixel_limit(args.max_pixels):
                return module.run(args) or 0
    except UserError as error:
        complain(error)
    except KeyboardInterrupt:
        kept = bool(argv) and argv[0] in RESUMED
        print(f"stopped: {'run the same command again to go on' if kept else STARTS_AGAIN}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        raise
    except MemoryError as error:
        complain(
            f"the work must fit into memory, but it does not ({error or 'no more'}): smaller images, or less at once"
        )
    except RuntimeError as error:
        if "nable to initialize backend" not in str(error):
            raise
        complain(f"JAX needs a device, but has none of that kind: {error}")
    except OSError as error:  # a full disk, a folder nobody may write to: the system's own words say which
        which = error.filename or ("one" if _has_working_folder() else "the working folder")
        why = error.strerror or error
        complain(f"files must be readable, and writable in --out, but {which} is not ({why}): choose another")
    return 2
