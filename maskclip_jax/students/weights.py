"""State dicts of other projects -> a student's parameters: one table per format, checked from both sides.

A table lists (their module, our module) as regular expressions and replacements. A module of ours whose last name
starts with `bn`, or is `downsample_1`, is a batch norm, any other a convolution: that settles the leaves. Every key of
theirs must be used exactly once or be declared ignorable, and every one of our leaves must be filled, with its shape.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import traverse_util

from maskclip_jax.checkpoints.files import SUFFIXES, read_arrays
from maskclip_jax.checkpoints.folders import WEIGHTS
from maskclip_jax.checkpoints.weights import why_unusable
from maskclip_jax.data.whole_files import reason
from maskclip_jax.errors import UserError

Table = tuple[tuple[str, str], ...]
Variables = dict[str, Any]

_BLOCKS = r"layer([1-4])\.(\d+)\."
_OURS = r"backbone/layer\1_\2/"
_STEM = {0: "conv1", 1: "bn1", 3: "conv2", 4: "bn2", 6: "conv3"}  # places in a v1c stem that is one Sequential

# timm's resnet50c / resnet101c (gluon_in1k): v1c stem as one Sequential
TIMM: Table = (
    *((rf"conv1\.{i}", f"backbone/{ours}") for i, ours in _STEM.items()),
    (r"bn1", "backbone/bn3"),
    (_BLOCKS + r"(conv[123]|bn[123])", _OURS + r"\3"),
    (_BLOCKS + r"downsample\.0", _OURS + "downsample_0"),
    (_BLOCKS + r"downsample\.1", _OURS + "downsample_1"),
)

# torchvision's and timm's plain ResNet: v1 stem
TORCHVISION: Table = ((r"conv1", "backbone/conv1"), (r"bn1", "backbone/bn1"), *TIMM[6:])

# transformers' ResNetForImageClassification (microsoft/resnet-50, -101): v1 stem, everything counted from 0
_HF_LAYER = r"resnet\.encoder\.stages\.{stage}\.layers\.(\d+)\."
HUGGING_FACE: Table = (
    (r"resnet\.embedder\.embedder\.convolution", "backbone/conv1"),
    (r"resnet\.embedder\.embedder\.normalization", "backbone/bn1"),
    *(
        (_HF_LAYER.format(stage=stage) + theirs, rf"backbone/layer{stage + 1}_\1/{ours}")
        for stage in range(4)
        for theirs, ours in (
            (r"shortcut\.convolution", "downsample_0"),
            (r"shortcut\.normalization", "downsample_1"),
            *((rf"layer\.{i}\.convolution", f"conv{i + 1}") for i in range(3)),
            *((rf"layer\.{i}\.normalization", f"bn{i + 1}") for i in range(3)),
        )
    ),
)

# OpenAI's CLIP, the image tower of a ModifiedResNet: clip stem
OPENAI: Table = (
    (r"visual\.(conv[123]|bn[123])", r"backbone/\1"),
    *((r"visual\." + theirs, ours) for theirs, ours in TIMM[6:]),
)

# mmsegmentation, a whole segmentor: its text head aside, every student of the released code
MMSEGMENTATION: Table = (
    *((rf"backbone\.stem\.{i}", f"backbone/{ours}") for i, ours in (_STEM | {7: "bn3"}).items()),
    *((r"backbone\." + theirs, ours) for theirs, ours in TIMM[6:]),
    (r"decode_head\.aspp_modules\.(\d)\.(conv|bn)", r"head/aspp_\1/\2"),
    (r"decode_head\.aspp_modules\.(\d)\.(depthwise|pointwise)_conv\.(conv|bn)", r"head/aspp_\1/\2/\3"),
    (r"decode_head\.bottleneck\.(conv|bn)", r"head/bottleneck/\1"),
    (r"decode_head\.image_pool\.1\.(conv|bn)", r"head/image_pool/\1"),
    (r"decode_head\.c1_bottleneck\.(conv|bn)", r"head/low_level/\1"),
    (r"decode_head\.sep_bottleneck\.([01])\.(depthwise|pointwise)_conv\.(conv|bn)", r"head/refine_\1/\2/\3"),
    (r"decode_head\.psp_modules\.(\d)\.1\.(conv|bn)", r"head/pool_\1/\2"),
    (r"decode_head\.conv_seg", "classifier/conv_seg"),
)

# A format is recognised by one key only it has. Name -> (that key, table, keys that may go unused).
FORMATS: dict[str, tuple[str, Table, str]] = {
    "mmsegmentation": ("backbone.stem.0.weight", MMSEGMENTATION, r"auxiliary_head\..*"),
    "huggingface": ("resnet.embedder.embedder.convolution.weight", HUGGING_FACE, r"classifier\..*"),
    "openai": ("visual.bn3.weight", OPENAI, r"visual\.attnpool\..*|(?!visual\.).*"),
    "timm": ("conv1.0.weight", TIMM, r"fc\..*"),
    "torchvision": ("conv1.weight", TORCHVISION, r"fc\..*"),
}
_COUNTERS = re.compile(r"(.*\.)?num_batches_tracked")
STEMS = {"mmsegmentation": "v1c", "huggingface": "v1", "openai": "clip", "timm": "v1c", "torchvision": "v1"}


def detect_format(state: Mapping[str, Any]) -> str:
    """Name of the format whose key is in `state`; UserError with a few of its keys otherwise."""
    for name, (key, _, _) in FORMATS.items():
        if key in state:
            return name
    raise UserError(
        f"these weights are in no known format ({', '.join(FORMATS)}); their first keys are {sorted(state)[:4]}: "
        "use timm resnet50c/101c, microsoft/resnet-50/101 or OpenAI's CLIP ResNets"
    )


def _our_leaf(key: str, table: Table) -> tuple[str, ...] | None:
    """Path of the leaf their `key` fills, ("params" or "batch_stats", module…, leaf), or None."""
    module, _, leaf = key.rpartition(".")
    for pattern, replacement in table:
        match = re.fullmatch(pattern, module)
        if match is None:
            continue
        path = tuple(match.expand(replacement).split("/"))
        norm = path[-1].startswith("bn") or path[-1] == "downsample_1"
        names = {"weight": "scale", "bias": "bias"} if norm else {"weight": "kernel", "bias": "bias"}
        if leaf in names:
            return ("params", *path, names[leaf])
        if norm and leaf in ("running_mean", "running_var"):
            return ("batch_stats", *path, leaf.removeprefix("running_"))
    return None


def _few(names: list[str]) -> str:
    return ", ".join(names[:6]) + (f" … ({len(names)} in all)" if len(names) > 6 else "") if names else "none"


def _check_fit(what: str, unused: list[str], missing: list[str], shapes: list[str], remedy: str) -> None:
    """Raises UserError, with both sides, where anything is left over or differs."""
    if unused or missing or shapes:
        raise UserError(
            f"{what}: their keys unused: {_few(unused)}; our parameters unfilled: {_few(missing)}; "
            f"shapes that differ: {_few(shapes)}: {remedy}"
        )


def convert_state_dict(
    state: Mapping[str, np.ndarray], variables: Variables, parts: tuple[str, ...] = ("backbone",)
) -> Variables:
    """A copy of `variables` whose `parts` come from `state`; the other parts keep their values.

    Args:
        state: their names -> arrays, convolutions [out, in, k, k]. Any float type becomes the one of ours.
        variables: {"params", "batch_stats"} of a `Student`, arrays or `ShapeDtypeStruct`s (from `jax.eval_shape`).
        parts: which of "backbone", "head", "classifier" to fill. Keys of theirs for other parts are left alone.

    Raises:
        UserError: for an unknown format, or listing both sides: their keys unused, our parameters unfilled, and
            shapes that differ; or numbers that are no weights (`checkpoints.weights.why_unusable`).
    """
    name = detect_format(state)
    _, table, ignorable = FORMATS[name]
    ours: dict[tuple[str, ...], Any] = traverse_util.flatten_dict(variables)
    wanted = {path for path in ours if path[1] in parts}
    filled: dict[tuple[str, ...], np.ndarray] = {}
    unused, shapes, origin = [], [], {}
    for key in sorted(state):
        if _COUNTERS.fullmatch(key):
            continue
        path = _our_leaf(key, table)
        if path is None and re.fullmatch(ignorable, key):
            continue
        if path is not None and path[1] not in parts:
            continue
        if path is None or path not in wanted:
            unused.append(key)
            continue
        if path in filled:
            raise UserError(f"{origin[path]} and {key} are both the weights of {'/'.join(path)}: keep one")
        value = np.asarray(state[key])
        if why := why_unusable(key, value.dtype, [value]):
            raise UserError(f"weights are finite floating-point numbers, but {key} {why}: take the original file")
        if path[-1] == "kernel":
            # PyTorch's [out, in, k, k] -> HWIO; a Dense classifier's kernel is its 1×1 convolution without the k's
            value = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T
            value = value[0, 0] if len(ours[path].shape) == 2 and value.ndim == 4 else value
        if value.shape != ours[path].shape:
            shapes.append(f"{key} {value.shape} for {'/'.join(path)} {ours[path].shape}")
        filled[path], origin[path] = value.astype(ours[path].dtype), key
    missing = ["/".join(path) for path in sorted(wanted - set(filled))]
    remedy = "check backbone, stem, width and head of the student's config"
    _check_fit(f"{name} weights (stem {STEMS[name]}) do not fit this student", unused, missing, shapes, remedy)
    return traverse_util.unflatten_dict(ours | filled)


def backbone_from_clip(tower: Variables, variables: Variables) -> Variables:
    """`variables` of a student (stem "clip") whose backbone starts from CLIP's ResNet (paper §3.2, fine-tuned CLIP).

    Args:
        tower: {"params", "batch_stats"} of `encoders`' image tower, a ModifiedResNet; its attention pool is
            not used.
        variables: {"params", "batch_stats"} of the student.

    Raises:
        UserError: listing both sides when the towers differ.
    """
    theirs: dict[tuple[str, ...], Any] = {}
    for (collection, *path), value in traverse_util.flatten_dict(tower).items():
        if path[0] != "attnpool":
            theirs[(collection, "backbone", *(path[1:] if path[0] == "stem" else path))] = value
    ours: dict[tuple[str, ...], Any] = traverse_util.flatten_dict(variables)
    wanted = {path for path in ours if path[1] == "backbone"}
    unused, missing = (
        ["/".join(path) for path in sorted(paths)] for paths in (set(theirs) - wanted, wanted - set(theirs))
    )
    shapes = _different_shapes(theirs, {path: ours[path] for path in wanted})
    remedy = "use stem='clip', expansion=4 and the tower's layers and base_width"
    _check_fit("CLIP's image tower does not fit this student's backbone", unused, missing, shapes, remedy)
    return traverse_util.unflatten_dict(ours | theirs)


def start_from_student(theirs: Variables, variables: Variables) -> Variables:
    """`variables` of a student that starts from another's: what it has beyond that one (a decoder) keeps its values.

    Args:
        theirs, variables: {"params", "batch_stats"} of a student each.

    Raises:
        UserError: listing their parameters that have no place, and shapes that differ.
    """
    given: dict[tuple[str, ...], Any] = traverse_util.flatten_dict(theirs)
    ours: dict[tuple[str, ...], Any] = traverse_util.flatten_dict(variables)
    unused = ["/".join(path) for path in sorted(set(given) - set(ours))]
    shapes = _different_shapes(given, ours)
    _check_fit("the student to start from does not fit this one", unused, [], shapes, "give it that one's config")
    return traverse_util.unflatten_dict(ours | {path: value.astype(ours[path].dtype) for path, value in given.items()})


def modules_beyond(theirs: Mapping[str, Any], params: Mapping[str, Any]) -> list[str]:
    """The modules ("head/decoder_0") among a student's parameters that are not among those that it starts from."""
    found = set(traverse_util.flatten_dict(params)) - set(traverse_util.flatten_dict(theirs))
    return sorted({"/".join(path[:2]) for path in found})


def _different_shapes(theirs: Mapping[tuple[str, ...], Any], ours: Mapping[tuple[str, ...], Any]) -> list[str]:
    return [
        f"{theirs[path].shape} for {'/'.join(path)} {ours[path].shape}"
        for path in sorted(set(theirs) & set(ours))
        if theirs[path].shape != ours[path].shape
    ]


def read_state_dict(path: str | Path) -> Mapping[str, np.ndarray]:
    """Arrays of a weight file as `checkpoints.files.read_arrays` takes it, of a folder with one, or of a hub id.

    Nothing pickled in `.pth`, `.pt` or `.bin` is run, and PyTorch is not needed.

    Raises:
        UserError: when there is nothing of the kind there, or it is damaged.
    """
    file = Path(os.path.expanduser(path))
    if file.is_dir():
        file = next((file / name for name in WEIGHTS["config.json"] if (file / name).is_file()), file)
    if file.is_dir():
        raise UserError(f"no ImageNet weights in {path}: it holds none of {', '.join(WEIGHTS['config.json'])}")
    if not file.exists():
        if file.suffix.lower() in SUFFIXES or str(path).count("/") != 1:
            raise UserError(
                f"no ImageNet weights at {path}: give a file of {', '.join(SUFFIXES)}, its folder, a hub id"
            )
        from huggingface_hub import hf_hub_download

        try:
            file = Path(hf_hub_download(str(path), "model.safetensors"))
        except Exception as error:  # the hub raises a dozen kinds, all meaning "not to be had"
            why = reason(error)
            raise UserError(f"no ImageNet weights at {path}, neither a folder nor on the hub ({why})") from error
    return read_arrays(file)


def load_backbone_weights(path: str | Path, variables: Variables) -> Variables:
    """`variables` of a student with its backbone's parameters and statistics replaced by those in `path`."""
    return convert_state_dict(read_state_dict(path), variables, ("backbone",))
