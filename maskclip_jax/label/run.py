"""Masks for a whole corpus: over all hosts and devices, resumable at the image, the same bytes however often it stops.

The corpus is cut into shards of consecutive images; worker i of n takes shards i, i + n, …. A shard is read in blocks,
and what is computed together is a function of the block alone: shapes come from a fixed ladder (`bucket_shape`),
batches from the block's own images. So a run that was killed computes an image in the very batch that an
uninterrupted one does, and two workers on one shard write the same.

Per block: threads read and resize ahead, the devices compute one batch while another is copied back, and threads make
pixels of scores and write files (`label_store.py` says which).
"""

from __future__ import annotations

import collections
import dataclasses
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from maskclip_jax.data.preprocess import ResizedImage
from maskclip_jax.data.schema import check_choices, check_ranges
from maskclip_jax.data.whole_files import changed_at, is_count
from maskclip_jax.errors import UserError
from maskclip_jax.label.corpus import Corpus, Read
from maskclip_jax.label.folder import damaged_shards, read_shard, shard_file, undo_shard, write_shard
from maskclip_jax.label.labellers import Labeller, labeller_of
from maskclip_jax.label.store import Entry, FileStore, Labelled, PartGone, RecordStore, Store
from maskclip_jax.segment.grid import GridScores
from maskclip_jax.segment.pixels import needs_every_pixel
from maskclip_jax.segment.settings import PredictionSettings

BATCHES_OF_A_BLOCK = 8  # a block is this many batches' worth of images: few are half empty, and it fits memory


@dataclasses.dataclass(frozen=True)
class LabelOptions:
    """What to write.

    Fields:
      form: "png" (files, the tree mirrored) or "records" (array_record shards of a TFDS data set).
      confidence: the probability of each pixel's class, in 255ths.
      top_k: this many most probable classes of each cell of the model's grid; 0 is none.
      features: the unit features of each cell, in bfloat16.
      shard_size: images of a shard.
      on_error: "skip" lists damaged images and goes on; "stop" raises.
    """

    form: str = "png"
    confidence: bool = False
    top_k: int = 0
    features: bool = False
    shard_size: int = 1000
    on_error: str = "skip"

    def __post_init__(self):
        check_choices(self, {"form": ("png", "records"), "on_error": ("skip", "stop")})
        check_ranges(self, {"shard_size": (1, 2**62), "top_k": (0, 2**16)})


def check_options(settings: PredictionSettings, options: LabelOptions) -> None:
    """Raises UserError where the options ask for what these settings cannot give."""
    if needs_every_pixel(settings):
        raise UserError("a corpus is labelled from one reading of each image, got PAMR or several views: leave them")
    if settings.options.windows is not None and (options.top_k or options.features):
        raise UserError("top-k and features are those of whole images, got --window besides: leave one out")
    if options.top_k > len(settings.names):
        raise UserError(f"top-k is at most the {len(settings.names)} classes, got {options.top_k}: take fewer")


def label_shard(
    corpus: Corpus,
    settings: PredictionSettings | Labeller,
    options: LabelOptions,
    out: Path,
    shard: int,
    *,
    scratch: Path | None = None,
    made_with: str = "",
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Labels what of one shard is not labelled yet, and writes the shard's JSON, which it returns.

    Args:
      settings: how a CLIP reads them, or what else labels.
      corpus: all images. The shard is images `shard · shard_size` … of it.
      scratch: folder where records wait until their shard is whole; None is in `out`.
      made_with: `settings_digest` of what the folder was begun with.
      progress: called with the number of images of this shard done so far.

    Raises:
      UserError: an image is damaged and `on_error` is "stop", two have one name, or nothing can be written.
    """
    labeller, shards = labeller_of(settings), shard_count(corpus, options)
    indices = range(len(corpus))[shard * options.shard_size : (shard + 1) * options.shard_size]
    if options.form == "records":
        wanted = record_features(labeller, options)
        store: Store = RecordStore(out, scratch or out, labeller.names, shard, shards, wanted)
    else:
        cells = bool(options.top_k or options.features)
        store = FileStore(out, labeller.names, confidence=options.confidence, cells=cells)
    size = BATCHES_OF_A_BLOCK * labeller.batch_size
    blocks = [indices[start : start + size] for start in range(0, len(indices), size)]
    workers = min(os.cpu_count() or 1, 16)
    with ThreadPoolExecutor(workers, "read") as readers, ThreadPoolExecutor(workers, "write") as writers:
        work = _Labelling(corpus, labeller, options, store, readers, writers, 4 * workers)
        try:
            for block, reading in work.read_ahead(blocks):
                work.label(block, reading)
                if progress is not None:
                    progress(len(work.entries) + len(work.skipped))
            work.wait_for_writers(0)
        except BaseException:
            readers.shutdown(wait=False, cancel_futures=True)
            writers.shutdown(wait=False, cancel_futures=True)
            raise
    entries, skipped, names = work.entries, work.skipped, work.names
    done = [names[i] for i in indices if i not in skipped]
    if len(set(done)) < len(done):
        twice = next(name for name, count in collections.Counter(done).items() if count > 1)
        raise UserError(f"images have different names, but two are called {twice!r}: name another feature, or none")
    try:
        sealed = store.seal(done)
    except PartGone as error:  # another worker has sealed this shard meanwhile, and cleared away what waited
        if (found := read_shard(out, shard, shards)) is None:
            raise UserError(f"records that waited for shard {shard} have gone: run the same command again") from error
        store.clear()
        return found
    pixels = sum((entries[name].pixels for name in done), np.zeros(len(labeller.names), np.int64))
    found = {
        "shard": shard,
        "first": indices.start,
        "images": len(done),
        "bytes": sum(entries[name].size for name in done),
        "pixels": dict(zip(labeller.names, pixels.tolist(), strict=True)),
        "skipped": [{"name": name, "reason": reason, "index": i} for i, (name, reason) in sorted(skipped.items())],
        "settings": made_with,
        "sources": _sums(corpus, work, [i for i in indices if i not in skipped]),
        "files": sealed or {path: digest for name in done for path, digest in entries[name].files.items()},
    }
    write_shard(out, shard, shards, found)
    store.clear()
    return found


def review(
    corpus: Corpus,
    settings: PredictionSettings | Labeller,
    options: LabelOptions,
    out: Path,
    mine: Sequence[int],
    progress: Callable[[int], None] | None = None,
) -> list[int]:
    """Which of the shards `mine` are to be labelled (again): also what was damaged, and images that can be read now.

    And those of images that are no longer what their masks were made of, which a warning says. `progress` is called
    with the number of shards looked at.
    """
    shards, read = shard_count(corpus, options), _reader(corpus, labeller_of(settings), options)
    again = set(damaged_shards(out, mine, shards, progress))
    changed: list[str] = []
    for shard in mine:
        if (found := read_shard(out, shard, shards)) is None:
            continue
        indices = [e["index"] for e in found["skipped"] if is_count(e.get("index"), len(corpus) - 1)]
        if corpus.knows_names and (names := _changed(corpus, options, out, shard, found, set(indices))):
            changed += names
            again.add(shard)
        if any(not isinstance(read(index), Exception) for index in indices):
            again.add(shard)
    if changed:
        what = f"{len(changed)} images have changed since their masks were made, the first {changed[0]}"
        warnings.warn(f"{what}: labelled again", stacklevel=2)
    for shard in again:
        undo_shard(out, shard, shards)
    for name in changed:
        _mask(out, name).unlink(missing_ok=True)
    return [shard for shard in mine if read_shard(out, shard, shards) is None]


def _changed(
    corpus: Any, options: LabelOptions, out: Path, shard: int, found: dict[str, Any], besides: set[int]
) -> list[str]:
    """Names of a finished shard's images whose files are others than those that were labelled."""
    indices = range(len(corpus))[shard * options.shard_size : (shard + 1) * options.shard_size]
    done, sums = changed_at(out / shard_file(shard, shard_count(corpus, options))), found.get("sources", {})

    def is_still(index: int) -> bool:
        name = corpus.name(index)
        made = changed_at(_mask(out, name)) if options.form == "png" else done
        return index in besides or corpus.is_still(index, sums.get(name), made)

    with ThreadPoolExecutor(min(os.cpu_count() or 1, 16)) as pool:
        return [corpus.name(i) for i, still in zip(indices, pool.map(is_still, indices), strict=True) if not still]


def _mask(out: Path, name: str) -> Path:
    return out / "labels" / f"{name}.png"


def _sums(corpus: Any, work: _Labelling, indices: Sequence[int]) -> dict[str, list]:
    """What the images' files are, by name; of those that an earlier run has labelled, too."""
    if not corpus.knows_names:
        return {}
    return {work.names[i]: work.sums.get(i) or corpus.sum(i) for i in indices}


def shard_count(corpus: Corpus, options: LabelOptions) -> int:
    """How many shards there are."""
    return -(-len(corpus) // options.shard_size)


def record_features(settings: Any, options: LabelOptions) -> dict[str, Any]:
    """Arguments of `label_records.tfds_features`."""
    width = labeller_of(settings).settings.config.embed_dim if options.features else None
    return {"confidence": options.confidence, "top_k": options.top_k, "width": width}


Reading = list[Future]  # of (Read, ResizedImage | None), or of the Exception that came instead


def _reader(
    corpus: Corpus, labeller: Any, options: LabelOptions
) -> Callable[[int], tuple[Read, ResizedImage | None] | Exception]:
    encoded = options.form == "records"

    def read(index: int) -> tuple[Read, ResizedImage | None] | Exception:
        try:
            found = corpus.read(index, encoded=encoded)
            resized = labeller.resize(found.image)
            if resized is None:
                return found, None
            return found._replace(image=np.empty((0, 0, 3), np.uint8)), resized  # pixels of photos fill memory
        except Exception as error:  # decoders raise anything on a damaged file; the caller names the image
            return error

    return read


class _Labelling:
    """What is known of a shard's images while it is labelled: their names, what was saved, what was left out."""

    def __init__(
        self,
        corpus: Corpus,
        labeller: Any,
        options: LabelOptions,
        store: Store,
        readers: ThreadPoolExecutor,
        writers: ThreadPoolExecutor,
        most_saving: int,
    ):
        self.corpus, self.labeller, self.options, self.store = corpus, labeller, options, store
        self.entries: dict[str, Entry] = {}
        self.skipped: dict[int, tuple[str, str]] = {}
        self.names: dict[int, str] = {}
        self.sums: dict[int, list] = {}
        self._readers, self._writers, self._most_saving = readers, writers, most_saving
        self._saving: collections.deque[tuple[str, Future[Entry]]] = collections.deque()

    def read_ahead(self, blocks: Sequence[range]) -> Iterator[tuple[range, Reading]]:
        """Blocks in which something is missing, all images of each being read; one block is read ahead."""

        def known(index: int) -> tuple[str, Entry | None]:
            name = self.corpus.name(index)  # pyright: ignore[reportAttributeAccessIssue]: called where it knows_names
            entry = self.store.recall(name)
            newer = entry is not None and self.corpus.changed_at(index) > self.store.made_at(name)  # pyright: ignore[reportAttributeAccessIssue]: as above
            return name, None if newer else entry

        read = _reader(self.corpus, self.labeller, self.options)
        waiting: collections.deque[tuple[range, Reading]] = collections.deque()
        for block in blocks:
            if self.corpus.knows_names:
                for index, (name, entry) in zip(block, self._readers.map(known, block), strict=True):
                    self.names[index] = name
                    if entry is not None:
                        self.entries[name] = entry
            if any(self.names.get(index) not in self.entries for index in block):
                waiting.append((block, [self._readers.submit(read, index) for index in block]))
            if len(waiting) > 1:
                yield waiting.popleft()
        yield from waiting

    def label(self, block: range, reading: Reading) -> None:
        """Computes what is missing of one block and gives it to the writers; some is still being saved afterwards."""
        images: list[tuple[Read, ResizedImage | None]] = []
        for index, future in zip(block, reading, strict=True):
            found = future.result()
            if isinstance(found, Exception):
                self._skip(index, found)
                continue
            images.append(found)
            if found[0].sum is not None:
                self.sums[index] = found[0].sum
            name = self.names.setdefault(index, found[0].name)
            if not self.corpus.knows_names and (entry := self.store.recall(name)) is not None:
                self.entries[name] = entry
        wanted = {row for row, (found, _) in enumerate(images) if found.name not in self.entries}
        top_k, features = self.options.top_k, self.options.features
        for row, scores, cells in self.labeller.scores(images, wanted, top_k=top_k, features=features):
            self._saving.append((images[row][0].name, self._writers.submit(self._save, *images[row], scores, cells)))
            self.wait_for_writers(self._most_saving)  # full-size maps fill memory

    def wait_for_writers(self, most: int) -> None:
        """Until at most so many images are still to be saved. Raises what their writer raised."""
        while len(self._saving) > most:
            name, future = self._saving.popleft()
            self.entries[name] = future.result()

    def _skip(self, index: int, error: Exception) -> None:
        name = self.names.setdefault(index, f"number {index}")  # of a damaged record not even the name is known
        reason = " ".join(str(error).split()) or type(error).__name__
        if self.options.on_error == "stop":
            raise UserError(f"{name} cannot be labelled: {reason} (--on-error skip goes on)") from error
        self.skipped[index] = name, reason

    def _save(
        self, found: Read, resized: ResizedImage | None, scores: GridScores, cells: dict[str, np.ndarray]
    ) -> Entry:
        maps, names = self.labeller.maps(scores), self.labeller.names
        confidence = np.rint(255 * maps.confidence.clip(0, 1)).astype(np.uint8) if self.options.confidence else None
        if "classes" in cells:
            cells["classes"] = cells["classes"].astype(np.uint8 if len(names) <= 256 else np.uint16)
            cells["probabilities"] = cells["probabilities"].astype(np.float16)
        geometry = self.labeller.geometry(resized)
        return self.store.save(Labelled(found.name, found.encoded, maps.labels, confidence, cells, geometry))
