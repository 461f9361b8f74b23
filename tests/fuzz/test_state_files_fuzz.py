"""Some seven hundred damaged files of what `label` and `distill` keep, seeded: made again, or a UserError on one line.

A changed byte is noticed by the files' own checksums; values of other types are signed anew, as another version might.
"""

import io
import json
import random
import warnings

import numpy as np
import pytest
import tiny_distill
from mutations import most_memory, mutated_bytes, mutated_json

from maskclip_jax.data.sums import damaged_files, read_sums, with_digest, write_sums
from maskclip_jax.distill.checkpoint import FOLDER, about_of, has_checkpoints
from maskclip_jax.distill.run_folder import claim, read_config, read_text
from maskclip_jax.distill.run_log import MetricsFile, read_metrics
from maskclip_jax.errors import UserError
from maskclip_jax.label import folder as label_folder
from maskclip_jax.label.store import FileStore, Labelled, PartGone, RecordStore

ROUNDS = 60  # of every file
MEMORY = 2**28  # bytes that all mutations of one file may take
NAMES = ("dog", "cat", "sky")
SETTINGS = {"classes": list(NAMES), "short_side": None, "scales": [1.0]}


def attempt(content: bytes, *calls) -> int:
    """How many of the calls were refused, each in one short line."""
    messages = [refusal(content, call) for call in calls]
    for message in messages:
        assert message is None or ("\n" not in message and len(message) < 900), message
    return sum(message is not None for message in messages)


def refusal(content: bytes, call) -> str | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call()
    except UserError as error:
        return str(error)
    except BaseException as error:
        raise AssertionError(f"{type(error).__name__}: {error}\n{content[:3000]!r}") from error
    return None


def damage(path, rng, *, signed=False):
    """Yields `ROUNDS` damaged contents, each of which is at `path` meanwhile."""
    original, before = path.read_bytes(), most_memory()
    for _ in range(ROUNDS):
        is_json = path.suffix == ".json"
        content = mutated_json(original.decode(), rng) if is_json else mutated_bytes(original, rng)
        if signed and content.startswith(b"{") and rng.random() < 0.8:
            try:
                found = json.loads(content)
                found.pop("sha256", None)
                content = json.dumps(with_digest(found)).encode()
            except (ValueError, RecursionError):  # bytes were damaged
                pass
        path.write_bytes(content)
        yield content
    path.write_bytes(original)
    assert most_memory() - before < MEMORY


def labelled(rng) -> Labelled:
    labels = rng.integers(0, 3, (20, 24)).astype(np.uint8)
    cells = {"classes": rng.integers(0, 3, (4, 5, 2)).astype(np.uint8)}
    cells["probabilities"] = rng.random((4, 5, 2)).astype(np.float16)
    return Labelled("a/é", b"image", labels, (labels * 80).astype(np.uint8), cells, {"size": [20, 24]})


def recall(store, content: bytes):
    found = []
    assert attempt(content, lambda: found.append(store.recall("a/é"))) == 0
    return found[0]


@pytest.mark.slow
def test_shards_and_settings_of_label(tmp_path):
    found = {"shard": 0, "first": 0, "images": 2, "bytes": 9, "pixels": {"dog": 4, "cat": 0, "sky": 7}}
    found |= {"skipped": [{"name": "b", "reason": "torn", "index": 1}], "files": {"labels/a.png": "0" * 64}}
    found["settings"] = label_folder.settings_digest(SETTINGS)
    label_folder.write_shard(tmp_path, 0, 1, found)
    shard, rng, refused = tmp_path / label_folder.shard_file(0, 1), random.Random("shard"), 0
    for content in damage(shard, rng, signed=True):
        attempt(
            content,
            lambda: label_folder.read_shard(tmp_path, 0, 1),
            lambda: label_folder.damaged_shards(tmp_path, [0], 1),
            lambda: label_folder.missing_shards(tmp_path, 1),
        )
        refused += attempt(content, lambda: label_folder.finish(tmp_path, 1, SETTINGS))
    assert refused > ROUNDS // 3
    label_folder.begin(tmp_path, SETTINGS)
    for content in damage(tmp_path / label_folder.SETTINGS, rng):
        refused += attempt(content, lambda: label_folder.begin(tmp_path, SETTINGS))


@pytest.mark.slow
def test_masks_and_cells_of_label(tmp_path):
    """What is not exactly what was written counts as absent, so that it is made again."""
    store = FileStore(tmp_path, NAMES, confidence=True, cells=True)
    store.save(labelled(np.random.default_rng(0)))
    assert store.recall("a/é") is not None
    for path in sorted(path for path in tmp_path.rglob("*") if path.is_file()):
        original, recalled = path.read_bytes(), []
        for content in damage(path, random.Random(path.name)):
            recalled.append(recall(store, content))
            assert recalled[-1] is None or content == original
        assert len(recalled) == ROUNDS


@pytest.mark.slow
def test_records_that_wait(tmp_path):
    store = RecordStore(tmp_path, tmp_path, NAMES, 0, 1, {"confidence": True, "top_k": 2, "width": None})
    store.save(labelled(np.random.default_rng(0)))
    (part,) = (path for path in tmp_path.rglob("*") if path.is_file())
    original = part.read_bytes()
    assert store.recall("a/é") is not None
    for content in damage(part, random.Random("part")):
        assert recall(store, content) is None or content == original
    part.unlink()
    with pytest.raises(PartGone):
        store.seal(["a/é"])


@pytest.mark.slow
def test_files_of_a_run(tmp_path):
    config, rng = tiny_distill.config_of(mode="supervised"), random.Random("run")
    claim(config, tmp_path, resume=False)
    for content in damage(tmp_path / "config.json", rng):
        attempt(content, lambda: read_config(tmp_path), lambda: claim(config, tmp_path, resume=True))

    buffer = io.BytesIO()
    np.save(buffer, np.eye(5, dtype=np.float32))
    (tmp_path / "text.npy").write_bytes(buffer.getvalue())
    refused = sum(attempt(content, lambda: read_text(tmp_path)) for content in damage(tmp_path / "text.npy", rng))
    assert refused > ROUNDS // 4

    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step, "train/loss": 0.5 / step}) + "\n" for step in range(1, 9)))
    original = path.read_text().splitlines()
    for content in damage(path, rng):
        attempt(content, lambda: read_metrics(tmp_path))
    for _ in range(ROUNDS):
        lines = [*original]
        lines[rng.randrange(8)] = mutated_json(original[0], rng).decode(errors="replace")
        path.write_bytes("\n".join(lines).encode())
        attempt(path.read_bytes(), lambda: MetricsFile(tmp_path, 4).close())
        assert {record["step"] for record in read_metrics(tmp_path)} <= set(range(5))

    step = tmp_path / FOLDER / "00000004"
    step.mkdir(parents=True)
    (step / "data").write_bytes(bytes(100))
    write_sums(step, {"about": {"config.json": "0" * 64}, "score": 0.5})
    assert damaged_files(step) == ""
    for content in damage(step / "sums.json", rng, signed=True):
        attempt(content, lambda: read_sums(step), lambda: about_of(tmp_path), lambda: has_checkpoints(tmp_path))
        attempt(content, lambda: damaged_files(step))
    for content in damage(step / "data", rng):
        assert damaged_files(step) != "" or content == bytes(100)
