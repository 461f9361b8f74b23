"""Two hundred requests from eight threads: every answer right, and memory as before."""

import itertools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from web_calls import ask, call

pytestmark = pytest.mark.slow
SCENES = ("0005", "0038", "0010", "0041")
WORDS = ("sheep, sand, sky", "dog, road, fish, car, grass", "sun, moon, water")
THRESHOLDS = (None, 0.3, 0.9)


def resident() -> int:
    """Bytes of memory that this process has."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")
def test_two_hundred_requests_from_eight_threads(server):
    url, desk = server
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
    before, runs = resident(), desk.tower_runs
    with ThreadPoolExecutor(8) as threads:
        replies = list(threads.map(one, range(200)))
    assert [status for _, status, _, _ in replies] == [200] * 200
    for kind, _, classes, labels in replies:
        assert (classes, labels) == wanted[kind]
    assert desk.tower_runs - runs == 200  # each upload is an image of its own
    # 200 photos' features are 170 MB, and kept while there is room; beyond them memory does not grow
    kept = desk._kept.nbytes + desk._answers.nbytes + desk._photos.nbytes
    assert resident() - before < kept + 2**26
    again = resident()
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda number: ask(url, SCENES[number % 4], WORDS[number % 3]).status, range(200)))
    assert resident() - again < 2**25
