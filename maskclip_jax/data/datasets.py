"""TFDS builders over files that you have: VOC, Pascal Context, COCO-Stuff, ADE20K, Cityscapes, folders, emoji scenes.

    Voc2012("~/VOCdevkit", config="voc20", data_dir="data").download_and_prepare()
    open_source("tfds:voc2012/voc20?split=val&label=label&name=name&data_dir=data")

or on the command line, `python run.py prepare voc2012 ~/VOCdevkit --data-dir data`. Nothing is downloaded. Examples are
`image` uint8 [H, W, 3], `label` uint8 [H, W, 1] (class indices, 255 = ignore; with more than 255 classes uint16 and
65535 = ignore) and `name`, in the order of the split's list; `builder.info.metadata` holds class names, colours and the
unseen classes of the zero-shot split.

This module imports TFDS, so it is imported inside functions only. Records are array_record,
so neither writing nor reading needs TensorFlow. Which files lie where is in `layouts.py`, what pixels mean is in
`masks.py`.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core.dataset_builder import ShardBasedBuilder
from tensorflow_datasets.proto import tf_example_pb2

from maskclip_jax.data.folders import find_pairs
from maskclip_jax.data.images import IGNORE, ignored_label, read_content, stored_image, stored_label
from maskclip_jax.data.layouts import LAYOUTS, Pair, find_examples
from maskclip_jax.data.masks import OtherMasks, read_mask, value_table
from maskclip_jax.data.vocabulary import SCENE_CLASSES, class_palette, class_set, unseen_classes
from maskclip_jax.data.whole_files import as_text, cut, locked, reason, write_json
from maskclip_jax.errors import UserError

ON_ERROR = ("stop", "skip")
SKIPPED = "skipped.json"  # beside the records
SHARD = 1000  # examples in a file of records


def stable_record(record: bytes) -> bytes:
    """The same record with its features in order of their names: protobuf's own order changes from run to run."""
    example = tf_example_pb2.Example  # pyright: ignore[reportAttributeAccessIssue]: made when the module is imported
    return example.FromString(record).SerializeToString(deterministic=True)


_table = functools.cache(value_table)


class _LocalInfo(tfds.core.DatasetInfo):
    """Of files that the user has: no look-up in Google's bucket, which would leave a temporary folder too."""

    def initialize_from_bucket(self) -> None:
        pass


class _StableWriter(tfds.core.ExampleWriter):
    def write(self, path, examples):
        return super().write(path, ((key, stable_record(record)) for key, record in examples))


# Shard by shard: TFDS's other builder sorts all examples, which takes their size in memory, and TensorFlow above 1 GB.
class Corpus(ShardBasedBuilder, skip_registration=True):
    """What all builders share: files in, encoded examples out, and what happens to those that cannot be read.

    `source` is where the files are; None reads what is prepared already. `on_error="skip"` leaves out images and masks
    that are damaged or do not fit (never files that are missing), and writes their names and reasons to skipped.json.
    """

    VERSION = tfds.core.Version("1.0.0")
    # TFDS looks beside the code for checksums of downloads. There are none, and looking needs importlib_resources,
    # which TFDS 4.9.10 does not declare on today's Python.
    code_path = None
    title = "images"
    remedy = "check the masks"

    def __init__(self, source: str | os.PathLike | None = None, *, on_error: str = "stop", **kwargs):
        """Finds the files; `kwargs` (`data_dir`, `config` …) are those of `tfds.core.DatasetBuilder`.

        Raises:
          UserError: files are missing, or an option is none.
        """
        if on_error not in ON_ERROR:
            raise UserError(f"on_error is one of {', '.join(ON_ERROR)}, got {on_error!r}: choose one")
        self.on_error, self.skipped = on_error, []
        self.pairs = None if source is None else self.find(Path(os.path.expanduser(source)))
        self.report: Callable[[int], object] = lambda done: None  # told how many examples were looked at
        known = [config.name for config in self.BUILDER_CONFIGS]
        if isinstance(config := kwargs.get("config"), str) and config not in known:
            remedy = f"choose among {', '.join(known)}" if known else "there are none, leave it out"
            raise UserError(f"{self.title} has no config {cut(config)!r}: {remedy}")
        super().__init__(**({"file_format": "array_record"} | kwargs))

    def find(self, source: Path) -> Mapping[str, Sequence[Pair]]:
        """The files of every split. Raises UserError."""
        raise NotImplementedError

    def class_names(self) -> tuple[str, ...] | None:
        """Names of the label values; None where they have none."""
        raise NotImplementedError

    @property
    def background(self) -> bool:
        """Whether class 0 is the background."""
        return False

    @property
    def has_masks(self) -> bool:
        """Whether examples have a label."""
        return True

    def unseen(self) -> tuple[str, ...]:
        """Classes without annotation in the zero-shot split."""
        return ()

    def _info(self) -> tfds.core.DatasetInfo:
        features = {"image": tfds.features.Image(shape=(None, None, 3))}
        names = self.class_names()
        ignore = IGNORE if names is None else ignored_label(len(names))
        if self.has_masks:
            features["label"] = tfds.features.Image(shape=(None, None, 1), encoding_format="png")
            if ignore != IGNORE:  # TFDS reads 16-bit images with OpenCV alone, and tensors always
                zipped = tfds.features.Encoding.ZLIB
                features["label"] = tfds.features.Tensor(shape=(None, None, 1), dtype=np.uint16, encoding=zipped)
        features["name"] = tfds.features.Text()
        metadata = {"ignore": ignore, "unseen": list(self.unseen())}
        if names is not None:
            metadata |= {"classes": list(names), "palette": class_palette(names).tolist()}
        return _LocalInfo(
            builder=self,
            description=f"{self.title}, {'as they are' if names is None else f'{len(names)} classes'}.",
            features=tfds.features.FeaturesDict(features),
            metadata=tfds.core.MetadataDict(metadata),
            disable_shuffling=True,
        )

    def _example_writer(self) -> tfds.core.ExampleWriter:
        return _StableWriter(file_format=self.info.file_format)

    def download_and_prepare(self, **kwargs) -> None:
        """Writes the records, and the list of what was left out; all of it or nothing.

        Raises:
          UserError: an image or mask cannot be used, or nothing can be written.
        """
        folder = Path(self.data_dir)
        try:
            with locked(folder.parent / ".lock", str(folder)):
                for path in folder.parent.glob("incomplete.*"):  # of a run that was killed
                    shutil.rmtree(path, ignore_errors=True)
                super().download_and_prepare(**kwargs)
                if self.skipped:
                    write_json(folder / SKIPPED, self.skipped)
        except BaseException as error:
            downloads = Path(self._data_dir_root) / "downloads"  # which TFDS makes, and which stays empty
            for path in (downloads / "extracted", downloads, *list(folder.parents)[:2]):
                with contextlib.suppress(OSError):
                    path.rmdir()
            if isinstance(error, UserError) or not isinstance(error, Exception):
                raise
            why = reason(error)  # RuntimeError of array_record, OSError …
            raise UserError(f"records must be writable, but {folder} is not ({why}): make room, run again") from error

    _log_download_bytes = _log_download_done = lambda self: None  # TFDS would say that it downloads

    def _shard_iterators_per_split(self, dl_manager: tfds.download.DownloadManager) -> dict[str, list[Callable]]:
        del dl_manager  # nothing to download
        if self.pairs is None:
            name = type(self).__name__
            raise UserError(f"{self.title} is prepared from files, got no source: {name}(FOLDER, …)")
        self.skipped, self._made = [], collections.Counter()
        return {
            split: [
                functools.partial(self._examples, split, pairs, range(len(pairs))[start : start + SHARD])
                for start in range(0, len(pairs), SHARD)
            ]
            for split, pairs in self.pairs.items()
        }

    def _examples(self, split: str, pairs: Sequence[Pair], keys: Sequence[int]) -> Iterator[tuple[int, dict]]:
        for key in keys:
            pair = pairs[key]
            try:
                example = self._example(pair, _table(pair.values, background=self.background))
            except (UserError, OSError) as error:
                if self.on_error == "stop" or isinstance(error, OtherMasks):
                    raise UserError(str(error)) from error
                self.skipped.append({"split": split, "name": pair.name, "reason": str(error)})
                continue
            self._made[split] += 1
            self.report(len(self.skipped) + self._made.total())
            yield key, example
            example.clear()  # it is written, and TFDS keeps what it counts until the shard's end
        if keys[-1] == len(pairs) - 1 and not self._made[split]:
            why = self.skipped[-1]["reason"]
            raise UserError(f"a split has examples, but none of {len(pairs)} in {split} is usable, the last: {why}")

    def _example(self, pair: Pair, table) -> dict:
        image, shape = stored_image(pair.image, read_content(pair.image))
        example = {"image": image, "name": as_text(pair.name)}
        if not self.has_masks:
            return example
        labels = read_mask(pair.label, table, remedy=self.remedy)
        if labels.shape != shape:
            raise UserError(
                f"a mask has its image's size {list(shape)}, but {pair.label} has {list(labels.shape)}: make it again"
            )
        return example | {"label": stored_label(labels) if labels.dtype == np.uint8 else labels[..., None]}


class _Standard(Corpus, skip_registration=True):
    """A data set of the table in `layouts.py`."""

    layout: str

    def __init__(self, source: str | os.PathLike | None = None, *, splits: Sequence[str] | None = None, **kwargs):
        """`splits`: which to prepare; None takes those whose files are there. Otherwise as `Corpus`."""
        self._wanted = None if splits is None else tuple(splits)
        super().__init__(source, **kwargs)

    def find(self, source: Path) -> Mapping[str, Sequence[Pair]]:
        return find_examples(LAYOUTS[self.layout], source, self._wanted)

    @property
    def title(self) -> str:
        return LAYOUTS[self.layout].title

    @property
    def remedy(self) -> str:
        return f"take the masks of {self.title} from {LAYOUTS[self.layout].origin}"

    @property
    def _classes(self) -> tuple[str, bool]:
        assert self.builder_config is not None  # each of them has configs
        return LAYOUTS[self.layout].configs[self.builder_config.name]

    @property
    def background(self) -> bool:
        return self._classes[1]

    def class_names(self) -> tuple[str, ...]:
        return ("background",) * self.background + tuple(str(name) for name in class_set(self._classes[0]))

    def unseen(self) -> tuple[str, ...]:
        name = self._classes[0]
        return unseen_classes(name) if name in ("voc20", "context59", "coco-stuff171") else ()


def _configs(layout: str) -> list[tfds.core.BuilderConfig]:
    return [
        tfds.core.BuilderConfig(name=name, description=f"{classes}, background {'as class 0' if own else 'ignored'}")
        for name, (classes, own) in LAYOUTS[layout].configs.items()
    ]


class Voc2012(_Standard):
    """Pascal VOC 2012: train, val, trainval, and with SBD's SegmentationClassAug trainaug. Configs voc20, voc21."""

    layout, BUILDER_CONFIGS = "voc2012", _configs("voc2012")


class PascalContext(_Standard):
    """Pascal Context over VOC 2010, from 459-class .mat or PNG masks or mmsegmentation's PNGs: context59, context60."""

    layout, BUILDER_CONFIGS = "pascal_context", _configs("pascal_context")


class CocoStuff164k(_Standard):
    """COCO-Stuff 164k, from stuffthingmaps with raw ids, or `*_labelTrainIds.png`. Config coco-stuff171."""

    layout, BUILDER_CONFIGS = "coco_stuff164k", _configs("coco_stuff164k")

    @property
    def remedy(self) -> str:
        ids = "these are no raw ids of stuffthingmaps (11, 25, 28 … are none)"
        return f"{ids}; call masks of train ids *_labelTrainIds.png"


class Ade20k(_Standard):
    """ADE20K's scene parsing benchmark (ADEChallengeData2016), 150 classes; 0 is ignored."""

    layout, BUILDER_CONFIGS = "ade20k", _configs("ade20k")


class CityscapesFine(_Standard):
    """Cityscapes, fine annotation, 19 classes: `*_labelTrainIds.png`, or `*_labelIds.png` as they are downloaded."""

    layout, BUILDER_CONFIGS = "cityscapes_fine", _configs("cityscapes_fine")


class ImageCorpus(Corpus, skip_registration=True):  # read by name, it would have neither classes nor masks
    """Your own images, with or without masks (see `folders.py`). With `classes`, mask values must be among them."""

    title = "a folder of images"
    remedy = "name all classes in order, or mark other pixels 255 (65535 where there are more than 255 classes)"

    def __init__(
        self, source: str | os.PathLike | None = None, *, classes: Sequence[str] | None = None, masks=None, **kwargs
    ):
        """`masks`: whether there are masks, where `source` is None. Otherwise as `Corpus`."""
        self._names = None if classes is None else tuple(str(name) for name in classes)
        self._masks = bool(masks)
        super().__init__(source, **kwargs)

    def find(self, source: Path) -> Mapping[str, Sequence[Pair]]:
        count = 255 if self._names is None else len(self._names)
        pairs = find_pairs(source, f"classes+{count}", need_masks=False)
        masked = {pair.label is not None for of_split in pairs.values() for pair in of_split}
        if len(masked) > 1:
            raise UserError(f"all splits have masks or none has, but {source} has both: prepare them one by one")
        self._masks = masked.pop()
        return pairs

    def class_names(self) -> tuple[str, ...] | None:
        return self._names

    @property
    def has_masks(self) -> bool:
        return self._masks


class EmojiScenes(Corpus):
    """Scenes with exact masks of 66 classes, from `SPLIT/images/` (JPEG or PNG) and `SPLIT/labels/*.png` (same stems).

    `source` is a zip file or folder with one folder for each split, or a folder that is one split and names it.
    """

    title = "emoji scenes"
    remedy = f"masks hold 0..{len(SCENE_CLASSES) - 1}, the indices of SCENE_CLASSES"

    def find(self, source: Path) -> Mapping[str, Sequence[Pair]]:
        return find_pairs(source, f"only+{len(SCENE_CLASSES)}", need_masks=True, suffixes=(".jpg", ".jpeg", ".png"))

    def class_names(self) -> tuple[str, ...]:
        return SCENE_CLASSES


BUILDERS = {
    "voc2012": Voc2012,
    "pascal_context": PascalContext,
    "coco_stuff164k": CocoStuff164k,
    "ade20k": Ade20k,
    "cityscapes_fine": CityscapesFine,
    "image_corpus": ImageCorpus,
    "emoji_scenes": EmojiScenes,
}
