"""Writes `torch_files/`: what PyTorch itself saves, for the reader that needs none. Run with torch 2.13.0 and NumPy.

    python tests/golden/make_torch_files.py tests/golden/torch_files

`forms()` says what the small files hold, `openai_arrays()` the tiny CLIP in `openai_*.pt`; tests compute both again.
"""

import collections
import sys
import warnings
from pathlib import Path

import numpy as np

BASE = np.arange(24, dtype=np.float32) / 7


def noise(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """float16 numbers within ±0.05 that look random and are the same everywhere."""
    steps = (np.arange(int(np.prod(shape)), dtype=np.int64) * 7919 + seed * 104729) % 1009
    return ((steps / 1009 - 0.5) / 10).astype(np.float16).reshape(shape)


def openai_arrays() -> dict[str, np.ndarray]:
    """A CLIP under OpenAI's names: 16 px, patch 8, both towers 64 wide with one layer, 10 tokens, 6 positions, E 8."""
    shapes = {
        "visual.conv1.weight": (64, 3, 8, 8),
        "visual.class_embedding": (64,),
        "visual.positional_embedding": (5, 64),
        "visual.proj": (64, 8),
        "token_embedding.weight": (10, 64),
        "positional_embedding": (6, 64),
        "text_projection": (64, 8),
        "logit_scale": (),
    }
    for name in ("visual.ln_pre", "visual.ln_post", "ln_final"):
        shapes |= {f"{name}.weight": (64,), f"{name}.bias": (64,)}
    for block in ("visual.transformer.resblocks.0", "transformer.resblocks.0"):
        for name, shape in (("ln_1", (64,)), ("ln_2", (64,)), ("attn.out_proj", (64, 64)), ("mlp.c_fc", (128, 64))):
            shapes |= {f"{block}.{name}.weight": shape, f"{block}.{name}.bias": shape[:1]}
        shapes |= {f"{block}.mlp.c_proj.weight": (64, 128), f"{block}.mlp.c_proj.bias": (64,)}
        shapes |= {f"{block}.attn.in_proj_weight": (192, 64), f"{block}.attn.in_proj_bias": (192,)}
    return {name: noise(shape, i) for i, (name, shape) in enumerate(sorted(shapes.items()))}


def forms() -> dict[str, np.ndarray]:
    """Name -> array of every form of tensor in `state.pt`, `legacy.pt`, `no_checksums.pt` and `training.pt`."""
    return {
        "float": BASE.reshape(4, 6),
        "half": BASE.astype(np.float16).reshape(2, 12),
        "double": BASE.astype(np.float64),
        "transposed": BASE.reshape(4, 6).T,
        "strided": BASE[5:17:2],
        "shared": BASE,
        "int": np.arange(5),
        "bool": np.array([True, False]),
        "scalar": np.float32(4.6),
        "parameter": BASE[:3],
        "empty": np.zeros((0, 3), np.float32),
        "bytes": np.arange(3, dtype=np.uint8),
        "expanded": np.ones(3, np.float32),
    }


def main(out: Path) -> None:
    import torch
    from torch.serialization import set_crc32_options

    out.mkdir(exist_ok=True)
    base = torch.tensor(BASE)
    plain = {name: torch.tensor(np.array(array)) for name, array in forms().items()}
    state = plain | {
        "float": base.reshape(4, 6),
        "transposed": base.reshape(4, 6).t(),
        "strided": base[5:17:2],
        "shared": base,
        "parameter": torch.nn.Parameter(base[:3].clone()),
        "expanded": torch.ones(1).expand(3),
        "bfloat16": base.bfloat16(),
    }
    torch.save(state | {"fp8": base.to(torch.float8_e4m3fn)}, out / "state.pt")
    torch.save(state, out / "legacy.pt", _use_new_zipfile_serialization=False)
    model = collections.OrderedDict((f"module.{name}", tensor) for name, tensor in state.items())
    rest = {"epoch": 3, "best": np.float64(0.5), "device": torch.device("cpu"), "size": base.shape, "half": torch.half}
    optimizer = torch.optim.Adam([torch.nn.Parameter(base.clone())]).state_dict()
    torch.save(rest | {"state_dict": model, "optimizer": optimizer}, out / "training.pt")
    set_crc32_options(False)
    torch.save(state, out / "no_checksums.pt")
    set_crc32_options(True)

    class Holder(torch.nn.Module):
        def forward(self, x):
            return x * torch.sigmoid(1.702 * x) if self.quick else torch.nn.functional.gelu(x)

    class Hostile(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(2))

        @torch.jit.export
        def __getstate__(self):
            return (self.weight, self.training)

        @torch.jit.export
        def __setstate__(self, state: tuple[torch.Tensor, bool]):
            self.weight, self.training = state
            torch.save(self.weight, "written_by_hostile_file")

        def forward(self, x):
            return x

    with warnings.catch_warnings():  # newer torch deprecates TorchScript, which OpenAI's files are
        warnings.simplefilter("ignore")
        for kind in ("traced", "gelu"):
            root = Holder()
            root.quick = kind == "traced"
            for name, array in openai_arrays().items():
                *parents, leaf = name.split(".")
                module = root
                for parent in parents:
                    if not hasattr(module, parent):
                        module.add_module(parent, Holder())
                    module = getattr(module, parent)
                module.register_parameter(leaf, torch.nn.Parameter(torch.tensor(array)))
            for name, value in (("input_resolution", 16), ("context_length", 6), ("vocab_size", 10)):
                root.register_buffer(name, torch.tensor(value))
            torch.jit.trace(root, torch.zeros(1, dtype=torch.half)).save(str(out / f"openai_{kind}.pt"))
        torch.jit.script(Hostile()).save(str(out / "hostile.pt"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
