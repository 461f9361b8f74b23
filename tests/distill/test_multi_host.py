"""Two hosts of two devices are one host of one device: losses, parameters, scores, checkpoints.

In float64, like `test_multi_device`: what differs by 1e-10 is not the same.
"""

import json
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_run import HERE, child_environment, run_config, write_noise

from maskclip_jax.data.augment import AugmentConfig
from maskclip_jax.distill.checkpoint import Checkpoints
from maskclip_jax.distill.run_log import read_metrics


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def run_hosts(folder, config, count=2):
    """The same command on `count` hosts; the arrays that the first one ends with."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    coordinator, processes = f"127.0.0.1:{free_port()}", []
    command = [sys.executable, str(HERE / "tiny_run.py"), *(str(folder / n) for n in ("config.json", "run", "out.npz"))]
    for host in range(count):
        names = {"MASKCLIP_COORDINATOR": coordinator, "MASKCLIP_HOSTS": str(count), "MASKCLIP_HOST": str(host)}
        environment = child_environment(folder / "cache", devices=count) | names | {"JAX_ENABLE_X64": "1"}
        log = (folder / f"host{host}.log").open("w")
        processes.append((subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT), log))
    try:
        for process, log in processes:
            assert process.wait(timeout=400) == 0, Path(log.name).read_text()[-3000:]
    finally:
        for process, log in processes:
            process.kill()
            process.wait()
            log.close()
    with np.load(folder / "out.npz") as arrays:
        return dict(arrays)


@pytest.mark.slow
def test_two_hosts_are_one_and_go_on_together(tmp_path):
    data, still = write_noise(tmp_path), AugmentConfig(scale=(1.0, 1.0))
    changes = {"batch_size": 8, "accumulate": 2, "steps": 5, "learning_rate": 0.01, "dtype": "float64"}
    changes["augmentation"] = still
    config = run_config(data, evaluate_every=3, checkpoint_every=2, **changes)
    two = run_hosts(tmp_path, config)
    one = run_hosts(tmp_path / "one", config, 1)
    assert one.keys() == two.keys()
    worst = max(float(np.abs(one[name] - two[name]).max()) for name in one)
    records = [read_metrics(tmp_path / name) for name in ("one/run", "run")]
    assert [r["step"] for r in records[0]] == [r["step"] for r in records[1]]
    losses = [np.array([r["train/loss"] for r in found if "train/loss" in r]) for found in records]
    print(f"parameters differ by {worst:.2g}, losses by {np.abs(losses[0] - losses[1]).max():.2g}")
    assert worst < 1e-10
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-7)  # the log keeps eight digits
    assert np.ptp(losses[0]) > 1e-2
    scores = [[r["eval/pixel accuracy"] for r in found if "eval/mIoU" in r] for found in records]
    np.testing.assert_allclose(scores[0], scores[1], rtol=1e-7)
    with Checkpoints(tmp_path / "run", read_only=True) as checkpoints:
        assert checkpoints.steps == [3, 4, 5]  # the last three

    # The last checkpoint is lost: both hosts go on from the one before, to the same end.
    newest = tmp_path / "run" / "checkpoints" / "00000005"
    newest.rename(tmp_path / "elsewhere")
    again = run_hosts(tmp_path, config)
    assert newest.is_dir()
    for name in two:
        np.testing.assert_allclose(again[name], two[name], atol=1e-10, err_msg=name)
    assert [r["step"] for r in read_metrics(tmp_path / "run")] == [r["step"] for r in records[0]]
