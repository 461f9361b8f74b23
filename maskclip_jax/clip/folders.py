"""What a checkpoint folder holds: which file is the weights, which config describes them, and what lies beside."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from maskclip_jax.clip import infer
from maskclip_jax.clip.config import NO_TEXT, CLIPConfig
from maskclip_jax.clip.files import read_arrays, read_json, shapes_of
from maskclip_jax.clip.tokenizer import MissingTokenizer, load_tokenizer
from maskclip_jax.clip.weights import naming_of, plain_names
from maskclip_jax.data.preprocess import Preprocess
from maskclip_jax.errors import UserError

OPENAI_MEAN, OPENAI_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SMALL_FILES = ("*.json", "merges.txt")  # configs, tokenizer, the index of shards
WEIGHTS = {  # in order of preference; what needs torch comes last
    "config.json": (
        "model.safetensors",
        "model.safetensors.index.json",
        "flax_model.msgpack",
        "pytorch_model.bin",
    ),
    "open_clip_config.json": (
        "open_clip_model.safetensors",
        "model.safetensors",
        "open_clip_pytorch_model.bin",
    ),
}


@dataclasses.dataclass(frozen=True)
class Reading:
    """How a checkpoint is best read, from its optional `maskclip.json`; every key may be left out.

    Fields:
      dense_stride: pixels from one dense feature to the next (for ResNets to choose: 8, 16 or 32).
      short_side: pixels that the image's short side is resized to.
      prompt_denoising: threshold in 0..1, or None for none.
      templates: name of a template set, or None for the library's default.
    """

    dense_stride: int | None = None
    short_side: int = 512
    prompt_denoising: float | int | None = None
    templates: str | None = None


class Parts(NamedTuple):
    """A checkpoint as it lies on disk. `arrays` have someone's names; read them with `weights.to_variables`."""

    arrays: Mapping[str, Any]
    config: CLIPConfig
    tokenizer: Callable
    preprocess: Preprocess
    reading: Reading


def from_mapping(arrays: Mapping[str, Any]) -> Parts:
    """A mapping of OpenAI-named arrays, of both towers or of the image tower alone (`visual.…`, maybe `logit_scale`).

    Statistics are OpenAI's, and there is no tokenizer.
    """
    names = plain_names(arrays)
    if naming_of(names) != "openai":
        raise UserError("a mapping has OpenAI's names, but transformers' came: give the folder with its config.json")
    if all(name.startswith("visual.") or name == "logit_scale" for name in names):
        shapes = shapes_of(arrays)
        vision, embed_dim = infer.vision_from_shapes({name: shapes[key] for name, key in names.items()})
        config = CLIPConfig(vision, NO_TEXT, embed_dim)
    else:
        config = _from_arrays(arrays)
    return Parts(arrays, config, MissingTokenizer("a mapping of arrays"), openai_preprocess(), Reading())


def from_file(path: Path) -> Parts:
    """A weight file; configs and tokenizer are looked for beside it. OpenAI's names need no config."""
    folder, arrays = path.parent, read_arrays(path)
    if naming_of(plain_names(arrays)) != "openai":
        if not (folder / "config.json").is_file():
            raise UserError(f"{path} has transformers' names, which need config.json beside them: put it there")
        return _parts(arrays, infer.from_hf(read_json(folder / "config.json")), folder, _hf_preprocess(folder))
    if (folder / "open_clip_config.json").is_file():
        config, preprocess = _open_clip(folder)
        return _parts(arrays, config, folder, preprocess)
    return _parts(arrays, _from_arrays(arrays), folder, openai_preprocess())


def from_folder(folder: Path) -> Parts:
    """A Hugging Face or open_clip folder."""
    config_name, names = candidates(folder)
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
    return _parts(arrays, infer.from_hf(read_json(folder / config_name)), folder, _hf_preprocess(folder))


def candidates(folder: Path) -> tuple[str, tuple[str, ...]]:
    """The config that describes `folder`'s weights, and the names these may have, the best first.

    Raises UserError when there is no config of a CLIP. Some folders hold transformers' files and open_clip's; some a
    timm `config.json` that is no CLIP's.
    """
    hf, open_clip = folder / "config.json", folder / "open_clip_config.json"
    if hf.is_file():
        content = read_json(hf)
        if content.get("model_type") == "clip" or not open_clip.is_file():
            infer.check_model_type(content)
            return hf.name, WEIGHTS[hf.name]
    if open_clip.is_file():
        return open_clip.name, WEIGHTS[open_clip.name]
    raise UserError(f"a checkpoint folder holds config.json or open_clip_config.json, {folder} neither: add one")


def openai_preprocess() -> Preprocess:
    """OpenAI's statistics: also transformers' and open_clip's defaults, for checkpoints that bring none."""
    return Preprocess(OPENAI_MEAN, OPENAI_STD)


def read_reading(folder: Path) -> Reading:
    """`maskclip.json` of a folder, or the defaults where there is none. Raises UserError for unknown keys."""
    path = folder / "maskclip.json"
    if not path.is_file():
        return Reading()
    content, names = read_json(path), [field.name for field in dataclasses.fields(Reading)]
    unknown = sorted(set(content) - set(names))
    if unknown:
        raise UserError(f"{path} holds {', '.join(names)}, but {', '.join(unknown)} came: remove it")
    for name, fits, rule in (
        ("dense_stride", lambda x: x is None or isinstance(x, int), "a number of pixels or null"),
        ("short_side", lambda x: isinstance(x, int) and x > 0, "a number of pixels"),
        ("prompt_denoising", lambda x: x is None or (isinstance(x, int | float) and 0 <= x <= 1), "in 0..1 or null"),
        ("templates", lambda x: x is None or isinstance(x, str), "the name of a template set or null"),
    ):
        if name in content and not fits(content[name]):
            raise UserError(f"{path}: {name} is {rule}, not {content[name]!r}: correct it")
    return Reading(**content)


def _parts(arrays: Mapping[str, Any], config: CLIPConfig, folder: Path, preprocess: Preprocess) -> Parts:
    return Parts(arrays, config, load_tokenizer(folder, config.text), preprocess, read_reading(folder))


def _from_arrays(arrays: Mapping[str, Any]) -> CLIPConfig:
    shapes = shapes_of(arrays)
    return infer.from_shapes({name: shapes[key] for name, key in plain_names(arrays).items()})


def _open_clip(folder: Path) -> tuple[CLIPConfig, Preprocess]:
    content = read_json(folder / "open_clip_config.json")
    if "model_cfg" not in content:
        raise UserError(f"{folder / 'open_clip_config.json'} must hold model_cfg: take the original file")
    if "preprocess_cfg" not in content:
        return infer.from_open_clip(content["model_cfg"]), openai_preprocess()
    return infer.from_open_clip(content["model_cfg"]), Preprocess.from_open_clip(content["preprocess_cfg"])


def _hf_preprocess(folder: Path) -> Preprocess:
    older, newer = folder / "preprocessor_config.json", folder / "processor_config.json"
    if older.is_file():
        return Preprocess.from_hf(read_json(older))
    if newer.is_file():  # transformers 5 writes image processor and tokenizer settings into one file
        content = read_json(newer)
        if "image_processor" in content:
            return Preprocess.from_hf(content["image_processor"])
    return openai_preprocess()
