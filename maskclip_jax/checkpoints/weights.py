"""Named arrays -> variables of `CLIP`, checked on both sides: every key used once, every parameter filled."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from maskclip_jax.checkpoints.memory import as_float32
from maskclip_jax.checkpoints.names import HALVES, IGNORED, OTHERS, SIGNATURE, Entry, Naming, Tower, entries
from maskclip_jax.checkpoints.names import abstract_variables as abstract_variables
from maskclip_jax.data.whole_files import cut
from maskclip_jax.encoders.config import CLIPConfig, ViTConfig
from maskclip_jax.errors import UserError

Arrays = Mapping[str, Any]  # name -> array; values may be read from disk as they are asked for
SHOWN = 4  # names listed on each side of a mismatch
MOST_SCALE = 10.0  # of logit_scale, a logarithm: OpenAI's training clips it at log 100 = 4.6
# What torch.compile, FSDP and activation checkpointing put into names, anywhere; and DistributedDataParallel in front.
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_PARALLEL = "module."


def naming_of(names: Iterable[str]) -> Naming:
    """Which table these names belong to. Raises UserError, with a few of them, when to none."""
    names = set(names)
    for pattern, name in OTHERS:
        if found := sorted(filter(re.compile(pattern).fullmatch, names)):
            raise UserError(
                f"weights are of CLIP's, SigLIP's or TIPS' architecture, got {name} ({_some(found[:1])}): give "
                "another model"
            )
    for naming, key in SIGNATURE.items():
        if key in names:
            return naming
    for key, whole in HALVES.items():
        if key in names:
            raise UserError(f"a model is whole, got {whole} alone ({key}): give both towers")
    came = _some(sorted(names)) if names else "nothing"
    raise UserError(
        f"a checkpoint has OpenAI's names ({SIGNATURE['openai']}), transformers' ({SIGNATURE['hf']}) or Google's "
        f"({SIGNATURE['big_vision']}), got {came}: give a whole model, both towers"
    )


def plain_names(arrays: Arrays) -> dict[str, str]:
    """Plain OpenAI or HF name -> the key it has in `arrays`: without wrappers' prefixes and open_clip's `text.`."""
    if not all(isinstance(key, str) for key in arrays):
        raise UserError("weights are named by text, got other keys: give a state dict")
    names = {key: _WRAPPERS.sub("", key) for key in arrays}
    while names and all(name.startswith(_PARALLEL) for name in names.values()):
        names = {key: name.removeprefix(_PARALLEL) for key, name in names.items()}
    # open_clip's CustomTextCLIP keeps the same text tower under `text.`; HF's names never start with it.
    plain = {name.removeprefix("text."): key for key, name in names.items()}
    if len(plain) < len(names):
        plain = {name: key for key, name in names.items()}
    if len(plain) < len(names):
        twice = sorted(key for key, name in names.items() if plain[name] != key)
        raise UserError(f"weights have one array per name, but {_some(twice)} come(s) twice: keep one of each")
    return plain


def to_variables(
    arrays: Arrays, config: CLIPConfig, *, towers: tuple[Tower, ...] = ("visual", "text")
) -> dict[str, Any]:
    """Reads `arrays` into `{"params": …}` (ResNets: and `"batch_stats"`), as float32 device arrays.

    Args:
      arrays: names -> arrays of any float type under any known naming; read one at a time.
      config: the architecture they must be.
      towers: the towers they must hold; an image tower alone has no `logit_scale` either.

    Raises:
      UserError: names missing, left over or of another shape (all three, with what the model needs); or numbers that
        are no weights: of an integer type, NaN or infinite, a negative variance, a `logit_scale` saved after exp.
    """
    names = plain_names(arrays)
    naming = naming_of(names)
    if naming != "openai" and not hasattr(config.vision, "patch_size"):
        raise UserError(f"a ResNet has OpenAI's names, got {naming} names: the config belongs to other weights")
    check_depth(config, len(names))
    wanted = abstract_variables(config)
    table = {entry.key: entry for entry in entries(config, naming, towers)}
    ignored = re.compile("|".join(IGNORED[naming]))
    left_over = [name for name in names if name not in table and not ignored.fullmatch(name)]
    missing = [name for name in table if name not in names]
    filled, misshapen, unusable = {}, [], []
    for name, entry in table.items():
        if name not in names:
            continue
        array = np.asanyarray(arrays[names[name]])
        shapes = [wanted[path].shape for path in entry.paths]
        try:
            with np.errstate(all="ignore"):  # of a temperature that is none: seen below
                parts = entry.layout.read(array)
        except (ValueError, IndexError, TypeError):  # cannot even be laid out: a wrong rank, or one that does not split
            parts = []
        if [part.shape for part in parts] != shapes:
            misshapen.append(f"{cut(name, 80)} {_size(array.shape)}, not {_size(_their_shape(entry, shapes))}")
        elif not misshapen and not left_over and not missing:
            with np.errstate(all="ignore"):  # what overflows is infinite, and refused as such
                numbers = [as_float32(part) for part in parts if _is_floating(array.dtype)]
            if reason := why_unusable(name, array.dtype, numbers):
                unusable.append(f"{cut(name, 80)} {reason}")
            for path, part in zip(entry.paths, numbers, strict=True) if not unusable else ():
                filled[path] = jax.device_put(part)
    _report(missing, left_over, misshapen)
    if unusable:
        raise UserError(f"weights are finite floating-point numbers, but {_some(unusable)}: take the original file")
    unfilled = [path for path in wanted if path not in filled and _tower(path) in towers]
    if unfilled:
        raise AssertionError(f"name_tables.py gives no key for {_some(unfilled)}")
    if "params/logit_scale" in filled:
        check_scale(filled["params/logit_scale"])
    return unflatten_dict(filled, sep="/")


def check_scale(logit_scale: Any) -> None:
    """Raises UserError for a `logit_scale` that is no logarithm: with it every pixel would get the first class."""
    value = float(logit_scale)
    if not abs(value) <= MOST_SCALE:  # NaN too
        remedy = f"store log({value:g}) = {np.log(value):.4g}" if value > 0 else "take the original file"
        raise UserError(
            f"logit_scale is a logarithm, at most {MOST_SCALE:g} (OpenAI's is 4.605), got {value:g}, perhaps "
            f"saved after exp: {remedy}"
        )


def to_names(variables: Mapping[str, Any], config: CLIPConfig, naming: Naming) -> dict[str, np.ndarray]:
    """The inverse of `to_variables`: NumPy arrays under OpenAI's ("openai"), transformers' ("hf", "flax") or Google's
    ("big_vision", "tips", "tips_torch") names."""
    flat = flatten_dict({name: variables[name] for name in ("params", "batch_stats") if name in variables}, sep="/")
    out = {}
    for key, paths, layout in entries(config, naming):
        array = layout.write([np.asarray(flat.pop(path)) for path in paths])
        out[key] = np.require(array, requirements="C")
    if flat:
        raise UserError(f"{naming} names have no place for {_some(list(flat))}: use naming 'openai'")
    return out


def check_depth(config: CLIPConfig, count: int) -> None:
    """Raises UserError when the config says more layers than `count` names can fill, before any is built."""
    blocks = config.vision.layers if isinstance(config.vision, ViTConfig) else max(config.vision.layers)
    for tower, layers in (("image", blocks), ("text", config.text.layers)):
        if 12 * layers > max(count, 24):  # a layer has twelve arrays
            raise UserError(
                f"weights must fit the model exactly, but the config gives the {tower} tower {layers} layers and the "
                f"weights have {count} arrays in all: check that config and weights belong together"
            )


def _their_shape(entry: Entry, shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
    """The shape of an array that fills ours; of views alone, for a config may ask for terabytes."""
    if len(set(map(len, shapes))) != 1 or len(shapes) == 1:
        return entry.layout.write([np.broadcast_to(np.float32(0), shapes[0])]).shape
    first, *rest = shapes[0][::-1]  # q, k and v, transposed and one below the other
    return (len(shapes) * first, *rest)


def why_unusable(name: str, dtype: np.dtype, numbers: Sequence[np.ndarray]) -> str | None:
    """Why the numbers of an array are no weights: of an integer type, not finite, a negative variance; None if not."""
    if not _is_floating(dtype):
        return f"is of type {dtype}"
    # A sum is finite where all are, but for one that overflows; the least and the largest decide then.
    with np.errstate(all="ignore"):
        finite = (np.isfinite(x.sum()) or np.isfinite((x.min(), x.max())).all() for x in numbers if x.size)
        usable = all(finite)
    if not usable:
        return "holds NaN or infinity"
    negative = name.endswith("running_var") and numbers[0].min(initial=0) < 0
    return "is a negative variance" if negative else None


def _is_floating(dtype: np.dtype) -> bool:
    return jnp.issubdtype(dtype.newbyteorder("="), jnp.floating)


def _report(missing: list[str], left_over: list[str], misshapen: list[str]) -> None:
    sides = []
    if missing:
        sides.append(f"{len(missing)} missing ({_some(missing)})")
    if left_over:
        sides.append(f"{len(left_over)} unknown ({_some(left_over)})")
    if misshapen:
        sides.append(f"{len(misshapen)} of another shape ({_some(misshapen)})")
    if sides:
        raise UserError(
            f"weights must fit the model exactly, but of their names {'; '.join(sides)}: "
            "check that config and weights belong together"
        )


def _tower(path: str) -> str:
    part = path.split("/")[1]
    return part if part in ("visual", "text") else "text"  # logit_scale comes with the text


def _some(names: list[str]) -> str:
    more = f", … {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(cut(name, 120) for name in names[:SHOWN]) + more


def _size(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) or "scalar"
