"""Eight devices are one: losses, parameters and statistics, in both phases, whatever the label count of each."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
from tiny_distill import SIDE, config_of, run_steps

HERE = Path(__file__).parent


def case():
    """Four steps over the change of phase; device 0 has hardly a label, device 1 none."""
    config = config_of(mode="zero-shot", unseen=("cat", "sky"), self_training=True, guided_steps=2, background=True)
    rng = np.random.default_rng(0)
    batches = []
    for _ in range(4):
        images = rng.integers(0, 256, (config.batch_size, SIDE, SIDE, 3), np.uint8)
        labels = rng.choice(np.array([0, 1, 3, 5, 254, 254, 255], np.int32), images.shape[:3])
        labels[0, 1:], labels[1] = 255, 255
        batches.append({"image": images, "label": labels.astype(np.int32)})
    return config, batches


def run(devices: int) -> dict[str, np.ndarray]:
    state, metrics = run_steps(*case(), devices)
    arrays = {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(state)}
    return arrays | {name: np.array([values[name] for values in metrics]) for name in metrics[0]}


def test_eight_devices_are_one(tmp_path):
    assert jax.device_count() == 1
    file = tmp_path / "eight.npz"
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    child = subprocess.run(
        [sys.executable, __file__, str(file)],
        env=environment | {"PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), str(HERE)])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert child.returncode == 0, child.stderr
    one = run(1)
    with np.load(file) as stored:
        eight = dict(stored)
    assert eight.keys() == one.keys()
    np.testing.assert_array_equal(one["phase"], [1, 1, 2, 2])
    worst = {name: float(np.abs(eight[name] - value).max()) for name, value in one.items()}
    for part in ("loss", ".params", ".batch_stats", ".opt_state"):  # -s shows the figures that the README reports
        print(part, max(value for name, value in worst.items() if name.startswith(part)))
    assert max(worst.values()) < 1e-4
    assert np.ptp(one["loss"]) > 1e-2  # the steps did something


if __name__ == "__main__":
    assert jax.device_count() == 8
    np.savez(sys.argv[1], **run(8))
