"""What several commands share: the model's arguments, how to read it densely, progress, and the record of a run."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from maskclip_jax.data.whole_files import as_text, cut
from maskclip_jax.errors import UserError
from maskclip_jax.segment.options import FIELDS, Options

MOST_MESSAGE = 2000  # characters: an input that is quoted may have a megabyte
READING = {option.name: option for option in FIELDS if option.metadata["flag"]}  # the fields that have a flag


def unit(text: str) -> float:
    """An argument above 0 and up to 1."""
    with contextlib.suppress(ValueError):
        if 0 < (value := float(text)) <= 1:
            return value
    raise argparse.ArgumentTypeError(f"a number above 0 and up to 1, not {text!r}")


def positive(text: str) -> int:
    """An argument of at least 1."""
    with contextlib.suppress(ValueError):
        if (value := int(text)) >= 1:
            return value
    raise argparse.ArgumentTypeError(f"a whole number of at least 1, not {text!r}")


TYPES = {"text": str, "number": float, "integer": int, "probability": unit, "count": positive}


def place(text: str) -> Path:
    """An argument that is a path: an empty one would be the working folder."""
    if text.strip():
        return Path(text)
    raise argparse.ArgumentTypeError(f"a path, not {text!r} (the folder you are in is '.')")


def complain(message: Exception | str, kind: str = "error") -> None:
    """One line on stderr, whatever the message holds (file names may hold line breaks)."""
    print(f"{kind}:", cut(str(message), MOST_MESSAGE), file=sys.stderr)


def add_model_arguments(parser: argparse.ArgumentParser, *, source: bool = False) -> None:
    """The model, `--model` or (with `source`) the first argument, and how to load it."""
    kinds = {"help": "embedded, embedded-resnet, embedded-student, a hub id, or a checkpoint's folder or file"}
    if source:
        parser.add_argument("model", metavar="SOURCE", **kinds)
    else:
        parser.add_argument("--model", default="embedded", **kinds)
    add_checkpoint_arguments(parser)
    parser.add_argument("--fidelity", choices=("clip", "released"), default="clip", help="whose habits to follow")
    parser.add_argument("--dense-stride", type=int, choices=(8, 16, 32), help="where a ResNet is read out")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="what the towers compute in"
    )


def add_checkpoint_arguments(parser: argparse.ArgumentParser) -> None:
    """What a checkpoint or a run does not say by itself."""
    parser.add_argument("--tokenizer", help="folder, hub id or .model file of a tokenizer, where a checkpoint has none")
    parser.add_argument(
        "--activation", choices=("quick_gelu", "gelu"), help="of weights that come without a config (quick_gelu)"
    )
    parser.add_argument(
        "--checkpoint", type=checkpoint, metavar="WHICH", help="of a run: latest (default), a step, or best (eval data)"
    )


def checkpoint(text: str) -> str | int:
    """An argument that names a checkpoint of a run: latest, best or a step."""
    if text in ("latest", "best"):
        return text
    if text.isdecimal():
        return int(text)
    raise argparse.ArgumentTypeError(f"latest, best, or a step, not {text!r}")


def load_run(args: argparse.Namespace):
    """The `TrainedStudent` that `--model` is; prints which checkpoint it is and how it was chosen."""
    from maskclip_jax.distill.student_folder import load_student

    trained = load_student(args.model, args.checkpoint or "latest")
    print(trained.origin)
    return trained


def add_image_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-pixels", type=positive, metavar="N", help="refuse images of more; 89,478,485 unless given"
    )


def load_model(args: argparse.Namespace):
    """The `Pretrained` that `add_model_arguments` describe."""
    import jax.numpy as jnp

    from maskclip_jax.checkpoints.load import load_clip

    if getattr(args, "checkpoint", None) is not None:
        raise UserError(f"--checkpoint chooses among a run's, but {args.model} is no run: leave it out")
    print_notes()
    return load_clip(
        args.model,
        fidelity=args.fidelity,
        dense_stride=args.dense_stride,
        dtype=jnp.dtype(args.dtype),
        tokenizer=args.tokenizer,
        activation=args.activation,
    )


def print_notes() -> None:
    """From now on the library's log, what it assumes of a checkpoint, is lines on stderr: "note: …"."""
    log = logging.getLogger("maskclip_jax")
    if not any(isinstance(handler, _Notes) for handler in log.handlers):
        log.addHandler(_Notes(logging.WARNING))


class _Notes(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        complain(record.getMessage(), "note")


def add_reading_arguments(parser: argparse.ArgumentParser, without: Sequence[str] = ()) -> None:
    """A flag for every field of `Options` that has one, and --protocol; what is not given stays None."""
    size, method = parser.add_mutually_exclusive_group(), parser.add_mutually_exclusive_group()
    groups = {"short_side": size, "within": size, "method": method}
    method.add_argument("--naive", action="store_true", help="the paper's baseline: short for --method clip")
    parser.add_argument("--protocol", help="a paper's sizes, windows, templates, scale and method; yours go first")
    for name, option in READING.items():
        if name not in without:
            flag = option.metadata["flag"]
            keywords = flag | ({"type": TYPES[flag["type"]]} if "type" in flag else {})
            flag_name = f"--{name.replace('_', '-')}"
            groups.get(name, parser).add_argument(flag_name, help=option.metadata["help"], **keywords)


def reading_options(args: argparse.Namespace, *, background: bool):
    """The `Options` that the flags describe: what is given, else `--protocol`'s, else the defaults.

    `background`: whether the classes include one, to which a protocol's threshold applies.
    """
    from maskclip_jax.segment.protocols import protocol_options

    given = {name: value for name in READING if (value := getattr(args, name, None)) is not None and value is not False}
    if args.naive:
        given["method"] = "clip"
    if args.protocol is None:
        return Options(**given)
    one = {"stride"} if "window" in given else set()  # a window of one's own comes with its own stride
    one |= {"short_side", "within"} if {"short_side", "within"} & set(given) else set()  # a size too, of either kind
    return dataclasses.replace(protocol_options(args.protocol, background=background), **dict.fromkeys(one), **given)


def refuse_for_students(args: argparse.Namespace, takes: Sequence[str], also: Sequence[str] = ()) -> None:
    """Raises UserError where a reading's or a CLIP's option was set that a student does not take."""
    names = [name for name in READING if name not in takes]
    names += ["naive", "protocol", "tokenizer", "activation", "dense_stride", *also]
    if refused := [name for name in names if getattr(args, name, None)]:
        option = f"--{refused[0].replace('_', '-')}"
        raise UserError(f"a student is read as it was trained, got {option}: leave it out")


def record(args: argparse.Namespace) -> dict[str, Any]:
    """The run's settings, for the output folder."""
    from importlib import metadata

    import jax

    settings = {name: _recorded(value) for name, value in vars(args).items()}
    versions = {"jax": jax.__version__, "flax": metadata.version("flax"), "device": jax.devices()[0].device_kind}
    return {"command": args.command, "settings": settings, "versions": versions}


def _recorded(value: Any) -> Any:
    """An argument's value as JSON holds it."""
    if isinstance(value, list | tuple):
        return [_recorded(one) for one in value]
    return as_text(value) if isinstance(value, str | os.PathLike) else value


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on the host or on a device: another image may fit."""
    from jax.errors import JaxRuntimeError

    return isinstance(error, MemoryError) or (isinstance(error, JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error))


@contextlib.contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar with a rate and an ETA on stderr (plain lines where that is no terminal): call it with the number done."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn

    class Rate(ProgressColumn):
        def render(self, task):
            return f"{task.speed:.1f}/s" if task.speed else "-/s"

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Rate(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=total)
        yield lambda done: bar.update(task, completed=done)


def output_folder(path: Path, option: str = "--out") -> Path:
    """The folder results go to, made when missing. Raises UserError, naming `option`, where it cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"{option} is a folder, but {path} is, or lies in, a file: choose another") from error
    except OSError as error:
        raise UserError(f"{option} must be a folder that can be written, {path} can not ({error.strerror})") from error
    return path


def output_file(path: Path, inputs: Sequence[str | Path], option: str = "--out") -> Path:
    """The file a result goes to, checked before the work. Raises UserError where it cannot be, or is an input."""
    if path.is_dir():
        raise UserError(f"{option} is a file, but {path} is a folder: name a file in it")
    if path.exists() and any(os.path.exists(one) and os.path.samefile(one, path) for one in inputs):
        raise UserError(f"{option} is a file of its own, but {path} is an input: choose another")
    output_folder(path.parent, option)
    return path
