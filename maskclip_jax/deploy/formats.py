"""A model's function as a file of another runtime: StableHLO (`jax.export`, any size) and ONNX (jax2onnx, one size).

Beside FILE goes FILE.json, which says what a program has to know: inputs, outputs, classes, palette, how to resize.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from maskclip_jax.data.whole_files import cut, json_text, reason, write_bytes, write_json
from maskclip_jax.deploy.functions import Deployed
from maskclip_jax.errors import UserError
from maskclip_jax.version import __version__

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
OPSET = 21  # the newest that onnxruntime has had for two years
MOST_ONNX = 2**31 - 2**20  # bytes: a protobuf has no more


def write_model(model: Deployed, path: Path, to: str) -> dict[str, Any]:
    """Writes `path` and its `.json`, each whole or not at all, and returns what the latter says.

    Raises:
      UserError: an unknown format, a converter that is not installed or cannot convert this model, no room.
    """
    check_format(path, to)
    content, specific = FORMATS[to](model)
    about = _about(model, to) | specific
    write_bytes(path, content(about) if callable(content) else content)
    write_json(path.with_name(path.name + ".json"), about)
    return about


def check_format(path: Path, to: str) -> None:
    """Raises UserError for an unknown format, or for a file named after the other one."""
    if to not in FORMATS:
        raise UserError(f"a format is {' or '.join(FORMATS)}, got {cut(to)}: choose one of them")
    if (other := path.suffix[1:].casefold()) in FORMATS and other != to:
        raise UserError(f"a file is called as its format is, got {path.name} for {to}: take --to {other}, or rename it")


def _about(model: Deployed, to: str) -> dict[str, Any]:
    """What a user of the file has to know."""
    height, width = model.size or (f"{model.multiple}*h", f"{model.multiple}*w")
    classes = "c" if model.width is not None and to == "stablehlo" else len(model.about["classes"])
    inputs = {"image": {"dtype": "uint8", "shape": [1, height, width, 3], "what": "RGB, resized as `resize` says"}}
    if model.width is not None:
        what = "a unit row of the text tower for each class"
        inputs["classifier"] = {"dtype": "float32", "shape": [classes, model.width], "what": what}
    outputs = {
        "labels": {"dtype": "int32", "shape": [1, height, width], "what": "index of the class"},
        "probabilities": {"dtype": "float32", "shape": [1, height, width, classes]},
    }
    versions = {"maskclip_jax": __version__, "jax": jax.__version__}
    return {"format": to, "inputs": inputs, "outputs": outputs, "versions": versions} | model.about


def _stablehlo(model: Deployed) -> tuple[bytes, dict[str, Any]]:
    from jax import export

    if model.size is None:
        height, width, classes = export.symbolic_shape(f"{model.multiple}*h, {model.multiple}*w, c")
    else:
        (height, width), (classes,) = model.size, export.symbolic_shape("c")
    function = jax.jit(model.function)  # a new one: what others compiled of it took this machine's routes
    try:
        exported = export.export(function, platforms=PLATFORMS)(*model.shapes(height, width, classes))
    except Exception as error:  # a method that looks at sizes: JAX has several names for that
        remedy = "give --size" if model.size is None else "choose another method"
        raise UserError(f"this model cannot be exported so ({reason(error)}): {remedy}") from error
    low, high = exported.calling_convention_version, export.maximum_supported_calling_convention_version
    return bytes(exported.serialize()), {"platforms": PLATFORMS, "calling convention": [low, high]}


def _onnx(model: Deployed) -> tuple[Callable[[dict[str, Any]], bytes], dict[str, Any]]:
    if model.size is None:
        raise UserError("an ONNX file has one size of images, got none: give --size HEIGHT WIDTH")
    if model.width is not None and "classes" not in model.about:
        raise UserError("an ONNX file has one number of classes, got none: give --classes (rows may change)")
    try:
        with _quiet():
            import jax2onnx
    except ImportError as error:
        raise UserError(
            f"onnx needs jax2onnx, but {error.name} is not installed: pip install jax2onnx, or take --to stablehlo"
        ) from error
    names = ["image"] if model.width is None else ["image", "classifier"]
    inputs = model.shapes(*model.size, len(model.about["classes"]))
    try:
        with _quiet():
            proto = jax2onnx.to_onnx(
                *(model.function, inputs),
                model_name="maskclip_jax",
                opset=OPSET,
                input_names=names,
                output_names=["labels", "probabilities"],
            )
    except Exception as error:  # whatever its rules for each operation raise
        raise UserError(f"jax2onnx cannot convert this model ({reason(error)}): take --to stablehlo") from error
    if (size := proto.ByteSize()) > MOST_ONNX:
        raise UserError(f"an ONNX file has at most 2 GiB, got {size / 2**30:.1f}: take --to stablehlo")

    def content(about: dict[str, Any]) -> bytes:
        proto.metadata_props.add(key="maskclip_jax", value=json_text(about))
        return proto.SerializeToString()

    return content, {"opset": OPSET}


@contextlib.contextmanager
def _quiet():
    """A converter's warnings say nothing to a user of this command."""
    log = logging.getLogger("onnx_ir")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


FORMATS: dict[str, Callable[[Deployed], Any]] = {"stablehlo": _stablehlo, "onnx": _onnx}
