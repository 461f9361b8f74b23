"""Makes `peers_readings_tiny.npz`: what the authors' own towers answer on random weights, in float64 on a CPU.

    python tests/golden/make_readings.py RESCLIP SCCLIP     # checkouts of yvhangyang/ResCLIP, SuleBai/SC-CLIP; torch

Width 32, 12 layers, 2 heads, patch 8, a grid of 7 × 7. ResCLIP is read with its feedback (SFR) off.
"""

import importlib.util
import sys
import types
from pathlib import Path

import numpy as np
import torch


def module(folder):
    sys.modules["pamr"] = types.SimpleNamespace(PAMR=None)
    for unused in ("cv2", "torchvision", "torchvision.transforms", "torchvision.transforms.functional"):
        sys.modules.setdefault(unused, types.ModuleType(unused))
    spec = importlib.util.spec_from_file_location("model", Path(folder) / "clip" / "model.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    found.LayerNorm.forward = torch.nn.LayerNorm.forward  # theirs rounds to float32
    return found


resclip, scclip = map(module, sys.argv[1:])
torch.manual_seed(0)
towers = [m.VisionTransformer(56, 8, 32, 12, 2, 16).double().eval() for m in (resclip, scclip)]
weights = {k: (torch.randn(v.shape) * 0.25 * v.numel() ** -0.1).half() for k, v in towers[0].state_dict().items()}
for key in weights:
    if "ln_" in key and key.endswith("weight"):
        weights[key] = weights[key] + 1
for tower in towers:
    tower.load_state_dict({k: v.double() for k, v in weights.items()})
image = torch.randn(1, 3, 56, 56).half()
towers[0].set_params("wo_resi", "naclip", 5.0)
with torch.no_grad():
    options = {"use_rcs": True, "use_sfr": False, "attn_rcs_weights": (2.0, 0.4)}
    found = {
        "resclip_rcs": towers[0](image.double(), return_all=True, **options)[0, 1:],
        "sc_clip": towers[1](image.double(), return_all=True)[0],
    }
np.savez_compressed(
    Path(__file__).parent / "peers_readings_tiny.npz",
    image=image.numpy(),
    **{f"w/visual.{k}": v.numpy() for k, v in weights.items()},
    **{k: v.numpy() for k, v in found.items()},
)
print({k: (tuple(v.shape), float(v.abs().max())) for k, v in found.items()})
