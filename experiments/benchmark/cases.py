"""Which rivals meet in each section, at full length and quickly."""

from __future__ import annotations

from experiments.benchmark.interleave import Rival

SECTIONS = ("dense", "smoothing", "train", "label", "first-mask", "backbone")


def groups(section: str, *, quick: bool, torch: str | None, dtypes: list[str], model: str | None, batch: int | None,
           images: int) -> dict[str, list[Rival]]:  # fmt: skip
    """Title -> the rivals that take turns, the first one being what the others are compared with.

    Args:
      quick: fewer and smaller cases.
      torch: the interpreter of PyTorch's side, or None.
      dtypes: what ours computes in; the first is the one compared.
      model, batch: of `dense`, instead of the standard ones.
      images: of `label`.
    """
    return {
        "dense": lambda: _dense(quick, torch, dtypes, model, batch),
        "smoothing": lambda: _smoothing(torch),
        "train": lambda: _train(quick, torch, dtypes),
        "label": lambda: _label(dtypes[0], images, model or "ViT-B/16"),
        "first-mask": lambda: _first_mask(torch, model),
        "backbone": lambda: _backbone(dtypes[0]),
    }[section]()


def _dense(quick: bool, torch: str | None, dtypes: list[str], model: str | None, batch: int | None) -> dict:
    out = {}
    for name in [model] if model else ["ViT-B/16", "RN50", "SigLIP B/16", "TIPS B/14"]:
        kin = name.startswith(("SigLIP", "TIPS"))  # at batch 1, without PyTorch's side
        for size in [batch] if batch else [1] if quick or kin else [1, 8]:
            options = {"model": name, "batch": size}
            rivals = [Rival(f"ours, {d}", "dense", options | {"dtype": d}) for d in dtypes]
            if torch and name.startswith("ViT"):
                rivals.append(Rival("PyTorch, released code's work", "dense", options | {"work": "released"}, torch))
                rivals.append(Rival("PyTorch, this work, fused attention", "dense", options, torch))
            elif torch and not kin:
                rivals.append(Rival("PyTorch", "dense", options, torch))
                rivals.append(Rival("PyTorch, channels last", "dense", options | {"work": "channels_last"}, torch))
            out[f"dense {name}, 512², batch {size}"] = rivals
    return out


def _smoothing(torch: str | None) -> dict:
    out = {}
    for length, times in ((1024, 16), (4096, 4)):
        rivals = [
            Rival("ours", "smoothing", {"length": length, "times": times}),
            Rival("L×L product", "smoothing", {"length": length, "order": "all pairs", "times": times}),
        ]
        if torch:
            rivals.append(Rival("PyTorch, L×L", "smoothing", {"length": length, "times": times}, torch))
        out[f"key smoothing, L = {length}, {times} times"] = rivals
    return out


def _train(quick: bool, torch: str | None, dtypes: list[str]) -> dict:
    rivals = [Rival(f"ours, {d}", "train", {"dtype": d}) for d in dtypes]
    if not quick:
        rivals.append(Rival("ours, memory not kept", "train", {"dtype": dtypes[0]}, keep_memory=False))
    if torch:
        rivals.append(Rival("PyTorch, channels last", "train", {}, torch))
        if not quick:
            rivals.append(Rival("PyTorch, channels first", "train", {"work": "channels_first"}, torch))
    return {"train ResNet-101 DeepLabv2, 256², batch 2": rivals}


def _label(dtype: str, images: int, model: str) -> dict:
    options = {"images": images, "dtype": dtype, "model": model}
    bare = Rival("the model alone", "label", options | {"part": "bare"})
    whole = Rival("from file to file", "label", options)
    return {f"label {images} JPEGs of 500×375, {model}, short side 512": [bare, whole]}


def _first_mask(torch: str | None, model: str | None) -> dict:
    from maskclip_jax.checkpoints.load import EMBEDDED  # here: `--help` needs no JAX

    out = {}
    for name in [model] if model else ["ViT-B/16", "embedded"]:
        rivals = [
            Rival("ours, second run", "first mask", {"model": name}),
            Rival("ours, nothing compiled yet", "first mask", {"model": name, "compiled": False}),
        ]
        if name in EMBEDDED:
            out[f"first mask, one JPEG of 500×375, {name} at its own size"] = rivals
            continue
        # What no process can do without: one pass over the 512×688 pixels that the photograph is padded to.
        rivals.append(Rival("the compiled tower alone", "dense", {"model": name, "width": 688}))
        if torch:
            rivals.append(Rival("PyTorch and transformers", "first mask", {"model": name, "torch": torch}))
        out[f"first mask, one JPEG of 500×375, {name} at short side 512"] = rivals
    return out


def _backbone(dtype: str) -> dict:
    rivals = [Rival("MaskCLIP alone", "dense", {"model": "ViT-B/16", "dtype": dtype})]
    rivals += [
        Rival(method, "backbone", {"method": method, "dtype": dtype})
        for method in ("clip_dinoiser", "proxyclip", "lposs")
    ]
    return {"dense ViT-B/16 beside DINOv2 B/14, 512², batch 1": rivals}
