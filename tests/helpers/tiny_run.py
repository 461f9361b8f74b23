"""Whole runs of the loop on the tiny student, also as a program: `python tiny_run.py CONFIG.json WORKDIR OUT.npz`.

Parameters are drawn, not initialised, and steps of one config share a compiled program: only compiling takes time here.
"""

import functools
import json
import os
import sys
from pathlib import Path

import jax
import numpy as np
from compile_flags import with_devices
from tiny_distill import CLASSES, config_of, pretrained_clip, setup, text_rows

from maskclip_jax.distill import train as loop
from maskclip_jax.distill.config import DistillConfig
from maskclip_jax.distill.step import make_train_step
from maskclip_jax.distill.teacher import teacher_from
from maskclip_jax.ops import hosts

HERE = Path(__file__).parent


def write_data(folder: Path, count: int = 11) -> Path:
    """Small pictures of two sizes' worth of content with annotation of all classes and some 255."""
    rng = np.random.default_rng(5)
    labels = rng.integers(0, len(CLASSES), (count, 9, 11)).repeat(4, 1).repeat(4, 2).astype(np.uint8)
    images = (labels[..., None] * 40 + rng.integers(0, 60, (*labels.shape, 3))).astype(np.uint8)
    labels[:, :3] = 255
    path = folder / "data.npz"
    np.savez(path, images=images, labels=labels)
    return path


def write_noise(folder: Path) -> Path:
    """Pictures of noise: no channel of the student is ever without variance, so rounding stays rounding.

    (On `write_data`, one device and parameters moved by 1e-7 end 0.8 apart after six steps; here, 6e-5.)
    """
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (11, 40, 44, 3), np.uint8), rng.integers(0, 5, (11, 40, 44))
    path = folder / "noise.npz"
    np.savez(path, images=images, labels=labels.astype(np.uint8))
    return path


def run_config(data: Path, **changes) -> DistillConfig:
    fields = {
        "train_data": str(data),
        "eval_data": f"{data}[0:5]",
        "steps": 8,
        "evaluate_every": 4,
        "checkpoint_every": 2,
        "log_every": 1,
        "batch_size": 4,
        "mode": "supervised",
    }
    return config_of(**(fields | changes))


@functools.cache
def shared_step(config: DistillConfig):
    return make_train_step(config, *_parts(config))


def _parts(config):
    teacher, _, student, _ = setup(config)
    return student, teacher


def train(config: DistillConfig, workdir: Path, *, wrap=lambda step: step, **options):
    """`train_and_evaluate` from drawn parameters; `wrap` may replace the compiled step."""
    originals = loop.create_train_state, loop.make_train_step
    loop.create_train_state = lambda config, *_, **__: setup(config)[3]
    loop.make_train_step = lambda config, *_: wrap(shared_step(config))
    try:
        loaded = teacher_from(config, pretrained_clip(), text_rows())
        return loop.train_and_evaluate(config, workdir, loaded=loaded, quiet=True, **options)
    finally:
        loop.create_train_state, loop.make_train_step = originals


def arrays_of(state) -> dict[str, np.ndarray]:
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(state)}


def failing_at(step, action):
    """A compiled step that calls `action` instead of its `step`-th call."""

    def wrap(compiled):
        calls = 0

        def p_step(*arguments):
            nonlocal calls
            calls += 1
            return action(compiled, *arguments) if calls == step else compiled(*arguments)

        return p_step

    return wrap


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def child_environment(cache: Path, devices: int = 1) -> dict[str, str]:
    """For a process that runs this file. The compile cache makes the second child start fast."""
    return os.environ | {
        "XLA_FLAGS": with_devices(devices),
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), str(HERE)]),
    }


def main(config: str, workdir: str, out: str) -> None:
    hosts.join_hosts()
    try:
        with hosts.ending_together(workdir):
            state = train(DistillConfig.from_dict(json.loads(Path(config).read_text())), Path(workdir))
    except hosts.StoppedTogether:
        print("StoppedTogether")
        sys.exit(130)  # as the command line does
    if hosts.is_first_host():
        np.savez(out, **arrays_of(state))


if __name__ == "__main__":
    main(*sys.argv[1:])
