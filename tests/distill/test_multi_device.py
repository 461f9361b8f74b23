"""Eight devices are one: losses, parameters and statistics, in both phases, whatever the label count of each.

Both run as programs of their own, in float64: in float32 a ReLU tips by rounding within four steps, on one processor
and not on another. What would be wrong is planted too, and seen.
"""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from compile_flags import with_devices
from tiny_distill import SIDE, config_of, run_steps

from maskclip_jax.distill import step
from maskclip_jax.distill.config import DistillConfig

HERE = Path(__file__).parents[1] / "helpers"  # the modules that tests share


def case(**changes):
    """Four steps over the change of phase; device 0 has hardly a label, device 1 none."""
    fields = {"self_training": True, "guided_steps": 2, "background": True, "dtype": "float64"} | changes
    config = config_of(mode="zero-shot", unseen=("cat", "sky"), **fields)
    rng = np.random.default_rng(0)
    batches = []
    for _ in range(4):
        images = rng.integers(0, 256, (config.batch_size, SIDE, SIDE, 3), np.uint8)
        labels = rng.choice(np.array([0, 1, 3, 5, 254, 254, 255], np.int32), images.shape[:3])
        labels[0, 1:], labels[1] = 255, 255
        batches.append({"image": images, "label": labels.astype(np.int32)})
    return config, batches


def plant(fault: str) -> None:
    """Makes the step wrong, as one that was not made for several devices would be."""
    whole = step._over_all
    if fault == "local statistics":
        right = DistillConfig.student_config.fget
        DistillConfig.student_config = property(lambda c: dataclasses.replace(right(c), bn_axis_name=None))
    elif fault == "mean of local means":

        def averaged(parts):
            grads, tally = parts
            count = whole(tally.loss.count)
            local = jax.numpy.maximum(tally.loss.count, 1)
            return jax.tree.map(lambda g: jax.lax.pmean(g / local, step.AXIS) * count, grads), whole(tally)

        step._over_all = averaged
    elif fault == "local count":

        def counted(parts):
            grads, tally = parts
            summed = whole(tally)
            return whole(grads), summed._replace(loss=summed.loss._replace(count=tally.loss.count))

        step._over_all = counted


CHANGES = {"two micro-batches": {"accumulate": 2}, "groups of two": {"bn_group_size": 2}}


def run(devices: int, fault: str = "") -> dict[str, np.ndarray]:
    plant(fault)
    state, metrics = run_steps(*case(**CHANGES.get(fault, {})), devices)
    shards = [[np.asarray(shard.data) for shard in x.addressable_shards] for x in jax.tree.leaves(state)]
    apart = max(float(np.abs(shard - first).max()) for first, *others in shards for shard in others or [first])
    arrays = {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(state)}
    return (
        arrays
        | {"replicas apart": np.array(apart)}
        | {name: np.array([values[name] for values in metrics]) for name in metrics[0]}
    )


def in_a_child(folder: Path, devices: int, fault: str = "") -> dict[str, np.ndarray]:
    file = folder / f"{devices} {fault}.npz"
    environment = os.environ | {
        "XLA_FLAGS": with_devices(devices),
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_X64": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), str(HERE)]),
    }
    command = [sys.executable, __file__, str(file), str(devices), fault]
    child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert child.returncode == 0, child.stderr
    with np.load(file) as stored:
        return dict(stored)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return in_a_child(tmp_path_factory.mktemp("one"), 1)


def worst(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> dict[str, float]:
    """The largest difference in each part; -s shows the figures that the README reports."""
    assert other.keys() == one.keys()
    found = {}
    for part in ("loss", ".params", ".batch_stats", ".opt_state"):
        found[part] = max(float(np.abs(other[n] - value).max()) for n, value in one.items() if n.startswith(part))
        print(part, found[part])
    return found


def test_eight_devices_are_one(one, tmp_path):
    assert {value.dtype.name for name, value in one.items() if name.startswith(".")} == {"float64", "int32"}
    np.testing.assert_array_equal(one["phase"], [1, 1, 2, 2])
    assert np.ptp(one["loss"]) > 1e-2  # the steps did something
    eight = in_a_child(tmp_path, 8)
    assert max(worst(one, eight).values()) < 1e-10
    assert eight["replicas apart"] == 0  # bit for bit, or they would drift
    for name in ("labelled", "pseudo", "accuracy", "leaked", "learning_rate"):
        np.testing.assert_allclose(eight[name], one[name], rtol=1e-10, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["local statistics", "mean of local means", "local count"])
def test_what_would_be_wrong_is_seen(fault, one, tmp_path):
    wrong = in_a_child(tmp_path, 8, fault)
    assert worst(one, wrong)[".params"] > 1e-3
    assert (wrong["replicas apart"] > 1e-3) == (fault != "mean of local means")


@pytest.mark.slow
def test_a_group_of_devices_has_the_statistics_of_a_micro_batch(tmp_path):
    """Four devices in groups of two are one that takes two halves in turn; only running averages are made otherwise."""
    halves, groups = in_a_child(tmp_path, 1, "two micro-batches"), in_a_child(tmp_path, 4, "groups of two")
    found = worst(halves, groups)
    assert found.pop(".batch_stats") < 1
    assert max(found.values()) < 1e-10
    assert groups["replicas apart"] == 0
    assert worst(halves, in_a_child(tmp_path, 4))[".params"] > 1e-3  # statistics of all four are others


if __name__ == "__main__":
    assert jax.device_count() == int(sys.argv[2])
    np.savez(sys.argv[1], **run(int(sys.argv[2]), sys.argv[3]))
