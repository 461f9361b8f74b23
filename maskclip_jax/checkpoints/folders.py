"""What a checkpoint folder holds: which file is the weights, which config describes them, and what lies beside."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from maskclip_jax.checkpoints import architecture, dino, google
from maskclip_jax.checkpoints.files import read_arrays
from maskclip_jax.checkpoints.memory import array_shapes
from maskclip_jax.checkpoints.pretrained import Reading
from maskclip_jax.checkpoints.tokenizer import MissingTokenizer, load_tokenizer, openai_tokenizer
from maskclip_jax.checkpoints.torch_files import TorchFile
from maskclip_jax.checkpoints.weights import naming_of, plain_names
from maskclip_jax.data import schema
from maskclip_jax.data.preprocess import Preprocess
from maskclip_jax.data.whole_files import read_json
from maskclip_jax.encoders.config import NO_TEXT, CLIPConfig, TextConfig, with_activation
from maskclip_jax.errors import UserError

OPENAI_MEAN, OPENAI_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
OPENAI = Preprocess(OPENAI_MEAN, OPENAI_STD)  # also transformers' and open_clip's, for checkpoints that bring none
SMALL_FILES = ("*.json", "*.model", "merges.txt")  # configs, tokenizer, the index of shards
WEIGHTS = {  # in order of preference
    "config.json": (
        "model.safetensors",
        "model.safetensors.index.json",
        "flax_model.msgpack",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
    ),
    "open_clip_config.json": (
        "open_clip_model.safetensors",
        "model.safetensors",
        "open_clip_pytorch_model.bin",
    ),
}


_READING = {
    "dense_stride": schema.optional(schema.whole(1, 2**14)),
    "short_side": schema.whole(1, 4096)._replace(words="a number of pixels from 1 to 4096"),
    "prompt_denoising": schema.optional(schema.number(0, 1)._replace(words="in 0..1")),
    "templates": schema.optional(schema.text()._replace(words="the name of a template set")),
}


class Parts(NamedTuple):
    """A checkpoint read from disk; `arrays` keep their original names (`weights.to_variables` converts them)."""

    arrays: Mapping[str, Any]
    config: CLIPConfig
    tokenizer: Callable[[], Callable]  # reads it, for another may be given instead
    preprocess: Preprocess
    reading: Reading
    note: str | None = None  # what was assumed, where nothing in the checkpoint says it


def from_mapping(arrays: Mapping[str, Any]) -> Parts:
    """A mapping of OpenAI-named arrays, of both towers or of the image tower alone (`visual.…`, maybe `logit_scale`);
    or of Google's.

    Statistics are OpenAI's, and so is the tokenizer where the vocabulary is.
    """
    names = plain_names(arrays)
    if (found := _google(arrays, None)) is not None:
        return found
    if naming_of(names) != "openai":
        raise UserError("a mapping has OpenAI's names, got transformers': give the folder with its config.json")
    if all(name.startswith("visual.") or name == "logit_scale" for name in names):
        shapes = array_shapes(arrays)
        vision, embed_dim = architecture.vision_from_shapes({name: shapes[key] for name, key in names.items()})
        return Parts(arrays, CLIPConfig(vision, NO_TEXT, embed_dim), _none(NO_TEXT), OPENAI, Reading())
    config, note = _from_arrays(arrays, "a mapping of arrays")
    missing = _none(config.text)
    return Parts(arrays, config, lambda: openai_tokenizer(config.text) or missing(), OPENAI, Reading(), note)


def from_file(path: Path, *, backbone: bool = False) -> Parts:
    """A weight file; configs and tokenizer are looked for beside it. OpenAI's names need no config, nor do Google's.

    For a `backbone`, as in `from_folder`, an image tower alone will do.
    """
    folder, arrays = path.parent, google.read_npz(path) if path.suffix == ".npz" else read_arrays(path)
    if (found := _google(arrays, folder)) is not None:
        return found
    if naming_of(plain_names(arrays)) != "openai":
        if not (folder / "config.json").is_file():
            raise UserError(f"{path} has transformers' names, which need config.json beside them: put it there")
        return _hf(arrays, folder, backbone)
    if (folder / "open_clip_config.json").is_file():
        config, preprocess = _open_clip(folder)
        return _parts(arrays, config, folder, preprocess)
    config, note = _from_arrays(arrays, path.name)
    return _parts(arrays, config, folder, OPENAI)._replace(note=note)


def from_folder(folder: Path, *, backbone: bool = False) -> Parts:
    """A Hugging Face or open_clip folder, or one with the files of one of Google's models."""
    if not any((folder / name).is_file() for name in WEIGHTS) and (found := google.in_folder(folder)) is not None:
        return from_file(found)
    config_name, names = candidates(folder, backbone=backbone)
    file = next((folder / name for name in names if (folder / name).is_file()), None)
    if file is None:
        raise UserError(f"{folder} holds {config_name} but no weights: add one of {', '.join(names)}")
    arrays = read_arrays(file)
    naming = naming_of(plain_names(arrays))
    if (naming == "openai") != (config_name == "open_clip_config.json"):
        raise UserError(
            f"{file} has names of the {naming} kind, but {config_name} describes others: take matching files"
        )
    if naming == "openai":
        config, preprocess = _open_clip(folder)
        return _parts(arrays, config, folder, preprocess)
    return _hf(arrays, folder, backbone)


def candidates(folder: Path, *, backbone: bool = False) -> tuple[str, tuple[str, ...]]:
    """The config that describes `folder`'s weights, and the names these may have, the best first.

    Raises UserError when there is no config of a CLIP, before anyone fetches or reads the weights. Some folders hold
    transformers' files and open_clip's; some a timm `config.json` that is no CLIP's.
    """
    hf, open_clip = folder / "config.json", folder / "open_clip_config.json"
    if hf.is_file():
        content = read_json(hf)
        if content.get("model_type") in architecture.MODEL_TYPES or not open_clip.is_file():
            architecture.from_hf(content, backbone=backbone)
            return hf.name, WEIGHTS[hf.name]
    if open_clip.is_file():
        _open_clip(folder)
        return open_clip.name, WEIGHTS[open_clip.name]
    raise UserError(
        f"a checkpoint folder holds config.json, open_clip_config.json or Google's .npz, but {folder} none: add one"
    )


def read_reading(folder: Path) -> Reading:
    """`maskclip.json` of a folder, or the defaults where there is none. Raises UserError for unknown keys."""
    path = folder / "maskclip.json"
    if not path.is_file():
        return Reading()
    return Reading(**schema.fields(read_json(path), _READING, str(path), only=True))


def _google(arrays: Mapping[str, Any], folder: Path | None) -> Parts | None:
    """A model of Google's, whose files say their sizes themselves; None where the names are others'."""
    arrays = google.plain(arrays)
    naming = naming_of(plain_names(arrays))
    if naming not in google.NAMINGS:
        return None
    config = google.from_shapes(array_shapes(arrays), naming)
    preprocess = google.preprocess(config)
    if folder is None:
        return Parts(arrays, config, _none(config.text), preprocess, Reading())
    return _parts(arrays, config, folder, preprocess)


def _hf(arrays: Mapping[str, Any], folder: Path, backbone: bool) -> Parts:
    config = architecture.from_hf(read_json(folder / "config.json"), backbone=backbone)
    if not config.has_text:
        preprocess = _hf_preprocess(folder, dino.PREPROCESS)
        return Parts(arrays, config, _none(config.text, str(folder)), preprocess, Reading())
    default = OPENAI if config.family == "clip" else google.preprocess(config)
    return _parts(arrays, config, folder, _hf_preprocess(folder, default))


def _parts(arrays: Mapping[str, Any], config: CLIPConfig, folder: Path, preprocess: Preprocess) -> Parts:
    tokenizer = functools.partial(load_tokenizer, folder, config.text)
    return Parts(arrays, config, tokenizer, preprocess, read_reading(folder))


def _none(text: TextConfig, source: str = "a mapping of arrays") -> Callable[[], Callable]:
    return functools.partial(MissingTokenizer, source, text)


def _from_arrays(arrays: Mapping[str, Any], name: str) -> tuple[CLIPConfig, str | None]:
    """The architecture, and a note where its activation is only assumed: no array's shape tells it."""
    shapes = array_shapes(arrays)
    config = architecture.from_shapes({plain: shapes[key] for plain, key in plain_names(arrays).items()})
    known = arrays.activation if isinstance(arrays, TorchFile) else None
    if known is not None:
        return with_activation(config, known), None
    return config, (
        f"{name} does not say its activation: QuickGELU was assumed, as in OpenAI's models; for weights trained with "
        "GELU (most of open_clip's) give --activation gelu (load_clip(…, activation='gelu')), or put their "
        "open_clip_config.json beside them"
    )


def _open_clip(folder: Path) -> tuple[CLIPConfig, Preprocess]:
    file = folder / "open_clip_config.json"
    rules = {"model_cfg": schema.OBJECT, "preprocess_cfg": schema.OBJECT}
    content = schema.fields(read_json(file), rules, str(file), needed=("model_cfg",))
    config = architecture.from_open_clip(content["model_cfg"])
    if "preprocess_cfg" not in content:
        return config, OPENAI
    return config, Preprocess.from_open_clip(content["preprocess_cfg"])


def _hf_preprocess(folder: Path, default: Preprocess) -> Preprocess:
    older, newer = folder / "preprocessor_config.json", folder / "processor_config.json"
    if older.is_file():
        return Preprocess.from_hf(read_json(older))
    if newer.is_file():  # transformers 5 writes image processor and tokenizer settings into one file
        content = read_json(newer)
        if "image_processor" in content:
            return Preprocess.from_hf(content["image_processor"])
    return default
