"""The first mask: one process from its start to the files, as a user waits for it."""

from __future__ import annotations

import atexit
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import jax.numpy as jnp
from safetensors.numpy import save_file

from experiments.benchmark.interleave import ROOT
from experiments.benchmark.labelling import write_photos
from experiments.benchmark.work import Case, random_variables, variant
from experiments.benchmark.worker_pipe import peak_mib
from maskclip_jax.checkpoints.architecture import to_hf
from maskclip_jax.checkpoints.folders import OPENAI_MEAN, OPENAI_STD
from maskclip_jax.checkpoints.load import EMBEDDED
from maskclip_jax.checkpoints.tokenizer import openai_tokenizer
from maskclip_jax.checkpoints.weights import to_names
from maskclip_jax.encoders.model import CLIP

WORDS = "dog, sofa, window"


def write_folder(folder: Path, name: str) -> Path:
    """One of OpenAI's architectures with random weights, as transformers writes it: both towers and the tokenizer."""
    config = variant(name)
    folder.mkdir()
    tokenizer = openai_tokenizer(config.text)
    assert tokenizer is not None
    tokenizer.save(folder)
    (folder / "config.json").write_text(json.dumps(to_hf(config)))
    preprocess = {"image_mean": OPENAI_MEAN, "image_std": OPENAI_STD, "resample": 3, "size": config.vision.image_size}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocess))
    variables = random_variables(CLIP(config, jnp.dtype("float32")), text=True)
    save_file(to_names(variables, config, "hf"), folder / "model.safetensors", {"format": "pt"})
    return folder


def first_mask(model: str = "ViT-B/16", *, compiled: bool = True, torch: str | None = None) -> Case:
    """`run.py segment` of one photograph and three words, with the programs of the run before or with none.

    Args:
      model: an architecture, whose folder is written first, at short side 512; or an embedded model at its own size.
      compiled: as the second run finds it.
      torch: an interpreter of PyTorch and transformers, which do the same.
    """
    folder = Path(tempfile.mkdtemp(prefix="first-mask-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    photo = str(write_photos(folder / "photos", 1)[0])
    source = model if model in EMBEDDED else str(write_folder(folder / "clip", model))
    if torch is None:
        command = [sys.executable, "run.py", "segment", photo, "--classes", WORDS, "--model", source]
        command += ["--out", str(folder / "out")]
        if model not in EMBEDDED:
            command += ["--short-side", "512", "--templates", "single"]
    else:
        script = str(Path(__file__).with_name("torch_first_mask.py"))
        command = [torch, script, source, photo, WORDS, str(folder / "labels.png")]
    cache = folder / "cache"
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    facts: dict[str, float] = {}

    def run() -> None:
        if not compiled:
            shutil.rmtree(cache, ignore_errors=True)
        shutil.rmtree(folder / "out", ignore_errors=True)
        subprocess.run(command, cwd=ROOT, env=environment | {"XDG_CACHE_HOME": str(cache)}, check=True)
        facts["peak_mib"] = peak_mib(resource.RUSAGE_CHILDREN)

    return Case(run, 0, 1, facts)
