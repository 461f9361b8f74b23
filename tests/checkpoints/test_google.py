"""SigLIP's and TIPS' files as Google publishes them: every form gives the same arrays; what is wrong is one line."""

import json
import shutil
from pathlib import Path

import clip_checkpoints
import jax
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict
from safetensors.numpy import save_file
from sentence_pieces import trained_pieces

from maskclip_jax.checkpoints import google
from maskclip_jax.checkpoints.load import load_clip
from maskclip_jax.checkpoints.names import abstract_variables, entries
from maskclip_jax.checkpoints.orbax_io import save_converted
from maskclip_jax.checkpoints.tokenizer import MissingTokenizer, PaddedTokenizer
from maskclip_jax.checkpoints.weights import to_names
from maskclip_jax.encoders import config as families
from maskclip_jax.encoders.config import CLIPConfig, TextConfig, ViTConfig
from maskclip_jax.encoders.model import CLIP
from maskclip_jax.errors import UserError

NAMINGS = {"siglip": "big_vision", "tips": "tips", "tips_torch": "tips_torch"}


def arrays_of(kind):
    config, variables = clip_checkpoints.random_clip(kind)
    return to_names(variables, config, NAMINGS[kind])


def write_pair(folder, kind="tips", stem="tips_v2_b14"):
    folder.mkdir(exist_ok=True)
    vision = {"tips": ("encoder/",), "tips_torch": ("blocks", "cls", "register", "pos_", "patch_", "norm", "mask_")}[
        kind
    ]
    arrays = arrays_of(kind)
    for half, wanted in (("vision", True), ("text", False)):
        part = {name: array for name, array in arrays.items() if name.startswith(vision) == wanted}
        np.savez(folder / f"{stem}_{half}.npz", **part)
    return folder


def same(found, kind, tolerance=0.0):
    config, variables = clip_checkpoints.random_clip(kind)
    assert found.config == config
    close = jax.tree.map(lambda a, b: np.allclose(a, b, rtol=tolerance, atol=tolerance), found.variables, variables)
    return all(jax.tree.leaves(close))


def scanned(arrays):
    """Blocks stacked, as big_vision's `scan` writes them."""
    out = {}
    for name, array in arrays.items():
        place, _, rest = name.partition("/encoderblock_")
        if rest:
            out.setdefault(f"{place}/encoderblock/{rest.split('/', 1)[1]}", []).append(array)
        else:
            out[name] = array
    return {name: np.stack(array) if isinstance(array, list) else array for name, array in out.items()}


@pytest.mark.parametrize(
    "change",
    [
        lambda arrays: arrays,
        lambda arrays: {f"params/{name}": array for name, array in arrays.items()} | {"opt/0/count": np.int32(7)},
        lambda arrays: {f"opt/target/{name}": array for name, array in arrays.items()},
        scanned,
        lambda arrays: {f"params/{name}": array for name, array in scanned(arrays).items()},
        lambda arrays: {name: np.asfortranarray(array) for name, array in arrays.items()},
    ],
    ids=["plain", "params", "opt/target", "scan", "params and scan", "Fortran's order"],
)
def test_forms_of_big_vision(tmp_path, change):
    np.savez(tmp_path / "siglip_vision.npz", **change(arrays_of("siglip")))  # whole, whatever its name says
    found = load_clip(tmp_path / "siglip_vision.npz", fold=False)
    assert same(found, "siglip")
    assert isinstance(found.tokenizer, MissingTokenizer)
    with pytest.raises(UserError, match=r"put tokenizer\.json \(or tokenizer\.model, spiece\.model"):
        found.tokenizer(["a cat"])
    assert (found.preprocess.interpolation, found.preprocess.image_size) == ("bilinear", 32)


def test_compressed_and_bfloat16(tmp_path):
    """NumPy has no bfloat16 and writes two bytes of no type; big_vision's readers know that."""
    arrays = arrays_of("siglip")
    np.savez_compressed(tmp_path / "small.npz", **arrays)
    assert same(load_clip(tmp_path / "small.npz", fold=False), "siglip")
    half = {name: a.astype(ml_dtypes.bfloat16).view("V2") if a.ndim > 1 else a for name, a in arrays.items()}
    np.savez(tmp_path / "half.npz", **half)
    assert same(load_clip(tmp_path / "half.npz", fold=False), "siglip", tolerance=0.01)
    assert not same(load_clip(tmp_path / "half.npz", fold=False), "siglip")


@pytest.mark.parametrize("kind", ["tips", "tips_torch"])
def test_forms_of_tips(tmp_path, kind):
    folder = write_pair(tmp_path / "model", kind)
    for source in (folder, folder / "tips_v2_b14_vision.npz", folder / "tips_v2_b14_text.npz"):
        assert same(load_clip(source, fold=False), kind, tolerance=1e-6)  # the temperature goes by way of a logarithm
    bare = write_pair(tmp_path / "bare", kind, "")
    for half in ("vision", "text"):
        (bare / f"_{half}.npz").rename(bare / f"{half}.npz")
    assert load_clip(bare / "vision.npz", fold=False).config == load_clip(folder, fold=False).config


@pytest.mark.parametrize(
    "names", [("temperature",), ("temperature_contrastive",), ("temperature", "temperature_contrastive")]
)
def test_temperatures_of_tips_in_pytorch(names):
    arrays = arrays_of("tips_torch")
    value = arrays.pop("temperature")
    found = load_clip(arrays | dict.fromkeys(names, value) | {"mask_token": np.zeros((1, 48), np.float32)}, fold=False)
    assert same(found, "tips_torch", tolerance=1e-6)


@pytest.mark.parametrize("kind", ["siglip", "tips", "tips_torch"])
def test_conversion_and_back(tmp_path, kind):
    """Weights, architecture, statistics and tokenizer, through orbax."""
    source = tmp_path / "source"
    source.mkdir()
    if kind == "siglip":
        np.savez(source / "siglip.npz", **arrays_of(kind))
    else:
        write_pair(source, kind)
    (source / "tokenizer.model").write_bytes(trained_pieces("unigram"))
    before = load_clip(source, fold=False)
    after = load_clip(save_converted(before, tmp_path / "converted"), fold=False)
    assert (after.config, after.preprocess) == (before.config, before.preprocess)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, after.variables, before.variables)))
    prompts = ["A photo of a Cat.", "grass"]
    np.testing.assert_array_equal(after.tokenizer(prompts), before.tokenizer(prompts))
    assert isinstance(after.tokenizer, PaddedTokenizer)


def test_hugging_face_siglip(tmp_path):
    """transformers' names, and its config's own defaults."""
    config, variables = clip_checkpoints.random_clip("siglip")
    v, t = config.vision, config.text
    sizes = lambda c: {  # noqa: E731
        "hidden_size": c.width,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "intermediate_size": c.mlp_width,
    }
    content = {
        "model_type": "siglip",
        "vision_config": sizes(v) | {"image_size": v.image_size, "patch_size": v.patch_size},
        "text_config": sizes(t) | {"vocab_size": t.vocab_size, "max_position_embeddings": t.context_length},
    }
    (tmp_path / "config.json").write_text(json.dumps(content))
    save_file(to_names(variables, config, "hf"), tmp_path / "model.safetensors")
    found = load_clip(tmp_path, fold=False)
    assert same(found, "siglip")
    assert (found.preprocess.mean, found.preprocess.std) == ((0.5,) * 3, (0.5,) * 3)
    content["vision_config"]["vision_use_head"] = False
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="vision_use_head is false"):
        load_clip(tmp_path)


def changed(arrays, kind):
    """A SigLIP's arrays with something wrong; None where `kind` is another fault."""
    added = {
        "objects": {"params": np.array({"a": 1}, dtype=object)},
        "one object": {"img/embedding/kernel": np.array([None], dtype=object)},
        "unknown": {"img/other": np.zeros(3, np.float32)},
        "misshapen": {"img/Transformer/encoderblock_1/LayerNorm_0/bias": np.zeros(7, np.float32)},
        "words": {"img/embedding/bias": np.array(["a"] * 48)},
        "naflex": {"img/embedding/kernel": np.zeros((192, 48), np.float32)},
    }
    kept = {
        "missing": lambda name: name != "txt/head/bias",
        "no pooling head": lambda name: "MAPHead" not in name,
        "image tower": lambda name: name.startswith("img/"),
        "text tower": lambda name: not name.startswith("img/"),
    }
    if kind in kept:
        return {name: array for name, array in arrays.items() if kept[kind](name)}
    return arrays | added[kind] if kind in added else None


def damaged(tmp_path, kind):
    file = tmp_path / "siglip.npz"
    arrays = arrays_of("siglip")
    if kind in ("text", "empty"):
        file.write_text("not a zip" if kind == "text" else "")
    elif kind in ("truncated", "two models") or changed(arrays, kind) is not None:
        np.savez(file, **(changed(arrays, kind) or arrays))
        if kind == "truncated":
            file.write_bytes(file.read_bytes()[:-1000])
        return write_pair(tmp_path) if kind == "two models" else file
    else:
        vision, text = (write_pair(tmp_path) / f"tips_v2_b14_{half}.npz" for half in ("vision", "text"))
        if kind == "half":
            text.unlink()
        elif kind == "image half twice":
            shutil.copy(vision, text)
        elif kind == "text half twice":
            return shutil.copy(text, tmp_path / "other.npz")
        elif kind == "no temperature":
            with np.load(text) as content:
                np.savez(text, **dict(content) | {"temperature_contrastive": np.float32(-1)})
        return tmp_path
    return file


WRONG = {
    "truncated": "not a whole .npz file",
    "text": "not a whole .npz file",
    "empty": "is empty",
    "objects": "params holds Python objects, which are never unpickled",
    "one object": "img/embedding/kernel holds Python objects",
    "unknown": r"1 unknown \(img/other\)",
    "missing": r"1 missing \(txt/head/bias\)",
    "misshapen": "encoderblock_1/LayerNorm_0/bias 7, not 48",
    "words": "img/embedding/bias is of type <U1",
    "naflex": "SigLIP 2's NaFlex, which is another architecture",
    "no pooling head": "without SigLIP's pooling head",
    "half": "half of a TIPS, but its other half, tips_v2_b14_text.npz, is missing",
    "image half twice": "a TIPS is two files, got the image half alone",
    "text half twice": "got the text half of a TIPS alone",
    "image tower": "a SigLIP has an image tower and a text tower, but the second is missing",
    "text tower": "got SigLIP's text tower alone",
    "two models": "holds several models",
    "no temperature": "temperature_contrastive holds NaN",
}


@pytest.mark.parametrize("kind", WRONG)
def test_one_line_for_what_is_wrong(tmp_path, kind):
    with pytest.raises(UserError, match=WRONG[kind]) as error:
        load_clip(damaged(tmp_path, kind))
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


def test_damaged_archives_are_refused_or_read(tmp_path):
    """Bytes changed anywhere: what cannot be read is one line, and nothing is unpickled or raised otherwise."""
    np.savez(tmp_path / "whole.npz", **{name: array[:2] for name, array in arrays_of("tips").items() if array.ndim})
    content, rng, lines = (tmp_path / "whole.npz").read_bytes(), np.random.default_rng(0), []
    for i in range(60):
        changed = bytearray(content)
        for place in rng.integers(0, len(content), 30):
            changed[place] = rng.integers(256)
        (tmp_path / "changed.npz").write_bytes(changed if i % 2 else changed[: rng.integers(len(content))])
        try:
            arrays = google.read_npz(tmp_path / "changed.npz")
            for name in arrays:
                np.asarray(arrays[name])
        except UserError as error:
            lines.append(str(error))
    assert lines
    assert not any("\n" in line for line in lines)


FULL = {  # as published (the first is "375M")
    "siglip2_b16_256": (
        CLIPConfig(
            ViTConfig(256, 16, 768, 12, 12, 3072, **families.SIGLIP_VIT),
            TextConfig(256_000, 64, 768, 12, 12, 3072, **families.SIGLIP_TEXT),
            768,
            logit_bias=True,
        ),
        375_234_050,
    ),
    "tips_v2_b14": (
        CLIPConfig(
            ViTConfig(448, 14, 768, 12, 12, 3072, **families.TIPS_VIT),
            TextConfig(32_000, 64, 768, 12, 12, 3072, **families.TIPS_TEXT),
            768,
        ),
        None,
    ),
    "tips_v2_g14": (
        CLIPConfig(
            ViTConfig(448, 14, 1536, 40, 24, 4096, **families.TIPS_VIT | {"activation": "swiglu"}),
            TextConfig(32_000, 64, 1536, 12, 24, 6144, **families.TIPS_TEXT),
            1536,
        ),
        None,
    ),
}


@pytest.mark.parametrize("name", FULL)
def test_full_size(name):
    """Names and shapes there and back, and the dense reading at 512 pixels, without a single number."""
    config, parameters = FULL[name]
    wanted = abstract_variables(config)
    if parameters is not None:
        assert sum(int(np.prod(leaf.shape)) for leaf in wanted.values()) == parameters
    naming = "big_vision" if config.family == "siglip" else "tips"
    table = list(entries(config, naming))
    assert sorted(path for entry in table for path in entry.paths) == sorted(wanted)
    shapes = {
        entry.key: entry.layout.write(
            [np.broadcast_to(np.float32(0), wanted[path].shape) for path in entry.paths]
        ).shape
        for entry in table
        if entry.key != "encoder/ToTokenSequence_0/cls"
    } | ({} if naming == "big_vision" else {"encoder/ToTokenSequence_0/cls": (1, 2, config.vision.width)})
    assert google.from_shapes(shapes, naming) == config
    side = -(-512 // config.multiple) * config.multiple
    images = jax.ShapeDtypeStruct((1, side, side, 3), np.float32)
    variables = unflatten_dict(wanted, sep="/")
    read = jax.eval_shape(lambda v, x: CLIP(config).apply(v, x, method="encode_dense"), variables, images)
    assert read.features.shape == (1, side // config.stride, side // config.stride, config.embed_dim)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["siglip2_b16_256", "tips_v2_b14"])
def test_one_forward_pass_at_full_size(tmp_path, name):
    """Through a file of its published form and size, image tower and text."""
    config, _ = FULL[name]
    naming = "big_vision" if config.family == "siglip" else "tips"
    rng, ours = np.random.default_rng(0), abstract_variables(config)
    arrays = {}
    for entry in entries(config, naming):
        parts = [rng.standard_normal(ours[path].shape, np.float32) * 0.02 for path in entry.paths]
        arrays[entry.key] = entry.layout.write(parts)
    if naming == "tips":
        for half in ("vision", "text"):
            part = {k: a for k, a in arrays.items() if k.startswith("encoder/") == (half == "vision")}
            np.savez(tmp_path / f"{name}_{half}.npz", **part)
    else:
        np.savez(tmp_path / f"{name}.npz", **arrays)
    found = load_clip(tmp_path)
    assert found.config == config
    images = rng.standard_normal((1, 16 * config.stride, 20 * config.stride, 3), np.float32)
    apply = jax.jit(found.model.apply, static_argnames="method")
    features, keys = apply(found.variables, images, method="encode_dense")
    assert features.shape == (1, 16, 20, 768)
    assert keys.shape == (1, 320, 768)
    np.testing.assert_allclose(np.linalg.norm(features, axis=-1), 1, atol=1e-5)
    assert np.isfinite(apply(found.variables, np.ones((2, 64), np.int32), method="encode_text")).all()


def test_names_of_one_model_and_files_of_another(tmp_path):
    """A CLIP's folder keeps its own files; a TIPS beside it is not looked for."""
    folder = clip_checkpoints.write_folder(tmp_path / "clip", "vit", "hf")
    write_pair(folder)
    assert load_clip(folder).config.family == "clip"
    shutil.copy(folder / "tips_v2_b14_vision.npz", folder / "alone.npz")
    with pytest.raises(UserError, match="a TIPS is two files, got the image half alone") as error:
        load_clip(Path(folder / "alone.npz"))
    assert "\n" not in str(error.value)
