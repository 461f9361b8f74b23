"""Two hundred requests from eight threads: every answer right, and memory as before; also where nothing repeats."""

import itertools
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from web_calls import ask, call

from maskclip_jax.ops.memory import resident_bytes

pytestmark = pytest.mark.slow
SCENES = ("0005", "0038", "0010", "0041")
WORDS = ("sheep, sand, sky", "dog, road, fish, car, grass", "sun, moon, water")
THRESHOLDS = (None, 0.3, 0.9)


needs_proc = pytest.mark.skipif(resident_bytes() is None, reason="memory is read from Linux's /proc")


@needs_proc
def test_two_hundred_requests_from_eight_threads(server):
    url, session = server
    photos = {name: call(f"{url}/api/scenes/{name}.jpg").data for name in SCENES}
    kinds = list(itertools.product(SCENES, WORDS, THRESHOLDS))

    def one(number: int):
        """A visitor uploads, asks, and fetches the label PNG."""
        scene, words, threshold = kinds[number % len(kinds)]
        image = call(f"{url}/api/images?name={scene}.jpg", photos[scene]).content["image"]
        reply = ask(url, image, words, prompt_denoising=threshold)
        labels = call(url + reply.content["files"]["labels"])
        return number % len(kinds), reply.status, reply.content["classes"], labels.data

    wanted = [one(number)[2:] for number in range(len(kinds))]  # one after the other, and everything compiled
    before, runs = resident_bytes(), session.tower_runs
    with ThreadPoolExecutor(8) as threads:
        replies = list(threads.map(one, range(200)))
    assert [status for _, status, _, _ in replies] == [200] * 200
    for kind, _, classes, labels in replies:
        assert (classes, labels) == wanted[kind]
    assert session.tower_runs - runs == 200  # each upload is an image of its own
    # 200 photos' features are 170 MB, and kept while there is room; beyond them memory does not grow
    kept = session._kept.nbytes + session._answers.nbytes + session._photos.nbytes
    assert resident_bytes() - before < kept + 2**26
    again = resident_bytes()
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda number: ask(url, SCENES[number % 4], WORDS[number % 3]).status, range(200)))
    assert resident_bytes() - again < 2**25


@needs_proc
def test_what_never_repeats_does_not_pile_up(server):
    """Templates, words and windows without end, and uploads that stop half-way: each has its bytes, and no more."""
    url, session = server
    long = "in a very very long sentence that says nothing"

    def status(**options):
        return ask(url, "0005", options.pop("classes", "dog, sand"), **({"templates": "single"} | options)).status

    for window in (16, 40, 64, 104, 2048):  # the programs, and what the allocator keeps of its first work
        assert status(window=window, stride=max(window // 2, 10)) == 200
    assert status(templates=f"{long} {{}}", classes=[f"w{i}" for i in range(40)]) == 200
    before = resident_bytes()
    for number in range(60):
        assert status(templates=f"{number} {long} {{}}") == 200
        assert status(templates=f"{number}{'x' * 240_000} {{}}") == 400
    rows = session.models.reader("embedded")._rows
    assert rows.nbytes < 2**25
    kept = session._kept.nbytes + session._answers.nbytes
    for window in range(40, 104, 8):
        assert status(window=window, stride=window // 2) == 200
    kept = session._kept.nbytes + session._answers.nbytes - kept
    assert resident_bytes() - before < kept + 2**27

    host, port = url.removeprefix("http://").split(":")
    clients = []
    try:
        before = resident_bytes()
        for _ in range(100):  # as many as can send: the others are told to come back
            client = socket.create_connection((host, int(port)), timeout=10)
            clients.append(client)
            client.sendall(f"POST /api/images HTTP/1.1\r\nHost: {host}\r\nContent-Length: {2**20}\r\n\r\n".encode())
            client.sendall(bytes(2**19))
        time.sleep(1)
        assert resident_bytes() - before < 2**25
        assert call(f"{url}/api/options").status == 200
    finally:
        for client in clients:
            client.close()
    end = time.monotonic() + 30
    while ask(url, "0005", "dog", templates="single").status != 200 and time.monotonic() < end:
        time.sleep(0.1)
    assert call(f"{url}/api/images?name=a.jpg", call(f"{url}/api/scenes/0005.jpg").data).status == 200
