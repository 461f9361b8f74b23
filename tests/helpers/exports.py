"""Finished folders of `label` and `segment` without a model, made of whole numbers alone: the same on every machine."""

import hashlib
import io
import json
import os
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from maskclip_jax.data.images import read_image, stored_image
from maskclip_jax.data.whole_files import as_text
from maskclip_jax.label import folder as label_files
from maskclip_jax.label.records import write_tfds_metadata
from maskclip_jax.label.store import FileStore, Labelled, RecordStore
from maskclip_jax.segment.pixels import PixelMaps
from maskclip_jax.segment.predict import Segmentation, segmentation_of

CLASSES = ("dog", "wet: grass, #2", "Küche 台所")
FILES = ("a.jpg", "sub/a.jpg", "sub/b.c (1) ü.png", "sub/images/d.jpg", "e.png")
SHAPES = ((37, 53), (24, 24), (1, 1), (40, 17), (9, 130))
TURNED, GREY = "sub/a.jpg", "e.png"  # stored lying down; without colours
MANY = tuple(f"thing, no. {i} & <ü>" for i in range(300))


def label_maps(classes: int = len(CLASSES)) -> dict[str, np.ndarray]:
    """By name: blots with holes, single pixels, pixels that touch by a corner, and a few of no class (255)."""
    random, maps = np.random.default_rng(7), {}
    for file, (height, width) in zip(FILES, SHAPES, strict=True):
        coarse = np.kron(random.integers(0, classes, (height // 6 + 1, width // 6 + 1)), np.ones((6, 6), int))
        fine, noisy = random.integers(0, classes, (height, width)), random.integers(0, 8, (height, width))
        labels = np.where(noisy == 0, fine, coarse[:height, :width])
        labels[random.integers(0, 40, (height, width)) == 0] = 255
        maps[os.path.splitext(file)[0]] = labels.astype(np.uint8)
    maps[os.path.splitext(FILES[2])[0]][:] = 1
    return maps


def maps_of_many() -> dict[str, np.ndarray]:
    """By file, of classes `MANY`: those about the end of a byte; an image of no class (65535); one of one class."""
    random = np.random.default_rng(10)
    known = np.array([0, 127, 254, 255, 256, 299, 65535])
    mixed = np.kron(known[random.integers(0, 7, (4, 5))], np.ones((4, 5), int))
    maps = {"all none.png": np.full((16, 24), 65535), "ß x/of ü, (one).png": np.full((12, 31), 255), "mixed.jpg": mixed}
    return {file: labels.astype(np.uint16) for file, labels in maps.items()}


def confidences(maps: dict[str, np.ndarray] | None = None) -> dict[str, np.ndarray]:
    """By name: 0..255."""
    random, maps = np.random.default_rng(8), label_maps() if maps is None else maps
    return {name: random.integers(0, 256, labels.shape).astype(np.uint8) for name, labels in maps.items()}


def write_photos(folder: Path, shapes: dict[str, tuple[int, int]] | None = None) -> Path:
    """The images that the maps are of."""
    random = np.random.default_rng(9)
    for file, shape in (shapes or dict(zip(FILES, SHAPES, strict=True))).items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(random.integers(0, 256, (*shape, 3)).astype(np.uint8))
        exif = Image.Exif()
        if file == TURNED:
            image, exif[0x0112] = image.transpose(Image.Transpose.ROTATE_90), 6
        image.convert("L" if file == GREY else "RGB").save(folder / file, exif=exif)
    return folder


def write_labels(
    out: Path, photos: Path, *, records: bool = False, sure: bool = True, classes: tuple[str, ...] = CLASSES, maps=None
) -> Path:
    """What `label` leaves, as files or records, of maps by file."""
    originals = dict(zip(FILES, label_maps().values(), strict=True)) if maps is None else maps
    maps = {os.path.splitext(file)[0]: labels for file, labels in originals.items()}
    known = confidences(maps)
    settings = {"format": "records" if records else "png"}
    label_files.begin(out, settings)
    features = {"confidence": sure, "top_k": 0, "width": None}
    store = FileStore(out, classes, confidence=sure, cells=False)
    if records:
        store = RecordStore(out, out, classes, 0, 1, features)
    files = {}
    for file, (name, labels) in zip(originals, maps.items(), strict=True):
        encoded = stored_image(photos / file, (photos / file).read_bytes())[0]
        saved = Labelled(name, encoded, labels, known[name] if sure else None, {}, {})
        if records:  # which count pixels of classes alone
            store.classes = 256
        files |= store.save(saved).files
    found = {"images": len(maps), "bytes": 1, "pixels": dict.fromkeys(classes, 0), "skipped": [], "settings": ""}
    label_files.write_shard(out, 0, 1, found | {"files": store.seal(list(maps)) or files})
    if records:
        write_tfds_metadata(out, 1, features, classes)
    label_files.finish(out, 1, settings)
    return out


def write_segments(out: Path, photos: Path, maps=None) -> Path:
    """What `segment` leaves of maps by file; a class's confidence is the mean of its pixels'."""
    maps, classes = maps or dict(zip(FILES, label_maps().values(), strict=True)), ("background", *CLASSES[:2])
    for number, (file, labels) in enumerate(maps.items()):
        sure = confidences(maps)[file].astype(np.float32) / 255
        found: Segmentation = segmentation_of(PixelMaps(np.minimum(labels, 2), sure, None), classes)
        found.save(out, photos / file if file != TURNED else None, name=f"{number}")
        path = out / f"{number}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"image": as_text(photos / file)}))
    keys = ("command", "settings", "versions", "skipped")
    (out / "segment.json").write_text(json.dumps({key: [] for key in keys}))
    return out


def upright(photos: Path) -> dict[str, np.ndarray]:
    """The photos' pixels by name."""
    return {os.path.splitext(file)[0]: read_image(photos / file) for file in FILES}


def digest(folder: Path) -> str:
    """SHA-256 of an export: texts by their bytes, masks by their pixels (each zlib packs its way), without images."""
    found = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        members = {"": path.read_bytes()}
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                members = {name: archive.read(name) for name in sorted(archive.namelist())}
        for name, content in members.items():
            where = f"{path.relative_to(folder)} {name}"
            if where.startswith(("images/", "data/")):
                continue
            if content.startswith(b"\x89PNG"):
                pixels = np.asarray(Image.open(io.BytesIO(content)))
                where, content = f"{where} {pixels.shape} {pixels.dtype}", pixels.tobytes()
            found.update(f"{where} {len(content)} ".encode() + content)
    return found.hexdigest()
