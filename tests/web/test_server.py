"""The endpoint, over HTTP on this machine: what the page asks, and what nobody should."""

import io
import json
import re
import shlex
import shutil
import socket
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from web_calls import ask, call

ROOT = Path(__file__).parents[2]
WORDS = "sheep, sand, sky"


def photo(colour=(30, 90, 200), size=(54, 40)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, format="PNG")
    return file.getvalue()


def test_the_page_and_nothing_from_outside(server):
    url, _ = server
    for path, kind in {"/": "html", "/page.js": "javascript", "/drawing.js": "javascript", "/page.css": "css"}.items():
        reply = call(url + path)
        assert reply.status == 200
        assert kind in reply.headers["content-type"]
        assert "default-src 'none'" in reply.headers["content-security-policy"]
        assert reply.headers["cache-control"] == "no-store"
        outside = [link for link in re.findall(r"https?://[^\s\"']+", reply.data.decode()) if "www.w3.org" not in link]
        assert outside == []


def test_choices(server):
    url, _ = server
    found = call(f"{url}/api/options").content
    assert found["models"] == ["embedded", "embedded-resnet"]
    assert found["methods"][:2] == ["maskclip", "naive"]
    assert len(found["class_sets"]["pascal_voc20"]) == 20
    assert all(len(words) <= found["limits"]["classes"] for words in found["class_sets"].values())
    assert call(f"{url}/api/scenes/{found['scenes'][0]}.jpg").data[:2] == b"\xff\xd8"


def test_a_photo_from_upload_to_files(server):
    url, _ = server
    received = call(f"{url}/api/images?name=C%3A%5Cmy%20photo.png", photo()).content
    assert (received["name"], received["height"], received["width"]) == ("my photo.png", 40, 54)
    with Image.open(io.BytesIO(call(f"{url}/api/images/{received['image']}").data)) as image:
        assert (image.size, image.getpixel((0, 0))) == ((54, 40), (30, 90, 200))
    reply = ask(url, received["image"], WORDS)
    assert reply.headers["content-type"].startswith("application/json")
    answer = reply.content
    assert [entry["class"] for entry in answer["classes"]] == WORDS.split(", ")
    assert all(re.fullmatch("#[0-9a-f]{6}", entry["color"]) for entry in answer["classes"])
    labels = call(url + answer["files"]["labels"])
    assert labels.headers["content-disposition"] == "attachment; filename*=UTF-8''my%20photo_labels.png"
    with Image.open(io.BytesIO(labels.data)) as image:
        assert (image.mode, image.size) == ("P", (54, 40))
        areas = np.bincount(np.array(image).ravel(), minlength=3) / 2160
    np.testing.assert_allclose(areas, [entry["area"] for entry in answer["classes"]])
    written = call(url + answer["files"]["json"]).content
    assert list(written) == ["image", "height", "width", "classes"]
    heat = call(f"{url}{answer['files']['heat']}2.png")
    assert (heat.status, heat.data[:4]) == (200, b"\x89PNG")


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ("", "at least one word is needed"),
        ([f"w{i}" for i in range(500)], "at most 256 classes, got 500"),
        ("dog,,cat", "an empty one"),
    ],
)
def test_words_that_cannot_be_used(server, classes, message):
    url, _ = server
    reply = ask(url, "0005", classes)
    assert reply.status == 400
    assert message in reply.content["error"]


def test_files_that_are_no_images(server):
    url, _ = server
    reply = call(f"{url}/api/images?name=notes.txt", b"not a picture")
    assert reply.status == 400
    assert "but notes.txt is none of them" in reply.content["error"]
    reply = call(f"{url}/api/images", b"\0" * (2**20 + 1))
    assert reply.status == 413
    assert reply.content["error"] == "an image file has at most 1 MB here, but this one has more: make it smaller"
    reply = ask(url, "0005", "a, " * 2**17)
    assert reply.status == 413


@pytest.mark.parametrize(
    ("path", "status", "message"),
    [
        ("/nothing", 404, "there is no GET /nothing here"),
        ("/api/segment", 404, "there is no GET /api/segment"),
        ("/api/images/unknown", 404, "load it again"),
        ("/api/scenes/9999.jpg", 404, "a scene is one of"),
        ("/api/scenes/..%2Fclasses.json", 404, "there is no GET"),
        ("/api/answers/unknown/labels.png", 404, "send the request again"),
        ("/../pyproject.toml", 404, "there is no GET"),
        (f"/api/answers/unknown/heat/{'9' * 5000}.png", 404, "a class is a number, got 99999999999999999999"),
        ("/api/answers/unknown/heat/-1.png", 404, "a class is a number"),
        ("/api/images/%ED%A0%80", 404, "load it again"),
    ],
)
def test_what_is_not_there(server, path, status, message):
    url, _ = server
    reply = call(url + path)
    assert reply.status == status
    assert message in reply.content["error"]


def test_other_sites_pages_are_refused(server, monkeypatch):
    url, session = server
    asked = []
    monkeypatch.setattr(session, "segment", lambda question: asked.append(question) or {})
    body = json.dumps({"image": "0005", "classes": WORDS}).encode()
    for headers in (
        *({"Origin": origin} for origin in ("http://elsewhere.example", "http://[", "null", "//", f"{url}@elsewhere")),
        *({"Host": host} for host in ("elsewhere.example", "[::1", "", "127.0.0.1.elsewhere.example", "192.0.2.1")),
    ):
        reply = call(f"{url}/api/segment", body, **headers)
        assert reply.status == 403
        assert re.search("pages of other sites|this page is at", reply.content["error"])
    assert asked == []
    assert call(f"{url}/api/segment", body, Origin=url).status == 200
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("bound", "known", "unknown"),
    [
        ("127.0.0.1", ["127.0.0.1", "::1", "localhost", "lab.example"], ["192.0.2.7", "elsewhere.example", ""]),
        ("0.0.0.0", ["127.0.0.1", "192.0.2.7", "::1", "localhost", "lab.example"], ["elsewhere.example", ""]),
        ("photos.example", ["photos.example", "192.0.2.7", "lab.example"], ["photos.example.elsewhere.example", ""]),
    ],
)
def test_hosts_are_addresses_or_known_names(bound, known, unknown):
    pytest.importorskip("starlette", reason="the web extra is not installed")
    from maskclip_jax.web.server import Guard

    async def app(scope, receive, send):
        raise AssertionError

    guard = Guard(app, bound, ["Lab.Example"])
    assert [host for host in (*known, *unknown) if guard.is_known(host)] == known
    if bound != "127.0.0.1":
        assert guard.is_known(socket.gethostname().lower())


def test_what_json_can_hold_is_no_fault_of_the_server(server):
    """Half characters and numbers without end, wherever they come: one line, and not too long a one."""
    url, _ = server
    texts = ['"\\ud800"', '["\\udfff"]', "9" * 400, "1e20", "-1e400", "9" * 5000, '"' + "x" * 9000 + '"', "{}", "[[1]]"]
    for name in (
        "image",
        "classes",
        "model",
        "method",
        "window",
        "prompt_denoising",
        "background",
        "templates",
        "other",
    ):
        for text in texts:
            fields = {"image": '"0005"', "classes": '"dog"'} | {name: text}
            body = "{" + ", ".join(f'"{key}": {value}' for key, value in fields.items()) + "}"
            reply = call(f"{url}/api/segment", body.encode())
            assert reply.status in (400, 404), (name, text[:20])
            assert len(reply.content["error"]) < 450


def test_a_fault_of_the_server_is_a_line_too(server, monkeypatch):
    url, session = server

    def broken(name):
        raise ZeroDivisionError

    monkeypatch.setattr(session, "scene", broken)
    reply = call(f"{url}/api/scenes/0005.jpg")
    assert reply.status == 500
    assert reply.content == {"error": "this is a fault of the server: its terminal has the details"}


def test_the_line_has_an_end():
    pytest.importorskip("starlette", reason="the web extra is not installed")
    import asyncio
    import threading

    from maskclip_jax.web.server import Busy, Turns

    async def crowd():
        turns, gate = Turns(most=2), threading.Event()
        first, second = (asyncio.ensure_future(turns(gate.wait, 60)) for _ in range(2))
        await asyncio.sleep(0)
        with pytest.raises(Busy, match="at most 2 requests wait here"):
            await turns(gate.wait)
        gate.set()
        assert [await first, await second, await turns(gate.wait)] == [True] * 3
        turns.close()

    asyncio.run(crowd())


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_guides_curl_lines(server, tmp_path):
    url, _ = server
    (tmp_path / "photo.jpg").write_bytes(photo())
    lines = [
        line for line in (ROOT / "docs" / "guides" / "serve.md").read_text().splitlines() if line.startswith("curl ")
    ]
    assert lines
    for line in lines:
        command = shlex.split(line.replace("http://127.0.0.1:7860", url))
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        assert "error" not in json.loads(result.stdout), line
