"""Eight devices are one: losses, parameters and statistics, in both phases, whatever the label count of each.

They run in a process of their own, in float64: in float32 a ReLU tips by rounding within four steps, on one processor
and not on another. What would be wrong is planted too, and seen.
"""

import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from compile_flags import with_devices
from tiny_distill import SIDE, config_of, on_devices, quickly, setup

from maskclip_jax.distill import step

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


FAULTS = ("none", "local statistics", "mean of local means", "local count")
CASES = {  # devices of the eight that there are, and what else is another config
    "one": (1, {}),
    "eight": (8, {}),
    "faults": (8, {}),
    "two micro-batches": (1, {"accumulate": 2}),
    "groups of four": (8, {"bn_group_size": 4}),
}


def plant() -> None:
    """Makes the step wrong, as one that was not made for several devices would be: with which of FAULTS, the batch
    says, so that one program has them all."""
    whole, mean, accumulate = step._over_all, jax.lax.pmean, step._accumulate
    planted = {}

    def instead(fault, wrong, right):
        return jax.tree.map(functools.partial(jax.numpy.where, planted["fault"] == FAULTS.index(fault)), wrong, right)

    def accumulated(forward_backward, batch_stats, batch, parts):
        planted["fault"] = batch["fault"][0]
        return accumulate(forward_backward, batch_stats, batch, parts)

    def averaged(statistics, axis, **options):
        return instead("local statistics", statistics, mean(statistics, axis, **options))

    def over_all(parts):
        (grads, tally), (right, summed) = parts, whole(parts)
        local, count = jax.numpy.maximum(tally.loss.count, 1), summed.loss.count
        means = jax.tree.map(lambda g: mean(g / local, step.AXIS) * count, grads)
        count = instead("local count", tally.loss.count, count)
        return instead("mean of local means", means, right), summed._replace(loss=summed.loss._replace(count=count))

    step._over_all, step._accumulate, jax.lax.pmean = over_all, accumulated, averaged


def run(name: str, folder: Path) -> None:
    """Writes what the steps of a case leave, or of "faults" those of each."""
    devices, changes = CASES[name]
    config, batches = case(**changes)
    if name == "faults":
        plant()
    teacher, frozen, student, start = setup(config)
    compiled = None
    for index, fault in enumerate(FAULTS if name == "faults" else (name,)):
        state, metrics = start, []
        for batch in batches:
            planted = {"fault": np.full(config.batch_size, index, np.int32)} if name == "faults" else {}
            arrays = on_devices(batch | planted, devices)
            compiled = compiled or quickly(step.make_train_step(config, student, teacher), state, frozen, arrays)
            state, values = compiled(state, frozen, arrays)
            metrics.append({key: float(value) for key, value in values.items()})
        np.savez(folder / f"{fault}.npz", **left(state, metrics))


def left(state, metrics) -> dict[str, np.ndarray]:
    shards = [[np.asarray(shard.data) for shard in x.addressable_shards] for x in jax.tree.leaves(state)]
    apart = max(float(np.abs(shard - first).max()) for first, *others in shards for shard in others or [first])
    arrays = {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(state)}
    return (
        arrays
        | {"replicas apart": np.array(apart)}
        | {name: np.array([values[name] for values in metrics]) for name in metrics[0]}
    )


def in_a_child(folder: Path, *cases: str) -> dict[str, dict[str, np.ndarray]]:
    environment = os.environ | {
        "XLA_FLAGS": with_devices(8),
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_X64": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), str(HERE)]),
    }
    command = [sys.executable, __file__, str(folder), *cases]
    child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert child.returncode == 0, child.stderr
    return {file.stem: dict(np.load(file)) for file in folder.iterdir()}


@pytest.fixture(scope="module")
def wrong(tmp_path_factory):
    """What planted faults do, and groups of devices; "faults" is the last, for its plant stays."""
    return in_a_child(tmp_path_factory.mktemp("wrong"), "one", "two micro-batches", "groups of four", "faults")


def worst(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> dict[str, float]:
    """The largest difference in each part; -s shows the figures that the README reports."""
    assert other.keys() == one.keys()
    found = {}
    for part in ("loss", ".params", ".batch_stats", ".opt_state"):
        found[part] = max(float(np.abs(other[n] - value).max()) for n, value in one.items() if n.startswith(part))
        print(part, found[part])
    return found


def test_eight_devices_are_one(tmp_path):
    found = in_a_child(tmp_path, "one", "eight")
    one, eight = found["one"], found["eight"]
    assert {value.dtype.name for name, value in one.items() if name.startswith(".")} == {"float64", "int32"}
    np.testing.assert_array_equal(one["phase"], [1, 1, 2, 2])
    assert np.ptp(one["loss"]) > 1e-2  # the steps did something
    assert max(worst(one, eight).values()) < 1e-10
    assert eight["replicas apart"] == 0  # bit for bit, or they would drift
    for name in ("labelled", "pseudo", "accuracy", "leaked", "learning_rate"):
        np.testing.assert_allclose(eight[name], one[name], rtol=1e-10, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_what_would_be_wrong_is_seen(fault, wrong):
    found = worst(wrong["one"], wrong[fault])
    assert (found[".params"] > 1e-3) if fault != "none" else (max(found.values()) < 1e-10)
    assert (wrong[fault]["replicas apart"] > 1e-3) == (fault in ("local statistics", "local count"))


@pytest.mark.slow
def test_a_group_of_devices_has_the_statistics_of_a_micro_batch(wrong):
    """Eight devices in groups of four are one that takes two halves in turn; only running averages are other ones."""
    halves, groups = wrong["two micro-batches"], wrong["groups of four"]
    found = worst(halves, groups)
    assert found.pop(".batch_stats") < 1
    assert max(found.values()) < 1e-10
    assert groups["replicas apart"] == 0
    assert worst(halves, wrong["none"])[".params"] > 1e-3  # statistics of all eight are others


if __name__ == "__main__":
    assert jax.device_count() == 8
    for chosen in sys.argv[2:]:
        run(chosen, Path(sys.argv[1]))
