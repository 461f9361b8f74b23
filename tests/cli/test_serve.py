"""`serve` from its start to Ctrl-C, and one line for what stands in its way."""

import json
import os
import signal
import socket
import subprocess
import sys
import tomllib
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def needs_the_extra():
    for name in ("starlette", "uvicorn"):
        pytest.importorskip(name, reason="the web extra is not installed: pip install -r requirements-web.txt")


@pytest.mark.parametrize("name", ["starlette", "uvicorn"])
def test_without_the_extra(call, monkeypatch, name):
    needs_the_extra()
    monkeypatch.setitem(sys.modules, name, None)
    result = call("serve")
    assert result.code == 2
    (line,) = result.errors
    assert line.startswith(f"error: serve needs starlette and uvicorn, but {name} is not installed: pip install -r")


def test_a_taken_port(call):
    needs_the_extra()
    with socket.create_server(("127.0.0.1", 0)) as other:
        number = other.getsockname()[1]
        result = call("serve", "--port", number)
    assert result.code == 2
    (line,) = result.errors
    assert f"the port must be free, but 127.0.0.1:{number} cannot be had (Address already in use)" in line


@pytest.mark.parametrize("host", ["192.0.2.1", "no..name", "x" * 64])  # the first is for documentation (RFC 5737)
def test_an_address_of_another_machine(call, host):
    needs_the_extra()
    result = call("serve", "--host", host, "--port", "0")
    assert result.code == 2
    assert len(result.errors) == 1
    assert host in result.errors[0]


@pytest.mark.parametrize("option", ["--model", "--more-models"])
def test_a_students_folder_is_read_before_the_page_opens(call, tmp_path, option):
    needs_the_extra()
    for name in ("config.json", "text.npy"):
        (tmp_path / name).write_bytes(b"{}")
    result = call("serve", "--port", "0", option, tmp_path)
    assert result.code == 2
    assert len(result.errors) == 1
    assert result.errors[0].startswith(f"error: a run's folder holds its config.json, but {tmp_path}")


@pytest.mark.parametrize("number", ["70000", "-1", "http"])
def test_no_port(call, number):
    result = call("serve", f"--port={number}")
    assert result.code == 2
    assert "a port is 0 to 65535" in result.errors[0]


def test_the_extra_is_said_twice_alike():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (ROOT / "requirements-web.txt").read_text().split() == project["optional-dependencies"]["web"]


@pytest.mark.slow
def test_from_start_to_ctrl_c(model, photo, tmp_path):
    """The tiny model on a free port; nothing of what came is on the disk afterwards."""
    needs_the_extra()
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    environment = os.environ | {"HOME": str(home), "TMPDIR": str(home), "MASKCLIP_JAX_CACHE": str(home / "cache")}
    process = subprocess.Popen(
        [sys.executable, ROOT / "run.py", "serve", "--model", model, "--port", "0"],
        cwd=here,
        env=environment | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        line = process.stdout.readline()
        assert line.startswith("open http://127.0.0.1:"), process.communicate()[1]
        url = line.split()[1]
        with urllib.request.urlopen(f"{url}/api/images?name=photo.png", photo.read_bytes()) as reply:
            image = json.load(reply)["image"]
        body = json.dumps({"image": image, "classes": "dog, cat, grass"}).encode()
        with urllib.request.urlopen(f"{url}/api/segment", body) as reply:
            answer = json.load(reply)
        assert [entry["class"] for entry in answer["classes"]] == ["dog", "cat", "grass"]
        with urllib.request.urlopen(url + answer["files"]["labels"]) as reply:
            assert reply.read(4) == b"\x89PNG"
        assert [p for folder in (home, here) for p in folder.rglob("*") if p.is_file()] == []
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, errors) == (0, "stopped\n")
