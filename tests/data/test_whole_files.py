"""Files that are whole or not there, strict JSON, and a lock that dies with its process."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from maskclip_jax.data import whole_files
from maskclip_jax.data.whole_files import (
    cache_folder,
    cut,
    is_count,
    json_bytes,
    locked,
    parse_json,
    read_json,
    reason,
    shipped,
    write_json,
)
from maskclip_jax.errors import UserError

DAMAGED = {
    "nothing": b"",
    "spaces": b"  \n",
    "zero bytes": b"\0" * 16,
    "half": b'{"a": [1, 2',
    "Latin-1": b'{"caf\xe9": 1}',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "NaN": b'{"a": NaN}',
    "infinity": b'{"a": -Infinity}',
    "1e999": b'{"a": 1e999}',
    "6,000 digits": b'{"a": ' + b"9" * 6000 + b"}",
    "surrogate": b'{"a": "\\ud800"}',
    "surrogate key": b'{"\\ud800": 1}',
    "deep list": b"[" * 100_000,
    "deep object": b'{"a":' * 5000 + b"1" + b"}" * 5000,
    "a list": b"[]",
    "two values": b"{}{}",
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_damaged_json_is_one_line(tmp_path, content):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        read_json(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400 + len(str(path))


def test_legal_json_comes_back(tmp_path):
    value = {"ä": [1, -2.5, True, None, "🐕", {"b": []}], "large": 2**63}
    write_json(tmp_path / "deep" / "x.json", value)
    assert read_json(tmp_path / "deep" / "x.json") == value
    assert parse_json(b"\xef\xbb\xbf{}", "x") == {}
    assert parse_json(b"[1]", "x", kind=None) == [1]
    name = os.fsdecode(b"caf\xe9.png")  # a file name that is not UTF-8 can be kept where it is asked for
    assert parse_json(json_bytes({"a": name}), "x", surrogates=True) == {"a": name}
    assert json.loads(json_bytes({"a": np.float32("nan"), "b": np.arange(2)})) == {"a": None, "b": [0, 1]}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_the_reason_is_the_systems_word(number):
    """Whoever met it: Python, or a library that writes by itself and tells a story."""
    words = os.strerror(number)
    assert (
        reason(OSError(number, words))
        == reason(RuntimeError(f"open() failed: {words}; opening x; {'.' * 999}"))
        == words
    )


def test_only_files_of_a_size_are_read(tmp_path):
    write_json(tmp_path / "x.json", {"a": "b" * 100})
    with pytest.raises(UserError, match="at most 50 bytes"):
        read_json(tmp_path / "x.json", most=50)
    for path in (tmp_path, tmp_path / "none", "/dev/zero", tmp_path / ("x" * 5000)):
        with pytest.raises(UserError):
            read_json(path)


def test_counts():
    assert is_count(0)
    assert is_count(2**63 - 1)
    for other in (True, -1, 2**63, 1.0, "1", None, [1]):
        assert not is_count(other)


def test_messages_are_cut():
    assert cut("a\nb") == "a b"
    assert len(cut("x" * 10**6)) == 200
    assert len(cut(list(range(10**4)))) == 200


def test_what_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    write_json(tmp_path / "x.json", {"a": 1})

    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(whole_files, "sync", full)
    with pytest.raises(UserError, match="No space left"):
        write_json(tmp_path / "x.json", {"a": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]
    assert read_json(tmp_path / "x.json") == {"a": 1}


def test_a_lock_is_held_by_one_and_dies_with_its_process(tmp_path):
    path = tmp_path / "lock"
    script = (
        "import sys, time\nfrom maskclip_jax.data.whole_files import locked\n"
        "with locked(sys.argv[1], 'x'):\n    print('held', flush=True)\n    time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", script, path], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"process {child.pid} on"), locked(path, "this folder"):
            pass
        child.kill()
        child.wait()
    with locked(path, "this folder"):
        path.unlink()  # as someone who tidies up might: the next one's lock is a lock all the same
        with locked(path, "x"), pytest.raises(UserError), locked(path, "x"):
            pass
    with locked(path, "x"):
        pass


def test_what_ships_is_there_or_one_line():
    assert (shipped("assets", "scenes") / "classes.json").is_file()
    with pytest.raises(UserError, match="install the package again"):
        shipped("assets", "no_such_folder")


def test_no_home_is_no_cache(monkeypatch):
    """No $HOME and a user whom the system does not know: words are read, nothing is kept."""

    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("MASKCLIP_JAX_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", home)
    assert cache_folder() is None
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # is to be ignored
    assert cache_folder() is None
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert cache_folder() == Path("/caches/maskclip_jax")
    monkeypatch.setenv("MASKCLIP_JAX_CACHE", "somewhere")
    assert cache_folder() == Path("somewhere")
