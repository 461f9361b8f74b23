"""A student goes to the hub and comes back, through huggingface_hub and a stand-in for the hub's HTTP API."""

import json

import huggingface_hub
import numpy as np
import pytest
from hub_server import TOKEN, Hub
from huggingface_hub import constants
from tiny_run import arrays_of

from maskclip_jax import cli, load_student
from maskclip_jax.distill import is_student

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub to its client


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with Hub() as hub:
        changed = {
            "ENDPOINT": hub.address,
            "HUGGINGFACE_CO_URL_TEMPLATE": hub.address + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
        }
        for name, value in changed.items():
            monkeypatch.setattr(constants, name, value)
        huggingface_hub.close_session()
        yield hub
    huggingface_hub.close_session()


def push(capsys, *arguments):
    code = cli.run_command(["push", *map(str, arguments), "--no-compile-cache"])
    return code, *capsys.readouterr()


def test_there_and_back(hub, student_folder, capsys):
    code, out, errors = push(capsys, student_folder, "alice/scenes", "--license", "apache-2.0")
    assert (code, errors) == (0, "")
    assert out == f"wrote {hub.address}/alice/scenes\n"
    assert set(hub.files["alice/scenes"]) == {"config.json", "model.safetensors", "README.md"}
    assert sum("/commit/" in request for request in hub.requests) == 1  # nothing half-written
    assert is_student("alice/scenes")
    one, other = load_student(student_folder), load_student("alice/scenes")
    for name, value in arrays_of((one.variables, one.text)).items():
        np.testing.assert_array_equal(arrays_of((other.variables, other.text))[name], value)
    assert other.config == one.config
    card = hub.files["alice/scenes"]["README.md"].decode()
    assert card.startswith('---\nlicense: "apache-2.0"\n')
    for words in ("dog, cat, grass, sky, road", "# scenes", "| mIoU |\n|---:|\n| 12.5 |", "voc.npz", "7 of 10 steps"):
        assert words in card
    assert not is_student("alice/nothing")


def test_refusals_are_one_line_and_send_nothing(hub, student_folder, tmp_path, capsys, monkeypatch):
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "config.json").write_text("{}")
    cases = [((student_folder, name), "OWNER/NAME") for name in ("scenes", "a/b/c", "../b", "a/", "a b/c")]
    cases += [((tmp_path / "none", "a/b"), "is none"), ((tmp_path / "clip", "a/b"), "config.json")]
    for arguments, words in cases:
        code, out, errors = push(capsys, *arguments)
        assert (code, out, errors.count("\n")) == (2, "", 1)
        assert words in errors
    assert hub.requests == []
    monkeypatch.setenv("HF_TOKEN", "hf_bad")
    code, _, errors = push(capsys, student_folder, "a/b")
    assert (code, errors.count("\n")) == (2, 1)
    assert "the hub did not take a/b (HfHubHTTPError" in errors
    assert hub.files == {}


def test_without_a_token_or_a_network(hub, student_folder, capsys, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    code, _, errors = push(capsys, student_folder, "a/b")
    assert (code, errors) == (
        2,
        "error: the hub wants to know who you are, but no token is here: run `hf auth login`, or set HF_TOKEN\n",
    )
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    errors = push(capsys, student_folder, "a/b")[2]
    assert errors == "error: the hub must be reached, but HF_HUB_OFFLINE is set: unset it\n"
    assert hub.requests == []


def test_a_card_of_ones_own_goes_along(hub, student_folder, capsys):
    (student_folder / "README.md").write_text("mine")
    assert push(capsys, student_folder, "a/b")[0] == 0
    assert hub.files["a/b"]["README.md"] == b"mine"
    assert json.loads(hub.files["a/b"]["config.json"])["format"] == "maskclip_jax.student"
