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


@pytest.fixture
def made(place, tmp_path):
    """`made(format, **options)` exports the labels and returns (folder, notes)."""

    def make(form: str, source: str = "labels", **options):
        images = str(place / "photos") if source == "labels" else None
        out = tmp_path / form
        return out, export(open_labels(place / source, images), form, out, ExportOptions(**options))

    return make
