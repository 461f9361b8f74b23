"""Makes `hf_backbones_tiny.npz`: transformers' DINO models on random weights (transformers 5.24.0, torch 2.13.0).

    python tests/golden/make_backbones.py [base]      # base: facebook's base sizes into /tmp/base_backbones, not kept

For each model: `NAME/config` (its config.json as bytes), `NAME/w/…` (float16 numbers under the names of its
model.safetensors), `image`, `wide`, and `NAME/image`, `NAME/wide`: last_hidden_state [T, D] in float32.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file, save_file

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
V3 = {"num_register_tokens": 4, "intermediate_size": 48}
MODELS = {
    "vit": (transformers.ViTConfig(**SIZES, intermediate_size=48), transformers.ViTModel),
    "dinov2": (transformers.Dinov2Config(**SIZES, mlp_ratio=2), transformers.Dinov2Model),
    "dinov2_swiglu": (transformers.Dinov2Config(**SIZES, use_swiglu_ffn=True), transformers.Dinov2Model),
    "dinov2_with_registers": (
        transformers.Dinov2WithRegistersConfig(**SIZES, mlp_ratio=2),
        transformers.Dinov2WithRegistersModel,
    ),
    "dinov3": (transformers.DINOv3ViTConfig(**SIZES, **V3), transformers.DINOv3ViTModel),
    "dinov3_gated": (
        transformers.DINOv3ViTConfig(**SIZES, **V3, use_gated_mlp=True, hidden_act="silu", query_bias=False),
        transformers.DINOv3ViTModel,
    ),
}
BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
if sys.argv[1:] == ["base"]:
    MODELS = {
        "dinov2": (transformers.Dinov2Config(**BASE, image_size=518), transformers.Dinov2Model),
        "dinov3": (
            transformers.DINOv3ViTConfig(**BASE, num_register_tokens=4, intermediate_size=3072),
            transformers.DINOv3ViTModel,
        ),
    }
torch.manual_seed(0)
base = sys.argv[1:] == ["base"]
sides = {"image": (224, 224), "wide": (112, 336)} if base else {"image": (32, 32), "wide": (24, 80)}
images = {name: torch.randn(1, 3, *side).half() for name, side in sides.items()}
out = {name: image.numpy() for name, image in images.items()}
for name, (config, kind) in MODELS.items():
    config._attn_implementation = "eager"
    model = kind(config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape) * 0.5 * (parameter[0].numel() if parameter.ndim > 1 else 9) ** -0.5
            ones = ("norm" in key and key.endswith("weight")) or "lambda" in key
            parameter.copy_((noise + ones).half().float())
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        weights = load_file(f"{folder}/model.safetensors")
        text = Path(f"{folder}/config.json").read_text()
    out |= {f"{name}/w/{key}": array.astype(np.float16) for key, array in weights.items()}
    out[f"{name}/config"] = np.frombuffer(json.dumps(json.loads(text)).encode(), np.uint8)
    with torch.no_grad():
        for side, image in images.items():
            options = {"interpolate_pos_encoding": True} if name == "vit" else {}
            out[f"{name}/{side}"] = model(image.float(), **options).last_hidden_state[0].numpy()
    if base:
        folder = Path("/tmp/base_backbones") / name
        folder.mkdir(parents=True, exist_ok=True)
        save_file(weights, folder / "model.safetensors")
        (folder / "config.json").write_text(text)
        out = {key: array for key, array in out.items() if "/w/" not in key}
np.savez_compressed("/tmp/base_backbones.npz" if base else Path(__file__).parent / "hf_backbones_tiny.npz", **out)
