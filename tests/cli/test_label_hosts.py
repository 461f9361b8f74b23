"""`label` as processes: two hosts that know each other, and SIGKILL."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_outputs import WORDS
from compile_flags import with_devices
from label_outputs import check_manifest, tree

ROOT = Path(__file__).parents[2]


def program(photos: Path, model: Path, out: Path, cache: Path, *options, **variables) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "run.py"), "label", str(photos), "--classes", WORDS, "--model", str(model)]
    command += ["--out", str(out), "--batch-size", "1", "--shard-size", "3", *options]
    compiled = {"JAX_COMPILATION_CACHE_DIR": str(cache / "jax"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    environment = {**os.environ, "MASKCLIP_JAX_CACHE": str(cache), **compiled, **variables}
    log = out.with_name(f"{out.name}-{time.monotonic_ns()}.log")
    with log.open("w") as told:  # no pipe that nobody reads or closes
        running = subprocess.Popen(command, env=environment, stdout=told, stderr=subprocess.STDOUT)
    running.log = log
    return running


@pytest.mark.slow
def test_two_hosts_that_know_each_other(photos, model, tmp_path, cache):
    """Two processes over loopback, two devices each, write what one process does."""
    assert program(photos, model, tmp_path / "one", cache).wait(300) == 0
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{found.getsockname()[1]}"
    names = {"MASKCLIP_COORDINATOR": address, "MASKCLIP_HOSTS": "2"}
    names["XLA_FLAGS"] = with_devices(2)
    hosts = [program(photos, model, tmp_path / "two", cache, **names, MASKCLIP_HOST=str(i)) for i in range(2)]
    try:
        for host in hosts:
            host.wait(300)
    finally:
        for host in hosts:
            host.kill()
            host.wait()
    told = [host.log.read_text() for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], told
    assert "labelled 6 images in 2 shards" in told[0]
    assert "labelled 5 images in 2 shards" in told[1]
    check_manifest(tmp_path / "two")
    assert tree(tmp_path / "two") == tree(tmp_path / "one")


@pytest.mark.slow
def test_sigkill(photos, model, tmp_path, cache):
    """The real thing, three times, as soon as something new is there."""
    assert program(photos, model, tmp_path / "quiet", cache).wait(300) == 0
    out, seen = tmp_path / "out", 0
    for _ in range(3):
        running = program(photos, model, out, cache)
        deadline = time.monotonic() + 300
        while len(list(out.rglob("*.png"))) <= seen and running.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        running.send_signal(signal.SIGKILL)
        running.wait()
        seen = len(list(out.rglob("*.png")))
    assert seen > 0
    assert program(photos, model, out, cache).wait(300) == 0
    assert tree(out) == tree(tmp_path / "quiet")
