"""What `serve` computes, without HTTP: images in, masks and files out. Nothing is written to disk.

An image gets a name that cannot be guessed and gives access to it; the last images, the features of the last
images and the last answers are kept in memory. For one thread at a time: `server.Turns` ensures it.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import secrets
import time
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from maskclip_jax.data.buckets import Shape
from maskclip_jax.data.images import encoded_png, label_png, read_image
from maskclip_jax.data.vocabulary import class_palette
from maskclip_jax.data.whole_files import json_text, shipped
from maskclip_jax.errors import UserError
from maskclip_jax.segment.feature_cache import Kept, class_probability, keep_features, read_features, room_for
from maskclip_jax.segment.files import output_names, result_record
from maskclip_jax.segment.options import with_overrides
from maskclip_jax.segment.pixels import needs_every_pixel
from maskclip_jax.segment.predict import Segmentation, iter_segmentations
from maskclip_jax.segment.settings import PredictionSettings, prediction_settings
from maskclip_jax.visualize import heat_map
from maskclip_jax.web.cache import Memory
from maskclip_jax.web.downloads import FORMATS, zipped
from maskclip_jax.web.limits import check_cost, check_every_pixel, check_student
from maskclip_jax.web.models import Models, Reader
from maskclip_jax.web.request import SegmentRequest

SHOWN = 768  # pixels of the long side on the page; files have them all
MEGABYTE = 2**20


class Gone(UserError):
    """The image or answer is not, or no longer, in memory."""


class Photo(NamedTuple):
    """An image as it came."""

    name: str
    data: bytes
    size: Shape


class Answer(NamedTuple):
    """What the files of an answer are made from."""

    request: SegmentRequest
    settings: PredictionSettings | None  # None: a student's
    names: tuple[str, ...]
    shown: bytes  # PNG: red and green are the class's index (low and high byte), blue is its probability


class File(NamedTuple):
    """Something to send."""

    data: bytes
    type: str
    name: str | None = None  # what a browser saves it as


class Session:
    """Serves one visitor's request at a time."""

    def __init__(self, models: Models, *, keep: int = 512 * MEGABYTE, most_pixels: int = 50_000_000):
        """`keep`: bytes of features, and a quarter of it each for images and answers; `most_pixels`: of an image."""
        self.models = models
        self.most_pixels = most_pixels
        self.tower_runs = 0
        self._photos: Memory[Photo] = Memory(keep // 4)
        self._kept: Memory[Kept] = Memory(keep)
        self._answers: Memory[Answer] = Memory(keep // 4)

    @property
    def nbytes(self) -> int:
        """Of all photos, features and answers that are kept."""
        return self._photos.nbytes + self._kept.nbytes + self._answers.nbytes

    def receive(self, data: bytes, name: str) -> dict[str, Any]:
        """Takes in an image file. Raises UserError when it is none."""
        pixels = self._decoded(data, name)
        token = secrets.token_urlsafe(12)
        self._photos.put(token, Photo(name, data, pixels.shape[:2]), len(data) + 1000)
        return {"image": token, "name": name, "height": pixels.shape[0], "width": pixels.shape[1]}

    def picture(self, token: str) -> File:
        """The image as the model is shown it: upright, 8-bit RGB, at most `SHOWN` pixels on its long side."""
        pixels = self._small(self._photo(token))
        file, small = io.BytesIO(), pixels.size < 2**20
        Image.fromarray(pixels).save(file, **({"format": "PNG"} if small else {"format": "JPEG", "quality": 92}))
        return File(file.getvalue(), "image/png" if small else "image/jpeg")

    def scene(self, name: str) -> File:
        """The file of a shipped scene."""
        if name not in scene_names():
            raise Gone(f"a scene is one of {scene_names()[0]} to {scene_names()[-1]}, got {name}: choose another")
        return File(self._photo(name).data, "image/jpeg")

    def segment(self, request: SegmentRequest) -> dict[str, Any]:
        """The masks of one question: what `segment` writes as JSON, and with it colours, times and the files' paths.

        Areas and confidences are those of the size shown; an image of at most `SHOWN` pixels has no other.
        """
        photo, clock = self._photo(request.image), time.perf_counter
        began = clock()
        settings = self._settings(request)
        words = clock()
        if not _keeps(settings):
            result, ran, seen = self._whole(request, settings), True, words
        else:
            kept, ran = self._features(request, settings)
            seen, columns = clock(), room_for(len(settings.word_class))
            result = read_features(kept, settings, size=shown_size(photo.size), columns=columns)
        shown = Image.fromarray(_maps(result)).resize(shown_size(photo.size)[::-1], Image.Resampling.NEAREST)
        maps = encoded_png(shown, compress_level=1)  # speed, not size: it goes as far as the next session
        masks = clock()
        token = secrets.token_urlsafe(12)
        rows = 0 if settings is None else settings.classifier.nbytes
        self._answers.put(token, Answer(request, settings, result.classes, maps), len(maps) + rows + request.nbytes)
        record = result_record(photo.name, result) | {"height": photo.size[0], "width": photo.size[1]}
        for entry, colour in zip(record["classes"], class_palette(result.classes), strict=True):
            entry["color"] = "#" + bytes(colour).hex()
        record["seconds"] = {"words": words - began, "image": seen - words, "masks": masks - seen, "all": masks - began}
        record["image_tower_ran"] = ran
        stem, path = stem_of(photo.name), f"/api/answers/{token}"
        kinds = {"labels": "labels.png", "json": "result.json", "overlay": "overlay.png", "shown": "shown.png"}
        record["files"] = {kind: f"{path}/{file}" for kind, file in kinds.items()} | {"heat": f"{path}/heat/"}
        record["files"]["exports"] = {form: f"{path}/{form}.zip" for form in FORMATS}
        record["names"] = {"labels": f"{stem}_labels.png", "json": f"{stem}.json", "overlay": f"{stem}_overlay.png"}
        return record

    def file(self, token: str, kind: str) -> File:
        """One of the files of an answer: those that `segment` writes, in the image's own size, byte for byte."""
        answer = self._answer(token)
        if kind == "shown.png":
            return File(answer.shown, "image/png")
        photo = self._photo(answer.request.image)
        stem = stem_of(photo.name)
        kinds = ("labels.png", "result.json", "overlay.png", *(f"{form}.zip" for form in FORMATS))
        if kind not in kinds:
            raise Gone(f"an answer has {', '.join(kinds)} and shown.png, got {kind}: choose one of them")
        result = self._result(answer)
        if kind.endswith(".zip"):
            data = zipped(kind.removesuffix(".zip"), photo.name, photo.data, result)
            return File(data, "application/zip", f"{stem}_{kind}")
        palette = class_palette(result.classes)
        if kind == "labels.png":
            return File(label_png(result.labels, palette), "image/png", f"{stem}_labels.png")
        if kind == "result.json":
            return File(json_text(result_record(photo.name, result)).encode(), "application/json", f"{stem}.json")
        picture = result.overlay(self._decoded(photo.data, photo.name))
        return File(encoded_png(Image.fromarray(picture)), "image/png", f"{stem}_overlay.png")

    def heat(self, token: str, index: int) -> File:
        """The heat map of one class alone: its probability at every pixel shown."""
        answer = self._answer(token)
        settings = answer.settings
        if not 0 <= index < len(answer.names):
            raise Gone(f"this answer has classes 0 to {len(answer.names) - 1}, got {index}: choose one of them")
        small = self._small(self._photo(answer.request.image))
        if not _keeps(settings):
            probabilities = self._whole(answer.request, settings, small, return_probabilities=True).probabilities
            assert probabilities is not None
            scores = probabilities[..., index]
        else:
            kept, _ = self._features(answer.request, settings)
            columns = room_for(len(settings.word_class))
            scores = class_probability(kept, settings, index, size=small.shape[:2], columns=columns)
        picture = heat_map(small, scores, low=0.0, name=f"probability of {answer.names[index]}")
        return File(encoded_png(Image.fromarray(picture)), "image/png")

    def _settings(self, request: SegmentRequest) -> PredictionSettings | None:
        """None for a student, which has its own."""
        reader = self.models.reader(request.model)
        if not isinstance(reader, Reader):
            return None
        classifier = reader.classifier(request.words, request.options.templates)
        return prediction_settings(request.classes, reader.pretrained, request.options, classifier=classifier)

    def _result(self, answer: Answer) -> Segmentation:
        """What `segment` finds in the image, in its own size."""
        if not _keeps(answer.settings):
            return self._whole(answer.request, answer.settings)
        return read_features(self._features(answer.request, answer.settings)[0], answer.settings)

    def _whole(
        self,
        request: SegmentRequest,
        settings: PredictionSettings | None,
        pixels: UInt8[np.ndarray, "H W 3"] | None = None,
        **more: Any,
    ) -> Segmentation:
        """The answer of a student, or one with PAMR or several views, from the pixels (the image's): none is kept."""
        if pixels is None:
            photo = self._photo(request.image)
            pixels = self._decoded(photo.data, photo.name)
        self.tower_runs += 1
        if settings is None:
            student = self.models.reader(request.model)
            check_student(pixels.shape[:2], student)
            if more:
                check_every_pixel(pixels.shape[:2], len(request.classes))
            (found,) = student.iter_segmentations([pixels], request.classes, with_overrides(request.options, more))
            return found
        check_every_pixel(pixels.shape[:2], len(settings.word_class))
        for scale in settings.options.scales:
            check_cost(pixels.shape[:2], dataclasses.replace(settings, times=scale), self._kept.budget)
        (found,) = iter_segmentations(
            [pixels], dataclasses.replace(settings, options=with_overrides(settings.options, more))
        )
        return found

    def _features(self, request: SegmentRequest, settings: PredictionSettings) -> tuple[Kept, bool]:
        """The kept features of an image, and whether the image tower had to run for them."""
        key = (request.image, request.model or self.models.names[0], request.options.method, settings.options.windows)
        kept = self._kept.get(key)
        if kept is not None:
            return kept, False
        photo = self._photo(request.image)
        check_cost(photo.size, settings, self._kept.budget)
        kept = keep_features(self._decoded(photo.data, photo.name), settings)
        for batch in kept.batches:
            batch.features.block_until_ready()  # so that its time is not counted as the masks'
        self.tower_runs += 1
        return self._kept.put(key, kept, kept.nbytes), True

    def _photo(self, token: str) -> Photo:
        if token in scene_names():
            file = _scenes() / f"{token}.jpg"
            with Image.open(file) as image:
                return Photo(file.name, file.read_bytes(), image.size[::-1])
        photo = self._photos.get(token)
        if photo is None:
            raise Gone("an image is kept for as long as there is room, but this one is gone: load it again")
        return photo

    def _answer(self, token: str) -> Answer:
        answer = self._answers.get(token)
        if answer is None:
            raise Gone("an answer is kept for as long as there is room, but this one is gone: send the request again")
        return answer

    def _small(self, photo: Photo) -> UInt8[np.ndarray, "H W 3"]:
        pixels, size = self._decoded(photo.data, photo.name), shown_size(photo.size)
        if size == pixels.shape[:2]:
            return pixels
        return np.asarray(Image.fromarray(pixels).resize(size[::-1], Image.Resampling.LANCZOS))

    def _decoded(self, data: bytes, name: str) -> UInt8[np.ndarray, "H W 3"]:
        return read_image(name, data, most_pixels=self.most_pixels)


def _keeps(settings: PredictionSettings | None) -> TypeGuard[PredictionSettings]:
    """Whether an answer is read from features that are kept: not a student's, nor one with PAMR or several views."""
    return settings is not None and not needs_every_pixel(settings)


@functools.cache
def scene_names() -> tuple[str, ...]:
    """Names of the shipped scenes."""
    return tuple(sorted(path.stem for path in _scenes().iterdir()))


def _scenes() -> Path:
    return shipped("assets", "scenes", "images")


def shown_size(size: Shape) -> Shape:
    """Height and width on the page of an image of that size: at most `SHOWN`."""
    scale = min(1.0, SHOWN / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def stem_of(name: str) -> str:
    """What `segment` calls the files of an image of that name."""
    return output_names([Path(name)])[Path(name)]


def _maps(result: Segmentation) -> UInt8[np.ndarray, "H W 3"]:
    labels = result.labels.astype(np.uint16)
    confidence = np.rint(255 * np.clip(result.confidence, 0, 1)).astype(np.uint8)
    return np.dstack([(labels & 255).astype(np.uint8), (labels >> 8).astype(np.uint8), confidence])
