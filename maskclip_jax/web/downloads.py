"""One answer of the page as the files of other tools, in a zip archive: what `run.py export` writes of one image."""

from __future__ import annotations

import io
import tempfile
import zipfile
from pathlib import Path

from maskclip_jax.export.labels import Masks
from maskclip_jax.export.picture import ExportOptions
from maskclip_jax.export.run import export
from maskclip_jax.segment.predict import Segmentation

FORMATS = ("coco", "coco-panoptic", "cvat", "label-studio", "fiftyone", "yolo", "voc")


class OneImage:
    """The masks of one image as a source of `export` (see `export.labels`)."""

    def __init__(self, name: str, data: bytes, result: Segmentation):
        self.classes, self.names, self.sure, self.identity = result.classes, [Path(name).stem], True, ""
        self._name, self._data, self._result = name, data, result

    def read(self, index: int) -> Masks:
        return self._result.labels, self._result.confidence

    def image(self, index: int) -> bytes:
        return self._data

    def original(self, index: int) -> str:
        """The image's name, with its suffix."""
        return self._name


def zipped(form: str, name: str, data: bytes, result: Segmentation) -> bytes:
    """A zip archive of the masks of an image in a format of `FORMATS`, and of the image.

    The files lie in the system's temporary folder for the moment that this takes. Raises UserError where the format
    does not take these classes.
    """
    file = io.BytesIO()
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        out = Path(folder) / "export"
        export(OneImage(name, data, result), form, out, ExportOptions(media="copy"))
        files = sorted(p for p in out.rglob("*") if p.is_file())
        if [path.suffix for path in files] == [".zip"]:  # CVAT takes an archive as it is
            return files[0].read_bytes()
        for path in files:
            archive.write(path, path.relative_to(out))
    return file.getvalue()
