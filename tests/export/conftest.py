"""Finished folders and what is made of them, once for a file of tests."""

from pathlib import Path

import exports
import pytest

from maskclip_jax.export.labels import open_labels
from maskclip_jax.export.picture import ExportOptions
from maskclip_jax.export.run import export


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """photos/, labels/ and segments/ of `tests/helpers/exports.py`."""
    folder = tmp_path_factory.mktemp("finished")
    exports.write_photos(folder / "photos")
    exports.write_labels(folder / "labels", folder / "photos")
    exports.write_segments(folder / "segments", folder / "photos")
    return folder


@pytest.fixture(scope="module")
def many(place) -> str:
    """300 classes, most of them nowhere, in a folder beside the labels, and its images in their own."""
    maps = exports.maps_of_many()
    exports.write_photos(place / "many photos", {file: labels.shape for file, labels in maps.items()})
    exports.write_labels(place / "many", place / "many photos", classes=exports.MANY, maps=maps)
    return "many"


@pytest.fixture
def made(place, tmp_path):
    """`made(format, **options)` exports the labels and returns (folder, notes)."""

    def make(form: str, source: str = "labels", **options):
        images = {"labels": str(place / "photos"), "many": str(place / "many photos")}.get(source)
        out = tmp_path / form
        return out, export(open_labels(place / source, images), form, out, ExportOptions(**options))

    return make
