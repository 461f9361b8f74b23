"""Two hosts of two devices are one host of one device: losses, parameters, scores, checkpoints. And they end together.

In float64, like `test_multi_device`: what differs by 1e-10 is not the same.
"""

import contextlib
import json
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from tiny_run import HERE, child_environment, run_config, write_noise

from maskclip_jax.data.augment import AugmentConfig
from maskclip_jax.distill.checkpoint import Checkpoints
from maskclip_jax.distill.input_pipeline import epoch_order
from maskclip_jax.distill.run_log import read_metrics


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextlib.contextmanager
def started_hosts(folder, config, count=2, **environment):
    """The same command on `count` hosts: processes and the files of what they say."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    coordinator, processes = f"127.0.0.1:{free_port()}", []
    command = [sys.executable, str(HERE / "tiny_run.py"), *(str(folder / n) for n in ("config.json", "run", "out.npz"))]
    for host in range(count):
        names = {"MASKCLIP_COORDINATOR": coordinator, "MASKCLIP_HOSTS": str(count), "MASKCLIP_HOST": str(host)}
        given = child_environment(folder / "cache", devices=count) | names | environment
        log = folder / f"host{host}.log"
        with log.open("w") as file:
            process = subprocess.Popen(command, env=given, stdout=file, stderr=subprocess.STDOUT)
        processes.append((process, log))
    try:
        yield processes
    finally:
        for process, _ in processes:
            process.kill()
            process.wait()


def run_hosts(folder, config, count=2):
    """The arrays that the first host ends with."""
    with started_hosts(folder, config, count, JAX_ENABLE_X64="1") as processes:
        for process, log in processes:
            assert process.wait(timeout=400) == 0, log.read_text()[-3000:]
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


def ends(processes, within=30):
    """Exit codes, all that was said, and last lines (Gloo's own aside: it speaks from threads of its own)."""
    deadline, ended = time.monotonic() + 400, {}
    while len(ended) < len(processes):
        for place, (process, log) in enumerate(processes):
            if place not in ended and process.poll() is not None:
                ended[place] = time.monotonic()
                deadline = min(deadline, ended[place] + within)
            assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.1)
    print("all ended within", max(ended.values()) - min(ended.values()))
    texts = [log.read_text() for _, log in processes]
    # its threads' lines may be cut anywhere
    said = ([line for line in text.splitlines() if "[Gloo]" not in line and "peer ranks" not in line] for text in texts)
    last = ["".join(lines[-1:]) for lines in said]  # who was killed may have said nothing
    return [process.returncode for process, _ in processes], texts, last


@pytest.mark.slow
def test_what_ends_one_host_ends_both(tmp_path):
    """A bad label in one host's share of a later batch, SIGTERM to one host, and kill -9: with one line each."""
    data = write_noise(tmp_path)
    changes = {"steps": 100_000, "log_every": 5, "evaluate_every": 10**6, "checkpoint_every": 10**6}
    config = run_config(data, **changes)
    with np.load(data) as arrays:
        images, labels = arrays["images"], arrays["labels"].copy()
    labels[epoch_order(config.seed, 0, len(images))[2 * 4 + 2]] = 99  # step 2, device 2
    np.savez(tmp_path / "bad.npz", images=images, labels=labels)
    with started_hosts(tmp_path, run_config(tmp_path / "bad.npz", **changes)) as processes:
        codes, texts, last = ends(processes)
    assert codes == [2, 2], texts
    for line, text in zip(last, texts, strict=True):
        assert line.startswith("error: host 1: annotation is 0..4 or 255, but"), text
        assert "Traceback" not in text
    assert not list((tmp_path / "run").glob(".ended*"))
    (tmp_path / "run").rename(tmp_path / "failed")

    def begun(processes, beyond=0):
        """The second host's process, once the log has a later step: signals are heard."""
        deadline = time.monotonic() + 400
        while not any(record["step"] > beyond for record in read_metrics(tmp_path / "run")):
            assert all(process.poll() is None for process, _ in processes), processes[0][1].read_text()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.1)
        return processes[1][0]

    with started_hosts(tmp_path, config) as processes:
        begun(processes).send_signal(signal.SIGTERM)
        codes, texts, last = ends(processes)
    assert codes == [130, 130], texts
    assert all("StoppedTogether" in text for text in texts)
    with Checkpoints(tmp_path / "run", read_only=True) as checkpoints:
        (saved,) = checkpoints.steps
    steps = [record["step"] for record in read_metrics(tmp_path / "run")]
    assert steps[-1] == saved
    assert len(steps) < 10_000  # it did not go on for long

    with started_hosts(tmp_path, config) as processes:
        begun(processes, beyond=saved).kill()
        codes, texts, last = ends(processes)
    assert codes == [2, -signal.SIGKILL], texts
    assert last[0].startswith("error: host 0: the hosts work together, but another one is gone"), texts
