"""The emoji scenes as a TFDS data set, so that they travel the same road as Pascal VOC.

    EmojiScenes("experiments/embedded/heldout.zip", data_dir="data").download_and_prepare()
    open_source("tfds:emoji_scenes?split=heldout&label=label&data_dir=data")

This module imports TFDS and nothing imports this module: who only segments never pays for it. Files are handed over
still encoded and stored as array_record, so neither writing nor reading needs TensorFlow.
"""

import os
import zipfile
from collections.abc import Iterator
from pathlib import Path

import tensorflow_datasets as tfds

from maskclip_jax.data.scene_classes import SCENE_CLASSES
from maskclip_jax.errors import UserError

ONE_SPLIT = "heldout"  # the name of the split where a folder holds `images/` itself


class EmojiScenes(tfds.core.GeneratorBasedBuilder):
    """Scenes with exact masks of 66 classes, from `SPLIT/images/*.jpg` and `SPLIT/labels/*.png` (same stems).

    Features: `image` uint8 [H, W, 3]; `label` uint8 [H, W, 1], indices into SCENE_CLASSES; `name`, the stem. Examples
    keep the order of their names.
    """

    VERSION = tfds.core.Version("1.0.0")
    # TFDS looks beside the code for checksums of downloads. There are none, and looking needs importlib_resources,
    # which TFDS 4.9.10 does not declare on today's Python.
    code_path = None

    def __init__(self, source: str | os.PathLike | None = None, *, file_format: str = "array_record", **kwargs):
        """Names the scenes.

        Args:
            source: a zip file or folder with one folder for each split, or a folder that is one split ("heldout");
                None to read what is prepared already, as `tfds.builder("emoji_scenes")` does.
            file_format: of the records; `as_data_source` needs "array_record".
            **kwargs: `data_dir` and others of `tfds.core.DatasetBuilder`.

        Raises:
            UserError: no scenes there, or an image without its mask.
        """
        self._splits = None if source is None else _splits(Path(source))
        super().__init__(file_format=file_format, **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=f"Emoji on procedural backgrounds, {len(SCENE_CLASSES)} classes: {', '.join(SCENE_CLASSES)}.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg"),
                    "label": tfds.features.Image(shape=(None, None, 1), encoding_format="png"),
                    "name": tfds.features.Text(),
                }
            ),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        del dl_manager  # nothing to download
        if self._splits is None:
            raise UserError("scenes are prepared from files, but no source came: EmojiScenes(ZIP_OR_FOLDER, …)")
        return {split: self._generate_examples(images) for split, images in self._splits.items()}

    def _generate_examples(self, images: list[zipfile.Path | Path]) -> Iterator[tuple[int, dict]]:
        for key, image in enumerate(images):
            label = _label_of(image)
            name = Path(image.name).stem
            if isinstance(image, Path):
                yield key, {"image": str(image), "label": str(label), "name": name}
            else:
                with image.open("rb") as image_file, label.open("rb") as label_file:
                    yield key, {"image": image_file, "label": label_file, "name": name}


def _label_of(image: zipfile.Path | Path) -> zipfile.Path | Path:
    return image.parent.parent / "labels" / f"{Path(image.name).stem}.png"


def _splits(source: Path) -> dict[str, list[zipfile.Path | Path]]:
    """The image files of each split, sorted by name; every one has its mask."""
    if not source.exists():
        raise UserError(f"scenes are a zip file or a folder, but {source} does not exist: check the path")
    if not source.is_dir() and not zipfile.is_zipfile(source):
        raise UserError(f"scenes are a zip file or a folder, but {source} is neither: check the path")
    root = source if source.is_dir() else zipfile.Path(source)
    if (root / "images").is_dir():
        folders = {ONE_SPLIT: root}
    else:
        folders = {folder.name: folder for folder in root.iterdir() if (folder / "images").is_dir()}
    splits = {}
    for split in sorted(folders):
        images = (folders[split] / "images").iterdir()
        splits[split] = sorted((path for path in images if path.name.endswith(".jpg")), key=lambda path: path.name)
        for image in splits[split]:
            if not _label_of(image).is_file():
                raise UserError(f"every scene has a mask, but {_label_of(image)} is missing: add it")
    if not any(splits.values()):
        raise UserError(f"scenes lie in SPLIT/images/*.jpg, but {source} has none: name a zip or folder that does")
    return splits
