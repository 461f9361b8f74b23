"""A trained run -> the checkpoint folder users have: open_clip's layout for the ResNet, Hugging Face's for the ViT.

python -m experiments.toy_world.export out/clip-resnet maskclip_jax/assets/clip_resnet --prompt-denoising 0.5
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
from flax import serialization
from safetensors.numpy import save_file

from experiments.toy_world.train_clip import MEAN, STD, clip_config
from maskclip_jax.checkpoints import architecture
from maskclip_jax.checkpoints.weights import to_names
from maskclip_jax.encoders.config import CLIPConfig

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt")


def hf_config(config: CLIPConfig) -> dict:
    """transformers' `config.json` of a ViT CLIP, with all of its special tokens."""
    out, end = architecture.to_hf(config), config.text.vocab_size - 1
    out["text_config"] |= {"model_type": "clip_text_model", "bos_token_id": end - 1}
    out["text_config"] |= {"eos_token_id": end, "pad_token_id": end}
    out["vision_config"] |= {"model_type": "clip_vision_model"}
    return out


def export(run: Path, out: Path, reading: dict) -> None:
    """Writes `out`; weights in float16, the settings and the curve of the training beside them."""
    training = json.loads((run / "training.json").read_text())
    config = clip_config(training["tower"], len(json.loads((run / "vocab.json").read_text())))
    state = serialization.msgpack_restore((run / "state.msgpack").read_bytes())
    variables = {name: state[name] for name in ("params", "batch_stats") if state[name]}
    resnet = training["tower"] == "resnet"
    arrays = to_names(variables, config, "openai" if resnet else "hf")
    arrays = {k: v.astype(np.float16) if v.dtype == np.float32 else v for k, v in arrays.items()}
    temporary = out.with_name(out.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    mean, std = MEAN.tolist(), STD.tolist()
    side = config.vision.image_size
    if resnet:
        preprocess = {"size": [side, side], "mode": "RGB", "mean": mean, "std": std, "interpolation": "bicubic"}
        preprocess |= {"resize_mode": "shortest", "fill_color": 0}
        files = {
            "open_clip_config.json": {"model_cfg": architecture.to_open_clip(config), "preprocess_cfg": preprocess},
        }
        save_file(arrays, temporary / "open_clip_model.safetensors")
    else:
        preprocess = {"image_processor_type": "CLIPImageProcessor", "do_resize": True, "do_normalize": True}
        preprocess |= {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}, "resample": 3}
        preprocess |= {"do_center_crop": True, "do_rescale": True, "rescale_factor": 1 / 255, "do_convert_rgb": True}
        preprocess |= {"image_mean": mean, "image_std": std}
        files = {"config.json": hf_config(config), "preprocessor_config.json": preprocess}
        save_file(arrays, temporary / "model.safetensors", metadata={"format": "np"})
    files |= {"maskclip.json": reading, "training.json": training}
    for name, content in files.items():
        (temporary / name).write_text(json.dumps(content, indent=1) + "\n")
    for name in TOKENIZER_FILES:
        shutil.copy(run / name, temporary / name)
    shutil.copy(run / "curve.jsonl", temporary / "curve.jsonl")
    shutil.rmtree(out, ignore_errors=True)
    temporary.rename(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--short-side", type=int, default=144)
    parser.add_argument("--dense-stride", type=int, default=8)
    parser.add_argument("--prompt-denoising", type=float, default=None)
    args = parser.parse_args()
    reading = {"dense_stride": args.dense_stride, "short_side": args.short_side, "templates": "maskclip"}
    reading["prompt_denoising"] = args.prompt_denoising
    export(args.run, args.out, reading)
    size = sum(f.stat().st_size for f in args.out.iterdir()) / 2**20
    print(f"wrote {args.out} ({size:.2f} MiB)")


if __name__ == "__main__":
    main()
