"""Labels as a TFDS data set of array_record shards: its features, and the metadata that make files a data set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from maskclip_jax.data.vocabulary import class_palette
from maskclip_jax.label.folder import read_shard

DATASET, VERSION = "labelled", "1.0.0"


def tfds_features(*, confidence: bool, top_k: int, width: int | None):
    """The features of the records: `image`, `label`, `name`, and what was asked for besides.

    `features` are bfloat16 seen as uint16 (TFDS has no bfloat16 on the host): `.view(ml_dtypes.bfloat16)`.
    """
    import tensorflow_datasets as tfds

    raw = tfds.features.Encoding.BYTES
    grey = {"shape": (None, None, 1), "encoding_format": "png"}
    features = {"image": tfds.features.Image(shape=(None, None, 3)), "label": tfds.features.Image(**grey)}
    features["name"] = tfds.features.Text()
    if confidence:
        features["confidence"] = tfds.features.Image(**grey)
    if top_k:
        shape = (None, None, top_k)
        features["classes"] = tfds.features.Tensor(shape=shape, dtype=np.uint8, encoding=raw)
        features["probabilities"] = tfds.features.Tensor(shape=shape, dtype=np.float16, encoding=raw)
    if width:
        features["features"] = tfds.features.Tensor(shape=(None, None, width), dtype=np.uint16, encoding=raw)
    return tfds.features.FeaturesDict(features)


def write_tfds_metadata(out: Path, shards: int, features: dict[str, Any], names: Sequence[str]) -> None:
    """Makes the shards a data set: `tfds:labelled?split=train&label=label&name=name&data_dir=OUT/records`."""
    import tensorflow_datasets as tfds

    folder = out / "records" / DATASET / VERSION
    template = tfds.core.ShardedFileTemplate(
        dataset_name=DATASET, data_dir=folder, split="train", filetype_suffix="array_record"
    )
    found: list[Any] = [read_shard(out, shard, shards) for shard in range(shards)]  # all of them are there
    split = tfds.core.SplitInfo(
        name="train",
        shard_lengths=[shard["images"] for shard in found],
        num_bytes=sum(shard["bytes"] for shard in found),
        filename_template=template,
    )
    metadata = tfds.core.MetadataDict({"classes": list(names), "palette": class_palette(names).tolist()})
    tfds.folder_dataset.write_metadata(
        data_dir=folder, features=tfds_features(**features), split_infos=[split], check_data=False, metadata=metadata
    )
